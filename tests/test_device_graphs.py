"""Steps that are captured into a CUDA graph and replayed."""

from __future__ import annotations

import gc
from typing import Any

import device_arrays
import fusedstep as fs
import numpy as np
import objects
import pytest
from device_arrays import DeviceArray, Emulator, Graph, to_device
from device_twins import Twins, check_same, on_device, on_host, random


@pytest.fixture
def stream(emulator: Emulator) -> int:
    """The current stream of the library of arrays: the default one cannot be captured."""
    made = emulator.new_stream()
    device_arrays.current_streams[0] = made
    return made


class Captured:
    """A step of both optimizers that have taken one before; that of the device is in a graph."""

    def __init__(self, emulator: Emulator, stream: int, twins: Twins, **options: Any) -> None:
        self.emulator, self.stream, self.twins = emulator, stream, twins
        self.grads = on_device(random(1))
        twins.gpu.step(self.grads, **options)
        twins.cpu.step(random(1), **options)
        with emulator.capture(stream) as made:
            self.result = twins.gpu.step(self.grads, **options)
        self.graph: Graph = made[0]

    def replay(self, seed: int, scale: float = 1.0, stream: int | None = None) -> None:
        """One more step of the device by the graph, and of the CPU as ever."""
        grads = [a * np.float32(scale) for a in random(seed)]
        self.emulator.run()
        for array, values in zip(self.grads, grads, strict=True):
            array.array[...] = values
        self.graph.replay(self.stream if stream is None else stream)
        self.twins.cpu.step(grads)


@pytest.mark.parametrize("kind", objects.FORMS, ids=lambda kind: kind.__name__)
def test_replays_are_steps(emulator: Emulator, stream: int, kind: type[fs.Optimizer]) -> None:
    """Bias corrections are right in every one, and counts are known afterwards."""
    twins = Twins(kind, random(0), lr=0.1, grad_clip_norm=1.0, **objects.FORMS[kind])
    captured = Captured(emulator, stream, twins)
    assert captured.graph.nodes == ["kernel", "kernel"]
    assert twins.gpu.steps == 1
    for t in range(20):
        captured.replay(5 + t)
    assert twins.gpu.steps == 21
    twins.check()
    twins.step(random(90))  # and one as ever
    captured.replay(91)
    twins.check()


def test_one_kernel_without_a_norm(emulator: Emulator, stream: int) -> None:
    captured = Captured(emulator, stream, Twins(fs.SGD, random(0), lr=0.1))
    assert captured.graph.nodes == ["kernel"]
    captured.replay(3)
    captured.twins.check()


def test_a_rate_that_changes_between_replays(emulator: Emulator, stream: int) -> None:
    twins = Twins(fs.Adam, random(0), lr=0.1, grad_clip_norm=1.0)
    rate = to_device(np.array(0.1, np.float32))
    twins.gpu.param_groups[0]["lr"] = rate
    twins.cpu.lr = float(np.float32(0.1))
    captured = Captured(emulator, stream, twins)
    for t in range(5):
        emulator.run()
        rate.array[...] = np.float32(0.1 / (2 + t))
        twins.cpu.lr = float(rate.array)
        captured.replay(5 + t)
    twins.check()


def test_replays_skip(emulator: Emulator, stream: int) -> None:
    twins = Twins(fs.NAdam, random(0), lr=0.1, on_nonfinite="skip", skip_grad_norm=1e3)
    captured = Captured(emulator, stream, twins)
    for t, scale in enumerate((1.0, np.nan, 1.0, 1e9, 1.0)):
        captured.replay(5 + t, scale)
    assert (twins.gpu.steps, twins.gpu.skipped_steps) == (4, 2)
    twins.check()


def test_the_result_tells_of_the_last_replay(emulator: Emulator, stream: int) -> None:
    twins = Twins(fs.SGD, random(0), lr=0.1, grad_clip_norm=1.0, on_nonfinite="skip")
    captured = Captured(emulator, stream, twins)
    norms = []
    for t, scale in enumerate((1.0, 2.0, np.inf)):
        captured.replay(5 + t, scale)
        emulator.synchronize(stream)
        assert not captured.result.settled
        norms.append(captured.result.grad_norm)
        assert captured.result.skipped is (scale == np.inf)
    expected = [np.sqrt(fs.sum_squares(random(5 + t))) for t in range(2)]
    assert norms[0] == expected[0]
    assert norms[1] == 2 * expected[1]
    assert not np.isfinite(norms[2])


def test_replays_in_another_stream(emulator: Emulator, stream: int) -> None:
    """Counts are read after what is in the library's stream then, not in that of the capture."""
    captured = Captured(emulator, stream, Twins(fs.Adam, random(0), lr=0.1))
    emulator.run()
    other = emulator.new_stream()
    emulator.free_stream(stream)
    device_arrays.current_streams[0] = other
    captured.replay(5, stream=other)
    assert captured.twins.gpu.steps == 2
    captured.twins.check()


def test_functions_are_captured(emulator: Emulator, stream: int) -> None:
    """Their count is in device memory: it goes on by itself."""
    params = random(0)
    state: dict[str, Any] = {n: [a * 0 for a in params] for n in ("exp_avg", "exp_avg_sq")}
    held, moments = on_device(params), on_device(state)
    step, grads = to_device(np.array(0, np.int64)), on_device(random(1))
    options = {"lr": 0.1, "grad_clip_norm": 1.0}
    fs.fused_adam_step(held, grads, **moments, step=step, **options)
    with emulator.capture(stream) as made:
        fs.fused_adam_step(held, grads, **moments, step=step, **options)
    state = fs.fused_adam_step(params, random(1), **state, **options).state
    for t in range(3):
        emulator.run()
        for array, values in zip(grads, random(5 + t), strict=True):
            array.array[...] = values
        made[0].replay(stream)
        state = fs.fused_adam_step(params, random(5 + t), **state, **options).state
    check_same(on_host(held), params)
    assert step.numpy() == state["step"] == 4


def test_an_optimizer_that_is_gone(emulator: Emulator, stream: int) -> None:
    """What its graph needs stays."""
    twins = Twins(fs.Momentum, random(0), lr=0.1, grad_clip_norm=1.0)
    captured = Captured(emulator, stream, twins)
    states = [entry["velocity"] for entry in twins.gpu.state_dict()["state"].values()]
    del twins.gpu, captured.result
    captured.replay(5)
    emulator.run()
    check_same(on_host(twins.params["gpu"]), twins.params["cpu"])
    assert len(states) == 4


@pytest.mark.parametrize("how", ["load", "register", "accumulate"])
def test_what_a_graph_writes_stays(emulator: Emulator, stream: int, how: str) -> None:
    """Afterwards the graph and the optimizer go separate ways, but no memory is lost to it."""
    twins = Twins(fs.Momentum, random(0), lr=0.1, grad_clip_norm=1.0)
    captured = Captured(emulator, stream, twins)
    if how == "accumulate":
        twins.gpu.accumulate(captured.grads)
        with emulator.capture(stream) as made:
            twins.gpu.accumulate(captured.grads)
        captured.graph = made[0]
        twins.gpu.zero_grad()
    elif how == "load":
        twins.gpu.load_state_dict(on_host(twins.gpu.state_dict()))
    else:
        twins.gpu.add_param_group({"params": on_device(random(7))})
        twins.gpu.load_state_dict(on_host(twins.gpu.state_dict()))
    gc.collect()
    emulator.run()
    captured.graph.replay(stream)
    emulator.run()
    assert not emulator.fault
    captured.graph.free()


def test_counts_after_replays_that_nobody_tells_of(emulator: Emulator, stream: int) -> None:
    """The library works on another stream than the replays: they are waited for all the same."""
    twins = Twins(fs.Adam, random(0), lr=0.1, grad_clip_norm=1.0, on_nonfinite="skip")
    captured = Captured(emulator, stream, twins)
    captured.replay(5, stream=emulator.new_stream())
    assert twins.gpu.steps == twins.cpu.steps == 2
    twins.check()


def test_a_result_before_the_first_replay(emulator: Emulator, stream: int) -> None:
    """It does not tell what another step did, whose memory it might have got."""
    twins = Twins(fs.Momentum, random(0), lr=0.1, grad_clip_norm=1.0, on_nonfinite="skip")
    for seed in range(3):
        twins.step(random(seed))
    captured = Captured(emulator, stream, twins)
    for read in (lambda: captured.result.skipped, lambda: tuple(captured.result)):
        with pytest.raises(RuntimeError, match="graph that has not been replayed yet"):
            read()
    captured.replay(5)
    assert captured.result.grad_norm > 0
    assert captured.result.skipped is False


# --- what cannot be captured ----------------------------------------------------------------------


def attempt(emulator: Emulator, stream: int, call: Any) -> None:
    with emulator.capture(stream):
        call()


def test_the_first_step(emulator: Emulator, stream: int) -> None:
    twins = Twins(fs.Momentum, random(0), lr=0.1)
    grads = on_device(random(1))
    text = r"velocity\[0\] cannot be made \(take a step before\) while its stream is being captured"
    with pytest.raises(RuntimeError, match=text):
        attempt(emulator, stream, lambda: twins.gpu.step(grads))
    plain = fs.SGD(on_device(random(0)), lr=0.1)
    with pytest.raises(RuntimeError, match="the first step of an optimizer cannot be taken while"):
        attempt(emulator, stream, lambda: plain.step(grads))
    twins.step(random(1))
    twins.check()


def test_other_arrays_than_before(emulator: Emulator, stream: int) -> None:
    twins = Twins(fs.Momentum, random(0), lr=0.1)
    twins.step(random(1))
    part = on_device([None, *random(1)[1:]])
    with pytest.raises(RuntimeError, match="take one step with gradients for the same arrays"):
        attempt(emulator, stream, lambda: twins.gpu.step(part))
    twins.step([None, *random(2)[1:]])
    attempt(emulator, stream, lambda: twins.gpu.step(part))
    twins.check()


def test_other_arrays_than_captured(emulator: Emulator, stream: int) -> None:
    """The graph would count for arrays that have gone another way."""
    captured = Captured(emulator, stream, Twins(fs.Momentum, random(0), lr=0.1))
    part = on_device([None, *random(2)[1:]])
    with pytest.raises(RuntimeError, match="a captured CUDA graph advances some of these arrays"):
        captured.twins.gpu.step(part)
    captured.replay(5)
    captured.twins.check()


def test_what_reads(emulator: Emulator, stream: int) -> None:
    twins = Twins(fs.Adam, random(0), lr=0.1, grad_clip_norm=1.0, on_nonfinite="skip")
    grads = on_device(random(1))
    twins.gpu.step(grads)
    result = twins.gpu.step(grads)
    number = to_device(np.float32(0.5)[...])
    calls: dict[str, Any] = {
        "the result of a step cannot be read": lambda: result.grad_norm,
        "the steps of an optimizer cannot be read": lambda: twins.gpu.steps,
        "the progress of an optimizer cannot be read|the steps": lambda: twins.gpu.state_dict(),
        "a sum of squares cannot be read": lambda: fs.sum_squares(grads),
        "momentum cannot be read": lambda: fs.fused_momentum_step(
            grads, grads, momentum=number, lr=0.1
        ),
    }
    for text, call in calls.items():
        with pytest.raises(RuntimeError, match=f"({text}) while its stream is being captured"):
            attempt(emulator, stream, call)
    twins.gpu.on_nonfinite = "raise"
    with pytest.raises(RuntimeError, match="on_nonfinite='raise' reads the result"):
        attempt(emulator, stream, lambda: twins.gpu.step(grads))
    with pytest.raises(RuntimeError, match="on_nonfinite='raise' cannot read a result while"):
        attempt(
            emulator, stream,
            lambda: fs.fused_sgd_step(on_device(random(0)), grads, lr=0.1, on_nonfinite="raise"),
        )  # fmt: skip
    assert result.grad_norm > 0
    assert twins.gpu.steps == 2


def test_accumulation_is_captured(emulator: Emulator, stream: int) -> None:
    twins = Twins(fs.Momentum, random(0), lr=0.1, grad_clip_norm=1.0)
    grads = on_device(random(1))

    def work(optimizer: fs.Optimizer, *parts: Any) -> None:
        for part in parts:
            optimizer.accumulate(part, scale=0.5)
        optimizer.step()

    def first() -> None:
        attempt(emulator, stream, lambda: twins.gpu.accumulate(grads))

    with pytest.raises(RuntimeError, match="while its stream is being captured"):
        first()
    work(twins.gpu, grads, grads)
    work(twins.cpu, random(1), random(1))
    with emulator.capture(stream) as made:
        work(twins.gpu, grads, grads)
    for t in range(2):
        emulator.run()
        for array, values in zip(grads, random(5 + t), strict=True):
            array.array[...] = values
        made[0].replay(stream)
        work(twins.cpu, random(5 + t), random(5 + t))
    twins.check()
    assert isinstance(grads[0], DeviceArray)
