"""`make bench` in tiny: every row is built, verified against the oracle, timed and written."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.machine import ROOT
from bench.measure import Row, measure_all


def test_every_row_runs_and_is_written(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "bench", "--smoke", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert {"date", "commit", "command", "versions", "machine", "missing"} < result.keys()
    for name in ("nesterov-1", "clip-200", "sgd", "bf16", "small", "call", "cached"):
        fusedstep = next(iter(result["rows"][name]["contenders"].values()))
        assert fusedstep["low"] <= fusedstep["median"] <= fusedstep["high"]
    assert path.with_suffix(".png").exists() == bool(importlib.util.find_spec("matplotlib"))
    judged = [bar for bar in result["bars"] if bar["verdict"] != "not measured"]
    assert {bar["row"] for bar in judged} >= {"call", "cached", "import"}
    if not result["missing"]:
        assert len(judged) >= len(result["bars"]) - 1  # the wheel may not have been made


def test_a_row_frees_its_memory_before_the_next_is_made() -> None:
    arrays = []

    def make() -> Row:
        array = np.zeros(10)
        arrays.append(weakref.ref(array))
        return Row("row", "", {"who": lambda: float(array[0])})

    def rows() -> Iterator[Row]:
        for _ in range(3):
            assert all(array() is None for array in arrays)
            yield make()

    results = list(measure_all(rows(), rounds=2))
    assert [len(result.samples["who"]) for result in results] == [2, 2, 2]
