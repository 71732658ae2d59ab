"""Threads: they change no bit, share, let others run, survive fork, and never hang an exit."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import driver
import fusedstep as fs
import numpy as np
import pytest
from exact import mismatch
from fusedstep import _core
from subprocesses import run_python

RUNTIMES = pytest.mark.parametrize("runtime", ["auto", "own"])
SIZES = (300_001, 0, 5, 16_384, 700_007, 1000, 33)


def train(count: int) -> tuple[list[Any], Any]:
    fs.set_num_threads(count)
    params = [x.copy() for x in driver.values("float32", SIZES)]
    opt = fs.MomentumNesterov(
        params, lr=0.1, weight_decay=0.01, grad_clip_norm=2.0, grad_clip_value=0.1
    )
    for grads in driver.gradients("float32", SIZES):
        result = opt.step(grads)
    return params, result


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize("count", [2, 3, 4, 17])
def test_thread_count_changes_no_bit(count: int) -> None:
    expected, one = train(1)
    got, many = train(count)
    assert not any(mismatch(p, q) for p, q in zip(got, expected, strict=True))
    assert (many.grad_norm, many.clip_coef) == (one.grad_norm, one.clip_coef)


@pytest.mark.usefixtures("isa", "threads")
def test_every_chunk_is_visited_exactly_once() -> None:
    """p += 1 for each element: any chunk left out or taken twice shows."""
    sizes = (0, 1, 16_383, 16_384, 16_385, 32_768, 100_003, 1, 0, 1_000_003)
    for count in (1, 2, 5):
        fs.set_num_threads(count)
        params = [np.zeros(n, np.float32) for n in sizes]
        for _ in range(20):
            fs.fused_sgd_step(
                params, [np.ones(n, np.float32) for n in sizes], lr=1.0, maximize=True
            )
        assert all(np.all(p == 20) for p in params)


@pytest.mark.usefixtures("threads")
def test_more_threads_than_chunks() -> None:
    fs.set_num_threads(64)
    p = np.zeros(200_000, np.float32)
    fs.fused_sgd_step(p, np.ones(200_000, np.float32), lr=1.0, grad_clip_norm=1e9)
    assert np.all(p == -1)


@pytest.mark.usefixtures("threads")
def test_set_and_get() -> None:
    default = fs.get_num_threads()
    assert default >= 1
    fs.set_num_threads(3)
    assert fs.get_num_threads() == 3
    fs.set_num_threads(0)
    assert fs.get_num_threads() == default
    for bad in (-1, 1.5, "2", None):
        with pytest.raises((ValueError, TypeError), match=r"threads|argument"):
            fs.set_num_threads(bad)
    assert fs.get_num_threads() == default


# --- beside other Python threads --------------------------------------------------------------

TWO_MODELS = """
    import threading
    import numpy as np, fusedstep as fs
    fs.set_num_threads(2)
    def make():
        params = [np.zeros(n, np.float32) for n in (300_000, 40_000, 7)]
        return params, fs.MomentumNesterov(params, lr=0.01, grad_clip_norm=1.0)
    grads = [np.sin(np.arange(n, dtype=np.float32)) for n in (300_000, 40_000, 7)]
    def work(opt):
        for _ in range(30):
            opt.step(grads)
    models = [make() for _ in range(4)]
    workers = [threading.Thread(target=work, args=(opt,)) for _, opt in models[:3]]
    for worker in workers: worker.start()
    for worker in workers: worker.join()
    work(models[3][1])
    for params, _ in models[:3]:
        for p, q in zip(params, models[3][0]):
            assert p.tobytes() == q.tobytes()
    print("same")
"""


@RUNTIMES
def test_threads_step_models_of_their_own(runtime: str) -> None:
    assert run_python(TWO_MODELS, FUSEDSTEP_THREADS_RUNTIME=runtime) == "same\n"


@pytest.mark.usefixtures("threads")
def test_the_gil_is_released() -> None:
    """While one thread is in a long step, this one runs Python."""
    fs.set_num_threads(1)
    p, g = (np.ones(20_000_000, np.float32) for _ in range(2))
    stepping = threading.Event()
    spans: list[tuple[float, float]] = []

    def work() -> None:
        for _ in range(5):
            stepping.set()
            begin = time.perf_counter()
            fs.fused_sgd_step(p, g, lr=1e-3, grad_clip_norm=1.0)
            spans.append((begin, time.perf_counter()))

    worker = threading.Thread(target=work)
    worker.start()
    stepping.wait()
    ticks = []
    while worker.is_alive():
        ticks.append(time.perf_counter())
    worker.join()
    # Were the GIL held, ticks could fall into a step's first and last moments only.
    thirds = [((2 * a + b) / 3, (a + 2 * b) / 3) for a, b in spans]
    assert any(a < t < b for t in ticks for a, b in thirds)


# --- runtimes ---------------------------------------------------------------------------------

STEP = """
    import numpy as np, fusedstep as fs
    def step():
        p = np.zeros(1 << 20, np.float32)
        fs.fused_sgd_step(p, np.ones(1 << 20, np.float32), lr=1.0, grad_clip_norm=1e9)
        assert (p == -1).all()
    fs.set_num_threads(2)
    step()
"""


@RUNTIMES
def test_conformance_on_each_runtime(runtime: str) -> None:
    """The same bits from our own threads, for machines without OpenMP."""
    program = (
        STEP
        + """
    import hashlib
    p = np.sin(np.arange(1_000_003, dtype=np.float32))
    v = np.cos(np.arange(1_000_003, dtype=np.float32))
    for k in range(3):
        r = fs.fused_nesterov_step(p, p * np.float32(k + 1), v, lr=0.1, grad_clip_norm=5.0)
    print(hashlib.sha256(p.tobytes() + v.tobytes()).hexdigest(), r.grad_norm.hex())
    """
    )
    serial = program.replace("fs.set_num_threads(2)", "fs.set_num_threads(1)")
    assert run_python(program, FUSEDSTEP_THREADS_RUNTIME=runtime) == run_python(serial)


def test_runtime_is_named() -> None:
    assert run_python(
        "import fusedstep as fs; print(fs._core.thread_runtime())", FUSEDSTEP_THREADS_RUNTIME="own"
    ).startswith("own threads")
    assert _core.thread_runtime().split(":")[0] in {
        "openmp",
        "own threads (no OpenMP runtime found)",
    }


def test_unknown_runtime_is_an_error() -> None:
    error = run_python(STEP, FUSEDSTEP_THREADS_RUNTIME="green", fails=True)
    assert "FUSEDSTEP_THREADS_RUNTIME: expected auto, openmp or own" in error


def test_no_runtime_is_bundled() -> None:
    """Neither linked nor shipped: an OpenMP runtime is found at run time or not at all."""
    import pathlib

    folder = pathlib.Path(_core.__file__).parent
    assert not [p for p in folder.rglob("*") if "gomp" in p.name or "omp.so" in p.name]
    libraries = folder.parent / "fusedstep.libs"
    assert not libraries.exists() or not list(libraries.glob("*omp*"))


def test_omp_num_threads() -> None:
    program = "import fusedstep as fs; print(fs.get_num_threads())"
    for runtime in ("auto", "own"):
        assert run_python(program, OMP_NUM_THREADS="3", FUSEDSTEP_THREADS_RUNTIME=runtime) == "3\n"


def test_affinity_limits_the_default() -> None:
    program = """
        import os
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        import fusedstep as fs
        print(fs.get_num_threads())
    """
    environment = {k: "" for k in ("OMP_NUM_THREADS",) if k in os.environ}
    assert run_python(program, **environment) == "1\n"


# --- fork and exit ----------------------------------------------------------------------------

FORK = (
    STEP
    + """
    import os
    pids = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            step()
            fs.set_num_threads(3)
            step()
            os._exit(0)
        pids.append(pid)
    step()
    for pid in pids:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    print("done")
"""
)


@RUNTIMES
def test_forked_children_step(runtime: str) -> None:
    """After the parent has used its threads, whose copies do not exist in the child."""
    assert (
        run_python(FORK, timeout=60, FUSEDSTEP_THREADS_RUNTIME=runtime, PYTHONWARNINGS="ignore")
        == "done\n"
    )


@RUNTIMES
def test_fork_before_the_first_step(runtime: str) -> None:
    program = FORK.replace("    fs.set_num_threads(2)\n    step()\n", "    fs.set_num_threads(2)\n")
    assert (
        run_python(program, timeout=60, FUSEDSTEP_THREADS_RUNTIME=runtime, PYTHONWARNINGS="ignore")
        == "done\n"
    )


@RUNTIMES
def test_multiprocessing(runtime: str) -> None:
    program = (
        STEP
        + """
    import multiprocessing
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.map(lambda_free, range(4))
    print("done")
    """
    )
    program = program.replace(
        "fs.set_num_threads(2)\n", "fs.set_num_threads(2)\n    def lambda_free(_): step()\n"
    )
    assert (
        run_python(program, timeout=60, FUSEDSTEP_THREADS_RUNTIME=runtime, PYTHONWARNINGS="ignore")
        == "done\n"
    )


EXITS = {
    "at once": "",
    "from a thread": """
    import threading
    threading.Thread(target=step).start()
    """,
    "with a daemon that steps": """
    import threading, time
    def forever():
        while True: step()
    threading.Thread(target=forever, daemon=True).start()
    time.sleep(0.3)
    """,
    "in atexit": """
    import atexit
    atexit.register(step)
    """,
    "in a destructor": """
    class Late:
        def __del__(self, step=step): step()
    late = Late()
    import sys
    sys.keep = late
    """,
    "by SystemExit": """
    raise SystemExit(0)
    """,
}


@RUNTIMES
@pytest.mark.parametrize("ending", EXITS)
def test_exit_does_not_hang(ending: str, runtime: str) -> None:
    run_python(STEP + EXITS[ending], timeout=60, FUSEDSTEP_THREADS_RUNTIME=runtime)


@RUNTIMES
def test_interrupt_leaves_a_working_interpreter(runtime: str) -> None:
    program = (
        STEP
        + """
    import os, signal, threading, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    try:
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        while True: step()
    except KeyboardInterrupt:
        pass
    step()
    print("done")
    """
    )
    assert run_python(program, timeout=60, FUSEDSTEP_THREADS_RUNTIME=runtime) == "done\n"
