"""The adaptive rules as papers and PyTorch print them, in float64: no trick of the kernels.

Averages are `beta*m + (1 - beta)*g`, powers are powers. `reference.py` has the kernels' bits; this
is what these bits are good for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import fusedstep as fs
import numpy as np
from exact import Array

State = dict[str, Any]


def nadam(h: dict[str, Any], t: int, p: Array, g: Array, state: State) -> Array:
    """Dozat 2016, algorithm 2 with its momentum schedule; t counts from 1."""
    (beta1, beta2), psi = h["betas"], h["momentum_decay"]
    p, g = _decay(h, p, g)
    mu, coming = (beta1 * (1 - 0.5 * 0.96 ** (n * psi)) for n in (t, t + 1))
    state["mu_product"] = state.get("mu_product", 1.0) * mu
    m = _average(state, "exp_avg", beta1, g)
    denominator = np.sqrt(_average(state, "exp_avg_sq", beta2, g * g) / (1 - beta2**t)) + h["eps"]
    product = state["mu_product"]
    ahead = (1 - mu) * g / (1 - product) + coming * m / (1 - product * coming)
    return p - h["lr"] * ahead / denominator


def adam(h: dict[str, Any], t: int, p: Array, g: Array, state: State) -> Array:
    """Kingma and Ba 2015, algorithm 1; Reddi et al. 2018 in PyTorch's form of the maximum."""
    beta1, beta2 = h["betas"]
    p, g = _decay(h, p, g)
    m = _average(state, "exp_avg", beta1, g)
    s = _average(state, "exp_avg_sq", beta2, g * g)
    if h["amsgrad"]:
        s = state["max_exp_avg_sq"] = np.maximum(state.get("max_exp_avg_sq", 0.0), s)
    m_hat, s_hat = m / (1 - beta1**t), s / (1 - beta2**t)
    return p - h["lr"] * m_hat / (np.sqrt(s_hat) + h["eps"])


def adamw(h: dict[str, Any], t: int, p: Array, g: Array, state: State) -> Array:
    """Loshchilov and Hutter 2019, algorithm 2."""
    return adam({**h, "decoupled_weight_decay": True}, t, p, g, state)


def rmsprop(h: dict[str, Any], t: int, p: Array, g: Array, state: State) -> Array:  # noqa: ARG001
    """Hinton 2012; Graves 2013, eq. 38-45; the look-ahead is that of Sutskever et al. 2013."""
    p, g = _decay(h, p, g)
    variance = _average(state, "square_avg", h["alpha"], g * g)
    if h["centered"]:
        variance = variance - _average(state, "grad_avg", h["alpha"], g) ** 2
    u = g / (np.sqrt(variance) + h["eps"])
    if h["momentum"] > 0:
        v = state["momentum_buffer"] = h["momentum"] * state.get("momentum_buffer", 0.0) + u
        coming = h["momentum"] if h["next_momentum"] is None else h["next_momentum"]
        u = u + coming * v if h["nesterov"] else v
    return p - h["lr"] * u


def _decay(h: dict[str, Any], p: Array, g: Array) -> tuple[Array, Array]:
    g = -g if h["maximize"] else g
    if h.get("decoupled_weight_decay"):
        return p - h["lr"] * h["weight_decay"] * p, g
    return p, g + h["weight_decay"] * p


def _average(state: State, name: str, beta: float, x: Array) -> Array:
    state[name] = beta * state.get(name, 0.0) + (1 - beta) * x
    return state[name]


Formula = Callable[[dict[str, Any], int, Array, Array, State], Array]
FORMULAS: dict[type[fs.Optimizer], Formula] = {
    fs.NAdam: nadam,
    fs.Adam: adam,
    fs.AdamW: adamw,
    fs.RMSprop: rmsprop,
}
FUNCTIONS = {kind: getattr(fs, kind.declaration.function) for kind in FORMULAS}


def hypers(kind: type[fs.Optimizer], **given: Any) -> dict[str, Any]:
    """All hyper-parameters of a class, with those that are given."""
    parameters = inspect.signature(kind.__init__).parameters
    return {name: p.default for name, p in parameters.items()} | given


DECOUPLED = {"weight_decay": 0.1, "decoupled_weight_decay": True}
SMALL = {"betas": (0.3, 0.2), "lr": 0.01}
_AVERAGES = {
    "plain": {},
    "large lr": {"lr": 0.1},
    "decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True, "weight_decay": 0.05},
    "small betas": SMALL,
    "no betas": {"betas": (0.0, 0.0)},
    "large betas": {"betas": (0.99, 0.99999)},
    "large eps": {"eps": 0.1, "lr": 0.1},
}
CASES: dict[type[fs.Optimizer], dict[str, dict[str, Any]]] = {
    fs.NAdam: {
        **_AVERAGES,
        "decoupled": DECOUPLED,
        "no momentum decay": {"momentum_decay": 0.0},
        "momentum decay": {"momentum_decay": 0.1, "weight_decay": 0.1},
        "Keras": {"momentum_decay": 1.0, **DECOUPLED},
    },
    fs.Adam: {
        **_AVERAGES,
        "decoupled": DECOUPLED,
        "amsgrad": {"amsgrad": True},
        "amsgrad decay": {"amsgrad": True, "weight_decay": 0.1, **SMALL},
    },
    fs.AdamW: {
        **_AVERAGES,
        "no decay": {"weight_decay": 0.0},
        "amsgrad": {"amsgrad": True, "weight_decay": 0.1, **SMALL},
    },
    fs.RMSprop: {
        "plain": {},
        "decay": {"weight_decay": 0.1},
        "decoupled": DECOUPLED,
        "maximize": {"maximize": True, "weight_decay": 0.05},
        "small alpha": {"alpha": 0.2},
        "no alpha": {"alpha": 0.0},
        "large eps": {"eps": 0.1},
        "momentum": {"momentum": 0.9, "weight_decay": 0.1},
        "nesterov": {"momentum": 0.9, "nesterov": True},
        "nesterov next momentum": {"momentum": 0.5, "next_momentum": 0.6, "nesterov": True},
        "nesterov all": {"momentum": 0.9, "nesterov": True, "centered": True, **DECOUPLED},
        "centered": {"centered": True},
        "centered momentum": {"centered": True, "momentum": 0.5, "weight_decay": 0.1},
    },
}
PAIRS = [(kind, case) for kind, cases in CASES.items() for case in cases]
