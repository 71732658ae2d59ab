"""How an optimizer describes itself to a reader."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fusedstep.hyperparameters import Hyperparameter
from fusedstep.ranges import shown
from fusedstep.schedules import MomentumSchedule, Schedule

if TYPE_CHECKING:
    from fusedstep.base import Optimizer

_PLAIN = (bool, int, float, str, type(None))


def describe(optimizer: Optimizer) -> str:
    """Class, what differs from its defaults, and sizes; several groups get a line each."""
    groups, declaration = optimizer.param_groups, optimizer.declaration
    shared = groups[0] if len(groups) == 1 else optimizer.defaults
    call = {hyper.name: getattr(optimizer, hyper.name) for hyper in declaration.of_call()}
    hypers = [
        *_told(shared, declaration.of_group(), always=("lr", "momentum")),
        *_told(call, declaration.of_call()),
    ]
    sizes = {"array": len(optimizer._keys), "group": len(groups), "step": optimizer.steps}
    counts = [_counted(size, noun) for noun, size in sizes.items()]
    if optimizer.skipped_steps:
        counts.append(f"{optimizer.skipped_steps} skipped")
    text = f"{declaration.class_name}({', '.join(hypers)}; {', '.join(counts)})"
    if len(groups) < 2:
        return text
    return "\n".join([text, *(f"  {_group_line(optimizer, k)}" for k in range(len(groups)))])


def _group_line(optimizer: Optimizer, index: int) -> str:
    group, defaults, plan = optimizer.param_groups[index], optimizer.defaults, optimizer._plan
    arrays = sum(plan is not None and plan.tree(k) == index for k in range(len(optimizer._keys)))
    own = [
        f"{name}={_brief(group[name])}"
        for name, default in defaults.items()
        if name in group and _differs(group[name], default)
    ]
    return ", ".join([f"group {index}: {_counted(arrays, 'array')}", *own])


def _told(
    values: Mapping[str, Any], hypers: Iterable[Hyperparameter], always: tuple[str, ...] = ()
) -> list[str]:
    return [
        f"{hyper.name}={_brief(values[hyper.name])}"
        for hyper in hypers
        if hyper.name in values
        and (hyper.name in always or _differs(values[hyper.name], hyper.default))
    ]


def _counted(size: int, noun: str) -> str:
    return f"{size} {noun}{'s' * (size != 1)}"


def _brief(value: Any) -> str:
    """Functions by name, schedules as they describe themselves, arrays only by type."""
    if isinstance(value, (tuple, list)):
        text = ", ".join(map(_brief, value))
        return f"[{text}]" if isinstance(value, list) else f"({text})"
    if isinstance(value, (*_PLAIN, Schedule, MomentumSchedule)):
        return repr(value)
    return str(getattr(value, "__name__", shown(value)))


def _differs(value: Any, default: Any) -> bool:
    """Without asking an array what it holds."""
    if isinstance(value, (tuple, list)) and isinstance(default, tuple):
        return len(value) != len(default) or any(map(_differs, value, default))
    return value is not default and not (isinstance(value, _PLAIN) and value == default)
