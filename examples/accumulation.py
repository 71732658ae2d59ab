"""A batch that does not fit: its gradients in parts, accumulated, make the step of the whole.

`accumulate` adds `scale * grads` into float32 buffers of the optimizer, here for float16
parameters. The last pass leaves the norm as well, so the step reads no gradient again; the norm
that it tells and the clip are those of the whole batch.

    python examples/accumulation.py [parts]
"""

from __future__ import annotations

import sys

import fusedstep as fs
import numpy as np

STEPS, ROWS, COLUMNS = 200, 4096, 64


def gradient(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of the mean square error of a linear model, as a float16 backward pass would leave it."""
    error = x @ w.astype(np.float32) - y
    return (2 / len(x) * (x.T @ error)).astype(np.float16)


def main(parts: int = 8) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    truth = rng.standard_normal(COLUMNS).astype(np.float32)
    y = x @ truth
    whole, parted = np.zeros(COLUMNS, np.float16), np.zeros(COLUMNS, np.float16)
    options = {"lr": 0.02, "momentum": 0.8, "grad_clip_norm": 4.0}
    one, several = fs.MomentumNesterov(whole, **options), fs.MomentumNesterov(parted, **options)
    for step in range(STEPS):
        expected = one.step(gradient(whole, x, y))
        for x_part, y_part in zip(np.split(x, parts), np.split(y, parts), strict=True):
            several.accumulate(gradient(parted, x_part, y_part), scale=1 / parts)
        result = several.step()
        if step in {0, 1, 10, STEPS - 1}:
            print(
                f"step {step + 1}: norm {result.grad_norm:.4f} of {parts} parts, "
                f"{expected.grad_norm:.4f} of the whole, clipped by {result.clip_coef:.3f}"
            )
    print(f"largest difference of the parameters: {np.max(np.abs(whole - parted)):.1e}")
    print(f"largest error: {np.max(np.abs(parted - truth)):.1e}; {several.steps} steps")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
