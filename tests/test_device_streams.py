"""On which stream a step runs, and what arrays are asked with."""

from __future__ import annotations

import ctypes
import types
from collections.abc import Iterator
from typing import Any

import device_arrays
import fusedstep as fs
import numpy as np
import pytest
from device_arrays import STREAMS, DeviceArray, Emulator, to_device
from fusedstep import _core, buffers

VALUES = np.arange(1.0, 6.0, dtype=np.float32)
STEPPED = VALUES - np.float32(0.5) * VALUES


def ran_on(emulator: Emulator, stream: int, array: DeviceArray) -> bool:
    """Whether what was put into the streams is all in this one."""
    emulator.synchronize(stream)
    return emulator.count("pending") == 0 and array.array.tobytes() == STEPPED.tobytes()


@pytest.fixture
def stream(emulator: Emulator) -> int:
    """A stream beside the default one, where nothing runs before somebody waits for it."""
    emulator.set(streams=STREAMS["late"])
    return emulator.new_stream()


class Torch:
    """A stream as torch has it."""

    def __init__(self, handle: int) -> None:
        self.cuda_stream = handle


class CuPy:
    """A stream as CuPy has it."""

    def __init__(self, handle: int) -> None:
        self.ptr = handle


class Protocol:
    """A stream of any library."""

    def __init__(self, handle: int, version: int = 0) -> None:
        self.pair = (version, handle)

    def __cuda_stream__(self) -> tuple[int, int]:
        return self.pair


@pytest.mark.parametrize("kind", [int, Torch, CuPy, Protocol])
def test_a_given_stream(emulator: Emulator, stream: int, kind: Any) -> None:
    """Nothing is asked of the arrays then: the caller has seen to the order."""
    device_arrays.current_streams[0] = emulator.new_stream()
    param, grad = to_device(VALUES), to_device(VALUES)
    fs.fused_sgd_step(param, grad, lr=0.5, stream=kind(stream))
    assert ran_on(emulator, stream, param)
    assert [a.asked[-1]["stream"] for a in (param, grad)] == [-1, -1]


@pytest.mark.parametrize("object_form", [False, True])
def test_the_current_stream_of_the_library(
    emulator: Emulator, stream: int, object_form: bool
) -> None:
    device_arrays.current_streams[0] = stream
    param, grad = to_device(VALUES), to_device(VALUES)
    if object_form:
        fs.SGD(param, lr=0.5).step(grad)
    else:
        fs.fused_sgd_step(param, grad, lr=0.5)
    assert ran_on(emulator, stream, param)
    assert {a.asked[-1]["stream"] for a in (param, grad)} == {-1}
    assert param.asked[-1]["max_version"] == (1, 3)


def test_the_stream_of_the_device_of_the_array(emulator: Emulator, stream: int) -> None:
    emulator.set(devices=2)
    emulator.device = 1
    device_arrays.current_streams.update({0: stream, 1: emulator.new_stream()})
    emulator.device = 0
    param = to_device(VALUES, 1)
    fs.fused_sgd_step(param, to_device(VALUES, 1), lr=0.5)
    assert ran_on(emulator, device_arrays.current_streams[1], param)
    assert emulator.device == 0


class Stranger(DeviceArray):
    """An array of a library that the table does not know: its stream is not known either."""


class Interface(Stranger):
    """One that has NumPy's interface for devices."""

    stream: Any = None

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"stream": self.stream}


@pytest.fixture
def strangers() -> Iterator[None]:
    """Types of this module are no arrays of `device_arrays`."""
    original = buffers.producer_of

    def lookup(kind: type) -> buffers.Producer:
        return buffers._UNKNOWN if issubclass(kind, Stranger) else original(kind)

    _core.set_producer_lookup(lookup)
    yield
    _core.set_producer_lookup(original)


@pytest.mark.usefixtures("strangers", "stream")
def test_without_any_the_default_stream(emulator: Emulator) -> None:
    """Nobody knows where such a library works: it has to wait for itself."""
    param, grad = Stranger(VALUES.copy()), Stranger(VALUES.copy())
    fs.fused_sgd_step(param, grad, lr=0.5)
    assert ran_on(emulator, 0, param)
    assert [a.asked[-1]["stream"] for a in (param, grad)] == [1, 1]


@pytest.mark.usefixtures("strangers")
@pytest.mark.parametrize(("told", "asked"), [(1, -1), (None, 1), ("stream", -1)])
def test_the_stream_of_the_array_interface(
    emulator: Emulator, stream: int, told: Any, asked: int
) -> None:
    param = Interface(VALUES.copy())
    param.stream = stream if told == "stream" else told
    fs.fused_sgd_step(param, to_device(VALUES), lr=0.5)
    assert ran_on(emulator, stream if told == "stream" else 0, param)
    assert param.asked[-1]["stream"] == asked


@pytest.mark.usefixtures("strangers")
def test_gradients_of_another_library_wait(emulator: Emulator, stream: int) -> None:
    """The stream is that of the parameters; whoever works elsewhere is told which."""
    device_arrays.current_streams[0] = stream
    param, grad = to_device(VALUES), Stranger(VALUES.copy())
    fs.fused_sgd_step(param, grad, lr=0.5)
    assert grad.asked[-1]["stream"] == stream
    assert param.asked[-1]["stream"] == -1
    assert ran_on(emulator, stream, param)


# --- the exchange table of DLPack -----------------------------------------------------------------


class _Api(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("previous", ctypes.c_void_p),
        ("allocate", ctypes.c_void_p),
        ("from_object", ctypes.c_void_p),
        ("to_object", ctypes.c_void_p),
        ("tensor_of_object", ctypes.c_void_p),
        ("current_stream", ctypes.c_void_p),
    )


class Exchanging(DeviceArray):
    """An array whose type has an exchange table, as torch's."""

    current = 0


_asked: list[tuple[int, int]] = []


@ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p)
def _tensor_of_object(array: Any, out: int) -> int:
    import dlpack

    tensor, kept = dlpack.tensor_of(array.array, device=dlpack.CUDA, device_id=array.device)
    array.exported = kept
    ctypes.memmove(out, ctypes.addressof(tensor), ctypes.sizeof(tensor))
    return 0


@ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int32, ctypes.c_void_p)
def _current_stream(device_type: int, device: int, out: int) -> int:
    _asked.append((device_type, device))
    ctypes.c_void_p.from_address(out).value = Exchanging.current
    return 0


_api = _Api(
    1, 3, None, None, None, None,
    ctypes.cast(_tensor_of_object, ctypes.c_void_p), ctypes.cast(_current_stream, ctypes.c_void_p),
)  # fmt: skip
_NAME = b"dlpack_exchange_api"  # the capsule does not keep it
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
Exchanging.__dlpack_c_exchange_api__ = _new_capsule(ctypes.addressof(_api), _NAME, None)


def test_the_exchange_table_tells_the_stream(emulator: Emulator, stream: int) -> None:
    Exchanging.current = stream
    _asked.clear()
    param, grad = Exchanging(VALUES.copy()), Exchanging(VALUES.copy())
    fs.fused_sgd_step(param, grad, lr=0.5)
    assert ran_on(emulator, stream, param)
    assert _asked == [(2, 0)]
    assert param.asked == grad.asked == []  # nobody called __dlpack__


def test_gradients_of_an_exchange_table_wait(emulator: Emulator, stream: int) -> None:
    """They are imported without any order, which does not do for those of another stream."""
    side = emulator.new_stream()
    device_arrays.current_streams[0], Exchanging.current = stream, side
    param, grad = to_device(VALUES), Exchanging(VALUES.copy())
    fs.fused_sgd_step(param, grad, lr=0.5)
    assert [options["stream"] for options in grad.asked] == [stream]
    assert ran_on(emulator, stream, param)
    fs.fused_sgd_step(param, grad, lr=0.5, stream=stream)
    assert len(grad.asked) == 1  # who gives a stream sees to the order
    emulator.run()


# --- torch and CuPy, as far as the table goes -----------------------------------------------------


def test_rows_of_torch_and_cupy() -> None:
    """What the table does with the modules; nobody imports them."""
    calls: list[Any] = []
    torch = types.SimpleNamespace(
        autograd=types.SimpleNamespace(graph=types.SimpleNamespace(increment_version=print)),
        _C=types.SimpleNamespace(_cuda_getCurrentRawStream=lambda device: 100 + device),
    )
    made = buffers._torch(torch)
    assert made.current_stream is not None
    assert made.current_stream(3) == 103
    del torch._C._cuda_getCurrentRawStream  # a build for CPUs
    assert buffers._torch(torch).current_stream is None

    class Device:
        def __init__(self, number: int) -> None:
            self.number = number

        def __enter__(self) -> None:
            calls.append(("enter", self.number))

        def __exit__(self, *_: object) -> None:
            calls.append(("exit", self.number))

    def zeros_like(array: Any, dtype: str) -> Any:
        calls.append(("zeros", dtype))
        return array

    cuda = types.SimpleNamespace(Device=Device, get_current_stream=lambda: CuPy(7))
    cupy = buffers._cupy(types.SimpleNamespace(cuda=cuda, zeros_like=zeros_like))
    assert cupy.current_stream is not None
    assert cupy.current_stream(2).ptr == 7
    assert cupy.zeros_like is not None
    cupy.zeros_like(types.SimpleNamespace(device=Device(1)), "float32")
    inside = [("enter", 2), ("exit", 2), ("enter", 1), ("zeros", "float32"), ("exit", 1)]
    assert calls == inside


# --- state that is made -------------------------------------------------------------------------


def test_new_state_is_zero_before_a_given_stream_uses_it(emulator: Emulator, stream: int) -> None:
    """Its library zeroes it in its own stream, in which nothing has run by then."""
    param, grad = to_device(VALUES), to_device(VALUES)
    result = fs.fused_momentum_step(param, grad, lr=0.5, stream=stream)
    assert ran_on(emulator, stream, param)
    assert result.state["velocity"].array.tobytes() == VALUES.tobytes()


@pytest.mark.parametrize("seed", range(4))
def test_streams_at_random(emulator: Emulator, stream: int, seed: int) -> None:
    """The step and the making of its state are in one stream: no order of streams matters."""
    emulator.set(streams=STREAMS["random"], seed=seed)
    device_arrays.current_streams[0] = stream
    param, other = to_device(VALUES), emulator.new_stream()
    optimizer = fs.Momentum(param, lr=0.5, on_nonfinite="skip")
    kept = [to_device(VALUES) for _ in range(3)]
    emulator.fill(kept[2].array.ctypes.data, 4, stream=other)
    for grad in kept[:2]:
        optimizer.step(grad)
    assert optimizer.steps == 2
    expected = VALUES.copy()
    twin = fs.Momentum(expected, lr=0.5)
    for _ in range(2):
        twin.step(VALUES)
    assert param.numpy().tobytes() == expected.tobytes()


# --- what is no stream ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ("cuda", TypeError, r"stream: expected a stream of CUDA .*, got 'cuda'"),
        (True, TypeError, "stream: expected a stream of CUDA"),
        (1.0, TypeError, "stream: expected a stream of CUDA"),
        (types.SimpleNamespace(ptr="x"), TypeError, "stream: expected a stream of CUDA"),
        (types.SimpleNamespace(__cuda_stream__=lambda: 3), TypeError, "stream: expected a stream"),
        (-1, ValueError, "stream: -1 is no handle of a stream"),
        (1 << 70, ValueError, "stream: 1180591620717411303424 is no handle of a stream"),
        (2, ValueError, "stream: the per-thread default stream is not supported; use a stream of"),
        (Torch(2), ValueError, "stream: the per-thread default stream is not supported"),
    ],
)
@pytest.mark.parametrize("where", ["gpu", "cpu"])
@pytest.mark.usefixtures("emulator")
def test_what_is_no_stream(given: Any, error: type[Exception], text: str, where: str) -> None:
    make: Any = to_device if where == "gpu" else np.copy
    param = make(VALUES)
    with pytest.raises(error, match=text):
        fs.fused_sgd_step(param, make(VALUES), lr=0.5, stream=given)
    held = param.numpy() if where == "gpu" else param
    assert held.tobytes() == VALUES.tobytes()


def test_a_stream_says_nothing_to_the_cpu() -> None:
    param = VALUES.copy()
    fs.fused_sgd_step(param, VALUES, lr=0.5, stream=12345)
    assert param.tobytes() == STEPPED.tobytes()


@pytest.mark.parametrize("door", ["table", "exchange"])
def test_the_per_thread_stream_is_refused(emulator: Emulator, door: str) -> None:
    """It is another one in each thread, by one name."""
    device_arrays.current_streams[0] = Exchanging.current = 2
    make: Any = Exchanging if door == "exchange" else to_device
    with pytest.raises(ValueError, match="the current stream: the per-thread default stream is"):
        fs.fused_sgd_step(make(VALUES.copy()), make(VALUES.copy()), lr=0.5)
    assert emulator.count("pending") == 0


# --- what the host reads ------------------------------------------------------------------------


def test_a_checkpoint_waits_for_a_given_stream(emulator: Emulator, stream: int) -> None:
    param, grad = to_device(VALUES), to_device(VALUES)
    optimizer = fs.Momentum(param, lr=0.5)
    optimizer.step(grad, stream=stream)
    (entry,) = optimizer.state_dict()["state"].values()
    assert _core.to_host(entry["velocity"]).tobytes() == VALUES.tobytes()
    waited = emulator.calls("cudaStreamSynchronize")
    optimizer._plan.get_state(0)
    assert emulator.calls("cudaStreamSynchronize") == waited  # once is enough


class Unknown:
    """What tells nothing but its memory."""

    def __init__(self, array: DeviceArray) -> None:
        self.array, self.asked = array, array.asked

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)


@pytest.mark.usefixtures("emulator")
def test_reading_asks_for_order() -> None:
    array = Unknown(to_device(np.array([0.5], np.float32)))
    assert _core.read_scalar(array) == _core.to_host(array)[0] == 0.5
    assert [options["stream"] for options in array.asked] == [1, 1]
