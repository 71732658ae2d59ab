"""State of optimizers on a device: as dicts, files, copies."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import fusedstep as fs
import numpy as np
import objects
import pytest
from device_arrays import DeviceArray, Emulator, to_device
from device_twins import Twins, check_same, on_device, on_host, random
from exact import DTYPES
from fusedstep import _core, buffers

pytestmark = pytest.mark.usefixtures("emulator")


def started(kind: type[fs.Optimizer] = fs.Adam, dtype: Any = np.float32, **hypers: Any) -> Twins:
    twins = Twins(kind, random(0, dtype=dtype), lr=0.1, **{**objects.FORMS[kind], **hypers})
    for t, grads in enumerate(([*random(1)[:2], None, None], random(2))):
        if t and hypers.get("on_nonfinite") == "skip":
            twins.step([np.full_like(a, np.nan) for a in random(1)], lazy=True)
        twins.step(grads, lazy=True)
    return twins


@pytest.mark.parametrize("kind", objects.FORMS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_files(tmp_path: Path, kind: type[fs.Optimizer], suffix: str) -> None:
    """The bytes are those of the CPU's optimizer, and either one reads either one's."""
    twins = started(kind, on_nonfinite="skip")
    paths = {name: tmp_path / f"{name}{suffix}" for name in ("cpu", "gpu")}
    twins.cpu.save(paths["cpu"])
    twins.gpu.save(paths["gpu"])
    if suffix == ".npz":  # in the other, the order of the metadata is left to chance
        assert paths["cpu"].read_bytes() == paths["gpu"].read_bytes()
    fresh = Twins(kind, random(7), lr=0.3, **objects.FORMS[kind])
    fresh.gpu.load(paths["cpu"])
    fresh.cpu.load(paths["gpu"])
    fresh.check()
    for both in (twins, fresh):
        both.step(random(9), lazy=True)
        both.check()
    check_same(on_host(fresh.params["gpu"]), twins.params["cpu"])


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_other_dtypes(tmp_path: Path, dtype: str) -> None:
    twins = started(fs.Adam, DTYPES[dtype])
    twins.gpu.save(tmp_path / "run.npz")
    fresh = Twins(fs.Adam, random(7, dtype=DTYPES[dtype]), lr=0.3, **objects.FORMS[fs.Adam])
    for optimizer in (fresh.gpu, fresh.cpu):
        optimizer.load(tmp_path / "run.npz")
    fresh.step(random(3))
    fresh.check()


def test_dicts() -> None:
    twins = started(fs.NAdam, on_nonfinite="skip")
    fresh = Twins(fs.NAdam, random(7), lr=0.3, on_nonfinite="skip", momentum_decay=0.2)
    fresh.gpu.load_state_dict(twins.gpu.state_dict())
    fresh.cpu.load_state_dict(twins.gpu.state_dict())
    made, own = fresh.gpu.state_dict()["state"], twins.gpu.state_dict()["state"]
    assert all(made[k]["exp_avg"] is not own[k]["exp_avg"] for k in own)
    fresh.step(random(3), lazy=True)
    fresh.check()


def test_the_order_of_dimensions_is_kept() -> None:
    params = [np.asarray(np.arange(24.0).reshape(2, 3, 4), np.float32).transpose(2, 0, 1)]
    twins = Twins(fs.Momentum, params, lr=0.1)
    twins.step(params)
    buffer = twins.gpu.state_dict()["state"][0]["velocity"]
    assert buffer.array.strides == params[0].strides
    twins.gpu.load_state_dict(twins.cpu.state_dict())
    twins.step(params)
    twins.check()


def test_state_from_elsewhere() -> None:
    """Buffers of the host and of the device, of any strides, rounded where need be."""
    values = random(5, dtype=np.float64)
    twins = started(fs.Momentum)
    given = [np.repeat(values[0], 2)[::2], values[1], values[2], None]
    twins.cpu.set_state(velocity=given, step=7)
    on_gpu = [DeviceArray(given[0]), values[1], to_device(values[2].astype(np.float16)), None]
    with_half = [*given[:2], values[2].astype(np.float16).astype(np.float32), None]
    twins.cpu.set_state(velocity=with_half, step=7)
    twins.gpu.set_state(velocity=[*on_gpu[:2], to_device(with_half[2]), None], step=7)
    twins.step(random(3))
    twins.check()
    assert twins.gpu.steps == 8


def test_a_state_that_is_set_is_no_first_step() -> None:
    """Though the step before was skipped, for which the device had made one."""
    twins = Twins(fs.SGD, random(0), lr=0.1, momentum=0.9, dampening=0.5, on_nonfinite="skip")
    twins.step([np.full_like(a, np.nan) for a in random(1)], lazy=True)
    for optimizer in (twins.cpu, twins.gpu):
        optimizer.set_state(velocity=random(4))
    twins.step(random(2), lazy=True)
    twins.check()


def test_pickles_and_copies() -> None:
    """As far as the arrays themselves can be copied."""

    def reduce(self: DeviceArray) -> Any:
        return to_device, (self.numpy(), self.device)

    DeviceArray.__reduce__ = reduce
    try:
        twins = started(fs.NAdam, on_nonfinite="skip")
        for duplicate in (copy.deepcopy(twins.gpu), pickle.loads(pickle.dumps(twins.gpu))):
            check_same(on_host(duplicate.state_dict()), twins.cpu.state_dict())
            assert duplicate.steps == twins.cpu.steps
            assert duplicate.skipped_steps == 1
    finally:
        del DeviceArray.__reduce__
    twins.step(random(3), lazy=True)
    twins.check()


@pytest.mark.parametrize("name", ["lr", "rescale_grad"])
def test_numbers_in_buffers_are_saved_and_loaded(tmp_path: Path, name: str) -> None:
    """What is in them is saved, and comes back into the buffer that is there."""
    saved = fs.SGD(on_device(random(0)), lr=0.5)
    saved.param_groups[0][name] = to_device(np.array(0.25, np.float32))
    saved.save(tmp_path / "run.npz")
    assert saved.state_dict()["param_groups"][0][name] == 0.25
    for make in (to_device, np.copy):
        held = make(np.array([0.75], np.float32))
        fresh = fs.SGD(on_device(random(0)), lr=0.5)
        fresh.param_groups[0][name] = held
        fresh.load(tmp_path / "run.npz")
        assert fresh.param_groups[0][name] is held
        assert on_host([held])[0].tolist() == [0.25]


def test_a_failed_load_changes_nothing(emulator: Emulator) -> None:
    twins = started()
    before = on_host(twins.gpu.state_dict())
    state = twins.cpu.state_dict()
    state["state"][2]["exp_avg"] = np.zeros(7, np.float32)
    with pytest.raises(ValueError, match="exp_avg"):
        twins.gpu.load_state_dict(state)
    check_same(on_host(twins.gpu.state_dict()), before)
    assert emulator.fault is None
    twins.step(random(3))
    twins.check()


# --- arrays to the host and back ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_arrays_come_to_the_host(dtype: str) -> None:
    values = np.asarray(np.random.default_rng(0).standard_normal((4, 6)), np.float32)
    values = values.astype(DTYPES[dtype])
    for view in (values, values.T, values[::-1, ::2], values[1:, :0], values[2, 3]):
        array = DeviceArray(np.asarray(view))
        found = _core.to_host(array)
        expected = np.asarray(view)
        bits = expected.view(np.uint16) if dtype == "bfloat16" else expected
        assert found.tobytes() == bits.tobytes()
        assert found.shape == expected.shape
        assert buffers.dtype_of(array) == dtype


def test_arrays_are_written() -> None:
    for made in (np.zeros((3, 4), np.float32), np.zeros((4, 3), np.float32).T, np.zeros((), "f4")):
        array = DeviceArray(made)
        values = np.arange(1.0, 1.0 + made.size).reshape(made.shape)
        _core.write(array, values)
        assert array.numpy().tolist() == values.tolist()
        _core.write(array, 2.5)
        assert array.numpy().tolist() == np.full(made.shape, 2.5).tolist()
    with pytest.raises(ValueError, match="array is not dense"):
        _core.write(DeviceArray(np.zeros(8, np.float32)[::2]), 1.0)
    with pytest.raises(ValueError, match="broadcast"):
        _core.write(to_device(np.zeros(3, np.float32)), np.ones(4))


def test_where_arrays_are(emulator: Emulator) -> None:
    emulator.set(devices=2)
    places = [
        np.ones(2),
        to_device(np.ones(2)),
        to_device(np.ones(2), 1),
        to_device(np.ones(2, int)),
    ]
    assert [_core.device(a) for a in places] == ["cpu", "cuda:0", "cuda:1", "cuda:0"]
