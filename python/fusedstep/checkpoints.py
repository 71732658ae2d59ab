"""The state of an optimizer as a dict and as a file. What is loaded is checked first, all of it.

A file is an ordinary `.npz`: `params/<key>` and `velocity/<key>` for each array, and the entry
`fusedstep.json` (UTF-8 text as uint8) with everything else. bfloat16 arrays are stored as their
uint16 bits; the JSON entry has the dtypes.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from fusedstep import _core
from fusedstep.buffers import Stored, copy_like, note_writes, stored
from fusedstep.groups import (
    Group,
    Key,
    Members,
    assign_rows,
    check_complete,
    check_unchanged,
    make_plan,
)
from fusedstep.hyperparameters import lr_range
from fusedstep.ranges import Count, shown
from fusedstep.schedules import Schedule

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fusedstep.base import Optimizer

FORMAT = "fusedstep checkpoint"
VERSION = 1
HEADER = "fusedstep.json"
# Stands for a `weight_decay` that is a function: its code cannot be stored.
FUNCTION = "function"
# What reading an entry of a wrong form may raise.
MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


# --- dicts ----------------------------------------------------------------------------------------


def capture(optimizer: Optimizer) -> dict[str, Any]:
    """The state dict of an optimizer; its buffers are the live ones."""
    plan, state = optimizer._plan, {}
    for leaf, key in enumerate(optimizer._keys):
        assert plan is not None
        kept, step = plan.get_state(leaf), plan.get_steps(leaf)
        if step > 0 or kept:
            buffers = dict(zip(optimizer.declaration.slots, kept, strict=False))
            state[key] = {**buffers, "step": step}
    groups = [_entry(optimizer, index) for index in range(len(optimizer.param_groups))]
    return {"state": state, "param_groups": groups, "steps": optimizer.steps}


def _entry(optimizer: Optimizer, index: int) -> dict[str, Any]:
    """A param group as plain data."""
    group = optimizer.param_groups[index]
    check_complete(f"param_groups[{index}]", group, optimizer.defaults)
    entry: dict[str, Any] = {}
    for hyper in optimizer.declaration.of_group():
        value = group[hyper.name]
        if hyper.name == "lr":
            entry["lr"] = optimizer._lr_of(group)
        elif hyper.name == "weight_decay" and callable(value):
            entry["weight_decay"] = FUNCTION
        else:
            entry[hyper.name] = hyper.check(hyper.name, value)
    if isinstance(group["lr"], Schedule):
        entry["lr_scheduler"] = group["lr"].state_dict()
    entry["params"] = _keys_of(optimizer, index)
    return entry


def _keys_of(optimizer: Optimizer, group: int) -> list[Key]:
    plan = optimizer._bound_plan()
    return [key for leaf, key in enumerate(optimizer._keys) if plan.tree(leaf) == group]


def restore(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Takes over a state dict, or raises and changes nothing."""
    _Restored(optimizer, state).take_over()


class _Restored:
    """A state dict, checked and made ready; `take_over` cannot fail any more."""

    def __init__(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        self.optimizer = optimizer
        plan = optimizer._bound_plan()
        for name, kind in (("state", Mapping), ("param_groups", (list, tuple))):
            if not isinstance(state, Mapping) or not isinstance(state.get(name), kind):
                raise ValueError(f"state_dict: expected a dict with {name!r} as of state_dict()")
        self.schedules: list[tuple[Schedule, Mapping[str, Any]]] = []
        self.writes: list[tuple[NDArray[Any], Any]] = []
        self.written: list[Any] = []  # the arrays that they go to
        self.groups = self._read_groups(state["param_groups"])
        self.plan = make_plan(self.groups, optimizer._grouped)
        check_unchanged(self.plan, [plan.leaf(leaf) for leaf in range(len(plan))])
        self._read_state(state["state"])
        counts = [self.plan.get_steps(leaf) for leaf in range(len(self.plan))]
        self.steps = _count("steps", state.get("steps", max(counts)))
        self.members: list[Members] = assign_rows(self.plan, self.groups)
        optimizer._rows(self.groups, self.members)

    def take_over(self) -> None:
        optimizer = self.optimizer
        for target, value in self.writes:
            target[...] = value
        for schedule, saved in self.schedules:
            schedule.load_state_dict(saved)
        for group, new in zip(optimizer.param_groups, self.groups, strict=True):
            group.update(new)
        if optimizer._follow and type(optimizer.defaults["lr"]) is float:
            optimizer.defaults["lr"] = optimizer.param_groups[optimizer._follow[0]]["lr"]
        optimizer._bind(self.plan, optimizer._keys, self.members)
        optimizer._steps = self.steps
        note_writes(self.written)

    # --- param groups ---

    def _read_groups(self, saved: Sequence[Mapping[str, Any]]) -> list[Group]:
        groups = self.optimizer.param_groups
        if len(saved) != len(groups):
            raise ValueError(f"param_groups: expected {len(groups)} groups, got {len(saved)}")
        return [self._read_group(index, entry) for index, entry in enumerate(saved)]

    def _read_group(self, index: int, entry: Mapping[str, Any]) -> Group:
        where, group = f"param_groups[{index}]", self.optimizer.param_groups[index]
        check_complete(where, group, self.optimizer.defaults)
        if not isinstance(entry, Mapping) or not isinstance(entry.get("params"), (list, tuple)):
            raise ValueError(f"{where}: expected a dict with the list 'params', as of state_dict()")
        wanted = {hyper.name for hyper in self.optimizer.declaration.of_group()} | {"params"}
        found = set(entry) - {"lr_scheduler"}
        if found != wanted:
            raise ValueError(f"{where}: expected the keys {sorted(wanted)}, got {sorted(found)}")
        self._check_keys(where, list(entry["params"]), _keys_of(self.optimizer, index))
        new = {**group, **{name: entry[name] for name in wanted}, "params": group["params"]}
        new["lr"] = self._read_lr(f"{where}['lr']", group["lr"], entry)
        if (entry["weight_decay"] == FUNCTION) != callable(group["weight_decay"]):
            raise ValueError(
                f"{where}['weight_decay']: the saved one was {shown(entry['weight_decay'])}, here "
                f"it is {shown(group['weight_decay'])}; a function has to be given anew"
            )
        if callable(group["weight_decay"]):
            new["weight_decay"] = group["weight_decay"]
        return new

    @staticmethod
    def _check_keys(where: str, saved: list[Key], mine: list[Key]) -> None:
        if saved == mine:
            return
        lost = [shown(key) for key in mine if key not in saved][:5]
        extra = [shown(key) for key in saved if key not in mine][:5]
        differ = f"missing {', '.join(lost)}; " if lost else ""
        differ += f"unknown {', '.join(extra)}; " if extra else ""
        raise ValueError(
            f"{where}['params']: expected the {len(mine)} arrays of this optimizer, got "
            f"{len(saved)}; {differ or 'in another order; '}keys are paths, or indices in a list"
        )

    def _read_lr(self, where: str, lr: Any, entry: Mapping[str, Any]) -> Any:
        """What the group's `lr` becomes: schedules, functions and buffers stay, with new values."""
        saved = entry.get("lr_scheduler")
        if saved is not None and not isinstance(saved, Mapping):
            raise ValueError(f"{where}: lr_scheduler is no dict but {shown(saved)}")
        if isinstance(lr, Schedule):
            if saved is None:
                raise ValueError(
                    f"{where}: the saved one followed no schedule, here it follows {lr!r}; assign "
                    "lr_scheduler after loading"
                )
            type(lr).load_state_dict(_copy_of(lr), saved)
            self.schedules.append((lr, saved))
            return lr
        if saved is not None:
            raise ValueError(
                f"{where}: the saved one followed {saved['type']}, here there is no schedule; make "
                f"the optimizer with lr={saved['type']}(...)"
            )
        if isinstance(lr, (int, float, np.number)):
            return entry["lr"]
        if _core.is_array(lr):
            number = lr_range.number(where, entry["lr"])
            target, dtype = _core.array_view(lr, writable=True), _core.describe(lr)[1]
            with np.errstate(over="ignore"):
                exact = dtype != "bfloat16" and float(target.dtype.type(number)) == number
            if not exact:
                raise ValueError(f"{where}: a {dtype} buffer cannot hold {number!r} exactly")
            self.writes.append((target, number))
            self.written.append(lr)
        return lr

    # --- arrays ---

    def _read_state(self, saved: Mapping[Key, Mapping[str, Any]]) -> None:
        leaves = {key: leaf for leaf, key in enumerate(self.optimizer._keys)}
        for key, entry in saved.items():
            if key not in leaves:
                raise ValueError(f"state: no array of this optimizer has the key {shown(key)}")
            self._read_entry(f"state[{key!r}]", leaves[key], entry)

    def _read_entry(self, where: str, leaf: int, entry: Mapping[str, Any]) -> None:
        slots = self.optimizer.declaration.slots
        if not isinstance(entry, Mapping):
            raise ValueError(f"{where}: expected a dict, got {shown(entry)}")
        names = [name for name in slots if name in entry]
        if set(entry) != {*names, "step"} or len(names) not in {0, len(slots)}:
            raise ValueError(f"{where}: expected {[*slots, 'step']}, got {list(entry)}")
        param = self.plan.leaf(leaf)
        for name in names:
            if not isinstance(entry[name], Stored) and not _core.is_array(entry[name]):
                got = shown(entry[name])
                raise TypeError(f"{where}[{name!r}]: expected an array, got {got}")
            _check_shape(f"{where}[{name!r}]", param, entry[name])
        if names:
            self.plan.set_state(leaf, tuple(copy_like(param, entry[name]) for name in names))
        self.plan.set_steps(leaf, _count(f"{where}['step']", entry["step"]))

    def read_params(self, saved: Mapping[Key, Stored]) -> None:
        """Prepares the writes of parameters."""
        arrays = [self.plan.leaf(leaf) for leaf in range(len(self.plan))]
        for key, array in zip(self.optimizer._keys, arrays, strict=True):
            where, dtype = f"params[{key!r}]", stored(array).dtype
            _check_shape(where, array, saved[key])
            if dtype != saved[key].dtype:
                raise ValueError(f"{where}: expected dtype {dtype}, got {saved[key].dtype}")
            if stored(array).bits.dtype != saved[key].bits.dtype:
                raise ValueError(f"{where}: its elements are {saved[key].bits.dtype}, not {dtype}")
            self.writes.append((_core.array_view(array, writable=True), saved[key].bits))
        self.written += arrays


def _count(where: str, value: Any) -> int:
    """A number of steps, which the core keeps in 64 bits."""
    count = Count()(where, value)
    if count >= 2**63:
        raise ValueError(f"{where}: expected an integer < 2**63, got {shown(count)}")
    return count


def _copy_of(schedule: Schedule) -> Schedule:
    copied = object.__new__(type(schedule))
    vars(copied).update(vars(schedule))
    return copied


def _check_shape(where: str, mine: Any, saved: Any) -> None:
    shape, found = stored(mine).bits.shape, stored(saved).bits.shape
    if shape != found:
        raise ValueError(f"{where}: expected shape {shape}, got {found}")


# --- files ----------------------------------------------------------------------------------------


def save(optimizer: Optimizer, path: str | os.PathLike[str], *, params: bool) -> None:
    """Writes a checkpoint: complete, or not at all."""
    plan, state = optimizer._bound_plan(), capture(optimizer)
    arrays: dict[str, NDArray[Any]] = {}
    table = []
    for leaf, key in enumerate(optimizer._keys):
        entry = state["state"].get(key, {"step": 0})
        kept = {name: value for name, value in entry.items() if name != "step"}
        if params:
            kept["params"] = plan.leaf(leaf)
        places = {name: _store(arrays, name, leaf, key, value) for name, value in kept.items()}
        table.append({"key": key, "step": entry["step"], "arrays": places})
    header = {
        "format": FORMAT,
        "version": VERSION,
        "fusedstep": _core.build_info()["version"],
        "optimizer": type(optimizer).__name__,
        "has_params": params,
        "steps": state["steps"],
        "param_groups": state["param_groups"],
        "table": table,
    }
    arrays[HEADER] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    with _replacing(Path(path)) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _store(
    arrays: dict[str, NDArray[Any]], kind: str, leaf: int, key: Key, value: Any
) -> dict[str, str]:
    # The number makes it unique; a key that an archive could mangle stands in the table only.
    text = str(key)
    plain = text.isprintable() and len(text) <= 200 and not text.endswith(".npy")
    name = f"{kind}/{leaf}:{text}" if plain else f"{kind}/{leaf}:"
    arrays[name], dtype = stored(value)
    return {"name": name, "dtype": dtype}


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when it is complete and on the disk."""
    target = path.resolve()
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, survives a loss of power
    finally:
        os.close(folder)


def load(optimizer: Optimizer, path: str | os.PathLike[str], *, params: bool) -> None:
    """Reads a checkpoint, checks all of it, then takes it over."""
    with Path(path).open("rb") as file:
        try:
            header, table = _read(file)
            own = type(optimizer).__name__
            if header["optimizer"] != own:
                raise ValueError(f"a checkpoint of {header['optimizer']}, not of {own}")
            restored = _Restored(optimizer, {**header, "state": _state_of(table)})
            saved = {key: kept["params"] for key, (_, kept) in table.items() if "params" in kept}
            if params and header["has_params"]:
                restored.read_params(saved)
        except MALFORMED as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error
    restored.take_over()


_Table = dict[Key, tuple[int, dict[str, Stored]]]  # for each array its step and its buffers


def _read(file: IO[bytes]) -> tuple[dict[str, Any], _Table]:
    """Header and arrays of a file, read to the end: what is damaged is noticed here."""
    if file.read(2) != b"PK":
        raise ValueError("no checkpoint of fusedstep, which is an .npz file")
    file.seek(0)
    try:
        archive = np.load(file, allow_pickle=False)
        header = json.loads(archive[HEADER].tobytes())
        bits = {name: archive[name] for name in archive if name != HEADER}
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes zipfile and NumPy raise almost anything
        raise ValueError(f"no checkpoint of fusedstep, or a damaged one ({error})") from error
    if header["format"] != FORMAT:
        raise ValueError("no checkpoint of fusedstep")
    if header["version"] != VERSION:
        raise ValueError(f"checkpoint version {header['version']}; this release reads {VERSION}")
    table: _Table = {}
    for entry in header["table"]:
        places = entry["arrays"].items()
        kept = {kind: _stored_at(place, bits) for kind, place in places}
        table[entry["key"]] = (entry["step"], kept)
    return header, table


def _stored_at(place: Mapping[str, str], bits: Mapping[str, NDArray[Any]]) -> Stored:
    name, dtype = place["name"], place["dtype"]
    found = bits[name].dtype
    if found != np.dtype("uint16" if dtype == "bfloat16" else dtype):
        raise ValueError(f"{name}: the header says {dtype}, but the array is {found}")
    return Stored(bits[name], dtype)


def _state_of(table: _Table) -> dict[Key, dict[str, Any]]:
    """The `state` of the state dict that was saved."""
    state: dict[Key, dict[str, Any]] = {}
    for key, (step, kept) in table.items():
        buffers = {kind: buffer for kind, buffer in kept.items() if kind != "params"}
        if step > 0 or buffers:
            state[key] = {**buffers, "step": step}
    return state
