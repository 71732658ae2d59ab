"""Fixtures and the report header: what ran, on which instruction set, against which frameworks."""

from __future__ import annotations

import importlib.util
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import device_arrays
import fusedstep as fs
import gpu_devices
import hypothesis
import pytest
from fusedstep import _core

FRAMEWORKS = ("torch", "jax", "braintools")
# Several devices for the tests of sharded arrays; JAX reads it when it is first used.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
LEFT_OUT = "framework test left out"
REQUIRED = os.environ.get("FUSEDSTEP_REQUIRE_FRAMEWORKS") == "1"
GPU_REQUIRED = os.environ.get("FUSEDSTEP_REQUIRE_GPU") == "1"
HAS_GPU = Path("/proc/driver/nvidia/version").exists() or bool(shutil.which("nvidia-smi"))

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def installed(framework: str) -> bool:
    """Whether `framework` can be imported, without importing it."""
    return importlib.util.find_spec(framework) is not None


def pytest_report_header() -> list[str]:
    info = fs.build_info()
    present = [name for name in FRAMEWORKS if installed(name)]
    return [
        f"fusedstep {fs.__version__}, compiler {info['compiler']}, "
        f"isas {' '.join(_core.available_isas())} (active: {_core.active_isa()})",
        f"threads {fs.get_num_threads()} ({_core.thread_runtime()}), "
        f"frameworks {' '.join(present) or 'none'}{' (required)' if REQUIRED else ''}",
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests whose framework is missing; with FUSEDSTEP_REQUIRE_FRAMEWORKS=1 they fail.

    The same for tests that need a GPU, with FUSEDSTEP_REQUIRE_GPU=1.
    The instruction set varies fastest, so that an oracle's result serves all of them.
    """
    case_of: dict[str, int] = {}
    items.sort(key=lambda item: case_of.setdefault(_case(item), len(case_of)))
    for item in items:
        mark = item.get_closest_marker("framework")
        if mark and not installed(mark.args[0]) and not REQUIRED:
            item.add_marker(pytest.mark.skip(reason=f"{LEFT_OUT}: {mark.args[0]} is not installed"))
        if item.get_closest_marker("gpu") and not HAS_GPU and not GPU_REQUIRED:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def _case(item: pytest.Item) -> str:
    """What an item tests, whatever the instruction set."""
    callspec = getattr(item, "callspec", None)
    params = {k: v for k, v in callspec.params.items() if k != "isa"} if callspec else {}
    return f"{item.nodeid.split('[')[0]} {params}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Names every framework test that was left out, so that nobody takes a pass for more."""
    skipped = terminalreporter.stats.get("skipped", [])
    names = {r.nodeid.split("[")[0] for r in skipped if LEFT_OUT in str(r.longrepr)}
    if names:
        terminalreporter.section(f"{LEFT_OUT}: {len(names)} (make test-all runs them)")
        for name in sorted(names):
            terminalreporter.write_line(name)


@pytest.fixture(params=_core.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction set of this machine, and asserts that it is the one."""
    _core.force_isa(request.param)
    assert _core.active_isa() == request.param
    yield request.param
    _core.force_isa(None)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back after the test."""
    yield
    fs.set_num_threads(0)


@pytest.fixture
def emulator(request: pytest.FixtureRequest) -> Iterator[device_arrays.Emulator]:
    """The emulated device, as after loading; the test fails if something was done wrong to it.

    Threads, blocks and streams run in random order, which is another one in each test.
    """
    if device_arrays.find_module() is None:
        if "FUSEDSTEP_EMULATOR" in os.environ:
            pytest.fail("the emulator is not in FUSEDSTEP_EMULATOR")
        pytest.skip("needs the emulator of CUDA: make emulator")
    device_arrays.current_streams.clear()
    with device_arrays.installed() as found:
        found.reset()
        seed = zlib.crc32(request.node.nodeid.encode())
        found.set(order=device_arrays.ORDERS["random"], seed=seed)
        yield found
        found.check()
        found.reset()


def _device_params() -> list[Any]:
    gpu, framework = pytest.mark.gpu, pytest.mark.framework
    marks = {"emulated": [], "torch": [gpu, framework("torch")], "cupy": [gpu]}
    return [pytest.param(name, marks=marks[name]) for name in gpu_devices.KINDS]


@pytest.fixture(params=_device_params())
def device(request: pytest.FixtureRequest) -> Iterator[gpu_devices.Device]:
    """Each device in turn: the emulated one, and with the mark `gpu` a GPU, by each library."""
    if request.param == "emulated":
        request.getfixturevalue("emulator")
    if request.param == "cupy" and not installed("cupy") and not GPU_REQUIRED:
        pytest.skip("CuPy is not installed")
    made = gpu_devices.KINDS[request.param]()
    yield made
    made.check()


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def torch_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A GPU for tensors of torch: the emulated one, and with `-m gpu` a real one."""
    import torch_devices

    if request.param == "cuda":
        yield torch_devices.Cuda()
        return
    emulator = request.getfixturevalue("emulator")
    monkeypatch.setattr("fusedstep.torch.base._is_capturing", lambda: torch_devices._capturing[0])
    emulated = torch_devices.Emulated(emulator)
    yield emulated
    emulator.run()
    emulated.close()


@pytest.fixture
def x64() -> Iterator[None]:
    """JAX with float64."""
    import jax

    enable = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    with enable(True):
        yield
