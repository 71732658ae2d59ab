"""The hyper-parameters: type, range and meaning of each, declared once.

An optimizer class lists those it has, with their defaults, in its annotated `__init__`. `declared`
reads them from there, and the function form, the stub, the docs and all checks follow from that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, NamedTuple, SupportsFloat, TypeAlias, get_type_hints

import numpy as np

from fusedstep.ranges import Check, Choice, Flag, Real
from fusedstep.scheduled import (
    BetasRange,
    LearningRateRange,
    MomentumRange,
    Scale,
    is_buffer,
    is_on_device,
    read_number,
)
from fusedstep.schedules import MomentumSchedule, Schedule

Tree: TypeAlias = Any
"""One array, or a nested dict, list, tuple or other iterable of arrays."""

Params: TypeAlias = Tree | Iterable[Mapping[str, Any]] | None
"""A tree, a list of param groups, or None."""


lr_range = LearningRateRange(0.0)
weight_decay_range = Real(0.0)
_FRACTION = Real(0.0, 1.0)
_LIMIT = Real(0.0, math.inf, "(]", optional=True)

LearningRate = Annotated[
    SupportsFloat | Schedule | Callable[[int], SupportsFloat],
    lr_range,
    "Learning rate, >= 0. A number; a buffer of one element, read at every step (one on the GPU of "
    "the parameters by that GPU, which checks nothing); a schedule object (its `current_lr`); or a "
    "function of t, the number of steps applied so far, which must be pure: it is evaluated again "
    "to save and to load.",
]
LearningRateNow = Annotated[
    SupportsFloat | Schedule,
    lr_range,
    "Learning rate, >= 0. A number; a buffer of one element (one on the GPU of the parameters is "
    "read by that GPU, which checks nothing); or a schedule object (its `current_lr`). A function "
    "of t belongs to the optimizer objects, which count steps.",
]
MomentumFactor = Annotated[
    SupportsFloat | MomentumSchedule | Callable[[int], SupportsFloat],
    MomentumRange(0.0, 1.0),
    "Share of the velocity that a step keeps, in [0, 1), dimensionless. A number; a buffer of one "
    "element; a momentum schedule (its `current_momentum`, and `next_momentum` as the look-ahead "
    "of Nesterov's form); or a pure function of t, the number of steps applied so far.",
]
MomentumFactorNow = Annotated[
    SupportsFloat | MomentumSchedule,
    MomentumRange(0.0, 1.0),
    "Share of the velocity that a step keeps, in [0, 1), dimensionless. A number; a buffer of one "
    "element; or a momentum schedule (its `current_momentum`, and `next_momentum` as the "
    "look-ahead of Nesterov's form).",
]
NextMomentum = Annotated[
    float | None,
    Real(0.0, 1.0, optional=True),
    "The momentum of the coming step, in [0, 1), which the look-ahead of Nesterov's form uses "
    "when the momentum changes from step to step. None: what the momentum's schedule or function "
    "says, else the same as `momentum`.",
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
Betas = Annotated[
    tuple[SupportsFloat | MomentumSchedule | Callable[[int], SupportsFloat], float],
    BetasRange(),
    "Decay rates of the averages of the gradient and of its square, each in [0, 1). The first one, "
    "a momentum, may be a momentum schedule or a pure function of t.",
]
BetasNow = Annotated[
    tuple[SupportsFloat | MomentumSchedule, float],
    BetasRange(),
    "Decay rates of the averages of the gradient and of its square, each in [0, 1). The first one, "
    "a momentum, may be a momentum schedule.",
]
Alpha = Annotated[
    float, _FRACTION, "Decay rate of the averages of the gradient's square, in [0, 1)."
]
Eps = Annotated[
    float, Real(0.0), "Added to the square root in the denominator, >= 0; bounds the step."
]
MomentumDecay = Annotated[
    float,
    Real(0.0),
    "How quickly the momentum of NAdam warms up to `betas[0]` from half of it, >= 0: "
    "`mu_t = betas[0] (1 - 0.96**(t momentum_decay) / 2)`. Dozat's report has 0.004, Keras 3 1.",
]
EpsInRoot = Annotated[
    bool,
    Flag(),
    "True adds `eps` under the square root (TensorFlow, Keras, optax, braintools), False to the "
    "root (PyTorch).",
]
Amsgrad = Annotated[
    bool, Flag(), "True divides by the largest average of squares so far, which is kept as state."
]
Centered = Annotated[
    bool, Flag(), "True divides by the standard deviation: the average gradient is kept as state."
]
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
    "Largest norm of all gradients of the step together (see `grad_clip_scope`), > 0: they are "
    "scaled by `min(1, grad_clip_norm / norm)`. `inf` measures the norm without clipping. None: "
    "neither.",
]
GradClipScope = Annotated[
    str,
    Choice("all", "group", "array"),
    'Whose norm `grad_clip_norm` limits: of "all" gradients together, of each param "group", or '
    'of each "array". The result\'s `grad_norm` is that of all gradients in any case.',
]
SkipGradNorm = Annotated[
    float | None,
    _LIMIT,
    "A step whose gradients, all together and after `rescale_grad`, have a norm that is larger "
    "than this (or NaN) leaves everything as it was, > 0. None or inf: none is skipped for its "
    "norm.",
]
GradClipValue = Annotated[
    float | None,
    _LIMIT,
    "Largest magnitude of a gradient element, > 0, applied after the norm clip. None: no limit.",
]
RescaleGrad = Annotated[
    SupportsFloat,
    Scale(-math.inf, math.inf, "()"),
    "Multiplies every gradient before anything else is done with it, finite. A number, or a buffer "
    "of one element, read at every step.",
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
    now: Any = {
        "lr": LearningRateNow,
        "weight_decay": WeightDecayNow,
        "momentum": MomentumFactorNow,
        "betas": BetasNow,
    }.get(hyper.name)
    if now is None:
        return hyper
    check, doc = now.__metadata__
    return Hyperparameter(
        hyper.name, f"{hyper.alias}Now", now.__origin__, check, doc, hyper.default
    )


def given_norm(grad_norm: Any) -> Any:
    """The `grad_norm` argument of a step as a number, or a buffer that a device reads."""
    if grad_norm is None or (type(grad_norm) is float and grad_norm >= 0.0):
        return grad_norm
    if is_on_device("grad_norm", grad_norm):
        return grad_norm
    if is_buffer(grad_norm):
        grad_norm = read_number("grad_norm", grad_norm)
    if isinstance(grad_norm, (float, np.floating)) and math.isnan(grad_norm):
        return math.nan  # what a non-finite gradient makes of a norm; `on_nonfinite` judges it
    return grad_norm_range.number("grad_norm", grad_norm)
