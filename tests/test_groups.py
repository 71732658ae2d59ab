"""Groups of the finished objects: added later, decayed by path, counted, described."""

from __future__ import annotations

import re
from typing import Any

import fusedstep as fs
import numpy as np
import objects
import pytest
from exact import Array, mismatch

EVERY_CLASS = pytest.mark.parametrize("kind", list(objects.FORMS), ids=lambda k: k.__name__)


def snapshot(opt: fs.Optimizer) -> tuple[str, list[Array]]:
    """What a refused call must leave as it was."""
    state = opt.state_dict()
    buffers = [
        np.copy(v) for e in state["state"].values() for v in e.values() if isinstance(v, np.ndarray)
    ]
    params = [np.copy(p) for group in opt.param_groups for p in group["params"]]
    return repr([state["param_groups"], opt.steps, opt.skipped_steps]), params + buffers


# --- groups that come later -------------------------------------------------------------------


@pytest.mark.usefixtures("isa")
@EVERY_CLASS
def test_an_added_group_uses_the_same_rule(kind: type[fs.Optimizer]) -> None:
    """The bits of the oracle in both groups, one norm over both (braintools adds an Adam)."""
    own = {"lr": 0.03, "weight_decay": 0.2, "maximize": True}
    options = {**objects.FORMS[kind], "lr": 0.01, "grad_clip_norm": 5.0}
    params, late = objects.arrays(1), objects.arrays(2, sizes=(5, 200))
    groups = [objects.oracle(kind, params, **options)]
    opt = kind(params, **options)
    for t in range(2):
        objects.advance(groups, [objects.arrays(10 + t)])
        opt.step(objects.arrays(10 + t))
    groups.append(objects.oracle(kind, late, **{**options, **own}))
    opt.add_param_group({"params": late, **own})
    for t in range(3):
        grads = [objects.arrays(20 + t), objects.arrays(30 + t, sizes=(5, 200))]
        norm, clips = objects.advance(groups, grads)
        result = opt.step(grads)
        assert (result.grad_norm, result.clip_coef) == (norm, min(clips))
    objects.check(opt, groups)
    assert opt.steps == 5


def test_a_group_of_an_empty_optimizer() -> None:
    p = np.ones(2)
    opt = fs.Adam(lr=0.5)
    opt.add_param_group({"params": [p], "eps": 0.0})
    opt.step([[np.ones(2)]])
    assert np.all(p == 0.5)


@pytest.mark.parametrize(
    ("group", "text"),
    [
        ([np.ones(1)], r"group: expected a dict with the key 'params', got an object of type list"),
        ({"lr": 0.1}, r"group: expected a dict with the key 'params'"),
        ({"params": [np.ones(1)], "beta": (0.9, 0.9)}, r"params\[0\]: unknown key 'beta'"),
        (
            {"params": [np.ones(1)], "betas": (0.9, 1.0)},
            r"param_groups\[1\]: betas\[1\]: .*got 1\.0",
        ),
        ({"params": [np.ones(1)], "amsgrad": 2}, r"param_groups\[1\]: amsgrad: .*got 2"),
        ({"params": []}, r"is empty"),
        (
            {"params": [np.ones(1)], "weight_decay": lambda *_: -1.0},
            r"weight_decay\('0'\): expected a number >= 0, got -1\.0",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refused_groups_change_nothing(group: Any, text: str) -> None:
    params = [np.ones(3)]
    opt = fs.Adam(params)
    opt.step([np.ones(3)])
    before, buffers = snapshot(opt)
    with pytest.raises((TypeError, ValueError), match=text):
        opt.add_param_group(group)
    after, now = snapshot(opt)
    assert before == after
    assert not any(mismatch(a, b) for a, b in zip(buffers, now, strict=True))
    opt.step([np.ones(3)])


def test_a_group_of_registered_arrays_is_refused() -> None:
    p = np.ones(3)
    opt = fs.NAdam([p])
    with pytest.raises(BufferError, match="overlap"):
        opt.add_param_group({"params": {"again": p[1:]}})
    assert len(opt.param_groups) == 1
    opt.step([np.ones(3)])


# --- decay by path ----------------------------------------------------------------------------


@pytest.mark.usefixtures("isa")
@EVERY_CLASS
def test_weight_decay_by_path(kind: type[fs.Optimizer]) -> None:
    """Arrays of one group with decays of their own: the bits of a group each."""
    options = {**objects.FORMS[kind], "lr": 0.01}
    names = ("w", "bias", "v", "head.w")
    decay_of = {"w": 0.1, "bias": 0.0, "v": 0.1, "head.w": 0.3}
    params = dict(zip(names, objects.arrays(1), strict=True))
    groups = [
        objects.oracle(kind, [params[n]], **{**options, "weight_decay": decay_of[n]}) for n in names
    ]
    opt = kind(params, **options, weight_decay=lambda path, _: decay_of[path])
    for t in range(3):
        grads = objects.arrays(10 + t)
        objects.advance(groups, [[g] for g in grads])
        opt.step(dict(zip(names, grads, strict=True)))
    for name, group in zip(names, groups, strict=True):
        assert not mismatch(params[name], group.params[0]), name


@EVERY_CLASS
def test_weight_decay_functions_differ_by_group(kind: type[fs.Optimizer]) -> None:
    """A function sees the paths of its own group; one that is assigned later is asked then."""
    a, b = np.ones(1), np.ones(1)
    asked: list[str] = []

    def decay(path: str, array: Array) -> float:
        asked.append(f"{path} {array.shape}")
        return 0.5

    opt = kind([{"params": {"a": a}, "weight_decay": decay}, {"params": {"b": b}}], lr=0.0)
    assert asked == ["a (1,)"]
    opt.step([{"a": np.ones(1)}, {"b": np.ones(1)}])
    assert asked == ["a (1,)"]
    opt.param_groups[1]["weight_decay"] = decay
    opt.step([{"a": np.ones(1)}, {"b": np.ones(1)}])
    assert asked[1:] == ["a (1,)", "b (1,)"]


# --- counts -----------------------------------------------------------------------------------


def test_steps_count_what_was_applied() -> None:
    p = np.ones(2)
    opt = fs.NAdam([p], on_nonfinite="skip", skip_grad_norm=10.0)
    for value, skipped in ((1.0, False), (np.nan, True), (100.0, True), (2.0, False)):
        assert opt.step([np.full(2, value)]).skipped == skipped
    assert (opt.steps, opt.skipped_steps) == (2, 2)
    with pytest.raises(ValueError, match="shape"):
        opt.step([np.ones(3)])
    opt.on_nonfinite = "raise"
    with pytest.raises(FloatingPointError):
        opt.step([np.full(2, np.inf)])
    opt.step([None])
    assert (opt.steps, opt.skipped_steps) == (3, 2)
    for name in ("steps", "skipped_steps"):
        with pytest.raises(AttributeError):
            setattr(opt, name, 0)


# --- repr -------------------------------------------------------------------------------------


class Rising(fs.MomentumSchedule):
    """Of a user."""

    def at(self, t: int) -> float:
        return 1 - 1 / (t + 2)


def ramp(t: int) -> float:
    return 0.5 + 0.01 * t


def decay_of(path: str, array: Array) -> float:
    return 0.1 if path == "w" and array.ndim > 1 else 0.0


def test_repr_of_defaults() -> None:
    for kind in objects.FORMS:
        opt = kind([np.ones(2), np.ones(3)])
        assert re.fullmatch(
            rf"{kind.__name__}\(lr=[\d.]+(, momentum=[\d.]+)?; 2 arrays, 1 group, 0 steps\)",
            repr(opt),
        )
    assert repr(fs.NAdam()) == "NAdam(lr=0.002; 0 arrays, 0 groups, 0 steps)"


def test_repr_of_what_was_set() -> None:
    opt = fs.RMSprop(
        [np.ones(2)], 0.1, momentum=0.5, centered=True, grad_clip_norm=1.0,
        on_nonfinite="skip", grad_clip_scope="array", skip_grad_norm=100.0,
    )  # fmt: skip
    opt.step([np.ones(2)])
    opt.step([np.full(2, np.nan)])
    assert repr(opt) == (
        "RMSprop(lr=0.1, momentum=0.5, centered=True, grad_clip_norm=1.0, on_nonfinite='skip', "
        "grad_clip_scope='array', skip_grad_norm=100.0; 1 array, 1 group, 1 step, 1 skipped)"
    )


def test_repr_of_schedules_and_functions() -> None:
    opt = fs.MomentumNesterov(
        [np.ones(2)], lr=fs.ExponentialLR(0.5, 0.5), momentum=ramp, weight_decay=decay_of
    )
    assert repr(opt) == (
        "MomentumNesterov(lr=ExponentialLR(base_lr=0.5, gamma=0.5, last_epoch=0), momentum=ramp, "
        "weight_decay=decay_of; 1 array, 1 group, 0 steps)"
    )
    text = repr(fs.NAdam([np.ones(2)], lr=lambda _: 0.1, betas=(ramp, 0.99)))
    assert text == "NAdam(lr=<lambda>, betas=(ramp, 0.99); 1 array, 1 group, 0 steps)"
    assert "Rising" in repr(fs.Adam([np.ones(2)], betas=(Rising(), 0.99)))
    assert "betas=[0.8, 0.99]" in repr(fs.Adam([np.ones(2)], betas=[0.8, 0.99]))


def test_repr_of_groups() -> None:
    opt = fs.AdamW([np.ones(2)], lr=0.1)
    opt.add_param_group(
        {"params": {"b": np.ones(2), "c": np.ones(1)}, "lr": 0.5, "betas": (0.5, 0.9)}
    )
    assert repr(opt) == (
        "AdamW(lr=0.1; 3 arrays, 2 groups, 0 steps)\n"
        "  group 0: 1 array\n"
        "  group 1: 2 arrays, lr=0.5, betas=(0.5, 0.9)"
    )


def test_repr_holds_no_contents_of_arrays() -> None:
    """Nor addresses: two equal optimizers read alike."""
    number = np.array(0.1234567)

    def make() -> fs.Optimizer:
        groups = [
            {"params": [np.full(2, 0.7654321)], "lr": number},
            {"params": [np.ones(1)], "betas": (number, 0.99)},
        ]
        return fs.NAdam(groups, lr=number, betas=(lambda _: 0.5, 0.9))

    text = repr(make())
    assert text == repr(make())
    assert "1234567" not in text
    assert "7654321" not in text
    assert " at 0x" not in text
    assert "lr=an object of type numpy.ndarray" in text
    assert "betas=(an object of type numpy.ndarray, 0.99)" in text
    assert "betas=(<lambda>, 0.9)" in text
