"""The bars that `make bench` and `make bench-gpu` can judge: of design 8, and of `fusedstep.torch`.

They are moved nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.measure import Result, Spread


@dataclass(frozen=True)
class Bar:
    """A limit on the time of `measured`, or on how many times that of `base` it is.

    Of several that are measured the fastest counts.
    """

    row: str
    measured: str | tuple[str, ...]
    base: str | None = None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def limit(self) -> str:
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"

    def counted(self, result: Result) -> str | None:
        """Whose time it is, by the median; None if a contender was not there."""
        names = (self.measured,) if isinstance(self.measured, str) else self.measured
        if not {*names, self.base or names[0]} <= result.samples.keys():
            return None
        return min(names, key=lambda who: result.spread(who).median)

    def figure(self, result: Result) -> Spread | None:
        """None if a contender was not there."""
        who = self.counted(result)
        if who is None or self.base is None:
            return None if who is None else result.spread(who)
        return result.ratio(who, self.base)

    def title(self, result: Result) -> str:
        """What is limited, for people."""
        who = self.counted(result)
        if not isinstance(self.measured, str):
            who = f"fastest of {len(self.measured)}" + (f" ({who})" if who else "")
        who = who or str(self.measured)
        return who if self.base is None else f"{who} / {self.base}"

    def met(self, figure: Spread) -> bool:
        """By the median; the quartiles tell how sure that is."""
        if self.at_least is not None:
            return figure.median >= self.at_least
        return self.at_most is None or figure.median <= self.at_most


OURS, ROOFLINE, FUSED = "fusedstep", "roofline", "torch fused"
CLIPPED, UNCLIPPED = "fusedstep clip", "fusedstep no clip"
ON_TORCH = "fusedstep on torch tensors"
FUNCTION, OBJECT = "fusedstep function", "fusedstep object"
SHARED = "fusedstep shared state"
FOREACH, FOR_LOOP = "torch foreach", "torch for-loop"
ADAPTER = "fusedstep.torch"
ADAPTER_IN_BACKWARD = "fusedstep.torch in backward"
# To clip and step with torch: each form as one calls it, and its fused step behind a foreach clip.
TORCH_WAYS = (FUSED, FOREACH, "torch default", "torch fused, foreach clip")
JAX, OPTAX = "fusedstep.jax", "optax"
OBJECT_GRAPH, CUPY = "fusedstep graph", "cupy"

BARS = (
    Bar("nesterov-1", ROOFLINE, OURS, at_least=0.97),
    Bar("nesterov-1", FUSED, OURS, at_least=1.05),
    Bar("nesterov-200", ROOFLINE, OURS, at_least=0.97),
    Bar("nesterov-200", FUSED, OURS, at_least=1.05),
    Bar("clip-1", ROOFLINE, OURS, at_least=0.95),
    Bar("clip-1", FUSED, OURS, at_least=1.3),
    Bar("clip-200", ROOFLINE, OURS, at_least=0.95),
    Bar("clip-200", FUSED, OURS, at_least=1.3),
    Bar("nadam-1", ROOFLINE, OURS, at_least=0.9),
    Bar("nadam-1", FOREACH, OURS, at_least=2.5),
    Bar("nadam-1", FOR_LOOP, OURS, at_least=2.5),
    Bar("nadam-200", ROOFLINE, OURS, at_least=0.9),
    Bar("nadam-200", FOREACH, OURS, at_least=2.5),
    Bar("nadam-200", FOR_LOOP, OURS, at_least=2.5),
    Bar("adamw", FUSED, OURS, at_least=1.0),
    Bar("adamw-clip", FUSED, OURS, at_least=1.3),
    Bar("small", FUSED, OURS, at_least=20),
    Bar("small", OURS, FUNCTION, at_most=1.3),
    Bar("small", FUSED, ON_TORCH, at_least=12),
    Bar("call", OURS, at_most=3e-6),
    Bar("call", OBJECT, at_most=6e-6),
    Bar("cached", CLIPPED, UNCLIPPED, at_most=1.3),
    Bar("bf16", ROOFLINE, OURS, at_least=0.9),
    Bar("torch-1", TORCH_WAYS, ADAPTER, at_least=1.3),
    Bar("torch-resnet50", TORCH_WAYS, ADAPTER, at_least=1.3),
    Bar("torch-gpt2", TORCH_WAYS, ADAPTER, at_least=1.3),
    Bar("torch-gpt2-nesterov", TORCH_WAYS, ADAPTER, at_least=1.3),
    Bar("torch-1000", TORCH_WAYS, ADAPTER, at_least=8),
    Bar("torch-one", FUSED, ADAPTER, at_least=1.0),
    Bar("jax-1", OPTAX, JAX, at_least=1.25),
    Bar("jax-200", OPTAX, JAX, at_least=1.1),
    Bar("jax-1000", OPTAX, JAX, at_least=1.0),
    Bar("jax-nadam", OPTAX, JAX, at_least=1.25),
    Bar("jax-compile", JAX, at_most=3.0),
    Bar("import", OURS, at_most=0.060),
    Bar("wheel", OURS, at_most=2e6),
    Bar("wheel-cuda", OURS, at_most=5e6),
)

# Of `python -m bench.gpu`, where the roofline is the device's copy and fusedstep its object.
GPU_BARS = (
    *(
        Bar(row, ROOFLINE, OURS, at_least=0.9)
        for row in (
            *("clip-1x1e8", "clip-200x5e5", "clip-1x1e9", "clip-200x5e6", "clip-1000x1e5"),
            *("plain-1x1e8", "plain-200x5e5", "plain-1x1e9"),
            *("bf16-1x1e8", "bf16-clip-1x1e8", "bf16-clip-200x5e5", "bf16-clip-1x1e9"),
            *("nadam-1x1e8", "nadam-200x5e5", "nadam-clip-1x1e8"),
            *("adamw-clip-1x1e8", "gpt2-adamw-clip", "sgd-1x1e8", "sgd-clip-1x1e8"),
        )
    ),
    *(
        Bar(row, FUSED, OURS, at_least=1.3)
        for row in ("clip-1x1e8", "clip-200x5e5", "clip-1x1e9", "clip-200x5e6", "clip-1000x1e5")
    ),
    *(
        Bar(row, FOREACH, OURS, at_least=3)
        for row in ("nadam-1x1e8", "nadam-200x5e5", "nadam-1000x1e3 loop", "nadam-clip-1x1e8")
    ),
    Bar("clip-1000x1e3 loop", FUSED, OURS, at_least=5),
    Bar("clip-1000x1e3 loop", FUSED, FUNCTION, at_least=5),
    Bar("clip-1000x1e3 loop", FUSED, ADAPTER, at_least=5),
    Bar("clip-1000x1e3 launches", OURS, at_most=2),
    Bar("clip-1x1e9 launches", OURS, at_most=2),
    Bar("plain-1000x1e3 launches", OURS, at_most=1),
    Bar("plain-1x1e8 launches", OURS, at_most=1),
)
