"""The classes: for each, which optimizer it is, and how torch writes it.

Arguments, formulas and what else follows from the optimizer is added to a class by `docs` and
`signatures`. What comes out, for readers and type checkers, is in `optimizers.pyi`, which
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
    """Drop-in for `torch.optim.SGD`, bit for bit (float32 and float64, for-loop and foreach).

    Example:
        >>> import torch
        >>> from fusedstep import torch as optim
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = optim.SGD([weight], lr=0.5, momentum=0.9, grad_clip_norm=1.0)
        >>> (weight * torch.tensor([3.0, 4.0])).sum().backward()
        >>> optimizer.step()
        >>> optimizer.grad_norm, weight.detach()
        (tensor(5., dtype=torch.float64), tensor([0.7000, 0.6000]))
    """


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
    """`torch.optim.SGD` with momentum, and the conventions of other libraries; its checkpoints.

    Example:
        >>> import torch
        >>> from fusedstep import torch as optim
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = optim.Momentum([weight], lr=0.5, lr_in_velocity=True)
        >>> (weight * torch.tensor([3.0, 4.0])).sum().backward()
        >>> optimizer.step()
        >>> weight.detach(), optimizer.state[weight]
        (tensor([-0.5000, -1.0000]), {'momentum_buffer': tensor([-1.5000, -2.0000])})
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
    """`torch.optim.SGD` with `nesterov=True`, the conventions of other libraries; its checkpoints.

    Example:
        >>> import torch
        >>> from fusedstep import torch as optim
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = optim.MomentumNesterov([weight], lr=0.5, momentum=0.5, grad_clip_norm=2.5)
        >>> (weight * torch.tensor([3.0, 4.0])).sum().backward()
        >>> optimizer.step()
        >>> optimizer.grad_norm, weight.detach()
        (tensor(5., dtype=torch.float64), tensor([-0.1250, -0.5000]))
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
    """Drop-in for `torch.optim.NAdam`, which has no fused form.

    Example:
        >>> import torch
        >>> from fusedstep import torch as optim
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = optim.NAdam([weight], lr=0.1)
        >>> (weight * torch.tensor([3.0, 4.0])).sum().backward()
        >>> optimizer.step()
        >>> weight.detach(), optimizer.state[weight]["mu_product"]
        (tensor([0.8944, 0.8944]), tensor(0.4501, dtype=torch.float64))
    """


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
    """Drop-in for `torch.optim.Adam`.

    Example:
        >>> import torch
        >>> from fusedstep import torch as optim
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = optim.Adam([weight], lr=0.1, grad_clip_value=0.5)
        >>> (weight * torch.tensor([3.0, 4.0])).sum().backward()
        >>> optimizer.step()
        >>> weight.detach(), sorted(optimizer.state[weight])
        (tensor([0.9000, 0.9000]), ['exp_avg', 'exp_avg_sq', 'step'])
    """


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
    """Drop-in for `torch.optim.AdamW`.

    Example:
        >>> import torch
        >>> from fusedstep import torch as optim
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = optim.AdamW([weight], lr=0.1, weight_decay=0.5, grad_clip_norm=1.0)
        >>> (weight * torch.tensor([3.0, 4.0])).sum().backward()
        >>> optimizer.step()
        >>> optimizer.grad_norm, weight.detach()
        (tensor(5., dtype=torch.float64), tensor([0.8500, 0.8500]))
    """


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
    """Drop-in for `torch.optim.RMSprop`.

    Example:
        >>> import torch
        >>> from fusedstep import torch as optim
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = optim.RMSprop([weight], lr=0.1, alpha=0.75, momentum=0.5, nesterov=True)
        >>> (weight * torch.tensor([3.0, 4.0])).sum().backward()
        >>> optimizer.step()
        >>> weight.detach()
        tensor([0.7000, 0.7000])
    """
