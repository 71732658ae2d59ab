"""Norms and decisions that all processes of a job must share; only a few numbers travel."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from fusedstep import _core
from fusedstep.torch.amp import Scaling
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
    rehearse: Callable[[], None],
) -> tuple[float | None, bool, _core.Policy]:
    """What the processes that hold parts of the parameters decide together.

    Every process takes part, whether it has gradients, elements, or neither. All come to the same
    norm, to the bit: what each measured is gathered, not reduced, and added with one rounding per
    mesh.

    Args:
        leaves: The parameters.
        grads: Local parts of their gradients, or None.
        rows: The row of each group.
        policy: What the optimizer says about norms and inf or NaN.
        overflow: Whether a scaler found inf in a gradient here; None without a scaler.
        rehearse: Raises what the step would raise, and changes nothing.

    Returns:
        The norm of all gradients (None if nothing asks for it), whether one of the processes found
        an overflow, and what the core is to decide from the norm, as it will everywhere.

    Raises:
        FloatingPointError: With `on_nonfinite="raise"`, on all processes alike.
        ValueError: If a clip has a scope of its own, groups differ in `rescale_grad`, or FSDP1 does
            not tell which processes hold the rest of a parameter, or no mesh surrounds the others.
        RuntimeError: If another process cannot take the step; that one tells why.
    """
    on_nonfinite, scope, skip_grad_norm = policy
    measures = _is_judged(policy) or any(row[2] is not None for _, row in rows)
    if not measures and overflow is None:
        return None, False, policy
    parts = _parts([leaf.param for leaf in leaves], grads if measures else [None] * len(leaves))
    sums = [_LOST] * len(parts)
    failure: Exception | None = None
    try:
        if measures:
            _check_norm_is_one(leaves, rows, scope)
        _check_membership(parts)
        rehearse()  # after the agreement it would be too late: others move
        sums = [part.measure() for part in parts]
    except Exception as error:
        failure = error
    overflow, shared = _share(parts, sums, bool(overflow), failure)
    if not measures or overflow:
        return None, overflow, policy
    total = _total(shared)
    norm = math.sqrt(total.value) * 2.0**total.exponent
    if math.isfinite(norm * abs(rows[0][1][0])):
        return norm, False, ("propagate", scope, skip_grad_norm)
    if on_nonfinite == "raise":
        raise FloatingPointError(f"{_blame(leaves, grads)}; nothing was changed")
    if on_nonfinite == "skip" and (skip_grad_norm is None or math.isinf(skip_grad_norm)):
        skip_grad_norm = sys.float_info.max
    return norm, False, ("propagate", scope, skip_grad_norm)


def tell(
    param_groups: list[dict[str, Any]],
    policy: _core.Policy,
    scaling: Scaling,
    failure: Exception,
) -> None:
    """Says to processes that wait in `agree` that this one raises before it comes to that.

    Args:
        param_groups: Those of the optimizer.
        policy: As for `agree`.
        scaling: What a scaler has said.
        failure: What this process has raised.
    """
    groups = [group for group in param_groups if group["params"]]
    params = [param for group in groups for param in group["params"]]
    if not any(map(is_dtensor, params)):  # nobody waits
        return
    overflow = scaling.overflow
    clips = any(group.get("grad_clip_norm") is not None for group in groups)
    if overflow is None and not clips and not _is_judged(policy):
        return
    parts = _parts(params, [None] * len(params))
    with contextlib.suppress(type(failure)):
        _share(parts, [_LOST] * len(parts), bool(overflow), failure)


def gradients(leaves: list[Leaf], given: Mapping[int, Any] | None) -> list[Any]:
    """The local parts of all gradients, or None.

    To bring one into the placements of its parameter can take all processes. So one that cannot be
    used is reported only after the others have had their turn.
    """
    grads: list[Any] = []
    failure: Exception | None = None
    for leaf in leaves:
        try:
            leaf.refresh()
            grads.append(leaf.gradient(given))
        except Exception as error:
            failure = failure or error
    if failure is not None:
        raise failure
    return grads


def _is_judged(policy: _core.Policy) -> bool:
    on_nonfinite, _, skip_grad_norm = policy
    return on_nonfinite != "propagate" or skip_grad_norm is not None


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


_LOST = _Sum(math.nan, 0)


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


def _parts(params: list[Any], grads: list[Any]) -> list[_Part]:
    """By mesh and sharded dimensions; the same list, in the same order, on every process."""
    parts: dict[Any, _Part] = {}
    for param, grad in zip(params, grads, strict=True):
        mesh: Any = None
        dims: tuple[int, ...] = ()
        if is_dtensor(param):
            mesh = param.device_mesh
            # Not `is_shard()`, which is False for the strided shards of FSDP2 over tensor
            # parallelism.
            placements = enumerate(param.placements)
            dims = tuple(k for k, placement in placements if not placement.is_replicate())
        part = parts.setdefault((mesh, dims), _Part(mesh, dims))
        if grad is not None:
            part.grads.append(grad)
    return list(parts.values())


def _total(sums: list[_Sum]) -> _Sum:
    """The sum of all, the same for any order of them."""
    exponent = max((each.exponent for each in sums if each.value != 0.0), default=0)
    terms = (math.ldexp(each.value, 2 * (each.exponent - exponent)) for each in sums)
    return _Sum(math.fsum(terms), exponent)


# --- what travels -----------------------------------------------------------------------------


def _share(
    parts: list[_Part], sums: list[_Sum], overflow: bool, failure: Exception | None
) -> tuple[bool, list[_Sum]]:
    """Whether there is an overflow anywhere, and the sums of everywhere.

    Meshes have their turn from the smallest to the largest, which all processes belong to. There
    every process also says what it knows of smaller meshes and of ordinary tensors, and one copy
    counts, so that all decide alike even where copies differ.

    A process that fails says so to the others before it raises, or they would wait for it.
    """
    sums = list(sums)
    meshes = list(dict.fromkeys(part.mesh for part in parts if part.mesh is not None))
    meshes.sort(key=lambda mesh: int(mesh.size()))
    inside = _inside(meshes)
    if len(inside) > 1 and failure is None:
        failure = ValueError(
            "the parameters are on several meshes none of which has all processes of the others, "
            "so that these cannot agree on a norm; distribute one of them over all processes"
        )
    flags = [float(overflow), float(failure is not None)]
    for mesh in meshes:
        if mesh.get_coordinate() is None:
            continue
        copies = [k for k, part in enumerate(parts) if part.mesh in inside.get(mesh, ())]
        own = [k for k, part in enumerate(parts) if part.mesh == mesh]
        gathered = _gather([*flags, *(number for k in own + copies for number in sums[k])], mesh)
        flags = gathered[..., :2].reshape(-1, 2).amax(0).tolist()
        for place, k in enumerate(own + copies):
            dims = parts[k].dims if k in own else ()
            sums[k] = _total(_of_part(dims, gathered[..., 2 + 2 * place : 4 + 2 * place]))
    if failure is not None:
        raise failure
    if flags[1]:
        raise RuntimeError(
            "another process cannot take the step, and tells why; nothing was changed"
        )
    return bool(flags[0]), sums


def _inside(meshes: list[Any]) -> dict[Any, set[Any]]:
    """For each mesh that no other surrounds, those that it surrounds, and None.

    Of several with the same processes the last one counts.
    """
    if len(meshes) == 1:
        return {meshes[0]: {None}}
    ranks = {mesh: frozenset(mesh.mesh.flatten().tolist()) for mesh in meshes}
    outer = {
        here: mesh
        for mesh, here in ranks.items()
        if not any(here < other for other in ranks.values())
    }
    return {
        mesh: {None, *(other for other in meshes if ranks[other] < here)}
        for here, mesh in outer.items()
    }


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


def _of_part(dims: tuple[int, ...], gathered: Any) -> list[_Sum]:
    """The sums of all processes that hold other elements, along `dims`; of copies, one.

    But inf or NaN in any copy is everybody's.
    """
    place = tuple(slice(None) if k in dims else 0 for k in range(gathered.ndim - 1))
    numbers = gathered[place].reshape(-1, 2).tolist()
    everywhere = gathered[..., 0].flatten().tolist()
    lost = [_Sum(value, 0) for value in everywhere if not math.isfinite(value)]
    return lost or [_Sum(value, int(exponent)) for value, exponent in numbers]
