"""Every rule, form and storage on a GPU: the bits of the CPU, at any size and alignment.

The ordinary test run executes a part of it on the emulated device (tests/device_arrays.py), and
`pytest -m gpu` all of it on a GPU. FUSEDSTEP_WHOLE_MATRIX=1 lets the emulator have all of it, too.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from typing import Any

import driver
import fusedstep as fs
import gpu_devices
import numpy as np
import objects
import pytest
import reference
from device_twins import Twins, check_same
from exact import DTYPES, Array
from fusedstep import _core

WHOLE = os.environ.get("FUSEDSTEP_WHOLE_MATRIX") == "1"
# Around vectors, tiles and chunks; each at every offset of 16 bytes, and a few once.
SMALL = (1, 3, 4, 5, 33, 1030)
LARGE = (4099, 16_383, 16_384, 16_385, 40_000)
FORMS = [(rule, case) for rule, of in reference.RULES.items() for case in of.cases]
# What is asked for in the steps of a test, one after the other: with one launch and with two.
STEPS: tuple[dict[str, Any], ...] = (
    {},
    {"grad_clip_norm": 0.7, "rescale_grad": 0.5, "on_nonfinite": "skip"},
    {"grad_clip_value": 0.4, "maximize": True},
)
# Gradients of longdouble are the CPU's alone.
STORAGES = [s for s in (*driver.KERNEL_STORAGES, *driver.STAGED_STORAGES) if "longdouble" not in s]
PLAIN = ("float32", "float32", "float32")
RULES = [rule for rule, of in reference.RULES.items() if of.cases]  # those of optimizers


def shifted(sizes: tuple[int, ...], every: bool) -> Iterator[tuple[int, int]]:
    """Sizes, each with the offset of one tensor or of four."""
    for index, size in enumerate(sizes):
        for offset in range(4) if every else (index,):
            yield size, offset % 4


class Functional:
    """One rule's function on the CPU and on a device, with state in given storage.

    The buffers of tensor i are all at the same offset if i is even, else at several; gradients move
    by one from step to step.
    """

    def __init__(
        self,
        device: gpu_devices.Device,
        form: tuple[str, str],
        storage: tuple[str, str, str],
        tensors: list[tuple[int, int]],
        copy: str | None = None,
    ) -> None:
        rule, case = form
        self.device, self.rule, self.storage = device, rule, storage
        self.sizes = tuple(size for size, _ in tensors)
        self.offsets = [offset for _, offset in tensors]
        self.group = driver.make_group(
            rule, reference.RULES[rule].cases[case], storage, self.sizes, copy
        )
        self.names = reference.RULES[rule].slots
        host: dict[str, Any] = {"params": self.group.params}
        for k, name in enumerate(self.names):
            host[name] = [slots[k] for slots in self.group.slots]
        if copy:
            host["param_copy"] = self.group.copies
        self.host = host
        self.gpu = {name: self._put(list_, k) for k, (name, list_) in enumerate(host.items())}
        self.kept: list[Any] = []
        self.scalars: dict[str, Any] = {}

    def _put(self, arrays: list[Array], shift: int) -> list[Any]:
        return [
            self.device.array(a, (offset + (shift if i % 2 else 0)) % 4)
            for i, (a, offset) in enumerate(zip(arrays, self.offsets, strict=True))
        ]

    def step(self, t: int, **options: Any) -> None:
        grads = driver.values(self.storage[1], self.sizes, seed=100 + t)
        self.kept.append(self._put(grads, t))
        function, hyper = driver.public_form(self.rule, self.group.hyper)
        given = {**hyper, **self.scalars, **options}
        expected = function(grads=grads, **self.host, **given)
        told = function(grads=self.kept[-1], **self.gpu, **given)
        for name in ("grad_norm", "clip_coef", "skipped", "grad_norms"):
            check_same(getattr(told, name), getattr(expected, name), f"step {t}: {name}")
        self.scalars = {k: v for k, v in expected.state.items() if k not in self.names}
        check_same({k: told.state[k] for k in self.scalars}, self.scalars, f"step {t}: state")

    def check(self) -> None:
        for name, arrays in self.host.items():
            for i, (got, expected) in enumerate(zip(self.gpu[name], arrays, strict=True)):
                where = f"{name}[{i}] of {expected.size}, offset {self.offsets[i]}"
                check_same(self.device.numpy(got), expected, where)


def run(device: gpu_devices.Device, *args: Any, **kwargs: Any) -> None:
    functional = Functional(device, *args, **kwargs)
    for t, options in enumerate(STEPS):
        functional.step(t, **options)
    functional.check()


def needs(device: gpu_devices.Device, *dtypes: str) -> None:
    for dtype in dtypes:
        if not device.has(dtype):
            pytest.skip(f"{device.name} has no {dtype}")


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_forms(device: gpu_devices.Device, form: tuple[str, str]) -> None:
    """Each form in float32, at every size and alignment."""
    run(device, form, PLAIN, list(shifted(SMALL, True)) + list(shifted(LARGE[:1], False)))


@pytest.mark.parametrize(
    ("rule", "storage"),
    [(rule, s) for rule in RULES for s in driver.storages(rule, tuple(STORAGES))],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_storages(device: gpu_devices.Device, rule: str, storage: tuple[str, str, str]) -> None:
    """Each rule in every storage; the forms go round."""
    needs(device, *storage)
    cases = list(reference.RULES[rule].cases)
    case = cases[STORAGES.index(storage) % len(cases)]
    run(device, (rule, case), storage, list(shifted((1, 3, 4, 5, 33), True)))


@pytest.mark.parametrize("rule", RULES)
def test_sizes(device: gpu_devices.Device, rule: str) -> None:
    """Around the borders of chunks, where a tensor has several; one kernel or another."""
    case = next(iter(reference.RULES[rule].cases))
    for storage in (PLAIN, ("float64",) * 3, ("bfloat16", "bfloat16", "float32")):
        if all(map(device.has, storage)):
            run(device, (rule, case), storage, list(shifted(LARGE, device.name != "emulated")))


@pytest.mark.parametrize("rule", RULES)
def test_everything(device: gpu_devices.Device, rule: str) -> None:
    """Every form in every storage at every size and alignment."""
    if device.name == "emulated" and not WHOLE:
        pytest.skip("takes minutes on the emulator: FUSEDSTEP_WHOLE_MATRIX=1")
    tensors = list(shifted((*SMALL, 4099), True)) + list(shifted((16_384, 16_385), False))
    storages = driver.storages(rule, tuple(STORAGES))
    for case, storage in itertools.product(reference.RULES[rule].cases, storages):
        if all(map(device.has, storage)):
            run(device, (rule, case), storage, tensors)


@pytest.mark.parametrize("copy", ["float16", "bfloat16"])
@pytest.mark.parametrize("rule", RULES)
def test_parameter_copies(device: gpu_devices.Device, rule: str, copy: str) -> None:
    needs(device, copy)
    case = next(iter(reference.RULES[rule].cases))
    run(device, (rule, case), PLAIN, list(shifted((1, 3, 33, 1030), True)), copy)


@pytest.mark.parametrize("rule", reference.RULES)
def test_raw_coefficients(device: gpu_devices.Device, rule: str) -> None:
    """Coefficients that no hyper-parameters make."""
    index = _core.rules()[rule]["index"]
    sizes = (1, 3, 33, 1030)
    for coefficients in reference.RULES[rule].coefficients.values():
        group = driver.make_group(rule, {}, PLAIN, sizes)
        slots = tuple(list(s) for s in zip(*group.slots, strict=True))
        host = (group.params, group.grads, slots if group.slots[0] else ())
        gpu = device.put(host)
        _core.step_coefficients(index, *gpu, coefficients)
        _core.step_coefficients(index, *host, coefficients)
        check_same(device.fetch(gpu), host)


# --- gradients in any order -----------------------------------------------------------------------


def layouts(device: gpu_devices.Device, dtype: str) -> tuple[list[Array], list[Array]]:
    """Parameters with any order of dimensions; gradients with any strides, zeros among them."""
    rng = np.random.default_rng(0)

    def values(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(DTYPES[dtype])

    params = [
        values(5, 7).T, values(3, 4, 5).transpose(1, 2, 0), values(40), values(2, 3), values(),
        values(150, 130), values(0, 3), values(33, 1, 2),
    ]  # fmt: skip
    steps = (-1, -2) if device.has_negative_strides else (1, 2)
    grads = [
        values(7, 10)[:, ::2], values(3, 4, 5).transpose(1, 2, 0)[:: steps[0]],
        values(80)[:: steps[1]], np.broadcast_to(values(3), (2, 3)), values(),
        values(130, 150).T, values(3, 0).T, np.broadcast_to(values(1, 1, 2), (33, 1, 2)),
    ]  # fmt: skip
    return params, grads


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", [fs.SGD, fs.Adam], ids=lambda kind: kind.__name__)
def test_layouts(device: gpu_devices.Device, kind: type[fs.Optimizer], dtype: str) -> None:
    needs(device, dtype)
    params, grads = layouts(device, dtype)
    twins = Twins(kind, params, device=device, lr=0.1, grad_clip_norm=1.0)
    for _ in range(2):
        twins.step(grads)
    twins.check()


# --- objects --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", objects.FORMS, ids=lambda kind: kind.__name__)
def test_objects(device: gpu_devices.Device, kind: type[fs.Optimizer], dtype: str) -> None:
    """State that is made, steps that are skipped, arrays without a gradient."""
    needs(device, dtype)
    sizes = (3, 0, 129, 5, 16_385)

    def draw(seed: int, bad: bool = False) -> list[Any]:
        arrays = objects.arrays(seed, DTYPES[dtype], sizes)
        if bad:
            arrays[2][128] = np.inf
        return arrays

    twins = Twins(
        kind, draw(0), device=device, lr=0.1, on_nonfinite="skip", grad_clip_norm=3.0,
        weight_decay=0.01, **objects.FORMS[kind],
    )  # fmt: skip
    for t, bad in enumerate((True, False, False, True, False)):
        grads = draw(1 + t, bad)
        if t == 2:
            grads[0] = grads[3] = None
        twins.step(grads, lazy=t % 2 == 0)
    twins.check()
    assert (twins.gpu.steps, twins.gpu.skipped_steps) == (3, 2)


@pytest.mark.parametrize("kind", [fs.SGD, fs.Adam], ids=lambda kind: kind.__name__)
def test_accumulated_gradients(device: gpu_devices.Device, kind: type[fs.Optimizer]) -> None:
    """Sums of gradients, and their norm, are the CPU's."""
    twins = Twins(kind, objects.arrays(0), device=device, lr=0.1, grad_clip_norm=1.0)
    for t in range(2):
        for k in range(3):
            grads = objects.arrays(10 * t + k + 1)
            on_gpu = device.put(grads)
            twins.kept.append(on_gpu)
            twins.gpu.accumulate(on_gpu, scale=1 / 3)
            twins.cpu.accumulate(grads, scale=1 / 3)
        twins.step()
    twins.check()


# --- the norm -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_norms(device: gpu_devices.Device, dtype: str) -> None:
    """Of many shapes of trees: chunk borders, many tensors, more than one level of sums."""
    needs(device, dtype)
    few = device.name == "emulated"
    shapes = [[1], [16_384], [16_385, 0, 3], [7] * 1100, [40_000, 1, 16_383], []]
    if not few:
        shapes += [[16_384 * 1025 + 1], [3] * 5000]
    for k, sizes in enumerate(shapes):
        grads = driver.values(dtype, tuple(sizes), seed=k) if sizes else []
        assert fs.sum_squares(device.put(grads)) == fs.sum_squares(grads), sizes[:3]


@pytest.mark.parametrize("size", [5, 16_390])
@pytest.mark.parametrize("scale", [1e-200, 1e200, 1e-320])
def test_norms_beyond_the_range(device: gpu_devices.Device, scale: float, size: int) -> None:
    """Squares of float64 that leave the range get a second, scaled look."""
    grads = [a.astype(np.float64) * scale for a in objects.arrays(1, np.float64, (size, 3, size))]
    twins = Twins(
        fs.SGD, objects.arrays(0, np.float64, (size, 3, size)), device=device, lr=0.1,
        grad_clip_norm=1.0,
    )  # fmt: skip
    twins.step(grads)
    assert 0 < twins.cpu.step(grads).grad_norm < math.inf
    twins.step_gpu(grads)
    twins.check()
