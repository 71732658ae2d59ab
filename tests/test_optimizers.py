"""The objects: groups, learning rates, gradients from `.grad`, skipping, registration."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import driver
import fusedstep as fs
import numpy as np
import pytest
import reference
from exact import Array, mismatch
from fusedstep import _core, _stubs

CLASSES = [fs.SGD, fs.Momentum, fs.MomentumNesterov]


def ones(*shape: int, dtype: Any = np.float32) -> Array:
    return np.ones(shape or (3,), dtype)


class Parameter(np.ndarray):
    """An array with a `.grad`, as frameworks have it."""

    grad: Array | None = None


def parameter(values: Array, grad: Array | None) -> Parameter:
    made = values.copy().view(Parameter)
    made.grad = grad
    return made


# --- against the functions --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "function", "options"),
    [
        (fs.SGD, fs.fused_sgd_step, {"weight_decay": 0.1}),
        (fs.Momentum, fs.fused_momentum_step, {"momentum": 0.8, "dampening": 0.3}),
        (
            fs.MomentumNesterov,
            fs.fused_nesterov_step,
            {"lr_in_velocity": True, "grad_clip_norm": 1.0},
        ),
        (
            fs.Momentum,
            fs.fused_momentum_step,
            {"decoupled_weight_decay": True, "weight_decay": 0.1},
        ),
        (fs.MomentumNesterov, fs.fused_nesterov_step, {"next_momentum": 0.5, "maximize": True}),
    ],
)
def test_objects_and_functions_agree(make: Any, function: Any, options: dict[str, Any]) -> None:
    sizes = (5, 16_385, 0, 1000)
    params, expected = ([x.copy() for x in driver.values("float32", sizes)] for _ in range(2))
    opt, state = make(params, lr=0.1, **options), {}
    for grads in driver.gradients("float32", sizes):
        got = opt.step(grads)
        result = function(expected, grads, **state, lr=0.1, **options)
        state = result.state
        assert (got.grad_norm, got.clip_coef, got.skipped) == (
            result.grad_norm,
            result.clip_coef,
            False,
        )
        assert got.state == {}
    assert not any(mismatch(p, q) for p, q in zip(params, expected, strict=True))


def test_sgd_covers_all_forms() -> None:
    """SGD(momentum, nesterov, dampening) as in torch; without momentum there is no buffer."""
    for options, make in (
        ({"momentum": 0.9}, fs.Momentum),
        ({"momentum": 0.9, "nesterov": True}, fs.MomentumNesterov),
        ({"momentum": 0.9, "dampening": 0.5}, fs.Momentum),
    ):
        p, q = ones(dtype=float), ones(dtype=float)
        first = fs.SGD([p], lr=0.1, **options)
        second = make([q], lr=0.1, **{k: v for k, v in options.items() if k != "nesterov"})
        for k in range(3):
            first.step([np.arange(3.0) + k])
            second.step([np.arange(3.0) + k])
        np.testing.assert_array_equal(p, q)
    plain = fs.SGD([ones()], lr=0.1)
    plain.step([ones()])
    assert all("velocity" not in entry for entry in plain.state_dict()["state"].values())


def test_a_step_is_one_call_into_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """1000 arrays in three groups: one call, and none per array."""
    calls: list[str] = []
    import fusedstep

    params = [[ones(2) for _ in range(n)] for n in (500, 300, 200)]
    opt = fs.MomentumNesterov(
        [{"params": p, "lr": 0.1 * (k + 1)} for k, p in enumerate(params)], grad_clip_norm=1.0
    )
    grads = [[ones(2) for _ in p] for p in params]
    opt.step(grads)

    class Counting:
        def __init__(self, plan: Any) -> None:
            self._plan = plan

        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(self._plan, name)

        def __len__(self) -> int:
            calls.append("__len__")
            return len(self._plan)

    plans = [name for name, value in vars(opt).items() if isinstance(value, _core.Plan)]
    assert len(plans) == 1
    monkeypatch.setattr(opt, plans[0], Counting(getattr(opt, plans[0])))
    for name in ("step", "describe", "array_view", "flatten", "is_array", "read_scalar"):
        original = getattr(fusedstep._core, name)

        def counted(*a: Any, _name: str = name, _f: Any = original, **k: Any) -> Any:
            calls.append(_name)
            return _f(*a, **k)

        monkeypatch.setattr(fusedstep._core, name, counted)
    opt.step(grads)
    assert calls == ["step"]


# --- groups -----------------------------------------------------------------------------------


def test_groups_have_their_own_hyper_parameters() -> None:
    a, b, c = (np.zeros(1) for _ in range(3))
    opt = fs.Momentum(
        [
            {"params": a, "lr": 1.0},
            {"params": [b], "momentum": 0.0, "weight_decay": 0.5},
            {"params": {"c": c}, "maximize": True, "grad_clip_value": 0.5},
        ],
        lr=0.5,
    )
    assert [g["lr"] for g in opt.param_groups] == [1.0, 0.5, 0.5]
    for _ in range(2):
        opt.step([np.ones(1), [np.ones(1)], {"c": np.ones(1)}])
    assert (a[0], b[0], c[0]) == (-2.9, -0.5 - 0.5 * 0.75, 0.25 + 0.25 * 1.9)


def test_changing_a_group_takes_effect() -> None:
    p = np.zeros(1)
    opt = fs.SGD([{"params": [p]}], lr=1.0)
    opt.param_groups[0]["lr"] = 0.25
    opt.step([[np.ones(1)]])
    assert p[0] == -0.25
    opt.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr"):
        opt.step([[np.ones(1)]])
    assert p[0] == -0.25


def test_group_errors_name_the_group() -> None:
    with pytest.raises((TypeError, ValueError), match=r"params\[1\].*momentun"):
        fs.Momentum([{"params": [ones()]}, {"params": [ones()], "momentun": 0.5}], lr=0.1)
    with pytest.raises(ValueError, match=r"momentum.*got 1\.5"):
        fs.Momentum([{"params": [ones()], "momentum": 1.5}], lr=0.1)
    shared = ones()
    with pytest.raises(
        BufferError,
        match=r"params\[0\]\['params'\]\[0\] and params\[1\]\['params'\]\['w'\] overlap",
    ):
        fs.SGD([{"params": [shared]}, {"params": {"w": shared}}], lr=0.1)
    with pytest.raises(ValueError, match=r"params\[1\]\['params'\] is empty"):
        fs.SGD([{"params": [ones()]}, {"params": []}], lr=0.1)


def test_a_list_of_dicts_without_params_is_a_tree() -> None:
    layers = [{"W": np.zeros(2), "b": np.zeros(1)}, {"W": np.zeros(3), "params": np.zeros(1)}]
    opt = fs.SGD(layers, lr=1.0)
    opt.step([{"W": np.ones(2), "b": np.ones(1)}, {"W": np.ones(3), "params": np.ones(1)}])
    assert layers[1]["params"][0] == -1
    assert len(opt.param_groups) == 1


def test_weight_decay_by_path() -> None:
    """No decay on biases: a function of path and array, asked once at registration."""
    params = {"layers": [{"W": ones(2, 2), "b": ones(2)}], "head": {"W": ones(2, 2)}}
    asked: list[str] = []

    def decay(path: str, array: Array) -> float:
        asked.append(path)
        return 0.5 if array.ndim > 1 else 0.0

    opt = fs.SGD(params, lr=1.0, weight_decay=decay)
    zeros = {"layers": [{"W": ones(2, 2) * 0, "b": ones(2) * 0}], "head": {"W": ones(2, 2) * 0}}
    for _ in range(2):
        opt.step(zeros)
    assert sorted(asked) == ["head.W", "layers.0.W", "layers.0.b"]
    assert params["layers"][0]["W"][0, 0] == 0.25
    assert params["layers"][0]["b"][0] == 1.0
    with pytest.raises(ValueError, match="weight_decay"):
        fs.SGD(params, lr=1.0, weight_decay=lambda path, array: -len(path) * array.size)


# --- gradients --------------------------------------------------------------------------------


def test_grads_from_the_parameters() -> None:
    params = [parameter(ones(), ones()), parameter(ones(2), None)]
    opt = fs.SGD(params, lr=0.5)
    opt.step()
    assert (params[0][0], params[1][0]) == (0.5, 1.0)
    opt.zero_grad()
    assert params[0].grad is None
    opt.step()
    assert params[0][0] == 0.5
    params[1].grad = ones(2)
    opt.zero_grad(set_to_none=False)
    assert params[1].grad is not None
    assert not params[1].grad.any()


def test_step_without_grads_needs_them_somewhere() -> None:
    opt = fs.SGD([ones()], lr=0.1)
    with pytest.raises(
        TypeError,
        match=r"params\[0\]: a .*ndarray has no \.grad; pass the gradients: step\(grads\)",
    ):
        opt.step()
    opt.zero_grad()


def test_none_gradients_do_not_count() -> None:
    """Each tensor has a step count of its own: dampening starts with its own second step."""
    a, b = np.zeros(1), np.zeros(1)
    opt = fs.Momentum([a, b], lr=1.0, momentum=0.5, dampening=0.5)
    opt.step([np.ones(1), None])
    opt.step([np.ones(1), np.ones(1)])
    opt.step([None, None])
    assert (a[0], b[0]) == (-2.0, -1.0)
    state = opt.state_dict()["state"]
    assert (state[0]["step"], state[1]["step"]) == (2, 1)


def test_bad_gradients_change_nothing() -> None:
    a, b = ones(), ones(2)
    opt = fs.Momentum({"a": a, "b": b}, lr=0.5)
    for grads, text in (
        ({"a": ones()}, r"grads: missing key 'b'"),
        (
            {"a": ones(), "b": ones(3)},
            r"grads\['b'\]: expected shape \(2,\) like params\['b'\], got \(3,\)",
        ),
        ([ones(), ones(2)], r"grads: expected a dict"),
    ):
        with pytest.raises((TypeError, ValueError), match=text):
            opt.step(grads)
    assert np.all(a == 1)
    assert opt.state_dict()["state"] == {}


def test_gradients_of_groups_are_named_by_group() -> None:
    opt = fs.SGD([{"params": {"w": ones()}}, {"params": [ones()]}], lr=0.5)
    with pytest.raises(ValueError, match=r"grads\[1\]\[0\]: expected shape"):
        opt.step([{"w": ones()}, [ones(4)]])
    with pytest.raises((TypeError, ValueError), match="grads"):
        opt.step([{"w": ones()}])


def test_given_norm_and_copies() -> None:
    p, copy = np.zeros(1, np.float32), np.zeros(1, np.float16)
    opt = fs.SGD([p], lr=1.0, grad_clip_norm=1.0)
    result = opt.step([ones(1)], grad_norm=4.0, param_copy=[copy])
    assert (result.grad_norm, result.clip_coef, p[0], copy[0]) == (4.0, 0.25, -0.25, -0.25)


# --- registration -----------------------------------------------------------------------------


def test_rebound_parameters_are_noticed() -> None:
    params = {"W": ones(), "b": ones()}
    opt = fs.Momentum(params, lr=0.5)
    grads = {"W": ones(), "b": ones()}
    opt.step(grads)
    params["W"] = params["W"] * 2
    before = params["b"].copy()
    with pytest.raises(ValueError, match=r"params\['W'\].*\[\.\.\.\]"):
        opt.step(grads)
    np.testing.assert_array_equal(params["b"], before)
    opt.register_trainable_weights(params)
    opt.step(grads)


def test_changed_trees_are_noticed() -> None:
    params = [ones(), ones()]
    opt = fs.SGD(params, lr=0.5)
    params.append(ones())
    with pytest.raises(ValueError, match=r"params"):
        opt.step([ones(), ones(), ones()])
    del params[1:]
    with pytest.raises(ValueError, match=r"params"):
        opt.step([ones()])
    assert params[0][0] == 1.0


def test_registration_later() -> None:
    opt = fs.Momentum(lr=0.5)
    with pytest.raises((RuntimeError, ValueError, TypeError), match="register_trainable_weights"):
        opt.step([ones()])
    p = ones()
    opt.register_trainable_weights({"w": p})
    opt.step({"w": ones()})
    assert p[0] == 0.5


def test_bad_parameters_are_refused_at_registration() -> None:
    for make in CLASSES:
        with pytest.raises(
            TypeError, match=r"params: got 0\.01; params comes first, write lr=0\.01"
        ):
            make(0.01)
        with pytest.raises(ValueError, match="empty"):
            make([], lr=0.1)
        with pytest.raises(TypeError, match=r"params\[0\]: a float cannot be updated in place"):
            make([0.1], lr=0.1)
        with pytest.raises(BufferError, match=r"params\['w'\] is read-only"):
            make({"w": np.broadcast_to(np.float32(1), 3)}, lr=0.1)
        with pytest.raises(TypeError, match=r"params\[0\]: dtype int64"):
            make([np.arange(3)], lr=0.1)
        with pytest.raises(ValueError, match=r"lr"):
            make([ones()], lr=-0.1)


def test_generator_of_parameters() -> None:
    arrays = [ones(), ones(2)]
    opt = fs.SGD((x for x in arrays), lr=0.5)
    opt.step([ones(), ones(2)])
    opt.step([ones(), ones(2)])
    assert arrays[1][0] == 0.0


def test_named_parameters() -> None:
    arrays = {"fc.weight": ones(2, 2), "fc.bias": ones(2)}
    opt = fs.Momentum(iter(arrays.items()), lr=0.5)
    opt.step({"fc.bias": ones(2), "fc.weight": ones(2, 2)})
    assert set(opt.state_dict()["state"]) == {"fc.weight", "fc.bias"}


# --- learning rate ----------------------------------------------------------------------------


def lrs_of(opt: Any, p: Array, steps: int, between: Any = lambda: None) -> list[float]:
    seen = []
    for _ in range(steps):
        p[...] = 0
        opt.step([np.ones(1)])
        seen.append(-float(p[0]))
        between()
    return seen


def test_lr_forms() -> None:
    p = np.zeros(1)
    opt = fs.SGD([p], lr=0.5)
    assert opt.lr == 0.5
    opt.lr = 0.25
    assert lrs_of(opt, p, 2, opt.lr_scheduler.step) == [0.25, 0.25]

    schedule = fs.ExponentialLR(base_lr=0.5, gamma=0.5)
    opt = fs.SGD([p], lr=schedule)
    assert opt.lr_scheduler is schedule
    assert lrs_of(opt, p, 3, opt.lr_scheduler.step) == [0.5, 0.25, 0.125]
    assert opt.lr == 0.0625
    assert lrs_of(opt, p, 2) == [0.0625, 0.0625]

    opt = fs.SGD([p], lr=schedule.at)
    assert lrs_of(opt, p, 3) == [0.5, 0.25, 0.125]

    buffer = np.array(0.5, np.float32)
    opt = fs.SGD([p], lr=buffer)
    assert lrs_of(opt, p, 1) == [0.5]
    buffer[...] = 0.125
    assert opt.lr == 0.125
    assert lrs_of(opt, p, 1) == [0.125]


def test_default_learning_rates() -> None:
    assert [make([ones()]).lr for make in CLASSES] == [1e-3] * 3
    assert fs.Momentum([ones()]).param_groups[0]["momentum"] == 0.9
    assert fs.SGD([ones()]).param_groups[0]["momentum"] == 0.0


def test_bad_learning_rates() -> None:
    p = ones()
    opt = fs.SGD([p], lr=lambda t: 0.5 - t)
    opt.step([ones()])
    with pytest.raises(ValueError, match=r"lr.*got -0\.5"):
        opt.step([ones()])
    with pytest.raises(ValueError, match="lr"):
        opt.lr = math.nan
    opt = fs.SGD([p], lr=lambda t: 0.5 if t == 0 else "fast")
    opt.step([np.zeros(3)])
    with pytest.raises(TypeError, match="lr"):
        opt.step([ones()])
    assert np.all(p == 0.5)


def test_function_of_t_counts_applied_steps_per_group() -> None:
    a, b = np.zeros(1), np.zeros(1)
    opt = fs.SGD([{"params": [a], "lr": lambda t: 2.0**t}, {"params": [b]}], lr=1.0)
    for _ in range(3):
        opt.step([[np.ones(1)], [np.ones(1)]])
    assert (a[0], b[0]) == (-7.0, -3.0)


class Registry:
    """Reads like a dict, but is no Mapping (as torch's ParameterDict)."""

    def __init__(self, **arrays: Array) -> None:
        self.arrays = arrays

    def __getitem__(self, key: str) -> Array:
        return self.arrays[key]

    def __iter__(self) -> Any:
        return iter(self.arrays)

    def keys(self) -> Any:
        return self.arrays.keys()

    def items(self) -> Any:
        return self.arrays.items()


def test_what_reads_like_a_dict_is_one() -> None:
    weights = Registry(w=np.ones(2), b=np.ones(1))
    opt = fs.Momentum(weights, lr=0.5)
    opt.step({"w": np.ones(2), "b": np.ones(1)})
    assert list(opt.state_dict()["state"]) == ["w", "b"]
    assert weights["w"][0] == 0.5


@pytest.mark.framework("torch")
def test_torch_parameter_dict() -> None:
    import torch

    weights = torch.nn.ParameterDict({"w": torch.ones(2), "b": torch.ones(1)})
    opt = fs.Momentum(weights, lr=0.5)
    opt.step({"w": torch.ones(2), "b": torch.ones(1)})
    assert set(opt.state_dict()["state"]) == {"w", "b"}
    assert weights["w"][0] == 0.5


@pytest.mark.parametrize("lr", [np.array(1), 10**400], ids=["int64", "1e400"])
def test_lr_is_named_whatever_is_wrong_with_it(lr: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^lr: "):
        fs.SGD([np.ones(1)], lr=lr)


@pytest.mark.parametrize("key", ["lr", "momentum", "weight_decay", "params"])
def test_deleted_group_keys_are_named(key: str) -> None:
    opt = fs.SGD([np.ones(1)], lr=0.1)
    state = opt.state_dict()
    del opt.param_groups[0][key]
    for call in (lambda: opt.step([np.ones(1)]), lambda: opt.load_state_dict(state)):
        with pytest.raises(ValueError, match=f"'{key}'"):
            call()
    with pytest.raises(ValueError, match=f"'{key}'"):
        opt.state_dict()


def test_info_survives_a_bad_setting() -> None:
    environment = {**os.environ, "FUSEDSTEP_THREADS_RUNTIME": "bogus"}
    command = [sys.executable, "-m", "fusedstep", "info"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "bogus" in done.stdout
    assert "CUDA" in done.stdout


def test_the_stub_is_what_the_generator_writes() -> None:
    assert Path(fs.__file__).with_name("functional.pyi").read_text() == _stubs.stub()


# --- the first two seed pages -----------------------------------------------------------------


@pytest.mark.parametrize("make", [fs.Momentum, fs.MomentumNesterov])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.0001}, {"grad_clip_norm": 1.0}])
def test_braintools_examples(make: Any, options: dict[str, Any]) -> None:
    weights = {"weight": np.full((10, 5), 0.1, np.float32), "bias": np.zeros(5, np.float32)}
    optimizer = make(lr=0.01, momentum=0.9, **options)
    optimizer.register_trainable_weights(weights)
    optimizer.step({"weight": ones(10, 5), "bias": ones(5)})
    assert np.all(weights["weight"] < 0.1)


@pytest.mark.parametrize(
    ("make", "scheduler", "lr_at"),
    [
        (fs.MomentumNesterov, fs.ExponentialLR(base_lr=0.01, gamma=0.95), lambda k: 0.01 * 0.95**k),
        (
            fs.Momentum,
            fs.StepLR(base_lr=0.1, step_size=30, gamma=0.1),
            lambda k: 0.1 * 0.1 ** (k // 30),
        ),
    ],
)
def test_braintools_schedule_examples(make: Any, scheduler: Any, lr_at: Any) -> None:
    weights = {"weight": np.full((10, 5), 0.1), "bias": np.zeros(5)}
    optimizer = make(lr=scheduler, momentum=0.9)
    optimizer.register_trainable_weights(weights)
    group = driver.make_group(
        "momentum", {"nesterov": make is fs.MomentumNesterov}, ("float64",) * 3, (50,)
    )
    group.params[0][...], group.slots[0][0][...] = 0.1, 0
    for epoch in range(100):
        grads = {"weight": np.sin(np.arange(50.0) + epoch).reshape(10, 5), "bias": np.ones(5)}
        optimizer.step(grads)
        group.hyper["lr"], group.first = lr_at(epoch), epoch == 0
        group.grads = [grads["weight"].ravel()]
        reference.step([group])
        scheduler.step()
    assert not mismatch(weights["weight"].ravel(), group.params[0])
