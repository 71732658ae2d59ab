"""Checks an installed wheel where nothing but NumPy is: `make wheel` runs it, pytest does not.

It asks whether the packaged library works here: loads, runs every instruction set, gives the bits
of the formula, refuses bad input, saves. The full conformance tests are `test_*.py`.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import fusedstep as fs
import numpy as np
from fusedstep import _core
from numpy.typing import NDArray

Array = NDArray[np.float32]
F = np.float32
LR, MOMENTUM, DECAY, CLIP = 0.1, 0.9, 1e-2, 5.0
SIZES = (0, 1, 7, 16, 33, 1000, 16385)


def fma(a: float, b: Array, c: Array) -> Array:
    """a*b + c in float64, then float32: exact but for one element in 2^29, and none of these."""
    return (np.float64(F(a)) * b.astype(np.float64) + c.astype(np.float64)).astype(F)


def nesterov(p: Array, g: Array, v: Array, clip: float) -> tuple[Array, Array]:
    g = fma(DECAY, p, F(clip) * g)
    v = F(MOMENTUM) * v + g
    return fma(-LR, fma(MOMENTUM, v, g), p), v


def arrays(seed: int) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(size).astype(F) for size in SIZES]


def check_bits_on_every_isa() -> None:
    for isa in _core.available_isas():
        _core.force_isa(isa)
        assert _core.active_isa() == isa
        params, velocity = arrays(0), [np.zeros_like(p) for p in arrays(0)]
        expected_p, expected_v = arrays(0), [np.zeros_like(p) for p in arrays(0)]
        for step in range(3):
            grads = arrays(step + 1)
            result = fs.fused_nesterov_step(
                params,
                grads,
                velocity,
                lr=LR,
                momentum=MOMENTUM,
                weight_decay=DECAY,
                grad_clip_norm=CLIP,
            )
            norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in grads))
            np.testing.assert_allclose(result.grad_norm, norm, rtol=1e-13)
            for i, g in enumerate(grads):
                new = nesterov(expected_p[i], g, expected_v[i], result.clip_coef)
                expected_p[i], expected_v[i] = new
                np.testing.assert_array_equal(params[i], expected_p[i])
                np.testing.assert_array_equal(velocity[i], expected_v[i])
    _core.force_isa(None)


def check_threads_change_no_bit() -> None:
    results = []
    for threads in (1, 2, 3):
        fs.set_num_threads(threads)
        p = np.linspace(-1, 1, 400_000, dtype=F)
        norm = fs.fused_nesterov_step(p, np.sin(p), lr=LR, grad_clip_norm=1.0).grad_norm
        results.append((norm, p.tobytes()))
    fs.set_num_threads(0)
    assert results[0] == results[1] == results[2]


def check_bad_input_changes_nothing() -> None:
    p, g = np.ones(3, F), np.ones(4, F)
    message = ""
    try:
        fs.fused_sgd_step({"w": p}, {"w": g}, lr=LR)
    except ValueError as error:
        message = str(error)
    assert "grads['w']" in message, message or "accepted"
    assert (p == 1).all()


def check_save_and_load() -> None:
    params, copy = {"w": np.ones(100, F)}, {"w": np.ones(100, F)}
    optimizer, other = fs.Momentum(params, lr=LR), fs.Momentum(copy, lr=LR)
    optimizer.step({"w": np.ones(100, F)})
    with tempfile.TemporaryDirectory() as folder:
        optimizer.save(Path(folder, "run.npz"))
        other.load(Path(folder, "run.npz"))
    copy["w"][...] = params["w"]
    for each in (optimizer, other):
        each.step({"w": np.ones(100, F)})
    np.testing.assert_array_equal(params["w"], copy["w"])


def check_it_stands_alone() -> None:
    """Imports NumPy and nothing else, and prints what a bug report needs."""
    code = "import sys; old = {*sys.modules}; import fusedstep; print(*{*sys.modules} - old)"
    modules = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    packages = {name.split(".")[0] for name in modules} - sys.stdlib_module_names
    assert packages == {"fusedstep", "numpy"}, packages
    info = subprocess.check_output([sys.executable, "-m", "fusedstep", "info"], text=True)
    assert fs.__version__ in info
    assert importlib.metadata.version("fusedstep") == fs.__version__


class OnGpu:
    """What says that it lies on a GPU, and does not."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, **options: object) -> object:
        """A capsule of DLPack 1.0: one float32 number."""
        new_capsule = ctypes.pythonapi.PyCapsule_New
        new_capsule.restype = ctypes.py_object
        new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        self.number, self.shape = ctypes.c_float(1.0), ctypes.c_int64(1)
        version, context, deleter, flags = (1 | 0 << 32), 0, 0, 0
        data, device, ndim = ctypes.addressof(self.number), (2 | 0 << 32), 1
        dtype = 2 | 32 << 8 | 1 << 16  # float, bits, lanes
        self.fields = (ctypes.c_uint64 * 10)(
            *(version, context, deleter, flags, data, device, ndim | dtype << 32),
            *(ctypes.addressof(self.shape), 0, 0),  # no strides, no offset
        )
        return new_capsule(ctypes.addressof(self.fields), b"dltensor_versioned", None)


def check_gpus_are_found_or_missed() -> None:
    """Where there is none, an array that is on one is a clear error."""
    status = fs.cuda_status()
    print(status)
    assert status.built == fs.build_info()["cuda"]
    if status.why is None:
        return
    array, message = OnGpu(), ""
    try:
        fs.fused_sgd_step(array, np.ones(1, F), lr=LR)
    except RuntimeError as error:
        message = str(error)
    assert message.startswith("params "), message or "accepted"
    assert status.why in message
    assert array.number.value == 1.0


def check_modules_export_and_need_nothing_else() -> None:
    """No library was put into the wheel; the CUDA runtime is inside the module."""
    package = Path(fs.__file__).parent
    assert not [path.name for path in package.parent.glob("fusedstep*.libs")]
    tools = shutil.which("readelf"), shutil.which("nm")
    for path in package.glob("_*.so") if all(tools) else ():
        dynamic = subprocess.check_output(["readelf", "-d", str(path)], text=True)
        needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
        assert needed, path.name
        assert not [name for name in needed if re.search("cuda|omp|jax", name)], needed
        listing = subprocess.check_output(["nm", "-D", "--defined-only", str(path)], text=True)
        names = {line.split()[-1] for line in listing.splitlines()}
        assert names == {f"PyInit_{path.name.split('.')[0]}"}, names


CHECKS: tuple[Callable[[], None], ...] = (
    check_bits_on_every_isa,
    check_threads_change_no_bit,
    check_bad_input_changes_nothing,
    check_save_and_load,
    check_it_stands_alone,
    check_gpus_are_found_or_missed,
    check_modules_export_and_need_nothing_else,
)

if __name__ == "__main__":
    for check in CHECKS:
        check()
        print(f"{check.__name__}: ok")
    print(f"{len(CHECKS)} passed on {' '.join(_core.available_isas())} from {fs.__file__}")
