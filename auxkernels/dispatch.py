"""Which implementations exist here, why the others do not, and which one a call gets."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import platform
from collections.abc import Iterable
from types import ModuleType
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter

from . import native

# releases that a report of a fault may depend on
OPTIONAL = ("triton", "numpy", "transformers", "accelerate", "peft", "trl", "vllm")
BACKENDS = ("auto", "reference", "native", "triton")


def _is_installed(module: str) -> bool:
    """Looks for a module without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # made unimportable on purpose, as tests do
        return False


# Found out once, at import: to torch.compile these are constants, and the compiled module must be loaded before a fork
# to know a forked child as one.
_NATIVE_MISSING = native.missing()
_CUDA_MISSING = native.cuda_missing()
_HAS_TRITON = _is_installed("triton")


def native_missing() -> str | None:
    """Why the compiled CPU module cannot be used; None if it can."""
    return _NATIVE_MISSING


def cuda_missing() -> str | None:
    """Why the compiled CUDA module cannot be used; None if it can."""
    return _CUDA_MISSING


def triton_missing() -> str | None:
    """Why Triton kernels cannot be used; None if they can."""
    return None if _HAS_TRITON else "triton is not installed: pip install 'auxkernels[triton]'"


def triton_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_not(backend: str, device: torch.device, compute: torch.dtype, has_cuda_kernels: bool) -> str | None:
    """Why `backend` cannot serve tensors on `device`; None if it can."""
    if backend == "native":
        if device.type == "cuda":
            if not has_cuda_kernels:
                return "the compiled CUDA module has aux_cross_entropy and logit_stats alone, use 'triton'"
            return cuda_missing()
        if device.type != "cpu":
            return f"the compiled modules serve CPU and CUDA tensors, these are on {device}"
        return native_missing()
    if backend == "triton":
        if compute == torch.float64:
            return "the Triton kernels have no float64"
        if device.type != "cuda" and not (device.type == "cpu" and triton_interpreted()):
            return f"Triton kernels run on CUDA or ROCm devices (or interpreted, TRITON_INTERPRET=1), not on {device}"
        return triton_missing()
    return None


def resolve(backend: str, device: torch.device, compute: torch.dtype, has_cuda_kernels: bool = False) -> str:
    """The implementation that serves a call: the one named, or an error that says why it cannot; "auto" chooses.

    has_cuda_kernels   whether the compiled CUDA module has this operator
    """
    if backend == "auto":
        preferred = "native" if device.type == "cpu" else "triton"
        return preferred if _why_not(preferred, device, compute, has_cuda_kernels) is None else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    reason = _why_not(backend, device, compute, has_cuda_kernels)
    if reason is not None:
        raise RuntimeError(f"backend={backend!r} cannot be used: {reason}")
    return backend


@functools.cache
def implementation(operator: str, backend: str, is_cuda: bool = False) -> ModuleType:
    """The module of an operator's folder that serves its ops, imported on first use.

    is_cuda   on tensors of a CUDA device, which are another compiled module's
    """
    modules = {"native": "cuda" if is_cuda else "native", "triton": "triton.launch"}
    if backend not in modules:
        raise ValueError(f"the backend of an op must be 'native' or 'triton', got {backend!r}")
    return importlib.import_module(f".{operator}.{modules[backend]}", __package__)


def is_direct(tensors: Iterable[Any], backend: str) -> bool:
    """Whether a call of a compiled module may skip the dispatcher, a fifth of a small call (6 of 30 us)."""
    return backend == "native" and are_plain(tensors)


# names of their own: a chain of attributes is a tenth of a microsecond, and small calls ask often
_is_compiling, _num_modes, _tracing_state = (
    torch.compiler.is_compiling,
    torch._C._len_torch_dispatch_stack,
    torch._C._get_tracing_state,
)
_level_of_transforms, _STRIDED = torch._C._functorch.maybe_current_level, torch.strided


def is_eager() -> bool:
    """Whether nothing is tracing or transforming."""
    return not (_is_compiling() or _num_modes()) and _tracing_state() is None and _level_of_transforms() is None


# torch.compile's, while it runs what it was given and takes up the frames in it
_frame_callback = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: None)


def is_eager_without_compiler() -> bool:
    """`is_eager`, and torch.compile will not take up the frames of this call one by one, as after a graph's break."""
    return is_eager() and _frame_callback() is None


def are_plain(tensors: Iterable[Any]) -> bool:
    """Whether the dispatcher has nothing to say of a call with these arguments, of which some are tensors.

    Nothing may be tracing or transforming, and every tensor must be a plain one that lies in memory as it is read:
    subclasses, functorch's wrappers and lazily negated tensors are the dispatcher's to resolve.
    """
    if not is_eager():
        return False
    for value in tensors:
        if value is None:
            continue
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            if value.is_neg():
                return False
        elif isinstance(value, Tensor):
            return False
    return True


def is_plain_on_cpu(value: object) -> TypeGuard[Tensor]:
    """Whether it is a tensor that lies in memory densely and as it is read."""
    kind = type(value)
    if kind is not Tensor and kind is not Parameter:
        return False
    tensor: Tensor = value  # type: ignore[assignment]
    return tensor.is_cpu and tensor.layout is _STRIDED and tensor.is_contiguous() and not tensor.is_neg()


def number_tensor(value: float | Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """A number as a 0-d tensor: float arguments of an op would make torch.compile compile again for every value."""
    if value is None or isinstance(value, Tensor):
        return value
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=dtype, device=device) * value
    return torch.full((), value, dtype=dtype, device=device)


def _describe_cuda() -> str:
    if cuda_missing() is not None:
        return f"unavailable: {cuda_missing()}"
    said = "available (CUDA C++: aux_cross_entropy, logit_stats)"
    return said if torch.cuda.is_available() else f"{said}, but there is no CUDA device"


def _releases() -> str:
    """Those of the packages that are used where they are there; none is imported."""
    from importlib import metadata

    found = []
    for name in OPTIONAL:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def _machine() -> str:
    """Operating system, processor, and the threads that a call may use."""
    name = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    words = [platform.system(), platform.machine(), *([] if name in ("", platform.machine()) else [name])]
    return f"{' '.join(words)}, {torch.get_num_threads()} threads"


def show_config() -> str:
    """What a report of a fault needs: releases, the machine, and of each implementation whether it is there or why not.

    Touches no device beyond asking whether there is one.
    """
    from . import __version__, memory

    cuda = f"{torch.version.cuda or torch.version.hip}" if torch.cuda.is_available() else "no device"
    triton = triton_missing()
    if triton is None and not torch.cuda.is_available():
        triton = "triton is installed, but there is no CUDA or ROCm device (set TRITON_INTERPRET=1 to interpret on CPU)"
    lines = [
        f"auxkernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}, CUDA: {cuda}",
        f"beside it   {_releases()}",
        f"machine     {_machine()}",
        "reference   available (plain PyTorch)",
        f"native CPU  {native.describe()}",
        f"native CUDA {_describe_cuda()}",
        f"triton      {'available' if triton is None else 'unavailable: ' + triton}",
        f"CPU cache   {memory.describe()}",
    ]
    lines += [f"build       {name}: {said}" for name, said in native.build_record().items()]
    return "\n".join(lines)
