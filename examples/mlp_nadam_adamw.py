"""A NumPy network on two spirals: NAdam and AdamW side by side, each with a schedule and a clip.

Parameters and gradients are dicts of plain arrays; a step is one call. The biases do not decay.

    python examples/mlp_nadam_adamw.py [epochs]
"""

from __future__ import annotations

import math
import sys
from itertools import pairwise

import fusedstep as fs
import numpy as np

Params = dict[str, np.ndarray]
WIDTHS = (2, 32, 32, 1)


def spirals(points: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two arms in the plane; which of them a point is in, as 0 or 1."""
    arm = np.repeat(np.float32([0, 1]), points // 2)
    angle = np.tile(np.linspace(0.5, 2.5 * math.pi, points // 2), 2)
    x = angle / 8 * np.stack([np.cos(angle + math.pi * arm), np.sin(angle + math.pi * arm)])
    return (x.T + 0.02 * rng.standard_normal((points, 2))).astype(np.float32), arm[:, None]


def make_params(rng: np.random.Generator) -> Params:
    params = {}
    for k, shape in enumerate(pairwise(WIDTHS)):
        params[f"W{k}"] = rng.standard_normal(shape, np.float32) / math.sqrt(shape[0])
        params[f"b{k}"] = np.zeros(shape[1], np.float32)
    return params


def loss_and_grads(params: Params, x: np.ndarray, y: np.ndarray) -> tuple[float, float, Params]:
    """Mean cross entropy, share of right answers, gradients."""
    layers = [x]
    for k in range(2):
        layers.append(np.tanh(layers[-1] @ params[f"W{k}"] + params[f"b{k}"]))
    logits = layers[-1] @ params["W2"] + params["b2"]
    loss = float(np.mean(np.logaddexp(0, logits) - y * logits))
    grads, delta = {}, (1 / (1 + np.exp(-logits)) - y) / len(x)
    for k in (2, 1, 0):
        grads[f"W{k}"], grads[f"b{k}"] = layers[k].T @ delta, delta.sum(axis=0)
        delta = (delta @ params[f"W{k}"].T) * (1 - layers[k] ** 2)
    return loss, float(np.mean((logits > 0) == (y > 0.5))), grads


def make_optimizers(runs: dict[str, Params], epochs: int) -> dict[str, fs.Optimizer]:
    options = {
        "lr": lambda step: 0.01 * (1 + math.cos(math.pi * step / epochs)),
        "weight_decay": lambda path, _: 0.0 if path.startswith("b") else 0.01,
    }
    return {
        "NAdam": fs.NAdam(runs["NAdam"], lr=fs.ExponentialLR(0.02, 0.998), grad_clip_norm=1.0),
        "AdamW": fs.AdamW(runs["AdamW"], grad_clip_norm=1.0, **options),
    }


def main(epochs: int = 400) -> None:
    x, y = spirals(400, np.random.default_rng(0))
    runs = {name: make_params(np.random.default_rng(1)) for name in ("NAdam", "AdamW")}
    optimizers = make_optimizers(runs, epochs)
    for epoch in range(epochs):
        told = f"epoch {epoch:4}"
        for name, optimizer in optimizers.items():
            loss, _, grads = loss_and_grads(runs[name], x, y)
            told += f"    {name} loss {loss:.4f}, lr {optimizer.lr:.5f}"
            optimizer.step(grads)
            optimizer.lr_scheduler.step()
        if epoch % max(1, epochs // 8) == 0:
            print(told)
    for name, params in runs.items():
        print("{}: loss {:.4f}, {:.1%} right".format(name, *loss_and_grads(params, x, y)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
