"""Arrays of a device that is emulated on the CPU, and the emulator itself (tests/cuda/emulator).

`make emulator` builds the CUDA sources with a stand-in for the CUDA runtime. While that module is
in the place of `fusedstep._cuda`, a `DeviceArray` is to fusedstep what an array of a GPU is, and
the kernels run. The fixture `emulator` sees to it, with a fresh one for each test.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import dlpack
import fusedstep
import numpy as np
from exact import DTYPES, Array
from fusedstep import buffers

NAME = "fusedstep._cuda"
ORDERS = {"forward": 0, "backward": 1, "random": 2}
STREAMS = {"late": 0, "at once": 1, "random": 2}
# cudaError_t
INVALID_VALUE, OUT_OF_MEMORY, NO_DEVICE = 1, 2, 100
ILLEGAL_ADDRESS, LAUNCH_OUT_OF_RESOURCES, LAUNCH_FAILURE = 700, 701, 719


def find_module() -> Path | None:
    """The module with the emulator, if it has been built."""
    here = Path(__file__).resolve().parent.parent / "build" / "emulator"
    found = sorted(Path(os.environ.get("FUSEDSTEP_EMULATOR", here)).glob("_cuda.*.so"))
    return found[0] if found else None


@functools.cache
def emulator() -> Emulator:
    """The emulator, which has to have been built."""
    path = find_module()
    assert path is not None
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Emulator(module)


@contextmanager
def installed() -> Iterator[Emulator]:
    """Puts the emulator in the place of `fusedstep._cuda`, and afterwards what was there."""
    missing = object()
    before = sys.modules.get(NAME, missing), vars(fusedstep).get("_cuda", missing)
    sys.modules[NAME] = fusedstep._cuda = emulator().module
    buffers._TABLE[__name__] = _producer
    try:
        yield emulator()
    finally:
        del buffers._TABLE[__name__], sys.modules[NAME], fusedstep._cuda
        if before[0] is not missing:
            sys.modules[NAME] = before[0]
        if before[1] is not missing:
            fusedstep._cuda = before[1]


# --- the emulator -----------------------------------------------------------------------------


class CudaError(RuntimeError):
    """A function of the runtime that a test has called failed."""


class Graph:
    """A captured graph, ready to be replayed.

    Attributes:
        nodes: Their types: "kernel", "memcpy", "memset".
    """

    _TYPES = ("kernel", "memcpy", "memset")

    def __init__(self, emulator: Emulator, graph: ctypes.c_void_p) -> None:
        self._emulator = emulator
        count = ctypes.c_size_t()
        emulator.call("cudaGraphGetNodes", graph, None, ctypes.byref(count))
        nodes = (ctypes.c_void_p * max(count.value, 1))()
        emulator.call("cudaGraphGetNodes", graph, nodes, ctypes.byref(count))
        self.nodes = [self._type_of(node) for node in nodes[: count.value]]
        self._exec = ctypes.c_void_p()
        flags = ctypes.c_ulonglong(0)
        emulator.call("cudaGraphInstantiate", ctypes.byref(self._exec), graph, flags)
        emulator.call("cudaGraphDestroy", graph)

    def _type_of(self, node: int) -> str:
        kind = ctypes.c_int()
        self._emulator.call("cudaGraphNodeGetType", ctypes.c_void_p(node), ctypes.byref(kind))
        return self._TYPES[kind.value]

    def replay(self, stream: int = 0) -> None:
        """Puts it into a stream once more."""
        self._emulator.call("cudaGraphLaunch", self._exec, ctypes.c_void_p(stream))

    def free(self) -> None:
        self._emulator.call("cudaGraphExecDestroy", self._exec)


class Emulator:
    """What tests/cuda/emulator/emulator.h declares, and the functions of CUDA that tests need."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self._library = ctypes.CDLL(str(module.__file__))
        for name in ("get", "count", "calls"):
            getattr(self._library, f"emulator_{name}").restype = ctypes.c_int64
        for name in ("launched", "executed", "fault"):
            getattr(self._library, f"emulator_{name}").restype = ctypes.c_char_p
        self._fault_is_known = False

    def call(self, function: str, *arguments: Any) -> None:
        """Calls a function of the CUDA runtime."""
        error = getattr(self._library, function)(*arguments)
        if error:
            raise CudaError(f"{function}: error {error}")

    # --- how it runs ---

    def reset(self) -> None:
        self._library.emulator_reset()
        self._fault_is_known = False
        _release()

    def set(self, **settings: int) -> None:
        """Sets what `emulator_set` knows: `emulator.set(order=ORDERS["random"], seed=3)`."""
        for name, value in settings.items():
            known = self._library.emulator_set(name.encode(), ctypes.c_int64(value)) == 0
            assert known, name

    def run(self) -> None:
        """Runs all that is in all streams."""
        self._library.emulator_run()
        _release()

    def fail(self, function: str, error: int, nth: int = 1) -> None:
        """Lets the `nth` call from now of a function return an error, and do nothing else."""
        self._library.emulator_fail(function.encode(), ctypes.c_int64(nth), error)

    # --- what happened ---

    def count(self, what: str) -> int:
        """E.g. `pending` operations, or `launched` kernels since the reset."""
        number: int = self._library.emulator_count(what.encode())
        assert number >= 0, what
        return number

    def calls(self, function: str) -> int:
        """How often a function of the runtime was called since the reset."""
        number: int = self._library.emulator_calls(function.encode())
        return number

    @property
    def launched(self) -> list[str]:
        """The kernels that were launched, or captured, since the reset."""
        return self._names("launched")

    @property
    def executed(self) -> list[str]:
        """The kernels that have run since the reset."""
        return self._names("executed")

    def _names(self, which: str) -> list[str]:
        get = getattr(self._library, f"emulator_{which}")
        return [get(ctypes.c_int64(i)).decode() for i in range(self.count(which))]

    @property
    def fault(self) -> str | None:
        """What was done wrong first. A test that has not asked fails if there is something."""
        self._fault_is_known = True
        return self._fault()

    def _fault(self) -> str | None:
        text: bytes | None = self._library.emulator_fault()
        return None if text is None else text.decode()

    def check(self) -> None:
        """The end of a test: everything runs, and nothing has been done wrong."""
        self.run()
        assert self._fault_is_known or self._fault() is None, self._fault()
        assert self.count("broken_guards") == 0

    # --- memory and streams ---

    def register(self, address: int, size: int, device: int) -> None:
        self._library.emulator_register(ctypes.c_void_p(address), ctypes.c_int64(size), device)

    def unregister(self, address: int) -> None:
        self._library.emulator_unregister(ctypes.c_void_p(address))

    def fill(self, address: int, size: int, value: int = 0, stream: int = 0) -> None:
        """`cudaMemsetAsync`."""
        pointer, count = ctypes.c_void_p(address), ctypes.c_size_t(size)
        self.call("cudaMemsetAsync", pointer, value, count, ctypes.c_void_p(stream))

    def new_stream(self, *, blocking: bool = False) -> int:
        """A stream of the current device, as torch and CuPy make them."""
        stream = ctypes.c_void_p()
        flags = ctypes.c_uint(0 if blocking else 1)
        self.call("cudaStreamCreateWithFlags", ctypes.byref(stream), flags)
        assert stream.value is not None
        return stream.value

    def free_stream(self, stream: int) -> None:
        self.call("cudaStreamDestroy", ctypes.c_void_p(stream))

    def synchronize(self, stream: int = 0) -> None:
        self.call("cudaStreamSynchronize", ctypes.c_void_p(stream))

    @property
    def device(self) -> int:
        """The current device of this thread."""
        device = ctypes.c_int()
        self.call("cudaGetDevice", ctypes.byref(device))
        return device.value

    @device.setter
    def device(self, value: int) -> None:
        self.call("cudaSetDevice", value)

    @contextmanager
    def capture(self, stream: int, mode: int = 0) -> Iterator[list[Graph]]:
        """Captures what the block puts into a stream; the graph is in the list afterwards."""
        made: list[Graph] = []
        pointer, graph = ctypes.c_void_p(stream), ctypes.c_void_p()
        self.call("cudaStreamBeginCapture", pointer, mode)
        try:
            yield made
        except BaseException:
            self._library.cudaStreamEndCapture(pointer, ctypes.byref(graph))
            raise
        self.call("cudaStreamEndCapture", pointer, ctypes.byref(graph))
        made.append(Graph(self, graph))


# --- arrays -----------------------------------------------------------------------------------

#: The stream that this library of arrays works in, by device: torch's and CuPy's current stream.
current_streams: dict[int, int] = {}

# Exported tensors by address, until their consumer gives them back.
_exported: dict[int, tuple[Any, ...]] = {}


@dlpack.Deleter
def _give_back(address: int) -> None:
    del _exported[address]


class DeviceArray:
    """An array in the memory of a device, which is that of a NumPy array.

    Args:
        array: Is wrapped as it is, with its strides and alignment (`placed` makes others), not
            copied.
        device: Number of the device.
        split: Export the address as DLPack says: a multiple of 256, and the rest as `byte_offset`.
            Libraries put all of it into the address.

    Attributes:
        array: The NumPy array. The host must not look at it before what is in the streams has run.
        asked: The keyword arguments of every call of `__dlpack__`.
        grad: As a tensor of torch has it.
    """

    def __init__(self, array: Array, device: int = 0, *, split: bool = False) -> None:
        self.array, self.device, self._split = array, device, split
        self.asked: list[dict[str, Any]] = []
        self.grad: Any = None
        begin, end = byte_bounds(array)
        emulator().register(begin, end - begin, device)
        self._finalizer = weakref.finalize(self, _forget, begin, array)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def numpy(self) -> Array:
        """A copy on the host, after everything in the streams has run."""
        emulator().run()
        return self.array.copy(order="K")

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self.device

    def __dlpack__(self, **options: Any) -> Any:
        self.asked.append(options)
        address = self.array.ctypes.data
        offset = address % 256 if self._split else 0
        tensor, kept = dlpack.tensor_of(
            self.array,
            device=dlpack.CUDA,
            device_id=self.device,
            data=address - offset,
            byte_offset=offset,
        )
        managed: dlpack.Managed | dlpack.Versioned
        if options.get("max_version", (0, 0))[0] >= 1:
            managed = dlpack.Versioned(1, 0, None, _give_back, 0, tensor)
            name = b"dltensor_versioned"
        else:
            managed, name = dlpack.Managed(tensor, None, _give_back), b"dltensor"
        _exported[ctypes.addressof(managed)] = (managed, kept, self)
        return dlpack.new_capsule(managed, name)


# Memory that nobody has any more: what still is in the streams may use it, as an allocator that
# knows about streams sees to it.
_left: list[tuple[int, Array]] = []


def _forget(begin: int, array: Array) -> None:
    _left.append((begin, array))
    if emulator().count("pending") == 0:
        _release()


def _release() -> None:
    while _left:
        begin, _ = _left.pop()
        emulator().unregister(begin)


def byte_bounds(array: Array) -> tuple[int, int]:
    """Addresses of the first byte of an array, and of the one after its last."""
    begin = end = array.ctypes.data
    if array.size:
        for size, stride in zip(array.shape, array.strides, strict=True):
            reach = (size - 1) * stride
            begin, end = begin + min(reach, 0), end + max(reach, 0)
        end += array.itemsize
    return begin, end


def allocate(like: Array, dtype: np.dtype[Any], offset: int = 0) -> Array:
    """A dense array of this shape that holds anything, its dimensions in the same order in memory.

    It begins `offset` bytes beyond a multiple of 256.
    """
    order = sorted(range(like.ndim), key=lambda d: -abs(like.strides[d]))
    shape = [like.shape[d] for d in order]
    size = math.prod(shape) * dtype.itemsize
    memory = np.full(size + 512, 0xCD, np.uint8)
    begin = -memory.ctypes.data % 256 + offset
    dense = memory[begin : begin + size].view(dtype).reshape(shape)
    return dense.transpose(np.argsort(order)) if order else dense


def placed(values: Array, offset: int = 0) -> Array:
    """A dense copy that begins `offset` bytes beyond a multiple of 256."""
    copy = allocate(values, values.dtype, offset)
    copy[...] = values
    return copy


def to_device(values: Array, device: int = 0, offset: int = 0) -> DeviceArray:
    """A copy on a device, `offset` bytes beyond a multiple of 256."""
    return DeviceArray(placed(values, offset), device)


def _zeros_like(array: DeviceArray, dtype: str | None = None) -> DeviceArray:
    """What libraries do: memory that holds anything, and zeros in the order of their stream."""
    chosen = DTYPES[dtype or buffers.state_dtype(array.dtype.name)]
    made = DeviceArray(allocate(array.array, chosen), array.device)
    begin, end = byte_bounds(made.array)
    stream = current_streams.get(array.device, 0)
    here = emulator().device
    emulator().device = array.device
    emulator().fill(begin, end - begin, stream=stream)
    emulator().device = here
    return made


def _current_stream(device: int) -> int:
    return current_streams.get(device, 0)


def _producer(_module: ModuleType) -> buffers.Producer:
    columns = {"name": __name__, "zeros_like": _zeros_like, "current_stream": _current_stream}
    known = {name: columns[name] for name in columns if name in buffers.Producer._fields}
    return buffers._UNKNOWN._replace(**known)
