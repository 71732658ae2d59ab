"""Optimizer objects on a device: the same bits as on the CPU, whatever happens between steps."""

from __future__ import annotations

from typing import Any

import fusedstep as fs
import numpy as np
import objects
import pytest
from device_arrays import DeviceArray, Emulator, to_device
from device_twins import Twins, on_device, random
from exact import DTYPES

pytestmark = pytest.mark.usefixtures("emulator")

# Whole steps, steps of some arrays, of none, and of those that have not had one yet.
PATTERNS = ("1111", "1011", "0001", "0000", "1111", "0110", "1111")


def some(pattern: str, arrays: list[Any]) -> list[Any]:
    return [a if bit == "1" else None for bit, a in zip(pattern, arrays, strict=True)]


@pytest.mark.parametrize("kind", objects.FORMS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("patterns", [PATTERNS, PATTERNS[1:]], ids=["whole", "part"])
def test_patterns_of_gradients(kind: type[fs.Optimizer], patterns: tuple[str, ...]) -> None:
    """Arrays that come equally far share their progress on the device, and part again."""
    twins = Twins(kind, random(0), lr=0.1, grad_clip_norm=3.0, **objects.FORMS[kind])
    for t, pattern in enumerate(patterns):
        twins.step(some(pattern, random(10 + t)))
    twins.check()


@pytest.mark.parametrize("kind", objects.FORMS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("first", [True, False], ids=["the first", "later"])
def test_skipped_steps(emulator: Emulator, kind: type[fs.Optimizer], first: bool) -> None:
    """A skipped first step has not happened: the rule of first steps holds in the next one."""
    twins = Twins(kind, random(0), lr=0.1, on_nonfinite="skip", **objects.FORMS[kind])
    bad = [np.full_like(a, np.nan) for a in random(1)]
    steps = [bad, bad] if first else []
    steps += [random(2), some("1010", bad), random(3), bad, some("0111", random(4))]
    for grads in steps:
        twins.step(grads, lazy=True)
    before = emulator.calls("cudaStreamSynchronize")
    twins.check()
    assert emulator.calls("cudaStreamSynchronize") > before


@pytest.mark.parametrize("kind", [fs.SGD, fs.Adam], ids=lambda kind: kind.__name__)
def test_only_a_skipped_step(kind: type[fs.Optimizer]) -> None:
    """There is no state then, and no count."""
    twins = Twins(kind, random(0), lr=0.1, on_nonfinite="skip", **objects.FORMS[kind])
    twins.step([np.full_like(a, np.inf) for a in random(1)], lazy=True)
    twins.check()
    assert twins.gpu.state_dict()["state"] == {}
    assert twins.gpu.skipped_steps == 1
    twins.step(random(2))
    twins.check()


def test_the_rule_of_a_first_step_after_a_skipped_one() -> None:
    """With dampening, the first applied step is another one than the rest."""
    twins = Twins(fs.SGD, random(0), lr=0.1, momentum=0.9, dampening=0.5, skip_grad_norm=1e3)
    twins.step([a * 1e5 for a in random(1)])
    twins.step(random(2))
    assert twins.cpu.state_dict()["state"][0]["velocity"].tobytes() == random(2)[0].tobytes()
    twins.check()


def test_a_buffer_that_comes_later() -> None:
    """SGD makes its buffer when momentum first applies, after steps without."""
    twins = Twins(fs.SGD, random(0), lr=0.1, momentum=0.0, dampening=0.5, on_nonfinite="skip")
    twins.step(random(1))
    for optimizer in (twins.cpu, twins.gpu):
        optimizer.param_groups[0]["momentum"] = 0.9
    twins.step([np.full_like(a, np.nan) for a in random(1)], lazy=True)
    twins.check()
    twins.step(some("1101", random(2)), lazy=True)
    twins.step(random(3), lazy=True)
    twins.check()


def test_a_further_buffer_that_comes_later() -> None:
    """Such a state says nothing of a first step; whether it stays, is asked at once."""
    twins = Twins(fs.Adam, random(0), lr=0.1, on_nonfinite="skip")
    twins.step(random(1))
    for optimizer in (twins.cpu, twins.gpu):
        optimizer.param_groups[0]["amsgrad"] = True
    twins.step([np.full_like(a, np.nan) for a in random(1)], lazy=True)
    twins.check()
    twins.step(random(2), lazy=True)
    twins.step(random(3), lazy=True)
    twins.check()


@pytest.mark.parametrize("scope", ["all", "group", "array"])
def test_groups_and_clip_scopes(scope: str) -> None:
    groups = [
        {"params": random(0), "grad_clip_norm": 0.5, "rescale_grad": 0.5},
        {"params": random(1), "lr": 0.01, "grad_clip_value": 0.02, "maximize": True},
        {"params": random(2), "rescale_grad": 0.5, "weight_decay": 0.1},
    ]
    twins = Twins(fs.Adam, groups, lr=0.1, grad_clip_scope=scope, on_nonfinite="skip")
    for t in range(3):
        grads = [random(10 + 3 * t + k) for k in range(3)]
        if t == 1:
            grads[1][2][5] = np.nan
        twins.step(grads)
    twins.check()


def test_decay_by_a_function() -> None:
    twins = Twins(
        fs.AdamW, {"w": random(0), "b": random(1)}, lr=0.1,
        weight_decay=lambda path, _: 0.1 if path.startswith("w") else 0.0,
    )  # fmt: skip
    for t in range(2):
        twins.step({"w": random(2 + t), "b": random(4 + t)})
    twins.check()


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("grad", ["float64", "float32", "float16", "bfloat16"])
def test_storages(dtype: str, grad: str) -> None:
    """Gradients that no kernel reads as they are, are gathered and rounded once."""
    twins = Twins(fs.Momentum, random(0, dtype=DTYPES[dtype]), lr=0.1, grad_clip_norm=2.0)
    for t in range(2):
        twins.step(random(1 + t, dtype=DTYPES[grad]))
    twins.check()


def test_layouts() -> None:
    """Parameters in any order of dimensions; gradients with any strides, zero and negative ones."""
    rng = np.random.default_rng(0)

    def values(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    params = [values(5, 7).T, values(3, 4, 5).transpose(1, 2, 0), values(40), values(2, 3)]
    twins = Twins(fs.Adam, params, lr=0.1, grad_clip_norm=1.0)
    host = twins.params["cpu"]
    grads = [values(7, 10)[:, ::2], values(3, 4, 5).transpose(1, 2, 0)[::-1], values(80)[::-2]]
    grads.append(np.broadcast_to(values(3), (2, 3)))
    on_gpu = [DeviceArray(g) for g in grads]
    for _ in range(2):
        result = twins.gpu.step(on_gpu)
        expected = twins.cpu.step(grads)
        assert result.grad_norm == expected.grad_norm
    assert [p.strides for p in host] == [p.array.strides for p in twins.params["gpu"]]
    twins.check()


def test_parameter_copies() -> None:
    twins = Twins(fs.AdamW, random(0), lr=0.1)
    for dtype in ("float16", "bfloat16"):
        copies = random(5, dtype=DTYPES[dtype])
        twins.step(random(1), param_copy=copies)
        on_gpu = twins.kept[-1]["param_copy"]
        for mine, expected in zip(on_gpu, copies, strict=True):
            assert mine.numpy().tobytes() == expected.tobytes()
    twins.check()


def test_gradients_of_the_arrays_themselves() -> None:
    twins = Twins(fs.Momentum, random(0), lr=0.1)
    grads = random(1)
    for param, grad in zip(twins.params["gpu"], grads, strict=True):
        param.grad = None if grad.size == 129 else type(param)(grad.copy())
    twins.gpu.step()
    twins.cpu.step([None if g.size == 129 else g for g in grads])
    twins.check()


def test_step_counts_need_no_device_where_nothing_can_be_skipped(emulator: Emulator) -> None:
    twins = Twins(fs.Adam, random(0), lr=lambda t: 0.1 / (1 + t), grad_clip_norm=1.0)
    twins.step(random(1), lazy=True)  # makes what the device keeps
    before = emulator.calls("cudaStreamSynchronize"), emulator.calls("cudaMemcpyAsync")
    for t in range(3):
        twins.step(random(2 + t), lazy=True)
        assert twins.gpu.steps == 2 + t
        twins.gpu.state_dict()
    after = emulator.calls("cudaStreamSynchronize"), emulator.calls("cudaMemcpyAsync")
    assert after == before
    twins.check()


def test_functions_of_t_wait_where_steps_can_be_skipped(emulator: Emulator) -> None:
    twins = Twins(fs.Adam, random(0), lr=lambda t: 0.1 / (1 + t), on_nonfinite="skip")
    for t in range(5):
        grads = random(1 + t)
        if t == 2:
            grads[0][0] = np.nan
        before = emulator.calls("cudaStreamSynchronize")
        twins.step(grads, lazy=True)
        assert t == 0 or emulator.calls("cudaStreamSynchronize") > before
    twins.check()


def test_parameters_that_move_to_another_device(emulator: Emulator) -> None:
    """As `module.to()` does it: the objects stay, their memory changes. State has to follow."""
    emulator.set(devices=2)
    twins = Twins(fs.Adam, random(0), lr=0.1, on_nonfinite="skip")
    twins.step(random(1), lazy=True)
    saved = twins.gpu.state_dict()
    twins.kept += [saved, [p.array for p in twins.params["gpu"]]]
    for param in twins.params["gpu"]:
        moved = to_device(param.numpy(), 1)
        twins.kept.append(moved)
        param.array, param.device = moved.array, 1
    grads = [to_device(g, 1) for g in random(2)]
    with pytest.raises(ValueError, match=r"is on cuda:0, but params\[0\] is on cuda:1; the arrays"):
        twins.gpu.step(grads)
    assert twins.gpu.steps == 1
    twins.gpu.load_state_dict(saved)
    twins.gpu.step(grads)
    twins.cpu.step(random(2))
    twins.check()


def test_arrays_that_are_registered_later() -> None:
    first, second = random(0), random(1)
    twins = Twins(fs.Adam, [{"params": first}], lr=0.1, on_nonfinite="skip")
    twins.step([random(2)], lazy=True)
    late = {"cpu": [a.copy() for a in second], "gpu": on_device(second)}
    twins.cpu.add_param_group({"params": late["cpu"]})
    twins.gpu.add_param_group({"params": late["gpu"]})
    assert twins.gpu.steps == 1
    twins.step([random(3), random(4)], lazy=True)
    twins.check()


def test_more_rows_than_a_block_of_cells() -> None:
    """Each array has had another number of steps, as after loading."""
    count = 1100
    twins = Twins(fs.Adam, random(0, [2] * count), lr=0.1)
    twins.step(random(1, [2] * count))
    state = twins.cpu.state_dict()
    for k in range(count):
        state["state"][k]["step"] = 1 + k
    twins.cpu.load_state_dict(state)
    twins.gpu.load_state_dict(state)
    for t in range(2):
        twins.step(random(2 + t, [2] * count))
    twins.check()
