"""The calling thread's floating-point environment: flush-to-zero and the rounding direction."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import platform
from collections.abc import Iterator

_libm = ctypes.CDLL(ctypes.util.find_library("m"))
# fenv_t in glibc: where the control word is, and its flush bits (x86: FTZ and DAZ of MXCSR).
if platform.machine() == "x86_64":
    _SIZE, _OFFSET, FLUSH, UPWARD = 32, 28, 0x8040, 0x4000
    _UPWARD_ARGUMENT = 0x800
else:
    _SIZE, _OFFSET, FLUSH, UPWARD = 8, 0, 1 << 24, 1 << 22
    _UPWARD_ARGUMENT = 0x400000


def control_word() -> int:
    """The control bits of this thread (MXCSR or FPCR), without the sticky exception flags."""
    environment = ctypes.create_string_buffer(_SIZE)
    _libm.fegetenv(environment)
    return int.from_bytes(environment[_OFFSET : _OFFSET + 4], "little") & ~0x3F


@contextlib.contextmanager
def flush_to_zero() -> Iterator[None]:
    """Denormals are read and written as zero while this is open."""
    saved, changed = ctypes.create_string_buffer(_SIZE), ctypes.create_string_buffer(_SIZE)
    _libm.fegetenv(saved)
    ctypes.memmove(changed, saved, _SIZE)
    word = int.from_bytes(saved[_OFFSET : _OFFSET + 4], "little") | FLUSH
    ctypes.memmove(ctypes.addressof(changed) + _OFFSET, word.to_bytes(4, "little"), 4)
    _libm.fesetenv(changed)
    try:
        yield
    finally:
        _libm.fesetenv(saved)


@contextlib.contextmanager
def round_upward() -> Iterator[None]:
    """Results are rounded towards plus infinity while this is open."""
    _libm.fesetround(_UPWARD_ARGUMENT)
    try:
        yield
    finally:
        _libm.fesetround(0)
