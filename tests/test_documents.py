"""README and docstrings: every example runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import fusedstep as fs
import numpy as np
import pytest
from conftest import LEFT_OUT, REQUIRED, installed
from fusedstep import _core
from fusedstep.conventions import CONVENTIONS, NOT_NESTEROV

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(fs.__path__, "fusedstep.")
    if "__main__" not in name
]
# A line that imports one of these needs the framework behind it.
NEEDED = {"torch": "torch", "jax": "jax", "braintools": "brainstate", "brainstate": "brainstate"}
IMPORTS = re.compile(
    rf"^(?:>>> )? *(?:import|from) (?:fusedstep\.)?({'|'.join(NEEDED)})\b", re.MULTILINE
)


def marked(name: str, text: str, value: Any) -> Any:
    """A parameter of a test, with the mark of the framework that the text imports."""
    used = IMPORTS.findall(text)
    needed = max((NEEDED[each] for each in used), key=list(NEEDED).index, default=None)
    return pytest.param(value, id=name, marks=pytest.mark.framework(needed) if needed else ())


@pytest.mark.parametrize("name", [marked(n, f"import {n}", n) for n in ("fusedstep", *MODULES)])
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


@pytest.mark.parametrize("page", [marked(page.stem, page.read_text(), page) for page in PAGES])
def test_pages(page: Path) -> None:
    """All `>>>` blocks of a page, one after the other, in one namespace."""
    text = re.sub(r"^```.*$", "", page.read_text(), flags=re.MULTILINE)
    examples = doctest.DocTestParser().get_doctest(text, {}, page.stem, page.name, 0)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(examples)
    fs.set_num_threads(0)
    assert runner.summarize(verbose=False).failed == 0


def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """docs/tables.py, which writes the parts of the pages that follow from the code."""
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("tables")


@pytest.mark.skipif(not PAGES, reason="runs in a checkout only")
def test_every_public_name_is_in_the_api_page(monkeypatch: pytest.MonkeyPatch) -> None:
    text = tables(monkeypatch).api()
    listed = re.findall(r"^\.\. auto\w+:: fusedstep\.(\w+)$", text, re.MULTILINE)
    assert sorted([*listed, "__version__"]) == sorted(fs.__all__)


@pytest.mark.skipif(not PAGES, reason="runs in a checkout only")
@pytest.mark.framework("torch")
def test_every_name_of_torch_is_in_the_api_page(monkeypatch: pytest.MonkeyPatch) -> None:
    text = tables(monkeypatch).torch_api()
    listed = re.findall(r"^\.\. autoclass:: fusedstep\.torch\.(\w+)\(", text, re.MULTILINE)
    assert sorted(listed) == sorted(importlib.import_module("fusedstep.torch").__all__)


@pytest.mark.skipif(not PAGES, reason="runs in a checkout only")
def test_every_rule_has_a_section_with_its_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    module, text = tables(monkeypatch), (DOCS / "rules.md").read_text()
    for rule in _core.rules():
        name = module.section_of(rule)
        section = re.search(rf"^## {name}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        assert name, rule
        assert section, rule
        assert "$$" in section[1], rule
        assert f"generated/oracle_{name}.md" in section[1], rule
        for function in (name, f"prepare_{name}"):
            assert f":pyobject: {function}\n" in module.oracle(name), rule


@pytest.mark.skipif(not PAGES, reason="runs in a checkout only")
def test_every_optimizer_and_function_is_in_the_rules_page() -> None:
    text = (DOCS / "rules.md").read_text()
    for name in fs.__all__:
        member = getattr(fs, name)
        kind = isinstance(member, type) and issubclass(member, fs.Optimizer)
        if (kind and member is not fs.Optimizer) or name.startswith("fused_"):
            assert f"`{name}`" in text, name


@pytest.mark.skipif(not PAGES, reason="runs in a checkout only")
def test_every_convention_is_in_its_page(monkeypatch: pytest.MonkeyPatch) -> None:
    module, page = tables(monkeypatch), (DOCS / "conventions.md").read_text()
    for part in ("conventions", "differences", "not_nesterov"):
        assert f"generated/{part}.md" in page
    for name, row in CONVENTIONS.items():
        assert f"| `{name}` | {row.title} |" in module.conventions()
        assert f"| `{name}` |" in module.differences()
    for name, entry in NOT_NESTEROV.items():
        assert name in module.not_nesterov()
        assert entry.instead in module.not_nesterov()


@pytest.mark.framework("jax")
@pytest.mark.skipif(not PAGES, reason="runs in a checkout only")
def test_every_public_name_for_jax_is_in_the_api_page(monkeypatch: pytest.MonkeyPatch) -> None:
    text = tables(monkeypatch).jax_api()
    listed = re.findall(r"^\.\. auto\w+:: fusedstep\.jax\.(\w+)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(importlib.import_module("fusedstep.jax").__all__)


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
    for document in [*ROOT.glob("*.md"), *PAGES]:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", document.read_text()):
            made = target.startswith("generated/")  # by the build, which fails without them
            assert made or (document.parent / target).exists(), f"{document.name}: {target}"
