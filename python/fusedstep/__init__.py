"""One-pass, in-place, bit-reproducible optimizer steps for NumPy and DLPack buffers."""

from __future__ import annotations

from fusedstep._core import (
    InternalError,
    StepResult,
    build_info,
    get_num_threads,
    set_num_threads,
    sum_squares,
)
from fusedstep.adaptive import Adam, AdamW, NAdam, RMSprop
from fusedstep.base import Optimizer
from fusedstep.functional import (
    fused_adam_step,
    fused_adamw_step,
    fused_momentum_step,
    fused_nadam_step,
    fused_nesterov_step,
    fused_rmsprop_step,
    fused_sgd_step,
)
from fusedstep.optimizers import SGD, Momentum, MomentumNesterov
from fusedstep.schedules import ConstantLR, ExponentialLR, MomentumSchedule, Schedule, StepLR

__version__: str = build_info()["version"]

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "ConstantLR",
    "ExponentialLR",
    "InternalError",
    "Momentum",
    "MomentumNesterov",
    "MomentumSchedule",
    "NAdam",
    "Optimizer",
    "RMSprop",
    "Schedule",
    "StepLR",
    "StepResult",
    "__version__",
    "build_info",
    "fused_adam_step",
    "fused_adamw_step",
    "fused_momentum_step",
    "fused_nadam_step",
    "fused_nesterov_step",
    "fused_rmsprop_step",
    "fused_sgd_step",
    "get_num_threads",
    "set_num_threads",
    "sum_squares",
]
