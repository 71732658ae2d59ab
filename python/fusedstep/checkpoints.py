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
from fusedstep.codegen import SCALARS
from fusedstep.groups import (
    Group,
    Key,
    Members,
    assign_rows,
    check_complete,
    check_unchanged,
    dotted,
    make_plan,
)
from fusedstep.hyperparameters import Hyperparameter
from fusedstep.ranges import Count, shown
from fusedstep.scheduled import AnySchedule, Scheduled, is_buffer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fusedstep.base import Optimizer

FORMAT = "fusedstep checkpoint"
VERSION = 2
HEADER = "fusedstep.json"
# Stands for a `weight_decay` that is a function: its code cannot be stored.
FUNCTION = "function"
STEP = Count(0, 2**62)
# What reading an entry of a wrong form may raise.
MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


# --- dicts ----------------------------------------------------------------------------------------


def capture(optimizer: Optimizer) -> dict[str, Any]:
    """The state dict of an optimizer; its buffers are the live ones."""
    plan, state = optimizer._plan, {}
    for leaf, key in enumerate(optimizer._keys):
        assert plan is not None
        kept, progress = plan.get_state(leaf), plan.get_progress(leaf)
        if progress[0] > 0 or kept:
            scalars = zip(_scalars(optimizer), progress, strict=False)
            state[key] = {**kept, **dict(scalars)}
    groups = [_entry(optimizer, index) for index in range(len(optimizer.param_groups))]
    steps = {"steps": optimizer.steps, "skipped_steps": optimizer.skipped_steps}
    return {"state": state, "param_groups": groups, **steps}


def _scalars(optimizer: Optimizer) -> tuple[str, ...]:
    """What an array's entry has besides its buffers: a count, whether its rule reads it or not."""
    return optimizer.declaration.scalars or ("step",)


def _entry(optimizer: Optimizer, index: int) -> dict[str, Any]:
    """A param group as plain data."""
    group = optimizer.param_groups[index]
    check_complete(f"param_groups[{index}]", group, optimizer.defaults)
    entry: dict[str, Any] = {}
    for hyper in optimizer.declaration.of_group():
        value = group[hyper.name]
        if isinstance(hyper.check, Scheduled):
            entry[hyper.name] = hyper.check.at(hyper.name, value, optimizer.steps)
            schedule = hyper.check.schedule_of(value)
            if schedule is not None:
                entry[f"{hyper.check.noun}_scheduler"] = schedule.state_dict()
        elif hyper.name == "weight_decay" and callable(value):
            entry["weight_decay"] = FUNCTION
        else:
            entry[hyper.name] = hyper.check(hyper.name, value)
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
        self.schedules: list[tuple[AnySchedule, Mapping[str, Any]]] = []
        self.writes: list[tuple[NDArray[Any], Any]] = []
        self.written: list[Any] = []  # the arrays that they go to
        self.groups = self._read_groups(state["param_groups"])
        self.plan = make_plan(self.groups, optimizer._grouped, optimizer.declaration.slots)
        check_unchanged(self.plan, [plan.leaf(leaf) for leaf in range(len(plan))])
        self._read_state(state["state"])
        counts = [self.plan.get_progress(leaf)[0] for leaf in range(len(self.plan))]
        self.steps = STEP("steps", state.get("steps", max(counts)))
        self.skipped_steps = STEP("skipped_steps", state.get("skipped_steps", 0))
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
        optimizer._steps, optimizer._skipped_steps = self.steps, self.skipped_steps
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
        found = set(entry) - {"lr_scheduler", "momentum_scheduler"}
        if found != wanted:
            raise ValueError(f"{where}: expected the keys {sorted(wanted)}, got {sorted(found)}")
        self._check_keys(where, list(entry["params"]), _keys_of(self.optimizer, index))
        new = {**group, **{name: entry[name] for name in wanted}, "params": group["params"]}
        for hyper in self.optimizer.declaration.of_group():
            if isinstance(hyper.check, Scheduled):
                new[hyper.name] = self._read_scheduled(where, hyper, group[hyper.name], entry)
            elif entry[hyper.name] != FUNCTION:
                new[hyper.name] = hyper.check(f"{where}[{hyper.name!r}]", entry[hyper.name])
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

    def _read_scheduled(
        self, where: str, hyper: Hyperparameter, mine: Any, entry: Mapping[str, Any]
    ) -> Any:
        """What the group's value becomes: schedules, functions and buffers stay."""
        where, check = f"{where}[{hyper.name!r}]", hyper.check
        assert isinstance(check, Scheduled)
        saved, schedule = entry.get(f"{check.noun}_scheduler"), check.schedule_of(mine)
        if saved is not None and not isinstance(saved, Mapping):
            raise ValueError(f"{where}: {check.noun}_scheduler is no dict but {shown(saved)}")
        if schedule is not None and saved is None:
            raise ValueError(
                f"{where}: the saved one followed no schedule, here it follows {schedule!r}; "
                "assign the schedule after loading"
            )
        if schedule is None and saved is not None:
            raise ValueError(
                f"{where}: the saved one followed {saved['type']}, here there is no schedule; make "
                f"the optimizer with {hyper.name}={saved['type']}(...)"
            )
        if schedule is not None and saved is not None:
            schedule.copied().load_state_dict(saved)
            self.schedules.append((schedule, saved))
        number = check(where, entry[hyper.name])
        if is_buffer(mine):
            self._write_number(where, mine, number)
        return check.restored(mine, number)

    def _write_number(self, where: str, buffer: Any, number: float) -> None:
        target, dtype = _core.array_view(buffer, writable=True), _core.describe(buffer)[1]
        with np.errstate(over="ignore"):
            exact = dtype != "bfloat16" and float(target.dtype.type(number)) == number
        if not exact:
            raise ValueError(f"{where}: a {dtype} buffer cannot hold {number!r} exactly")
        self.writes.append((target, number))
        self.written.append(buffer)

    # --- arrays ---

    def _read_state(self, saved: Mapping[Key, Mapping[str, Any]]) -> None:
        leaves = {key: leaf for leaf, key in enumerate(self.optimizer._keys)}
        for key, entry in saved.items():
            if key not in leaves:
                raise ValueError(f"state: no array of this optimizer has the key {shown(key)}")
            self._read_entry(f"state[{key!r}]", leaves[key], entry)

    def _read_entry(self, where: str, leaf: int, entry: Mapping[str, Any]) -> None:
        slots, scalars = self.optimizer.declaration.slots, _scalars(self.optimizer)
        if not isinstance(entry, Mapping):
            raise ValueError(f"{where}: expected a dict, got {shown(entry)}")
        names = [name for name in slots if name in entry]
        if set(entry) != {*names, *scalars}:
            raise ValueError(f"{where}: expected {[*slots, *scalars]}, got {list(entry)}")
        buffers = {name: _copied(where, name, self.plan.leaf(leaf), entry[name]) for name in names}
        self.plan.set_state(leaf, buffers)
        checked = {name: SCALARS[name][0](f"{where}[{name!r}]", entry[name]) for name in scalars}
        self.plan.set_progress(leaf, checked["step"], checked.get("mu_product", 1.0))

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


def _copied(where: str, name: str, param: Any, buffer: Any) -> Any:
    """A state buffer in the form of its parameter, with the elements of `buffer`."""
    if not isinstance(buffer, Stored) and not _core.is_array(buffer):
        raise TypeError(f"{where}[{name!r}]: expected an array, got {shown(buffer)}")
    _check_shape(f"{where}[{name!r}]", param, buffer)
    return copy_like(param, buffer)


def _check_shape(where: str, mine: Any, saved: Any) -> None:
    shape, found = stored(mine).bits.shape, stored(saved).bits.shape
    if shape != found:
        raise ValueError(f"{where}: expected shape {shape}, got {found}")


# --- state from elsewhere ---------------------------------------------------------------------


def assign(optimizer: Optimizer, trees: Mapping[str, Any], scalars: Mapping[str, Any]) -> None:
    """Puts trees of state buffers and numbers into an optimizer, or raises and changes nothing."""
    plan, declaration = optimizer._bound_plan(), optimizer.declaration
    for name in (*trees, *scalars):
        known = declaration.slots if name in trees else _scalars(optimizer)
        if name not in known:
            raise TypeError(f"{name}: no state of {declaration.class_name}; it has {known}")
    new = make_plan(optimizer.param_groups, optimizer._grouped, declaration.slots, plan)
    numbers = {name: SCALARS[name][0](name, value) for name, value in scalars.items()}
    leaves = {(plan.tree(leaf), plan.path(leaf)): leaf for leaf in range(len(plan))}
    states = [new.get_state(leaf) for leaf in range(len(new))]
    for name, tree in trees.items():
        for group, own in enumerate(optimizer._per_group(name, tree) or []):
            for path, buffer in _core.flatten(own, name):
                leaf = leaves.get((group, path))
                if leaf is None:
                    raise ValueError(f"{name}: params has no array at {dotted(path)!r}")
                if buffer is not None:
                    states[leaf][name] = _copied(name, dotted(path), plan.leaf(leaf), buffer)
    for leaf, state in enumerate(states):
        new.set_state(leaf, state)
        steps, product = plan.get_progress(leaf)
        new.set_progress(leaf, numbers.get("step", steps), numbers.get("mu_product", product))
    members = assign_rows(new, optimizer.param_groups)
    optimizer._bind(new, optimizer._keys, members)


# --- files ----------------------------------------------------------------------------------------


def save(optimizer: Optimizer, path: str | os.PathLike[str], *, params: bool) -> None:
    """Writes a checkpoint: complete, or not at all."""
    plan, state = optimizer._bound_plan(), capture(optimizer)
    arrays: dict[str, NDArray[Any]] = {}
    table = []
    for leaf, key in enumerate(optimizer._keys):
        entry = state["state"].get(key, {})
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
        "steps": state["steps"],
        "skipped_steps": state["skipped_steps"],
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


# For each array its numbers and its buffers.
_Table = dict[Key, tuple[dict[str, Any], dict[str, Stored]]]


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
        table[entry["key"]] = (entry["scalars"], kept)
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
    for key, (scalars, kept) in table.items():
        buffers = {kind: buffer for kind, buffer in kept.items() if kind != "params"}
        if scalars or buffers:
            state[key] = {**buffers, **scalars}
    return state
