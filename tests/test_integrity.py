"""State stays with its array, and what is refused has changed nothing: found by a review."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import fusedstep as fs
import numpy as np
import pytest
from exact import Array


def full(value: float, n: int = 3) -> Array:
    return np.full(n, float(value))


def test_two_arrays_of_one_name_are_refused_at_registration() -> None:
    with pytest.raises(ValueError, match=r"'w' occurs twice"):
        fs.SGD(iter([("w", full(1)), ("w", full(1))]), lr=0.5)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_reordered_tree_is_not_cloned_with_swapped_states(clone: Any) -> None:
    params = {"a": full(0), "b": full(0)}
    opt = fs.Momentum(params, lr=1.0, momentum=0.5)
    opt.step({"a": full(1), "b": full(5)})
    params["a"] = params.pop("a")
    with pytest.raises(ValueError, match="register"):
        clone(opt)


def test_a_changed_tree_does_not_load() -> None:
    params = {"m": {"x": full(0)}, "z": full(0)}
    opt = fs.Momentum(params, lr=1.0, momentum=0.5)
    opt.step({"m": {"x": full(1)}, "z": full(5)})
    state = copy.deepcopy(opt.state_dict())
    params["m"]["y"] = full(0)
    with pytest.raises(ValueError, match="register"):
        opt.load_state_dict(state)
    del params["m"]["y"]
    params["z"] = full(0)
    with pytest.raises(ValueError, match="register"):
        opt.load_state_dict(state)


def test_a_decay_function_that_fails_has_changed_nothing() -> None:
    def good(path: str, _: Any) -> float:
        return 0.5 if path == "a" else 0.0

    def bad(path: str, _: Any) -> float:
        if path == "c":
            raise KeyError(path)
        return 0.25

    params = {name: full(1) for name in "abc"}
    opt = fs.SGD(params, lr=1.0, weight_decay=good)
    opt.param_groups[0]["weight_decay"] = bad
    with pytest.raises(KeyError):
        opt.step({name: full(0) for name in "abc"})
    opt.param_groups[0]["weight_decay"] = good
    opt.step({name: full(0) for name in "abc"})
    assert [params[name][0] for name in "abc"] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize("names", [("a", "a.npy"), ("#1", "\n"), ("params/0", "0")])
def test_names_that_an_archive_could_confuse(names: tuple[str, str], tmp_path: Path) -> None:
    opt = fs.Momentum({names[0]: full(1), names[1]: full(2)}, lr=0.5)
    opt.save(tmp_path / "run.npz")
    params = {names[0]: full(0), names[1]: full(0)}
    fs.Momentum(params, lr=0.5).load(tmp_path / "run.npz")
    assert (params[names[0]] == 1).all()
    assert (params[names[1]] == 2).all()


@pytest.mark.parametrize("second", ["abc", -3.0, float("nan")])
def test_lr_buffers_keep_their_numbers_when_loading_fails(second: Any) -> None:
    buffers = [np.array(0.1), np.array(0.2)]
    groups = [{"params": [full(1)], "lr": lr} for lr in buffers]
    opt = fs.SGD(groups)
    state = opt.state_dict()
    state["param_groups"][0]["lr"] = 0.5
    state["param_groups"][1]["lr"] = second
    with pytest.raises((TypeError, ValueError), match="lr"):
        opt.load_state_dict(state)
    assert [float(lr) for lr in buffers] == [0.1, 0.2]


def test_lr_buffers_that_cannot_hold_a_number_refuse_it() -> None:
    lr = np.array(0.5, np.float16)
    opt = fs.SGD([full(1)], lr=lr)
    state = opt.state_dict()
    state["param_groups"][0]["lr"] = 0.3
    with pytest.raises(ValueError, match="exactly"):
        opt.load_state_dict(state)
    assert lr == 0.5


@pytest.mark.parametrize(
    ("name", "value"), [("step_size", 0), ("gamma", float("nan")), ("base_lr", -1.0)]
)
def test_schedules_refuse_what_their_constructor_refuses(name: str, value: float) -> None:
    schedule = fs.StepLR(base_lr=0.5, step_size=3)
    before = schedule.state_dict()
    with pytest.raises(ValueError, match=name):
        schedule.load_state_dict({**before, name: value})
    assert schedule.state_dict() == before
