"""What a run leaves behind: JSON lines per device, and a table of times, floors and errors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import torch
from rich.table import Table

from benchmarks.files import write_atomically
from benchmarks.timing import machine_info
from benchmarks.timing.harness import shape_text

# what perfect is measured by, in the same rounds as everything else
FLOORS = {
    "cross_entropy": "a copy of the same bytes",
    "cross_entropy_heads": "the bare matrix products",
    "soft_embedding": "the longer of products and copy",
}


def floor_text(row: dict) -> str:
    """What the floor of a row's operator is on its device; rows of GPUs say their compute capability."""
    is_gpu = "capability" in row
    return FLOORS[row["op"]] + (", at least a launch" if is_gpu and row["op"] == "cross_entropy" else "")


def append_rows(path: Path, rows: Iterable[dict]) -> None:
    """Adds JSON lines to `path`, leaving either the old file or the old lines and all of the new ones."""
    old = path.read_text() if path.exists() else ""
    new = "".join(json.dumps(row, allow_nan=False, default=str) + "\n" for row in map(_finite, rows))
    write_atomically(path, lambda temporary: temporary.write_text(old + new))


def append_described(path: Path | None, rows: Iterable[dict], device: torch.device) -> None:
    """Adds rows to `path`, unless it is None, each with the description of the machine that they were measured on."""
    if path is not None:
        machine = machine_info.describe(device)
        append_rows(path, ({**machine, **row} for row in rows))


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _finite(row: dict) -> dict:
    """JSON has no infinity: an infinite error becomes the string "inf"."""
    errors = {key: row[key] for key in ("fp64_error", "eager_fp64_error") if key in row}
    as_json = {k: {n: "inf" if v == math.inf else v for n, v in values.items()} for k, values in errors.items()}
    return row | as_json


def case_key(row: dict) -> tuple:
    return (row["op"], row["pass"], tuple(row["shape"]), row["dtype"], row["inputs"])


def results_table(op: str, rows: list[dict]) -> Table:
    """One section per case of an operator; the speed-up is over eager in the inputs' dtype."""
    floor = floor_text(rows[0])
    title = f"{op}: median and quartiles; rate of the floor's work; share of the floor ({floor}); "
    table = Table(title=title + "errors relative to float64; peak memory beyond the inputs")
    table.add_column("case / implementation", no_wrap=True)
    for name in ("time", "quartiles", "over eager", "rate", "share", "fp64 error", "peak MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for _, group in groupby(rows, key=case_key):
        group = list(group)
        table.add_section()
        errors = max((row["fp64_error"] for row in group), key=len)
        table.add_row(f"[bold]{case_text(group[0])}", *[""] * 5, f"[dim]{', '.join(errors)}", "")
        eager_us = next((row["time_us"] for row in group if row["role"] == "yardstick"), None)
        for row in group:
            table.add_row(*_cells(row, eager_us))
    return table


def _cells(row: dict, eager_us: float | None) -> list[str]:
    name = f"  {row['implementation']}"
    errors = " ".join(f"{float(value):.1e}".replace("e-0", "e-") for value in row["fp64_error"].values())
    if row["time_us"] is None:
        return [f"[red]{name}", "[red]not timed", "", "", "", "", errors, ""]
    time_text, *quartiles = (_time_text(row[key]) for key in ("time_us", "time_us_p25", "time_us_p75"))
    style = "[green]" if row["role"] == "ours" else ""
    return [
        style + name,
        style + time_text,
        " .. ".join(quartiles),
        f"{eager_us / row['time_us']:.2f}x" if eager_us and row["role"] != "floor" else "",
        _rate_text(row),
        f"{100 * row['share_of_floor']:.0f} %" if row["share_of_floor"] else "",
        errors,
        f"{row['peak_bytes'] / 2**20:.1f}" if row["peak_bytes"] is not None and row["role"] != "floor" else "",
    ]


def _rate_text(row: dict) -> str:
    if row["gflops"]:
        return f"{row['gflops']:.0f} GFLOP/s"
    return f"{row['gbps']:.1f} GB/s" if row["gbps"] else ""


def not_timed(rows: list[dict]) -> list[str]:
    """One line for each row without a time: which, and why."""
    refused = (row for row in rows if row["time_us"] is None)
    return [f"{case_text(row)}, {row['implementation']}: {row['status']}" for row in refused]


def summary(rows: list[dict]) -> str:
    """One line for a case that has just finished."""
    times = (f"{row['implementation']} {_time_text(row['time_us'])}" for row in rows if row["time_us"])
    return f"{case_text(rows[0])}: {', '.join(times)}"


def case_text(row: dict) -> str:
    return f"{row['pass']} {shape_text(row['shape'])} {row['dtype']} {row['inputs']}"


def _time_text(time_us: float) -> str:
    return f"{time_us:.1f} us" if time_us < 1000 else f"{time_us / 1000:.2f} ms"
