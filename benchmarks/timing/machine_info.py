"""What the numbers were measured on: device, versions, commit, copy bandwidth and GEMM rate."""

from __future__ import annotations

import datetime
import os
import platform
import re
import statistics
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.files import ROOT
from benchmarks.timing import baselines

# with these the GNU C library keeps all memory that was ever freed; they are read when a process starts
KEEPS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 36), "MALLOC_TRIM_THRESHOLD_": str(1 << 36)}


def keeps_memory() -> bool:
    """Whether this process was started with `KEEPS_MEMORY`."""
    return all(os.environ.get(name) == value for name, value in KEEPS_MEMORY.items())


def describe(device: torch.device) -> dict:
    """The part of every row that does not depend on the case. Holds no host name, user name or path.

    Rows of GPUs also say the compute capability ("9.0"), the driver and torch's CUDA; that tells them from a CPU's.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    threads = torch.get_num_threads()
    commit, is_dirty = git_commit()
    half = None if device.type == "cuda" else bfloat16_instructions()
    suffix = "" if device.type == "cuda" else f" {half or ''} {threads} thread{'s' if threads > 1 else ''}"
    if keeps_memory():
        suffix += " memory kept"  # rows of another setting lie in a file of their own
    return {
        "device": name,
        "device_slug": slug(name + suffix),
        "cores": _usable_cores(),
        "threads": threads,
        "memory": "kept" if keeps_memory() else "as it comes",
        "isa": _isa(device),
        "native_isa": _native_isa(),
        **({} if device.type == "cuda" else {"bfloat16": half}),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        **(_cuda_versions(device) if device.type == "cuda" else {}),
        "peers": baselines.installed(),
        "auxkernels": getattr(_auxkernels(), "__version__", None),
        "commit": commit,
        "is_dirty": is_dirty,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "copy_gbps": round(copy_gbps(device), 2),
        "gemm_gflops": {name: round(gemm_gflops(device, name)) for name in ("float32", "bfloat16")},
    }


def bfloat16_instructions() -> str | None:
    """What this processor multiplies bfloat16 with; processors of one name differ in it, and libraries by factors."""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX512-BF16" if torch.cpu._is_avx512_bf16_supported() else None


def _cuda_versions(device: torch.device) -> dict:
    capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
    return {"capability": capability, "driver": driver(), "cuda": torch.version.cuda or torch.version.hip}


def driver() -> str | None:
    """Version of NVIDIA's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def slug(name: str) -> str:
    """File name of a device: "Intel(R) Xeon(R) Processor 2 threads" -> "intel-xeon-2-threads"."""
    name = re.sub(r"\((R|TM|C)\)|\b(CPU|Processor)\b|@ *[\d.]+ *GHz|\d+-Core", " ", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def copy_gbps(device: torch.device, size_bytes: int = 512 << 20) -> float:
    """Bytes read plus bytes written per second by a large `copy_`, the median of seven."""
    source = torch.ones(size_bytes // 4, dtype=torch.float32, device=device)
    destination = torch.zeros_like(source)
    return 2 * size_bytes / _median_seconds(lambda: destination.copy_(source), device, repeats=7) / 1e9


def gemm_gflops(device: torch.device, dtype: str) -> float:
    """Floating-point operations per second of a large square matrix product, the median of five."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    out = torch.empty_like(a)
    return 2 * size**3 / _median_seconds(lambda: torch.mm(a, a, out=out), device, repeats=5) / 1e9


def _median_seconds(call, device: torch.device, repeats: int) -> float:
    def synchronize():
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    samples = []
    for _ in range(repeats + 1):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples[1:])


def _cpu_name() -> str:
    try:
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1].strip()
    except (OSError, TypeError):  # no such file, or (Arm) no such line
        return platform.processor() or platform.machine()


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _isa(device: torch.device) -> str:
    if device.type == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return torch.backends.cpu.get_cpu_capability()


def _auxkernels():
    """The package, or None where it does not import: the baselines can be timed without it."""
    try:
        import auxkernels.native
    except ImportError:
        return None
    return auxkernels


def _native_isa() -> str | None:
    """Instruction set of the compiled CPU module, which need not be torch's."""
    package = _auxkernels()
    return None if package is None or package.native.missing() else package.native.cpu().instruction_set()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> tuple[str | None, bool | None]:
    """Commit of the checkout and whether tracked files differ from it; the results themselves do not count.

    AUXKERNELS_COMMIT says it of a copy without its history, as `git describe --dirty` does: a hash, and perhaps
    "-dirty".
    """
    if given := os.environ.get("AUXKERNELS_COMMIT"):
        return given.removesuffix("-dirty")[:12], given.endswith("-dirty")

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return commit, bool(changes)
    except (OSError, subprocess.CalledProcessError):
        return None, None
