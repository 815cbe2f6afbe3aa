"""Numbers that an operator promises, of flat and peaked inputs the worse, looked up in timed rows; their table."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from rich.table import Table

from benchmarks.timing.report import case_key


class Threshold(NamedTuple):
    """A number that an operator promises, None where a first measurement has to set it.

    `measure(rows)` returns it in `unit`, or None where it was not run.
    """

    text: str
    comparison: str
    bar: float | None
    unit: str
    measure: Callable[[list[dict]], float | None]


def at_least(text: str, bar: float | None, unit: str, measure: Callable, *arguments) -> Threshold:
    return Threshold(text, ">=", bar, unit, functools.partial(measure, *arguments))


def at_most(text: str, bar: float | None, unit: str, measure: Callable, *arguments) -> Threshold:
    return Threshold(text, "<=", bar, unit, functools.partial(measure, *arguments))


def worst_speed_up(op: str, rows: list[dict]) -> float | None:
    """How many times faster than the yardstick in the case where that is least."""
    ratios = []
    for _, case in groupby((row for row in rows if row["op"] == op), key=case_key):
        timed = {row["implementation"]: row for row in case if row["time_us"]}
        yardstick = next((row for row in timed.values() if row["role"] == "yardstick"), None)
        if yardstick and "auxkernels" in timed:
            ratios.append(yardstick["time_us"] / timed["auxkernels"]["time_us"])
    return min(ratios, default=None)


@dataclass(frozen=True)
class Measure:
    """Numbers of one operator's cases on some shapes; each is None where those cases were not run."""

    op: str
    shapes: tuple[tuple[int, ...], ...]
    own: str = "auxkernels"  # whose speed-up is meant

    def times(self, pass_name: str, dtype: str, name: str, rows: list[dict]) -> dict[tuple, dict]:
        """Timed rows of one implementation, by shape and kind of input."""
        wanted = (self.op, pass_name, dtype, name)
        found = (r for r in rows if (r["op"], r["pass"], r["dtype"], r["implementation"]) == wanted)
        return {case_key(r): r for r in found if tuple(r["shape"]) in self.shapes and r["time_us"]}

    def speed_up(self, pass_name: str, dtype: str, baselines: tuple[str, ...], rows: list[dict]) -> float | None:
        """How many times faster than the fastest of the baselines."""
        own = self.times(pass_name, dtype, self.own, rows)
        found = (self.times(pass_name, dtype, baseline, rows) for baseline in baselines)
        ratios = (row["time_us"] / own[i]["time_us"] for other in found for i, row in other.items() if i in own)
        return min(ratios, default=None)

    def share_of_floor(self, pass_name: str, dtype: str, name: str, rows: list[dict]) -> float | None:
        found = self.times(pass_name, dtype, name, rows).values()
        return min((100 * row["share_of_floor"] for row in found if row["share_of_floor"]), default=None)

    def of_floor(self, pass_name: str, dtype: str, name: str, rows: list[dict]) -> float | None:
        """Time as a multiple of the floor's, in the case where that is most."""
        share = self.share_of_floor(pass_name, dtype, name, rows)
        return None if share is None else 100 / share

    def relative_time(self, pass_name: str, dtype: str, name: str, to: str, rows: list[dict]) -> float | None:
        """Time of one implementation in percent of another's in the same case."""
        own, other = (self.times(pass_name, dtype, n, rows) for n in (name, to))
        return max((100 * row["time_us"] / other[i]["time_us"] for i, row in own.items() if i in other), default=None)

    def extra_cost(self, pass_name: str, dtype: str, name: str, to: str, rows: list[dict]) -> float | None:
        relative = self.relative_time(pass_name, dtype, name, to, rows)
        return None if relative is None else relative - 100

    def time_us(self, pass_name: str, dtype: str, name: str, rows: list[dict]) -> float | None:
        return max((row["time_us"] for row in self.times(pass_name, dtype, name, rows).values()), default=None)

    def peak_share(self, pass_name: str, dtype: str, allowed_bytes: Callable[[dict], int], rows: list[dict]):
        """Measured peak memory in percent of `allowed_bytes(row)`."""
        found = self.times(pass_name, dtype, "auxkernels", rows).values()
        return max((100 * row["peak_bytes"] / allowed_bytes(row) for row in found if row["peak_bytes"]), default=None)


def thresholds_table(bars: list[Threshold], rows: list[dict], title: str) -> Table | None:
    """Bar, measured, met or not; a bar whose cases were not run says so. None where that is all of them."""
    table = Table(title=title)
    table.add_column("promise", no_wrap=True)
    for name in ("bar", "measured", "met"):
        table.add_column(name, justify="right", no_wrap=True)
    values = [bar.measure(rows) for bar in bars]
    for bar, value in zip(bars, values, strict=True):
        bound = "not set" if bar.bar is None else f"{bar.comparison} {bar.bar:g} {bar.unit}"
        if value is None:
            table.add_row(f"[dim]{bar.text}", bound, "[dim]not run", "")
            continue
        digits = 2 if bar.unit == "x" else 1
        table.add_row(bar.text, bound, f"{value:.{digits}f} {bar.unit}", _is_met_text(bar, value))
    return None if all(value is None for value in values) else table


def _is_met_text(bar: Threshold, value: float) -> str:
    if bar.bar is None:
        return ""
    is_met = value >= bar.bar if bar.comparison == ">=" else value <= bar.bar
    return "[green]yes" if is_met else "[red]no"
