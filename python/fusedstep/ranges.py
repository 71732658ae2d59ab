"""What values an argument may have: checks whose messages name the argument and the value."""

from __future__ import annotations

import math
import numbers
from typing import Any, Protocol

import numpy as np


class Check(Protocol):
    """Turns what a caller passed into the plain value that is used, or raises."""

    def __call__(self, name: str, value: Any) -> Any:
        """Returns the plain value; TypeError or ValueError name the argument `name`."""

    def accepts(self, variable: str) -> str:
        """A Python expression, true only if `variable` needs no conversion and is in range."""


def shown(value: object) -> str:
    """A value as messages show it: numbers and short strings, but never what an array holds."""
    if value is None or isinstance(value, (numbers.Number, np.generic, str)):
        try:
            text = repr(value)
        except ValueError:  # Python refuses to spell integers of more than 4300 digits
            return "a huge integer"
        return text if len(text) <= 60 else f"{text[:57]}..."
    kind = type(value)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"an object of type {module}{kind.__qualname__}"


class Real:
    """Numbers in an interval; with `optional`, None as well.

    Args:
        low: Lower end.
        high: Upper end. NaN is in no interval.
        ends: `[` or `(`, `]` or `)`: which ends belong to the interval.
        optional: None is accepted.
    """

    def __init__(
        self, low: float, high: float = math.inf, ends: str = "[)", *, optional: bool = False
    ) -> None:
        self.low = low
        self.high = high
        self.ends = ends
        self.optional = optional

    def __str__(self) -> str:
        if self.low == -math.inf:
            text = "a finite number"
        elif self.high == math.inf:
            text = f"a number {'>=' if self.ends[0] == '[' else '>'} {self.low:g}"
        else:
            text = f"a number in {self.ends[0]}{self.low:g}, {self.high:g}{self.ends[1]}"
        return f"{text} or None" if self.optional else text

    def __contains__(self, number: float) -> bool:
        above = self.low <= number if self.ends[0] == "[" else self.low < number
        return above and (number <= self.high if self.ends[1] == "]" else number < self.high)

    def __call__(self, name: str, value: Any) -> float | None:
        """The value as a float in the interval, or None where that is allowed."""
        if value is None and self.optional:
            return None
        return self.number(name, value)

    def number(self, name: str, value: Any) -> float:
        """The value as a float in the interval."""
        # A flag where a number belongs is a mistaken argument, although bool is an int in Python.
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name}: expected {self}, got {shown(value)}")
        try:
            number = float(value)
        except OverflowError:  # an integer beyond the largest float
            raise ValueError(f"{name}: expected {self}, got {shown(value)}") from None
        if number not in self:
            raise ValueError(f"{name}: expected {self}, got {shown(value)}")
        return number

    def accepts(self, variable: str) -> str:
        """True for floats in the interval."""
        below = "<=" if self.ends[0] == "[" else "<"
        above = "<=" if self.ends[1] == "]" else "<"
        interval = f"{self.low!r} {below} {variable} {above} {self.high!r}"
        test = f"type({variable}) is float and {interval}"
        return f"{variable} is None or {test}" if self.optional else test


class Flag:
    """True or False, in Python's or NumPy's form, or the integers 0 and 1."""

    def __str__(self) -> str:
        return "True or False"

    def __call__(self, name: str, value: Any) -> bool:
        """The value as a bool."""
        whole = isinstance(value, numbers.Integral) and value in {0, 1}
        if not whole and not isinstance(value, (bool, np.bool_)):
            kind = ValueError if isinstance(value, numbers.Real) else TypeError
            raise kind(f"{name}: expected {self}, got {shown(value)}")
        return bool(value)

    def accepts(self, variable: str) -> str:
        """True for the two bools."""
        return f"{variable} is True or {variable} is False"


class Choice:
    """One of a few strings."""

    def __init__(self, *options: str) -> None:
        self.options = options

    def __str__(self) -> str:
        quoted = [f'"{option}"' for option in self.options]
        return f"{', '.join(quoted[:-1])} or {quoted[-1]}"

    def __call__(self, name: str, value: Any) -> str:
        """The value, if it is an option."""
        if not isinstance(value, str):
            raise TypeError(f"{name}: expected {self}, got {shown(value)}")
        if value not in self.options:
            raise ValueError(f"{name}: expected {self}, got {shown(value)}")
        return str(value)

    def accepts(self, variable: str) -> str:
        """True for the options."""
        return f"type({variable}) is str and {variable} in {self.options!r}"


class Count:
    """Whole numbers from `low` on, below `end`."""

    def __init__(self, low: int = 0, end: int | None = None) -> None:
        self.low = low
        self.end = end

    def __str__(self) -> str:
        if self.end is None:
            return f"an integer >= {self.low}"
        return f"an integer in [{self.low}, 2**{self.end.bit_length() - 1})"

    def __call__(self, name: str, value: Any) -> int:
        """The value as an int in the range."""
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name}: expected {self}, got {shown(value)}")
        number = int(value)
        if number < self.low or (self.end is not None and number >= self.end):
            raise ValueError(f"{name}: expected {self}, got {shown(value)}")
        return number

    def accepts(self, variable: str) -> str:
        """True for ints in the range."""
        below = "" if self.end is None else f" < {self.end}"
        return f"type({variable}) is int and {self.low} <= {variable}{below}"
