"""Plays a CUDA device on a CPU, for dry runs of what is to run on a real one: never for results.

What names a CUDA device gets the CPU's tensors, and both fused implementations are the CPU's. Events, streams,
capture, replay and the allocator's counts have the same interface; a captured graph computes anew when it is replayed.
Large problems are small here: inputs of the benchmark keep their names and lose most of their elements.

FAKE_CUDA_DEFECT lets an implementation fail: "native:illegal" (an illegal access, after which the device is lost),
"native:abort" (the process), "triton:hang", "native:missing" (there is no module).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
NAME, CAPABILITY = "Fake GPU", (9, 0)
# the largest tensor that is made on the device, and what each side of a larger one becomes
MAX_ELEMENTS, MAX_SIDE, MAX_LENGTH = 1 << 16, 256, 1 << 12
# of the sixty small calls, every so many-th in a process that has imported them (one that is started has all)
KEPT_CASES = 7
FACTORIES = (torch.empty, torch.ones, torch.zeros, torch.randn)


def _is_cuda(value: Any) -> bool:
    return (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value.partition(":")[0] == "cuda"
    )


class OnCpu(TorchFunctionMode):
    """Every call that names a CUDA device is made with the CPU instead."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.device:  # as a name it stays what it is
            return func(*args, **kwargs)
        is_made_there = func in FACTORIES and _is_cuda(kwargs.get("device"))
        args = tuple(CPU if _is_cuda(value) else value for value in args)
        kwargs = {name: CPU if _is_cuda(value) else value for name, value in kwargs.items()}
        if is_made_there:
            args = _cut(args)
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*args, **kwargs)


def _cut(sizes: tuple) -> tuple:
    """The sizes of a factory's call, none of them large."""
    sizes = tuple(sizes[0]) if sizes and isinstance(sizes[0], (tuple, list)) else sizes
    if torch.Size(sizes).numel() <= MAX_ELEMENTS:
        return sizes
    return tuple(min(size, MAX_LENGTH if len(sizes) == 1 else MAX_SIDE) for size in sizes)


class Event:
    def __init__(self, enable_timing: bool = False):
        self.can_time, self.seconds = enable_timing, None

    def record(self, stream=None) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        assert self.seconds is not None, "an event must have been recorded"

    def elapsed_time(self, end: Event) -> float:
        assert self.can_time and end.can_time, "these events do not time"
        return (end.seconds - self.seconds) * 1e3


class Stream:
    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)

    def synchronize(self) -> None:
        pass


class _Recorder(TorchDispatchMode):
    """Keeps what was called, with what, and what came of it."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class CUDAGraph:
    def __init__(self):
        self.calls: list[tuple] = []

    def replay(self) -> None:
        """Makes the same calls on what the same tensors hold now."""
        assert self.calls, "nothing was captured"
        with torch.no_grad():
            for func, args, kwargs, result in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(_tensors(result), _tensors(again), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def _tensors(result) -> list[torch.Tensor]:
    values = result if isinstance(result, (tuple, list)) else (result,)
    return [value for value in values if isinstance(value, torch.Tensor)]


@contextlib.contextmanager
def graph(captured: CUDAGraph):
    with _Recorder() as recorder:
        yield
    captured.calls = recorder.calls


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu" if _is_cuda(device) else device)


class Defect:
    """What goes wrong, as FAKE_CUDA_DEFECT says."""

    def __init__(self, text: str):
        self.name, _, self.kind = text.partition(":")
        self.is_lost = False

    def meet(self, name: str) -> None:
        """A call by the implementation `name` begins."""
        if name != self.name:
            return
        if self.kind == "abort":
            os.abort()
        if self.kind == "hang":
            time.sleep(600)
        if self.kind == "illegal":
            self.is_lost = True
            self.synchronize()

    def synchronize(self, device=None) -> None:
        if self.is_lost:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def _patch_torch(patch: Callable, defect: Defect) -> None:
    properties = SimpleNamespace(name=NAME, L2_cache_size=50 << 20, total_memory=16 << 30, multi_processor_count=4)
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_properties": lambda device=None: properties,
        "synchronize": defect.synchronize,
        "memory_allocated": lambda device=None: 1 << 20,
        "max_memory_allocated": lambda device=None: 3 << 20,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "current_stream": lambda device=None: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device=None: contextlib.nullcontext(),
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
    }.items():
        patch(torch.cuda, name, value)
    patch(torch, "Generator", Generator)
    patch(torch.version, "cuda", "13.0")
    # compilers are not what a device is needed for
    patch(torch, "compile", lambda function=None, **options: function)


def _patch_package(patch: Callable, defect: Defect) -> None:
    """Both fused implementations are what the CPU has; which one was asked for is still decided as on a device."""
    from auxkernels import dispatch
    from auxkernels.cross_entropy import cuda as cuda_cross_entropy

    decide, on_cpu = dispatch.resolve, "reference" if dispatch.native_missing() else "native"

    def resolve(backend, device, *args, **kwargs):
        found = decide(backend, CUDA, *args, **kwargs)
        if found == "reference" or _is_cuda(device):  # or: it is only asked whether it could be used
            return found
        defect.meet(found)
        return on_cpu

    is_missing = (defect.name, defect.kind) == ("native", "missing")
    patch(dispatch, "_CUDA_MISSING", "the CUDA module was not built" if is_missing else None)
    patch(dispatch, "_HAS_TRITON", True)
    told = {"cluster": 1, "num_slots": 20, "clusters_at_once": 132}
    patch(cuda_cross_entropy, "plan", lambda num_rows, vocab_size, base, aux: told)
    patch(dispatch, "resolve", resolve)


def _patch_benchmarks(patch: Callable) -> None:
    """Inputs of a few thousand elements whatever the case's shape, which it keeps as its name; fewer calls."""
    from benchmarks.cross_entropy import cases as cross_entropy
    from benchmarks.gpu import cases as gpu_cases
    from benchmarks.heads import cases as cross_entropy_heads
    from benchmarks.soft_embedding import cases as soft_embedding

    all_cases = gpu_cases.all_cases
    patch(gpu_cases, "all_cases", lambda: all_cases()[::KEPT_CASES])
    for module, name, largest in (
        (cross_entropy, "make_inputs", (8, 1 << 9)),
        (cross_entropy_heads, "make_heads", (8, 1 << 9, 64, 16)),
        (soft_embedding, "make_inputs", (32, 300, 32)),
    ):
        patch(module, name, _of_small_shapes(getattr(module, name), largest))


def _of_small_shapes(make: Callable, largest: tuple[int, ...]) -> Callable:
    def made(shape, *args):
        # from half of the largest on; what is odd stays odd
        sizes = zip(shape, largest, strict=True)
        small = [size if size <= most else most // 2 + size % (most // 2) for size, most in sizes]
        return make(tuple(small), *args)

    return made


def install(patch: Callable = setattr) -> OnCpu:
    """Puts the fake device in the place of torch's CUDA, for the rest of the process or of what `patch` undoes."""
    defect = Defect(os.environ.get("FAKE_CUDA_DEFECT", ""))
    _patch_torch(patch, defect)
    _patch_package(patch, defect)
    _patch_benchmarks(patch)
    mode = OnCpu()
    mode.__enter__()
    return mode
