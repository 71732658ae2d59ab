"""The examples run, and show what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# `make demo`, `make demo-torch` and `make demo-jax`, with packages of their own.
DEMOS = {"digits.py", "char_transformer.py", "jax_digits.py"}

pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="runs in a checkout only")


def run(name: str, *arguments: object, folder: Path | None = None) -> str:
    """What an example prints; a warning is an error."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def test_every_example_is_run_here() -> None:
    here = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert path.name == "digits.py" or f'run("{path.name}"' in here, path.name
        if path.name not in DEMOS:
            lines = path.read_text().splitlines()
            assert len(lines) <= 80, path.name
            assert any(f"python examples/{path.name}" in line for line in lines), path.name


def test_mlp() -> None:
    """Both learn the spirals; the schedules fall, one of them to zero."""
    text = run("mlp_nadam_adamw.py", 300)
    results = dict(re.findall(r"^(\w+): loss [\d.]+, ([\d.]+)% right$", text, re.MULTILINE))
    assert results.keys() == {"NAdam", "AdamW"}
    assert all(float(accuracy) >= 95 for accuracy in results.values())
    lrs = [[float(lr) for lr in re.findall(r"lr ([\d.]+)", line)] for line in text.splitlines()[:9]]
    assert lrs[0] == [0.02, 0.02]
    for name in range(2):
        column = [row[name] for row in lrs]
        assert column == sorted(column, reverse=True)
        assert column[-1] < 0.7 * column[0]


def test_sutskever_momentum() -> None:
    """The schedule beats the moderate constants and does not go uphill, as the largest one does."""
    header, *table, uphill = run("sutskever_momentum.py", 3000).splitlines()
    names = header.split()[1:]
    last = dict(zip(names, map(float, table[-1].split()[1:]), strict=True))
    rises = dict(zip(names, map(int, uphill.split()[1:]), strict=True))
    assert names == ["0.5", "0.9", "0.99", "schedule"]
    assert len(table) == 8
    assert last["schedule"] < last["0.9"] / 4 < last["0.5"] / 100
    assert rises["schedule"] == 0 < rises["0.99"]


@pytest.mark.parametrize("parts", [1, 4])
def test_accumulation(parts: int) -> None:
    text = run("accumulation.py", parts)
    norms = re.findall(r"norm ([\d.]+) of \d parts, ([\d.]+) of the whole", text)
    assert len(norms) == 4
    for accumulated, whole in norms:
        assert float(accumulated) == pytest.approx(float(whole), rel=1e-3, abs=1e-2)
    clips = [float(c) for c in re.findall(r"clipped by ([\d.]+)", text)]
    assert clips[0] < 0.3
    assert clips[-1] == 1
    (difference,) = re.findall(r"difference of the parameters: (\S+)", text)
    assert float(difference) == 0 if parts == 1 else float(difference) < 3e-3
    assert "200 steps" in text


@pytest.mark.parametrize("steps", [(25, 25), (0, 3)])
def test_save_and_resume(steps: tuple[int, int]) -> None:
    saved, loaded, after = run("save_and_resume.py", *steps).splitlines()
    assert saved.removeprefix("saved: ") == loaded.removeprefix("loaded: ")
    assert f"last_epoch={steps[0]})" in loaded
    assert after.startswith(f"after {sum(steps)} steps, lr ")
    assert after.endswith(": the same bits")


@pytest.mark.framework("torch")
def test_char_transformer(tmp_path: Path) -> None:
    """`make demo-torch`, tiny: all three learn, both ways alike, and there is a picture.

    Over a few steps losses are alike to what rounding in float32 makes of them.
    """
    text = run("char_transformer.py", "--smoke", "--steps", 12, folder=tmp_path)
    for name in ("AdamW", "NAdam", "Nesterov"):
        line = rf"^{name}: losses from ([\d.]+) to ([\d.]+), .* by at most (\S+)"
        ((first, last, difference),) = re.findall(line, text, re.MULTILINE)
        assert float(last) < float(first) - 0.1
        assert float(difference) < 1e-4
    assert len(set(re.findall(r"to ([\d.]+),", text))) == 3
    assert (tmp_path / "demo-torch.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.framework("jax")
def test_jax_digits(tmp_path: Path) -> None:
    """The same curve with fusedstep.jax as with optax, and a network that has learned."""
    pytest.importorskip("matplotlib")
    text = run("jax_digits.py", 8, folder=tmp_path)
    results = dict(re.findall(r"^(\w+): loss [\d.]+, ([\d.]+)% of the test set right$", text, re.M))
    assert results.keys() == {"fusedstep", "optax"}
    assert all(float(accuracy) > 95 for accuracy in results.values())
    (difference,) = re.findall(r"largest difference of the losses: (\S+)", text)
    assert float(difference) < 1e-4
    assert (tmp_path / "demo-jax.png").read_bytes().startswith(b"\x89PNG")
