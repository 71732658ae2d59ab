"""The same steps by `fusedstep.jax` and by the NumPy objects, to be compared bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import fusedstep as fs
import numpy as np
from exact import DTYPES, Array

try:
    import fusedstep.jax as fj
    import jax
    import jax.numpy as jnp
except ImportError:  # the marker leaves the tests out, by name
    fj = jax = jnp = None

KINDS: dict[str, type[fs.Optimizer]] = {
    "sgd": fs.SGD,
    "momentum": fs.Momentum,
    "nesterov": fs.MomentumNesterov,
    "nadam": fs.NAdam,
    "adam": fs.Adam,
    "adamw": fs.AdamW,
    "rmsprop": fs.RMSprop,
}
# Around the borders of registers, tiles and chunks; a scalar, an empty array, two dimensions.
SHAPES: tuple[tuple[int, ...], ...] = (
    *((), (1,), (7,), (0, 3), (16,), (3, 11), (4099,)),
    *((16_383,), (16_384,), (5, 3277)),
)


def random_arrays(
    seed: int, dtype: str = "float32", shapes: Sequence[tuple[int, ...]] = SHAPES
) -> list[Array]:
    """Random arrays, of which no element is zero."""
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.standard_normal(shape)).astype(DTYPES[dtype]) for shape in shapes]


def on_device(tree: Any) -> Any:
    """Copies as JAX arrays, of arrays that change later.

    `jnp.asarray` may share their memory; even a copy is made some time after `jnp.array` returns.
    """
    return jax.block_until_ready(jax.tree.map(functools.partial(jnp.array, copy=True), tree))


def same_bits(a: Any, b: Any) -> bool:
    """Of two trees of arrays."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(
        np.asarray(x).dtype == np.asarray(y).dtype and np.asarray(x).tobytes() == y.tobytes()
        for x, y in pairs
    )


def buffers_of(optimizer: fs.Optimizer, slot: str, like: Any) -> list[Array]:
    """The state buffers of a NumPy object, in the order of its parameters; zeros before a step."""
    states = optimizer.state_dict()["state"]
    zeros = [np.zeros(array.shape, array.dtype) for array in jax.tree.leaves(like)]
    return [states[k][slot] if k in states else zero for k, zero in enumerate(zeros)]


def compare(
    name: str,
    options: dict[str, Any],
    *,
    dtype: str = "float32",
    grad_dtype: str | None = None,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    steps: int = 3,
    scale: float = 1.0,
) -> Any:
    """Steps both and compares parameters, buffers and what they report; returns the state."""
    params = random_arrays(0, dtype, shapes)
    optimizer = KINDS[name](params, **options)
    tx = getattr(fj, name)(**options)
    ours = on_device(params)
    state = tx.init(ours)
    step = jax.jit(tx.step, donate_argnums=(1, 2))
    for k in range(steps):
        grads = random_arrays(k + 1, grad_dtype or dtype, shapes)
        grads = [(np.asarray(g, np.float64) * scale).astype(g.dtype) for g in grads]
        result = optimizer.step(grads)
        ours, state = step(on_device(grads), state, ours)
        assert same_bits(ours, params), f"parameters after step {k + 1}"
        for slot in tx.slots:
            ours_now = state.buffers[slot]
            assert same_bits(ours_now, buffers_of(optimizer, slot, ours_now)), slot
        assert bool(state.skipped) == result.skipped
        assert np.asarray(state.clip_coef) == np.asarray(result.clip_coef, state.clip_coef.dtype)
        if result.grad_norm is not None:
            expected = np.asarray(result.grad_norm, state.grad_norm.dtype)
            assert np.asarray(state.grad_norm).tobytes() == expected.tobytes()
    return state
