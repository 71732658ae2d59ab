"""The hyper-parameters of a transform: checked by their declarations, static or traced.

Numbers that Python knows are constants of the compiled program, as exact float64. What JAX knows
only when the program runs (an array, or what a function of the step returns) is an operand, so
that another value compiles nothing anew.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from fusedstep import _core, _xla
from fusedstep.base import Optimizer
from fusedstep.codegen import make_packer
from fusedstep.hyperparameters import Hyperparameter, given_norm, lr_range, weight_decay_range
from fusedstep.jax.calls import Settings, halves
from fusedstep.jax.state import Array
from fusedstep.jax.trees import PARAM_DTYPES, Leaves
from fusedstep.ranges import Real, shown
from fusedstep.scheduled import Scheduled
from fusedstep.schedules import MomentumSchedule, Schedule

# In the order of `Settings` in csrc/xla/settings.hpp; the hyper-parameters of the rule follow.
_HEAD = ("rescale_grad", "maximize", "grad_clip_norm", "grad_clip_value", "skip_grad_norm")
# Where a value goes that has another name in a rule, or more than one place there.
_PLACES = {
    "momentum": ("momentum", "next_momentum"),
    "betas[0]": ("beta1", "next_beta1"),
    "betas[1]": ("beta2",),
}
# What stands in for a value that is not known yet when the others are checked and packed.
_STAND_IN = {"momentum": 0.5, "next_momentum": 0.5, "betas[0]": 0.5, "betas[1]": 0.5}


def is_traced(value: object) -> bool:
    """Known to JAX, and perhaps only when the program runs."""
    return isinstance(value, jax.Array)


def as_operand(name: str, value: Any) -> Array:
    """One number as an operand: an array as it is, a Python number as exact float64 halves."""
    if not is_traced(value):
        return jnp.asarray(halves([value]))
    whole = jnp.issubdtype(value.dtype, jnp.integer)
    if value.size != 1 or not (whole or str(value.dtype) in PARAM_DTYPES):
        raise TypeError(
            f"{name}: expected one real number, got an array of shape {value.shape} and dtype "
            f"{value.dtype}"
        )
    return (value.astype(jnp.float32) if whole else value).reshape(())


def _plain(value: Any) -> Any:
    """NumPy arrays of one number are that number."""
    return value.item() if isinstance(value, np.ndarray) and value.size == 1 else value


class Options:
    """The hyper-parameters of one transform.

    Args:
        kind: The optimizer class that declares them.
        given: A value for each, by name.

    Raises:
        TypeError, ValueError: As the class would raise, and for what has no meaning under JAX.
    """

    def __init__(self, kind: type[Optimizer], given: Mapping[str, Any]) -> None:
        self._kind = kind
        self._pack = make_packer(kind.declaration)
        self._varying: dict[str, Any] = {}  # arrays and functions, by name or `betas[i]`
        self._static: dict[str, Any] = {}  # the rest, with stand-ins
        for hyper in kind.declaration.hypers:
            self._sort(hyper, _plain(given[hyper.name]))
        self.grad_clip_scope: str = self._static.pop("grad_clip_scope")
        self.judge = self._static.pop("on_nonfinite") == "skip"
        limit = self._static.pop("skip_grad_norm")
        self._skip_norm = None if limit == math.inf else limit
        decay = self._static["weight_decay"]
        self._decay_of: Callable[[str, Any], Any] | None = decay if callable(decay) else None
        if self._decay_of is not None:
            self._static["weight_decay"] = 0.0
        rule, _ = self._packed()
        kind._check_form(self._static)
        self._names, self.slots, self.has_product = _rule_of(rule)

    # --- at construction ----------------------------------------------------------------------

    def _sort(self, hyper: Hyperparameter, value: Any) -> None:
        """Into what is static and what varies; checks what `_pack` does not check."""
        name = hyper.name
        if name == "betas" and isinstance(value, (tuple, list)) and len(value) == 2:
            pair = enumerate(map(_plain, value))
            self._static[name] = tuple(self._split(hyper, f"betas[{i}]", each) for i, each in pair)
            return
        _refuse(name, value)
        if name in {"on_nonfinite", "grad_clip_scope", "skip_grad_norm"} and not is_traced(value):
            value = hyper.check(name, value)
        self._static[name] = self._split(hyper, name, value)

    def _split(self, hyper: Hyperparameter, name: str, value: Any) -> Any:
        """The value if it is static, else what stands in for it."""
        _refuse_schedule(name, value)
        follows = isinstance(hyper.check, Scheduled) and name != "betas[1]" and callable(value)
        if not follows and not is_traced(value):
            return value
        if not isinstance(hyper.check, Real):
            raise TypeError(f"{name}: has to be known when a program is compiled; pass a constant")
        if follows and isinstance(value, type):
            raise TypeError(f"{name}: got the class {value.__name__}, pass an object of it")
        if is_traced(value):
            as_operand(name, value)
        self._varying[name] = value
        default = hyper.default
        return _STAND_IN.get(name, default if isinstance(default, float) else 1.0)

    def _packed(self) -> tuple[int, tuple[Any, ...]]:
        return self._pack(self._static, 0, self._static["weight_decay"])

    # --- at a step ----------------------------------------------------------------------------

    @property
    def measures(self) -> bool:
        """Whether anything asks for the norm of the gradients."""
        limits = (self._static["grad_clip_norm"], self._skip_norm)
        return self.judge or any(limit is not None for limit in limits)

    @property
    def decay_position(self) -> int:
        """Where a rule has its weight decay."""
        return self._names.index("weight_decay") - len(_HEAD)

    def decays(self, leaves: Leaves, present: list[int]) -> NDArray[np.float64]:
        """The weight decay of each array, if a function tells it; else nothing."""
        if self._decay_of is None:
            return np.zeros(0)
        found = [self._decay_of(leaves.spell(i), leaves.arrays[i]) for i in present]
        check = weight_decay_range.number
        pairs = zip(present, found, strict=True)
        return np.array([check(f"weight_decay of {leaves.spell(i)}", x) for i, x in pairs])

    def at(self, step: Array, lr: Any = None) -> Settings:
        """The settings of a step; `lr` stands for the one of the constructor."""
        rule, row = self._packed()
        skip_norm = math.inf if self._skip_norm is None else self._skip_norm
        numbers = [*row[:4], skip_norm, *row[4:]]
        values = np.zeros(len(_HEAD) + _xla.MAX_HYPERS)
        values[: len(numbers)] = [math.inf if x is None else float(x) for x in numbers]
        values[1] = -1.0 if row[1] else 1.0
        varying = dict(self._varying)
        if lr is not None:
            varying["lr"] = _checked("lr", lr_range, _plain(lr))
        traced: dict[int, Array] = {}
        for name, value in varying.items():
            self._put(traced, name, value, step)
        return Settings(rule, values, traced)

    def _put(self, traced: dict[int, Array], name: str, value: Any, step: Array) -> None:
        """The operands of one value, now and (of a momentum) at the step after this one."""
        hyper = next(h for h in self._kind.declaration.hypers if h.name == name.split("[")[0])
        for ahead, place in enumerate(_PLACES.get(name, (name,))):
            if place not in self._names or (ahead and self._static.get(place) is not None):
                continue
            now = value
            if callable(value) and not is_traced(value):
                now = _checked(name, hyper.check, _plain(value(step + ahead)))
            position = self._names.index(place)
            if position not in traced:
                traced[position] = as_operand(name, now)

    def first_lr(self) -> Any:
        """The learning rate of the first step."""
        lr = self._varying.get("lr", self._static["lr"])
        if callable(lr) and not is_traced(lr):
            lr = _checked("lr", lr_range, _plain(lr(jnp.int32(0))))
        return as_operand("lr", lr) if is_traced(lr) else lr


def _rule_of(index: int) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """The settings of a rule by name, its slots, and whether it has a running product."""
    rule = next(rule for rule in _core.rules().values() if rule["index"] == index)
    return (*_HEAD, *rule["hypers"]), tuple(rule["slots"]), len(rule["scalars"]) > 1


def _refuse(name: str, value: Any) -> None:
    if name == "on_nonfinite" and value == "raise":
        raise ValueError(
            'on_nonfinite: "raise" needs the host, which a compiled program does not ask; use '
            '"skip" and look at state.skipped'
        )
    if name == "grad_clip_scope" and value == "group":
        raise ValueError(
            'grad_clip_scope: a pytree has no param groups; use "all" or "array", or a transform '
            "for each part of it"
        )


def _refuse_schedule(name: str, value: Any) -> None:
    if isinstance(value, (Schedule, MomentumSchedule)):
        raise TypeError(
            f"{name}: {type(value).__name__} counts epochs on the host, which a compiled program "
            f"does not see; pass its formula, {name}=schedule.at, which is then called with the "
            "number of steps, or the number of each step: step(..., lr=schedule.current_lr)"
        )


def _checked(name: str, check: Any, value: Any) -> Any:
    """A number in its range; what only the device knows is taken as it is."""
    if is_traced(value):
        return value
    if not isinstance(value, numbers.Real) or callable(value):
        raise TypeError(f"{name}: expected a number or an array of one, got {shown(value)}")
    return check.number(name, value)


def given_norm_operand(grad_norm: Any) -> Array | None:
    """The `grad_norm` argument of a step as an operand."""
    if grad_norm is None:
        return None
    grad_norm = _plain(grad_norm)
    return as_operand("grad_norm", grad_norm if is_traced(grad_norm) else given_norm(grad_norm))
