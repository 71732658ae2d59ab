"""The optimizers that are measured: ours, torch's, and by hand, with the same arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import fusedstep as fs
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LR, MOMENTUM, DECAY = 0.01, 0.9, 1e-4
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class Method:
    """One optimizer.

    Attributes:
        rule: Its name in `tests/reference.py`.
        hyper: Its hyper-parameters there.
        function: Our functional step, which takes `options`.
        optimizer: Our class, which takes them too.
        torch: The name of torch's class.
        torch_options: Its arguments.
        torch_forms: Which of fused, foreach and for-loop it has.
        torch_state: Our state buffers by torch's names.
        by_hand: One tensor's update (p, g, states, t), as one writes it in NumPy.
    """

    rule: str
    hyper: dict[str, Any]
    function: Callable[..., fs.StepResult]
    optimizer: type[fs.Optimizer]
    options: dict[str, Any]
    torch: str
    torch_options: dict[str, Any]
    torch_forms: tuple[str, ...]
    torch_state: dict[str, str]
    by_hand: Callable[[Array, Array, list[Array], int], None]
    torch_scalars: dict[str, float] = field(default_factory=dict)


# --- by hand ----------------------------------------------------------------------------------


def _sgd(p: Array, g: Array, _: list[Array], __: int) -> None:
    p -= np.float32(LR) * (g + np.float32(DECAY) * p)


def _nesterov(p: Array, g: Array, states: list[Array], _: int) -> None:
    (v,) = states
    g = g + np.float32(DECAY) * p
    v *= np.float32(MOMENTUM)
    v += g
    g += np.float32(MOMENTUM) * v
    p -= np.float32(LR) * g


def _moments(g: Array, states: list[Array]) -> tuple[Array, Array]:
    m, s = states
    m += np.float32(1 - BETA1) * (g - m)
    s += np.float32(1 - BETA2) * (g * g - s)
    return m, s


def _nadam(p: Array, g: Array, states: list[Array], t: int) -> None:
    def mu(k: int) -> float:
        return BETA1 * (1 - 0.5 * 0.96 ** (k * 0.004))

    g = g + np.float32(DECAY) * p
    m, s = _moments(g, states)
    product = float(np.prod([mu(k) for k in range(1, t + 1)]))
    look_ahead = np.float32((1 - mu(t)) / (1 - product)) * g
    look_ahead += np.float32(mu(t + 1) / (1 - product * mu(t + 1))) * m
    p -= np.float32(LR) * look_ahead / (np.sqrt(s * np.float32(1 / (1 - BETA2**t))) + EPS)


def _adamw(p: Array, g: Array, states: list[Array], t: int) -> None:
    m, s = _moments(g, states)
    p -= np.float32(LR * DECAY) * p
    size = np.float32(LR / (1 - BETA1**t))
    p -= size * m / (np.sqrt(s * np.float32(1 / (1 - BETA2**t))) + np.float32(EPS))


# --- the table --------------------------------------------------------------------------------

ALL_FORMS = ("fused", "foreach", "for-loop")
ADAM_STATE = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
ADAM_HYPER = {"lr": LR, "beta1": BETA1, "beta2": BETA2, "eps": EPS, "weight_decay": DECAY}

SGD = Method(
    "sgd",
    {"lr": LR, "weight_decay": DECAY},
    fs.fused_sgd_step,
    fs.SGD,
    {"lr": LR, "weight_decay": DECAY},
    "SGD",
    {"lr": LR, "weight_decay": DECAY},
    ALL_FORMS,
    {},
    _sgd,
)
NESTEROV = Method(
    "momentum",
    {"lr": LR, "weight_decay": DECAY, "momentum": MOMENTUM, "nesterov": True},
    fs.fused_nesterov_step,
    fs.MomentumNesterov,
    {"lr": LR, "weight_decay": DECAY, "momentum": MOMENTUM},
    "SGD",
    {"lr": LR, "weight_decay": DECAY, "momentum": MOMENTUM, "nesterov": True},
    ALL_FORMS,
    {"velocity": "momentum_buffer"},
    _nesterov,
)
NADAM = Method(
    "nadam",
    {**ADAM_HYPER, "momentum_decay": 0.004},
    fs.fused_nadam_step,
    fs.NAdam,
    {"lr": LR, "weight_decay": DECAY},
    "NAdam",
    {"lr": LR, "weight_decay": DECAY},
    ("foreach", "for-loop"),
    ADAM_STATE,
    _nadam,
    {"step": 0.0, "mu_product": 1.0},
)
ADAMW = Method(
    "adam",
    {**ADAM_HYPER, "decoupled_weight_decay": True},
    fs.fused_adamw_step,
    fs.AdamW,
    {"lr": LR, "weight_decay": DECAY},
    "AdamW",
    {"lr": LR, "weight_decay": DECAY},
    ALL_FORMS,
    ADAM_STATE,
    _adamw,
    {"step": 0.0},
)
