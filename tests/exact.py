"""Exactly rounded arithmetic in NumPy: fused multiply-add and the 16-bit conversions.

Nothing here is compiled and nothing calls a C library's `fma`, so that a wrong instruction, flag or
library cannot be wrong on both sides of a comparison. `test_reference.py` checks it against libm.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

try:
    from ml_dtypes import bfloat16

    BFLOAT16: np.dtype | None = np.dtype(bfloat16)
except ImportError:  # the empty environment in which a wheel is checked
    BFLOAT16 = None

Array = NDArray[np.generic]

DTYPES = {name: np.dtype(name) for name in ("float32", "float64", "float16")}
if BFLOAT16 is not None:
    DTYPES["bfloat16"] = BFLOAT16


# --- fused multiply-add -----------------------------------------------------------------------


def fma(a: ArrayLike, b: ArrayLike, c: ArrayLike, dtype: np.dtype) -> Array:
    """a*b + c, rounded once to `dtype` (float32 or float64), element by element."""
    operands = np.broadcast_arrays(*(np.asarray(x, dtype) for x in (a, b, c)))
    with np.errstate(all="ignore"):
        return _fma32(*operands) if dtype == np.float32 else _fma64(*operands)


def _fma32(a: Array, b: Array, c: Array) -> Array:
    product = np.asarray(a.astype(np.float64) * b.astype(np.float64))  # 24 + 24 bits: exact
    c = c.astype(np.float64)
    total, error = _two_sum(product, c)
    # The second rounding can go wrong only where the first one ended halfway between two float32.
    halfway = np.nonzero((total.view(np.int64) & 0xFFFFFFF == 0) & (error != 0))
    total[halfway] = _add_to_odd(product[halfway], c[halfway])
    return total.astype(np.float32)


def _fma64(a: Array, b: Array, c: Array) -> Array:
    """Boldo and Melquiond 2008, Emulation of FMA and correctly rounded sums: Fmaemul."""
    high, low = _two_product(a, b)
    sum_high, sum_low = _two_sum(c, low)
    top, rest = _two_sum(high, sum_high)
    result = np.asarray(top + _add_to_odd(sum_low, rest))
    # Infinities, NaN, and the sign of an exact zero are those of the unfused expression, but that a
    # product that overflows must not meet an infinite c.
    unfused = np.where(np.isinf(c) & np.isfinite(a) & np.isfinite(b), c, a * b + c)
    result = np.where(~np.isfinite(unfused) | (result == 0), unfused, result)
    # The algorithm is exact only while no intermediate result overflows or underflows.
    for index in zip(*np.nonzero(_out_of_range(a, b, c)), strict=True):
        result[index] = _fma_exact(float(a[index]), float(b[index]), float(c[index]))
    return result


def _out_of_range(a: Array, b: Array, c: Array) -> NDArray[np.bool_]:
    def unsafe(x: Array, low: float, high: float) -> NDArray[np.bool_]:
        return np.isfinite(x) & (x != 0) & ((np.abs(x) < low) | (np.abs(x) > high))

    lost = (a * b == 0) & (a != 0) & (b != 0)
    factors = unsafe(a, 0.0, 2.0**990) | unsafe(b, 0.0, 2.0**990) | ~np.isfinite(a * b)
    terms = unsafe(a * b, 2.0**-900, 2.0**1000) | unsafe(c, 2.0**-900, 2.0**1000)
    return (factors | terms | lost) & np.isfinite(a) & np.isfinite(b) & np.isfinite(c)


def _fma_exact(a: float, b: float, c: float) -> float:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        return a * b + c
    try:
        return float(exact)  # Python divides integers with correct rounding
    except OverflowError:
        return np.inf if exact > 0 else -np.inf


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    total = np.asarray(a + b)
    shadow = total - a
    return total, (a - (total - shadow)) + (b - shadow)


def _two_product(a: Array, b: Array) -> tuple[Array, Array]:
    product = a * b
    (a_high, a_low), (b_high, b_low) = _split(a), _split(b)
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return product, error


def _split(x: Array) -> tuple[Array, Array]:
    scaled = x * (2.0**27 + 1)
    high = scaled - (scaled - x)
    return high, x - high


def _add_to_odd(a: Array, b: Array) -> Array:
    """a + b in float64, rounded to odd: a later rounding to fewer bits is then the only one."""
    total, error = _two_sum(a, b)
    bits = total.view(np.int64)
    inexact_even = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    away = (error > 0) == (total > 0)
    return np.where(inexact_even, np.where(away, bits + 1, bits - 1), bits).view(np.float64)


# --- conversions ------------------------------------------------------------------------------


def load(x: Array, arithmetic: np.dtype) -> Array:
    """The values of `x` in the arithmetic type, rounded once (exact unless `x` is wider)."""
    if x.dtype.name == "bfloat16":
        x = (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    with np.errstate(all="ignore"):
        return x.astype(arithmetic)


def store(x: Array, dtype: np.dtype) -> Array:
    """`x` (float32 or float64) in the storage type, rounded to nearest even."""
    if dtype == x.dtype:
        return x.copy()
    bits = _to_bfloat16 if dtype.name == "bfloat16" else _to_float16
    return bits(np.ascontiguousarray(x, np.float32).view(np.uint32)).view(dtype)


def _to_bfloat16(bits: NDArray[np.uint32]) -> NDArray[np.uint16]:
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, 0x7FC0, rounded).astype(np.uint16)


def _to_float16(bits: NDArray[np.uint32]) -> NDArray[np.uint16]:
    sign = (bits >> 16) & 0x8000
    magnitude = (bits & 0x7FFFFFFF).astype(np.int64)
    exponent = magnitude >> 23
    # Dropped bits: 13 for normal results, one more per binade below 2**-14, where the implicit bit
    # becomes explicit. 25 dropped bits and more leave zero.
    shift = np.clip(126 - exponent, 13, 25)
    subnormal = exponent < 113
    significand = np.where(subnormal, (magnitude & 0x7FFFFF) | 0x800000, magnitude)
    kept = significand >> shift
    rest, half = significand & ((1 << shift) - 1), 1 << (shift - 1)
    kept += (rest > half) | ((rest == half) & (kept & 1 == 1))
    result = np.where(subnormal, kept, kept - (112 << 10))
    result = np.where(magnitude >= 0x47800000, 0x7C00, result)  # 65536 and more, infinity
    result = np.where(magnitude > 0x7F800000, 0x7E00, result)
    return (sign.astype(np.int64) | result).astype(np.uint16)


# --- comparison -------------------------------------------------------------------------------


def bits_of(x: Array) -> Array:
    """The bit patterns of `x`, with one for every NaN (payload and sign are unspecified)."""
    x = np.asarray(x)
    if x.dtype == np.longdouble:  # no integer is as wide
        return x.reshape(-1).view(np.uint8)
    patterns = x.view(f"u{x.itemsize}") if x.ndim else x.reshape(1).view(f"u{x.itemsize}")
    if x.dtype.kind in "iub":
        return patterns
    with np.errstate(invalid="ignore"):  # signalling NaN
        nan = np.isnan(x)
    return np.where(nan, np.iinfo(patterns.dtype).max, patterns)


def mismatch(got: Array, expected: Array) -> str:
    """Empty if both hold the same bits, else where they differ first."""
    got, expected = np.asarray(got), np.asarray(expected)
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return f"{got.dtype}{got.shape} against {expected.dtype}{expected.shape}"
    differs = np.nonzero(bits_of(got).ravel() != bits_of(expected).ravel())[0]
    if not len(differs):
        return ""
    first = differs[0]
    values = got.ravel()[first], expected.ravel()[first]
    told = "got {!r}, expected {!r}".format(*values)
    return f"{len(differs)} of {got.size} differ, first [{first}]: {told}"
