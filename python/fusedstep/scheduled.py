"""Hyper-parameters that may follow a schedule: what they may be, and their number now."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from fusedstep import _core
from fusedstep.ranges import Check, Real, shown
from fusedstep.schedules import MomentumSchedule, Schedule

AnySchedule: TypeAlias = Schedule | MomentumSchedule

# Arguments that may be a buffer of one element on the device of the parameters, where a step reads
# them by itself: nobody waits, and nobody checks their range.
READ_THERE = frozenset({"lr", "rescale_grad", "step", "mu_product"})


def read_number(name: str, buffer: Any) -> float:
    """The one element of an array."""
    return _core.read_scalar(buffer, name)


def is_buffer(value: object) -> bool:
    """An array, and no number that could pass for one."""
    plain = value is None or isinstance(value, (numbers.Number, np.generic, str))
    return not plain and _core.is_array(value)


def is_on_device(name: str, value: object) -> bool:
    """A buffer that is not in CPU memory: what is in it is not for the host to ask, if it can."""
    return is_buffer(value) and _core.device(value, name) != "cpu"


def is_function_of_t(value: object) -> bool:
    """A function, or a pair with one: what has to know how many steps were applied."""
    first = value[0] if isinstance(value, (tuple, list)) and value else value
    return callable(first)


class Scale(Real):
    """A number in an interval, or a buffer of one element."""

    def __call__(self, name: str, value: Any) -> float | None:
        """The number now."""
        return self.number(name, read_number(name, value) if is_buffer(value) else value)


class Scheduled(Real):
    """A number, a buffer of one element, a schedule object, or a function of t.

    t is the number of steps that an optimizer has applied.
    """

    kind: type[AnySchedule]
    noun: str  # what a state dict calls the schedule: "<noun>_scheduler"

    def __call__(self, name: str, value: Any) -> Any:
        """The number now; functions of t are refused."""
        return self.at(name, value, None)

    def at(self, name: str, value: Any, t: int | None) -> Any:
        """The number after `t` applied steps; functions of t are refused without one."""
        if isinstance(value, self.kind):
            return self.number(name, self.current(value))
        if is_buffer(value):
            return self.number(name, read_number(name, value))
        return self._call(name, value, t) if callable(value) else self.number(name, value)

    def _call(self, name: str, function: Callable[[int], Any], t: int | None) -> float:
        if t is None:
            raise TypeError(
                f"{name}: a call cannot know how many steps came before it; pass {name}=f(t), or "
                "use an optimizer object, which counts"
            )
        if isinstance(function, type):  # `StepLR` for `StepLR(...)`: it would be called with t
            raise TypeError(f"{name}: got the class {function.__name__}, pass an object of it")
        value = function(t)
        if callable(value) or isinstance(value, (Schedule, MomentumSchedule)):
            raise TypeError(f"{name}: the function of t returned {shown(value)}, no number")
        number: float = self.at(name, value, None)
        return number

    @staticmethod
    def current(schedule: Any) -> float:
        """The value of a schedule now."""
        raise NotImplementedError

    def schedule_of(self, value: Any) -> AnySchedule | None:
        """The schedule that a value follows."""
        return value if isinstance(value, self.kind) else None

    def is_function(self, value: Any) -> bool:
        """A bare function of t."""
        return callable(value) and not is_buffer(value)

    def restored(self, mine: Any, saved: Any) -> Any:
        """What `mine` becomes when a state is loaded: numbers change, all else stays what it is."""
        return saved if isinstance(mine, numbers.Real) else mine


class LearningRateRange(Scheduled):
    """What `lr` may be."""

    kind, noun = Schedule, "lr"

    @staticmethod
    def current(schedule: Schedule) -> float:
        """The learning rate now."""
        return schedule.current_lr


class MomentumRange(Scheduled):
    """What `momentum` may be."""

    kind, noun = MomentumSchedule, "momentum"

    @staticmethod
    def current(schedule: MomentumSchedule) -> float:
        """The momentum now."""
        return schedule.current_momentum

    @staticmethod
    def varies(value: Any) -> bool:
        """Whether the momentum may be another one in the next step, without being set."""
        return not isinstance(value, numbers.Real)

    def coming(self, name: str, value: Any, t: int | None = None) -> float:
        """The momentum of the step after this one, as far as it is known."""
        if isinstance(value, MomentumSchedule):
            return self.number(name, value.next_momentum)
        following = None if t is None else t + 1
        number: float = self.at(name, value, following)
        return number


class BetasRange(Scheduled):
    """Two decay rates, the first of which is a momentum and may follow a schedule."""

    kind, noun = MomentumSchedule, "momentum"

    def __init__(self) -> None:
        super().__init__(0.0, 1.0)
        self._first = MomentumRange(0.0, 1.0)

    def __str__(self) -> str:
        return "a pair of numbers in [0, 1)"

    def at(self, name: str, value: Any, t: int | None) -> tuple[float, float]:
        """Both numbers after `t` applied steps."""
        sequence = isinstance(value, Sequence) or (isinstance(value, np.ndarray) and value.ndim > 0)
        if isinstance(value, str) or not sequence:
            raise TypeError(f"{name}: expected {self}, got {shown(value)}")
        if len(value) != 2:
            raise ValueError(f"{name}: expected {self}, got {len(value)} of them")
        return self._first.at(f"{name}[0]", value[0], t), self.number(f"{name}[1]", value[1])

    def coming(self, name: str, value: Any, t: int | None = None) -> float:
        """The first number of the step after this one; `value` has been checked."""
        return self._first.coming(f"{name}[0]", value[0], t)

    def accepts(self, variable: str) -> str:
        """True for tuples of two floats in the interval."""
        first, second = (Real.accepts(self, f"{variable}[{k}]") for k in range(2))
        return f"type({variable}) is tuple and len({variable}) == 2 and {first} and {second}"

    def schedule_of(self, value: Any) -> AnySchedule | None:
        """The schedule that the first one follows."""
        return self._first.schedule_of(value[0])

    def is_function(self, value: Any) -> bool:
        """The first one is a bare function of t."""
        return self._first.is_function(value[0])

    def restored(self, mine: Any, saved: Any) -> Any:
        """Numbers change, a schedule stays."""
        return (self._first.restored(mine[0], saved[0]), saved[1])


def for_step(check: Check, name: str, value: Any, t: int | None = None) -> Any:
    """What the compiled core gets of an argument of which `READ_THERE` has the name."""
    if is_on_device(name, value):
        return value
    return check.at(name, value, t) if isinstance(check, Scheduled) else check(name, value)
