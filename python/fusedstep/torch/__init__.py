"""Optimizers for PyTorch: `torch.optim.Optimizer` classes whose whole step is one fused call.

A training script changes one import and deletes its `clip_grad_norm_` line:

    >>> import torch
    >>> from fusedstep import torch as optim
    >>> model = torch.nn.Linear(8, 2)
    >>> optimizer = optim.AdamW(model.parameters(), lr=3e-4, grad_clip_norm=1.0)
    >>> model(torch.ones(4, 8)).square().mean().backward()
    >>> optimizer.step()
    >>> optimizer.zero_grad()

Schedulers, `GradScaler`, hooks, checkpoints, DDP and FSDP2 work as with `torch.optim`; see the page
"PyTorch" of the documentation for what is the same, what differs and what is refused.
"""

from __future__ import annotations

from fusedstep.torch.base import Optimizer
from fusedstep.torch.optimizers import (
    SGD,
    Adam,
    AdamW,
    Momentum,
    MomentumNesterov,
    NAdam,
    RMSprop,
)

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Momentum",
    "MomentumNesterov",
    "NAdam",
    "Optimizer",
    "RMSprop",
]
