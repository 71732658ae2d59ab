"""Test data: buffers between sentinels, at any alignment; random values that need rounding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from exact import DTYPES, Array, mismatch, store

GUARD = 128  # bytes on each side, more than one AVX-512 register
SENTINEL = 0xA5

VECTOR_SIZES = (
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    15,
    16,
    17,
    31,
    32,
    33,
    47,
    63,
    64,
    65,
    127,
    128,
    129,
    257,
)
CHUNK_SIZES = (16383, 16384, 16385, 32767, 32768, 32769)
SIZES = (*VECTOR_SIZES, *CHUNK_SIZES, 100_003)


class Guarded:
    """A 1-D array whose neighbouring bytes must not change, `offset` elements off a border."""

    def __init__(self, values: Array, offset: int = 0) -> None:
        itemsize, nbytes = values.dtype.itemsize, values.nbytes
        self._memory = np.full(nbytes + 2 * GUARD + 64 + offset * itemsize, SENTINEL, np.uint8)
        start = -self._memory.ctypes.data % 64 + GUARD + offset * itemsize
        self._start, self._stop = start, start + nbytes
        self.array = self._memory[start : self._stop].view(values.dtype)
        self.array[...] = values

    def intact(self) -> bool:
        """True while nobody has written beside the array."""
        outside = self._memory[: self._start], self._memory[self._stop :]
        return all(np.all(side == SENTINEL) for side in outside)


class GuardedList:
    """Guarded copies of arrays, each at an alignment of its own."""

    def __init__(self, values: Sequence[Array], seed: int = 0) -> None:
        offsets = np.random.default_rng(seed).integers(0, 17, len(values))
        self.buffers = [Guarded(x, int(k)) for x, k in zip(values, offsets, strict=True)]
        self.arrays = [buffer.array for buffer in self.buffers]

    def check(self, expected: Sequence[Array], what: str) -> None:
        """Fails unless the arrays hold `expected`, bit for bit, and the sentinels stand."""
        for buffer, values in zip(self.buffers, expected, strict=True):
            difference = mismatch(buffer.array, values)
            assert not difference, f"{what}, size {values.size}: {difference}"
            assert buffer.intact(), f"{what}, size {values.size}: wrote outside the array"


def random_values(rng: np.random.Generator, size: int, dtype: str, scale: float = 1.0) -> Array:
    """Non-zero values over several binades: products and sums round in every way."""
    wide = rng.standard_normal(size) * np.exp2(rng.integers(-6, 3, size)) * scale
    wide = np.where(wide == 0, scale, wide)
    if dtype in ("float64", "longdouble"):
        return wide.astype(dtype)
    return store(wide.astype(np.float32), DTYPES[dtype])


def random_list(
    rng: np.random.Generator, dtype: str, sizes: Sequence[int] = SIZES, scale: float = 1.0
) -> list[Array]:
    """One array of random values per size."""
    return np.split(random_values(rng, sum(sizes), dtype, scale), np.cumsum(sizes)[:-1])
