"""Row kernels of soft_embedding in Triton: from tensors, checked in chunked.py, to launches.

Launch choices are functions of device, sizes and what is wanted. They are reasoned and compiled for, not measured.
Nothing is read from the device: temperature, scale of the noise and seed are 0-d tensors there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from ...tritonlib import launch
from ..request import SoftRows, Upstream
from .kernels import (
    soft_bwd_kernel,
    soft_bwd_segment_kernel,
    soft_fwd_kernel,
    soft_segment_kernel,
    soft_select_bwd_kernel,
    soft_select_kernel,
    soft_selected_kernel,
)
from .label_kernels import label_gather_kernel, label_products_kernel, label_scatter_kernel
from .row_state import BEST, NUM_SUMS, SQUARES, TIMES_X, WIDTH, Fields, Scores

MOST_TILES = 8  # that stay in registers: 32 scores of a thread
MOST_PASSES = 128  # up to so many labels are picked one by one, each in a pass over registers
SELECTED_BLOCK = 1024
FILL_BLOCK = 1024
_MaybeTensor = TypeVar("_MaybeTensor", Tensor, Tensor | None)
NO_FIELDS = Fields(None, None, None, None, None, None)


class Cut(NamedTuple):
    """How the columns of a row are cut. Bits depend on it: it follows from K and the kernel, not from the rows."""

    lanes: int
    tiles: int  # loaded at a time
    segment: int  # columns whose sums are formed together
    is_resident: bool  # the row stays in registers


def cut_of(num_labels: int, tiles_at_once: int, device: launch.Device) -> Cut:
    """The cut of rows of `num_labels` scores. tiles_at_once: of rows too long for registers; no bit depends on it.

    A warp for a short row, whose reductions then need no barrier; 16 warps for a long one.
    """
    for lanes in (32, 128, 512):
        lanes = max(lanes, device.warp_size)
        if num_labels <= lanes * WIDTH.value * MOST_TILES:
            tiles = triton.cdiv(num_labels, lanes * WIDTH.value)
            return Cut(lanes, tiles, tiles * lanes * WIDTH.value, True)
    # AMD's scalar registers hold a mask for each column
    return Cut(512, 2 if device.backend == "hip" else tiles_at_once, 32768, False)


def select_cut_of(num_labels: int, device: launch.Device) -> Cut:
    """Segments stay in registers: of 1024 columns where that is the row, otherwise of up to 4096."""
    lanes = max(32 if num_labels <= 32 * WIDTH.value * MOST_TILES else 128, device.warp_size)
    tiles = min(triton.cdiv(num_labels, lanes * WIDTH.value), MOST_TILES)
    return Cut(lanes, tiles, tiles * lanes * WIDTH.value, True)


def _slots(k: int, device: launch.Device) -> dict[str, int]:
    """Blocks of selected labels, and warps for them."""
    slots = min(triton.next_power_of_2(k), SELECTED_BLOCK)
    return {"SLOTS": slots, "num_warps": min(max(slots // (4 * device.warp_size), 1), 4)}


def _options(cut: Cut, device: launch.Device) -> dict[str, int]:
    num_warps = max(cut.lanes // device.warp_size, 1)
    if device.backend != "cuda" or num_warps < 16:
        return {"num_warps": num_warps}
    # left to itself ptxas spills a register or two for one more resident block
    return {"num_warps": num_warps, "maxnreg": 65536 // (32 * num_warps)}


# -- arguments ---------------------------------------------------------------------------------------------------------


def _number(value: float | int | Tensor | None, dtype: torch.dtype, like: Tensor) -> Tensor | None:
    """A number as kernels read it, on the device."""
    if value is None or isinstance(value, Tensor):
        return None if value is None else value.to(dtype).contiguous()
    return torch.full((), value, dtype=dtype, device=like.device)


def _adjacent(tensor: _MaybeTensor) -> _MaybeTensor:
    """With columns that lie side by side; a copy where they do not."""
    return tensor if tensor is None or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


class _Call(NamedTuple):
    """Rows as kernels get them, and their device."""

    scores: Scores
    first_row: int
    num_rows: int
    num_labels: int
    is_grouped: bool
    device: launch.Device

    def leading(self) -> tuple[Scores, int, int]:
        return self.scores, self.first_row, self.num_labels

    def columns(self, cut: Cut) -> dict[str, int]:
        """Constants of the kernels over columns, and launch options."""
        constants = {"SEGMENT": cut.segment, "TILES": cut.tiles, "LANES": cut.lanes, "GROUPED": self.is_grouped}
        return {**constants, **_options(cut, self.device)}


def _call(rows: SoftRows) -> _Call:
    scores, mask = _adjacent(rows.scores), rows.mask
    launch.check_device(scores)
    num_rows, num_labels = scores.shape
    temperature: Tensor | None = None
    if isinstance(rows.temperature, Tensor) or rows.temperature != 1.0:
        temperature = _number(rows.temperature, torch.float32, scores)
    if mask is not None:
        mask = _adjacent(mask.view(torch.uint8) if mask.dtype == torch.bool else mask)
    given = Scores(
        scores,
        scores.stride(0),
        temperature,
        int(temperature is not None and temperature.dim() > 0),
        None if rows.seed is None else _number(rows.gumbel, torch.float32, scores),
        None if rows.gumbel is None else _number(rows.seed, torch.int64, scores),
        mask,
        mask.stride(0) if mask is not None and mask.dim() == 2 else 0,
    )
    # Triton compiles a kernel for K that is a multiple of 16 and one for the rest anyway
    is_grouped = num_labels % 16 == 0 or given.gumbel is not None
    return _Call(given, rows.first_row, num_rows, num_labels, is_grouped, launch.device_of(scores.device))


def _fields(state: Mapping[str, Tensor | None]) -> Fields:
    return Fields(*(state.get(name) for name in Fields._fields))


def _upstream(upstream: Upstream | None) -> Upstream:
    return Upstream(None, None, None, None) if upstream is None else Upstream(*map(launch.numbers, upstream))


def _is_split(call: _Call, cut: Cut) -> bool:
    return not cut.is_resident and launch.is_split(call.num_labels, call.num_rows, cut.segment, call.device)


# -- rows of scores ----------------------------------------------------------------------------------------------------


def softmax(rows: SoftRows, fields: dict[str, Tensor], probabilities: Tensor | None) -> None:
    """Writes the wanted fields [C] and, where given, the probabilities [C, K]."""
    call = _call(rows)
    named = _fields(fields)
    wanted = BEST.value if named.argmax is not None or named.max is not None else 0
    wanted |= TIMES_X.value if named.entropy is not None else 0
    wanted |= SQUARES.value if named.sum_squares is not None else 0
    # 64 bytes in flight for every thread hide the memory's latency; noise needs the registers, and hides it too
    is_light = call.scores.gumbel is None and rows.scores.element_size() == 2
    cut = cut_of(call.num_labels, 8 if is_light else 4, call.device)
    is_split = _is_split(call, cut)
    num_programs, floats, ints = call.num_rows, None, None
    with launch.on_device_of(rows.scores):
        if is_split:
            num_programs *= triton.cdiv(call.num_labels, cut.segment)
            floats = rows.scores.new_empty(num_programs * NUM_SUMS.value, dtype=torch.float32)
            ints = rows.scores.new_empty(num_programs, dtype=torch.int64)
            args = (*call.leading(), floats, ints)
            launch.run(soft_segment_kernel, num_programs, *args, WANTED=wanted, **call.columns(cut))
        launch.run(
            soft_fwd_kernel,
            num_programs,
            *call.leading(),
            floats,
            ints,
            named,
            probabilities,
            _stride(probabilities),
            WANTED=wanted,
            RESIDENT=cut.is_resident,
            SPLIT=is_split,
            **call.columns(cut),
        )


def softmax_backward(
    rows: SoftRows,
    fields: dict[str, Tensor],
    grad_probabilities: Tensor | None,
    upstream: Upstream | None,
    grad_scores: Tensor | None,
    grad_temperature: Tensor | None,
    probabilities: Tensor | None,
) -> None:
    """From max, log_denom (and argmax) of the rows: gradients of scores [C, K] and temperature [C], probabilities."""
    call = _call(rows)
    grad_probabilities = _adjacent(grad_probabilities)
    cut = cut_of(call.num_labels, 4, call.device)
    # a temperature's gradient is a sum over its row, which is then not split
    is_split = _is_split(call, cut) and grad_temperature is None
    given = (_fields(fields), _upstream(upstream), grad_probabilities, _stride(grad_probabilities))
    num_programs, means = call.num_rows, None
    with launch.on_device_of(rows.scores):
        if is_split:
            num_programs *= triton.cdiv(call.num_labels, cut.segment)
            means = rows.scores.new_empty(num_programs, dtype=torch.float32)
            launch.run(soft_bwd_segment_kernel, num_programs, *call.leading(), *given, means, **call.columns(cut))
        launch.run(
            soft_bwd_kernel,
            num_programs,
            *call.leading(),
            *given,
            means,
            grad_scores,
            _stride(grad_scores),
            grad_temperature,
            probabilities,
            _stride(probabilities),
            RESIDENT=cut.is_resident,
            SPLIT=is_split,
            **call.columns(cut),
        )


# -- selection ---------------------------------------------------------------------------------------------------------


def select(rows: SoftRows, fields: dict[str, Tensor], labels: Tensor, weights: Tensor) -> None:
    """Writes labels and weights [C, k] of the likeliest labels, and the wanted fields of the softmax over these.

    Up to MOST_PASSES labels are picked in registers, k of every segment of a row; of those, where there are several
    segments, torch.topk picks. For larger k it picks from all columns, which takes 8 bytes for each score.
    """
    call, k = _call(rows), labels.shape[-1]
    cut = select_cut_of(call.num_labels, call.device)
    segments, named = triton.cdiv(call.num_labels, cut.segment), _fields(fields)
    slots = triton.next_power_of_2(k) if k <= MOST_PASSES else 0
    is_whole = segments == 1 and slots > 0
    candidates: Tensor | None = None
    if not is_whole:
        size = (call.num_rows, segments * k if slots else call.num_labels)
        candidates = rows.scores.new_empty(size, dtype=torch.int64)
    outputs = (named, labels, weights) if is_whole else (NO_FIELDS, None, None)
    with launch.on_device_of(rows.scores):
        launch.run(
            soft_select_kernel,
            call.num_rows * segments,
            *call.leading(),
            k,
            *outputs,
            candidates,
            SLOTS=slots,
            **call.columns(cut),
        )
        if candidates is None or not call.num_rows:
            return
        # packed labels differ, but for those that name none: the order does not depend on how it sorts
        packed = candidates.topk(k, dim=-1).values.contiguous()
        args = (call.scores, k, packed, packed.stride(0), named, labels, weights)
        launch.run(soft_selected_kernel, call.num_rows, *args, **_slots(k, call.device))


def select_backward(
    rows: SoftRows,
    fields: dict[str, Tensor],
    labels: Tensor,
    weights: Tensor,
    grad_weights: Tensor | None,
    upstream: Upstream | None,
    grad_scores: Tensor | None,
    grad_temperature: Tensor | None,
) -> None:
    """The same for selected labels [C, k]; writes their weights too."""
    call, k = _call(rows), labels.shape[-1]
    grad_weights = None if grad_weights is None else grad_weights.contiguous()
    with launch.on_device_of(rows.scores):
        if grad_scores is not None:
            grad_scores.zero_()  # here: a program's threads would have to wait for one another between 0 and gradient
        launch.run(
            soft_select_bwd_kernel,
            call.num_rows,
            *call.leading(),
            k,
            _fields(fields),
            _upstream(upstream),
            labels.contiguous(),
            weights,
            grad_weights,
            grad_scores,
            _stride(grad_scores),
            grad_temperature,
            BLOCK=FILL_BLOCK,
            **_slots(k, call.device),
        )


# -- rows of tables ----------------------------------------------------------------------------------------------------


def _tile(width: int, num_rows: int, elements: int) -> tuple[int, int]:
    """(rows, columns) of a tile over [num_rows, width]: whole rows of up to 256 columns, about `elements` in all."""
    columns = min(triton.next_power_of_2(max(width, 1)), 256)
    return min(max(elements // columns, 1), triton.next_power_of_2(max(num_rows, 1))), columns


def _warps(tile: tuple[int, int]) -> int:
    """So many that a thread has eight elements: a 128-bit load of 16-bit ones."""
    return min(max(tile[0] * tile[1] // 256, 1), 4)


def gather(tables: Tensor, labels: Tensor, weights: Tensor | None, out: Tensor, in_double: bool) -> None:
    """out [L, C, D] = sum over j of weights [C, k] (1) times the rows of tables [L, K, D] that labels [C, k] name."""
    launch.check_device(tables)
    tables, labels = _adjacent(tables), labels.contiguous()
    (num_tables, num_labels, width), (num_rows, k) = tables.shape, labels.shape
    weights = None if weights is None else weights.contiguous()
    tile = block_rows, block = _tile(width, num_rows, 1024)
    args: tuple[Any, ...] = (tables, tables.stride(0), tables.stride(1), num_labels, labels, weights, k)
    num_programs = num_tables * triton.cdiv(num_rows, block_rows) * triton.cdiv(width, block)
    args += (out, out.stride(0), out.stride(1), num_rows, width)
    with launch.on_device_of(tables):
        launch.run(label_gather_kernel, num_programs, *args, ROWS=block_rows, BLOCK=block, num_warps=_warps(tile))


def products(tables: Tensor, labels: Tensor, rows: Tensor, out: Tensor, in_double: bool) -> None:
    """out [C, k] = sum over tables of <rows [L, C, D], the table's row that labels [C, k] name>."""
    launch.check_device(tables)
    tables, rows, labels = _adjacent(tables), _adjacent(rows), labels.contiguous()
    (num_tables, num_labels, width), (num_rows, k) = tables.shape, labels.shape
    tile = slots, block = _tile(width, min(k, 16), 1024)
    args: tuple[Any, ...] = (tables, tables.stride(0), tables.stride(1), num_tables, num_labels, labels, k)
    args += (rows, rows.stride(0), rows.stride(1), width, out)
    with launch.on_device_of(tables):
        num_programs = num_rows * triton.cdiv(k, slots)
        launch.run(label_products_kernel, num_programs, *args, SLOTS=slots, BLOCK=block, num_warps=_warps(tile))


def scatter(tables: Tensor, labels: Tensor, weights: Tensor | None, rows: Tensor, in_double: bool) -> None:
    """tables [L, K, D] += weights times rows [L, C, D] where labels [C, k] say.

    The terms of a label are added in an order that their number alone decides: bits repeat.
    """
    launch.check_device(tables)
    rows, flat = _adjacent(rows), labels.reshape(-1)
    (num_tables, num_labels, width), num_terms = tables.shape, flat.numel()
    if not num_terms:
        return
    tile = terms, block = _tile(width, num_terms, 2048)
    with launch.on_device_of(tables):
        sorted_labels, positions = torch.sort(flat, stable=True)
        ends = torch.searchsorted(sorted_labels, sorted_labels, right=True)
        args: tuple[Any, ...] = (tables, tables.stride(0), tables.stride(1), num_labels)
        args += (sorted_labels, positions, ends, num_terms)
        args += (labels.shape[-1], None if weights is None else weights.contiguous())
        args += (rows, rows.stride(0), rows.stride(1), width)
        num_programs = num_tables * num_terms * triton.cdiv(width, block)
        launch.run(label_scatter_kernel, num_programs, *args, TERMS=terms, BLOCK=block, num_warps=_warps(tile))
