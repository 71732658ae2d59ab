"""The shapes that schedules are made of, as pure functions, and checks of their sequences."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from fusedstep.ranges import Choice, Count, Real, shown

FRACTION = Real(0.0, 1.0, "[]")
FACTOR = Real(0.0)
ANNEAL_STRATEGY = Choice("cos", "linear")
CYCLE_MODE = Choice("triangular", "triangular2", "exp_range")


def interpolated(start: float, end: float, share: float) -> float:
    """From `start` at share 0 straight to `end` at 1: exact at both ends, never beyond them."""
    if share >= 1.0:
        return end
    # A share < 1 takes at least one unit in the last place off the difference, more than the
    # rounding of the difference has put on it: the sum cannot pass `end`.
    return start + (end - start) * share


def half_cosine(x: float) -> float:
    """1 at 0, 0 at 1, 1 again at 2."""
    return (1.0 + math.cos(math.pi * x)) / 2.0


def power(base: float, exponent: float) -> float:
    """`base ** exponent`, infinite where Python's raises OverflowError."""
    try:
        return float(base**exponent)
    except OverflowError:
        return math.inf


def triangle(t: int, up: int, down: int) -> tuple[int, float]:
    """The cycle that `t` is in, from 1, and its height there: 0, 1 after `up` epochs, 0 again."""
    cycle, place = divmod(t, up + down)
    return cycle + 1, place / up if place <= up else (up + down - place) / down


def cycle_scale(t: int, cycle: int, mode: str, gamma: float) -> float:
    """By how much a mode of the cyclic schedules lowers the triangle."""
    if mode == "triangular2":
        return power(2.0, 1 - cycle)
    return gamma**t if mode == "exp_range" else 1.0


def one_cycle(
    t: int, levels: tuple[float, ...], total_steps: int, pct_start: float, strategy: str
) -> float:
    """From level to level, the first of them reached after a share of `pct_start`; then the last.

    Two phases (three levels) end after `pct_start` and all of the steps; of three, the second
    lasts as long as the first. The borders are torch's: they need not be whole numbers.
    """
    t = min(t, total_steps - 1)
    ends = [pct_start * total_steps - 1.0, 2.0 * pct_start * total_steps - 2.0]
    begin, phase, last = 0.0, 0, len(levels) - 2
    while phase < last and t > ends[phase]:
        begin, phase = ends[phase], phase + 1
    end = ends[phase] if phase < last else total_steps - 1.0
    share = (t - begin) / (end - begin) if end > begin else 1.0
    if strategy == "cos":
        return interpolated(levels[phase + 1], levels[phase], half_cosine(share))
    return interpolated(levels[phase], levels[phase + 1], share)


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
