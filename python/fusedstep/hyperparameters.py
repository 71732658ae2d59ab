"""The hyper-parameters: type, range and meaning of each, declared once.

An optimizer class lists those it has, with their defaults, in its annotated `__init__`. `declared`
reads them from there, and the function form, the stub, the docs and all checks follow from that.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, NamedTuple, SupportsFloat, TypeAlias, get_type_hints

import numpy as np

from fusedstep import _core
from fusedstep.ranges import Check, Choice, Flag, Real, shown
from fusedstep.schedules import Schedule

Tree: TypeAlias = Any
"""One array, or a nested dict, list, tuple or other iterable of arrays."""

Params: TypeAlias = Tree | Iterable[Mapping[str, Any]] | None
"""A tree, a list of param groups, or None."""


def read_number(name: str, buffer: Any) -> float:
    """The one element of an array."""
    try:
        return _core.read_scalar(buffer)
    except (TypeError, ValueError, BufferError) as error:
        raise type(error)(f"{name}: {error}") from None


class LearningRateRange(Real):
    """What `lr` may be, and the number that it is now."""

    def __call__(self, name: str, value: Any) -> float:
        """The learning rate now; functions of t are refused."""
        return self.at(name, value, None)

    def at(self, name: str, lr: Any, t: int | None) -> float:
        """The learning rate after `t` applied steps; functions of t are refused without one."""
        if isinstance(lr, Schedule):
            return self.number(name, lr.current_lr)
        if not isinstance(lr, (numbers.Number, np.generic, str)) and lr is not None:
            if _core.is_array(lr):
                return self.number(name, read_number(name, lr))
            if callable(lr):
                return self._call(name, lr, t)
        return self.number(name, lr)

    def _call(self, name: str, lr: Callable[[int], Any], t: int | None) -> float:
        if t is None:
            raise TypeError(
                f"{name}: a call cannot know how many steps came before it; pass {name}=f(t), or "
                "use an optimizer object, which counts"
            )
        value = lr(t)
        if callable(value):
            raise TypeError(f"{name}: the function of t returned {shown(value)}, no number")
        return self.at(name, value, None)


lr_range = LearningRateRange(0.0)
weight_decay_range = Real(0.0)
_FRACTION = Real(0.0, 1.0)
_LIMIT = Real(0.0, math.inf, "(]", optional=True)

LearningRate = Annotated[
    SupportsFloat | Schedule | Callable[[int], SupportsFloat],
    lr_range,
    "Learning rate, >= 0. A number; a buffer of one element, read at every step; a schedule "
    "object (its `current_lr`); or a function of t, the number of steps applied so far, which must "
    "be pure: it is evaluated again to save and to load.",
]
LearningRateNow = Annotated[
    SupportsFloat | Schedule,
    lr_range,
    "Learning rate, >= 0. A number; a buffer of one element; or a schedule object (its "
    "`current_lr`). A function of t belongs to the optimizer objects, which count steps.",
]
MomentumFactor = Annotated[
    float, _FRACTION, "Share of the velocity that a step keeps, in [0, 1), dimensionless."
]
NextMomentum = Annotated[
    float | None,
    Real(0.0, 1.0, optional=True),
    "The momentum of the coming step, in [0, 1), which the look-ahead of Nesterov's form uses "
    "when the momentum follows a schedule. None: the same as `momentum`.",
]
Dampening = Annotated[
    float,
    Real(0.0, 1.0, "[]"),
    "In [0, 1]: the gradient enters the velocity with weight `1 - dampening`. Equal to `momentum` "
    "it makes the velocity an average of the gradients (unit gain).",
]
DampenFirstStep = Annotated[
    bool,
    Flag(),
    "True applies `dampening` to an array's first step as well (CNTK); False takes `v = g` there, "
    "as PyTorch does.",
]
LrInVelocity = Annotated[
    bool,
    Flag(),
    "False: `v = mu v + g; p -= lr ...` (PyTorch, braintools). True: `v = mu v - lr g; p += ...` "
    "(Keras, MXNet). They differ once `lr` changes.",
]
Nesterov = Annotated[bool, Flag(), "True steps along `g + mu v` instead of along `v`."]
WeightDecay = Annotated[
    float | Callable[[str, Any], float],
    weight_decay_range,
    "Decay coefficient, >= 0, added to the gradient after clipping (L2). Or a function "
    "`(path, array) -> float`, evaluated once per array at registration. It must be pure: it is "
    "evaluated again when arrays or another function are registered, and when a state is loaded.",
]
WeightDecayNow = Annotated[
    float,
    weight_decay_range,
    "Decay coefficient, >= 0, added to the gradient after clipping (L2).",
]
DecoupledWeightDecay = Annotated[
    bool, Flag(), "True decays the parameter itself, `p -= lr wd p`, not through the gradient."
]
GradClipNorm = Annotated[
    float | None,
    _LIMIT,
    "Largest norm of all gradients of the step together, > 0: they are scaled by "
    "`min(1, grad_clip_norm / norm)`. `inf` measures the norm without clipping. None: neither.",
]
GradClipValue = Annotated[
    float | None,
    _LIMIT,
    "Largest magnitude of a gradient element, > 0, applied after the norm clip. None: no limit.",
]
RescaleGrad = Annotated[
    float,
    Real(-math.inf, math.inf, "()"),
    "Multiplies every gradient before anything else is done with it, finite.",
]
Maximize = Annotated[bool, Flag(), "True ascends instead of descending."]
OnNonfinite = Annotated[
    str,
    Choice("propagate", "skip", "raise"),
    'What a step does whose gradients hold inf or NaN: compute with them ("propagate"), leave '
    'everything as it was ("skip"), or do so and raise FloatingPointError ("raise").',
]

grad_norm_range = Real(0.0, math.inf, "[]")


class Hyperparameter(NamedTuple):
    """One declared argument of an optimizer class."""

    name: str
    alias: str  # the name of its annotation in this module
    annotation: Any  # the type alone
    check: Check
    doc: str
    default: Any


def declared(initializer: Callable[..., None]) -> tuple[Hyperparameter, ...]:
    """The hyper-parameters in the signature of an optimizer's `__init__`, in its order."""
    code = initializer.__code__
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    positional = names[: code.co_argcount]
    given = initializer.__defaults__ or ()
    defaults = dict(zip(positional[len(positional) - len(given) :], given, strict=True))
    defaults.update(initializer.__kwdefaults__ or {})
    hints = get_type_hints(initializer, include_extras=True)
    found = []
    for name in names:
        metadata = getattr(hints.get(name), "__metadata__", None)
        if metadata is not None:
            alias, plain = initializer.__annotations__[name], hints[name].__origin__
            check, doc = metadata
            found.append(Hyperparameter(name, alias, plain, check, doc, defaults[name]))
    return tuple(found)


def in_function(hyper: Hyperparameter) -> Hyperparameter:
    """The hyper-parameter as a function takes it, which has no registration and counts no steps."""
    now: Any = {"lr": LearningRateNow, "weight_decay": WeightDecayNow}.get(hyper.name)
    if now is None:
        return hyper
    check, doc = now.__metadata__
    return Hyperparameter(
        hyper.name, f"{hyper.alias}Now", now.__origin__, check, doc, hyper.default
    )


def given_norm(grad_norm: Any) -> float | None:
    """The `grad_norm` argument of a step as a number."""
    if grad_norm is None or (type(grad_norm) is float and grad_norm >= 0.0):
        return grad_norm
    if not isinstance(grad_norm, (numbers.Number, np.generic, str)) and _core.is_array(grad_norm):
        grad_norm = read_number("grad_norm", grad_norm)
    if isinstance(grad_norm, (float, np.floating)) and math.isnan(grad_norm):
        return math.nan  # what a non-finite gradient makes of a norm; `on_nonfinite` judges it
    return grad_norm_range.number("grad_norm", grad_norm)
