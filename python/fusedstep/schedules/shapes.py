"""The shapes that schedules are made of, as pure functions, and checks of their sequences.

Each takes numbers, or arrays of a library that follows the array API standard, such as a step count
that JAX traces. So a schedule's formula is written once, and `at` may stand in compiled code.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from fusedstep.ranges import Choice, Count, Real, shown

_Number = TypeVar("_Number", int, float)

FRACTION = Real(0.0, 1.0, "[]")
FACTOR = Real(0.0)
ANNEAL_STRATEGY = Choice("cos", "linear")
CYCLE_MODE = Choice("triangular", "triangular2", "exp_range")


def is_array(value: object) -> bool:
    """An array, whose elements cannot be branched on; NumPy's scalars pass for numbers."""
    return hasattr(value, "__array_namespace__") and not isinstance(value, np.generic)


def select(condition: bool, yes: _Number, no: _Number) -> _Number:
    """`yes` where the condition holds, else `no`. Both have been computed."""
    if not is_array(condition):
        return yes if condition else no
    library: Any = condition.__array_namespace__()  # type: ignore[attr-defined]
    return library.where(condition, yes, no)  # type: ignore[no-any-return]


def choose(index: int, values: Sequence[Callable[[], float]]) -> float:
    """The value of that index; of numbers, no other is computed."""
    if not is_array(index):
        return values[index]()
    chosen = values[0]()
    for k in range(1, len(values)):
        chosen = select(index >= k, values[k](), chosen)
    return chosen


def smaller(a: _Number, b: _Number) -> _Number:
    """The smaller of two numbers."""
    return select(b < a, b, a)


def larger(a: _Number, b: _Number) -> _Number:
    """The larger of two numbers."""
    return select(b > a, b, a)


def passed(borders: Sequence[int], t: int) -> int:
    """How many of the increasing borders `t` has reached."""
    if not is_array(t):
        return bisect_right(borders, t)
    return sum(select(t >= border, 1, 0) for border in borders)


def interpolated(start: float, end: float, share: float) -> float:
    """From `start` at share 0 straight to `end` at 1: exact at both ends, never beyond them."""
    # A share < 1 takes at least one unit in the last place off the difference, more than the
    # rounding of the difference has put on it: the sum cannot pass `end`.
    return select(share >= 1.0, end, start + (end - start) * share)


def half_cosine(x: float) -> float:
    """1 at 0, 0 at 1, 1 again at 2."""
    if not is_array(x):
        return (1.0 + math.cos(math.pi * x)) / 2.0
    library: Any = x.__array_namespace__()  # type: ignore[attr-defined]
    return (1.0 + library.cos(math.pi * x)) / 2.0  # type: ignore[no-any-return]


def power(base: float, exponent: float) -> float:
    """`base ** exponent`, infinite where Python's raises OverflowError."""
    if is_array(base) or is_array(exponent):
        return base**exponent  # type: ignore[no-any-return]
    try:
        return float(base**exponent)
    except OverflowError:
        return math.inf


def triangle(t: int, up: int, down: int) -> tuple[int, float]:
    """The cycle that `t` is in, from 1, and its height there: 0, 1 after `up` epochs, 0 again."""
    cycle, place = divmod(t, up + down)
    falling = (up + down - place) / max(down, 1)
    return cycle + 1, select(place <= up, place / up, falling)


def cycle_scale(t: int, cycle: int, mode: str, gamma: float) -> float:
    """By how much a mode of the cyclic schedules lowers the triangle."""
    if mode == "triangular2":
        return power(2.0, 1 - cycle)
    return power(gamma, t) if mode == "exp_range" else 1.0


def one_cycle(
    t: int, levels: tuple[float, ...], total_steps: int, pct_start: float, strategy: str
) -> float:
    """From level to level, the first of them reached after a share of `pct_start`; then the last.

    Two phases (three levels) end after `pct_start` and all of the steps; of three, the second
    lasts as long as the first. The borders are torch's: they need not be whole numbers.
    """
    t = smaller(t, total_steps - 1)
    last = len(levels) - 2
    ends = [pct_start * total_steps - 1.0, 2.0 * pct_start * total_steps - 2.0][:last]
    borders = [0.0, *ends, total_steps - 1.0]
    value = 0.0
    for phase in range(last + 1):
        begin, end = borders[phase : phase + 2]
        share = (t - begin) / (end - begin) if end > begin else 1.0
        if strategy == "cos":
            here = interpolated(levels[phase + 1], levels[phase], half_cosine(share))
        else:
            here = interpolated(levels[phase], levels[phase + 1], share)
        value = select(t > begin, here, value) if phase else here
    return value


def _items(name: str, values: Any, what: str) -> list[Any]:
    if isinstance(values, Iterable) and not isinstance(values, str):
        return list(values)
    raise TypeError(f"{name}: expected a sequence of {what}, got {shown(values)}")


def increasing(name: str, values: Any, low: int = 0) -> tuple[int, ...]:
    """Whole numbers >= `low`, each larger than the one before."""
    check = Count(low)
    found = [check(f"{name}[{i}]", v) for i, v in enumerate(_items(name, values, "integers"))]
    for index in range(1, len(found)):
        if found[index] <= found[index - 1]:
            raise ValueError(
                f"{name}: expected increasing integers, got {shown(found[index])} after "
                f"{shown(found[index - 1])}"
            )
    return tuple(found)


def reals(name: str, values: Any, check: Real) -> tuple[float, ...]:
    """Numbers in a range."""
    items = _items(name, values, "numbers")
    return tuple(check.number(f"{name}[{i}]", value) for i, value in enumerate(items))
