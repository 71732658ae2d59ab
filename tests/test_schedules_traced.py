"""Schedules in compiled code: `at` of a step count that JAX traces gives the values of integers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import fusedstep as fs
import numpy as np
import pytest

pytestmark = pytest.mark.framework("jax")
try:  # a missing JAX leaves these tests out, by name; with an installed one this cannot fail
    jax = importlib.import_module("jax")
except ImportError:
    jax = None

STEPS = range(70)
RESTARTS = {"T_0": 4, "T_mult": 2, "eta_min": 0.01}
SCHEDULES: dict[str, Callable[[], Any]] = {
    "constant": lambda: fs.ConstantLR(0.1, 0.5, 7),
    "step": lambda: fs.StepLR(0.1, 7, 0.3),
    "milestones": lambda: fs.MultiStepLR(0.1, (3, 17, 30), 0.3),
    "pieces": lambda: fs.PiecewiseConstantSchedule((5, 9, 40), (0.1, 1.0, 0.01, 0.2)),
    "one piece": lambda: fs.PiecewiseConstantSchedule((), (0.1,)),
    "exponential": lambda: fs.ExponentialLR(0.1, 0.9),
    "decay": lambda: fs.ExponentialDecayLR(0.1, 12, 0.5, 9, end_value=0.02),
    "decay in stairs": lambda: fs.ExponentialDecayLR(0.1, 12, 2.0, 9, True, end_value=0.7),
    "inverse time": lambda: fs.InverseTimeDecayLR(0.1, 5, 0.5, 0.7, staircase=True),
    "linear": lambda: fs.LinearLR(0.1, 0.25, 1.0, 9),
    "polynomial": lambda: fs.PolynomialLR(0.1, 33, 1.7),
    "cosine": lambda: fs.CosineAnnealingLR(0.1, 15, 0.01),
    "restarts": lambda: fs.CosineAnnealingWarmRestarts(0.1, **RESTARTS),
    "equal restarts": lambda: fs.CosineAnnealingWarmRestarts(0.1, 7),
    "warm-up": lambda: fs.WarmupScheduler(0.1, 9, 0.02),
    "no warm-up": lambda: fs.WarmupScheduler(0.1, 0, 0.02),
    "warm-up and cosine": lambda: fs.WarmupCosineSchedule(0.1, 9, 50, 0.02, 0.001),
    "no warm-up, cosine": lambda: fs.WarmupCosineSchedule(0.1, 0, 50),
    "one cycle": lambda: fs.OneCycleLR(0.1, 50),
    "one cycle, straight": lambda: fs.OneCycleLR(0.1, 50, anneal_strategy="linear"),
    "one cycle, three phases": lambda: fs.OneCycleLR(0.1, 50, pct_start=0.2, three_phase=True),
    "one cycle without a rise": lambda: fs.OneCycleLR(0.1, 50, pct_start=0.0),
    "cycles": lambda: fs.CyclicLR(0.01, 0.1, 4, 3, "triangular2"),
    "saw": lambda: fs.CyclicLR(0.01, 0.1, 4, 0, "exp_range", 0.95),
    "scaled cycles": lambda: fs.CyclicLR(0.01, 0.1, 4, scale_fn=lambda cycle: 1 / (1 + cycle)),
    "sequence": lambda: fs.SequentialLR(
        [fs.LinearLR(0.1, 0.1, 1.0, 5), fs.CosineAnnealingLR(0.1, 20), fs.ConstantLR(0.3, 0.1, 9)],
        [5, 25],
    ),
    "chain": lambda: fs.ChainedScheduler([fs.ConstantLR(0.1, 0.5, 7), fs.ExponentialLR(0.2, 0.9)]),
    "function": lambda: fs.LambdaLR(0.1, lambda t: 1 / (1 + t)),
    "one cycle of the momentum": lambda: fs.OneCycleMomentum(50),
    "cyclic momentum": lambda: fs.CyclicMomentum(0.8, 0.9, 4, 3),
    "linear momentum": lambda: fs.LinearMomentum(0.5, 0.99, 20),
    "Sutskever": lambda: fs.SutskeverMomentum(0.95, 4),
    "Nesterov": lambda: fs.NesterovMomentum(r=3.0),
}


def traced(schedule: Any, steps: Any) -> Any:
    return np.asarray(jax.vmap(jax.jit(schedule.at))(jax.numpy.asarray(steps)))


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_values_in_compiled_code(make: Callable[[], Any]) -> None:
    """XLA's cosine and powers are not libm's to the last bit: a few units in the last place."""
    schedule = make()
    expected = [schedule.at(t) for t in STEPS]
    with jax.enable_x64(True):
        got = traced(schedule, np.arange(len(STEPS)))
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-17)
    got = traced(schedule, np.arange(len(STEPS), dtype=np.int32))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=3e-6, atol=1e-8)


def test_every_schedule_with_a_formula_is_here() -> None:
    kinds = {type(make()) for make in SCHEDULES.values()}
    every = {getattr(fs, name) for name in fs.schedules.__all__}
    assert every - kinds == {fs.Schedule, fs.MomentumSchedule, fs.ReduceLROnPlateau}


def test_a_sequence_without_a_formula_is_refused() -> None:
    with pytest.raises(TypeError, match="at: without r the sequence has no closed form"):
        jax.jit(fs.NesterovMomentum().at)(3)


def test_a_formula_is_the_learning_rate_of_a_transform() -> None:
    """`lr=schedule.at` under `fusedstep.jax`: the rates of the steps 0, 1, 2, ..."""
    import fusedstep.jax as fj

    schedule = fs.SequentialLR([fs.LinearLR(0.5, 0.5, 1.0, 2), fs.StepLR(0.5, 1, 0.5)], [2])
    tx = fj.sgd(lr=schedule.at)
    params, grads = {"w": jax.numpy.zeros(1)}, {"w": jax.numpy.ones(1)}
    state, step = tx.init(params), jax.jit(tx.step)
    for t in range(5):
        params, state = step(grads, state, params)
        assert float(state.lr) == schedule.at(t)


def test_restarts_to_the_end_of_the_counter() -> None:
    """A run that begins near 2**31, where the table of the runs ends."""
    schedule = fs.CosineAnnealingWarmRestarts(0.1, 3, 5)
    steps = [2**31 - 1, 2**30, 5**12, 3 * (5**12 - 1) // 4, 3 * (5**12 - 1) // 4 - 1]
    with jax.enable_x64(True):
        got = traced(schedule, np.array(steps, np.int64))
    np.testing.assert_allclose(got, [schedule.at(t) for t in steps], rtol=1e-9, atol=1e-16)


def test_numpy_scalars_pass_for_numbers() -> None:
    schedule = fs.StepLR(0.5, 2, 0.5)
    assert schedule.at(np.int64(3)) == 0.25  # type: ignore[arg-type]
    assert not isinstance(schedule.at(np.int64(3)), np.ndarray)  # type: ignore[arg-type]
    np.testing.assert_array_equal(schedule.at(np.arange(4)), [0.5, 0.5, 0.25, 0.25])  # type: ignore[arg-type]
