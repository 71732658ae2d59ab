"""Who does the work of a row on NumPy arrays: fusedstep, and NumPy itself."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.work import Step, Work


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


def _options(work: Work) -> dict[str, Any]:
    return {**work.method.options, "grad_clip_norm": work.clip}


def numpy_loop(work: Work) -> Step:
    """As one writes it by hand."""
    states = (
        zip(*map(work.split, work.states), strict=True) if work.states else [()] * len(work.shapes)
    )
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
