"""The gradient norm: the bits of the fixed tree for any instruction set, dtype, thread count."""

from __future__ import annotations

import math

import fpenv
import fusedstep as fs
import guarded
import numpy as np
import pytest
import reference
from exact import BFLOAT16, DTYPES, Array

NORM_SIZES = (*guarded.VECTOR_SIZES, 1000, 1023, 1024, 1025, 3172, *guarded.CHUNK_SIZES, 65_537)


def gradients(dtype: str, sizes: tuple[int, ...], seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return guarded.GuardedList(guarded.random_list(rng, dtype, sizes), seed).arrays


def measured(grads: list[Array], **options: float) -> float:
    """grad_norm of a step that changes nothing and clips nothing."""
    params = [np.zeros(g.shape, np.float64 if g.dtype == np.float64 else np.float32) for g in grads]
    result = fs.fused_sgd_step(params, grads, lr=0.0, grad_clip_norm=math.inf, **options)
    assert not any(p.any() for p in params)
    return result.grad_norm


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_every_size_alone(dtype: str) -> None:
    for grad in gradients(dtype, NORM_SIZES):
        assert fs.sum_squares([grad]) == reference.sum_squares([grad]), grad.size


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("offset", range(1, 16, 2))
def test_alignment_changes_nothing(dtype: str, offset: int) -> None:
    values = gradients(dtype, (16_411,))[0]
    moved = guarded.Guarded(values, offset).array
    assert fs.sum_squares(moved) == reference.sum_squares([values])


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_threads_change_nothing(count: int) -> None:
    fs.set_num_threads(count)
    grads = gradients("float32", (1_000_003, 5, 200_000, 0, 16_384))
    assert fs.sum_squares(grads) == reference.sum_squares(grads)
    assert measured(grads) == reference.norm(grads)


@pytest.mark.usefixtures("isa")
def test_mixed_list() -> None:
    """Dtypes mix in one tree; the order of the call counts."""
    rng = np.random.default_rng(5)
    sizes = rng.integers(0, 20_000, 40)
    kinds = rng.choice(list(DTYPES), 40)
    grads = [gradients(str(d), (int(n),), int(n))[0] for d, n in zip(kinds, sizes, strict=True)]
    assert fs.sum_squares(grads) == reference.sum_squares(grads)
    assert measured(grads) == reference.norm(grads)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("count", [1000, 1024, 1025, 3000])
def test_many_small_tensors(count: int) -> None:
    """More than 1024 chunk sums take a second level of the tree."""
    grads = gradients("float32", (100,) * count)
    assert fs.sum_squares(grads) == reference.sum_squares(grads)


def test_three_levels() -> None:
    """1,048,577 and more chunk sums take a third level."""
    grads = np.split(
        guarded.random_values(np.random.default_rng(2), 1_100_000, "float32"), 1_100_000
    )
    assert fs.sum_squares(grads) == reference_of_single_elements(grads)


def reference_of_single_elements(grads: list[Array]) -> float:
    """The tree over tensors of one element: a chunk sum is the square itself."""
    sums = np.concatenate(grads).astype(np.float64) ** 2
    while len(sums) > 1:
        rows = reference.pad(sums, reference.TILE).reshape(-1, reference.ROWS, reference.LANES)
        sums = reference.tile_sum(rows)
    return float(sums[0])


def test_no_gradients_at_all() -> None:
    assert fs.sum_squares([]) == 0.0
    assert fs.sum_squares(np.zeros((3, 0), np.float32)) == 0.0


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("scale", [0.0, 1e-320, 1e-300, 1e-160, 1e-130, 1.0, 1e150, 1e155, 1e300])
def test_second_look(scale: float) -> None:
    """float64 squares that leave the range: the norm is that of scaled gradients."""
    rng = np.random.default_rng(6)
    for size in (1, 5, 1000, 20_000):
        grads = [
            rng.standard_normal(size) * scale,
            rng.standard_normal(7).astype(np.float32) * np.float32(min(scale, 1)),
        ]
        assert measured(grads) == reference.norm(grads)
        assert measured(grads[:1]) == reference.norm(grads[:1])


@pytest.mark.usefixtures("isa")
def test_second_look_at_the_largest_numbers() -> None:
    grads = [np.array([1.7e308, 1e300]), np.array([-1e308, 5e-324])]
    assert measured(grads) == reference.norm(grads)
    assert math.isclose(measured(grads), math.hypot(1.7e308, 1e308, 1e300), rel_tol=1e-15)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 31, 1023, 1024, 16_384, 19_999])
def test_nonfinite(dtype: str, bad: float, position: int) -> None:
    grad = gradients(dtype, (20_000,))[0]
    grad[position] = bad
    expected = math.nan if math.isnan(bad) else math.inf
    np.testing.assert_equal(measured([grad]), expected)
    np.testing.assert_equal(fs.sum_squares(grad), expected)


@pytest.mark.usefixtures("isa")
def test_nan_wins_over_infinity() -> None:
    grad = np.array([math.inf, math.nan, 1.0], np.float32)
    assert math.isnan(fs.sum_squares(grad))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_finite_16_bit_values(dtype: str) -> None:
    values = np.arange(65536, dtype=np.uint16).view(DTYPES[dtype])
    values = values[np.isfinite(values.astype(np.float32))]
    assert fs.sum_squares(values) == reference.sum_squares([values])


@pytest.mark.usefixtures("isa")
def test_float32_never_overflows() -> None:
    grad = np.full(100_003, np.finfo(np.float32).max, np.float32)
    assert fs.sum_squares(grad) == reference.sum_squares([grad])


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_caller_that_flushes_denormals(dtype: str, count: int) -> None:
    fs.set_num_threads(count)
    tiny = {"float64": 1e-310}.get(dtype, 1e-40)
    grad = np.full(300_003, tiny).astype(DTYPES[dtype])
    expected = reference.norm([grad])
    assert expected > 0
    with fpenv.flush_to_zero():
        before = fpenv.control_word()
        got = measured([grad])
        assert fpenv.control_word() == before
    assert got == expected


@pytest.mark.usefixtures("isa")
def test_caller_that_rounds_upward() -> None:
    grads = gradients("float64", (100_003,))
    expected = reference.norm(grads)
    with fpenv.round_upward():
        got = measured(grads)
    assert got == expected


@pytest.mark.usefixtures("isa")
def test_staged_gradients_are_measured_as_staged() -> None:
    """A float64 gradient of a float32 parameter counts as rounded, in the parameter's order."""
    rng = np.random.default_rng(8)
    grad = rng.standard_normal((300, 70))
    param = np.zeros((300, 70), np.float32, order="F")
    result = fs.fused_sgd_step(param, grad, lr=0.0, grad_clip_norm=math.inf)
    staged = grad.astype(np.float32).ravel(order="F")
    assert result.grad_norm == reference.norm([staged])


@pytest.mark.usefixtures("isa")
def test_rescaled_norm() -> None:
    grads = gradients("float32", (1000, 17))
    assert measured(grads, rescale_grad=-0.25) == 0.25 * reference.norm(grads)


def test_sum_squares_takes_trees_and_skips_none() -> None:
    a, b = gradients("float32", (100, 200))
    assert fs.sum_squares({"x": a, "y": [None, b]}) == reference.sum_squares([a, b])
    assert fs.sum_squares(iter([a, b])) == reference.sum_squares([a, b])


def test_sum_squares_of_a_strided_gradient() -> None:
    """A dense gradient is read in its memory order, any other one in some order."""
    a = gradients("float32", (10_000,))[0].reshape(100, 100)
    assert fs.sum_squares(a.T) == reference.sum_squares([a.ravel()])
    part = a[::-3, ::2]
    assert math.isclose(fs.sum_squares(part), reference.sum_squares([part.ravel()]), rel_tol=1e-14)


def test_bfloat16_is_a_gradient_of_its_own() -> None:
    assert fs.sum_squares(np.array([3, 4], BFLOAT16)) == 25.0
