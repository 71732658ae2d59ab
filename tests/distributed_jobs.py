"""What the processes of test_torch_distributed.py run: each function is called on every rank.

The oracle is the same optimizer on whole tensors: `Mirror` holds a full copy of each parameter and
is stepped, on every rank, with the full gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from fusedstep import torch as optim
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import Parameter

# Borders of the kernels; dim 0 smaller than, equal to and no multiple of the number of processes.
SHAPES = ((1,), (2, 3), (3, 5), (7,), (16, 33), (4099,), (131, 127), (4, 6))
RULES = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    "AdamW": {"lr": 0.01},
    "NAdam": {"lr": 0.01, "weight_decay": 0.01},
}
# One rounding of the coefficient, and what a step makes of it.
CLIPPED = {"rtol": 1e-6, "atol": 1e-7}


def full(tensor: Any) -> Any:
    """A copy of all elements of a tensor, on every rank."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def random(shape: tuple[int, ...], dtype: Any = torch.float32, scale: float = 1.0) -> Any:
    """The same on all ranks, as they draw the same numbers."""
    return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)


class Mirror:
    """The unsharded run: full copies of parameters, updated from full gradients."""

    def __init__(self, params: Iterable[Any], rule: str, **more: Any) -> None:
        self.theirs = list(params)
        self.params = [Parameter(full(p)) for p in self.theirs]
        self.optimizer = getattr(optim, rule)(self.params, **more)

    def step(self) -> None:
        for mine, other in zip(self.params, self.theirs, strict=True):
            mine.grad = None if other.grad is None else full(other.grad).to(mine.dtype)
        self.optimizer.step()

    def check(self, optimizer: Any, exact: bool) -> None:
        """Norms agree to 1e-14; parameters and state to the bit, or to a rounding of the clip."""
        norm, expected = optimizer.last.grad_norm, self.optimizer.last.grad_norm
        assert (norm is None) == (expected is None)
        if norm is not None:
            assert abs(norm - expected) <= 1e-14 * expected, (norm, expected)
        tolerance = {"rtol": 0, "atol": 0} if exact else CLIPPED
        for mine, other in zip(self.params, self.theirs, strict=True):
            torch.testing.assert_close(full(other), full(mine), **tolerance)
            expected_state, state = self.optimizer.state[mine], optimizer.state[other]
            assert state.keys() == expected_state.keys()
            for name, value in state.items():
                torch.testing.assert_close(full(value), full(expected_state[name]), **tolerance)
                assert isinstance(value, DTensor) == (
                    isinstance(other, DTensor) and value.ndim == other.ndim
                )


# --- every placement --------------------------------------------------------------------------


def layouts(world: int) -> dict[str, Any]:
    """Name -> for each shape of SHAPES, the (mesh, placements) of its parameter; None: ordinary."""
    line = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    found: dict[str, Any] = {
        "rows": [(line, [Shard(0)])] * len(SHAPES),
        "columns": [(line, [Shard(len(shape) - 1)]) for shape in SHAPES],
        "copies": [(line, [Replicate()])] * len(SHAPES),
        "some ordinary": [None if k % 2 else (line, [Shard(0)]) for k in range(len(SHAPES))],
    }
    if world == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        two = {
            "hybrid": [Replicate(), Shard(0)],
            "rows twice": [Shard(0), Shard(0)],
            "rows and columns": [Shard(0), Shard(1)],
            "strided": [_StridedShard(0, split_factor=2), Shard(0)],
        }
        for name, placements in two.items():
            fits = [len(shape) == 2 or name != "rows and columns" for shape in SHAPES]
            found[name] = [(square, placements if fit else [Shard(0)] * 2) for fit in fits]
        kinds = [
            *((square["tp"], [Shard(0)]), (square["dp"], [Shard(0)]), None),
            *((square, two["hybrid"]), (square, two["strided"]), (line, [Shard(0)])),
        ]
        found["several meshes"] = [kinds[k % len(kinds)] for k in range(len(SHAPES))]
    return found


def placed(tensor: Any, layout: Any) -> Any:
    """The rank's part of a tensor that all ranks have."""
    if layout is None:
        return tensor.clone()
    mesh, placements = layout
    if not isinstance(placements[0], _StridedShard):
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)
    # As FSDP2 over tensor parallelism cuts it: first along the last dimension of the mesh.
    i, j = mesh.get_coordinate()
    rows = pieces(pieces(tensor, 2)[j], 2)[i].clone()
    return DTensor.from_local(
        rows, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def pieces(tensor: Any, count: int) -> list[Any]:
    """Along dimension 0, as many as were asked for; the last ones may be empty."""
    cut = list(tensor.chunk(count))
    return cut + [tensor[:0]] * (count - len(cut))


def every_placement(rank: int, world: int, rule: str, dtype: str) -> list[str]:
    """Steps with the clip active and not, and parameters without a gradient."""
    del rank
    names = []
    for name, layout in layouts(world).items():
        params = [
            Parameter(placed(random(shape, getattr(torch, dtype)), where))
            for shape, where in zip(SHAPES, layout, strict=True)
        ]
        settings = {**RULES[rule], "grad_clip_norm": 1e9}
        groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.05}]
        optimizer = getattr(optim, rule)(groups, **settings)
        mirror = Mirror(params, rule, **settings)
        mirror.optimizer.param_groups[0]["params"] = mirror.params[:3]
        mirror.optimizer.add_param_group({"params": mirror.params[3:], "lr": 0.05})
        for step in range(4):
            for k, (param, where) in enumerate(zip(params, layout, strict=True)):
                grad = placed(random(SHAPES[k], param.dtype, 0.1), where)
                param.grad = None if (step + k) % 4 == 1 else grad
            clips = step == 3
            for group in (*optimizer.param_groups, *mirror.optimizer.param_groups):
                group["grad_clip_norm"] = 0.5 if clips else 1e9
            optimizer.step()
            mirror.step()
            assert (optimizer.last.clip_coef < 1) == clips
            if step >= 2:
                mirror.check(optimizer, exact=not clips)
        names.append((name, optimizer.last.grad_norm))
    return names


# --- decisions --------------------------------------------------------------------------------


class Small:
    """A hybrid-sharded parameter, one on another mesh, and an ordinary one, with an optimizer."""

    shapes = ((5, 3), (1,), (4,))

    def __init__(self, rule: str = "AdamW", dtype: Any = torch.float32, **more: Any) -> None:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
        line = init_device_mesh("cpu", (4,))
        self.layout = ((square, [Replicate(), Shard(0)]), (line, [Shard(0)]), None)
        tensors = [random(shape, dtype) for shape in self.shapes]
        self.params = [Parameter(p) for p in map(placed, tensors, self.layout)]
        self.optimizer = getattr(optim, rule)(self.params, lr=0.1, **more)
        self.mirror = Mirror(self.params, rule, lr=0.1, **more)

    def differentiate(self, scale: float = 1.0) -> None:
        for param, shape, where in zip(self.params, self.shapes, self.layout, strict=True):
            param.grad = placed(random(shape, param.dtype, scale), where)

    def step_both(self, exact: bool = False) -> None:
        self.differentiate()
        self.optimizer.step()
        self.mirror.step()
        self.mirror.check(self.optimizer, exact)

    def everything(self) -> list[Any]:
        """Copies of this process's elements of parameters and state, and the counts."""
        states = [value for p in self.params for value in self.optimizer.state[p].values()]
        with torch.no_grad():
            return [local(t).clone() for t in (*self.params, *states)]

    def unchanged(self, before: list[Any]) -> bool:
        now = self.everything()
        return len(now) == len(before) and all(map(torch.equal, now, before))


def local(tensor: Any) -> Any:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def spoil(param: Any, value: float) -> None:
    """Puts a value into this process's part of a gradient."""
    local(param.grad).reshape(-1)[0] = value


def inf_and_nan(rank: int) -> None:
    """On one process only: a part of a shard, of a replica's shard, of a copy."""
    for index, value in ((0, float("nan")), (0, float("inf")), (2, float("nan"))):
        for policy in ("skip", "raise"):
            small = Small(on_nonfinite=policy, grad_clip_norm=1.0)
            small.step_both()
            before = small.everything()
            small.differentiate()
            if rank == 3:
                spoil(small.params[index], value)
            if policy == "raise":
                error = raised(FloatingPointError, small.optimizer.step)
                name = f"param_groups[0]['params'][{index}].grad holds inf or NaN; nothing was"
                assert error.startswith(name if rank == 3 else "a gradient of another process")
            else:
                small.optimizer.step()
                assert small.optimizer.last.skipped
                assert small.optimizer.skipped_steps == 1
                assert not torch.isfinite(small.optimizer.grad_norm)
            assert small.unchanged(before)
            small.step_both()  # as if that step had not been


def raised(kind: type[Exception], function: Any, *args: Any) -> str:
    try:
        function(*args)
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def limits(rank: int) -> None:
    """`skip_grad_norm`; what a skipped step reports is what the unsharded one does."""
    small = Small(skip_grad_norm=1e3, grad_clip_norm=1.0)
    small.step_both()
    small.differentiate()
    if rank == 2:
        spoil(small.params[0], 1e6)  # of the other replica, whose numbers do not count
    small.optimizer.step()
    small.mirror.step()
    assert not small.optimizer.last.skipped
    small = Small(skip_grad_norm=1e3, grad_clip_norm=1.0)
    small.step_both()
    before = small.everything()
    small.differentiate(scale=1e4)
    small.optimizer.step()
    small.mirror.step()
    assert small.optimizer.last.skipped
    assert small.mirror.optimizer.last.skipped
    assert small.unchanged(before)
    small.mirror.check(small.optimizer, exact=False)
    clips = small.optimizer.last.clip_coef, small.mirror.optimizer.last.clip_coef
    assert abs(clips[0] - clips[1]) <= 1e-14, clips
    small.step_both()


def scalers(rank: int) -> None:
    """`found_inf` on one process counts for all, with a clip and without, before all policies."""
    for more in ({}, {"grad_clip_norm": 1.0}, {"on_nonfinite": "raise"}):
        small = Small(**more)
        small.optimizer.grad_scale = torch.tensor(4.0)
        small.optimizer.found_inf = torch.tensor(0.0)
        small.mirror.optimizer.grad_scale = torch.tensor(4.0)
        small.step_both(exact=not more)
        before = small.everything()
        small.differentiate()
        small.optimizer.found_inf = torch.tensor(float(rank == 2))
        if rank == 2:
            spoil(small.params[0], float("inf"))
        small.optimizer.step()
        assert small.optimizer.last.skipped
        assert small.optimizer.grad_norm is None
        assert small.unchanged(before)
        small.optimizer.found_inf = torch.tensor(0.0)
        small.step_both(exact=not more)


def refusals(rank: int) -> None:
    """What is refused is refused everywhere, and nobody waits."""
    small = Small(grad_clip_norm=1.0)
    small.step_both()
    before = small.everything()
    small.differentiate()
    if rank == 1:
        small.params[2].grad = small.params[2].grad.to_sparse()
    error = raised(TypeError if rank == 1 else RuntimeError, small.optimizer.step)
    assert ("is sparse_coo" if rank == 1 else "another process cannot take the step") in error
    assert small.unchanged(before)
    for scope in ("group", "array"):
        small.differentiate()
        small.optimizer.grad_clip_scope = scope
        assert scope in raised(ValueError, small.optimizer.step)
    small.optimizer.grad_clip_scope = "all"
    small.optimizer.add_param_group({"params": [Parameter(torch.ones(2))], "rescale_grad": 2.0})
    assert "rescale_grad" in raised(ValueError, small.optimizer.step)
    assert small.unchanged(before)
    mesh = init_device_mesh("cpu", (4,))
    partial = Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()], run_check=False))
    assert "partial sum" in raised(ValueError, optim.SGD([partial], lr=0.1).step)


# --- gradients --------------------------------------------------------------------------------


def extremes(rank: int) -> None:
    """Squares of float64 that leave its range, on all processes or on one; zeros."""
    for scale in (1e200, 1e-200, 1e300, 1e-320, 1e160, 0.0):
        small = Small("SGD", torch.float64, grad_clip_norm=1.0)
        small.differentiate(scale)
        small.optimizer.step()
        small.mirror.step()
        small.mirror.check(small.optimizer, exact=False)
        assert (small.optimizer.last.grad_norm > 0) == (scale > 0)
    small = Small("SGD", torch.float64, rescale_grad=1e10, on_nonfinite="skip")
    for scale in (1.0, 1e305):  # a finite norm that `rescale_grad` makes infinite
        small.differentiate(scale)
        small.optimizer.step()
        small.mirror.step()
        for optimizer in (small.optimizer, small.mirror.optimizer):
            assert optimizer.last.skipped == (scale > 1)
            assert torch.isinf(optimizer.grad_norm) == (scale > 1)
    mesh = init_device_mesh("cpu", (4,))
    for mine, norm in ((1e200, 1e200), (1e-200, 3.0**0.5), (1e154, 1e154), (0.0, 3.0**0.5)):
        param = Parameter(distribute_tensor(torch.zeros(4, dtype=torch.float64), mesh, [Shard(0)]))
        param.grad = distribute_tensor(torch.ones(4, dtype=torch.float64), mesh, [Shard(0)])
        if rank == 1:
            spoil(param, mine)
        optimizer = optim.SGD([param], lr=0.1, grad_clip_norm=1.0)
        optimizer.step()
        assert abs(optimizer.last.grad_norm - norm) <= 1e-14 * norm


def gradient_kinds(rank: int) -> None:
    """Partial sums, other placements, ones still on their way; another mesh is refused."""
    mesh = init_device_mesh("cpu", (2,))
    for placements in ([Shard(0)], [Replicate()]):
        param = Parameter(placed(random((5, 3)), (mesh, placements)))
        optimizer = optim.AdamW([param], lr=0.1, grad_clip_norm=0.5)
        mirror = Mirror([param], "AdamW", lr=0.1, grad_clip_norm=0.5)
        terms = [random((5, 3)), random((5, 3))]
        pending = distribute_tensor(random((5, 3)), mesh, [Shard(0)], src_data_rank=None)
        for grad in (
            DTensor.from_local(terms[rank], mesh, [Partial()], run_check=False),
            distribute_tensor(terms[0], mesh, [Replicate()], src_data_rank=None),
            distribute_tensor(terms[0], mesh, [Shard(1)], src_data_rank=None),
            pending_grad(pending),
        ):
            param.grad = grad
            optimizer.step()
            mirror.step()
            mirror.check(optimizer, exact=False)
        assert type(pending_grad(pending)._local_tensor).__name__ == "AsyncCollectiveTensor"
    other = init_device_mesh("cpu", (1, 2))
    param.grad = distribute_tensor(terms[0], other, [Replicate()] * 2, src_data_rank=None)
    before = full(param)
    assert "another device mesh" in raised(ValueError, optimizer.step)
    assert torch.equal(full(param), before)


def pending_grad(grad: Any) -> Any:
    return grad.redistribute(placements=[Replicate()], async_op=True)


def no_gradients(rank: int) -> None:
    """On one process, as pipelines of one's own may leave it; on none; empty shards everywhere."""
    mesh = init_device_mesh("cpu", (4,))
    tensors = [random((8, 2)), random((3,))]
    params = [Parameter(placed(t, (mesh, [Shard(0)]))) for t in tensors]
    grads = [random((8, 2)), random((3,))]
    optimizer = optim.SGD(params, lr=0.5, momentum=0.5, grad_clip_norm=1.0)
    expected = [t.clone() for t in tensors]
    for param, grad in zip(params, grads, strict=True):
        param.grad = placed(grad, (mesh, [Shard(0)]))
    if rank == 2:  # has rows 4 and 5 of the first and the last of the second
        params[0].grad = params[1].grad = None
    optimizer.step()
    grads[0][4:6], grads[1][2] = 0, 0
    norm = sum(g.double().square().sum() for g in grads).sqrt().item()
    assert abs(optimizer.last.grad_norm - norm) <= 1e-14 * norm
    for param, tensor, grad in zip(params, expected, grads, strict=True):
        torch.testing.assert_close(full(param), tensor - 0.5 / norm * grad, **CLIPPED)
    for param in params:
        param.grad = None
    before = [full(p) for p in params]
    optimizer.step()
    assert optimizer.last.grad_norm == 0
    assert all(torch.equal(full(p), b) for p, b in zip(params, before, strict=True))


def stale_graphs(rank: int) -> None:
    """A write between forward and backward is found; by a step without gradient nothing is."""
    del rank
    mesh = init_device_mesh("cpu", (2,))
    for dtype, more in ((torch.float32, {}), (torch.bfloat16, {"master_weights": True})):
        param = Parameter(placed(random((4, 3), dtype), (mesh, [Shard(0)])))
        optimizer = optim.SGD([param], lr=0.1, grad_clip_norm=1.0, **more)
        loss = (param * param).sum()
        optimizer.step()
        loss.backward()
        loss = (param * param).sum()
        before = param._version
        optimizer.step()
        assert param._version > before
        assert "modified by an inplace operation" in raised(RuntimeError, loss.backward)


# --- unusual parameters -----------------------------------------------------------------------


def unusual_shards(rank: int) -> None:
    """Transposed, with gaps, complex; copies of an optimizer; under torch.compile."""
    del rank
    mesh = init_device_mesh("cpu", (2,))
    gaps = DTensor.from_local(random((5, 6))[:, ::2], mesh, [Replicate()], run_check=False)
    for whole in (placed(random((3, 5)).t(), (mesh, [Shard(0)])), gaps, complex_shard(mesh)):
        param = Parameter(whole)
        settings = {"lr": 0.1, "momentum": 0.9, "grad_clip_norm": 0.5}
        optimizer = optim.SGD([param], **settings)
        mirror = Mirror([param], "SGD", **settings)
        for step in range(3):
            grad = random((5, 3))
            grad = torch.complex(grad, grad.flip(0)) if whole.is_complex() else grad
            param.grad = placed(grad, (mesh, whole.placements))
            before = param._version
            optimizer.step()
            mirror.step()
            mirror.check(optimizer, exact=False)
            assert param._version > before
            if step == 1:
                optimizer = copy.deepcopy(optimizer)
                (param,) = mirror.theirs = optimizer.param_groups[0]["params"]


def complex_shard(mesh: Any) -> Any:
    return placed(torch.complex(random((5, 3)), random((5, 3))), (mesh, [Shard(0)]))


def compiled(rank: int) -> None:
    """The graph breaks, silently; a whole graph is refused."""
    del rank
    mesh = init_device_mesh("cpu", (2,))
    params = [Parameter(placed(random((5, 3)), (mesh, [Shard(0)]))), Parameter(random((3,)))]
    optimizer = optim.AdamW(params, lr=0.1, grad_clip_norm=0.5)
    mirror = Mirror(params, "AdamW", lr=0.1, grad_clip_norm=0.5)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        params[0].grad = placed(random((5, 3)), (mesh, [Shard(0)]))
        params[1].grad = random((3,))
        step()
        mirror.step()
        mirror.check(optimizer, exact=False)
    torch.compiler.reset()
    step = torch.compile(optimizer.step, backend="eager", fullgraph=True)
    assert "distributed tensors outside of graphs" in raised(RuntimeError, step)


def strangers(rank: int) -> None:
    """A process that is not in a parameter's mesh cannot know the norm; without one it goes on."""
    pair, line = DeviceMesh("cpu", [0, 1]), init_device_mesh("cpu", (3,))
    params = [Parameter(placed(random((4,)), (mesh, [Shard(0)]))) for mesh in (pair, line)]
    for param, mesh in zip(params, (pair, line), strict=True):
        param.grad = placed(random((4,)), (mesh, [Shard(0)]))
    optimizer = optim.SGD(params, lr=0.1, grad_clip_norm=1.0)
    before = full(params[1])
    error = raised(ValueError if rank == 2 else RuntimeError, optimizer.step)
    assert ("not in the mesh" if rank == 2 else "another process") in error
    assert torch.equal(full(params[1]), before)
    optimizer.param_groups[0]["grad_clip_norm"] = None
    optimizer.step()
    assert torch.equal(full(params[1]), before - 0.1 * full(params[1].grad))
