"""Array libraries in miniature: DLPack producers that are honest, old, odd, or lying."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import dlpack
import numpy as np
import pytest
from dlpack import CPU, CUDA, IS_COPIED, READ_ONLY, UINT  # noqa: F401 (for tests that lie)
from exact import Array


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
        tensor, kept = dlpack.tensor_of(self.array, **self.lies)
        if self.versioned:
            major, flags = self.lies.get("major", 1), self.lies.get("flags", 0)
            managed = dlpack.Versioned(major, 0, None, self._deleter(), flags, tensor)
            name = b"dltensor_versioned"
        else:
            managed, name = dlpack.Managed(tensor, None, self._deleter()), b"dltensor"
        name = self.lies.get("name", name)
        self._kept += [managed, kept, name]
        return dlpack.new_capsule(managed, name)

    def _deleter(self) -> Any:
        def delete(_: int) -> None:
            self.deleted += 1

        self._kept.append(dlpack.Deleter(delete))
        return self._kept[-1]


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
