"""The state of an optimizer as nested dicts, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from fusedstep.braintools.values import as_number, plain
from fusedstep.hyperparameters import weight_decay_range
from fusedstep.jax.state import State

if TYPE_CHECKING:
    from fusedstep.braintools.optimizer import Group, Optimizer

Tree: TypeAlias = Any

_COUNTS = ("step", "skipped_steps", "leaf_steps", "leaf_products")


def capture(optimizer: Optimizer) -> dict[str, Any]:
    """What `Optimizer.state_dict` returns."""
    states = [state for state in optimizer._opt_states() if state is not None]
    first, *others = [_as_dict(state.value) for state in states] or [{}]
    scheduler = optimizer.lr_scheduler
    return {
        "step_count": jnp.copy(optimizer.step_count.value),
        "lr": plain(optimizer.current_lr),
        "base_lr": optimizer.base_lr,
        "param_groups": {
            str(index): {
                "params": [name for name, _ in group.paths],
                "lr": plain(lr),
                "weight_decay": group.weight_decay,
            }
            for index, (group, lr) in enumerate(
                zip(optimizer._groups, optimizer._lrs(), strict=True)
            )
        },
        "opt_state": first,
        "param_groups_opt_states": {str(index): own for index, own in enumerate(others)},
        "lr_scheduler": {"type": type(scheduler).__name__, **scheduler.state_dict()},
    }


def _as_dict(state: State) -> dict[str, Any]:
    """Copies: a step that donates would take the arrays away."""
    entries = {"buffers": state.buffers, **{name: getattr(state, name) for name in _COUNTS}}
    copies: dict[str, Any] = jax.tree.map(jnp.copy, entries)
    return copies


# --- loading ------------------------------------------------------------------------------------


def restore(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """What `Optimizer.load_state_dict` does: everything is checked, then everything is written."""
    opt_states = [state for state in optimizer._opt_states() if state is not None]
    count = len(opt_states)
    groups = _entries("param_groups", _entry(saved, "param_groups"), count)
    others = _entries(
        "param_groups_opt_states", _entry(saved, "param_groups_opt_states"), count - 1
    )
    wanted = [_entry(saved, "opt_state"), *others][:count]
    new_groups = [
        _group(optimizer, index, own, group)
        for index, (own, group) in enumerate(zip(optimizer._groups, groups, strict=True))
    ]
    new_states = [
        _state(f"opt_state of group {index}", holder.value, state)
        for index, (holder, state) in enumerate(zip(opt_states, wanted, strict=True))
    ]
    scheduler, rates = optimizer.lr_scheduler, _entry(saved, "lr_scheduler")
    if rates.get("type") != type(scheduler).__name__:
        raise ValueError(
            f"lr_scheduler: expected the state of a {type(scheduler).__name__}, got that of a "
            f"{rates.get('type')}"
        )
    _, base_lrs, _ = scheduler._checked(rates)
    places = 1 + max((group.place for group in optimizer._groups), default=0)
    if len(base_lrs) < places:
        raise ValueError(f"lr_scheduler: expected {places} base_lrs at least, got {len(base_lrs)}")
    step_count = jnp.asarray(_entry(saved, "step_count"), jnp.int32).reshape(())

    scheduler.load_state_dict(rates)
    optimizer.step_count.value = step_count
    for holder, state in zip(opt_states, new_states, strict=True):
        holder.value = state
    optimizer._groups = new_groups
    if new_groups:  # the decay of the first group is that of the optimizer
        optimizer.weight_decay = new_groups[0].weight_decay
        optimizer.tx = optimizer.default_tx()
    optimizer._compile()


def _entry(saved: Any, name: str) -> Any:
    if not isinstance(saved, Mapping) or name not in saved:
        raise ValueError(f"state_dict: has no entry {name!r}")
    return saved[name]


def _entries(name: str, saved: Any, count: int) -> list[Any]:
    """The values of a dict with the keys "0", "1", ..."""
    if not isinstance(saved, Mapping) or set(saved) != {str(k) for k in range(count)}:
        got = list(saved) if isinstance(saved, Mapping) else type(saved).__name__
        raise ValueError(f"{name}: expected {count} of them, got {got}")
    return [saved[str(k)] for k in range(count)]


def _group(optimizer: Optimizer, index: int, group: Group, saved: Any) -> Group:
    """The group with the saved decay."""
    names, theirs = sorted(name for name, _ in group.paths), sorted(_entry(saved, "params"))
    if names != theirs:
        raise ValueError(f"param_groups[{index}]: expected the weights {names}, got {theirs}")
    decay = as_number("weight_decay", _entry(saved, "weight_decay"), weight_decay_range)
    if decay == group.weight_decay:
        return group
    given = {**dict(group.given), "weight_decay": decay}
    return replace(optimizer._group(given, group.lr, group.place), paths=group.paths)


def _state(name: str, own: State, saved: Any) -> State:
    """The saved state, with arrays of its own."""
    mine = _as_dict(own)
    for entry in mine:
        _entry(saved, entry)
    trees = {entry: saved[entry] for entry in mine}
    if jax.tree.structure(trees) != jax.tree.structure(mine):
        raise ValueError(f"{name}: its buffers or weights are not those of this optimizer")
    loaded: dict[str, Any] = jax.tree_util.tree_map_with_path(
        lambda path, array, new: _array(f"{name}: {jax.tree_util.keystr(path)}", array, new),
        mine,
        trees,
    )
    buffers = loaded.pop("buffers")
    return replace(own, buffers=buffers, **loaded)


def _array(place: str, mine: Any, saved: Any) -> Any:
    array = np.asarray(saved)
    if array.shape != mine.shape or array.dtype != mine.dtype:
        raise ValueError(
            f"{place}: expected an array of shape {mine.shape} and dtype {mine.dtype}, got "
            f"{array.shape} and {array.dtype}"
        )
    return jnp.array(array)  # a copy, which a donated step may overwrite


# --- registration -------------------------------------------------------------------------------


def carried_over(old: State, old_values: Tree, fresh: State, values: Tree) -> State:
    """The state of all weights, from that of the first ones and a fresh one of all."""
    buffers = {slot: {**own, **old.buffers[slot]} for slot, own in fresh.buffers.items()}
    places = {path: index for index, path in enumerate(_paths(values))}
    kept = np.array([places[path] for path in _paths(old_values)], np.int64)
    steps = fresh.leaf_steps.at[kept].set(old.leaf_steps)
    products = fresh.leaf_products
    if products.size:
        products = products.at[kept].set(old.leaf_products)
    return replace(old, buffers=buffers, leaf_steps=steps, leaf_products=products)


def _paths(values: Tree) -> list[str]:
    return [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(values)[0]
    ]
