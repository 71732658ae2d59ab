"""The configuration of the build with CUDA, where nvcc is missing or does not work."""

from __future__ import annotations

from pathlib import Path

import pytest
from cudatools import ROOT, configure

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
