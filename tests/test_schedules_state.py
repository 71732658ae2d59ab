"""Every schedule: the counter against the formula, its state in mid-course, copies, refusals."""

from __future__ import annotations

import copy
import inspect
import json
import math
import pickle
from collections.abc import Callable
from typing import Any

import fusedstep as fs
import pytest


def halved(epoch: int) -> float:
    return 0.5**epoch


def sequence(gamma: float, total_iters: int, milestone: int) -> fs.SequentialLR:
    warmup = fs.WarmupScheduler(base_lr=0.3, warmup_epochs=total_iters)
    chain = fs.ChainedScheduler([fs.ExponentialLR(0.3, gamma), fs.ConstantLR(0.2, 0.5, 3)])
    return fs.SequentialLR([warmup, chain], [milestone])


# A schedule of each class, and another with other constants.
PAIRS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "ChainedScheduler": (
        lambda: fs.ChainedScheduler([fs.StepLR(0.3, 2, 0.5), fs.LinearLR(0.3)]),
        lambda: fs.ChainedScheduler([fs.StepLR(0.1), fs.LinearLR(0.7, 0.1, 0.2, 30)]),
    ),
    "ConstantLR": (lambda: fs.ConstantLR(0.3, 0.5, 9), lambda: fs.ConstantLR(0.1)),
    "CosineAnnealingLR": (
        lambda: fs.CosineAnnealingLR(0.3, 5, 0.01),
        lambda: fs.CosineAnnealingLR(),
    ),
    "CosineAnnealingWarmRestarts": (
        lambda: fs.CosineAnnealingWarmRestarts(0.3, 2, 2, 0.01),
        lambda: fs.CosineAnnealingWarmRestarts(),
    ),
    "CyclicLR": (
        lambda: fs.CyclicLR(0.3, 0.5, 3, 2, "exp_range", 0.9),
        lambda: fs.CyclicLR(),
    ),
    "CyclicMomentum": (
        lambda: fs.CyclicMomentum(0.5, 0.7, 3, 2, "triangular2"),
        lambda: fs.CyclicMomentum(),
    ),
    "ExponentialDecayLR": (
        lambda: fs.ExponentialDecayLR(0.3, 3, 0.5, 2, True, 0.01),
        lambda: fs.ExponentialDecayLR(),
    ),
    "ExponentialLR": (lambda: fs.ExponentialLR(0.3, 0.5), lambda: fs.ExponentialLR()),
    "InverseTimeDecayLR": (
        lambda: fs.InverseTimeDecayLR(0.3, 2, 0.5, 0.75, True),
        lambda: fs.InverseTimeDecayLR(),
    ),
    "LambdaLR": (lambda: fs.LambdaLR(0.3, halved), lambda: fs.LambdaLR(0.1, halved)),
    "LinearLR": (lambda: fs.LinearLR(0.3, 0.1, 0.9, 11), lambda: fs.LinearLR()),
    "LinearMomentum": (lambda: fs.LinearMomentum(0.2, 0.8, 11), lambda: fs.LinearMomentum()),
    "MultiStepLR": (lambda: fs.MultiStepLR(0.3, [2, 6, 8], 0.5), lambda: fs.MultiStepLR()),
    "NesterovMomentum": (lambda: fs.NesterovMomentum(r=4.0), lambda: fs.NesterovMomentum()),
    "OneCycleLR": (
        lambda: fs.OneCycleLR(0.3, epochs=4, steps_per_epoch=3, three_phase=True),
        lambda: fs.OneCycleLR(0.1, 50, anneal_strategy="linear"),
    ),
    "OneCycleMomentum": (
        lambda: fs.OneCycleMomentum(12, 0.5, 0.7, three_phase=True),
        lambda: fs.OneCycleMomentum(50, anneal_strategy="linear"),
    ),
    "PiecewiseConstantSchedule": (
        lambda: fs.PiecewiseConstantSchedule([3, 8], [0.3, 0.5, 0.1]),
        lambda: fs.PiecewiseConstantSchedule(),
    ),
    "PolynomialLR": (lambda: fs.PolynomialLR(0.3, 11, 2.0), lambda: fs.PolynomialLR()),
    "ReduceLROnPlateau": (
        lambda: fs.ReduceLROnPlateau(0.3, "max", 0.5, 1, 0.01, "abs", 2, 0.01, 0.0),
        lambda: fs.ReduceLROnPlateau(),
    ),
    "SequentialLR": (lambda: sequence(0.5, 3, 4), lambda: sequence(0.9, 5, 9)),
    "StepLR": (lambda: fs.StepLR(0.3, 3, 0.5), lambda: fs.StepLR()),
    "SutskeverMomentum": (
        lambda: fs.SutskeverMomentum(0.8, 3),
        lambda: fs.SutskeverMomentum(),
    ),
    "WarmupCosineSchedule": (
        lambda: fs.WarmupCosineSchedule(0.3, 3, 12, 0.01, 0.02),
        lambda: fs.WarmupCosineSchedule(),
    ),
    "WarmupScheduler": (lambda: fs.WarmupScheduler(0.3, 9, 0.01), lambda: fs.WarmupScheduler()),
}

every_schedule = pytest.mark.parametrize("name", PAIRS)


def current_name(schedule: Any) -> str:
    return "current_lr" if isinstance(schedule, fs.Schedule) else "current_momentum"


def current(schedule: Any) -> float:
    return float(getattr(schedule, current_name(schedule)))


def move(schedule: Any, steps: int) -> None:
    for step in range(steps):
        if isinstance(schedule, fs.ReduceLROnPlateau):
            schedule.step(-abs(step - 2.0))  # best at the third
        else:
            schedule.step()


def course(schedule: Any, steps: int = 30) -> list[float]:
    """The values to come; the schedule has moved on afterwards."""
    values = []
    for _ in range(steps):
        values.append(current(schedule))
        move(schedule, 1)
    return values


def test_no_schedule_is_left_out() -> None:
    assert set(PAIRS) == set(fs.schedules.__all__) - {"Schedule", "MomentumSchedule"}


@every_schedule
def test_counter_and_formula(name: str) -> None:
    for make in PAIRS[name]:
        schedule = make()
        assert schedule.last_epoch == 0
        if name == "ReduceLROnPlateau":
            continue  # has no formula; see test_schedules_torch.py
        expected = [schedule.at(t) for t in range(40)]
        assert len(set(expected)) > 1 or make is PAIRS[name][1]
        assert schedule.last_epoch == 0
        assert course(schedule, 40) == expected
        assert schedule.last_epoch == 40
        schedule.step(epoch=7)
        assert (schedule.last_epoch, current(schedule)) == (7, expected[7])
        if isinstance(schedule, fs.MomentumSchedule):
            assert schedule.next_momentum == expected[8]


@every_schedule
def test_last_epoch_is_where_it_starts(name: str) -> None:
    schedule = PAIRS[name][0]()
    arguments = schedule._arguments()
    later = type(schedule)(**{**arguments, "last_epoch": 5})
    if name != "ReduceLROnPlateau":
        assert current(later) == schedule.at(5)
    move(later, 1)
    assert later.last_epoch == 6
    parameter = inspect.signature(type(schedule)).parameters["last_epoch"]
    assert (parameter.kind, parameter.default) == (inspect.Parameter.KEYWORD_ONLY, 0)


@every_schedule
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_state_goes_on_in_a_schedule_with_other_constants(name: str, steps: int) -> None:
    make, make_other = PAIRS[name]
    schedule, other = make(), make_other()
    move(schedule, steps)
    move(other, 3)
    text = json.dumps(schedule.state_dict())
    other.load_state_dict(json.loads(text))
    assert json.dumps(other.state_dict()) == text
    assert repr(other) == repr(schedule)
    assert other.last_epoch == steps
    assert course(other) == course(schedule)


@every_schedule
def test_loading_goes_both_ways(name: str) -> None:
    """Also from None to a number and back."""
    make, make_other = PAIRS[name]
    schedule, other = make(), make_other()
    before = make_other().state_dict()
    other.load_state_dict(schedule.state_dict())
    other.load_state_dict(before)
    assert other.state_dict() == before
    assert course(other) == course(make_other())


@every_schedule
def test_an_assigned_value_is_part_of_the_state(name: str) -> None:
    make, make_other = PAIRS[name]
    schedule, other = make(), make_other()
    move(schedule, 2)
    setattr(schedule, current_name(schedule), 0.625)
    other.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    assert current(other) == 0.625
    assert course(other) == course(schedule)
    if name != "ReduceLROnPlateau":  # it reduces what was assigned
        schedule.step(0)
        assert current(schedule) == schedule.at(0) != 0.625


@every_schedule
@pytest.mark.parametrize("wrong", ["nonsense", {}, math.nan, [[]], object()])
def test_wrong_entries_are_refused_and_nothing_changes(name: str, wrong: Any) -> None:
    make, make_other = PAIRS[name]
    schedule, saved = make(), make_other().state_dict()
    move(schedule, 4)
    before = schedule.state_dict()
    for entry in saved:
        with pytest.raises(ValueError, match="schedule: "):
            schedule.load_state_dict({**saved, entry: wrong})
        assert schedule.state_dict() == before
    reference = make()
    move(reference, 4)
    assert course(schedule) == course(reference)


@every_schedule
def test_other_forms_are_refused(name: str) -> None:
    schedule = PAIRS[name][0]()
    before = schedule.state_dict()
    other = "StepLR" if name != "StepLR" else "LinearLR"
    states: list[Any] = [
        None,
        [],
        {},
        {**before, "extra": 1},
        {key: value for key, value in before.items() if key != "last_epoch"},
        {**before, "type": other},
        PAIRS[other][0]().state_dict(),
    ]
    for state in states:
        with pytest.raises(ValueError, match="schedule: "):
            schedule.load_state_dict(state)
        assert schedule.state_dict() == before


@every_schedule
def test_copies_share_nothing_that_moves(name: str) -> None:
    make, make_other = PAIRS[name]
    schedule = make()
    move(schedule, 3)
    before = schedule.state_dict()
    makers = (lambda s: s.copied(), copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s)))
    for duplicate in makers:
        twin = duplicate(schedule)
        assert type(twin) is type(schedule)
        assert twin.state_dict() == before
        twin.load_state_dict(make_other().state_dict())
        move(twin, 2)
        assert schedule.state_dict() == before
    expected = make()
    move(expected, 3)
    assert course(schedule) == course(expected)


@every_schedule
def test_repr_can_be_read(name: str) -> None:
    text = repr(PAIRS[name][0]())
    assert text.startswith(f"{name}(")
    assert "last_epoch=0)" in text
    for constant in PAIRS[name][0]()._constants():
        assert f"{constant}=" in text


# --- schedules made of others -------------------------------------------------------------------


def test_members_are_loaded_in_place() -> None:
    """What the user holds goes on as well; nothing is detached."""
    schedule = sequence(0.5, 3, 4)
    warmup, chain = schedule.schedules
    schedule.load_state_dict(sequence(0.9, 5, 9).state_dict())
    assert schedule.schedules == (warmup, chain)
    assert warmup.warmup_epochs == 5
    assert chain.schedules[0].gamma == 0.9


def test_members_are_not_moved() -> None:
    schedule = sequence(0.5, 3, 4)
    move(schedule, 6)
    assert [each.last_epoch for each in schedule.schedules] == [0, 0]


def test_a_wrong_member_is_named_and_no_member_changes() -> None:
    schedule = sequence(0.5, 3, 4)
    before = schedule.state_dict()
    state = sequence(0.9, 5, 9).state_dict()
    state["schedules"][1]["schedules"][0]["gamma"] = -1.0
    text = r"^schedule: schedules\[1\]: schedules\[0\]: gamma: .*got -1\.0"
    with pytest.raises(ValueError, match=text):
        schedule.load_state_dict(state)
    assert schedule.state_dict() == before
    state = sequence(0.9, 5, 9).state_dict()
    state["schedules"].pop()
    with pytest.raises(ValueError, match=r"^schedule: schedules: .*of 2, got 1"):
        schedule.load_state_dict(state)
    assert schedule.state_dict() == before


def test_milestones_of_a_state_are_checked() -> None:
    schedule = sequence(0.5, 3, 4)
    before = schedule.state_dict()
    for milestones in ([], [0], [2, 3]):
        with pytest.raises(ValueError, match="milestones"):
            schedule.load_state_dict({**before, "milestones": milestones})
    assert schedule.state_dict() == before


def test_members_of_ones_own_class_are_saved() -> None:
    class Doubled(fs.Schedule):
        def __init__(self, inner: fs.Schedule) -> None:
            super().__init__(base_lr=inner.base_lr)
            self.inner = inner

        def at(self, t: int) -> float:
            return 2.0 * self.inner.at(t)

    schedule, other = Doubled(fs.ExponentialLR(0.3, 0.5)), Doubled(fs.ExponentialLR(0.1, 0.9))
    schedule.step()
    other.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    assert (other.current_lr, other.inner.gamma) == (0.3, 0.5)
    assert other.copied().inner is not other.inner


# --- constants that others follow from ------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["ChainedScheduler", "OneCycleLR", "PiecewiseConstantSchedule", "SequentialLR"]
)
def test_a_base_lr_that_follows_cannot_be_assigned(name: str) -> None:
    schedule = PAIRS[name][0]()
    base = schedule.base_lr
    assert base > 0
    with pytest.raises(AttributeError, match=rf"base_lr: .*{name}.*got 0\.5"):
        schedule.base_lr = 0.5
    assert schedule.base_lr == base
    assert "base_lr" not in schedule.state_dict()


def test_constants_may_be_assigned() -> None:
    schedule = fs.OneCycleLR(max_lr=1.0, total_steps=10, div_factor=4.0)
    schedule.max_lr = 2.0
    assert (schedule.base_lr, schedule.current_lr) == (0.5, 0.5)
    plateau = fs.ReduceLROnPlateau(base_lr=0.5)
    plateau.base_lr = 0.25
    assert plateau.current_lr == 0.25


# --- plateau ----------------------------------------------------------------------------------


def test_plateau_has_no_formula() -> None:
    schedule = fs.ReduceLROnPlateau(base_lr=0.5)
    with pytest.raises(TypeError, match=r"at\(3\): a ReduceLROnPlateau follows a metric"):
        schedule.at(3)


@pytest.mark.parametrize("metric", [None, "0.5", b"1", True, [], {}])
def test_plateau_wants_a_number(metric: Any) -> None:
    schedule = fs.ReduceLROnPlateau(base_lr=0.5)
    before = schedule.state_dict()
    with pytest.raises(TypeError, match="metric: expected a number, got"):
        schedule.step(metric)
    with pytest.raises(TypeError, match="metric"):
        schedule.step()  # type: ignore[call-arg]
    assert schedule.state_dict() == before


@pytest.mark.parametrize("entry", ["num_bad_epochs", "cooldown_counter"])
def test_plateau_counters_of_a_state_are_checked(entry: str) -> None:
    schedule = fs.ReduceLROnPlateau(base_lr=0.5)
    before = schedule.state_dict()
    with pytest.raises(ValueError, match=rf"{entry}: .*got -1"):
        schedule.load_state_dict({**before, entry: -1})
    with pytest.raises(ValueError, match=r"factor: .*got 2\.0"):
        schedule.load_state_dict({**before, "factor": 2.0})
    assert schedule.state_dict() == before
