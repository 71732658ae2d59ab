"""Schedules: the counter, assignment, state, what is refused, docstrings."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import math
import pickle
import pkgutil
import re
from pathlib import Path
from typing import Any

import fusedstep as fs
import numpy as np
import pytest
from fusedstep import schedules as package

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
        (lambda: fs.MultiStepLR(milestones=[3, 3]), r"milestones: .*got 3 after 3"),
        (lambda: fs.MultiStepLR(milestones=[9, 3]), r"milestones: .*got 3 after 9"),
        (lambda: fs.MultiStepLR(milestones=[1, 2.5]), r"milestones\[1\]: .*got 2\.5"),
        (lambda: fs.MultiStepLR(milestones=[-1]), r"milestones\[0\]: .*got -1"),
        (lambda: fs.MultiStepLR(milestones=5), r"milestones: expected a sequence .*got 5"),
        (lambda: fs.MultiStepLR(milestones="12"), r"milestones: expected a sequence .*got '12'"),
        (lambda: fs.PiecewiseConstantSchedule([1, 2], [0.1, 0.2]), r"values: expected 3 .*got 2"),
        (lambda: fs.PiecewiseConstantSchedule([1], [0.1, -0.2]), r"values\[1\]: .*got -0\.2"),
        (lambda: fs.PiecewiseConstantSchedule([1], 0.1), r"values: expected a sequence .*got 0\.1"),
        (lambda: fs.PiecewiseConstantSchedule([2, 1], [1, 2, 3]), r"boundaries: .*got 1 after 2"),
        (lambda: fs.ExponentialDecayLR(decay_steps=0), r"decay_steps: .*got 0"),
        (lambda: fs.ExponentialDecayLR(decay_rate=0.0), r"decay_rate: .*got 0\.0"),
        (lambda: fs.ExponentialDecayLR(transition_begin=-1), r"transition_begin: .*got -1"),
        (lambda: fs.ExponentialDecayLR(staircase=2), r"staircase: .*got 2"),
        (lambda: fs.ExponentialDecayLR(end_value=-0.1), r"end_value: .*got -0\.1"),
        (lambda: fs.InverseTimeDecayLR(decay_steps=0), r"decay_steps: .*got 0"),
        (lambda: fs.InverseTimeDecayLR(decay_rate=-1.0), r"decay_rate: .*got -1\.0"),
        (lambda: fs.InverseTimeDecayLR(power=-1.0), r"power: .*got -1\.0"),
        (lambda: fs.LinearLR(start_factor=-0.1), r"start_factor: .*got -0\.1"),
        (lambda: fs.LinearLR(end_factor=1.1), r"end_factor: .*got 1\.1"),
        (lambda: fs.LinearLR(total_iters=0), r"total_iters: .*got 0"),
        (lambda: fs.PolynomialLR(total_iters=0), r"total_iters: .*got 0"),
        (lambda: fs.PolynomialLR(power=-1), r"power: .*got -1"),
        (lambda: fs.CosineAnnealingLR(T_max=0), r"T_max: .*got 0"),
        (lambda: fs.CosineAnnealingLR(eta_min=-0.1), r"eta_min: .*got -0\.1"),
        (lambda: fs.CosineAnnealingWarmRestarts(T_0=0), r"T_0: .*got 0"),
        (lambda: fs.CosineAnnealingWarmRestarts(T_mult=1.5), r"T_mult: .*got 1\.5"),
        (lambda: fs.WarmupCosineSchedule(0.1, 10, 10), r"total_steps: .*warmup_steps=10, got 10"),
        (lambda: fs.WarmupCosineSchedule(warmup_start_lr=-1.0), r"warmup_start_lr: .*got -1\.0"),
        (lambda: fs.WarmupScheduler(warmup_epochs=-1), r"warmup_epochs: .*got -1"),
        (lambda: fs.OneCycleLR(max_lr=-1.0, total_steps=9), r"max_lr: .*got -1\.0"),
        (lambda: fs.OneCycleLR(max_lr=1.0), r"total_steps: expected it, or both"),
        (lambda: fs.OneCycleLR(max_lr=1.0, epochs=3), r"total_steps: expected it, or both"),
        (lambda: fs.OneCycleLR(1.0, 9, epochs=3), r"total_steps: .*got 9 beside epochs=3"),
        (lambda: fs.OneCycleLR(1.0, epochs=3, steps_per_epoch=0), r"steps_per_epoch: .*got 0"),
        (lambda: fs.OneCycleLR(1.0, total_steps=0), r"total_steps: .*got 0"),
        (lambda: fs.OneCycleLR(1.0, 9, pct_start=1.5), r"pct_start: .*got 1\.5"),
        (lambda: fs.OneCycleLR(1.0, 9, anneal_strategy="sin"), r"anneal_strategy: .*got 'sin'"),
        (lambda: fs.OneCycleLR(1.0, 9, div_factor=0.0), r"div_factor: .*got 0\.0"),
        (lambda: fs.CyclicLR(max_lr=math.inf), r"max_lr: .*got inf"),
        (lambda: fs.CyclicLR(step_size_up=0), r"step_size_up: .*got 0"),
        (lambda: fs.CyclicLR(step_size_down=-1), r"step_size_down: .*got -1"),
        (lambda: fs.CyclicLR(mode="square"), r"mode: .*got 'square'"),
        (lambda: fs.CyclicLR(gamma=1.5), r"gamma: .*got 1\.5"),
        (lambda: fs.CyclicLR(scale_fn=3), r"scale_fn: .*got 3"),
        (lambda: fs.CyclicLR(scale_mode="x"), r"scale_mode: .*got 'x'"),
        (lambda: fs.ReduceLROnPlateau(factor=1.0), r"factor: .*got 1\.0"),
        (lambda: fs.ReduceLROnPlateau(mode="best"), r"mode: .*got 'best'"),
        (lambda: fs.ReduceLROnPlateau(patience=-1), r"patience: .*got -1"),
        (lambda: fs.ReduceLROnPlateau(threshold_mode="x"), r"threshold_mode: .*got 'x'"),
        (lambda: fs.ReduceLROnPlateau(min_lr=-1.0), r"min_lr: .*got -1\.0"),
        (lambda: fs.LambdaLR(0.1, 0.5), r"lr_lambda: .*got 0\.5"),
        (lambda: fs.SequentialLR([], []), r"schedules: expected at least one"),
        (lambda: fs.SequentialLR(fs.StepLR(), []), r"schedules: expected a sequence .*StepLR"),
        (lambda: fs.SequentialLR([fs.StepLR(), 0.1], [3]), r"schedules\[1\]: .*got 0\.1"),
        (lambda: fs.SequentialLR([fs.StepLR()], [3]), r"milestones: expected 0, .*got 1"),
        (lambda: fs.SequentialLR([fs.StepLR()] * 2, [0]), r"milestones\[0\]: .*got 0"),
        (lambda: fs.SequentialLR([fs.StepLR()] * 3, [5, 4]), r"milestones: .*got 4 after 5"),
        (
            lambda: fs.SequentialLR([fs.StepLR(), fs.SutskeverMomentum()], [3]),
            r"schedules\[1\]: expected a learning-rate schedule, got .*SutskeverMomentum",
        ),
        (lambda: fs.ChainedScheduler([fs.ReduceLROnPlateau()]), r"schedules\[0\]: .*metric"),
        (
            lambda: fs.ChainedScheduler([fs.StepLR(), fs.StepLR(base_lr=0.0)]),
            r"schedules\[1\]: .*base_lr > 0.*got 0\.0",
        ),
        (lambda: fs.SutskeverMomentum(max_momentum=1.0), r"max_momentum: .*got 1\.0"),
        (lambda: fs.SutskeverMomentum(period=0), r"period: .*got 0"),
        (lambda: fs.NesterovMomentum(r=2.0), r"r: .*got 2\.0"),
        (lambda: fs.OneCycleMomentum(9, max_momentum=1), r"max_momentum: .*got 1"),
        (lambda: fs.OneCycleMomentum(0), r"total_steps: .*got 0"),
        (lambda: fs.CyclicMomentum(base_momentum=-0.1), r"base_momentum: .*got -0\.1"),
        (lambda: fs.CyclicMomentum(gamma=1.01), r"gamma: .*got 1\.01"),
        (lambda: fs.LinearMomentum(end=1.0), r"end: .*got 1\.0"),
        (lambda: fs.LinearMomentum(start="slow"), r"start: .*got 'slow'"),
        (lambda: fs.LinearMomentum(total_iters=0), r"total_iters: .*got 0"),
    ],
)
def test_constants_out_of_range(make: Any, text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        make()


@pytest.mark.parametrize("name", [name for _, name, _ in pkgutil.iter_modules(package.__path__)])
def test_examples_of_the_docstrings(name: str) -> None:
    module = importlib.import_module(f"fusedstep.schedules.{name}")
    finder, runner = doctest.DocTestFinder(exclude_empty=True), doctest.DocTestRunner()
    for test in finder.find(module, name, extraglobs=vars(fs)):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize("name", package.__all__)
def test_every_schedule_says_what_it_takes_and_shows_it(name: str) -> None:
    kind = getattr(fs, name)
    assert kind.__doc__ is not None
    examples = [test for test in doctest.DocTestFinder().find(kind, name) if test.examples]
    assert examples
    described = set(re.findall(r"^    +(\w+): ", kind.__doc__, re.MULTILINE))
    assert set(inspect.signature(kind).parameters) <= described


def test_package_imports_nothing_but_ranges() -> None:
    """Schedules are plain numbers; they know neither optimizers nor the compiled core."""
    for path in Path(package.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [getattr(node, "module", None) or ""]
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            for module in modules:
                if module.startswith("fusedstep"):
                    assert module.startswith(("fusedstep.ranges", "fusedstep.schedules")), path.name
