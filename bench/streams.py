"""The roofline: pure loops over the same streams (bench/roofline), called through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusedstep import _core
from numpy.typing import NDArray

Array = NDArray[Any]
LIBRARY = Path(__file__).parent.parent / "build/bench/bench/roofline/libfusedstep_roofline.so"


class Roofline:
    """Loops of the active instruction set on `threads` threads."""

    def __init__(self, threads: int, library: Path = LIBRARY) -> None:
        self._call = ctypes.CDLL(str(library)).fusedstep_roofline
        pointer = ctypes.c_void_p
        text = ctypes.c_char_p
        self._call.argtypes = [text, text, *[pointer] * 4, ctypes.c_int64, ctypes.c_int]
        self._threads = threads

    def loop(
        self, names: tuple[str, ...], p: Array, g: Array, states: list[Array]
    ) -> Callable[[], None]:
        """A call that runs the named loops, one after the other, over whole flat arrays."""
        isa = _core.active_isa().encode()
        loops = [name.encode() for name in names]
        first, second = (*(state.ctypes.data for state in states), None, None)[:2]
        buffers = p.ctypes.data, g.ctypes.data, first, second, p.size, self._threads

        def run() -> None:
            for name in loops:
                if self._call(isa, name, *buffers):
                    raise RuntimeError(f"no roofline loop {name!r} for {isa!r}")

        return run


def load(threads: int) -> Roofline | None:
    """None if `make roofline` has not been run: rows are then measured without it."""
    return Roofline(threads) if LIBRARY.exists() else None
