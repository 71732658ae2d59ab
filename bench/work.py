"""The memory that the contenders of a row share, and the check that they do the same work."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bench.bars import ROOFLINE
from bench.machine import ROOT
from bench.methods import NESTEROV, Method
from bench.models import Shape

sys.path.insert(0, str(ROOT / "tests"))
import reference

Array = NDArray[Any]
Step = Callable[[], object]

STEPS = 3  # before the check
WINDOW = 2000  # elements at both ends of a tensor that the oracle computes


@dataclass
class Work:
    """Tensors that are views of one flat array each for parameters, gradients and states.

    Attributes:
        shapes: One per tensor.
        clip: The limit on the global norm; None: no clipping.
        loss_scale: The gradients are this power of two times as large as those that count.
    """

    shapes: list[Shape]
    clip: float | None = None
    method: Method = NESTEROV
    dtype: type = np.float32
    loss_scale: float = 1.0
    p: Array = field(init=False)
    g: Array = field(init=False)
    states: list[Array] = field(init=False)

    def __post_init__(self) -> None:
        self._borders = list(accumulate(map(math.prod, self.shapes), initial=0))
        self._allocate(self._borders[-1])

    def _allocate(self, size: int) -> None:
        rng = np.random.default_rng(0)
        self._start: list[Array] = [
            rng.standard_normal(size, dtype=np.float32).astype(self.dtype) for _ in range(2)
        ]
        self.p, self.g = (a.copy() for a in self._start)
        self.states = [np.zeros(size, np.float32) for _ in self.method.torch_state]

    def with_clip(self) -> Self:
        """The same work on the same memory, with a clip that is always active."""
        clipped = copy.copy(self)
        clipped.clip = self.norm / 2
        return clipped

    def with_loss_scale(self, scale: float) -> Self:
        """The same work on the same memory, with gradients of a scaled loss."""
        scaled = copy.copy(self)
        scaled.loss_scale = scale
        return scaled

    @property
    def extent(self) -> str:
        """How many tensors of which size, for people."""
        sizes = set(map(math.prod, self.shapes))
        if len(sizes) == 1:
            return f"{len(self.shapes)} x {sizes.pop():,}"
        return f"{len(self.shapes)} tensors, {self._borders[-1]:,} elements"

    @cached_property
    def norm(self) -> float:
        """Of the gradients at the start, in float64."""
        blocks = np.array_split(self._start[1], max(1, self.g.size >> 20))
        return float(np.sqrt(sum(np.sum(b.astype(np.float64) ** 2) for b in blocks)))

    def split(self, flat: Array) -> list[Array]:
        parts = (flat[begin:end] for begin, end in pairwise(self._borders))
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def reset_gradients(self) -> None:
        """torch clips and unscales gradients in place; everyone starts from the same ones."""
        if self.loss_scale == 1.0:
            np.copyto(self.g, self._start[1])
        else:
            np.multiply(self._start[1], self.dtype(self.loss_scale), out=self.g)

    def reset(self) -> None:
        np.copyto(self.p, self._start[0])
        self.reset_gradients()
        for state in self.states:
            state.fill(0)

    # --- verification ---------------------------------------------------------------------

    def verify(self, contenders: dict[str, Step], oracle: bool = True) -> dict[str, float]:
        """Ours give the oracle's bits, and the others nearly the same parameters.

        The contenders must be fresh, and are afterwards STEPS steps old.

        Args:
            contenders: Their steps; one of ours is the first.
            oracle: False where gradients are not those of this work, which the oracle knows: all
                are then compared with the first.

        Returns:
            Of the others, the largest difference from ours in parts of the largest change.
        """
        ours = None
        differences = {}
        for name, run in contenders.items():
            if name == ROOFLINE:
                continue
            self.reset()
            for _ in range(STEPS):
                self.reset_gradients()
                run()
            is_ours = name.startswith("fusedstep")
            if is_ours and oracle:
                self._compare_with_oracle(name)
            if ours is None or (is_ours and oracle):
                ours = self.p.copy()
            else:
                differences[name] = self._compare_with_ours(name, ours)
        self.reset()
        return differences

    def _compare_with_ours(self, name: str, ours: Array) -> float:
        change = float(np.max(np.abs(ours - self._start[0])))
        difference = float(np.max(np.abs(self.p - ours))) / change
        # A float32 parameter is rounded in each step, by everyone in another way.
        rounding = STEPS * float(np.finfo(np.float32).eps) * float(np.max(np.abs(ours))) / change
        # The norm of torch is a float32 sum, 0.18 % too small for 2^25 normal numbers (2.13, CPU).
        exact = self.clip is None or name.startswith("fusedstep")
        limit = 1e-5 + rounding if exact else 1e-2
        if not difference < limit:
            raise AssertionError(f"{name}: differs from fusedstep by {difference:g} of the change")
        return difference

    def _compare_with_oracle(self, name: str) -> None:
        rule = self.method.rule
        hyper = reference.RULES[rule].hyper(**self.method.hyper)
        for tensor in {0, len(self.shapes) // 2, len(self.shapes) - 1}:
            numel = math.prod(self.shapes[tensor])
            for part in (slice(0, WINDOW), slice(max(0, numel - WINDOW), numel)):
                p, g = (self.split(a)[tensor].reshape(-1)[part].copy() for a in self._start)
                slots = [tuple(np.zeros(p.shape, np.float32) for _ in self.states)]
                group = reference.Group(rule, hyper, [p], [g], slots, grad_clip_norm=self.clip)
                for _ in range(STEPS):
                    reference.step([group], grad_norm=self.norm)
                got = self.split(self.p)[tensor].reshape(-1)[part]
                if got.tobytes() != p.tobytes():
                    raise AssertionError(f"{name}: tensor {tensor}, {part}: not the oracle's bits")
