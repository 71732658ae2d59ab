"""Norms and decisions that all processes of a job must share; only a few numbers travel."""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import torch

from fusedstep import _core
from fusedstep.torch.leaves import Leaf, is_dtensor, is_flat

# Outside of it a sum of squares of float64 numbers may have lost some, or be about to overflow.
_SAFE = (2.0**-900, 2.0**900)
# Every exponent that a float64 needs lies within, and so do the powers of two.
_LARGEST_EXPONENT = 1000


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

    Every process takes part, whether it has gradients, elements, or neither. All come to the same
    norm, to the bit: what each measured is gathered, not reduced, and added with one rounding.

    Args:
        leaves: The parameters.
        grads: Local parts of their gradients, or None.
        rows: The row of each group.
        policy: What the optimizer says about norms and inf or NaN.
        overflow: Whether a scaler found inf in a gradient here; None without a scaler.

    Returns:
        The norm of all gradients (None if nothing asks for it), whether one of the processes found
        an overflow, and what the core is to decide from the norm, as it will everywhere.

    Raises:
        FloatingPointError: With `on_nonfinite="raise"`, on all processes alike.
        ValueError: If a clip has a scope of its own, groups differ in `rescale_grad`, or FSDP1 does
            not tell which processes hold the rest of a parameter.
        RuntimeError: If another process could not measure its gradients; that one tells why.
    """
    on_nonfinite, scope, skip_grad_norm = policy
    judges = on_nonfinite != "propagate" or skip_grad_norm is not None
    measures = judges or any(row[2] is not None for _, row in rows)
    if measures:
        _check_norm_is_one(leaves, rows, scope)
    if not measures and overflow is None:
        return None, False, policy
    parts = _parts(leaves, grads, measures)
    overflow, shared = _share(parts, bool(overflow))
    if not measures or overflow:
        return None, overflow, policy
    norm = _norm_of(shared)
    if math.isfinite(norm * abs(rows[0][1][0])):
        return norm, False, ("propagate", scope, skip_grad_norm)
    if on_nonfinite == "raise":
        raise FloatingPointError(f"{_blame(leaves, grads)}; nothing was changed")
    if on_nonfinite == "skip" and (skip_grad_norm is None or math.isinf(skip_grad_norm)):
        skip_grad_norm = sys.float_info.max
    return norm, False, ("propagate", scope, skip_grad_norm)


def _check_norm_is_one(leaves: list[Leaf], rows: list[tuple[int, _core.Row]], scope: str) -> None:
    if any(is_flat(leaf.param) for leaf in leaves):
        raise ValueError(
            "parameters of FullyShardedDataParallel (FSDP1) do not tell which processes hold the "
            "rest of them, so that there is no norm to clip or judge by; use fully_shard (FSDP2)"
        )
    if scope != "all":
        raise ValueError(
            f'grad_clip_scope: "{scope}" is not available for distributed tensors; use "all"'
        )
    if len({abs(row[0]) for _, row in rows}) > 1:
        raise ValueError(
            "rescale_grad: with distributed tensors and a norm all groups need the same one"
        )


def _blame(leaves: list[Leaf], grads: list[Any]) -> str:
    for leaf, grad in zip(leaves, grads, strict=True):
        if grad is not None and not bool(grad.isfinite().all()):
            return f"{leaf.name}.grad holds inf or NaN"
    return "a gradient of another process holds inf or NaN, or grad_norm is not finite"


# --- what is measured -------------------------------------------------------------------------


class _Sum(NamedTuple):
    """A sum of squares, value * 4**exponent, which finite gradients never take out of range."""

    value: float
    exponent: int


class _Part:
    """Gradients that are spread over the same processes in the same way.

    Attributes:
        mesh: The processes; None for ordinary tensors, of which each process has a copy.
        dims: Dimensions of the mesh along which processes hold different elements.
        grads: Local parts of the gradients.
    """

    def __init__(self, mesh: Any, dims: tuple[int, ...]) -> None:
        self.mesh, self.dims = mesh, dims
        self.grads: list[Any] = []

    def measure(self) -> _Sum:
        """The sum of squares of the local elements."""
        total = _core.sum_squares(self.grads) if self.grads else 0.0
        if _SAFE[0] <= total <= _SAFE[1] or math.isnan(total):
            return _Sum(total, 0)
        largest = max((grad.abs().max().item() for grad in self.grads if grad.numel()), default=0.0)
        if largest == 0.0 or math.isinf(largest):
            return _Sum(largest, 0)
        exponent = max(-_LARGEST_EXPONENT, min(math.frexp(largest)[1], _LARGEST_EXPONENT))
        scaled = [grad.double() * 2.0**-exponent for grad in self.grads]
        return _Sum(_core.sum_squares(scaled), exponent)


def _parts(leaves: list[Leaf], grads: list[Any], measures: bool) -> list[_Part]:
    """By mesh and sharded dimensions; the same list, in the same order, on every process."""
    parts: dict[Any, _Part] = {}
    for leaf, grad in zip(leaves, grads, strict=True):
        mesh: Any = None
        dims: tuple[int, ...] = ()
        if is_dtensor(leaf.param):
            mesh = leaf.param.device_mesh
            # Not `is_shard()`, which is False for the strided shards of FSDP2 over tensor
            # parallelism.
            placements = enumerate(leaf.param.placements)
            dims = tuple(k for k, placement in placements if not placement.is_replicate())
        part = parts.setdefault((mesh, dims), _Part(mesh, dims))
        if grad is not None and measures:
            part.grads.append(grad)
    return list(parts.values())


def _norm_of(sums: list[_Sum]) -> float:
    """The root of the sum of all, the same for any order of them."""
    exponent = max((each.exponent for each in sums if each.value != 0.0), default=0)
    total = math.fsum(math.ldexp(each.value, 2 * (each.exponent - exponent)) for each in sums)
    return math.sqrt(total) * 2.0**exponent


# --- what travels -----------------------------------------------------------------------------


def _share(parts: list[_Part], overflow: bool) -> tuple[bool, list[_Sum]]:
    """Whether there is an overflow anywhere, and the sums of everywhere.

    A process that fails says so to the others before it raises, or they would wait for it.
    """
    failure: Exception | None = None
    sums = [_Sum(math.nan, 0)] * len(parts)
    try:
        _check_membership(parts)
        sums = [part.measure() for part in parts]
    except Exception as error:
        failure = error
    flags = [float(overflow), float(failure is not None)]
    meshes = list(dict.fromkeys(part.mesh for part in parts if part.mesh is not None))
    shared: list[_Sum] = []
    for mesh in meshes:
        if mesh.get_coordinate() is None:
            continue
        # Of ordinary tensors one copy counts, so that all decide alike even where copies differ.
        also = {mesh, None} if mesh == meshes[0] else {mesh}
        here = [k for k, part in enumerate(parts) if part.mesh in also]
        gathered = _gather([*flags, *(number for k in here for number in sums[k])], mesh)
        flags = gathered[..., :2].reshape(-1, 2).amax(0).tolist()
        for place, k in enumerate(here):
            shared += _of_part(parts[k], gathered[..., 2 + 2 * place : 4 + 2 * place])
    if failure is not None:
        raise failure
    if flags[1]:
        raise RuntimeError(
            "another process could not measure its gradients, and tells why; nothing was changed"
        )
    return bool(flags[0]), shared


def _check_membership(parts: list[_Part]) -> None:
    for part in parts:
        if part.mesh is not None and part.mesh.get_coordinate() is None:
            raise ValueError(
                "this process is not in the mesh of one of its parameters, and so cannot know its "
                "gradient's norm; give the optimizer of this process only what it has a part of"
            )


def _gather(numbers: list[float], mesh: Any) -> Any:
    """What all processes of a mesh have to say: a tensor of the mesh's shape + (numbers,)."""
    import torch.distributed as dist

    shared = torch.tensor(numbers, dtype=torch.float64, device=mesh.device_type)
    for dim in reversed(range(mesh.ndim)):
        received = [shared]
        if mesh.size(dim) > 1:
            received = [torch.empty_like(shared) for _ in range(mesh.size(dim))]
            dist.all_gather(received, shared, group=mesh.get_group(dim))
        shared = torch.stack(received)
    return shared.cpu()


def _of_part(part: _Part, gathered: Any) -> list[_Sum]:
    """The sums of all processes that hold other elements of a part; of copies, one.

    But inf or NaN in any copy is everybody's.
    """
    place = tuple(slice(None) if k in part.dims else 0 for k in range(gathered.ndim - 1))
    numbers = gathered[place].reshape(-1, 2).tolist()
    everywhere = gathered[..., 0].flatten().tolist()
    lost = [_Sum(value, 0) for value in everywhere if not math.isfinite(value)]
    return lost or [_Sum(value, int(exponent)) for value, exponent in numbers]
