"""An optimizer of the CPU beside one of a device: they get the same, and have to do the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import fusedstep as fs
import numpy as np
from device_arrays import DeviceArray, to_device
from exact import Array, mismatch


def on_device(tree: Any, device: int = 0) -> Any:
    """The same tree with its arrays copied to a device."""
    if isinstance(tree, dict):
        return {key: on_device(value, device) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(on_device(value, device) for value in tree)
    return to_device(tree, device) if isinstance(tree, np.ndarray) else tree


def on_host(tree: Any) -> Any:
    """The same tree with its arrays copied back, after everything has run."""
    if isinstance(tree, dict):
        return {key: on_host(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(on_host(value) for value in tree)
    return tree.numpy() if isinstance(tree, DeviceArray) else tree


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

    Attributes:
        cpu, gpu: The optimizers.
        kept: What has to live until it has run: gradients.
    """

    def __init__(self, kind: type[fs.Optimizer], params: Any, **hypers: Any) -> None:
        self.params = {"cpu": _copied(params), "gpu": on_device(params)}
        self.cpu = kind(self.params["cpu"], **hypers)
        self.gpu = kind(self.params["gpu"], **hypers)
        self.kept: list[Any] = []

    def step(self, grads: Any = None, *, lazy: bool = False, **options: Any) -> fs.StepResult:
        """One step of both; `lazy` does not look at what the device says of it."""
        grads_of_gpu = on_device(grads)
        options_of_gpu = {name: on_device(value) for name, value in options.items()}
        self.kept += [grads_of_gpu, options_of_gpu]
        told = self.gpu.step(grads_of_gpu, **options_of_gpu)
        expected = self.cpu.step(grads, **options)
        if not lazy:
            check_result(told, expected)
        return expected

    def check(self) -> None:
        """Fails unless parameters, states and counts are the same."""
        check_same(on_host(self.params["gpu"]), self.params["cpu"], "params")
        check_same(on_host(self.gpu.state_dict()), self.cpu.state_dict(), "state_dict")
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
