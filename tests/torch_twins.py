"""Optimizers of torch and ours on twins: equal parameters that get equal gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

try:
    import torch
    from fusedstep import torch as ours
except ImportError:  # the marker of the tests leaves them out, by name
    torch = ours = None

# The classes that torch has, too.
NAMES = ("SGD", "Adam", "AdamW", "NAdam", "RMSprop")

# Every class of ours, and the class of torch whose state it shares, with arguments that make it
# keep all the state it can.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"momentum": 0.9, "weight_decay": 0.1}),
    "Momentum": ("SGD", {"momentum": 0.9}),
    "MomentumNesterov": ("SGD", {"momentum": 0.9}),
    "Adam": ("Adam", {"amsgrad": True}),
    "AdamW": ("AdamW", {"amsgrad": True, "weight_decay": 0.1}),
    "NAdam": ("NAdam", {"momentum_decay": 0.1}),
    "RMSprop": ("RMSprop", {"centered": True, "momentum": 0.5}),
}

# Around the borders of vectors, tiles and chunks; no element, and no dimension.
SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (7,), (5, 3), (33,), (4099,), (16_385,))


def parameters(shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: str = "float32") -> list[Any]:
    """The same random parameters at every call."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [torch.nn.Parameter(tensor.to(getattr(torch, dtype))) for tensor in made]


def give_gradients(params: Iterable[Any], step: int) -> None:
    """The same random gradients for the same step, none of them zero."""
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        real = torch.view_as_real(param) if param.is_complex() else param
        grad = torch.randn(real.shape, generator=generator, dtype=torch.float64).to(real.dtype)
        param.grad = torch.view_as_complex(grad) if param.is_complex() else grad


def run(optimizer: Any, steps: int, start: int = 0) -> None:
    """Some steps, each with gradients of its own; one thread is quick on a busy machine."""
    params = parameters_of(optimizer)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for step in range(start, start + steps):
            give_gradients(params, step)
            optimizer.step()
    finally:
        torch.set_num_threads(threads)


def pair(name: str, dtype: str = "float32", shapes: Any = SHAPES, **kwargs: Any) -> tuple[Any, Any]:
    """(torch's optimizer, ours) of one class on twins."""
    theirs = getattr(torch.optim, name)(parameters(shapes, dtype), **copy.deepcopy(kwargs))
    return theirs, getattr(ours, name)(parameters(shapes, dtype), **copy.deepcopy(kwargs))


def parameters_of(optimizer: Any) -> list[Any]:
    """All parameters, in their order."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def difference(first: Any, second: Any) -> float:
    """Largest difference between the parameters of two optimizers; inf if a NaN is in the way."""
    largest = 0.0
    for p, q in zip(parameters_of(first), parameters_of(second), strict=True):
        if p.numel():
            d = (p.detach() - q.detach()).abs().max().item()
            largest = max(largest, d if d == d else float("inf"))
    return largest


def equal(first: Any, second: Any) -> bool:
    """The parameters of two optimizers hold the same numbers."""
    both = zip(parameters_of(first), parameters_of(second), strict=True)
    return all(torch.equal(p, q) for p, q in both)


def same_state(first: Any, second: Any) -> bool:
    """Two state dicts have the same entries per parameter, with the same numbers."""
    if first["state"].keys() != second["state"].keys():
        return False
    for key, entries in first["state"].items():
        other = second["state"][key]
        if entries.keys() != other.keys():
            return False
        for name, value in entries.items():
            if value.dtype != other[name].dtype or not torch.equal(value, other[name]):
                return False
    return True


def snapshot(optimizer: Any) -> tuple[Any, ...]:
    """All that a step may change: parameters and their versions, and the state."""
    params = parameters_of(optimizer)
    return (
        [(p.detach().clone(), p._version) for p in params],
        copy.deepcopy(optimizer.state_dict()),
    )


def unchanged(optimizer: Any, before: tuple[Any, ...]) -> bool:
    """Whether `snapshot` would give the same now."""
    values, state = before
    params = parameters_of(optimizer)
    return (
        all(torch.equal(p, value) for p, (value, _) in zip(params, values, strict=True))
        and [p._version for p in params] == [version for _, version in values]
        and same_state(optimizer.state_dict(), state)
    )
