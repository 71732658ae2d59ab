"""Checks an installed wheel where nothing but NumPy is: `make wheel` runs it, pytest does not.

It asks whether the packaged library works here: loads, runs every instruction set, gives the bits
of the formula, refuses bad input, saves. The full conformance tests are `test_*.py`.
"""

from __future__ import annotations

import importlib.metadata
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


CHECKS: tuple[Callable[[], None], ...] = (
    check_bits_on_every_isa,
    check_threads_change_no_bit,
    check_bad_input_changes_nothing,
    check_save_and_load,
    check_it_stands_alone,
)

if __name__ == "__main__":
    for check in CHECKS:
        check()
        print(f"{check.__name__}: ok")
    print(f"{len(CHECKS)} passed on {' '.join(_core.available_isas())} from {fs.__file__}")
