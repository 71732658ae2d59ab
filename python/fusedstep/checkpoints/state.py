"""The state of an optimizer as a dict. What is loaded is checked first, all of it."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from fusedstep import _core
from fusedstep.buffers import (
    Stored,
    check_writable,
    copy_like,
    dtype_of,
    note_writes,
    shape_of,
)
from fusedstep.codegen import SCALARS
from fusedstep.groups import (
    Group,
    Key,
    Members,
    assign_rows,
    check_complete,
    check_unchanged,
    make_plan,
)
from fusedstep.hyperparameters import Hyperparameter
from fusedstep.ranges import Count, shown
from fusedstep.scheduled import AnySchedule, Scheduled, is_buffer, read_number
from fusedstep.schedules import MomentumSchedule, Schedule

if TYPE_CHECKING:
    from fusedstep.base import Optimizer

# Stands for a `weight_decay`, a learning rate or a momentum that is a function: its code cannot be
# stored.
FUNCTION = "function"
STEP = Count(0, 2**62)
START = (0, 1.0)  # an array's progress before its first step


# --- out of an optimizer --------------------------------------------------------------------------


def capture(optimizer: Optimizer) -> dict[str, Any]:
    """The state dict of an optimizer; its buffers are the live ones."""
    plan, state = optimizer._plan, {}
    for leaf, key in enumerate(optimizer._keys):
        assert plan is not None
        kept, progress = plan.get_state(leaf), plan.get_progress(leaf)
        if progress != START or kept:
            scalars = zip(scalars_of(optimizer), progress, strict=False)
            state[key] = {**kept, **dict(scalars)}
    groups = [_entry(optimizer, index) for index in range(len(optimizer.param_groups))]
    policy = {h.name: h.check(h.name, getattr(optimizer, h.name)) for h in _of_call(optimizer)}
    steps = {"steps": optimizer.steps, "skipped_steps": optimizer.skipped_steps}
    return {"state": state, "param_groups": groups, **policy, **steps}


def _of_call(optimizer: Optimizer) -> tuple[Hyperparameter, ...]:
    return optimizer.declaration.of_call()


def scalars_of(optimizer: Optimizer) -> tuple[str, ...]:
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
            elif hyper.check.is_function(value):
                entry[f"{hyper.check.noun}_scheduler"] = FUNCTION
        elif hyper.name == "weight_decay" and callable(value):
            entry["weight_decay"] = FUNCTION
        else:
            entry[hyper.name] = hyper.check(hyper.name, value)
    entry["params"] = _keys_of(optimizer, index)
    return entry


def _keys_of(optimizer: Optimizer, group: int) -> list[Key]:
    plan = optimizer._bound_plan()
    return [key for leaf, key in enumerate(optimizer._keys) if plan.tree(leaf) == group]


# --- into an optimizer ----------------------------------------------------------------------------


def restore(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Takes over a state dict, or raises and changes nothing."""
    Restored(optimizer, state).take_over()


def settled_plan(optimizer: Optimizer) -> _core.Plan:
    """The plan of an optimizer, which no gradients of an earlier state may wait for."""
    plan = optimizer._bound_plan()
    if plan.has_accumulated():
        raise ValueError(
            "grads: some were accumulated for a step; call step() or zero_grad() first"
        )
    return plan


class Restored:
    """A state dict, checked and made ready; `take_over` cannot fail any more."""

    def __init__(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        self.optimizer = optimizer
        plan = settled_plan(optimizer)
        for name, kind in (("state", Mapping), ("param_groups", (list, tuple))):
            if not isinstance(state, Mapping) or not isinstance(state.get(name), kind):
                raise ValueError(f"state_dict: expected a dict with {name!r} as of state_dict()")
        self.schedules: dict[int, tuple[AnySchedule, Mapping[str, Any]]] = {}
        self.writes: list[tuple[Any, Any]] = []  # arrays, and what goes into them
        self.groups = self._read_groups(state["param_groups"])
        self.plan = make_plan(self.groups, optimizer._grouped, optimizer.declaration.slots)
        check_unchanged(self.plan, [plan.leaf(leaf) for leaf in range(len(plan))])
        self._read_state(state["state"])
        counts = [self.plan.get_progress(leaf)[0] for leaf in range(len(self.plan))]
        self.steps = STEP("steps", state.get("steps", max(counts)))
        self.skipped_steps = STEP("skipped_steps", state.get("skipped_steps", 0))
        called = [hyper for hyper in _of_call(optimizer) if hyper.name in state]
        self.policy = {h.name: h.check(h.name, state[h.name]) for h in called}
        self.members: list[Members] = assign_rows(self.plan, self.groups)
        optimizer._rows(self.groups, self.members)

    def take_over(self) -> None:
        """Writes everything into the optimizer and its arrays."""
        optimizer = self.optimizer
        for target, value in self.writes:
            _core.write(target, value)
        for schedule, saved in self.schedules.values():
            schedule.load_state_dict(saved)
        for group, new in zip(optimizer.param_groups, self.groups, strict=True):
            group.update(new)
        if optimizer._follow and type(optimizer.defaults["lr"]) is float:
            optimizer.defaults["lr"] = optimizer.param_groups[optimizer._follow[0]]["lr"]
        optimizer._bind(self.plan, optimizer._keys, self.members)
        optimizer._steps, optimizer._skipped_steps = self.steps, self.skipped_steps
        vars(optimizer).update(self.policy)
        note_writes([target for target, _ in self.writes])

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
                place, mine = f"{where}[{hyper.name!r}]", group[hyper.name]
                new[hyper.name] = hyper.check(place, entry[hyper.name])
                if is_buffer(mine):
                    self._write_number(place, mine, new[hyper.name])
                    new[hyper.name] = mine
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
        own: Any = schedule
        if own is None and check.is_function(mine):
            own = FUNCTION
        if isinstance(saved, Mapping) and schedule is not None:
            self._share(where, schedule, saved)
        elif saved != own:
            raise ValueError(
                f"{where}: the saved one followed {_leader(saved)}, here it follows "
                f"{_leader(own)}; load into the {hyper.name} that was saved, and change it then"
            )
        number = check(where, entry[hyper.name])
        pair = isinstance(number, tuple)
        if is_buffer(mine[0] if pair else mine):
            self._write_number(where, *((mine[0], number[0]) if pair else (mine, number)))
        return check.restored(mine, number)

    def _share(self, where: str, schedule: AnySchedule, saved: Mapping[str, Any]) -> None:
        """Groups may have one schedule, which can go on from one place only."""
        schedule.copied().load_state_dict(saved)
        known = self.schedules.setdefault(id(schedule), (schedule, saved))[1]
        if repr(known) != repr(saved):  # as text, in which NaN is like itself
            raise ValueError(
                f"{where}: groups that share this schedule were saved with different ones"
            )

    def _write_number(self, where: str, buffer: Any, number: float) -> None:
        check_writable(buffer)
        dtype = dtype_of(buffer)
        with np.errstate(over="ignore"):
            exact = dtype != "bfloat16" and float(np.dtype(dtype).type(number)) == number
        if not exact:
            raise ValueError(f"{where}: a {dtype} buffer cannot hold {number!r} exactly")
        self.writes.append((buffer, number))

    # --- arrays ---

    def _read_state(self, saved: Mapping[Key, Mapping[str, Any]]) -> None:
        leaves = {str(key): leaf for leaf, key in enumerate(self.optimizer._keys)}
        for key, entry in saved.items():
            leaf = leaves.pop(str(key), None)  # in JSON the key 0 has become "0"
            if leaf is None:
                raise ValueError(
                    f"state: no array of this optimizer has the key {shown(key)}, or it is there "
                    "twice"
                )
            self._read_entry(f"state[{key!r}]", leaf, entry)

    def _read_entry(self, where: str, leaf: int, entry: Mapping[str, Any]) -> None:
        slots, scalars = self.optimizer.declaration.slots, scalars_of(self.optimizer)
        if not isinstance(entry, Mapping):
            raise ValueError(f"{where}: expected a dict, got {shown(entry)}")
        names = [name for name in slots if name in entry]
        if set(entry) != {*names, *scalars}:
            raise ValueError(f"{where}: expected {[*slots, *scalars]}, got {list(entry)}")
        param, buffers = self.plan.leaf(leaf), {}
        for name in names:
            check_buffer(f"{where}[{name!r}]", param, entry[name])
            buffers[name] = copy_like(param, entry[name])
        self.plan.set_state(leaf, buffers)
        checked = {name: scalar(f"{where}[{name!r}]", name, entry[name]) for name in scalars}
        self.plan.set_progress(leaf, checked["step"], checked.get("mu_product", 1.0))

    def read_params(self, saved: Mapping[Key, Stored | None]) -> None:
        """Prepares the writes of parameters."""
        arrays = [self.plan.leaf(leaf) for leaf in range(len(self.plan))]
        for key, array in zip(self.optimizer._keys, arrays, strict=True):
            where, dtype, found = f"params[{key!r}]", dtype_of(array), saved.get(key)
            if found is None:
                raise ValueError(f"{where}: there is no such array")
            check_buffer(where, array, found)
            if dtype != found.dtype:
                raise ValueError(f"{where}: expected dtype {dtype}, got {found.dtype}")
            if np.dtype("uint16" if dtype == "bfloat16" else dtype) != found.bits.dtype:
                raise ValueError(f"{where}: its elements are {found.bits.dtype}, not {dtype}")
            check_writable(array)
            self.writes.append((array, found.bits))


def _leader(saved: Any) -> str:
    """What a value follows, as messages say it."""
    if isinstance(saved, Mapping):
        return str(saved.get("type"))
    if isinstance(saved, (Schedule, MomentumSchedule)):
        return repr(saved)
    if saved is None:
        return "no schedule"
    return "a function of t" if saved == FUNCTION else shown(saved)


def check_buffer(where: str, param: Any, buffer: Any) -> None:
    """Refuses what is no array of the shape of its parameter."""
    if not isinstance(buffer, Stored) and not is_buffer(buffer):
        raise TypeError(f"{where}: expected an array, got {shown(buffer)}")
    try:
        found = shape_of(buffer)
    except (TypeError, ValueError, BufferError) as error:
        raise type(error)(f"{where}: {str(error).removeprefix('array: ')}") from error
    shape = shape_of(param)
    if shape != found:
        raise ValueError(f"{where}: expected shape {shape}, got {found}")


def scalar(where: str, name: str, value: Any) -> Any:
    """A number of the state; torch keeps its counts in 0-d arrays of floats."""
    if is_buffer(value):
        value = _number_in(where, value)
    whole = isinstance(value, (float, np.floating)) and float(value).is_integer()
    return SCALARS[name][0](where, int(value) if whole and name == "step" else value)


def _number_in(where: str, array: Any) -> int | float:
    with suppress(TypeError):
        return operator.index(array)
    return read_number(where, array)
