"""Optimizer steps for JAX: the compiled kernels as XLA calls, on pytrees, under any transform.

Importing it registers the handlers with XLA; it raises ImportError, and leaves JAX alone, where
they could not run.
"""

from __future__ import annotations

from fusedstep.jax.runtime import register

register()  # before anything below can be called

from fusedstep.jax.constructors import (  # noqa: E402
    adam,
    adamw,
    momentum,
    nadam,
    nesterov,
    rmsprop,
    sgd,
)
from fusedstep.jax.sharding import ShardedTransform  # noqa: E402
from fusedstep.jax.state import State  # noqa: E402
from fusedstep.jax.transform import Transform  # noqa: E402

__all__ = [
    "ShardedTransform",
    "State",
    "Transform",
    "adam",
    "adamw",
    "momentum",
    "nadam",
    "nesterov",
    "rmsprop",
    "sgd",
]
