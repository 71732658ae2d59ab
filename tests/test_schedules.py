"""Schedules: closed forms, the counter, assignment, state, and what is refused."""

from __future__ import annotations

import math
import pickle
from typing import Any

import fusedstep as fs
import numpy as np
import pytest

SCHEDULES = [
    (lambda: fs.ConstantLR(base_lr=0.4, factor=0.5, total_iters=3), [0.2, 0.2, 0.2, 0.4, 0.4, 0.4]),
    (lambda: fs.ConstantLR(base_lr=0.4, factor=1.0, total_iters=0), [0.4] * 6),
    (lambda: fs.StepLR(base_lr=0.4, step_size=2, gamma=0.5), [0.4, 0.4, 0.2, 0.2, 0.1, 0.1]),
    (lambda: fs.ExponentialLR(base_lr=0.4, gamma=0.5), [0.4, 0.2, 0.1, 0.05, 0.025, 0.0125]),
]
IDS = ["constant", "constant from the start", "step", "exponential"]


@pytest.mark.parametrize(("make", "expected"), SCHEDULES, ids=IDS)
def test_values(make: Any, expected: list[float]) -> None:
    schedule = make()
    assert [schedule.at(t) for t in range(6)] == expected
    assert schedule.last_epoch == 0
    seen = []
    for epoch in range(6):
        assert schedule.last_epoch == epoch
        seen.append(schedule.current_lr)
        schedule.step()
    assert seen == expected


@pytest.mark.parametrize(("make", "expected"), SCHEDULES, ids=IDS)
def test_state_round_trip(make: Any, expected: list[float]) -> None:
    schedule = make()
    for _ in range(3):
        schedule.step()
    other = make()
    other.load_state_dict(pickle.loads(pickle.dumps(schedule.state_dict())))
    assert (other.last_epoch, other.current_lr) == (3, expected[3])
    other.step()
    assert other.current_lr == expected[4]
    assert schedule.current_lr == expected[3]


def test_loading_takes_the_constants_along() -> None:
    schedule = fs.StepLR(base_lr=0.1, step_size=5)
    schedule.load_state_dict(fs.StepLR(base_lr=0.4, step_size=2, gamma=0.5).state_dict())
    assert [schedule.at(t) for t in range(4)] == [0.4, 0.4, 0.2, 0.2]


def test_state_of_another_class_is_refused() -> None:
    schedule = fs.ExponentialLR(base_lr=0.4)
    with pytest.raises(ValueError, match=r"ExponentialLR.*StepLR"):
        schedule.load_state_dict(fs.StepLR(base_lr=0.1).state_dict())
    assert schedule.current_lr == 0.4


@pytest.mark.parametrize(
    "entry",
    [
        {"step_size": 0},
        {"step_size": 2.5},
        {"gamma": math.nan},
        {"gamma": 1e300},
        {"base_lr": -1.0},
        {"last_epoch": -1},
        {"last_epoch": "late"},
        {"current_lr": "fast"},
    ],
)
def test_states_out_of_range_are_refused(entry: dict[str, Any]) -> None:
    schedule = fs.StepLR(base_lr=0.4, step_size=2, gamma=0.5, last_epoch=9)
    before = schedule.state_dict()
    with pytest.raises(ValueError, match="schedule: "):
        schedule.load_state_dict({**before, **entry})
    assert schedule.state_dict() == before
    with pytest.raises(ValueError, match="schedule: "):
        schedule.load_state_dict(3)  # type: ignore[arg-type]


def test_state_of_a_class_with_another_constructor() -> None:
    class Squared(fs.Schedule):
        def __init__(self, root: float) -> None:
            super().__init__(root**2)
            self.divisor = 2

        def at(self, t: int) -> float:
            return self.base_lr / self.divisor ** (t + 1)

    schedule = Squared(2.0)
    schedule.step()
    other = Squared(7.0)
    other.load_state_dict(schedule.state_dict())
    assert other.current_lr == 1.0
    with pytest.raises(ValueError, match="schedule: "):
        other.load_state_dict({**schedule.state_dict(), "divisor": 0})
    assert other.current_lr == 1.0


def test_step_to_an_epoch() -> None:
    schedule = fs.ExponentialLR(base_lr=1.0, gamma=0.5)
    schedule.step(epoch=3)
    assert (schedule.last_epoch, schedule.current_lr) == (3, 0.125)
    assert fs.ExponentialLR(base_lr=1.0, gamma=0.5, last_epoch=3).current_lr == 0.125


def test_assigned_lr_holds_until_the_next_step() -> None:
    schedule = fs.ExponentialLR(base_lr=1.0, gamma=0.5)
    schedule.current_lr = 7.0
    assert schedule.current_lr == 7.0
    schedule.step()
    assert schedule.current_lr == 0.5


def test_assigned_lr_through_the_optimizer() -> None:
    p = np.zeros(1)
    opt = fs.SGD([p], lr=fs.ExponentialLR(base_lr=1.0, gamma=0.5))
    opt.lr = 0.25
    opt.step([np.ones(1)])
    assert p[0] == -0.25


def test_float_becomes_a_constant_schedule() -> None:
    opt = fs.SGD([np.zeros(1)], lr=0.25)
    assert isinstance(opt.lr_scheduler, fs.ConstantLR)
    for _ in range(10):
        opt.lr_scheduler.step()
    assert opt.lr == 0.25


def test_last_value_far_out() -> None:
    """No drift: epoch 10,000 is one power, not 10,000 products."""
    schedule = fs.ExponentialLR(base_lr=0.1, gamma=0.9999)
    for _ in range(10_000):
        schedule.step()
    assert schedule.current_lr == 0.1 * 0.9999**10_000


def test_schedules_of_ones_own() -> None:
    class Halves(fs.Schedule):
        def at(self, t: int) -> float:
            return self.base_lr / (1 + t)

    p = np.zeros(1)
    opt = fs.SGD([p], lr=Halves(base_lr=1.0))
    for _ in range(2):
        opt.step([np.ones(1)])
        opt.lr_scheduler.step()
    assert p[0] == -1.5


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: fs.ConstantLR(base_lr=-1.0), r"base_lr: .*got -1\.0"),
        (lambda: fs.ExponentialLR(base_lr=math.nan), r"base_lr: .*got nan"),
        (lambda: fs.ExponentialLR(base_lr=0.1, gamma=-0.5), r"gamma: .*got -0\.5"),
        (lambda: fs.StepLR(base_lr=0.1, step_size=0), r"step_size: .*got 0"),
        (lambda: fs.StepLR(base_lr=0.1, step_size=1.5), r"step_size: .*got 1\.5"),
        (lambda: fs.StepLR(base_lr="fast"), r"base_lr: .*got 'fast'"),
        (lambda: fs.ConstantLR(base_lr=0.1, factor=1.5), r"factor: .*got 1\.5"),
        (lambda: fs.ConstantLR(base_lr=0.1, total_iters=-1), r"total_iters: .*got -1"),
        (lambda: fs.ExponentialLR(base_lr=0.1, last_epoch=-2), r"last_epoch: .*got -2"),
    ],
)
def test_constants_out_of_range(make: Any, text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        make()


@pytest.mark.framework("torch")
@pytest.mark.parametrize("name", ["StepLR", "ExponentialLR", "ConstantLR"])
def test_same_values_as_torch(name: str) -> None:
    import torch

    constants = {"StepLR": {"step_size": 3, "gamma": 0.3}, "ExponentialLR": {"gamma": 0.7}}.get(
        name, {}
    )
    ours = getattr(fs, name)(base_lr=0.1, **constants)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    theirs = getattr(torch.optim.lr_scheduler, name)(optimizer, **constants)
    for _ in range(12):
        assert math.isclose(ours.current_lr, theirs.get_last_lr()[0], rel_tol=1e-14)
        optimizer.step()
        theirs.step()
        ours.step()
