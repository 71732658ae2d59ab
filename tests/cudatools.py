"""The build with CUDA, for tests: the toolkit, CMake's configuration, what becomes of kernels."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def cuda_tool(name: str) -> str:
    """Where `nvcc`, `cuobjdump`, ... is, on the PATH or among the packages of PyPI; else skips."""
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    packaged = [str(Path(folder, "cu13", "bin", name)) for folder in folders]
    found = next(filter(None, map(shutil.which, [name, *packaged])), None)
    if found is None:
        pytest.skip(f"needs {name}, of the CUDA toolkit")
    return found


def configure(tree: Path, **settings: str | Path) -> tuple[bool, str]:
    """Makes a build tree. Whether that worked, and what was said, without line breaks."""
    beside = str(Path(sys.executable).parent)
    path = os.pathsep.join([beside, os.environ["PATH"]])
    cmake = shutil.which("cmake", path=path)
    if cmake is None or importlib.util.find_spec("pybind11") is None:
        pytest.skip("needs CMake and pybind11")
    import pybind11

    settings = {
        "FUSEDSTEP_XLA": "OFF", "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(), "SKBUILD_PROJECT_VERSION": "0", **settings,
    }  # fmt: skip
    command = [cmake, "-S", str(ROOT), "-B", str(tree)]
    command += [f"-D{name}={value}" for name, value in settings.items()]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path}
    )
    return done.returncode == 0, " ".join((done.stdout + done.stderr).split())


# --- from sources to code -----------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A call of nvcc, and where it is made."""

    arguments: list[str]
    folder: str

    def run(self) -> str:
        """What it says."""
        done = subprocess.run(
            self.arguments, cwd=self.folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stderr


def kernel_commands(tree: Path) -> dict[str, Command]:
    """How the build calls nvcc for each file that has kernels, by the file's stem and its shard."""
    works, text = configure(
        tree,
        FUSEDSTEP_CUDA="AUTO",
        FUSEDSTEP_CUDA_ARCHITECTURES="75",
        FUSEDSTEP_WERROR="ON",
        CMAKE_EXPORT_COMPILE_COMMANDS="ON",
    )
    assert works, text
    if "fusedstep._cuda: nvcc" not in text:
        pytest.skip(text[text.find("fusedstep._cuda is not built") :])
    found = {}
    for entry in json.loads((tree / "compile_commands.json").read_text()):
        source = Path(entry["file"])
        if source.suffix == ".cu" and "__global__" in source.read_text():
            shard = re.search(r"-DFUSEDSTEP_SHARD=(\d+)", entry["command"])
            found[source.stem + (shard[1] if shard else "")] = Command(
                shlex.split(entry["command"]), entry["directory"]
            )
    return found


def compile_ptx(build: Command, out: Path, *flags: str) -> Path:
    """What a command of the build makes, but PTX; `flags` take the place of the same flags."""
    options = {flag.split("=")[0] for flag in flags}
    command = [part for part in build.arguments if part.split("=")[0] not in options]
    begin = command.index("-c")
    command[begin : begin + 1] = [*flags, "-ptx"]
    command[command.index("-o") + 1] = str(out)
    Command(command, build.folder).run()
    return out


def assemble(build: Command, ptx: Path, architecture: int) -> tuple[Path, str]:
    """The machine code of a PTX file, and what the assembler says about each kernel."""
    out = ptx.with_suffix(f".sm_{architecture}.cubin")
    nvcc = [build.arguments[0], "-cubin", f"-arch=sm_{architecture}", "-Xptxas=-v"]
    return out, Command([*nvcc, str(ptx), "-o", str(out)], build.folder).run()


# --- kernels ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """One kernel as text: of PTX, or of machine code as nvdisasm writes it.

    `name` is "measure", "upload", "update any", or "update <rule's struct> <access>".
    """

    name: str
    text: str

    @property
    def instructions(self) -> list[str]:
        """The operations in order, with their modifiers."""
        return operations(self.text)

    def innermost_loops(self) -> list[list[str]]:
        """The operations of each loop of PTX that has no other loop in it."""
        lines = self.text.splitlines()
        labels = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"\$L\w+:", line)}
        found = set()
        for end, line in enumerate(lines):
            branch = re.search(r"\bbra(?:\.uni)?\s+(\$L\w+);", line)
            if branch and labels[branch[1]] <= end:
                found.add((labels[branch[1]], end))
        return [
            operations("\n".join(lines[begin : end + 1]))
            for begin, end in sorted(found)
            if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in found)
        ]


ACCESSES = (
    "float32",
    "float64",
    "mixed",
)  # of update kernels that take one rule: csrc/cuda/table.hpp


def kernel_name(mangled: str) -> str:
    one = re.search(r"6updateINS0_3TagINS_\d+([A-Z]\w*?)EEELNS0_6AccessE(\d)E", mangled)
    if one:
        return f"update {one[1]} {ACCESSES[int(one[2])]}"
    return "update any" if "RuleList" in mangled else re.findall(r"\d([a-z]+)E", mangled)[-1]


def kernels_in(text: str, mark: str) -> dict[str, Kernel]:
    """The kernels of a listing, each of which `mark` and its mangled name begin."""
    _, *parts = re.split(mark, text, flags=re.MULTILINE)
    found = [Kernel(kernel_name(re.match(r"\w+", part)[0]), part) for part in parts]
    kernels = {kernel.name: kernel for kernel in found}
    assert len(kernels) == len(found)
    return kernels


def kernels_of_ptx(text: str) -> dict[str, Kernel]:
    assert not re.search(r"^\s*(?:\.visible |\.weak )?\.func", text, re.MULTILINE)
    return kernels_in(text, r"^(?:\.visible |\.weak )?\.entry ")


def kernels_of_cubin(cubin: Path) -> dict[str, Kernel]:
    listing = subprocess.run(
        [cuda_tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True
    )
    return kernels_in(listing.stdout, r"^\.text\.")


def operations(text: str) -> list[str]:
    """Of lines of PTX, or of machine code."""
    line = r"^\s+(?:/\*[0-9a-f]{4,}\*/\s+)?(?:@\S+\s+)?([A-Za-z][\w.]*)(?=[\s;])"
    return re.findall(line, text, re.MULTILINE)


def accesses(instructions: list[str]) -> Counter[tuple[str, str, int]]:
    """How often PTX loads ("ld") and stores ("st"), by kind of memory and bytes at once."""
    found: Counter[tuple[str, str, int]] = Counter()
    for instruction in instructions:
        kind, *modifiers = instruction.split(".")
        if kind in {"ld", "st"}:
            spaces = {"global", "shared", "local", "const", "param"}.intersection(modifiers)
            count = next((int(m[1:]) for m in modifiers if re.fullmatch(r"v\d", m)), 1)
            size = int(modifiers[-1][1:]) // 8
            found[kind, "".join(spaces) or "generic", count * size] += 1
    return found
