"""``python -m benchmarks.scaling``: how times grow with each size of a call, and whether faster than its work does.

For each operator each dimension in turn doubles a few times from a size at which work is what takes the time, and all
others stay. auxkernels, eager PyTorch and the floor (a copy of the same bytes, the bare matrix products) are timed with
one thread and with all, checked against float64 as in `python -m benchmarks`, and all sizes of a ladder in the same
rounds. The table has their slopes in logarithms, beside those of bytes and multiplications; what grows faster than
both by more than the spread of its times explains is marked (slopes.py has the error model). "fixed" is a call that is
too small for its work to matter, and its share of the ladder's smallest; "threads" how many times faster all are.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.__main__ import OPS
from benchmarks.files import RESULTS
from benchmarks.gpu.results_page import OWN
from benchmarks.scaling import slopes
from benchmarks.timing import harness, report

CPU = torch.device("cpu")
SLOW_ROUNDS = 3  # of what is not ours: its slope is shown beside ours, and not judged


class Sizes(NamedTuple):
    """What is measured of an operator: its passes, the first shape of each dimension's ladder, and a tiny shape."""

    passes: tuple[str, ...]
    first_shapes: dict[str, tuple[int, ...]]
    tiny: tuple[int, ...]


SIZES = {
    "cross_entropy": Sizes(
        ("forward", "training", "stats"),
        {"N": (64, 32768), "V": (128, 16384)},
        (1, 32),
    ),
    "cross_entropy_heads": Sizes(
        ("forward", "training"),
        {
            "N": (128, 16384, 64, 32),
            "V": (128, 4096, 256, 128),
            "D_b": (256, 8192, 128, 64),
            "D_a": (256, 8192, 256, 64),
        },
        (1, 32, 8, 8),
    ),
    "soft_embedding": Sizes(
        ("forward", "training"),
        {"N": (512, 1024, 256), "K": (1024, 512, 256), "D": (1024, 1024, 128)},
        (1, 32, 8),
    ),
}
AXES = tuple(dict.fromkeys(axis for sizes in SIZES.values() for axis in sizes.first_shapes))


def ladder_shapes(op: ModuleType, axis: str, doublings: int) -> list[tuple[int, ...]]:
    first, place = SIZES[op.OP].first_shapes[axis], op.SHAPE_FORM.split("x").index(axis)
    return [(*first[:place], first[place] << i, *first[place + 1 :]) for i in range(doublings + 1)]


def cases(op: ModuleType, axis: str, dtype: str, options: argparse.Namespace) -> Iterator[harness.Case]:
    """Every pass and number of threads at the tiny shape and at those of the ladder: eager, ours and the floor."""
    for shape in (SIZES[op.OP].tiny, *ladder_shapes(op, axis, options.doublings)):
        for pass_name in SIZES[op.OP].passes:
            case = op.build(op.Spec(pass_name, shape, dtype, "flat", "eager"), CPU, options.seed)
            case.implementations = [
                i if i.role == "ours" else replace(i, max_rounds=SLOW_ROUNDS)
                for i in case.implementations
                if i.role != "baseline" and (i.role != "ours" or i.name == OWN.get(pass_name, "auxkernels"))
            ]
            yield from (replace(case, threads=threads) for threads in options.threads)


def measure(
    op: ModuleType, axis: str, dtype: str, settings: harness.Settings, options: argparse.Namespace
) -> list[dict]:
    """Rows of all cases of one dimension and dtype, with its name and size; the size is None for the tiny shape."""
    place, tiny = op.SHAPE_FORM.split("x").index(axis), list(SIZES[op.OP].tiny)
    # a collection for each implementation would go through all that is imported
    gc.collect()
    gc.freeze()
    try:
        rows = harness.run_cases(list(cases(op, axis, dtype, options)), settings)
    finally:
        gc.unfreeze()
    return [{"axis": axis, "size": None if row["shape"] == tiny else row["shape"][place], **row} for row in rows]


def table(op: str, found: list[slopes.Ladder]) -> Table:
    threads = "; ".join(map(str, sorted({ladder.threads for ladder in found})))
    made = Table(title=f"{op}: log-log slopes of time over size, with {threads} threads, and of its work")
    for name in slopes.HEADER:
        made.add_column(name, justify="left" if name == "sizes" else "right", no_wrap=True)
    for line in slopes.lines(found, op):
        made.add_row(*line, style="red" if line[slopes.HEADER.index("faster than its work")] else "")
    return made


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.partition(": ")[2])
    parser.add_argument("--op", dest="ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--axis", dest="axes", nargs="+", choices=AXES, default=list(AXES), help="dimensions that grow")
    parser.add_argument("--dtype", dest="dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    threads = sorted({1, torch.get_num_threads()})
    parser.add_argument("--threads", nargs="+", type=int, default=threads, help="torch's threads (one, and all)")
    parser.add_argument("--doublings", type=int, default=3, help="of a size in its ladder (3)")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of auxkernels at each size (15)")
    parser.add_argument("--seconds", type=float, default=10.0, help="a ladder's rounds stop early after this long (10)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs and of the order of the rounds")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "scaling/rows.jsonl", metavar="FILE", help="of JSON lines"
    )
    options = parser.parse_args(arguments)
    for name in ("doublings", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console(width=None if sys.stdout.isatty() else 180)
    settings = harness.Settings(options.rounds, options.seconds, rng=random.Random(options.seed))
    rows: list[dict] = []
    wanted = [
        (OPS[name], axis, dtype)
        for name in options.ops
        for axis in SIZES[name].first_shapes
        for dtype in options.dtypes
        if axis in options.axes
    ]
    is_interrupted = False
    try:
        for op, axis, dtype in wanted:
            with console.status("") as status:
                settings.on_step = lambda text, share, status=status: status.update(f"{100 * share:3.0f} % {text}")
                rows += measure(op, axis, dtype, settings, options)
            console.print(f"[dim]{op.OP}: {axis}, {dtype}")
    except KeyboardInterrupt:
        is_interrupted = True
    report.append_described(options.output, rows, CPU)
    found = slopes.ladders([{"date": "now", **row} for row in rows])
    for op in dict.fromkeys(ladder.op for ladder in found):
        console.print(table(op, found))
    for line in report.not_timed(rows):
        console.print(line, style="red", markup=False, soft_wrap=True)
    return 130 if is_interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
