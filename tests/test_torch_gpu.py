"""fusedstep.torch on a GPU: the bits of the CPU, and nobody waits for it.

Each test runs on the emulated device, and with `-m gpu` on a real one.
"""

from __future__ import annotations

import math
from typing import Any

import fusedstep
import pytest
from torch_devices import SHAPES, Cuda, Twins
from torch_twins import FORMS, give_gradients, ours, parameters, torch

pytestmark = pytest.mark.framework("torch")

# --- steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("policy", ["propagate", "skip"])
def test_the_bits_of_the_cpu(torch_device: Any, name: str, policy: str) -> None:
    twins = Twins(torch_device, name, lr=0.1, grad_clip_norm=1.0, on_nonfinite=policy)
    for t in range(4):
        step = twins.step if t == 0 else twins.step_without_waiting
        step(t, bad=math.inf if policy == "skip" and t in {0, 2} else None)
        assert isinstance(twins.gpu.last, fusedstep.DeviceStepResult)
        assert not twins.gpu.last.settled
    assert twins.gpu.grad_norm == twins.cpu.grad_norm
    assert twins.gpu.grad_norm.device.type == "cpu"
    assert tuple(twins.gpu.last)[:3] == tuple(twins.cpu.last)[:3]
    twins.check()


def test_what_nothing_can_skip_is_known_at_once(torch_device: Any) -> None:
    """Counts need no device then, also while somebody holds the state."""
    twins = Twins(torch_device, "Adam", lr=0.1)
    twins.step(0)
    held = twins.gpu.state[twins.on_device[0]]
    for t in range(1, 4):
        twins.give(t)
        twins.cpu.step()
        with torch_device.never_waiting():
            twins.gpu.step()
            assert twins.gpu.last.settled
            assert held["step"] == t + 1
    twins.check()


@pytest.mark.parametrize("held", [True, False])
def test_counts_after_skipped_steps(torch_device: Any, held: bool) -> None:
    twins = Twins(torch_device, "NAdam", lr=0.1, on_nonfinite="skip")
    twins.step(0, bad=math.nan)
    assert len(twins.gpu.state) == 0
    twins.step(1)
    kept = twins.gpu.state[twins.on_device[0]] if held else None
    twins.step(2, bad=math.nan)
    twins.step(3)
    if kept is not None:
        assert kept["step"] == 2
    twins.step(4, bad=math.inf)
    assert twins.gpu.state[twins.on_device[0]]["step"] == 2
    assert twins.gpu.skipped_steps == 3
    twins.check()


def test_what_is_put_into_the_state_holds(torch_device: Any) -> None:
    twins = Twins(torch_device, "Adam", lr=0.1, on_nonfinite="skip")
    twins.step(0)
    for optimizer in (twins.cpu, twins.gpu):
        for entries in optimizer.state.values():
            entries["step"] = torch.tensor(7.0)
    assert twins.gpu.state[twins.on_device[0]]["step"] == 7
    twins.step(1)
    assert twins.gpu.state[twins.on_device[0]]["step"] == 8
    twins.check()


def test_an_error_changes_nothing(torch_device: Any) -> None:
    twins = Twins(torch_device, "Adam", lr=0.1, on_nonfinite="raise")
    twins.step(0)
    twins.give(1, bad=math.nan)
    for optimizer in (twins.cpu, twins.gpu):
        with pytest.raises(FloatingPointError, match=r"params'\]\[0\].grad holds inf or NaN"):
            optimizer.step()
    twins.check()


def test_counts_outlive_the_plan(torch_device: Any) -> None:
    """Groups come, a state is loaded: what has been skipped before still counts."""
    twins = Twins(torch_device, "SGD", lr=0.1, on_nonfinite="skip")
    twins.step(0, bad=math.nan)
    twins.step(1)
    new = parameters([(5,)])
    twins.cpu.add_param_group({"params": new})
    twins.gpu.add_param_group({"params": [torch_device.to(new[0])]})
    twins.params = [p for group in twins.cpu.param_groups for p in group["params"]]
    twins.on_device = [p for group in twins.gpu.param_groups for p in group["params"]]
    twins.step(2, bad=math.nan)
    twins.check()
    with torch_device.waiting():
        saved = [optimizer.state_dict() for optimizer in (twins.cpu, twins.gpu)]
    twins.step(3)
    twins.step(4, bad=math.inf)
    with torch_device.waiting():
        for optimizer, state in zip((twins.cpu, twins.gpu), saved, strict=True):
            optimizer.load_state_dict(state)
    twins.step(5)
    assert twins.gpu.skipped_steps == 3
    twins.check()


# --- scalers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD", "Adam", "NAdam"])
@pytest.mark.parametrize("overflows", [(0,), (2,), (0, 1, 4)])
def test_scale_and_overflow_stay_on_the_device(
    torch_device: Any, name: str, overflows: tuple[int, ...]
) -> None:
    """Also a scale that is no power of two: the same product in float64 everywhere."""
    twins = Twins(torch_device, name, lr=0.1, grad_clip_norm=1.0, rescale_grad=0.5)
    scale, inf = torch.tensor(3.0), torch.tensor(0.0)
    twins.cpu.grad_scale, twins.cpu.found_inf = scale, inf
    twins.gpu.grad_scale, twins.gpu.found_inf = torch_device.to(scale), torch_device.to(inf)
    for t in range(6):
        inf.fill_(float(t in overflows))
        torch_device.write(twins.gpu.found_inf, inf)
        step = twins.step if t == 0 else twins.step_without_waiting
        step(t, bad=math.inf if t in overflows else None)
    assert twins.gpu.skipped_steps == len(overflows)
    assert twins.gpu.last.skipped == twins.cpu.last.skipped
    twins.check()


def test_an_overflow_is_no_error_of_the_gradients(torch_device: Any) -> None:
    twins = Twins(torch_device, "SGD", lr=0.1, on_nonfinite="raise")
    twins.step(0)
    twins.cpu.found_inf = torch.tensor(1.0)
    twins.gpu.found_inf = torch_device.to(twins.cpu.found_inf)
    with torch_device.waiting():  # on_nonfinite="raise" does
        twins.step(1, bad=math.inf)
    assert twins.gpu.last.skipped
    twins.check()


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_flag_of_the_host(torch_device: Any, clip: float | None) -> None:
    """What is known before counts, too."""
    twins = Twins(torch_device, "Adam", lr=0.1, grad_clip_norm=clip)
    twins.step(0)
    for t in range(1, 5):
        flag = torch.tensor(float(t in {1, 3}))
        twins.cpu.found_inf = twins.gpu.found_inf = flag
        twins.step(t)
    assert twins.gpu.skipped_steps == 2
    twins.check()


@pytest.mark.gpu
@pytest.mark.parametrize("fused_unscale", [True, False])
@pytest.mark.parametrize("overflows", [(), (0,), (0, 3)])
def test_grad_scaler(fused_unscale: bool, overflows: tuple[int, ...]) -> None:
    twins = Twins(Cuda(), "Adam", lr=0.1, grad_clip_norm=1.0, fused_unscale=fused_unscale)
    scalers = [
        torch.amp.GradScaler(where, init_scale=1024.0, growth_interval=2)
        for where in ("cpu", "cuda")
    ]
    for t in range(6):
        scalers[0].scale(torch.ones(()))
        scalers[1].scale(torch.ones((), device="cuda"))
        twins.give(t, scalers[0].get_scale(), math.inf if t in overflows else None)
        for scaler, optimizer in zip(scalers, (twins.cpu, twins.gpu), strict=True):
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
    twins.check()


# --- numbers on the device --------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_a_learning_rate_on_the_device(torch_device: Any, name: str) -> None:
    numbers = {"cpu": torch.tensor(0.1), "gpu": torch_device.to(torch.tensor(0.1))}
    twins = Twins(torch_device, name, lr=0.5)
    twins.cpu.param_groups[0]["lr"] = numbers["cpu"]
    twins.gpu.param_groups[0]["lr"] = numbers["gpu"]
    for t in range(4):
        numbers["cpu"].fill_(0.1 / (1 + t))
        torch_device.write(numbers["gpu"], numbers["cpu"])
        step = twins.step if t == 0 else twins.step_without_waiting
        step(t)
    twins.check()


def test_numbers_of_the_constructor(torch_device: Any) -> None:
    """`lr` is looked at once, there; a tensor of the CPU needs no waiting later."""
    with torch_device.waiting():
        twins = Twins(torch_device, "Adam", lr=torch_device.to(torch.tensor(0.25)), capturable=True)
        with pytest.raises(ValueError, match="lr: expected a number >= 0, got -1"):
            Twins(torch_device, "Adam", lr=torch_device.to(torch.tensor(-1.0)))
    twins.cpu.param_groups[0]["lr"] = 0.25
    twins.step(0)
    twins.gpu.param_groups[0]["lr"] = torch.tensor(0.125)
    twins.cpu.param_groups[0]["lr"] = 0.125
    twins.step_without_waiting(1)
    twins.check()


def test_other_numbers_on_the_device_are_read(torch_device: Any) -> None:
    """As plain numbers; the host waits."""
    twins = Twins(torch_device, "AdamW", lr=0.1)
    betas = (0.5, 0.75)
    twins.cpu.param_groups[0].update(betas=betas, weight_decay=0.25)
    twins.gpu.param_groups[0].update(
        betas=tuple(torch_device.to(torch.tensor(b)) for b in betas),
        weight_decay=torch_device.to(torch.tensor(0.25)),
    )
    with torch_device.waiting():
        twins.step(0)
        twins.step(1)
    twins.check()


@pytest.mark.parametrize("scale", ["none", "host", "device"])
def test_factors_of_gradients_on_the_device(torch_device: Any, scale: str) -> None:
    """`rescale_grad` there, and the scale of a scaler beside it."""
    twins = Twins(torch_device, "SGD", lr=0.1, grad_clip_norm=1.0)
    factor = torch.tensor(0.3, dtype=torch.float64)
    twins.cpu.param_groups[0]["rescale_grad"] = factor.item()
    twins.gpu.param_groups[0]["rescale_grad"] = torch_device.to(factor)
    if scale != "none":
        number = torch.tensor(3.0)
        twins.cpu.grad_scale = number
        twins.gpu.grad_scale = torch_device.to(number) if scale == "device" else number
    twins.step(0)
    twins.step_without_waiting(1)
    assert twins.gpu.grad_norm == twins.cpu.grad_norm
    twins.check()


# --- streams, masters, norms in the backward pass ---------------------------------------------


def test_the_stream_that_torch_works_in(torch_device: Any) -> None:
    twins = Twins(torch_device, "Adam", lr=0.1, grad_clip_norm=1.0)
    twins.step(0)
    with torch_device.stream():
        twins.step(1)
        twins.step(2)
    twins.step(3)
    twins.check()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("policy", ["propagate", "skip"])
def test_masters(torch_device: Any, dtype: str, policy: str) -> None:
    torch_device.at_once()
    twins = Twins(
        torch_device,
        "Adam",
        dtype,
        lr=0.01,
        master_weights=True,
        grad_clip_norm=1.0,
        on_nonfinite=policy,
    )
    for t in range(4):
        step = twins.step if t == 0 else twins.step_without_waiting
        step(t, bad=math.inf if policy == "skip" and t in {0, 2} else None)
    twins.check()
    with torch.no_grad():  # others write: the masters follow
        for param in (twins.params[0], twins.on_device[0]):
            param.fill_(0.5)
    twins.step(4)
    twins.check()


def test_strided_parameters(torch_device: Any) -> None:
    torch_device.at_once()
    (whole,) = parameters([(6, 4)])
    on_device = torch_device.to(whole.detach())
    columns = [torch.nn.Parameter(tensor[:, 1]) for tensor in (whole.detach(), on_device)]
    grad = torch.arange(6.0)
    optimizers = [ours.SGD([p], lr=0.1, momentum=0.9, on_nonfinite="skip") for p in columns]
    for t, bad in enumerate((0.0, 1.0, math.nan, 2.0)):
        for param, optimizer in zip(columns, optimizers, strict=True):
            given = grad + bad
            param.grad = given if param is columns[0] else torch_device.to(given)
            if t:
                with torch_device.never_waiting():
                    optimizer.step()
            else:
                optimizer.step()
    assert torch.equal(torch_device.host(on_device), whole)


def test_complex_parameters(torch_device: Any) -> None:
    torch_device.at_once()
    twins = Twins(
        torch_device, "Adam", "complex64", lr=0.1, shapes=[(5,), (33,)], grad_clip_norm=1.0
    )
    for t in range(3):
        twins.step(t)
    twins.check()


def test_norms_taken_in_the_backward_pass(torch_device: Any) -> None:
    twins = Twins(torch_device, "Adam", lr=0.1, grad_clip_norm=1.0, norm_in_backward=True)
    plain = Twins(torch_device, "Adam", lr=0.1, grad_clip_norm=1.0)
    for t in range(4):
        give_gradients(twins.params, t)
        for param, other in zip(plain.params, twins.params, strict=True):
            param.grad = other.grad
        plain.cpu.step()
        grads = [p.grad for p in twins.params]
        twins.cpu._observer.forget()
        twins.cpu.step()
        torch_device.backward(twins.gpu, grads)
        assert len(twins.gpu._observer._seen) == len(grads)
        if t:
            with torch_device.never_waiting():
                twins.gpu.step()
        else:
            twins.gpu.step()
    assert twins.gpu.grad_norm == plain.cpu.grad_norm
    twins.check()


# --- checkpoints ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_checkpoints_go_both_ways(torch_device: Any, name: str) -> None:
    twins = Twins(torch_device, name, lr=0.1, on_nonfinite="skip")
    for t in range(3):
        twins.step(t, bad=math.nan if t == 1 else None)
    with torch_device.waiting():
        from_cpu, from_gpu = twins.cpu.state_dict(), twins.state_on_host()
        twins.gpu.load_state_dict(from_cpu)
        twins.cpu.load_state_dict(from_gpu)
    twins.step(3)
    twins.step(4)
    twins.check()


@pytest.mark.parametrize("name", ["SGD", "Adam", "NAdam", "RMSprop"])
def test_checkpoints_of_torch(torch_device: Any, name: str) -> None:
    """Loaded on a device: buffers go there, counts come to the CPU."""
    twins = Twins(torch_device, name, lr=0.1)
    theirs = getattr(torch.optim, name)(parameters(SHAPES), lr=0.1, **FORMS[name][1])
    for t in range(2):
        give_gradients(theirs.param_groups[0]["params"], t)
        theirs.step()
    with torch_device.waiting():
        for optimizer in (twins.cpu, twins.gpu):
            optimizer.load_state_dict(theirs.state_dict())
    twins.step(2)
    twins.check()


@pytest.mark.gpu
def test_the_module_moves_before_the_first_step() -> None:
    """As `model.cuda()` after the optimizer was made."""
    twins = Twins(Cuda(), "Adam", lr=0.1)
    model = torch.nn.ParameterList(parameters(SHAPES))
    moved = ours.Adam(model.parameters(), lr=0.1, **FORMS["Adam"][1])
    model.cuda()
    twins.on_device, twins.gpu = list(model), moved
    twins.step(0)
    twins.step(1)
    twins.check()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_module_moves_with_its_state(dtype: str) -> None:
    """The user moves the state; masters are among it."""
    twins = Twins(Cuda(), "Adam", dtype, lr=0.1, master_weights=True)
    model = torch.nn.ParameterList(parameters(SHAPES, dtype))
    moved = ours.Adam(model.parameters(), lr=0.1, master_weights=True, **FORMS["Adam"][1])
    for optimizer in (twins.cpu, moved):
        give_gradients([p for group in optimizer.param_groups for p in group["params"]], 0)
        optimizer.step()
    model.zero_grad()
    model.cuda()
    for entries in moved.state.values():
        entries.update({k: v.cuda() for k, v in entries.items() if k != "step"})
    twins.on_device, twins.gpu = list(model), moved
    twins.step(1)
    twins.step(2)
    twins.check()


# --- compiled ---------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
    "ignore:.*torch.jit.*:DeprecationWarning",
)
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_steps(mode: str | None) -> None:
    """The learning rate is read when the graph runs, also where torch makes CUDA graphs."""
    twins = Twins(Cuda(), "Adam", lr=0.1, grad_clip_norm=1.0)
    step = torch.compile(twins.gpu.step, fullgraph=True, mode=mode)
    for t in range(5):
        twins.cpu.param_groups[0]["lr"] = twins.gpu.param_groups[0]["lr"] = 0.1 / (1 + t)
        twins.give(t)
        twins.cpu.step()
        step()
    twins.check()
