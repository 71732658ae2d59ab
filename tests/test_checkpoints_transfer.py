"""`set_state`: state of other runs and libraries comes in, all of it or none."""

from __future__ import annotations

import copy
from typing import Any

import fusedstep as fs
import numpy as np
import pytest
from exact import BFLOAT16, Array
from resuming import CASES, gradients, leaves, make, mapped, same, snapshot, train, tree


def nested() -> dict[str, Any]:
    return {
        "a": [np.ones(2, np.float32), np.ones((2, 3), np.float32)],
        "b": np.ones((), np.float32),
    }


def like(node: Any, value: float, dtype: Any = np.float32) -> Any:
    return mapped(lambda x: np.full(x.shape, value, dtype), node)


def state_of(opt: Any, name: str) -> list[Array]:
    return [entry[name] for entry in opt.state_dict()["state"].values()]


# --- what comes in ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_from_its_buffers(case: str) -> None:
    """The buffers and counts of one optimizer, given to another, go on with the same bits."""
    first, params = make(case, tree(0)), tree(0)
    grads = [{**gradients(k), "head": tree(200 + k)["head"]} for k in range(1, 9)]
    for each in grads[:4]:
        first.step(each)
    old = first.param_groups[0]["params"]
    for x, y in zip(leaves(params), leaves(old), strict=True):
        x[...] = y
    second = make(case, params)
    entries = first.state_dict()["state"]
    names = [name for name in next(iter(entries.values())) if name in first.declaration.slots]
    trees = {}
    for name in names:
        buffers = iter([entry[name] for entry in entries.values()])
        trees[name] = mapped(lambda _, buffers=buffers: next(buffers), params)
    numbers = {k: v for k, v in next(iter(entries.values())).items() if k not in names}
    second.set_state(**trees, **numbers)
    for each in grads[4:]:
        first.step(each)
        second.step(each)
    assert same(params, old)


def test_buffers_are_copied_and_the_others_stay() -> None:
    params = nested()
    opt = fs.Adam(params)
    opt.step(like(params, 0.5))
    before = copy.deepcopy(opt.state_dict()["state"])
    given = like(params, 3.0)
    opt.set_state(exp_avg=given)
    given["b"][...] = 9.0
    assert [np.unique(x).tolist() for x in state_of(opt, "exp_avg")] == [[3.0]] * 3
    for key, entry in opt.state_dict()["state"].items():
        assert entry["exp_avg_sq"].tobytes() == before[key]["exp_avg_sq"].tobytes()
        assert entry["step"] == 1


def test_none_leaves_an_array_or_a_branch_alone() -> None:
    params = nested()
    opt = fs.Momentum(params, lr=0.5)
    opt.step(like(params, 1.0))
    opt.set_state(velocity={"a": None, "b": np.full((), 2.0, np.float32)})
    assert [np.unique(x).tolist() for x in state_of(opt, "velocity")] == [[1.0], [1.0], [2.0]]
    opt.set_state(velocity={"a": [np.full(2, 3.0, np.float32), None], "b": None})
    assert [np.unique(x).tolist() for x in state_of(opt, "velocity")] == [[3.0], [1.0], [2.0]]
    opt.set_state(velocity=None)
    opt.set_state()
    assert [np.unique(x).tolist() for x in state_of(opt, "velocity")] == [[3.0], [1.0], [2.0]]
    assert opt.steps == 1


def test_groups_have_a_tree_each() -> None:
    arrays = [np.ones(2), np.ones(3)]
    opt = fs.Momentum([{"params": [arrays[0]]}, {"params": {"w": arrays[1]}}], lr=0.5)
    opt.set_state(velocity=[[np.full(2, 2.0)], {"w": np.full(3, 3.0)}], step=4)
    assert [x[0] for x in state_of(opt, "velocity")] == [2.0, 3.0]
    opt.set_state(velocity=[None, {"w": np.full(3, 5.0)}])
    assert [x[0] for x in state_of(opt, "velocity")] == [2.0, 5.0]
    with pytest.raises(ValueError, match=r"velocity: expected a list of 2 trees"):
        opt.set_state(velocity=[[np.ones(2)]])
    with pytest.raises(ValueError, match=r"velocity\[1\]\['w'\]: expected shape \(3,\), got"):
        opt.set_state(velocity=[None, {"w": np.ones(2)}])


def test_one_array_is_a_tree() -> None:
    opt = fs.Momentum(np.ones(3), lr=0.5)
    opt.set_state(velocity=np.full(3, 2.0))
    assert state_of(opt, "velocity")[0].tolist() == [2.0] * 3
    with pytest.raises(ValueError, match=r"^velocity: expected shape \(3,\), got \(4,\)"):
        opt.set_state(velocity=np.ones(4))


def test_a_missing_buffer_starts_at_zero() -> None:
    params, whole = [np.ones(3)], [np.ones(3)]
    opt, other = fs.Adam(params), fs.Adam(whole)
    opt.set_state(exp_avg=[np.full(3, 2.0)], step=3)
    other.set_state(exp_avg=[np.full(3, 2.0)], exp_avg_sq=[np.zeros(3)], step=3)
    for each in (opt, other):
        each.step([np.full(3, 0.5)])
    assert same(params, whole)
    assert state_of(opt, "exp_avg_sq")[0][0] > 0


def test_the_count_is_that_of_the_optimizer_too() -> None:
    """A function of t goes on, as it does after loading."""
    p = np.zeros(1)
    opt = fs.Momentum([p], lr=lambda t: float(t))
    opt.set_state(step=7)
    assert opt.steps == 7
    opt.step([np.ones(1)])
    assert p[0] == -7.0
    assert opt.state_dict()["state"][0]["step"] == 8


# --- dtypes -----------------------------------------------------------------------------------


STORED = {
    ("float32", "float64"): "float32",
    ("float32", "float32"): "float32",
    ("float32", "float16"): "float16",
    ("float32", "bfloat16"): "bfloat16",
    ("float64", "float64"): "float64",
    ("float64", "float32"): "float64",
    ("float64", "bfloat16"): "float64",
    ("float16", "float16"): "float16",
    ("float16", "float32"): "float32",
    ("float16", "float64"): "float32",
    ("bfloat16", "float16"): "float32",
    ("bfloat16", "bfloat16"): "bfloat16",
}


def dtype_of(name: str) -> Any:
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


@pytest.mark.parametrize(("param", "given"), STORED, ids=str)
@pytest.mark.parametrize("shape", [(3,), (), (0,)], ids=str)
def test_what_a_state_cannot_have_is_rounded(
    param: str, given: str, shape: tuple[int, ...]
) -> None:
    """Once, to nearest; what it can have stays."""
    opt = fs.Momentum([np.ones(shape, dtype_of(param))], lr=0.5)
    value = np.full(shape, 1 / 3).astype(dtype_of(given))
    opt.set_state(velocity=[value])
    (found,) = state_of(opt, "velocity")
    kept = STORED[param, given]
    assert found.dtype == dtype_of(kept)
    assert found.shape == shape
    assert found.tobytes() == value.astype(dtype_of(kept)).tobytes()
    opt.step([np.ones(shape, dtype_of(param))])


def test_a_number_that_does_not_fit_is_refused() -> None:
    opt = fs.Momentum({"w": np.ones(2, np.float32)}, lr=0.5)
    with pytest.raises(ValueError, match=r"velocity\['w'\]: .*too large for float32"):
        opt.set_state(velocity={"w": np.array([1.0, 1e300])})
    with np.errstate(all="raise"):
        opt.set_state(velocity={"w": np.array([1e-300, np.inf])})
    assert state_of(opt, "velocity")[0].tolist() == [0.0, np.inf]


def test_strides_are_those_of_the_parameter() -> None:
    param = np.asfortranarray(np.ones((2, 3)))
    opt = fs.Momentum([param], lr=0.5)
    opt.set_state(velocity=[np.arange(6.0).reshape(2, 3)])
    (found,) = state_of(opt, "velocity")
    assert found.strides == param.strides
    assert found.tolist() == [[0, 1, 2], [3, 4, 5]]


# --- numbers ----------------------------------------------------------------------------------


STEPS = [
    3,
    3.0,
    np.int32(3),
    np.float32(3),
    np.array(3),
    np.array(3.0, np.float32),
    np.array([3.0]),
]


@pytest.mark.parametrize("step", STEPS, ids=repr)
def test_steps_are_whole_numbers_or_arrays_with_one(step: Any) -> None:
    opt = fs.NAdam([np.ones(2)])
    opt.set_state(step=step, mu_product=np.array(0.5, np.float32))
    assert opt.state_dict()["state"] == {0: {"step": 3, "mu_product": 0.5}}
    assert type(opt.steps) is int


@pytest.mark.framework("torch")
def test_tensors_are_numbers_too() -> None:
    import torch

    opt = fs.NAdam([np.ones(2)])
    opt.set_state(step=torch.tensor(3.0), mu_product=torch.tensor(0.5, requires_grad=True))
    assert opt.state_dict()["state"] == {0: {"step": 3, "mu_product": 0.5}}
    opt.set_state(step=torch.tensor(4))
    assert opt.steps == 4


# --- what is refused ----------------------------------------------------------------------------

ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"velocity": [np.ones(2)]}, TypeError, r"^velocity: no state of NAdam; it has exp_avg, exp_"),
    ({"lr": 0.5}, TypeError, r"^lr: no state of NAdam"),
    ({"step": -1}, ValueError, r"^step: expected an integer in \[0, 2\*\*62\), got -1"),
    ({"step": 2**62}, ValueError, r"^step: "),
    ({"step": 2.5}, TypeError, r"^step: expected an integer .* got 2\.5"),
    ({"step": float("nan")}, TypeError, r"^step: .*nan"),
    ({"step": float("inf")}, TypeError, r"^step: .*inf"),
    ({"step": "3"}, TypeError, r"^step: .*'3'"),
    ({"step": True}, TypeError, r"^step: .*True"),
    ({"step": np.ones(2)}, (TypeError, ValueError), r"^step: "),
    ({"step": np.array(2.5)}, TypeError, r"^step: .*2\.5"),
    ({"step": np.array(True)}, TypeError, r"^step: "),
    ({"mu_product": 1.5}, ValueError, r"^mu_product: expected a number in \[0, 1\], got 1\.5"),
    ({"mu_product": -0.25}, ValueError, r"^mu_product: .*-0\.25"),
    ({"mu_product": np.array(np.nan)}, ValueError, r"^mu_product: .*nan"),
    ({"mu_product": "half"}, TypeError, r"^mu_product: .*'half'"),
    ({"exp_avg": {"a": [1.0, None], "b": None}}, TypeError, r"^exp_avg\['a\.0'\]: .*array"),
    ({"exp_avg": {"a": None, "b": np.ones(1)}}, ValueError, r"^exp_avg\['b'\]: expected shape"),
    ({"exp_avg": {"a": [None, np.ones(6)], "b": None}}, ValueError, r"^exp_avg\['a\.1'\]: .*\(2"),
    ({"exp_avg": {"a": None}}, ValueError, r"^exp_avg\['b'\]: missing; None"),
    ({"exp_avg": {"a": [None], "b": None}}, ValueError, r"^exp_avg\['a\.1'\]: missing"),
    ({"exp_avg": {"a": None, "b": None, "c": None}}, ValueError, r"^exp_avg\['c'\]: .*no such"),
    ({"exp_avg": {"a": None, "b": None, "c": np.ones(1)}}, ValueError, r"^exp_avg\['c'\]: .*no"),
    ({"exp_avg": [None, None]}, ValueError, r"^exp_avg\['0'\]: .*no such array"),
    ({"exp_avg": np.ones(2)}, ValueError, r"^exp_avg: .*no such array"),
    ({"exp_avg": {"a": [np.ones(2, int), None], "b": None}}, TypeError, r"^exp_avg\['a\.0.*int64"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "kind", "message"), ERRORS, ids=lambda x: str(x)[:40])
def test_what_is_refused_has_changed_nothing(wrong: Any, kind: Any, message: str) -> None:
    params = nested()
    opt = fs.NAdam(params)
    opt.step(like(params, 0.5))
    before = snapshot(opt, params)
    right = {"exp_avg_sq": like(params, 2.0), "step": 5, "mu_product": 0.25}
    with pytest.raises(kind, match=message):
        opt.set_state(**{**right, **wrong})
    assert snapshot(opt, params) == before
    opt.set_state(**right)
    assert snapshot(opt, params) != before


def test_momentum_has_no_product() -> None:
    opt = fs.Momentum([np.ones(2)], lr=0.5)
    with pytest.raises(TypeError, match=r"mu_product: no state of Momentum; it has velocity, step"):
        opt.set_state(mu_product=0.5)


def test_an_optimizer_without_parameters_has_no_state() -> None:
    with pytest.raises(ValueError, match="no parameters are registered"):
        fs.Momentum(lr=0.5).set_state(step=3)


def test_a_decay_function_that_fails_has_changed_nothing() -> None:
    calls: list[str] = []

    def decay(path: str, _: Any) -> float:
        calls.append(path)
        if len(calls) > 1:
            raise KeyError(path)
        return 0.5

    opt = fs.Momentum({"w": np.ones(2)}, lr=0.5, weight_decay=decay)
    with pytest.raises(KeyError):
        opt.set_state(velocity={"w": np.ones(2)}, step=3)
    assert opt.steps == 0
    assert opt._plan.get_state(0) == {}


# --- torch ------------------------------------------------------------------------------------

RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "nadam": ("NAdam", {"lr": 0.01, "weight_decay": 0.1, "momentum_decay": 0.01}, {}),
    "nadam_decoupled": ("NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}, {}),
    "adam": ("Adam", {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1}, {}),
    "amsgrad": ("Adam", {"lr": 0.01, "amsgrad": True}, {}),
    "adamw": ("AdamW", {"lr": 0.01, "weight_decay": 0.1}, {}),
    "adamw_amsgrad": ("AdamW", {"lr": 0.01, "amsgrad": True, "eps": 1e-3}, {}),
    "rmsprop": ("RMSprop", {"lr": 0.01, "alpha": 0.9, "weight_decay": 0.1}, {}),
    "rmsprop_centered": ("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True}, {}),
    "sgd": ("SGD", {"lr": 0.01, "momentum": 0.9}, {"momentum_buffer": "velocity"}),
}


@pytest.mark.framework("torch")
@pytest.mark.parametrize("numpy", [False, True], ids=["tensors", "numpy"])
@pytest.mark.parametrize("run", RUNS)
def test_a_run_of_torch_goes_on(run: str, numpy: bool) -> None:
    """With its state as it is: buffers by its names, `step` and `mu_product` as tensors."""
    import torch

    name, options, renamed = RUNS[run]
    generator = torch.Generator().manual_seed(3)

    def random() -> list[Any]:
        made = [(3,), (4, 5), ()]
        return [torch.randn(s, dtype=torch.float64, generator=generator) for s in made]

    weights = random()
    theirs = getattr(torch.optim, name)(weights, **options)
    for _ in range(20):
        for weight, grad in zip(weights, random(), strict=True):
            weight.grad = grad
        theirs.step()

    own = [w.clone().numpy() if numpy else w.clone() for w in weights]
    ours = getattr(fs, name)(own, **options)
    saved = [theirs.state[w] for w in weights]
    trees = {
        renamed.get(key, key): [entry[key] for entry in saved]
        for key in saved[0]
        if key not in {"step", "mu_product"} and saved[0][key] is not None
    }
    numbers = {key: saved[0][key] for key in ("step", "mu_product") if key in saved[0]}
    if run.startswith("rmsprop"):
        assert "step" in numbers
    if run.startswith("nadam"):
        assert isinstance(numbers["mu_product"], torch.Tensor)
    ours.set_state(**trees, **numbers)
    for _ in range(20):
        grads = random()
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad
        theirs.step()
        ours.step(grads)
    for mine, its in zip(own, weights, strict=True):
        np.testing.assert_allclose(np.asarray(mine), its.numpy(), rtol=0, atol=1e-9)


def test_training_goes_on_after_a_refusal() -> None:
    params, straight = tree(0), tree(0)
    opt, other = make("nadam", params), make("nadam", straight)
    train(opt, range(3))
    with pytest.raises(ValueError, match="mu_product"):
        opt.set_state(mu_product=2.0)
    train(opt, range(3, 6))
    train(other, range(6))
    assert same(params, straight)
