"""`python -m bench.gpu` in tiny on the CPU, its check of the bits, and what it does with a GPU."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import fusedstep as fs
import numpy as np
import pytest

try:
    import torch
except ImportError:  # the marker leaves the tests out, by name
    torch = None

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
if torch is not None:
    from rich.console import Console

    from bench import contenders as by
    from bench import gpu, gpu_contenders, gpu_device, gpu_work, on_torch
    from bench.bars import GPU_BARS, OPTAX
    from bench.gpu_device import Contender, Cpu
    from bench.gpu_rows import CASES, Bench, Case
    from bench.gpu_work import TorchWork
    from bench.methods import NADAM, NESTEROV

pytestmark = [pytest.mark.framework("torch"), pytest.mark.usefixtures("threads")]

OF_TORCH = ("torch fused", "torch foreach", "torch default")


def test_every_row_runs_and_is_written(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "bench.gpu", "--device", "cpu", "--quick"]
    env = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [*command, "--output", str(tmp_path)],
        cwd=ROOT, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr

    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert {"commit", "versions", "machine", "device", "absent", "left_out"} < result.keys()
    assert result["left_out"] == {}
    assert result["bars"] == []  # a CPU meets none
    rows = result["rows"]
    measured = [name for name in rows if " " not in name]
    assert {name for case in measured for name in (f"{case} loop", f"{case} host")} <= rows.keys()
    assert "clip-1000x1e3 launches" in rows
    for name in measured:
        wanted = {"fusedstep", "fusedstep function", "fusedstep.torch", "fusedstep graph"}
        assert (
            wanted | {"roofline", "torch foreach", "torch default"}
            <= rows[name]["contenders"].keys()
        )
        assert next(iter(rows[name]["contenders"])) == "fusedstep"
    assert OPTAX in result["absent"] or OPTAX in rows["clip-1x1e8"]["contenders"]
    # torch's fused SGD does not update bfloat16 on a CPU, and the check sees it.
    assert all(
        name.startswith("bf16") and who.startswith("torch fused")
        for name, failed in result["failed"].items()
        for who in failed
    )


def test_every_bar_is_about_a_row() -> None:
    names = {case.name: case for case in CASES}
    assert len(names) == len(CASES)
    for bar in GPU_BARS:
        case, _, kind = bar.row.partition(" ")
        assert case in names
        assert kind != "launches" or names[case].launches


def test_sizes_are_those_of_the_names() -> None:
    for case in CASES:
        if "x" in case.name.rpartition("-")[2]:
            tensors, numel = case.name.rpartition("-")[2].split("x")
            assert case.elements == int(tensors) * int(float(numel))
    assert max(case.elements for case in CASES) == 10**9


# --- the check ----------------------------------------------------------------------------------


@pytest.fixture(params=["all", "ends"])
def work(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Small work, of which everything is computed on the CPU, or only both ends."""
    if request.param == "ends":
        monkeypatch.setattr(gpu_work, "WHOLE", 1000)
        monkeypatch.setattr(gpu_work, "WINDOW", 100)
    monkeypatch.setattr(gpu_work, "BLOCK", 700)
    return TorchWork([(1001,), (3, 7), (2000,)], Cpu()).with_clip()


def test_right_ones_pass(work: Any) -> None:
    contenders = {
        "fusedstep": Contender(by.optimizer(work)),
        "fusedstep function": Contender(by.function(work)),
        "torch": Contender(on_torch.optimizer(work, "foreach")),
    }
    differences, failed = work.check(contenders)
    assert failed == {}
    assert differences["torch"] < 1e-5


@pytest.mark.parametrize("element", [0, 99, -100, -1])
def test_a_wrong_bit_is_found(work: Any, element: int) -> None:
    step = by.function(work)

    def wrong() -> None:
        step()
        p = work.p[element : element + 1 or None]
        p.copy_(torch.nextafter(p, p + 1))

    differences, failed = work.check({"fusedstep": Contender(wrong), "torch": Contender(wrong)})
    assert "1 of" in failed["fusedstep"]
    assert differences == {}  # there is nothing right to compare with


def test_who_does_not_the_same_is_found(work: Any) -> None:
    ours = Contender(by.function(work))
    other = TorchWork.with_clip(work)
    other.clip = work.clip * 1.05
    lazy: dict[str, Contender] = {
        "torch lazy": Contender(int),
        "torch clips less": Contender(on_torch.optimizer(other, "foreach")),
    }
    _, failed = work.check({"fusedstep": ours, **lazy})
    assert failed.keys() == lazy.keys()


def test_who_raises_does_not_stop_the_others(work: Any) -> None:
    def broken() -> None:
        raise RuntimeError("cudaErrorWhatever")

    contenders = {"broken": Contender(broken), "fusedstep": Contender(by.function(work))}
    _, failed = work.check(contenders)
    assert failed == {"broken": "RuntimeError: cudaErrorWhatever"}


def test_torch_gets_states_of_its_own_for_16_bits() -> None:
    work = TorchWork([(50,)], Cpu(), dtype=torch.bfloat16)
    narrow = work.with_narrow_states()
    assert (work.states[0].dtype, narrow.states[0].dtype) == (torch.float32, torch.bfloat16)
    assert narrow.p is work.p
    narrow.states[0].fill_(1)
    work.reset()
    assert not narrow.states[0].any()


# --- the table ----------------------------------------------------------------------------------


def table(seconds: float = 1000, device: Any = None) -> Any:
    console = Console(file=io.StringIO())
    return gpu.Table(device or Cpu(), 2, time.monotonic() + seconds, console)


@pytest.fixture
def case() -> Any:
    return Case("row", [(100,)])


def test_what_does_not_fit_is_named(case: Any) -> None:
    late, full = table(seconds=gpu.SECONDS_AT_THE_END - 1), table()
    assert not late.measure(case)
    assert late.left_out == {"row": "no time was left"}
    assert not full.measure(Case("row", [(10**12,)]))
    assert "GiB" in full.left_out["row"]
    assert (late.results, full.results) == ([], [])
    assert [late.ours_failed, full.ours_failed] == [False, False]


@pytest.mark.parametrize(("who", "fatal"), [("function", True), ("optimizer", False)])
def test_a_failure_is_told(
    case: Any, who: str, fatal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours decides the exit status, a peer's does not."""

    def broken(*_: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(by if who == "function" else on_torch, who, broken)
    done = table()
    assert done.measure(case)
    assert set(done.failed["row"].values()) == {"RuntimeError: no such kernel"}
    assert done.ours_failed == fatal
    assert len(done.results) == 3


def test_a_broken_device_is_told(case: Any) -> None:
    class Broken(Cpu):
        def free_bytes(self) -> int:
            raise RuntimeError("an illegal memory access was encountered")

    done = table(device=Broken())
    assert not done.measure(case)
    assert done.ours_failed


# --- CUDA, as far as it goes without ------------------------------------------------------------


class FakeEvent:
    """Of a device whose clock is the host's."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Any) -> float:
        return 1e3 * (end.time - self.time)


class FakeGraph:
    """Records what `torch.cuda.graph` sees; here a capture computes, a replay counts."""

    replays = 0

    def replay(self) -> None:
        FakeGraph.replays += 1


@contextlib.contextmanager
def capture(graph: Any) -> Iterator[None]:
    assert isinstance(graph, FakeGraph)
    yield


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    properties = SimpleNamespace(
        name="NVIDIA Fake 1", major=9, minor=0, total_memory=2**30, multi_processor_count=4,
        L2_cache_size=2**12,
    )  # fmt: skip
    fakes: dict[str, Any] = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda _: properties,
        "empty_cache": lambda: None,
        "mem_get_info": lambda: (2**29, 2**30),
        "synchronize": lambda: None,
        "Event": FakeEvent,
        "CUDAGraph": FakeGraph,
        "graph": capture,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(gpu_device.Cuda, "torch_device", "cpu")
    return gpu_device.open_device("cuda")


def test_a_row_on_cuda(fake_cuda: Any) -> None:
    """All of the code that only runs there, but CUDA itself."""
    assert fake_cuda.describe()["capability"] == "9.0"
    bench = Bench(Case("row", [(100,), (30,)], optax=True), fake_cuda)
    FakeGraph.replays = 0
    bench.work.check({"fusedstep": Contender(fake_cuda.captured(lambda: None))})
    assert FakeGraph.replays == 2
    for row in bench.rows({}):
        assert all(sample() > 0 for sample in row.contenders.values()), row.name


class FakeProfile:
    """What the profiler exports for a step of one kernel and one copy."""

    def __init__(self, activities: list[Any]) -> None:
        assert activities == [torch.profiler.ProfilerActivity.CUDA]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def export_chrome_trace(self, path: str) -> None:
        kinds = ("kernel", "gpu_memcpy", "cuda_runtime", "gpu_user_annotation", None)
        events = [{"name": "x", **({"cat": kind} if kind else {})} for kind in kinds]
        Path(path).write_text(json.dumps({"traceEvents": events}))


def test_launches_are_what_the_device_runs(fake_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_device, "profile", FakeProfile)
    result = Bench(Case("row", [(100,)]), fake_cuda).launches()
    assert result.row.name == "row launches"
    assert {tuple(counts) for counts in result.samples.values()} == {(2.0,)}


def test_clock_of_the_device_tells_the_step_alone(fake_cuda: Any) -> None:
    slow = fake_cuda.step_time(Contender(lambda: time.sleep(0.02)), lambda: time.sleep(0.2))
    assert 0.02 <= slow() < 0.2


def test_without_a_gpu_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main([])
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu"])  # it would take a day


def test_walks_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    walks = ["forward"]

    def set_walk(walk: str) -> str:
        walks.append(walk)
        return walks[-2]

    monkeypatch.setattr(fs, "_cuda", SimpleNamespace(set_walk=set_walk), raising=False)
    monkeypatch.setitem(sys.modules, "fusedstep._cuda", fs._cuda)
    clipped = TorchWork([(50,)], Cpu()).with_clip()
    makers = gpu_contenders.ours(clipped)
    for walk in ("forward", "backward"):
        makers[f"fusedstep {walk} walk"](clipped, Cpu()).queue()
    assert walks == ["forward", "forward", "forward", "backward", "forward"]


# --- a stand-in for CuPy ------------------------------------------------------------------------


def elementwise(inputs: str, outputs: str, body: str, _: str) -> Callable[..., None]:
    """The same body on scalars of Python, one element after the other."""
    names = [part.split()[-1] for part in f"{inputs}, {outputs}".split(", ")]
    code = "\n".join(line.strip() for line in body.replace("const T ", "").split("\n"))

    def run(*arguments: Any) -> None:
        arrays = dict(zip(names, arguments, strict=True))
        for i in range(arrays["p"].size):
            scope = {k: a[i] if np.ndim(a) else a for k, a in arrays.items()}
            scope["coefficient"] = [arrays["coefficient"]]
            exec(code, scope)
            for out in ("p", "v"):
                arrays[out][i] = scope[out]

    return run


def test_the_kernel_for_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy: Any = SimpleNamespace(
        ElementwiseKernel=elementwise,
        ReductionKernel=lambda *_: lambda x: (x * x).sum(),
        from_dlpack=lambda tensor: tensor.numpy(),
        cuda=SimpleNamespace(is_available=lambda: True),
        **{name: getattr(np, name) for name in ("ones", "float32", "minimum", "sqrt", "stack")},
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(gpu_contenders, "why_no_cupy", lambda _: None)
    for clip in (True, False):
        work = TorchWork([(40,), (9,)], Cpu())
        work = work.with_clip() if clip else work
        (maker,) = gpu_contenders.others(work, Cpu(), with_optax=False).values()
        contenders = {"fusedstep": Contender(by.function(work)), "cupy": maker(work, Cpu())}
        differences, failed = work.check(contenders)
        assert failed == {}
        assert differences["cupy"] < 1e-5


def test_cupy_is_left_out_of_other_rules() -> None:
    work = TorchWork([(9,)], Cpu(), method=NADAM)
    assert work.method is not NESTEROV
    assert gpu_contenders.others(work, Cpu(), with_optax=False) == {}
