"""`tx.optax()` among optax's own transformations and in flax: parity, chains, wrappers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from jaxruns import KINDS, fj, jax, jnp, on_device, random_arrays, same_bits

try:
    import optax
except ImportError:  # the marker leaves the tests out, by name
    optax = None

pytestmark = pytest.mark.framework("jax")

SHAPES = ((4, 3), (7,), (40,))
STEPS = 6


def run(transformation: Any, steps: int = STEPS, start: int = 0, **extra: Any) -> Any:
    """Parameters after a few steps in optax's manner."""
    params = make(start)
    state = transformation.init(params)

    @jax.jit
    def step(grads: Any, state: Any, params: Any) -> Any:
        updates, state = transformation.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    for k in range(steps):
        params, state = step(make(k + 1), state, params)
    return params, state


def make(seed: int) -> dict[str, Any]:
    return on_device(dict(zip("abc", random_arrays(seed, shapes=SHAPES), strict=True)))


def run_natively(tx: Any, steps: int = STEPS) -> Any:
    params = make(0)
    state = tx.init(params)
    for k in range(steps):
        params, state = tx.step(make(k + 1), state, params)
    return params, state


def close(a: Any, b: Any, atol: float) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=0, atol=atol)


# --- the updates ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_applied_updates_are_the_native_step(name: str) -> None:
    """To the bit where `new - old` is exact; elsewhere to a rounding of a parameter."""
    tx = getattr(fj, name)(lr=0.01, grad_clip_norm=1.0)
    native, native_state = run_natively(tx)
    ours, state = run(tx.optax())
    close(ours, native, atol=STEPS * 4e-7)
    assert int(state.step) == int(native_state.step) == STEPS


def test_small_updates_are_exact() -> None:
    params = jax.tree.map(lambda p: jnp.sign(p) + p / 8, make(0))  # away from zero
    tx = fj.nesterov(lr=1e-3, grad_clip_norm=1.0, weight_decay=1e-4)
    native, _ = tx.step(make(1), tx.init(params), params)
    transformation = tx.optax()
    updates, _ = transformation.update(make(1), transformation.init(params), params)
    assert same_bits(optax.apply_updates(params, updates), jax.tree.map(np.asarray, native))


def test_16_bit_parameters() -> None:
    params = jax.tree.map(lambda p: (jnp.sign(p) + p / 8).astype(jnp.bfloat16), make(0))
    tx = fj.adamw(lr=1e-2)
    native, _ = tx.step(make(1), tx.init(params), params)
    transformation = tx.optax()
    updates, _ = transformation.update(make(1), transformation.init(params), params)
    assert same_bits(optax.apply_updates(params, updates), jax.tree.map(np.asarray, native))


# --- parity -----------------------------------------------------------------------------------
# optax computes in float32 in another order, so results differ by roundings of the parameters. Its
# 1 - 0.999^t, too, is a float32 difference: wrong by 6e-5 at t = 1, half of that after the root, of
# a step of 0.1.
ADAPTIVE = 1e-5


def clipped(*then: Any) -> Any:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.add_decayed_weights(1e-2), *then)


def pairs() -> dict[str, Any]:
    decay = {"grad_clip_norm": 1.0, "weight_decay": 1e-2}
    return {
        "sgd": (fj.sgd(lr=0.1, **decay), clipped(optax.sgd(0.1))),
        "momentum": (fj.momentum(lr=0.1, **decay), clipped(optax.sgd(0.1, momentum=0.9))),
        "nesterov": (
            fj.nesterov(lr=0.1, **decay),
            clipped(optax.sgd(0.1, momentum=0.9, nesterov=True)),
        ),
        "adam": (fj.adam(lr=0.1, **decay), clipped(optax.adam(0.1))),
        "adamw": (fj.adamw(lr=0.1, weight_decay=0.01), optax.adamw(0.1, weight_decay=0.01)),
        "schedule": (
            fj.nesterov(lr=optax.exponential_decay(0.1, 2, 0.5)),
            optax.sgd(optax.exponential_decay(0.1, 2, 0.5), momentum=0.9, nesterov=True),
        ),
    }


@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov", "adam", "adamw", "schedule"])
def test_parity(name: str) -> None:
    ours, theirs = pairs()[name]
    atol = ADAPTIVE if name.startswith("adam") else 2e-6
    close(run(ours.optax())[0], run(theirs)[0], atol=atol)


def test_parity_with_nadam_where_momentum_does_not_warm_up() -> None:
    """optax's NAdam has a constant momentum, which ours has if it warms up within one step."""
    options = {"grad_clip_norm": 1.0, "weight_decay": 1e-2}
    ours = fj.nadam(lr=0.1, momentum_decay=1e6, **options)
    theirs = clipped(optax.nadam(0.1))
    close(run(ours.optax())[0], run(theirs)[0], atol=ADAPTIVE)


# --- wrappers ---------------------------------------------------------------------------------


def test_in_a_chain() -> None:
    tx = fj.nesterov(lr=0.1, grad_clip_norm=1.0)
    chained = optax.chain(optax.scale(2.0), tx.optax(), optax.scale(1.0))
    scaled = fj.nesterov(lr=0.1, grad_clip_norm=1.0, rescale_grad=2.0)
    close(run(chained)[0], run(scaled.optax())[0], atol=1e-6)
    close(run(chained, value=1.0)[0], run(scaled.optax())[0], atol=1e-6)


def test_inject_hyperparams() -> None:
    """All numbers become arrays that may be changed in the state; flags stay what they are."""

    def make_one(lr: Any, momentum: Any = 0.9, grad_clip_norm: Any = 1.0) -> Any:
        return fj.nesterov(lr=lr, momentum=momentum, grad_clip_norm=grad_clip_norm).optax()

    injected = optax.inject_hyperparams(make_one)(lr=optax.linear_schedule(0.1, 0.0, 4))
    lrs = [np.float32(0.1 * (1 - k / 4)) for k in range(4)]
    params, native = make(0), make(0)
    state, tx = (
        injected.init(params),
        fj.nesterov(lr=0.0, momentum=jnp.float32(0.9), grad_clip_norm=1.0),
    )
    native_state = tx.init(native)
    step = jax.jit(injected.update)
    for k, lr in enumerate(lrs):
        updates, state = step(make(k + 1), state, params)
        params = optax.apply_updates(params, updates)
        assert state.hyperparams["lr"] == lr
        native, native_state = tx.step(make(k + 1), native_state, native, lr=jnp.float32(lr))
    close(params, native, atol=2e-6)
    state.hyperparams["momentum"] = jnp.float32(0.0)
    assert step._cache_size() == 1
    step(make(1), state, params)
    assert step._cache_size() == 1


def test_multi_steps() -> None:
    """The mean gradient of two micro-batches makes one step."""
    tx = fj.nesterov(lr=0.1, grad_clip_norm=1.0)
    multi = optax.MultiSteps(tx.optax(), every_k_schedule=2)
    params, _ = run(multi, steps=4)
    native = make(0)
    state = tx.init(native)
    for k in (1, 3):
        mean = jax.tree.map(lambda a, b: (a + b) / 2, make(k), make(k + 1))
        native, state = tx.step(mean, state, native)
    close(params, native, atol=1e-6)


def test_masked() -> None:
    tx = fj.nesterov(lr=0.1, grad_clip_norm=1.0)
    mask = {"a": True, "b": False, "c": True}
    params, state = run(optax.masked(tx.optax(), mask), steps=2)
    native = make(0)
    del native["b"]
    native_state = tx.init(native)
    plain = make(0)["b"]
    for k in (1, 2):
        grads = make(k)
        plain = plain + grads.pop("b")  # what optax does with an update that nobody transforms
        native, native_state = tx.step(grads, native_state, native)
    assert same_bits(params["b"], np.asarray(plain))
    close({"a": params["a"], "c": params["c"]}, native, atol=1e-6)
    assert state.inner_state.leaf_steps.tolist() == [2, 2]


def test_a_transform_for_each_part() -> None:
    transforms = {"x": fj.sgd(lr=0.1).optax(), "y": fj.adam(lr=0.01).optax()}
    partition = getattr(optax, "partition", None) or optax.multi_transform
    params, _ = run(partition(transforms, {"a": "x", "b": "y", "c": "x"}))
    whole = [run_natively(fj.sgd(lr=0.1))[0], run_natively(fj.adam(lr=0.01))[0]]
    close(params, {"a": whole[0]["a"], "b": whole[1]["b"], "c": whole[0]["c"]}, atol=2e-6)


def test_a_missing_gradient_is_no_update() -> None:
    transformation = fj.adam(lr=0.1).optax()
    params = make(0)
    grads = {**make(1), "b": None}
    updates, _ = transformation.update(grads, transformation.init(params), params)
    assert not np.any(np.asarray(updates["b"]))
    after = optax.apply_updates(params, updates)
    assert same_bits(after["b"], np.asarray(params["b"]))


@pytest.mark.parametrize("bad", [np.nan, 1.0, None])
def test_infinite_parameters_stay_infinite(bad: float | None) -> None:
    """Where a step is skipped, where it is not, and where there is no gradient."""
    transformation = fj.sgd(lr=1.0, on_nonfinite="skip").optax()
    params = {"w": jnp.array([jnp.inf, -jnp.inf, 1.0])}
    grads = {"w": None if bad is None else jnp.array([1.0, 1.0, bad])}
    updates, state = transformation.update(grads, transformation.init(params), params)
    assert bool(state.skipped) == (bad is not None and np.isnan(bad))
    assert updates["w"].tolist() == [0.0, 0.0, -1.0 if bad == 1.0 else 0.0]
    after = optax.apply_updates(params, updates)
    assert after["w"].tolist() == [np.inf, -np.inf, 0.0 if bad == 1.0 else 1.0]


def test_parameters_are_needed() -> None:
    transformation = fj.sgd(lr=0.1).optax()
    with pytest.raises(ValueError, match="params: "):
        transformation.update(make(1), transformation.init(make(0)))


def test_flax_train_state() -> None:
    linen = pytest.importorskip("flax.linen")
    train_state = pytest.importorskip("flax.training.train_state")
    model = linen.Dense(3)
    x = jnp.ones((4, 5))
    params = model.init(jax.random.key(0), x)
    tx = fj.nesterov(lr=0.1, grad_clip_norm=1.0)
    state = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx.optax())

    @jax.jit
    def train(state: Any) -> Any:
        grads = jax.grad(lambda p: jnp.sum(state.apply_fn(p, x) ** 2))(state.params)
        return state.apply_gradients(grads=grads)

    native, native_state = params, tx.init(params)
    for _ in range(3):
        grads = jax.grad(lambda p: jnp.sum(model.apply(p, x) ** 2))(native)
        native, native_state = tx.step(grads, native_state, native)
        state = train(state)
    close(state.params, native, atol=1e-6)
    assert int(state.step) == int(state.opt_state.step) == 3
