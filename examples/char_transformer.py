"""Trains a small character-level transformer with torch.optim and with fusedstep.torch.

`make demo-torch` runs it. The text is the reference part of Python's own `help()`. For each of
three optimizers two equal models are trained side by side on the same batches: one with torch's
optimizer and `clip_grad_norm_`, one with ours, which clips inside its step. It prints how far the
two loss curves are apart and what a step costs, and draws both.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
from fusedstep import torch as optim
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

CLIP_NORM = 1.0
WAYS = ("torch", "fusedstep")
COLOURS = ("#f4b183", "#1f4e9c")
PICTURE = Path("demo-torch.png")


# --- text and model ---------------------------------------------------------------------------


class Text:
    """Characters as numbers, and random batches of them."""

    def __init__(self) -> None:
        text = "\n".join(topics.values())
        self.alphabet = sorted(set(text))
        index = {character: k for k, character in enumerate(self.alphabet)}
        self.codes = torch.tensor([index[character] for character in text])

    def batch(self, size: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and targets, which are the inputs shifted by one."""
        starts = torch.randint(len(self.codes) - context, (size, 1), generator=generator)
        rows = self.codes[starts + torch.arange(context + 1)]
        return rows[:, :-1], rows[:, 1:]

    def decode(self, codes: Tensor) -> str:
        return "".join(self.alphabet[k] for k in codes.tolist())


class Block(nn.Module):
    """Causal self-attention and a feed-forward network, each normalised first and added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """The next character, given those before it."""

    def __init__(self, n_characters: int, size: Size) -> None:
        super().__init__()
        self.context = size.context
        self.token = nn.Embedding(n_characters, size.width)
        self.place = nn.Embedding(size.context, size.width)
        self.blocks = nn.Sequential(*(Block(size.width, size.heads) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, n_characters, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        self.head.weight = self.token.weight  # tied

    def forward(self, codes: Tensor) -> Tensor:
        x = self.token(codes) + self.place.weight[: codes.shape[1]]
        return self.head(self.norm(self.blocks(x)))

    def loss(self, codes: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self(codes).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def write(self, codes: Tensor, length: int, generator: torch.Generator) -> Tensor:
        """Goes on from `codes`, one sampled character after the other."""
        for _ in range(length):
            logits = self(codes[None, -self.context :])[0, -1]
            new = torch.multinomial((logits / 0.7).softmax(0), 1, generator=generator)
            codes = torch.cat([codes, new])
        return codes


@dataclass(frozen=True)
class Size:
    """How large model and batches are."""

    layers: int = 2
    width: int = 128
    heads: int = 4
    context: int = 32
    batch: int = 16


# --- the two ways to update -------------------------------------------------------------------


class Kind(NamedTuple):
    """One optimizer in both libraries. Where torch has a fused form on the CPU, that is used."""

    lr: float
    options: dict[str, Any]
    theirs: type[torch.optim.Optimizer]
    ours: type[optim.Optimizer]


OPTIMIZERS = {
    "AdamW": Kind(3e-3, {"weight_decay": 0.1, "fused": True}, torch.optim.AdamW, optim.AdamW),
    "NAdam": Kind(2e-3, {}, torch.optim.NAdam, optim.NAdam),
    "Nesterov": Kind(
        0.2, {"momentum": 0.9, "nesterov": True, "fused": True}, torch.optim.SGD, optim.SGD
    ),
}


def by_torch(model: nn.Module, name: str) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
    """torch's optimizer, and its step with the clip before it."""
    kind = OPTIMIZERS[name]
    optimizer = kind.theirs(model.parameters(), lr=kind.lr, **kind.options)

    def step() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()

    return optimizer, step


def by_fusedstep(model: nn.Module, name: str) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
    """Our optimizer, and its step."""
    kind = OPTIMIZERS[name]
    options = {"lr": kind.lr, "grad_clip_norm": CLIP_NORM, **kind.options}
    optimizer = kind.ours(model.parameters(), **options)
    return optimizer, lambda: optimizer.step()  # looked up when called: schedulers replace `step`


# --- training ---------------------------------------------------------------------------------


@dataclass
class Run:
    """One model in training."""

    model: Transformer
    optimizer: torch.optim.Optimizer
    step: Callable[[], None]
    scheduler: torch.optim.lr_scheduler.OneCycleLR
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def make(cls, model: Transformer, way: str, name: str, steps: int) -> Run:
        make = by_torch if way == "torch" else by_fusedstep
        optimizer, step = make(model, name)
        # One scheduler for both; it drives the momentum (`betas`, `momentum`), too.
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=OPTIMIZERS[name].lr, total_steps=steps + 1, pct_start=0.2
        )
        return cls(model, optimizer, step, scheduler)

    def train(self, codes: Tensor, targets: Tensor) -> None:
        """One step on one batch."""
        self.optimizer.zero_grad()
        loss = self.model.loss(codes, targets)
        loss.backward()
        begin = time.perf_counter()
        self.step()
        self.seconds.append(time.perf_counter() - begin)
        self.scheduler.step()
        self.losses.append(loss.item())

    @property
    def step_ms(self) -> Tensor:
        """Quartiles of the time of a step; the first steps, which make the state, are left out."""
        times = torch.tensor(self.seconds[min(5, len(self.seconds) // 2) :])
        return 1e3 * times.quantile(torch.tensor([0.25, 0.5, 0.75]))


def compare(
    text: Text, size: Size, name: str, steps: int, tick: Callable[..., object]
) -> list[Run]:
    """Trains two equal models side by side, so that what slows the machine slows both."""
    torch.manual_seed(0)
    model = Transformer(len(text.alphabet), size)
    runs = [Run.make(copy.deepcopy(model), way, name, steps) for way in WAYS]
    generator = torch.Generator().manual_seed(1)
    for k in range(steps):
        batch = text.batch(size.batch, size.context, generator)
        for run in runs if k % 2 else reversed(runs):
            run.train(*batch)
        tick(loss=runs[1].losses[-1])
    return runs


# --- results ----------------------------------------------------------------------------------


def mean_of_last(losses: list[float]) -> float:
    """A batch is small, and its loss jumps."""
    last = losses[-20:]
    return sum(last) / len(last)


def apart(runs: list[Run]) -> Tensor:
    """How far the two losses are apart, at every step."""
    theirs, ours = (torch.tensor(run.losses, dtype=torch.float64) for run in runs)
    return (theirs - ours).abs()


def show(console: Console, results: dict[str, list[Run]]) -> None:
    table = Table(title="clip and optimizer step, median ms")
    table.add_column("optimizer")
    for column in ("clip_grad_norm_ and torch", "fusedstep", "ratio"):
        table.add_column(column, justify="right")
    for name, runs in results.items():
        theirs, ours = (run.step_ms[1].item() for run in runs)
        form = " (fused)" if "fused" in OPTIMIZERS[name].options else ""
        table.add_row(name, f"{theirs:.2f}{form}", f"{ours:.2f}", f"{theirs / ours:.2f}")
    console.print(table)
    for name, runs in results.items():
        difference = apart(runs)
        first = difference[: max(1, len(difference) // 10)]
        losses = runs[1].losses
        console.print(
            f"{name}: losses from {losses[0]:.3f} to {mean_of_last(losses):.3f}, with torch's "
            f"{mean_of_last(runs[0].losses):.3f}; they differ by at most {first.max():.1e} in the "
            f"first tenth of the steps, by at most {difference.max():.1e} in all {len(difference)}",
            soft_wrap=True,
        )


def draw(results: dict[str, list[Run]], path: Path) -> None:
    """A panel of losses for each optimizer, and one of the times of all."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    first, second, third = results
    figure, axes = plt.subplot_mosaic(
        [[first, second], [third, "time"]], figsize=(11, 7), layout="constrained"
    )
    for name, runs in results.items():
        for way, run, colour, width in zip(WAYS, runs, COLOURS, (6, 1.5), strict=True):
            axes[name].plot(_smooth(run.losses), color=colour, lw=width, label=way)
        axes[name].sharey(axes[first])
        axes[name].set(xlabel="step", ylabel="nats per character", title=f"{name}: training loss")
        axes[name].legend(title="mean of 10 steps")
        axes[name].grid(alpha=0.3)
    _draw_times(axes["time"], results)
    figure.savefig(path, dpi=120)


def _draw_times(axes: Any, results: dict[str, list[Run]]) -> None:
    for k, runs in enumerate(results.values()):
        for way, run, colour, side in zip(WAYS, runs, COLOURS, (-0.2, 0.2), strict=True):
            low, middle, high = run.step_ms.tolist()
            spread = [[middle - low], [high - middle]]
            axes.barh(k + side, middle, 0.38, color=colour, xerr=spread)
            axes.text(high, k + side, f"  {way}: {middle:.2f} ms", va="center")
    axes.set_yticks(range(len(results)), results)
    axes.invert_yaxis()
    axes.margins(x=0.4)
    axes.set(xlabel="ms, median and quartiles", title="Clip and optimizer step")


def _smooth(losses: list[float]) -> Tensor:
    """A running mean over up to 10 steps."""
    total = torch.tensor([0.0, *losses], dtype=torch.float64).cumsum(0)
    ends = torch.arange(1, len(total))
    starts = (ends - 10).clamp(min=0)
    return (total[ends] - total[starts]) / (ends - starts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=500, help="of each of the six trainings")
    parser.add_argument("--smoke", action="store_true", help="a tiny model: does it run?")
    options = parser.parse_args()
    steps, size = options.steps, Size()
    if options.smoke:
        steps, size = min(steps, 20), Size(layers=1, width=32, context=16, batch=4)
        torch.set_num_threads(1)  # its matrices are too small for more

    console, text = Console(), Text()
    columns = (TextColumn("{task.description:9}"), BarColumn(), MofNCompleteColumn())
    more = (TextColumn("loss {task.fields[loss]:.3f}"), TimeRemainingColumn())
    results = {}
    with Progress(*columns, *more, console=console) as progress:
        for name in OPTIMIZERS:
            task = progress.add_task(name, total=steps, loss=float("nan"))

            def tick(loss: float, task: Any = task) -> None:
                progress.update(task, advance=1, loss=loss)

            results[name] = compare(text, size, name, steps, tick)

    show(console, results)
    best = min((run for _, run in results.values()), key=lambda run: mean_of_last(run.losses))
    start, generator = text.codes[: size.context // 2], torch.Generator().manual_seed(2)
    written = text.decode(best.model.write(start, 300, generator))
    console.print("\nWhat the best model writes:\n", style="bold")
    console.print(written, markup=False, highlight=False)
    draw(results, PICTURE)
    console.print(f"\nloss curves and times: {PICTURE.resolve()}", soft_wrap=True)


if __name__ == "__main__":
    main()
