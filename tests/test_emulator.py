"""The emulated device of tests/device_arrays.py: what tests rely on when they use it.

The emulator itself is checked without Python, by tests/cuda/check_emulator.cpp (`make sanitize`).
"""

from __future__ import annotations

import ctypes
import gc
import sys
from typing import Any

import device_arrays
import dlpack
import fusedstep
import numpy as np
import pytest
from device_arrays import CudaError, DeviceArray, Emulator, byte_bounds, placed, to_device
from exact import BFLOAT16, DTYPES, Array
from fusedstep import buffers

STRIDED = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
VIEWS = {
    "dense": STRIDED,
    "transposed": STRIDED.T,
    "permuted": STRIDED.transpose(1, 2, 0),
    "every second": STRIDED[:, :, ::2],
    "backward": STRIDED[::-1, :, ::-1],
    "repeated": np.broadcast_to(np.float32(7), (3, 5)),
    "scalar": np.array(np.float32(3)),
    "empty": STRIDED[:0],
}


def exported(array: DeviceArray, **options: Any) -> tuple[Any, dlpack.Tensor]:
    """The capsule of an array, which keeps the tensor alive, and the tensor."""
    capsule = array.__dlpack__(**options)
    return capsule, dlpack.tensor_in(capsule)


def view_of(tensor: dlpack.Tensor, dtype: np.dtype[Any]) -> Array:
    """What a consumer sees, as an array of NumPy over the same memory."""
    shape, strides = tensor.shape[: tensor.ndim], tensor.strides[: tensor.ndim]
    reach = sum(abs(s) * (n - 1) for n, s in zip(shape, strides, strict=True)) if all(shape) else 0
    begin = tensor.data + tensor.byte_offset
    back = sum(-s * (n - 1) for n, s in zip(shape, strides, strict=True) if s < 0 and n > 0)
    back *= dtype.itemsize
    memory = (ctypes.c_uint8 * ((reach + 1) * dtype.itemsize)).from_address(begin - back)
    return np.ndarray(shape, dtype, memory, back, [s * dtype.itemsize for s in strides])


# --- arrays -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", VIEWS)
def test_exports_describe_the_array(name: str, split: bool) -> None:
    array = DeviceArray(VIEWS[name], device=3, split=split)
    assert array.__dlpack_device__() == (2, 3)
    for options in ({}, {"max_version": (1, 1), "stream": -1}):
        _capsule, tensor = exported(array, **options)
        assert (tensor.device.type, tensor.device.id) == (dlpack.CUDA, 3)
        assert (tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes) == (dlpack.FLOAT, 32, 1)
        assert tensor.data + tensor.byte_offset == VIEWS[name].ctypes.data
        assert not split or tensor.data % 256 == 0
        assert np.array_equal(view_of(tensor, array.dtype), VIEWS[name])
    assert array.asked == [{}, {"max_version": (1, 1), "stream": -1}]


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("offset", [0, 8, 24])
def test_copies_are_placed_as_asked(dtype: np.dtype[Any], offset: int) -> None:
    values = np.arange(35).reshape(5, 7).T.astype(dtype, order="K")
    array = to_device(values, offset=offset)
    assert array.array.ctypes.data % 256 == offset
    assert array.array.strides == values.strides
    assert array.numpy().tobytes() == values.tobytes()
    _capsule, tensor = exported(array)
    assert tensor.dtype.code == (dlpack.BFLOAT if dtype == BFLOAT16 else dlpack.FLOAT)


@pytest.mark.usefixtures("emulator")
def test_exports_keep_the_memory() -> None:
    before = len(device_arrays._exported)
    capsule = to_device(STRIDED).__dlpack__()
    gc.collect()
    assert len(device_arrays._exported) == before + 1
    del capsule
    assert len(device_arrays._exported) == before


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("name", VIEWS)
def test_byte_bounds(name: str) -> None:
    view = VIEWS[name]
    begin, end = byte_bounds(view)
    strides = np.array(view.strides, int)
    addresses = [view.ctypes.data + int(strides @ np.array(i, int)) for i in np.ndindex(view.shape)]
    assert begin == min(addresses, default=view.ctypes.data)
    assert end == max((a + 4 for a in addresses), default=begin)


# --- memory -----------------------------------------------------------------------------------


def test_memory_belongs_to_the_device_while_the_array_lives(emulator: Emulator) -> None:
    values = placed(STRIDED)
    begin, end = byte_bounds(values)
    with pytest.raises(CudaError, match="error 1"):
        emulator.fill(begin, end - begin)
    assert "not within memory of a device" in str(emulator.fault)
    array = DeviceArray(values)
    part = DeviceArray(values[1])
    emulator.fill(begin, end - begin, value=0)
    del part
    gc.collect()
    assert not array.numpy().any()
    del array
    gc.collect()
    with pytest.raises(CudaError):
        emulator.fill(begin, end - begin)


def test_zeros_come_in_the_order_of_the_stream(emulator: Emulator) -> None:
    array = to_device(STRIDED.T.astype(DTYPES["float16"], order="K"))
    make = buffers.producer_of(DeviceArray).zeros_like
    assert make is not None
    stream = emulator.new_stream()
    device_arrays.current_streams[0] = stream
    for dtype, expected in ((None, "float32"), ("float64", "float64"), ("float16", "float16")):
        made = make(array, dtype)
        assert made.dtype == expected
        assert made.shape == array.shape
        steps = [s // made.dtype.itemsize for s in made.array.strides]
        assert steps == [s // 2 for s in array.array.strides]
        emulator.synchronize()  # another stream
        assert made.array.tobytes() == b"\xcd" * made.array.nbytes
        emulator.synchronize(stream)
        assert not made.array.any()
    emulator.free_stream(stream)


# --- the emulator -----------------------------------------------------------------------------


def test_it_is_there_only_for_the_test(emulator: Emulator) -> None:
    assert sys.modules["fusedstep._cuda"] is emulator.module
    assert fusedstep._cuda is emulator.module
    assert fusedstep.cuda_status().names == ("emulated device 0 (9.0)",)


def test_it_is_not_there_otherwise() -> None:
    if device_arrays.find_module() is None:
        pytest.skip("needs the emulator of CUDA: make emulator")
    before = sys.modules.get("fusedstep._cuda"), vars(fusedstep).get("_cuda")
    with device_arrays.installed() as found:
        assert sys.modules["fusedstep._cuda"] is found.module
    assert (sys.modules.get("fusedstep._cuda"), vars(fusedstep).get("_cuda")) == before
    assert "device_arrays" not in buffers._TABLE


def test_streams_and_settings(emulator: Emulator) -> None:
    array = to_device(np.ones(8, np.uint8))
    address = array.array.ctypes.data
    emulator.fill(address, 8, value=3)
    assert (emulator.count("pending"), array.array[0]) == (1, 1)
    emulator.synchronize()
    assert (emulator.count("pending"), array.array[0]) == (0, 3)
    emulator.set(streams=device_arrays.STREAMS["at once"])
    emulator.fill(address, 8, value=4)
    assert array.array[0] == 4
    assert emulator.calls("cudaMemsetAsync") == 2
    assert emulator.count("bytes_set") == 16
    emulator.fail("cudaMemsetAsync", device_arrays.OUT_OF_MEMORY, nth=2)
    emulator.fill(address, 8, value=5)
    with pytest.raises(CudaError, match="cudaMemsetAsync: error 2"):
        emulator.fill(address, 8, value=6)
    assert array.numpy()[0] == 5
    assert emulator.launched == emulator.executed == []
    with pytest.raises(AssertionError):
        emulator.set(colour=1)


def test_graphs(emulator: Emulator) -> None:
    array = to_device(np.ones(8, np.uint8))
    stream = emulator.new_stream()
    with emulator.capture(stream) as graphs:
        emulator.fill(array.array.ctypes.data, 8, value=9, stream=stream)
    (graph,) = graphs
    assert graph.nodes == ["memset"]
    assert array.numpy()[0] == 1
    graph.replay(stream)
    assert array.array[0] == 1
    assert array.numpy()[0] == 9
    graph.free()
    with pytest.raises(RuntimeError, match="in the block"), emulator.capture(stream):
        raise RuntimeError("in the block")
    emulator.free_stream(stream)  # no capture goes on there


def test_devices(emulator: Emulator) -> None:
    assert emulator.device == 0
    with pytest.raises(CudaError, match="cudaSetDevice"):
        emulator.device = 1
    emulator.set(devices=2)
    emulator.device = 1
    assert emulator.device == 1
    emulator.reset()
    assert emulator.device == 0


def test_a_fault_fails_the_test(emulator: Emulator) -> None:
    with pytest.raises(CudaError):
        emulator.fill(STRIDED.ctypes.data, 4)
    with pytest.raises(AssertionError, match="not within memory"):
        emulator.check()
    assert emulator.fault is not None  # now it is known
    emulator.check()
