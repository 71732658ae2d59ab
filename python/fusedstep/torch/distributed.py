"""Norms and decisions that all processes of a job must share; only scalars travel."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

from fusedstep import _core
from fusedstep.torch.leaves import Leaf, is_dtensor


def world_size() -> int:
    """Number of processes of the job; 1 where torch.distributed is not in use."""
    module = sys.modules.get("torch.distributed")
    if module is None or not module.is_available() or not module.is_initialized():
        return 1
    size: int = module.get_world_size()
    return size


def agree(
    leaves: list[Leaf],
    grads: list[Any],
    rows: list[tuple[int, _core.Row]],
    policy: _core.Policy,
    overflow: bool | None,
) -> tuple[float | None, bool, _core.Policy]:
    """What the processes that hold parts of the parameters decide together.

    Every process takes part, whether it has gradients, elements, or neither.

    Args:
        leaves: The parameters.
        grads: Local parts of their gradients, or None.
        rows: The row of each group.
        policy: What the optimizer says about norms and inf or NaN.
        overflow: Whether a scaler found inf in a gradient here; None without a scaler.

    Returns:
        The norm of all gradients (None if nothing asks for it), whether to skip the step, and what
        the core is still to decide by itself: nothing about inf and NaN, which the norm tells.

    Raises:
        FloatingPointError: With `on_nonfinite="raise"`, on all processes alike.
        ValueError: If a clip has a scope of its own.
    """
    on_nonfinite, scope, skip_grad_norm = policy
    measures = any(row[2] is not None for _, row in rows)
    judges = on_nonfinite != "propagate" or skip_grad_norm is not None
    if not measures and not judges and overflow is None:
        return None, False, policy
    if scope != "all" and (measures or judges):
        raise ValueError(
            f'grad_clip_scope: "{scope}" is not available for distributed tensors; use "all"'
        )
    parts = _parts(leaves, grads)
    for part in parts:
        part.reduce(bool(overflow))
    norm = math.sqrt(math.fsum(part.sum_squares for part in parts))
    scaled = abs(rows[0][1][0]) * norm if rows else norm
    refused = skip_grad_norm is not None and not scaled <= skip_grad_norm
    nonfinite = not math.isfinite(norm)
    if on_nonfinite == "raise" and nonfinite:
        raise FloatingPointError("a gradient holds inf or NaN; nothing was changed")
    skip = any(part.overflow for part in parts) or refused or (on_nonfinite == "skip" and nonfinite)
    return (norm if measures or judges else None), skip, ("propagate", scope, None)


class _Part:
    """Gradients that are spread over the same processes in the same way."""

    def __init__(self, mesh: Any, dims: tuple[int, ...]) -> None:
        self._mesh, self._dims = mesh, dims
        self._grads: list[Any] = []
        self.sum_squares = 0.0
        self.overflow = False

    def add(self, grad: Any) -> None:
        if grad is not None:
            self._grads.append(grad)

    def reduce(self, overflow: bool) -> None:
        """Sums over the processes that hold other elements; over copies nothing is summed."""
        self.sum_squares = _core.sum_squares(self._grads) if self._grads else 0.0
        self.overflow = overflow
        if self._mesh is None:
            return
        import torch.distributed as dist

        shared = torch.tensor(
            [self.sum_squares, float(overflow)], dtype=torch.float64, device=self._mesh.device_type
        )
        for dim in self._dims:
            dist.all_reduce(shared, group=self._mesh.get_group(dim))
        self.sum_squares, self.overflow = shared[0].item(), shared[1].item() != 0.0


def _parts(leaves: list[Leaf], grads: list[Any]) -> list[_Part]:
    """By mesh and sharded dimensions; the same list, in the same order, on every process."""
    parts: dict[Any, _Part] = {}
    for leaf, grad in zip(leaves, grads, strict=True):
        mesh: Any = None
        dims: tuple[int, ...] = ()
        if is_dtensor(leaf.param):
            mesh = leaf.param.device_mesh
            dims = tuple(k for k, p in enumerate(leaf.param.placements) if p.is_shard())
        part = parts.setdefault((mesh, dims), _Part(mesh, dims))
        part.add(grad)
    return list(parts.values())
