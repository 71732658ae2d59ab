"""braintools' optimizers and schedulers on compiled steps: `import fusedstep.braintools as optim`.

Classes, arguments and trajectories are those of `braintools.optim` 0.3; where they differ, the page
"braintools" of the documentation says how and why.
"""

from __future__ import annotations

import sys
from typing import NoReturn

import fusedstep.jax  # noqa: F401  # says what is missing if JAX cannot run the handlers

try:
    import brainstate  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"fusedstep.braintools needs brainstate, pip install 'fusedstep[braintools]' brings it: "
        f"{error}"
    ) from error

from fusedstep.braintools.composite import ChainedScheduler, ReduceLROnPlateau, SequentialLR
from fusedstep.braintools.formulas import (
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialDecayLR,
    ExponentialLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    PiecewiseConstantSchedule,
    PolynomialLR,
    StepLR,
    WarmupCosineSchedule,
    WarmupScheduler,
)
from fusedstep.braintools.optimizer import Optimizer
from fusedstep.braintools.optimizers import (
    SGD,
    Adam,
    AdamW,
    Momentum,
    MomentumNesterov,
    Nadam,
    RMSprop,
)
from fusedstep.braintools.scheduler import LRScheduler
from fusedstep.braintools.values import OptimState

# braintools' users write `braintools.optim.Adam`: `from fusedstep import braintools` suffices.
optim = sys.modules[__name__]

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "ChainedScheduler",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "ExponentialDecayLR",
    "ExponentialLR",
    "LRScheduler",
    "LinearLR",
    "Momentum",
    "MomentumNesterov",
    "MultiStepLR",
    "Nadam",
    "OneCycleLR",
    "OptimState",
    "Optimizer",
    "PiecewiseConstantSchedule",
    "PolynomialLR",
    "RMSprop",
    "ReduceLROnPlateau",
    "SequentialLR",
    "StepLR",
    "WarmupCosineSchedule",
    "WarmupScheduler",
    "optim",
]

# What braintools.optim has besides.
_ELSEWHERE = frozenset(
    {
        "AdaBelief",
        "Adadelta",
        "Adafactor",
        "Adagrad",
        "Adamax",
        "Fromage",
        "LBFGS",
        "Lamb",
        "Lars",
        "Lion",
        "Lookahead",
        "NevergradOptimizer",
        "Novograd",
        "OptaxOptimizer",
        "RAdam",
        "Rprop",
        "SM3",
        "SOFO",
        "SOFOScan",
        "ScipyOptimizer",
        "UniqueStateManager",
        "Yogi",
    }
)


def __getattr__(name: str) -> NoReturn:
    if name in _ELSEWHERE:
        raise AttributeError(
            f"fusedstep.braintools has no {name}: there is no compiled rule for it; use "
            f"braintools.optim.{name}"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
