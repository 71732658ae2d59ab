"""A GPU for tests of fusedstep.torch: a real one, or the emulated one (device_arrays.py).

The tensors of the emulated one have the host's memory, where torch's own operations work at once.
To fusedstep they are on a GPU: their exchange table says so, as that of CUDA tensors does. What
would make the host wait for a GPU raises.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import device_arrays
import dlpack
from torch_twins import FORMS, give_gradients, ours, parameters, same_state, torch

_NAME = b"dlpack_exchange_api"
# What torch calls to get values of a tensor to the host.
_READS = {
    *("__array__", "__bool__", "__float__", "__index__", "__int__"),
    *("cpu", "equal", "is_nonzero", "item", "nonzero", "numpy", "tolist"),
}


class HostRead(RuntimeError):
    """The host would have waited for a GPU."""


class _Exchange(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        *((name, ctypes.c_void_p) for name in ("before", "allocate", "export", "to_object")),
        ("describe", ctypes.c_void_p),
        ("current_stream", ctypes.c_void_p),
    )


_Describe = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(dlpack.Tensor))
_CurrentStream = ctypes.PYFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p)
)
# Storages by address: the caching allocator of CUDA gives no memory away that is in use.
_held: dict[int, Any] = {}


def _exchange_of_torch() -> _Exchange:
    capsule = torch.Tensor.__dlpack_c_exchange_api__
    return _Exchange.from_address(dlpack._pointer_of(id(capsule), _NAME))


@_Describe
def _describe(address: int, out: Any) -> int:
    failed: int = _Describe(_exchange_of_torch().describe)(address, out)
    if not failed:
        out.contents.device = dlpack.Device(dlpack.CUDA, 0)
        storage = ctypes.cast(address, ctypes.py_object).value.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in _held:
            _held[storage.data_ptr()] = storage
            device_arrays.emulator().register(storage.data_ptr(), storage.nbytes(), 0)
    return failed


@_CurrentStream
def _current_stream(_type: int, device: int, out: Any) -> int:
    out[0] = device_arrays.current_streams.get(device, 0)
    return 0


def _table() -> Any:
    table = _Exchange.from_buffer_copy(_exchange_of_torch())
    table.export = None
    table.describe = ctypes.cast(_describe, ctypes.c_void_p).value
    table.current_stream = ctypes.cast(_current_stream, ctypes.c_void_p).value
    return table, dlpack._make_capsule(ctypes.addressof(table), _NAME, None)


if torch is not None:
    _kept, _capsule = _table()
    _waits, _capturing = [False], [False]

    class DeviceTensor(torch.Tensor):
        """A tensor of the emulated device."""

        __dlpack_c_exchange_api__ = _capsule

        @classmethod
        def __torch_function__(
            cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if function.__name__ in _READS and not _waits[0]:
                raise HostRead(function.__name__)
            return super().__torch_function__(function, types, args, kwargs or {})


class Emulated:
    """The emulated device. Nothing runs before somebody looks, unless `at_once` is called."""

    def __init__(self, emulator: device_arrays.Emulator) -> None:
        self._emulator = emulator

    def to(self, tensor: Any) -> Any:
        """A copy on the device, a parameter if it is one; the gradient stays behind."""
        copy = tensor.detach().clone().as_subclass(DeviceTensor)
        return torch.nn.Parameter(copy) if isinstance(tensor, torch.nn.Parameter) else copy

    def host(self, tensor: Any) -> Any:
        """A copy for the host to look at."""
        self._emulator.run()
        with torch._C.DisableTorchFunctionSubclass():
            return tensor.detach().clone().as_subclass(torch.Tensor)

    def write(self, tensor: Any, values: Any) -> None:
        """Writes a tensor in place, after what is in the streams."""
        self._emulator.run()
        with torch.no_grad():
            tensor.copy_(values)

    def at_once(self) -> None:
        """Torch's own operations may follow the step: what is put into streams runs at once."""
        self._emulator.set(streams=device_arrays.STREAMS["at once"])

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The host may read tensors of the device."""
        before, _waits[0] = _waits[0], True
        self._emulator.run()
        try:
            yield
        finally:
            _waits[0] = before

    @contextmanager
    def never_waiting(self) -> Iterator[None]:
        """Fails if the host waits for the device."""
        before = self._emulator.calls("cudaStreamSynchronize")
        yield
        assert self._emulator.calls("cudaStreamSynchronize") == before

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Work is put into a stream of its own."""
        stream = self._emulator.new_stream()
        before = device_arrays.current_streams.get(0, 0)
        device_arrays.current_streams[0] = stream
        try:
            yield
            self._emulator.run()
        finally:
            device_arrays.current_streams[0] = before

    def capture(self, step: Callable[[], Any]) -> Callable[[], None]:
        """Captures a step into a graph; replays it when called."""
        stream = self._emulator.new_stream()
        before = device_arrays.current_streams.get(0, 0)
        device_arrays.current_streams[0] = stream
        _capturing[0] = True
        try:
            with self._emulator.capture(stream) as graphs:
                step()
        finally:
            _capturing[0] = False
            device_arrays.current_streams[0] = before
        return lambda: graphs[0].replay(before)

    def backward(self, optimizer: Any, grads: Iterable[Any]) -> None:
        """What a backward pass does that arrives at these gradients: autograd makes none here."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
            param.grad = self.to(grad)
            if optimizer._observer is not None:
                optimizer._observer.observe(index, param.grad)

    def close(self) -> None:
        """Gives the memory of all tensors back to the host."""
        for address in _held:
            self._emulator.unregister(address)
        _held.clear()


@contextmanager
def _quiet(message: str) -> Iterator[None]:
    """Without a warning of torch's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message)
        yield


class Cuda:
    """The GPU of this machine, with the same methods."""

    def to(self, tensor: Any) -> Any:
        copy = tensor.detach().to("cuda", copy=True)
        return torch.nn.Parameter(copy) if isinstance(tensor, torch.nn.Parameter) else copy

    def host(self, tensor: Any) -> Any:
        return tensor.detach().cpu()

    def write(self, tensor: Any, values: Any) -> None:
        with torch.no_grad():
            tensor.copy_(values)

    def at_once(self) -> None:
        """Everything is in the order of the stream."""

    def waiting(self) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def never_waiting(self) -> Iterator[None]:
        with _quiet("Synchronization debug mode is a prototype"):
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @contextmanager
    def stream(self) -> Iterator[None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)

    def capture(self, step: Callable[[], Any]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with _quiet("The CUDA Graph is empty"), torch.cuda.graph(graph):
            step()
        replay: Callable[[], None] = graph.replay
        return replay

    def backward(self, optimizer: Any, grads: Iterable[Any]) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        terms = [(p * self.to(g)).sum() for p, g in zip(params, grads, strict=True)]
        optimizer.zero_grad()
        torch.stack(terms).sum().backward()

    def close(self) -> None:
        """Nothing is held."""


SHAPES = [(7,), (0,), (33, 3), (16_385,)]


class Twins:
    """The same optimizer on the CPU and on a device."""

    def __init__(
        self, device: Any, name: str, dtype: str = "float32", shapes: Any = None, **kwargs: Any
    ) -> None:
        self.device = device
        make, both = getattr(ours, name), shapes or SHAPES
        kwargs = {**FORMS[name][1], **kwargs}
        self.params = parameters(both, dtype)
        self.cpu = make(self.params, **kwargs)
        self.on_device = [device.to(p) for p in self.params]
        self.gpu = make(self.on_device, **kwargs)

    def give(self, seed: int, factor: float = 1.0, bad: float | None = None) -> None:
        """The same gradients to both; those of the device at the same places if there are any."""
        give_gradients(self.params, seed)
        for mine, other in zip(self.params, self.on_device, strict=True):
            mine.grad *= factor
            if bad is not None and mine.numel():
                mine.grad.view(-1)[0] = bad
            if other.grad is None:
                other.grad = self.device.to(mine.grad)
            else:
                self.device.write(other.grad, mine.grad)

    def step(self, seed: int, **given: Any) -> None:
        self.give(seed, **given)
        self.cpu.step()
        self.gpu.step()

    def step_without_waiting(self, seed: int, **given: Any) -> None:
        """One step of both, in which the host does not wait for the device."""
        self.give(seed, **given)
        self.cpu.step()
        with self.device.never_waiting():
            self.gpu.step()

    def check(self) -> None:
        """Fails unless parameters, states and counts are the same."""
        for mine, other in zip(self.params, self.on_device, strict=True):
            found, expected = self.device.host(other), mine.detach()
            both_nan = found.isnan() & expected.isnan()
            assert ((found == expected) | both_nan).all()
        assert self.gpu.skipped_steps == self.cpu.skipped_steps
        assert same_state(self.state_on_host(), self.cpu.state_dict())

    def state_on_host(self) -> dict[str, Any]:
        """The state dict of the optimizer on the device, with tensors of the host."""
        with self.device.waiting():
            state = self.gpu.state_dict()
        values = {
            key: {name: self.device.host(value) for name, value in entries.items()}
            for key, entries in state["state"].items()
        }
        return {**state, "state": values}
