"""Checkpoints as ordinary `.npz` files: `numpy.load` reads them, without us and without pickle.

NumPy has no bfloat16: such arrays are stored as their uint16 bits. The text of a checkpoint is the
entry `fusedstep.json`, UTF-8 as uint8. A zip archive has a check sum of each entry.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.lib import format as npy

from fusedstep.buffers import Stored

if TYPE_CHECKING:
    from numpy.typing import NDArray

TEXT = "fusedstep.json"
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def write(path: Path, text: str, arrays: Mapping[str, Stored]) -> None:
    """Writes text and arrays to a file that exists already."""
    entries = {name: array.bits for name, array in arrays.items()}
    entries[TEXT] = np.frombuffer(text.encode(), np.uint8)
    with path.open("wb") as file:
        np.savez(file, **entries)  # type: ignore[arg-type]


def read(file: IO[bytes]) -> tuple[str, dict[str, Stored]]:
    """Text and arrays of a file, read to the end: what is damaged is noticed here."""
    if file.read(2) != b"PK":
        raise ValueError("no checkpoint of fusedstep: an .npz file is a zip archive, this is none")
    try:
        entries = _entries(file)
        text = entries.pop(TEXT).tobytes().decode()
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes zipfile and NumPy raise almost anything
        raise ValueError(f"no checkpoint of fusedstep, or a damaged one ({error})") from error
    return text, {name: Stored(bits, bits.dtype.name) for name, bits in entries.items()}


def _entries(file: IO[bytes]) -> dict[str, NDArray[Any]]:
    entries: dict[str, NDArray[Any]] = {}
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name in entries:
                raise ValueError(f"two entries are called {name!r}")
            entries[name] = _entry(archive, member)
    return entries


def _entry(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(member) as entry:
        # NumPy makes room for whatever a header says, before it looks for the elements.
        shape, _, dtype = _HEADERS[npy.read_magic(entry)](entry)
        said, there = math.prod(shape) * dtype.itemsize, member.file_size - entry.tell()
        if said != there:
            raise ValueError(f"{member.filename}: its header says {said} bytes, it has {there}")
    with archive.open(member) as entry:
        array: NDArray[Any] = npy.read_array(entry, allow_pickle=False)
        return array
