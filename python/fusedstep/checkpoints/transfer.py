"""State from elsewhere: trees of buffers and numbers that go into an optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fusedstep import _core
from fusedstep.buffers import Stored, copy_like, dtype_of, state_dtype, stored
from fusedstep.checkpoints.state import check_buffer, scalar, scalars_of, settled_plan
from fusedstep.groups import assign_rows, dotted, make_plan

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fusedstep.base import Optimizer

_Path = tuple[str | int, ...]


def assign(optimizer: Optimizer, trees: Mapping[str, Any], scalars: Mapping[str, Any]) -> None:
    """Puts trees of state buffers and numbers into an optimizer, or raises and changes nothing."""
    plan, declaration = settled_plan(optimizer), optimizer.declaration
    for name in (*trees, *scalars):
        known = declaration.slots if name in trees else scalars_of(optimizer)
        if name not in known:
            has = ", ".join((*declaration.slots, *scalars_of(optimizer)))
            raise TypeError(f"{name}: no state of {declaration.class_name}; it has {has}")
    numbers = {name: scalar(name, name, value) for name, value in scalars.items()}
    new = make_plan(optimizer.param_groups, optimizer._grouped, declaration.slots, plan)
    states = [new.get_state(leaf) for leaf in range(len(new))]
    for name, tree in trees.items():
        for leaf, buffer in _copies(optimizer, new, name, tree).items():
            states[leaf][name] = buffer
    for leaf, state in enumerate(states):
        new.set_state(leaf, state)
        steps, product = new.get_progress(leaf)
        new.set_progress(leaf, numbers.get("step", steps), numbers.get("mu_product", product))
    members = assign_rows(new, optimizer.param_groups)
    optimizer._bind(new, optimizer._keys, members)
    optimizer._steps = numbers.get("step", optimizer._steps)


def _copies(optimizer: Optimizer, plan: _core.Plan, name: str, tree: Any) -> dict[int, Any]:
    """The buffers of a tree as state of their leaves."""
    copies: dict[int, Any] = {}
    for group, own in enumerate(optimizer._per_group(name, tree) or []):
        leaves = {plan.path(leaf): leaf for leaf in range(len(plan)) if plan.tree(leaf) == group}
        where = f"{name}[{group}]" if optimizer._grouped else name
        for path, buffer in _core.flatten(own, where):
            if buffer is None:
                _leave(leaves, path, where)
                continue
            leaf = leaves.pop(path, None)
            if leaf is None:
                raise ValueError(f"{_spelt(where, path)}: params has no such array")
            copies[leaf] = _as_state(_spelt(where, path), plan.leaf(leaf), buffer)
        if leaves:
            raise ValueError(
                f"{_spelt(where, next(iter(leaves)))}: missing; None leaves an array's state alone"
            )
    return copies


def _leave(leaves: dict[_Path, int], path: _Path, where: str) -> None:
    """A None stands for one array or for a whole branch."""
    if leaves.pop(path, None) is not None:
        return
    below = [other for other in leaves if other[: len(path)] == path]
    if not below:
        raise ValueError(f"{_spelt(where, path)}: params has no such array")
    for other in below:
        del leaves[other]


def _spelt(name: str, path: _Path) -> str:
    return f"{name}[{dotted(path)!r}]" if path else name


def _as_state(where: str, param: Any, buffer: Any) -> Any:
    """A copy in the form of the parameter, in a dtype that its state may have."""
    check_buffer(where, param, buffer)
    own, dtype = dtype_of(param), dtype_of(buffer)
    half = own == "float32" and dtype in {"float16", "bfloat16"}
    wanted = state_dtype(own)
    if half or dtype in {own, wanted}:
        return copy_like(param, buffer)
    bits = stored(buffer).bits
    try:
        with np.errstate(all="ignore", over="raise"):
            return copy_like(param, Stored(_values(bits, dtype).astype(wanted), wanted))
    except FloatingPointError:
        raise ValueError(f"{where}: a number is too large for {wanted}, its state") from None


def _values(bits: NDArray[Any], dtype: str) -> NDArray[Any]:
    """The elements as numbers of NumPy."""
    if dtype != "bfloat16":
        return bits
    widened: NDArray[np.uint32] = np.left_shift(bits, 16, dtype=np.uint32)
    return widened.view(np.float32)
