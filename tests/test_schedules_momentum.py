"""Momentum schedules: Sutskever's values, Nesterov's sequence, assignment, the step they drive."""

from __future__ import annotations

import math
import threading
from fractions import Fraction
from typing import Any

import fusedstep as fs
import numpy as np
import pytest
from fusedstep.schedules import momentum as module


def test_sutskever_values() -> None:
    schedule = fs.SutskeverMomentum(max_momentum=0.999, period=250)
    expected = [Fraction(1, 2), Fraction(3, 4), Fraction(5, 6), Fraction(7, 8), Fraction(9, 10)]
    for rise, mu in enumerate(expected):
        for t in (250 * rise, 250 * rise + 249):
            assert schedule.at(t) == float(mu)


@pytest.mark.parametrize("limit", [0.0, 0.9, 0.99, 0.995, 0.999])
def test_sutskever_as_the_paper_writes_it(limit: float) -> None:
    schedule = fs.SutskeverMomentum(limit)
    for t in range(0, 150_000, 37):
        paper = min(1 - 2 ** (-1 - math.log2(math.floor(t / 250) + 1)), limit)
        assert math.isclose(schedule.at(t), paper, rel_tol=1e-15)
    assert schedule.at(10**9) == limit


def test_nesterov_sequence_is_the_recursion() -> None:
    schedule = fs.NesterovMomentum()
    assert schedule.at(0) == 0.0
    a = 1.0
    for t in range(1, 1000):
        following = (1 + math.sqrt(1 + 4 * a**2)) / 2
        assert math.isclose(schedule.at(t), (a - 1) / following, rel_tol=1e-14)
        a = following


def test_nesterov_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same number whatever was asked before, and few operations to find it."""
    expected = [fs.NesterovMomentum().at(t) for t in range(700)]
    calls = 0

    def counted(a: float, after: Any = module._after) -> float:
        nonlocal calls
        calls += 1
        return float(after(a))

    monkeypatch.setattr(module, "_marks", module.array("d", [1.0]))
    monkeypatch.setattr(module, "_after", counted)
    schedule = fs.NesterovMomentum()
    assert [schedule.at(t) for t in reversed(range(700))] == expected[::-1]
    calls = 0
    assert schedule.at(699) == expected[699]
    assert calls <= 64
    assert len(module._marks) <= 700 // 64 + 1


def test_nesterov_cache_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [fs.NesterovMomentum().at(t) for t in range(0, 6400, 64)]
    monkeypatch.setattr(module, "_marks", module.array("d", [1.0]))
    found: list[list[float]] = []

    def work() -> None:
        schedule = fs.NesterovMomentum()
        found.append([schedule.at(t) for t in range(0, 6400, 64)])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 8


def test_convex_form() -> None:
    """beta_k = (k - 1) / (k + 2) for the velocity of k steps."""
    schedule = fs.NesterovMomentum(r=3)
    assert [schedule.at(k) for k in range(6)] == [0.0, *((k - 1) / (k + 2) for k in range(1, 6))]
    damped = fs.NesterovMomentum(r=5.5)
    assert damped.at(9) == 8 / 13.5


@pytest.mark.parametrize("r", [None, 3.0])
def test_a_step_with_it_is_nesterovs_method(r: float | None) -> None:
    """x_k = y_k - g(y_k)/L; y_{k+1} = x_k + beta_k (x_k - x_{k-1}), as FISTA is written."""
    curvature = np.array([1.0, 0.3, 0.01, 1e-4])
    x = y = np.array([1.0, -2.0, 3.0, 4.0])
    p, state = x.copy(), {}
    schedule = fs.NesterovMomentum(r)
    t_k = 1.0
    for k in range(1, 200):
        following = (1 + math.sqrt(1 + 4 * t_k**2)) / 2
        beta = (t_k - 1) / following if r is None else (k - 1) / (k + 2)
        x, before = y - curvature * y, x
        y, t_k = x + beta * (x - before), following
        momenta = {
            "momentum": schedule.current_momentum, "next_momentum": schedule.next_momentum
        }  # fmt: skip
        state = fs.fused_nesterov_step(p, curvature * p, **state, lr=1.0, **momenta).state
        schedule.step()
        np.testing.assert_allclose(p, y, rtol=1e-11, atol=1e-15)
        # The bound that it is known for, at the iterate x_k.
        assert curvature @ x**2 / 2 <= 2 * 30.0 / (k + 1) ** 2


def test_linear_momentum() -> None:
    schedule = fs.LinearMomentum(0.5, 0.99, 10)
    assert [schedule.at(t) for t in (0, 5, 10, 11)] == [0.5, 0.745, 0.99, 0.99]


def test_assigned_momentum_holds_until_the_next_step() -> None:
    schedule = fs.SutskeverMomentum(period=1)
    schedule.current_momentum = 0.25
    assert (schedule.current_momentum, schedule.next_momentum) == (0.25, 0.75)
    schedule.step()
    assert schedule.current_momentum == 0.75


@pytest.mark.parametrize("value", [1.0, 1, -0.1, math.nan, math.inf, None, "0.9", True])
def test_what_no_momentum_is(value: Any) -> None:
    schedule = fs.SutskeverMomentum()
    with pytest.raises((TypeError, ValueError), match=r"current_momentum: .*in \[0, 1\), got "):
        schedule.current_momentum = value
    with pytest.raises(ValueError, match=r"current_momentum: .*in \[0, 1\), got "):
        schedule.load_state_dict({**schedule.state_dict(), "current_momentum": value})
    assert schedule.current_momentum == 0.5


def test_momenta_of_ones_own() -> None:
    class Rising(fs.MomentumSchedule):
        def __init__(self, slowness: int) -> None:
            super().__init__()
            self.slowness = slowness

        def at(self, t: int) -> float:
            return 1.0 - self.slowness / (self.slowness + t)

    schedule, other = Rising(2), Rising(5)
    schedule.step()
    schedule.step()
    assert (schedule.current_momentum, schedule.next_momentum) == (0.5, 0.6)
    other.load_state_dict(schedule.state_dict())
    assert other.current_momentum == 0.5
    with pytest.raises(ValueError, match=r"at\(2\): .*got "):
        other.load_state_dict({**schedule.state_dict(), "slowness": -1})
    assert other.slowness == 2


def test_a_momentum_is_no_learning_rate() -> None:
    schedule = fs.StepLR()
    with pytest.raises(ValueError, match=r"StepLR.*SutskeverMomentum"):
        schedule.load_state_dict(fs.SutskeverMomentum().state_dict())
    assert not isinstance(fs.SutskeverMomentum(), fs.Schedule)
    with pytest.raises(TypeError, match="lr"):
        fs.SGD([np.zeros(1)], lr=fs.SutskeverMomentum())  # type: ignore[arg-type]
