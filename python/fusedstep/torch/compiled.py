"""The step as an operator of torch, so that `torch.compile` has something to put into a graph."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch

from fusedstep.torch.leaves import is_dtensor

if TYPE_CHECKING:
    from fusedstep.torch.base import Optimizer

_optimizers: weakref.WeakValueDictionary[int, Optimizer] = weakref.WeakValueDictionary()
_handles = itertools.count()

_library = torch.library.Library("fusedstep", "DEF")
# `places` says which of the optimizer's parameters these are. The optimizer's state is no argument:
# nothing else in a graph reads or writes it, and what is mutated orders the calls.
# The tag keeps it out of the CUDA graphs that `mode="reduce-overhead"` makes: what is read when the
# graph runs would be read when it is captured. (Old versions of torch do not know the tag.)
_tags = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []
_library.define(
    "step(int handle, int[] places, Tensor(a!)[] params, Tensor[] grads) -> ()", tags=_tags
)


def register(optimizer: Optimizer) -> int:
    """A number by which graphs call the optimizer, as long as it lives."""
    handle = next(_handles)
    _optimizers[handle] = optimizer
    return handle


def step(handle: int, param_groups: list[dict[str, Any]]) -> None:
    """What `Optimizer.step` is under `torch.compile`: traced, so plain code and one operator.

    Hyper-parameters are read when the graph runs, not when it is made: a scheduler never makes it
    compile again. Distributed tensors are left to a step outside of the graph, as operators do not
    tell how to take them apart.
    """
    if any(is_dtensor(param) for group in param_groups for param in group["params"]):
        _step_outside(handle)
        return
    places, params, grads = [], [], []
    place = 0
    for group in param_groups:
        for param in group["params"]:
            if param.grad is not None:
                places.append(place)
                params.append(param)
                grads.append(param.grad)
            place += 1
    torch.ops.fusedstep.step(handle, places, params, grads)


@torch.compiler.disable(reason="fusedstep updates distributed tensors outside of graphs")
def _step_outside(handle: int) -> None:
    _optimizers[handle]._advance()


@torch.library.impl(_library, "step", "CompositeExplicitAutograd")
def _run(handle: int, places: list[int], params: list[Any], grads: list[Any]) -> None:
    optimizer = _optimizers.get(handle)
    if optimizer is None:
        raise RuntimeError(f"fusedstep::step: the optimizer of handle {handle} is gone")
    own = [param for group in optimizer.param_groups for param in group["params"]]
    given = {id(own[place]): grad for place, grad in zip(places, grads, strict=True)}
    with torch.no_grad():
        swapped = []
        for place, param in zip(places, params, strict=True):
            if param.data_ptr() != own[place].data_ptr():  # the graph works on a copy
                swapped.append((own[place], param, own[place].detach().clone()))
                own[place].copy_(param)
        try:
            optimizer._advance(given)
            for mine, param, _ in swapped:
                param.copy_(mine)
        finally:
            for mine, _, before in reversed(swapped):
                mine.copy_(before)  # the graph will write it when it is its turn


@torch.library.register_fake("fusedstep::step", lib=_library)
def _fake(handle: int, places: list[int], params: list[Any], grads: list[Any]) -> None:
    pass
