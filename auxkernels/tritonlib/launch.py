"""How a kernel is launched: cut of the rows, whether they are split, devices, and what a kernel can be given."""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..cross_entropy.triton.columns import Source
from ..layout import as_rows

INTERPRETED = bool(triton.knobs.runtime.interpret)
MAX_INT32 = 2**31 - 1


class Device(NamedTuple):
    """What launch choices depend on."""

    backend: str  # "cuda", "hip", or "cpu" where kernels are interpreted
    multiprocessors: int
    warp_size: int


class Cut(NamedTuple):
    """How the columns of a row are cut.

    The bits of a result depend on these numbers: they follow from V, dtypes and options, never from the number of rows.
    """

    lanes: int  # each with its own running maximum; a thread has one
    width: int  # columns of a lane in a tile
    segment: int  # columns whose sums are formed together


def cut_of(vocab_size: int, num_bytes: int, is_bent: bool, device: Device) -> Cut:
    """The cut of rows of `vocab_size` logits of up to `num_bytes` bytes; `is_bent`: with scales or softcaps.

    A lane's columns in a tile are one 128-bit load; fewer on AMD, whose scalar registers hold a mask for each column.
    Wide rows get many threads, so that few rows are in flight on a multiprocessor and the second read finds them in L2;
    a segment is then long enough for the reduction over its lanes, where all warps wait, to cost a few percent.
    Reasoned, not measured.
    """
    lanes, segment = 512, 32768
    if vocab_size <= 1024:
        lanes, segment = 32, 1024
    elif vocab_size <= 8192:
        lanes, segment = 128, 8192
    elif vocab_size <= 32768:
        lanes = 256
    width = 16 // num_bytes
    if device.backend == "hip":
        width = 2 if is_bent else 4
    return Cut(lanes, width, segment)


def tiles_at_once(is_plain: bool, even: bool, device: Device) -> int:
    """How many tiles are loaded before the first is used; no bit depends on it.

    64 bytes of each source in flight for every thread hide the memory's latency. Statistics, softcaps and scale
    gradients need the registers, and have arithmetic to hide it; 16-bit logits that come one by one take one each.
    """
    if not is_plain:
        return 1
    return 4 if even and device.backend != "hip" else 2


def options(cut: Cut, has_bends: bool, device: Device) -> dict[str, int]:
    """Launch options: warps, and on NVIDIA how many registers a thread may have."""
    num_warps = max(cut.lanes // device.warp_size, 1)
    if device.backend != "cuda":
        return {"num_warps": num_warps}
    # left to itself ptxas spills a register or two for one more resident block
    return {"num_warps": num_warps, "maxnreg": min(65536 // (32 * num_warps), 255) if has_bends else 128}


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


def on_device_of(tensor: Tensor):
    """Kernels start on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def run(kernel, num_programs: int, *args, **options) -> None:
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


def check_rows(name: str, tensor: Tensor | None, like: Tensor) -> None:
    """One number per row of [*, V] logits."""
    if tensor is None:
        return
    if tensor.shape != like.shape[:-1]:
        raise ValueError(f"{name} must have shape {list(like.shape[:-1])}, got {list(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {tensor.device}")


def check(base: Tensor, aux: Tensor | None, vocab_size: int) -> None:
    """What the kernels cannot do, of arguments that the op has checked."""
    check_device(base)
    for name, tensor in (("base", base), ("aux", aux)):
        if tensor is not None and tensor.dtype == torch.float64:
            raise TypeError(f"{name} must be float32, bfloat16 or float16, got torch.float64: triton has no float64")
    if vocab_size > MAX_INT32 // 2:
        raise ValueError(f"vocab_size must be at most {MAX_INT32 // 2}, got {vocab_size}")


def numbers(tensor: Tensor | None) -> Tensor | None:
    """A small vector (one number per row, class weights) as kernels read it."""
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def source(values: Tensor | None, scale: Tensor | None, softcap: float | None) -> Source:
    """A source as kernels read it. A matrix has one row per outer step: Triton would compile for some N again."""
    if values is None:
        return Source(None, 1, 0, 0, 0, None, 0, None)
    tensor, num_inner, stride_outer, stride_inner = as_rows(values)
    if stride_outer == 0 and values.numel() == num_inner * values.shape[-1]:
        num_inner, stride_outer, stride_inner = 1, stride_inner, 0
    scale_stride = 0 if scale is None or scale.dim() == 0 else 1
    return Source(
        tensor, num_inner, stride_outer, stride_inner, values.shape[-1], numbers(scale), scale_stride, softcap
    )
