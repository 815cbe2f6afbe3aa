"""How a kernel is launched: devices, whether rows are split, and what every kernel can be given."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
MAX_INT32 = 2**31 - 1


class Device(NamedTuple):
    """What launch choices depend on."""

    backend: str  # "cuda", "hip", or "cpu" where kernels are interpreted
    multiprocessors: int
    warp_size: int


def is_split(vocab_size: int, num_rows: int, segment: int, device: Device) -> bool:
    """Whether segments of one row go to several programs: where a program a row leaves half of the device idle."""
    return vocab_size > segment and 2 * num_rows <= device.multiprocessors


@functools.cache
def device_of(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device("cpu", 0, 32)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Device("hip", properties.multi_processor_count, properties.warp_size)
    return Device("cuda", properties.multi_processor_count, 32)


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Kernels start on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def run(kernel: triton.runtime.KernelInterface, num_programs: int, *args: Any, **options: Any) -> None:
    """The one place where kernels are launched; without fused multiply-add, see row_state.py."""
    if num_programs > MAX_INT32:
        raise ValueError(f"a launch has at most {MAX_INT32} programs, got {num_programs}: pass fewer rows at a time")
    if num_programs:
        kernel[(num_programs,)](*args, **options, enable_fp_fusion=False)


# -- arguments ---------------------------------------------------------------------------------------------------------


def check_device(tensor: Tensor) -> None:
    if tensor.device.type == "cuda" or (INTERPRETED and tensor.device.type == "cpu"):
        return
    raise RuntimeError(
        "backend='triton' needs tensors on a CUDA or ROCm device (or on CPU, with TRITON_INTERPRET=1 set before Triton "
        f"is imported), got {tensor.device}"
    )


def numbers(tensor: Tensor | None) -> Tensor | None:
    """A small vector (one number per row, class weights) as kernels read it."""
    return None if tensor is None else tensor.to(torch.float32).contiguous()
