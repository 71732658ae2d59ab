"""Puts a file in place at once: whoever looks sees the old one or the new one, never half."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of `path` when it is complete and on the disk.

    It lies beside `path`. The body may write it or put another file under its name.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        raise OSError(f"{path}: not a regular file, it cannot be replaced")
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.touch(exist_ok=False)
        mode = _mode(temporary)
        yield temporary
        _sync(temporary)
        with suppress(FileNotFoundError):
            mode = _mode(target)
        temporary.chmod(mode)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The new name, too, shall survive a loss of power. Not every file system can promise that, and
    # an error would say that the old file is still there.
    with suppress(OSError):
        _sync(target.parent)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
