"""How Sphinx builds these pages: `make docs`, with warnings as errors."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import fusedstep as fs

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

project = "fusedstep"
author = "the fusedstep developers"
release = version = fs.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build", "generated"]
html_theme = "furo"
html_title = f"fusedstep {release}"

# Docstrings: Google's sections, and some of our own; between single backticks stands code.
default_role = "code"
napoleon_custom_sections = ["State", "Numerics", "Function"]
napoleon_use_ivar = True
autodoc_typehints = "none"
autodoc_class_signature = "mixed"
# The classes of fusedstep.torch say the same about themselves without torch.
autodoc_mock_imports = [] if importlib.util.find_spec("torch") else ["torch"]

myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3

# References to our own names have to resolve; those to Python, NumPy and torch are not linked.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!fusedstep\b).*")]


def generate(_app: Any) -> None:
    """Writes what the pages include: tables from the code, oracles, pictures."""
    import tables

    tables.write(HERE / "generated")
    if (HERE / "schedule_curves.py").exists():
        import schedule_curves

        schedule_curves.draw(HERE / "generated")


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", generate)
