"""The functional steps, made from the classes: arrays in, updated in place.

Their signatures, for readers and type checkers, are in `functional.pyi`, which
`python -m fusedstep._stubs` writes.
"""

from __future__ import annotations

from fusedstep.adaptive import Adam, AdamW, NAdam, RMSprop
from fusedstep.base import Optimizer
from fusedstep.codegen import make_step
from fusedstep.docs import function_docstring
from fusedstep.optimizers import SGD, Momentum, MomentumNesterov


def _step_of(optimizer: type[Optimizer]) -> object:
    return make_step(optimizer.declaration, function_docstring(optimizer), globals())


fused_sgd_step = _step_of(SGD)
fused_momentum_step = _step_of(Momentum)
fused_nesterov_step = _step_of(MomentumNesterov)
fused_nadam_step = _step_of(NAdam)
fused_adam_step = _step_of(Adam)
fused_adamw_step = _step_of(AdamW)
fused_rmsprop_step = _step_of(RMSprop)
