"""Parameters that are spread over devices: one norm for all shards, nothing else exchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fusedstep.jax import calls
from fusedstep.jax.donation import in_order_of_arguments
from fusedstep.jax.options import is_traced
from fusedstep.jax.state import Array, State, Tree
from fusedstep.jax.trees import PARAM_DTYPES, Leaves

if TYPE_CHECKING:
    from fusedstep.jax.transform import Transform

Axes = tuple[str, ...]


def _is_spec(node: object) -> bool:
    return node is None or isinstance(node, PartitionSpec)


def check_specs(specs: Tree) -> None:
    """Refuses what is no tree of PartitionSpecs."""
    for spec in jax.tree.leaves(specs, is_leaf=_is_spec):
        if not _is_spec(spec):
            raise TypeError(f"specs: expected PartitionSpecs or None, got {type(spec).__name__}")


def spread(specs: Tree, tree: Tree) -> Tree:
    """A spec for each array of a tree, from a prefix of it."""

    def over(spec: Any, part: Tree) -> Tree:
        return jax.tree.map(lambda _: PartitionSpec() if spec is None else spec, part)

    try:
        return jax.tree.map(over, specs, tree, is_leaf=_is_spec)
    except (ValueError, TypeError) as error:
        raise ValueError(f"specs: no prefix of the tree of params: {error}") from None


def _axes_of(spec: Any) -> Axes:
    """The mesh axes over which an array is split."""
    names: list[str] = []
    for entry in spec or ():
        names += [entry] if isinstance(entry, str) else list(entry or ())
    return tuple(names)


def axes_of(leaves: Leaves, specs: Tree | None) -> list[Axes]:
    """The mesh axes of each array."""
    if specs is None:
        return [()] * len(leaves.arrays)
    full = spread(specs, leaves.form.unflatten(leaves.arrays))
    return [_axes_of(spec) for spec in leaves.form.flatten_up_to(full)]


def _exchange(norms: Array, axes: Axes) -> Array:
    """The norms of all shards, [shards, n, 2], from those of this one.

    Every shard adds its bits to a slot of its own, as integers: exact, and in an order that does
    not depend on how devices talk to each other.
    """
    if not axes:
        return norms[None]
    shards = jax.lax.psum(1, axes)  # a constant
    slots = jnp.zeros((shards, *norms.shape), norms.dtype).at[jax.lax.axis_index(axes)].set(norms)
    return jax.lax.psum(slots, axes)


def measure(
    leaves: Leaves, grads: list[Array | None], axes: list[Axes], per_array: bool
) -> tuple[list[Array], list[int]]:
    """The norms of gradients, [shards, norms, 2] for each group of arrays that are split alike."""
    groups: dict[Axes, list[int]] = {}
    for index, grad in enumerate(grads):
        if grad is not None:
            groups.setdefault(axes[index], []).append(index)
    parts = []
    for split, members in (groups or {(): []}).items():
        dtypes = [PARAM_DTYPES.index(str(leaves.arrays[i].dtype)) for i in members]
        norms = calls.norms([grads[i] for i in members], dtypes, per_array)
        parts.append(_exchange(norms, split))
    return parts, [index for members in groups.values() for index in members]


class ShardedTransform:
    """A transform whose arrays are spread over the devices of a mesh; see `Transform.sharded`."""

    def __init__(self, transform: Transform, mesh: Any, specs: Tree) -> None:
        self._transform = transform
        self._mesh = mesh
        self._specs = specs

    def _state_specs(self, params_specs: Tree) -> State:
        whole = PartitionSpec()
        buffers = dict.fromkeys(self._transform.slots, params_specs)
        return State(buffers, *[whole] * 8)

    def _mapped(self, function: Any, inputs: Any, outputs: Any) -> Any:
        return jax.shard_map(
            function, mesh=self._mesh, in_specs=inputs, out_specs=outputs, check_vma=False
        )

    def init(self, params: Tree) -> State:
        """The state before the first step, its buffers spread like `params`."""
        specs = spread(self._specs, params)
        run = self._mapped(self._transform.init, (specs,), self._state_specs(specs))
        state: State = run(params)
        return state

    def step(
        self, grads: Tree, state: State, params: Tree, *, lr: Any = None, grad_norm: Any = None
    ) -> tuple[Tree, State]:
        """One step; as `Transform.step`."""
        specs = spread(self._specs, params)
        given = {"lr": lr, "grad_norm": grad_norm}
        # Arrays have to be arguments of the mapped function; numbers keep their bits outside of it.
        traced = {name: value for name, value in given.items() if is_traced(value)}
        known = {name: value for name, value in given.items() if name not in traced}
        decays = self._transform._decays(grads, params)  # by functions that see whole arrays

        def run(grads: Tree, state: State, params: Tree, traced: Any) -> tuple[Tree, State]:
            numbers = {**known, **traced, "specs": specs, "decays": decays}
            return self._transform._stepped(grads, state, params, **numbers)

        state_specs = self._state_specs(specs)
        inputs = (spread(self._specs, grads), state_specs, specs, PartitionSpec())
        mapped = self._mapped(run, inputs, (specs, state_specs))
        new_params, new_state = mapped(grads, state, params, traced)
        return in_order_of_arguments(ShardedTransform.step, new_params, new_state)
