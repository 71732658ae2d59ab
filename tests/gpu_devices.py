"""Devices that the GPU tests run on: the emulated one, and a GPU by torch's and by CuPy's arrays.

All of them do the same, so that a test is written once: the fixture `device` gives it each.
"""

from __future__ import annotations

import ctypes
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import device_arrays
import numpy as np
from device_arrays import DeviceArray, byte_bounds
from exact import DTYPES, Array

BORDER = 256  # bytes before and behind each array, which nobody may write
MARK = 0xA5


class Captured:
    """A graph in the making; `replay` puts it into the library's current stream once more.

    Attributes:
        replay: None while it is being captured.
        kernels: How many it consists of, if that can be told; there is nothing else in it then.
    """

    replay: Callable[[], None] | None = None
    kernels: int | None = None

    def __call__(self) -> None:
        assert self.replay is not None
        self.replay()


class Device(ABC):
    """What tests need of a device and of the library whose arrays are on it."""

    name: str
    has_negative_strides = True

    # --- arrays ---

    def has(self, dtype: str) -> bool:
        """Whether the library has arrays of this dtype."""
        return dtype in DTYPES

    @abstractmethod
    def array(self, values: Array, offset: int = 0) -> Any:
        """A copy with the same strides, `offset` elements beyond a multiple of 256 bytes."""

    @abstractmethod
    def is_array(self, item: Any) -> bool:
        """Whether it is one of this library's."""

    @abstractmethod
    def numpy(self, array: Any) -> Array:
        """A copy on the host, after everything in all streams has run."""

    @abstractmethod
    def write(self, array: Any, values: Any) -> None:
        """Writes into an array, after everything in all streams has run."""

    def number(self, value: float, dtype: str = "float32") -> Any:
        """An array of one element."""
        return self.array(np.array(value, DTYPES.get(dtype, np.dtype(dtype))))

    def put(self, tree: Any, offset: int = 0) -> Any:
        """The same tree with copies of its arrays, each one element further off than the last."""
        arrays = iter(range(offset, 1 << 30))
        return mapped(tree, lambda item: isinstance(item, np.ndarray),
                      lambda item: self.array(item, next(arrays) % 4))  # fmt: skip

    def fetch(self, tree: Any) -> Any:
        """The same tree with the arrays of this device copied back."""
        return mapped(tree, self.is_array, self.numpy)

    # --- streams ---

    @abstractmethod
    def synchronize(self) -> None:
        """Waits for everything in all streams."""

    @abstractmethod
    def stream(self) -> Any:
        """A new stream of the library, which waits for no other."""

    @abstractmethod
    def using(self, stream: Any) -> Any:
        """In its context it is the library's current stream."""

    @abstractmethod
    def capture(self) -> Any:
        """A context that captures what its block puts into the library's current stream."""

    def kernels(self, run: Callable[[], Any]) -> int | None:
        """How many kernels of ours `run` launches; None if that cannot be told."""
        del run
        return None

    @abstractmethod
    def check(self) -> None:
        """The end of a test: nothing may have been written beside the arrays."""


def mapped(tree: Any, is_leaf: Callable[[Any], bool], change: Callable[[Any], Any]) -> Any:
    """The same tree of dicts, lists and tuples with some of its leaves changed."""
    if is_leaf(tree):
        return change(tree)
    if isinstance(tree, dict):
        return {key: mapped(value, is_leaf, change) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(mapped(value, is_leaf, change) for value in tree)
    return tree


def span(values: Array) -> tuple[Array, int]:
    """The bytes that an array spans, and which of them is the first of its first element."""
    begin, end = byte_bounds(values)
    held = (ctypes.c_uint8 * (end - begin)).from_address(begin) if end > begin else b""
    return np.frombuffer(held, np.uint8).copy(), values.ctypes.data - begin


# --- the emulator -----------------------------------------------------------------------------


class Emulated(Device):
    """The emulated device. What it watches by itself is checked by the fixture `emulator`."""

    name = "emulated"

    @property
    def emulator(self) -> device_arrays.Emulator:
        return device_arrays.emulator()

    def array(self, values: Array, offset: int = 0) -> DeviceArray:
        content, first = span(values)
        memory = np.full(len(content) + 512, 0xCD, np.uint8)
        begin = -memory.ctypes.data % 256 + offset * values.itemsize
        memory[begin : begin + len(content)] = content
        made: Array = np.ndarray(
            values.shape, values.dtype, memory.data, begin + first, values.strides
        )
        return DeviceArray(made)

    def is_array(self, item: Any) -> bool:
        return isinstance(item, DeviceArray)

    def numpy(self, array: DeviceArray) -> Array:
        return array.numpy()

    def write(self, array: DeviceArray, values: Any) -> None:
        self.synchronize()
        array.array[...] = values

    def synchronize(self) -> None:
        self.emulator.run()

    def stream(self) -> int:
        return self.emulator.new_stream()

    @contextmanager
    def using(self, stream: int) -> Iterator[None]:
        before = device_arrays.current_streams.get(0, 0)
        device_arrays.current_streams[0] = stream
        try:
            yield
        finally:
            device_arrays.current_streams[0] = before

    @contextmanager
    def capture(self) -> Iterator[Captured]:
        captured, stream = Captured(), self.stream()
        with self.using(stream), self.emulator.capture(stream) as made:
            yield captured
        graph = made[0]
        assert set(graph.nodes) <= {"kernel"}, graph.nodes
        captured.kernels = len(graph.nodes)
        captured.replay = lambda: graph.replay(device_arrays.current_streams.get(0, 0))

    def kernels(self, run: Callable[[], Any]) -> int:
        before = self.emulator.count("launched")
        run()
        return self.emulator.count("launched") - before

    def check(self) -> None:
        pass


# --- GPUs -------------------------------------------------------------------------------------


class Gpu(Device):
    """What is alike for both libraries: each array lies in the middle of one of bytes."""

    def __init__(self) -> None:
        self._held: list[tuple[Any, int, int]] = []

    def _place(self, values: Array, offset: int) -> tuple[Any, int]:
        """An array of bytes, and where in it the first element is."""
        content, first = span(values)
        begin = BORDER + offset * values.itemsize
        memory = np.full(begin + len(content) + BORDER, MARK, np.uint8)
        memory[begin : begin + len(content)] = content
        held = self._upload(memory)
        self._held.append((held, begin, begin + len(content)))
        return held, begin + first

    @abstractmethod
    def _upload(self, memory: Array) -> Any:
        """A copy of bytes."""

    def check(self) -> None:
        self.synchronize()
        for held, begin, end in self._held:
            memory = self.numpy(held)
            assert np.all(memory[:begin] == MARK), "something was written before an array"
            assert np.all(memory[end:] == MARK), "something was written behind an array"


class Torch(Gpu):
    """A GPU by torch's tensors. `where` is another device than a GPU to test this class itself."""

    name = "torch"
    has_negative_strides = False

    def __init__(self, where: str = "cuda") -> None:
        super().__init__()
        self.torch = importlib.import_module("torch")
        self.where = where
        if where == "cuda":
            assert self.torch.cuda.is_available(), "torch sees no GPU"

    def _upload(self, memory: Array) -> Any:
        return self.torch.from_numpy(memory).to(self.where)

    def array(self, values: Array, offset: int = 0) -> Any:
        held, first = self._place(values, offset)
        size = values.itemsize
        whole = held[: held.numel() // size * size].view(getattr(self.torch, values.dtype.name))
        strides = [s // size for s in values.strides]
        return whole.as_strided(values.shape, strides, first // size)

    def is_array(self, item: Any) -> bool:
        return isinstance(item, self.torch.Tensor)

    def numpy(self, array: Any) -> Array:
        self.synchronize()
        host = array.detach().cpu()
        if host.dtype != self.torch.bfloat16:
            return host.numpy().copy()
        return host.view(self.torch.int16).numpy().view(DTYPES["bfloat16"]).copy()

    def write(self, array: Any, values: Any) -> None:
        self.synchronize()
        values = np.asarray(values, DTYPES.get(str(array.dtype).removeprefix("torch.")))
        content = np.array(np.broadcast_to(values, tuple(array.shape)), order="C")
        if content.dtype.name == "bfloat16":
            made = self.torch.from_numpy(content.view(np.int16)).view(self.torch.bfloat16)
        else:
            made = self.torch.from_numpy(content)
        array.copy_(made)
        self.synchronize()

    def synchronize(self) -> None:
        if self.where == "cuda":
            self.torch.cuda.synchronize()

    def stream(self) -> Any:
        return self.torch.cuda.Stream()

    def using(self, stream: Any) -> Any:
        return self.torch.cuda.stream(stream)

    @contextmanager
    def capture(self) -> Iterator[Captured]:
        captured, graph = Captured(), self.torch.cuda.CUDAGraph()
        self.synchronize()
        with self.torch.cuda.graph(graph):
            yield captured
        captured.replay = graph.replay

    def kernels(self, run: Callable[[], Any]) -> int:
        profiler = self.torch.profiler
        self.synchronize()
        with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as profile:
            run()
            self.synchronize()
        return sum(
            event.device_type == self.torch.autograd.DeviceType.CUDA and "fusedstep" in event.name
            for event in profile.events()
        )


class CuPy(Gpu):
    """A GPU by CuPy's arrays."""

    name = "cupy"

    def __init__(self) -> None:
        super().__init__()
        self.cupy = importlib.import_module("cupy")

    def has(self, dtype: str) -> bool:
        if dtype != "bfloat16":
            return super().has(dtype)
        try:  # newer versions have it by way of ml_dtypes
            self.cupy.zeros(1, DTYPES[dtype]).__dlpack__()
        except (KeyError, TypeError, ValueError, BufferError):
            return False
        return True

    def _upload(self, memory: Array) -> Any:
        return self.cupy.asarray(memory)

    def array(self, values: Array, offset: int = 0) -> Any:
        held, first = self._place(values, offset)
        return self.cupy.ndarray(values.shape, values.dtype, held.data + first, values.strides)

    def is_array(self, item: Any) -> bool:
        return isinstance(item, self.cupy.ndarray)

    def numpy(self, array: Any) -> Array:
        self.synchronize()
        copied: Array = self.cupy.asnumpy(array)
        return copied

    def write(self, array: Any, values: Any) -> None:
        self.synchronize()
        array[...] = self.cupy.asarray(np.asarray(values, array.dtype))
        self.synchronize()

    def synchronize(self) -> None:
        self.cupy.cuda.Device().synchronize()

    def stream(self) -> Any:
        return self.cupy.cuda.Stream(non_blocking=True)

    def using(self, stream: Any) -> Any:
        return stream

    @contextmanager
    def capture(self) -> Iterator[Captured]:
        captured, stream = Captured(), self.stream()
        self.synchronize()
        with stream:
            stream.begin_capture()
            try:
                yield captured
            finally:
                graph = stream.end_capture()
        captured.replay = lambda: graph.launch(self.cupy.cuda.get_current_stream())


KINDS: dict[str, type[Device]] = {"emulated": Emulated, "torch": Torch, "cupy": CuPy}
