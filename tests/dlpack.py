"""The C structures of DLPack, and capsules of them: what tests build producers from."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from exact import Array

CPU, CUDA = 1, 2
INT, UINT, FLOAT, BFLOAT, COMPLEX, BOOL = 0, 1, 2, 4, 5, 6
READ_ONLY, IS_COPIED = 1, 2
CODES = {"f": FLOAT, "V": BFLOAT, "i": INT, "u": UINT, "c": COMPLEX, "b": BOOL}


class Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class Type(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", Device),
        ("ndim", ctypes.c_int32),
        ("dtype", Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Managed(ctypes.Structure):
    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", Deleter))


class Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", Deleter),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )


_make_capsule = ctypes.pythonapi.PyCapsule_New
_make_capsule.restype = ctypes.py_object
_make_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
# By address: a capsule that is being destroyed must not be referenced again.
_name_of = ctypes.pythonapi.PyCapsule_GetName
_name_of.restype, _name_of.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]


_KINDS = {b"dltensor": Managed, b"dltensor_versioned": Versioned}


@ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
def _destroy(capsule: int) -> None:
    """What a producer's capsule destructor does: an unconsumed capsule frees its tensor."""
    name = _name_of(capsule)
    if name in _KINDS:
        address = _pointer_of(capsule, name)
        _KINDS[name].from_address(address).deleter(address)


def tensor_in(capsule: Any) -> Tensor:
    """The tensor of a capsule, which has to outlive it, and has not been consumed."""
    name = _name_of(id(capsule))
    return _KINDS[name].from_address(_pointer_of(id(capsule), name)).tensor


def new_capsule(managed: Managed | Versioned, name: bytes) -> Any:
    """A capsule; the structure and the name have to outlive it."""
    destroy = ctypes.cast(_destroy, ctypes.c_void_p)
    return _make_capsule(ctypes.addressof(managed), name, destroy)


def tensor_of(
    array: Array,
    *,
    device: int = CPU,
    device_id: int = 0,
    data: Any = ...,
    byte_offset: int = 0,
    shape: Sequence[int] | None = None,
    strides: Any = ...,
    code: int | None = None,
    lanes: int = 1,
    **_others: Any,
) -> tuple[Tensor, Any]:
    """How an array is described, but for what the arguments say; and what has to be kept alive."""
    if shape is None:
        shape = array.shape
    if strides is ...:
        strides = tuple(s // array.itemsize for s in array.strides)
    c_shape = (ctypes.c_int64 * max(len(shape), 1))(*shape)
    c_strides = None if strides is None else (ctypes.c_int64 * max(len(strides), 1))(*strides)
    tensor = Tensor(
        array.ctypes.data if data is ... else data,
        Device(device, device_id),
        len(shape),
        Type(CODES[array.dtype.kind] if code is None else code, array.itemsize * 8, lanes),
        c_shape,
        c_strides,
        byte_offset,
    )
    return tensor, (c_shape, c_strides)
