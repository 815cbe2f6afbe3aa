"""``python -m benchmarks.kept_memory``: what a call on CPU costs in fresh memory and in memory that is kept.

A call's large tensors come from the operating system page by page and go back to it with the last of them, if nothing
keeps them. Each setting is a process of its own, in which the same call repeats as in a training loop; the processes
take turns, in random order, so that each round compares them under one load of the machine:

as torch comes   no variable set, `cache_settings.num_bytes = 0`
cache            no variable set, the package's own cache of blocks as it comes
memory kept      variables of glibc (`machine_info.KEEPS_MEMORY`), `cache_settings.num_bytes = 0`

The table has each setting's median time and page faults of a call, and the median over the rounds of the ratio of the
cache's time to that of memory kept. A round is the mean of several calls, processor time of all threads.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

import auxkernels
from benchmarks.cross_entropy import cases as cross_entropy
from benchmarks.heads import cases as cross_entropy_heads
from benchmarks.heads.inputs import make_heads
from benchmarks.soft_embedding import cases as soft_embedding
from benchmarks.soft_embedding.inputs import make_inputs as make_lookup
from benchmarks.timing import report
from benchmarks.timing.implementations import DTYPES
from benchmarks.timing.machine_info import KEEPS_MEMORY


class Setting(NamedTuple):
    """Variables of the process, and whether the package's cache is as it comes or off."""

    variables: dict[str, str]
    has_cache: bool


SETTINGS = {
    "as torch comes": Setting({}, False),
    "cache": Setting({}, True),
    "memory kept": Setting(KEEPS_MEMORY, False),
}
# operator, pass, shape, dtype
CASES = (
    *(("cross_entropy", name, "1024x50257", dtype) for name in ("training", "both") for dtype in ("bf16", "fp32")),
    *(("cross_entropy_heads", name, "2048x50257x768x256", "bf16") for name in ("training", "both")),
    ("cross_entropy_heads", "training", "2048x50257x768x256", "fp32"),
    *(("soft_embedding", "planner_training", "4096x1024x768", dtype) for dtype in ("bf16", "fp32")),
    *(("soft_embedding", "training", "4096x1024x256", dtype) for dtype in ("bf16", "fp32")),
)


# -- a process ---------------------------------------------------------------------------------------------------------


def call_of(op: str, pass_name: str, shape: str, dtype: str, implementation: str) -> Callable[[], Any]:
    """The work of a case as one call: by "auxkernels", or by "eager" PyTorch in the inputs' dtype.

    Results are those of `python -m benchmarks`, which checks them.
    """
    sizes, of, device = tuple(map(int, shape.split("x"))), DTYPES[dtype], torch.device("cpu")
    if op == cross_entropy.OP:
        loss = {"auxkernels": cross_entropy.ours, "eager": cross_entropy.eager}[implementation]
        return cross_entropy.loss_call(loss, pass_name, *cross_entropy.make_inputs(sizes, of, "flat", device, 0))
    if op == cross_entropy_heads.OP:
        loss = {"auxkernels": cross_entropy_heads.ours, "eager": cross_entropy_heads.eager}[implementation]
        return cross_entropy_heads.loss_call(loss, pass_name, make_heads(sizes, of, "flat", False, device, 0))
    mode = soft_embedding.MODES[pass_name]
    ours = partial(soft_embedding.our_planner, "auto") if mode.is_planner else soft_embedding.ours(mode, "auto")
    eager = soft_embedding.eager_each_token if mode.is_planner else soft_embedding.eager
    lookup = {"auxkernels": ours, "eager": eager}[implementation]
    return soft_embedding.lookup_call(lookup, mode, make_lookup(sizes, of, "flat", mode, device, 0))


def serve(has_cache: bool, threads: int) -> None:
    """Answers requests, one JSON text a line: [case, implementation] makes a call ready, a number repeats it."""
    torch.set_num_threads(threads)
    if not has_cache:
        auxkernels.cache_settings.num_bytes = 0
    answers, call = os.fdopen(os.dup(1), "w"), None
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, int):
            answer = _repeated(call, request)
        else:
            call = None
            case, implementation = request
            call, answer = call_of(*case, implementation), None
            for _ in range(2):
                call()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _repeated(call: Any, count: int) -> dict[str, float]:
    """Of one call: seconds, processor seconds of all threads, and page faults."""
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    begun, processor = time.perf_counter(), time.process_time()
    for _ in range(count):
        call()
    took = time.perf_counter() - begun, time.process_time() - processor
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return {"wall": took[0] / count, "processor": took[1] / count, "faults": faults / count}


class Worker:
    """A process in one of the settings."""

    def __init__(self, setting: Setting, threads: int):
        command = [sys.executable, "-m", "benchmarks.kept_memory", "--serve", str(int(setting.has_cache)), str(threads)]
        environment = {
            name: value for name, value in os.environ.items() if name not in KEEPS_MEMORY
        } | setting.variables
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def ask(self, request: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None, "both are pipes"
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a process of the benchmark ended with {self.process.wait()}")
        return json.loads(answer)

    def stop(self) -> None:
        self.process.communicate()


# -- the comparison ----------------------------------------------------------------------------------------------------


def compare(workers: dict[str, Worker], case: tuple[str, ...], implementation: str, options, rng) -> dict:
    """The rounds of one case: by setting, a list of what `_repeated` answers."""
    for worker in workers.values():
        worker.ask([case, implementation])
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    order = list(workers)
    for _ in range(options.rounds):
        rng.shuffle(order)
        for name in order:
            rounds[name].append(workers[name].ask(options.calls))
    return {"case": list(case), "implementation": implementation, "threads": options.threads, "rounds": rounds}


def ratio(rounds: dict[str, list[dict[str, float]]], one: str, other: str, clock: str) -> float:
    """Median over the rounds."""
    return statistics.median(a[clock] / b[clock] for a, b in zip(rounds[one], rounds[other], strict=True))


def table(found: list[dict], settings: list[str], clock: str) -> Table:
    made = Table(title=f"{clock} time of a call, ms, and its page faults")
    for name in ("case", "implementation", *settings, *(f"{name} / memory kept" for name in settings[:-1])):
        made.add_column(name, justify="left" if name in ("case", "implementation") else "right")
    for one in found:
        rounds, cells = one["rounds"], []
        for name in settings:
            ms, faults = (statistics.median(r[key] for r in rounds[name]) for key in (clock, "faults"))
            cells.append(f"{1e3 * ms:.1f} ({faults:,.0f})")
        if settings[-1] == "memory kept":
            cells += [f"{ratio(rounds, name, 'memory kept', clock):.2f}" for name in settings[:-1]]
        made.add_row(" ".join(one["case"]), one["implementation"], *cells)
    return made


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kept_memory", description=__doc__.partition(": ")[2])
    parser.add_argument("--serve", nargs=2, type=int, metavar=("CACHE", "THREADS"), help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=3, help="of a round")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--clock", choices=("processor", "wall"), default="processor")
    parser.add_argument("--only", default="", help="cases whose words hold this text")
    parser.add_argument("--implementation", nargs="+", choices=("auxkernels", "eager"), default=["auxkernels"])
    parser.add_argument("--output", type=Path, help="a file of JSON lines that the rounds are added to")
    options = parser.parse_args(arguments)
    if options.serve:
        serve(bool(options.serve[0]), options.serve[1])
        return 0
    console, rng = Console(width=None if sys.stdout.isatty() else 180), random.Random(0)
    found = []
    workers = {name: Worker(SETTINGS[name], options.threads) for name in options.settings}
    try:
        for case in (case for case in CASES if options.only in " ".join(case)):
            for implementation in options.implementation:
                found.append(compare(workers, case, implementation, options, rng))
                console.print(table(found[-1:], options.settings, options.clock))
    finally:
        for worker in workers.values():
            worker.stop()
    report.append_described(options.output, found, torch.device("cpu"))
    console.print(table(found, options.settings, options.clock))
    return 0


if __name__ == "__main__":
    sys.exit(main())
