"""brainstate states in a tree: found at registration, and gradients by the same paths."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax
from brainstate import State

from fusedstep.ranges import shown

Tree: TypeAlias = Any
Path: TypeAlias = tuple[Any, ...]


class Weight(NamedTuple):
    """A state with a weight (or a pytree of them), and where it was in the registered tree."""

    path: Path
    state: State


def _is_state(node: object) -> bool:
    return isinstance(node, State)


def _plain(key: Any) -> Any:
    """What a container is indexed with; what is an attribute stays the key that says so."""
    for attribute in ("key", "idx"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return key


def _child(node: Any, key: Any) -> Any:
    """What a node has at an element of a path."""
    if isinstance(key, jax.tree_util.GetAttrKey):  # of a named tuple, a registered dataclass
        return getattr(node, key.name)
    return node[key]


def spelled(path: Path) -> str:
    """A path as a name: `layers.0.weight`."""
    parts: list[str] = []
    for key in path:
        plain = key.name if isinstance(key, jax.tree_util.GetAttrKey) else key
        parts += map(str, plain) if isinstance(plain, tuple) else [str(plain)]
    return ".".join(parts)


def weights_in(argument: str, tree: Tree) -> dict[str, Weight]:
    """The states of a tree by name, each once, in its order.

    Raises:
        TypeError: If a leaf is no brainstate state.
        ValueError: If there is none, or two have the same name.
    """
    found: dict[str, Weight] = {}
    seen: set[int] = set()
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_state)[0]:
        path = tuple(map(_plain, keys))
        name = spelled(path) or "weight"
        if not isinstance(leaf, State):
            raise TypeError(
                f"{argument}[{name!r}]: expected a brainstate.State, such as the ParamStates of "
                f"model.states(brainstate.ParamState), got {shown(leaf)}"
            )
        if id(leaf) in seen:  # a shared weight: once, under its first name
            continue
        if name in found:
            raise ValueError(f"{argument}: two states have the same path {name!r}")
        seen.add(id(leaf))
        found[name] = Weight(path, leaf)
    if not found:
        raise ValueError(f"{argument}: holds no states")
    return found


# --- gradients ----------------------------------------------------------------------------------


def gradient_at(grads: Tree, path: Path, value: Tree) -> Tree:
    """The gradient of the weight at `path`, a tree like `value`; None in places without one.

    Raises:
        ValueError: If there is no entry, or it has another form or unit than the weight.
    """
    node = grads
    for depth, key in enumerate(path):
        try:
            node = _child(node, key)
        except (AttributeError, KeyError, IndexError, TypeError):
            name = spelled(path[: depth + 1])
            raise ValueError(
                f"grads: has no entry {name!r}; pass None there to leave a weight alone"
            ) from None
        if node is None:
            break
    if node is None:
        return jax.tree.map(lambda _: None, value)
    _check_units(spelled(path), value, node)
    return node


def is_quantity(node: object) -> bool:
    """A number with a unit: a pytree node of brainunit's, whose one leaf is the mantissa."""
    return hasattr(node, "mantissa") and hasattr(node, "unit")


def _units(tree: Tree) -> list[str | None]:
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: node is None or is_quantity(node))
    return [str(node.unit) if is_quantity(node) else None for node in nodes]


def _check_units(name: str, value: Tree, grad: Tree) -> None:
    """The update is one of mantissas, so a gradient has to come in the unit of its weight."""
    wanted, got = _units(value), _units(grad)
    if wanted == got or len(wanted) != len(got):  # another form: the step says where
        return
    pairs = [(w, g) for w, g in zip(wanted, got, strict=True) if w != g]
    raise ValueError(
        f"grads[{name!r}]: expected the unit of the weight, {pairs[0][0]}, got {pairs[0][1]}; "
        "brainstate.transform.grad gives such gradients of a loss without a unit"
    )
