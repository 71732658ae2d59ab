"""Command line: `python -m bench`, in the root of a checkout."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import fusedstep as fs
from rich.console import Console

from bench import machine, on_torch, report, rows, streams
from bench.measure import measure_all
from bench.setting import FULL, SMOKE, Setting


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("-k", default="", metavar="WORD", help="only rows with WORD in their name")
    parser.add_argument("--rounds", type=int, default=31, help="samples of each contender")
    parser.add_argument("--threads", type=int, default=0, help="default: all CPUs")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it still run?")
    parser.add_argument("--output", type=Path, help="folder for JSON and PNG")
    return parser.parse_args()


def set_threads(threads: int) -> int:
    """The same number for everyone."""
    fs.set_num_threads(threads)
    if on_torch.HAS_TORCH:
        import torch

        torch.set_num_threads(fs.get_num_threads())
    return fs.get_num_threads()


def main() -> None:
    options = parse()
    console = Console(width=None if sys.stdout.isatty() else 100)
    threads = set_threads(options.threads)
    known = machine.facts("bench")
    setting = Setting(SMOKE if options.smoke else FULL, streams.load(threads))
    missing = [name for name in ("torch", "jax", "optax", "matplotlib") if not find_spec(name)]
    missing += [] if setting.roofline else ["roofline (make roofline)"]
    if missing:
        console.print(f"not installed and left out: {', '.join(missing)}", style="yellow")

    if known["machine"]["load"] > 0.5:
        console.print("the machine is busy with something else: expect noise", style="yellow")

    results = []
    rounds = 2 if options.smoke else options.rounds
    for result in measure_all(rows.build(setting, options.k), rounds):
        results.append(result)
        report.show_result(console, result)
    report.show_bars(console, results)

    full = not (options.k or options.smoke)
    folder = options.output or (Path(__file__).parent / "results" if full else None)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{machine.slug(known['machine'])}-{known['commit']}"
        report.write_json(folder / f"{name}.json", {**known, "missing": missing}, results)
        title = f"{known['machine']['cpu']}, {threads} threads, {known['commit']}"
        if "matplotlib" not in missing:
            report.draw(folder / f"{name}.png", title, results)
        console.print(f"written: {folder / name}.json", soft_wrap=True)


if __name__ == "__main__":
    main()
