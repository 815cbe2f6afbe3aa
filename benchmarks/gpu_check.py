"""``python -m benchmarks.gpu_check``: everything that only a CUDA device can show, in one command of nine minutes.

build       the native modules, where there is a compiler
tests       the suite's GPU part (`pytest -m gpu`), Triton and CUDA C++, more than 2**31 elements included
repeats     250 runs of every third case give the same bits
graphs      every third case captured in a CUDA graph, replayed on other inputs, and run on a side stream
memcheck    the sixty cases under compute-sanitizer, without torch's caching allocator, which would hide overruns
racecheck   every fourth of them
benchmark   the quick grid with every baseline that is installed, as many cases as the time allows

Each part writes one JSON line, with device, driver, versions, baselines and commit, to
benchmarks/results/<device>-check.jsonl; its whole output goes to <device>-check-<part>.log beside it. A part that
outlives its share of the time is stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from . import gpu_cases, machine, report

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
# seconds of each part, where the whole check may take `WHOLE`
WHOLE = 540
LIMITS = {
    "build": 40,
    "tests": 190,
    "repeats": 30,
    "graphs": 30,
    "memcheck": 80,
    "racecheck": 40,
    "benchmark": 130,
}
# what a process takes to begin
START_SECONDS = 8
# a sanitizer's last call begins this long before its time is over, process start included
SUMMARY_SECONDS = 25
# the benchmark's last case begins this long before its time is over: it may have other packages to compile
LAST_CASE_SECONDS = 40


class Outcome(NamedTuple):
    """What a part found. status: passed, failed, stopped (out of time) or skipped; `found`: more for its row."""

    status: str
    detail: str
    found: dict[str, dict] | None = None


# -- parts, each in a process of its own -------------------------------------------------------------------------------


def _run(command: list[str], log: Path, seconds: float, **variables: str) -> tuple[int | None, str]:
    """Exit status, None where it was stopped, and the output."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **variables}
    with log.open("w") as file:
        try:
            done = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, cwd=ROOT, env=environment
            )
            status = done.returncode
        except subprocess.TimeoutExpired:
            status = None
    return status, log.read_text(errors="replace")


def _last(pattern: str, output: str) -> str:
    found = re.findall(pattern, output, flags=re.MULTILINE)
    lines = output.strip().splitlines()
    return found[-1] if found else (lines[-1][:120] if lines else "no output")


def _outcome(status: int | None, detail: str) -> Outcome:
    return Outcome("stopped" if status is None else "passed" if status == 0 else "failed", detail)


def build(log: Path, seconds: float) -> Outcome:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    status, output = _run(command, log, seconds, MAX_JOBS=os.environ.get("MAX_JOBS", str(os.cpu_count() or 2)))
    from auxkernels import native

    said = "; ".join(f"{name}: {text}" for name, text in native.build_record().items())
    return _outcome(status, said or _last(r".+", output))


def tests(log: Path, seconds: float) -> Outcome:
    workers = str(min(12, os.cpu_count() or 1))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-n", workers, "tests"]
    start = time.perf_counter()
    found = {"unusable": _unusable(log)}
    status, output = _run(command, log, max(seconds - (time.perf_counter() - start), 5.0))
    outcome = _outcome(status, _last(r"^\d+ (?:passed|failed|skipped|error|deselected).*$", output))
    if outcome.status == "passed" and not re.search(r"\b[1-9]\d* passed", outcome.detail):
        outcome = outcome._replace(status="skipped")  # nothing ran, so nothing was shown
    return outcome._replace(found=found)


def _unusable(log: Path) -> dict[str, str | None]:
    """Why each implementation cannot be used (None: it can), asked in a process that sees what was just built."""
    _, output = _run([sys.executable, "-m", "benchmarks.gpu_cases", "--usable"], log, 60.0)
    try:
        return json.loads(output.splitlines()[-1])
    except (IndexError, ValueError):
        return dict.fromkeys(gpu_cases.BY_NAME, f"not known: {_last(r'.+', output)}")


def _calls(check: str) -> Callable[[Path, float], Outcome]:
    """Every third case by each implementation that serves it, until the time is over.

    In a process of its own: this one has looked for the compiled modules before they were built, and a kernel that goes
    wrong takes its process's whole context with it.
    """

    def run(log: Path, seconds: float) -> Outcome:
        limits = ["--every", "3", "--seconds", f"{max(seconds - START_SECONDS, 1.0):.0f}"]
        command = [sys.executable, "-m", "benchmarks.gpu_cases", "--check", check, *limits]
        status, output = _run(command, log, seconds)
        lines = [line for line in output.splitlines() if line.startswith(("ok ", "FAIL ", gpu_cases.TIME_IS_OVER))]
        failed = [line for line in lines if line.startswith("FAIL ")]
        if failed:
            return Outcome("failed", f"{len(failed)} of {len(lines)} calls: {failed[0][:120]}")
        if lines and lines[-1].startswith(gpu_cases.TIME_IS_OVER):
            return Outcome("stopped", lines[-1])
        return _outcome(status, f"{len(lines)} calls" if status == 0 else _last(r".+", output))

    return run


def _sanitizer(tool: str, every: int) -> Callable[[Path, float], Outcome]:
    def run(log: Path, seconds: float) -> Outcome:
        program = shutil.which("compute-sanitizer")
        if program is None:
            return Outcome("skipped", "compute-sanitizer is not installed")
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu_cases"]
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        # it ends by itself, so that the tool gets to its summary of what did run
        limits = ["--every", str(every), "--seconds", f"{max(seconds - SUMMARY_SECONDS, 1.0):.0f}"]
        status, output = _run([*command, *limits], log, seconds, **variables)
        num_ok = len(re.findall(r"^ok ", output, flags=re.MULTILINE))
        outcome = _outcome(status, f"{num_ok} calls; {_last(r'(?:ERROR|RACECHECK) SUMMARY: .*', output)}")
        is_over = status == 0 and gpu_cases.TIME_IS_OVER in output
        return outcome._replace(status="stopped") if is_over else outcome

    return run


def benchmark(log: Path, seconds: float) -> Outcome:
    limit = max(seconds - LAST_CASE_SECONDS, 10.0)
    command = [sys.executable, "-m", "benchmarks", "--device", "cuda", "--seconds", "0.5"]
    status, output = _run([*command, "--time-limit", f"{limit:.0f}"], log, seconds)
    done = re.findall(r"^(\d+)/(\d+) ", output, flags=re.MULTILINE)
    num_done, num_cases = done[-1] if done else ("0", "?")
    outcome = _outcome(status, f"{num_done} of {num_cases} cases; {_last(r'^rows: .*$', output)}")
    return outcome._replace(status="stopped") if status == 0 and num_done != num_cases else outcome


PARTS: dict[str, Callable[[Path, float], Outcome]] = {
    "build": build,
    "tests": tests,
    "repeats": _calls("repeats"),
    "graphs": _calls("graphs"),
    "memcheck": _sanitizer("memcheck", every=1),
    "racecheck": _sanitizer("racecheck", every=4),
    "benchmark": benchmark,
}


# -- the check ---------------------------------------------------------------------------------------------------------


def run_parts(names: list[str], output: Path, environment: dict, console: Console) -> list[dict]:
    """One row for each part, written as it ends. What a part leaves of its time goes to those that follow."""
    rows, slug, deadline = [], environment["device_slug"], time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    for name in names:
        deadline += LIMITS[name]
        start = time.perf_counter()
        outcome = PARTS[name](output / f"{slug}-check-{name}.log", max(deadline - start, 5.0))
        seconds = round(time.perf_counter() - start, 1)
        said = {"status": outcome.status, "detail": outcome.detail, **(outcome.found or {})}
        row = {"part": name, **said, "seconds": seconds, **environment}
        report.append_rows(output / f"{slug}-check.jsonl", [row])
        console.print(f"[dim]{name}: {outcome.status}, {seconds} s", soft_wrap=True)
        rows.append(row)
    return rows


def table_of(rows: list[dict]) -> Table:
    first = rows[0]
    title = f"{first['device']}, driver {first['driver']}, torch {first['torch']}, triton {first['triton']}"
    table = Table(title=f"{title}, commit {first['commit']}")
    for name in ("part", "status", "seconds", "detail"):
        table.add_column(name, justify="right" if name == "seconds" else "left", overflow="fold")
    for row in rows:
        table.add_row(row["part"], row["status"], f"{row['seconds']:.0f}", row["detail"])
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="all of them")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="benchmarks/results")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if not torch.cuda.is_available():
        console.print("there is no CUDA device here: nothing was checked")
        return 2
    rows = run_parts(options.parts, options.output, machine.describe(torch.device("cuda")), console)
    console.print(table_of(rows))
    console.print("baselines: " + "; ".join(f"{name} {said}" for name, said in rows[0]["peers"].items()))
    return int(any(row["status"] in ("failed", "stopped") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
