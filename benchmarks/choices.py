"""``python -m benchmarks.choices``: writes for which sizes the CUDA C++ kernels were the faster, from measured rows.

Source: rows of CUDA devices in benchmarks/results/<device>.jsonl in which "auxkernels (triton)" and
"auxkernels (cuda)" were timed in the same rounds, on devices on which <device>-check.jsonl verifies the CUDA C++
kernels, which are what would be chosen. `python -m benchmarks --lattice` and the quick grid measure a lattice of sizes.

Result: auxkernels/native/cuda_choices.json, {"9.0": {"device", "commit", "faster": [box, ...]}}. A box is {"pass",
"num_bytes" of a logit, "min_vocab", "max_vocab", "min_rows", "max_rows"}, bounds included: a rectangle with measured
corners in which every measured size was won, its edges in steps that are not too long. Nothing is said of sizes
outside of the boxes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from . import cross_entropy
from .chart import newest_cases
from .cross_entropy import DTYPES
from .readme import RESULTS, ROOT, commit_text, is_verified, read_checks, read_devices
from .report import write_atomically

OUTPUT = ROOT / "auxkernels" / "native" / "cuda_choices.json"
TRITON, CUDA = "auxkernels (triton)", "auxkernels (cuda)"
MIN_SPEED_UP = 1.02
# the largest factor between neighbours that a box may span: kernels change their form with the width more often than
# with the number of rows
MAX_VOCAB_STEP, MAX_ROWS_STEP = 4, 16


class Box(NamedTuple):
    """Bounds of a rectangle of sizes, included."""

    min_vocab: int
    max_vocab: int
    min_rows: int
    max_rows: int

    def holds(self, vocab: int, rows: int) -> bool:
        return self.min_vocab <= vocab <= self.max_vocab and self.min_rows <= rows <= self.max_rows

    def contains(self, other: Box) -> bool:
        return self.holds(other.min_vocab, other.min_rows) and self.holds(other.max_vocab, other.max_rows)


def won_sizes(devices: Iterable[list[dict]]) -> dict[tuple[str, int], dict[tuple[int, int], bool]]:
    """By pass and bytes of a logit: whether CUDA C++ won at (vocabulary, rows), on all devices, dtypes and inputs."""
    won: dict[tuple[str, int], dict[tuple[int, int], bool]] = {}
    for rows in devices:
        for (op, pass_name, shape, dtype, _), case in newest_cases(rows).items():
            times_us = {row["implementation"]: row["time_us"] for row in case if row["time_us"]}
            if op != cross_entropy.OP or TRITON not in times_us or CUDA not in times_us:
                continue
            num_rows, vocab = shape
            sizes = won.setdefault((pass_name, DTYPES[dtype].itemsize), {})
            is_won = times_us[TRITON] >= MIN_SPEED_UP * times_us[CUDA]
            sizes[vocab, num_rows] = sizes.get((vocab, num_rows), True) and is_won
    return won


def boxes(won: dict[tuple[int, int], bool]) -> list[Box]:
    """The largest boxes; see the module's text for what a box is. They may overlap."""
    corners = [size for size, is_won in won.items() if is_won]
    pairs = itertools.product(corners, corners)
    candidates = (Box(a[0], b[0], a[1], b[1]) for a, b in pairs if a[0] <= b[0] and a[1] <= b[1])
    found = {box for box in candidates if _is_won(box, won)}
    return sorted(box for box in found if not any(other != box and other.contains(box) for other in found))


def _is_won(box: Box, won: dict[tuple[int, int], bool]) -> bool:
    inside = [size for size in won if box.holds(*size)]
    corners = set(itertools.product(box[:2], box[2:]))
    if not (corners <= set(inside) and all(won[size] for size in inside)):
        return False
    rows_of = {edge: [rows for vocab, rows in inside if vocab == edge] for edge in box[:2]}
    vocabs_of = {edge: [vocab for vocab, rows in inside if rows == edge] for edge in box[2:]}
    return all(_has_short_steps(sizes, MAX_ROWS_STEP) for sizes in rows_of.values()) and all(
        _has_short_steps(sizes, MAX_VOCAB_STEP) for sizes in vocabs_of.values()
    )


def _has_short_steps(sizes: list[int], longest: int) -> bool:
    return all(larger <= longest * smaller for smaller, larger in itertools.pairwise(sorted(sizes)))


def choices(results: Path) -> dict[str, dict]:
    """The content of the file; empty where nothing allows a choice."""
    checks = {next(iter(parts.values()))["device_slug"]: parts for parts in read_checks(results)}
    by_capability: dict[str, list[list[dict]]] = {}
    for rows in read_devices(results):
        parts = checks.get(rows[0]["device_slug"], {})
        if is_verified(parts, "native"):
            by_capability.setdefault(rows[0]["capability"], []).append(_of_newest_commit(rows))
    found = {}
    for capability, devices in sorted(by_capability.items()):
        won = won_sizes(devices)
        faster = [
            {"pass": pass_name, "num_bytes": num_bytes, **box._asdict()}
            for (pass_name, num_bytes), sizes in sorted(won.items())
            for box in boxes(sizes)
        ]
        if won:
            names, commits = ({of(rows[0]) for rows in devices} for of in (lambda row: row["device"], commit_text))
            described = {"device": ", ".join(sorted(names)), "commit": ", ".join(sorted(commits))}
            found[capability] = described | {"faster": faster}
    return found


def _of_newest_commit(rows: list[dict]) -> list[dict]:
    """Kernels change: what another commit's took says nothing of these."""
    newest = max((row for row in rows if _is_paired(row)), key=lambda row: row["date"], default=rows[-1])
    return [row for row in rows if row["commit"] == newest["commit"]]


def _is_paired(row: dict) -> bool:
    return row["op"] == cross_entropy.OP and row["implementation"] == CUDA and bool(row["time_us"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choices", description=__doc__.partition(": ")[2])
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="benchmarks/results")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    found = choices(options.results)
    if not found:
        print(f"nothing to choose by: no CUDA device that verifies {CUDA} has times of it and {TRITON}")
        return 0
    write_atomically(options.output, lambda temporary: temporary.write_text(json.dumps(found, indent=1) + "\n"))
    for capability, choice in found.items():
        print(f"{capability} ({choice['device']}): CUDA C++ is the faster in {len(choice['faster'])} boxes")
    print(f"written: {options.output.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
