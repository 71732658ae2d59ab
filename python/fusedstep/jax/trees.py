"""Pytrees taken apart and checked; messages name the argument, the path and what was wrong."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fusedstep.jax.state import Array, Tree
from fusedstep.ranges import shown

# In the order of DType in csrc/core/types.hpp.
PARAM_DTYPES = ("float32", "float64", "float16", "bfloat16")


class Leaves(NamedTuple):
    """The arrays of `params`, in JAX's order."""

    arrays: list[Array]
    paths: list[Any]
    form: Any  # its treedef

    def spell(self, index: int) -> str:
        """The path of an array as weight decay functions get it: `layers.0.W`."""
        return str(jax.tree_util.keystr(self.paths[index], simple=True, separator="."))

    def place(self, argument: str, index: int) -> str:
        """The path of an array as messages show it: `params['layers'][0]['W']`."""
        return f"{argument}{jax.tree_util.keystr(self.paths[index])}"


def _described(value: object) -> str:
    dtype = getattr(value, "dtype", None)
    return f"dtype {dtype}" if dtype is not None else shown(value)


def _is_array(value: object) -> bool:
    return isinstance(value, (jax.Array, jax.ShapeDtypeStruct))


def _of_jax(value: Any) -> Any:
    """NumPy arrays as JAX takes them: without `jax_enable_x64`, float64 becomes float32."""
    return jnp.asarray(value) if isinstance(value, np.ndarray) else value


def leaves_of(params: Tree) -> Leaves:
    """Takes `params` apart; every leaf must be an array that can be updated."""
    found, form = jax.tree_util.tree_flatten_with_path(params)
    leaves = Leaves([_of_jax(leaf) for _, leaf in found], [path for path, _ in found], form)
    for index, leaf in enumerate(leaves.arrays):
        if not _is_array(leaf) or str(leaf.dtype) not in PARAM_DTYPES:
            raise TypeError(
                f"{leaves.place('params', index)}: expected an array of float32, float64, float16 "
                f"or bfloat16, got {_described(leaf)}; leave it out (None in its place) if it is "
                "not to be trained"
            )
    return leaves


def matched(leaves: Leaves, argument: str, tree: Tree) -> list[Any]:
    """What `tree` has in the places of the arrays of `params`."""
    try:
        return [_of_jax(node) for node in leaves.form.flatten_up_to(tree)]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{argument}: not the tree of params: {error}") from None


def _is_missing(grad: Any) -> bool:
    """None, or a node of a library that stands for it (optax.MaskedNode); no empty container."""
    plain = type(grad) is tuple or isinstance(grad, (list, dict))
    return grad is None or (not plain and not jax.tree.leaves(grad))


def gradients_of(leaves: Leaves, grads: Tree) -> list[Array | None]:
    """The gradient of each array; None where there is none."""
    found: list[Array | None] = []
    for index, grad in enumerate(matched(leaves, "grads", grads)):
        if _is_missing(grad):
            found.append(None)
            continue
        place, param = leaves.place("grads", index), leaves.arrays[index]
        if not _is_array(grad) or not jnp.issubdtype(grad.dtype, jnp.floating):
            raise TypeError(
                f"{place}: expected an array of a floating-point dtype, got {_described(grad)}"
            )
        if grad.shape != param.shape:
            raise ValueError(
                f"{place}: expected shape {param.shape} like "
                f"{leaves.place('params', index)}, got {grad.shape}"
            )
        # The kernels read these of any parameter; the rare ones are converted by XLA.
        found.append(grad if str(grad.dtype) in PARAM_DTYPES else grad.astype(jnp.float32))
    return found


def state_dtype(param: Array) -> Any:
    """The dtype of the buffers that are made for a parameter."""
    return jnp.float64 if str(param.dtype) == "float64" else jnp.float32


def buffers_of(leaves: Leaves, slot: str, tree: Tree) -> list[Array]:
    """The buffers of one slot."""
    found = matched(leaves, f"state.{slot}", tree)
    for index, (buffer, param) in enumerate(zip(found, leaves.arrays, strict=True)):
        place = leaves.place(f"state.{slot}", index)
        if not _is_array(buffer) or buffer.shape != param.shape:
            got = getattr(buffer, "shape", None) or shown(buffer)
            raise ValueError(f"{place}: expected an array of shape {param.shape}, got {got}")
        own, dtype = str(param.dtype), str(buffer.dtype)
        allowed = {"float32", "float16", "bfloat16"} if own == "float32" else {own}
        if dtype not in allowed | ({"float32"} if own != "float64" else set()):
            raise TypeError(
                f"{place}: a state of dtype {dtype} does not go with parameters of {own}"
            )
    return found
