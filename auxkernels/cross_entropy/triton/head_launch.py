"""Row statistics of linear heads in Triton, without a tensor of logits: which calls it serves, and how it is launched.

Launch choices are functions of device, sizes and what is wanted. They are reasoned and compiled for, not measured.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...tritonlib import launch
from ..request import empty_rows, mask_of, with_sources_of_derived
from .head_kernels import HeadRows, head_finish_kernel, head_scan_kernel, head_target_kernel
from .row_state import NUM_FLOATS, NUM_INTS, TARGET_RANK

OF_BASE = mask_of("mean_base", "base_max", "base_log_denom", "base_nll", "base_argmax")
HIDDEN_BYTES_TOGETHER = 16 * 2**20  # of the rows that are walked together: they stay in L2 while weights stream by
MAX_STATES_PER_ROW = 1024
LARGEST_STRIDE = 2**22  # a tile of rows is walked with 32-bit distances
FINISH_LANES = 64
_NO_HEAD = HeadRows(None, 0, None, 0, None, 0, None, 0, None)


class Head(NamedTuple):
    """Logits scale * softcap(hidden @ weight.T + bias) of a linear head."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [>= V, D]
    bias: Tensor | None  # [>= V]
    scale: Tensor | None  # float32, () or [N]
    softcap: float | None


class Tile(NamedTuple):
    """A block of logits that a program makes at a time, and the options that its kernel is compiled with."""

    rows: int
    cols: int
    depth: int  # of the products' steps
    parts: int  # lanes of a row; with `run` they follow from where the matrix instruction leaves a row's columns
    run: int  # neighbouring columns of a lane
    strip: int  # columns of a lane that are absorbed at a time
    num_warps: int
    num_stages: int


class Schedule(NamedTuple):
    """How programs share the work."""

    num_blocks: int  # of rows
    num_splits: int  # of the vocabulary, each of `split_size` classes
    split_size: int
    blocks_together: int


# -- policy ------------------------------------------------------------------------------------------------------------


def tile_of(architecture: int, is_small: bool) -> Tile:
    """The tile for an NVIDIA architecture (90 is sm_90).

    is_small    the logits of both heads are kept apart, or capped: half of the registers must do for one tile of them.
    Threads have 255 registers. Logits take 128 of them; where mma.sync wants its operands in registers too, 64.
    wgmma and mma.sync leave runs of two columns to four threads of a row, mma.sync to those of four warps (of two where
    there are 64 columns), tcgen05 half a row to a thread. If `parts` and `run` said otherwise, threads would exchange
    numbers in every tile; results would be the same.
    """
    if architecture in (100, 103):
        return Tile(128, 128, 64, 2, 64, 8, 8, 4) if is_small else Tile(128, 256, 64, 2, 128, 8, 8, 4)
    if architecture == 90:
        return Tile(128, 128, 64, 4, 2, 4, 8, 4) if is_small else Tile(128, 256, 64, 4, 2, 8, 8, 4)
    return Tile(128, 64, 32, 8, 2, 4, 8, 4) if is_small else Tile(128, 128, 64, 16, 2, 4, 8, 3)


def schedule_of(num_rows: int, vocab_size: int, row_bytes: int, tile: Tile, multiprocessors: int) -> Schedule:
    """As many programs as fill the device for the shortest time, if one tile takes one unit and a start another.

    row_bytes   of the hidden states of a row
    """
    num_blocks, num_tiles = triton.cdiv(num_rows, tile.rows), triton.cdiv(vocab_size, tile.cols)
    together = max(min(HIDDEN_BYTES_TOGETHER // (tile.rows * row_bytes), num_blocks), 1)
    slots = max(multiprocessors, 1)

    def time(num_splits: int) -> int:
        return triton.cdiv(num_blocks * num_splits, slots) * (triton.cdiv(num_tiles, num_splits) + 1)

    # with fewer the device would have more rows in flight than `together`
    fewest = min(triton.cdiv(slots, together), num_tiles)
    most = max(min(4 * fewest, num_tiles, MAX_STATES_PER_ROW // tile.parts), fewest)
    size = triton.cdiv(num_tiles, min(range(fewest, most + 1), key=time))
    return Schedule(num_blocks, triton.cdiv(num_tiles, size), size * tile.cols, together)


@functools.cache
def architecture_of(device: torch.device) -> int:
    """80 for sm_80; 0 where kernels are interpreted."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def fits(base: Head, aux: Head | None, wanted: int) -> str | None:
    """Why this kernel does not serve a call; None: it does."""
    device = base.hidden.device
    backend = launch.device_of(device).backend
    if backend == "hip":
        return "the kernel has no matrix instructions chosen for AMD"
    if backend == "cpu" and not launch.INTERPRETED:
        return f"the kernel needs a CUDA device, got {device}"
    if backend == "cuda" and architecture_of(device) < 80:
        return f"the kernel needs compute capability 8.0, got {architecture_of(device) / 10}"
    for name, head in (("base", base), ("aux", aux)):
        if launch.INTERPRETED and head is not None and head.hidden.dtype == torch.bfloat16:
            return f"{name}: interpreted products of bfloat16 are wrong"
        reason = None if head is None else _misfit(head)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def _misfit(head: Head) -> str | None:
    hidden, weight = head.hidden, head.weight
    if hidden.dtype not in (torch.bfloat16, torch.float16):
        return f"hidden must be bfloat16 or float16, got {hidden.dtype}"  # exact float32 products are the library's
    if weight.dtype != hidden.dtype:
        return f"weight must be {hidden.dtype} as hidden is, got {weight.dtype}"
    if hidden.shape[-1] % 16 or hidden.shape[-1] == 0:
        return f"the width must be a multiple of 16, got {hidden.shape[-1]}"
    if weight.shape[0] > launch.MAX_INT32 // 2:
        return f"weight must have at most {launch.MAX_INT32 // 2} classes, got {weight.shape[0]}"
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if _row_stride(tensor) > LARGEST_STRIDE:
            return f"rows of {name} must be at most {LARGEST_STRIDE} elements apart, got {_row_stride(tensor)}"
        # asynchronous copies take 16 bytes, and Triton knows only of multiples of 16 elements
        if tensor.stride(-1) != 1 or _row_stride(tensor) % 16 or tensor.storage_offset() % 16:
            return f"rows of {name} must be contiguous and start at a multiple of 16 elements"
    return None


# -- launch ------------------------------------------------------------------------------------------------------------


def _row_stride(tensor: Tensor) -> int:
    """One row may have any stride, 1 too, for which Triton would compile again."""
    return tensor.stride(0) if tensor.shape[0] > 1 else 0


def _rows_of(head: Head | None) -> HeadRows:
    if head is None:
        return _NO_HEAD
    return HeadRows(
        head.hidden,
        _row_stride(head.hidden),
        head.weight,
        _row_stride(head.weight),
        None if head.bias is None else head.bias.contiguous(),
        head.hidden.shape[-1],
        launch.numbers(head.scale),
        0 if head.scale is None or head.scale.dim() == 0 else 1,
        head.softcap,
    )


def _is_changed(head: Head) -> bool:
    return head.scale is not None or head.softcap is not None


def _row_bytes(*heads: Head | None) -> int:
    return sum(head.hidden.shape[-1] * head.hidden.element_size() for head in heads if head is not None)


def scan(
    base: Head,
    aux: Head | None,
    target: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    vocab_size: int,
    wanted: int,
) -> list[Tensor]:
    """The wanted fields of every row, as cross_entropy.scan gives them for the logits of the heads, which `fits`.

    target [N], weight [V] of the classes; the fields are float32 [F, N] and int64 [A, N], each only if it is not empty.
    """
    num_rows = base.hidden.shape[0]
    fields = empty_rows(base.hidden, base.hidden.shape[:1], torch.float32, wanted)
    if not fields or num_rows == 0:
        return fields
    with launch.on_device_of(base.hidden):
        _scan(base, aux, target, weight, ignore_index, vocab_size, wanted, fields)
    return fields


def _scan(
    base: Head,
    aux: Head | None,
    target: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    vocab_size: int,
    wanted: int,
    fields: list[Tensor],
) -> None:
    hidden = base.hidden
    num_rows = hidden.shape[0]
    scanned = with_sources_of_derived(wanted)
    has_two = aux is not None and (bool(scanned & OF_BASE) or _is_changed(aux))
    tile = tile_of(architecture_of(hidden.device), has_two or _is_changed(base))
    multiprocessors = launch.device_of(hidden.device).multiprocessors
    schedule = schedule_of(num_rows, vocab_size, _row_bytes(base, aux), tile, multiprocessors)
    states_per_split = schedule.num_blocks * tile.rows * tile.parts
    num_states = schedule.num_splits * states_per_split
    floats = hidden.new_empty(num_states * NUM_FLOATS.value, dtype=torch.float32)
    ints = hidden.new_empty(num_states * NUM_INTS.value, dtype=torch.int64)
    is_ranked, target_logits = bool(scanned & TARGET_RANK.value), None
    if target is not None:
        target_logits = hidden.new_empty((num_rows if is_ranked else num_states) * 2, dtype=torch.float32)
    classes = (
        None if target is None else target.contiguous(),
        launch.numbers(weight),
        ignore_index,
        vocab_size,
        num_rows,
    )
    heads = _rows_of(base), _rows_of(aux)
    products = {
        "BLOCK_ROWS": tile.rows,
        "BLOCK_DEPTH": tile.depth,
        "EVEN_DEPTH": all(head is None or head.hidden.shape[-1] % tile.depth == 0 for head in (base, aux)),
        "TWO": has_two,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    if is_ranked:
        of_targets = classes[0], *classes[2:], target_logits
        launch.run(head_target_kernel, schedule.num_blocks, *heads, *of_targets, **products)
    launch.run(
        head_scan_kernel,
        schedule.num_blocks * schedule.num_splits,
        *heads,
        *classes,
        *schedule,
        floats,
        ints,
        target_logits,
        WANTED=scanned,
        BLOCK_COLS=tile.cols,
        PARTS=tile.parts,
        RUN=tile.run,
        STRIP=tile.strip,
        **products,
    )
    launch.run(
        head_finish_kernel,
        num_rows,
        *classes,
        schedule.num_splits,
        schedule.split_size,
        states_per_split,
        floats,
        ints,
        target_logits,
        next((stacked for stacked in fields if stacked.dtype == torch.float32), None),
        next((stacked for stacked in fields if stacked.dtype == torch.int64), None),
        FIELDS=wanted,
        WANTED=scanned,
        BLOCK_COLS=tile.cols,
        PARTS=tile.parts,
        LANES=FINISH_LANES,
        num_warps=1,
    )
