"""`torch.amp.GradScaler` on the CPU, custom scalers, and what an overflow leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
from torch_twins import (
    FORMS,
    difference,
    equal,
    give_gradients,
    ours,
    parameters,
    parameters_of,
    snapshot,
    torch,
    unchanged,
)

pytestmark = pytest.mark.framework("torch")

SHAPES = [(4, 3), (33,)]


def scaled(params: Any, step: int, scale: float, overflow: bool = False) -> None:
    give_gradients(params, step)
    for p in params:
        p.grad *= scale
    if overflow:
        params[1].grad[5] = float("inf")


def run_scaled(opt: Any, steps: int, overflows: tuple[int, ...] = (), **kwargs: Any) -> Any:
    """Steps with a GradScaler, as a training loop calls it."""
    kwargs = {"init_scale": 2.0**12, "growth_interval": 3, **kwargs}
    scaler = torch.amp.GradScaler("cpu", **kwargs)
    params = parameters_of(opt)
    for step in range(steps):
        scaler.scale(torch.ones(()))
        scaled(params, step, scaler.get_scale(), step in overflows)
        scaler.step(opt)
        scaler.update()
    return scaler


@pytest.mark.parametrize("overflows", [(), (0,), (2,), (0, 1, 4)])
@pytest.mark.parametrize("fused_unscale", [None, True, False])
@pytest.mark.parametrize("name", ["SGD", "Adam", "NAdam"])
def test_as_with_the_class_of_torch(
    name: str, fused_unscale: Any, overflows: tuple[int, ...]
) -> None:
    """The scale is a power of two: dividing by it is exact, fused or not. It grows alike."""
    kwargs = {"lr": 0.01, **({"momentum": 0.9} if name == "SGD" else {})}
    theirs = getattr(torch.optim, name)(parameters(SHAPES, "float64"), **kwargs)
    mine = getattr(ours, name)(parameters(SHAPES, "float64"), fused_unscale=fused_unscale, **kwargs)
    scalers = [run_scaled(opt, 8, overflows) for opt in (theirs, mine)]
    assert scalers[0].get_scale() == scalers[1].get_scale()
    assert scalers[0].state_dict() == scalers[1].state_dict()
    if name == "SGD":
        assert equal(theirs, mine)
    assert difference(theirs, mine) < 1e-9
    assert mine.skipped_steps == (len(overflows) if fused_unscale else 0)
    assert not hasattr(mine, "grad_scale")
    assert not hasattr(mine, "found_inf")


@pytest.mark.parametrize("fused_unscale", [None, True, False])
def test_with_a_clip(fused_unscale: Any) -> None:
    """The norm is that of unscaled gradients, and the clip inside the one outside."""
    mine = ours.SGD(
        parameters(SHAPES), lr=0.1, momentum=0.9, grad_clip_norm=0.5, fused_unscale=fused_unscale
    )
    plain = ours.SGD(parameters(SHAPES), lr=0.1, momentum=0.9, grad_clip_norm=0.5)
    run_scaled(mine, 5)
    for step in range(5):
        give_gradients(parameters_of(plain), step)
        plain.step()
    assert equal(mine, plain)
    assert mine.last.grad_norm == plain.last.grad_norm
    assert mine._step_supports_amp_scaling is (fused_unscale is not False)


def test_who_unscales() -> None:
    """Left to the scaler unless a group clips, or as `fused_unscale` says."""
    params = parameters(SHAPES)
    assert not ours.SGD(params)._step_supports_amp_scaling
    assert ours.SGD(params, grad_clip_norm=1.0)._step_supports_amp_scaling
    assert ours.SGD(params, grad_clip_value=1.0)._step_supports_amp_scaling
    groups = [{"params": params[:1]}, {"params": params[1:], "grad_clip_norm": 1.0}]
    assert ours.SGD(groups)._step_supports_amp_scaling
    assert ours.SGD(params, fused_unscale=True)._step_supports_amp_scaling
    assert not ours.SGD(params, grad_clip_norm=1.0, fused_unscale=False)._step_supports_amp_scaling


@pytest.mark.parametrize("fused_unscale", [True, False])
def test_unscale_called_before(fused_unscale: bool) -> None:
    """The user unscales, looks at the gradients, and steps: they are not divided again."""
    mine = ours.SGD(parameters(SHAPES), lr=0.1, grad_clip_norm=0.5, fused_unscale=fused_unscale)
    plain = ours.SGD(parameters(SHAPES), lr=0.1, grad_clip_norm=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        scaler.scale(torch.ones(()))
        scaled(parameters_of(mine), step, scaler.get_scale(), step == 1)
        scaler.unscale_(mine)
        scaler.step(mine)
        scaler.update()
        if step != 1:
            give_gradients(parameters_of(plain), step)
            plain.step()
        assert equal(mine, plain)
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("name", FORMS)
def test_an_overflow_on_the_first_step_is_a_no_op(name: str) -> None:
    """Not a bit, not a version, no state; and the next step is a first step."""
    kwargs = FORMS[name][1]
    opt = getattr(ours, name)(parameters(SHAPES), fused_unscale=True, **kwargs)
    before = snapshot(opt)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    scaled(parameters_of(opt), 0, 1024.0, overflow=True)
    scaler.step(opt)
    scaler.update()
    assert unchanged(opt, before)
    assert len(opt.state) == 0
    assert opt.last.skipped
    assert opt.grad_norm is None
    assert opt.skipped_steps == 1
    assert scaler.get_scale() == 512.0
    plain = getattr(ours, name)(parameters(SHAPES), **kwargs)
    for each in (opt, plain):
        give_gradients(parameters_of(each), 1)
        each.step()
    assert equal(opt, plain)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_attributes_of_a_custom_scaler(shape: tuple[int, ...]) -> None:
    """`grad_scale` divides, `found_inf` skips; either may be missing or None (pytorch#123428)."""
    plain = ours.SGD(parameters(SHAPES), lr=0.1, momentum=0.9)
    mine = ours.SGD(parameters(SHAPES), lr=0.1, momentum=0.9)
    number = torch.zeros(shape)
    for step, (scale, inf) in enumerate(
        [(8.0, None), (4.0, 0.0), (None, 0.0), (None, None), (16.0, 1.0), (2.0, 0.0)]
    ):
        mine.grad_scale = None if scale is None else number + scale
        mine.found_inf = None if inf is None else number + inf
        scaled(parameters_of(mine), step, scale or 1.0)
        mine.step()
        if not inf:
            give_gradients(parameters_of(plain), step)
            plain.step()
        assert equal(mine, plain), step
    del mine.grad_scale, mine.found_inf
    assert mine.skipped_steps == 1


def test_scale_that_is_no_power_of_two() -> None:
    """One multiplication by 1 / scale in float64, rounded once."""
    mine = ours.SGD(parameters(SHAPES), lr=0.1)
    plain = ours.SGD(parameters(SHAPES), lr=0.1, rescale_grad=1.0 / 3.0)
    mine.grad_scale = torch.tensor(3.0)
    for opt in (mine, plain):
        give_gradients(parameters_of(opt), 0)
        opt.step()
    assert equal(mine, plain)


def test_scale_together_with_rescale_grad() -> None:
    mine = ours.SGD(parameters(SHAPES), lr=0.1, rescale_grad=0.5, grad_clip_norm=1.0)
    plain = ours.SGD(parameters(SHAPES), lr=0.1, grad_clip_norm=1.0)
    mine.grad_scale = torch.tensor(4.0)
    for opt, factor in ((mine, 8.0), (plain, 1.0)):
        scaled(parameters_of(opt), 0, factor)
        opt.step()
    assert equal(mine, plain)
    assert mine.last.grad_norm == plain.last.grad_norm


def test_on_nonfinite_beside_a_scaler() -> None:
    """The optimizer's own judgement still holds where the scaler saw nothing."""
    opt = ours.SGD(parameters(SHAPES), lr=0.1, on_nonfinite="raise")
    before = snapshot(opt)
    opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    scaled(parameters_of(opt), 0, 4.0, overflow=True)
    with pytest.raises(FloatingPointError, match="holds inf or NaN"):
        opt.step()
    assert unchanged(opt, before)
    opt.found_inf = torch.tensor(1.0)
    opt.step()
    assert opt.last.skipped
    assert unchanged(opt, before)


class Recording:
    """A plan that notes what its steps get."""

    def __init__(self, plan: Any) -> None:
        self.plan, self.got = plan, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plan, name)

    def step(self, *arguments: Any, **scaling: Any) -> Any:
        self.got.append(scaling)
        return self.plan.step(*arguments, **scaling)


def test_the_core_gets_tensors_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that those of a GPU are read there: nothing here asks for their values."""
    opt = ours.Adam(parameters(SHAPES), lr=0.1, grad_clip_norm=1.0, on_nonfinite="skip")
    give_gradients(parameters_of(opt), 0)
    opt.step()
    plan = Recording(opt._bound.plan)
    opt._bound = opt._bound._replace(plan=plan)
    opt.grad_scale, opt.found_inf = torch.tensor(3.0), torch.tensor(1.0)

    def refuse(*_: Any) -> None:
        raise AssertionError("read by the host")

    with monkeypatch.context() as patches:
        for name in ("item", "tolist", "numpy", "__float__", "__bool__", "__int__", "cpu"):
            patches.setattr(torch.Tensor, name, refuse)
        opt.step()
    (got,) = plan.got
    assert got["found_inf"] is opt.found_inf
    assert got["grad_scale"] is opt.grad_scale
    assert opt.last.skipped


def test_numbers_of_other_kinds() -> None:
    """Python numbers, integers, flags: what `float` takes."""
    plain = ours.SGD(parameters(SHAPES), lr=0.1)
    mine = ours.SGD(parameters(SHAPES), lr=0.1)
    pairs = [(4, False), (torch.tensor(4), torch.tensor(True)), (4.0, torch.tensor(0))]
    for step, (scale, inf) in enumerate(pairs):
        mine.grad_scale, mine.found_inf = scale, inf
        scaled(parameters_of(mine), step, 4.0)
        mine.step()
        if not inf:
            give_gradients(parameters_of(plain), step)
            plain.step()
        assert equal(mine, plain), step
    assert mine.skipped_steps == 1


def test_closures_are_refused_by_the_scaler() -> None:
    """As torch says; the optimizer is not called."""
    opt = ours.SGD(parameters(SHAPES), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(opt, closure=lambda: None)
    assert opt.last is None


def test_disabled_scaler() -> None:
    opt, plain = (ours.Adam(parameters(SHAPES), grad_clip_norm=0.5) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for each in (opt, plain):
        give_gradients(parameters_of(each), 0)
    scaler.step(opt)
    scaler.update()
    plain.step()
    assert equal(opt, plain)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_parameters(dtype: str) -> None:
    """torch's scaler cannot unscale float16 gradients; the step can, in float32."""
    mine = ours.SGD(parameters(SHAPES, dtype), lr=0.1, momentum=0.9, fused_unscale=True)
    plain = ours.SGD(parameters(SHAPES, dtype), lr=0.1, momentum=0.9)
    run_scaled(mine, 4, init_scale=4.0, growth_interval=100)
    for step in range(4):
        give_gradients(parameters_of(plain), step)
        plain.step()
    assert equal(mine, plain)


def test_autocast_training() -> None:
    """A loop of torch's documentation: autocast, scaler, clip inside; it learns."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    x = torch.randn(64, 8)
    y = x.sum(1, keepdim=True)
    opt = ours.AdamW(model.parameters(), lr=0.02, grad_clip_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    losses = []
    for _ in range(30):
        opt.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = torch.nn.functional.mse_loss(model(x).float(), y)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
