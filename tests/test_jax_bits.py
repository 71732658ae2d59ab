"""`fusedstep.jax` gives the bits of the NumPy path: every rule, form, dtype and chunking."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fusedstep as fs
import numpy as np
import pytest
from jaxruns import KINDS, compare, fj, jax, jnp, on_device, random_arrays, same_bits

pytestmark = pytest.mark.framework("jax")

if fj is not None:
    from fusedstep.jax import calls

# Every slot, flag and hyper-parameter of every class is used by one of these.
FORMS: list[tuple[str, dict[str, Any]]] = [
    ("sgd", {"lr": 0.1}),
    ("sgd", {"lr": 0.1, "weight_decay": 0.01, "maximize": True}),
    ("sgd", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("momentum", {"lr": 0.1, "dampening": 0.25, "lr_in_velocity": True}),
    ("momentum", {"lr": 0.1, "dampening": 0.9, "dampen_first_step": True}),
    ("nesterov", {"lr": 0.1, "next_momentum": 0.95, "grad_clip_norm": 2.0}),
    ("nesterov", {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("nadam", {"lr": 0.01, "momentum_decay": 0.1, "weight_decay": 0.01}),
    ("nadam", {"lr": 0.01, "betas": (0.3, 0.7), "decoupled_weight_decay": True}),
    ("adam", {"lr": 0.01, "weight_decay": 0.1, "grad_clip_norm": 1.0}),
    ("adam", {"lr": 0.01, "amsgrad": True, "eps": 1e-3}),
    ("adamw", {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    ("rmsprop", {"lr": 0.01}),
    ("rmsprop", {"lr": 0.01, "centered": True, "weight_decay": 0.1}),
    ("rmsprop", {"lr": 0.01, "momentum": 0.5, "nesterov": True, "alpha": 0.75}),
    ("rmsprop", {"lr": 0.01, "centered": True, "momentum": 0.5, "next_momentum": 0.6}),
]
CONDITIONS: list[dict[str, Any]] = [
    {"grad_clip_norm": 1.5, "rescale_grad": -0.3},
    {"grad_clip_norm": math.inf},
    {"grad_clip_norm": 1e6, "grad_clip_value": 0.5},
    {"grad_clip_value": 0.25, "maximize": True},
    {"grad_clip_norm": 2.0, "grad_clip_scope": "array", "rescale_grad": 0.7},
    {"on_nonfinite": "skip", "grad_clip_norm": 1.0},
    {"on_nonfinite": "skip", "grad_clip_scope": "array"},
    {"skip_grad_norm": 100.0},  # the gradients are larger
    {"skip_grad_norm": 1e6},
]


def named(options: dict[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in options.items() if key != "lr")


@pytest.mark.parametrize(("name", "options"), FORMS, ids=[f"{n}:{named(o)}" for n, o in FORMS])
def test_every_form(name: str, options: dict[str, Any]) -> None:
    compare(name, options)


@pytest.mark.parametrize("options", CONDITIONS, ids=map(named, CONDITIONS))
@pytest.mark.parametrize("name", ["nesterov", "nadam"])
def test_conditions_of_the_gradient(name: str, options: dict[str, Any]) -> None:
    compare(name, {"lr": 0.1, "weight_decay": 0.01, **options})


@pytest.mark.parametrize("scale", [1e-6, 1e-30, 1e15])
def test_norms_of_every_size(scale: float) -> None:
    compare("momentum", {"lr": 0.1, "grad_clip_norm": 1.0}, scale=scale)


def test_a_denormal_learning_rate_is_an_operand_like_others() -> None:
    params, grads = random_arrays(0), [g * np.float32(1e37) for g in random_arrays(1)]
    lr = np.float32(1e-40)
    ours = on_device(params)
    tx = fj.sgd(lr=1.0)
    ours, state = jax.jit(tx.step)(on_device(grads), tx.init(ours), ours, lr=lr)
    fs.SGD(params, lr=float(lr)).step(grads)
    assert same_bits(ours, params)
    assert np.asarray(state.lr) == lr


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_parameters(name: str, dtype: str) -> None:
    compare(name, {"lr": 0.1, "weight_decay": 0.01, "grad_clip_norm": 3.0}, dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [
        *(("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32")),
        *(("bfloat16", "float16"), ("float16", "bfloat16")),
    ],
)
def test_gradients_of_another_dtype(dtype: str, grad_dtype: str) -> None:
    options = {"lr": 0.1, "grad_clip_norm": 1.0}
    compare("nesterov", options, dtype=dtype, grad_dtype=grad_dtype)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.usefixtures("x64")
def test_float64_under_x64(name: str) -> None:
    state = compare(name, {"lr": 0.1, "grad_clip_norm": 1.0}, dtype="float64")
    assert state.grad_norm.dtype == np.float64


@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [("float64", "float32"), ("float32", "float64"), ("bfloat16", "float64")],
)
@pytest.mark.usefixtures("x64")
def test_mixed_float64_under_x64(dtype: str, grad_dtype: str) -> None:
    options = {"lr": 0.1, "grad_clip_norm": 1.0}
    compare("nesterov", options, dtype=dtype, grad_dtype=grad_dtype)


@pytest.mark.parametrize("scale", [1e-170, 1e170])
@pytest.mark.parametrize("scope", ["all", "array"])
@pytest.mark.usefixtures("x64")
def test_norms_whose_squares_leave_float64(scale: float, scope: str) -> None:
    options = {"lr": 0.1, "grad_clip_norm": 1.0, "grad_clip_scope": scope}
    state = compare("nesterov", options, dtype="float64", scale=scale)
    assert 0 < float(state.grad_norm) < math.inf


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
def test_any_chunking(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "CHUNK", chunk)
    for scope in ("all", "array"):
        options = {"lr": 0.1, "grad_clip_norm": 1.0, "grad_clip_scope": scope}
        compare("nadam", options, steps=2)


def test_many_parameters_in_many_calls() -> None:
    """More than two chunks of the default size; sizes differ from leaf to leaf."""
    shapes = tuple((k % 7 + 1,) for k in range(2 * calls.CHUNK + 5))
    compare("adam", {"lr": 0.1, "grad_clip_norm": 1.0}, shapes=shapes)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.usefixtures("threads")
def test_any_number_of_threads(count: int) -> None:
    fs.set_num_threads(count)
    shapes = ((300_001,), (5,), (70_000,))
    compare("nesterov", {"lr": 0.1, "grad_clip_norm": 1.0}, shapes=shapes, steps=2)


def test_more_calls_at_once_than_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA runs independent calls at the same time, and each of them asks for its threads."""
    monkeypatch.setattr(calls, "CHUNK", 1)
    compare("nesterov", {"lr": 0.1, "grad_clip_norm": 1.0}, shapes=((200_000,),) * 12)


def test_steps_in_several_threads_of_python() -> None:
    shapes = ((200_000,), (300,))
    expected = random_arrays(0, shapes=shapes)
    optimizer = fs.Adam(expected, lr=0.1, grad_clip_norm=1.0)
    for k in range(5):
        optimizer.step(random_arrays(k + 1, shapes=shapes))
    tx = fj.adam(lr=0.1, grad_clip_norm=1.0)
    step = jax.jit(tx.step, donate_argnums=(1, 2))

    def train(_: int) -> bool:
        params = on_device(random_arrays(0, shapes=shapes))
        state = tx.init(params)
        for k in range(5):
            params, state = step(on_device(random_arrays(k + 1, shapes=shapes)), state, params)
        return same_bits(params, expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(train, range(8)))


@pytest.mark.usefixtures("isa")
def test_every_instruction_set() -> None:
    compare("nadam", {"lr": 0.1, "grad_clip_norm": 1.0}, steps=2)


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adam"])
def test_denormals_are_kept_although_xla_flushes_them(name: str) -> None:
    """Parameters, gradients and velocities below the normal numbers, on one thread and on more."""
    tiny = np.float32(1e-40)
    shapes = ((3,), (40_000,), (200_000,))
    params = [p * tiny for p in random_arrays(0, shapes=shapes)]
    optimizer = KINDS[name](params, lr=0.5, weight_decay=0.1)
    tx = getattr(fj, name)(lr=0.5, weight_decay=0.1)
    ours = on_device(params)
    assert same_bits(ours, params)
    assert not np.any(jax.jit(lambda x: x * 0.5)(ours[0]))  # XLA's own code flushes them
    state = tx.init(ours)
    for seed in (1, 2):
        grads = [g * tiny for g in random_arrays(seed, shapes=shapes)]
        optimizer.step(grads)
        ours, state = jax.jit(tx.step)(on_device(grads), state, ours)
        assert same_bits(ours, params)
    kept = [*params, *map(np.asarray, jax.tree.leaves(state.buffers))]
    assert any(np.any((np.abs(x) < 1.2e-38) & (x != 0)) for x in kept)


@pytest.mark.usefixtures("x64")
def test_a_denormal_norm_survives() -> None:
    """The norm, the clip coefficient and a traced learning rate are float64 outside the kernels."""
    params = [np.ones(3)]
    grads = [np.full(3, 5e-324)]
    optimizer = fs.Momentum(params, lr=1e-310, grad_clip_norm=1e-323)
    result = optimizer.step(grads)
    tx = fj.momentum(lr=0.1, grad_clip_norm=1e-323)
    ours = on_device([np.ones(3)])
    ours, state = jax.jit(tx.step)(on_device(grads), tx.init(ours), ours, lr=jnp.float64(1e-310))
    assert result.grad_norm == float(np.asarray(state.grad_norm)) == 1e-323
    assert float(np.asarray(state.lr)) == 1e-310
    assert same_bits(state.velocity, optimizer.state_dict()["state"][0]["velocity"][None])


def test_hyper_parameters_arrive_as_exact_float64() -> None:
    """0.1 and 0.9 are no float32; beta2 close to 1 shows it, and so do many steps of a product."""
    compare("nadam", {"lr": 0.1, "betas": (0.9, 0.999999)}, steps=40, shapes=((33,),))


def test_leaves_that_join_later_count_their_own_steps() -> None:
    """A None gradient leaves its parameter, buffers and step count alone."""
    shapes = ((5,), (40,), (7,))
    params = random_arrays(0, shapes=shapes)
    optimizer = fs.NAdam(params, lr=0.1, grad_clip_norm=1.0)
    tx = fj.nadam(lr=0.1, grad_clip_norm=1.0)
    ours = on_device(params)
    state = tx.init(ours)
    for seed, missing in enumerate([(0, 2), (2,), (1,), (), (0, 1, 2)]):
        grads: list[Any] = random_arrays(seed + 1, shapes=shapes)
        for index in missing:
            grads[index] = None
        optimizer.step(grads)
        ours, state = jax.jit(tx.step)(on_device(grads), state, ours)
        assert same_bits(ours, params)
    assert state.leaf_steps.tolist() == [3, 3, 2]
    assert int(state.step) == 5


@pytest.mark.parametrize("norm", [0.3, 1e4 / 3, math.inf, math.nan])
@pytest.mark.parametrize("policy", ["propagate", "skip"])
def test_a_given_norm(norm: float, policy: str) -> None:
    options = {"lr": 0.1, "grad_clip_norm": 1.0, "rescale_grad": 0.5, "on_nonfinite": policy}
    params, grads = random_arrays(0), random_arrays(1)
    ours = on_device(params)
    result = fs.Momentum(params, **options).step(grads, grad_norm=norm)
    tx = fj.momentum(**options)
    ours, state = tx.step(on_device(grads), tx.init(ours), ours, grad_norm=norm)
    assert bool(state.skipped) == result.skipped
    np.testing.assert_array_equal(np.asarray(state.grad_norm), np.float32(result.grad_norm))
    if np.isfinite(norm):
        assert same_bits(ours, params)
    else:
        np.testing.assert_array_equal(np.asarray(ours[1]), params[1])


def test_a_given_norm_does_not_hide_a_bad_gradient() -> None:
    tx = fj.momentum(lr=0.1, grad_clip_norm=1.0, on_nonfinite="skip")
    params = {"w": jnp.ones(3)}
    grads = {"w": jnp.array([1.0, jnp.inf, 1.0])}
    after, state = tx.step(grads, tx.init(params), params, grad_norm=1.0)
    assert bool(state.skipped)
    assert after["w"].tolist() == [1, 1, 1]
