"""The state of a transform, as a pytree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import jax

Array: TypeAlias = Any
Tree: TypeAlias = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What a transform keeps from step to step, and what it says of the last one.

    A pytree of arrays. All numbers live on the device: reading one outside of a traced function
    waits for the step, passing it on does not. Floats are float32, float64 where JAX has
    `jax_enable_x64`.

    Attributes:
        buffers: The state buffers by name (`velocity`, `exp_avg`, ...), each a tree like the
            parameters. They are attributes as well: `state.velocity`.
        step: Steps applied so far, int32. A schedule is called with it.
        skipped_steps: Steps that `on_nonfinite="skip"` or `skip_grad_norm` left out, int32.
        skipped: Whether the last step was one of these, bool.
        grad_norm: Norm of all gradients of the last step, after `rescale_grad`; -1 if nothing
            asked for it (`grad_clip_norm=inf` does, and clips nothing).
        clip_coef: The factor of its norm clip; the smallest if arrays are clipped each.
        lr: Its learning rate; before the first step that of the first one.
        leaf_steps: Steps applied to each array, int32 [arrays]: one without a gradient waits.
        leaf_products: Running product of each array, for rules that have one (`mu_product`), as
            the two uint32 halves of a float64, [arrays, 2].
    """

    buffers: dict[str, Tree]
    step: Array
    skipped_steps: Array
    skipped: Array
    grad_norm: Array
    clip_coef: Array
    lr: Array
    leaf_steps: Array
    leaf_products: Array

    def __getattr__(self, name: str) -> Tree:
        # Only called for what is no field. (`buffers` itself is missing while a copy is unpickled.)
        buffers = self.__dict__.get("buffers", {})
        if isinstance(buffers, dict) and name in buffers:  # a prefix of a state has anything there
            return buffers[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
