"""Checkpoints as safetensors files, written by that library; reading needs no package.

The text of a checkpoint stands in the metadata under `fusedstep.json`. The format has no check
sums: those of the text and of all tensors stand beside it, under `fusedstep.crc32`.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from fusedstep.buffers import Stored

if TYPE_CHECKING:
    from numpy.typing import NDArray

TEXT, SUMS = "fusedstep.json", "fusedstep.crc32"
# What the format calls a dtype: our name of it, and the NumPy dtype of its elements' bits.
_DTYPES = {
    "F64": ("float64", "<f8"),
    "F32": ("float32", "<f4"),
    "F16": ("float16", "<f2"),
    "BF16": ("bfloat16", "<u2"),
}


# --- writing --------------------------------------------------------------------------------------


def write(path: Path, text: str, arrays: Mapping[str, Stored]) -> None:
    """Writes text and arrays to a file; the library puts one of its own under that name."""
    library = _library()
    kept = {name: np.asarray(array.bits, order="C") for name, array in arrays.items()}
    sums = _sums(text, kept)
    tensors = {
        name: _tensor(library, bits, arrays[name].dtype) for name, bits in kept.items()
    }  # `kept` lives until they are written: they may be bare addresses
    try:
        library.serialize_file(tensors, path, {TEXT: text, SUMS: json.dumps(sums)})
    except library.SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def _sums(text: str, arrays: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    of_arrays = {name: zlib.crc32(bits.data) for name, bits in arrays.items()}
    return {TEXT: zlib.crc32(text.encode()), **of_arrays}


def _library() -> Any:
    try:
        return importlib.import_module("safetensors")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "writing .safetensors needs the package safetensors: "
            "pip install 'fusedstep[safetensors]'",
            name="safetensors",
        ) from error


def _tensor(library: Any, bits: NDArray[Any], dtype: str) -> Any:
    if not hasattr(library, "TensorSpec"):  # older releases take bytes
        return {"dtype": dtype, "shape": bits.shape, "data": bits.tobytes()}
    return library.TensorSpec(
        dtype=dtype, shape=bits.shape, data_ptr=bits.ctypes.data, data_len=bits.nbytes
    )


# --- reading --------------------------------------------------------------------------------------


def read(file: IO[bytes]) -> tuple[str, dict[str, Stored]]:
    """Text and arrays of a file, read to the end: what is damaged is noticed here.

    The library would hold the file twice, and take the last of several tensors of one name.
    """
    try:
        header = _header(file)
        metadata = header.pop("__metadata__", {})
        text, sums = metadata[TEXT], json.loads(metadata[SUMS])
        arrays = _arrays(file, header)
        found = _sums(text, {name: array.bits for name, array in arrays.items()})
    except MemoryError:
        raise
    except Exception as error:  # anything may stand where a number or a dict belongs
        raise ValueError(f"no checkpoint of fusedstep, or a damaged one ({error})") from error
    if found != sums:
        raise ValueError("a damaged checkpoint: its check sums are wrong")
    return text, arrays


def _size(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_size


def _header(file: IO[bytes]) -> dict[str, Any]:
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > _size(file) - 8:
        raise ValueError("the file is shorter than its header")
    header = json.loads(file.read(length).decode(), object_pairs_hook=_unique)
    if not isinstance(header, dict):
        raise ValueError("the header is no dict")
    return header


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"two entries are called {name!r}")
        found[name] = value
    return found


def _arrays(file: IO[bytes], header: Mapping[str, Any]) -> dict[str, Stored]:
    """The tensors, one after the other without a gap up to the end of the file."""
    begin = file.tell()
    places = sorted((entry["data_offsets"], name) for name, entry in header.items())
    end = begin
    for (first, last), name in places:
        said = _bytes_of(header[name])
        if begin + first != end or last - first != said:
            raise ValueError(f"{name}: its place is [{first}, {last}], its size {said} bytes")
        end = begin + last
    if end != _size(file):
        raise ValueError(f"{end} bytes are said to be in the file, which has {_size(file)}")
    return {name: _array(file, header[name]) for _, name in places}


def _bytes_of(entry: Mapping[str, Any]) -> int:
    shape = entry["shape"]
    if any(extent < 0 for extent in shape):
        raise ValueError("a shape has a negative extent")
    size: int = math.prod(shape) * np.dtype(_DTYPES[entry["dtype"]][1]).itemsize
    return size


def _array(file: IO[bytes], entry: Mapping[str, Any]) -> Stored:
    dtype, element = _DTYPES[entry["dtype"]]
    shape = entry["shape"]
    return Stored(np.fromfile(file, element, math.prod(shape)).reshape(shape), dtype)
