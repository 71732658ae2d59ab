"""An optimizer of the CPU beside one of a device: they get the same, and have to do the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import fusedstep as fs
import numpy as np
from device_arrays import to_device
from exact import Array, mismatch
from gpu_devices import Device, Emulated, mapped


def on_device(tree: Any, device: int = 0) -> Any:
    """The same tree with its arrays copied to an emulated device."""
    return mapped(
        tree, lambda item: isinstance(item, np.ndarray), lambda item: to_device(item, device)
    )


def on_host(tree: Any) -> Any:
    """The same tree with its arrays copied back, after everything has run."""
    return Emulated().fetch(tree)


def check_same(got: Any, expected: Any, path: str = "") -> None:
    """Fails unless two trees hold the same bits, and the same of everything else."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), path
        for key, value in expected.items():
            check_same(got[key], value, f"{path}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected), path
        for index, value in enumerate(expected):
            check_same(got[index], value, f"{path}[{index}]")
    elif isinstance(expected, np.ndarray):
        assert not mismatch(got, expected), f"{path}: {mismatch(got, expected)}"
    else:
        assert got == expected or (got != got and expected != expected), (path, got, expected)


def check_result(got: Any, expected: fs.StepResult) -> None:
    """Fails unless both results say the same."""
    check_same(on_host(tuple(got)), tuple(expected), "result")


class Twins:
    """Two optimizers over copies of the same arrays.

    Args:
        kind: Their class.
        params: NumPy arrays, in any tree.
        device: Where the second one's are; the emulated device if None.
        **hypers: For both. An array in them is a number that only a device reads.

    Attributes:
        cpu, gpu: The optimizers.
        kept: What has to live until it has run: gradients.
    """

    def __init__(
        self, kind: type[fs.Optimizer], params: Any, *, device: Device | None = None, **hypers: Any
    ) -> None:
        self.device = device or Emulated()
        self.params = {"cpu": _copied(params), "gpu": self.device.put(params)}
        self.cpu = kind(self.params["cpu"], **hypers)
        self.gpu = kind(self.params["gpu"], **hypers)
        self.kept: list[Any] = []

    def step(self, grads: Any = None, *, lazy: bool = False, **options: Any) -> Any:
        """One step of both; `lazy` does not look at what the device says of it."""
        told = self.step_gpu(grads, **options)
        expected = self.cpu.step(grads, **options)
        if not lazy:
            check_same(self.device.fetch(tuple(told)), tuple(expected), "result")
        return expected

    def step_gpu(self, grads: Any = None, **options: Any) -> Any:
        """One step of the device's, with gradients at other alignments each time."""
        grads_of_gpu = self.device.put(grads, len(self.kept) // 2)
        options_of_gpu = self.device.put(options)
        self.kept += [grads_of_gpu, options_of_gpu]
        return self.gpu.step(grads_of_gpu, **options_of_gpu)

    def check(self) -> None:
        """Fails unless parameters, states and counts are the same."""
        check_same(self.device.fetch(self.params["gpu"]), self.params["cpu"], "params")
        check_same(self.device.fetch(self.gpu.state_dict()), self.cpu.state_dict(), "state_dict")
        assert (self.gpu.steps, self.gpu.skipped_steps) == (self.cpu.steps, self.cpu.skipped_steps)


def _copied(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_copied(value) for value in tree)
    return tree.copy(order="K") if isinstance(tree, np.ndarray) else tree


SIZES = (3, 0, 129, 16_385)


def random(
    seed: int, sizes: Sequence[int] = SIZES, dtype: Any = np.float32, scale: float = 1.0
) -> list[Array]:
    """Random arrays of these sizes."""
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal(n) * scale).astype(dtype) for n in sizes]
