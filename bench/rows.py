"""The rows of the table: which work, by whom."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from bench import contenders as by
from bench import jax_rows, on_torch, torch_rows
from bench.bars import CLIPPED, FUNCTION, FUSED, OBJECT, ON_TORCH, OURS, ROOFLINE, SHARED, UNCLIPPED
from bench.machine import ROOT
from bench.measure import Row, timed
from bench.methods import ADAMW, NADAM, SGD
from bench.models import equal
from bench.setting import Setting
from bench.work import Step, Work


def _row(
    setting: Setting,
    name: str,
    what: str,
    work: Work,
    loops: tuple[str, ...],
    bytes_per_element: int,
    peers: bool = True,
) -> Row:
    steps: dict[str, Step] = {OURS: by.function(work)}
    if setting.roofline:
        steps[ROOFLINE] = setting.roofline.loop(loops, work.p, work.g, work.states)
    if peers:
        steps |= on_torch.forms(work) | {"numpy": by.numpy_loop(work)}
    differences = work.verify(steps)
    reset = work.reset_gradients if work.clip else int
    samplers = {who: timed(run, 1, reset) for who, run in steps.items()}
    nbytes = dict.fromkeys((OURS, ROOFLINE), bytes_per_element * work.p.size)
    title = f"{what}, {work.extent}"
    return Row(name, title, samplers, nbytes, differences)


def nesterov(setting: Setting, tensors: int) -> Row:
    work = Work(equal(tensors, setting.scale.large // tensors))
    return _row(setting, f"nesterov-{tensors}", "Nesterov + decay", work, ("update",), 20)


def clip(setting: Setting, tensors: int) -> Row:
    work = Work(equal(tensors, setting.scale.large // tensors)).with_clip()
    what = "Nesterov + decay + global clip"
    return _row(setting, f"clip-{tensors}", what, work, ("read", "update"), 24)


def sgd(setting: Setting) -> Row:
    work = Work(equal(1, setting.scale.large), method=SGD)
    return _row(setting, "sgd", "SGD + decay", work, ("sgd",), 12)


def bf16(setting: Setting) -> Row:
    """No peer: torch keeps the velocity in bfloat16 here."""
    import ml_dtypes

    work = Work(equal(1, setting.scale.large), dtype=ml_dtypes.bfloat16)
    what = "Nesterov + decay, bfloat16 p and g, float32 v"
    return _row(setting, "bf16", what, work, ("update_bf16",), 14, peers=False)


def nadam(setting: Setting, tensors: int) -> Row:
    work = Work(equal(tensors, setting.scale.large // tensors), method=NADAM)
    return _row(setting, f"nadam-{tensors}", "NAdam + decay", work, ("moments",), 28)


def adamw(setting: Setting) -> Row:
    work = Work(equal(1, setting.scale.large), method=ADAMW)
    return _row(setting, "adamw", "AdamW", work, ("moments",), 28)


def adamw_clip(setting: Setting) -> Row:
    work = Work(equal(1, setting.scale.large), method=ADAMW).with_clip()
    loops = ("read", "moments")
    return _row(setting, "adamw-clip", "AdamW + global clip", work, loops, 32)


def small(setting: Setting) -> Row:
    work = Work(equal(setting.scale.many, 1000)).with_clip()
    steps = {OURS: by.optimizer(work), FUNCTION: by.function_with_own_state(work)}
    steps[SHARED] = by.function(work)
    if on_torch.HAS_TORCH:
        steps[ON_TORCH] = on_torch.object_on_torch(work)
    steps |= on_torch.forms(work) | {"numpy": by.numpy_loop(work)}
    differences = work.verify(steps)
    # Five calls: the first may have to wake sleeping threads, as no call in a training loop has to.
    samplers = {who: timed(run, 5, work.reset_gradients) for who, run in steps.items()}
    title = f"Nesterov + decay + global clip, {work.extent}"
    return Row("small", title, samplers, differences=differences)


def call(setting: Setting) -> Row:
    work = Work(equal(1, 1000))
    steps = {OURS: by.single(work), OBJECT: by.optimizer(work)}
    steps |= on_torch.forms(work) | {"numpy": by.numpy_loop(work)}
    differences = work.verify(steps)
    samplers = {who: timed(run, setting.scale.calls) for who, run in steps.items()}
    return Row("call", "Nesterov + decay, one call on 1 x 1000", samplers, differences=differences)


def cached(setting: Setting) -> Row:
    plain = Work(equal(10, setting.scale.cached // 10))
    clipped = plain.with_clip()
    steps = {UNCLIPPED: by.function(plain), CLIPPED: by.function(clipped)}
    plain.verify({UNCLIPPED: steps[UNCLIPPED]})
    clipped.verify({CLIPPED: steps[CLIPPED]})
    if on_torch.HAS_TORCH:
        steps["torch fused no clip"] = on_torch.optimizer(plain, "fused")
        steps["torch fused clip"] = on_torch.optimizer(clipped, "fused")
    samplers = {who: timed(run, 20) for who, run in steps.items()}
    return Row("cached", f"Nesterov + decay, {plain.extent}", samplers)


def alternate(setting: Setting) -> Row:
    """A step and a torch operation by turns, and the same number of both one after the other."""
    work = Work(equal(10, setting.scale.cached // 10)).with_clip()
    rounds = 20
    contenders: dict[str, Callable[[], float]] = {}
    if on_torch.HAS_TORCH:
        import torch

        square = torch.ones(setting.scale.matmul, setting.scale.matmul)
        multiply = partial(torch.mm, square, square)
        for who, step in {
            OURS: by.function(work),
            FUSED: on_torch.optimizer(work, "fused"),
        }.items():
            contenders[f"{who} by turns"] = timed(partial(_by_turns, step, multiply, rounds))
            contenders[f"{who} apart"] = timed(partial(_apart, step, multiply, rounds))
    size = setting.scale.matmul
    return Row("alternate", f"{rounds} x ({work.extent}, matmul {size})", contenders)


def _by_turns(step: Step, other: Step, rounds: int) -> None:
    for _ in range(rounds):
        step()
        other()


def _apart(step: Step, other: Step, rounds: int) -> None:
    for run in (step, other):
        for _ in range(rounds):
            run()


def import_time(_: Setting) -> Row:
    code = """
import numpy, time
begin = time.perf_counter()
import fusedstep
print(time.perf_counter() - begin)
"""

    def sample() -> float:
        return float(subprocess.check_output([sys.executable, "-c", code], cwd="/", text=True))

    return Row("import", "import fusedstep, beyond NumPy", {OURS: sample})


def wheel(_: Setting) -> Row:
    wheels = sorted((ROOT / "wheelhouse").glob("fusedstep-*.whl"), key=_made)
    contenders = {OURS: lambda: float(wheels[-1].stat().st_size)} if wheels else {}
    if wheels and any("/_cuda" in name for name in zipfile.ZipFile(wheels[-1]).namelist()):
        return Row("wheel-cuda", "size of the wheel, with CUDA", contenders, unit="bytes")
    return Row("wheel", "size of the wheel", contenders, unit="bytes")


def _made(path: Path) -> float:
    return path.stat().st_mtime


ROWS: dict[str, Callable[[Setting], Row]] = {
    "nesterov-1": partial(nesterov, tensors=1),
    "nesterov-200": partial(nesterov, tensors=200),
    "clip-1": partial(clip, tensors=1),
    "clip-200": partial(clip, tensors=200),
    "sgd": sgd,
    "nadam-1": partial(nadam, tensors=1),
    "nadam-200": partial(nadam, tensors=200),
    "adamw": adamw,
    "adamw-clip": adamw_clip,
    "bf16": bf16,
    "small": small,
    "call": call,
    "cached": cached,
    "alternate": alternate,
    **(torch_rows.ROWS if on_torch.HAS_TORCH else {}),
    **(jax_rows.ROWS if jax_rows.HAS_JAX else {}),
    "import": import_time,
    "wheel": wheel,
}


def build(setting: Setting, word: str) -> Iterator[Row]:
    """The rows whose name contains `word`, one at a time: each frees its memory before the next."""
    for name, make in ROWS.items():
        if word in name:
            yield make(setting)
