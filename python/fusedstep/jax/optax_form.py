"""A transform as a gradient transformation of optax.

optax adds what an `update` returns to the parameters in a pass of its own, so the step cannot be
fused whole: it costs a copy of the parameters and that pass. Where memory traffic counts, use
`Transform.step`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from fusedstep.jax.state import Array, State, Tree

if TYPE_CHECKING:
    from fusedstep.jax.transform import Transform


def _difference(after: Array, before: Array) -> Array:
    """`after - before`, and 0 where nothing changed: the difference of infinities is NaN."""
    return jnp.where(after == before, jnp.zeros_like(after), after - before)


def gradient_transformation(transform: Transform) -> optax.GradientTransformationExtraArgs:
    """`new - old` as the update.

    Where no element changes by more than a factor of two, that difference is exact (Sterbenz), and
    `optax.apply_updates` gives the parameters of `step` to the bit; elsewhere to a rounding. XLA
    flushes a difference below 1.2e-38 to 0.
    """

    def update(
        updates: Tree, state: State, params: Tree | None = None, **extra_args: Any
    ) -> tuple[Tree, State]:
        del extra_args  # of other members of a chain
        if params is None:
            raise ValueError("params: update(grads, state, params) needs the parameters")
        new, state = transform.step(updates, state, params)
        return jax.tree.map(_difference, new, params), state

    return optax.GradientTransformationExtraArgs(transform.init, update)
