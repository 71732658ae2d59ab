"""What differs by the library an array comes from. One table; no framework is ever imported.

The compiled core reads any array by itself (NumPy struct, DLPack, buffer protocol). What it cannot
know is how that library makes an array, what has to happen after a write behind its back, whether
its arrays may be written at all, and on which stream of a GPU it works.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fusedstep import _core

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Producer(NamedTuple):
    """A library whose arrays are used.

    Attributes:
        name: Root module of its array types; "" for any library that the table does not know.
        immutable: Writing into its arrays is undefined behaviour, whatever flags they show.
        zeros_like: `(array, dtype name or None) -> array` of zeros with the array's shape, strides
            and device, without gradient; None picks the dtype of a state. None if immutable.
        after_write: Called with the list of arrays that were written; None if nothing is to be
            done.
        current_stream: `(number of a device) -> stream` on which the library works now: a handle,
            or an object that has one. None if it has none, or its exchange table tells.
    """

    name: str
    immutable: bool
    zeros_like: Callable[..., Any] | None
    after_write: Callable[[list[Any]], None] | None
    current_stream: Callable[[int], Any] | None = None


def state_dtype(dtype: str) -> str:
    """The dtype of the state that belongs to a parameter: float32 where that is a 16-bit type."""
    return "float32" if dtype in {"float16", "bfloat16"} else dtype


def _dtype_of_state(array: Any, dtype: str | None) -> str:
    return dtype or state_dtype(_core.describe(array)[1])


def _numpy_dtype(name: str) -> np.dtype[Any]:
    if name != "bfloat16":
        return np.dtype(name)
    if "ml_dtypes" not in sys.modules:
        raise TypeError("a bfloat16 NumPy array needs the package ml_dtypes to be imported")
    found: np.dtype[Any] = np.dtype(sys.modules["ml_dtypes"].bfloat16)
    return found


def _numpy(_module: ModuleType) -> Producer:
    def zeros_like(array: Any, dtype: str | None = None) -> Any:
        chosen = _numpy_dtype(_dtype_of_state(array, dtype))
        return np.zeros_like(array, chosen, order="K", subok=False)

    return Producer("numpy", False, zeros_like, None)


def _torch(torch: ModuleType) -> Producer:
    def zeros_like(array: Any, dtype: str | None = None) -> Any:
        chosen = getattr(torch, _dtype_of_state(array, dtype))
        return torch.zeros_like(
            array, dtype=chosen, memory_format=torch.preserve_format, requires_grad=False
        )

    # Without it autograd would not notice the write and compute wrong gradients from a graph that
    # saved the old value.
    increment_version = torch.autograd.graph.increment_version
    stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # builds without CUDA lack it
    try:
        increment_version([])
    except (TypeError, AttributeError):  # torch before 2.4 takes one tensor

        def after_write(arrays: list[Any]) -> None:
            for array in arrays:
                increment_version(array)

        return Producer("torch", False, zeros_like, after_write, stream)
    return Producer("torch", False, zeros_like, increment_version, stream)


def _cupy(cupy: ModuleType) -> Producer:
    def zeros_like(array: Any, dtype: str | None = None) -> Any:
        with array.device:  # not where CuPy happens to be
            return cupy.zeros_like(array, dtype=_dtype_of_state(array, dtype))

    def current_stream(device: int) -> Any:
        with cupy.cuda.Device(device):
            return cupy.cuda.get_current_stream()

    return Producer("cupy", False, zeros_like, None, current_stream)


def _paddle(paddle: ModuleType) -> Producer:
    def zeros_like(array: Any, dtype: str | None = None) -> Any:
        return paddle.zeros_like(array, dtype=_dtype_of_state(array, dtype))

    def after_write(arrays: list[Any]) -> None:
        for array in arrays:
            array._bump_inplace_version()

    return Producer("paddle", False, zeros_like, after_write)


def _immutable(module: ModuleType) -> Producer:
    return Producer(module.__name__, True, None, None)


def _zeros_in_numpy(array: Any, dtype: str | None = None) -> Any:
    device = _core.device(array)
    if device != "cpu":
        raise TypeError(
            f"zeros cannot be made on {device} for an array of {type(array).__module__}, whose "
            "library is not known; pass buffers of zeros"
        )
    chosen = _numpy_dtype(_dtype_of_state(array, dtype))
    return np.zeros_like(_core.array_view(array), chosen, order="K")


_UNKNOWN = Producer("", False, _zeros_in_numpy, None)

_TABLE: dict[str, Callable[[ModuleType], Producer]] = {
    "numpy": _numpy,
    "torch": _torch,
    "cupy": _cupy,
    "paddle": _paddle,
    "jax": _immutable,
    "jaxlib": _immutable,
    "tensorflow": _immutable,
    "mlx": _immutable,
}


def producer_of(kind: type) -> Producer:
    """The entry of an array type; subclasses defined elsewhere count as their library's."""
    for base in kind.__mro__:
        root = str(base.__module__).partition(".")[0]
        if root in _TABLE and root in sys.modules:
            return _TABLE[root](sys.modules[root])
    return _UNKNOWN


_core.set_producer_lookup(producer_of)


def dtype_of(array: Any) -> str:
    """The name of an array's dtype."""
    return array.dtype if isinstance(array, Stored) else _core.describe(array)[1]


def shape_of(array: Any) -> tuple[int, ...]:
    """The shape of an array."""
    return array.bits.shape if isinstance(array, Stored) else _core.describe(array)[0]


class Stored(NamedTuple):
    """An array out of a file: NumPy has no bfloat16, so that its elements come as uint16."""

    bits: NDArray[Any]
    dtype: str


def stored(array: Any) -> Stored:
    """Any array as it would be stored; no copy unless it is on a device."""
    if isinstance(array, Stored):
        return array
    return Stored(_core.to_host(array), _core.describe(array)[1])


def copy_like(param: Any, buffer: Any) -> Any:
    """A copy of a state buffer in the library, strides and device of its parameter."""
    bits, dtype = stored(buffer)
    make = producer_of(type(param)).zeros_like
    if make is None:
        raise TypeError(f"params: arrays of {type(param).__module__} are immutable")
    made = make(param, dtype)
    _core.write(made, bits)
    return made


def check_writable(array: Any) -> None:
    """Refuses an array of the CPU's that cannot be written."""
    if _core.device(array) == "cpu":
        _core.array_view(array, writable=True)


def note_writes(arrays: list[Any]) -> None:
    """Tells the libraries of `arrays` that these were written from outside."""
    for array in arrays:
        after_write = producer_of(type(array)).after_write
        if after_write is not None:
            after_write([array])
