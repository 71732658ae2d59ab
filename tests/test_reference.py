"""The oracle itself: against libm, NumPy's conversions and exact sums."""

from __future__ import annotations

import ctypes
import ctypes.util
import math
from fractions import Fraction

import numpy as np
import pytest
import reference
from exact import BFLOAT16, fma, mismatch, store

SPECIAL = [0.0, -0.0, 1.0, -1.5, np.inf, -np.inf, np.nan]


def edge_values(dtype: type) -> np.ndarray:
    info = np.finfo(dtype)
    limits = [info.max, -info.max, info.tiny, info.smallest_subnormal, -info.smallest_subnormal]
    return np.array(SPECIAL + limits, dtype)


def fma_operands(dtype: type, size: int = 20_000) -> np.ndarray:
    """Three rows: random bit patterns, values that nearly cancel, all triples of edge values."""
    rng = np.random.default_rng(1)
    patterns = rng.integers(0, 256, (3, size * np.dtype(dtype).itemsize), dtype=np.uint8).view(
        dtype
    )
    a, b = rng.standard_normal((2, size)).astype(dtype)
    near = -(a * b) * rng.choice([1, 1 + 1e-7, 2.0**-30, 1e9], size).astype(dtype)
    edges = edge_values(dtype)
    triples = np.array(np.meshgrid(edges, edges, edges)).reshape(3, -1)
    return np.concatenate([patterns, [a, b, near], triples], axis=1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_fma_equals_libm(dtype: type) -> None:
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    function = libm.fmaf if dtype is np.float32 else libm.fma
    kind = ctypes.c_float if dtype is np.float32 else ctypes.c_double
    function.restype, function.argtypes = kind, [kind] * 3
    a, b, c = fma_operands(dtype)
    expected = [
        function(x, y, z) for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    ]
    assert not mismatch(fma(a, b, c, np.dtype(dtype)), np.array(expected, dtype))


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=str)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_store_equals_numpy(dtype: np.dtype) -> None:
    rng = np.random.default_rng(2)
    x = rng.integers(0, 2**32, 1_000_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    assert not mismatch(store(x, dtype), x.astype(dtype))


def test_sum_squares_is_close_to_the_exact_sum() -> None:
    rng = np.random.default_rng(3)
    tensors = [rng.standard_normal(n).astype(np.float32) for n in (0, 1, 31, 1025, 16385, 40_000)]
    exact = sum(Fraction(float(x)) ** 2 for tensor in tensors for x in tensor)
    assert math.isclose(reference.sum_squares(tensors), float(exact), rel_tol=1e-14)


def test_sum_squares_sees_every_element_once() -> None:
    for size in (1, 33, 1024, 16385, 20_000):
        bits = np.exp2(np.arange(size) % 16 - 8.0)
        assert reference.sum_squares([bits]) == math.fsum(bits * bits)


@pytest.mark.parametrize("scale", [1e-320, 1e-200, 1e-150, 1.0, 1e155, 1e300])
def test_norm_has_a_second_look(scale: float) -> None:
    x = np.array([3.0, -4.0]) * scale
    assert math.isclose(reference.norm([x]), 5.0 * scale, rel_tol=1e-3 if scale < 1e-300 else 1e-15)


def test_blocks_decode_to_within_half_a_code() -> None:
    x = np.random.default_rng(4).standard_normal(1000).astype(np.float32)
    codes, scales = reference.encode_blocks(x)
    error = np.abs(reference.decode_blocks(codes, scales) - x)
    assert np.all(error <= np.repeat(scales, reference.BLOCK)[:1000] * 0.5001)
    assert codes.max() == 127 or codes.min() == -127
