"""``python -m benchmarks``: times auxkernels against torch on this machine and keeps the rows."""

from __future__ import annotations

import argparse
import gc
import math
import os
import random
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import chart
from benchmarks.cross_entropy import cases as cross_entropy
from benchmarks.files import RESULTS
from benchmarks.heads import cases as cross_entropy_heads
from benchmarks.soft_embedding import cases as soft_embedding
from benchmarks.timing import harness, machine_info, report, thresholds

OPS = {op.OP: op for op in (cross_entropy, cross_entropy_heads, soft_embedding)}
BASELINES = tuple(dict.fromkeys(level for op in OPS.values() for level in op.BASELINES))
PASSES = tuple(dict.fromkeys(name for op in OPS.values() for name in op.PASSES))


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition(": ")[2])
    grid = parser.add_mutually_exclusive_group()
    grid.add_argument("--quick", action="store_true", help="a quarter of an hour on two cores (the default)")
    grid.add_argument("--full", action="store_true", help="every pass, dtype and input over all shapes")
    grid.add_argument("--lattice", action="store_true", help="sizes for the choice between implementations on a GPU")
    parser.add_argument("--op", dest="ops", nargs="+", choices=OPS, default=list(OPS), metavar="OP", help=_one_of(OPS))
    parser.add_argument("--baselines", choices=BASELINES, metavar="LEVEL", help=f"no more than: {_one_of(BASELINES)}")
    parser.add_argument("--pass", dest="passes", nargs="+", choices=PASSES, metavar="PASS", help=_one_of(PASSES))
    dtypes = cross_entropy.DTYPES
    parser.add_argument("--dtype", dest="dtypes", nargs="+", choices=dtypes, metavar="DTYPE", help=_one_of(dtypes))
    parser.add_argument("--inputs", nargs="+", choices=cross_entropy.INPUTS)
    forms = " or ".join(op.SHAPE_FORM for op in OPS.values())
    shape_help = f"instead of the grid's: {forms}"
    parser.add_argument("--shape", dest="shapes", nargs="+", type=_shape, metavar="SHAPE", help=shape_help)
    parser.add_argument("--rounds", type=_positive, default=15, help="timed calls of each implementation (15)")
    parser.add_argument("--seconds", type=float, help="a case's rounds stop early after this long (6, full: 30)")
    parser.add_argument("--time-limit", type=float, help="seconds after which no further case begins (none)")
    parser.add_argument("--threads", type=_positive, help="torch's threads (torch's own choice)")
    kept = "with memory that the GNU C library keeps, for all implementations; rows go to a file of their own"
    parser.add_argument("--keep-memory", action="store_true", help=kept)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs and of the order of the rounds")
    parser.add_argument("--reference", action="store_true", help="also time the reference backend")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="benchmarks/results")
    parser.add_argument("--no-plot", action="store_true")
    return parser.parse_args(arguments)


def _one_of(names) -> str:
    return f"any of {', '.join(names)}"


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.lower().split("x")
    lengths = {len(op.SHAPE_FORM.split("x")) for op in OPS.values()}
    if not (len(sizes) in lengths and all(size.isdigit() and int(size) for size in sizes)):
        forms = " or ".join(op.SHAPE_FORM for op in OPS.values())
        raise argparse.ArgumentTypeError(f"must be {forms}, such as 1024x50257, got {text!r}")
    return tuple(map(int, sizes))


def _positive(text: str) -> int:
    if not (text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def choose_specs(op, options: argparse.Namespace, device: torch.device) -> list:
    """The cases, each with no more baselines than are wanted."""
    return [_with_at_most(op, spec, options.baselines) for spec in _specs(op, options, device)]


def _with_at_most(op, spec, baselines: str | None):
    """A level that an operator does not have takes nothing away."""
    levels = op.BASELINES
    is_less = baselines in levels and levels.index(baselines) < levels.index(spec.baselines)
    return spec._replace(baselines=baselines) if is_less else spec


def _specs(op, options: argparse.Namespace, device: torch.device) -> list:
    """The grid's cases that pass the filters; with shapes given, their product with the filters instead."""
    if options.shapes:
        passes = [name for name in options.passes or ["training"] if name in op.PASSES]
        shapes = [shape for shape in options.shapes if len(shape) == len(op.SHAPE_FORM.split("x"))]
        return op.product_specs(passes, shapes, options.dtypes or ["bf16", "fp32"], options.inputs or op.INPUTS)
    if options.lattice:
        specs = cross_entropy.lattice_specs() if op is cross_entropy else []
    else:
        specs = op.full_specs(device) if options.full else op.quick_specs(device)
    if options.dtypes and "fp16" in options.dtypes:  # in no grid: it is asked for by name, in place of bf16
        specs = specs + [spec._replace(dtype="fp16") for spec in specs if spec.dtype == "bf16"]
    filters = (("pass_name", options.passes), ("dtype", options.dtypes), ("inputs", options.inputs))
    return [spec for spec in specs if all(not kept or getattr(spec, name) in kept for name, kept in filters)]


def run(specs: list, options: argparse.Namespace, device: torch.device, console: Console) -> tuple[list[dict], bool]:
    """Rows of the finished cases of `specs` (operator, spec), each case written as it finishes; whether Ctrl-C came."""
    rows, num_done = [], 0
    settings = harness.Settings(options.rounds, options.seconds, rng=random.Random(options.seed))
    deadline = time.perf_counter() + (options.time_limit or math.inf)
    columns = (BarColumn(30), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console, transient=True) as progress:
        task = progress.add_task("measuring copy bandwidth and GEMM rate", total=len(specs))
        settings.on_step = lambda text, share: progress.update(task, completed=num_done + share, description=text)
        try:
            environment = machine_info.describe(device)
            path = options.output / f"{environment['device_slug']}.jsonl"
            for op, spec in specs:
                if time.perf_counter() > deadline:
                    console.print(f"time is over: {num_done} of {len(specs)} cases finished")
                    break
                settings.on_step(f"drawing inputs of {spec.pass_name} {harness.shape_text(spec.shape)}", 0.0)
                num_done += 1
                # a collection for each implementation would go through all that is imported, a second for every case
                gc.collect()
                gc.freeze()
                try:
                    case = op.build(spec, device, options.seed, options.reference)
                    case_rows = [{**row, **environment} for row in harness.run_case(case, settings)]
                except torch.OutOfMemoryError:  # a smaller GPU than the grid was made for: the case is left out
                    text = f"{spec.pass_name} {harness.shape_text(spec.shape)} {spec.dtype}: does not fit the device"
                    console.print(f"{num_done}/{len(specs)} {text}", soft_wrap=True)
                    continue
                report.append_rows(path, case_rows)
                rows += case_rows
                console.print(f"[dim]{num_done}/{len(specs)} {report.summary(case_rows)}", soft_wrap=True)
        except KeyboardInterrupt:
            console.print(f"[yellow]interrupted: {num_done} of {len(specs)} cases begun")
            return rows, True
        finally:
            gc.unfreeze()
    return rows, False


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.keep_memory and not machine_info.keeps_memory():  # which is settled when a process starts
        given = sys.argv[1:] if arguments is None else arguments
        command = [sys.executable, "-m", "benchmarks", *given]
        os.execve(sys.executable, command, os.environ | machine_info.KEEPS_MEMORY)
    options.seconds = options.seconds or (30.0 if options.full else 6.0)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 180)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    ops = [OPS[name] for name in options.ops]
    specs = [(op, spec) for op in ops for spec in choose_specs(op, options, device)]
    if device.type == "cuda":  # what tunes other packages for half a minute comes last, where the time may be over
        specs.sort(key=lambda of_op: of_op[1].baselines == "slow")
    if not specs:
        console.print("no case has that operator, pass, dtype and input; --shape names one outside of the grid")
        return 2
    rows, is_interrupted = run(specs, options, device, console)
    if not rows:
        return 130 if is_interrupted else 2
    for op in ops:
        if of_op := [row for row in rows if row["op"] == op.OP]:
            console.print(report.results_table(op.OP, of_op))
    for line in report.not_timed(rows):
        console.print(line, style="red", markup=False, soft_wrap=True)
    first = rows[0]
    gemm = ", ".join(f"{name} {rate} GFLOP/s" for name, rate in first["gemm_gflops"].items())
    console.print(f"{first['device']}, {first['threads']} threads, {first['isa']}, torch {first['torch']}")
    console.print(f"copy {first['copy_gbps']} GB/s, GEMM {gemm}")
    if device.type == "cpu" and first["native_isa"] is None:
        console.print("auxkernels is its plain PyTorch reference here: the compiled module is missing", style="red")
    measured_on = {"cpu": "two cores with AVX-512", "cuda": "one H100"}[device.type]
    for op in ops:
        title = f"{op.OP} on {measured_on}; of flat and peaked the worse counts"
        table = thresholds.thresholds_table(op.THRESHOLDS.get(device.type, []), rows, title)
        console.print(table or f"{op.OP}: none of the cases that promises speak of was run")
    path = options.output / f"{first['device_slug']}.jsonl"
    console.print(f"rows: {_shown(path)}")
    chart_path = path.with_suffix(".png")
    if not options.no_plot and chart.draw(report.read_rows(path), chart_path):
        console.print(f"chart: {_shown(chart_path)}")
    return 130 if is_interrupted else 0


def _shown(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


if __name__ == "__main__":
    sys.exit(main())
