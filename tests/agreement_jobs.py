"""What the processes of test_torch_distributed.py run where one of them differs from the others."""

from __future__ import annotations

import copy
from typing import Any

import torch
from distributed_jobs import Mirror, local, placed, raised, random, spoil
from fusedstep import torch as optim
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, init_device_mesh
from torch.nn import Parameter


def on_submeshes(square: DeviceMesh, *names: str) -> tuple[list[Any], list[Any]]:
    """Parameters with gradients on parts of a mesh, on all of it, and an ordinary one; layouts."""
    meshes = [square[name] if name else square for name in names]
    layout = [*((mesh, [Replicate()] * (mesh.ndim - 1) + [Shard(0)]) for mesh in meshes), None]
    params = [Parameter(placed(random((5, 2)), where)) for where in layout]
    for param, where in zip(params, layout, strict=True):
        param.grad = placed(random((5, 2)), where)
    return params, layout


def submeshes(rank: int) -> list[float]:
    """Tensor parallelism with and without FSDP2: parts of the mesh first, then the whole one."""
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    norms = []
    for index in (0, 1, 3):  # whose copies differ
        params, layout = on_submeshes(square, "dp", "tp", "")
        optimizer = optim.SGD(params, lr=0.1, on_nonfinite="skip", grad_clip_norm=1.0)
        mirror = Mirror(params, "SGD", lr=0.1, on_nonfinite="skip", grad_clip_norm=1.0)
        optimizer.step()
        mirror.step()
        mirror.check(optimizer, exact=False)
        with torch.no_grad():
            local(params[index].grad).mul_(1 + rank)
        optimizer.step()
        norms.append(optimizer.last.grad_norm)
        params[index].grad = placed(random((5, 2)), layout[index])
        before = [local(p).clone() for p in params]
        for value in (float("nan"), float("inf")):
            if rank == 3:
                spoil(params[index], value)
            optimizer.step()
            assert optimizer.last.skipped
            assert all(map(torch.equal, before, map(local, params)))
        optimizer.on_nonfinite = "raise"
        raised(FloatingPointError, optimizer.step)
        optimizer.found_inf = torch.tensor(float(rank == 3))
        optimizer.step()
        assert optimizer.last.skipped
        assert all(map(torch.equal, before, map(local, params)))
    return norms


def crossed_meshes(rank: int) -> None:
    """No mesh has all processes: refused by the one that sees it, and the others do not wait."""
    pairs = [DeviceMesh("cpu", [1, 2]), DeviceMesh("cpu", [1, 3])]
    layout = [(mesh, [Shard(0)]) for mesh in pairs if mesh.get_coordinate() is not None]
    if layout:
        params = [Parameter(placed(random((4,)), where)) for where in (*layout, None)]
        for param, where in zip(params, (*layout, None), strict=True):
            param.grad = placed(random((4,)), where)
        before = [local(p).clone() for p in params]
        optimizer = optim.SGD(params, lr=0.1, grad_clip_norm=1.0)
        error = raised(ValueError if rank == 1 else RuntimeError, optimizer.step)
        assert ("on several meshes" if rank == 1 else "another process") in error
        assert all(map(torch.equal, before, map(local, params)))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    params, _ = on_submeshes(square, "dp", "tp")
    optimizer = optim.SGD(params, lr=0.1, on_nonfinite="skip")
    assert "on several meshes" in raised(ValueError, optimizer.step)


def spoilers() -> dict[str, tuple[str, Any]]:
    """What one process may find wrong: before gradients are looked at, with one, with all.

    Name -> what the error says, and a function of the optimizer that makes it so.
    """

    def on_other_mesh(optimizer: Any) -> None:
        # Made without process groups, which all processes would have to make together.
        grad = optimizer.param_groups[0]["params"][0].grad
        grad._spec = copy.copy(grad._spec)
        grad._spec.mesh = DeviceMesh("cpu", [[0, 1]], _init_backend=False)
        grad._spec.placements = (Replicate(), Shard(0))

    def of_state(optimizer: Any) -> None:
        last = optimizer.param_groups[0]["params"][-1]
        optimizer.state[last]["momentum_buffer"] = torch.ones(last.shape, dtype=torch.float64)

    def of_parameter(optimizer: Any) -> None:
        optimizer.param_groups[0]["params"][-1].data = torch.ones(1).expand(4)

    def shared(optimizer: Any) -> None:
        last = optimizer.param_groups[0]["params"][-1]
        last.grad = last.detach()

    def rate(optimizer: Any) -> None:
        optimizer.param_groups[0]["lr"] = float("nan")

    def rescale(optimizer: Any) -> None:
        optimizer.param_groups[0]["rescale_grad"] = float("inf")

    return {
        "gradient": ("another device mesh", on_other_mesh),
        "state": ("dtype float64", of_state),
        "parameter": ("is expanded", of_parameter),
        "overlap": ("overlap in memory", shared),
        "rate": ("lr", rate),
        "rescale": ("rescale_grad", rescale),
    }


def raises_on_one(rank: int) -> None:
    """Wherever one process raises, the others do, and nobody has moved."""
    mesh = init_device_mesh("cpu", (2,))
    layout = [(mesh, [Shard(0)]), (mesh, [Shard(0)]), None]
    for more in ({"grad_clip_norm": 1.0}, {"on_nonfinite": "skip"}, {"found_inf": 0.0}):
        for name, (text, spoils) in spoilers().items():
            settings = {key: value for key, value in more.items() if key != "found_inf"}
            params = [Parameter(placed(random((4,)), where)) for where in layout]
            optimizer = optim.SGD(params, lr=0.1, momentum=0.9, **settings)
            if not settings:
                optimizer.found_inf = torch.tensor(0.0)
            for step in range(2):
                for param, where in zip(params, layout, strict=True):
                    param.grad = placed(random((4,)), where)
                if step and name not in {"state", "parameter"}:  # which raise before these
                    params[1].grad = DTensor.from_local(random((4,)), mesh, [Partial()])
                if step and rank:
                    spoils(optimizer)
                before = [local(p).clone() for p in params]
                if not step:
                    optimizer.step()
                    continue
                kinds = (TypeError, ValueError, BufferError) if rank else RuntimeError
                error = raised(kinds, optimizer.step)
                assert (text if rank else "another process") in error, (name, error)
                assert all(map(torch.equal, before, map(local, params))), name
