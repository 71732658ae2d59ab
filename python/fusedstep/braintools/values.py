"""Numbers that are Python's outside of compiled code and traced ones inside."""

from __future__ import annotations

import inspect
import numbers
from typing import Any

import brainstate
import jax

from fusedstep.ranges import Real

LEARNING_RATE = Real(0.0)


class OptimState(brainstate.LongTermState):  # type: ignore[misc]
    """What optimizers and schedulers remember: counts, learning rates, buffers."""


def show_signature(kind: type) -> None:
    """Lets `help` and editors see the constructor's arguments behind brainstate's metaclass."""
    signature = inspect.signature(kind.__init__)  # type: ignore[misc]
    arguments = list(signature.parameters.values())[1:]
    kind.__signature__ = signature.replace(parameters=arguments)  # type: ignore[attr-defined]


def is_traced(value: Any) -> bool:
    """A value that compiled code will compute, so that nothing can be asked of it now."""
    return isinstance(value, jax.core.Tracer)


def plain(value: Any) -> Any:
    """Arrays of one number as Python's numbers, also inside of lists."""
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    scalar = getattr(value, "ndim", None) == 0 and hasattr(value, "item") and not is_traced(value)
    return value.item() if scalar else value


def as_number(name: str, value: Any, check: Real) -> float:
    """A number, or an array of one number, as a float in the range."""
    number = plain(value)
    return check.number(name, number if isinstance(number, numbers.Real) else value)
