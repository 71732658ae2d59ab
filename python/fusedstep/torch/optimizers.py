"""The classes: for each, which optimizer it is, and how torch writes it.

Their signatures and docstrings, for readers and type checkers, are in `optimizers.pyi`, which
`python -m fusedstep.torch.stubs` writes.
"""

from __future__ import annotations

from typing import final

import fusedstep
from fusedstep.torch.base import Optimizer
from fusedstep.torch.signatures import Form

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_ADAM = ("lr", "betas", "eps", "weight_decay", "amsgrad")


@final
class SGD(
    Optimizer,
    form=Form(
        fusedstep.SGD,
        positional=("lr", "momentum", "dampening", "weight_decay", "nesterov"),
        switches=("foreach", "differentiable", "fused"),
        buffers={"velocity": "momentum_buffer"},
    ),
):
    """Drop-in for `torch.optim.SGD`, bit for bit (float32 and float64, for-loop and foreach)."""


@final
class Momentum(
    Optimizer,
    form=Form(
        fusedstep.Momentum,
        positional=("lr", "momentum"),
        switches=("foreach", "differentiable", "fused"),
        buffers={"velocity": "momentum_buffer"},
        fixed={"nesterov": False},
    ),
):
    """`torch.optim.SGD` with momentum, and the conventions of other libraries.

    Its checkpoints are those of `torch.optim.SGD`.
    """


@final
class MomentumNesterov(
    Optimizer,
    form=Form(
        fusedstep.MomentumNesterov,
        positional=("lr", "momentum"),
        switches=("foreach", "differentiable", "fused"),
        buffers={"velocity": "momentum_buffer"},
        fixed={"nesterov": True},
    ),
):
    """`torch.optim.SGD` with `nesterov=True`, and the conventions of other libraries.

    Its checkpoints are those of `torch.optim.SGD`.
    """


@final
class NAdam(
    Optimizer,
    form=Form(
        fusedstep.NAdam,
        positional=(
            *("lr", "betas", "eps", "weight_decay", "momentum_decay", "decoupled_weight_decay"),
        ),
        switches=("foreach", "capturable", "differentiable"),
        buffers={name: name for name in _MOMENTS[:2]},
        scalars=("step", "mu_product"),
    ),
):
    """Drop-in for `torch.optim.NAdam`, which has no fused form."""


@final
class Adam(
    Optimizer,
    form=Form(
        fusedstep.Adam,
        positional=_ADAM,
        switches=("foreach", "capturable", "differentiable", "fused"),
        buffers={name: name for name in _MOMENTS},
        scalars=("step",),
    ),
):
    """Drop-in for `torch.optim.Adam`."""


@final
class AdamW(
    Optimizer,
    form=Form(
        fusedstep.AdamW,
        positional=_ADAM,
        switches=("foreach", "capturable", "differentiable", "fused"),
        buffers={name: name for name in _MOMENTS},
        scalars=("step",),
        fixed={"decoupled_weight_decay": True},
    ),
):
    """Drop-in for `torch.optim.AdamW`."""


@final
class RMSprop(
    Optimizer,
    form=Form(
        fusedstep.RMSprop,
        positional=(
            *("lr", "alpha", "eps", "weight_decay", "momentum", "centered"),
            *("capturable", "foreach", "maximize", "differentiable"),
        ),
        switches=("capturable", "foreach", "differentiable"),
        buffers={name: name for name in ("square_avg", "grad_avg", "momentum_buffer")},
        scalars=("step",),
    ),
):
    """Drop-in for `torch.optim.RMSprop`."""
