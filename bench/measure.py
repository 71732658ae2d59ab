"""How times are taken: interleaved, in one process, all samples kept, ratios of neighbours."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import repeat

import numpy as np

Sampler = Callable[[], float]


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        low, median, high = np.percentile(samples, (25, 50, 75))
        return cls(float(median), float(low), float(high))


def timed(run: Callable[[], object], calls: int = 1, reset: Callable[[], object] = int) -> Sampler:
    """Seconds per call of `run`; `reset` goes before each sample, outside the time."""

    def sample() -> float:
        reset()
        begin = time.perf_counter()
        for _ in repeat(None, calls):
            run()
        return (time.perf_counter() - begin) / calls

    return sample


@dataclass
class Row:
    """One line of work and everyone who does it.

    Attributes:
        name: What bars and `-k` call it.
        work: What is done, for people.
        contenders: Who -> a sampler. All work on the same memory, so that where the pages lie is
            the same for all.
        nbytes: Who -> bytes that one call moves by definition, where that says something.
        differences: Who -> how far its parameters were from ours, in parts of the largest change.
        unit: What a sampler returns: seconds or bytes.
    """

    name: str
    work: str
    contenders: dict[str, Sampler]
    nbytes: dict[str, int] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    unit: str = "seconds"


@dataclass
class Result:
    """All samples of a row: `samples[who][k]` was taken in round k, next to the others' k-th.

    The row is without its contenders, which hold its memory.
    """

    row: Row
    samples: dict[str, list[float]]
    preempted: int

    def spread(self, who: str) -> Spread:
        return Spread.of(self.samples[who])

    def ratio(self, numerator: str, denominator: str) -> Spread:
        """Of the times of the same round: what slows the machine for a while slows both."""
        pairs = zip(self.samples[numerator], self.samples[denominator], strict=True)
        return Spread.of([a / b for a, b in pairs])


def measure(row: Row, rounds: int) -> Result:
    """Every contender once per round, each round beginning with another one."""
    names = list(row.contenders)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        row.contenders[name]()  # warm: first-touch pages, lazily made state, caches of code
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    for k in range(rounds):
        for i in range(len(names)):
            name = names[(i + k) % len(names)]
            samples[name].append(row.contenders[name]())
    preempted = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - before
    return Result(replace(row, contenders={}), samples, preempted)


def measure_all(rows: Iterable[Row], rounds: int) -> Iterator[Result]:
    """One result after the other; no row is held while the next is made."""
    return map(partial(measure, rounds=rounds), rows)
