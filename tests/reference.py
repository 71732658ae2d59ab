"""Executable specification: the norm tree, the table of rules, and the order of a step.

The compiled kernels must give these bits on every instruction set, for any number of threads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from exact import Array, load, store
from formulas import (
    Progress,
    accumulate,
    adam,
    adam_amsgrad,
    momentum,
    mu_of_nadam,
    nadam,
    prepare_accumulate,
    prepare_adam,
    prepare_momentum,
    prepare_nadam,
    prepare_rmsprop,
    prepare_sgd,
    rmsprop,
    rmsprop_momentum,
    sgd,
)

# --- norm tree (docs: numerics) ---------------------------------------------------------------

LANES, ROWS, TILES = 32, 32, 16
TILE = LANES * ROWS
CHUNK = TILE * TILES
SAFE_LOW = 2.0**-900


def fold(a: Array) -> Array:
    """Adds the halves of the last axis (a power of two) until one element is left."""
    while a.shape[-1] > 1:
        half = a.shape[-1] // 2
        a = a[..., :half] + a[..., half:]
    return a[..., 0]


def tile_sum(a: Array) -> Array:
    """a[..., row, lane]: each lane adds its rows in order, then the lanes are folded."""
    lanes = np.zeros(a.shape[:-2] + a.shape[-1:])
    for row in range(a.shape[-2]):
        lanes = lanes + a[..., row, :]
    return fold(lanes)


def pad(a: Array, multiple: int) -> Array:
    """`a` with zeros behind it up to a multiple."""
    return np.concatenate([a, np.zeros(-len(a) % multiple)])


def chunk_sums(x: Array, scale: float = 1.0) -> Array:
    """Sums of the squares of scale*x over chunks of 16384 elements."""
    x = load(x, np.dtype(np.float64)) * scale
    return fold(tile_sum(pad(x * x, CHUNK).reshape(-1, TILES, ROWS, LANES)))


def sum_squares(tensors: Sequence[Array], scale: float = 1.0) -> float:
    """The tree over all tensors in call order. `tensors` are 1-D, in memory order."""
    with np.errstate(all="ignore"):
        sums = np.concatenate([chunk_sums(x, scale) for x in tensors] + [np.zeros(0)])
        while len(sums) > 1:
            sums = tile_sum(pad(sums, TILE).reshape(-1, ROWS, LANES))
    return float(sums[0]) if len(sums) else 0.0


def norm(tensors: Sequence[Array]) -> float:
    """sqrt(sum of squares), with a second, scaled look at float64 data out of the safe range."""
    total = sum_squares(tensors)
    wide = any(x.dtype == np.float64 for x in tensors)
    if not wide or math.isnan(total) or SAFE_LOW <= total < math.inf:
        return math.sqrt(total)
    largest = max(
        (float(np.max(np.abs(load(x, np.dtype(float))))) for x in tensors if x.size), default=0.0
    )
    if largest == 0 or math.isinf(largest):
        return largest
    exponent = max(-1000, min(1000, math.frexp(largest)[1] - 1))
    with np.errstate(over="ignore", under="ignore"):
        return float(np.ldexp(math.sqrt(sum_squares(tensors, 2.0**-exponent)), exponent))


def clip_coefficient(value: float | None, limit: float | None) -> float:
    """1 if the norm is at most the limit, else limit / norm; NaN stays NaN. No epsilon."""
    if value is None or limit is None or limit == math.inf or value <= limit:
        return 1.0
    return limit / value


# --- rules ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule's oracle. `cases` are its forms, as hyper-parameters that differ from `defaults`."""

    prepare: Callable[[dict[str, Any], Progress], list[float]]
    apply: Callable[..., tuple[Array, ...]]
    slots: tuple[str, ...]
    defaults: dict[str, Any]
    cases: dict[str, dict[str, Any]]
    coefficients: dict[str, list[float]]  # raw ones, beyond what `prepare` can make
    scalars: tuple[str, ...] = ()
    factor: Callable[[dict[str, Any], int], float] | None = None

    def hyper(self, **given: Any) -> dict[str, Any]:
        """All hyper-parameters of the rule; the coming momentum follows this one."""
        h = {**self.defaults, **given}
        if h.get("next_beta1", 0) is None:
            h["next_beta1"] = h["beta1"]
        if h.get("next_momentum", 0) is None:
            h["next_momentum"] = h["momentum"]
        return h


DECAYS = {
    "coupled decay": {"weight_decay": 0.01},
    "decoupled decay": {"weight_decay": 0.3, "decoupled_weight_decay": True},
}
RULES = {
    "sgd": Rule(
        prepare_sgd,
        sgd,
        (),
        {"lr": 0.1, "weight_decay": 0.0, "decoupled_weight_decay": False},
        {"plain": {}, "lr zero": {"lr": 0.0}, **DECAYS},
        {"all terms": [0.037, -0.11, 0.043], "ascent": [0.0, 0.7, 0.0], "shrink": [0.0, 0.0, 0.3]},
    ),
    "momentum": Rule(
        prepare_momentum,
        momentum,
        ("velocity",),
        {
            "lr": 0.1,
            "momentum": 0.9,
            "next_momentum": None,
            "dampening": 0.0,
            "weight_decay": 0.0,
            "nesterov": False,
            "lr_in_velocity": False,
            "decoupled_weight_decay": False,
            "dampen_first_step": False,
        },
        {
            "heavy ball": {},
            "lr zero": {"lr": 0.0},
            "no momentum": {"momentum": 0.0},
            "dampened": {"dampening": 0.3},
            "unit gain": {"dampening": 0.9, "dampen_first_step": True},
            "lr inside": {"lr_in_velocity": True},
            "nesterov": {"nesterov": True},
            "nesterov dampened": {"nesterov": True, "dampening": 0.3, **DECAYS["coupled decay"]},
            "nesterov lr inside": {"nesterov": True, "lr_in_velocity": True},
            "nesterov next momentum": {"nesterov": True, "next_momentum": 0.99},
            "nesterov lr inside all": {
                "nesterov": True,
                "lr_in_velocity": True,
                "next_momentum": 0.5,
                **DECAYS["decoupled decay"],
            },
            **DECAYS,
        },
        {
            "all terms": [0.037, 0.83, 0.61, 0.57, 0.29, -0.11, 0.043],
            "FISTA": [0.0, 0.25, -0.2, 0.4, -0.2, 1.0, 0.0],
            "Caffe": [0.0, 0.9, 0.1, -0.9, -0.1, 1.0, 0.0],
            "Chainer": [0.0, 0.9, -0.1, 0.81, -0.19, 1.0, 0.0],
            "NeuPy": [0.0, 0.81, -0.19, 1.0, 0.0, 1.0, 0.0],
            "BMUF": [0.0, 0.5, 0.05, -1.5, 0.0, 1.0, 0.0],
            "velocity alone": [0.0, 0.9, 0.0, 0.7, 0.0, -0.1, 0.0],
            "gradient alone": [0.0, 0.0, 0.5, 0.0, 0.7, -0.1, 0.0],
            "nothing": [0.0] * 7,
        },
    ),
    "accumulate": Rule(
        prepare_accumulate,
        accumulate,
        (),
        {"keep": 1.0, "scale": 1.0},
        {},
        {"add": [1.0, 0.25], "begin": [0.0, -3.7], "fade": [0.3, 0.7], "keep": [1.0, 0.0]},
    ),
}
ADAM_DEFAULTS = {
    "lr": 0.1,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "decoupled_weight_decay": False,
}
ADAM_CASES = {
    "plain": {},
    "lr zero": {"lr": 0.0},
    "no eps": {"eps": 0.0},
    "large eps": {"eps": 0.1},
    "small betas": {"beta1": 0.3, "beta2": 0.2},
    "no beta1": {"beta1": 0.0, "beta2": 0.5},
    "no betas": {"beta1": 0.0, "beta2": 0.0},
    "large betas": {"beta1": 0.999, "beta2": 0.999999},
    **DECAYS,
}
ADAM_RAW = {
    "all terms": [0.037, 0.1, 0.0, 0.01, 0.0, 1.3, -0.11, 0.01, 0.043],
    "both weights": [0.037, 0.1, 0.2, 0.01, 0.3, 1.3, -0.11, 0.01, 0.043],
    "no weights": [0.0, 0.0, 0.0, 0.0, 0.0, 1.3, -0.11, 0.01, 0.0],
    "no step": [0.0, 0.1, 0.0, 0.01, 0.0, 1.3, 0.0, 0.01, 0.043],
    "nothing": [0.0] * 9,
}
RULES["adam"] = Rule(
    prepare_adam,
    adam,
    ("exp_avg", "exp_avg_sq"),
    ADAM_DEFAULTS,
    ADAM_CASES,
    ADAM_RAW,
    ("step",),
)
RULES["adam_amsgrad"] = dataclasses.replace(
    RULES["adam"], apply=adam_amsgrad, slots=("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
)
RULES["nadam"] = Rule(
    prepare_nadam,
    nadam,
    ("exp_avg", "exp_avg_sq"),
    {**ADAM_DEFAULTS, "next_beta1": None, "momentum_decay": 4e-3},
    {
        **ADAM_CASES,
        "no momentum decay": {"momentum_decay": 0.0},
        "rising beta1": {"beta1": 0.7, "next_beta1": 0.95},
        "Keras": {"momentum_decay": 1.0},
        "steep": {"momentum_decay": 2e4},
    },
    {
        "all terms": [0.037, 0.1, 0.0, 0.01, 0.0, 0.3, 0.8, 1.3, -0.11, 0.01, 0.043],
        "both weights": [0.037, 0.1, 0.2, 0.01, 0.3, 0.3, 0.8, 1.3, -0.11, 0.01, 0.043],
        "gradient alone": [0.0, 0.1, 0.0, 0.01, 0.0, 0.3, 0.0, 1.3, -0.11, 0.01, 0.0],
        "average alone": [0.0, 0.1, 0.0, 0.01, 0.0, 0.0, 0.8, 1.3, -0.11, 0.01, 0.0],
        "nothing": [0.0] * 11,
    },
    ("step", "mu_product"),
    mu_of_nadam,
)
RMSPROP_RAW = {
    "all terms": [0.037, 0.01, 0.0, 0.83, 0.57, 0.29, -0.11, 0.01, 0.043, 0.02],
    "small weight": [0.0, 0.0, 0.3, 0.83, 0.0, 0.29, -0.11, 0.01, 0.0, 0.0],
    "no buffer": [0.0, 0.01, 0.0, 0.0, 1.0, 0.0, -0.11, 0.01, 0.0, 0.0],
    "nothing": [0.0] * 10,
}
RULES["rmsprop"] = Rule(
    prepare_rmsprop,
    rmsprop,
    ("square_avg",),
    {
        "lr": 0.1,
        "alpha": 0.99,
        "eps": 1e-8,
        "momentum": 0.0,
        "next_momentum": None,
        "nesterov": False,
        "weight_decay": 0.0,
        "decoupled_weight_decay": False,
        "eps_in_root": False,
    },
    {
        "plain": {},
        "lr zero": {"lr": 0.0},
        "large eps": {"eps": 0.1},
        "eps in root": {"eps": 0.1, "eps_in_root": True},
        "small alpha": {"alpha": 0.2},
        "no alpha": {"alpha": 0.0},
        **DECAYS,
    },
    RMSPROP_RAW,
)
RULES["rmsprop_centered"] = dataclasses.replace(RULES["rmsprop"], slots=("square_avg", "grad_avg"))
RULES["rmsprop_momentum"] = dataclasses.replace(
    RULES["rmsprop"],
    apply=rmsprop_momentum,
    slots=("square_avg", "momentum_buffer"),
    defaults={**RULES["rmsprop"].defaults, "momentum": 0.9},
    cases={
        **RULES["rmsprop"].cases,
        "small momentum": {"momentum": 0.25},
        "nesterov": {"nesterov": True},
        "nesterov next momentum": {"nesterov": True, "next_momentum": 0.99},
        "nesterov no next momentum": {"nesterov": True, "next_momentum": 0.0},
    },
)
RULES["rmsprop_centered_momentum"] = dataclasses.replace(
    RULES["rmsprop_momentum"], apply=rmsprop, slots=("square_avg", "grad_avg", "momentum_buffer")
)


# --- one step ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Group:
    """Tensors (1-D, memory order) that share hyper-parameters. The arrays are updated in place."""

    rule: str
    hyper: dict[str, Any]
    params: list[Array]
    grads: list[Array]
    slots: list[tuple[Array, ...]]
    copies: list[Array] | None = None
    first: bool = False
    applied: int = 0  # steps before this one
    product: float = 1.0  # of the rule's factors of these steps
    rescale_grad: float = 1.0
    maximize: bool = False
    grad_clip_norm: float | None = None
    grad_clip_value: float | None = None

    def staged(self) -> list[Array]:
        """The gradients as the kernels read them: foreign dtypes rounded to the arithmetic type."""
        return [_staged(g, p) for p, g in zip(self.params, self.grads, strict=True)]


def arithmetic_of(storage: np.dtype) -> np.dtype:
    """float64 for float64, float32 for everything else."""
    return np.dtype(np.float64 if storage == np.float64 else np.float32)


def _staged(g: Array, p: Array) -> Array:
    arithmetic = arithmetic_of(p.dtype)
    return g if g.dtype.itemsize <= arithmetic.itemsize else load(g, arithmetic)


def total_norm(groups: Sequence[Group]) -> float:
    """The norm over all groups, after `rescale_grad`."""
    scales = [abs(group.rescale_grad) for group in groups]
    if len(set(scales)) == 1:
        return scales[0] * norm([g for group in groups for g in group.staged()])
    return math.hypot(*(s * norm(group.staged()) for s, group in zip(scales, groups, strict=True)))


def step(
    groups: Sequence[Group], grad_norm: float | None = None
) -> tuple[float | None, list[float]]:
    """Applies one step in place; returns the norm after rescaling and the clip coefficients.

    Each group's counts advance, but `first` is the caller's to set.
    """
    if grad_norm is None and any(group.grad_clip_norm is not None for group in groups):
        grad_norm = total_norm(groups)
    clips = [clip_coefficient(grad_norm, group.grad_clip_norm) for group in groups]
    for group, clip in zip(groups, clips, strict=True):
        sign = -1.0 if group.maximize else 1.0
        _apply(group, sign * group.rescale_grad * clip)
    return grad_norm, clips


def _apply(group: Group, factor: float) -> None:
    rule = RULES[group.rule]
    at = Progress(group.applied + 1, group.first, group.product)
    coefficients = rule.prepare(group.hyper, at)
    for i, (p, g) in enumerate(zip(group.params, group.grads, strict=True)):
        g = condition(load(g, arithmetic_of(p.dtype)), factor, group.grad_clip_value)
        copy = group.copies[i] if group.copies else None
        apply_coefficients(group.rule, coefficients, p, g, group.slots[i], copy)
    group.applied = at.step
    if rule.factor is not None:
        group.product *= rule.factor(group.hyper, at.step)


def condition(g: Array, factor: float, clip_value: float | None) -> Array:
    """clamp(factor*g, +-clip_value) by selects, so that NaN stays NaN."""
    with np.errstate(all="ignore"):
        g = g.dtype.type(factor) * g
    if clip_value is None:
        return g
    high = g.dtype.type(clip_value)
    return np.where(g > high, high, np.where(g < -high, -high, g))


def apply_coefficients(
    rule: str,
    coefficients: Sequence[float],
    p: Array,
    g: Array,
    slots: tuple[Array, ...],
    copy: Array | None = None,
) -> None:
    """The formula in the arithmetic type, one rounding per buffer. `g` is conditioned already."""
    arithmetic = arithmetic_of(p.dtype)
    states = [load(s, arithmetic) for s in slots]
    new = RULES[rule].apply(coefficients, load(p, arithmetic), load(g, arithmetic), *states)
    for buffer, value in zip((p, *slots), new, strict=True):
        buffer[...] = store(value, buffer.dtype)
    if copy is not None:
        copy[...] = store(new[0], copy.dtype)


# --- block-wise 8-bit state ---------------------------------------------------------------------

BLOCK = 256


def encode_blocks(x: Array) -> tuple[Array, Array]:
    """float32 -> int8 codes and one float32 scale per 256 elements."""
    codes = np.zeros(len(x), np.int8)
    scales = np.zeros(-(-len(x) // BLOCK), np.float32)
    for i, start in enumerate(range(0, len(x), BLOCK)):
        block = x[start : start + BLOCK]
        if not np.all(np.isfinite(block)):
            scales[i] = np.nan
            continue
        scales[i] = np.max(np.abs(block)) / np.float32(127)
        if scales[i] != 0:
            codes[start : start + BLOCK] = np.rint(block / scales[i])
    return codes, scales


def decode_blocks(codes: Array, scales: Array) -> Array:
    """code * scale, rounded to float32."""
    return codes.astype(np.float32) * np.repeat(scales, BLOCK)[: len(codes)]
