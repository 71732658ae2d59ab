"""A few worker processes that run jobs of torch.distributed together, with a time limit on all.

One server imports torch and forks the workers, so that a test costs no start of its own. Whatever
goes wrong, a job ends: collectives time out before the limit, and after it the workers are killed.
"""

from __future__ import annotations

import datetime
import importlib
import multiprocessing
import signal
import time
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

COLLECTIVE_SECONDS = 60
JOB_SECONDS = 100
STOP_SECONDS = 5
PRELOADED = (
    "torch",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
)


class JobFailed(AssertionError):
    """A job raised in at least one process."""


class Workers:
    """Processes that wait for jobs; those that died are replaced."""

    def __init__(self, folder: Path) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOADED))
        self._folder = folder
        self._jobs = 0
        self._running: list[tuple[Any, Connection]] = []

    def run(self, job: str, world: int, *args: Any) -> list[Any]:
        """Calls `module:function(rank, *args)` in `world` processes of one process group.

        Returns:
            What the function returned, by rank; None where its process was killed by SIGKILL.

        Raises:
            JobFailed: With the tracebacks, if it raised somewhere or took too long.
        """
        self._start(world)
        self._jobs += 1
        store = self._folder / f"store{self._jobs}"
        for rank, (_, pipe) in enumerate(self._running[:world]):
            pipe.send((job, rank, world, str(store), args))
        outcomes = self._gather(world)
        failures = [f"rank {k}: {text}" for k, (text, _) in enumerate(outcomes) if text]
        if failures:
            self.stop()
            raise JobFailed("\n".join(failures))
        return [value for _, value in outcomes]

    def _start(self, world: int) -> None:
        while len(self._running) < world:
            here, there = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()
            self._running.append((process, here))

    def _gather(self, world: int) -> list[tuple[str, Any]]:
        outcomes: list[tuple[str, Any]] = [("no answer in time", None)] * world
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._running[:world])}
        deadline = time.monotonic() + JOB_SECONDS
        while waiting and (left := deadline - time.monotonic()) > 0:
            for pipe in wait(list(waiting), left):
                rank = waiting.pop(pipe)
                try:
                    outcomes[rank] = pipe.recv()
                except EOFError:
                    outcomes[rank] = (self._epitaph(rank), None)
        self._running = [(p, pipe) for p, pipe in self._running if p.is_alive()]
        return outcomes

    def _epitaph(self, rank: int) -> str:
        process = self._running[rank][0]
        process.join(STOP_SECONDS)
        killed = process.exitcode == -signal.SIGKILL
        return "" if killed else f"ended with exit code {process.exitcode}"

    def stop(self) -> None:
        """Ends all processes."""
        for process, pipe in self._running:
            pipe.close()
            process.kill()
            process.join(STOP_SECONDS)
        self._running = []


def _serve(pipe: Connection) -> None:
    """What a worker does."""
    import fusedstep
    import torch

    torch.set_num_threads(1)
    fusedstep.set_num_threads(1)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            answer = ("", _run(*job))
        except BaseException:
            answer = (traceback.format_exc(), None)
        pipe.send(answer)


def _run(job: str, rank: int, world: int, store: str, args: tuple[Any, ...]) -> Any:
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=COLLECTIVE_SECONDS),
    )
    try:
        torch.manual_seed(0)
        module, _, name = job.partition(":")
        return getattr(importlib.import_module(module), name)(rank, *args)
    finally:
        _forget_meshes()
        dist.destroy_process_group()


def _forget_meshes() -> None:
    """torch remembers results, and takes an equal mesh of a later job for the one in there."""
    from torch.distributed.tensor import debug

    debug._clear_sharding_prop_cache()
