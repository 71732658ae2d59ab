"""Runs a program in a fresh interpreter: what can only be seen from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

HERE = Path(__file__).resolve().parent


def environment_in(**more: str) -> dict[str, str]:
    """An environment in which a program can import what this one can, the tests too."""
    path = os.pathsep.join(map(str, (HERE, *filter(None, sys.path))))
    return {**os.environ, "PYTHONPATH": path, **more}


def run_python(
    program: str,
    *,
    timeout: float = 120,
    fails: bool = False,
    exits: int | None = None,
    directory: Path | None = None,
    **environment: str,
) -> str:
    """Its standard output; with `fails`, its standard error, and it must fail.

    With `exits` that must be its exit status. With a directory it runs there.
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=directory,
        env=environment_in(**environment) if directory else {**os.environ, **environment},
    )
    right = (done.returncode != 0) == fails if exits is None else done.returncode == exits
    assert right, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stderr if fails else done.stdout
