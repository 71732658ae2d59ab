"""The rows of `fusedstep.torch`: whole `optimizer.step()` calls on torch parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bench import on_torch
from bench.bars import ADAPTER, ADAPTER_IN_BACKWARD, TORCH_WAYS
from bench.measure import Row, timed
from bench.methods import ADAMW, NESTEROV, Method
from bench.models import Shape, equal
from bench.setting import Setting
from bench.work import Step, Work

WAYS = tuple(name.removeprefix("torch ") for name in TORCH_WAYS)
BYTES = {"momentum": 24, "adam": 32}  # per element; the gradients are read twice, for the norm too
LOSS_SCALE = 1024.0


def _row(name: str, what: str, work: Work, steps: dict[str, Step], calls: int = 1) -> Row:
    differences = work.verify(steps)
    samplers = {who: timed(run, calls, work.reset_gradients) for who, run in steps.items()}
    nbytes = {ADAPTER: BYTES[work.method.rule] * work.p.size} if work.clip else {}
    return Row(name, f"{what}, {work.extent}", samplers, nbytes, differences)


def _clipped(
    name: str,
    what: str,
    shapes: list[Shape],
    method: Method = NESTEROV,
    calls: int = 1,
    adapter: Callable[[Work], Step] = on_torch.adapter,
) -> Row:
    """A step with a clip by the global norm, against torch's ways to do it."""
    work = Work(shapes, method=method).with_clip()
    steps = {ADAPTER: adapter(work)} | on_torch.forms(work, *WAYS)
    return _row(name, f"{what} + global clip", work, steps, calls)


def large(setting: Setting) -> Row:
    return _clipped("torch-1", "Nesterov + decay", equal(1, setting.scale.large))


def resnet50(setting: Setting) -> Row:
    what = "ResNet-50, Nesterov + decay"
    return _clipped("torch-resnet50", what, setting.scale.resnet50)


def gpt2(setting: Setting) -> Row:
    return _clipped("torch-gpt2", "GPT-2 small, AdamW", setting.scale.gpt2, ADAMW)


def gpt2_nesterov(setting: Setting) -> Row:
    what = "GPT-2 small, Nesterov + decay"
    return _clipped("torch-gpt2-nesterov", what, setting.scale.gpt2)


def small(setting: Setting) -> Row:
    """Five calls, and states of its own: see the row `small`."""
    shapes = equal(setting.scale.many, 1000)
    own = on_torch.adapter_with_own_states
    return _clipped("torch-1000", "Nesterov + decay", shapes, calls=5, adapter=own)


def one(setting: Setting) -> Row:
    """Overhead alone."""
    work = Work(equal(1, 1000))
    steps = {ADAPTER: on_torch.adapter_with_own_states(work)}
    steps |= on_torch.forms(work, "fused", "foreach", "default")
    return _row("torch-one", "Nesterov + decay", work, steps, setting.scale.calls)


def in_backward(setting: Setting) -> Row:
    """Backward and step, with the norm taken in the one or in the other; forward is not timed."""
    scale = setting.scale
    layer = [(scale.width, scale.width), (scale.width,)]
    work = Work(layer * scale.layers, clip=10.0)  # always active: the norm is 22,000
    ours = partial(on_torch.make_adapter, work)
    makers: dict[str, on_torch.StepMaker] = {
        ADAPTER: lambda params: ours(params).step,
        ADAPTER_IN_BACKWARD: lambda params: ours(params, norm_in_backward=True).step,
    }
    makers |= {f"torch {way}": partial(on_torch.torch_step, work, form=way) for way in WAYS}
    trained = {who: on_torch.Training(work, scale.batch, make) for who, make in makers.items()}
    differences = work.verify({who: each.run for who, each in trained.items()}, oracle=False)
    samplers = {who: timed(t.backward_and_step, 1, t.forward) for who, t in trained.items()}
    what = f"backward of {scale.batch} + Nesterov + decay + global clip, {work.extent}"
    return Row("torch-backward", what, samplers, differences=differences)


def scaler(setting: Setting) -> Row:
    """What follows a backward pass with a scaled loss."""
    work = Work(setting.scale.resnet50).with_clip().with_loss_scale(LOSS_SCALE)
    steps = {ADAPTER: on_torch.scaled_adapter(work)}
    steps |= {f"torch {way}": on_torch.scaled_optimizer(work, way) for way in WAYS}
    what = "ResNet-50, GradScaler + Nesterov + decay + global clip"
    return _row("torch-scaler", what, work, steps)


ROWS: dict[str, Callable[[Setting], Row]] = {
    "torch-1": large,
    "torch-resnet50": resnet50,
    "torch-gpt2": gpt2,
    "torch-gpt2-nesterov": gpt2_nesterov,
    "torch-1000": small,
    "torch-one": one,
    "torch-backward": in_backward,
    "torch-scaler": scaler,
}
