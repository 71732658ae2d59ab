"""Param groups: what a user may pass as `params`, and how groups, arrays and rows hang together."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import numpy as np

from fusedstep import _core
from fusedstep.hyperparameters import weight_decay_range
from fusedstep.ranges import shown

Group: TypeAlias = dict[str, Any]
"""The hyper-parameters of a group and its tree, under the key `params`."""

Key: TypeAlias = int | str
"""What `state_dict` calls an array: its index in a sequence, its dotted path in a dict."""


def is_group_list(params: object) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    """A list is one of param groups only if every element has the key `params`."""
    return (
        isinstance(params, (list, tuple))
        and len(params) > 0
        and all(isinstance(element, Mapping) and "params" in element for element in params)
    )


def as_tree(params: Any) -> Any:
    """Iterators as lists, since a tree is walked again; (name, array) pairs as a dict."""
    if isinstance(params, (numbers.Number, np.number)):
        raise TypeError(f"params: got {shown(params)}; params comes first, write lr={params}")
    if isinstance(params, (str, bytes)):
        raise TypeError(f"params: expected arrays, got {shown(params)}")
    plain = isinstance(params, (list, tuple)) or is_dict(params) or _core.is_array(params)
    if not plain and isinstance(params, Iterable):
        params = list(params)
    pairs = isinstance(params, (list, tuple)) and len(params) > 0
    if pairs and all(_is_named(element) for element in params):
        return _dict_of_pairs(params)
    return params


def is_dict(node: object) -> bool:
    """A mapping, or what reads like one, as the core sees it (`torch.nn.ParameterDict`, say)."""
    return isinstance(node, Mapping) or (hasattr(node, "keys") and hasattr(node, "items"))


def _dict_of_pairs(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Of two arrays with one name `dict` would keep the last without a word."""
    named: dict[str, Any] = {}
    for name, array in pairs:
        if name in named:
            raise ValueError(f"params: the name {name!r} occurs twice; pass a dict or param groups")
        named[name] = array
    return named


def _is_named(element: object) -> bool:
    return isinstance(element, tuple) and len(element) == 2 and isinstance(element[0], str)


def read_groups(params: Any, defaults: Mapping[str, Any]) -> list[Group]:
    """The groups in `params`, each with all hyper-parameters; the user's dicts are not kept."""
    if not is_group_list(params):
        return [{**defaults, "params": as_tree(params)}]
    groups = []
    for index, given in enumerate(params):
        check_keys(f"params[{index}]", given, defaults)
        groups.append({**defaults, **given, "params": as_tree(given["params"])})
    return groups


def check_keys(name: str, group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuses what no group may set: a misspelt key must not be ignored."""
    unknown = [key for key in group if key not in defaults and key != "params"]
    if unknown:
        raise ValueError(
            f"{name}: unknown {'keys' if len(unknown) > 1 else 'key'} "
            f"{', '.join(map(shown, unknown))}; a group may set {', '.join(defaults)}"
        )


def check_complete(name: str, group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuses a group to which keys were added, or from which they were deleted."""
    if len(group) == len(defaults) + 1 and defaults.keys() <= group.keys():
        return
    check_keys(name, group, defaults)
    missing = [key for key in (*defaults, "params") if key not in group]
    raise ValueError(f"{name}: missing {', '.join(map(shown, missing))}")


def make_plan(
    groups: Sequence[Group], grouped: bool, slots: Sequence[str], old: _core.Plan | None = None
) -> _core.Plan:
    """A plan over the trees of `groups`; arrays that `old` has, too, keep their state."""
    names = [f"params[{k}]['params']" if grouped else "params" for k in range(len(groups))]
    plan = _core.Plan([group["params"] for group in groups], names, slots)
    if len(plan) == 0:
        raise ValueError("params is empty (an exhausted generator?)")
    known = {id(old.leaf(k)): k for k in range(len(old))} if old is not None else {}
    for leaf in range(len(plan)):
        k = known.get(id(plan.leaf(leaf)))
        if old is not None and k is not None:
            plan.set_state(leaf, old.get_state(k))
            plan.set_progress(leaf, *old.get_progress(k))
    return plan


def check_unchanged(plan: _core.Plan, leaves: Sequence[Any]) -> None:
    """Refuses trees that have come to hold other arrays since they were registered."""
    same = len(plan) == len(leaves) and all(plan.leaf(k) is a for k, a in enumerate(leaves))
    if not same:
        raise ValueError(
            "params: the tree has changed since it was registered; assign to arrays in place, or "
            "register it again"
        )


class Members(NamedTuple):
    """What a group's arrays share, as of their registration.

    `decay` is the function that `weight_decay` was, or None; `decays` its values, one for each row
    of the group. A group has more rows than one only if the function tells its arrays apart.
    """

    decay: Callable[[str, Any], float] | None
    decays: tuple[float, ...]


def assign_rows(plan: _core.Plan, groups: Sequence[Group]) -> list[Members]:
    """Evaluates the decay functions and tells the plan which row each array uses."""
    leaves: list[list[int]] = [[] for _ in groups]
    for leaf in range(len(plan)):
        leaves[plan.tree(leaf)].append(leaf)
    members: list[Members] = []
    row_of: dict[int, int] = {}
    first_row = 0
    for group, own in zip(groups, leaves, strict=True):
        decay = group["weight_decay"]
        rows: dict[float, int] = {}
        for leaf in own:
            value = _decay_of(decay, plan, leaf) if callable(decay) else 0.0
            row_of[leaf] = first_row + rows.setdefault(value, len(rows))
        members.append(Members(decay if callable(decay) else None, tuple(rows) or (0.0,)))
        first_row += len(members[-1].decays)
    for leaf, row in row_of.items():  # after all functions: one that raises has changed nothing
        plan.set_row(leaf, row)
    return members


def _decay_of(decay: Callable[[str, Any], float], plan: _core.Plan, leaf: int) -> float:
    if isinstance(decay, type):
        raise TypeError(f"weight_decay: got the class {decay.__name__}, pass a function")
    path = dotted(plan.path(leaf))
    return weight_decay_range.number(f"weight_decay({path!r})", decay(path, plan.leaf(leaf)))


def dotted(path: Sequence[str | int]) -> str:
    """A path as users write it: `layers.0.W`."""
    return ".".join(map(str, path))


def leaf_keys(plan: _core.Plan, groups: Sequence[Group]) -> list[Key]:
    """What `state_dict` calls each array. Keys stay as they are when groups are added later."""
    keys: list[Key] = []
    taken: set[str] = set()
    for leaf in range(len(plan)):
        path, tree = plan.path(leaf), plan.tree(leaf)
        named = is_dict(groups[tree]["params"]) or any(isinstance(k, str) for k in path)
        key: Key = dotted(path) if named else leaf
        if str(key) in taken and tree > 0:
            key = f"{tree}.{dotted(path)}"  # two groups with the same names
        if str(key) in taken:
            raise ValueError(f"params: two arrays have the same path {str(key)!r}")
        taken.add(str(key))
        keys.append(key)
    return keys
