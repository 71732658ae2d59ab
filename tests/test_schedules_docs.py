"""The page of the schedules: a section and a picture for each, and code that runs."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path
from typing import Any

import fusedstep as fs
import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
CLASSES = set(fs.schedules.__all__) - {"Schedule", "MomentumSchedule"}

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="runs in a checkout only")


@pytest.fixture(scope="module")
def curves() -> Any:
    spec = importlib.util.spec_from_file_location("schedule_curves", DOCS / "schedule_curves.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sections() -> dict[str, str]:
    """The text of each section that is about a class, by the class."""
    text = (DOCS / "schedules.md").read_text()
    parts = re.split(r"^#+ (.*)$", text, flags=re.MULTILINE)
    found = zip(parts[1::2], parts[2::2], strict=True)
    return {title.strip("`"): body for title, body in found if title.startswith("`")}


def test_every_schedule_has_a_section_with_its_picture() -> None:
    assert set(sections()) == CLASSES
    for name, body in sections().items():
        assert re.findall(r"generated/(\w+)\.svg", body) == [name]
        assert "Use it" in body, name


def test_every_schedule_has_a_curve(curves: Any) -> None:
    names = [type(curve.schedule).__name__ for curve in curves.CURVES]
    assert sorted(names) == sorted(CLASSES)
    for curve in curves.CURVES:
        heights = curves.values(curve)
        assert len(heights) == curve.steps
        assert all(map(math.isfinite, heights))
        assert len(set(heights)) > 1, curve.title
        assert curve.schedule.last_epoch == 0


def test_pictures(curves: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = curves.draw(tmp_path / "first")
    assert {path.stem for path in written} == CLASSES
    for path, again in zip(written, curves.draw(tmp_path / "second"), strict=True):
        assert path.read_bytes() == again.read_bytes()
        assert path.stat().st_size < 40_000
        assert "<svg" in path.read_text()


def test_examples_of_the_page() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "schedules.md").read_text(), re.M | re.S)
    assert len(blocks) >= 4
    names: dict[str, Any] = {"__name__": "page"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"schedules.md, python block {number + 1}", "exec"), names)
    assert names["schedule"].last_epoch == 4
    assert names["Halving"](0.5).at(2) == 0.125
