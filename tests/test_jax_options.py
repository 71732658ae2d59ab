"""The hyper-parameters of `fusedstep.jax`: those of the classes; numbers, arrays, functions."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import fusedstep as fs
import numpy as np
import pytest
from jaxruns import KINDS, fj, jax, jnp, on_device, random_arrays, same_bits

pytestmark = pytest.mark.framework("jax")

SHAPES = ((4, 3), (7,), (40,))


def run(tx: Any, steps: int = 3, **more: Any) -> Any:
    """Parameters and state after a few compiled steps."""
    params = on_device(random_arrays(0, shapes=SHAPES))
    state = tx.init(params)
    step = jax.jit(tx.step)
    for k in range(steps):
        params, state = step(on_device(random_arrays(k + 1, shapes=SHAPES)), state, params, **more)
    return params, state


def run_numpy(kind: type[fs.Optimizer], steps: int = 3, **options: Any) -> Any:
    params = random_arrays(0, shapes=SHAPES)
    optimizer = kind(params, **options)
    for k in range(steps):
        optimizer.step(random_arrays(k + 1, shapes=SHAPES))
    return params


# --- declarations -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_signatures_are_those_of_the_classes(name: str) -> None:
    ours = inspect.signature(getattr(fj, name)).parameters
    theirs = dict(inspect.signature(KINDS[name]).parameters)
    del theirs["params"]
    assert {k: p.default for k, p in ours.items()} == {k: p.default for k, p in theirs.items()}


def test_every_class_has_a_transform() -> None:
    kinds = {kind.__name__ for kind in KINDS.values()}
    assert kinds == {kind.__name__ for kind in fs.Optimizer.__subclasses__()}
    assert KINDS.keys() < set(fj.__all__)


def test_the_stub_is_in_sync() -> None:
    from fusedstep.jax import _stubs

    assert Path(fj.__file__).with_name("constructors.pyi").read_text() == _stubs.stub()


def test_the_learning_rate_is_the_first_of_every_rule() -> None:
    """settle.cpp reports it from there."""
    from fusedstep import _core

    for name, rule in _core.rules().items():
        assert rule["hypers"][0] == "lr" or name == "accumulate"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr: expected a number >= 0, got -1.0"),
        ({"momentum": 1.0}, ValueError, "momentum: expected a number in"),
        ({"grad_clip_norm": 0.0}, ValueError, "grad_clip_norm"),
        ({"skip_grad_norm": -1}, ValueError, "skip_grad_norm"),
        ({"on_nonfinite": "raise"}, ValueError, 'on_nonfinite: "raise" needs the host'),
        ({"on_nonfinite": "ignore"}, ValueError, "on_nonfinite: expected"),
        ({"grad_clip_scope": "group"}, ValueError, "grad_clip_scope: a pytree has no param groups"),
        ({"learning_rate": 0.1}, TypeError, "nesterov: .*learning_rate"),
        ({"lr": "0.1"}, TypeError, "lr: expected a number"),
        ({"weight_decay": lambda *_: -1.0}, ValueError, "weight_decay of 0: expected"),
        ({"lr": fs.StepLR(0.1, step_size=3)}, TypeError, "lr: StepLR counts epochs on the host"),
        ({"lr": fs.StepLR}, TypeError, "lr: got the class StepLR"),
        ({"momentum": fs.NesterovMomentum()}, TypeError, "momentum: NesterovMomentum counts"),
        ({"lr": lambda _: "0.1"}, TypeError, "lr: expected a number or an array of one, got"),
        ({"lr": lambda _: -1.0}, ValueError, "lr: expected a number >= 0"),
        ({"lr": lambda _: jnp.ones(2)}, TypeError, r"lr: expected one real number, got an array"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(fj.nesterov(**options))


def test_arrays_are_refused_where_a_constant_is_needed() -> None:
    with pytest.raises(TypeError, match="nesterov: has to be known when a program is compiled"):
        fj.sgd(momentum=0.9, nesterov=jnp.array(True))
    with pytest.raises(TypeError, match="lr: expected one real number, got an array of shape"):
        fj.sgd(lr=jnp.ones(2))
    with pytest.raises(ValueError, match=r"nesterov: needs momentum > 0"):
        fj.sgd(nesterov=True)


# --- numbers that only the device knows -------------------------------------------------------

# float32 numbers, so that an operand and a constant are the same number.
VALUES: dict[str, float] = {
    "lr": 0.125, "momentum": 0.75, "next_momentum": 0.625, "dampening": 0.25,
    "weight_decay": 0.0625, "grad_clip_norm": 1.5, "grad_clip_value": 0.375,
    "rescale_grad": -0.5, "skip_grad_norm": 64.0, "eps": 0.0078125, "alpha": 0.875,
    "momentum_decay": 0.03125,
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_number_may_be_an_array(name: str) -> None:
    """As `optax.inject_hyperparams` makes them; the result is that of the constants."""
    names = set(inspect.signature(getattr(fj, name)).parameters)
    known: dict[str, Any] = {key: value for key, value in VALUES.items() if key in names}
    traced: dict[str, Any] = {key: jnp.float32(value) for key, value in known.items()}
    if "betas" in names:
        known["betas"], traced["betas"] = (0.75, 0.875), (jnp.float32(0.75), jnp.float32(0.875))
    constant, state = run(getattr(fj, name)(**known))
    operand, traced_state = run(getattr(fj, name)(**traced))
    assert same_bits(operand, jax.tree.map(np.asarray, constant))
    assert same_bits(traced_state, jax.tree.map(np.asarray, state))
    assert same_bits(constant, run_numpy(KINDS[name], **known))


def test_hyper_parameters_may_be_arguments_of_a_compiled_function() -> None:
    params, grads = (on_device(random_arrays(k, shapes=SHAPES)) for k in (0, 1))

    @jax.jit
    def once(lr: Any, decay: Any) -> Any:
        tx = fj.adamw(lr=lr, weight_decay=decay)
        return tx.step(grads, tx.init(params), params)[0]

    for lr, decay in ((0.5, 0.25), (0.125, 0.0)):
        expected = fj.adamw(lr=lr, weight_decay=decay)
        after, _ = expected.step(grads, expected.init(params), params)
        assert same_bits(once(lr, decay), jax.tree.map(np.asarray, after))
    assert once._cache_size() == 1


def test_dtypes_of_an_operand() -> None:
    for lr in (jnp.bfloat16(0.25), jnp.float16(0.25), jnp.int32(2), np.float64(0.1), np.array(0.1)):
        params, state = run(fj.sgd(lr=lr))
        exact = float(lr)
        assert same_bits(params, run_numpy(fs.SGD, lr=exact))
        assert float(state.lr) == np.float32(exact)
    params, _ = run(fj.sgd(lr=1.0), lr=0.1)  # jit makes float32 of a Python number
    assert same_bits(params, run_numpy(fs.SGD, lr=float(np.float32(0.1))))
    params = on_device(random_arrays(0, shapes=SHAPES))
    tx = fj.sgd(lr=1.0)
    params, _ = tx.step(on_device(random_arrays(1, shapes=SHAPES)), tx.init(params), params, lr=0.1)
    assert same_bits(params, run_numpy(fs.SGD, lr=0.1, steps=1))


@pytest.mark.parametrize("dtype", ["complex64", "bool", "float8_e4m3fn"])
def test_dtypes_that_no_number_has(dtype: str) -> None:
    lr = jnp.ones((), dtype)
    with pytest.raises(TypeError, match=rf"lr: expected one real number, got .* dtype {dtype}"):
        fj.sgd(lr=lr)
    with pytest.raises(TypeError, match=rf"lr: expected one real number, got .* dtype {dtype}"):
        run(fj.sgd(lr=1.0), lr=lr)
    assert same_bits(run(fj.sgd(lr=1.0), lr=jnp.int8(2))[0], run_numpy(fs.SGD, lr=2.0))


# --- functions of the step --------------------------------------------------------------------


def test_a_schedule_is_called_with_the_steps_before() -> None:
    seen = []

    def schedule(step: Any) -> Any:
        seen.append((step.shape, step.dtype))
        return 0.5 / (1.0 + step)

    params, state = run(fj.nesterov(lr=schedule))
    lrs = [float(np.float32(0.5) / np.float32(1.0 + t)) for t in range(4)]
    assert same_bits(params, run_numpy(fs.MomentumNesterov, lr=lambda t: lrs[t]))
    assert float(state.lr) == lrs[2]
    assert set(seen) == {((), np.dtype(np.int32))}


def test_a_skipped_step_does_not_move_a_schedule() -> None:
    tx = fj.sgd(lr=lambda t: 1.0 / (1.0 + t), on_nonfinite="skip")
    params = {"w": jnp.ones(2)}
    state = tx.init(params)
    assert float(state.lr) == 1
    _, state = tx.step({"w": jnp.array([jnp.nan, 1.0])}, state, params)
    _, state = tx.step({"w": jnp.ones(2)}, state, params)
    assert float(state.lr) == 1
    _, state = tx.step({"w": jnp.ones(2)}, state, params)
    assert float(state.lr) == 0.5


@pytest.mark.parametrize("name", ["momentum", "nesterov", "nadam", "rmsprop"])
def test_a_momentum_schedule_looks_ahead(name: str) -> None:
    mus = [float(np.float32(0.5) + np.float32(0.0625) * t) for t in range(5)]
    ours = lambda t: 0.5 + 0.0625 * t.astype(jnp.float32)  # noqa: E731
    theirs = mus.__getitem__
    if name == "nadam":
        options, numpy_options = {"betas": (ours, 0.875)}, {"betas": (theirs, 0.875)}
    else:
        options, numpy_options = {"momentum": ours}, {"momentum": theirs}
    if name == "rmsprop":
        options["nesterov"] = numpy_options["nesterov"] = True  # type: ignore[assignment]
    params, _ = run(getattr(fj, name)(**options), steps=4)
    assert same_bits(params, run_numpy(KINDS[name], steps=4, **numpy_options))


def test_a_momentum_that_starts_at_zero_has_its_buffer() -> None:
    tx = fj.sgd(lr=0.1, momentum=lambda t: 0.25 * t)
    assert tx.slots == ("velocity",)
    params, _ = run(tx)
    assert same_bits(params, run_numpy(fs.SGD, lr=0.1, momentum=lambda t: 0.25 * t))


def test_weight_decay_may_be_a_function_of_path_and_array() -> None:
    seen: dict[str, tuple[int, ...]] = {}

    def decay(path: str, array: Any) -> float:
        seen[path] = array.shape
        return 0.0 if array.ndim == 1 else 0.25

    arrays, grads = random_arrays(0, shapes=SHAPES), random_arrays(1, shapes=SHAPES)
    make = lambda a: {"layers": [{"W": a[0], "b": a[1]}], "out": a[2]}  # noqa: E731
    tx = fj.nesterov(lr=0.1, weight_decay=decay)
    params = on_device(make(arrays))
    params, _ = jax.jit(tx.step)(on_device(make(grads)), tx.init(params), params)
    assert seen == {"layers.0.W": (4, 3), "layers.0.b": (7,), "out": (40,)}
    fs.MomentumNesterov(make(arrays), lr=0.1, weight_decay=decay).step(make(grads))
    assert same_bits(params, make(arrays))


# --- messages about trees ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "grads", "error", "message"),
    [
        ({"w": [1.0]}, {"w": [1.0]}, TypeError, r"params\['w'\]\[0\]: expected an array of"),
        ({"w": np.ones(2, np.int32)}, None, TypeError, r"params\['w'\].*got dtype int32"),
        ({"w": np.ones(2, np.complex64)}, None, TypeError, r"params\['w'\].*complex64"),
        ({"w": np.ones(2, np.float32)}, {"v": 1}, ValueError, "grads: not the tree of params"),
        (
            {"w": np.ones(2, np.float32)}, {"w": np.ones(3, np.float32)},
            ValueError, r"grads\['w'\]: expected shape \(2,\) like params\['w'\], got \(3,\)",
        ),
        (
            {"w": np.ones(2, np.float32)}, {"w": np.ones(2, np.int32)},
            TypeError, r"grads\['w'\]: expected an array of a floating-point dtype, got",
        ),
        ({"w": np.ones(2, np.float32)}, {"w": 1.0}, TypeError, r"grads\['w'\].*got 1.0"),
        ({"w": np.ones(2, np.float32)}, {"w": ()}, TypeError, r"grads.*an object of type tuple"),
        ({"w": np.ones(2, np.float32)}, {"w": []}, TypeError, r"grads.*an object of type list"),
        ({"w": np.ones(2, np.float32)}, {"w": {}}, TypeError, r"grads.*an object of type dict"),
    ],
)  # fmt: skip
def test_messages_have_the_path(
    params: Any, grads: Any, error: type[Exception], message: str
) -> None:
    tx = fj.momentum(lr=0.1)
    with pytest.raises(error, match=message):
        tx.step(grads, tx.init(params), params)


def test_states_of_another_transform_are_refused() -> None:
    params = {"w": jnp.ones(2)}
    state = fj.momentum().init(params)
    with pytest.raises(ValueError, match="state: has no buffers 'exp_avg'"):
        fj.adam().step(params, state, params)
    with pytest.raises(ValueError, match="state: has other running products"):
        fj.nadam().step(params, fj.adam().init(params), params)
    sgd_state = fj.sgd().init(params)
    with pytest.raises(ValueError, match="state: it counts the steps of 1 arrays, params has 2"):
        fj.sgd().step([params, params], sgd_state, [params, params])
    with pytest.raises(TypeError, match="state: expected what init returned, got dict"):
        fj.adam().step(params, {}, params)
    with pytest.raises(ValueError, match=r"state.velocity: not the tree of params"):
        fj.momentum().step({"v": params["w"]}, state, {"v": params["w"]})
    with pytest.raises(ValueError, match=r"state.velocity\['w'\]: expected an array of shape"):
        fj.momentum().step({"w": jnp.ones(3)}, state, {"w": jnp.ones(3)})
    wide = {"w": jnp.ones(2, jnp.bfloat16)}
    half = jax.tree.map(lambda v: v.astype(jnp.float16), state.buffers)
    with pytest.raises(TypeError, match="a state of dtype float16 does not go with parameters of"):
        fj.momentum().step(wide, type(state)(**{**vars(state), "buffers": half}), wide)


def test_a_norm_for_all_does_not_go_with_clipping_each() -> None:
    tx = fj.momentum(grad_clip_norm=1.0, grad_clip_scope="array")
    params = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="grad_norm: one norm for all"):
        tx.step(params, tx.init(params), params, grad_norm=1.0)
