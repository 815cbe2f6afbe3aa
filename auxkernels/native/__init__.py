"""The compiled modules: loaded on first use, and the reason where one cannot be."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

_SPOKEN = {"cpu": "CPU", "cuda": "CUDA"}
# what cuda_wheel/setup.py makes: the CUDA module and its _build.json, for a package that was built without
_CUDA_WHEEL = "auxkernels_cuda"
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


@functools.cache
def _load(kind: str) -> tuple[ModuleType | None, str | None]:
    """The module of that kind, "cpu" or "cuda", or why there is none."""
    for package in (__package__, _CUDA_WHEEL) if kind == "cuda" else (__package__,):
        try:
            return importlib.import_module(f"{package}._{kind}"), None
        except ModuleNotFoundError:
            continue
        except ImportError as error:  # built for another Python, or a library that it needs is missing
            return None, f"the {_SPOKEN[kind]} module does not load: {error}"
    return None, build_record().get(kind, f"the {_SPOKEN[kind]} module was not built")


def _loaded(kind: str) -> ModuleType:
    module, reason = _load(kind)
    if module is None:
        raise RuntimeError(reason)
    return module


def cpu() -> ModuleType:
    """The compiled CPU module. Raises RuntimeError with the reason where there is none."""
    return _loaded("cpu")


def cuda() -> ModuleType:
    """The compiled CUDA module, likewise."""
    return _loaded("cuda")


def with_orders(module: ModuleType, **orders: Sequence[str]) -> ModuleType:
    """The module. Raises RuntimeError unless each of its functions so named returns these names in this order.

    Python and C++ pass lists that go by number: a module of other sources would read one number as another.
    """
    for function, expected in orders.items():
        found = list(getattr(module, function, list)())
        if found != list(expected):
            raise RuntimeError(
                f"{module.__name__} was built from other sources than this package: its {function} are {found}, the "
                f"package has {list(expected)}; rebuild it: pip install ., or python setup.py build_ext --inplace"
            )
    return module


def missing() -> str | None:
    """Why there is no compiled CPU module here; None if there is one."""
    return _load("cpu")[1]


def cuda_missing() -> str | None:
    """Why there is no compiled CUDA module that this machine's driver can run; None if there is one.

    Asks for the driver's version and touches no device.
    """
    module, reason = _load("cuda")
    return reason if module is None else module.driver_problem()


def build_record() -> dict[str, str]:
    """What the build said of each module, as written beside it."""
    record = _record_in(Path(__file__).parent)
    if not record.get("cuda", "").startswith("built"):
        wheel = importlib.util.find_spec(_CUDA_WHEEL)
        for folder in (wheel and wheel.submodule_search_locations) or ():
            record |= _record_in(Path(folder))
    return record


def _record_in(folder: Path) -> dict[str, str]:
    path = folder / "_build.json"
    return json.loads(path.read_text()) if path.exists() else {}


def describe() -> str:
    module, reason = _load("cpu")
    if module is None:
        return f"unavailable: {reason}"
    return f"available (C++, CPU, instruction set {module.instruction_set()} of {', '.join(module.instruction_sets())})"


def add(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a + b for contiguous CPU tensors of one shape, added in float32; 16-bit and float32 may be mixed."""
    tensors = (out, a, b)
    cpu().add(*((t.data_ptr(), DTYPE_CODES[t.dtype]) for t in tensors), out.numel(), torch.get_num_threads())


def can_add(*tensors: Tensor) -> bool:
    return _load("cpu")[0] is not None and all(
        t.device.type == "cpu"
        and t.is_contiguous()
        and t.dtype in DTYPE_CODES
        and t.dtype != torch.float64
        and t.shape == tensors[0].shape
        for t in tensors
    )


def brought_in(tensor: Tensor) -> Tensor:
    """A fresh tensor, the pages of a large CPU one brought in: a GEMM that has to do it takes three times as long."""
    module = _load("cpu")[0]
    if module is not None and tensor.device.type == "cpu":
        module.bring_in(tensor.data_ptr(), tensor.numel() * tensor.element_size(), torch.get_num_threads())
    return tensor
