"""Triton kernels of soft_embedding over rows of scores: softmax, selection, gradients. Formulas: ../request.py.

A row that fits in one load of several tiles stays in registers; longer ones are read twice, and their noise is drawn
twice. Columns are cut in segments that depend on K alone, which go to several programs where rows are few.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...tritonlib.primitives import column_of, exp, finite, finite_or_zero, lane_sum, tile_sum
from .row_state import (
    NO_LABEL,
    WIDTH,
    Row,
    at_row,
    best_of_lanes,
    columns_at,
    gumbel_of,
    is_nan,
    key_of,
    load_scores,
    load_state,
    load_values,
    log_of_denom,
    merge,
    no_scores,
    pack,
    random_bits_of,
    scan_segment,
    scan_tiles,
    store_field,
    store_fields,
    store_state,
    value_of,
)


class Slope(NamedTuple):
    """What a row's gradient is made of: `upstream` and `of_probabilities` of all rows, and what `slope_at_row` finds of
    one. Of those two None: nothing of that kind."""

    upstream: Any
    of_probabilities: Any
    offset: Any  # of the row from `of_probabilities`
    max: Any
    log_denom: Any
    argmax: Any
    entropy: Any
    max_prob: Any
    sum_squares: Any


# -- softmax -----------------------------------------------------------------------------------------------------------


@triton.jit
def place_of(program, K, SEGMENT: tl.constexpr, SPLIT: tl.constexpr):
    """(row, first column, one past the last, number of segments) of a program; rows in 64 bits."""
    row, start, stop, num_segments = program.to(tl.int64), 0, K, 1
    if SPLIT:
        num_segments = tl.cdiv(K, SEGMENT)
        start = (row % num_segments).to(tl.int32) * SEGMENT
        row, stop = row // num_segments, tl.minimum(start + SEGMENT, K)
    return row, start, stop, num_segments


@triton.jit
def store_tile(ptr, cols, stop, x):
    if ptr is not None:
        tl.store(ptr + cols, x.to(ptr.dtype.element_ty), mask=cols < stop)


@triton.jit(do_not_specialize=["first_row"])
def soft_segment_kernel(
    scores,
    first_row: tl.int64,
    K,
    floats,
    ints,
    WANTED: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILES: tl.constexpr,
    LANES: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """The state of one segment of one row, for the programs of soft_fwd_kernel to merge."""
    program = tl.program_id(0)
    n, start, stop, _ = place_of(program, K, SEGMENT, True)
    row = Row(scores, *at_row(scores, n, first_row))
    state = scan_segment(row, start, stop, WANTED, TILES, LANES, GROUPED)
    store_state(floats, ints, program.to(tl.int64), state, WANTED)


@triton.jit
def probabilities_of(v, ref, row, factor, is_empty):
    return tl.where(is_empty, 0.0, exp((v - ref) * row.inverse) * factor)


@triton.jit(do_not_specialize=["first_row"])
def soft_fwd_kernel(
    scores,
    first_row: tl.int64,
    K,
    floats,
    ints,
    fields,
    probabilities,
    stride_probabilities,
    WANTED: tl.constexpr,
    RESIDENT: tl.constexpr,
    SPLIT: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILES: tl.constexpr,
    LANES: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """Fields and probabilities of a row. Split: of a segment of it, whose row's states are in `floats` and `ints`."""
    n, start, stop, num_segments = place_of(tl.program_id(0), K, SEGMENT, SPLIT)
    row = Row(scores, *at_row(scores, n, first_row))
    tiles = ()
    if RESIDENT:
        tiles = load_scores(row, 0, K, TILES, LANES, GROUPED)
        state = scan_tiles(tiles, row, 0, WANTED, LANES, GROUPED)
    else:
        state = no_scores([], WANTED)
        for segment in range(num_segments if SPLIT else tl.cdiv(K, SEGMENT)):
            if SPLIT:
                other = load_state(floats, ints, n * num_segments + segment, WANTED)
            else:
                at = segment * SEGMENT
                other = scan_segment(row, at, tl.minimum(at + SEGMENT, K), WANTED, TILES, LANES, GROUPED)
            state = merge(state, other, row.inverse, WANTED)
    is_empty = (state.max == float("-inf")) & (state.denom == 0)
    denom = tl.where(is_empty, 1.0, state.denom)
    if start == 0:
        store_fields(fields, n, state, is_empty, denom, WANTED)
    if probabilities is not None:
        ref, factor = finite_or_zero(state.max), tl.math.div_rn(1.0, denom)
        probabilities += n * stride_probabilities
        if RESIDENT:
            for i in tl.static_range(TILES):
                p = probabilities_of(tiles[i], ref, row, factor, is_empty)
                store_tile(probabilities, columns_at(i * (LANES * WIDTH), LANES, GROUPED), K, p)
        else:
            for at in range(start, stop, TILES * LANES * WIDTH):
                again = load_scores(row, at, stop, TILES, LANES, GROUPED)
                for i in tl.static_range(TILES):
                    p = probabilities_of(again[i], ref, row, factor, is_empty)
                    store_tile(probabilities, columns_at(at + i * (LANES * WIDTH), LANES, GROUPED), stop, p)


# -- gradient ----------------------------------------------------------------------------------------------------------


@triton.jit
def load_or_zero(ptr, row):
    return 0.0 if ptr is None else tl.load(ptr + row)


@triton.jit
def slope_at_row(fields, upstream, stride, row):
    """All of a Slope but what is of all rows."""
    return (
        row * stride,
        tl.load(fields.max + row),
        tl.load(fields.log_denom + row),
        -1 if upstream.max_prob is None else tl.load(fields.argmax + row),
        load_or_zero(upstream.entropy, row),
        load_or_zero(upstream.max_prob, row),
        load_or_zero(upstream.sum_squares, row),
    )


@triton.jit
def with_statistics(g, p, log_p, cols, stop, slope):
    """The gradient with respect to p, that of the statistics included; without meaning where p is 0."""
    if slope.upstream.usage is not None:
        g += tl.load(slope.upstream.usage + cols, mask=cols < stop, other=0.0)
    if slope.upstream.sum_squares is not None:
        g += (2.0 * slope.sum_squares) * p
    if slope.upstream.entropy is not None:
        g -= slope.entropy * log_p
    if slope.upstream.max_prob is not None:
        g += tl.where(cols == slope.argmax, slope.max_prob, 0.0)
    return g


@triton.jit
def log_p_and_gradient(row, slope, at, stop, TILES: tl.constexpr, LANES: tl.constexpr, GROUPED: tl.constexpr):
    """TILES tiles of log p, as many of the gradient with respect to p, and their part of sum p g, [LANES]."""
    logs, grads, mean = (), (), tl.zeros([LANES], tl.float32)
    scores = load_scores(row, at, stop, TILES, LANES, GROUPED)
    values = load_values(slope.of_probabilities, slope.offset, at, stop, TILES, LANES, GROUPED)
    ref = finite_or_zero(slope.max)
    for i in tl.static_range(TILES):
        cols = columns_at(at + i * (LANES * WIDTH), LANES, GROUPED)
        log_p = (scores[i] - ref) * row.inverse - slope.log_denom
        p = exp(log_p)
        g = with_statistics(values[i], p, log_p, cols, stop, slope)
        mean += tile_sum(tl.where(p == 0, 0.0, p * g))
        logs += (log_p,)
        grads += (g,)
    return logs, grads, mean


@triton.jit
def mean_of_segment(row, slope, start, stop, TILES: tl.constexpr, LANES: tl.constexpr, GROUPED: tl.constexpr):
    """sum p g over the columns [start, stop)."""
    lanes = tl.zeros([LANES], tl.float32)
    for at in range(start, stop, TILES * LANES * WIDTH):
        _, _, part = log_p_and_gradient(row, slope, at, stop, TILES, LANES, GROUPED)
        lanes += part
    return lane_sum(lanes)


@triton.jit
def write_tile(log_p, g, mean, factor, cols, stop, grad_scores, probabilities):
    """Writes a tile of what is wanted; returns its du log p, summed in each lane."""
    p = exp(log_p)
    du = tl.where(p == 0, 0.0, p * (g - mean))
    store_tile(grad_scores, cols, stop, du * factor)
    store_tile(probabilities, cols, stop, p)
    return tile_sum(tl.where(du == 0, 0.0, du * log_p))


@triton.jit(do_not_specialize=["first_row"])
def soft_bwd_segment_kernel(
    scores,
    first_row: tl.int64,
    K,
    fields,
    upstream,
    of_probabilities,
    stride_of_probabilities,
    means,
    SEGMENT: tl.constexpr,
    TILES: tl.constexpr,
    LANES: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """sum p g of one segment of one row, for the programs of soft_bwd_kernel to add up."""
    program = tl.program_id(0)
    n, start, stop, _ = place_of(program, K, SEGMENT, True)
    row = Row(scores, *at_row(scores, n, first_row))
    slope = Slope(upstream, of_probabilities, *slope_at_row(fields, upstream, stride_of_probabilities, n))
    tl.store(means + program.to(tl.int64), mean_of_segment(row, slope, start, stop, TILES, LANES, GROUPED))


@triton.jit(do_not_specialize=["first_row"])
def soft_bwd_kernel(
    scores,
    first_row: tl.int64,
    K,
    fields,
    upstream,
    of_probabilities,
    stride_of_probabilities,
    means,
    grad_scores,
    stride_grad_scores,
    grad_temperature,
    probabilities,
    stride_probabilities,
    RESIDENT: tl.constexpr,
    SPLIT: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILES: tl.constexpr,
    LANES: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """Gradients and probabilities of a row. Split: of a segment of it, without the temperature's gradient."""
    n, start, stop, num_segments = place_of(tl.program_id(0), K, SEGMENT, SPLIT)
    row = Row(scores, *at_row(scores, n, first_row))
    slope = Slope(upstream, of_probabilities, *slope_at_row(fields, upstream, stride_of_probabilities, n))
    logs, grads, mean, size = (), (), 0.0, TILES * LANES * WIDTH
    if RESIDENT:
        logs, grads, lanes = log_p_and_gradient(row, slope, 0, K, TILES, LANES, GROUPED)
        mean = lane_sum(lanes)
    else:
        for segment in range(num_segments if SPLIT else tl.cdiv(K, SEGMENT)):
            if SPLIT:
                mean += tl.load(means + n * num_segments + segment)
            else:
                at = segment * SEGMENT
                mean += mean_of_segment(row, slope, at, tl.minimum(at + SEGMENT, K), TILES, LANES, GROUPED)
    # NaN is then in every product, or rounding to 16 bits might lose it; a row without an allowed label gets zeros
    factor = tl.where(mean == mean, row.inverse, float("nan"))
    factor = tl.where(slope.max == float("-inf"), 0.0, factor)
    if grad_scores is not None:
        grad_scores += n * stride_grad_scores
    if probabilities is not None:
        probabilities += n * stride_probabilities
    times_log = tl.zeros([LANES], tl.float32)
    if RESIDENT:
        for i in tl.static_range(TILES):
            cols = columns_at(i * (LANES * WIDTH), LANES, GROUPED)
            times_log += write_tile(logs[i], grads[i], mean, factor, cols, K, grad_scores, probabilities)
    else:
        for at in range(start, stop, size):
            log_p, g, _ = log_p_and_gradient(row, slope, at, stop, TILES, LANES, GROUPED)
            for i in tl.static_range(TILES):
                cols = columns_at(at + i * (LANES * WIDTH), LANES, GROUPED)
                times_log += write_tile(log_p[i], g[i], mean, factor, cols, stop, grad_scores, probabilities)
    if grad_temperature is not None:
        tl.store(grad_temperature + n, (0.0 - lane_sum(times_log)) * factor)


# -- selection ---------------------------------------------------------------------------------------------------------


@triton.jit
def sums_of_selected(state, packed, ref, inverse):
    """`state`, four sums, and those of a block of selected labels: exp(x), exp(x) x, exp(x)^2, exp(x) but for x = 0."""
    x = (value_of(packed) - ref) * inverse
    e = exp(x)
    others = state[3] + lane_sum(tl.where(x == 0, 0.0, e))
    return state[0] + lane_sum(e), state[1] + lane_sum(e * finite(x)), state[2] + lane_sum(e * e), others


@triton.jit
def store_selected(labels, weights, at, k, packed, ref, inverse, denom, is_poisoned):
    """A block of labels and weights, of the row that `labels` and `weights` point to."""
    slots = at + tl.arange(0, packed.shape[0])
    is_label = (packed >> 32) != NO_LABEL
    label = tl.where(is_label, column_of(packed), -1)
    weight = tl.math.div_rn(exp((value_of(packed) - ref) * inverse), denom)
    weight = tl.where(is_label, weight, 0.0)
    tl.store(labels + slots, tl.where(is_poisoned, 0, label), mask=slots < k)
    tl.store(weights + slots, tl.where(is_poisoned, float("nan"), weight), mask=slots < k)


@triton.jit
def store_selection_fields(fields, n, first, sums):
    """From the row's best label, packed, and `sums_of_selected` of all."""
    is_empty, is_poisoned = (first >> 32) == NO_LABEL, is_nan(first)
    denom = tl.where(is_empty, 1.0, sums[0])
    denom = tl.where(is_poisoned, float("nan"), denom)
    log_denom = log_of_denom(denom, sums[3], is_empty)
    store_field(fields.max, n, value_of(first))
    store_field(fields.log_denom, n, log_denom)
    store_field(fields.entropy, n, log_denom - tl.math.div_rn(sums[1], denom))
    store_field(fields.max_prob, n, tl.where(is_empty, 0.0, tl.math.div_rn(1.0, denom)))
    store_field(fields.sum_squares, n, tl.math.div_rn(tl.math.div_rn(sums[2], denom), denom))
    store_field(fields.argmax, n, tl.where(is_empty, -1, column_of(first)))
    return denom


@triton.jit(do_not_specialize=["first_row", "k"])
def soft_select_kernel(
    scores,
    first_row: tl.int64,
    K,
    k,
    fields,
    labels,
    weights,
    candidates,
    SEGMENT: tl.constexpr,
    SLOTS: tl.constexpr,
    TILES: tl.constexpr,
    LANES: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """The k best labels of one segment of a row: as `candidates` [num_rows, segments, k], packed, best first.

    candidates None: the segment is the row, and labels, weights and fields are written. SLOTS: k or more, a power of
    two; 0: every column is a candidate, [num_rows, K].
    """
    n, start, stop, _ = place_of(tl.program_id(0), K, SEGMENT, candidates is not None)
    row = Row(scores, *at_row(scores, n, first_row))
    keys, tiles = (), load_scores(row, start, stop, TILES, LANES, GROUPED)
    for i in tl.static_range(TILES):
        keys += (key_of(tiles[i]),)
    if SLOTS == 0:
        for i in tl.static_range(TILES):
            cols = columns_at(start + i * (LANES * WIDTH), LANES, GROUPED)
            tl.store(candidates + n * K + cols, pack(keys[i], cols), mask=cols < stop)
    else:
        slots = tl.arange(0, SLOTS)
        chosen = tl.full([SLOTS], -(2**63), tl.int64)
        for j in range(k):
            best = tl.full([LANES], -(2**63), tl.int64)
            for i in tl.static_range(TILES):
                cols = columns_at(start + i * (LANES * WIDTH), LANES, GROUPED)
                best = tl.maximum(best, best_of_lanes(keys[i], cols))
            winner = tl.max(best, axis=0)
            chosen = tl.where(slots == j, winner, chosen)
            rest = ()
            for i in tl.static_range(TILES):
                cols = columns_at(start + i * (LANES * WIDTH), LANES, GROUPED)
                rest += (tl.where(cols == column_of(winner).to(tl.int32), NO_LABEL, keys[i]),)
            keys = rest
        if candidates is not None:
            place = candidates + tl.program_id(0).to(tl.int64) * k + slots
            tl.store(place, chosen, mask=slots < k)
        else:
            first = tl.max(chosen, axis=0)
            ref = finite_or_zero(value_of(first))
            sums = sums_of_selected((0.0, 0.0, 0.0, 0.0), chosen, ref, row.inverse)
            denom = store_selection_fields(fields, n, first, sums)
            place = n * k
            store_selected(labels + place, weights + place, 0, k, chosen, ref, row.inverse, denom, is_nan(first))


@triton.jit(do_not_specialize=["k"])
def soft_selected_kernel(scores, k, packed, stride_packed, fields, labels, weights, SLOTS: tl.constexpr):
    """Labels, weights and fields of a row from its k best labels, packed, best first."""
    n = tl.program_id(0).to(tl.int64)
    row = Row(scores, *at_row(scores, n, n))
    packed += n * stride_packed
    first = tl.load(packed)
    ref, sums = finite_or_zero(value_of(first)), (0.0, 0.0, 0.0, 0.0)
    for at in range(0, k, SLOTS):
        slots = at + tl.arange(0, SLOTS)
        sums = sums_of_selected(sums, tl.load(packed + slots, mask=slots < k, other=-(2**63)), ref, row.inverse)
    denom = store_selection_fields(fields, n, first, sums)
    for at in range(0, k, SLOTS):
        slots = at + tl.arange(0, SLOTS)
        block = tl.load(packed + slots, mask=slots < k, other=-(2**63))
        store_selected(labels + n * k, weights + n * k, at, k, block, ref, row.inverse, denom, is_nan(first))


@triton.jit
def selected_block(row, slope, labels, at, k, SLOTS: tl.constexpr):
    """(slots, labels, log p, p, gradient with respect to p) of a block of a row's selected labels; p 0 for label -1."""
    slots = at + tl.arange(0, SLOTS)
    label = tl.load(labels + slots, mask=slots < k, other=-1)
    is_label = label >= 0
    v = tl.load(row.ptr + label, mask=is_label, other=float("-inf")).to(tl.float32)
    if row.given.gumbel is not None:
        v += row.gumbel * gumbel_of(random_bits_of(row, label.to(tl.int32)))
    log_p = (v - finite_or_zero(slope.max)) * row.inverse - slope.log_denom
    p = tl.where(is_label, exp(log_p), 0.0)
    g = tl.zeros([SLOTS], tl.float32)
    if slope.of_probabilities is not None:
        g = tl.load(slope.of_probabilities + slope.offset + slots, mask=slots < k, other=0.0)
    return slots, label, log_p, p, with_statistics(g, p, log_p, label, tl.where(is_label, label + 1, label), slope)


@triton.jit(do_not_specialize=["first_row", "k"])
def soft_select_bwd_kernel(
    scores,
    first_row: tl.int64,
    K,
    k,
    fields,
    upstream,
    labels,
    weights,
    of_weights,
    grad_scores,
    stride_grad_scores,
    grad_temperature,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Weights and gradients of a row's selected labels; the rest of `grad_scores` is 0 already."""
    n = tl.program_id(0).to(tl.int64)
    row = Row(scores, *at_row(scores, n, first_row))
    slope = Slope(upstream, of_weights, *slope_at_row(fields, upstream, k, n))
    labels += n * k
    weights += n * k
    if grad_scores is not None:
        grad_scores += n * stride_grad_scores
    if slope.max != slope.max:
        if grad_scores is not None:
            for at in range(0, K, BLOCK):
                cols = at + tl.arange(0, BLOCK)
                store_tile(grad_scores, cols, K, tl.full([BLOCK], float("nan"), tl.float32))
        for at in range(0, k, SLOTS):
            slots = at + tl.arange(0, SLOTS)
            tl.store(weights + slots, tl.full([SLOTS], float("nan"), tl.float32), mask=slots < k)
        if grad_temperature is not None:
            tl.store(grad_temperature + n, float("nan"))
    else:
        mean, times_log = 0.0, 0.0
        for at in range(0, k, SLOTS):
            slots, _, _, p, g = selected_block(row, slope, labels, at, k, SLOTS)
            tl.store(weights + slots, p, mask=slots < k)
            mean += lane_sum(tl.where(p == 0, 0.0, p * g))
        for at in range(0, k, SLOTS):
            slots, label, log_p, p, g = selected_block(row, slope, labels, at, k, SLOTS)
            du = tl.where(p == 0, 0.0, p * (g - mean))
            times_log += lane_sum(tl.where(du == 0, 0.0, du * log_p))
            if grad_scores is not None:
                grad = (du * row.inverse).to(grad_scores.dtype.element_ty)
                tl.store(grad_scores + label, grad, mask=label >= 0)
        if grad_temperature is not None:
            is_empty = slope.max == float("-inf")
            tl.store(grad_temperature + n, tl.where(is_empty, 0.0, (0.0 - times_log) * row.inverse))
