"""``python -m benchmarks.gpu.check --run 1 --output DIR``: what only a CUDA device can show, in runs of 330 s.

Each run ends by itself. What it finds is in DIR as it is found, in three files: check-<run>.log (all that is said, line
by line), <device>-check.jsonl (a row for each part) and <device>.jsonl (the benchmark's rows, case by case). A step
that outlives its limit is stopped, and so is what the deadline falls into; what it had found remains. The first steps
are worth most. A step for an implementation that cannot be used there says so.

The commit must be known: of a copy without its history, --commit or AUXKERNELS_COMMIT says it
(`git describe --always --dirty --abbrev=12 --exclude='*'`). A compiled module that was brought along
(auxkernels/native/_cuda.*.so for that Python, and _build.json) is used, and named; where none loads, one is built.

Expected seconds are ESTIMATES, made before any of it has run on a GPU: 10 s for a process to begin, 16 cores, one H200.

run 1
machine          12   a process; 0.5 GB copied 8 times, 6 products of 8192 x 8192
(build           60   only without a module: one file takes nvcc 27 s, 16 cores do not help it)
calls-native     22   4 processes: begin, then 9 cases, 3 x 250 runs of 2 ms, 3 graphs each; compares with the reference
quick            60   begin, 19 cases of 2 s (float64 check, 7 implementations, 0.5 s of rounds), 20 kernels of Triton
tests-native     85   10 s to begin and collect, 2205 tests: 1000 CPU-s on 14 processes
calls-triton     55   8 processes: begin, 8 cases, 14 kernels of 0.8 s, 3 x 250 runs of 4 ms with 8 on one GPU, 3 graphs
peers            55   begin, torch.compile 25 s, other packages' kernels, eight implementations

run 2
machine          12
tests-triton     95   10 s to begin, 1120 tests: 1000 kernels of 0.8 s and as many launchers of 0.2 s on 14 processes
lattice         105   begin, 39 cases of 1.8 s, 25 kernels of Triton
memcheck-native  40   begin under the tool 20 s, 36 cases of 0.5 s
synccheck-native 30   begin under the tool 20 s, 18 cases of 0.5 s
racecheck-native 25   begin under the tool 15 s, 9 cases of 1 s; a finding is a lead: it may not know these barriers

run 3, where there is time
machine          12
operators        60   begin, 18 cases of heads and lookups of 2.5 s
tests-rest      240   torch.compile, registration, plain torch, Triton's other files: 3000 CPU-s on 14 processes
"""

from __future__ import annotations

import argparse
import datetime
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.files import RESULTS
from benchmarks.gpu import steps as gpu_steps
from benchmarks.gpu.processes import Log
from benchmarks.gpu.steps import Outcome, Place
from benchmarks.timing import machine_info, report

RUN_SECONDS = 330.0
# of a run, what is left for Python itself to begin and to end
MARGIN_SECONDS = 8.0
# what is left of the time must be worth beginning with
LEAST_SECONDS = 20.0
MACHINE_SECONDS, BUILD_SECONDS = 40.0, 75.0


class Step(NamedTuple):
    """`limit` and `expected` in seconds; `run` gives the outcome of each of its parts."""

    name: str
    limit: float
    expected: float
    run: Callable[[Place, float], dict[str, Outcome]]


HEADLINE = ("--shape", "8192x128256", "--pass", "training", "--dtype", "bf16", "--inputs", "flat")
OPERATORS = ("--op", "cross_entropy_heads", "soft_embedding", "--baselines", "eager")
RUNS: dict[int, tuple[Step, ...]] = {
    1: (
        Step("calls-native", 50, 22, gpu_steps.calls("native")),
        Step("quick", 85, 60, gpu_steps.benchmark("quick", "--op", "cross_entropy", "--baselines", "eager")),
        Step("tests-native", 130, 85, gpu_steps.suite("native")),
        Step("calls-triton", 85, 55, gpu_steps.calls("triton")),
        Step("peers", 80, 55, gpu_steps.benchmark("peers", "--op", "cross_entropy", *HEADLINE)),
    ),
    2: (
        Step("tests-triton", 110, 95, gpu_steps.suite("triton")),
        Step("lattice", 115, 105, gpu_steps.benchmark("lattice", "--lattice", "--op", "cross_entropy")),
        Step("memcheck-native", 55, 40, gpu_steps.sanitizer("memcheck", every=1)),
        Step("synccheck-native", 45, 30, gpu_steps.sanitizer("synccheck", every=2)),
        Step("racecheck-native", 45, 25, gpu_steps.sanitizer("racecheck", every=4)),
    ),
    3: (
        Step("operators", 75, 60, gpu_steps.benchmark("operators", *OPERATORS)),
        Step("tests-rest", 270, 240, gpu_steps.rest_of_suite),
    ),
}
MACHINE_EXPECTED = 12.0


class Check:
    """One run: its deadline, its files, and the rows that it has written."""

    def __init__(self, number: int, output: Path, seconds: float, console: Console):
        self.number, self.output, self.console = number, output, console
        self.deadline = time.perf_counter() + seconds - MARGIN_SECONDS
        self.log = Log(output / f"check-{number}.log")
        self.rows: list[dict] = []
        self.environment: dict = {}
        self.plans: str | None = None

    def left(self) -> float:
        return self.deadline - time.perf_counter()

    def write(self, part: str, outcome: Outcome, seconds: float) -> None:
        """A row, on the disk at once."""
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        said = {"part": part, "status": outcome.status, "detail": outcome.detail, "seconds": round(seconds, 1)}
        row = {**said, "run": self.number, **self.environment, "date": date}
        report.append_rows(self.output / f"{self.environment['device_slug']}-check.jsonl", [row])
        self.rows.append(row)
        text = f"{part}: {outcome.status}, {seconds:.0f} s: {outcome.detail}"
        self.log.say("check", text)
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self) -> str | None:
        """Learns what the machine is, and builds the module where none can be used; why that is not known, or None."""
        start = time.perf_counter()
        found = gpu_steps.describe(self.log, min(MACHINE_SECONDS, self.left()))
        if isinstance(found, str):
            return found
        self.plans, self.environment = found.pop("plans", None), found
        self.write("machine", Outcome("passed", f"driver {found['driver']}"), time.perf_counter() - start)
        self._provide_module()
        return None

    def _provide_module(self) -> None:
        start = time.perf_counter()
        outcome = Outcome("passed", f"brought along: {self.environment['module']}")
        if self.environment["unusable"].get("native") is not None:
            outcome = gpu_steps.build(self.log, min(BUILD_SECONDS, self.left()))
            if outcome.status == "passed":
                again = gpu_steps.describe(self.log, min(MACHINE_SECONDS, self.left()))
                if isinstance(again, dict):
                    self.plans, self.environment = again.pop("plans", None), again
                reason = self.environment["unusable"].get("native")
                detail = f"built here: {self.environment['module']}"
                outcome = Outcome("failed", f"{detail}; {reason}") if reason else Outcome("passed", detail)
        if self.plans is not None:
            outcome = outcome._replace(detail=f"{outcome.detail}; {self.plans}")
        self.write("module", outcome, time.perf_counter() - start)

    def take(self, step: Step) -> None:
        """One step within its limit and what is left of the run."""
        start = time.perf_counter()
        seconds = min(step.limit, self.left())
        if seconds < min(LEAST_SECONDS, step.limit):
            self.write(step.name, Outcome("skipped", "no time was left"), 0.0)
            return
        place = Place(self.environment, self.log, self.output)
        try:
            outcomes = step.run(place, seconds)
        except KeyboardInterrupt:
            self.write(step.name, Outcome("stopped", "the check was interrupted"), time.perf_counter() - start)
            raise
        except Exception as error:  # of this program itself: the other steps go on
            outcomes = {step.name: Outcome("failed", f"{type(error).__name__}: {error}")}
        for part, outcome in outcomes.items():
            self.write(part, outcome, time.perf_counter() - start)


def table_of(rows: list[dict]) -> Table:
    first = rows[0]
    title = f"{first['device']}, driver {first['driver']}, torch {first['torch']}, triton {first['triton']}"
    table = Table(title=f"{title}, commit {first['commit']}")
    for name in ("part", "status", "seconds", "detail"):
        table.add_column(name, justify="right" if name == "seconds" else "left", overflow="fold")
    for row in rows:
        table.add_row(row["part"], row["status"], f"{row['seconds']:.0f}", row["detail"])
    return table


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.check", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--run", type=int, choices=RUNS, default=1, help="which run (1)")
    names = [step.name for steps in RUNS.values() for step in steps]
    parser.add_argument("--steps", nargs="+", choices=names, metavar="STEP", help="these instead of a run's")
    parser.add_argument("--seconds", type=float, default=RUN_SECONDS, help=f"for the whole run ({RUN_SECONDS:.0f})")
    parser.add_argument("--commit", help="of a copy without its history (AUXKERNELS_COMMIT)")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="benchmarks/results")
    return parser.parse_args(arguments)


def _interrupt(number, frame):
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if options.commit:
        os.environ["AUXKERNELS_COMMIT"] = options.commit
    if machine_info.git_commit()[0] is None:
        console.print("no commit is known, and nothing can be said of none: give --commit or AUXKERNELS_COMMIT")
        return 2
    known = {step.name: step for steps in RUNS.values() for step in steps}
    steps = [known[name] for name in options.steps] if options.steps else RUNS[options.run]
    check = Check(options.run, options.output.resolve(), options.seconds, console)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        if reason := check.begin():
            console.print(f"nothing was checked: {reason}", markup=False, soft_wrap=True)
            return 2
        for step in steps:
            check.take(step)
    except KeyboardInterrupt:
        check.log.say("check", "interrupted")
    finally:
        signal.signal(signal.SIGTERM, before)
    if not check.rows:
        return 2
    console.print(table_of(check.rows))
    console.print("baselines: " + "; ".join(f"{name} {said}" for name, said in check.rows[0]["peers"].items()))
    return int(any(row["status"] in ("failed", "stopped") for row in check.rows))


if __name__ == "__main__":
    sys.exit(main())
