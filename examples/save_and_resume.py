"""Save a run, resume it elsewhere, and get the bits of a run that was never interrupted.

The file holds parameters, state, step counts, `mu_product` and the schedule; it is written beside
the old one and takes its place when it is complete, so a killed process leaves one of the two.

    python examples/save_and_resume.py [steps before] [steps after]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import fusedstep as fs
import numpy as np

Params = dict[str, np.ndarray]


def make_run() -> tuple[Params, fs.NAdam]:
    """Random parameters: `load` puts those of the file in their place."""
    rng = np.random.default_rng()
    params = {"W": rng.standard_normal((8, 4), np.float32), "b": np.zeros(4, np.float32)}
    schedule = fs.StepLR(base_lr=0.02, step_size=10, gamma=0.5)
    return params, fs.NAdam(params, lr=schedule, weight_decay=1e-3, grad_clip_norm=1.0)


def train(params: Params, optimizer: fs.NAdam, first: int, last: int) -> None:
    for step in range(first, last):
        rng = np.random.default_rng(step)  # the batch of this step
        x = rng.standard_normal((32, 8), np.float32)
        error = np.tanh(x @ params["W"] + params["b"]) - x[:, :4]
        optimizer.step({"W": x.T @ error / 32, "b": error.mean(axis=0)})
        optimizer.lr_scheduler.step()


def main(before: int = 25, after: int = 25) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.npz"
        params, optimizer = make_run()
        train(params, optimizer, 0, before)
        optimizer.save(path)
        print(f"saved: {optimizer}")
        train(params, optimizer, before, before + after)

        resumed, again = make_run()
        again.load(path)
        print(f"loaded: {again}")
        train(resumed, again, before, before + after)
    same = all(np.array_equal(params[name], resumed[name]) for name in params)
    print(f"after {again.steps} steps, lr {again.lr:g}: {'the same bits' if same else 'DIFFERENT'}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
