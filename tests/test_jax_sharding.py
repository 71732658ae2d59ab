"""`fusedstep.jax` on four (simulated) devices: data parallel, fully sharded, and by hand."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from jaxruns import fj, jax, jnp, on_device, random_arrays, same_bits

pytestmark = pytest.mark.framework("jax")

if jax is not None:
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

OPTIONS = {"lr": 0.1, "grad_clip_norm": 1.0, "weight_decay": 0.01}
SHAPES = ((8, 6), (12,), (64, 1000), (3,))


def mesh(*sizes: int) -> Any:
    names = ("d", "m")[: len(sizes)]
    devices = jax.devices("cpu")
    if len(devices) < np.prod(sizes):
        pytest.skip("needs 4 devices: XLA_FLAGS was set to something else")
    return Mesh(np.array(devices[: int(np.prod(sizes))]).reshape(sizes), names)


def trees(seed: int) -> dict[str, Any]:
    names = ("W", "b", "V", "c")
    return on_device(dict(zip(names, random_arrays(seed, shapes=SHAPES), strict=True)))


def place(tree: Any, devices: Any, specs: Any) -> Any:
    put = lambda x, spec: jax.device_put(x, NamedSharding(devices, spec))  # noqa: E731
    return jax.tree.map(put, tree, specs)


def collectives(compiled: Any) -> dict[str, int]:
    """Elements that each kind of collective hands over, in the optimized program."""
    found: dict[str, int] = {}
    pattern = r"= (\S+?)\[([\d,]*)\]\S* (all-\w+|reduce-scatter|collective-\w+)\("
    for _, shape, kind in re.findall(pattern, compiled.as_text()):
        size = int(np.prod([int(n) for n in shape.split(",") if n]))
        found[kind] = found.get(kind, 0) + size
    return found


FSDP = {"W": ("d",), "b": ("d",), "V": (None, "d"), "c": ()}


def specs_of(entries: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    return {name: P(*axes) for name, axes in entries.items()}


@pytest.mark.parametrize("name", ["nesterov", "nadam"])
@pytest.mark.parametrize("scope", ["all", "array"])
def test_fully_sharded_parameters(name: str, scope: str) -> None:
    """No array is gathered; what devices exchange is a norm each. Results are those of one device.

    Without an active clip to the bit; with one up to the rounding of the coefficient.
    """
    devices, specs = mesh(4), specs_of(FSDP)
    for clip, exact in ((1.0, False), (1e6, True)):
        tx = getattr(fj, name)(**{**OPTIONS, "grad_clip_norm": clip}, grad_clip_scope=scope)
        sharded = tx.sharded(devices, specs)
        alone = trees(0)
        alone_state = tx.init(alone)
        params = place(trees(0), devices, specs)
        state = jax.jit(sharded.init)(params)
        step = jax.jit(sharded.step, donate_argnums=(1, 2))
        for seed in (1, 2, 3):
            grads = trees(seed)
            alone, alone_state = tx.step(grads, alone_state, alone)
            params, state = step(place(grads, devices, specs), state, params)
            norm, expected = float(state.grad_norm), float(alone_state.grad_norm)
            assert norm == pytest.approx(expected, rel=2e-7)  # both are rounded to float32
        for key, spec in specs.items():
            assert params[key].sharding.is_equivalent_to(
                NamedSharding(devices, spec), params[key].ndim
            )
            a, b = np.asarray(params[key]), np.asarray(alone[key])
            assert same_bits(a, b) if exact else np.allclose(a, b, rtol=0, atol=3e-7)
        velocity = state.buffers[tx.slots[0]]["W"]
        assert velocity.sharding.is_equivalent_to(NamedSharding(devices, P("d")), 2)
        assert {s.data.shape for s in velocity.addressable_shards} == {(2, 6)}


def test_fully_sharded_exchanges_norms_only() -> None:
    devices, specs = mesh(4), specs_of(FSDP)
    tx = fj.nesterov(**OPTIONS)
    params = place(trees(0), devices, specs)
    sharded = tx.sharded(devices, specs)
    state = jax.jit(sharded.init)(params)
    compiled = jax.jit(sharded.step, donate_argnums=(1, 2)).lower(params, state, params).compile()
    found = collectives(compiled)
    assert found == {"all-reduce": 4 * 2}  # four float64 as halves
    without = fj.nesterov(lr=0.1).sharded(devices, specs)
    compiled = jax.jit(without.step).lower(params, state, params).compile()
    assert collectives(compiled) == {}


def test_a_plain_jit_would_gather() -> None:
    """What `sharded` is for: XLA does not know how to split a foreign call."""
    devices, specs = mesh(4), specs_of(FSDP)
    tx = fj.nesterov(**OPTIONS)
    params = place(trees(0), devices, specs)
    state = jax.jit(tx.init)(params)
    compiled = jax.jit(tx.step).lower(params, state, params).compile()
    assert collectives(compiled)["all-gather"] > 64_000


def test_sharded_steps_are_in_place_when_donated() -> None:
    devices, specs = mesh(4), specs_of(FSDP)
    sharded = fj.nesterov(**OPTIONS).sharded(devices, specs)
    params = place(trees(0), devices, specs)
    state = jax.jit(sharded.init)(params)
    step = jax.jit(sharded.step, donate_argnums=(1, 2))
    pointers = lambda *t: [  # noqa: E731
        s.data.unsafe_buffer_pointer() for a in jax.tree.leaves(t) for s in a.addressable_shards
    ]
    for _ in range(2):
        before = pointers(params, state.velocity)
        params, state = step(place(trees(1), devices, specs), state, params)
        assert pointers(params, state.velocity) == before


def test_data_parallel_training_is_that_of_one_device() -> None:
    """Replicated parameters, a batch that is split: two lines, and the gradients' own exchange."""
    devices, whole = mesh(4), P()
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 32, 5)).astype(np.float32)
    tx = fj.nesterov(**OPTIONS)
    loss = lambda w, x, y: jnp.mean((x @ w - y) ** 2)  # noqa: E731
    sharded = tx.sharded(devices, whole)

    @jax.jit
    def train(w: Any, state: Any, x: Any, y: Any) -> Any:
        return sharded.step(jax.grad(loss)(w, x, y), state, w)

    w = jnp.eye(5)
    state = sharded.init(w)
    rows = NamedSharding(devices, P("d"))
    batch = jax.device_put(x, rows), jax.device_put(y, rows)
    compiled = train.lower(w, state, *batch).compile()
    assert collectives(compiled) == {"all-reduce": 25}  # of the gradient
    after, state = w, state
    alone, alone_state = w, tx.init(w)
    for _ in range(3):
        after, state = train(after, state, *batch)
        alone, alone_state = tx.step(jax.grad(loss)(alone, x, y), alone_state, alone)
    # XLA adds up the gradient of a split batch in another order.
    np.testing.assert_allclose(np.asarray(after), np.asarray(alone), rtol=0, atol=1e-6)


def test_replicated_norms_have_the_bits_of_one_device() -> None:
    devices = mesh(4)
    tx = fj.nadam(**OPTIONS)
    alone, _ = tx.step(trees(1), tx.init(trees(0)), trees(0))
    sharded = tx.sharded(devices, P())
    params, _ = jax.jit(sharded.step)(trees(1), sharded.init(trees(0)), trees(0))
    assert same_bits(params, jax.tree.map(np.asarray, alone))


def test_two_mesh_axes_and_a_prefix_of_specs() -> None:
    """Each array's norm is summed over the axes that split it, and counted once on the others."""
    devices = mesh(2, 2)
    specs = {"W": P("d"), "b": P("m"), "V": P("d", "m"), "c": None}
    tx = fj.nesterov(lr=0.1, grad_clip_norm=1.0)
    nested = {"part": trees(0), "rest": trees(1)}
    prefix = {"part": specs, "rest": None}
    sharded = tx.sharded(devices, prefix)
    params, state = jax.jit(sharded.step)(nested, sharded.init(nested), nested)
    alone, alone_state = tx.step(nested, tx.init(nested), nested)
    assert float(state.grad_norm) == pytest.approx(float(alone_state.grad_norm), rel=2e-7)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=3e-7)
    (v,) = {s.data.shape for s in params["part"]["V"].addressable_shards}
    assert v == (32, 500)


@pytest.mark.usefixtures("x64")
def test_the_norm_over_shards_is_exact_to_float64() -> None:
    devices, specs = mesh(4), {"w": P("d")}
    w = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(4 * 16_385))}
    for scale in (1.0, 1e-170, 1e170):  # squares of the outer ones leave the range
        tx = fj.sgd(lr=0.1, grad_clip_norm=np.inf)
        sharded = tx.sharded(devices, specs)
        grads = jax.tree.map(lambda g, s=scale: g * s, w)
        _, state = jax.jit(sharded.step)(grads, sharded.init(w), w)
        _, alone = tx.step(grads, tx.init(w), w)
        assert float(state.grad_norm) == pytest.approx(float(alone.grad_norm), rel=1e-14)


def test_a_bad_gradient_on_one_shard_skips_the_step_on_all() -> None:
    devices, specs = mesh(4), specs_of(FSDP)
    sharded = fj.nesterov(lr=0.1, on_nonfinite="skip").sharded(devices, specs)
    params = place(trees(0), devices, specs)
    grads = trees(1)
    grads["W"] = grads["W"].at[5, 0].set(jnp.nan)
    after, state = jax.jit(sharded.step)(place(grads, devices, specs), sharded.init(params), params)
    assert bool(state.skipped)
    assert same_bits(after, jax.tree.map(np.asarray, params))


def test_step_inside_of_a_shard_map_by_hand() -> None:
    devices, specs = mesh(4), specs_of(FSDP)
    tx = fj.momentum(**OPTIONS)
    state_specs = jax.tree.map(lambda _: P(), jax.eval_shape(tx.init, trees(0)))
    state_specs.buffers["velocity"].update(specs)
    mapped = jax.shard_map(
        lambda grads, state, params: tx.step(grads, state, params, specs=specs),
        mesh=devices,
        in_specs=(specs, state_specs, specs),
        out_specs=(specs, state_specs),
        check_vma=False,
    )
    params, state = jax.jit(mapped)(trees(1), tx.init(trees(0)), trees(0))
    sharded = tx.sharded(devices, specs)
    expected, expected_state = sharded.step(trees(1), tx.init(trees(0)), trees(0))
    assert same_bits(params, jax.tree.map(np.asarray, expected))
    assert same_bits(state, jax.tree.map(np.asarray, expected_state))


@pytest.mark.parametrize("spread", [False, True])
def test_shardings_of_results_need_a_function_around_the_step(spread: bool) -> None:
    devices = mesh(4)
    tx = fj.nesterov(**OPTIONS)
    step = (tx.sharded(devices, P()) if spread else tx).step
    whole = NamedSharding(devices, P())
    shardings = jax.tree.map(lambda _: whole, (trees(0), tx.init(trees(0))))
    params, state = jax.device_put((trees(0), tx.init(trees(0))), shardings)
    expected, _ = tx.step(trees(1), state, params)
    with pytest.raises(ValueError, match="out_shardings"):
        jax.jit(step, out_shardings=shardings)(trees(1), state, params)
    around = jax.jit(
        lambda params, state, grads: step(grads, state, params),
        donate_argnums=(0, 1),
        out_shardings=shardings,
    )
    first = lambda tree: tree["V"].addressable_shards[0].data.unsafe_buffer_pointer()  # noqa: E731
    before = first(params)
    params, state = around(params, state, jax.device_put(trees(1), whole))
    assert first(params) == before
    assert params["V"].sharding == state.velocity["V"].sharding == whole
    assert same_bits(params, jax.tree.map(np.asarray, expected))


def test_numbers_that_change_are_arguments() -> None:
    devices, specs = mesh(4), specs_of(FSDP)
    tx = fj.momentum(lr=1.0, grad_clip_norm=1.0)
    sharded = tx.sharded(devices, specs)
    step = jax.jit(sharded.step)
    for lr, norm in ((0.1, 3.0), (0.2, 5.0)):
        after, state = step(trees(1), tx.init(trees(0)), trees(0), lr=lr, grad_norm=norm)
        alone, _ = jax.jit(tx.step)(trees(1), tx.init(trees(0)), trees(0), lr=lr, grad_norm=norm)
        assert same_bits(after, jax.tree.map(np.asarray, alone))
        assert float(state.grad_norm) == norm
    assert step._cache_size() == 1
    traced = jax.jit(
        lambda lr: (
            fj.sgd(lr=lr)
            .sharded(devices, specs)
            .step(trees(1), fj.sgd().init(trees(0)), trees(0))[0]
        )
    )(0.5)
    expected, _ = fj.sgd(lr=0.5).step(trees(1), fj.sgd().init(trees(0)), trees(0))
    assert same_bits(traced, jax.tree.map(np.asarray, expected))


def test_gradients_may_be_missing() -> None:
    devices, specs = mesh(4), specs_of(FSDP)
    tx = fj.nadam(**OPTIONS)
    grads = {**trees(1), "W": None}
    sharded = tx.sharded(devices, specs)
    after, state = jax.jit(sharded.step)(grads, sharded.init(trees(0)), trees(0))
    assert same_bits(after["W"], np.asarray(trees(0)["W"]))
    assert sorted(state.leaf_steps.tolist()) == [0, 1, 1, 1]


def test_weight_decay_by_a_function_sees_whole_arrays() -> None:
    devices, specs = mesh(4), specs_of(FSDP)
    seen: dict[str, set[tuple[int, ...]]] = {}

    def decay(path: str, array: Any) -> float:
        seen.setdefault(path, set()).add(array.shape)
        return 0.5 if array.size > 12 else 0.25 if path == "b" else 0.0

    tx = fj.sgd(lr=0.1, weight_decay=decay)
    grads = {**trees(1), "c": None}
    alone, _ = tx.step(grads, tx.init(trees(0)), trees(0))
    sharded = tx.sharded(devices, specs)
    for step in (sharded.step, jax.jit(sharded.step)):
        after, _ = step(grads, sharded.init(trees(0)), trees(0))
        assert same_bits(after, jax.tree.map(np.asarray, alone))
    assert seen == {"W": {(8, 6)}, "b": {(12,)}, "V": {(64, 1000)}}


def test_specs_are_checked() -> None:
    tx = fj.momentum(**OPTIONS)
    with pytest.raises(TypeError, match="specs: expected PartitionSpecs or None, got bool"):
        tx.sharded(mesh(4), {"W": True})
    params = {"w": jnp.ones(4)}
    with pytest.raises(ValueError, match="specs: no prefix of the tree of params"):
        tx.step(params, tx.init(params), params, specs={"v": P("d")})
