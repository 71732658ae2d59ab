"""README and docstrings: every example runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import fusedstep as fs
import numpy as np
import pytest
from conftest import LEFT_OUT, REQUIRED, installed
from fusedstep import _core

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MODULES = [
    name for _, name, _ in pkgutil.iter_modules(fs.__path__, "fusedstep.") if "__main__" not in name
]


@pytest.mark.parametrize("name", ["fusedstep", *MODULES])
def test_docstrings(name: str) -> None:
    module = importlib.import_module(name)
    finder = doctest.DocTestFinder(exclude_empty=True)
    names = {"np": np, "fs": fs, **vars(fs)}
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in finder.find(module, name, extraglobs=names):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


def test_optimizers_and_functions_have_examples() -> None:
    finder = doctest.DocTestFinder()
    for name in fs.__all__:
        member = getattr(fs, name)
        if name.startswith("fused_") or (
            isinstance(member, type)
            and issubclass(member, fs.Optimizer)
            and member is not fs.Optimizer
        ):
            assert any(test.examples for test in finder.find(member, name)), name


def test_bug_report() -> None:
    """What one pastes into a bug report: versions, instruction set, threads, caches, GPU."""
    command = [sys.executable, "-m", "fusedstep", "info"]
    report = subprocess.check_output(command, text=True).lower()
    for fact in (fs.__version__, np.__version__, fs.build_info()["compiler"], _core.active_isa()):
        assert fact in report
    for topic in ("python", "numpy", "threads", "caches", "cuda"):
        assert topic in report


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.skipif(not README.exists(), reason="runs in a checkout only")
def test_readme_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block after block, in one namespace, as a reader would paste them."""
    assert blocks()
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    missing = set()
    for number, block in enumerate(blocks()):
        used = re.search(r"^\s*(?:import|from) (torch|jax)", block, re.MULTILINE)
        if used and not installed(used.group(1)) and not REQUIRED:
            missing.add(used.group(1))
            continue
        exec(compile(block, f"README.md, python block {number + 1}", "exec"), names)
    if missing:
        pytest.skip(f"{LEFT_OUT}: {', '.join(missing)} not installed (the other examples ran)")


@pytest.mark.skipif(not README.exists(), reason="runs in a checkout only")
def test_readme_opens_with_the_two_commands() -> None:
    text = README.read_text()
    assert "make demo" in text[:2500]
    assert "make test" in text[:2500]


@pytest.mark.skipif(not README.exists(), reason="runs in a checkout only")
def test_links_to_files_exist() -> None:
    for document in ROOT.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (ROOT / target).exists(), f"{document.name}: {target}"
