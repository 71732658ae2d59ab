"""Schedules against torch's own, driven step by step over several periods."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import fusedstep as fs
import pytest

try:
    import torch
    from torch.optim import lr_scheduler
except ImportError:  # the marker leaves the tests out, by name
    torch = lr_scheduler = None

pytestmark = pytest.mark.framework("torch")

# torch computes most values from the one before, so its own errors add up.
RELATIVE = 1e-12


def make_optimizer(lr: float) -> Any:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)


def torch_course(make: Callable[[Any], Any], steps: int, lr: float) -> list[tuple[float, float]]:
    """Learning rate and momentum of each step under a scheduler of torch."""
    optimizer = make_optimizer(lr)
    scheduler = make(optimizer)
    course = []
    for step in range(steps):
        if step:
            optimizer.step()
            scheduler.step()
        group = optimizer.param_groups[0]
        course.append((float(group["lr"]), float(group["momentum"])))
    return course


def our_course(schedule: Any, steps: int) -> list[float]:
    """The values that the counter gives; they are those of `at`."""
    values = []
    for step in range(steps):
        now = (
            schedule.current_lr if isinstance(schedule, fs.Schedule) else schedule.current_momentum
        )
        assert now == schedule.at(step)
        values.append(now)
        schedule.step()
    return values


def assert_same(ours: list[float], theirs: list[float], scale: float = 0.0) -> None:
    """Equal up to rounding of the largest value: torch's small ones are differences of large ones.

    `scale` is the largest constant of the formula, where no value may be as large.
    """
    scale = max(scale, *theirs, 0.0)
    assert scale > 0
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert math.isclose(mine, other, rel_tol=RELATIVE, abs_tol=RELATIVE * scale), (
            f"step {step}: {mine!r}, torch has {other!r}"
        )


# Name of the class in both, arguments besides the learning rate, number of steps.
FORMULAS: list[tuple[str, dict[str, Any], int]] = [
    ("ConstantLR", {}, 12),
    ("ConstantLR", {"factor": 0.25, "total_iters": 3}, 12),
    ("ConstantLR", {"factor": 1.0, "total_iters": 0}, 4),
    ("StepLR", {"step_size": 1, "gamma": 0.9}, 50),
    ("StepLR", {"step_size": 7, "gamma": 0.3}, 60),
    ("StepLR", {"step_size": 30}, 100),
    ("StepLR", {"step_size": 4, "gamma": 1.5}, 30),
    ("MultiStepLR", {"milestones": [30, 60, 90]}, 100),
    ("MultiStepLR", {"milestones": [1, 2, 5, 11], "gamma": 0.5}, 20),
    ("MultiStepLR", {"milestones": [0, 3], "gamma": 0.5}, 6),
    ("MultiStepLR", {"milestones": [], "gamma": 0.5}, 6),
    ("ExponentialLR", {"gamma": 0.95}, 300),
    ("ExponentialLR", {"gamma": 1.01}, 300),
    ("LinearLR", {}, 12),
    ("LinearLR", {"start_factor": 0.01, "end_factor": 0.7, "total_iters": 40}, 60),
    ("LinearLR", {"start_factor": 1.0, "end_factor": 0.0, "total_iters": 9}, 12),
    ("LinearLR", {"start_factor": 0.5, "total_iters": 1}, 4),
    ("PolynomialLR", {}, 12),
    ("PolynomialLR", {"total_iters": 50, "power": 0.9}, 60),
    ("PolynomialLR", {"total_iters": 20, "power": 2.5}, 30),
    ("PolynomialLR", {"total_iters": 1, "power": 2.0}, 4),
    ("CosineAnnealingLR", {"T_max": 50}, 260),
    ("CosineAnnealingLR", {"T_max": 7, "eta_min": 0.03}, 70),
    ("CosineAnnealingLR", {"T_max": 1}, 9),
    ("CosineAnnealingLR", {"T_max": 6, "eta_min": 0.9}, 30),
    ("CosineAnnealingWarmRestarts", {"T_0": 10}, 45),
    ("CosineAnnealingWarmRestarts", {"T_0": 1, "T_mult": 2}, 130),
    ("CosineAnnealingWarmRestarts", {"T_0": 3, "T_mult": 2, "eta_min": 0.01}, 200),
    ("CosineAnnealingWarmRestarts", {"T_0": 5, "T_mult": 3, "eta_min": 0.2}, 300),
]


@pytest.mark.parametrize("lr", [0.1, 3.0])
@pytest.mark.parametrize(("name", "arguments", "steps"), FORMULAS)
def test_formulas(name: str, arguments: dict[str, Any], steps: int, lr: float) -> None:
    ours = getattr(fs, name)(base_lr=lr, **arguments)
    theirs = torch_course(lambda o: getattr(lr_scheduler, name)(o, **arguments), steps, lr)
    assert_same(our_course(ours, steps), [now for now, _ in theirs])


@pytest.mark.parametrize(("name", "arguments", "steps"), FORMULAS)
def test_closed_forms(name: str, arguments: dict[str, Any], steps: int) -> None:
    """torch's own closed formulas, where it has some: nothing adds up there."""
    scheduler = getattr(lr_scheduler, name)(make_optimizer(0.1), **arguments)
    if not hasattr(scheduler, "_get_closed_form_lr"):
        assert name == "CosineAnnealingWarmRestarts"
        return
    ours = getattr(fs, name)(base_lr=0.1, **arguments)
    for t in range(steps):
        scheduler.last_epoch = t
        (theirs,) = scheduler._get_closed_form_lr()
        assert math.isclose(ours.at(t), theirs, rel_tol=1e-14, abs_tol=1e-15)


ONE_CYCLES = [
    {"total_steps": 100},
    {"total_steps": 37, "pct_start": 0.45, "div_factor": 10.0, "final_div_factor": 100.0},
    {"total_steps": 50, "pct_start": 0.0},
    {"total_steps": 50, "pct_start": 1.0},
    {"total_steps": 2},
    {"total_steps": 1},
    {"epochs": 7, "steps_per_epoch": 9, "pct_start": 0.25},
    {"total_steps": 21, "div_factor": 0.5, "final_div_factor": 0.25},
]


@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize("anneal_strategy", ["cos", "linear"])
@pytest.mark.parametrize("arguments", ONE_CYCLES)
def test_one_cycle(arguments: dict[str, Any], anneal_strategy: str, three_phase: bool) -> None:
    form = {"anneal_strategy": anneal_strategy, "three_phase": three_phase}
    ours = fs.OneCycleLR(max_lr=0.3, **arguments, **form)
    momentum = fs.OneCycleMomentum(
        total_steps=ours.total_steps, pct_start=ours.pct_start, **form,
        base_momentum=0.7, max_momentum=0.98,
    )  # fmt: skip
    theirs = torch_course(
        lambda o: lr_scheduler.OneCycleLR(
            o, max_lr=0.3, **arguments, **form, base_momentum=0.7, max_momentum=0.98
        ),
        ours.total_steps, lr=0.1,
    )  # fmt: skip
    assert_same(our_course(ours, ours.total_steps), [lr for lr, _ in theirs], scale=0.3)
    assert_same(our_course(momentum, ours.total_steps), [mu for _, mu in theirs])


CYCLES = [
    {"step_size_up": 5},
    {"step_size_up": 4, "step_size_down": 2},
    {"step_size_up": 3, "step_size_down": 11},
    {"step_size_up": 1, "step_size_down": 1},
    {"step_size_up": 6, "step_size_down": 0},
    {"step_size_up": 7, "step_size_down": 5, "gamma": 0.97},
]


@pytest.mark.parametrize("mode", ["triangular", "triangular2", "exp_range"])
@pytest.mark.parametrize("arguments", CYCLES)
def test_cyclic(arguments: dict[str, Any], mode: str) -> None:
    ours = fs.CyclicLR(base_lr=0.01, max_lr=0.4, mode=mode, **arguments)
    momentum = fs.CyclicMomentum(mode=mode, **arguments, base_momentum=0.6, max_momentum=0.93)
    theirs = torch_course(
        lambda o: lr_scheduler.CyclicLR(
            o, base_lr=0.01, max_lr=0.4, mode=mode, **arguments,
            base_momentum=0.6, max_momentum=0.93,
        ),
        80, lr=0.1,
    )  # fmt: skip
    assert_same(our_course(ours, 80), [lr for lr, _ in theirs])
    assert_same(our_course(momentum, 80), [mu for _, mu in theirs])


@pytest.mark.parametrize("scale_mode", ["cycle", "iterations"])
def test_cyclic_with_a_function(scale_mode: str) -> None:
    arguments = {"scale_fn": lambda x: 1.0 / (1.0 + x), "scale_mode": scale_mode}
    ours = fs.CyclicLR(base_lr=0.01, max_lr=0.4, step_size_up=4, step_size_down=3, **arguments)
    theirs = torch_course(
        lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.4, 4, 3, **arguments), 60, lr=0.1
    )
    assert_same(our_course(ours, 60), [lr for lr, _ in theirs])


def test_lambda() -> None:
    def factor(epoch: int) -> float:
        return 0.9**epoch + 0.1

    theirs = torch_course(lambda o: lr_scheduler.LambdaLR(o, factor), 30, lr=0.3)
    assert_same(our_course(fs.LambdaLR(0.3, factor), 30), [lr for lr, _ in theirs])


# (class, arguments) of each member; the learning rate is 0.1.
Members = list[tuple[str, dict[str, Any]]]

SEQUENCES: list[tuple[Members, list[int]]] = [
    ([("LinearLR", {"total_iters": 4}), ("ExponentialLR", {"gamma": 0.9})], [4]),
    ([("ConstantLR", {"total_iters": 50}), ("ExponentialLR", {"gamma": 0.9})], [20]),
    (
        [
            ("LinearLR", {"start_factor": 0.01, "total_iters": 10}),
            ("CosineAnnealingLR", {"T_max": 30, "eta_min": 0.001}),
        ],
        [10],
    ),
    (
        [
            ("LinearLR", {"total_iters": 3}),
            ("StepLR", {"step_size": 5, "gamma": 0.5}),
            ("PolynomialLR", {"total_iters": 12, "power": 2.0}),
        ],
        [3, 21],
    ),
    ([("StepLR", {"step_size": 2, "gamma": 0.5})], []),
    ([("ExponentialLR", {"gamma": 0.5}), ("MultiStepLR", {"milestones": [2, 4]})], [1]),
]


def make_both(members: Members, combine: str, **arguments: Any) -> tuple[Any, Callable[[Any], Any]]:
    ours = [getattr(fs, name)(base_lr=0.1, **kwargs) for name, kwargs in members]

    def make(optimizer: Any) -> Any:
        theirs = [getattr(lr_scheduler, name)(optimizer, **kwargs) for name, kwargs in members]
        if combine == "SequentialLR":
            return lr_scheduler.SequentialLR(optimizer, theirs, **arguments)
        return lr_scheduler.ChainedScheduler(theirs)

    return getattr(fs, combine)(ours, **arguments), make


@pytest.mark.parametrize(("members", "milestones"), SEQUENCES)
def test_sequences(members: Members, milestones: list[int]) -> None:
    ours, make = make_both(members, "SequentialLR", milestones=milestones)
    theirs = torch_course(make, 60, lr=0.1)
    assert_same(our_course(ours, 60), [lr for lr, _ in theirs])


CHAINS: list[Members] = [
    [("ConstantLR", {"factor": 0.1, "total_iters": 2}), ("ExponentialLR", {"gamma": 0.9})],
    [("LinearLR", {"total_iters": 6}), ("StepLR", {"step_size": 4}), ("ConstantLR", {})],
    [
        ("MultiStepLR", {"milestones": [3, 9], "gamma": 0.3}),
        ("PolynomialLR", {"total_iters": 25, "power": 1.5}),
    ],
    [("ExponentialLR", {"gamma": 0.9})],
]


@pytest.mark.parametrize("members", CHAINS)
def test_chains(members: Members) -> None:
    ours, make = make_both(members, "ChainedScheduler")
    theirs = torch_course(make, 40, lr=0.1)
    assert_same(our_course(ours, 40), [lr for lr, _ in theirs])


# --- plateau ----------------------------------------------------------------------------------

PLATEAUS: list[dict[str, Any]] = [
    {},
    {"patience": 0, "factor": 0.5},
    {"patience": 2, "factor": 0.5, "cooldown": 3},
    {"patience": 1, "cooldown": 5, "threshold": 0.1},
    {"patience": 2, "threshold": 0.05, "threshold_mode": "abs", "factor": 0.3},
    {"patience": 1, "min_lr": 0.01, "factor": 0.2},
    {"patience": 0, "eps": 0.02, "factor": 0.5},
    {"patience": 0, "min_lr": 5.0},
    {"patience": 1, "threshold": 0.0, "factor": 0.0},
]


def metrics_of(kind: str) -> list[float]:
    generator = torch.Generator().manual_seed(3)
    noise = torch.rand(60, generator=generator, dtype=torch.float64).tolist()
    return {
        "constant": [1.0] * 60,
        "falling": [1.0 / (1 + k) for k in range(60)],
        "noisy": [1.0 / (1 + k // 8) + 0.2 * r for k, r in enumerate(noise)],
        "negative": [-r for r in noise],
        "with nan": [math.nan if k % 5 == 2 else r for k, r in enumerate(noise)],
        "with inf": [math.inf if k % 7 == 0 else r for k, r in enumerate(noise)],
        "down to -inf": [*noise[:30], -math.inf, *noise[31:]],
        "all nan": [math.nan] * 60,
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "constant", "falling", "noisy", "negative", "with nan", "with inf", "down to -inf",
        "all nan",
    ],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("arguments", PLATEAUS)
def test_plateau(arguments: dict[str, Any], mode: str, kind: str) -> None:
    optimizer = make_optimizer(0.1)
    theirs = lr_scheduler.ReduceLROnPlateau(optimizer, mode=mode, **arguments)
    ours = fs.ReduceLROnPlateau(base_lr=0.1, mode=mode, **arguments)
    for metric in metrics_of(kind):
        theirs.step(metric)
        ours.step(metric)
        assert ours.current_lr == optimizer.param_groups[0]["lr"]
        for name in ("best", "num_bad_epochs", "cooldown_counter", "last_epoch"):
            assert getattr(ours, name) == getattr(theirs, name), name


def test_plateau_reduces_what_was_assigned() -> None:
    optimizer = make_optimizer(0.1)
    theirs = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    ours = fs.ReduceLROnPlateau(base_lr=0.1, patience=0)
    optimizer.param_groups[0]["lr"] = ours.current_lr = 0.7
    for _ in range(3):
        theirs.step(torch.ones(()))
        ours.step(torch.ones(()))
        assert ours.current_lr == optimizer.param_groups[0]["lr"]
    assert ours.current_lr < 0.01
