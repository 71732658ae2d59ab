"""The 16-bit conversions, exhaustively, by public calls: every pattern in, every rounding out."""

from __future__ import annotations

import contextlib
from typing import Any

import fpenv
import fusedstep as fs
import numpy as np
import pytest
from exact import BFLOAT16, Array, bits_of, load, mismatch, store

SIXTEEN_BITS = [np.dtype(np.float16), BFLOAT16]
FLOAT32 = np.dtype(np.float32)


def all_patterns(dtype: np.dtype) -> Array:
    """All 65,536 values of a 16-bit type."""
    return np.arange(65536, dtype=np.uint16).view(dtype)


def rounding_cases() -> Array:
    """Ties of either 16-bit type and their neighbours, float16 subnormals, random patterns."""
    upper = np.arange(65536, dtype=np.uint32) << 16
    lower = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0FFF, 0x1000, 0x1001, 0x3000]
    subnormal = (np.arange(0, 4097, dtype=np.float64) / 2 * 2.0**-24).astype(np.float32)
    near = [
        subnormal,
        np.nextafter(subnormal, FLOAT32.type(1)),
        np.nextafter(subnormal, FLOAT32.type(-1)),
    ]
    rng = np.random.default_rng(0)
    patterns = [upper | np.uint32(low) for low in lower]
    patterns.append(rng.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32))
    return np.concatenate([p.view(np.float32) for p in patterns] + near + [-x for x in near])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_load_gradient(dtype: np.dtype) -> None:
    """p = 0 + g: the loaded value itself, but for the sign of zero."""
    grad = all_patterns(dtype)
    param = np.zeros(65536, np.float32)
    fs.fused_sgd_step(param, grad, lr=1.0, maximize=True)
    with np.errstate(invalid="ignore"):  # signalling NaN
        expected = load(grad, FLOAT32) + FLOAT32.type(0)
    assert not mismatch(param, expected)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_load_and_store_unchanged(dtype: np.dtype) -> None:
    """lr = 0: parameters and states of all patterns come back as they are (NaN as NaN)."""
    param, grad = all_patterns(dtype).copy(), np.zeros(65536, dtype)
    velocity = all_patterns(dtype)[::-1].copy()
    fs.fused_momentum_step(param, grad, velocity, lr=0.0, momentum=1 - 2.0**-40)
    assert not mismatch(param, all_patterns(dtype))
    expected = load(all_patterns(dtype)[::-1], FLOAT32)
    np.testing.assert_array_equal(load(velocity, FLOAT32), expected)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_store_rounds_to_nearest_even(dtype: np.dtype) -> None:
    """param_copy receives the parameter rounded once; lr = 0 leaves the parameter."""
    param = rounding_cases()
    before = param.copy()
    copy = np.zeros(param.shape, dtype)
    fs.fused_sgd_step(param, np.zeros_like(param), lr=0.0, param_copy=copy)
    assert not mismatch(param, before)
    assert not mismatch(copy, store(before, dtype))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_store_state(dtype: np.dtype) -> None:
    """A 16-bit velocity takes g, rounded once; the parameter takes the unrounded one."""
    grad = rounding_cases()
    finite = np.abs(grad) < 1e38
    grad = np.where(finite, grad, np.float32(1))
    velocity, param = np.zeros(grad.shape, dtype), np.zeros_like(grad)
    fs.fused_momentum_step(param, grad, velocity, lr=1.0)
    assert not mismatch(velocity, store(grad + FLOAT32.type(0), dtype))
    np.testing.assert_array_equal(param, -grad)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_nan_is_stored_as_nan(dtype: np.dtype) -> None:
    """Rounding the payload of a NaN must not carry into infinity or zero."""
    patterns = np.concatenate([np.arange(0x7F800001, 0x7FFFFFFF, 12345), [0x7F800001, 0x7FFFFFFF]])
    param = patterns.astype(np.uint32).view(np.float32)
    copy = np.zeros(param.shape, dtype)
    fs.fused_sgd_step(param, np.zeros_like(param), lr=0.0, param_copy=copy)
    assert np.isnan(copy.astype(np.float32)).all()
    assert len(np.unique(bits_of(copy))) == 1


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("rounding", [contextlib.nullcontext, fpenv.round_upward])
@pytest.mark.parametrize("wide", [np.float64, np.longdouble])
def test_staged_gradient_is_rounded_once(wide: type, rounding: Any) -> None:
    """Just above a float32 tie: rounding to float32 and then again would go the other way."""
    tie = 1 + 2.0**-24
    grad = np.array([tie, np.nextafter(wide(tie), wide(2)), np.nextafter(wide(tie), wide(0))], wide)
    param, expected = np.zeros(3, np.float32), -grad.astype(np.float32)
    with rounding():
        fs.fused_sgd_step(param, grad, lr=1.0)
    np.testing.assert_array_equal(param, expected)
