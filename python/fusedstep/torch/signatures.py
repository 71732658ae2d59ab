"""Constructors in torch's order of arguments, made from the declarations of the optimizers."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

import fusedstep
from fusedstep.hyperparameters import Hyperparameter
from fusedstep.ranges import Check, Flag, shown


class Extra(NamedTuple):
    """An argument that belongs to torch, not to the rule."""

    annotation: str
    default: Any
    doc: str


# Arguments of torch's classes that choose among its implementations. They are kept in the param
# groups, as torch keeps them, so that checkpoints can go back.
SWITCHES = {
    "foreach": Extra("bool | None", None, "Accepted, without effect: there is one implementation."),
    "fused": Extra("bool | None", None, "Accepted, without effect: the step is always fused."),
    "capturable": Extra(
        "bool", False, "Accepted, without effect: a step on a GPU can always be captured."
    ),
    "differentiable": Extra("bool", False, "Must be False: autograd cannot see into the step."),
}

ATTRIBUTES = {
    "master_weights": Extra(
        "bool",
        False,
        "True keeps a float32 master of each float16 or bfloat16 parameter (`master_param` in its "
        "state). The step updates the master and writes it to the parameter, rounded once, in the "
        "same pass. What others write into the parameter goes into the master, too; only not "
        "through `.data`, which autograd cannot see.",
    ),
    "norm_in_backward": Extra(
        "bool",
        False,
        "True measures each gradient in the backward pass, as soon as it is complete and while it "
        "is in cache, so that the step need not read it for the norm. The clip stays exact. "
        "Gradients may change afterwards, but not through `.grad.data`, which autograd cannot see.",
    ),
    "fused_unscale": Extra(
        "bool | None",
        None,
        "Whether `GradScaler` leaves it to the step to unscale the gradients, which saves a pass. "
        "None: if a group clips. Set it to False where something else must see unscaled "
        "gradients before the step.",
    ),
}


@dataclass(frozen=True)
class Form:
    """How an optimizer looks in torch.

    Attributes:
        optimizer: The class that declares its hyper-parameters and rules.
        positional: Arguments in torch's order, as far as they may be given by position.
        switches: Those of torch's implementation switches that its class has.
        buffers: The core's state buffers -> torch's names of them.
        scalars: State that is a number and that torch's class has, by torch's names.
        fixed: Hyper-parameters of torch's class that the class settles; they stand in its groups.
    """

    optimizer: type[fusedstep.Optimizer]
    positional: tuple[str, ...]
    switches: tuple[str, ...]
    buffers: Mapping[str, str]
    scalars: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def of_group(self) -> tuple[str, ...]:
        """What a param group holds."""
        hypers = (hyper.name for hyper in self.optimizer.declaration.of_group())
        return (*hypers, *self.switches)

    @property
    def attributes(self) -> tuple[str, ...]:
        """What an optimizer holds as attributes."""
        hypers = (hyper.name for hyper in self.optimizer.declaration.of_call())
        return (*hypers, *ATTRIBUTES)

    def arguments(self) -> dict[str, Hyperparameter | Extra]:
        """All arguments of the constructor after `params`, in their order."""
        hypers = {hyper.name: hyper for hyper in self.optimizer.declaration.hypers}
        extras = {name: SWITCHES[name] for name in self.switches} | ATTRIBUTES
        known: dict[str, Hyperparameter | Extra] = {**hypers, **extras}
        first = {name: known[name] for name in self.positional}
        # torch's own keyword-only ones next; what it does not have comes last
        own = [name for name in ("maximize", *self.switches) if name not in first]
        return first | {name: known[name] for name in own} | known


def make_initializer(owner: type, form: Form) -> Callable[..., None]:
    """`__init__` of a class, with a signature that tells its arguments and defaults."""
    arguments = form.arguments()
    parameters = [
        inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
        inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD),
    ]
    for name, argument in arguments.items():
        kind = (
            inspect.Parameter.POSITIONAL_OR_KEYWORD
            if name in form.positional
            else inspect.Parameter.KEYWORD_ONLY
        )
        parameters.append(inspect.Parameter(name, kind, default=argument.default))
    signature = inspect.Signature(parameters)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{owner.__name__}: {error}") from None
        bound.apply_defaults()
        given = bound.arguments
        self._set_up(
            given["params"],
            {name: given[name] for name in form.of_group},
            {name: given[name] for name in form.attributes},
        )

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    __init__.__qualname__ = f"{owner.__qualname__}.__init__"
    return __init__


def _flag(optional: bool) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if not (optional and value is None):
            Flag()(name, value)

    return check


def check_first(form: Form, defaults: Mapping[str, Any]) -> None:
    """What a constructor refuses: values out of range, and what does not exist here."""
    checks: dict[str, Check] = {h.name: h.check for h in form.optimizer.declaration.hypers}
    for name in form.of_group:
        if name in SWITCHES:
            _flag(SWITCHES[name].default is None)(name, defaults[name])
        else:
            _check_number(name, checks[name], defaults[name])
    if defaults.get("differentiable"):
        raise ValueError(
            "differentiable: autograd cannot see into the fused step; use the class of torch.optim"
        )
    form.optimizer._check_form(defaults)


def _check_number(name: str, check: Check, value: Any) -> None:
    """Numbers and tensors of one number; torch's schedulers set them in the groups."""
    if name == "betas" and isinstance(value, (tuple, list)):
        value = tuple(plain(name, beta) for beta in value)
    elif isinstance(value, torch.Tensor):
        value = plain(name, value)
    elif callable(value) and not isinstance(value, numbers.Number):
        raise TypeError(
            f"{name}: expected a number or a tensor of one, got {shown(value)}; "
            "a scheduler of torch.optim.lr_scheduler changes it from step to step"
        )
    check(name, value)


def plain(name: str, value: Any) -> Any:
    """A tensor of one number as that number. Waits for one on a GPU.

    Raises:
        ValueError: If it has more or fewer elements.
        RuntimeError: If it is on a GPU whose stream is being captured into a CUDA graph, which the
            attempt to read it would end.
    """
    if not isinstance(value, torch.Tensor):
        return value
    if value.numel() != 1:
        shape = tuple(value.shape)
        raise ValueError(f"{name}: expected a tensor of one number, got one of shape {shape}")
    if value.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{name}: a tensor on a GPU cannot be read by the host while a CUDA graph is captured; "
            "lr and rescale_grad may be such tensors, which the graph reads at each replay"
        )
    return value.item()


def with_numbers(group: Mapping[str, Any]) -> Mapping[str, Any]:
    """The group, with numbers for the tensors that `betas` may hold in torch."""
    betas = group.get("betas")
    if betas is None or not any(isinstance(beta, torch.Tensor) for beta in betas):
        return group
    return {**group, "betas": tuple(plain("betas", beta) for beta in betas)}
