"""Times implementations of one operator against each other: paired, alternating, and only after a float64 check.

A Case holds implementations of the same work on the same inputs. `run_cases` checks each against its case's oracle,
measures its peak memory once, and then times those that passed in rounds of random order, an untimed call of the same
implementation directly before each timed one: what runs after another implementation can pay for that one's pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

# of the buffer that flushes L2, before a timed call on a GPU
MAX_FILLS = 40


class Unavailable(Exception):
    """An implementation cannot run here; the message says why and becomes its row's status."""


class Outputs(NamedTuple):
    """What a call computed, for the check. `statistics` is whatever the operator's oracle understands."""

    loss: torch.Tensor | None = None
    gradients: tuple[torch.Tensor, ...] = ()
    statistics: Any = None


class Accuracy(NamedTuple):
    """Relative error against float64 by quantity, and why the result is refused (None: it is accepted)."""

    errors: dict[str, float]
    problem: str | None = None


@dataclass(frozen=True)
class Implementation:
    """One way to do the case's work: `prepare()` allocates what the call reuses and returns the call to be timed.

    role        "ours" is held to the error model and to the yardstick's error, "yardstick" is eager torch in the
                inputs' dtype, "baseline" need only be the same mathematics, "floor" does the floor's work and is not
                checked.
    max_rounds  a slow baseline takes part in the first rounds alone; None: in all.
    arithmetic  the coarsest dtype that a baseline computes in, where its loss comes back in a finer one.
    """

    name: str
    prepare: Callable[[], Callable[[], Any]]
    role: str = "baseline"
    max_rounds: int | None = None
    arithmetic: torch.dtype | None = None


@dataclass
class Case:
    """The same work for several implementations.

    floor_bytes, floor_flops   what a perfect kernel moves and computes; 0 for what does not bound the operator.
    threads                    torch's threads while it runs, which its rows then say; None: as they are.
    """

    op: str
    pass_name: str
    shape: tuple[int, ...]
    dtype: str
    inputs: str
    device: torch.device
    floor_bytes: int
    implementations: list[Implementation]
    check: Callable[[Implementation, Any], Accuracy]
    calls_per_sample: int = 1
    floor_flops: int = 0
    threads: int | None = None

    @property
    def title(self) -> str:
        return f"{self.pass_name} {shape_text(self.shape)} {self.dtype} {self.inputs}"


def shape_text(shape: Sequence[int]) -> str:
    """Rows x columns, with the widths of the heads behind them: "2048 x 50257 (768 + 256)"."""
    (num_rows, num_columns), widths = shape[:2], shape[2:]
    return f"{num_rows} x {num_columns}" + (f" ({' + '.join(map(str, widths))})" if widths else "")


@dataclass
class Settings:
    """Rounds per case; rounds stop early after `seconds`, but not before `minimum_rounds`."""

    rounds: int = 15
    seconds: float = 6.0
    minimum_rounds: int = 5
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    on_step: Callable[[str, float], None] = lambda text, share: None


def run_case(case: Case, settings: Settings) -> list[dict]:
    """One row per implementation, in the case's order; a row without a time says in `status` why."""
    return run_cases([case], settings)


def run_cases(cases: list[Case], settings: Settings) -> list[dict]:
    """The rows of several cases timed in the same rounds: whatever the machine does, it does to all of them."""
    checked = []
    for index, case in enumerate(cases):
        with _threads(case.threads):
            checked.append(_checked(case, settings, begin=0.5 * index / len(cases), end=0.5 * (index + 1) / len(cases)))
    times_us = _time_rounds([(case, calls) for case, (_, calls) in zip(cases, checked, strict=True)], settings)
    for case, (rows, _), of_case in zip(cases, checked, times_us, strict=True):
        _fill_times(case, rows, of_case)
    return [row for rows, _ in checked for row in rows.values()]


def _checked(case: Case, settings: Settings, begin: float, end: float) -> tuple[dict[str, dict], dict[str, Callable]]:
    """By implementation: rows without times, and the calls of those that are right; `begin` and `end` are progress."""
    rows, calls = {}, {}
    for index, implementation in enumerate(case.implementations):
        share = begin + (end - begin) * index / len(case.implementations)
        settings.on_step(f"{case.title}: checking {implementation.name}", share)
        rows[implementation.name] = row = _empty_row(case, implementation)
        try:
            call = implementation.prepare()
            if implementation.role != "floor":
                accuracy = case.check(implementation, call())
                row["fp64_error"] = accuracy.errors
                if accuracy.problem:
                    row["status"] = f"wrong: {accuracy.problem}"
                    continue
            call()
            row["peak_bytes"] = peak_bytes(call, case.device)
            calls[implementation.name] = call
        except Exception as error:  # a missing compiler or too little memory is a finding about one row, not the end
            row["status"] = _reason(error)
    return rows, calls


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Within it torch has so many threads; None: as many as before."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count:
            torch.set_num_threads(before)


def _empty_row(case: Case, implementation: Implementation) -> dict:
    return {
        "op": case.op,
        "pass": case.pass_name,
        "implementation": implementation.name,
        "role": implementation.role,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "inputs": case.inputs,
        **({"threads": case.threads} if case.threads else {}),
        "time_us": None,
        "time_us_p25": None,
        "time_us_p75": None,
        "rounds": 0,
        "floor_bytes": case.floor_bytes,
        "floor_flops": case.floor_flops,
        "gbps": None,
        "gflops": None,
        "share_of_floor": None,
        "fp64_error": {},
        "eager_fp64_error": {},
        "peak_bytes": None,
        "status": "ok",
    }


def _time_rounds(cases: list[tuple[Case, dict[str, Callable]]], settings: Settings) -> list[dict[str, list[float]]]:
    """Times of each case's calls by name; a round is one timed call of every implementation of every case."""
    times_us: list[dict[str, list[float]]] = [{name: [] for name in calls} for _, calls in cases]
    max_rounds = [{i.name: i.max_rounds or settings.rounds for i in case.implementations} for case, _ in cases]
    timers = [_cuda_timer(case) if case.device.type == "cuda" else _host_timer(case) for case, _ in cases]
    start = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for done in range(settings.rounds):
            elapsed = time.perf_counter() - start
            if done >= settings.minimum_rounds and elapsed > settings.seconds:
                break
            share = max(done / settings.rounds, min(elapsed / settings.seconds, 1.0))
            settings.on_step(f"{cases[0][0].title}: round {done + 1}", 0.5 + 0.5 * share)
            order = [(i, name) for i, (_, calls) in enumerate(cases) for name in calls if done < max_rounds[i][name]]
            settings.rng.shuffle(order)
            for i, name in order:
                case, calls = cases[i]
                with _threads(case.threads):
                    times_us[i][name].append(timers[i](calls[name]))
    finally:
        gc.enable()
    return times_us


def _host_timer(case: Case) -> Callable[[Callable], float]:
    def synchronize():
        if case.device.type == "cuda":
            torch.cuda.synchronize(case.device)

    # calls too small for their work to matter run on this thread, whose own time other processes do not count in
    is_of_thread = case.calls_per_sample > 1 and case.device.type == "cpu"
    clock = time.thread_time if is_of_thread else time.perf_counter

    def time_call(call: Callable) -> float:
        """Microseconds of one call, releasing its results included: a training step pays for that too."""
        call()
        synchronize()
        start = clock()
        for _ in range(case.calls_per_sample):
            call()
        synchronize()
        return (clock() - start) * 1e6 / case.calls_per_sample

    return time_call


def _cuda_timer(case: Case) -> Callable[[Callable], float]:
    if case.calls_per_sample > 1:  # calls bound by their launch are what the host pays, not what the device does
        return _host_timer(case)
    l2_bytes = torch.cuda.get_device_properties(case.device).L2_cache_size
    flush_buffer = torch.empty(max(2 * l2_bytes, 256 << 20), dtype=torch.uint8, device=case.device)

    def elapsed_us(call: Callable, num_fills: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(num_fills):
            flush_buffer.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    fill_us = max(1.0, min(elapsed_us(flush_buffer.zero_, 1) for _ in range(3)))

    def time_call(call: Callable) -> float:
        begun = time.perf_counter()
        call()
        host_us = (time.perf_counter() - begun) * 1e6
        return elapsed_us(call, fills_to_cover(host_us, fill_us))

    return time_call


def fills_to_cover(host_us: float, fill_us: float) -> int:
    """How many fills of the flush buffer precede a timed call.

    Two leave L2 cold. More keep the device busy for twice as long as the host needs to queue the call, so that the
    events time the device and not the host; a call that waits for the device itself gains nothing from that, which
    the limit is for.
    """
    return max(2, min(math.ceil(2 * host_us / fill_us), MAX_FILLS))


def _fill_times(case: Case, rows: dict[str, dict], times_us: dict[str, list[float]]) -> None:
    for name, samples in times_us.items():
        row = rows[name]
        quartiles = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
        row["time_us_p25"], row["time_us"], row["time_us_p75"] = (round(value, 3) for value in quartiles)
        row["rounds"] = len(samples)
        if case.calls_per_sample == 1:  # else a call is too small for its work to matter
            row["gbps"] = round(case.floor_bytes / row["time_us"] / 1e3, 3) or None
            row["gflops"] = round(case.floor_flops / row["time_us"] / 1e3, 3) or None
    # the floor's work was timed in the same rounds, so a change in the machine's speed cancels; of two floors, of bytes
    # and of products, the higher holds
    floors_us = [rows[i.name]["time_us"] for i in case.implementations if i.role == "floor"]
    floor_us = max((time_us for time_us in floors_us if time_us), default=None)
    yardstick = next((rows[i.name]["fp64_error"] for i in case.implementations if i.role == "yardstick"), {})
    for row in rows.values():
        is_lower_floor = row["role"] == "floor" and row["time_us"] != floor_us
        if row["time_us"] and floor_us and not is_lower_floor:
            row["share_of_floor"] = round(floor_us / row["time_us"], 4)
        row["eager_fp64_error"] = yardstick if row["fp64_error"] else {}


def copy_floor(floor_bytes: int, device: torch.device) -> Implementation:
    """Moves `floor_bytes`, half read and half written, between existing buffers: the floor, measured in every round."""

    def prepare():
        source = torch.ones(max(1, floor_bytes // 8), dtype=torch.float32, device=device)
        destination = torch.zeros_like(source)
        return lambda: destination.copy_(source)

    return Implementation("copy (floor)", prepare, role="floor")


def launch_floor(device: torch.device) -> Implementation:
    """Writes one element: what a kernel costs that does nothing, the floor of calls that are bound by their launch."""

    def prepare():
        element = torch.zeros(1, device=device)
        return element.zero_

    return Implementation("launch (floor)", prepare, role="floor")


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Most memory one call holds at once beyond what was there before it: temporaries, gradients and the loss.

    On a GPU the caching allocator's own count; on Linux the process's resident high-water mark, good to about 0.2 MiB
    (the kernel counts pages per CPU in batches) and to 2 MiB where huge pages are used. None where neither exists.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before_bytes = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before_bytes
    try:
        # freed pages that are kept are already resident and would hide the same amount of new memory
        ctypes.CDLL(None).malloc_trim(0)
        if ours := sys.modules.get("auxkernels"):
            ours.empty_cache()
        Path("/proc/self/clear_refs").write_text("5")  # 5 sets the high-water mark back to the present
        before_bytes = _process_bytes("VmRSS")
        call()
        return max(0, _process_bytes("VmHWM") - before_bytes)
    except (OSError, AttributeError):
        return None


def _process_bytes(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    # a file name tells a reader enough; where it lies is nobody's business
    text = re.sub(r"(?:/[\w.+-]+)+/", "", lines[0])
    prefix = "unavailable" if isinstance(error, Unavailable) else f"failed: {type(error).__name__}"
    return f"{prefix}: {text[:160]}"
