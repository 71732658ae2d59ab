"""The module for GPUs, as far as it can be seen without one: what it needs, exports, holds, says.

Each program runs in an interpreter of its own, and finds no GPU, also where there is one.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from importlib.machinery import PathFinder
from typing import Any

import fusedstep as fs
import pytest
from cudatools import cuda_tool
from fusedstep import _core
from subprocesses import run_python

# The installed one, whatever else a test has put in its place.
SPEC = PathFinder.find_spec("fusedstep._cuda", fs.__path__)
built = pytest.mark.skipif(SPEC is None, reason="this build has no CUDA")
SYSTEM = re.compile(r"(libc|libm|libdl|librt|libpthread|libgcc_s|libstdc\+\+|ld-linux.*)\.so\.\d+")


def run(program: str) -> str:
    return run_python(program, CUDA_VISIBLE_DEVICES="")


def status(before: str = "") -> dict[str, Any]:
    program = f"{before}\nimport fusedstep as fs; print(fs.cuda_status()._asdict())"
    return ast.literal_eval(run(program))


# --- what it says -----------------------------------------------------------------------------


@built
def test_status_without_a_gpu() -> None:
    found = status()
    assert found["built"]
    assert found["architectures"]
    assert re.fullmatch(r"\d+\.\d+", found["runtime"])
    assert found["driver"] is None or re.fullmatch(r"\d+\.\d+", found["driver"])
    assert (found["devices"], found["names"]) == (0, ())
    assert re.search(r"[a-z]{3}", found["why"])


@pytest.mark.parametrize(
    ("obstacle", "is_built", "why"),
    [
        ("None", False, "no CUDA"),
        ("Absent()", False, "no CUDA"),
        ("Broken()", True, "cannot be loaded: undefined symbol: foo"),
    ],
)
def test_status_without_a_module(obstacle: str, is_built: bool, why: str) -> None:
    """Not built, or built and not loadable: two things that a user has to tell apart."""
    before = """
import sys, fusedstep
class Broken:
    def find_spec(self, name, path, target=None):
        if name == "fusedstep._cuda":
            raise ImportError("undefined symbol: foo")
class Absent:
    def find_spec(self, name, path, target=None):
        if name == "fusedstep._cuda":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
"""
    hide = 'sys.modules["fusedstep._cuda"] = None' if obstacle == "None" else ""
    hide = hide or f"sys.meta_path.insert(0, {obstacle})"
    found = status(before + hide)
    assert found.pop("built") is is_built
    assert why in found.pop("why")
    assert not any(found.values())


def test_status_is_the_same_here() -> None:
    """Whatever this machine has."""
    found = fs.cuda_status()
    assert found == fs.cuda_status()
    assert len(found.names) == found.devices
    assert (found.devices > 0) == (found.why is None)
    assert found.built == fs.build_info()["cuda"]


@built
def test_report() -> None:
    found = status()
    text = run("from fusedstep.info import report; print(report())")
    line = (
        rf"CUDA: +built \({' '.join(found['architectures'])}\), runtime {found['runtime']}, driver"
    )
    assert re.search(line, text)
    assert f"none: {found['why']}" in text


def test_report_without_a_module() -> None:
    program = """
        import sys
        sys.modules["fusedstep._cuda"] = None
        from fusedstep.info import report
        print(report())
    """
    assert re.search(r"CUDA: +not in this build\n", run(program))


# --- when it is loaded --------------------------------------------------------------------------


def test_a_step_on_the_cpu_does_not_load_it() -> None:
    program = """
        import sys, numpy as np, fusedstep as fs
        fs.fused_sgd_step(np.zeros(3), np.ones(3), lr=0.1)
        print("fusedstep._cuda" in sys.modules)
    """
    assert run(program) == "False\n"


@built
def test_loading_it_loads_no_driver() -> None:
    """Which takes memory and time, and forbids to fork."""
    program = """
        from fusedstep import _cuda
        print([line for line in open("/proc/self/maps") if "libcuda" in line or "nvidia" in line])
    """
    assert run(program) == "[]\n"


@built
def test_it_is_loaded_once() -> None:
    program = """
        import ctypes, importlib, sys
        pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
        pointer_of.restype = ctypes.c_void_p
        pointer_of.argtypes = [ctypes.py_object, ctypes.c_char_p]
        tables = set()
        for _ in range(2):
            module = importlib.import_module("fusedstep._cuda")
            tables.add(pointer_of(module._DEVICE_API, b"fusedstep._cuda._DEVICE_API"))
            del sys.modules["fusedstep._cuda"]
        version = ctypes.c_uint32.from_address(*tables).value
        copies = {line.split()[-1] for line in open("/proc/self/maps") if "/_cuda." in line}
        print(version, len(copies))
    """
    assert run(program) == "1 1\n"


@built
def test_the_cpu_works_after_a_failed_look_for_gpus() -> None:
    program = """
        import numpy as np, fusedstep as fs
        p = np.zeros(3)
        fs.cuda_status()
        fs.fused_sgd_step(p, np.ones(3), lr=0.5)
        print(p)
    """
    assert run(program) == "[-0.5 -0.5 -0.5]\n"


# --- what is in it ----------------------------------------------------------------------------


@built
def test_it_needs_nothing_of_cuda() -> None:
    if not shutil.which("readelf"):
        pytest.skip("needs readelf")
    listing = subprocess.run(
        ["readelf", "-d", str(SPEC.origin)], capture_output=True, text=True, check=True
    )
    needed = re.findall(r"NEEDED.*\[(.*)\]", listing.stdout)
    assert "libc.so.6" in needed
    assert not [name for name in needed if not SYSTEM.fullmatch(name)]


@built
def test_the_architectures_are_those_of_the_status() -> None:
    """Each of them in every part of the module that has kernels at all."""
    command = [cuda_tool("cuobjdump"), "--list-elf", "--list-ptx", str(SPEC.origin)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True)
    kinds = {"ELF": "sm", "PTX": "compute"}
    found = re.findall(r"^(ELF|PTX) file.*\.sm_(\d+)\.(?:cubin|ptx)$", listing.stdout, re.MULTILINE)
    names = [f"{kinds[kind]}_{number}" for kind, number in found]
    assert set(names) == set(status()["architectures"])
    assert len({names.count(name) for name in names}) == 1


@built
def test_no_kernel_needs_local_memory() -> None:
    """Of any architecture that is built: tests/test_cuda_source.py compiles for some of them."""
    command = [cuda_tool("cuobjdump"), "--dump-resource-usage", str(SPEC.origin)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True)
    pattern = r"Function (\w+):\s+REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    found = re.findall(pattern, listing.stdout)
    assert len(found) >= 3 * len(_core.rules()) + 3
    assert [(name, amounts) for name, *amounts in found if amounts != ["0", "0"]] == []
