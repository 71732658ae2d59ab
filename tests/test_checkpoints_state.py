"""Nothing of a run is lost: every optimizer goes on with the same bits, by every way there is."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import fusedstep as fs
import numpy as np
import pytest
from resuming import CASES, SUFFIXES, Ramp, leaves, make, mapped, same, schedules, train, tree
from subprocesses import run_python

Carry = Callable[[Any, str, Path], tuple[Any, Any]]  # (optimizer, case, directory) -> the new ones


def by_file(suffix: str) -> Carry:
    """Into an optimizer with other parameters and other hyper-parameters."""

    def carry(opt: Any, case: str, directory: Path) -> tuple[Any, Any]:
        opt.save(directory / f"run{suffix}")
        fresh = tree(77)
        other = make(case, fresh, other=True)
        other.load(directory / f"run{suffix}")
        return other, fresh

    return carry


def by_dict(change: Callable[[Any], Any]) -> Carry:
    def carry(opt: Any, case: str, _: Path) -> tuple[Any, Any]:
        fresh = copy.deepcopy(opt.param_groups[0]["params"])
        other = make(case, fresh, other=True)
        other.load_state_dict(change(opt.state_dict()))
        return other, fresh

    return carry


def by_clone(clone: Callable[[Any], Any]) -> Carry:
    return lambda opt, _case, _: clone((opt, opt.param_groups[0]["params"]))


def through_json(state: dict[str, Any]) -> Any:
    """The numbers of a state dict as text; its buffers aside."""
    numbers = copy.copy(state)
    numbers["state"] = {
        key: {name: value for name, value in entry.items() if not isinstance(value, np.ndarray)}
        for key, entry in state["state"].items()
    }
    read = json.loads(json.dumps(numbers))
    for key, entry in state["state"].items():
        read["state"][str(key)] |= {k: v for k, v in entry.items() if isinstance(v, np.ndarray)}
    return read


def pickled(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))


WAYS: dict[str, Carry] = {
    **{suffix: by_file(suffix) for suffix in SUFFIXES},
    "dict": by_dict(lambda state: state),
    "json": by_dict(through_json),
    "pickled_dict": by_dict(pickled),
    "pickle": by_clone(pickled),
    "deepcopy": by_clone(copy.deepcopy),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_ten_steps_are_five_and_five(case: str, way: str, tmp_path: Path) -> None:
    straight, params = tree(0), tree(0)
    whole = make(case, straight)
    train(whole, range(10))

    first = make(case, params)
    train(first, range(5))
    second, resumed = WAYS[way](first, case, tmp_path)
    assert second is not first
    train(second, range(5, 10))
    assert same(resumed, straight)
    assert not same(params, straight)  # the old one stands where it stood
    assert (second.steps, second.skipped_steps) == (whole.steps, whole.skipped_steps)
    end, expected = second.state_dict(), whole.state_dict()
    assert repr(end["param_groups"]) == repr(expected["param_groups"])
    for key, entry in expected["state"].items():
        assert end["state"][key].keys() == entry.keys()
        assert same(list(end["state"][key].values()), list(entry.values()))


def test_cases_are_complete() -> None:
    """Every class, every state buffer, skipped steps, counts that differ by array."""
    assert {kind for kind, *_ in CASES.values()} == {
        getattr(fs, name)
        for name in fs.__all__
        if isinstance(getattr(fs, name), type) and issubclass(getattr(fs, name), fs.Optimizer)
    } - {fs.Optimizer}
    buffers: dict[type, set[str]] = {}
    skipped = 0
    for case, (kind, *_) in CASES.items():
        opt = make(case, tree(0))
        train(opt, range(5))
        state = opt.state_dict()["state"]
        counts = {entry["step"] for key, entry in state.items()}
        assert len(counts) == 2, case
        skipped += opt.skipped_steps
        buffers.setdefault(kind, set()).update(*state.values())
    assert 0 < skipped < 5
    for kind, names in buffers.items():
        assert names == {*kind.declaration.slots, *(kind.declaration.scalars or ("step",))}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("case", ["nadam_scheduled", "rmsprop_scheduled"])
def test_another_process_goes_on(case: str, suffix: str, tmp_path: Path) -> None:
    straight = tree(0)
    train(make(case, straight), range(10))
    first = make(case, tree(0))
    train(first, range(5))
    first.save(tmp_path / f"run{suffix}")
    run_python(
        f"""
        from resuming import make, train, tree
        fresh = tree(77)
        opt = make({case!r}, fresh, other=True)
        opt.load("run{suffix}")
        train(opt, range(5, 10))
        opt.save("end{suffix}")
        """,
        directory=tmp_path,
    )
    resumed = tree(1)
    make(case, resumed).load(tmp_path / f"end{suffix}")
    assert same(resumed, straight)


# --- torch ------------------------------------------------------------------------------------


def torch_tree(seed: int) -> Any:
    import torch

    return mapped(torch.from_numpy, tree(seed))


def in_numpy(tensors: Any) -> Any:
    return mapped(lambda x: x.numpy(), tensors)


@pytest.mark.framework("torch")
@pytest.mark.parametrize("way", [*SUFFIXES, "torch.save", "deepcopy"])
@pytest.mark.parametrize("case", CASES)
def test_tensors_go_on(case: str, way: str, tmp_path: Path) -> None:
    import torch

    straight = tree(0)
    train(make(case, straight), range(10))
    params, fresh = torch_tree(0), torch_tree(77)
    first = make(case, params)
    train(first, range(5), torch.from_numpy)
    if way == "deepcopy":
        second, fresh = copy.deepcopy((first, params))
    else:
        second = make(case, fresh, other=True)
    if way == "torch.save":
        torch.save((first.state_dict(), params), tmp_path / "run.pt")
        state, saved = torch.load(tmp_path / "run.pt", weights_only=True)
        for x, y in zip(leaves(fresh), leaves(saved), strict=True):
            x.copy_(y)
        second.load_state_dict(state)
    elif way != "deepcopy":
        first.save(tmp_path / f"run{way}")
        second.load(tmp_path / f"run{way}")
    train(second, range(5, 10), torch.from_numpy)
    assert same(in_numpy(fresh), straight)
    for entry in second.state_dict()["state"].values():
        assert all(isinstance(x, (torch.Tensor, int, float)) for x in entry.values())


# --- numbers ----------------------------------------------------------------------------------


def ones(n: int = 2) -> Any:
    return np.ones(n)


def test_a_state_dict_of_a_list_survives_json() -> None:
    """JSON makes the index 0 the key "0"."""
    opt = fs.SGD([ones(), ones()], lr=0.5)
    opt.step([ones(), None])
    fresh = fs.SGD([ones(), ones()], lr=0.25)
    fresh.load_state_dict(json.loads(json.dumps(opt.state_dict())))
    assert fresh.state_dict() == opt.state_dict()
    twice = opt.state_dict()
    twice["state"] = {0: {"step": 1}, "0": {"step": 2}}
    with pytest.raises(ValueError, match=r"state: .* '0'.*twice"):
        fresh.load_state_dict(twice)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_concerns_a_whole_step_is_state(suffix: str, tmp_path: Path) -> None:
    policy = {"on_nonfinite": "skip", "grad_clip_scope": "group", "skip_grad_norm": math.inf}
    opt = fs.Adam([ones()], **policy)
    opt.save(tmp_path / f"run{suffix}")
    fresh = fs.Adam([ones()], on_nonfinite="raise", skip_grad_norm=0.5)
    fresh.load(tmp_path / f"run{suffix}")
    assert {name: getattr(fresh, name) for name in policy} == policy
    with pytest.raises(ValueError, match="on_nonfinite"):
        fresh.load_state_dict({**opt.state_dict(), "on_nonfinite": "perhaps"})
    assert fresh.on_nonfinite == "skip"


def test_a_state_dict_without_what_concerns_a_whole_step() -> None:
    opt = fs.Adam([ones()], on_nonfinite="skip")
    state = opt.state_dict()
    state["on_nonfinite"] = "raise"
    del state["grad_clip_scope"], state["steps"], state["skipped_steps"]
    opt.load_state_dict(state)
    assert (opt.on_nonfinite, opt.grad_clip_scope, opt.steps) == ("raise", "all", 0)


def test_a_product_without_a_step_is_state() -> None:
    opt = fs.NAdam([ones()])
    opt.set_state(mu_product=0.5)
    assert opt.state_dict()["state"] == {0: {"step": 0, "mu_product": 0.5}}
    fresh = fs.NAdam([ones()])
    fresh.load_state_dict(opt.state_dict())
    assert fresh.state_dict() == opt.state_dict()


@pytest.mark.parametrize("mine", [Fraction(1, 4), np.float32(0.25), 0.25], ids=repr)
def test_any_number_is_replaced(mine: Any) -> None:
    state = fs.SGD([ones()], lr=0.5, momentum=0.75).state_dict()
    opt = fs.SGD([ones()], lr=mine, momentum=mine)
    opt.load_state_dict(state)
    assert (opt.lr, opt.param_groups[0]["momentum"]) == (0.5, 0.75)


def test_numbers_in_buffers_are_written() -> None:
    momentum, beta = np.array(0.25), np.array(0.25)
    first = fs.SGD([ones()], lr=0.5, momentum=0.75)
    second = fs.SGD([ones()], lr=0.5, momentum=momentum)
    second.load_state_dict(first.state_dict())
    assert momentum == 0.75
    assert second.param_groups[0]["momentum"] is momentum
    other = fs.Adam([ones()], betas=(beta, 0.5))
    other.load_state_dict(fs.Adam([ones()], betas=(0.75, 0.25)).state_dict())
    assert beta == 0.75
    assert other.param_groups[0]["betas"][0] is beta
    assert other.param_groups[0]["betas"][1] == 0.25


@pytest.mark.parametrize("step", [np.array(3), np.array(3.0, np.float32), 3.0], ids=repr)
def test_a_loaded_step_may_be_an_array_or_a_whole_float(step: Any) -> None:
    opt = fs.Momentum([ones()], lr=0.5)
    state = opt.state_dict()
    state["state"] = {0: {"velocity": ones(), "step": step}}
    opt.load_state_dict(state)
    assert opt.state_dict()["state"][0]["step"] == 3
    assert type(opt.state_dict()["state"][0]["step"]) is int


# --- schedules --------------------------------------------------------------------------------


def shared() -> tuple[Any, list[Any]]:
    params = [ones(), ones(), ones()]
    lr, momentum = fs.ExponentialLR(0.5, 0.5), Ramp(0.75)
    groups = [{"params": [p], "momentum": momentum} for p in params[:2]]
    opt = fs.Momentum([*groups, {"params": [params[2]], "lr": 0.125}], lr=lr)
    return opt, params


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_groups_that_share_a_schedule(suffix: str, tmp_path: Path) -> None:
    opt, _ = shared()
    grads = [[ones()]] * 3
    for _ in range(3):
        opt.step(grads)
        for schedule in schedules(opt):
            schedule.step()
    opt.save(tmp_path / f"run{suffix}")
    fresh, _ = shared()
    fresh.load(tmp_path / f"run{suffix}")
    assert len(schedules(fresh)) == 2
    assert [s.last_epoch for s in schedules(fresh)] == [3, 3]
    assert fresh.state_dict()["param_groups"] == opt.state_dict()["param_groups"]


@pytest.mark.parametrize("noun", ["lr", "momentum"])
def test_a_shared_schedule_cannot_go_on_from_two_places(noun: str) -> None:
    opt, _ = shared()
    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][1][f"{noun}_scheduler"]["last_epoch"] = 5
    with pytest.raises(ValueError, match=rf"param_groups\[1\]\['{noun}'\].*share"):
        opt.load_state_dict(state)
    assert [s.last_epoch for s in schedules(opt)] == [0, 0]


FOLLOWED = {"number": 0.25, "schedule": None, "function": lambda t: 0.5 / (t + 1)}


def following(name: str, kind: str) -> Any:
    value = FOLLOWED[kind]
    if kind == "schedule":
        value = fs.StepLR(0.5) if name == "lr" else Ramp(0.5)
    if name == "betas":
        return fs.AdamW([ones()], betas=(value, 0.5))
    return fs.SGD([ones()], **{"lr": 0.5, name: value})


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("mine", FOLLOWED)
@pytest.mark.parametrize("saved", FOLLOWED)
@pytest.mark.parametrize("name", ["lr", "momentum", "betas"])
def test_what_followed_something_must_follow_it_again(
    name: str, saved: str, mine: str, suffix: str, tmp_path: Path
) -> None:
    """A schedule or function must not silently become a constant, nor the other way round."""
    first, second = following(name, saved), following(name, mine)
    first.step([ones()])
    first.save(tmp_path / f"run{suffix}")
    if saved == mine:
        second.load(tmp_path / f"run{suffix}")
        assert second.state_dict()["param_groups"] == first.state_dict()["param_groups"]
        return
    words = {"number": "no schedule", "function": "a function of t", "schedule": r"StepLR|Ramp"}
    expected = rf"\['{name}'\]: .*followed ({words[saved]}).*here.*({words[mine]})"
    with pytest.raises(ValueError, match=expected):
        second.load(tmp_path / f"run{suffix}")
    assert second.steps == 0


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_functions_see_the_loaded_count(suffix: str, tmp_path: Path) -> None:
    seen: list[int] = []

    def halving(t: int) -> float:
        seen.append(t)
        return 0.5**t

    opt = fs.Momentum([ones()], lr=halving, momentum=lambda t: 0.5 if t else 0.0)
    for _ in range(4):
        opt.step([ones()])
    opt.save(tmp_path / f"run{suffix}")
    fresh = fs.Momentum([ones()], lr=halving, momentum=lambda t: 0.5 if t else 0.0)
    fresh.load(tmp_path / f"run{suffix}")
    del seen[:]
    fresh.step([ones()])
    assert set(seen) == {4}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_schedule_may_keep_numpy_numbers(suffix: str, tmp_path: Path) -> None:
    opt = fs.Momentum([ones()], lr=0.5, momentum=Ramp(np.float32(0.5), np.int64(3)))
    opt.save(tmp_path / f"run{suffix}")
    opt.param_groups[0]["momentum"].last_epoch = 0
    opt.load(tmp_path / f"run{suffix}")
    assert opt.param_groups[0]["momentum"].last_epoch == 3
    opt.param_groups[0]["momentum"].high = object()
    with pytest.raises(TypeError):
        opt.save(tmp_path / f"run{suffix}")


# --- accumulated gradients --------------------------------------------------------------------


def accumulating() -> tuple[Any, Any]:
    params = [ones()]
    opt = fs.Momentum(params, lr=0.5)
    opt.step([ones()])
    opt.accumulate([ones()])
    return opt, params


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_accumulated_gradients_are_no_state(suffix: str, tmp_path: Path) -> None:
    """A job that is about to be stopped can save at any moment; what was accumulated is lost."""
    opt, params = accumulating()
    path = tmp_path / f"run{suffix}"
    opt.save(path)
    fresh = fs.Momentum([ones()], lr=0.5)
    fresh.load(path)
    assert fresh.state_dict()["state"][0]["velocity"][0] == 1.0
    assert not fresh._plan.has_accumulated()
    for clone in (pickled, copy.deepcopy):  # would go on as if nothing had been accumulated
        with pytest.raises(ValueError, match="gradients wait"):
            clone(opt)
    opt.step()  # and still there where they were
    assert params[0][0] == 1.0 - 0.5 - 0.5 * 1.9


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_is_loaded_over_accumulated_gradients(suffix: str, tmp_path: Path) -> None:
    """They belong to the parameters and the state that were there."""
    opt, params = accumulating()
    path = tmp_path / f"run{suffix}"
    opt.save(path)
    for load in (
        lambda: opt.load(path),
        lambda: opt.load_state_dict(opt.state_dict()),
        lambda: opt.set_state(step=7),
    ):
        with pytest.raises(ValueError, match=r"grads: .*accumulated.*zero_grad"):
            load()
    assert opt.steps == 1
    opt.step()
    assert params[0][0] == 1.0 - 0.5 - 0.5 * 1.9
    opt.load(path)
    assert params[0][0] == 0.5
    opt.accumulate([ones()])
    opt.zero_grad()
    opt.load(path)


# --- clones -----------------------------------------------------------------------------------


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_clones_share_schedules_as_the_original_does(clone: Any) -> None:
    opt, _ = shared()
    other = clone(opt)
    assert len(schedules(other)) == 2
    assert not {id(s) for s in schedules(other)} & {id(s) for s in schedules(opt)}
    other.lr_scheduler.step()
    assert (other.lr, opt.lr) == (0.25, 0.5)
    assert other.param_groups[1]["lr"] is other.param_groups[0]["lr"]


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_clones_keep_counts_products_and_policies(clone: Any) -> None:
    opt = fs.NAdam([ones(), ones()], skip_grad_norm=5.0, grad_clip_scope="array")
    opt.step([ones(), None])
    opt.step([ones(), ones()])
    opt.step([9 * ones(), ones()])
    other = clone(opt)
    assert repr(other.state_dict()) == repr(opt.state_dict())
    assert (other.steps, other.skipped_steps) == (2, 1)
    assert other.skip_grad_norm == 5.0


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_an_optimizer_without_parameters_is_cloned(clone: Any) -> None:
    other = clone(fs.NAdam(lr=fs.StepLR(0.5)))
    assert other.param_groups == []
    other.register_trainable_weights([ones()])
    other.step([ones()])
    assert other.steps == 1
