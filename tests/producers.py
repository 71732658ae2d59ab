"""Array libraries in miniature: DLPack producers that are honest, old, odd, or lying."""

from __future__ import annotations

import ctypes
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from exact import Array

CPU, CUDA = 1, 2
INT, UINT, FLOAT, BFLOAT, COMPLEX = 0, 1, 2, 4, 5
READ_ONLY, IS_COPIED = 1, 2


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _Type(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", _Deleter),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
# By address: a capsule that is being destroyed must not be referenced again.
_name_of = ctypes.pythonapi.PyCapsule_GetName
_name_of.restype, _name_of.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]


@ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
def _destroy(capsule: int) -> None:
    """What a producer's capsule destructor does: an unconsumed capsule frees its tensor."""
    name = _name_of(capsule)
    kind = {b"dltensor": _Managed, b"dltensor_versioned": _Versioned}.get(name)
    if kind is not None:
        address = _pointer_of(capsule, name)
        kind.from_address(address).deleter(address)


class Odd:
    """A producer whose capsule says what the test wants, true or not.

    `deleted` counts how often the memory was given back.
    """

    def __init__(self, array: Array, *, versioned: bool = True, **lies: Any) -> None:
        self.array, self.versioned, self.lies = array, versioned, lies
        self.deleted = 0
        self._kept: list[Any] = []  # C structures must outlive their capsules

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.lies.get("device", CPU), 0

    def __dlpack__(self, **options: Any) -> Any:
        if not self.versioned and options:
            raise TypeError("unexpected keyword argument")
        tensor = self._tensor()
        if self.versioned:
            major, flags = self.lies.get("major", 1), self.lies.get("flags", 0)
            managed = _Versioned(major, 0, None, self._deleter(), flags, tensor)
            name = b"dltensor_versioned"
        else:
            managed, name = _Managed(tensor, None, self._deleter()), b"dltensor"
        self._kept.append(managed)
        name = self.lies.get("name", name)
        self._kept.append(name)
        return _new_capsule(ctypes.addressof(managed), name, ctypes.cast(_destroy, ctypes.c_void_p))

    def _deleter(self) -> Any:
        def delete(_: int) -> None:
            self.deleted += 1

        self._kept.append(_Deleter(delete))
        return self._kept[-1]

    def _tensor(self) -> _Tensor:
        lies, array = self.lies, self.array
        shape = lies.get("shape", array.shape)
        strides = lies.get("strides", tuple(s // array.itemsize for s in array.strides))
        c_shape = (ctypes.c_int64 * max(len(shape), 1))(*shape)
        c_strides = None if strides is None else (ctypes.c_int64 * max(len(strides), 1))(*strides)
        self._kept += [c_shape, c_strides]
        code = {"f": FLOAT, "V": BFLOAT, "i": INT, "u": UINT, "c": COMPLEX}[array.dtype.kind]
        return _Tensor(
            lies.get("data", array.ctypes.data),
            _Device(lies.get("device", CPU), 0),
            len(shape),
            _Type(lies.get("code", code), array.itemsize * 8, lies.get("lanes", 1)),
            c_shape,
            c_strides,
            lies.get("byte_offset", 0),
        )


class Versioned:
    """DLPack 1.x, by NumPy."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return CPU, 0


class Legacy(Versioned):
    """DLPack from before 1.0: no keyword but `stream`, an unversioned capsule."""

    def __dlpack__(self, stream: Any = None) -> Any:
        return self.array.__dlpack__()


class Broken(Versioned):
    """Raises when it is asked for its memory."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __dlpack__(self, **options: Any) -> Any:
        raise self.error


def of_module(module: str) -> Callable[[Array], Any]:
    """A legacy producer whose type claims to be from another library."""
    return type("Array", (Legacy,), {"__module__": module})


def pretend_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts stand-ins for the libraries of immutable arrays into `sys.modules`."""
    for name in ("jax", "jaxlib", "tensorflow", "mlx"):
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))


class Watched(np.ndarray):
    """A NumPy subclass, as a user may have one."""


def unaligned(values: Array) -> Array:
    """A copy whose elements are not aligned to their size."""
    memory = np.zeros(values.nbytes + 1, np.uint8)
    view = memory[1:].view(values.dtype).reshape(values.shape)
    view[...] = values
    assert values.itemsize == 1 or not view.flags.aligned
    return view
