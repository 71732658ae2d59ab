"""Tools of the CUDA toolkit, from the PATH or from the packages on PyPI."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest


def cuda_tool(name: str) -> str:
    """Where `nvcc`, `cuobjdump`, ... is; skips the test if nowhere."""
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    packaged = [str(Path(folder, "cu13", "bin", name)) for folder in folders]
    found = next(filter(None, map(shutil.which, [name, *packaged])), None)
    if found is None:
        pytest.skip(f"needs {name}, of the CUDA toolkit")
    return found
