"""What one pastes into a bug report: processor, threads, GPU, versions."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import fusedstep
from fusedstep import _core

# Looked up, never imported: a report must not change what it reports on.
_PACKAGES = ("numpy", "ml_dtypes", "torch", "jax", "jaxlib", "cupy", "tensorflow", "paddlepaddle")


def report() -> str:
    """The report, one line per fact, `name: value`."""
    width = max(len(name) for name, _ in _facts())
    return "\n".join(f"{name + ':':<{width + 1}} {value}" for name, value in _facts())


def _facts() -> list[tuple[str, str]]:
    build = fusedstep.build_info()
    return [
        ("fusedstep", f"{build['version']} ({build['compiler']}, pybind11 {build['pybind11']})"),
        ("Python", f"{platform.python_version()} ({sys.executable})"),
        ("platform", platform.platform()),
        ("processor", _processor()),
        ("caches", _caches() or "unknown"),
        ("instruction set", _instruction_set()),
        ("threads", _or_error(lambda: f"{_core.get_num_threads()} of {os.cpu_count()} CPUs")),
        ("thread runtime", _or_error(_core.thread_runtime)),
        *_cuda(),
        *((name, version) for name in _PACKAGES if (version := _version(name))),
        *((name, value) for name, value in sorted(os.environ.items()) if _matters(name)),
    ]


def _instruction_set() -> str:
    available = ", ".join(_core.available_isas())
    return _or_error(lambda: f"{_core.active_isa()} (available: {available})")


def _cuda() -> list[tuple[str, str]]:
    """What the build has, and what the machine has; asks the driver."""
    status = fusedstep.cuda_status()
    if not status.built:
        return [("CUDA", "not in this build")]
    versions = f"runtime {status.runtime}, driver {status.driver or 'none'}"
    return [
        ("CUDA", f"built ({' '.join(status.architectures)}), {versions}"),
        ("GPUs", ", ".join(status.names) if status.why is None else f"none: {status.why}"),
    ]


def _or_error(fact: Callable[[], str]) -> str:
    """The fact, or what is wrong with an environment variable that asks for what is missing."""
    try:
        return fact()
    except RuntimeError as error:
        return f"none: {error}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _caches() -> str:
    """Sizes of the first CPU's data caches, as the kernel tells them."""
    found = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind, level, size = (
                (index / name).read_text().strip() for name in ("type", "level", "size")
            )
        except OSError:
            continue
        if kind != "Instruction":
            found.append(f"L{level} {size}")
    return ", ".join(found)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _matters(variable: str) -> bool:
    return variable.startswith(("FUSEDSTEP_", "OMP_", "GOMP_", "KMP_"))
