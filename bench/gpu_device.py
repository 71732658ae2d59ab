"""What a table needs of whatever computes: clock, copy, launches. All that differs between them.

`Cuda` is what is measured. The CPU is there so that every row's code can run where no GPU is.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import fusedstep as fs
import torch
from torch.profiler import ProfilerActivity, profile

from bench import machine
from bench.measure import Sampler
from bench.work import Step

PIECE = 2**30  # bytes that are copied at once


@dataclass(frozen=True)
class Contender:
    """Someone who does the work of a row.

    Attributes:
        queue: Puts one step into a stream.
        wait: Waits for it, where that is not torch's current stream.
        params: Where the parameters are, if not in the memory of the work.
    """

    queue: Step
    wait: Step | None = None
    params: Callable[[], list[Any]] | None = None


class Cpu:
    """Nothing is asynchronous: a step is over when its call returns."""

    torch_device = "cpu"
    counted = "operators of torch"
    _activity = ProfilerActivity.CPU
    _categories = frozenset({"cpu_op"})

    def __init__(self) -> None:
        self._buffers: tuple[Any, Any] | None = None

    # --- the machine ----------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return machine.cpu_model()

    def describe(self) -> dict[str, Any]:
        return {"name": self.name}

    def free_bytes(self) -> int:
        """What can be allocated; caches are emptied first."""
        return 2**34

    def synchronize(self) -> None:
        """Waits for everything that is in torch's streams."""

    # --- time -----------------------------------------------------------------------------------

    def finish(self, contender: Contender) -> None:
        """Waits for the contender's steps."""
        (contender.wait or self.synchronize)()

    def step_time(self, contender: Contender, prepare: Step) -> Sampler:
        """Seconds that one step takes on the device, its inputs not in cache.

        Where the stream is not torch's: until it is over, by the clock of the host.
        """

        def sample() -> float:
            prepare()
            self.evict()
            self.synchronize()
            begin = time.perf_counter()
            contender.queue()
            self.finish(contender)
            return time.perf_counter() - begin

        return sample

    def loop_time(
        self, contender: Contender, calls: int, prepare: Step, *, of_host: bool = False
    ) -> Sampler:
        """Seconds per step of a loop, of host or device, whichever takes longer.

        `of_host`: of the host alone, which does not wait for the device.
        """

        def sample() -> float:
            prepare()
            self.synchronize()
            begin = time.perf_counter()
            for _ in repeat(None, calls):
                contender.queue()
            queued = time.perf_counter()
            self.finish(contender)
            return ((queued if of_host else time.perf_counter()) - begin) / calls

        return sample

    def evict(self) -> None:
        """Puts something else into the caches."""

    # --- what is compared with ------------------------------------------------------------------

    def copy(self, nbytes: int) -> Step:
        """A copy within the device that reads and writes so many bytes altogether."""
        pieces, rest = divmod(nbytes // 2, PIECE)
        source, target = self._two_buffers(PIECE if pieces else rest)
        sizes = [PIECE] * pieces + [rest]
        pairs = [(target[:size], source[:size]) for size in sizes if size]

        def run() -> None:
            for to, origin in pairs:
                to.copy_(origin)

        return run

    def _two_buffers(self, nbytes: int) -> tuple[Any, Any]:
        if self._buffers is None or len(self._buffers[0]) < nbytes:
            self._buffers = None
            random = torch.randint(-128, 128, (nbytes,), dtype=torch.int8, device=self.torch_device)
            self._buffers = random, torch.empty_like(random)
        return self._buffers

    # --- launches -------------------------------------------------------------------------------

    def captured(self, step: Step) -> Step:
        """The step as a graph that is replayed; there are none on a CPU."""
        return step

    def launches(self, contender: Contender) -> int:
        """Kernels, copies and fills of one step, by the profiler; 0: it saw nothing."""
        contender.queue()
        self.finish(contender)
        with profile(activities=[self._activity]) as seen:
            contender.queue()
            self.finish(contender)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            seen.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        return sum(event.get("cat") in self._categories for event in events)


class Cuda(Cpu):
    """The current CUDA device, on torch's current stream."""

    torch_device = "cuda"
    counted = "kernels, copies and fills"
    _activity = ProfilerActivity.CUDA
    _categories = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})

    def __init__(self) -> None:
        super().__init__()
        self._properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        cache = getattr(self._properties, "L2_cache_size", 0) or 2**26
        self._other = torch.ones(cache, device=self.torch_device)  # four times its size

    @property
    def name(self) -> str:
        return str(self._properties.name)

    def describe(self) -> dict[str, Any]:
        known = self._properties
        return {
            "name": self.name,
            "capability": f"{known.major}.{known.minor}",
            "memory_gib": round(known.total_memory / 2**30, 1),
            "multiprocessors": known.multi_processor_count,
            "l2_mib": round(getattr(known, "L2_cache_size", 0) / 2**20, 1),
            "torch_cuda": torch.version.cuda,
            "nvidia_smi": _nvidia_smi(),
        }

    def free_bytes(self) -> int:
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def step_time(self, contender: Contender, prepare: Step) -> Sampler:
        if contender.wait:
            return super().step_time(contender, prepare)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def sample() -> float:
            prepare()
            # While the device is busy with this, the host is already ahead of it.
            self.evict()
            begin.record()
            contender.queue()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) * 1e-3

        return sample

    def evict(self) -> None:
        self._other.mul_(-1.0)

    def captured(self, step: Step) -> Step:
        return Replayed(step)


class Replayed:
    """A step that is taken once, captured at the second call, and replayed from then on."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._warm = False
        self._graph: Any = None

    def __call__(self) -> None:
        if not self._warm:
            self._step()
            self._warm = True
            return
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
            self._graph = graph
        self._graph.replay()


def _nvidia_smi() -> dict[str, str]:
    """Driver and clocks as they are found; nothing if the tool is not there."""
    keys = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu")
    command = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader", "--id=0"]
    try:
        line = subprocess.check_output(command, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(keys, line.strip().split(", "), strict=False))


def open_device(name: str) -> Cpu:
    """`cuda`, or `cpu`."""
    if name == "cpu":
        for set_threads in (torch.set_num_threads, fs.set_num_threads):
            set_threads(1)  # nothing that is measured here means anything: do not wait for others
        return Cpu()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; --device cpu --quick only tests the script")
    return Cuda()
