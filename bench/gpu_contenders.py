"""Who does the work of a GPU row: fusedstep in its forms, torch, optax, CuPy."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from bench import contenders as by
from bench import on_torch
from bench.bars import ADAPTER, CUPY, FOREACH, FUNCTION, FUSED, OBJECT_GRAPH, OPTAX, OURS
from bench.gpu_device import Contender, Cpu
from bench.gpu_work import TorchWork
from bench.methods import DECAY, LR, MOMENTUM, NESTEROV
from bench.work import Step

Maker = Callable[[TorchWork, Cpu], Contender]

CAPTURABLE = "torch foreach capturable"
WALKS = ("forward", "backward")


def _plain(step: Callable[[TorchWork], Step]) -> Maker:
    return lambda work, _: Contender(step(work))


def _replayed(step: Callable[[TorchWork], Step]) -> Maker:
    """The same in a CUDA graph."""
    return lambda work, device: Contender(device.captured(step(work)))


def _torch(form: str) -> Callable[[TorchWork], Step]:
    return lambda work: on_torch.optimizer(work.with_narrow_states(), form)


def _walking(walk: str) -> Callable[[TorchWork], Step]:
    """Our function, its update pass in one of the two directions."""

    def make(work: TorchWork) -> Step:
        from fusedstep import _cuda

        step = by.function(work)

        def run() -> None:
            usual = _cuda.set_walk(walk)
            step()
            _cuda.set_walk(usual)

        return run

    return make


def has_walks() -> bool:
    """Whether the backend can be told in which direction the update pass goes."""
    try:
        from fusedstep import _cuda
    except ImportError:
        return False
    return hasattr(_cuda, "set_walk")


# --- optax --------------------------------------------------------------------------------------


def _optax(work: TorchWork, _: Cpu) -> Contender:
    """A jitted chain on donated arrays of its own."""
    import jax
    import jax.numpy as jnp

    from bench.jax_rows import Contender as Jitted
    from bench.jax_rows import optax_chain

    def arrays(flat: Any) -> list[Any]:
        # Aligned as XLA likes it, and then copied: what is not its own cannot be donated.
        aligned = (part.clone() for part in work.split(flat))
        return [jnp.array(jax.dlpack.from_dlpack(part), copy=True) for part in aligned]

    adaptive = len(work.method.torch_state) > 1
    jitted = Jitted(arrays(work.p), arrays(work.g), *optax_chain(work.clip, adaptive))
    return Contender(jitted.queue, jitted.wait, lambda: jitted.params)


def why_no_optax(device: Cpu) -> str | None:
    if not (find_spec("jax") and find_spec("optax")):
        return "jax or optax is not installed"
    import jax

    platform = jax.default_backend()
    wanted = {"cpu": "cpu", "cuda": "gpu"}[device.torch_device]
    return None if platform == wanted else f"JAX computes on {platform} here"


# --- CuPy ---------------------------------------------------------------------------------------

NESTEROV_IN_CUDA = """
    const T scaled = coefficient[0] * g + decay * p;
    v = momentum * v + scaled;
    p -= lr * (scaled + momentum * v);
"""


def _cupy(work: TorchWork, _: Cpu) -> Contender:
    """As one writes it by hand: sums of squares, and one elementwise kernel per tensor.

    CuPy's current stream is that of torch: both are the default stream.
    """
    import cupy

    squares = cupy.ReductionKernel("T x", "T y", "x * x", "a + b", "y = a", "0", "bench_squares")
    update = cupy.ElementwiseKernel(
        "T g, raw T coefficient, T lr, T momentum, T decay", "T p, T v",
        NESTEROV_IN_CUDA, "bench_nesterov",
    )  # fmt: skip
    flat = (work.p, work.g, *work.states)
    tensors = list(zip(*([cupy.from_dlpack(t) for t in work.split(a)] for a in flat), strict=True))
    one = cupy.ones((), cupy.float32)

    def step() -> None:
        coefficient = one
        if work.clip is not None:
            total = cupy.stack([squares(g) for _, g, _ in tensors]).sum()
            coefficient = cupy.minimum(one, cupy.float32(work.clip) / cupy.sqrt(total))
        for p, g, v in tensors:
            update(g, coefficient, LR, MOMENTUM, DECAY, p, v)

    return Contender(step)


def why_no_cupy(_: Cpu) -> str | None:
    if not find_spec("cupy"):
        return "cupy is not installed"
    import cupy

    return None if cupy.cuda.is_available() else "CuPy sees no GPU"


# --- the lists ----------------------------------------------------------------------------------


def ours(work: TorchWork) -> dict[str, Maker]:
    """fusedstep in every form, the object first."""
    makers = {
        OURS: _plain(by.optimizer),
        FUNCTION: _plain(by.function),
        ADAPTER: _plain(on_torch.adapter),
        OBJECT_GRAPH: _replayed(by.optimizer),
    }
    if work.clip is not None and has_walks():
        makers |= {f"fusedstep {walk} walk": _plain(_walking(walk)) for walk in WALKS}
    return makers


def of_torch(work: TorchWork, device: Cpu) -> dict[str, Maker]:
    """torch in each form that it has; the for-loop only where that is the default."""
    names = [name for name in work.method.torch_forms if name != "for-loop"] + ["default"]
    makers = {f"torch {name}": _plain(_torch(name)) for name in names}
    if work.method is NESTEROV:
        makers[f"{FUSED}, graph"] = _replayed(_torch("fused"))
    elif FUSED not in makers and device.torch_device == "cuda":  # torch has it nowhere else
        form = CAPTURABLE.removeprefix("torch ")
        makers |= {
            CAPTURABLE: _plain(_torch(form)),
            f"{CAPTURABLE}, graph": _replayed(_torch(form)),
        }
    assert FOREACH in makers
    return makers


def others(work: TorchWork, device: Cpu, with_optax: bool) -> dict[str, Maker]:
    """What is there of them; CuPy's kernel is for Nesterov on float32."""
    makers: dict[str, Maker] = {}
    if with_optax and not why_no_optax(device):
        makers[OPTAX] = _optax
    if work.method is NESTEROV and work.dtype == torch.float32 and not why_no_cupy(device):
        makers[CUPY] = _cupy
    return makers


def absent(device: Cpu) -> dict[str, str]:
    """Who is left out altogether, and why."""
    reasons = {OPTAX: why_no_optax(device), CUPY: why_no_cupy(device)}
    return {who: why for who, why in reasons.items() if why}
