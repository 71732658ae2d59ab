"""State between the plan, `Optimizer.state` and state dicts, in the form that torch gives it."""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from fusedstep.codegen import SCALARS
from fusedstep.ranges import shown
from fusedstep.torch.leaves import MASTER, Master, fitted, memory_of, zeros_like
from fusedstep.torch.signatures import plain

if TYPE_CHECKING:
    from fusedstep.torch.base import Bound, Optimizer


class Hidden:
    """A saved value that `torch.optim.Optimizer.load_state_dict` hands on as it is.

    torch gives every buffer the dtype of its parameter, which would round a float32 state of a
    bfloat16 parameter, and makes the name of a generator of a string.
    """

    def __init__(self, value: Any) -> None:
        self.value = value


# --- from the plan to the dict ----------------------------------------------------------------


def publish(optimizer: Optimizer) -> None:
    """Brings `Optimizer.state` up to date with what the plan knows.

    Without a step since the last time, only what a graph has replayed is new: anything else in the
    dict may be the user's.
    """
    bound: Bound = optimizer._bound  # type: ignore[assignment]
    ahead, optimizer._ahead = optimizer._ahead, False
    for index, leaf in enumerate(bound.leaves):
        progress = steps, product = bound.plan.get_progress(index)
        if steps == 0 or (not ahead and leaf.published == progress):
            continue
        leaf.published = progress
        known: dict[str, Any] = {}
        for slot, buffer in bound.plan.get_state(index).items():
            name = optimizer._form.buffers[slot]
            known[name] = leaf.wrap(name, buffer)
        if MASTER in leaf.wrapped:
            known[MASTER] = leaf.wrapped[MASTER]
        for name, number in zip(optimizer._form.scalars, (steps, product), strict=False):
            known[name] = _number(name, number)
        if known:
            optimizer._state[leaf.param].update(known)


def _number(name: str, number: float) -> Any:
    """As torch keeps counts: a tensor on the CPU, a new one each time.

    A count is float32, or float64 where that is the default dtype, as torch makes it; a product of
    momenta is always float64, or a run would not continue with the same bits.
    """
    wide = name != "step" or torch.get_default_dtype() == torch.float64
    return torch.tensor(float(number), dtype=torch.float64 if wide else torch.float32)


# --- from the dict to the plan ----------------------------------------------------------------

# What `sys.getrefcount` says of a value that a dict alone holds.
_ALONE = next(map(sys.getrefcount, {0: {}}.values()))


def is_held(optimizer: Optimizer) -> bool:
    """Whether somebody else has got hold of `Optimizer.state`, or of the state of a parameter."""
    whole = {0: optimizer._state}  # one holder more
    return any(count > _ALONE + 1 for count in map(sys.getrefcount, whole.values())) or any(
        count > _ALONE for count in map(sys.getrefcount, optimizer._state.values())
    )


def read(optimizer: Optimizer, bound: Bound) -> None:
    """Gives the plan what stands in `Optimizer.state`, which the user may have changed."""
    for index, leaf in enumerate(bound.leaves):
        state = optimizer._state.get(leaf.param, {})
        replaced = _read_buffers(optimizer, bound, index, state)
        _read_numbers(optimizer, bound, index, state, replaced)
        if isinstance(leaf, Master):
            leaf.restart(state.get(MASTER))
            if MASTER in state:
                state[MASTER] = leaf.master  # not a copy of it that nobody updates


def _read_buffers(optimizer: Optimizer, bound: Bound, index: int, state: dict[str, Any]) -> bool:
    """Whether they are others than those of the plan."""
    leaf = bound.leaves[index]
    known = bound.plan.get_state(index)
    wanted = {}
    for slot, name in optimizer._form.buffers.items():
        buffer = state.get(name)
        if buffer is None:
            continue
        if slot in known and buffer is leaf.wrap(name, known[slot]):
            wanted[slot] = known[slot]
        else:
            state[name] = fitted(leaf.param, name, buffer)
            wanted[slot] = memory_of(state[name])
            if not leaf.direct:
                leaf.wrapped[name] = state[name]
    same = wanted.keys() == known.keys() and all(wanted[slot] is known[slot] for slot in wanted)
    if not same:
        bound.plan.set_state(index, wanted)
    return not same


def _read_numbers(
    optimizer: Optimizer, bound: Bound, index: int, state: dict[str, Any], replaced: bool
) -> None:
    steps, product = bound.plan.get_progress(index)
    scalars = optimizer._form.scalars
    buffers = [name for name in optimizer._form.buffers.values() if state.get(name) is not None]
    if "step" in scalars:
        new_steps = _checked_number("step", state["step"]) if "step" in state else 0
    elif buffers:  # torch counts no steps here; what counts is whether there have been any
        new_steps = max(steps, 1)
    else:
        new_steps = 0 if replaced else steps
    new_product = product
    if "mu_product" in scalars:
        new_product = _checked_number("mu_product", state.get("mu_product", 1.0))
    if (new_steps, new_product) != (steps, product):
        bound.plan.set_progress(index, new_steps, new_product)


# --- state dicts ------------------------------------------------------------------------------


def with_own_numbers(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A post-hook of `state_dict`, the first one: without the counts of the optimizer.

    torch's `load_state_dict` takes a `step` as it is and then counts in it.
    """
    state = {}
    for key, of_param in state_dict["state"].items():
        if isinstance(of_param, dict):
            numbers = {
                name: _number(name, float(plain(name, of_param[name])))
                for name in optimizer._form.scalars
                if name in of_param
            }
            of_param = {**of_param, **numbers}
        state[key] = of_param
    return {**state_dict, "state": state}


def hide_values(_optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A pre-hook of `load_state_dict`, the last one: see `Hidden`."""
    state = {
        key: {name: Hidden(value) for name, value in of_param.items()}
        if isinstance(of_param, dict)
        else Hidden(of_param)
        for key, of_param in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def loaded(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """What `load_state_dict` hands to `__setstate__`, in this optimizer's form; nothing changes."""
    groups = zip(state_dict["param_groups"], optimizer.param_groups, strict=True)
    state: defaultdict[Any, Any] = defaultdict(dict)
    for param, of_param in state_dict["state"].items():
        if isinstance(of_param, dict):
            taken = {n: _taken(optimizer, param, n, v) for n, v in of_param.items()}
            of_param = {name: value for name, value in taken.items() if value is not None}
        elif isinstance(of_param, Hidden):
            if isinstance(param, torch.Tensor):
                kind = shown(of_param.value)
                raise TypeError(f"state: the state of a parameter is {kind}, no dict")
            of_param = of_param.value
        state[param] = of_param
    fixed = optimizer._form.fixed
    return {
        "state": state,
        "param_groups": [{**mine, **saved, **fixed} for saved, mine in groups],
    }


def _taken(optimizer: Optimizer, param: Any, name: str, value: Any) -> Any:
    """A copy of one saved value, or None if it has no use here."""
    if not isinstance(value, Hidden):  # not from `load_state_dict`
        return value
    given = value.value
    if given is None or not isinstance(param, torch.Tensor):  # a state of nobody's
        return given
    if name in optimizer._form.scalars:
        return _number(name, _checked_number(name, given))
    if name == MASTER and not optimizer.master_weights:
        return None
    if name != MASTER and name not in optimizer._form.buffers.values():
        return copy.deepcopy(given)
    made = zeros_like(param, "float32" if name == MASTER else None)
    buffer = fitted(param, name, given)
    if buffer.is_complex() != made.is_complex():  # torch would drop imaginary parts
        raise TypeError(f"state: {name} of dtype {buffer.dtype} for a parameter of {param.dtype}")
    with torch.no_grad():
        return made.copy_(buffer)


def _checked_number(name: str, value: Any) -> Any:
    """A count as a number, whole if it is `step`."""
    check, _, _ = SCALARS[name]
    number = plain(name, value)
    try:
        return check(name, round(number) if name == "step" else number)
    except (TypeError, ValueError, OverflowError):  # round() of no number, of NaN, of inf
        raise ValueError(f"state: {name} is {shown(number)}, expected {check}") from None
