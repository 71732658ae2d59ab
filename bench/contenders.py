"""Who does the work of a row: fusedstep, torch, plain NumPy."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

from bench.work import Step, Work

HAS_TORCH = importlib.util.find_spec("torch") is not None
TORCH_FORMS = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "for-loop": {"foreach": False},
}


def function(work: Work) -> Step:
    """The functional form, on NumPy arrays and with the shared states."""
    method, (params, grads) = work.method, (work.split(a) for a in (work.p, work.g))
    buffers = dict(zip(method.torch_state, map(work.split, work.states), strict=True))
    options = {**method.options, "grad_clip_norm": work.clip}
    if not method.torch_scalars:
        return lambda: method.function(params, grads, **buffers, **options)
    state: dict[str, Any] = dict(buffers)

    def step() -> None:
        nonlocal state
        state = method.function(params, grads, **state, **options).state

    return step


def function_with_own_state(work: Work) -> Step:
    """The functional form with the state that it makes itself, as the object does.

    The shared states are still in cache from the contender before; a state of its own is not.
    """
    method, (params, grads) = work.method, (work.split(a) for a in (work.p, work.g))
    options = {**method.options, "grad_clip_norm": work.clip}
    state: dict[str, Any] = {}

    def step() -> None:
        nonlocal state
        state = method.function(params, grads, **state, **options).state

    return step


def single(work: Work) -> Step:
    """The functional form on one bare array, written as a user would."""
    function, options = work.method.function, work.method.options
    p, g, (v,) = work.p, work.g, work.states
    return lambda: function(p, g, v, **options)


def optimizer(work: Work) -> Step:
    """The object, on NumPy arrays."""
    opt = work.method.optimizer(work.split(work.p), **_options(work))
    grads = work.split(work.g)
    return lambda: opt.step(grads)


def optimizer_on_torch(work: Work) -> Step:
    """The object, on torch Parameters that hold their gradients."""
    return work.method.optimizer(_torch_parameters(work), **_options(work)).step


def _options(work: Work) -> dict[str, Any]:
    return {**work.method.options, "grad_clip_norm": work.clip}


def torch_forms(work: Work) -> dict[str, Step]:
    """torch's class in its forms; with a clip after `clip_grad_norm_`, as documented."""
    if not HAS_TORCH:
        return {}
    forms = work.method.torch_forms
    return {f"torch {form}": torch_optimizer(work, **TORCH_FORMS[form]) for form in forms}


def torch_optimizer(work: Work, **form: bool) -> Step:
    import torch

    method, params = work.method, _torch_parameters(work)
    opt = getattr(torch.optim, method.torch)(params, **method.torch_options, **form)
    for k, p in enumerate(params):
        for name, flat in zip(method.torch_state.values(), work.states, strict=True):
            opt.state[p][name] = torch.from_numpy(work.split(flat)[k])
        for name, number in method.torch_scalars.items():
            opt.state[p][name] = torch.tensor(number)
    if work.clip is None:
        return opt.step

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(params, work.clip, foreach=form.get("foreach"))
        opt.step()

    return clip_and_step


def _torch_parameters(work: Work) -> list[Any]:
    import torch

    params = [torch.nn.Parameter(torch.from_numpy(p)) for p in work.split(work.p)]
    for p, g in zip(params, work.split(work.g), strict=True):
        p.grad = torch.from_numpy(g)
    return params


def numpy_loop(work: Work) -> Step:
    """As one writes it by hand."""
    states = zip(*map(work.split, work.states), strict=True) if work.states else [()] * work.tensors
    tensors = list(zip(work.split(work.p), work.split(work.g), map(list, states), strict=True))
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        scale = 1.0
        if work.clip is not None:
            norm = np.sqrt(sum(float(np.vdot(g, g)) for _, g, _ in tensors))
            scale = min(1.0, work.clip / norm)
        for p, g, own in tensors:
            work.method.by_hand(p, np.float32(scale) * g, own, steps)

    return step
