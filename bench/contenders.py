"""Who does the work of a row: fusedstep, torch, plain NumPy."""

from __future__ import annotations

import importlib.util
from typing import Any

import fusedstep as fs
import numpy as np

from bench.work import DECAY, LR, MOMENTUM, Array, Step, Work

HAS_TORCH = importlib.util.find_spec("torch") is not None
TORCH_FORMS = {
    "torch fused": {"fused": True},
    "torch foreach": {"foreach": True},
    "torch for-loop": {"foreach": False},
}


def function(work: Work) -> Step:
    """The functional form, on NumPy arrays and with the shared velocities."""
    params, grads, velocity = (work.split(a) for a in (work.p, work.g, work.v))
    options: dict[str, Any] = {"lr": LR, "weight_decay": DECAY, "grad_clip_norm": work.clip}
    if not work.momentum:
        return lambda: fs.fused_sgd_step(params, grads, **options)
    return lambda: fs.fused_nesterov_step(params, grads, velocity, momentum=MOMENTUM, **options)


def single(work: Work) -> Step:
    """The functional form on one bare array, written as a user would."""
    p, g, v = work.p, work.g, work.v
    return lambda: fs.fused_nesterov_step(p, g, v, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)


def optimizer(work: Work) -> Step:
    """The object, on NumPy arrays."""
    opt = fs.MomentumNesterov(work.split(work.p), **_options(work))
    grads = work.split(work.g)
    return lambda: opt.step(grads)


def optimizer_on_torch(work: Work) -> Step:
    """The object, on torch Parameters that hold their gradients."""
    opt = fs.MomentumNesterov(_torch_parameters(work), **_options(work))
    return opt.step


def _options(work: Work) -> dict[str, Any]:
    return {
        "lr": LR,
        "momentum": MOMENTUM,
        "weight_decay": DECAY,
        "grad_clip_norm": work.clip,
    }


def torch_forms(work: Work) -> dict[str, Step]:
    """torch.optim.SGD in its three forms; with a clip after `clip_grad_norm_`, as documented."""
    if not HAS_TORCH:
        return {}
    return {name: torch_sgd(work, **form) for name, form in TORCH_FORMS.items()}


def torch_sgd(work: Work, **form: bool) -> Step:
    import torch

    params = _torch_parameters(work)
    momentum = {"momentum": MOMENTUM, "nesterov": True} if work.momentum else {}
    opt = torch.optim.SGD(params, lr=LR, weight_decay=DECAY, **momentum, **form)
    if work.momentum:
        for p, v in zip(params, work.split(work.v), strict=True):
            opt.state[p]["momentum_buffer"] = torch.from_numpy(v)
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
    tensors = list(zip(*(work.split(a) for a in (work.p, work.g, work.v)), strict=True))

    def update(p: Array, g: Array, v: Array, scale: np.float32) -> None:
        g = scale * g + np.float32(DECAY) * p
        if work.momentum:
            v *= np.float32(MOMENTUM)
            v += g
            g += np.float32(MOMENTUM) * v
        p -= np.float32(LR) * g

    def step() -> None:
        scale = 1.0
        if work.clip is not None:
            norm = np.sqrt(sum(float(np.vdot(g, g)) for _, g, _ in tensors))
            scale = min(1.0, work.clip / norm)
        for p, g, v in tensors:
            update(p, g, v, np.float32(scale))

    return step
