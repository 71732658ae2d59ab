"""Trains a small NumPy network on scikit-learn's handwritten digits with three optimizers.

`make demo` runs it. Every optimizer trains twice from the same start on the same batches: once with
fusedstep, once with the update written as a plain NumPy loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import fusedstep as fs
import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits

Array = NDArray[np.float32]
Params = dict[str, Array]
Update = Callable[[Params], object]
EndEpoch = Callable[[], object]

EPOCHS, BATCH, HIDDEN = 30, 32, 128
BASE_LR, LR_DECAY = 0.1, 0.95
WEIGHT_DECAY, CLIP_NORM = 1e-4, 2.0
MOMENTUM = 0.9
PICTURE = Path("demo.png")


# --- data and network -------------------------------------------------------------------------


@dataclass
class Digits:
    """1797 pictures of 8x8 pixels in [0, 1]; a quarter of them is kept for the test."""

    x: Array
    y: NDArray[np.int64]
    x_test: Array
    y_test: NDArray[np.int64]

    @classmethod
    def load(cls) -> Digits:
        x, y = load_digits(return_X_y=True)
        x, x_test, y, y_test = train_test_split(
            (x / 16).astype(np.float32), y, test_size=0.25, random_state=0, stratify=y
        )
        return cls(x, y, x_test, y_test)

    def batches(self, rng: np.random.Generator) -> Iterator[tuple[Array, NDArray[np.int64]]]:
        order = rng.permutation(len(self.x))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            rows = order[start : start + BATCH]
            yield self.x[rows], self.y[rows]


def init(rng: np.random.Generator) -> Params:
    """64 -> 128 -> 128 -> 10 with ReLU between."""
    sizes = (64, HIDDEN, HIDDEN, 10)
    params: Params = {}
    for i, (rows, columns) in enumerate(pairwise(sizes)):
        weight = rng.standard_normal((rows, columns)) * np.sqrt(2 / rows)
        params[f"W{i}"] = weight.astype(np.float32)
        params[f"b{i}"] = np.zeros(columns, np.float32)
    return params


def forward(params: Params, x: Array) -> list[Array]:
    """Activations of every layer; the last ones are the logits."""
    layers = [x]
    for i in range(3):
        z = layers[-1] @ params[f"W{i}"] + params[f"b{i}"]
        layers.append(np.maximum(z, 0) if i < 2 else z)
    return layers


def loss_and_grads(params: Params, x: Array, y: NDArray[np.int64]) -> tuple[float, Params]:
    """Mean cross entropy, and its gradients by back-propagation."""
    layers = forward(params, x)
    logits = layers[-1] - layers[-1].max(axis=1, keepdims=True)
    probabilities = np.exp(logits)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    rows = np.arange(len(y))
    loss = -float(np.log(probabilities[rows, y]).mean())

    delta = probabilities
    delta[rows, y] -= 1
    delta /= np.float32(len(y))
    grads: Params = {}
    for i in (2, 1, 0):
        grads[f"W{i}"] = layers[i].T @ delta
        grads[f"b{i}"] = delta.sum(axis=0)
        delta = (delta @ params[f"W{i}"].T) * (layers[i] > 0)
    return loss, grads


def accuracy(params: Params, data: Digits) -> float:
    return float((forward(params, data.x_test)[-1].argmax(axis=1) == data.y_test).mean())


# --- the two ways to update -------------------------------------------------------------------


def fused(params: Params, name: str) -> tuple[Update, EndEpoch]:
    """The update, and what ends an epoch."""
    lr = fs.ExponentialLR(base_lr=BASE_LR, gamma=LR_DECAY)
    options = {"weight_decay": WEIGHT_DECAY, "grad_clip_norm": CLIP_NORM}
    if name == "SGD":
        optimizer = fs.SGD(params, lr=lr, **options)
    elif name == "Momentum":
        optimizer = fs.Momentum(params, lr=lr, momentum=MOMENTUM, **options)
    else:
        optimizer = fs.MomentumNesterov(params, lr=lr, momentum=MOMENTUM, **options)
    return optimizer.step, optimizer.lr_scheduler.step


def plain(params: Params, name: str) -> tuple[Update, EndEpoch]:
    """The same in NumPy, as one would write it by hand."""
    velocity = {key: np.zeros_like(p) for key, p in params.items()}
    momentum = 0.0 if name == "SGD" else MOMENTUM
    lr = BASE_LR

    def update(grads: Params) -> None:
        norm = np.sqrt(sum(np.vdot(g, g) for g in grads.values()))
        scale = min(1.0, CLIP_NORM / norm)
        for key, p in params.items():
            g = scale * grads[key] + WEIGHT_DECAY * p
            v = velocity[key]
            v *= momentum
            v += g
            p -= lr * (g + momentum * v if name == "MomentumNesterov" else v)

    def end_epoch() -> None:
        nonlocal lr
        lr *= LR_DECAY

    return update, end_epoch


# --- training ---------------------------------------------------------------------------------


@dataclass
class Run:
    """What one training gave."""

    accuracy: float = 0.0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    update_seconds: list[float] = field(default_factory=list)

    @property
    def steps_per_second(self) -> float:
        return len(self.losses) / self.seconds

    @property
    def update_us(self) -> float:
        return 1e6 * float(np.median(self.update_seconds))


def train(
    data: Digits,
    name: str,
    make: Callable[[Params, str], tuple[Update, EndEpoch]],
    tick: Callable[[], object],
) -> Run:
    rng = np.random.default_rng(0)
    params = init(rng)
    update, end_epoch = make(params, name)
    run = Run()
    begin = time.perf_counter()
    for _ in range(EPOCHS):
        for x, y in data.batches(rng):
            loss, grads = loss_and_grads(params, x, y)
            before = time.perf_counter()
            update(grads)
            run.update_seconds.append(time.perf_counter() - before)
            run.losses.append(loss)
        end_epoch()
        tick()
    run.seconds = time.perf_counter() - begin
    run.accuracy = accuracy(params, data)
    return run


def show(console: Console, runs: dict[str, tuple[Run, Run]]) -> None:
    table = Table(title="scikit-learn digits, the same training by two ways to update")
    for column in ("optimizer", "update by"):
        table.add_column(column)
    for column in ("test accuracy", "steps/s", "us per update"):
        table.add_column(column, justify="right")
    for name, pair in runs.items():
        for way, run in zip(("fusedstep", "NumPy loop"), pair, strict=True):
            figures = f"{run.accuracy:.2%}", f"{run.steps_per_second:.0f}", f"{run.update_us:.1f}"
            table.add_row(name, way, *figures, end_section=way == "NumPy loop")
    console.print(table)


def draw(runs: dict[str, tuple[Run, Run]], path: Path) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, (ours, _) in runs.items():
        per_epoch = np.reshape(ours.losses, (EPOCHS, -1)).mean(axis=1)
        axes.semilogy(np.arange(1, EPOCHS + 1), per_epoch, label=name)
    axes.set(xlabel="epoch", ylabel="training loss", title="scikit-learn digits")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    console = Console()
    data = Digits.load()
    runs = {}
    # The matrices are too small for BLAS threads, which would only make the times jump.
    with Progress(console=console) as progress, threadpool_limits(1, user_api="blas"):
        for name in ("SGD", "Momentum", "MomentumNesterov"):
            task = progress.add_task(f"{name:16}", total=2 * EPOCHS)
            tick = partial(progress.advance, task)
            runs[name] = train(data, name, fused, tick), train(data, name, plain, tick)
    show(console, runs)
    draw(runs, PICTURE)
    console.print(f"loss curves: {PICTURE.resolve()}", soft_wrap=True)


if __name__ == "__main__":
    main()
