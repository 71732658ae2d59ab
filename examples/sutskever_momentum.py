"""Sutskever's momentum schedule against constant momenta on an ill-conditioned quadratic.

The momentum rises, 1 - 1/2, 1 - 1/4, 1 - 1/6, ... up to a largest one (Sutskever et al., 2013,
section 3.1, with 250 steps per stage). It ends far below what 0.9 reaches and never goes uphill;
the largest momentum from the start is quicker on this noiseless function, but rings. The optimizer
asks the schedule for mu_t and, for the look-ahead of Nesterov's form, for mu_(t+1).

    python examples/sutskever_momentum.py [steps]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise

import fusedstep as fs
import numpy as np

CURVATURE = np.logspace(0, -4, 50)  # f(x) = sum(curvature * x^2) / 2
Momentum = float | Callable[[int], float]


def descend(momentum: Momentum, steps: int) -> list[float]:
    """f after every step, from the same start."""
    x = np.ones(50)
    optimizer = fs.MomentumNesterov(x, lr=1.0, momentum=momentum)
    values = []
    for _ in range(steps):
        optimizer.step(CURVATURE * x)
        values.append(float(np.sum(CURVATURE * x * x) / 2))
    return values


def main(steps: int = 4000) -> None:
    # `.at` counts the optimizer's steps; the object itself would wait for its `step()`.
    schedule = fs.SutskeverMomentum(max_momentum=0.99, period=250).at
    momenta: dict[str, Momentum] = {"0.5": 0.5, "0.9": 0.9, "0.99": 0.99, "schedule": schedule}
    runs = {name: descend(momentum, steps) for name, momentum in momenta.items()}
    print(f"{'step':>6}" + "".join(f"{name:>12}" for name in runs))
    for t in range(steps // 8 - 1, steps, steps // 8):
        print(f"{t + 1:6}" + "".join(f"{values[t]:12.2e}" for values in runs.values()))
    rises = {name: sum(b > a for a, b in pairwise(values)) for name, values in runs.items()}
    print("uphill" + "".join(f"{count:12}" for count in rises.values()))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
