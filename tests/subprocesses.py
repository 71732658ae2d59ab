"""Runs a program in a fresh interpreter: what can only be seen from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap


def run_python(
    program: str, *, timeout: float = 120, fails: bool = False, **environment: str
) -> str:
    """Its standard output; with `fails`, its standard error, and it must fail."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, **environment},
    )
    assert (done.returncode != 0) == fails, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stderr if fails else done.stdout
