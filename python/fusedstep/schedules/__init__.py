"""Schedules: objects with an epoch counter, whose value is a closed formula of the epoch.

As in braintools and torch, an optimizer's step never moves its schedule; `schedule.step()` does.
Epochs count from 0. Where systems disagree, the values are those of torch in closed form.
"""

from __future__ import annotations

from fusedstep.schedules.annealing import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    WarmupCosineSchedule,
    WarmupScheduler,
)
from fusedstep.schedules.base import MomentumSchedule, Schedule
from fusedstep.schedules.composite import ChainedScheduler, LambdaLR, SequentialLR
from fusedstep.schedules.cyclic import CyclicLR, OneCycleLR
from fusedstep.schedules.decays import (
    ExponentialDecayLR,
    ExponentialLR,
    InverseTimeDecayLR,
    LinearLR,
    PolynomialLR,
)
from fusedstep.schedules.momentum import (
    CyclicMomentum,
    LinearMomentum,
    NesterovMomentum,
    OneCycleMomentum,
    SutskeverMomentum,
)
from fusedstep.schedules.plateau import ReduceLROnPlateau
from fusedstep.schedules.steps import (
    ConstantLR,
    MultiStepLR,
    PiecewiseConstantSchedule,
    StepLR,
)

__all__ = [
    "ChainedScheduler",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "CyclicMomentum",
    "ExponentialDecayLR",
    "ExponentialLR",
    "InverseTimeDecayLR",
    "LambdaLR",
    "LinearLR",
    "LinearMomentum",
    "MomentumSchedule",
    "MultiStepLR",
    "NesterovMomentum",
    "OneCycleLR",
    "OneCycleMomentum",
    "PiecewiseConstantSchedule",
    "PolynomialLR",
    "ReduceLROnPlateau",
    "Schedule",
    "SequentialLR",
    "StepLR",
    "SutskeverMomentum",
    "WarmupCosineSchedule",
    "WarmupScheduler",
]
