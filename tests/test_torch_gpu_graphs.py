"""Steps of fusedstep.torch in CUDA graphs: every replay is a step.

Each test runs on the emulated device, and with `-m gpu` on a real one.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from torch_devices import Twins
from torch_twins import torch

pytestmark = pytest.mark.framework("torch")


@pytest.mark.parametrize("name", ["SGD", "MomentumNesterov", "Adam", "NAdam"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_hundred_replays(torch_device: Any, name: str, clip: float | None) -> None:
    """A changing learning rate; bias corrections and the product of momenta go on."""
    twins = Twins(torch_device, name, lr=0.5, shapes=[(7,), (33, 3), (4099,)], grad_clip_norm=clip)
    numbers = {"cpu": torch.tensor(0.1), "gpu": torch_device.to(torch.tensor(0.1))}
    twins.cpu.param_groups[0]["lr"] = numbers["cpu"]
    twins.gpu.param_groups[0]["lr"] = numbers["gpu"]
    twins.step(0)
    replay = torch_device.capture(twins.gpu.step)
    for t in range(100):
        numbers["cpu"].fill_(0.1 / (1 + t))
        torch_device.write(numbers["gpu"], numbers["cpu"])
        twins.give(t % 7)
        twins.cpu.step()
        replay()
    twins.check()
    twins.step(8)  # goes on where the replays ended
    twins.check()


def test_replays_that_are_skipped(torch_device: Any) -> None:
    twins = Twins(torch_device, "Adam", lr=0.1, on_nonfinite="skip")
    twins.step(0)
    replay = torch_device.capture(twins.gpu.step)
    for t in range(1, 8):
        twins.give(t, bad=math.nan if t in {2, 3, 7} else None)
        twins.cpu.step()
        replay()
        if t in {3, 5}:
            twins.check()
    twins.check()
    assert twins.gpu.skipped_steps == 3
    assert twins.gpu.last.skipped  # of the last replay
    assert math.isnan(twins.gpu.grad_norm)


def test_replays_beside_a_held_state(torch_device: Any) -> None:
    """Counts in it are true again when `state` is read, or after the next step outside."""
    twins = Twins(torch_device, "Adam", lr=0.1)
    twins.step(0)
    held = twins.gpu.state[twins.on_device[0]]
    replay = torch_device.capture(twins.gpu.step)
    for t in (1, 2):
        twins.give(t)
        twins.cpu.step()
        replay()
    assert twins.gpu.state[twins.on_device[0]] is held
    assert held["step"] == 3
    twins.give(3)
    twins.cpu.step()
    replay()
    twins.step(4)
    assert held["step"] == 5
    twins.check()


def test_edits_between_replays_and_a_step(torch_device: Any) -> None:
    """What is put into the state after a replay holds from the next step outside of the graph."""
    twins = Twins(torch_device, "Adam", lr=0.1)
    twins.step(0)
    replay = torch_device.capture(twins.gpu.step)
    twins.give(1)
    twins.cpu.step()
    replay()
    for optimizer in (twins.cpu, twins.gpu):
        for entries in optimizer.state.values():
            entries["step"] = torch.tensor(9.0)
    assert twins.gpu.state[twins.on_device[0]]["step"] == 9
    twins.step(2)
    assert twins.gpu.state[twins.on_device[0]]["step"] == 10
    twins.check()


def test_several_graphs(torch_device: Any) -> None:
    """After the state of an optimizer in a graph was read, a step comes before the next capture."""
    twins = Twins(torch_device, "Adam", lr=0.1, grad_clip_norm=1.0)
    twins.step(0)
    replays = [torch_device.capture(twins.gpu.step) for _ in range(2)]
    twins.gpu.state_dict()
    with pytest.raises(RuntimeError, match=r"progress.*|steps.*cannot be read while"):
        torch_device.capture(twins.gpu.step)
    twins.step(1)
    replays.append(torch_device.capture(twins.gpu.step))
    for t, k in enumerate([0, 1, 2, 1, 0]):
        twins.give(2 + t)
        twins.cpu.step()
        replays[k]()
    twins.check()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_state_dict_before_the_capture(torch_device: Any, momentum: float) -> None:
    """What nobody has changed is not made anew, which a capture could not."""
    twins = Twins(torch_device, "SGD", lr=0.1, momentum=momentum)
    twins.step(0)
    twins.gpu.state_dict()
    replay = torch_device.capture(twins.gpu.step)
    twins.give(1)
    twins.cpu.step()
    replay()
    twins.check()


def test_a_capture_needs_a_step_before(torch_device: Any) -> None:
    twins = Twins(torch_device, "Adam", lr=0.1)
    twins.give(0)
    with pytest.raises(RuntimeError, match=r"a step before.* captured"):
        torch_device.capture(twins.gpu.step)
    twins.cpu.step()
    twins.gpu.step()
    twins.check()


def test_schedulers_write_to_the_device(torch_device: Any) -> None:
    """Torch's schedulers change a tensor in place, which a graph sees."""
    start = torch.tensor(0.1)
    with torch_device.waiting():
        twins = Twins(torch_device, "Adam", lr=start)
        twins.gpu.param_groups[0]["lr"] = number = torch_device.to(start)
        decays = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (twins.cpu, twins.gpu)]
    twins.step(0)
    replay = torch_device.capture(twins.gpu.step)
    for t in range(1, 4):
        with torch_device.waiting():
            for decay in decays:
                decay.step()
        twins.give(t)
        twins.cpu.step()
        replay()
    assert twins.gpu.param_groups[0]["lr"] is number
    twins.check()
