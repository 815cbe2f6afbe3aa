"""The columns of one row: sources read, segments scanned, gradients written.

Triton 3.6 lets no function's result hold None. A result is therefore a number even where there is nothing to give, and
what is there is said by the kernel's arguments, which may be None and are passed down beside it, or by a constant.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...tritonlib.primitives import exp, finite, first_columns, lane_sum, soft_cap, tile_sum, within
from .row_state import TARGET_RANK, WEIGHTED_SUM, absorb, collapse, load_state, merge, no_columns


class Source(NamedTuple):
    """A source as kernels get it, see auxkernels/layout.py. `ptr` None: no such source."""

    ptr: Any
    num_inner: Any
    stride_outer: Any
    stride_inner: Any
    width: Any
    scale: Any  # None: 1
    scale_stride: Any
    softcap: Any  # None: none


class RowSource(NamedTuple):
    """A source and what `at_row` finds of one row."""

    given: Any
    offset: Any  # of the row's first column from `given.ptr`
    scale: Any  # 1 where none is given


class Logits(NamedTuple):
    """Some columns of a source, in float32."""

    scaled: Any  # scale * softcap(values)
    capped: Any  # softcap(values)
    slope: Any  # softcap'(values)


class Softmax(NamedTuple):
    """What turns a row's logits into probabilities."""

    max: Any
    log_denom: Any
    base_max: Any
    base_log_denom: Any
    residual: Any  # 1 - p of the target


class SumGradient(NamedTuple):
    """Some columns of the gradients with respect to the sources' scale * softcap(values)."""

    base: Any
    aux: Any


class Coefficients(NamedTuple):
    """One row's numbers of request.Coefficients. None: 0."""

    A: Any
    C: Any
    D: Any
    Q: Any
    G: Any
    S: Any
    Q_b: Any
    B_b: Any


class Gradients(NamedTuple):
    """Where the gradients go. None: not wanted."""

    base: Any
    aux: Any
    base_scale: Any
    aux_scale: Any


# -- reading -----------------------------------------------------------------------------------------------------------


@triton.jit
def at_row(source, row):
    """The source's row: (offset, scale) of a RowSource. `row` is 64-bit, so that the products are."""
    offset = (row // source.num_inner) * source.stride_outer + (row % source.num_inner) * source.stride_inner
    scale = 1.0
    if source.scale is not None:
        scale = tl.load(source.scale + row * source.scale_stride)
    return offset, scale


@triton.jit
def logits_of(values, source):
    # float32 before any arithmetic: the sum of two bf16 logits would round, and bf16 arithmetic interpreted is garbage
    capped = values.to(tl.float32)
    slope = 1.0
    if source.given.softcap is not None:
        capped, slope = soft_cap(capped, source.given.softcap)
    return Logits(capped if source.given.scale is None else capped * source.scale, capped, slope)


@triton.jit
def before(first, stop, LANES: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Which columns of a tile are less than `stop`. EVEN: all or none of a lane's."""
    return first < stop if EVEN else first + within(LANES, WIDTH, EVEN) < stop


@triton.jit
def places(ptr, first, LANES: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Pointers to the columns of a tile."""
    pointers = ptr + first + within(LANES, WIDTH, EVEN)
    if not EVEN:
        # rows may be aligned although V is not: wide loads would give a thread several lanes, and no register is left
        pointers = tl.multiple_of(pointers, (1, 1))
    return pointers


@triton.jit
def load_tiles(
    source,
    first,
    stop,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    EVICT: tl.constexpr,
):
    """The values of ROWS tiles: all loads are issued before anything waits for one of them."""
    tiles = ()
    if source.given.ptr is not None:
        for i in tl.static_range(ROWS):
            at = first + i * (LANES * WIDTH)
            mask = before(at, stop, LANES, WIDTH, EVEN)
            place = places(source.given.ptr + source.offset, at, LANES, WIDTH, EVEN)
            tiles += (tl.load(place, mask=mask, other=0.0, eviction_policy=EVICT),)
    return tiles


@triton.jit
def load_logits_at(base, aux, col):
    """(s, z_b) of one column; zeros for column -1."""
    z_base = logits_of(tl.load(base.given.ptr + base.offset + col, mask=col >= 0, other=0.0), base).scaled
    s = z_base
    if aux.given.ptr is not None:
        s += logits_of(tl.load(aux.given.ptr + aux.offset + col, mask=col >= 0, other=0.0), aux).scaled
    return s, z_base


@triton.jit
def read_target(target, row, ignore_index, V):
    """(column, or -1 where there is none; whether the row is ignored; whether its target names no class)."""
    col, is_ignored, is_poisoned = -1, False, False
    if target is not None:
        y = tl.load(target + row).to(tl.int64)
        in_range = (y >= 0) & (y < V)  # in 64 bits: 2**32 + 5 is not class 5
        is_ignored = y == ignore_index
        is_poisoned = (in_range | is_ignored) == 0
        col = tl.where(in_range, y, -1).to(tl.int32)
    return col, is_ignored, is_poisoned


# -- scan --------------------------------------------------------------------------------------------------------------


@triton.jit
def ranked_logit(base, aux, y, WANTED: tl.constexpr):
    """The target's logit, which every column is compared with where its rank is wanted."""
    s_y = 0.0
    if TARGET_RANK & WANTED:
        s_y, _ = load_logits_at(base, aux, y)
    return s_y


@triton.jit
def scan_segment(
    base,
    aux,
    weight,
    y,
    s_y,
    start,
    stop,
    WANTED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The state of the columns [start, stop) without y. s_y: as `ranked_logit` gives it."""
    lanes = no_columns([LANES], WANTED)
    for at in range(start, stop, ROWS * LANES * WIDTH):
        first = at + first_columns(LANES, WIDTH, EVEN)
        base_tiles = load_tiles(base, first, stop, ROWS, LANES, WIDTH, EVEN, "")
        aux_tiles = load_tiles(aux, first, stop, ROWS, LANES, WIDTH, EVEN, "")
        for i in tl.static_range(ROWS):
            in_row = before(first, stop, LANES, WIDTH, EVEN)
            z_base = logits_of(base_tiles[i], base).scaled
            s = z_base if aux.given.ptr is None else z_base + logits_of(aux_tiles[i], aux).scaled
            w = None
            if weight is not None and WEIGHTED_SUM & WANTED:
                w = tl.load(places(weight, first, LANES, WIDTH, EVEN), mask=in_row, other=0.0)
            at_y = within(LANES, WIDTH, EVEN) == y - first
            lanes = absorb(lanes, s, z_base, w, first, in_row, at_y, s_y, WANTED, EVEN)
            first += LANES * WIDTH
    return collapse(lanes, WANTED)


@triton.jit
def scan_row(
    base,
    aux,
    weight,
    y,
    V,
    WANTED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    SEGMENT: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The state of a row without y."""
    state, s_y = no_columns([], WANTED), ranked_logit(base, aux, y, WANTED)
    for start in range(0, V, SEGMENT):
        stop = tl.minimum(start + SEGMENT, V)
        segment = scan_segment(base, aux, weight, y, s_y, start, stop, WANTED, ROWS, LANES, WIDTH, EVEN)
        state = merge(state, segment, WANTED)
    return state


@triton.jit
def merge_segments(floats, ints, row, num_segments, WANTED: tl.constexpr):
    """The same from the states that other programs have stored, segment by segment."""
    state = no_columns([], WANTED)
    for segment in range(num_segments):
        state = merge(state, load_state(floats, ints, row * num_segments + segment, WANTED), WANTED)
    return state


# -- gradients ---------------------------------------------------------------------------------------------------------


@triton.jit
def gradient_of_sum(s, z_base, w, at_y, soft, k):
    """The formula of ../request.py."""
    z = s - soft.max
    p = exp(z - soft.log_denom)
    dz = tl.zeros_like(p)
    extra = None
    if k.G is not None:
        dz = tl.where(at_y, -k.G * soft.residual, k.G * p)
    if k.A is not None:
        dz += k.A * p
    if k.C is not None:
        dz += k.C * p * finite(z)
    if k.D is not None:
        dz += k.D * p * finite(z_base - soft.base_max)
        extra = k.D * p
    if k.S is not None:
        dz += k.S * w
    if k.Q is not None or k.Q_b is not None:
        q = exp((z_base - soft.base_max) - soft.base_log_denom)
        if k.Q is not None:
            dz += k.Q * q
        if k.Q_b is not None:
            extra = k.Q_b * q if extra is None else extra + k.Q_b * q
    if k.B_b is not None:
        at_target = tl.where(at_y, k.B_b, 0.0)
        extra = at_target if extra is None else extra + at_target
    return SumGradient(dz if extra is None else dz + extra, dz)


@triton.jit
def store_gradient(
    ptr, row, first, mask, dz, source, slope, LANES: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr
):
    """ptr: to gradients [N, width], contiguous."""
    if ptr is not None:
        if source.given.scale is not None:
            dz = dz * source.scale
        if source.given.softcap is not None:
            dz = dz * slope
        # streamed past the rows that wait in L2 for their second read
        place = places(ptr + row * source.given.width, first, LANES, WIDTH, EVEN)
        tl.store(place, dz.to(ptr.dtype.element_ty), mask=mask, cache_modifier=".cs")


@triton.jit
def sum_of_products(mask, dz, capped):
    """Of the gradient and softcap(values), in each lane; a masked class, 0 * (-inf), counts nothing."""
    return tile_sum(tl.where(mask, dz * finite(capped), 0.0))


@triton.jit
def write_gradients(
    base,
    aux,
    weight,
    y,
    start,
    stop,
    soft,
    k,
    grads,
    row,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Gradients of the columns [start, stop), the last tiles first; all of the row's where a scale's is wanted."""
    base_lanes = None if grads.base_scale is None else tl.zeros([LANES], tl.float32)
    aux_lanes = None if grads.aux_scale is None else tl.zeros([LANES], tl.float32)
    size = ROWS * LANES * WIDTH
    last = start + (stop - 1 - start) // size * size
    for at in range(start, stop, size):
        first = last - (at - start) + first_columns(LANES, WIDTH, EVEN)
        base_tiles = load_tiles(base, first, stop, ROWS, LANES, WIDTH, EVEN, "evict_first")
        aux_tiles = load_tiles(aux, first, stop, ROWS, LANES, WIDTH, EVEN, "evict_first")
        for i in tl.static_range(ROWS):
            mask = before(first, stop, LANES, WIDTH, EVEN)
            z_base = logits_of(base_tiles[i], base)
            s, z_aux = z_base.scaled, z_base
            if aux.given.ptr is not None:
                z_aux = logits_of(aux_tiles[i], aux)
                s += z_aux.scaled
            w = 1.0
            if weight is not None and k.S is not None:
                w = tl.load(places(weight, first, LANES, WIDTH, EVEN), mask=mask, other=0.0)
            dz = gradient_of_sum(s, z_base.scaled, w, within(LANES, WIDTH, EVEN) == y - first, soft, k)
            store_gradient(grads.base, row, first, mask, dz.base, base, z_base.slope, LANES, WIDTH, EVEN)
            store_gradient(grads.aux, row, first, mask, dz.aux, aux, z_aux.slope, LANES, WIDTH, EVEN)
            if base_lanes is not None:
                base_lanes += sum_of_products(mask, dz.base, z_base.capped)
            if aux_lanes is not None:
                aux_lanes += sum_of_products(mask, dz.aux, z_aux.capped)
            first += LANES * WIDTH
    if base_lanes is not None:
        tl.store(grads.base_scale + row, lane_sum(base_lanes))
    if aux_lanes is not None:
        tl.store(grads.aux_scale + row, lane_sum(aux_lanes))


@triton.jit
def fill(ptr, row, width, start, stop, value, BLOCK: tl.constexpr):
    """Columns [start, stop) of a row of [N, width]."""
    if ptr is not None:
        for first in range(start, stop, BLOCK):
            cols = first + tl.arange(0, BLOCK)
            place = ptr + row * width + cols
            tl.store(place, tl.full([BLOCK], value, ptr.dtype.element_ty), mask=cols < stop)


@triton.jit
def fill_gradients(grads, base, aux, row, start, stop, value, BLOCK: tl.constexpr):
    """Gradients that no formula gives: 0 where the row is ignored, NaN where its target names no class."""
    fill(grads.base, row, base.given.width, start, stop, value, BLOCK)
    fill(grads.aux, row, aux.given.width, start, stop, value, BLOCK)
    if grads.base_scale is not None:
        tl.store(grads.base_scale + row, value)
    if grads.aux_scale is not None:
        tl.store(grads.aux_scale + row, value)


@triton.jit
def fill_tails(grads, base, aux, row, stop, V, BLOCK: tl.constexpr):
    """Columns from V on belong to nobody: 0, written where the row's last columns are."""
    if stop == V:
        fill(grads.base, row, base.given.width, V, base.given.width, 0.0, BLOCK)
        fill(grads.aux, row, aux.given.width, V, aux.given.width, 0.0, BLOCK)
