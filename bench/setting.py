"""How much work the rows are, and what they need to know."""

from __future__ import annotations

from dataclasses import dataclass

from bench import models
from bench.models import Shape
from bench.streams import Roofline


@dataclass(frozen=True)
class Scale:
    """How much work a row is."""

    large: int  # elements, far beyond every cache but those of the largest servers
    cached: int  # elements whose three buffers fit a last-level cache
    many: int  # tensors of a model with many small ones
    calls: int  # of the smallest work, per sample
    matmul: int
    resnet50: list[Shape]
    gpt2: list[Shape]
    layers: int  # of a network that is trained: square ones, `large` elements altogether
    width: int  # of its layers
    batch: int


FULL = Scale(
    large=2**25,
    cached=2**20,
    many=1000,
    calls=1000,
    matmul=384,
    resnet50=models.resnet50(),
    gpt2=models.gpt2(),
    layers=32,
    width=1024,
    batch=32,
)
SMOKE = Scale(
    large=100_003,
    cached=10_007,
    many=20,
    calls=10,
    matmul=32,
    resnet50=models.resnet50(width=2, classes=10),
    gpt2=models.gpt2(width=16, layers=2, vocabulary=101, context=32),
    layers=3,
    width=32,
    batch=4,
)


@dataclass(frozen=True)
class Setting:
    """What the rows need to know."""

    scale: Scale
    roofline: Roofline | None
