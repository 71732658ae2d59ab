"""Learning rates and momenta that follow schedules and functions, in every group of their own."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import driver
import fusedstep as fs
import numpy as np
import objects
import pytest
from exact import Array, mismatch

STEPS = 6


class Rising(fs.MomentumSchedule):
    """A user's own: 1/2, 2/3, 3/4, ..."""

    def at(self, t: int) -> float:
        return 1 - 1 / (t + 2)


def rising(t: int) -> float:
    return 1 - 1 / (t + 2)


def falling(t: int) -> float:
    return 0.1 * 0.9**t


Step = Callable[[Array, Array, dict[str, Any], float, float, float], dict[str, Any]]
# One functional step with lr, the momentum of this step and of the next one, as plain numbers.
BY_HAND: dict[str, tuple[Callable[..., fs.Optimizer], Step]] = {
    "SGD": (
        lambda params, lr, mu: fs.SGD(params, lr, mu, nesterov=True),
        lambda p, g, state, lr, mu, coming: (
            fs.fused_nesterov_step(p, g, **state, lr=lr, momentum=mu, next_momentum=coming).state
        ),
    ),
    "Momentum": (
        fs.Momentum,
        lambda p, g, state, lr, mu, _: (
            fs.fused_momentum_step(p, g, **state, lr=lr, momentum=mu).state
        ),
    ),
    "MomentumNesterov": (
        fs.MomentumNesterov,
        lambda p, g, state, lr, mu, coming: (
            fs.fused_nesterov_step(p, g, **state, lr=lr, momentum=mu, next_momentum=coming).state
        ),
    ),
    "RMSprop": (
        lambda params, lr, mu: fs.RMSprop(params, lr, momentum=mu, nesterov=True),
        lambda p, g, state, lr, mu, coming: (
            fs.fused_rmsprop_step(
                p, g, **state, lr=lr, momentum=mu, next_momentum=coming, nesterov=True
            ).state
        ),
    ),
    "NAdam": (
        lambda params, lr, mu: fs.NAdam(params, lr, (mu, 0.99)),
        lambda p, g, state, lr, mu, coming: (
            fs.fused_nadam_step(p, g, **state, lr=lr, betas=(driver.Rising(mu, coming), 0.99)).state
        ),
    ),
    "Adam": (
        lambda params, lr, mu: fs.Adam(params, lr, (mu, 0.99), amsgrad=True),
        lambda p, g, state, lr, mu, _: (
            fs.fused_adam_step(p, g, **state, lr=lr, betas=(mu, 0.99), amsgrad=True).state
        ),
    ),
    "AdamW": (
        lambda params, lr, mu: fs.AdamW(params, lr, (mu, 0.99)),
        lambda p, g, state, lr, mu, _: (
            fs.fused_adamw_step(p, g, **state, lr=lr, betas=(mu, 0.99)).state
        ),
    ),
}
EVERY_CLASS = pytest.mark.parametrize("name", BY_HAND)


def by_hand(name: str, lr: Callable[[int], float], mu: Callable[[int], float]) -> Array:
    p, state = objects.arrays(0, sizes=(40,))[0], {}
    for t in range(STEPS):
        g = objects.arrays(10 + t, sizes=(40,))[0]
        state = BY_HAND[name][1](p, g, state, lr(t), mu(t), mu(t + 1))
    return p


@EVERY_CLASS
def test_functions_of_the_steps_applied(name: str) -> None:
    """mu_t = f(t), and the look-ahead has f(t + 1)."""
    params = objects.arrays(0, sizes=(40,))
    opt = BY_HAND[name][0](params, falling, rising)
    for t in range(STEPS):
        opt.step(objects.arrays(10 + t, sizes=(40,)))
    assert not mismatch(params[0], by_hand(name, falling, rising))


@EVERY_CLASS
def test_schedules_that_the_user_moves(name: str) -> None:
    """The same numbers; the step moves neither of them."""
    params = objects.arrays(0, sizes=(40,))
    lr, momentum = fs.ExponentialLR(0.1, 0.9), Rising()
    opt = BY_HAND[name][0](params, lr, momentum)
    for t in range(STEPS):
        assert (lr.last_epoch, momentum.last_epoch) == (t, t)
        opt.step(objects.arrays(10 + t, sizes=(40,)))
        lr.step()
        momentum.last_epoch += 1
    assert not mismatch(params[0], by_hand(name, lr.at, rising))


@EVERY_CLASS
def test_a_schedule_that_nobody_moves(name: str) -> None:
    params = objects.arrays(0, sizes=(40,))
    momentum = Rising()
    momentum.last_epoch = 3
    opt = BY_HAND[name][0](params, 0.1, momentum)
    for t in range(STEPS):
        opt.step(objects.arrays(10 + t, sizes=(40,)))
    p, state = objects.arrays(0, sizes=(40,))[0], {}
    for t in range(STEPS):
        g = objects.arrays(10 + t, sizes=(40,))[0]
        state = BY_HAND[name][1](p, g, state, 0.1, rising(3), rising(4))
    assert not mismatch(params[0], p)


def test_the_look_ahead_matters() -> None:
    """f(t) in place of f(t + 1) would be noticed."""
    p, q, state, other = np.zeros(3), np.zeros(3), {}, {}
    for t in range(3):
        right = {"momentum": rising(t), "next_momentum": rising(t + 1)}
        state = fs.fused_nesterov_step(p, np.ones(3), **state, lr=0.1, **right).state
        other = fs.fused_nesterov_step(q, np.ones(3), **other, lr=0.1, momentum=rising(t)).state
    assert not np.allclose(p, q, rtol=1e-3)


@pytest.mark.parametrize("kind", [fs.Momentum, fs.MomentumNesterov, fs.RMSprop])
def test_next_momentum_overrides_what_a_function_says(kind: Any) -> None:
    options = {"nesterov": True} if kind is fs.RMSprop else {}
    params, twins = objects.arrays(0, sizes=(5,)), objects.arrays(0, sizes=(5,))
    opt = kind(params, momentum=rising, next_momentum=0.25, **options)
    twin = kind(twins, next_momentum=0.25, momentum=0.5, **options)
    for t in range(3):
        twin.param_groups[0]["momentum"] = rising(t)
        opt.step([np.ones(5, np.float32)])
        twin.step([np.ones(5, np.float32)])
    assert not mismatch(params[0], twins[0])


# --- groups -----------------------------------------------------------------------------------


def test_every_group_follows_its_own() -> None:
    """Numbers, buffers, functions and schedules side by side."""
    buffer, schedule, momentum = np.array(0.2), fs.StepLR(0.5, 1, 0.5), Rising()
    settings = [
        {"lr": falling},
        {"lr": schedule, "momentum": 0.5},
        {"lr": buffer, "momentum": rising},
        {"momentum": momentum},
    ]
    params = [objects.arrays(0, sizes=(7,)) for _ in settings]
    groups = [{"params": p, **own} for p, own in zip(params, settings, strict=True)]
    opt = fs.MomentumNesterov(groups, lr=0.01, momentum=0.9)
    expected, states = [objects.arrays(0, sizes=(7,))[0] for _ in settings], [{}] * 4
    for t in range(STEPS):
        g = objects.arrays(10 + t, sizes=(7,))[0]
        opt.step([[g]] * 4)
        rows = [
            (falling(t), 0.9, 0.9),
            (0.5 * 0.5**t, 0.5, 0.5),
            (0.2 + t, rising(t), rising(t + 1)),
            (0.01, rising(t), rising(t + 1)),
        ]
        for k, (p, (lr, mu, coming)) in enumerate(zip(expected, rows, strict=True)):
            states[k] = fs.fused_nesterov_step(
                p, g, **states[k], lr=lr, momentum=mu, next_momentum=coming
            ).state
        schedule.step()
        buffer += 1
        momentum.last_epoch += 1
    for k, p in enumerate(expected):
        assert not mismatch(params[k][0], p), settings[k]


def test_a_group_added_later_counts_the_steps_of_the_optimizer() -> None:
    """t of a function is that of the optimizer; bias correction is an array's own."""
    asked: list[int] = []
    a, b = np.zeros(1), np.zeros(1)
    opt = fs.Adam([a], lr=lambda t: asked.append(t) or 0.5, eps=0.0)
    for _ in range(3):
        opt.step([np.ones(1)])
    opt.add_param_group({"params": [b]})
    asked.clear()
    opt.step([[np.ones(1)], [np.ones(1)]])
    assert set(asked) == {3}
    assert b[0] == -0.5
    assert [entry["step"] for entry in opt.state_dict()["state"].values()] == [4, 1]


@EVERY_CLASS
def test_a_skipped_step_moves_no_function(name: str) -> None:
    params = objects.arrays(0, sizes=(40,))
    opt = BY_HAND[name][0](params, falling, rising)
    opt.on_nonfinite = "skip"
    bad = [np.full(40, np.nan, np.float32)]
    for t in range(STEPS):
        opt.step(objects.arrays(10 + t, sizes=(40,)))
        assert opt.step(bad).skipped
    assert (opt.steps, opt.skipped_steps) == (STEPS, STEPS)
    assert not mismatch(params[0], by_hand(name, falling, rising))


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (
            lambda t: 1.0 if t else 0.5,
            ValueError,
            r"momentum: expected a number in \[0, 1\), got 1\.0",
        ),
        (lambda t: -0.1 if t else 0.5, ValueError, r"momentum: .*got -0\.1"),
        (lambda t: "fast" if t else 0.5, TypeError, r"momentum: .*got 'fast'"),
        (lambda t: None if t else 0.5, TypeError, r"momentum: .*got None"),
        (lambda t: rising if t else 0.5, TypeError, r"momentum: the function of t returned"),
    ],
    ids=itertools.count(),
)
def test_what_a_function_returns_is_checked(value: Any, kind: type[Exception], text: str) -> None:
    """Also when it is the look-ahead alone that is out of range: nothing is written."""
    p = np.ones(3)
    with pytest.raises(kind, match=text):
        fs.MomentumNesterov([p], momentum=value)
    opt = fs.MomentumNesterov([p])
    opt.param_groups[0]["momentum"] = value
    with pytest.raises(kind, match=text):
        opt.step([np.ones(3)])
    assert np.all(p == 1)
    assert (opt.steps, opt.state_dict()["state"]) == (0, {})
    opt = fs.Adam([p], betas=(value, 0.9))
    opt.step([np.zeros(3)])
    with pytest.raises(kind, match=text.replace("momentum", r"betas\[0\]")):
        opt.step([np.zeros(3)])
    assert opt.steps == 1


@pytest.mark.parametrize(
    ("kind", "options"),
    [(fs.SGD, {}), (fs.Momentum, {}), (fs.RMSprop, {}), (fs.Adam, {"betas": 1})],
)
def test_only_nesterov_forms_look_ahead(kind: Any, options: dict[str, Any]) -> None:
    """A table of momenta may end with the last step of the others."""
    table = [0.5, 0.6, 0.7]
    given = {"betas": (table.__getitem__, 0.9)} if options else {"momentum": table.__getitem__}
    opt = kind([np.ones(3)], **given)
    for _ in table:
        opt.step([np.ones(3)])
    with pytest.raises(IndexError):
        opt.step([np.ones(3)])
    with pytest.raises(IndexError):
        fs.MomentumNesterov([np.ones(3)], momentum=table[:1].__getitem__)
    with pytest.raises(IndexError):
        fs.NAdam([np.ones(3)], betas=(table[:1].__getitem__, 0.9))


def test_schedules_stay_in_their_places() -> None:
    p = [np.ones(3)]
    for arguments, name in (
        ({"lr": Rising()}, "lr"),
        ({"momentum": fs.StepLR()}, "momentum"),
        ({"next_momentum": Rising()}, "next_momentum"),
        ({"next_momentum": rising}, "next_momentum"),
        ({"dampening": rising}, "dampening"),
    ):
        with pytest.raises(TypeError, match=rf"^{name}: "):
            fs.Momentum(p, **arguments)
    with pytest.raises(TypeError, match=r"^betas\[0\]: "):
        fs.NAdam(p, betas=(fs.StepLR(), 0.9))
    with pytest.raises(TypeError, match=r"^betas\[1\]: "):
        fs.NAdam(p, betas=(0.9, Rising()))


@pytest.mark.parametrize("function", [fs.fused_momentum_step, fs.fused_nesterov_step])
def test_functional_steps_take_schedules_but_count_nothing(function: Any) -> None:
    p, q = np.ones(3), np.ones(3)
    schedule = Rising()
    schedule.last_epoch = 2
    options = {"next_momentum": rising(3)} if function is fs.fused_nesterov_step else {}
    function(p, np.ones(3), np.ones(3), lr=0.1, momentum=schedule)
    function(q, np.ones(3), np.ones(3), lr=0.1, momentum=rising(2), **options)
    assert not mismatch(p, q)
    with pytest.raises(TypeError, match=r"momentum: .*momentum=f\(t\)"):
        function(p, np.ones(3), lr=0.1, momentum=rising)
    with pytest.raises(TypeError, match=r"betas\[0\]: .*f\(t\)"):
        fs.fused_nadam_step(p, np.ones(3), lr=0.1, betas=(rising, 0.9))
    assert not mismatch(p, q)
