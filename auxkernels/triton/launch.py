"""How a kernel is launched: tile sizes, whether rows are split, devices, and tensors as kernel arguments."""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..layout import as_rows

INTERPRETED = bool(triton.knobs.runtime.interpret)
MAX_INT32 = 2**31 - 1


class Tiles(NamedTuple):
    """How the columns of a row are cut. The bits of a result depend on these numbers, so they follow from V alone."""

    lanes: int  # columns side by side, each with its own running maximum
    rows: int  # of lanes, loaded at once
    segment: int  # columns whose sums are formed together: a multiple of lanes * rows


def tiles(vocab_size: int) -> Tiles:
    """Cut of a row of `vocab_size` columns. Unmeasured; reasons below.

    Eight 16-bit columns a thread make 128-bit loads, four rows of lanes make the cost of a running maximum small (1.25
    exponentials a column) and put 64 bytes of each source in flight for every thread. Wide rows take a whole
    multiprocessor: fewer rows are in flight then, and the second read finds more of them in L2.
    """
    if vocab_size <= 1024:
        return Tiles(256, 4, 1024)
    if vocab_size <= 8192:
        return Tiles(1024, 4, 8192)
    if vocab_size <= 32768:
        return Tiles(2048, 4, 32768)
    return Tiles(4096, 4, 32768)


def num_warps(lanes: int, warp_size: int) -> int:
    """Eight columns a thread: 128-bit loads of 16-bit logits, 32 columns of a tile in registers."""
    return max(lanes // (8 * warp_size), 1)


def is_split(vocab_size: int, num_rows: int, segment: int, multiprocessors: int) -> bool:
    """Whether the segments of a row go to several programs: where whole rows would leave half of the device idle."""
    return vocab_size > segment and 2 * num_rows <= multiprocessors


@functools.cache
def device_limits(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, threads of a warp)."""
    if device.type != "cuda":
        return 0, 32
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, getattr(properties, "warp_size", 32)


def check_device(tensor: Tensor) -> None:
    if tensor.device.type == "cuda" or (INTERPRETED and tensor.device.type == "cpu"):
        return
    raise RuntimeError(
        f"backend='triton' needs tensors on a CUDA or ROCm device, or on CPU with TRITON_INTERPRET=1 set before Triton is "
        f"imported, got {tensor.device}"
    )


def on_device_of(tensor: Tensor):
    """Kernels are launched on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def run(kernel, num_programs: int, *args, **options) -> None:
    """The one place where kernels are launched. No fused multiply-add: see row_state.py."""
    if num_programs > MAX_INT32:
        raise ValueError(f"one launch has at most {MAX_INT32} programs, got {num_programs}: pass fewer rows at a time")
    kernel[(num_programs,)](*args, **options, enable_fp_fusion=False)


# -- arguments ---------------------------------------------------------------------------------------------------------


def small(tensor: Tensor | None) -> Tensor | None:
    """A vector with one number per row, or the class weights, as the kernels read it."""
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def source_args(values: Tensor | None, scale: Tensor | None, softcap: float | None) -> tuple:
    """(pointer, rows per outer step, its stride, the row stride, width, scale, its stride, softcap) of a source."""
    if values is None:
        return None, 1, 0, 0, 0, None, 0, None
    rows = as_rows(values)
    scale_stride = 0 if scale is None or scale.dim() == 0 else 1
    return (*rows, values.shape[-1], small(scale), scale_stride, None if softcap is None else float(softcap))
