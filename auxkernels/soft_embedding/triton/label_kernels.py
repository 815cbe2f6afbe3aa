"""Triton kernels of soft_embedding over the rows of tables that labels name: sums, products, sums into them.

Labels below 0 name nothing and count nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...tritonlib.primitives import tile_sum


@triton.jit
def column_sum(x):
    """[R, B] to [B], a tree of pairs of rows."""
    for _ in tl.static_range(12):
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, (x.shape[0] // 2, 2, x.shape[1])), axis=1)
    return tl.sum(x, axis=0)


@triton.jit(do_not_specialize=["num_rows", "k", "num_labels"])
def label_gather_kernel(
    tables,
    stride_table,
    stride_label,
    num_labels,
    labels,
    weights,
    k,
    out,
    stride_out_table,
    stride_out_row,
    num_rows: tl.int64,
    D,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [L, num_rows, D], a block of rows and columns: sum over j of weights (None: 1) times the labels' rows.

    A label of num_labels or more makes the row NaN; nothing is read for it.
    """
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(D, BLOCK)
    cols = (program % blocks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)[None, :]
    row_blocks = tl.cdiv(num_rows, ROWS)
    block = program // blocks
    table = block // row_blocks
    rows = (block % row_blocks) * ROWS + tl.arange(0, ROWS)
    tables += table * stride_table
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for j in range(k):
        label = tl.load(labels + rows * k + j, mask=rows < num_rows, other=-1)
        is_label = (label >= 0) & (label < num_labels)
        weight = tl.full([ROWS], 1.0, tl.float32)
        if weights is not None:
            weight = tl.load(weights + rows * k + j, mask=rows < num_rows, other=0.0)
        weight = tl.where(is_label, weight, tl.where(label < 0, 0.0, float("nan")))
        place = tables + label[:, None] * stride_label + cols
        total += weight[:, None] * tl.load(place, mask=is_label[:, None] & (cols < D), other=0.0).to(tl.float32)
    place = out + table * stride_out_table + rows[:, None] * stride_out_row + cols
    tl.store(place, total.to(out.dtype.element_ty), mask=(rows < num_rows)[:, None] & (cols < D))


@triton.jit(do_not_specialize=["num_tables", "k", "num_labels"])
def label_products_kernel(
    tables,
    stride_table,
    stride_label,
    num_tables,
    num_labels,
    labels,
    k,
    rows,
    stride_rows_table,
    stride_rows_row,
    D,
    out,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [num_rows, k], SLOTS labels of a row: sum over tables of <rows [L, num_rows, D], the label's row>."""
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(k, SLOTS)
    n = program // blocks
    slots = (program % blocks).to(tl.int32) * SLOTS + tl.arange(0, SLOTS)
    label = tl.load(labels + n * k + slots, mask=slots < k, other=-1)
    is_label = (label >= 0) & (label < num_labels)
    rows += n * stride_rows_row
    total = tl.zeros([SLOTS, BLOCK], tl.float32)
    for _ in range(num_tables):
        for at in range(0, D, BLOCK):
            cols = at + tl.arange(0, BLOCK)[None, :]
            row = tl.load(rows + cols, mask=cols < D, other=0.0).to(tl.float32)
            place = tables + label[:, None] * stride_label + cols
            total += row * tl.load(place, mask=is_label[:, None] & (cols < D), other=0.0).to(tl.float32)
        rows += stride_rows_table
        tables += stride_table
    tl.store(out + n * k + slots, tl.where(is_label, tile_sum(total), 0.0), mask=slots < k)


@triton.jit(do_not_specialize=["num_terms", "num_labels"])
def label_scatter_kernel(
    tables,
    stride_table,
    stride_label,
    num_labels,
    sorted_labels,
    positions,
    ends,
    num_terms,
    k,
    weights,
    rows,
    stride_rows_table,
    stride_rows_row,
    D,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """tables [L, K, D] += weights (None: 1) times rows [L, C, D], a block of columns of a label's row.

    sorted_labels, positions   the terms' labels in order and where they stood in [C, k], a label's by position
    ends                       for each place in that order, one past the last with the same label

    The program at the first place of each label adds up its terms, in an order that their number alone decides.
    """
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(D, BLOCK)
    cols = (program % blocks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    start, table = (program // blocks) % num_terms, program // blocks // num_terms
    label = tl.load(sorted_labels + start)
    before = tl.load(sorted_labels + start - 1, mask=start > 0, other=-1)
    if (label != before) & (label >= 0) & (label < num_labels):
        rows += table * stride_rows_table
        total = tl.zeros([TERMS, BLOCK], tl.float32)
        stop = tl.load(ends + start)
        for at in range(start, stop, TERMS):
            terms = at + tl.arange(0, TERMS)
            position = tl.load(positions + terms, mask=terms < stop, other=0)
            mask = (terms < stop)[:, None] & (cols < D)[None, :]
            place = rows + (position // k)[:, None] * stride_rows_row + cols[None, :]
            term = tl.load(place, mask=mask, other=0.0).to(tl.float32)
            if weights is not None:
                term = term * tl.load(weights + position, mask=terms < stop, other=0.0)[:, None]
            total += term
        place = tables + table * stride_table + label * stride_label + cols
        old = tl.load(place, mask=cols < D, other=0.0)
        tl.store(place, old + column_sum(total), mask=cols < D)
