"""The transforms, made from the optimizer classes; `constructors.pyi` has their signatures.

`python -m fusedstep.jax._stubs` writes it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from fusedstep.adaptive import Adam, AdamW, NAdam, RMSprop
from fusedstep.base import Optimizer
from fusedstep.jax.docs import docstring, name_of
from fusedstep.jax.options import Options
from fusedstep.jax.transform import Transform
from fusedstep.optimizers import SGD, Momentum, MomentumNesterov


def _signature(kind: type[Optimizer]) -> inspect.Signature:
    parameters = []
    for hyper in kind.declaration.hypers:
        lead = hyper.name == "lr"
        place = inspect.Parameter.POSITIONAL_OR_KEYWORD if lead else inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(hyper.name, place, default=hyper.default))
    return inspect.Signature(parameters)


def _constructor(kind: type[Optimizer]) -> Callable[..., Transform]:
    name, signature = name_of(kind), _signature(kind)

    def construct(*args: Any, **given: Any) -> Transform:
        try:
            bound = signature.bind(*args, **given)
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from None
        bound.apply_defaults()
        return Transform(name, Options(kind, bound.arguments))

    construct.__name__ = construct.__qualname__ = name
    construct.__module__ = __name__
    construct.__doc__ = docstring(kind)
    construct.__signature__ = signature  # type: ignore[attr-defined]
    return construct


sgd = _constructor(SGD)
momentum = _constructor(Momentum)
nesterov = _constructor(MomentumNesterov)
nadam = _constructor(NAdam)
adam = _constructor(Adam)
adamw = _constructor(AdamW)
rmsprop = _constructor(RMSprop)
