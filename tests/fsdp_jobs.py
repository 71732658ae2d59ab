"""Jobs of test_torch_distributed.py on whole models: FSDP2, tensor parallelism, DDP."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from distributed_jobs import RULES, Mirror, full, local, placed, raised, random
from fusedstep import torch as optim
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode

CLASSES, BATCH, FEATURES = 8, 24, 6


class Model(nn.Module):
    """A scalar weight, one that gets no gradient, and sizes that 3 and 4 do not divide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, width)
        self.last = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)
        self.scale = nn.Parameter(torch.ones(1))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, inputs: Any) -> Any:
        hidden = self.norm(self.last(self.first(inputs).relu()))
        return self.head(hidden) * full_value(self.scale)


def full_value(tensor: Any) -> Any:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def make_model(width: int = 10) -> Model:
    torch.manual_seed(1)
    return Model(width)


def loss_of(model: Any, step: int, place: int = 0, parts: int = 1) -> Any:
    """Of one share of a step's batch; the mean over all shares is the loss of the whole."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(BATCH, 4, FEATURES, generator=generator).chunk(parts)[place]
    labels = torch.randint(CLASSES, (BATCH, 4), generator=generator).chunk(parts)[place]
    return nn.functional.cross_entropy(model(inputs).flatten(0, 1).float(), labels.flatten())


def shard(model: Any, kind: str) -> tuple[int, int]:
    """Shards a model; the process's place among those with other data, and their number."""
    rank, world = dist.get_rank(), dist.get_world_size()
    place, parts = rank, world
    options: dict[str, Any] = {}
    if kind == "mixed":
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    elif kind == "offloaded":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if kind in {"hybrid", "tensor parallel", "both"}:
        shape = (1, world) if kind == "tensor parallel" else (2, world // 2)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "features"))
        options["mesh"] = mesh if kind == "hybrid" else mesh["data"]
        if kind != "hybrid":
            parallelize(model, mesh["features"])
            place, parts = mesh.get_local_rank("data"), shape[0]
    else:
        options["mesh"] = init_device_mesh("cpu", (world,))
    if kind != "tensor parallel":
        for part in (model.first, model.norm, model.last, model):
            fully_shard(part, **options)
    return place, parts


def parallelize(model: Any, mesh: Any) -> None:
    plan = {
        "first": ColwiseParallel(),
        "last": RowwiseParallel(output_layouts=Shard(1)),
        "norm": SequenceParallel(),  # each process sums gradients over its part of the sequence
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)


def training(rank: int, kind: str, rule: str) -> list[float]:
    """Norms and parameters of the unsharded optimizer; losses of one process with all the data."""
    del rank
    width = 8 if kind in {"tensor parallel", "both"} else 10
    model, alone = make_model(width), make_model(width)
    place, parts = shard(model, kind)
    settings = {**RULES[rule], "grad_clip_norm": 1e9}
    optimizer = getattr(optim, rule)(model.parameters(), **settings)
    single = getattr(optim, rule)(alone.parameters(), **settings)
    mirror = Mirror(model.parameters(), rule, **settings)
    norms = []
    for step in range(6):
        if step == 4:
            for each in (optimizer, mirror.optimizer, single):
                each.param_groups[0]["grad_clip_norm"] = 0.05
        loss = loss_of(model, step, place, parts)
        loss.backward()
        expected = loss_of(alone, step)
        expected.backward()
        optimizer.step()
        mirror.step()
        single.step()
        assert (optimizer.last.clip_coef < 1) == (step >= 4)
        if step >= 3:
            mirror.check(optimizer, exact=step == 3)
        dist.all_reduce(loss.detach_())
        # Gradients are summed in another order, or in bfloat16.
        tolerance = {"rtol": 5e-2 if kind == "mixed" else 1e-4, "atol": 0}
        torch.testing.assert_close(loss / dist.get_world_size(), expected.detach(), **tolerance)
        optimizer.zero_grad()
        single.zero_grad()
        norms.append(optimizer.last.grad_norm)
    return norms


# --- what travels -----------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Elements that collectives carry."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func.namespace in {"c10d", "_c10d_functional"}:
            leaves = torch.utils._pytree.tree_leaves((args, kwargs))
            self.elements.append(sum(t.numel() for t in leaves if isinstance(t, torch.Tensor)))
        return func(*args, **(kwargs or {}))


def only_scalars(rank: int) -> None:
    """One small gather for a norm, whatever the number of parameters; nothing without one."""
    del rank
    world = dist.get_world_size()
    for kind in ("plain", "offloaded"):
        model = make_model(200)
        place, parts = shard(model, kind)
        for more, gathers in (
            ({}, 0),
            ({"grad_clip_norm": 1e-3}, 1),
            ({"grad_clip_value": 1.0}, 0),
        ):
            optimizer = optim.AdamW(model.parameters(), lr=1e-3, **more)
            for step in range(2):
                loss_of(model, step, place, parts).backward()
                before = full(model.last.weight)
                with Traffic() as traffic:
                    optimizer.step()
                assert len(traffic.elements) == gathers, traffic.elements
                assert sum(traffic.elements) <= 4 * (world + 1) * gathers, traffic.elements
                assert not torch.equal(full(model.last.weight), before)
                optimizer.zero_grad()
    assert all(local(p).device.type == "cpu" for p in model.parameters())


# --- masters ----------------------------------------------------------------------------------


def masters(rank: int) -> None:
    """bf16 shards with float32 masters; what others write into a shard is taken over."""
    mesh = init_device_mesh("cpu", (3,))
    shapes = ((7, 3), (2,), (4099,))
    where = (mesh, [Shard(0)])
    settings = {"lr": 1e-3, "master_weights": True, "grad_clip_norm": 1e9}
    params = [nn.Parameter(placed(random(s, torch.bfloat16), where)) for s in shapes]
    optimizer = optim.AdamW(params, **settings)
    mirror = Mirror(params, "AdamW", **settings)
    for step in range(5):
        for param, shape in zip(params, shapes, strict=True):
            param.grad = placed(random(shape, torch.bfloat16), where)
        if step == 3:  # as a checkpoint is read: into the shard, behind the distributed tensor
            with torch.no_grad():
                params[0]._local_tensor.fill_(0.25)
                params[2].fill_(-0.5)  # or through it
                mirror.params[0].fill_(0.25)
                mirror.params[2].fill_(-0.5)
        optimizer.step()
        mirror.step()
        mirror.check(optimizer, exact=True)
    for param in params:
        master = optimizer.state[param]["master_param"]
        assert isinstance(master, DTensor)
        assert master.dtype == torch.float32
        assert torch.equal(full(master).bfloat16(), full(param))
    assert rank == mesh.get_rank()


# --- scalers ----------------------------------------------------------------------------------


def grad_scaler(rank: int) -> None:
    """An overflow on one process at the first step is left out on all; then the steps are right."""
    for more in ({}, {"grad_clip_norm": 0.5}, {"grad_clip_norm": 0.5, "fused_unscale": False}):
        model = make_model()
        place, parts = shard(model, "plain")
        optimizer = optim.AdamW(model.parameters(), lr=0.01, **more)
        mirror = Mirror(model.parameters(), "AdamW", lr=0.01, **more)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        before = [full(p) for p in model.parameters()]
        scaler.scale(loss_of(model, 0, place, parts)).backward()
        if rank == 1:
            model.first.weight.grad._local_tensor[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 512.0
        assert not optimizer.state
        for param, value in zip(model.parameters(), before, strict=True):
            assert torch.equal(full(param), value)
        for step in range(2):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step, place, parts)).backward()
            for mine, other in zip(mirror.params, model.parameters(), strict=True):
                mine.grad = None if other.grad is None else full(other.grad) / 512.0
            mirror.optimizer.step()
            scaler.step(optimizer)
            scaler.update()
            mirror.check(optimizer, exact=not more)


# --- DDP --------------------------------------------------------------------------------------


def data_parallel(rank: int) -> list[Any]:
    """Equal on all ranks, and to one process on all gradients; with bf16 and masters too."""
    finals = []
    for dtype, views, more in (
        (torch.float32, True, {"norm_in_backward": True}),
        (torch.float32, False, {"on_nonfinite": "skip"}),
        (torch.bfloat16, True, {"master_weights": True}),
    ):
        model = make_model().to(dtype)
        model.unused.requires_grad_(False)
        parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=views)
        optimizer = optim.AdamW(parallel.parameters(), lr=0.01, grad_clip_norm=0.5, **more)
        more.pop("norm_in_backward", None)
        mirror = Mirror(model.parameters(), "AdamW", lr=0.01, grad_clip_norm=0.5, **more)
        for step in range(4):
            generator = torch.Generator().manual_seed(10 * step + rank)
            inputs = torch.randn(4, FEATURES, generator=generator).to(dtype)
            parallel(inputs).square().mean().backward()
            optimizer.step()
            mirror.step()
            mirror.check(optimizer, exact=True)
            optimizer.zero_grad(set_to_none=step % 2 == 0)
        finals.append([p.detach().float().numpy().tobytes() for p in model.parameters()])
        finals.append(optimizer.last.grad_norm)
    return finals


# --- what others do ---------------------------------------------------------------------------


def fused_of_torch(rank: int) -> None:
    """torch's own fused SGD does not run on distributed tensors in 2.13, with momentum or not."""
    del rank
    mesh = init_device_mesh("cpu", (2,))
    for momentum in (0.0, 0.9):
        param = nn.Parameter(placed(random((4, 2)), (mesh, [Shard(0)])))
        param.grad = placed(random((4, 2)), (mesh, [Shard(0)]))
        theirs = torch.optim.SGD([param], lr=0.1, momentum=momentum, fused=True)
        assert "_fused_sgd_" in raised(NotImplementedError, theirs.step)
        optim.SGD([param], lr=0.1, momentum=momentum, fused=True).step()


def flat_parameters(rank: int) -> None:
    """FSDP1: a clip by the norm of one process's part would be wrong, and is refused."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    for original in (False, True):
        wrapped = FullyShardedDataParallel(
            nn.Linear(3, 3), device_id=torch.device("cpu"), use_orig_params=original
        )
        optimizer = optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
        theirs = copy.deepcopy([p.detach() for p in wrapped.parameters()])
        wrapped(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        for param, value in zip(wrapped.parameters(), theirs, strict=True):
            if param.grad is not None:
                assert torch.equal(param.detach(), value - 0.1 * param.grad)
        optimizer.param_groups[0]["grad_clip_norm"] = 1.0
        assert "fully_shard" in raised(ValueError, optimizer.step)
    assert rank < 2
