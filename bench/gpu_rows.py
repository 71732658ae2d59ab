"""The rows of the GPU table, the most important ones first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from bench import gpu_contenders as by
from bench.bars import FUNCTION, OURS, ROOFLINE
from bench.gpu_device import Contender, Cpu
from bench.gpu_work import TorchWork
from bench.jax_rows import WARM
from bench.measure import Result, Row
from bench.methods import ADAMW, NADAM, NESTEROV, SGD, Method
from bench.models import Shape, equal, gpt2
from bench.work import Step

# NAdam as optax has it: with a constant momentum, for everyone.
STEADY_NADAM = replace(
    NADAM,
    options={**NADAM.options, "momentum_decay": WARM},
    torch_options={**NADAM.torch_options, "momentum_decay": WARM},
)
WHAT = {
    NESTEROV.rule: "Nesterov + decay",
    NADAM.rule: "NAdam + decay",
    ADAMW.rule: "AdamW",
    SGD.rule: "SGD + decay",
}
QUICK_TENSORS, QUICK_NUMEL = 7, 1003
# Bytes per element that a row may take beside its own buffers: temporaries of torch and XLA, and
# what the verification keeps.
BESIDE = 40
LOOP, HOST, LAUNCHES = " loop", " host", " launches"


@dataclass(frozen=True)
class Case:
    """One line of work.

    Attributes:
        name: What bars and `-k` call it.
        optax: Whether it takes part. XLA compiles many tensors for minutes.
        launches: Whether they are counted, too.
        seconds: At least so many are needed; the row is left out if there are fewer.
    """

    name: str
    shapes: list[Shape] = field(repr=False)
    clip: bool = True
    method: Method = NESTEROV
    dtype: Any = torch.float32
    optax: bool = False
    launches: bool = False
    seconds: float = 0.0

    @property
    def elements(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    @property
    def bytes_per_element(self) -> int:
        """By definition: everything is read once and written once, but the gradient."""
        size = self.dtype.itemsize
        return 2 * size + (2 if self.clip else 1) * size + 8 * len(self.method.torch_state)

    @property
    def memory(self) -> int:
        """What the row may need; three of our forms and optax have states of their own."""
        own = 2 * self.dtype.itemsize + 4 * 4 * len(self.method.torch_state)
        return self.elements * (own + BESIDE)

    def quick(self) -> Case:
        """The same in tiny, which shows that the code runs and nothing else."""
        shapes = equal(min(len(self.shapes), QUICK_TENSORS), QUICK_NUMEL)
        return replace(self, shapes=shapes, seconds=0)


def _case(name: str, tensors: int, numel: int, **options: Any) -> Case:
    return Case(
        f"{name}-{tensors}x{numel:.0e}".replace("e+0", "e"), equal(tensors, numel), **options
    )


def _clip(tensors: int, numel: int, **options: Any) -> Case:
    return _case("clip", tensors, numel, **options)


def _plain(tensors: int, numel: int, **options: Any) -> Case:
    return _case("plain", tensors, numel, clip=False, **options)


def _nadam(tensors: int, numel: int, clip: bool = False, **options: Any) -> Case:
    name = "nadam-clip" if clip else "nadam"
    return _case(name, tensors, numel, clip=clip, method=STEADY_NADAM, **options)


M = 10**6
BF16 = torch.bfloat16

CASES = (
    # What the bars are about.
    _clip(1, 100 * M, optax=True, launches=True),
    _clip(1000, 1000, launches=True),
    _nadam(1, 100 * M, optax=True, launches=True),
    _plain(1, 100 * M, optax=True, launches=True),
    _clip(200, M // 2, optax=True, launches=True),
    _case("bf16-clip", 1, 100 * M, dtype=BF16, launches=True),
    _clip(1, 1000 * M, optax=True, launches=True),
    _nadam(200, M // 2),
    _nadam(1000, 1000, launches=True),
    _plain(1000, 1000, launches=True),
    # How it goes with the size.
    _clip(1, 10 * M, optax=True),
    _clip(1, M, optax=True),
    _clip(1, M // 10, optax=True),
    _clip(200, 5 * M),
    _clip(200, M // 20),
    _clip(200, M // 200),
    _clip(200, 500),
    _plain(1, 10 * M),
    _plain(1, M),
    _plain(1, M // 10),
    _plain(1, 1000 * M),
    _plain(200, M // 2),
    _clip(1000, 10_000),
    _clip(1000, M // 10),
    _clip(5000, 1000),
    # The other kernels.
    Case("gpt2-adamw-clip", gpt2(), method=ADAMW, launches=True),
    _case("adamw-clip", 1, 100 * M, method=ADAMW),
    _nadam(1, 100 * M, clip=True, optax=True),
    _nadam(1, 10 * M),
    _nadam(1, M),
    _case("bf16", 1, 100 * M, clip=False, dtype=BF16),
    _case("bf16-clip", 200, M // 2, dtype=BF16),
    _case("bf16-clip", 1, 1000 * M, dtype=BF16),
    _case("bf16-clip", 1000, 1000, dtype=BF16),
    _case("sgd", 1, 100 * M, clip=False, method=SGD),
    _case("sgd-clip", 1, 100 * M, method=SGD),
    # XLA compiles for long.
    _case("optax-clip", 1000, 1000, optax=True, seconds=150),
)


def quick_cases() -> list[Case]:
    """All cases in tiny, without those that then are the same as another."""
    tiny: dict[Any, Case] = {}
    for case in map(Case.quick, CASES):
        kind = (len(case.shapes), case.clip, case.method.rule, case.dtype, case.optax)
        tiny.setdefault(kind, case)
    return list(tiny.values())


class Bench:
    """A case with its memory and everyone who does its work."""

    def __init__(self, case: Case, device: Cpu) -> None:
        self._case, self._device = case, device
        work = TorchWork(case.shapes, device, case.method, case.dtype)
        self.work = work.with_clip() if case.clip else work
        self.failed: dict[str, str] = {}
        makers = by.ours(self.work) | by.of_torch(self.work, device)
        makers |= by.others(self.work, device, case.optax)
        self._contenders = dict(self._made(makers))
        self._title = f"{WHAT[case.method.rule]}{' + global clip' if case.clip else ''}"
        if case.dtype == BF16:
            self._title += ", bfloat16 p and g"
        self._title += f", {self.work.extent}"

    def _made(self, makers: dict[str, by.Maker]) -> Iterator[tuple[str, Contender]]:
        for who, make in makers.items():
            try:
                yield who, make(self.work, self._device)
            except Exception as error:  # the others are measured
                self.failed[who] = f"{type(error).__name__}: {error}"

    def check(self) -> dict[str, float]:
        """The differences of the peers; who fails is not measured."""
        differences, failed = self.work.check(self._contenders)
        self.failed |= failed
        self._contenders = {k: v for k, v in self._contenders.items() if k not in failed}
        return differences

    @property
    def _reset(self) -> Step:
        """torch clips the gradients in place; everyone starts from the same ones."""
        return self.work.reset_gradients if self._case.clip else int

    def rows(self, differences: dict[str, float]) -> Iterator[Row]:
        """Time of the device; of a loop; of the host."""
        case, device, reset = self._case, self._device, self._reset
        samplers = {who: device.step_time(c, reset) for who, c in self._contenders.items()}
        nbytes = case.bytes_per_element * case.elements
        samplers[ROOFLINE] = device.step_time(Contender(device.copy(nbytes)), reset)
        moved = dict.fromkeys((OURS, FUNCTION, ROOFLINE), nbytes)
        yield Row(case.name, self._title, samplers, moved, differences)

        calls = 10 if case.elements <= 10 * M and len(case.shapes) <= 1000 else 3
        timers = {LOOP: device.loop_time, HOST: partial(device.loop_time, of_host=True)}
        what = {LOOP: "time per step of a loop", HOST: "time of the host per step"}
        for suffix, timer in timers.items():
            samplers = {who: timer(c, calls, reset) for who, c in self._contenders.items()}
            yield Row(case.name + suffix, f"{self._title}: {what[suffix]}", samplers)

    def launches(self) -> Result:
        """What a step puts into the stream, for each of whom the profiler saw anything."""
        for contender in self._contenders.values():  # graphs are captured, caches filled
            for _ in range(2):
                contender.queue()
            self._device.finish(contender)
        counts = {who: self._device.launches(c) for who, c in self._contenders.items()}
        title = f"{self._title}: {self._device.counted} of a step"
        row = Row(self._case.name + LAUNCHES, title, {}, unit="launches")
        return Result(row, {who: [float(n)] for who, n in counts.items() if n}, preempted=0)
