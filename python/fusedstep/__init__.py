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
from fusedstep.base import Optimizer
from fusedstep.conventions import Continuation, from_convention
from fusedstep.functional import fused_momentum_step, fused_nesterov_step, fused_sgd_step
from fusedstep.optimizers import SGD, Momentum, MomentumNesterov
from fusedstep.schedules import ConstantLR, ExponentialLR, Schedule, StepLR

__version__: str = build_info()["version"]

__all__ = [
    "SGD",
    "ConstantLR",
    "Continuation",
    "ExponentialLR",
    "InternalError",
    "Momentum",
    "MomentumNesterov",
    "Optimizer",
    "Schedule",
    "StepLR",
    "StepResult",
    "__version__",
    "build_info",
    "from_convention",
    "fused_momentum_step",
    "fused_nesterov_step",
    "fused_sgd_step",
    "get_num_threads",
    "set_num_threads",
    "sum_squares",
]
