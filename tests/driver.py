"""Drives a rule twice from one description: by the public functions and by the oracle."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import fusedstep as fs
import guarded
import numpy as np
import reference
from exact import Array
from fusedstep import _core

# (parameter, gradient, state). Gradients that no kernel reads are rounded in staging.
WIDE = ("float32", "float16", "bfloat16")
KERNEL_STORAGES = (
    *(("float32", g, s) for g in WIDE for s in WIDE),
    ("float64", "float64", "float64"),
    *((p, g, s) for p in WIDE[1:] for g in (p, "float32") for s in (p, "float32")),
)
STAGED_STORAGES = (
    ("float32", "float64", "float32"),
    ("float32", "longdouble", "float32"),
    ("float64", "float32", "float64"),
    ("float64", "float16", "float64"),
    ("float64", "bfloat16", "float64"),
    ("float16", "bfloat16", "float32"),
    ("bfloat16", "float16", "float32"),
    ("bfloat16", "float64", "bfloat16"),
)
STEPS = 3


def storages(rule: str, candidates: tuple[tuple[str, str, str], ...]) -> list[tuple[str, str, str]]:
    """`candidates`, without the doubles that differ in the state of a rule that has none."""
    if reference.RULES[rule].slots:
        return list(candidates)
    return list({(p, g): (p, g, s) for p, g, s in candidates}.values())


class Rising(fs.MomentumSchedule):
    """A momentum of which only this one and the coming one matter."""

    def __init__(self, now: float, coming: float) -> None:
        super().__init__()
        self.now, self.coming = now, coming

    def at(self, t: int) -> float:
        """The momentum of epoch `t`, which is never moved."""
        return self.coming if t else self.now


def _first_beta(given: dict[str, Any]) -> Any:
    now, coming = given.pop("beta1"), given.pop("next_beta1", None)
    return now if coming in {None, now} else Rising(now, coming)


def public_form(rule: str, hyper: dict[str, Any]) -> tuple[Callable[..., fs.StepResult], dict]:
    """The public function of a rule and form, and the arguments that choose them."""
    family = rule.partition("_")[0]
    given = dict(hyper)
    if "beta1" in given:
        given["betas"] = (_first_beta(given), given.pop("beta2"))
    if rule == "momentum":
        family = "nesterov" if given.pop("nesterov") else rule
    if family == "adam":
        given["amsgrad"] = rule == "adam_amsgrad"
    if family == "rmsprop":
        given["centered"] = "centered" in rule
    return getattr(fs, f"fused_{family}_step"), given


@functools.lru_cache(maxsize=64)
def _values(dtype: str, sizes: tuple[int, ...], seed: int, scale: float) -> list[Array]:
    arrays = guarded.random_list(np.random.default_rng(seed), dtype, sizes, scale)
    for array in arrays:
        array.flags.writeable = False
    return arrays


def values(
    dtype: str, sizes: tuple[int, ...] = guarded.SIZES, seed: int = 0, scale: float = 1.0
) -> list[Array]:
    """Random arrays, made once; read-only."""
    return list(_values(dtype, sizes, seed, scale))


def gradients(dtype: str, sizes: tuple[int, ...] = guarded.SIZES) -> list[list[Array]]:
    """One list of gradients per step."""
    return [values(dtype, sizes, seed=100 + t) for t in range(STEPS)]


def _as_state(name: str, values: Array) -> Array:
    """Averages of squares are not negative."""
    return np.abs(values) if "sq" in name else values


def make_group(
    rule: str,
    hyper: dict[str, Any],
    storage: tuple[str, str, str],
    sizes: tuple[int, ...] = guarded.SIZES,
    copy_dtype: str | None = None,
    **limits: Any,
) -> reference.Group:
    """Fresh random parameters and states; the gradients are those of the first step."""
    param, grad, state = storage
    slots = [
        [_as_state(name, x) for x in values(state, sizes, seed=10 + k, scale=0.1)]
        for k, name in enumerate(reference.RULES[rule].slots)
    ]
    return reference.Group(
        rule,
        reference.RULES[rule].hyper(**hyper),
        params=[x.copy() for x in values(param, sizes, seed=1)],
        grads=gradients(grad, sizes)[0],
        slots=[tuple(s[i].copy() for s in slots) for i in range(len(sizes))],
        copies=[x.copy() for x in values(copy_dtype, sizes, seed=3)] if copy_dtype else None,
        **limits,
    )


class Compiled:
    """A guarded copy of a group, stepped by the compiled kernels."""

    def __init__(self, group: reference.Group) -> None:
        self.group = group
        self.params = guarded.GuardedList(group.params, seed=1)
        slots = zip(*group.slots, strict=True) if reference.RULES[group.rule].slots else ()
        self.slots = [guarded.GuardedList(s, seed=2 + k) for k, s in enumerate(slots)]
        self.copies = guarded.GuardedList(group.copies, seed=7) if group.copies else None
        self.scalars: dict[str, Any] = {}

    def step(self, grads: list[Array], **options: Any) -> fs.StepResult:
        """One step through the public function of the form."""
        group = self.group
        function, hyper = public_form(group.rule, group.hyper)
        names = reference.RULES[group.rule].slots
        buffers = {name: s.arrays for name, s in zip(names, self.slots, strict=True)}
        if self.copies:
            options["param_copy"] = self.copies.arrays
        limits = {
            name: getattr(group, name)
            for name in ("rescale_grad", "maximize", "grad_clip_norm", "grad_clip_value")
        }
        guarded_grads = guarded.GuardedList(grads, seed=5)
        result = function(
            self.params.arrays,
            guarded_grads.arrays,
            **{**buffers, **self.scalars},
            **hyper,
            **limits,
            **options,
        )
        self.scalars = {k: v for k, v in result.state.items() if k not in buffers}
        guarded_grads.check(grads, "gradients")
        return result

    def step_coefficients(self, coefficients: list[float], grads: list[Array]) -> None:
        """One step by raw coefficients."""
        index = _core.rules()[self.group.rule]["index"]
        states = tuple(s.arrays for s in self.slots)
        grads = guarded.GuardedList(grads, seed=5).arrays
        _core.step_coefficients(index, self.params.arrays, grads, states, coefficients)

    def check(self, expected: reference.Group, what: str) -> None:
        """Fails unless every buffer has the bits of the oracle's."""
        self.params.check(expected.params, f"{what}: parameters")
        names = reference.RULES[expected.rule].slots
        for k, (slot, name) in enumerate(zip(self.slots, names, strict=True)):
            slot.check([s[k] for s in expected.slots], f"{what}: {name}")
        if self.copies:
            self.copies.check(expected.copies, f"{what}: param_copy")


def oracle(group: reference.Group, grads: list[list[Array]]) -> reference.Group:
    """A copy of `group` after one oracle step per list of gradients."""
    group = copy.deepcopy(group)
    for step_grads in grads:
        group.grads = step_grads
        reference.step([group])
    return group
