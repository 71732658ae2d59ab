"""Schedulers of fusedstep.braintools against braintools' own, on the host and in compiled code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import brainstates as bs
import fusedstep as fs
import numpy as np
import pytest

pytestmark = pytest.mark.framework("braintools")

EPOCHS = 22
RTOL = 3e-6  # braintools computes most of its rates in float32

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "constant": lambda m: m.ConstantLR(0.1, 0.5, 4),
    "step": lambda m: m.StepLR(0.1, 4, 0.3),
    "step from 7": lambda m: m.StepLR(0.1, 4, 0.3, last_epoch=7),
    "milestones": lambda m: m.MultiStepLR(0.1, [9, 3, 14], 0.3),
    "exponential": lambda m: m.ExponentialLR(0.1, 0.9),
    "decay": lambda m: m.ExponentialDecayLR(0.1, 5, 0.5, 3, end_value=0.02),
    "decay in stairs": lambda m: m.ExponentialDecayLR(0.1, 5, 2.0, 3, True, 0.7),
    "decay below its end": lambda m: m.ExponentialDecayLR(0.1, 5, 0.5, 3, end_value=0.2),
    "linear": lambda m: m.LinearLR(0.1, 0.25, 1.0, 6),
    "polynomial": lambda m: m.PolynomialLR(0.1, 17, 1.7),
    "cosine": lambda m: m.CosineAnnealingLR(0.1, 11, 0.01),  # stays at eta_min
    "restarts": lambda m: m.CosineAnnealingWarmRestarts(0.1, 3, 2, 0.01),
    "equal restarts": lambda m: m.CosineAnnealingWarmRestarts(0.1, 7),
    "warm-up": lambda m: m.WarmupScheduler(0.1, 6, 0.02),
    "no warm-up": lambda m: m.WarmupScheduler(0.1, 0, 0.02),
    "warm-up and cosine": lambda m: m.WarmupCosineSchedule(0.1, 6, 20, 0.02, 0.001),
    "pieces": lambda m: m.PiecewiseConstantSchedule(0.1, [3, 9], [0.5, 0.1, 0.7]),
    "pieces by default": lambda m: m.PiecewiseConstantSchedule(),
    "cycles": lambda m: m.CyclicLR(0.01, 0.1, 4),
    "cycles, halved": lambda m: m.CyclicLR(0.01, 0.1, 4, 4, "triangular2"),
    "cycles, fading": lambda m: m.CyclicLR(0.01, 0.1, 4, None, "exp_range", 0.95),
    "one cycle": lambda m: m.OneCycleLR(0.1, 20),
    "one cycle, straight": lambda m: m.OneCycleLR(
        0.1, epochs=4, steps_per_epoch=5, pct_start=0.37, anneal_strategy="linear"
    ),
    "one cycle, other divisors": lambda m: m.OneCycleLR(0.1, 20, None, None, 0.3, "cos", 4.0, 50.0),
    "chain": lambda m: m.ChainedScheduler([m.ConstantLR(0.1, 0.5, 4), m.ExponentialLR(0.1, 0.9)]),
    "chain with another base": lambda m: m.ChainedScheduler(
        [m.StepLR(0.1, 4, 0.5), m.LinearLR(0.3, 0.25, 1.0, 6)]
    ),
    "sequence": lambda m: m.SequentialLR(
        [m.LinearLR(0.1, 0.1, 1.0, 5), m.CosineAnnealingLR(0.1, 9), m.ConstantLR(0.3, 0.1, 4)],
        [5, 15],
    ),
    "groups": lambda m: m.StepLR([0.1, 0.01], 4, 0.3),
    "groups of one cycle": lambda m: m.OneCycleLR([0.1, 0.01], 20),
    "groups of cycles": lambda m: m.CyclicLR([0.01, 0.02], [0.1, 0.3], 4),
}  # fmt: skip


def sequence(scheduler: Any, epochs: int = 0) -> Any:
    """The rates of all groups; 18 epochs of braintools' SequentialLR take 4 s to compile."""
    slow = type(scheduler) is bs.theirs.SequentialLR
    rows = []
    for _ in range(epochs or (18 if slow else EPOCHS)):
        rows.append([float(lr) for lr in scheduler.get_last_lr()])
        scheduler.step()
    return np.array(rows)


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_rates(make: Callable[[Any], Any]) -> None:
    theirs = sequence(make(bs.theirs))
    np.testing.assert_allclose(sequence(make(bs.ours), len(theirs)), theirs, rtol=RTOL, atol=1e-8)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "sequence"])
def test_rates_in_float64(name: str) -> None:
    """With x64 braintools' are in float64."""
    with bs.precision(np.float64):
        theirs = sequence(SCHEDULERS[name](bs.theirs))
        mine = sequence(SCHEDULERS[name](bs.ours))
    np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_rates_are_exact_numbers_outside_of_compiled_code(make: Callable[[Any], Any]) -> None:
    scheduler = make(bs.ours)
    for _ in range(3):
        assert all(type(lr) is float for lr in scheduler.get_last_lr())
        assert type(scheduler.last_epoch.value) is int
        scheduler.step()


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_steps_in_compiled_code(make: Callable[[Any], Any]) -> None:
    """One trace for all epochs, also after steps outside."""
    expected = sequence(make(bs.ours))
    scheduler, traces = make(bs.ours), []

    @bs.brainstate.transform.jit
    def step() -> None:
        traces.append(1)
        scheduler.step()

    rows = []
    for epoch in range(EPOCHS):
        rows.append([float(lr) for lr in scheduler.get_last_lr()])
        if epoch % 3:
            step()
        else:
            scheduler.step()
            assert all(type(lr) is float for lr in scheduler.get_last_lr())
    np.testing.assert_allclose(rows, expected, rtol=RTOL, atol=1e-8)
    assert len(traces) == 1


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_steps_in_a_compiled_loop(make: Callable[[Any], Any]) -> None:
    scheduler = make(bs.ours)

    def body(_: Any) -> Any:
        lrs = bs.jax.numpy.stack([bs.jax.numpy.asarray(lr) for lr in scheduler.get_last_lr()])
        scheduler.step()
        return lrs

    rows = bs.brainstate.transform.for_loop(body, bs.jax.numpy.arange(EPOCHS))
    np.testing.assert_allclose(rows, sequence(make(bs.ours)), rtol=RTOL, atol=1e-8)


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_state_round_trip(make: Callable[[Any], Any]) -> None:
    scheduler, other = make(bs.ours), make(bs.ours)
    sequence(scheduler, 7)
    scheduler.apply(lambda lr: 0.5 * lr)
    other.load_state_dict(scheduler.state_dict())
    assert other.get_last_lr() == scheduler.get_last_lr()
    np.testing.assert_array_equal(sequence(other, 9), sequence(scheduler, 9))


@pytest.mark.parametrize(
    "name", [name for name in SCHEDULERS if not name.startswith(("chain", "sequence"))]
)
def test_states_of_braintools_itself(name: str) -> None:
    """The entries are braintools', so a run can go on here."""
    theirs, mine = SCHEDULERS[name](bs.theirs), SCHEDULERS[name](bs.ours)
    sequence(theirs, 7)
    mine.load_state_dict(theirs.state_dict())
    np.testing.assert_allclose(sequence(mine, 9), sequence(theirs, 9), rtol=RTOL, atol=1e-8)


def test_jumps() -> None:
    for name, make in SCHEDULERS.items():
        if name == "step from 7":
            continue
        scheduler = make(bs.ours)
        scheduler.step(epoch=11)
        np.testing.assert_array_equal(
            [scheduler.get_last_lr()], sequence(make(bs.ours), 12)[-1:], err_msg=name
        )


def test_step_epoch_is_a_step() -> None:
    for name, make in SCHEDULERS.items():
        one, other = make(bs.ours), make(bs.ours)
        for _ in range(12):
            one.step()
            other.step_epoch()
            assert one.get_last_lr() == other.get_last_lr(), name


# --- bugs of braintools that are left out --------------------------------------------------------


def test_cycles_with_unequal_halves() -> None:
    """braintools measures both halves by the first: 0 .25 .5 .75 1 .75 0 0 0 .25."""
    right = [0, 0.25, 0.5, 0.75, 1, 0.5, 0, 0.25, 0.5, 0.75]
    np.testing.assert_allclose(sequence(bs.ours.CyclicLR(0.0, 1.0, 4, 2), 10)[:, 0], right)
    wrong = [0, 0.25, 0.5, 0.75, 1, 0.75, 0, 0, 0, 0.25]
    np.testing.assert_allclose(sequence(bs.theirs.CyclicLR(0.0, 1.0, 4, 2), 10)[:, 0], wrong)


def test_restarts_from_a_later_epoch() -> None:
    """braintools begins a run there, whatever `last_epoch` says."""
    mine, theirs = (
        m.CosineAnnealingWarmRestarts(0.1, 10, last_epoch=5) for m in (bs.ours, bs.theirs)
    )
    assert mine.get_last_lr()[0] == pytest.approx(0.05)
    assert theirs.get_last_lr()[0] == pytest.approx(0.1)


def test_a_sequence_from_a_later_epoch() -> None:
    """braintools leaves its members at the beginning."""

    def make(m: Any, **start: int) -> Any:
        return m.SequentialLR([m.LinearLR(0.1, 0.1, 1.0, 5), m.StepLR(0.1, 3)], [5], **start)

    expected = sequence(make(bs.ours), 12)
    np.testing.assert_array_equal(sequence(make(bs.ours, last_epoch=9), 3), expected[9:])
    assert make(bs.theirs, last_epoch=9).get_last_lr()[0] != pytest.approx(expected[9, 0])
    assert make(bs.ours, last_epoch=9).current_scheduler_idx == 1


def test_a_sequence_in_compiled_code() -> None:
    """braintools' asks for a traced number, swallows the error, and keeps its rate for ever."""
    moved = {}
    for module in (bs.ours, bs.theirs):
        scheduler = SCHEDULERS["sequence"](module)
        step = bs.brainstate.transform.jit(lambda scheduler=scheduler: scheduler.step())
        for _ in range(3):
            step()
        moved[module] = float(scheduler.get_last_lr()[0])
    assert moved[bs.ours] == pytest.approx(0.064)
    assert moved[bs.theirs] == pytest.approx(0.01)


# --- plateau --------------------------------------------------------------------------------------

METRICS = np.array(
    [5, 4, 4, 4, 4, 3.9, 3.9, 1, 1, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.7, 0.6, 0.5, 0.4, 9, 9, 9, 9]
)
PLATEAUS = {
    "patience 1": {"patience": 1},
    "cooldown": {"patience": 1, "cooldown": 3},
    "long cooldown": {"patience": 0, "cooldown": 5, "factor": 0.5},
    "no patience, a floor": {"patience": 0, "min_lr": 0.03},
    "absolute": {"patience": 1, "threshold": 0.15, "threshold_mode": "abs"},
    "max": {"mode": "max", "patience": 1},
    "max, absolute": {"mode": "max", "patience": 2, "threshold": 0.2, "threshold_mode": "abs"},
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", PLATEAUS.values(), ids=PLATEAUS)
def test_plateau(options: dict[str, Any], compiled: bool) -> None:
    options = {"eps": 0.0, **options}  # which braintools does not look at
    mine, theirs = (m.ReduceLROnPlateau([0.1, 0.2], **options) for m in (bs.ours, bs.theirs))
    step = bs.brainstate.transform.jit(lambda metric: mine.step(metric)) if compiled else mine.step
    for metric in METRICS:
        step(metric)
        theirs.step(metric)
        np.testing.assert_allclose(mine.get_last_lr(), theirs.get_last_lr(), rtol=1e-6)
        assert float(mine.best.value) == pytest.approx(float(theirs.best.value))
        assert int(mine.num_bad_epochs.value) == int(theirs.num_bad_epochs.value)
        assert int(mine.cooldown_counter.value) == int(theirs.cooldown_counter.value)
    assert len({*map(float, mine.get_last_lr())}) == 2 or options.get("min_lr")


def test_plateau_respects_eps() -> None:
    """braintools has the argument and does not use it."""
    rates = {}
    for module in (bs.ours, bs.theirs):
        scheduler = module.ReduceLROnPlateau(1e-8, factor=0.5, patience=0, eps=1e-8)
        for _ in range(3):
            scheduler.step(1.0)
        rates[module] = float(scheduler.get_last_lr()[0])
    assert rates[bs.ours] == 1e-8
    assert rates[bs.theirs] == pytest.approx(0.25e-8)


def test_plateau_state() -> None:
    scheduler, other = (bs.ours.ReduceLROnPlateau(0.1, patience=1, cooldown=2) for _ in range(2))
    for metric in METRICS[:9]:
        scheduler.step(metric)
    other.load_state_dict(scheduler.state_dict())
    for metric in METRICS[9:]:
        scheduler.step(metric)
        other.step(bs.jax.numpy.float32(metric))
        assert other.state_dict() == scheduler.state_dict()
    with pytest.raises(TypeError, match="metric: expected a number, got 'x'"):
        scheduler.step("x")


# --- what a scheduler is to an optimizer ---------------------------------------------------------


class Halving:
    """A scheduler as braintools' users write them; the base is set below."""

    def get_lr(self) -> list[Any]:
        return [lr / 2.0**self.last_epoch.value for lr in self.base_lrs]  # type: ignore[attr-defined]


@pytest.mark.parametrize("late", [False, True])
def test_a_scheduler_of_ones_own(late: bool) -> None:
    """A subclass with `get_lr`, also one that sets its attributes after the constructor."""
    rates = []
    for module in (bs.ours, bs.theirs):

        class Own(Halving, module.LRScheduler):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                if not late:
                    self.factor = 3.0
                super().__init__(0.1)
                self.factor = 3.0

            def get_lr(self) -> list[Any]:
                return [self.factor * lr for lr in super().get_lr()]

        scheduler = Own()
        module.SGD(scheduler)
        rates.append(sequence(scheduler, 5))
    np.testing.assert_allclose(rates[0], rates[1], rtol=1e-6)
    np.testing.assert_allclose(rates[0][:, 0], [0.3 / 2**t for t in range(5)], rtol=1e-6)


def test_an_error_in_get_lr_is_not_swallowed() -> None:
    class Wrong(bs.ours.LRScheduler):  # type: ignore[misc, name-defined]
        def get_lr(self) -> list[Any]:
            return [lr / self.last_epoch.absent for lr in self.base_lrs]

    with pytest.raises(AttributeError, match="absent"):
        Wrong(0.1)

    class Missing(bs.ours.LRScheduler):  # type: ignore[misc, name-defined]
        def get_lr(self) -> list[Any]:
            return [lr * self.missing for lr in self.base_lrs]

    with pytest.raises(AttributeError, match="missing"):  # an attribute that may come later
        bs.ours.SGD(Missing(0.1))


def test_a_scheduler_as_a_schedule_of_optax() -> None:
    scheduler = bs.ours.StepLR(0.1, 1, 0.5)
    scheduler.step()
    assert scheduler(7) == -0.05


def test_attach_makes_it_the_optimizers_schedule() -> None:
    """In braintools it is reported, but the steps keep the old one: here 1e-3 instead of 0.5."""
    moved = {}
    for module in (bs.ours, bs.theirs):
        weight = bs.brainstate.ParamState(bs.jax.numpy.zeros(1))
        optimizer = module.SGD(1e-3)
        optimizer.register_trainable_weights({"w": weight})
        scheduler = module.ConstantLR(0.5, 1.0, 0)
        scheduler.attach_optimizer(optimizer)
        scheduler.step()
        assert float(optimizer.current_lr) == 0.5
        optimizer.step({"w": bs.jax.numpy.ones(1)})
        moved[module] = float(weight.value[0])
    assert moved[bs.ours] == -0.5
    assert moved[bs.theirs] == pytest.approx(-1e-3)
    with pytest.raises(TypeError, match="optimizer: expected one of fusedstep"):
        bs.ours.StepLR(0.1).attach_optimizer("x")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bs.ours.StepLR(-0.1), r"base_lr: .*got -0\.1"),
        (lambda: bs.ours.StepLR([0.1, "x"]), r"base_lr\[1\]: .*got 'x'"),
        (lambda: bs.ours.StepLR([]), r"base_lr: .*empty"),
        (lambda: bs.ours.StepLR(0.1, 0), r"step_size: .*got 0"),
        (lambda: bs.ours.StepLR(0.1, last_epoch=-1), r"last_epoch: .*got -1"),
        (lambda: bs.ours.MultiStepLR(0.1, [3, 3]), r"milestones: .*got 3 after 3"),
        (lambda: bs.ours.OneCycleLR(0.1), r"total_steps: expected it"),
        (lambda: bs.ours.OneCycleLR(0.1, 9, pct_start=1.0), r"pct_start: .*got 1\.0"),
        (lambda: bs.ours.ChainedScheduler([]), r"schedulers: .*at least one"),
        (lambda: bs.ours.ChainedScheduler([fs.StepLR(0.1)]), r"schedulers\[0\]: .*StepLR"),
        (
            lambda: bs.ours.SequentialLR([bs.ours.ReduceLROnPlateau()], []),
            r"schedulers\[0\]: .*metric",
        ),
        (lambda: bs.ours.SequentialLR([bs.ours.StepLR()], [3]), r"milestones: expected 0"),
        (lambda: bs.ours.StepLR(0.1).step("x"), r"epoch: .*got 'x'"),
    ],
)
def test_rejections(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"last_epoch": -1}, "last_epoch"),
        ({"last_epoch": None}, "last_epoch"),
        ({"base_lrs": [-1.0]}, "base_lrs"),
        ({"current_lrs": [0.1, 0.2]}, "1 base_lrs, but 2 current_lrs"),
    ],
)
def test_states_are_checked(change: dict[str, Any], message: str) -> None:
    scheduler = bs.ours.StepLR(0.1)
    before = scheduler.state_dict()
    with pytest.raises(ValueError, match=message):
        scheduler.load_state_dict({**before, **change})
    with pytest.raises(ValueError, match="the state has no last_epoch"):
        scheduler.load_state_dict({})
    assert scheduler.state_dict() == before


def test_a_chain_of_states_is_checked_before_anything_is_written() -> None:
    chain = SCHEDULERS["chain"](bs.ours)
    before = chain.state_dict()
    members = [before["schedulers"][0], {**before["schedulers"][1], "last_epoch": -3}]
    with pytest.raises(ValueError, match="last_epoch"):
        chain.load_state_dict({**before, "last_epoch": 3, "schedulers": members})
    with pytest.raises(ValueError, match="states of 2 schedulers"):
        chain.load_state_dict({**before, "schedulers": members[:1]})
    assert chain.state_dict() == before
