"""The devices that the GPU tests run on, as far as that shows without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import device_arrays
import gpu_devices
import numpy as np
import pytest
from device_arrays import Emulator
from device_twins import check_same
from exact import DTYPES, Array

LAYOUTS = ("dense", "transposed", "strided", "broadcast", "number", "empty")


@pytest.fixture(params=["emulated", pytest.param("torch", marks=pytest.mark.framework("torch"))])
def any_device(request: pytest.FixtureRequest) -> Iterator[gpu_devices.Device]:
    """The emulated one; torch's tensors, although they are on the CPU."""
    if request.param == "torch":
        yield gpu_devices.Torch("cpu")
    else:
        request.getfixturevalue("emulator")
        yield gpu_devices.Emulated()


def laid_out(layout: str, dtype: str) -> Array:
    block = np.arange(24, dtype=np.float32).astype(DTYPES[dtype]).reshape(2, 3, 4)
    made = {
        "dense": block,
        "transposed": block.T,
        "strided": block[:, ::2, 1:],
        "broadcast": np.broadcast_to(block[1, 1], (3, 4)),
        "number": np.array(block[1, 1, 1]),
        "empty": block[:0],
    }
    return made[layout]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays(any_device: gpu_devices.Device, layout: str, dtype: str) -> None:
    values = laid_out(layout, dtype)
    for offset in range(4):
        array = any_device.array(values, offset)
        assert any_device.is_array(array)
        check_same(any_device.numpy(array), values)
        if isinstance(array, gpu_devices.DeviceArray):
            strides, address = array.array.strides, array.array.ctypes.data
            assert address % 256 == offset * values.itemsize
        else:
            strides = tuple(s * values.itemsize for s in array.stride())
        assert strides == values.strides
        if layout != "broadcast":
            any_device.write(array, values + values)
            check_same(any_device.numpy(array), values + values)
    any_device.check()


def test_trees(any_device: gpu_devices.Device) -> None:
    tree = {"a": [laid_out("dense", "float32"), None], "b": (1.5, laid_out("number", "float64"))}
    check_same(any_device.fetch(any_device.put(tree)), tree)
    assert any_device.numpy(any_device.number(3, "int64")).tolist() == 3


@pytest.mark.framework("torch")
@pytest.mark.parametrize("index", [-1, 3])
def test_writes_beside_an_array_are_found(index: int) -> None:
    made = gpu_devices.Torch("cpu")
    array = made.array(np.ones(3, np.float32), 1)
    made.check()
    array.as_strided((1,), (1,), array.storage_offset() + index).fill_(0.0)
    with pytest.raises(AssertionError, match="something was written b"):
        made.check()


def test_a_graph_of_more_than_kernels_is_refused(emulator: Emulator) -> None:
    made = gpu_devices.Emulated()
    array = made.array(np.ones(3, np.float32))
    with pytest.raises(AssertionError, match="memset"), made.capture() as captured:
        emulator.fill(array.array.ctypes.data, 4, stream=device_arrays.current_streams[0])
    assert captured.replay is None
