"""Arithmetic of one row: its state while columns are scanned, the one merge of two states, accurate scalar functions.

Columns are cut in segments that depend on the vocabulary alone. A segment is scanned in tiles [LANES, WIDTH] by lanes
that each have their own maximum, so that the loop has no reduction across threads; `collapse` makes one state of them,
and `merge` joins segments in their order. Every sum over a tile or over lanes is a tree of pairs: its bits do not
depend on how the compiler lays a tensor out over threads, which changes with alignment. Kernels are compiled without
fused multiply-add, so that a row has the same bits from every kernel, split or not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...tritonlib.primitives import exp, finite, finite_or_zero, lane_sum, log1p, tile_argmax, tile_max, tile_sum
from ..request import mask_of

MEAN_SUM = tl.constexpr(mask_of("mean_sum"))
MEAN_BASE = tl.constexpr(mask_of("mean_base"))
BASE_DENOM = tl.constexpr(mask_of("base_log_denom", "base_nll"))
BASE = tl.constexpr(mask_of("mean_base", "base_max", "base_log_denom", "base_nll"))
WEIGHTED_SUM = tl.constexpr(mask_of("weighted_sum"))
ARGMAX = tl.constexpr(mask_of("argmax"))
BASE_ARGMAX = tl.constexpr(mask_of("base_argmax"))
TARGET_RANK = tl.constexpr(mask_of("target_rank"))

NUM_FLOATS = tl.constexpr(8)  # of a stored state
NUM_INTS = tl.constexpr(3)


class RowState(NamedTuple):
    """Sums over some columns v, relative to r = max and r_b = base_max (0 while these are -inf).

    The mask WANTED of request.FIELDS says which are meant. The others are a 0.0 that nothing touches.
    """

    max: Any  # of s
    denom: Any  # sum exp(s - r)
    mean_sum: Any  # sum exp(s - r) (s - r)
    mean_base: Any  # sum exp(s - r) (z_b - r_b)
    base_max: Any  # of z_b
    base_denom: Any  # sum exp(z_b - r_b)
    weighted_sum: Any  # sum w (s - r)
    weight: Any  # sum w
    argmax: Any  # packed value and column
    base_argmax: Any
    num_above: Any  # how many s are greater than the target's; int32


# -- states ------------------------------------------------------------------------------------------------------------


@triton.jit
def no_columns(SHAPE: tl.constexpr, WANTED: tl.constexpr):
    """The state of no columns: the neutral element of `merge`."""
    zero = tl.full(SHAPE, 0.0, tl.float32)
    lowest = tl.full(SHAPE, float("-inf"), tl.float32)
    nowhere = tl.full(SHAPE, -(2**63), tl.int64)
    return RowState(
        lowest,
        zero,
        zero if MEAN_SUM & WANTED else 0.0,
        zero if MEAN_BASE & WANTED else 0.0,
        lowest if BASE & WANTED else 0.0,
        zero if BASE_DENOM & WANTED else 0.0,
        zero if WEIGHTED_SUM & WANTED else 0.0,
        zero if WEIGHTED_SUM & WANTED else 0.0,
        nowhere if ARGMAX & WANTED else 0.0,
        nowhere if BASE_ARGMAX & WANTED else 0.0,
        tl.full(SHAPE, 0, tl.int32) if TARGET_RANK & WANTED else 0.0,
    )


@triton.jit
def rebase(state, new_max, new_base_max, WANTED: tl.constexpr):
    """The same sums relative to other, not smaller, maxima. States, or vectors of states with scalar maxima."""
    old, ref = finite_or_zero(state.max), finite_or_zero(new_max)
    factor = exp(state.max - ref)
    mean_sum, mean_base = state.mean_sum, state.mean_base
    base_denom, weighted_sum = state.base_denom, state.weighted_sum
    # what has underflowed to nothing stays nothing: the shift may be infinite there
    if MEAN_SUM & WANTED:
        mean_sum = tl.where(factor == 0, 0.0, factor * (mean_sum + (old - ref) * state.denom))
    if MEAN_BASE & WANTED:
        shift = finite_or_zero(state.base_max) - finite_or_zero(new_base_max)
        mean_base = tl.where(factor == 0, 0.0, factor * (mean_base + shift * state.denom))
    if BASE_DENOM & WANTED:
        base_denom = base_denom * exp(state.base_max - finite_or_zero(new_base_max))
    if WEIGHTED_SUM & WANTED:
        weighted_sum = weighted_sum + (old - ref) * state.weight
    return RowState(
        new_max,
        state.denom * factor,
        mean_sum,
        mean_base,
        new_base_max,
        base_denom,
        weighted_sum,
        state.weight,
        state.argmax,
        state.base_argmax,
        state.num_above,
    )


@triton.jit
def merge(a, b, WANTED: tl.constexpr):
    """The state of the columns of both: segments of a row, or a row without its target and the target."""
    new_max = tl.maximum(a.max, b.max)
    new_base_max = tl.maximum(a.base_max, b.base_max) if BASE & WANTED else 0.0
    a, b = rebase(a, new_max, new_base_max, WANTED), rebase(b, new_max, new_base_max, WANTED)
    return RowState(
        new_max,
        a.denom + b.denom,
        a.mean_sum + b.mean_sum if MEAN_SUM & WANTED else 0.0,
        a.mean_base + b.mean_base if MEAN_BASE & WANTED else 0.0,
        new_base_max,
        a.base_denom + b.base_denom if BASE_DENOM & WANTED else 0.0,
        a.weighted_sum + b.weighted_sum if WEIGHTED_SUM & WANTED else 0.0,
        a.weight + b.weight if WEIGHTED_SUM & WANTED else 0.0,
        tl.maximum(a.argmax, b.argmax) if ARGMAX & WANTED else 0.0,
        tl.maximum(a.base_argmax, b.base_argmax) if BASE_ARGMAX & WANTED else 0.0,
        a.num_above + b.num_above if TARGET_RANK & WANTED else 0.0,
    )


@triton.jit
def collapse(lanes, WANTED: tl.constexpr):
    """One state of a vector of states. Maxima are exact in any order."""
    new_max = tl.max(lanes.max, axis=0)
    new_base_max = tl.max(lanes.base_max, axis=0) if BASE & WANTED else 0.0
    lanes = rebase(lanes, new_max, new_base_max, WANTED)
    return RowState(
        new_max,
        lane_sum(lanes.denom),
        lane_sum(lanes.mean_sum) if MEAN_SUM & WANTED else 0.0,
        lane_sum(lanes.mean_base) if MEAN_BASE & WANTED else 0.0,
        new_base_max,
        lane_sum(lanes.base_denom) if BASE_DENOM & WANTED else 0.0,
        lane_sum(lanes.weighted_sum) if WEIGHTED_SUM & WANTED else 0.0,
        lane_sum(lanes.weight) if WEIGHTED_SUM & WANTED else 0.0,
        tl.max(lanes.argmax, axis=0) if ARGMAX & WANTED else 0.0,
        tl.max(lanes.base_argmax, axis=0) if BASE_ARGMAX & WANTED else 0.0,
        tl.sum(lanes.num_above, axis=0) if TARGET_RANK & WANTED else 0.0,
    )


@triton.jit
def absorb(lanes, s, z_base, w, first, in_row, at_y, s_y, WANTED: tl.constexpr, EVEN: tl.constexpr):
    """The lanes after a tile [LANES, WIDTH] of logits.

    w         class weights, None: 1
    in_row    columns of the row; they all enter the argmaxes
    at_y      the target's column, which is left out of the sums and joined at the end
    s_y       the target's logit, of which its rank is made
    """
    argmax, base_argmax, num_above = lanes.argmax, lanes.base_argmax, lanes.num_above
    if ARGMAX & WANTED:
        argmax = tl.maximum(argmax, tile_argmax(s, first, in_row, EVEN))
    if BASE_ARGMAX & WANTED:
        base_argmax = tl.maximum(base_argmax, tile_argmax(z_base, first, in_row, EVEN))
    keep = in_row & (at_y == 0)
    s = tl.where(keep, s, float("-inf"))
    if TARGET_RANK & WANTED:
        num_above += tl.sum((s > s_y).to(tl.int32), axis=1)
    new_max, new_base_max = tl.maximum(lanes.max, tile_max(s)), lanes.base_max
    if BASE & WANTED:
        z_base = tl.where(keep, z_base, float("-inf"))
        new_base_max = tl.maximum(new_base_max, tile_max(z_base))
    lanes = rebase(lanes, new_max, new_base_max, WANTED)
    mean_sum, mean_base = lanes.mean_sum, lanes.mean_base
    base_denom, weighted_sum, weight = lanes.base_denom, lanes.weighted_sum, lanes.weight
    s = s - finite_or_zero(new_max)[:, None]
    e = exp(s)
    if MEAN_SUM & WANTED:
        mean_sum += tile_sum(e * finite(s))
    if BASE & WANTED:
        z_base = z_base - finite_or_zero(new_base_max)[:, None]
    if MEAN_BASE & WANTED:
        mean_base += tile_sum(e * finite(z_base))
    if BASE_DENOM & WANTED:
        base_denom += tile_sum(exp(z_base))
    if WEIGHTED_SUM & WANTED:
        if w is None:
            # 1, but made of the logits: a constant would get a layout of its own, and its sum go through shared memory
            w = tl.where(s == s, 1.0, float("nan"))
        weighted_sum += tile_sum(tl.where(keep, w * s, 0.0))
        weight += tile_sum(tl.where(keep, w, 0.0))
    return RowState(
        new_max,
        lanes.denom + tile_sum(e),
        mean_sum,
        mean_base,
        new_base_max,
        base_denom,
        weighted_sum,
        weight,
        argmax,
        base_argmax,
        num_above,
    )


# -- the target, joined last -------------------------------------------------------------------------------------------


@triton.jit
def of_target(s_y, z_y, w_y, rest, WANTED: tl.constexpr):
    """The state of the target's column alone, which is in the argmaxes of the `rest` already and not above itself."""
    zero = s_y - s_y  # 0, or NaN for a logit that is no number
    zero = tl.where(s_y == float("-inf"), 0.0, zero)
    return RowState(
        s_y,
        exp(s_y - finite_or_zero(s_y)),
        zero if MEAN_SUM & WANTED else 0.0,
        tl.where(s_y == float("-inf"), 0.0, z_y - z_y) if MEAN_BASE & WANTED else 0.0,
        z_y if BASE & WANTED else 0.0,
        exp(z_y - finite_or_zero(z_y)) if BASE_DENOM & WANTED else 0.0,
        w_y * (s_y - finite_or_zero(s_y)) if WEIGHTED_SUM & WANTED else 0.0,
        w_y if WEIGHTED_SUM & WANTED else 0.0,
        rest.argmax,
        rest.base_argmax,
        0 if TARGET_RANK & WANTED else 0.0,
    )


@triton.jit
def nll_of(rest_max, rest_denom, new_max, denom, logit):
    """-log p of the target and 1 - p, neither by cancellation, from the sums without it (rest) and with it."""
    ref = finite_or_zero(new_max)
    rest = rest_denom * exp(rest_max - ref)
    e = exp(logit - ref)
    nll = tl.where(e > rest, log1p(tl.math.div_rn(rest, e)), tl.log(denom) - (logit - new_max))
    return nll, tl.math.div_rn(rest, denom)


# -- stored states -----------------------------------------------------------------------------------------------------


@triton.jit
def store_if(wanted: tl.constexpr, ptr, x):
    if wanted:
        tl.store(ptr, x)


@triton.jit
def store_state(floats, ints, index, state, WANTED: tl.constexpr):
    floats += index * NUM_FLOATS
    ints += index * NUM_INTS
    tl.store(floats, state.max)
    tl.store(floats + 1, state.denom)
    store_if(MEAN_SUM & WANTED, floats + 2, state.mean_sum)
    store_if(MEAN_BASE & WANTED, floats + 3, state.mean_base)
    store_if(BASE & WANTED, floats + 4, state.base_max)
    store_if(BASE_DENOM & WANTED, floats + 5, state.base_denom)
    store_if(WEIGHTED_SUM & WANTED, floats + 6, state.weighted_sum)
    store_if(WEIGHTED_SUM & WANTED, floats + 7, state.weight)
    store_if(ARGMAX & WANTED, ints, state.argmax)
    store_if(BASE_ARGMAX & WANTED, ints + 1, state.base_argmax)
    store_if(TARGET_RANK & WANTED, ints + 2, state.num_above)


@triton.jit
def load_state(floats, ints, index, WANTED: tl.constexpr):
    floats += index * NUM_FLOATS
    ints += index * NUM_INTS
    return RowState(
        tl.load(floats),
        tl.load(floats + 1),
        tl.load(floats + 2) if MEAN_SUM & WANTED else 0.0,
        tl.load(floats + 3) if MEAN_BASE & WANTED else 0.0,
        tl.load(floats + 4) if BASE & WANTED else 0.0,
        tl.load(floats + 5) if BASE_DENOM & WANTED else 0.0,
        tl.load(floats + 6) if WEIGHTED_SUM & WANTED else 0.0,
        tl.load(floats + 7) if WEIGHTED_SUM & WANTED else 0.0,
        tl.load(ints) if ARGMAX & WANTED else 0.0,
        tl.load(ints + 1) if BASE_ARGMAX & WANTED else 0.0,
        tl.load(ints + 2).to(tl.int32) if TARGET_RANK & WANTED else 0.0,
    )
