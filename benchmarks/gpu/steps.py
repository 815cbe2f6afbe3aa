"""The steps of the GPU check: what each runs, in processes of its own, and what it reads off their output."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu import cases as gpu_cases
from benchmarks.gpu.processes import Ended, Log, run

# what a process takes to begin: torch, the device's context
START_SECONDS = 10.0
# and under a sanitizer, which goes through every library that is loaded
SANITIZED_START_SECONDS = 20.0
# the last call of a sanitizer begins this long before its time is over: its summary comes after it
SUMMARY_SECONDS = 6.0
# likewise the last case of the benchmark, tables included
LAST_CASE_SECONDS = 14.0
# processes that share the cases; CUDA C++ has nothing to compile
SHARDS = {"native": 4, "triton": 8}
MAX_WORKERS = 14
TEST_SECONDS = 60
MAX_FAILURES = 40
# what is called by name; what has one implementation on GPUs ("auto": heads, lookups) is Triton's
CALLED = {"native": ("native",), "triton": ("triton", "auto")}
CHECKS = tuple(gpu_cases.CHECKS)
# a case's rounds, and after how long they stop
ROUNDS, CASE_SECONDS = 15, 0.5
# one thread for each process where many share the cores
ALONE = {"OMP_NUM_THREADS": "1"}

# the suite's GPU tests in three parts. torch.compile takes minutes of them, so it is the third's; Triton compiles a
# kernel for most of its tests, so the second has the files that show its kernels' results, and not what Python does
# around them
NATIVE_FILES = (
    *("kernels/cuda/test_gpu.py", "cross_entropy/test_cross_entropy.py", "cross_entropy/test_statistics.py"),
    *("cross_entropy/test_contract.py", "cross_entropy/test_nonfinite.py", "cross_entropy/test_confident_rows.py"),
    *("cross_entropy/test_backward_form.py", "cross_entropy/test_autograd.py", "cross_entropy/test_tensors.py"),
    *("cross_entropy/test_safety.py", "cross_entropy/test_properties.py", "cross_entropy/test_training.py"),
    *("cross_entropy/test_memory.py", "cross_entropy/test_registration.py", "heads/test_heads.py"),
    *("heads/test_autograd.py", "heads/test_contract.py", "heads/test_gradients.py", "heads/test_precision.py"),
    *("heads/test_tensors.py", "heads/test_chunks.py", "heads/test_process.py", "heads/test_registration.py"),
)
TRITON_FILES = (
    *("kernels/cuda/test_gpu.py", "cross_entropy/test_cross_entropy.py", "cross_entropy/test_statistics.py"),
    *("cross_entropy/test_contract.py", "cross_entropy/test_nonfinite.py", "cross_entropy/test_backward_form.py"),
    *("soft_embedding/test_soft_embedding.py", "heads/test_heads.py"),
)
FILES = {"native": NATIVE_FILES, "triton": TRITON_FILES}
# without the models, whose tests import transformers and need no GPU, and without the benchmarks
REST = ("tests", "--ignore=tests/models", "--ignore=tests/benchmarks")
SELECTED = {"native": "native-cuda", "triton": "triton-cuda"}


class Outcome(NamedTuple):
    """What a part found. status: passed, failed, stopped (not all of it ran) or skipped (none of it)."""

    status: str
    detail: str


class Place(NamedTuple):
    """Where a step runs: what is known of the machine, the log, and where rows go."""

    environment: dict
    log: Log
    output: Path

    def why_not(self, name: str) -> str | None:
        """Why the implementation cannot be used here; None if it can."""
        return self.environment["unusable"].get(name, "it is not known whether it can be used")


Step = Callable[[Place, float], dict[str, Outcome]]


def _python(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def alone(name: str, command: list[str], log: Log, seconds: float, **variables: str) -> Ended:
    """One process."""
    return run({name: command}, log, seconds, **variables)[name]


# -- the machine -------------------------------------------------------------------------------------------------------


def describe(log: Log, seconds: float) -> dict | str:
    """What the machine is and can use, or why that is not known."""
    ended = alone("machine", _python("benchmarks.gpu.cases", "--device", "cuda", "--describe"), log, seconds)
    if ended.status == 0:
        return json.loads(ended.output.strip().splitlines()[-1])
    return "it took too long" if ended.status is None else ended.last()


def build(log: Log, seconds: float) -> Outcome:
    """The modules, here. They are brought along where there is no time for that: a file takes half a minute.

    Both of them: a build takes away what it was not asked for.
    """
    if shutil.which(os.environ.get("CUDACXX", "nvcc").split()[0]) is None:
        return Outcome("skipped", "there is no nvcc")
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 2))
    ended = alone("build", command, log, seconds, AUXKERNELS_BUILD="all", MAX_JOBS=jobs)
    return Outcome(_status(ended.status), "built here" if ended.status == 0 else ended.last())


def _status(status: int | None) -> str:
    return "stopped" if status is None else "passed" if status == 0 else "failed"


# -- calls, by name ----------------------------------------------------------------------------------------------------


def calls(name: str) -> Step:
    """Values, repeats and graphs of the cases by one implementation: a row for each."""

    def step(place: Place, seconds: float) -> dict[str, Outcome]:
        if reason := place.why_not(name):
            return {f"{check}-{name}": Outcome("skipped", reason) for check in CHECKS}
        last_call = max(seconds - START_SECONDS, 1.0)
        options = ["--check", *CHECKS, "--only", *CALLED[name], "--repeats", str(gpu_cases.NUM_REPEATS)]
        options += ["--seconds", f"{last_call:.0f}", "--every", str(SHARDS[name])]
        shards = {f"calls-{name}/{i}": ["--first", str(i)] for i in range(SHARDS[name])}
        command = _python("benchmarks.gpu.cases", "--device", "cuda", *options)
        ended = run({key: command + first for key, first in shards.items()}, place.log, seconds, **ALONE)
        return {f"{check}-{name}": _calls_outcome(check, list(ended.values())) for check in CHECKS}

    return step


def _calls_outcome(check: str, shards: list[Ended]) -> Outcome:
    """Of one check in all processes. It has passed only where each of them says that it has done all of its calls."""
    output = "\n".join(ended.output for ended in shards)
    oks = re.findall(rf"^ok   {check}: ", output, flags=re.MULTILINE)
    failures = re.findall(rf"^FAIL {check}: (.*)$", output, flags=re.MULTILINE)
    said = [re.search(rf"^(.+) {check}: (\d+) of (\d+) calls$", e.output, flags=re.MULTILINE) for e in shards]
    endings = [ending[0] for ending in said if ending and ending[1] != "done"]
    endings += [_without_ending(ended) for ended, ending in zip(shards, said, strict=True) if ending is None]
    crashes = [text for text in endings if text.startswith("ended")]
    detail = f"{len(oks)} calls alike or right"
    if failures or crashes:
        found = failures or crashes
        return Outcome("failed", f"{detail}, {len(found)} not: {found[0][:160]}")
    if endings:
        return Outcome("stopped", f"{detail}, then in {len(endings)} of {len(shards)} processes: {endings[0]}")
    return Outcome("passed" if oks else "skipped", detail)


def _without_ending(ended: Ended) -> str:
    """Why a process did not say how a check ended. Only the check that it was in has failed with it."""
    if ended.status is None:
        return "it was stopped"
    if ended.status in (0, 1):  # as after a finding that took the device away
        return "it did not come to that"
    return f"ended by itself, status {ended.status}, after: {ended.last()}"


# -- the suite ---------------------------------------------------------------------------------------------------------


def suite(name: str) -> Step:
    """The suite's tests of one implementation."""

    def step(place: Place, seconds: float) -> dict[str, Outcome]:
        if reason := place.why_not(name):
            return {f"tests-{name}": Outcome("skipped", reason)}
        files = [f"tests/{file}" for file in FILES[name]]
        return {f"tests-{name}": _suite(f"tests-{name}", SELECTED[name], files, place, seconds)}

    return step


def rest_of_suite(place: Place, seconds: float) -> dict[str, Outcome]:
    """What is in neither part."""
    return {"tests-rest": _suite("tests-rest", rest_expression(), list(REST), place, seconds)}


def rest_expression() -> str:
    # a file is told by its name and its folder's: test_contract.py there is in several
    files = {name: (f"({' and '.join(file.split('/'))})" for file in FILES[name]) for name in FILES}
    parts = (f"{SELECTED[name]} and ({' or '.join(files[name])})" for name in FILES)
    return " and ".join(f"not ({part})" for part in parts)


def _suite(part: str, expression: str, files: list[str], place: Place, seconds: float) -> Outcome:
    # -v: a line for each test as it ends. a hung kernel keeps Python from being interrupted: its process ends instead
    command = _python("pytest", "-v", "-m", "gpu", "-k", expression, "-p", "no:cacheprovider", "--tb=short")
    command += ["-n", str(min(MAX_WORKERS, os.cpu_count() or 1)), f"--maxfail={MAX_FAILURES}"]
    command += [f"--timeout={TEST_SECONDS}", "--timeout-method=thread", *files]
    return suite_outcome(alone(part, command, place.log, seconds, **ALONE))


def suite_outcome(ended: Ended) -> Outcome:
    count = {
        word: len(re.findall(rf"^\[gw\d+\].*? {word} ", ended.output, flags=re.MULTILINE))
        for word in ("PASSED", "FAILED", "ERROR")
    }
    num_failed = count["FAILED"] + count["ERROR"]
    so_far = f"{count['PASSED']} passed, {num_failed} failed"
    summary = re.findall(r"^=+ (.*\b(?:passed|failed|skipped|error|errors|deselected)\b.*?) =+$", ended.output, re.M)
    if ended.status is None:
        return Outcome("failed" if num_failed else "stopped", f"{so_far}, then the time was over")
    if not summary:
        return Outcome("failed", f"{so_far}, status {ended.status} after: {ended.last()}")
    if ended.status == 5 or (ended.status == 0 and not re.search(r"\b[1-9]\d* passed", summary[-1])):
        return Outcome("skipped", summary[-1])  # nothing ran, so nothing was shown
    return Outcome(_status(ended.status), summary[-1])


# -- sanitizers --------------------------------------------------------------------------------------------------------


def sanitizer(tool: str, every: int) -> Step:
    """The calls by CUDA C++ under one of compute-sanitizer's tools.

    Without torch's caching allocator, which would hide overruns; in the process itself alone, and by CUDA C++ alone:
    Triton starts compilers.
    """
    part = f"{tool}-native"

    def step(place: Place, seconds: float) -> dict[str, Outcome]:
        program = shutil.which("compute-sanitizer")
        reason = place.why_not("native") or (None if program else "compute-sanitizer is not installed")
        if reason:
            return {part: Outcome("skipped", reason)}
        # it ends by itself, so that the tool gets to its summary of what did run
        last_call = max(seconds - SANITIZED_START_SECONDS - SUMMARY_SECONDS, 1.0)
        options = ["--only", "native", "--every", str(every), "--seconds", f"{last_call:.0f}"]
        command = [program, "--tool", tool, "--target-processes", "application-only", "--error-exitcode", "9"]
        if tool == "memcheck":  # errors that a library asks for and handles, as "does this fit?", are not accesses
            command += ["--report-api-errors", "no"]
        command += _python("benchmarks.gpu.cases", "--device", "cuda", *options)
        ended = alone(part, command, place.log, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1", **ALONE)
        return {part: sanitizer_outcome(ended)}

    return step


def sanitizer_outcome(ended: Ended) -> Outcome:
    num_ok = len(re.findall(r"^ok ", ended.output, flags=re.MULTILINE))
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", ended.output)
    failure = re.search(r"^FAIL .*$", ended.output, flags=re.MULTILINE)
    detail = f"{num_ok} calls; {summary[-1].strip() if summary else f'no summary after: {ended.last()}'}"
    # a tool that was stopped before its summary has found what it has said
    failure = failure or re.search(
        r"^=+ (?:Invalid|Misaligned|Error:|Warning: Race|Barrier) .*$", ended.output, re.MULTILINE
    )
    if failure or (summary and not re.search(r"SUMMARY: 0 ", summary[-1])):
        return Outcome("failed", detail + (f"; {failure[0][:160]}" if failure else ""))
    is_done = ended.status == 0 and summary and num_ok and "\ndone values:" in ended.output
    return Outcome("passed" if is_done else "stopped", detail)


# -- times -------------------------------------------------------------------------------------------------------------


def benchmark(part: str, *options: str) -> Step:
    """Some of the benchmark's cases. Its rows are written case by case, whatever becomes of it."""

    def step(place: Place, seconds: float) -> dict[str, Outcome]:
        limit = max(seconds - LAST_CASE_SECONDS, 1.0)
        fixed = ["--device", "cuda", "--no-plot", "--output", str(place.output), "--time-limit", f"{limit:.0f}"]
        fixed += ["--rounds", str(ROUNDS), "--seconds", str(CASE_SECONDS)]
        command = _python("benchmarks", *fixed, *options)
        return {part: benchmark_outcome(alone(part, command, place.log, seconds))}

    return step


def benchmark_outcome(ended: Ended) -> Outcome:
    done = re.findall(r"^(\d+)/(\d+) ", ended.output, flags=re.MULTILINE)
    num_done, num_cases = done[-1] if done else ("0", "?")
    wrong = re.findall(r"^(.*, auxkernels.*: (?:wrong|failed).*)$", ended.output, flags=re.MULTILINE)
    detail = f"{num_done} of {num_cases} cases"
    if wrong:
        return Outcome("failed", f"{detail}; {len(wrong)} not timed: {wrong[0][:160]}")
    if ended.status not in (0, None):
        return Outcome("failed", f"{detail}, status {ended.status} after: {ended.last()}")
    return Outcome("passed" if num_done == num_cases and ended.status == 0 else "stopped", detail)
