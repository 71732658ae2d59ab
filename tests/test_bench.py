"""`make bench` in tiny: every row is built, verified against the oracle, timed and written."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench import models
from bench.bars import Bar
from bench.machine import ROOT
from bench.measure import Result, Row, measure_all


def test_every_row_runs_and_is_written(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "bench", "--smoke", "--output", str(tmp_path)]
    # Spinning workers of torch take minutes where other tests use the processors.
    env = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert {"date", "commit", "command", "versions", "machine", "missing"} < result.keys()
    for name in ("nesterov-1", "clip-200", "sgd", "bf16", "small", "call", "cached"):
        fusedstep = next(iter(result["rows"][name]["contenders"].values()))
        assert fusedstep["low"] <= fusedstep["median"] <= fusedstep["high"]
    assert path.with_suffix(".png").exists() == bool(importlib.util.find_spec("matplotlib"))
    if "torch" not in result["missing"]:
        torch_rows = [name for name in result["rows"] if name.startswith("torch-")]
        assert len(torch_rows) == 8
        for name in torch_rows:
            contenders = result["rows"][name]["contenders"]
            assert next(iter(contenders)) == "fusedstep.torch"
            assert len(contenders) >= 4
    judged = [bar for bar in result["bars"] if bar["verdict"] != "not measured"]
    assert {bar["row"] for bar in judged} >= {"call", "cached", "import"}
    if not result["missing"]:
        assert len(judged) >= len(result["bars"]) - 2  # of the wheels at most one has been made


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


@pytest.mark.parametrize(
    ("shapes", "tensors", "elements"),
    [(models.resnet50(), 161, 25_557_032), (models.gpt2(), 148, 124_439_808)],
    ids=["resnet50", "gpt2"],
)
def test_models_have_the_published_number_of_parameters(
    shapes: list[models.Shape], tensors: int, elements: int
) -> None:
    assert (len(shapes), sum(map(math.prod, shapes))) == (tensors, elements)


def test_of_several_contenders_the_fastest_counts() -> None:
    samples = {"ours": [1.0, 2.0, 3.0], "a": [2.0, 9.0, 9.0], "b": [3.0, 8.0, 3.0]}
    result = Result(Row("row", "", {}), samples, 0)
    bar = Bar("row", ("a", "b"), "ours", at_least=2)
    assert bar.counted(result) == "b"  # median 3, a has 9
    assert bar.figure(result) == result.ratio("b", "ours")
    assert bar.title(result) == "fastest of 2 (b) / ours"

    missing = Bar("row", ("a", "c"), "ours", at_least=2)
    assert (missing.counted(result), missing.figure(result)) == (None, None)
    assert missing.title(result) == "fastest of 2 / ours"

    alone = Bar("row", "a", at_most=1)
    assert (alone.figure(result), alone.title(result)) == (result.spread("a"), "a")
