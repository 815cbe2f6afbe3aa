"""Log-log slopes of a ladder's rows: how fast times grow with a size, and whether faster than the work does.

Along a ladder one dimension doubles from case to case, and all others stay. Time that is proportional to the n-th power
of the size lies on a line of slope n in logarithms, which is fitted by least squares. The error of a point is that of a
median, which follows from the quartiles and the number of rounds; a ladder's points have one error, the root mean
square of theirs, because the quartiles of a few rounds may lie together by chance. Cases of a ladder are timed in the
same rounds, so that quartiles hold whatever else the machine did.

A perfect kernel's time is bytes and multiplications, each at some rate, so its slope lies between theirs. What grows
faster is marked: the slope of time over work, be it bytes or multiplications, exceeds zero by more than its standard
error allows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from statistics import NormalDist, fmean, median
from typing import NamedTuple

import numpy as np

# one set of ladders in twenty has a mark by chance alone
FALSE_ALARMS = 0.05
# times in rows are rounded to a thousandth of a microsecond
ROUNDING_US = 0.0005
# a normal distribution's standard error of the median of n values, times sqrt(n), over the distance of its quartiles
ERROR_OF_QUARTILES = math.sqrt(math.pi / 2) / (2 * NormalDist().inv_cdf(0.75))


class Slope(NamedTuple):
    """An exponent and its standard error."""

    value: float
    error: float


class Ladder(NamedTuple):
    """The rows of one operator, pass and dtype along one dimension, with one number of threads.

    fixed        rows of a call too small for its work to matter
    rows         all others, those of small sizes first
    """

    op: str
    axis: str
    pass_name: str
    dtype: str
    threads: int
    fixed: list[dict]
    rows: list[dict]

    def of(self, role: str) -> list[dict]:
        """Timed rows of one role, one for each size; of two floors, of bytes and of products, the longer."""
        timed = [row for row in self.rows if row["role"] == role and row["time_us"]]
        return [max(of_size, key=lambda row: row["time_us"]) for _, of_size in groupby(timed, lambda row: row["size"])]

    def slope(self, role: str) -> Slope | None:
        """Of the times of "ours", the "yardstick" (eager) or the "floor"; None where fewer than two were timed."""
        return _slope(self.of(role), [row["time_us"] for row in self.of(role)])

    def slope_of_work(self, work: str) -> float | None:
        """Of "floor_bytes" or "floor_flops"; None where these do not bound the operator."""
        rows = self.of("ours")
        if len(rows) < 2 or not all(row[work] for row in rows):
            return None
        return float(np.polyfit(np.log([row["size"] for row in rows]), np.log([row[work] for row in rows]), 1)[0])

    def excess(self) -> Slope | None:
        """Slope of our time over its bytes or its multiplications, whichever is less."""
        rows = self.of("ours")
        works = [work for work in ("floor_bytes", "floor_flops") if all(row[work] for row in rows)]
        found = (_slope(rows, [row["time_us"] / row[work] for row in rows]) for work in works)
        return min((slope for slope in found if slope is not None), default=None)

    def fixed_us(self) -> float | None:
        """Time of our call that is too small for its work to matter."""
        return next((row["time_us"] for row in self.fixed if row["role"] == "ours"), None)


def _slope(rows: Sequence[dict], values: Sequence[float]) -> Slope | None:
    """Slope of values that have the relative errors of the rows' times."""
    if len(rows) < 2:
        return None
    error = math.sqrt(fmean(relative_error(row) ** 2 for row in rows))
    sizes = np.log([row["size"] for row in rows])
    coefficients, covariance = np.polyfit(sizes, np.log(values), 1, w=[1 / error] * len(rows), cov="unscaled")
    return Slope(float(coefficients[0]), math.sqrt(covariance[0, 0]))


def relative_error(row: dict) -> float:
    """Standard error of a row's median time, over that time."""
    spread = row["time_us_p75"] - row["time_us_p25"]
    return max(ERROR_OF_QUARTILES * spread / math.sqrt(row["rounds"]), ROUNDING_US) / row["time_us"]


def ladders(rows: list[dict]) -> list[Ladder]:
    """The newest run of every ladder that has two sizes or more, sorted: threads of a case follow each other."""
    runs: dict[tuple, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        key = tuple(row[name] for name in ("op", "axis", "pass", "dtype", "threads"))
        is_same_run = key in runs and runs[key][0]["date"] == row["date"]
        runs[key] = [*runs[key], row] if is_same_run else [row]
    found = []
    for key, run in runs.items():
        sized = sorted((row for row in run if row["size"] is not None), key=lambda row: row["size"])
        found.append(Ladder(*key, [row for row in run if row["size"] is None], sized))
    found = [ladder for ladder in found if len(ladder.of("ours")) > 1]
    return sorted(found, key=lambda ladder: ladder[:5])


def is_faster(ladder: Ladder, num_ladders: int) -> bool:
    """Whether time grows faster than the work, by more than chance explains in any of so many ladders."""
    excess = ladder.excess()
    return excess is not None and excess.value > NormalDist().inv_cdf(1 - FALSE_ALARMS / num_ladders) * excess.error


# -- what is shown of ladders ------------------------------------------------------------------------------------------

HEADER = ("sizes", "auxkernels", "eager", "floor", "bytes", "products", "faster than its work", "fixed", "threads")


def lines(found: list[Ladder], op: str) -> list[tuple[str, ...]]:
    """A line for each case of an operator, under HEADER; numbers of threads lie in one cell, fewest first.

    What counts as chance depends on how many ladders were looked at: `found` holds all of them.
    """
    of_op = (ladder for ladder in found if ladder.op == op)
    groups = groupby(of_op, key=lambda ladder: (ladder.axis, ladder.pass_name, ladder.dtype))
    return [_line(list(of_threads), len(found)) for _, of_threads in groups]


def _line(of_threads: list[Ladder], num_ladders: int) -> tuple[str, ...]:
    first = of_threads[0]
    sizes = [row["size"] for row in first.of("ours")]
    marked = [ladder.excess() for ladder in of_threads if is_faster(ladder, num_ladders)]
    return (
        f"{first.axis} {sizes[0]} to {sizes[-1]}, {first.pass_name} {first.dtype}",
        "; ".join(_slope_text(ladder.slope("ours")) for ladder in of_threads),
        "; ".join(_value_text(ladder.slope("yardstick")) for ladder in of_threads),
        "; ".join(_value_text(ladder.slope("floor")) for ladder in of_threads),
        _number_text(first.slope_of_work("floor_bytes")),
        _number_text(first.slope_of_work("floor_flops")),
        "; ".join(f"by {_slope_text(excess)}" for excess in marked),
        "; ".join(_fixed_text(ladder) for ladder in of_threads),
        _speed_up_text(of_threads),
    )


def _slope_text(slope: Slope | None) -> str:
    return "" if slope is None else f"{slope.value:.2f} ± {slope.error:.2f}"


def _value_text(slope: Slope | None) -> str:
    return "-" if slope is None else f"{slope.value:.2f}"


def _number_text(number: float | None) -> str:
    return "" if number is None else f"{number:.2f}"


def _fixed_text(ladder: Ladder) -> str:
    fixed_us = ladder.fixed_us()
    return "-" if fixed_us is None else f"{fixed_us:.0f} us, {100 * fixed_us / ladder.of('ours')[0]['time_us']:.0f} %"


def speed_up(one: Ladder, other: Ladder) -> float:
    """Median over the sizes of how many times faster the other is."""
    other_us = {row["size"]: row["time_us"] for row in other.of("ours")}
    return median(row["time_us"] / other_us[row["size"]] for row in one.of("ours") if row["size"] in other_us)


def _speed_up_text(of_threads: list[Ladder]) -> str:
    return "; ".join(f"{speed_up(of_threads[0], more):.2f}x" for more in of_threads[1:])
