"""Errors of a device: what is refused, what says why, and that nothing has changed then."""

from __future__ import annotations

import ctypes
import sys
import types
from collections.abc import Callable
from typing import Any

import device_arrays
import fusedstep as fs
import numpy as np
import producers
import pytest
from device_arrays import DeviceArray, Emulator, placed, to_device
from device_twins import Twins, check_same, on_device, on_host, random
from fusedstep import _core, buffers

ONES = np.ones(4, np.float32)


def state_of(optimizer: fs.Optimizer, params: Any) -> Any:
    return on_host(params), on_host(optimizer.state_dict())


# --- no device that could be used -----------------------------------------------------------------


def odd(array: Any = ONES, **lies: Any) -> producers.Odd:
    return producers.Odd(array.copy(), device=producers.CUDA, **lies)


@pytest.mark.parametrize("path", ["function", "object", "gradient", "sum"])
def test_without_the_module(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setitem(sys.modules, "fusedstep._cuda", None)
    calls: dict[str, Callable[[], Any]] = {
        "function": lambda: fs.fused_sgd_step([ONES, odd()], [ONES, odd()], lr=0.1),
        "object": lambda: fs.SGD({"w": odd()}, lr=0.1),
        "sum": lambda: fs.sum_squares([odd()]),
    }
    text = (
        "is on cuda:0, which cannot be used: this build of fusedstep has no CUDA backend; install"
    )
    if path == "gradient":
        with pytest.raises(ValueError, match="grads is on cuda:0, but params is on cpu"):
            fs.fused_sgd_step(ONES.copy(), odd(), lr=0.1)
    elif path == "function":
        with pytest.raises(
            ValueError, match=r"params\[1\] is on cuda:0, but params\[0\] is on cpu"
        ):
            calls[path]()
        with pytest.raises(RuntimeError, match=f"params {text}"):
            fs.fused_sgd_step(odd(), odd(), lr=0.1)
    else:
        with pytest.raises(RuntimeError, match=text):
            calls[path]()


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (types.ModuleType("_cuda"), "fusedstep._cuda has no function table"),
        ("mismatch", r"of different builds \(another version of the function table\); install"),
    ],
)
def test_another_module(monkeypatch: pytest.MonkeyPatch, module: Any, text: str) -> None:
    if module == "mismatch":
        module = types.ModuleType("_cuda")
        module.table = (ctypes.c_uint32 * 64)(999)
        module.name = b"fusedstep._cuda._DEVICE_API"
        make = ctypes.pythonapi.PyCapsule_New
        make.restype = ctypes.py_object
        make.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        module._DEVICE_API = make(ctypes.addressof(module.table), module.name, None)
    monkeypatch.setitem(sys.modules, "fusedstep._cuda", module)
    with pytest.raises(RuntimeError, match=f"params is on cuda:0, which cannot be used: .*{text}"):
        fs.fused_sgd_step(odd(), odd(), lr=0.1)


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch, emulator: Emulator) -> None:
    """The module is there, the GPU is not: what CUDA says is in the message."""
    emulator.set(driver_version=0)
    fresh = types.ModuleType("fusedstep._cuda")
    fresh._DEVICE_API = emulator.module._DEVICE_API
    # Undone at once: the fixture takes its own module away before that of `monkeypatch` is.
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "fusedstep._cuda", fresh)
        with pytest.raises(RuntimeError, match="which cannot be used: there is no NVIDIA driver"):
            fs.fused_sgd_step(odd(), odd(), lr=0.1)


def test_a_device_that_is_not_there(emulator: Emulator) -> None:
    assert emulator.fault is None
    param = DeviceArray(ONES.copy(), 0)
    param.device = 7
    with pytest.raises(
        RuntimeError, match="params is on cuda:7, which cannot be used: CUDA sees 1"
    ):
        fs.fused_sgd_step(param, param, lr=0.1)


# --- where arrays are, and how they lie -----------------------------------------------------------


def one_on(device: int | None) -> Any:
    return ONES.copy() if device is None else to_device(ONES, device)


@pytest.mark.parametrize(("mine", "other"), [(0, 1), (0, None), (None, 0)])
@pytest.mark.parametrize("what", ["params", "grads", "velocity", "param_copy"])
def test_one_device_per_call(
    emulator: Emulator, what: str, mine: int | None, other: int | None
) -> None:
    emulator.set(devices=2)
    names = ("params", "grads", "velocity", "param_copy")
    trees: dict[str, Any] = {n: {"a": one_on(mine), "b": one_on(mine)} for n in names}
    half = {key: np.zeros(4, np.float16) for key in "ab"}
    trees["param_copy"] = half if mine is None else on_device(half, mine)
    wrong = np.zeros(4, np.float16) if what == "param_copy" else ONES.copy()
    trees[what]["b"] = wrong if other is None else to_device(wrong, other)
    spelt = {None: "cpu", 0: "cuda:0", 1: "cuda:1"}
    like = "params['a']" if what == "params" else "params['b']"
    got, own = f"{what}['b'] is on {spelt[other]}", f"{like} is on {spelt[mine]}"
    if what == "params":  # its gradient, which is where it should be, is met first
        got, own = f"grads['b'] is on {spelt[mine]}", f"params['b'] is on {spelt[other]}"
    before = on_host(trees)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is compared below)
        fs.fused_momentum_step(**trees, lr=0.1)
    assert str(caught.value).startswith(f"{got}, but {own}")
    check_same(on_host(trees), before)


def test_one_device_per_optimizer(emulator: Emulator) -> None:
    emulator.set(devices=2)
    text = r"params\['b'\] is on cuda:1, but params\['a'\] is on cuda:0; the arrays of a call have"
    with pytest.raises(ValueError, match=text):
        fs.SGD({"a": one_on(0), "b": one_on(1)}, lr=0.1)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.usefixtures("emulator")
def test_alignment(dtype: str) -> None:
    """Elements of a GPU's arrays are read whole; those of the CPU may lie anywhere."""
    array = np.ones(4, dtype)
    for offset in range(1, array.itemsize):
        with pytest.raises(BufferError, match=r"params: an array on a device has to be aligned to"):
            fs.fused_sgd_step(to_device(array, 0, offset), to_device(array), lr=0.5)
        with pytest.raises(BufferError, match=r"grads: an array on a device has to be aligned to"):
            fs.fused_sgd_step(to_device(array), to_device(array, 0, offset), lr=0.5)
    param = to_device(array, 0, array.itemsize)
    fs.fused_sgd_step(param, DeviceArray(np.ones(9, dtype)[1::2], split=False), lr=0.5)
    assert param.numpy().tolist() == [0.5] * 4


@pytest.mark.usefixtures("emulator")
def test_overlap_and_what_is_read_only() -> None:
    memory = to_device(np.zeros(8, np.float32))
    halves = [DeviceArray(memory.array[:5]), DeviceArray(memory.array[3:])]
    with pytest.raises(BufferError, match=r"params\[0\] and params\[1\] overlap in memory"):
        fs.fused_sgd_step(halves, on_device([np.ones(5, np.float32)] * 2), lr=0.1)
    with pytest.raises(BufferError, match="params is read-only"):
        fs.fused_sgd_step(odd(flags=producers.READ_ONLY), to_device(ONES), lr=0.1)


@pytest.mark.usefixtures("emulator")
def test_a_library_that_is_not_known_makes_no_state() -> None:
    kept = odd()
    with pytest.raises(TypeError, match="zeros cannot be made on cuda:0 for an array of producers"):
        fs.fused_momentum_step(kept, to_device(ONES), lr=0.1)
    with pytest.raises(TypeError, match="zeros cannot be made on cuda:0"):
        fs.Momentum(kept, lr=0.1).set_state(velocity=ONES)


# --- CUDA says no ---------------------------------------------------------------------------------


def test_a_first_step_for_which_there_is_no_memory(emulator: Emulator) -> None:
    """Whichever of its allocations fails: nothing has changed, and the next step is right."""
    twins = Twins(fs.NAdam, random(0), lr=0.1, grad_clip_norm=1.0)
    kept = on_device(random(2))
    for nth in range(1, 20):
        emulator.fail("cudaMalloc", device_arrays.OUT_OF_MEMORY, nth)
        try:
            twins.gpu.step(kept)
        except RuntimeError as error:
            assert str(error).startswith("cuda:0: ")  # noqa: PT017 (until none fails any more)
            assert "cudaErrorMemoryAllocation" in str(error)  # noqa: PT017
        else:
            break
        twins.check()
    assert 3 < nth < 19
    twins.cpu.step(random(2))
    twins.check()


@pytest.mark.parametrize("launch", [1, 2])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_launch_that_fails(emulator: Emulator, steps: int, launch: int) -> None:
    """Even if it is the second one of the step, and the first one runs."""
    twins = Twins(fs.NAdam, random(0), lr=0.1, grad_clip_norm=1.0)
    for t in range(steps):
        twins.step(random(3 + t))
    kept = on_device(random(2))
    emulator.fail("cudaLaunchKernel", device_arrays.LAUNCH_OUT_OF_RESOURCES, launch)
    with pytest.raises(RuntimeError, match=r"^cuda:0: .*cudaErrorLaunchOutOfResources \(.+\)"):
        twins.gpu.step(kept)
    twins.check()
    twins.step(random(2))
    twins.check()


def test_a_step_that_fails_on_the_device(emulator: Emulator) -> None:
    """It is found when the result is read."""
    twins = Twins(fs.SGD, random(0), lr=0.1, grad_clip_norm=1.0)
    kept = on_device(random(1))
    emulator.fail("kernel", device_arrays.LAUNCH_FAILURE)
    result = twins.gpu.step(kept)
    with pytest.raises(RuntimeError, match="cudaErrorLaunchFailure"):
        _ = result.grad_norm
    with pytest.raises(RuntimeError, match="cudaErrorLaunchFailure"):
        repr(result)


@pytest.mark.usefixtures("emulator")
def test_views_are_of_the_cpu() -> None:
    with pytest.raises(BufferError, match="array is on cuda:0, not in CPU memory"):
        _core.array_view(to_device(ONES))
    assert buffers.stored(to_device(ONES)).bits.tolist() == [1.0] * 4


# --- parameters that go elsewhere -----------------------------------------------------------------


def move(array: DeviceArray, device: int) -> None:
    """What `module.to()` does: the same object has memory elsewhere."""
    there = to_device(array.numpy(), device)
    array.array, array.device, array.moved = there.array, device, there


@pytest.mark.parametrize("kind", [fs.Momentum, fs.NAdam])
def test_a_leaf_without_a_gradient_stays_behind(
    emulator: Emulator, kind: type[fs.Optimizer]
) -> None:
    """A step is where the leaves are that take part in it."""
    emulator.set(devices=2)
    values, grad = np.ones(5, np.float32), np.arange(5, dtype=np.float32)
    host = kind([values.copy(), values.copy()], lr=0.1)
    params = [to_device(values), to_device(values)]
    moved = kind(params, lr=0.1)
    for device in (0, 0, 1, 1, 0):
        if params[1].device != device:
            move(params[1], device)
            for state in moved._plan.get_state(1).values():
                move(state, device)
        moved.step([None, to_device(grad, device)])
        host.step([None, grad])
    assert params[1].numpy().tobytes() == host._plan.leaf(1).tobytes()
    assert moved.steps == host.steps == 5
    assert moved._plan.get_progress(1) == host._plan.get_progress(1)
    with pytest.raises(ValueError, match="one device"):
        moved.accumulate([to_device(grad, 0), to_device(grad, 1)])


class Mover(DeviceArray):
    """An array that can come to the CPU."""

    on_cpu = False

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0) if self.on_cpu else super().__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        if not self.on_cpu:
            return super().__dlpack__(**options)
        return self.array.__dlpack__(max_version=options.get("max_version"))


def test_a_leaf_without_a_gradient_stays_behind_on_the_device(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = device_arrays._producer

    def zeros(array: Any, dtype: str | None = None) -> Any:
        made = device_arrays._zeros_like(array, dtype)
        made.__class__ = Mover
        return made

    def producer(module: Any) -> Any:
        return row(module)._replace(zeros_like=zeros)

    monkeypatch.setitem(buffers._TABLE, __name__, producer)
    values, grad = np.ones(5, np.float32), np.arange(5, dtype=np.float32)
    host = fs.NAdam([values.copy(), values.copy()], lr=0.1)
    params, there = [Mover(placed(values)), Mover(placed(values))], Mover(placed(grad))
    moved = fs.NAdam(params, lr=0.1)
    for step in range(5):
        if step == 3:
            emulator.run()
            for array in (params[1], there, *moved._plan.get_state(1).values()):
                array.on_cpu = True
        moved.step([None, there])
        host.step([None, grad])
    assert params[1].array.tobytes() == host._plan.leaf(1).tobytes()
    assert moved.steps == host.steps == 5
    assert moved._plan.get_progress(1) == host._plan.get_progress(1)
