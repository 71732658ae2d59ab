"""Draws the curve of every schedule for the page `schedules.md`.

python docs/schedule_curves.py [FOLDER]
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import fusedstep as fs

GENERATED = Path(__file__).resolve().parent / "generated"

# Readable on a light and on a dark page.
LINE, FRAME = "#3d85c6", "#808080"


class Curve(NamedTuple):
    """What a picture shows."""

    schedule: Any
    title: str
    steps: int


_WARMUP = fs.LinearLR(1.0, start_factor=0.1, total_iters=10)

CURVES = [
    Curve(fs.ConstantLR(1.0, factor=0.5, total_iters=10), "factor=0.5, total_iters=10", 30),
    Curve(fs.StepLR(1.0, step_size=10, gamma=0.5), "step_size=10, gamma=0.5", 50),
    Curve(fs.MultiStepLR(1.0, [15, 25, 40], 0.5), "milestones=(15, 25, 40), gamma=0.5", 50),
    Curve(
        fs.PiecewiseConstantSchedule([10, 20, 40], [0.2, 1.0, 0.5, 0.1]),
        "boundaries=(10, 20, 40), values=(0.2, 1, 0.5, 0.1)",
        50,
    ),
    Curve(fs.ExponentialLR(1.0, gamma=0.9), "gamma=0.9", 50),
    Curve(
        fs.ExponentialDecayLR(1.0, 10, 0.5, transition_begin=10, end_value=0.2),
        "decay_steps=10, decay_rate=0.5, transition_begin=10, end_value=0.2",
        50,
    ),
    Curve(fs.InverseTimeDecayLR(1.0, decay_rate=0.1), "decay_rate=0.1", 50),
    Curve(fs.LinearLR(1.0, 0.2, total_iters=20), "start_factor=0.2, total_iters=20", 50),
    Curve(fs.PolynomialLR(1.0, total_iters=40, power=2.0), "total_iters=40, power=2", 50),
    Curve(fs.CosineAnnealingLR(1.0, T_max=40), "T_max=40", 100),
    Curve(fs.CosineAnnealingWarmRestarts(1.0, T_0=10, T_mult=2), "T_0=10, T_mult=2", 70),
    Curve(
        fs.WarmupCosineSchedule(1.0, warmup_steps=10, total_steps=80),
        "warmup_steps=10, total_steps=80",
        100,
    ),
    Curve(fs.WarmupScheduler(1.0, warmup_epochs=10), "warmup_epochs=10", 30),
    Curve(fs.OneCycleLR(1.0, total_steps=100), "max_lr=1, total_steps=100", 110),
    Curve(
        fs.CyclicLR(0.1, 1.0, step_size_up=10, mode="triangular2"),
        'base_lr=0.1, max_lr=1, step_size_up=10, mode="triangular2"',
        80,
    ),
    Curve(
        fs.ReduceLROnPlateau(1.0, factor=0.5, patience=3),
        "factor=0.5, patience=3, on a loss that levels off",
        50,
    ),
    Curve(
        fs.SequentialLR([_WARMUP, fs.ExponentialLR(1.0, 0.9)], [10]),
        "LinearLR, then ExponentialLR from 10 on",
        50,
    ),
    Curve(fs.ChainedScheduler([_WARMUP, fs.StepLR(1.0, 15, 0.5)]), "LinearLR times StepLR", 50),
    Curve(
        fs.LambdaLR(1.0, lambda t: min((t + 1) / 10, math.sqrt(10 / (t + 1)))),
        "min((t + 1) / 10, sqrt(10 / (t + 1)))",
        100,
    ),
    Curve(fs.SutskeverMomentum(0.99, period=250), "max_momentum=0.99, period=250", 3000),
    Curve(fs.NesterovMomentum(), "", 50),
    Curve(fs.OneCycleMomentum(total_steps=100), "total_steps=100", 110),
    Curve(fs.CyclicMomentum(step_size_up=10), "step_size_up=10", 80),
    Curve(fs.LinearMomentum(0.5, 0.99, total_iters=40), "start=0.5, end=0.99, total_iters=40", 50),
]


def values(curve: Curve) -> list[float]:
    """The value of each step."""
    schedule = curve.schedule.copied()
    if not isinstance(schedule, fs.ReduceLROnPlateau):
        return [schedule.at(t) for t in range(curve.steps)]
    found = []
    for t in range(curve.steps):
        found.append(schedule.current_lr)
        schedule.step(max(1.0 / (1 + t), 0.1))
    return found


def draw(folder: Path | str = GENERATED) -> list[Path]:
    """Writes `<ClassName>.svg` for every schedule and returns the paths."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")  # pictures are made anew, never committed
    written = []
    # The same bytes for the same curves: no date, no random identifiers, and text as text.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fusedstep", "font.size": 9}):
        for curve in CURVES:
            figure = Figure(figsize=(5.2, 2.0), layout="constrained")
            _plot(figure.add_subplot(), curve)
            path = folder / f"{type(curve.schedule).__name__}.svg"
            figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
            written.append(path)
    return written


def _plot(axes: Any, curve: Curve) -> None:
    heights = values(curve)
    dotted = len(heights) <= 120  # single steps can be told apart
    axes.plot(heights, color=LINE, linewidth=1.2, marker="." if dotted else "", markersize=3)
    axes.set_title(curve.title, color=FRAME, fontsize=9)
    momentum = isinstance(curve.schedule, fs.MomentumSchedule)
    axes.set_xlabel("t", color=FRAME)
    axes.set_ylabel("momentum" if momentum else "lr", color=FRAME)
    if not momentum:  # momenta differ little from each other
        axes.set_ylim(0.0, 1.05 * max(heights))
    axes.tick_params(colors=FRAME)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(FRAME)


if __name__ == "__main__":
    for picture in draw(*sys.argv[1:2]):
        print(picture)
