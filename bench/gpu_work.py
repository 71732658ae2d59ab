"""The memory that the contenders of a GPU row share, and the check against the CPU path."""

from __future__ import annotations

import copy
import math
from typing import Any, Self

import fusedstep as fs
import torch

from bench.gpu_device import Contender, Cpu
from bench.methods import NESTEROV, Method
from bench.models import Shape
from bench.work import STEPS, Work

WHOLE = 10**8  # elements; of larger work only both ends are computed on the CPU
WINDOW = 10**6
BLOCK = 2**26  # elements that are compared at once
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


class TorchWork(Work):
    """Tensors of torch that are views of one flat one each for parameters, gradients, states.

    The numbers at the start are not kept: the generator makes them again.
    """

    p: Any
    g: Any
    states: list[Any]

    def __init__(
        self,
        shapes: list[Shape],
        device: Cpu,
        method: Method = NESTEROV,
        dtype: Any = torch.float32,
    ) -> None:
        self.device = device
        super().__init__(shapes, method=method, dtype=dtype)

    def _allocate(self, size: int) -> None:
        def new(dtype: Any) -> Any:
            return torch.zeros(size, dtype=dtype, device=self.device.torch_device)

        self.p, self.g = new(self.dtype), new(self.dtype)
        self.states = [new(torch.float32) for _ in self.method.torch_state]
        self._all_states = list(self.states)  # of this and of what is copied from it
        self.reset()

    def with_narrow_states(self) -> Self:
        """The same work with states like the parameters, which torch demands."""
        if self.dtype == torch.float32:
            return self
        narrow = copy.copy(self)
        narrow.states = [torch.zeros_like(self.p) for _ in self.states]
        self._all_states += narrow.states
        return narrow

    @property
    def norm(self) -> float:
        """Nearly: a sum of squares in float64."""
        blocks = self.g.split(BLOCK)
        return math.hypot(*(float(torch.linalg.vector_norm(b.double())) for b in blocks))

    def _random(self, out: Any, seed: int) -> Any:
        generator = torch.Generator(device=out.device).manual_seed(seed)
        return out.normal_(generator=generator)

    def start(self) -> Any:
        """The parameters at the start, in other memory."""
        return self._random(torch.empty_like(self.p), 0)

    def reset_gradients(self) -> None:
        self._random(self.g, 1)

    def reset(self) -> None:
        self._random(self.p, 0)
        self.reset_gradients()
        for state in self._all_states:
            state.zero_()

    # --- verification ---------------------------------------------------------------------------

    def check(self, contenders: dict[str, Contender]) -> tuple[dict[str, float], dict[str, str]]:
        """Ours give the bits of the CPU path, the others nearly the same parameters.

        The contenders must be fresh, and are afterwards STEPS steps old.

        Returns:
            Of the others, how far they are from ours in parts of the change, both as Euclidean
            norms; and who failed, with the reason.
        """
        expected = self.expected()
        ours, change = None, math.nan
        differences, failed = {}, {}
        for name, contender in contenders.items():
            try:
                self._take_steps(contender)
                if name.startswith("fusedstep"):
                    self._compare_bits(expected)
                    if ours is None:
                        ours, change = self.p.clone(), distance(self.p, self.start())
                elif ours is not None:
                    differences[name] = self._compare(ours, change)
            except Exception as error:  # whatever it is, the others are measured
                failed[name] = f"{type(error).__name__}: {error}"
        self.reset()
        return differences, failed

    def _take_steps(self, contender: Contender) -> None:
        self.reset()
        for _ in range(STEPS):
            self.reset_gradients()
            contender.queue()
        self.device.finish(contender)
        if contender.params:
            for mine, other in zip(self.split(self.p), contender.params(), strict=True):
                mine.copy_(torch.from_dlpack(other))
            self.device.synchronize()

    def _compare(self, ours: Any, change: float) -> float:
        difference = distance(self.p, ours) / change
        # Everyone rounds the parameters in each step, in another way.
        size = float(distance(ours, torch.zeros((), device=ours.device)))
        rounding = STEPS * torch.finfo(self.dtype).eps * size / change
        # A norm of torch, JAX or CuPy is a float32 sum.
        limit = rounding + (1e-5 if self.clip is None else 1e-2)
        if not difference < limit:
            raise AssertionError(f"differs from fusedstep by {difference:g} of the change")
        return difference

    def _compare_bits(self, expected: list[tuple[slice, Any]]) -> None:
        integer = INTEGERS[self.dtype]
        for part, values in expected:
            got = self.p[part]
            differ = got.view(integer) != values.view(integer)
            if differ.any():
                first = int(differ.nonzero()[0])
                raise AssertionError(
                    f"{int(differ.sum())} of {len(got)} elements from {part.start} on differ from "
                    f"the CPU path, the first at {first}: {got[first]} for {values[first]}"
                )

    def expected(self) -> list[tuple[slice, Any]]:
        """Parameters after the steps on the CPU: all, or those at both ends."""
        self.reset()
        size = self.p.numel()
        if size <= WHOLE:
            return [(slice(0, size), self._on_cpu(slice(0, size), self.shapes, None))]
        norm = None
        if self.clip is not None:
            norm = math.sqrt(fs.sum_squares(self.split(self.g.cpu())))
        ends = (slice(0, WINDOW), slice(size - WINDOW, size))
        return [(end, self._on_cpu(end, [(WINDOW,)], norm)) for end in ends]

    def _on_cpu(self, part: slice, shapes: list[Shape], norm: float | None) -> Any:
        flat = [a[part].to("cpu", copy=True) for a in (self.p, self.g, *self.states)]
        params, grads, *states = (pieces(a, shapes) for a in flat)
        state: dict[str, Any] = dict(zip(self.method.torch_state, states, strict=True))
        options = {**self.method.options, "grad_clip_norm": self.clip, "grad_norm": norm}
        for _ in range(STEPS):
            state = self.method.function(params, grads, **state, **options).state
        return flat[0].to(self.device.torch_device)


def pieces(flat: Any, shapes: list[Shape]) -> list[Any]:
    """Views of the shapes, one after the other."""
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def distance(a: Any, b: Any) -> float:
    """Euclidean, in float64; `b` may be a scalar."""
    total = 0.0
    others = b.split(BLOCK) if b.dim() else [b] * math.ceil(a.numel() / BLOCK)
    for x, y in zip(a.split(BLOCK), others, strict=True):
        total += float((x.double() - y.double()).square().sum())
    return math.sqrt(total)
