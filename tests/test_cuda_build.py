"""The configuration of the build with CUDA, where nvcc is missing or does not work."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BROKEN = """#!/bin/sh
echo '#error -- unsupported GNU version!' >&2
exit 1
"""

pytestmark = pytest.mark.skipif(
    not (ROOT / "CMakeLists.txt").exists(), reason="runs in a checkout only"
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build tree, which all tests configure."""
    return tmp_path_factory.mktemp("build")


def configure(tree: Path, **settings: str | Path) -> tuple[bool, str]:
    """Whether that worked, and what was said, without line breaks."""
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


def test_without_nvcc(tree: Path) -> None:
    """A machine without it builds what it can, unless CUDA was asked for; both say so."""
    works, text = configure(tree, FUSEDSTEP_CUDA="AUTO", CMAKE_CUDA_COMPILER=tree / "missing")
    assert works, text
    assert "fusedstep._cuda is not built: there is no nvcc" in text
    works, text = configure(tree, FUSEDSTEP_CUDA="ON", CMAKE_CUDA_COMPILER=tree / "missing")
    assert not works
    assert "pip install --group cuda" in text


def test_with_an_nvcc_that_does_not_work(tree: Path) -> None:
    """As when the host compiler is newer than it knows: no reason to fail without being asked."""
    nvcc = tree / "nvcc"
    nvcc.write_text(BROKEN)
    nvcc.chmod(0o755)
    works, text = configure(tree, FUSEDSTEP_CUDA="AUTO", CMAKE_CUDA_COMPILER=nvcc)
    assert works, text
    assert f"{nvcc} does not work: #error -- unsupported GNU version!" in text
    works, text = configure(tree, FUSEDSTEP_CUDA="ON", CMAKE_CUDA_COMPILER=nvcc)
    assert not works
    assert "does not work" in text


def test_architectures_are_checked(tree: Path) -> None:
    works, text = configure(tree, FUSEDSTEP_CUDA="ON", FUSEDSTEP_CUDA_ARCHITECTURES="80-real;90")
    assert not works
    assert "expected numbers, native or release, got '80-real;90'" in text
