"""A file is the old one or the new one, whatever ends the process or the disk's patience."""

from __future__ import annotations

import errno
import os
import random
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import fusedstep as fs
import numpy as np
import pytest
import safetensors
from resuming import SUFFIXES
from subprocesses import environment_in, run_python

SIZE = 200_000  # large enough for a save to take a while
KILLS = 12


def filled(value: float, size: int = SIZE) -> tuple[Any, dict[str, Any]]:
    """An optimizer all of whose numbers are one."""
    params = {name: np.full(size, value) for name in ("w", "b")}
    opt = fs.Adam(params)
    buffers = {name: np.full(size, value) for name in params}
    opt.set_state(exp_avg=buffers, exp_avg_sq=buffers, step=int(value))
    return opt, params


def read_value(path: Path, size: int = SIZE) -> float:
    """The one number of a file, which has to be complete and of one piece."""
    opt, params = filled(0.0, size)
    opt.load(path)
    values = {float(x) for array in params.values() for x in np.unique(array)}
    for entry in opt.state_dict()["state"].values():
        values |= {float(entry["step"])}
        values |= {float(x) for name in ("exp_avg", "exp_avg_sq") for x in np.unique(entry[name])}
    assert len(values) == 1
    return values.pop()


# --- killed at any moment -----------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_process_killed_at_random_leaves_a_complete_file(suffix: str, tmp_path: Path) -> None:
    """A child saves without end; whenever it is killed, the file is one of its saves."""
    path = tmp_path / f"run{suffix}"
    filled(1.0)[0].save(path)
    child = textwrap.dedent(f"""
        from pathlib import Path
        from test_checkpoints_atomic import filled
        optimizers = [filled(float(k))[0] for k in range(2, 6)]
        print("ready", flush=True)
        while True:
            for optimizer in optimizers:
                optimizer.save(Path("run{suffix}"))
    """)
    chance = random.Random(5)
    littered = 0
    for _ in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, "-c", child], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
            env=environment_in(),
        )  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(chance.uniform(0.0, 0.15))
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        assert process.returncode == -signal.SIGKILL
        assert read_value(path) in {1.0, 2.0, 3.0, 4.0, 5.0}
        litter = [p for p in tmp_path.iterdir() if p != path]
        littered += bool(litter)
        assert all(p.name.startswith(".") for p in litter)
    assert littered  # some were killed in the middle
    filled(9.0)[0].save(path)
    assert read_value(path) == 9.0


CALLS = {"touch": "Path.touch", "fsync": "os.fsync", "replace": "Path.replace"}
WRITERS = {".npz": "np.savez", ".safetensors": "safetensors.serialize_file"}
WHEN = ("before", "after")
MOMENTS = [
    *((suffix, call, when) for suffix in SUFFIXES for call in CALLS for when in WHEN),
    *((suffix, "write", when) for suffix in SUFFIXES for when in (*WHEN, "halfway")),
]


@pytest.mark.parametrize(("suffix", "point", "moment"), MOMENTS)
def test_a_process_killed_at_a_point(suffix: str, point: str, moment: str, tmp_path: Path) -> None:
    """Before `replace` the file is the old one, after it the new one."""
    call = CALLS.get(point, WRITERS[suffix])
    path = tmp_path / f"run{suffix}"
    filled(1.0, 100)[0].save(path)
    program = f"""
        import os, signal
        from pathlib import Path
        import numpy as np, safetensors
        from test_checkpoints_atomic import filled

        real = {call}
        def deadly(*args, **kwargs):
            if {moment!r} != "before":
                real(*args, **kwargs)
            if {moment!r} == "halfway":
                (written,) = [p for p in Path(".").iterdir() if p.name.startswith(".")]
                os.truncate(written, written.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer = filled(2.0, 100)[0]
        {call} = deadly
        optimizer.save("run{suffix}")
    """
    assert run_python(program, directory=tmp_path, exits=-signal.SIGKILL) == ""
    replaced = (point, moment) == ("replace", "after")
    assert read_value(path, 100) == (2.0 if replaced else 1.0)
    litter = [p for p in tmp_path.iterdir() if p != path]
    assert len(litter) == (0 if replaced or (point, moment) == ("touch", "before") else 1)
    for stale in litter:
        before = stale.read_bytes()
        filled(3.0, 100)[0].save(path)
        assert read_value(path, 100) == 3.0
        assert stale.read_bytes() == before  # it may be another process's


# --- errors -----------------------------------------------------------------------------------


def refuse(number: int, partial: Path | None = None) -> Any:
    def fail(*args: Any, **_: Any) -> None:
        for argument in args:
            if partial and isinstance(argument, Path):
                argument.write_bytes(b"half of it")
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("point", ["write", "fsync", "replace", "touch", "chmod"])
def test_an_error_leaves_the_old_file_and_no_other(
    point: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"run{suffix}"
    filled(1.0, 100)[0].save(path)
    before = path.read_bytes()
    opt, _ = filled(2.0, 100)
    full = refuse(errno.ENOSPC, path)
    with monkeypatch.context() as patch:
        if point == "write":
            patch.setattr(np, "savez", full)
            patch.setattr(safetensors, "serialize_file", full)
        elif point == "fsync":
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr(Path, point, refuse(errno.ENOSPC))
        with pytest.raises(OSError, match="No space left"):
            opt.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_disk_that_is_really_full(suffix: str, tmp_path: Path) -> None:
    """A limit of the file size stops the writes of NumPy and of the library alike."""
    path = tmp_path / f"run{suffix}"
    filled(1.0)[0].save(path)
    program = f"""
        import resource
        from test_checkpoints_atomic import filled
        optimizer = filled(2.0)[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        try:
            optimizer.save("run{suffix}")
        except OSError as error:
            print(error)
    """
    assert "too large" in run_python(program, directory=tmp_path)
    assert read_value(path) == 1.0
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_directory_that_cannot_be_synced_is_no_error(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new file is in place then: an error would say that it is not."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not on this file system")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    filled(1.0, 100)[0].save(tmp_path / f"run{suffix}")
    assert read_value(tmp_path / f"run{suffix}", 100) == 1.0


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_file_and_directory_are_synced(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file before it gets its name, the directory afterwards."""
    events: list[str] = []
    real_sync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        found = os.fstat(descriptor)
        events.append("directory" if stat.S_ISDIR(found.st_mode) else f"{found.st_size} bytes")
        real_sync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        events.append("replace")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    path = tmp_path / f"run{suffix}"
    filled(1.0, 100)[0].save(path)
    assert events == [f"{path.stat().st_size} bytes", "replace", "directory"]


# --- what is replaced ---------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_mode_and_links_are_kept(suffix: str, tmp_path: Path) -> None:
    opt, _ = filled(1.0, 100)
    real, link = tmp_path / f"real{suffix}", tmp_path / f"link{suffix}"
    old = os.umask(0o027)
    try:
        opt.save(real)
    finally:
        os.umask(old)
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    real.chmod(0o604)
    link.symlink_to(real.name)
    filled(2.0, 100)[0].save(link)
    assert link.is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o604
    assert read_value(real, 100) == 2.0


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_only_files_are_replaced(suffix: str, tmp_path: Path) -> None:
    opt, _ = filled(1.0, 100)
    folder, pipe = tmp_path / f"folder{suffix}", tmp_path / f"pipe{suffix}"
    folder.mkdir()
    os.mkfifo(pipe)
    for path in (folder, pipe):
        with pytest.raises(OSError, match=rf"{path.stem}.*not a regular file"):
            opt.save(path)
    with pytest.raises(FileNotFoundError):
        opt.save(tmp_path / "missing" / f"run{suffix}")
    assert sorted(tmp_path.iterdir()) == [folder, pipe]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
