"""`make bench` in tiny: every row is built, verified against the oracle, timed and written."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


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
