"""Rows of scores as soft_embedding's Triton kernels read them, noise included, and the state of a row's softmax.

A tile is [LANES, 4]: a thread has a lane, and a lane the four columns of one counter of the noise. Tiles are loaded
several at a time. Sums are as in row_state.py: trees of pairs, whose bits do not depend on how threads hold a tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...tritonlib.primitives import LARGEST, column_of, exp, finite, finite_or_zero, lane_sum, log1p, tile_max, tile_sum

WIDTH = tl.constexpr(4)  # columns of a lane in a tile
SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)
NO_LABEL = tl.constexpr(-0x80000000)  # key of a column that is forbidden, taken or beyond the row's end

# what of a row's state is wanted besides its maximum and denominator
TIMES_X = tl.constexpr(1)
SQUARES = tl.constexpr(2)
BEST = tl.constexpr(4)
NUM_SUMS = tl.constexpr(5)  # of a stored state, its floats


class Scores(NamedTuple):
    """Rows of scores as kernels get them. None: no such option."""

    ptr: Any
    stride: Any
    temperature: Any  # None: 1
    temperature_stride: Any
    gumbel: Any
    seed: Any
    mask: Any  # uint8, not 0: forbidden
    mask_stride: Any


class Row(NamedTuple):
    """Rows of scores and what `at_row` finds of one. As in columns.py: which options there are is said by `given`."""

    given: Any
    ptr: Any  # to the row's scores
    inverse: Any  # of the temperature
    gumbel: Any
    seed: Any
    low: Any  # of the row's number, for its noise
    high: Any
    mask_offset: Any  # of the row from `given.mask`


class Fields(NamedTuple):
    """One number per row each, see ../request.py. None: not wanted."""

    max: Any
    log_denom: Any
    entropy: Any
    max_prob: Any
    sum_squares: Any
    argmax: Any


class SoftState(NamedTuple):
    """Sums over some columns, with x = (v - r) / T relative to r = max (0 while that is -inf).

    The mask WANTED says which are meant. The others are a 0.0 that nothing touches.
    """

    max: Any  # of v
    denom: Any  # sum exp(x)
    times_x: Any  # sum exp(x) x
    squares: Any  # sum exp(x)^2
    others: Any  # with times_x: denom without the columns at the maximum, whose ones would swallow it
    best: Any  # packed key and column


# -- reading -----------------------------------------------------------------------------------------------------------


@triton.jit
def inverse_of(T):
    """1 / T, a finite one where T is too small or too large for it: 0 times infinity would be NaN. NaN for T = 0."""
    inverse = tl.math.div_rn(1.0, T)
    inverse = tl.where(inverse > LARGEST, LARGEST, inverse)
    inverse = tl.where((inverse >= 0) & (inverse < SMALLEST_NORMAL), SMALLEST_NORMAL, inverse)
    return tl.where(T == 0, float("nan"), inverse)


@triton.jit
def at_row(scores, row, first_row):
    """All of a Row but `given`. `row` is 64-bit, so that products with strides are."""
    number = first_row + row
    gumbel, seed, inverse = 0.0, 0, 1.0
    if scores.temperature is not None:
        inverse = inverse_of(tl.load(scores.temperature + row * scores.temperature_stride))
    if scores.gumbel is not None:
        gumbel, seed = tl.load(scores.gumbel), tl.load(scores.seed)
    low, high = number.to(tl.uint32), (number >> 32).to(tl.uint32)
    return scores.ptr + row * scores.stride, inverse, gumbel, seed, low, high, row * scores.mask_stride


@triton.jit
def columns_at(at, LANES: tl.constexpr, GROUPED: tl.constexpr):
    """The columns of the tile at `at`.

    GROUPED, where rows are aligned or there is noise: neighbours in a lane, a wide load. Otherwise neighbours in a
    warp, for the loads of single scores.
    """
    lane, i = tl.arange(0, LANES)[:, None], tl.arange(0, WIDTH)[None, :]
    return (lane * WIDTH + i if GROUPED else lane + i * LANES) + at


@triton.jit
def gumbel_of(bits):
    """From 32 random bits: u is strictly inside (0, 1) and exact."""
    u = ((bits >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return 0.0 - tl.log(0.0 - tl.log(u))


@triton.jit
def random_bits(row, at, LANES: tl.constexpr):
    """uint32 for the columns of a grouped tile: one counter for each lane."""
    counter = (tl.arange(0, LANES) + at // WIDTH).to(tl.uint32)
    a, b, c, d = tl.philox(row.seed, counter, row.low, row.high, tl.full([], 0, tl.uint32))
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (LANES, WIDTH))


@triton.jit
def random_bits_of(row, cols):
    """The same for any columns, each with a counter of its own."""
    a, b, c, d = tl.philox(row.seed, (cols >> 2).to(tl.uint32), row.low, row.high, tl.full([], 0, tl.uint32))
    lane = cols & 3
    return tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d))


@triton.jit
def load_scores(row, at, stop, TILES: tl.constexpr, LANES: tl.constexpr, GROUPED: tl.constexpr):
    """TILES tiles of v = scores + noise, -inf where forbidden or from `stop` on; loads are issued before their use."""
    loaded, tiles = (), ()
    for i in tl.static_range(TILES):
        cols = columns_at(at + i * (LANES * WIDTH), LANES, GROUPED)
        # float32 before any arithmetic: bf16 arithmetic would round, and interpreted it is garbage
        loaded += (tl.load(row.ptr + cols, mask=cols < stop, other=float("-inf")).to(tl.float32),)
    for i in tl.static_range(TILES):
        v = loaded[i]
        first = at + i * (LANES * WIDTH)
        if row.given.gumbel is not None:
            v += row.gumbel * gumbel_of(random_bits(row, first, LANES))
        cols = columns_at(first, LANES, GROUPED)
        forbidden = cols >= stop
        if row.given.mask is not None:
            forbidden = tl.load(row.given.mask + row.mask_offset + cols, mask=cols < stop, other=1) != 0
        if row.given.gumbel is not None or row.given.mask is not None:
            v = tl.where(forbidden, float("-inf"), v)
        tiles += (v,)
    return tiles


@triton.jit
def load_values(ptr, offset, at, stop, TILES: tl.constexpr, LANES: tl.constexpr, GROUPED: tl.constexpr):
    """TILES tiles of anything else, in float32; zeros without `ptr`."""
    tiles = ()
    for i in tl.static_range(TILES):
        if ptr is None:
            tiles += (tl.zeros([LANES, WIDTH], tl.float32),)
        else:
            cols = columns_at(at + i * (LANES * WIDTH), LANES, GROUPED)
            tiles += (tl.load(ptr + offset + cols, mask=cols < stop, other=0.0).to(tl.float32),)
    return tiles


# -- keys: int32 in the order of the values, NaN above all -------------------------------------------------------------


@triton.jit
def key_of(v):
    """NO_LABEL for -inf."""
    bits = (v + 0.0).to(tl.int32, bitcast=True)  # -0.0 is 0.0
    key = tl.where(v != v, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return tl.where(v == float("-inf"), NO_LABEL, key)


@triton.jit
def value_of(packed):
    """Of a packed key and column; NO_LABEL as -inf."""
    key = (packed >> 32).to(tl.int32)
    value = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.where(key == NO_LABEL, float("-inf"), value)


@triton.jit
def is_nan(packed):
    return (packed >> 32) == 0x7FFFFFFF


@triton.jit
def pack(key, cols):
    """One int64 that is compared as such: by key, then the lower column is larger."""
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - cols).to(tl.int64)


@triton.jit
def best_of_lanes(key, cols):
    """The largest of each lane, packed."""
    best = tile_max(key)
    behind = tile_max(tl.where(key == best[:, None], 0x7FFFFFFF - cols, 0))
    return (best.to(tl.int64) << 32) | behind.to(tl.int64)


# -- states ------------------------------------------------------------------------------------------------------------


@triton.jit
def no_scores(SHAPE: tl.constexpr, WANTED: tl.constexpr):
    """The neutral element of `merge`."""
    zero = tl.full(SHAPE, 0.0, tl.float32)
    return SoftState(
        tl.full(SHAPE, float("-inf"), tl.float32),
        zero,
        zero if TIMES_X & WANTED else 0.0,
        zero if SQUARES & WANTED else 0.0,
        zero if TIMES_X & WANTED else 0.0,
        tl.full(SHAPE, -(2**63), tl.int64) if BEST & WANTED else 0.0,
    )


@triton.jit
def rebase(state, new_max, inverse, WANTED: tl.constexpr):
    """The same sums relative to another, not smaller, maximum."""
    shift = (finite_or_zero(state.max) - finite_or_zero(new_max)) * inverse
    factor = exp((state.max - finite_or_zero(new_max)) * inverse)
    times_x, squares, others = state.times_x, state.squares, state.others
    if TIMES_X & WANTED:
        # what has underflowed to nothing stays nothing: the shift may be infinite there
        times_x = tl.where(factor == 0, 0.0, factor * (times_x + shift * state.denom))
        others = tl.where(state.max == new_max, others, factor * state.denom)
    if SQUARES & WANTED:
        squares = squares * (factor * factor)
    return SoftState(new_max, state.denom * factor, times_x, squares, others, state.best)


@triton.jit
def merge(a, b, inverse, WANTED: tl.constexpr):
    new_max = tl.maximum(a.max, b.max)
    a, b = rebase(a, new_max, inverse, WANTED), rebase(b, new_max, inverse, WANTED)
    return SoftState(
        new_max,
        a.denom + b.denom,
        a.times_x + b.times_x if TIMES_X & WANTED else 0.0,
        a.squares + b.squares if SQUARES & WANTED else 0.0,
        a.others + b.others if TIMES_X & WANTED else 0.0,
        tl.maximum(a.best, b.best) if BEST & WANTED else 0.0,
    )


@triton.jit
def absorb(lanes, v, cols, inverse, WANTED: tl.constexpr):
    """The lanes after a tile."""
    best = lanes.best
    if BEST & WANTED:
        best = tl.maximum(best, best_of_lanes(key_of(v), cols))
    lanes = rebase(lanes, tl.maximum(lanes.max, tile_max(v)), inverse, WANTED)
    x = (v - finite_or_zero(lanes.max)[:, None]) * inverse
    e = exp(x)
    return SoftState(
        lanes.max,
        lanes.denom + tile_sum(e),
        lanes.times_x + tile_sum(e * finite(x)) if TIMES_X & WANTED else 0.0,
        lanes.squares + tile_sum(e * e) if SQUARES & WANTED else 0.0,
        lanes.others + tile_sum(tl.where(x == 0, 0.0, e)) if TIMES_X & WANTED else 0.0,
        best,
    )


@triton.jit
def collapse(lanes, inverse, WANTED: tl.constexpr):
    """One state of a vector of states."""
    new_max = tl.max(lanes.max, axis=0)
    lanes = rebase(lanes, new_max, inverse, WANTED)
    return SoftState(
        new_max,
        lane_sum(lanes.denom),
        lane_sum(lanes.times_x) if TIMES_X & WANTED else 0.0,
        lane_sum(lanes.squares) if SQUARES & WANTED else 0.0,
        lane_sum(lanes.others) if TIMES_X & WANTED else 0.0,
        tl.max(lanes.best, axis=0) if BEST & WANTED else 0.0,
    )


@triton.jit
def scan_tiles(tiles, row, at, WANTED: tl.constexpr, LANES: tl.constexpr, GROUPED: tl.constexpr):
    """The state of a segment that is here already."""
    lanes = no_scores([LANES], WANTED)
    for i in tl.static_range(len(tiles)):
        lanes = absorb(lanes, tiles[i], columns_at(at + i * (LANES * WIDTH), LANES, GROUPED), row.inverse, WANTED)
    return collapse(lanes, row.inverse, WANTED)


@triton.jit
def scan_segment(
    row, start, stop, WANTED: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr, GROUPED: tl.constexpr
):
    """The state of the columns [start, stop)."""
    lanes = no_scores([LANES], WANTED)
    for at in range(start, stop, TILES * LANES * WIDTH):
        tiles = load_scores(row, at, stop, TILES, LANES, GROUPED)
        for i in tl.static_range(TILES):
            cols = columns_at(at + i * (LANES * WIDTH), LANES, GROUPED)
            lanes = absorb(lanes, tiles[i], cols, row.inverse, WANTED)
    return collapse(lanes, row.inverse, WANTED)


@triton.jit
def store_state(floats, ints, index, state, WANTED: tl.constexpr):
    tl.store(floats + index * NUM_SUMS, state.max)
    tl.store(floats + index * NUM_SUMS + 1, state.denom)
    if TIMES_X & WANTED:
        tl.store(floats + index * NUM_SUMS + 2, state.times_x)
        tl.store(floats + index * NUM_SUMS + 4, state.others)
    if SQUARES & WANTED:
        tl.store(floats + index * NUM_SUMS + 3, state.squares)
    if BEST & WANTED:
        tl.store(ints + index, state.best)


@triton.jit
def load_state(floats, ints, index, WANTED: tl.constexpr):
    floats += index * NUM_SUMS
    return SoftState(
        tl.load(floats),
        tl.load(floats + 1),
        tl.load(floats + 2) if TIMES_X & WANTED else 0.0,
        tl.load(floats + 3) if SQUARES & WANTED else 0.0,
        tl.load(floats + 4) if TIMES_X & WANTED else 0.0,
        tl.load(ints + index) if BEST & WANTED else 0.0,
    )


@triton.jit
def store_field(ptr, row, x):
    if ptr is not None:
        tl.store(ptr + row, x)


@triton.jit
def log_of_denom(denom, others, is_empty):
    """log(denom), from the sum without the largest column's 1 where that is all but one: see csrc/cpu/row.h."""
    is_confident = (others < 1) & (denom - others < 1.5) & (is_empty == 0)
    return tl.where(is_confident, log1p(tl.where(is_confident, others, 0.0)), tl.log(denom))


@triton.jit
def store_fields(fields, row, state, is_empty, denom, WANTED: tl.constexpr):
    """denom: 1 for a row without an allowed label, whose other sums are 0."""
    log_denom = tl.log(denom)
    if TIMES_X & WANTED:
        log_denom = log_of_denom(denom, state.others, is_empty)
    store_field(fields.log_denom, row, log_denom)
    store_field(fields.max_prob, row, tl.where(is_empty, 0.0, tl.math.div_rn(1.0, denom)))
    if fields.entropy is not None:
        tl.store(fields.entropy + row, log_denom - tl.math.div_rn(state.times_x, denom))
    if fields.sum_squares is not None:
        tl.store(fields.sum_squares + row, tl.math.div_rn(tl.math.div_rn(state.squares, denom), denom))
    if BEST & WANTED:
        # a running maximum may step over NaN
        store_field(fields.max, row, tl.where(is_nan(state.best), float("nan"), state.max))
        store_field(fields.argmax, row, tl.where(is_empty, -1, column_of(state.best)))
