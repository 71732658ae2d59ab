"""The native form of an optimizer for JAX: pure functions of pytrees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from fusedstep.jax import calls
from fusedstep.jax.donation import in_order_of_arguments
from fusedstep.jax.options import Options, given_norm_operand
from fusedstep.jax.sharding import ShardedTransform, axes_of, check_specs, measure
from fusedstep.jax.state import Array, State, Tree
from fusedstep.jax.trees import Leaves, buffers_of, gradients_of, leaves_of, state_dtype

if TYPE_CHECKING:
    import optax


class Transform:
    """An optimizer for JAX; made by `sgd`, `momentum`, `nesterov`, `nadam`, `adam`, ...

    It holds hyper-parameters and nothing else; what changes is in the state that goes in and comes
    out. Both functions can be traced: `jit`, `lax.scan`, `vmap`, `shard_map`.

    Example:
        >>> import jax, jax.numpy as jnp, fusedstep.jax as fj
        >>> tx = fj.nesterov(lr=0.5, momentum=0.5, grad_clip_norm=2.5)
        >>> params = {"w": jnp.ones(2)}
        >>> state = tx.init(params)
        >>> step = jax.jit(tx.step, donate_argnums=(1, 2))
        >>> params, state = step({"w": jnp.array([3.0, 4.0])}, state, params)
        >>> params["w"].tolist(), float(state.grad_norm)
        ([-0.125, -0.5], 5.0)
    """

    def __init__(self, name: str, options: Options) -> None:
        self._name = name
        self._options = options

    def __repr__(self) -> str:
        return f"<fusedstep.jax transform {self._name}>"

    @property
    def options(self) -> Options:
        """The hyper-parameters."""
        return self._options

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the state buffers."""
        return self._options.slots

    def init(self, params: Tree) -> State:
        """The state before the first step.

        Args:
            params: A pytree of arrays of float32, float64, float16 or bfloat16; None leaves (and
                whole nodes without arrays, as `optax.masked` makes them) are left out.

        Returns:
            State: Buffers of zeros, float32 (float64 for float64 parameters), one per array.

        Raises:
            TypeError: If a leaf is no array of these dtypes; the message has its path.
        """
        leaves = leaves_of(params)
        zeros = [jnp.zeros_like(p, dtype=state_dtype(p)) for p in leaves.arrays]
        buffers = {
            # Each slot has arrays of its own: one that is donated twice would be refused.
            slot: leaves.form.unflatten([jnp.copy(z) if k else z for z in zeros])
            for k, slot in enumerate(self.slots)
        }
        count = len(leaves.arrays)
        ones = np.tile(calls.halves([1.0]), (count if self._options.has_product else 0, 1))
        real = jax.dtypes.canonicalize_dtype(np.float64)
        return State(
            buffers=buffers,
            step=jnp.zeros((), jnp.int32),
            skipped_steps=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.bool_),
            grad_norm=jnp.full((), -1.0, real),
            clip_coef=jnp.ones((), real),
            lr=jnp.array(self._options.first_lr(), real).reshape(()),
            leaf_steps=jnp.zeros(count, jnp.int32),
            leaf_products=jnp.asarray(ones, jnp.uint32),
        )

    def step(
        self,
        grads: Tree,
        state: State,
        params: Tree,
        *,
        lr: Any = None,
        grad_norm: Any = None,
        specs: Tree | None = None,
    ) -> tuple[Tree, State]:
        """New parameters and state; nothing is changed in place unless it is donated.

        Args:
            grads: The gradients: the tree of `params`, of any floating-point dtypes. None leaves
                its parameter, and that one's buffers and step count, alone.
            state: From `init`, or from the step before.
            params: The parameters.
            lr: The learning rate of this step, instead of that of the constructor: a number or an
                array of one. Another value compiles nothing anew if it is an argument of the
                compiled function.
            grad_norm: The norm of all gradients before `rescale_grad`, if it is known already.
            specs: Inside of `shard_map`, how `params` are split: a PartitionSpec (None: each
                device has all of it) for each array, or for the parts of a prefix of their tree.
                The norm is then that of all shards. `sharded` does all of this. jax 0.7 needs
                `check_vma=False` for a `shard_map` of your own.

        Returns:
            tuple: `(params, state)`, of the same types: a valid carry of `lax.scan`. With
            `jax.jit(tx.step, donate_argnums=(1, 2))` they are in the memory of those that came in.
            That result is a pytree node of its own: `out_shardings` of two trees needs a function
            of your own around `step`, as in the documentation.

        Raises:
            TypeError: If an array is of a dtype that does not belong there.
            ValueError: If trees or shapes disagree. Messages have the path.
        """
        stepped = self._stepped(grads, state, params, lr, grad_norm, specs)
        return in_order_of_arguments(Transform.step, *stepped)

    def _decays(self, grads: Tree, params: Tree) -> NDArray[np.float64]:
        """The weight decay of each array with a gradient, if a function tells it."""
        leaves = leaves_of(params)
        return self._options.decays(leaves, _present(gradients_of(leaves, grads)))

    def _stepped(
        self,
        grads: Tree,
        state: State,
        params: Tree,
        lr: Any,
        grad_norm: Any,
        specs: Tree | None,
        decays: NDArray[np.float64] | None = None,
    ) -> tuple[Tree, State]:
        """What `step` returns; `decays` are those of whole arrays where `params` are shards."""
        leaves = leaves_of(params)
        gradients = gradients_of(leaves, grads)
        buffers = [buffers_of(leaves, slot, _slot(state, slot)) for slot in self.slots]
        _check_count(state, leaves, self._options.has_product)
        present = _present(gradients)
        settings = self._options.at(state.step, lr)
        measured = self._measure(leaves, gradients, grad_norm, specs)
        counts = (state.leaf_steps, state.leaf_products)
        settled = calls.settle(settings, *counts, present, measured, self._options.judge)
        batch = calls.Batch(
            present,
            [leaves.arrays[i] for i in present],
            [gradients[i] for i in present],
            [[slot[i] for i in present] for slot in buffers],
            self._options.decays(leaves, present) if decays is None else decays,
        )
        position = self._options.decay_position
        updated = calls.update(settings, settled, *counts, batch, position, measured.per_array)
        new_params, *trees = (
            leaves.form.unflatten(_replaced(old, present, new))
            for old, new in zip([leaves.arrays, *buffers], [updated[0], *updated[1]], strict=True)
        )
        return new_params, _state_after(state, settled, dict(zip(self.slots, trees, strict=True)))

    def _measure(
        self, leaves: Leaves, grads: list[Array | None], grad_norm: Any, specs: Tree | None
    ) -> calls.Measured:
        """The norms of this step, as far as anything asks for them."""
        if isinstance(grad_norm, calls.Measured):  # by who steps several transforms together
            return grad_norm
        given = given_norm_operand(grad_norm)
        per_array = self._options.grad_clip_scope == "array" and self._options.measures
        if given is not None and per_array:
            raise ValueError('grad_norm: one norm for all does not go with grad_clip_scope="array"')
        wanted = self._options.judge or (self._options.measures and given is None)
        if not wanted:
            return calls.Measured([], [], per_array, given)
        check_specs(specs)
        parts, order = measure(leaves, grads, axes_of(leaves, specs), per_array)
        return calls.Measured(parts, order, per_array, given)

    def sharded(self, mesh: Any, specs: Tree) -> ShardedTransform:
        """The transform for arrays that are spread over a mesh of devices.

        XLA does not know how to split a call into foreign code: a plain `jit` of `step` would
        gather every array on every device. This one runs in `shard_map`: each device updates its
        shards, and the devices exchange one number each if a norm is wanted.

        Args:
            mesh: The `jax.sharding.Mesh`.
            specs: A PartitionSpec for each array of `params`, or for the parts of a prefix of their
                tree; `PartitionSpec()` for all is data parallel training.

        Returns:
            ShardedTransform: With `init(params)` and `step(grads, state, params)`. Gradients are
            those of the whole batch: from `jax.grad` under `jit`, or averaged over devices. A
            `weight_decay` that is a function gets whole arrays.

        Numerics:
            Shards are cut differently from whole arrays, so a norm over them agrees to 1e-14
            relative; where nothing is split it has the same bits.
        """
        check_specs(specs)
        return ShardedTransform(self, mesh, specs)

    def optax(self) -> optax.GradientTransformationExtraArgs:
        """The transform as optax has them; see `fusedstep.jax.optax_form`."""
        from fusedstep.jax.optax_form import gradient_transformation

        return gradient_transformation(self)


def _present(grads: list[Array | None]) -> list[int]:
    return [index for index, grad in enumerate(grads) if grad is not None]


def _slot(state: State, slot: str) -> Tree:
    if not isinstance(state, State):
        raise TypeError(f"state: expected what init returned, got {type(state).__name__}")
    if slot not in state.buffers:
        raise ValueError(f"state: has no buffers {slot!r}; it is from another transform's init")
    return state.buffers[slot]


def _check_count(state: State, leaves: Leaves, has_product: bool) -> None:
    count = len(leaves.arrays)
    if state.leaf_steps.shape != (count,):
        raise ValueError(
            f"state: it counts the steps of {state.leaf_steps.shape[0]} arrays, params has {count}"
        )
    if state.leaf_products.shape != (count if has_product else 0, 2):
        raise ValueError("state: has other running products; it is from another transform's init")


def _replaced(old: list[Array], present: list[int], new: list[Array]) -> list[Array]:
    replaced = list(old)
    for index, array in zip(present, new, strict=True):
        replaced[index] = array
    return replaced


def _state_after(state: State, settled: calls.Settled, buffers: dict[str, Tree]) -> State:
    skipped = settled.skipped.astype(jnp.int32)
    return State(
        buffers=buffers,
        step=state.step + (1 - skipped),
        skipped_steps=state.skipped_steps + skipped,
        skipped=settled.skipped,
        grad_norm=settled.norm,
        clip_coef=settled.clip_coef,
        lr=settled.lr,
        leaf_steps=settled.leaf_steps,
        leaf_products=settled.leaf_products,
    )
