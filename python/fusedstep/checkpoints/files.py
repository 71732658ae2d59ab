"""What stands in a checkpoint file, whatever its container.

Arrays are called `params/<number>:<key>`, `velocity/<number>:<key>` and so on. Everything else is
one JSON text: the numbers of the state dict, and a table that says which arrays belong to a key.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from fusedstep import _core
from fusedstep.buffers import Stored, stored
from fusedstep.checkpoints import npz, tensors
from fusedstep.checkpoints.placing import replacing
from fusedstep.checkpoints.state import Restored, capture
from fusedstep.codegen import SCALARS
from fusedstep.groups import Key
from fusedstep.ranges import shown

if TYPE_CHECKING:
    from fusedstep.base import Optimizer

FORMAT = "fusedstep checkpoint"
VERSION = 3
CONTAINERS = {".npz": npz, ".safetensors": tensors}
# What reading an entry of a wrong form may raise.
MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)


def _container(path: Path) -> ModuleType:
    """By the suffix: a misspelt one must not decide silently."""
    if path.suffix not in CONTAINERS:
        raise ValueError(f"path: expected a name in {' or '.join(CONTAINERS)}, got {path.name!r}")
    return CONTAINERS[path.suffix]


# --- writing --------------------------------------------------------------------------------------


def save(optimizer: Optimizer, path: str | os.PathLike[str], *, params: bool) -> None:
    """Writes a checkpoint: complete, or not at all."""
    container = _container(Path(path))
    plan, state = optimizer._bound_plan(), capture(optimizer)
    entries = state.pop("state")
    arrays: dict[str, Stored] = {}
    table = []
    for leaf, key in enumerate(optimizer._keys):
        entry = entries.get(key, {})
        scalars = {name: entry[name] for name in SCALARS if name in entry}
        kept = {name: value for name, value in entry.items() if name not in scalars}
        if params:
            kept["params"] = plan.leaf(leaf)
        places = {name: _store(arrays, name, leaf, key, value) for name, value in kept.items()}
        table.append({"key": key, "scalars": scalars, "arrays": places})
    header = {
        "format": FORMAT,
        "version": VERSION,
        "fusedstep": _core.build_info()["version"],
        "optimizer": type(optimizer).__name__,
        "has_params": params,
        **state,
        "table": table,
    }
    text = json.dumps(header, default=_plain)
    with replacing(Path(path)) as temporary:
        container.write(temporary, text, arrays)


def _plain(value: Any) -> Any:
    """Schedules of anyone's may keep NumPy's numbers."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"state of a schedule: a file cannot hold {shown(value)}")


def _store(arrays: dict[str, Stored], kind: str, leaf: int, key: Key, value: Any) -> dict[str, str]:
    # The number makes it unique; a key that an archive could mangle stands in the table only.
    text = str(key)
    plain = text.isprintable() and len(text) <= 200 and not text.endswith(".npy")
    name = f"{kind}/{leaf}:{text}" if plain else f"{kind}/{leaf}:"
    arrays[name] = stored(value)
    return {"name": name, "dtype": arrays[name].dtype}


# --- reading --------------------------------------------------------------------------------------


def load(optimizer: Optimizer, path: str | os.PathLike[str], *, params: bool) -> None:
    """Reads a checkpoint, checks all of it, then takes it over."""
    container = _container(Path(path))
    with Path(path).open("rb") as file:
        try:
            header, table = _read(*container.read(file))
            own = type(optimizer).__name__
            if header["optimizer"] != own:
                raise ValueError(f"a checkpoint of {shown(header['optimizer'])}, not of {own}")
            restored = Restored(optimizer, {**header, "state": _state_of(table)})
            if params and header["has_params"]:
                restored.read_params({key: kept.get("params") for key, (_, kept) in table.items()})
        except KeyError as error:
            raise ValueError(f"{os.fspath(path)}: missing {error}") from error
        except MALFORMED as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error
    restored.take_over()


# For each array its numbers and its buffers.
_Table = dict[Key, tuple[dict[str, Any], dict[str, Stored]]]


def _read(text: str, arrays: Mapping[str, Stored]) -> tuple[dict[str, Any], _Table]:
    """The header of a file and what belongs to each key."""
    header = json.loads(text)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError("no checkpoint of fusedstep")
    if header["version"] != VERSION:
        raise ValueError(
            f"checkpoint version {shown(header['version'])}; this release reads {VERSION}"
        )
    table: _Table = {}
    unused = dict(arrays)
    for entry in header["table"]:
        key, places = entry["key"], entry["arrays"].items()
        if key in table:
            raise ValueError(f"the table has the key {shown(key)} twice")
        table[key] = (entry["scalars"], {kind: _take(unused, place) for kind, place in places})
    if unused:
        raise ValueError(f"the table lacks {', '.join(map(shown, list(unused)[:5]))}")
    return header, table


def _take(unused: dict[str, Stored], place: Mapping[str, str]) -> Stored:
    """An array of the file, which belongs to one key only."""
    name, dtype = place["name"], place["dtype"]
    if name not in unused:
        raise ValueError(f"no array is called {shown(name)}, or two keys have it")
    found = unused.pop(name)
    if np.dtype("uint16" if dtype == "bfloat16" else dtype) != found.bits.dtype:
        raise ValueError(f"{name}: the header says {dtype}, but the array is {found.dtype}")
    return Stored(found.bits, dtype)


def _state_of(table: _Table) -> dict[Key, dict[str, Any]]:
    """The `state` of the state dict that was saved."""
    state: dict[Key, dict[str, Any]] = {}
    for key, (scalars, kept) in table.items():
        buffers = {kind: buffer for kind, buffer in kept.items() if kind != "params"}
        if scalars or buffers:
            state[key] = {**buffers, **scalars}
    return state
