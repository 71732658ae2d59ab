"""Clipping and non-finite gradients: the order, the limits, and steps that must write nothing."""

from __future__ import annotations

import math
from typing import Any

import driver
import fpenv
import fusedstep as fs
import numpy as np
import pytest
import reference
from exact import Array, bits_of, mismatch

FUNCTIONS = [fs.fused_sgd_step, fs.fused_momentum_step, fs.fused_nesterov_step]
SIZES = (5, 16_385, 0, 1, 1000)


def arrays(seed: int, dtype: str = "float32", sizes: tuple[int, ...] = SIZES) -> list[Array]:
    return [x.copy() for x in driver.values(dtype, sizes, seed)]


def run(function: Any, steps: int = 2, **options: Any) -> tuple[list[Array], fs.StepResult]:
    """Parameters after some steps from the same start, and the last result."""
    params, state = arrays(1), {}
    for t in range(steps):
        result = function(params, arrays(50 + t), **state, lr=0.1, weight_decay=0.01, **options)
        state = result.state
    return params, result


def same(got: list[Array], expected: list[Array]) -> bool:
    return not any(mismatch(p, q) for p, q in zip(got, expected, strict=True))


# --- order and limits -------------------------------------------------------------------------


@pytest.mark.usefixtures("isa")
def test_norm_is_clipped_before_values() -> None:
    """(3, 4) has norm 5: clipping to 1 gives (0.6, 0.8), then to 0.7 gives (0.6, 0.7)."""
    param = np.zeros(2, np.float64)
    fs.fused_sgd_step(param, np.array([3.0, 4.0]), lr=1.0, grad_clip_norm=1.0, grad_clip_value=0.7)
    np.testing.assert_array_equal(param, [-(3.0 * (1 / 5.0)), -0.7])


@pytest.mark.usefixtures("isa")
def test_decay_is_not_clipped() -> None:
    param = np.array([100.0, 0.0])
    fs.fused_sgd_step(
        param,
        np.array([0.0, 4.0]),
        lr=1.0,
        weight_decay=0.5,
        grad_clip_norm=2.0,
        grad_clip_value=1.0,
    )
    np.testing.assert_array_equal(param, [50.0, -1.0])


@pytest.mark.usefixtures("isa")
def test_norm_runs_over_all_tensors() -> None:
    params = {"a": np.zeros(1), "b": [np.zeros(1)]}
    grads = {"b": [np.array([4.0])], "a": np.array([3.0])}
    result = fs.fused_sgd_step(params, grads, lr=1.0, grad_clip_norm=2.5)
    assert (result.grad_norm, result.clip_coef) == (5.0, 0.5)
    assert (params["a"][0], params["b"][0][0]) == (-1.5, -2.0)


@pytest.mark.usefixtures("isa")
def test_no_epsilon() -> None:
    """The clipped gradient has the limit as its norm, and a norm equal to the limit is left."""
    param = np.zeros(2)
    result = fs.fused_sgd_step(param, np.array([3.0, 4.0]), lr=1.0, grad_clip_norm=5.0)
    assert result.clip_coef == 1.0
    np.testing.assert_array_equal(param, [-3.0, -4.0])
    result = fs.fused_sgd_step(param, np.array([6e-9, 8e-9]), lr=1.0, grad_clip_norm=1e-10)
    assert result.clip_coef == 1e-10 / result.grad_norm


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_inactive_clips_are_none(function: Any) -> None:
    expected, plain = run(function)
    assert (plain.grad_norm, plain.clip_coef, plain.skipped) == (None, 1.0, False)
    got, result = run(function, grad_clip_norm=1e9, grad_clip_value=1e9)
    assert same(got, expected)
    assert result.clip_coef == 1.0
    got, result = run(function, grad_clip_norm=math.inf, grad_clip_value=math.inf)
    assert same(got, expected)
    assert result.grad_norm == reference.norm(arrays(51))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_measuring_does_not_spread_nonfinite_gradients(bad: float) -> None:
    """grad_clip_norm=inf is the same as None, also for elements beside an infinity or NaN."""
    grad = np.array([1.0, bad, 2.0], np.float32)
    expected, got = np.zeros(3, np.float32), np.zeros(3, np.float32)
    fs.fused_sgd_step(expected, grad, lr=1.0)
    result = fs.fused_sgd_step(got, grad, lr=1.0, grad_clip_norm=math.inf)
    assert not mismatch(got, expected)
    assert result.clip_coef == 1.0
    np.testing.assert_equal(result.grad_norm, bad)


@pytest.mark.usefixtures("isa")
def test_value_clip_keeps_nan_and_limits_infinity() -> None:
    param = np.zeros(4, np.float32)
    grad = np.array([math.nan, math.inf, -math.inf, 0.25], np.float32)
    fs.fused_sgd_step(param, grad, lr=1.0, grad_clip_value=0.5)
    np.testing.assert_array_equal(param, [math.nan, -0.5, 0.5, -0.25])


@pytest.mark.usefixtures("isa")
def test_norm_clip_of_nonfinite_gradients() -> None:
    """As in braintools: NaN anywhere makes all NaN; infinity leaves zero, and NaN in its place."""
    params = [np.ones(2, np.float32), np.ones(1, np.float32)]
    fs.fused_sgd_step(
        params, [np.float32([1, math.inf]), np.float32([2])], lr=1.0, grad_clip_norm=1.0
    )
    np.testing.assert_array_equal(params[0], [1.0, math.nan])
    np.testing.assert_array_equal(params[1], [1.0])
    params = [np.ones(2, np.float32), np.ones(1, np.float32)]
    result = fs.fused_sgd_step(
        params, [np.float32([1, math.nan]), np.float32([2])], lr=1.0, grad_clip_norm=1.0
    )
    assert np.isnan(np.concatenate(params)).all()
    assert math.isnan(result.clip_coef)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_clip_of_extreme_float64_gradients(scale: float) -> None:
    """The squares under- or overflow; the clipped gradient is right all the same."""
    param = np.zeros(2)
    result = fs.fused_sgd_step(
        param, np.array([3.0, 4.0]) * scale, lr=1.0, grad_clip_norm=scale * 2.5
    )
    assert math.isclose(result.grad_norm, 5 * scale, rel_tol=1e-15)
    np.testing.assert_allclose(param, [-1.5 * scale, -2 * scale], rtol=1e-15)


# --- a norm from elsewhere ----------------------------------------------------------------------


@pytest.mark.usefixtures("isa")
def test_given_norm() -> None:
    """The same bits as measuring it: the raw norm, before rescale_grad."""
    grads = arrays(9)
    raw = math.sqrt(fs.sum_squares(grads))
    options = {"lr": 0.1, "grad_clip_norm": 1.0, "rescale_grad": 0.5}
    expected, got = arrays(1), arrays(1)
    first = fs.fused_sgd_step(expected, grads, **options)
    second = fs.fused_sgd_step(got, grads, grad_norm=raw, **options)
    assert same(got, expected)
    assert (first.grad_norm, first.clip_coef) == (second.grad_norm, second.clip_coef)
    assert second.grad_norm == 0.5 * raw


def test_given_norm_does_not_depend_on_the_rounding_direction() -> None:
    param = np.zeros(1)
    options = {"lr": 1.0, "rescale_grad": 0.1, "grad_norm": 0.7, "grad_clip_norm": 0.01}
    expected = fs.fused_sgd_step(param, np.ones(1), **options)
    with fpenv.round_upward():
        result = fs.fused_sgd_step(param, np.ones(1), **options)
    assert (result.grad_norm, result.clip_coef) == (expected.grad_norm, expected.clip_coef)


@pytest.mark.usefixtures("isa")
def test_given_norm_is_used_as_it_is() -> None:
    param = np.zeros(1)
    result = fs.fused_sgd_step(param, np.ones(1), lr=1.0, grad_clip_norm=1.0, grad_norm=4.0)
    assert (param[0], result.grad_norm, result.clip_coef) == (-0.25, 4.0, 0.25)


def test_sharded_norm_agrees() -> None:
    """Two shards that reduce their sums of squares take the step of the whole."""
    whole, grads = arrays(1), arrays(2)
    fs.fused_nesterov_step(whole, grads, lr=0.1, grad_clip_norm=0.5)
    shards, total = (slice(0, 2), slice(2, None)), 0.0
    total = math.sqrt(sum(fs.sum_squares(grads[shard]) for shard in shards))
    parts = arrays(1)
    for shard in shards:
        fs.fused_nesterov_step(
            parts[shard], grads[shard], lr=0.1, grad_clip_norm=0.5, grad_norm=total
        )
    assert same(parts, whole)


# --- groups -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("isa")
def test_groups_share_the_norm_and_have_limits_of_their_own() -> None:
    a, b = np.zeros(1), np.zeros(1)
    opt = fs.SGD(
        [{"params": [a], "grad_clip_norm": 1.0}, {"params": [b], "grad_clip_norm": 2.5}], lr=1.0
    )
    result = opt.step([[np.array([3.0])], [np.array([4.0])]])
    assert (a[0], b[0]) == (-3.0 * (1 / 5), -2.0)
    assert (result.grad_norm, result.clip_coef) == (5.0, 1 / 5)


@pytest.mark.usefixtures("isa")
def test_groups_rescale_on_their_own() -> None:
    """The norm is taken after rescale_grad, whose sign does not matter to it."""
    a, b = np.zeros(1), np.zeros(1)
    opt = fs.SGD(
        [
            {"params": [a], "rescale_grad": 0.5},
            {"params": [b], "rescale_grad": -2.0, "maximize": True},
        ],
        lr=1.0,
        grad_clip_norm=2.5,
    )
    result = opt.step([[np.array([6.0])], [np.array([2.0])]])
    assert (result.grad_norm, result.clip_coef) == (5.0, 0.5)
    assert (a[0], b[0]) == (-1.5, -2.0)


# --- on_nonfinite -----------------------------------------------------------------------------

BAD = [("float32", math.nan), ("float32", math.inf), ("float16", -math.inf), ("float64", math.nan)]


def state_of(size: int, dtype: str) -> Array:
    return np.full(size, 0.25, "float64" if dtype == "float64" else "float32")


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize(("dtype", "bad"), BAD)
@pytest.mark.parametrize("clip", [None, 1.0, math.inf])
@pytest.mark.parametrize("count", [1, 2])
def test_skip_leaves_every_byte(dtype: str, bad: float, clip: float | None, count: int) -> None:
    fs.set_num_threads(count)
    sizes = (40_000, 3, 300_000)
    params, grads = arrays(1, dtype, sizes), arrays(2, dtype, sizes)
    velocity = [state_of(n, dtype) for n in sizes]
    grads[2][299_999] = bad
    before = [x.copy() for x in params + velocity]
    result = fs.fused_nesterov_step(
        params, grads, velocity, lr=0.1, weight_decay=0.1, grad_clip_norm=clip, on_nonfinite="skip"
    )
    assert result.skipped
    assert same(params + velocity, before)
    grads[2][299_999] = 1
    result = fs.fused_nesterov_step(
        params, grads, velocity, lr=0.1, grad_clip_norm=clip, on_nonfinite="skip"
    )
    assert not result.skipped
    assert not same(params, before[:3])


@pytest.mark.usefixtures("isa")
def test_skip_of_the_first_functional_step() -> None:
    """The state of a skipped first step must let the next one be the first."""
    param, state = np.ones(3, np.float32), {}
    bad, good = np.float32([1, math.nan, 1]), np.float32([1, 2, 3])
    options = {"lr": 0.5, "dampening": 0.5, "on_nonfinite": "skip"}
    for grad in (bad, bad, good, good):
        result = fs.fused_momentum_step(param, grad, **state, **options)
        state = result.state
    expected, state = np.ones(3, np.float32), {}
    for grad in (good, good):
        state = fs.fused_momentum_step(expected, grad, **state, **options).state
    assert not mismatch(param, expected)


@pytest.mark.usefixtures("isa")
def test_skip_of_the_first_object_step() -> None:
    param = np.ones(3, np.float32)
    opt = fs.Momentum({"w": param}, lr=0.5, dampening=0.5, on_nonfinite="skip")
    assert opt.step({"w": np.float32([1, math.inf, 1])}).skipped
    np.testing.assert_array_equal(param, np.ones(3))
    assert opt.state_dict()["state"] == {} or all(
        entry.get("step", 0) == 0 for entry in opt.state_dict()["state"].values()
    )
    assert not opt.step({"w": np.ones(3, np.float32)}).skipped
    np.testing.assert_array_equal(param, np.full(3, 0.5))  # undamped: it was the first


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize("count", [1, 2])
def test_raise_names_the_array_and_writes_nothing(count: int) -> None:
    fs.set_num_threads(count)
    params = {"W1": np.ones(200_000, np.float32), "b": [np.ones(3, np.float32)]}
    grads = {"W1": np.ones(200_000, np.float32), "b": [np.float32([1, math.inf, 0])]}
    with pytest.raises(FloatingPointError, match=r"grads\['b'\]\[0\]"):
        fs.fused_momentum_step(params, grads, lr=0.1, on_nonfinite="raise")
    grads["W1"][199_999] = math.nan
    with pytest.raises(FloatingPointError, match=r"grads\['W1'\]"):
        fs.fused_momentum_step(params, grads, lr=0.1, on_nonfinite="raise")
    assert np.all(params["W1"] == 1)
    assert np.all(params["b"][0] == 1)


@pytest.mark.usefixtures("isa")
def test_raise_in_an_object_does_not_advance() -> None:
    param = np.ones(2, np.float32)
    opt = fs.MomentumNesterov([param], lr=lambda t: 1.0 / (t + 1), on_nonfinite="raise")
    opt.step([np.ones(2, np.float32)])
    before = {k: np.copy(v) for k, v in opt.state_dict()["state"][0].items()}
    bytes_before = param.copy()
    with pytest.raises(FloatingPointError, match=r"grads\[0\]"):
        opt.step([np.float32([math.nan, 0])])
    after = opt.state_dict()["state"][0]
    assert all(np.array_equal(bits_of(np.asarray(after[k])), bits_of(v)) for k, v in before.items())
    assert not mismatch(param, bytes_before)


@pytest.mark.usefixtures("isa")
def test_skip_does_not_advance_the_count() -> None:
    """The lr of a bare function depends on the steps applied, not on the steps tried."""
    seen: list[int] = []
    param = np.zeros(1)
    opt = fs.SGD([param], lr=lambda t: seen.append(t) or 1.0, on_nonfinite="skip")
    for value in (1.0, math.nan, math.nan, 1.0):
        opt.step([np.array([value])])
    assert param[0] == -2.0
    assert seen[-4:] == [0, 1, 1, 1]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("mode", ["skip", "raise"])
def test_finite_float64_beyond_the_range_of_squares_is_finite(mode: str) -> None:
    param = np.zeros(2)
    result = fs.fused_sgd_step(param, np.array([1e200, -1e300]), lr=1e-300, on_nonfinite=mode)
    assert not result.skipped
    np.testing.assert_allclose(param, [-1e-100, 1.0])


@pytest.mark.usefixtures("isa")
def test_gradients_that_overflow_in_staging_are_nonfinite() -> None:
    """1e39 is infinite as float32, which is what the step would use."""
    param = np.ones(1, np.float32)
    result = fs.fused_sgd_step(param, np.array([1e39]), lr=1.0, on_nonfinite="skip")
    assert result.skipped
    assert param[0] == 1


@pytest.mark.usefixtures("isa")
def test_given_norm_decides_about_skipping() -> None:
    """Another rank had the NaN: all ranks must skip."""
    param = np.ones(1)
    result = fs.fused_sgd_step(param, np.ones(1), lr=1.0, grad_norm=math.nan, on_nonfinite="skip")
    assert result.skipped
    assert param[0] == 1


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("mode", ["skip", "raise"])
def test_given_norm_does_not_hide_gradients(mode: str) -> None:
    """Whoever reduced the norm may have left something out; nothing of it may be written."""
    param, grad = np.ones(2), np.array([1.0, math.inf])
    options = {"lr": 1.0, "grad_norm": 1.0, "on_nonfinite": mode}
    if mode == "skip":
        assert fs.fused_sgd_step(param, grad, **options).skipped
    else:
        with pytest.raises(FloatingPointError, match="grads"):
            fs.fused_sgd_step(param, grad, **options)
    assert np.all(param == 1)


@pytest.mark.usefixtures("isa")
def test_propagate_is_the_default() -> None:
    param = np.ones(2, np.float32)
    result = fs.fused_sgd_step(param, np.float32([math.nan, 1]), lr=1.0)
    assert not result.skipped
    np.testing.assert_array_equal(param, [math.nan, 0.0])


def test_skip_with_groups_that_rescale_differently() -> None:
    """Each group has a norm of its own then; one bad element anywhere skips them all."""
    params = [np.ones(3), np.ones(20_000, np.float32), np.ones(2)]
    groups = [
        {"params": [p], "rescale_grad": s} for p, s in zip(params, (1.0, 0.5, 1.0), strict=True)
    ]
    for bad in range(3):
        grads = [[np.ones(p.shape)] for p in params]
        grads[bad][0][-1] = math.nan
        assert fs.SGD(groups, lr=0.1, on_nonfinite="skip").step(grads).skipped
        with pytest.raises(FloatingPointError, match=rf"grads\[{bad}\]\[0\]"):
            fs.SGD(groups, lr=0.1, on_nonfinite="raise").step(grads)
    assert all(np.all(p == 1) for p in params)


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_joint_norm_of_extreme_groups(scale: float) -> None:
    """(3, 4, 12) has norm 13, also where the squares of some groups leave the range."""
    params = [np.zeros(1) for _ in range(3)]
    groups = [
        {"params": [p], "rescale_grad": s} for p, s in zip(params, (2.0, 1.0, 0.5), strict=True)
    ]
    opt = fs.SGD(groups, lr=0.0, grad_clip_norm=math.inf)
    result = opt.step([[np.array([x * scale])] for x in (1.5, 4.0, 24.0)])
    assert math.isclose(result.grad_norm, 13 * scale, rel_tol=1e-15)
