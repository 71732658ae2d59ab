"""What has to be known about a machine to make sense of a time taken on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fusedstep as fs
from fusedstep import _core

PACKAGES = ("fusedstep", "numpy", "torch", "jax", "jaxlib", "optax")
ROOT = Path(__file__).parent.parent


def cpu_model() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1].strip() if found else platform.processor() or platform.machine()


def caches() -> dict[str, str]:
    """Size of each cache that the first CPU sees; a virtual machine may see its host's."""
    found = {}
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((cache / key).read_text().strip() for key in ("level", "type", "size"))
        found[f"L{level} {kind}"] = size
    return found


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str:
    """The checkout's commit, with "-dirty" if anything but results differs from it.

    Of a copy without its history that is what FUSEDSTEP_COMMIT says.
    """
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", ":!bench/results")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FUSEDSTEP_COMMIT", "unknown")
    return f"{head}-dirty" if changed else head


def _git(*arguments: str) -> str:
    return subprocess.check_output(["git", *arguments], cwd=ROOT, text=True).strip()


def describe() -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "caches": caches(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "virtual": "hypervisor" in Path("/proc/cpuinfo").read_text(),
        "load": os.getloadavg()[0],
        "isa": _core.active_isa(),
        "threads": fs.get_num_threads(),
        "thread_runtime": Path(_core.thread_runtime()).name,
        "environment": {k: v for k, v in os.environ.items() if re.match("OMP_|FUSEDSTEP_", k)},
        "build": fs.build_info(),
    }


def facts(module: str, packages: tuple[str, ...] = PACKAGES) -> dict[str, Any]:
    """What stands at the head of a JSON."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "versions": versions(packages),
        "machine": describe(),
    }


def words(name: str) -> str:
    """A part of a file name."""
    return "-".join(re.findall("[a-z0-9]+", name.lower()))


def slug(machine: dict[str, Any]) -> str:
    """A file name for the machine: its CPU and how many threads were used."""
    cpu = re.sub(r"\((R|TM)\)|CPU|@.*", "", machine["cpu"])
    return f"{words(cpu)}-{machine['threads']}t"
