"""`fusedstep.jax` under JAX's transformations: jit, donation, scan, vmap; trees of all kinds."""

from __future__ import annotations

import dataclasses
import functools
import pickle
from typing import Any

import fusedstep as fs
import numpy as np
import pytest
from jaxruns import compare, fj, jax, jnp, on_device, random_arrays, same_bits

pytestmark = pytest.mark.framework("jax")

SHAPES = ((4, 3), (7,), (20_000,), ())
OPTIONS = {"lr": 0.1, "grad_clip_norm": 1.0, "weight_decay": 0.01}


def start(
    name: str = "nesterov", shapes: Any = SHAPES, **options: Any
) -> tuple[Any, Any, Any, Any]:
    """A transform, its first state, parameters and gradients."""
    tx = getattr(fj, name)(**{**OPTIONS, **options})
    params = on_device(random_arrays(0, shapes=shapes))
    return tx, tx.init(params), params, on_device(random_arrays(1, shapes=shapes))


def pointers(*trees: Any) -> list[int]:
    return [array.unsafe_buffer_pointer() for array in jax.tree.leaves(trees)]


# --- jit and donation -------------------------------------------------------------------------
# Without a 0-d array here: XLA may give its four bytes to one of the numbers of the state.


@pytest.mark.parametrize("name", ["sgd", "nesterov", "nadam", "rmsprop"])
def test_donated_arrays_are_updated_in_place(name: str) -> None:
    tx, state, params, grads = start(name, SHAPES[:-1])
    step = jax.jit(tx.step, donate_argnums=(1, 2))
    for _ in range(3):
        before, old = pointers(params, state.buffers), params
        result = step(grads, state, params)
        params, state = result
        assert pointers(params, state.buffers) == before
        assert all(array.is_deleted() for array in old)
        assert isinstance(result, tuple)


def test_a_training_step_that_donates_is_in_place() -> None:
    tx, state, params, grads = start("adam", SHAPES[:-1])

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train(params: Any, state: Any, grads: Any) -> Any:
        return tx.step(jax.tree.map(lambda g: 2 * g, grads), state, params)

    for _ in range(3):
        before = pointers(params, state.buffers)
        params, state = train(params, state, grads)
        assert pointers(params, state.buffers) == before


def test_compiled_code_copies_no_array_that_is_donated() -> None:
    tx, state, params, grads = start("adamw", SHAPES[:-1])
    lowered = jax.jit(tx.step, donate_argnums=(1, 2)).lower(grads, state, params)
    copies = [line for line in lowered.compile().as_text().splitlines() if " copy(" in line]
    assert not [line for line in copies if " f32[" in line]


def test_what_is_not_donated_stays_as_it_is() -> None:
    tx, state, params, grads = start()
    kept = jax.tree.map(np.array, (params, state.buffers))
    eager, _ = tx.step(grads, state, params)
    compiled, _ = jax.jit(tx.step)(grads, state, params)
    assert same_bits((params, state.buffers), kept)
    assert same_bits(eager, jax.tree.map(np.asarray, compiled))
    assert not same_bits(eager, kept[0])


def test_a_live_view_of_a_donated_array_is_not_written() -> None:
    tx, state, params, grads = start()
    views = jax.tree.map(np.asarray, params)  # of the memory on a CPU
    kept = jax.tree.map(np.array, params)
    jax.block_until_ready(jax.jit(tx.step, donate_argnums=(1, 2))(grads, state, params))
    assert same_bits(kept, views)


def test_the_gradient_may_be_the_parameter() -> None:
    arrays = random_arrays(0, shapes=SHAPES)
    expected = [a.copy() for a in arrays]
    fs.MomentumNesterov(expected, **OPTIONS).step([a.copy() for a in arrays])
    tx = fj.nesterov(**OPTIONS)
    for donated in ((), (1,)):
        params = on_device(arrays)
        step = jax.jit(lambda s, p: tx.step(p, s, p), donate_argnums=donated)
        assert same_bits(step(tx.init(params), params)[0], expected)


def test_two_leaves_may_be_one_array() -> None:
    array = random_arrays(0, shapes=((40,),))[0]
    expected = [array.copy(), array.copy()]
    fs.Momentum(expected, lr=0.1).step([array.copy(), -array])
    tx = fj.momentum(lr=0.1)
    one = jnp.array(array)
    after, _ = jax.jit(tx.step)([one, -one], tx.init([one, one]), [one, one])
    assert same_bits(after, expected)


def test_a_step_compiles_once() -> None:
    """Another learning rate, number or array, and another state compile nothing anew."""
    tx, state, params, grads = start("nadam")
    step = jax.jit(tx.step)
    for lr in (0.1, 0.2, 0.3):
        params, state = step(grads, state, params, lr=jnp.float32(lr))
        assert state.lr == np.float32(lr)
    assert step._cache_size() == 1
    for lr in (0.1, 0.2):
        params, state = step(grads, state, params, lr=lr)
    assert step._cache_size() == 2  # jit makes an array of weak type of a Python number


def test_without_xla_s_aliasing_the_handler_writes_the_results_only() -> None:
    """XLA copies for itself where arrays are aliased, so this is asked of the handler directly."""
    from fusedstep.jax import calls

    tx, state, params, grads = start("nadam")
    expected = tx.step(grads, state, params)
    called = calls._call

    def unaliased(name: str, results: Any, **options: Any) -> Any:
        options.pop("input_output_aliases", None)
        return called(name, results, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "_call", unaliased)
        text = jax.jit(tx.step).lower(grads, state, params).as_text()
        assert "output_operand_alias" not in text
        kept = jax.tree.map(np.array, (params, state.buffers))
        after, after_state = jax.jit(lambda *a: tx.step(*a))(grads, state, params)
    assert same_bits((params, state.buffers), kept)
    assert same_bits(after, jax.tree.map(np.asarray, expected[0]))
    assert same_bits(after_state, jax.tree.map(np.asarray, expected[1]))


def test_thousands_of_leaves_become_a_few_calls() -> None:
    from fusedstep.jax.calls import CHUNK

    tx = fj.nesterov(lr=0.1, grad_clip_norm=1.0)
    params = [jax.ShapeDtypeStruct((3,), jnp.float32)] * 1000
    state = jax.eval_shape(tx.init, params)
    text = jax.jit(tx.step).lower(params, state, params).as_text()
    assert text.count("@fusedstep.update") == -(-1000 // CHUNK)
    assert text.count("@fusedstep.norms") == text.count("@fusedstep.settle") == 1


# --- scan and vmap ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd", "nadam"])
def test_scan_is_a_loop(name: str) -> None:
    tx, state, params, _ = start(name, on_nonfinite="skip")
    many = [on_device(random_arrays(k, shapes=SHAPES)) for k in range(5)]
    many[2][1] = many[2][1].at[3].set(jnp.nan)
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *many)
    step = jax.jit(tx.step)

    def body(carry: Any, grads: Any) -> Any:
        params, state = carry
        params, state = tx.step(grads, state, params)
        return (params, state), state.skipped

    (scanned, scanned_state), skipped = jax.lax.scan(body, (params, state), stacked)
    for grads in many:
        params, state = step(grads, state, params)
    assert same_bits(scanned, jax.tree.map(np.asarray, params))
    assert same_bits(scanned_state, jax.tree.map(np.asarray, state))
    assert skipped.tolist() == [False, False, True, False, False]
    assert (int(state.step), int(state.skipped_steps)) == (4, 1)


def test_the_result_of_a_step_is_a_carry() -> None:
    tx, state, params, grads = start()
    stacked = jax.tree.map(lambda g: jnp.stack([g, g]), grads)
    compiled = jax.jit(tx.step, donate_argnums=(1, 2))
    for step in (tx.step, compiled):
        body = lambda carry, g, step=step: (step(g, carry[1], carry[0]), None)  # noqa: E731
        (params_after, _), _ = jax.lax.scan(body, (params, state), stacked)
        once = tx.step(grads, state, params)
        assert same_bits(params_after, jax.tree.map(np.asarray, tx.step(grads, *once[::-1])[0]))


@pytest.mark.parametrize("scope", ["all", "array"])
def test_vmap_clips_each_element_of_the_batch_by_its_own_norm(scope: str) -> None:
    tx = fj.nadam(lr=0.1, grad_clip_norm=1.0, grad_clip_scope=scope)
    batch = [on_device(random_arrays(k, shapes=SHAPES)) for k in range(3)]
    grads = [jax.tree.map(lambda g, k=k: g * 10**k, batch[k]) for k in range(3)]
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)  # noqa: E731
    states = jax.vmap(tx.init)(stack(batch))
    step = jax.jit(jax.vmap(tx.step))
    params, states = step(stack(grads), states, stack(batch))
    params, states = step(stack(grads), states, params)
    for k in range(3):
        alone, state = batch[k], tx.init(batch[k])
        for _ in range(2):
            alone, state = tx.step(grads[k], state, alone)
        assert same_bits(alone, [np.asarray(p[k]) for p in params])
        assert same_bits(state, jax.tree.map(lambda x, k=k: np.asarray(x[k]), states))
    assert len({float(norm) for norm in states.grad_norm}) == 3


def test_vmap_over_learning_rates() -> None:
    tx, state, params, grads = start()
    lrs = jnp.array([0.1, 0.2, 0.4])
    many, states = jax.vmap(lambda lr: tx.step(grads, state, params, lr=lr))(lrs)
    for k, lr in enumerate(lrs):
        alone, _ = tx.step(grads, state, params, lr=lr)
        assert same_bits(alone, [np.asarray(p[k]) for p in many])
    assert states.lr.tolist() == lrs.tolist()


# --- skipping ---------------------------------------------------------------------------------


def test_a_skipped_step_changes_nothing_and_asks_the_host_nothing() -> None:
    tx, state, params, grads = start("nadam", on_nonfinite="skip")
    params, state = tx.step(grads, state, params)
    bad = [*grads[:2], grads[2].at[-1].set(jnp.inf), grads[3]]
    step = jax.jit(tx.step)
    expected = jax.tree.map(np.array, (params, state.buffers, state.leaf_products))
    with jax.transfer_guard("disallow"):
        params, state = step(bad, state, params)
        params, state = step(bad, state, params)
    assert same_bits((params, state.buffers, state.leaf_products), expected)
    assert bool(state.skipped)
    assert (int(state.step), int(state.skipped_steps)) == (1, 2)
    assert state.leaf_steps.tolist() == [1] * 4
    assert np.isinf(state.grad_norm)
    _, state = step(grads, state, params)
    assert not bool(state.skipped)


def test_propagated_bad_gradients_are_the_numpy_ones() -> None:
    params, grads = random_arrays(0, shapes=SHAPES), random_arrays(1, shapes=SHAPES)
    grads[0][1, 1] = np.inf
    tx = fj.momentum(lr=0.1, grad_clip_norm=1.0)
    ours = on_device(params)
    ours, _ = tx.step(on_device(grads), tx.init(ours), ours)
    fs.Momentum(params, lr=0.1, grad_clip_norm=1.0).step(grads)
    for a, b in zip(ours, params, strict=True):
        np.testing.assert_array_equal(np.asarray(a), b)


def test_nothing_trips_the_search_for_nan() -> None:
    """A norm that nobody asked for is no NaN, under `jax_debug_nans`."""
    tx, state, params, grads = start("adam", grad_clip_norm=None)
    with jax.debug_nans(True):
        params, state = jax.jit(tx.step)(grads, tx.init(params), params)
        assert float(state.grad_norm) == -1
        assert float(tx.init(params).grad_norm) == -1


# --- trees ------------------------------------------------------------------------------------


def test_nested_trees_with_holes() -> None:
    array, grad = random_arrays(0, shapes=((5,),))[0], random_arrays(1, shapes=((5,),))[0]
    expected = array.copy()
    fs.Momentum([expected], lr=0.1).step([grad])
    tx = fj.momentum(lr=0.1)
    params = {"a": [jnp.array(array), None], "b": (), "c": {"d": None}}
    grads = {"a": [jnp.array(grad), None], "b": (), "c": {"d": None}}
    state = tx.init(params)
    after, state = jax.jit(tx.step)(grads, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(params)
    assert jax.tree.structure(state.velocity) == jax.tree.structure(params)
    assert same_bits(after, [expected])


@pytest.mark.parametrize("params", [{}, [], None, {"a": None}])
def test_trees_without_arrays(params: Any) -> None:
    for scope in ("all", "array"):
        tx = fj.nadam(lr=0.1, grad_clip_norm=1.0, grad_clip_scope=scope, on_nonfinite="skip")
        after, state = jax.jit(tx.step)(params, tx.init(params), params)
        assert after == params
        assert (int(state.step), float(state.grad_norm)) == (1, 0.0)


def test_numpy_arrays_are_taken_as_jax_takes_them() -> None:
    """Without x64, float64 becomes float32 on the way in, compiled or not."""
    tx = fj.nadam(lr=0.1, grad_clip_norm=1.0)
    params, grads = (
        [a.astype(np.float64) for a in random_arrays(k, shapes=SHAPES)] for k in (0, 1)
    )
    expected, _ = tx.step(on_device(grads), tx.init(on_device(params)), on_device(params))
    for step in (tx.step, jax.jit(tx.step)):
        state = jax.tree.map(np.asarray, tx.init(params))
        after, _ = step(grads, state, params)
        assert same_bits(after, jax.tree.map(np.asarray, expected))


def test_empty_arrays() -> None:
    compare("nadam", {"lr": 0.1, "grad_clip_norm": 1.0}, shapes=((0,), (0, 3)))


def test_the_state_is_a_plain_pytree() -> None:
    tx, state, params, grads = start("nadam")
    _, state = tx.step(grads, state, params)
    restored = pickle.loads(pickle.dumps(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert same_bits(restored, jax.tree.map(np.asarray, state))
    assert same_bits(restored.exp_avg_sq, jax.tree.map(np.asarray, state.buffers["exp_avg_sq"]))
    again, _ = tx.step(grads, restored, params)
    assert same_bits(again, jax.tree.map(np.asarray, tx.step(grads, state, params)[0]))
    with pytest.raises(AttributeError, match="velocity"):
        _ = state.velocity
    for prefix in (None, "exp_avg", state.step):  # such as `in_axes`, or an array in its place
        with pytest.raises(AttributeError, match="exp_avg"):
            _ = dataclasses.replace(state, buffers=prefix).exp_avg


def test_a_fresh_state_is_that_of_a_step() -> None:
    """The same types, so that it can be the carry of a loop from the start."""
    tx, state, params, grads = start("nadam")
    _, after = tx.step(grads, state, params)
    described = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)  # noqa: E731
    assert described(state) == described(after)


def test_16_bit_states_are_used_as_they_are() -> None:
    params = random_arrays(0, shapes=SHAPES)
    tx = fj.momentum(lr=0.1)
    ours = on_device(params)
    state = tx.init(ours)
    half = jax.tree.map(lambda v: v.astype(jnp.bfloat16), state.buffers)
    state = jax.tree_util.tree_map(lambda x: x, state)
    state = type(state)(**{**vars(state), "buffers": half})
    velocity = [np.zeros(p.shape, half["velocity"][0].dtype) for p in params]
    numpy_state: dict[str, Any] = {"velocity": velocity}
    for seed in (1, 2):
        grads = random_arrays(seed, shapes=SHAPES)
        ours, state = tx.step(on_device(grads), state, ours)
        if seed == 1:  # the function takes a state that was passed for one that has seen a step
            fs.Momentum(params, lr=0.1).step(grads)
            velocity = [np.asarray(v).copy() for v in state.velocity]
            numpy_state = {"velocity": velocity}
        else:
            fs.fused_momentum_step(params, grads, **numpy_state, lr=0.1)
        assert same_bits(ours, params)
    assert same_bits(state.velocity, velocity)
