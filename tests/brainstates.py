"""Weights, gradients and runs for the tests of fusedstep.braintools, whose oracle is braintools."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from exact import Array

try:  # the marker leaves the tests out, by name
    brainstate = importlib.import_module("brainstate")
    theirs = importlib.import_module("braintools").optim
    jax = importlib.import_module("jax")
    ours = importlib.import_module("fusedstep.braintools")
except ImportError:
    brainstate = theirs = jax = ours = None

SHAPES = {"a": (7,), "b": (33, 5), "c": (1,), "d": (4099,), "e": ()}
STEPS = 14


@contextmanager
def precision(dtype: Any) -> Iterator[None]:
    """With JAX's x64 for float64."""
    with jax.enable_x64(np.dtype(dtype) == np.float64):
        yield


def values(seed: int, dtype: Any, scale: float = 1.0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {k: np.asarray(scale * rng.standard_normal(s), dtype) for k, s in SHAPES.items()}


def weights(dtype: Any = np.float32) -> dict[str, Any]:
    return {k: brainstate.ParamState(jax.numpy.asarray(v)) for k, v in values(1, dtype).items()}


def gradients(t: int, dtype: Any = np.float32) -> dict[str, Any]:
    """Their norm is about 64 times a scale that rises and falls, around what clips at 64 do."""
    return jax.tree.map(jax.numpy.asarray, values(100 + t, dtype, 1.0 + 0.5 * np.sin(t)))


def run(
    module: Any,
    make: Callable[[Any], Any],
    dtype: Any = np.float32,
    steps: int = STEPS,
    between: Callable[[Any, int], None] | None = None,
) -> list[dict[str, Array]]:
    """The weights after each step of an optimizer that `make` makes of a module's classes."""
    with precision(dtype):
        states, optimizer = weights(dtype), make(module)
        optimizer.register_trainable_weights(states)
        history = []
        for t in range(steps):
            optimizer.step(gradients(t, dtype))
            if between is not None:
                between(optimizer, t)
            history.append({k: np.asarray(v.value) for k, v in states.items()})
    return history


def assert_same(got: Sequence[Any], expected: Sequence[Any], rtol: float, atol: float) -> None:
    for t, (mine, oracle) in enumerate(zip(got, expected, strict=True)):
        for key in oracle:
            assert mine[key].dtype == oracle[key].dtype
            np.testing.assert_allclose(
                mine[key], oracle[key], rtol=rtol, atol=atol, err_msg=f"{key} after step {t}"
            )


def state(*numbers: float) -> Any:
    return brainstate.ParamState(array(*numbers))


def array(*numbers: float) -> Any:
    return jax.numpy.asarray(numbers, np.float32)
