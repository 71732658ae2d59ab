"""Docstrings of the transforms, from the declarations and docstrings of the classes."""

from __future__ import annotations

from fusedstep.base import Optimizer
from fusedstep.docs import sections, wrapped
from fusedstep.hyperparameters import Hyperparameter

# What an argument means here, where that is not what it means in the class.
_HERE = {
    "lr": "Learning rate, >= 0. A number; an array of one; or a function of the number of steps "
    "applied so far (int32, traced), as optax's schedules are.",
    "momentum": "Share of the velocity that a step keeps, in [0, 1), dimensionless. A number; an "
    "array of one; or a function of the number of steps applied so far, whose next value is the "
    "look-ahead of Nesterov's form.",
    "betas": "Decay rates of the averages of the gradient and of its square, each in [0, 1): a "
    "pair of numbers or arrays of one. The first, a momentum, may be a function of the number of "
    "steps applied so far.",
    "weight_decay": "Decay coefficient, >= 0, added to the gradient after clipping (L2). Or a "
    "function `(path, array) -> float`, evaluated for each array when a program is compiled.",
    "grad_clip_scope": 'Whose norm `grad_clip_norm` limits: of "all" gradients together, or of '
    'each "array". `state.grad_norm` is that of all gradients in any case.',
    "on_nonfinite": "What a step does whose gradients hold inf or NaN: compute with them "
    '("propagate"), or leave everything as it was ("skip"), which the device decides.',
}

_TRANSFORM = """\
`{class_name}` for JAX: a transform of pytrees.

{formula}Args:
{hypers}

    Every number may be an array of one element, whose value only the device knows; its range
    is not checked then.

Returns:
    Transform: `init(params)`, `step(grads, state, params)`, `sharded(mesh, specs)`, `optax()`.

Raises:
    TypeError: If an argument is of a wrong kind; the message names it and what it was.
    ValueError: If a number is out of range, or an option has no meaning in a compiled program.

Numerics:
    The bits of `fusedstep.{class_name}` for the same numbers. Python's numbers are exact
    float64 constants, arrays are widened exactly. Denormals are kept, which XLA flushes.

Example:
    >>> import jax, jax.numpy as jnp, fusedstep.jax as fj
    >>> tx = fj.{name}(lr=0.1)
    >>> params = {{"w": jnp.ones(2)}}
    >>> state = tx.init(params)
    >>> step = jax.jit(tx.step, donate_argnums=(1, 2))
    >>> params, state = step({{"w": jnp.ones(2)}}, state, params)
    >>> int(state.step), round(float(state.lr), 6)
    (1, 0.1)
"""


def name_of(kind: type[Optimizer]) -> str:
    """`nesterov`, of the class whose function is `fused_nesterov_step`."""
    return kind.declaration.function.removeprefix("fused_").removesuffix("_step")


def _argument(hyper: Hyperparameter) -> str:
    return wrapped(f"{hyper.name}: {_HERE.get(hyper.name, hyper.doc)}", "    ")


def docstring(kind: type[Optimizer]) -> str:
    """What a transform's constructor says of itself."""
    text = sections(kind.__doc__ or "")
    formula = text[""].partition(".. math::")[2].strip("\n")
    references = text.get("References", "").rstrip()
    return _TRANSFORM.format(
        class_name=kind.declaration.class_name,
        name=name_of(kind),
        formula=f".. math::\n{formula}\n\n" if formula else "",
        hypers="\n".join(map(_argument, kind.declaration.hypers)),
    ) + (f"\nReferences:\n{references}\n" if references else "")
