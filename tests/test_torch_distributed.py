"""fusedstep.torch on torch.distributed: several processes on this machine, with gloo."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import Workers

pytestmark = pytest.mark.framework("torch")


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Processes for all tests of this file."""
    pool = Workers(tmp_path_factory.mktemp("stores"))
    yield pool
    pool.stop()


def run(workers: Workers, job: str, world: int, *args: Any) -> list[Any]:
    return workers.run(f"distributed_jobs:{job}", world, *args)


@pytest.mark.parametrize(
    ("world", "rule", "dtype"),
    [
        *((2, "SGD", "float64"), (3, "AdamW", "float32")),
        *((4, "SGD", "float32"), (4, "NAdam", "float32")),
    ],
)
def test_equal_to_the_unsharded_run(workers: Workers, rule: str, dtype: str, world: int) -> None:
    """Norms on all ranks have the same bits, too."""
    results = run(workers, "every_placement", world, world, rule, dtype)
    assert all(result == results[0] for result in results)
    assert len(results[0]) == (9 if world == 4 else 4)


# --- what all processes decide alike ----------------------------------------------------------


@pytest.mark.parametrize("job", ["inf_and_nan", "limits", "scalers", "refusals"])
def test_decisions(workers: Workers, job: str) -> None:
    """What one process sees, all of them heed, and a step that is left out changes nothing."""
    run(workers, job, 4)


@pytest.mark.parametrize(
    ("job", "world"),
    [
        *(("extremes", 4), ("gradient_kinds", 2), ("no_gradients", 4), ("stale_graphs", 2)),
        *(("unusual_shards", 2), ("compiled", 2), ("strangers", 3)),
    ],
)
def test_tensors(workers: Workers, job: str, world: int) -> None:
    run(workers, job, world)


@pytest.mark.parametrize(("job", "world"), [("raises_on_one", 2), ("crossed_meshes", 4)])
def test_nobody_waits_or_moves_alone(workers: Workers, job: str, world: int) -> None:
    workers.run(f"agreement_jobs:{job}", world)


def test_norm_over_parts_of_a_mesh(workers: Workers) -> None:
    results = workers.run("agreement_jobs:submeshes", 4)
    assert all(norms == results[0] for norms in results)


# --- models -----------------------------------------------------------------------------------


def run_model(workers: Workers, job: str, world: int, *args: Any) -> list[Any]:
    return workers.run(f"fsdp_jobs:{job}", world, *args)


@pytest.mark.parametrize(
    ("kind", "world", "rule"),
    [
        *(("plain", 3, "AdamW"), ("plain", 2, "SGD"), ("mixed", 2, "AdamW")),
        *(("offloaded", 2, "NAdam"), ("hybrid", 4, "SGD")),
        *(("tensor parallel", 2, "SGD"), ("both", 4, "SGD"), ("both", 4, "AdamW")),
    ],
)
def test_training(workers: Workers, kind: str, world: int, rule: str) -> None:
    results = run_model(workers, "training", world, kind, rule)
    assert all(norms == results[0] for norms in results)


@pytest.mark.parametrize(
    ("job", "world"),
    [
        *(("only_scalars", 2), ("masters", 3), ("grad_scaler", 2)),
        *(("fused_of_torch", 2), ("flat_parameters", 2)),
    ],
)
def test_models(workers: Workers, job: str, world: int) -> None:
    run_model(workers, job, world)


def test_data_parallel(workers: Workers) -> None:
    """DDP."""
    results = run_model(workers, "data_parallel", 3)
    assert all(result == results[0] for result in results)


# --- checkpoints ------------------------------------------------------------------------------

CASES = ["SGD", "SGD without state", "AdamW", "NAdam", "masters"]


def run_checkpoint(workers: Workers, job: str, world: int, *args: Any) -> list[Any]:
    return workers.run(f"checkpoint_jobs:{job}", world, *args)


@pytest.mark.parametrize("case", CASES)
def test_state_dicts(workers: Workers, case: str) -> None:
    run_checkpoint(workers, "state_dicts", 2, case)


def test_checkpoints_of_torch(workers: Workers) -> None:
    run_checkpoint(workers, "with_torch", 2)


@pytest.mark.parametrize("case", CASES)
def test_resharded(workers: Workers, tmp_path: Path, case: str) -> None:
    """Saved by two processes, loaded by one, three and four: the same bits from there on."""
    undisturbed = run_checkpoint(workers, "save", 2, str(tmp_path), case)
    for world in (1, 2, 3, 4):
        resumed = run_checkpoint(workers, "resume", world, str(tmp_path), case)
        assert resumed == undisturbed[:1] * world, world


def test_killed_and_restarted(workers: Workers, tmp_path: Path) -> None:
    """A process is killed at the sixth step; from the save after the fourth all is as it was."""
    undisturbed = run_checkpoint(workers, "train", 2, str(tmp_path / "a"), 8, None)
    first = run_checkpoint(workers, "train", 2, str(tmp_path / "b"), 8, 5)
    assert first == ["lost a process", None]
    resumed = run_checkpoint(workers, "train", 2, str(tmp_path / "b"), 8, None)
    assert [begin for begin, *_ in resumed] == [4, 4]
    assert [rest for _, *rest in resumed] == [rest for _, *rest in undisturbed]
