"""Runs of every optimizer that are interrupted and go on: what makes them, and what compares."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import driver
import fusedstep as fs
import numpy as np
from exact import Array, mismatch

SIZES = (5, 16_385, 0, 7)
SUFFIXES = (".npz", ".safetensors")


class Ramp(fs.MomentumSchedule):
    """Momentum that rises to `high`."""

    def __init__(self, high: float, last_epoch: int = 0) -> None:
        self.high = high
        self.last_epoch = last_epoch
        self._assigned = None

    def at(self, t: int) -> float:
        return self.high * (1 - 1 / (t + 2))

    def step(self, epoch: int | None = None) -> None:
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch

    def copied(self) -> Ramp:
        return copy.copy(self)

    def state_dict(self) -> dict[str, Any]:
        return {"type": "Ramp", "high": self.high, "last_epoch": self.last_epoch}

    def load_state_dict(self, state: Any) -> None:
        if state.keys() != self.state_dict().keys() or state["type"] != "Ramp":
            raise ValueError("schedule: not the state of a Ramp")
        self.high, self.last_epoch = state["high"], state["last_epoch"]

    def __repr__(self) -> str:
        return f"Ramp({self.high}, {self.last_epoch})"


# A case is a class with the arguments of a run, and others that loading has to put right.
Case = tuple[type[fs.Optimizer], dict[str, Any], dict[str, Any]]
CASES: dict[str, Case] = {
    "sgd": (fs.SGD, {"lr": 0.1, "weight_decay": 0.1}, {"lr": 0.5}),
    "sgd_momentum": (
        fs.SGD,
        {"lr": 0.1, "momentum": Ramp(0.9), "dampening": 0.25},
        {"lr": 0.2, "momentum": Ramp(0.1, 7), "dampening": 0.5},
    ),
    "momentum": (
        fs.Momentum,
        {"lr": 0.1, "momentum": 0.8, "grad_clip_norm": 3.0, "grad_clip_scope": "array"},
        {"lr": 0.3},
    ),
    "nesterov": (
        fs.MomentumNesterov,
        {"lr": fs.ExponentialLR(0.1, 0.7), "momentum": Ramp(0.9), "lr_in_velocity": True},
        {"lr": fs.ExponentialLR(0.5, 0.1, last_epoch=3), "momentum": Ramp(0.2, 5)},
    ),
    "nadam": (
        fs.NAdam,
        {"lr": fs.StepLR(0.01, 2, 0.5), "momentum_decay": 0.5, "weight_decay": 0.1},
        {"lr": fs.StepLR(0.2, 7, 0.25), "betas": (0.5, 0.75)},
    ),
    "nadam_scheduled": (
        fs.NAdam,
        {"lr": 0.01, "betas": (Ramp(0.9), 0.99)},
        {"lr": 0.2, "betas": (Ramp(0.5, 9), 0.75)},
    ),
    "adam": (fs.Adam, {"lr": 0.01, "skip_grad_norm": 196.0}, {"eps": 0.5, "maximize": True}),
    "amsgrad": (fs.Adam, {"lr": 0.01, "amsgrad": True}, {"lr": 0.5}),
    "adamw": (fs.AdamW, {"lr": 0.01, "betas": (Ramp(0.9), 0.99)}, {"betas": (Ramp(0.1), 0.5)}),
    "adamw_amsgrad": (fs.AdamW, {"lr": 0.01, "amsgrad": True}, {"weight_decay": 0.5}),
    "rmsprop": (fs.RMSprop, {"lr": 0.01}, {"alpha": 0.5}),
    "rmsprop_centered": (
        fs.RMSprop,
        {"lr": 0.01, "momentum": 0.9, "centered": True, "nesterov": True},
        {"lr": 0.5, "alpha": 0.5},
    ),
    "rmsprop_scheduled": (
        fs.RMSprop,
        {"lr": fs.ExponentialLR(0.1, 0.7), "momentum": Ramp(0.9), "nesterov": True},
        {"lr": fs.ExponentialLR(0.5, 0.1), "momentum": Ramp(0.5, 4)},
    ),
}


def tree(seed: int, dtype: str = "float32") -> dict[str, Any]:
    """A nested tree; one array is empty."""
    a, b, c, d = (x.copy() for x in driver.values(dtype, SIZES, seed))
    return {"layers": [{"W": a, "b": b}, {"W": c}], "head": d}


def leaves(node: Any) -> list[Any]:
    """The arrays of a tree of dicts and lists."""
    if isinstance(node, dict):
        node = list(node.values())
    return [x for item in node for x in leaves(item)] if isinstance(node, list) else [node]


def mapped(function: Callable[[Any], Any], node: Any) -> Any:
    """The tree with `function` of each array."""
    if isinstance(node, dict):
        return {key: mapped(function, item) for key, item in node.items()}
    return [mapped(function, item) for item in node] if isinstance(node, list) else function(node)


def same(a: Any, b: Any) -> bool:
    """Two trees have the same bits."""
    return not any(mismatch(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def gradients(seed: int, dtype: str = "float32") -> dict[str, Any]:
    """Those of step `seed`. Counts differ by array: the head has none in every third step."""
    made = tree(100 + seed, dtype)
    return {**made, "head": None} if seed % 3 == 0 else made


def make(case: str, params: Any, *, other: bool = False) -> Any:
    """The optimizer of a case, with schedules of its own."""
    kind, options, others = CASES[case]
    return kind(params, **copy.deepcopy({**options, **others} if other else options))


def schedules(optimizer: Any) -> list[Any]:
    """Those of all groups, each once."""
    found = []
    for group in optimizer.param_groups:
        momentum = group.get("momentum", group.get("betas", (None,)))
        values = (group["lr"], momentum[0] if isinstance(momentum, tuple) else momentum)
        found += [x for x in values if isinstance(x, (fs.Schedule, fs.MomentumSchedule))]
    return list({id(x): x for x in found}.values())


def train(
    optimizer: Any, steps: Iterable[int], convert: Callable[[Any], Any] | None = None
) -> None:
    """Some steps, after each of which the schedules move on."""
    for step in steps:
        grads = gradients(step)
        if convert:
            grads = mapped(lambda x: None if x is None else convert(x), grads)
        optimizer.step(grads)
        for schedule in schedules(optimizer):
            schedule.step()


def snapshot(optimizer: Any, params: Any) -> Any:
    """Everything that an attempt to load could have changed, as text and bytes."""
    state = optimizer.state_dict()
    buffers = [
        (key, name, value.tobytes() if isinstance(value, np.ndarray) else value)
        for key, entry in state.pop("state").items()
        for name, value in entry.items()
    ]
    return buffers, repr(state), [x.tobytes() for x in leaves(params)], repr(optimizer.defaults)


def with_bits(x: Array) -> Array:
    """A copy that keeps a Fortran order."""
    return x.copy(order="K")
