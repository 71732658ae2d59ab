"""state_dict, save and load, pickle, deepcopy: training goes on with the same bits."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import driver
import fusedstep as fs
import numpy as np
import pytest
from exact import BFLOAT16, Array, mismatch

SIZES = (5, 16_385, 0, 7)


def tree(seed: int, dtype: str = "float32") -> dict[str, Any]:
    a, b, c, d = (x.copy() for x in driver.values(dtype, SIZES, seed))
    return {"layers": [{"W": a, "b": b}, {"W": c}], "head": d}


def leaves(node: Any) -> list[Array]:
    if isinstance(node, dict):
        node = list(node.values())
    return [x for item in node for x in leaves(item)] if isinstance(node, list) else [node]


def same(a: Any, b: Any) -> bool:
    return not any(mismatch(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def make(params: Any, **options: Any) -> fs.MomentumNesterov:
    settings = {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.01, "grad_clip_norm": 3.0}
    return fs.MomentumNesterov(
        params, lr=fs.ExponentialLR(base_lr=0.1, gamma=0.7), **settings, **options
    )


def train(opt: Any, seeds: range, dtype: str = "float32") -> None:
    for seed in seeds:
        opt.step(tree(seed, dtype))
        opt.lr_scheduler.step()


Carry = Callable[[Any, Any, Path], Any]  # (optimizer, new params, directory) -> optimizer


def by_state_dict(opt: Any, params: Any, _: Path) -> Any:
    fresh = make(params)
    fresh.load_state_dict(opt.state_dict())
    return fresh


def by_file(opt: Any, params: Any, directory: Path) -> Any:
    opt.save(directory / "run.npz")
    fresh = make(params)
    fresh.load(directory / "run.npz")
    return fresh


def by_pickled_state(opt: Any, params: Any, _: Path) -> Any:
    fresh = make(params)
    fresh.load_state_dict(pickle.loads(pickle.dumps(opt.state_dict())))
    return fresh


@pytest.mark.parametrize(
    "carry", [by_state_dict, by_file, by_pickled_state], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_continuing_has_the_same_bits(carry: Carry, dtype: str, tmp_path: Path) -> None:
    """The schedule, the step counts and the buffers come along; hyper-parameters too."""
    straight = tree(0, dtype)
    opt = make(straight)
    train(opt, range(1, 7), dtype)

    resumed = tree(0, dtype)
    first = make(resumed)
    train(first, range(1, 4), dtype)
    second = carry(first, resumed, tmp_path)
    train(second, range(4, 7), dtype)
    assert same(resumed, straight)
    assert second.lr == opt.lr


def test_loading_before_the_first_step(tmp_path: Path) -> None:
    """An optimizer that has not stepped saves that too: the first step is still the first."""
    straight, resumed = tree(0), tree(0)
    train(make(straight), range(1, 3))
    make(resumed).save(tmp_path / "start.npz")
    opt = make(resumed)
    opt.load(tmp_path / "start.npz")
    train(opt, range(1, 3))
    assert same(resumed, straight)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_clones_are_independent_and_go_on(clone: Any) -> None:
    """Optimizer and parameters are cloned together, so that they stay bound to each other."""
    params = tree(0)
    opt = make(params)
    train(opt, range(1, 3))
    other_opt, other_params = clone((opt, params))
    assert same(other_params, params)
    train(other_opt, range(3, 5))
    assert not same(other_params, params)
    train(opt, range(3, 5))
    assert same(other_params, params)
    assert other_opt.lr == opt.lr


def test_state_dict_has_the_documented_form() -> None:
    params = tree(0)
    opt = make(params)
    train(opt, range(1, 3))
    state = opt.state_dict()
    assert set(state) >= {"state", "param_groups"}
    assert set(state["state"]) == {"layers.0.W", "layers.0.b", "layers.1.W", "head"}
    entry = state["state"]["layers.0.W"]
    assert set(entry) == {"velocity", "step"}
    assert entry["step"] == 2
    group = state["param_groups"][0]
    assert group["momentum"] == 0.8
    assert group["grad_clip_norm"] == 3.0


def test_state_dict_of_a_sequence_has_index_keys() -> None:
    params = [np.ones(2), np.ones(3)]
    opt = fs.Momentum(params, lr=0.1)
    opt.step([np.ones(2), None])
    assert list(opt.state_dict()["state"]) == [0]
    opt.step([np.ones(2), np.ones(3)])
    assert list(opt.state_dict()["state"]) == [0, 1]


def test_state_dict_is_live_and_loading_copies() -> None:
    params, others = [np.ones(2)], [np.ones(2)]
    opt, other = fs.Momentum(params, lr=0.1), fs.Momentum(others, lr=0.1)
    opt.step([np.ones(2)])
    state = opt.state_dict()
    live = state["state"][0]["velocity"]
    other.load_state_dict(state)
    opt.step([np.ones(2)])
    assert live[0] == 1.9
    assert other.state_dict()["state"][0]["velocity"][0] == 1.0
    other.step([np.zeros(2)])
    assert live[0] == 1.9


def test_groups_are_carried(tmp_path: Path) -> None:
    def build() -> tuple[list[Array], Any]:
        arrays = [np.ones(3), np.ones(2)]
        groups = [{"params": [arrays[0]], "lr": 0.5, "momentum": 0.0}, {"params": {"w": arrays[1]}}]
        return arrays, fs.Momentum(groups, lr=fs.StepLR(base_lr=0.2, step_size=1, gamma=0.5))

    def go(opt: Any, steps: range) -> None:
        for k in steps:
            opt.step([[np.full(3, k + 1.0)], {"w": np.ones(2)}])
            opt.lr_scheduler.step()

    straight, opt = build()
    go(opt, range(4))
    arrays, opt = build()
    go(opt, range(2))
    opt.save(tmp_path / "groups.npz")
    resumed, opt = build()
    for x, y in zip(resumed, arrays, strict=True):
        x[...] = y
    opt.load(tmp_path / "groups.npz")
    go(opt, range(2, 4))
    assert same(resumed, straight)


def test_file_is_a_plain_npz(tmp_path: Path) -> None:
    """Readable without us and without pickle; bfloat16 as its bits."""
    opt = fs.Momentum({"w": np.ones(3, BFLOAT16)}, lr=0.1)
    opt.step({"w": np.ones(3, BFLOAT16)})
    opt.save(tmp_path / "run.npz")
    with np.load(tmp_path / "run.npz", allow_pickle=False) as file:
        names = list(file)
        assert any("velocity" in name for name in names)
        for name in names:
            assert file[name].dtype != object


def test_saving_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash while writing leaves the old file, and no litter."""
    path = tmp_path / "run.npz"
    opt = fs.Momentum([np.ones(3)], lr=0.1)
    opt.step([np.ones(3)])
    opt.save(path)
    before = path.read_bytes()

    def crash(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    for name in ("savez", "savez_compressed"):
        monkeypatch.setattr(np, name, crash)
    monkeypatch.setattr(np.lib.format, "write_array", crash)
    with pytest.raises(OSError, match="disk full"):
        opt.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_saving_takes_strings_and_paths(tmp_path: Path) -> None:
    opt = fs.Momentum([np.ones(3)], lr=0.1)
    opt.save(str(tmp_path / "a.npz"))
    opt.save(tmp_path / "b.npz")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.npz"]
    opt.load(str(tmp_path / "a.npz"))


# --- what does not fit ------------------------------------------------------------------------


def stepped(params: Any, grads: Any) -> Any:
    opt = fs.Momentum(params, lr=0.1)
    opt.step(grads)
    return opt


def test_states_that_do_not_fit_are_refused_and_change_nothing() -> None:
    opt = stepped({"w": np.ones(3)}, {"w": np.ones(3)})
    before = opt.state_dict()["state"]["w"]["velocity"].copy()
    strangers = [
        (stepped({"u": np.ones(3)}, {"u": np.ones(3)}), r"u|w"),
        (stepped({"w": np.ones(4)}, {"w": np.ones(4)}), r"w.*shape"),
        (
            stepped(
                [{"params": {"w": np.ones(3)}}, {"params": [np.ones(1)]}],
                [{"w": np.ones(3)}, [np.ones(1)]],
            ),
            r"group",
        ),
    ]
    for stranger, text in strangers:
        with pytest.raises((ValueError, KeyError), match=text):
            opt.load_state_dict(stranger.state_dict())
        assert opt.state_dict()["state"]["w"]["velocity"].tobytes() == before.tobytes()
        assert opt.state_dict()["state"]["w"]["step"] == 1
    with pytest.raises((TypeError, ValueError, KeyError), match="state"):
        opt.load_state_dict({"nonsense": 1})


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    opt = fs.Momentum([np.ones(3)], lr=0.1)
    with pytest.raises((ValueError, KeyError), match=r"other\.npz"):
        opt.load(tmp_path / "other.npz")
    with pytest.raises(FileNotFoundError):
        opt.load(tmp_path / "missing.npz")


def test_functions_as_lr_are_not_saved(tmp_path: Path) -> None:
    """A bare function cannot go into a file; loading keeps the one that the optimizer has."""
    p = np.zeros(1)
    opt = fs.SGD([p], lr=lambda t: 2.0**t)
    for _ in range(3):
        opt.step([np.ones(1)])
    opt.save(tmp_path / "f.npz")
    q = np.zeros(1)
    fresh = fs.SGD([q], lr=lambda t: 2.0**t)
    fresh.load(tmp_path / "f.npz")
    fresh.step([np.ones(1)])
    assert q[0] == -15.0  # the parameters are in the file, too


def test_nothing_is_warned(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = make(tree(0))
        opt.save(tmp_path / "x.npz")
        opt.load(tmp_path / "x.npz")
        copy.deepcopy(opt)


CLONES = [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]


@pytest.mark.parametrize("clone", CLONES, ids=["deepcopy", "pickle"])
@pytest.mark.parametrize(
    "change",
    [lambda tree: tree.update(a=tree.pop("a")), lambda tree: tree["m"].update(y=np.ones(2))],
    ids=["reordered", "grown"],
)
def test_trees_that_changed_are_refused(clone: Any, change: Any) -> None:
    """A velocity must not reach another array: the state knows its array by its place."""
    params = {"a": np.ones(2), "m": {"x": np.ones(2)}, "z": np.ones(2)}
    opt = stepped(params, {"a": np.ones(2), "m": {"x": np.full(2, 2.0)}, "z": np.full(2, 3.0)})
    state = copy.deepcopy(opt.state_dict())
    change(params)
    with pytest.raises(ValueError, match="registered"):
        clone(opt)
    with pytest.raises(ValueError, match="registered"):
        opt.load_state_dict(state)
    opt.register_trainable_weights(params)
    velocities = {key: entry["velocity"][0] for key, entry in opt.state_dict()["state"].items()}
    assert velocities == {"a": 1.0, "m.x": 2.0, "z": 3.0}
    again = clone(opt).state_dict()["state"]
    assert {key: entry["velocity"][0] for key, entry in again.items()} == velocities


def test_a_reordered_list_is_refused_too() -> None:
    params = [np.ones(2), np.ones(2)]
    opt = stepped(params, [np.ones(2), np.zeros(2)])
    params.reverse()
    with pytest.raises(ValueError, match="registered"):
        pickle.dumps(opt)


@pytest.mark.parametrize(
    "names", [("a", "a.npy"), ("#1", "\n"), ("a/b", "a\\b"), ("x" * 300, "")], ids=repr
)
def test_any_keys_can_be_saved(names: tuple[str, str], tmp_path: Path) -> None:
    params = {name: np.full(2, k + 1.0) for k, name in enumerate(names)}
    opt = stepped(params, {name: np.full(2, k + 5.0) for k, name in enumerate(names)})
    opt.save(tmp_path / "run.npz")
    fresh = {name: np.zeros(2) for name in names}
    other = fs.Momentum(fresh, lr=0.1)
    other.load(tmp_path / "run.npz")
    for k, name in enumerate(names):
        assert fresh[name].tobytes() == params[name].tobytes()
        assert other.state_dict()["state"][name]["velocity"][0] == k + 5.0


# --- learning rates in buffers ----------------------------------------------------------------


@pytest.mark.parametrize("number", [-3.0, float("nan"), float("inf"), "fast", None])
def test_a_loaded_lr_is_checked_before_any_is_written(number: Any) -> None:
    first, second = np.array(0.5), np.array(0.25)
    groups = [{"params": [np.ones(2)], "lr": first}, {"params": [np.ones(2)], "lr": second}]
    opt = fs.Momentum(groups)
    state = opt.state_dict()
    state["param_groups"][0]["lr"] = 0.125
    state["param_groups"][1]["lr"] = number
    with pytest.raises((TypeError, ValueError), match=r"param_groups\[1\]\['lr'\]"):
        opt.load_state_dict(state)
    assert (first, second) == (0.5, 0.25)
    state["param_groups"][1]["lr"] = 0.75
    opt.load_state_dict(state)
    assert (first, second) == (0.125, 0.75)


@pytest.mark.parametrize("number", [0.1, 1e300])
def test_a_loaded_lr_is_not_rounded(number: float) -> None:
    lr = np.array(0.5, np.float16)
    opt = fs.Momentum([np.ones(2)], lr=lr)
    state = opt.state_dict()
    state["param_groups"][0]["lr"] = number
    with pytest.raises(ValueError, match=r"lr.*float16.*exactly"):
        opt.load_state_dict(state)
    assert lr == 0.5


@pytest.mark.framework("torch")
def test_a_loaded_lr_counts_as_a_write() -> None:
    import torch

    lr = torch.tensor(0.5)
    opt = fs.Momentum([np.ones(2)], lr=lr)
    state, before = opt.state_dict(), lr._version
    state["param_groups"][0]["lr"] = 0.25
    opt.load_state_dict(state)
    assert lr == 0.25
    assert lr._version > before


# --- files with a wrong header ----------------------------------------------------------------


def put(*path: Any) -> Callable[[Any], None]:
    """Sets the place in a header that `path` names to the last of `path`."""
    *way, last, value = path

    def change(node: Any) -> None:
        for key in way:
            node = node[key]
        node[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        put("steps", 2**70),
        put("steps", -1),
        put("table", 0, "scalars", "step", 2**70),
        put("table", 0, "arrays", []),
        put("table", 0, "arrays", "velocity", "dtype", "float32"),
        put("table", 0, "arrays", "velocity", "dtype", "nonsense"),
        put("table", 3),
        put("table", 0, "key", []),
        put("param_groups", [3]),
        put("param_groups", 0, "params", None),
        put("param_groups", 0, "lr_scheduler", 3),
        put("param_groups", 0, "lr_scheduler", "step_size", 0),
        put("param_groups", 0, "lr_scheduler", "gamma", 1e300),
        put("param_groups", 0, "lr_scheduler", "last_epoch", 10**400),
        put("param_groups", 0, "momentum", 10**400),
    ],
)
def test_malformed_headers_are_value_errors(change: Any, tmp_path: Path) -> None:
    def build() -> Any:
        return fs.Momentum({"w": np.ones(3)}, lr=fs.StepLR(base_lr=0.1, step_size=2, last_epoch=9))

    path, opt = tmp_path / "run.npz", build()
    opt.step({"w": np.ones(3)})
    opt.save(path)
    with np.load(path) as file:
        arrays = dict(file)
    header = json.loads(arrays["fusedstep.json"].tobytes())
    change(header)
    arrays["fusedstep.json"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez(path, **arrays)
    fresh = build()
    with pytest.raises(ValueError, match=r"run\.npz: "):
        fresh.load(path)
    assert (fresh.steps, fresh.state_dict()["state"]) == (0, {})


def test_a_list_is_no_buffer() -> None:
    opt = stepped({"w": np.ones(3)}, {"w": np.ones(3)})
    state = opt.state_dict()
    state["state"]["w"] = {"velocity": [1.0, 1.0, 1.0], "step": 1}
    with pytest.raises(TypeError, match=r"state\['w'\]\['velocity'\]: expected an array"):
        opt.load_state_dict(state)
