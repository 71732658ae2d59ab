"""Lets `jax.jit(tx.step, donate_argnums=(1, 2))` work in place.

XLA gives the memory of donated arguments to results of the same size, in the order of both. The
state comes before the parameters among the arguments of `step`, and after them in what it returns:
each parameter would get the memory of a velocity, and four copies would put that right. So, where
JAX compiles `step` itself and no function around it, the results are handed to JAX in the order of
the arguments: as a tuple `(params, state)` whose leaves JAX finds in the other order.
"""

from __future__ import annotations

from typing import Any

import jax

from fusedstep.jax.state import State, Tree


class _StateFirst(tuple[Tree, State]):
    """`(params, state)`, whose leaves are those of `state` before those of `params`."""


def _rebuilt(_: None, children: tuple[State, Tree]) -> tuple[Tree, State]:
    """A plain tuple inside of another function that is traced, whose result it may become.

    Outside, JAX takes apart once more what it gets here, and must find the same order.
    """
    state, params = children
    result = (params, state)
    traced = isinstance(getattr(state, "step", None), jax.core.Tracer)
    return result if traced else _StateFirst(result)


jax.tree_util.register_pytree_node(
    _StateFirst, lambda result: ((result[1], result[0]), None), _rebuilt
)


def _is_compiled_itself(function: Any) -> bool:
    """Whether JAX traces just `function` for a `jit`. There is no public way to ask."""
    try:
        from jax._src.core import trace_ctx

        traced = trace_ctx.trace.frame.debug_info
        code = function.__code__
        place = f"{code.co_name} at {code.co_filename}:"
        return bool(traced.traced_for == "jit" and traced.func_src_info.startswith(place))
    except (ImportError, AttributeError):
        return False  # slower, and right


def in_order_of_arguments(function: Any, params: Tree, state: State) -> tuple[Tree, State]:
    """`(params, state)` as the result of `function(grads, state, params)`."""
    result = (params, state)
    return _StateFirst(result) if _is_compiled_itself(function) else result
