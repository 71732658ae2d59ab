"""Gradients that are gathered on a device, or measured there before the step."""

from __future__ import annotations

from typing import Any

import device_arrays
import fusedstep as fs
import numpy as np
import pytest
from device_arrays import Emulator, to_device
from device_twins import Twins, check_result, on_device, random
from exact import DTYPES
from fusedstep import _core

pytestmark = pytest.mark.usefixtures("emulator")


def accumulate(twins: Twins, grads: Any, **options: Any) -> None:
    twins.kept.append(on_device(grads))
    twins.gpu.accumulate(twins.kept[-1], **options)
    twins.cpu.accumulate(grads, **options)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_passes_and_steps(dtype: str, clip: float | None) -> None:
    """The same sums, and the norm of what was written, without a second read."""
    twins = Twins(fs.Adam, random(0, dtype=DTYPES[dtype]), lr=0.1, grad_clip_norm=clip)
    for step in range(3):
        for part in range(3):
            grads = random(10 * step + part + 1, dtype=DTYPES[dtype])
            if part == 1:
                grads[2] = None
            accumulate(twins, grads, scale=1 / 3)
        twins.step()
    twins.check()


def test_one_pass_per_accumulation(emulator: Emulator) -> None:
    twins = Twins(fs.SGD, random(0), lr=0.1, grad_clip_norm=1.0)
    accumulate(twins, random(1))
    launched = emulator.count("launched")
    accumulate(twins, random(2))
    assert emulator.count("launched") == launched + 1
    twins.step(lazy=True)
    assert emulator.count("launched") == launched + 3
    allocated = emulator.calls("cudaMalloc")
    accumulate(twins, random(3))
    twins.step(lazy=True)
    assert emulator.calls("cudaMalloc") == allocated
    twins.check()


def test_a_skipped_step_uses_the_sums_up() -> None:
    twins = Twins(fs.SGD, random(0), lr=0.1, on_nonfinite="skip")
    bad = random(1)
    bad[3][7] = np.nan
    accumulate(twins, bad)
    accumulate(twins, random(2))
    twins.step(lazy=True)
    accumulate(twins, random(3))
    twins.step(lazy=True)
    twins.check()
    assert twins.gpu.skipped_steps == 1


def test_a_step_that_raises_keeps_the_sums() -> None:
    twins = Twins(fs.SGD, random(0), lr=0.1, on_nonfinite="raise")
    bad = random(1)
    bad[3][7] = np.nan
    accumulate(twins, bad)
    for optimizer in (twins.gpu, twins.cpu):
        with pytest.raises(FloatingPointError, match=r"grads\[3\] holds inf or NaN"):
            optimizer.step()
        with pytest.raises(ValueError, match="gradients were accumulated and wait for a step"):
            optimizer.step(random(2))
        optimizer.on_nonfinite = "propagate"
    twins.step(lazy=True)
    twins.check()


def test_a_given_stream(emulator: Emulator) -> None:
    """The buffers are zeros before it, whatever their library's own stream does."""
    stream = emulator.new_stream()
    device_arrays.current_streams[0] = emulator.new_stream()
    twins = Twins(fs.Momentum, random(0), lr=0.1, grad_clip_norm=1.0)
    for seed in (1, 2):
        twins.kept.append(on_device(random(seed)))
        twins.gpu.accumulate(twins.kept[-1], stream=stream)
        twins.cpu.accumulate(random(seed))
    result = twins.gpu.step(stream=stream)
    check_result(result, twins.cpu.step())
    emulator.synchronize(stream)
    twins.check()


def test_an_error_adds_nothing() -> None:
    twins = Twins(fs.SGD, random(0), lr=0.1)
    accumulate(twins, random(1))
    with pytest.raises(ValueError, match=r"grads\[1\] is on cpu, but params\[1\] is on cuda:0"):
        twins.gpu.accumulate([on_device(random(2))[0], *random(2)[1:]])
    twins.step()
    twins.check()


def test_observed_gradients(emulator: Emulator) -> None:
    """Each is measured when it arrives; the step reads none before the update."""
    told = []
    for make in (np.copy, to_device):
        params, grads = [make(a) for a in random(0)], [make(a) for a in random(1)]
        rule = _core.rules()["sgd"]
        row = (1.0, False, 0.5, None, 0.1, *[0.0] * (len(rule["hypers"]) - 1))
        plan = _core.Plan([params], ["params"], [])
        for index in (3, 0, 1, 2):
            plan.observe(index, grads[index])
        if make is to_device:
            emulator.run()
        for grad in grads:  # not read again for the norm
            elements = grad.array if make is to_device else grad
            elements *= 2
        result = plan.step(
            [grads], [(rule["index"], row)], ("propagate", "all", None), None, None, observed=True
        )
        told.append((tuple(result), [a.numpy() if make is to_device else a for a in params]))
    assert told[0][0][:4] == told[1][0][:4]
    assert told[0][0][0] == np.sqrt(fs.sum_squares(random(1)))
    assert told[0][0][4].tobytes() == told[1][0][4].tobytes()
    assert [a.tobytes() for a in told[0][1]] == [a.tobytes() for a in told[1][1]]


def test_memory_of_sums_is_used_again(emulator: Emulator) -> None:
    """`zero_grad` leaves what was measured as large as it was: 512 sums here, 256 times a block."""
    param, grad = (to_device(np.ones(1 << 23, np.float32)) for _ in range(2))
    optimizer = fs.SGD(param, lr=0.1)

    def measure() -> None:
        emulator.fail("cudaLaunchKernel", device_arrays.LAUNCH_OUT_OF_RESOURCES)
        with pytest.raises(RuntimeError):
            optimizer._plan.observe(0, grad, None)
        optimizer.zero_grad()

    measure()
    allocated = emulator.calls("cudaMalloc")
    for _ in range(300):
        measure()
    assert emulator.calls("cudaMalloc") == allocated
