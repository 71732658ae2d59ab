"""Trains a small JAX network on handwritten digits twice: with `fusedstep.jax` and with optax.

The same start, the same batches, the same arithmetic up to rounding: the curves lie on each other.
Run `python examples/jax_digits.py [EPOCHS]`, or `make demo-jax`.
"""

from __future__ import annotations

import sys
from typing import Any

import fusedstep.jax as fj
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

BATCH, SIZES = 32, (64, 128, 10)
SCHEDULE = optax.cosine_decay_schedule(0.1, 1200)


def start() -> list[dict[str, Any]]:
    """A layer's weights and biases for each pair of sizes."""
    keys = jax.random.split(jax.random.key(0), len(SIZES) - 1)
    pairs = zip(keys, SIZES, SIZES[1:], strict=False)
    return [
        {"W": jax.random.normal(key, (n, m)) * np.sqrt(2 / n), "b": jnp.zeros(m)}
        for key, n, m in pairs
    ]


def logits(params: list[dict[str, Any]], x: Any) -> Any:
    hidden = jax.nn.relu(x @ params[0]["W"] + params[0]["b"])
    return hidden @ params[1]["W"] + params[1]["b"]


def loss(params: list[dict[str, Any]], x: Any, y: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


def train(init: Any, step: Any, x: Any, y: Any, epochs: int) -> tuple[Any, list[float]]:
    """The parameters, and the mean loss of each epoch."""

    def body(carry: Any, batch: Any) -> Any:
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, *batch)
        return step(grads, state, params), value

    epoch = jax.jit(lambda carry, batches: jax.lax.scan(body, carry, batches), donate_argnums=0)
    params, curve = start(), []
    carry = params, init(params)
    for order in np.random.default_rng(0).permuted(np.tile(np.arange(len(x)), (epochs, 1)), axis=1):
        rows = order[: len(x) // BATCH * BATCH].reshape(-1, BATCH)
        carry, values = epoch(carry, (x[rows], y[rows]))
        curve.append(float(values.mean()))
    return carry[0], curve


def draw(curves: dict[str, list[float]], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for (name, curve), style in zip(curves.items(), ("-", "--"), strict=True):
        axes.semilogy(range(1, len(curve) + 1), curve, style, label=name)
    axes.set(xlabel="epoch", ylabel="training loss", title="digits, Nesterov, cosine schedule")
    axes.legend()
    figure.savefig(path)


def main(epochs: int = 30) -> None:
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split((x / 16).astype(np.float32), y, random_state=0)
    tx = fj.nesterov(lr=SCHEDULE, momentum=0.9, weight_decay=1e-4, grad_clip_norm=2.0)
    clip, decay = optax.clip_by_global_norm(2.0), optax.add_decayed_weights(1e-4)
    chain = optax.chain(clip, decay, optax.sgd(SCHEDULE, momentum=0.9, nesterov=True))

    def by_optax(grads: Any, state: Any, params: Any) -> Any:
        updates, state = chain.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    curves = {}
    for name, init, step in (("fusedstep", tx.init, tx.step), ("optax", chain.init, by_optax)):
        params, curves[name] = train(init, step, x, y, epochs)
        right = float((logits(params, x_test).argmax(axis=1) == y_test).mean())
        print(f"{name}: loss {curves[name][-1]:.5f}, {100 * right:.1f}% of the test set right")
    difference = max(abs(a - b) for a, b in zip(*curves.values(), strict=True))
    print(f"largest difference of the losses: {difference:.1e}")
    draw(curves, "demo-jax.png")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
