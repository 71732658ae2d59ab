"""The calls into the compiled handlers, and what they take as static and as an operand.

A float64 travels as its two uint32 halves, because JAX has no float64 unless a flag allows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from fusedstep import _xla
from fusedstep.jax.state import Array

# Parameters per update call. XLA's compile time grows with the square of it (22 s for one call of
# 1000), its run time does not depend on it. Results do not, either.
CHUNK = 32

_WORD = jnp.uint32


def halves(numbers: Sequence[float]) -> NDArray[np.uint32]:
    """float64 numbers as they travel: [n, 2]."""
    return np.asarray(numbers, np.float64).view(np.uint32).reshape(-1, 2)


def _like(array: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _indices(values: Sequence[int]) -> NDArray[np.int64]:
    return np.asarray(values, np.int64)


def _call(name: str, results: Any, **options: Any) -> Any:
    return jax.ffi.ffi_call(f"fusedstep.{name}", results, vmap_method="sequential", **options)


def norms(grads: Sequence[Array], param_dtypes: Sequence[int], per_array: bool) -> Array:
    """Norms of gradients as float64 halves, [1 or n, 2]: of all together, or of each."""
    shape = (len(grads) if per_array else 1, 2)
    call = _call("norms", jax.ShapeDtypeStruct(shape, _WORD))
    return call(*grads, param_dtypes=_indices(param_dtypes), per_array=per_array)


class Settings(NamedTuple):
    """The hyper-parameters of a step, as the handlers read them."""

    rule: int
    values: NDArray[np.float64]
    traced: dict[int, Array]  # position among `values` -> the operand that replaces it


class Settled(NamedTuple):
    """What is decided before any array is updated."""

    words: Array  # for the update calls
    norm: Array
    clip_coef: Array
    lr: Array
    skipped: Array
    leaf_steps: Array
    leaf_products: Array


class Measured(NamedTuple):
    """The norms of a step, as far as they are known."""

    parts: list[Array]  # [shards, 1 or leaves, 2] of each group of leaves
    order: list[int]  # with `per_array`, the leaves that they belong to
    per_array: bool
    given: Array | None  # the norm of all, if the caller has reduced it


def settle(
    settings: Settings,
    leaf_steps: Array,
    leaf_products: Array,
    present: Sequence[int],
    measured: Measured,
    judge: bool,
) -> Settled:
    """Decides whether a step is taken, and by which numbers."""
    real = jax.dtypes.canonicalize_dtype(np.float64)
    number = jax.ShapeDtypeStruct((), real)
    count = leaf_steps.shape[0] if measured.per_array else 1
    results = (
        jax.ShapeDtypeStruct((_xla.NUM_SETTLED + count, 2), _WORD),
        *(number, number, number, jax.ShapeDtypeStruct((), jnp.bool_)),
        *(_like(leaf_steps), _like(leaf_products)),
    )
    given = [] if measured.given is None else [measured.given]
    operands = [leaf_steps, leaf_products, *settings.traced.values(), *given, *measured.parts]
    settled = _call("settle", results)(
        *operands,
        rule=np.int64(settings.rule),
        settings=settings.values,
        traced=_indices(list(settings.traced)),
        leaves=_indices(present),
        order=_indices(measured.order),
        norm_given=bool(given),
        judge=judge,
        per_array=measured.per_array,
    )
    return Settled(*settled)


class Batch(NamedTuple):
    """The arrays of a step that have a gradient, and which leaf of the tree each is."""

    leaves: list[int]
    params: list[Array]
    grads: list[Array]
    buffers: list[list[Array]]  # of each slot
    decays: NDArray[np.float64]  # weight decay of each, if they differ; else empty

    def part(self, begin: int) -> Batch:
        """CHUNK of them."""
        cut = slice(begin, begin + CHUNK)
        buffers = [slot[cut] for slot in self.buffers]
        return Batch(self.leaves[cut], self.params[cut], self.grads[cut], buffers, self.decays[cut])

    @property
    def states(self) -> list[Array]:
        """All buffers, slot by slot."""
        return [buffer for slot in self.buffers for buffer in slot]


def update(
    settings: Settings,
    settled: Settled,
    leaf_steps: Array,
    leaf_products: Array,
    batch: Batch,
    decay_position: int,
    per_array: bool,
) -> tuple[list[Array], list[list[Array]]]:
    """The new parameters and buffers; `leaf_steps` and `leaf_products` are those before."""
    params: list[Array] = []
    buffers: list[list[Array]] = [[] for _ in batch.buffers]
    counts = (settled.words, leaf_steps, leaf_products)
    for begin in range(0, len(batch.leaves), CHUNK):
        part = batch.part(begin)
        count, written = len(part.leaves), [*part.params, *part.states]
        outputs = range(len(written))
        first = len(counts)
        call = _call(
            "update",
            [_like(array) for array in written],
            input_output_aliases={first + i + (count if i >= count else 0): i for i in outputs},
        )
        results = call(
            *(*counts, *part.params, *part.grads, *part.states),
            rule=np.int64(settings.rule),
            slots=np.int64(len(part.buffers)),
            leaves=_indices(part.leaves),
            decays=part.decays,
            decay_position=np.int64(decay_position),
            per_array=per_array,
        )
        params += results[:count]
        for slot, into in enumerate(buffers):
            into += results[count * (1 + slot) : count * (2 + slot)]
    return params, buffers
