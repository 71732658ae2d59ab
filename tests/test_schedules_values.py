"""Values of the schedules that torch has not, by hand and as their authors write them; ranges."""

from __future__ import annotations

import math
from typing import Any

import fusedstep as fs
import numpy as np
import pytest
from fusedstep.schedules.shapes import interpolated
from hypothesis import given
from hypothesis import strategies as st

STEPS = range(60)


def close(ours: float, expected: float) -> bool:
    return math.isclose(ours, expected, rel_tol=1e-14, abs_tol=1e-17)


# --- formulas of other systems ------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1, 1e-6, 3.0])
def test_keras_decay(decay: float) -> None:
    schedule = fs.InverseTimeDecayLR(0.01, decay_rate=decay)
    for iterations in STEPS:
        lr = 0.01 * (1.0 / (1.0 + decay * iterations))
        assert close(schedule.at(iterations), lr)


@pytest.mark.parametrize("staircase", [False, True])
def test_keras_inverse_time_decay(staircase: bool) -> None:
    schedule = fs.InverseTimeDecayLR(0.1, decay_steps=7, decay_rate=0.5, staircase=staircase)
    for step in STEPS:
        p = step / 7
        if staircase:
            p = math.floor(p)
        assert close(schedule.at(step), 0.1 / (1 + 0.5 * p))


@pytest.mark.parametrize(("gamma", "power"), [(1e-4, 0.75), (0.5, 2.0), (0.1, 0.0)])
def test_caffe_inv(gamma: float, power: float) -> None:
    schedule = fs.InverseTimeDecayLR(0.01, decay_rate=gamma, power=power)
    for iteration in STEPS:
        assert close(schedule.at(iteration), 0.01 * (1 + gamma * iteration) ** (-power))


def test_sklearn_invscaling() -> None:
    schedule = fs.InverseTimeDecayLR(0.2, power=0.5)
    for t in STEPS:
        assert close(schedule.at(t), 0.2 / (t + 1) ** 0.5)


def test_sklearn_itself() -> None:
    """Its optimizer: t counts samples there."""
    optimizers = pytest.importorskip("sklearn.neural_network._stochastic_optimizers")
    theirs = optimizers.SGDOptimizer([np.zeros(1)], 0.2, "invscaling", power_t=0.3)
    ours = fs.InverseTimeDecayLR(0.2, power=0.3)
    for samples in range(0, 2000, 100):
        theirs.iteration_ends(samples)
        assert close(ours.at(samples), theirs.learning_rate)


def test_caffe_exp_and_poly() -> None:
    exponential, polynomial = fs.ExponentialLR(0.1, 0.9), fs.PolynomialLR(0.1, 50, 0.9)
    for iteration in STEPS:
        assert close(exponential.at(iteration), 0.1 * 0.9**iteration)
        left = max(1 - iteration / 50, 0.0)
        assert math.isclose(polynomial.at(iteration), 0.1 * left**0.9, rel_tol=1e-12)


@pytest.mark.parametrize("staircase", [False, True])
@pytest.mark.parametrize(
    ("rate", "end"),
    [(0.5, None), (0.5, 0.02), (0.5, 0.2), (2.0, None), (2.0, 0.7), (2.0, 0.05)],
)
@pytest.mark.parametrize("begin", [0, 9])
def test_optax_exponential_decay(
    rate: float, end: float | None, begin: int, staircase: bool
) -> None:
    schedule = fs.ExponentialDecayLR(0.1, 12, rate, begin, staircase, end)
    for count in STEPS:
        decreased = count - begin
        p = decreased / 12
        if staircase:
            p = math.floor(p)
        value = 0.1 if decreased <= 0 else 0.1 * rate**p
        if end is not None:
            value = max(value, end) if rate < 1 else min(value, end)
        assert close(schedule.at(count), value)


def test_exponential_growth_stops_where_it_is_told() -> None:
    assert fs.ExponentialDecayLR(0.1, 1, 10.0, end_value=5.0).at(10**6) == 5.0
    endless = fs.ExponentialLR(0.1, 10.0, last_epoch=10**6)
    assert endless.current_lr == math.inf
    with pytest.raises(ValueError, match=r"lr: .*got inf"):
        fs.fused_sgd_step(np.zeros(1), np.ones(1), lr=endless)


def test_optax_warmup_cosine() -> None:
    schedule = fs.WarmupCosineSchedule(0.4, 10, 40, warmup_start_lr=0.1, eta_min=0.02)
    assert [schedule.at(t) for t in (0, 10, 40, 1000)] == [0.1, 0.4, 0.02, 0.02]
    for step in range(10):
        assert close(schedule.at(step), 0.1 + 0.3 * step / 10)
    for step in range(10, 41):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 10) / 30))
        assert math.isclose(schedule.at(step), 0.02 + 0.38 * cosine, rel_tol=1e-13)
    assert fs.WarmupCosineSchedule(0.4, 0, 4).at(0) == 0.4


def test_warmup() -> None:
    schedule = fs.WarmupScheduler(0.5, 4, 0.1)
    expected = [0.1, 0.2, 0.3, 0.4, 0.5, 0.5]
    assert all(map(close, [schedule.at(t) for t in range(6)], expected))
    assert [schedule.at(t) for t in (0, 4, 10**9)] == [0.1, 0.5, 0.5]
    assert [fs.WarmupScheduler(0.5, 0, 0.1).at(t) for t in range(2)] == [0.5, 0.5]


def test_warmup_is_the_linear_schedule_of_torch() -> None:
    ours, other = fs.WarmupScheduler(0.5, 7, 0.1), fs.LinearLR(0.5, 0.2, 1.0, 7)
    for t in range(12):
        assert close(ours.at(t), other.at(t))


def test_piecewise_values_are_absolute() -> None:
    schedule = fs.PiecewiseConstantSchedule(boundaries=[0, 2, 3], values=[9.0, 0.5, 0.0, 0.25])
    assert [schedule.at(t) for t in range(5)] == [0.5, 0.5, 0.0, 0.25, 0.25]
    assert schedule.base_lr == 9.0
    assert fs.PiecewiseConstantSchedule([], [0.5]).at(3) == 0.5


def test_piecewise_takes_arrays() -> None:
    schedule = fs.PiecewiseConstantSchedule(np.array([2, 4]), np.array([0.5, 0.25, 0.125]))
    assert [schedule.at(t) for t in range(5)] == [0.5, 0.5, 0.25, 0.25, 0.125]
    assert schedule.state_dict()["values"] == (0.5, 0.25, 0.125)


# --- beyond the end, and corners ------------------------------------------------------------------


@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize("strategy", ["cos", "linear"])
def test_one_cycle_stays_where_it_ends(strategy: str, three_phase: bool) -> None:
    schedule = fs.OneCycleLR(1.0, 20, anneal_strategy=strategy, three_phase=three_phase)
    for t in (19, 20, 21, 10**9):
        assert schedule.at(t) == 1.0 / 25.0 / 1e4
    momentum = fs.OneCycleMomentum(20, anneal_strategy=strategy, three_phase=three_phase)
    assert momentum.at(10**9) == 0.95


def test_one_cycle_without_a_rise() -> None:
    """pct_start * total_steps == 1: torch divides by zero at step 0."""
    schedule = fs.OneCycleLR(1.0, 10, pct_start=0.1, anneal_strategy="linear")
    assert schedule.at(0) == 1.0
    assert schedule.at(9) == 1.0 / 25.0 / 1e4
    assert fs.OneCycleLR(1.0, 1, pct_start=1.0).at(0) == 1.0


def test_cosine_is_exact_after_many_periods() -> None:
    schedule = fs.CosineAnnealingLR(0.3, 7, 0.1)
    for t in range(14):
        assert schedule.at(t + 14 * 10**12) == schedule.at(t)
    assert schedule.at(7) == 0.1
    assert schedule.at(14) == 0.3


def test_restarts_far_out() -> None:
    """torch finds the run by a logarithm there, which rounds."""
    schedule = fs.CosineAnnealingWarmRestarts(0.3, 3, 3)
    for n in range(1, 30):
        start = 3 * (3**n - 1) // 2
        assert schedule.at(start) == 0.3
        assert schedule.at(start - 1) < 0.3 * 0.3
        assert close(schedule.at(start + 3**n), 0.3 * (1 + math.cos(math.pi / 3)) / 2)


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_a_scale_function_gives_shares(value: float) -> None:
    schedule = fs.CyclicLR(scale_fn=lambda _: value, step_size_up=2, scale_mode="iterations")
    with pytest.raises(ValueError, match=r"scale_fn\(1\): expected a number in \[0, 1\]"):
        schedule.at(1)


def test_a_lambda_gives_numbers() -> None:
    schedule = fs.LambdaLR(0.1, lambda t: -1.0 if t else None)  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match=r"lr_lambda\(0\): expected a number >= 0, got None"):
        schedule.at(0)
    with pytest.raises(ValueError, match=r"lr_lambda\(1\): .*got -1\.0"):
        schedule.at(1)


def test_sequences_may_hold_different_rates() -> None:
    first, second = fs.ConstantLR(0.5, 1.0, 0), fs.PiecewiseConstantSchedule([1], [0.25, 8.0])
    schedule = fs.SequentialLR([first, second, fs.ExponentialLR(1.0, 0.5)], [2, 4])
    assert [schedule.at(t) for t in range(7)] == [0.5, 0.5, 0.25, 8.0, 1.0, 0.5, 0.25]
    assert schedule.base_lr == 0.5
    first.base_lr = 0.125
    assert schedule.at(0) == 0.125


def test_chains_multiply_factors() -> None:
    half = fs.PiecewiseConstantSchedule([2], [8.0, 4.0])
    schedule = fs.ChainedScheduler([fs.ExponentialLR(0.5, 0.5), fs.StepLR(3.0, 1, 0.5), half])
    assert [schedule.at(t) for t in range(4)] == [0.5, 0.125, 0.015625, 0.00390625]
    assert schedule.base_lr == 0.5


# --- properties -------------------------------------------------------------------------------

rates = st.floats(0.0, 10.0)
factors = st.floats(0.0, 1.0)
counts = st.integers(1, 40)
epochs = st.integers(0, 10**6)
modes = st.sampled_from(["triangular", "triangular2", "exp_range"])
strategies = st.sampled_from(["cos", "linear"])

# Schedules with random constants, and between which two of them all values lie.
BOUNDED: dict[str, Any] = {
    "constant": st.builds(fs.ConstantLR, rates, factors, counts).map(
        lambda s: (s, 0.0, s.base_lr)
    ),
    "step": st.builds(fs.StepLR, rates, counts, factors).map(lambda s: (s, 0.0, s.base_lr)),
    "decay": st.builds(
        fs.ExponentialDecayLR, rates, counts, st.floats(1e-3, 1.0), counts, st.booleans()
    ).map(lambda s: (s, 0.0, s.base_lr)),
    "inverse time": st.builds(
        fs.InverseTimeDecayLR, rates, counts, rates, rates, st.booleans()
    ).map(lambda s: (s, 0.0, s.base_lr)),
    "linear": st.builds(fs.LinearLR, rates, factors, factors, counts).map(
        lambda s: (s, s.base_lr * s.start_factor, s.base_lr * s.end_factor)
    ),
    "polynomial": st.builds(fs.PolynomialLR, rates, counts, rates).map(
        lambda s: (s, 0.0, s.base_lr)
    ),
    "cosine": st.builds(fs.CosineAnnealingLR, rates, counts, rates).map(
        lambda s: (s, s.eta_min, s.base_lr)
    ),
    "restarts": st.builds(
        fs.CosineAnnealingWarmRestarts, rates, counts, st.integers(1, 4), rates
    ).map(lambda s: (s, s.eta_min, s.base_lr)),
    "warm-up": st.builds(fs.WarmupScheduler, rates, counts, rates).map(
        lambda s: (s, s.warmup_start_lr, s.base_lr)
    ),
    "warm-up, cosine": st.builds(
        lambda lr, warmup, more: fs.WarmupCosineSchedule(lr, warmup, warmup + more),
        rates, counts, counts,
    ).map(lambda s: (s, 0.0, s.base_lr)),
    "one cycle": st.builds(
        fs.OneCycleLR, rates, counts, pct_start=factors, anneal_strategy=strategies,
        three_phase=st.booleans(),
    ).map(lambda s: (s, s.base_lr / s.final_div_factor, s.max_lr)),
    "cyclic": st.builds(fs.CyclicLR, rates, rates, counts, counts, modes, factors).map(
        lambda s: (s, s.base_lr, s.max_lr)
    ),
    "Sutskever": st.builds(fs.SutskeverMomentum, st.floats(0.0, 0.999), counts).map(
        lambda s: (s, 0.0, s.max_momentum)
    ),
    "one-cycle momentum": st.builds(
        fs.OneCycleMomentum, counts, st.floats(0.0, 0.999), st.floats(0.0, 0.999), factors,
        strategies, st.booleans(),
    ).map(lambda s: (s, s.base_momentum, s.max_momentum)),
    "cyclic momentum": st.builds(
        fs.CyclicMomentum, st.floats(0.0, 0.999), st.floats(0.0, 0.999), counts, counts, modes,
        factors,
    ).map(lambda s: (s, s.base_momentum, s.max_momentum)),
    "linear momentum": st.builds(
        fs.LinearMomentum, st.floats(0.0, 0.999), st.floats(0.0, 0.999), counts
    ).map(lambda s: (s, s.start, s.end)),
    "Nesterov": st.builds(fs.NesterovMomentum, st.none() | st.floats(3.0, 50.0)).map(
        lambda s: (s, 0.0, math.nextafter(1.0, 0.0))
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BOUNDED)
@given(data=st.data())
def test_values_lie_between_the_constants(kind: str, data: st.DataObject) -> None:
    schedule, one, other = data.draw(BOUNDED[kind])
    far = st.integers(0, 2000) if kind == "Nesterov" else epochs
    for t in data.draw(st.lists(st.integers(0, 100) | far, min_size=1, max_size=20)):
        assert min(one, other) <= schedule.at(t) <= max(one, other)


@pytest.mark.parametrize("kind", BOUNDED)
@given(data=st.data())
def test_the_formula_is_pure(kind: str, data: st.DataObject) -> None:
    schedule, *_ = data.draw(BOUNDED[kind])
    before = vars(schedule).copy()
    order = data.draw(st.permutations(range(30)))
    assert [schedule.at(t) for t in order] == [schedule.copied().at(t) for t in order]
    assert vars(schedule) == before


FALLING = ["step", "decay", "inverse time", "polynomial"]
RISING = ["Sutskever", "Nesterov"]


@pytest.mark.parametrize("kind", [*FALLING, *RISING])
@given(data=st.data())
def test_what_only_falls_or_rises(kind: str, data: st.DataObject) -> None:
    schedule, *_ = data.draw(BOUNDED[kind])
    values = [schedule.at(t) for t in range(100)]
    assert values == sorted(values, reverse=kind in FALLING)


@given(start=rates, end=rates, share=st.just(math.nextafter(1.0, 0.0)) | factors)
def test_no_line_passes_its_end(start: float, end: float, share: float) -> None:
    assert min(start, end) <= interpolated(start, end, share) <= max(start, end)


@pytest.mark.parametrize("kind", ["linear", "warm-up", "linear momentum"])
@given(data=st.data())
def test_straight_lines(kind: str, data: st.DataObject) -> None:
    """Exact at both ends, without a bump in between."""
    schedule, start, end = data.draw(BOUNDED[kind])
    values = [schedule.at(t) for t in range(100)]
    assert values == sorted(values, reverse=start > end)
    assert (values[0], values[-1]) == (start, end)
