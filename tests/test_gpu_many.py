"""Many tensors, several rules in a step, more than 2^31 elements: few launches, the same bits."""

from __future__ import annotations

from typing import Any

import fusedstep as fs
import gpu_devices
import numpy as np
import pytest
import reference
from device_arrays import Emulator
from device_twins import Twins, check_same, random
from exact import DTYPES

SIZES = tuple(1 + 7 * k % 40 for k in range(1000))


def uploads(emulator: Emulator) -> int:
    return sum("upload" in name for name in emulator.launched)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_thousand_tensors(device: gpu_devices.Device, clip: float | None) -> None:
    """One launch, and one more with a norm, where gradients stay where they are."""
    twins = Twins(fs.Adam, random(0, SIZES), device=device, lr=0.1, grad_clip_norm=clip)
    grads = device.put(random(1, SIZES))
    for _ in range(2):
        twins.gpu.step(grads)
        twins.cpu.step(random(1, SIZES))
    launched = device.kernels(lambda: twins.gpu.step(grads))
    twins.cpu.step(random(1, SIZES))
    assert launched in {None, 1 if clip is None else 2}
    twins.check()


def test_what_is_sent_anew(emulator: Emulator) -> None:
    """What has changed of the addresses of gradients, in one launch; nothing of the rest."""
    twins = Twins(fs.Adam, random(0, SIZES), lr=0.1)
    sets = [twins.device.put(random(k, SIZES)) for k in range(2)]
    sent = []
    for grads in (sets[0], sets[0], sets[1], [*sets[1][:-1], sets[0][-1]]):
        before = uploads(emulator)
        twins.gpu.step(grads)
        sent.append(uploads(emulator) - before)
    everything, nothing, addresses, one = sent
    assert nothing == 0
    assert one == 1
    assert addresses == 1
    assert everything > addresses


@pytest.mark.parametrize("kind", ["SGD", "RMSprop"])
def test_groups_of_several_rules(device: gpu_devices.Device, kind: str) -> None:
    """One launch for all of them, and one more for the norm; a group comes later."""
    forms: dict[str, tuple[dict[str, Any], ...]] = {
        "SGD": ({"momentum": 0.0}, {"momentum": 0.9, "nesterov": True}),
        "RMSprop": ({"centered": False}, {"centered": True, "momentum": 0.5}),
    }
    first, second = forms[kind]
    groups = [{"params": random(0), **first}, {"params": random(1), **second}]
    twins = Twins(getattr(fs, kind), groups, device=device, lr=0.1, grad_clip_norm=1.0)
    for t in range(3):
        grads = [random(10 + t), random(20 + t)]
        if t == 1:
            grads[0][0] = None
        twins.step(grads)
    held = device.put([random(10), random(20)])
    assert device.kernels(lambda: twins.gpu.step(held)) in {None, 2}
    twins.cpu.step([random(10), random(20)])
    late = random(2)
    twins.gpu.add_param_group({"params": device.put(late), **first})
    twins.cpu.add_param_group({"params": [a.copy() for a in late], **first})
    twins.step([random(30), random(31), random(32)])
    twins.check()


@pytest.mark.parametrize("mine", ["cpu", "device"])
def test_one_device_per_call(device: gpu_devices.Device, mine: str) -> None:
    """Nothing is copied behind the caller's back."""
    host, gpu = random(0), device.put(random(0))
    params, grads = (host, gpu) if mine == "cpu" else (gpu, host)
    with pytest.raises(ValueError, match=r"grads\[0\] is on .*, but params\[0\] is on "):
        fs.fused_sgd_step(params, grads, lr=0.1)
    check_same(device.fetch(gpu), random(0))


@pytest.mark.gpu
@pytest.mark.framework("torch")
@pytest.mark.parametrize("norm", [None, 1.0])
def test_more_than_2_to_the_31_elements(norm: float | None) -> None:
    """A block of values again and again: the CPU steps one, and its chunk sums make the norm."""
    torch = pytest.importorskip("torch")
    block, times = 1 << 20, (1 << 11) + 3
    if torch.cuda.mem_get_info()[0] < 18e9:
        pytest.skip("needs 18 GB of free GPU memory")
    names = ("params", "grads", "velocity")
    rng = np.random.default_rng(0)
    host = {n: rng.standard_normal(block).astype(DTYPES["bfloat16"]) for n in names}
    small = {n: torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) for n, a in host.items()}
    gpu = {n: t.cuda().repeat(times) for n, t in small.items()}
    assert gpu["params"].numel() > 1 << 31
    options: dict[str, Any] = {"lr": 0.1, "grad_clip_norm": norm}
    told = fs.fused_momentum_step(**gpu, **options)
    if norm is not None:
        sums = np.tile(reference.chunk_sums(host["grads"]), times)
        while len(sums) > 1:
            sums = reference.tile_sum(reference.pad(sums, 1024).reshape(-1, 32, 32))
        options["grad_norm"] = float(np.sqrt(sums[0]))
        assert told.grad_norm == options["grad_norm"]
    fs.fused_momentum_step(**host, **options)
    for name in ("params", "velocity"):
        expected = small[name].cuda()  # shares the memory that the CPU has stepped
        assert all(torch.equal(part, expected) for part in gpu[name].view(times, block))
