"""Check and time the whole GPU table: `python -m bench.gpu`, in the root of a checkout.

Rows come in the order of their importance, until the time is over. The JSON is written after each
of them, so that an interrupted run was not in vain.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import warnings
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Before JAX is imported: torch needs memory, too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import fusedstep as fs
from rich.console import Console

from bench import gpu_contenders, machine, report
from bench.bars import GPU_BARS, OURS
from bench.gpu_device import Cpu, open_device
from bench.gpu_rows import CASES, HOST, LAUNCHES, LOOP, Bench, Case, quick_cases
from bench.measure import Result, Row, measure

PACKAGES = (
    *machine.PACKAGES,
    *("jax-cuda13-plugin", "jax-cuda12-plugin", "cupy-cuda13x", "cupy-cuda12x"),
)
SECONDS_PER_ROW = {"": 4.0, LOOP: 2.0, HOST: 2.0}
LEAST_ROUNDS = 5
SECONDS_AT_THE_END = 45.0  # for launches, bars, picture
EVERYONE = "everyone"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("-k", default="", metavar="WORD", help="only rows with WORD in their name")
    parser.add_argument("--rounds", type=int, default=31, help="samples of each, if time permits")
    parser.add_argument(
        "--budget", type=float, default=460, metavar="SECONDS", help="for all of it"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--output", type=Path, help="folder for JSON and PNG")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.quick:
        parser.error("a CPU has no use but to test this script: --device cpu --quick")
    return options


@dataclass
class Table:
    """What has been measured, and what has not.

    Attributes:
        rounds: Samples of each contender, if time permits.
        end: When all has to be over, on the clock of `time.monotonic`.
        left_out: Row -> why it was not measured.
        failed: Row -> who gave wrong results or raised, with the reason.
    """

    device: Cpu
    rounds: int
    end: float
    console: Console
    results: list[Result] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    failed: dict[str, dict[str, str]] = field(default_factory=dict)
    longest: float = 0.0  # seconds of a case

    @property
    def ours_failed(self) -> bool:
        names = {who for row in self.failed.values() for who in row}
        return any(who.startswith((OURS, EVERYONE)) for who in names)

    # --- times ----------------------------------------------------------------------------------

    def measure(self, case: Case) -> bool:
        """Verifies and times everyone; whether that was possible."""
        begin = time.monotonic()
        try:
            if reason := self._why_not(case):
                self._leave_out(case.name, reason)
                return False
            self._measure(case)
        except Exception as error:  # a row is not the table
            self._fail(case.name, {EVERYONE: f"{type(error).__name__}: {error}"})
            return False
        self.longest = max(self.longest, time.monotonic() - begin)
        return True

    def _why_not(self, case: Case) -> str | None:
        needed = max(case.seconds, self.longest)
        if self._seconds_left() - SECONDS_AT_THE_END < needed:
            return "no time was left"
        if self.device.free_bytes() < case.memory:
            return f"it may need {case.memory / 2**30:.0f} GiB"
        return None

    def _measure(self, case: Case) -> None:
        bench = Bench(case, self.device)
        differences = bench.check()
        self._fail(case.name, bench.failed)
        for row in bench.rows(differences):
            result = measure(row, self._rounds_for(row))
            self.results.append(result)
            report.show_result(self.console, result)

    def _rounds_for(self, row: Row) -> int:
        """Fewer where they take long."""
        begin = time.monotonic()
        for sample in row.contenders.values():
            sample()
        one = time.monotonic() - begin
        kind = next((suffix for suffix in (LOOP, HOST) if row.name.endswith(suffix)), "")
        return min(self.rounds, max(LEAST_ROUNDS, int(SECONDS_PER_ROW[kind] / one)))

    # --- launches -------------------------------------------------------------------------------

    def count_launches(self, cases: list[Case]) -> None:
        """After all times: a profiler that was once attached may slow down what follows."""
        for case in (case for case in cases if case.launches):
            name = case.name + LAUNCHES
            if self._seconds_left() < SECONDS_AT_THE_END / 3:
                self._leave_out(name, "no time was left")
                continue
            try:
                self._count_launches(name, case)
            except Exception as error:
                self._fail(name, {EVERYONE: f"{type(error).__name__}: {error}"})

    def _count_launches(self, name: str, case: Case) -> None:
        result = Bench(case, self.device).launches()
        if not result.samples:
            self._leave_out(name, "the profiler saw nothing")
            return
        self.results.append(result)
        report.show_result(self.console, result)

    # --- what was not measured ------------------------------------------------------------------

    def _seconds_left(self) -> float:
        return self.end - time.monotonic()

    def _leave_out(self, name: str, reason: str) -> None:
        self.left_out[name] = reason
        self.console.print(f"{name}: left out, {reason}", style="yellow")

    def _fail(self, name: str, reasons: dict[str, str]) -> None:
        if reasons:
            self.failed[name] = reasons
        for who, why in reasons.items():
            self.console.print(f"{name}: {who} failed: {why}", style="red", markup=False)


def facts(device: Cpu) -> dict[str, Any]:
    status = getattr(fs, "cuda_status", None)
    return {
        **machine.facts("bench.gpu", PACKAGES),
        "device": device.describe(),
        "cuda_status": repr(status()) if status else "not known to this version",
        "absent": gpu_contenders.absent(device),
    }


class Output:
    """The files, if there are to be any."""

    def __init__(self, folder: Path | None, known: dict[str, Any], bars: report.Bars) -> None:
        self._known, self._bars = known, bars
        self._path: Path | None = None
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{machine.words(known['device']['name'])}-{known['commit']}.json"
            self._path = folder / name

    def write(self, table: Table) -> None:
        if self._path:
            head = {**self._known, "left_out": table.left_out, "failed": table.failed}
            report.write_json(self._path, head, table.results, self._bars)

    def finish(self, table: Table) -> None:
        if self._bars:
            report.show_bars(table.console, table.results, self._bars)
        self.write(table)
        if self._path:
            table.console.print(f"written: {self._path}", soft_wrap=True)
        if self._path and find_spec("matplotlib"):
            title = f"{self._known['device']['name']}, {self._known['commit']}"
            judged = {bar.row for bar in GPU_BARS}
            shown = [result for result in table.results if result.row.name in judged]
            report.draw(self._path.with_suffix(".png"), title, shown)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    begin = time.monotonic()
    # It is measured outside a graph as well as inside.
    warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
    console = Console(width=None if sys.stdout.isatty() else 100)
    device = open_device(options.device)
    known = facts(device)
    for who, why in known["absent"].items():
        console.print(f"{who}: left out, {why}", style="yellow")

    meaningful = options.device == "cuda" and not options.quick
    default = Path(__file__).parent / "results" if meaningful and not options.k else None
    output = Output(options.output or default, known, GPU_BARS if meaningful else ())
    table = Table(device, 2 if options.quick else options.rounds, begin + options.budget, console)
    measured = []
    for case in quick_cases() if options.quick else CASES:
        if options.k in case.name and table.measure(case):
            measured.append(case)
            output.write(table)
            gc.collect()
    table.count_launches(measured)
    output.finish(table)
    console.print(f"{time.monotonic() - begin:.0f} s")
    if table.ours_failed:
        sys.exit("fusedstep failed: see above")


if __name__ == "__main__":
    main()
