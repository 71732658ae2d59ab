"""A function of CUDA fails once, at every place where one is called: nothing has changed then.

The call says which function it was, and the next one works. On the emulated device alone, which
lets any call fail.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import device_arrays
import fusedstep as fs
import numpy as np
import pytest
from device_arrays import STREAMS, Emulator, Graph, to_device
from device_twins import Twins, check_same, random
from gpu_devices import Emulated

INVALID_VALUE, OUT_OF_MEMORY, LAUNCH_OUT_OF_RESOURCES = 1, 2, 701
ERRORS = {
    "cudaGetDevice": INVALID_VALUE,
    "cudaSetDevice": INVALID_VALUE,
    "cudaMalloc": OUT_OF_MEMORY,
    "cudaMemsetAsync": INVALID_VALUE,
    "cudaMemcpyAsync": INVALID_VALUE,
    "cudaStreamSynchronize": INVALID_VALUE,
    "cudaStreamIsCapturing": INVALID_VALUE,
    "cudaStreamCreateWithFlags": OUT_OF_MEMORY,
    "cudaLaunchKernel": LAUNCH_OUT_OF_RESOURCES,
}
NAMES = {1: "cudaErrorInvalidValue", 2: "cudaErrorMemoryAllocation", 701: "cudaErrorLaunchOutOf"}
# What gives something back: there is nothing to be done, and nobody to tell.
QUIET = ("cudaFree", "cudaStreamDestroy", "cudaThreadExchangeStreamCaptureMode")
NEVER = 1 << 40
SIZES = (3, 129, 0, 40)
MANY = (3, 5) * 40


class Story:
    """Something that is done to both of two optimizers.

    Attributes:
        gpu, cpu: What is done; `gpu` may fail, and is done again then.
        reads: It only reads, so that nothing is to be compared in between.
    """

    def __init__(
        self, twins: Twins, gpu: Callable[[], Any], cpu: Callable[[], Any], reads: bool = False
    ) -> None:
        self.twins, self.gpu, self.cpu, self.reads = twins, gpu, cpu, reads

    def seen(self) -> Any:
        """All that a user can see of the device's."""
        device, gpu = self.twins.device, self.twins.gpu
        params = device.fetch(self.twins.params["gpu"])
        if self.reads:
            return params
        return params, device.fetch(gpu.state_dict()), gpu.steps, gpu.skipped_steps


def step_of(twins: Twins, grads: Any, **options: Any) -> Story:
    """One more step. The gradients are copied now, as copying calls CUDA, too."""
    on_gpu, options_of_gpu = twins.device.put(grads), twins.device.put(options)
    return Story(
        twins, lambda: twins.gpu.step(on_gpu, **options_of_gpu),
        lambda: twins.cpu.step(grads, **options),
    )  # fmt: skip


def first_step(_: Emulator) -> Story:
    twins = Twins(fs.Adam, random(0, SIZES), lr=0.1, grad_clip_norm=1.0, on_nonfinite="skip")
    return step_of(twins, random(1, SIZES))


def first_step_of_all_kinds(_: Emulator) -> Story:
    """Without state: without a norm, so that there is one launch."""
    return step_of(Twins(fs.SGD, random(0, SIZES), lr=0.1), random(1, SIZES))


def later_step(_: Emulator) -> Story:
    twins = Twins(fs.NAdam, random(0, SIZES), lr=0.1, grad_clip_norm=1.0, on_nonfinite="skip")
    twins.step(random(1, SIZES))
    return step_of(twins, random(2, SIZES))


def step_of_many(_: Emulator) -> Story:
    """Whose table does not fit behind the arguments, and is sent anew."""
    twins = Twins(fs.Adam, random(0, MANY), lr=0.1, grad_clip_norm=1.0)
    twins.step(random(1, MANY))
    return step_of(twins, random(2, MANY))


def first_step_of_many(_: Emulator) -> Story:
    return step_of(Twins(fs.SGD, random(0, MANY), lr=0.1, grad_clip_norm=1.0), random(1, MANY))


def step_of_a_part(_: Emulator) -> Story:
    """Progress parts."""
    twins = Twins(fs.Adam, random(0, SIZES), lr=0.1, grad_clip_norm=1.0, on_nonfinite="skip")
    twins.step(random(1, SIZES))
    return step_of(twins, [random(2, SIZES)[0], None, None, random(2, SIZES)[3]])


def step_of_newcomers(_: Emulator) -> Story:
    """Some have had a step, others take their first one."""
    twins = Twins(fs.SGD, random(0, SIZES), lr=0.1, momentum=0.9, dampening=0.5)
    twins.step([random(1, SIZES)[0], None, None, random(1, SIZES)[3]])
    return step_of(twins, random(2, SIZES))


def step_that_is_skipped(_: Emulator) -> Story:
    twins = Twins(fs.Adam, random(0, SIZES), lr=0.1, on_nonfinite="skip")
    grads = random(2, SIZES)
    grads[0][0] = np.nan
    return step_of(twins, grads)


def step_with_numbers(emulator: Emulator) -> Story:
    """Those of another device are read by the host."""
    emulator.set(devices=2)
    twins = Twins(fs.Momentum, random(0, SIZES), lr=0.1)
    flag, norm = to_device(np.zeros((), np.float32), 1), to_device(np.full((), 2.0), 1)
    story = step_of(twins, random(1, SIZES))
    on_gpu = twins.device.put(random(1, SIZES))
    story.gpu = lambda: twins.gpu.step(on_gpu, found_inf=flag, grad_norm=norm)
    story.cpu = lambda: twins.cpu.step(random(1, SIZES), found_inf=0.0, grad_norm=2.0)
    return story


def step_beside_another_device(emulator: Emulator) -> Story:
    """Another device is the current one, and stays it."""
    emulator.set(devices=2)
    story = later_step(emulator)
    emulator.device = 1
    return story


def copies(_: Emulator) -> Story:
    twins = Twins(fs.AdamW, random(0, SIZES), lr=0.1)
    return step_of(
        twins, random(1, SIZES), param_copy=[a.astype(np.float16) for a in random(2, SIZES)]
    )


def gathered(_: Emulator) -> Story:
    """Gradients are summed, and the sums are taken."""
    twins = Twins(fs.Adam, random(0, SIZES), lr=0.1, grad_clip_norm=1.0)
    grads = twins.device.put(random(1, SIZES))

    def work() -> None:
        twins.gpu.accumulate(grads)

    def finish() -> None:
        twins.cpu.accumulate(random(1, SIZES))
        twins.cpu.step()
        twins.gpu.step()

    return Story(twins, work, finish)


def step_of_sums(_: Emulator) -> Story:
    twins = Twins(fs.Adam, random(0, SIZES), lr=0.1, grad_clip_norm=1.0)
    grads = twins.device.put(random(1, SIZES))
    for _ in range(2):
        twins.gpu.accumulate(grads)
        twins.cpu.accumulate(random(1, SIZES))
    return Story(twins, twins.gpu.step, twins.cpu.step)


def counts(_: Emulator) -> Story:
    twins = Twins(fs.Adam, random(0, SIZES), lr=0.1, on_nonfinite="skip")
    for t in range(2):
        twins.step(random(1 + t, SIZES), lazy=True)
    return Story(twins, lambda: twins.gpu.steps, lambda: None, reads=True)


def states(_: Emulator) -> Story:
    twins = Twins(fs.Adam, random(0, SIZES), lr=0.1, on_nonfinite="skip")
    twins.step([np.full_like(a, np.nan) for a in random(1, SIZES)], lazy=True)
    return Story(twins, twins.gpu.state_dict, lambda: None, reads=True)


def loading(_: Emulator) -> Story:
    twins = Twins(fs.Adam, random(0, SIZES), lr=0.1, on_nonfinite="skip")
    twins.step(random(1, SIZES))
    saved = twins.cpu.state_dict()
    twins.step(random(2, SIZES), lazy=True)
    return Story(
        twins, lambda: twins.gpu.load_state_dict(saved), lambda: twins.cpu.load_state_dict(saved),
        reads=True,
    )  # fmt: skip


def result(_: Emulator) -> Story:
    twins = Twins(fs.Adam, random(0, SIZES), lr=0.1, grad_clip_norm=1.0, on_nonfinite="skip")
    told = twins.step_gpu(random(1, SIZES))
    expected = twins.cpu.step(random(1, SIZES))

    def read() -> None:
        check_same(tuple(told), tuple(expected))

    return Story(twins, read, lambda: None, reads=True)


def functions(_: Emulator) -> Story:
    """That make state; of a workspace that is there."""
    twins = Twins(fs.SGD, random(0, SIZES), lr=0.1)
    grads = twins.device.put(random(1, SIZES))
    options: dict[str, Any] = {"lr": 0.1, "grad_clip_norm": 1.0}
    return Story(
        twins, lambda: fs.fused_adam_step(twins.params["gpu"], grads, **options),
        lambda: fs.fused_adam_step(twins.params["cpu"], random(1, SIZES), **options),
    )  # fmt: skip


def functions_on_a_new_stream(emulator: Emulator) -> Story:
    """That make a workspace, too."""
    story = functions(emulator)
    device_arrays.current_streams[0] = emulator.new_stream()
    return story


def sum_of_squares(_: Emulator) -> Story:
    twins = Twins(fs.SGD, random(0, SIZES), lr=0.1)
    grads = twins.device.put(random(1, SIZES))
    expected = fs.sum_squares(random(1, SIZES))

    def read() -> None:
        assert fs.sum_squares(grads) == expected

    return Story(twins, read, lambda: None)


def captured(emulator: Emulator, sizes: tuple[int, ...] = SIZES) -> Story:
    """What fails in a capture ends neither it nor the stream: it is the caller's."""
    stream = device_arrays.current_streams[0] = emulator.new_stream()
    twins = Twins(fs.Adam, random(0, sizes), lr=0.1, grad_clip_norm=1.0, on_nonfinite="skip")
    twins.step(random(1, sizes))
    grads = twins.device.put(random(2, sizes))
    graphs: list[Graph] = []

    def capture() -> None:
        error = None
        with emulator.capture(stream) as made:
            try:
                twins.gpu.step(grads)
            except RuntimeError as caught:
                error = caught
        graphs.extend(made)
        if error:
            raise error

    def replay() -> None:
        for _ in range(2):
            graphs[-1].replay(stream)
            twins.cpu.step(random(2, sizes))

    return Story(twins, capture, replay)


def captured_of_many(emulator: Emulator) -> Story:
    return captured(emulator, MANY)


STORIES = (
    first_step, first_step_of_all_kinds, later_step, step_of_many, first_step_of_many,
    step_of_a_part, step_of_newcomers, step_that_is_skipped, step_with_numbers,
    step_beside_another_device, copies, gathered, step_of_sums, counts, states, loading, result,
    functions, functions_on_a_new_stream, sum_of_squares, captured, captured_of_many,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _quick_collections() -> Iterator[None]:
    """Of what the tests here leave: all else in the process takes long to look at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def check_failure(emulator: Emulator, story: Story, function: str, nth: int) -> bool:
    """One failure and what comes after it; whether there was one."""
    gc.collect()  # what is left of other stories calls CUDA, too
    before, device = story.seen(), emulator.device
    known = emulator.calls(function)
    emulator.fail(function, ERRORS[function], nth)
    error = None
    try:
        story.gpu()
    except RuntimeError as caught:
        error = str(caught)
    failed = emulator.calls(function) - known >= nth
    emulator.fail(function, INVALID_VALUE, NEVER)
    where = f"call {nth} of {function}"
    if not failed:
        assert error is None, where
        return False
    if error is not None:
        word = "launch" if function == "cudaLaunchKernel" else function
        assert word in error, (where, error)
        of_test = error == f"{function}: error {ERRORS[function]}"  # it calls CUDA, too
        assert of_test or NAMES[ERRORS[function]] in error, (where, error)
        check_same(story.seen(), before, where)
        story.gpu()
    else:  # what puts the current device back, or gives memory back: nobody has to know
        assert function in {"cudaGetDevice", "cudaSetDevice"}, where
    if function != "cudaSetDevice":
        assert emulator.device == device
    story.cpu()
    story.twins.check()
    story.twins.step(random(7, tuple(a.size for a in story.twins.params["cpu"])))
    story.twins.check()
    return True


@pytest.mark.parametrize("function", ERRORS)
@pytest.mark.parametrize("make", STORIES, ids=lambda make: make.__name__)
def test_every_call_fails_once(
    emulator: Emulator, make: Callable[[Emulator], Story], function: str
) -> None:
    # A copy to memory that is not pinned has ended when cudaMemcpyAsync returns, as that memory may
    # be gone when nobody could wait.
    streams = STREAMS["at once" if function == "cudaStreamSynchronize" else "late"]
    for nth in range(1, 100):
        emulator.set(streams=streams)
        if not check_failure(emulator, make(emulator), function, nth):
            break
        emulator.run()
        emulator.reset()
        device_arrays.current_streams.clear()
    else:
        pytest.fail("too many calls")


@pytest.mark.parametrize("function", QUIET)
@pytest.mark.parametrize("make", STORIES, ids=lambda make: make.__name__)
def test_what_is_given_back(
    emulator: Emulator, make: Callable[[Emulator], Story], function: str
) -> None:
    """That fails when the process ends, or the device is lost."""
    story = make(emulator)
    for nth in (1, 2):
        emulator.fail(function, INVALID_VALUE, nth)
    story.gpu()
    emulator.fail(function, INVALID_VALUE, NEVER)
    story.cpu()
    story.twins.check()


@pytest.mark.parametrize(
    ("function", "unseen"), [("cudaDriverGetVersion", 6), ("cudaGetDeviceCount", 7)]
)
def test_the_first_look_fails(emulator: Emulator, function: str, unseen: int) -> None:
    """And is taken again: for a device that has not been seen yet."""
    emulator.set(devices=unseen + 1)
    arrays = [to_device(np.ones(3, np.float32), unseen) for _ in range(2)]
    emulator.fail(function, INVALID_VALUE)
    text = f"params is on cuda:{unseen}, which .*{function} failed"
    with pytest.raises(RuntimeError, match=text):
        fs.fused_sgd_step(*arrays, lr=0.5)
    assert Emulated().numpy(arrays[0]).tolist() == [1.0] * 3
    fs.fused_sgd_step(*arrays, lr=0.5)
    assert Emulated().numpy(arrays[0]).tolist() == [0.5] * 3
