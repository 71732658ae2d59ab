"""Steps on streams and in CUDA graphs: what is replayed does what steps of the CPU do."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import fusedstep as fs
import gpu_devices
import numpy as np
import objects
import pytest
from device_arrays import STREAMS
from device_twins import Twins, check_same, random

SIZES = (3, 129, 1, 33)
REPLAYS = 100


class Loop:
    """Twins, the second of which takes its steps by a graph.

    Attributes:
        grads: The gradients of the captured step, on the device.
        result: What that step returned.
    """

    def __init__(
        self, device: gpu_devices.Device, kind: type[fs.Optimizer], *, first: bool = True,
        sizes: tuple[int, ...] = SIZES, **hypers: Any,
    ) -> None:  # fmt: skip
        self.device, self.sizes = device, sizes
        self.twins = Twins(kind, random(0, sizes), device=device, **{"lr": 0.1, **hypers})
        if first:
            self.twins.step(random(1, sizes), lazy=True)
        self.grads = device.put(random(2, sizes))
        self.result: Any = None
        self.graph: Any = None

    def capture(self, **options: Any) -> None:
        with self.device.capture() as self.graph:
            self.result = self.twins.gpu.step(self.grads, **options)

    def fill(self, grads: list[Any]) -> None:
        """Writes into the gradients that the graph reads."""
        for array, values in zip(self.grads, grads, strict=True):
            self.device.write(array, values)

    def replay(self, grads: list[Any], **options: Any) -> Any:
        """One replay, and a step of the CPU; returns that one's result."""
        self.fill(grads)
        self.graph()
        return self.twins.cpu.step(grads, **options)


@pytest.mark.parametrize("kind", objects.FORMS, ids=lambda kind: kind.__name__)
def test_replays(device: gpu_devices.Device, kind: type[fs.Optimizer]) -> None:
    """A hundred of them, each by another learning rate, which the device reads.

    Bias corrections and decaying momentum go on, as each replay counts itself.
    """
    loop = Loop(device, kind, grad_clip_norm=3.0, **objects.FORMS[kind])
    lr = device.number(0.1, "float64")
    loop.twins.gpu.param_groups[0]["lr"] = lr
    loop.capture()
    loop.twins.check()  # a capture is no step
    for t in range(REPLAYS):
        loop.twins.cpu.param_groups[0]["lr"] = 0.1 / (1 + t)
        device.write(lr, 0.1 / (1 + t))
        loop.replay(random(3 + t, SIZES))
    loop.twins.check()
    assert loop.twins.gpu.steps == REPLAYS + 1


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("count", [3, 300])
def test_kernels_of_a_graph(device: gpu_devices.Device, count: int, clip: float | None) -> None:
    """One, and one more with a norm: a table that has to be sent is there before."""
    loop = Loop(device, fs.Adam, sizes=tuple(1 + k % 5 for k in range(count)), grad_clip_norm=clip)
    loop.capture()
    assert loop.graph.kernels in {None, 1 if clip is None else 2}
    for t in range(3):
        loop.replay(random(3 + t, loop.sizes))
    loop.twins.check()


@pytest.mark.parametrize("kind", [fs.SGD, fs.NAdam], ids=lambda kind: kind.__name__)
def test_skipped_replays(device: gpu_devices.Device, kind: type[fs.Optimizer]) -> None:
    """NaN in the gradients: such a replay leaves everything, and is counted."""
    loop = Loop(device, kind, on_nonfinite="skip", **objects.FORMS[kind])
    loop.capture()
    for t in range(6):
        grads = random(3 + t, SIZES)
        if t in {0, 3, 4}:
            grads[t % 3][0] = np.nan
        expected = loop.replay(grads)
        assert loop.result.skipped == expected.skipped == (t in {0, 3, 4})
        loop.twins.check()
    assert (loop.twins.gpu.steps, loop.twins.gpu.skipped_steps) == (4, 3)


def test_replays_after_a_skipped_first_step(device: gpu_devices.Device) -> None:
    """The state was made by then; the rule of first steps waits for one that is applied."""
    loop = Loop(device, fs.SGD, first=False, momentum=0.9, dampening=0.5, on_nonfinite="skip")
    loop.twins.step([np.full_like(a, np.inf) for a in random(1, SIZES)], lazy=True)
    loop.capture()
    loop.replay([np.full_like(a, np.inf) for a in random(1, SIZES)])
    for t in range(3):
        loop.replay(random(3 + t, SIZES))
        loop.twins.check()


def test_the_result_is_of_the_last_replay(device: gpu_devices.Device) -> None:
    loop = Loop(device, fs.Momentum, grad_clip_norm=0.5)
    loop.capture()
    for t in range(3):
        expected = loop.replay(random(3 + t, SIZES))
        check_same(device.fetch(tuple(loop.result)), tuple(expected))


def test_numbers_of_the_device(device: gpu_devices.Device) -> None:
    """What a loss scaler says, a norm that was reduced elsewhere, a scale: read in each replay."""
    loop = Loop(device, fs.Adam, grad_clip_norm=1.0)
    numbers = {"found_inf": device.number(0), "grad_norm": device.number(1, "float64")}
    scale = loop.twins.gpu.param_groups[0]["rescale_grad"] = device.number(1)
    loop.capture(**numbers)
    for t in range(8):
        given = {"found_inf": float(t % 3 == 1), "grad_norm": 0.5 + t}
        for name, value in given.items():
            device.write(numbers[name], value)
        device.write(scale, 2.0 ** (1 - t))
        loop.twins.cpu.param_groups[0]["rescale_grad"] = 2.0 ** (1 - t)
        expected = loop.replay(random(3 + t, SIZES), **given)
        check_same(device.fetch(tuple(loop.result)), tuple(expected))
    loop.twins.check()
    assert loop.twins.gpu.skipped_steps == 3


def test_a_function(device: gpu_devices.Device) -> None:
    """Its count is an array of the caller's, which replays advance."""
    host = {"params": random(0, SIZES), "exp_avg": [a * 0 for a in random(0, SIZES)]}
    host["exp_avg_sq"] = [a.copy() for a in host["exp_avg"]]
    gpu, grads = device.put(host), device.put(random(1, SIZES))
    step, product = device.number(0, "int64"), device.number(1, "float64")
    options = {"lr": 0.1, "grad_clip_norm": 1.0}
    fs.fused_nadam_step(grads=grads, **gpu, step=step, mu_product=product, **options)
    with device.capture() as graph:
        fs.fused_nadam_step(grads=grads, **gpu, step=step, mu_product=product, **options)
    scalars: dict[str, Any] = {"step": 0, "mu_product": 1.0}
    for t in range(5):
        values = random(1 + t, SIZES)
        if t > 0:
            for array, new in zip(grads, values, strict=True):
                device.write(array, new)
            graph()
        state = fs.fused_nadam_step(grads=values, **host, **scalars, **options).state
        scalars = {name: state[name] for name in scalars}
    check_same(device.fetch(gpu), host)
    assert device.numpy(step) == 5
    assert device.numpy(product) == scalars["mu_product"]


def test_groups_of_several_rules(device: gpu_devices.Device) -> None:
    """One graph of two kernels, with rows that have come differently far."""
    groups = [
        {"params": random(0, SIZES), "momentum": 0.0},
        {"params": random(1, SIZES), "momentum": 0.9, "weight_decay": 0.1},
    ]
    twins = Twins(fs.SGD, groups, device=device, lr=0.1, grad_clip_norm=1.0)
    twins.step([random(2, SIZES), [None] * 4])
    twins.step([random(3, SIZES), random(4, SIZES)])
    grads = device.put([random(5, SIZES), random(6, SIZES)])
    with device.capture() as graph:
        twins.gpu.step(grads)
    assert graph.kernels in {None, 2}
    for _ in range(3):
        graph()
        twins.cpu.step([random(5, SIZES), random(6, SIZES)])
    twins.check()


def test_steps_between_replays(device: gpu_devices.Device) -> None:
    """Eager steps, two graphs, and further optimizers share nothing but the progress."""
    loop = Loop(device, fs.Adam, grad_clip_norm=1.0)
    loop.capture()
    first = loop.graph
    loop.capture()
    other = Twins(fs.Adam, random(9, SIZES * 100), device=device, lr=0.1, grad_clip_norm=1.0)
    for t in range(6):
        grads = random(3 + t, SIZES)
        if t % 3 == 2:
            loop.twins.step(grads)
        else:
            loop.graph = (first, loop.graph)[t % 2]
            loop.replay(grads)
        other.step(random(20 + t, SIZES * 100), lazy=True)
    loop.twins.check()
    other.check()


def test_a_graph_outlives_its_optimizer(device: gpu_devices.Device) -> None:
    """Its arrays are the caller's to keep; all else of it stays as long as the process."""
    loop = Loop(device, fs.Adam, grad_clip_norm=1.0, sizes=SIZES * 100)
    loop.capture()
    kept = loop.twins.gpu.state_dict()["state"]
    del loop.twins.gpu
    loop.result = None
    gc.collect()
    Twins(fs.Adam, random(9, SIZES), device=device, lr=0.1).step(random(8, SIZES))
    for t in range(3):
        loop.replay(random(3 + t, loop.sizes))
    check_same(device.fetch(loop.twins.params["gpu"]), loop.twins.params["cpu"])
    buffers = {k: {n: v for n, v in of.items() if device.is_array(v)} for k, of in kept.items()}
    expected = loop.twins.cpu.state_dict()["state"]
    check_same(device.fetch(buffers), {k: {n: expected[k][n] for n in buffers[k]} for k in buffers})


# --- what cannot be captured ----------------------------------------------------------------------


def refused(loop: Loop, text: str, step: Callable[[], Any]) -> None:
    """What is refused leaves the capture as it was: another step can follow, and is the graph."""
    other = Loop(loop.device, fs.Momentum)
    before = loop.device.fetch(loop.twins.params["gpu"])
    with loop.device.capture() as graph:
        with pytest.raises(RuntimeError, match=text):
            step()
        other.twins.gpu.step(other.grads)
    assert graph.kernels in {None, 1}
    other.graph = graph
    for t in range(2):
        other.replay(random(5 + t, SIZES))
    other.twins.check()
    check_same(loop.device.fetch(loop.twins.params["gpu"]), before)
    for t in range(2):
        loop.twins.step(random(3 + t, SIZES))
    loop.twins.check()


@pytest.mark.parametrize("kind", [fs.SGD, fs.Adam], ids=lambda kind: kind.__name__)
def test_a_first_step_is_refused(device: gpu_devices.Device, kind: type[fs.Optimizer]) -> None:
    loop = Loop(device, kind, first=False)
    refused(loop, "captured into a CUDA graph", lambda: loop.twins.gpu.step(loop.grads))


def test_other_arrays_than_before_are_refused(device: gpu_devices.Device) -> None:
    loop = Loop(device, fs.Adam)
    grads = [loop.grads[0], None, None, None]
    text = "take one step with gradients for the same arrays before capturing"
    refused(loop, text, lambda: loop.twins.gpu.step(grads))


def test_raise_is_refused(device: gpu_devices.Device) -> None:
    loop = Loop(device, fs.Adam, on_nonfinite="raise")
    refused(loop, "on_nonfinite='raise' reads", lambda: loop.twins.gpu.step(loop.grads))


@pytest.mark.parametrize("what", ["sum", "function"])
def test_reading_is_refused(device: gpu_devices.Device, what: str) -> None:
    """What would have to wait for the stream that is being captured."""
    loop = Loop(device, fs.Adam, on_nonfinite="skip")
    run: dict[str, Callable[[], Any]] = {
        "sum": lambda: fs.sum_squares(loop.grads),
        "function": lambda: fs.fused_sgd_step(
            loop.twins.params["gpu"], loop.grads, lr=0.1, on_nonfinite="raise"
        ),
    }
    refused(loop, "captured", run[what])


def test_results_are_not_read_in_a_capture(device: gpu_devices.Device) -> None:
    loop = Loop(device, fs.Adam, grad_clip_norm=1.0)
    with device.capture() as loop.graph:
        result = loop.twins.gpu.step(loop.grads)
        with pytest.raises(RuntimeError, match="captured"):
            assert result.grad_norm
    expected = loop.replay(random(3, SIZES))
    assert result.grad_norm == expected.grad_norm
    loop.twins.check()


def test_parts_of_what_a_graph_advances_are_refused(device: gpu_devices.Device) -> None:
    """Their progress is one number, which a replay would advance for all of them."""
    loop = Loop(device, fs.Adam)
    loop.capture()
    grads = random(3, SIZES)
    with pytest.raises(RuntimeError, match="a captured CUDA graph advances some of these arrays"):
        loop.twins.step_gpu([grads[0], None, None, None])
    loop.replay(grads)
    loop.twins.step(grads)
    loop.twins.check()


# --- streams --------------------------------------------------------------------------------------


def at_random(device: gpu_devices.Device) -> None:
    """Streams of the emulator run at any time that is in order."""
    if isinstance(device, gpu_devices.Emulated):
        device.emulator.set(streams=STREAMS["random"], seed=7)


@pytest.mark.parametrize("kind", [fs.SGD, fs.Adam], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("given", [False, True], ids=["current", "stream="])
def test_another_stream(device: gpu_devices.Device, kind: type[fs.Optimizer], given: bool) -> None:
    at_random(device)
    twins = Twins(
        kind, random(0), device=device, lr=0.1, grad_clip_norm=1.0, on_nonfinite="skip",
        **objects.FORMS[kind],
    )  # fmt: skip
    stream = device.stream()
    for t in range(5):
        grads = random(1 + t)
        if t == 2:
            grads[0][0] = np.inf
        on_gpu = device.put(grads)
        device.synchronize()
        if given:
            twins.gpu.step(on_gpu, stream=stream)
        else:
            with device.using(stream):
                twins.gpu.step(on_gpu)
        twins.kept.append(on_gpu)
        twins.cpu.step(grads)
    twins.check()


def test_functions_on_another_stream(device: gpu_devices.Device) -> None:
    at_random(device)
    host = {"params": random(0), "velocity": [a * 0 for a in random(0)]}
    gpu, grads = device.put(host), device.put(random(1))
    device.synchronize()
    stream, clip = device.stream(), {"lr": 0.1, "grad_clip_norm": 1.0}
    for _ in range(3):
        told = fs.fused_nesterov_step(grads=grads, **gpu, **clip, stream=stream)
        expected = fs.fused_nesterov_step(grads=random(1), **host, **clip)
    assert told.grad_norm == expected.grad_norm
    assert fs.sum_squares(grads, stream=stream) == fs.sum_squares(random(1))
    check_same(device.fetch(gpu), host)


def test_an_optimizer_for_each_stream(device: gpu_devices.Device) -> None:
    at_random(device)
    all_twins = [
        Twins(fs.Adam, random(k), device=device, lr=0.1, grad_clip_norm=1.0) for k in range(3)
    ]
    streams = [device.stream() for _ in all_twins]
    for t in range(3):
        for k, (twins, stream) in enumerate(zip(all_twins, streams, strict=True)):
            grads = random(10 * t + k)
            twins.kept.append(device.put(grads))
            device.synchronize()
            twins.gpu.step(twins.kept[-1], stream=stream)
            twins.cpu.step(grads)
    for twins in all_twins:
        twins.check()
