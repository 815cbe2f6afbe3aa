"""The kernels of cross-entropy: one program works on one row, or on one segment of a row.

The mathematics is in ../request.py, the arithmetic of a row in row_state.py, how its columns are walked in columns.py.
A program scans the row's columns and, where gradients are wanted, reads them again, last columns first because those
are still in L2. With few and long rows the segments of a row go to several programs, with the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...tritonlib.primitives import column_of, lane_sum, one_minus_exp
from ..request import FIELDS
from ..request import NUM_FLOAT_FIELDS as _NUM_FLOAT_FIELDS
from .columns import (
    Coefficients,
    RowSource,
    Softmax,
    at_row,
    fill_gradients,
    fill_tails,
    load_logits_at,
    merge_segments,
    ranked_logit,
    read_target,
    scan_row,
    scan_segment,
    write_gradients,
)
from .row_state import (
    ARGMAX,
    BASE_ARGMAX,
    BASE_DENOM,
    MEAN_BASE,
    MEAN_SUM,
    TARGET_RANK,
    merge,
    nll_of,
    of_target,
    store_state,
)

# what the loss is divided by
BY_ONE = tl.constexpr(0)
BY_NORMALIZER = tl.constexpr(1)
BY_KEPT_ROWS = tl.constexpr(2)
BY_PARTS = tl.constexpr(3)

NUM_FIELDS = tl.constexpr(len(FIELDS))
NUM_FLOAT_FIELDS = tl.constexpr(_NUM_FLOAT_FIELDS)


class RowEnd(NamedTuple):
    """The row fields of request.FIELDS in their order, then what losses and gradients need besides. Not wanted: 0.0."""

    max: Any
    log_denom: Any
    nll: Any
    mean_sum: Any
    mean_base: Any
    base_max: Any
    base_log_denom: Any
    base_nll: Any
    weighted_sum: Any
    lse: Any
    entropy: Any
    kl_to_base: Any
    log_prob: Any
    base_log_prob: Any
    argmax: Any
    base_argmax: Any
    target_rank: Any
    residual: Any  # 1 - p of the target
    weight: Any  # sum of the class weights
    target_weight: Any


# -- one row -----------------------------------------------------------------------------------------------------------


@triton.jit
def checked(new_max, denom):
    """(max, denom): a row of -inf alone has no distribution; a running maximum steps over NaN, a sum does not."""
    denom = tl.where(new_max == float("-inf"), float("nan"), denom)
    is_number = (denom == denom) | (tl.abs(new_max) == float("inf"))
    return tl.where(is_number, new_max, float("nan")), denom


@triton.jit
def end_of_row(rest, base, aux, weight, y, WANTED: tl.constexpr, HAS_TARGET: tl.constexpr):
    """From the state of a row without its target, whose column is read, to the row's numbers."""
    s_y, z_y, w_y = 0.0, 0.0, 1.0
    if HAS_TARGET:
        s_y, z_y = load_logits_at(base, aux, y)
        if weight is not None:
            w_y = tl.load(weight + y, mask=y >= 0, other=0.0)
    return end_of_logits(rest, y, s_y, z_y, w_y, WANTED, HAS_TARGET)


@triton.jit
def end_of_logits(rest, y, s_y, z_y, w_y, WANTED: tl.constexpr, HAS_TARGET: tl.constexpr):
    """The same, from the target's column (-1: none), logits and class weight."""
    whole = rest
    nll, base_nll, residual, base_log_denom = 0.0, 0.0, 0.0, 0.0
    if HAS_TARGET:
        whole = merge(rest, of_target(s_y, z_y, w_y, rest, WANTED), WANTED)
    row_max, denom = checked(whole.max, whole.denom)
    if HAS_TARGET:
        nll, residual = nll_of(rest.max, rest.denom, whole.max, denom, s_y)
    base_max = whole.base_max
    if BASE_DENOM & WANTED:
        base_max, base_denom = checked(whole.base_max, whole.base_denom)
        base_log_denom = tl.log(base_denom)
        if HAS_TARGET:
            base_nll, _ = nll_of(rest.base_max, rest.base_denom, whole.base_max, base_denom, z_y)
    log_denom = tl.log(denom)
    mean_sum = tl.math.div_rn(whole.mean_sum, denom) if MEAN_SUM & WANTED else 0.0
    mean_base = tl.math.div_rn(whole.mean_base, denom) if MEAN_BASE & WANTED else 0.0
    kl_to_base = 0.0
    if (MEAN_SUM & WANTED) and (MEAN_BASE & WANTED) and (BASE_DENOM & WANTED):
        kl_to_base = (mean_sum - mean_base) + (base_log_denom - log_denom)
    return RowEnd(
        row_max,
        log_denom,
        nll,
        mean_sum,
        mean_base,
        base_max,
        base_log_denom,
        base_nll,
        whole.weighted_sum,
        row_max + log_denom,
        log_denom - mean_sum,
        kl_to_base,
        0.0 - nll,
        0.0 - base_nll,
        column_of(whole.argmax) if ARGMAX & WANTED else 0.0,
        column_of(whole.base_argmax) if BASE_ARGMAX & WANTED else 0.0,
        tl.where((y >= 0) & (denom == denom), whole.num_above, -1) if TARGET_RANK & WANTED else 0.0,
        residual,
        whole.weight,
        w_y,
    )


@triton.jit
def store_fields(float_fields, int_fields, row, num_rows, floats, ints, end, FIELDS: tl.constexpr):
    """The fields of the mask FIELDS, [F, num_rows] and [A, num_rows]: `floats` and `ints`; the row's where None."""
    for i in tl.static_range(NUM_FIELDS):
        if (FIELDS >> i) & 1:
            if i < NUM_FLOAT_FIELDS:
                tl.store(float_fields + row, end[i] if floats is None else floats)
                float_fields += num_rows
            else:
                tl.store(int_fields + row, end[i] if ints is None else ints)
                int_fields += num_rows


@triton.jit
def loss_of(end, kept, share, z_loss, divisor):
    """(the row's loss, not divided; its gradient's coefficients A, G and S, divided).

    kept, share   1 - label_smoothing and label_smoothing / V, or None and None
    """
    a, s = 0.0, 0.0
    w_y = end.target_weight if kept is None else kept * end.target_weight
    loss = w_y * end.nll
    g = tl.math.div_rn(w_y, divisor)
    if share is not None:
        loss += share * (end.weight * end.log_denom - end.weighted_sum)
        a = tl.math.div_rn(share * end.weight, divisor)
        s = tl.math.div_rn(-share, divisor)
    if z_loss is not None:
        lse = end.max + end.log_denom
        loss += z_loss * lse * lse
        pull = tl.math.div_rn(2.0 * z_loss * lse, divisor)
        a = pull if share is None else a + pull
    return loss, a, g, s


# -- sums over rows ----------------------------------------------------------------------------------------------------


@triton.jit
def kept_of(rows, target, weight, ignore_index, V, num_rows):
    """1 for rows that are not ignored, or the weight of their target; float64."""
    y = tl.load(target + rows, mask=rows < num_rows, other=0).to(tl.int64)
    kept = (rows < num_rows) & (y != ignore_index)
    if weight is None:
        number = kept.to(tl.float64)
    else:
        number = tl.load(weight + y, mask=kept & (y >= 0) & (y < V), other=0.0).to(tl.float64)
    return number


@triton.jit
def kept_rows(target, weight, ignore_index, V, num_rows, BLOCK: tl.constexpr):
    """Number of rows that are not ignored, or the sum of their targets' weights; float64."""
    lanes = tl.zeros([BLOCK], tl.float64)
    for first in range(0, num_rows, BLOCK):
        lanes += kept_of(first + tl.arange(0, BLOCK), target, weight, ignore_index, V, num_rows)
    return lane_sum(lanes)


@triton.jit
def sum_of_numbers(ptr, count, BLOCK: tl.constexpr):
    """In float64 and in an order that depends on their number alone."""
    lanes = tl.zeros([BLOCK], tl.float64)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        lanes += tl.load(ptr + i, mask=i < count, other=0.0).to(tl.float64)
    return lane_sum(lanes)


@triton.jit
def divisor_of(normalizer, target, weight, ignore_index, V, num_rows, DIVISOR: tl.constexpr, BLOCK: tl.constexpr):
    divisor = tl.full([], 1.0, tl.float64)
    if DIVISOR == BY_NORMALIZER:
        divisor = tl.load(normalizer).to(tl.float64)
    if DIVISOR == BY_KEPT_ROWS:
        divisor = kept_rows(target, weight, ignore_index, V, num_rows, BLOCK)
    return divisor


@triton.jit(do_not_specialize=["ignore_index", "num_rows"])
def cross_entropy_parts_kernel(
    row_loss, target, weight, ignore_index: tl.int64, V, num_rows: tl.int64, losses, kept, BLOCK: tl.constexpr
):
    """Sums over a block of rows, for cross_entropy_reduce_kernel to add up. `losses` or `kept` None: not wanted.

    What a kernel has stored is there for the next one. The last program could add up here as well, but the counter by
    which it knew itself would have to order memory accesses, and be 0 before and after in each stream and graph.
    """
    part = tl.program_id(0).to(tl.int64)
    rows = part * BLOCK + tl.arange(0, BLOCK)
    if losses is not None:
        loss = tl.load(row_loss + rows, mask=rows < num_rows, other=0.0)
        tl.store(losses + part, lane_sum(loss.to(tl.float64)))
    if kept is not None:
        tl.store(kept + part, lane_sum(kept_of(rows, target, weight, ignore_index, V, num_rows)))


@triton.jit(do_not_specialize=["ignore_index", "num_rows", "num_parts"])
def cross_entropy_reduce_kernel(
    parts,
    num_parts: tl.int64,
    total,
    normalizer,
    target,
    weight,
    ignore_index: tl.int64,
    V,
    num_rows: tl.int64,
    DIVISOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The 0-d sum of `parts`, row losses or sums of them, divided. BY_PARTS: by the sum of as many normalizers."""
    if DIVISOR == BY_PARTS:
        divisor = sum_of_numbers(normalizer, num_parts, BLOCK)
    else:
        divisor = divisor_of(normalizer, target, weight, ignore_index, V, num_rows, DIVISOR, BLOCK)
    tl.store(total, sum_of_numbers(parts, num_parts, BLOCK) / divisor)


# -- kernels over rows -------------------------------------------------------------------------------------------------


@triton.jit
def place_of(program, V, SEGMENT: tl.constexpr, SPLIT: tl.constexpr):
    """(row, first column, one past the last, number of segments) of a program; rows in 64 bits."""
    row, start, stop, num_segments = program.to(tl.int64), 0, V, 1
    if SPLIT:
        num_segments = tl.cdiv(V, SEGMENT)
        start = (row % num_segments).to(tl.int32) * SEGMENT
        row, stop = row // num_segments, tl.minimum(start + SEGMENT, V)
    return row, start, stop, num_segments


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_segment_kernel(
    base,
    aux,
    target,
    weight,
    ignore_index: tl.int64,
    V,
    floats,
    ints,
    WANTED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    SEGMENT: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The state of one segment of one row, for the programs of cross_entropy_fwd_kernel to merge."""
    program = tl.program_id(0)
    row, start, stop, _ = place_of(program, V, SEGMENT, True)
    y, ignored, _ = read_target(target, row, ignore_index, V)
    base, aux = RowSource(base, *at_row(base, row)), RowSource(aux, *at_row(aux, row))
    if not ignored:
        s_y = ranked_logit(base, aux, y, WANTED)
        state = scan_segment(base, aux, weight, y, s_y, start, stop, WANTED, ROWS, LANES, WIDTH, EVEN)
        store_state(floats, ints, program.to(tl.int64), state, WANTED)


@triton.jit(do_not_specialize=["ignore_index", "num_rows"])
def cross_entropy_fwd_kernel(
    base,
    aux,
    target,
    weight,
    ignore_index: tl.int64,
    V,
    num_rows: tl.int64,
    floats,
    ints,
    float_fields,
    int_fields,
    row_loss,
    normalizer,
    kept,
    share,
    z_loss,
    grads,
    FIELDS: tl.constexpr,
    WANTED: tl.constexpr,
    DIVISOR: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    SEGMENT: tl.constexpr,
    EVEN: tl.constexpr,
    COUNT_BLOCK: tl.constexpr,
):
    """Fields, loss and gradients of a row. Split: of a segment of it, whose row's states are in `floats` and `ints`."""
    row, start, stop, num_segments = place_of(tl.program_id(0), V, SEGMENT, SPLIT)
    y, ignored, poisoned = read_target(target, row, ignore_index, V)
    base, aux = RowSource(base, *at_row(base, row)), RowSource(aux, *at_row(aux, row))
    if ignored:
        if start == 0:
            store_fields(float_fields, int_fields, row, num_rows, 0.0, -1, None, FIELDS)
            if row_loss is not None:
                tl.store(row_loss + row, 0.0)
        fill_gradients(grads, base, aux, row, start, stop, 0.0, LANES * WIDTH)
    else:
        if SPLIT:
            rest = merge_segments(floats, ints, row, num_segments, WANTED)
        else:
            rest = scan_row(base, aux, weight, y, V, WANTED, ROWS, LANES, WIDTH, SEGMENT, EVEN)
        end = end_of_row(rest, base, aux, weight, y, WANTED, target is not None)
        if start == 0:
            # a target that names no class makes the floats NaN, and its rank -1; the argmaxes do not depend on it
            if poisoned:
                store_fields(float_fields, int_fields, row, num_rows, float("nan"), None, end, FIELDS)
            else:
                store_fields(float_fields, int_fields, row, num_rows, None, None, end, FIELDS)
        if row_loss is not None:
            divisor = 1.0
            if HAS_GRADIENT:
                divisor = divisor_of(normalizer, target, weight, ignore_index, V, num_rows, DIVISOR, COUNT_BLOCK)
                divisor = divisor.to(tl.float32)
            loss, a, g, s = loss_of(end, kept, share, z_loss, divisor)
            if start == 0:
                tl.store(row_loss + row, tl.where(poisoned, float("nan"), loss))
            if HAS_GRADIENT:
                soft = Softmax(end.max, end.log_denom, None, None, end.residual)
                has_a: tl.constexpr = share is not None or z_loss is not None
                k = Coefficients(a if has_a else None, None, None, None, g, None if share is None else s, None, None)
                if poisoned:
                    fill_gradients(grads, base, aux, row, start, stop, float("nan"), LANES * WIDTH)
                else:
                    write_gradients(base, aux, weight, y, start, stop, soft, k, grads, row, ROWS, LANES, WIDTH, EVEN)
    fill_tails(grads, base, aux, row, stop, V, LANES * WIDTH)


@triton.jit(do_not_specialize=["ignore_index"], do_not_specialize_on_alignment=["saved", "nll", "coefficients"])
def cross_entropy_bwd_kernel(
    base,
    aux,
    target,
    weight,
    ignore_index: tl.int64,
    V,
    saved,
    nll,
    coefficients,
    grads,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    SEGMENT: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Gradients of a row, or of a segment of it, from its saved state and one number per row for each coefficient."""
    row, start, stop, _ = place_of(tl.program_id(0), V, SEGMENT, SPLIT)
    y, ignored, poisoned = read_target(target, row, ignore_index, V)
    base, aux = RowSource(base, *at_row(base, row)), RowSource(aux, *at_row(aux, row))
    if ignored:
        fill_gradients(grads, base, aux, row, start, stop, 0.0, LANES * WIDTH)
    elif poisoned:
        fill_gradients(grads, base, aux, row, start, stop, float("nan"), LANES * WIDTH)
    else:
        soft = Softmax(
            tl.load(saved.max + row),
            tl.load(saved.log_denom + row),
            None if saved.base_max is None else tl.load(saved.base_max + row),
            None if saved.base_log_denom is None else tl.load(saved.base_log_denom + row),
            None if nll is None else one_minus_exp(tl.load(nll + row)),
        )
        k = Coefficients(
            None if coefficients.A is None else tl.load(coefficients.A + row),
            None if coefficients.C is None else tl.load(coefficients.C + row),
            None if coefficients.D is None else tl.load(coefficients.D + row),
            None if coefficients.Q is None else tl.load(coefficients.Q + row),
            None if coefficients.G is None else tl.load(coefficients.G + row),
            None if coefficients.S is None else tl.load(coefficients.S + row),
            None if coefficients.Q_b is None else tl.load(coefficients.Q_b + row),
            None if coefficients.B_b is None else tl.load(coefficients.B_b + row),
        )
        write_gradients(base, aux, weight, y, start, stop, soft, k, grads, row, ROWS, LANES, WIDTH, EVEN)
    fill_tails(grads, base, aux, row, stop, V, LANES * WIDTH)


@triton.jit(do_not_specialize=["ignore_index", "num_rows"])
def cross_entropy_rescale_kernel(
    grad, factor, target, ignore_index: tl.int64, num_rows: tl.int64, width, BLOCK: tl.constexpr
):
    """grad *= factor on the rows that count: 0 * -1 is -0.0 and 0 * inf NaN, which ignored rows must not become.

    The usual factor is 1, and programs cost time even if they leave at once: there are few, which walk all blocks.
    """
    factor = tl.load(factor).to(tl.float32)
    if factor != 1.0:
        blocks = tl.cdiv(width, BLOCK)
        for block in range(tl.program_id(0).to(tl.int64), num_rows * blocks, tl.num_programs(0)):
            row = block // blocks  # 64-bit, as num_rows is
            is_kept = True
            if target is not None:
                is_kept = tl.load(target + row).to(tl.int64) != ignore_index
            if is_kept:
                cols = (block % blocks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
                place = grad + row * width + cols
                g = tl.load(place, mask=cols < width, other=0.0).to(tl.float32)
                tl.store(place, (g * factor).to(grad.dtype.element_ty), mask=cols < width)
