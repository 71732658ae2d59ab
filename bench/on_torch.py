"""Who does the work of a row on torch parameters: torch, `fusedstep.torch`, fusedstep."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from bench.methods import Method
from bench.work import Step, Work

StepMaker = Callable[[list[Any]], Step]  # of parameters, which get their gradients later

HAS_TORCH = importlib.util.find_spec("torch") is not None

# (arguments of torch's class, `foreach` of `clip_grad_norm_`)
FORMS: dict[str, tuple[dict[str, bool], bool | None]] = {
    "fused": ({"fused": True}, None),
    "fused, foreach clip": ({"fused": True}, True),
    "foreach": ({"foreach": True}, True),
    "foreach capturable": ({"foreach": True, "capturable": True}, True),
    "for-loop": ({"foreach": False}, False),
    "default": ({}, None),
}


def parameters(work: Work, with_gradients: bool = True) -> list[Any]:
    """torch Parameters in the work's memory, each with its gradient there."""
    import torch

    params = [torch.nn.Parameter(torch.as_tensor(p)) for p in work.split(work.p)]
    if with_gradients:
        for p, g in zip(params, work.split(work.g), strict=True):
            p.grad = torch.as_tensor(g)
    return params


def object_on_torch(work: Work) -> Step:
    """fusedstep's object that knows no framework."""
    options = {**work.method.options, "grad_clip_norm": work.clip}
    return work.method.optimizer(parameters(work), **options).step


# --- fusedstep.torch ----------------------------------------------------------------------------


def adapter(work: Work) -> Step:
    return make_adapter(work, parameters(work)).step


def adapter_with_own_states(work: Work) -> Step:
    """As it is used: the states are those that it makes itself, and not in cache from others."""
    return _new_adapter(work, parameters(work)).step


def make_adapter(work: Work, params: list[Any], **options: Any) -> Any:
    """The optimizer of `fusedstep.torch`, with the states of the work."""
    return _with_states(_new_adapter(work, params, **options), work, params)


def _new_adapter(work: Work, params: list[Any], **options: Any) -> Any:
    import fusedstep.torch

    made = getattr(fusedstep.torch, work.method.optimizer.__name__)
    return made(params, **work.method.options, grad_clip_norm=work.clip, **options)


def _with_states(opt: Any, work: Work, params: list[Any]) -> Any:
    import torch

    method: Method = work.method
    for name, flat in zip(method.torch_state.values(), work.states, strict=True):
        for p, state in zip(params, work.split(flat), strict=True):
            opt.state[p][name] = torch.as_tensor(state)
    # Where torch itself keeps its counts: in these forms the kernels read them.
    beside = any(opt.defaults.get(form) for form in ("fused", "capturable"))
    for name, number in method.torch_scalars.items():
        for p in params:
            opt.state[p][name] = torch.tensor(number, device=p.device if beside else "cpu")
    return opt


# --- torch --------------------------------------------------------------------------------------


def forms(work: Work, *names: str) -> dict[str, Step]:
    """torch's class in the forms that are named, or else in all that it has."""
    if not HAS_TORCH:
        return {}
    names = names or work.method.torch_forms
    return {f"torch {name}": optimizer(work, name) for name in names}


def optimizer(work: Work, form: str) -> Step:
    """torch's step; with a clip after `clip_grad_norm_`, as documented."""
    return torch_step(work, parameters(work), form)


def torch_step(work: Work, params: list[Any], form: str) -> Step:
    opt = _make_torch(work, params, form)
    if work.clip is None:
        return opt.step
    clip = _clip(work, params, form)

    def clip_and_step() -> None:
        clip()
        opt.step()

    return clip_and_step


def _make_torch(work: Work, params: list[Any], form: str) -> Any:
    import torch

    arguments, _ = FORMS[form]
    opt = getattr(torch.optim, work.method.torch)(params, **work.method.torch_options, **arguments)
    return _with_states(opt, work, params)


def _clip(work: Work, params: list[Any], form: str) -> Step:
    import torch

    _, foreach = FORMS[form]
    limit = work.clip
    return lambda: torch.nn.utils.clip_grad_norm_(params, limit, foreach=foreach)


# --- GradScaler ---------------------------------------------------------------------------------


def scaled_adapter(work: Work) -> Step:
    """The scaler looks for inf and NaN, our step unscales."""
    opt, scaler = make_adapter(work, parameters(work)), _scaler(work)

    def step() -> None:
        scaler.step(opt)
        scaler.update()

    return step


def scaled_optimizer(work: Work, form: str) -> Step:
    """Unscale, clip, step, as documented."""
    params = parameters(work)
    opt, clip, scaler = _make_torch(work, params, form), _clip(work, params, form), _scaler(work)

    def step() -> None:
        scaler.unscale_(opt)
        clip()
        scaler.step(opt)
        scaler.update()

    return step


def _scaler(work: Work) -> Any:
    import torch

    scaler = torch.amp.GradScaler("cpu", init_scale=work.loss_scale)
    scaler.scale(torch.zeros(()))  # makes the scaler's tensors, as the first loss would
    return scaler


# --- gradients from autograd --------------------------------------------------------------------


class Training:
    """A network of square layers whose weights and biases are a work's parameters."""

    def __init__(self, work: Work, batch: int, make_step: StepMaker) -> None:
        import torch

        generator = torch.Generator().manual_seed(0)
        self._input = torch.randn(batch, work.shapes[0][0], generator=generator)
        self._params = parameters(work, with_gradients=False)
        self._step = make_step(self._params)
        self._loss: Any = None

    def forward(self) -> None:
        from torch.nn import functional as F

        for p in self._params:
            p.grad = None
        x = self._input
        for weight, bias in zip(self._params[::2], self._params[1::2], strict=True):
            # Normalized, so that no layer's gradients vanish, whatever the weights are.
            x = x + F.gelu(F.layer_norm(F.linear(x, weight, bias), x.shape[1:]))
        self._loss = x.square().sum()

    def backward_and_step(self) -> None:
        self._loss.backward()
        self._step()

    def run(self) -> None:
        self.forward()
        self.backward_and_step()
