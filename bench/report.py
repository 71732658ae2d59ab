"""What is printed and written: tables, JSON, picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.bars import BARS, OURS, Bar
from bench.measure import Result, Spread

Bars = tuple[Bar, ...]

UNITS = {
    "seconds": (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)),
    "bytes": (("MB", 1e6),),
    "launches": (("launches", 1.0),),
}


def quantity(value: float, unit: str) -> str:
    name, size = _scale(value, unit)
    return f"{value / size:.3g} {name}"


def spread_of(spread: Spread, unit: str) -> str:
    """Median (quartiles) in one unit."""
    name, size = _scale(spread.median, unit)
    return f"{ratio(Spread(spread.median / size, spread.low / size, spread.high / size))} {name}"


def _scale(value: float, unit: str) -> tuple[str, float]:
    """The largest unit of which there are 0.2 or more."""
    return next((each for each in UNITS[unit] if value >= 0.2 * each[1]), UNITS[unit][-1])


def ratio(spread: Spread) -> str:
    return f"{spread.median:.3g} ({spread.low:.3g} {spread.high:.3g})"


def show_result(console: Console, result: Result) -> None:
    """One table per row: times, bandwidth by definition, and how many times the first's."""
    row = result.row
    if not result.samples:
        console.print(f"{row.name}: {row.work}: not measured")
        return
    first = next(iter(result.samples))
    table = Table(title=f"{row.name}: {row.work}", title_justify="left")
    table.add_column("who", width=28)
    table.add_column("median (quartiles)", width=24, justify="right")
    table.add_column("GB/s", width=6, justify="right")
    table.add_column("times the first", width=20, justify="right")
    for who in result.samples:
        spread = result.spread(who)
        rate = f"{row.nbytes[who] / spread.median / 1e9:.1f}" if who in row.nbytes else ""
        relative = ratio(result.ratio(who, first)) if who != first else ""
        table.add_row(who, spread_of(spread, row.unit), rate, relative)
    console.print(table)


def judge(results: list[Result], bars: Bars) -> Iterator[tuple[Bar, Result, Spread | None]]:
    """Every bar of the rows that were run, with its figure."""
    by_name = {result.row.name: result for result in results}
    for bar in bars:
        if bar.row in by_name:
            yield bar, by_name[bar.row], bar.figure(by_name[bar.row])


def verdict(bar: Bar, figure: Spread | None) -> str:
    if figure is None:
        return "not measured"
    return "met" if bar.met(figure) else "missed"


def show_bars(console: Console, results: list[Result], bars: Bars = BARS) -> None:
    table = Table(title="bars", title_justify="left")
    for column in ("row", "figure", "bar", "median (quartiles)", ""):
        table.add_column(column)
    for bar, result, figure in judge(results, bars):
        limit, shown = bar.limit, "" if figure is None else ratio(figure)
        if bar.base is None and bar.at_most is not None:
            limit = f"<= {quantity(bar.at_most, result.row.unit)}"
            shown = "" if figure is None else spread_of(figure, result.row.unit)
        style = {"met": "green", "missed": "red"}.get(verdict(bar, figure))
        table.add_row(bar.row, bar.title(result), limit, shown, verdict(bar, figure), style=style)
    console.print(table)


def as_json(facts: dict[str, Any], results: list[Result], bars: Bars) -> dict[str, Any]:
    rows = {
        result.row.name: {
            "work": result.row.work,
            "unit": result.row.unit,
            "preempted": result.preempted,
            "contenders": {
                who: {
                    **vars(result.spread(who)),
                    "bytes": result.row.nbytes.get(who),
                    "difference": result.row.differences.get(who),
                    "samples": [float(f"{x:.5g}") for x in samples],
                }
                for who, samples in result.samples.items()
            },
        }
        for result in results
    }
    judged = [
        {
            **vars(bar),
            "counted": bar.counted(result),
            "figure": None if figure is None else vars(figure),
            "verdict": verdict(bar, figure),
        }
        for bar, result, figure in judge(results, bars)
    ]
    return {**facts, "bars": judged, "rows": rows}


def write_json(path: Path, facts: dict[str, Any], results: list[Result], bars: Bars = BARS) -> None:
    text = json.dumps(as_json(facts, results, bars), indent=1)
    path.write_text(text + "\n")


def draw(path: Path, title: str, results: list[Result]) -> None:
    """Time of everyone as multiples of the first one's, with quartiles."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = [result for result in results if len(result.samples) > 1]
    columns = 2
    lines = -(-len(shown) // columns)
    height = max([2.2, *(0.6 + 0.2 * len(result.samples) for result in shown)])
    figure, grid = plt.subplots(
        lines, columns, figsize=(12, height * lines), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, result in zip(grid.flat, shown, strict=False):
        names = list(result.samples)[::-1]
        spreads = [result.ratio(name, names[-1]) for name in names]
        medians = [s.median for s in spreads]
        whiskers = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
        colors = ["tab:green" if name.startswith(OURS) else "tab:gray" for name in names]
        axes.barh(names, medians, xerr=whiskers, color=colors, capsize=3)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_title(f"{result.row.name}: {result.row.work}", fontsize=9)
    figure.suptitle(f"{title}\ntime / time of the first", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
