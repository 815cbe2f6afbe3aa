"""The kernels that scan linear heads: logits are made tile by tile, folded into row states, and never stored.

A program of `head_scan_kernel` has a block of rows and a range of the vocabulary. The products of both heads with a
tile of the vocabulary go to one float32 accumulator, which is then absorbed as any other tile of logits, see
row_state.py. `head_finish_kernel` merges the states of a row in their order and joins the target.

Which lane a column goes to follows from which thread has it after the matrix instruction, so that the loop over tiles
moves nothing between threads: a row's columns go in runs of RUN to PARTS lanes, over and over. A lane is to stand for
neighbouring classes, therefore it is the rows of the weight that are read in another order (`class_of_column`).

Ranks compare every logit with the target's, which `head_target_kernel` makes before the scan.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...tritonlib.primitives import tile_sum, within
from .columns import logits_of, read_target
from .kernels import end_of_logits, store_fields
from .row_state import (
    BASE,
    NUM_FLOATS,
    NUM_INTS,
    TARGET_RANK,
    WEIGHTED_SUM,
    RowState,
    absorb,
    collapse,
    load_state,
    merge,
    no_columns,
    store_state,
)


class HeadRows(NamedTuple):
    """A head as kernels get it. `hidden` None: no such head."""

    hidden: Any  # [N, D]
    stride_hidden_row: Any
    weight: Any  # [>= V, D]
    stride_weight_class: Any
    bias: Any  # [>= V], None: 0
    depth: Any  # D
    scale: Any  # None: 1
    scale_stride: Any
    softcap: Any  # None: none


class HeadBlock(NamedTuple):
    """A head and a block of its rows."""

    given: Any
    first_row: Any
    scale: Any  # [L, 1], of lanes; 1 where none is given


class Place(NamedTuple):
    """What a program works on."""

    block: Any  # of rows
    split: Any  # of the vocabulary
    start: Any  # its first class
    stop: Any  # one past its last


# -- products ----------------------------------------------------------------------------------------------------------


@triton.jit
def scale_of(head, first_row, row):
    """The numbers [L, 1] of lanes whose rows are `row`, counted from the first."""
    scale = 1.0
    if head.scale is not None:
        scale = tl.load(head.scale + first_row * head.scale_stride + row * head.scale_stride)[:, None]
    return scale


@triton.jit
def add_product(total, block, r, start, c, BLOCK_DEPTH: tl.constexpr, EVEN_DEPTH: tl.constexpr):
    """total [R, C] + hidden[r] @ weight[start + c].T, with r [R] and c [C] counted from the tile's first."""
    # a tile spans less than 2**31 elements: one 64-bit pointer and 32-bit distances spare a thread a dozen registers
    k, head = tl.arange(0, BLOCK_DEPTH), block.given
    hidden_at = (r * head.stride_hidden_row)[:, None] + k[None, :]
    weight_at = (c * head.stride_weight_class)[None, :] + k[:, None]
    hidden = head.hidden + block.first_row * head.stride_hidden_row
    weight = head.weight + tl.full([], start, tl.int64) * head.stride_weight_class
    for first in range(0, head.depth, BLOCK_DEPTH):
        if EVEN_DEPTH:
            h, w = tl.load(hidden + first + hidden_at), tl.load(weight + first + weight_at)
        else:
            # both: beyond D lies the next row, and 0 * NaN is NaN
            h = tl.load(hidden + first + hidden_at, mask=k[None, :] < head.depth - first, other=0.0)
            w = tl.load(weight + first + weight_at, mask=k[:, None] < head.depth - first, other=0.0)
        total = tl.dot(h, w, total)
    return total


# -- lanes and strips --------------------------------------------------------------------------------------------------


@triton.jit
def class_of_column(BLOCK_COLS: tl.constexpr, PARTS: tl.constexpr, RUN: tl.constexpr):
    """[C]: which class of a tile a column of the product stands for, such that a lane's classes are neighbours."""
    col = tl.arange(0, BLOCK_COLS)
    part, turn = col // RUN % PARTS, col // (RUN * PARTS)
    return part * (BLOCK_COLS // PARTS) + turn * RUN + col % RUN


@triton.jit
def strips_of(x, PARTS: tl.constexpr, RUN: tl.constexpr, STRIP: tl.constexpr):
    """A product [R, C] as lanes [R * PARTS, C / PARTS], and these as a tuple of [R * PARTS, STRIP]."""
    x = tl.reshape(x, (x.shape[0], x.shape[1] // (PARTS * RUN), PARTS, RUN))
    x = tl.permute(x, (0, 2, 1, 3))
    strips = (tl.reshape(x, (x.shape[0] * PARTS, x.shape[2] * RUN)),)
    for _ in tl.static_range(8):
        if strips[0].shape[1] > STRIP:
            halves = ()
            for i in tl.static_range(len(strips)):
                pair = tl.reshape(strips[i], (strips[i].shape[0], 2, strips[i].shape[1] // 2))
                left, right = tl.split(tl.permute(pair, (0, 2, 1)))
                halves += (left, right)
            strips = halves
    return strips


@triton.jit
def product_of(strips, PARTS: tl.constexpr, RUN: tl.constexpr):
    """The reverse."""
    for _ in tl.static_range(8):
        if len(strips) > 1:
            whole = ()
            for i in tl.static_range(len(strips) // 2):
                pair = tl.permute(tl.join(strips[2 * i], strips[2 * i + 1]), (0, 2, 1))
                whole += (tl.reshape(pair, (pair.shape[0], 2 * pair.shape[2])),)
            strips = whole
    x = tl.reshape(strips[0], (strips[0].shape[0] // PARTS, PARTS, strips[0].shape[1] // RUN, RUN))
    x = tl.permute(x, (0, 2, 1, 3))
    return tl.reshape(x, (x.shape[0], x.shape[1] * PARTS * RUN))


@triton.jit
def of_classes(ptr, v, BLOCK_ROWS: tl.constexpr):
    """A strip of what is given for classes v [PARTS, STRIP], the same for every row."""
    x = tl.broadcast_to(tl.load(ptr + v).to(tl.float32)[None, :, :], (BLOCK_ROWS, v.shape[0], v.shape[1]))
    return tl.reshape(x, (BLOCK_ROWS * v.shape[0], v.shape[1]))


@triton.jit
def strip_logits(product, head, v, BLOCK_ROWS: tl.constexpr):
    """scale * softcap(product + bias)."""
    if head.given.bias is not None:
        product += of_classes(head.given.bias, v, BLOCK_ROWS)
    return logits_of(product, head).scaled


@triton.jit
def classes_of_strip(start, i, V, WIDTH: tl.constexpr, PARTS: tl.constexpr, STRIP: tl.constexpr):
    """[PARTS, STRIP]: classes of the i-th strip of the tile from `start` on; the last class for those beyond it."""
    v = start + i * STRIP + tl.arange(0, PARTS)[:, None] * WIDTH + tl.arange(0, STRIP)[None, :]
    return tl.minimum(v, V - 1)


@triton.jit
def tile_products(
    base,
    aux,
    r,
    start,
    V,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
    STRIP: tl.constexpr,
    TWO: tl.constexpr,
):
    """Strips of the products of a tile: of each head if TWO, otherwise of their sum, with the base's already capped."""
    c = tl.minimum(class_of_column(BLOCK_COLS, PARTS, RUN), V - 1 - start)
    zeros = tl.zeros([r.shape[0], BLOCK_COLS], tl.float32)
    total, aux_strips = add_product(zeros, base, r, start, c, BLOCK_DEPTH, EVEN_DEPTH), ()
    if TWO:
        aux_total = add_product(zeros, aux, r, start, c, BLOCK_DEPTH, EVEN_DEPTH)
        aux_strips = strips_of(aux_total, PARTS, RUN, STRIP)
    elif aux.given.hidden is not None:
        if base.given.softcap is not None or base.given.scale is not None:
            strips, capped = strips_of(total, PARTS, RUN, STRIP), ()
            for i in tl.static_range(len(strips)):
                v = classes_of_strip(start, i, V, BLOCK_COLS // PARTS, PARTS, STRIP)
                capped += (strip_logits(strips[i], base, v, r.shape[0]),)
            total = product_of(capped, PARTS, RUN)
        total = add_product(total, aux, r, start, c, BLOCK_DEPTH, EVEN_DEPTH)
    return strips_of(total, PARTS, RUN, STRIP), aux_strips


@triton.jit
def logits_of_products(product, aux_product, base, aux, v, BLOCK_ROWS: tl.constexpr, TWO: tl.constexpr):
    """(s, z_b) of the classes v, from products as `tile_products` gives them; z_b is s where only s is wanted."""
    if TWO:
        z_base = strip_logits(product, base, v, BLOCK_ROWS)
        s = z_base + strip_logits(aux_product, aux, v, BLOCK_ROWS)
    elif aux.given.hidden is None:
        s = strip_logits(product, base, v, BLOCK_ROWS)
        z_base = s
    else:
        s = strip_logits(product, aux, v, BLOCK_ROWS)
        if base.given.bias is not None and base.given.softcap is None and base.given.scale is None:
            s += of_classes(base.given.bias, v, BLOCK_ROWS)
        z_base = s
    return s, z_base


# -- programs ----------------------------------------------------------------------------------------------------------


@triton.jit
def place_of_program(V, num_blocks, num_splits, split_size, blocks_together):
    """Programs of one range and neighbouring blocks of rows come together: they read the same weights at a time."""
    program = tl.program_id(0)
    first = program // (blocks_together * num_splits) * blocks_together
    together = tl.minimum(num_blocks - first, blocks_together)
    within_group = program - first * num_splits
    block, split = first + within_group % together, within_group // together
    start = split * split_size
    return Place(block, split, start, tl.minimum(start + split_size, V))


@triton.jit(do_not_specialize=["ignore_index", "num_rows"])
def head_target_kernel(
    base,
    aux,
    target,
    ignore_index: tl.int64,
    V,
    num_rows: tl.int64,
    target_logits,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    TWO: tl.constexpr,
):
    """Each row's logits (s_y, z_y) at its target, of no meaning where that is no class: [num_rows, 2].

    The product of a block of rows and of their targets' weights, of which only the diagonal counts: one tile more than
    all those of the vocabulary. A dot product of each row by itself would be less, but it adds in another order than
    the matrix instructions of the scan, and classes with the target's very weights would not all tie.
    """
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    last_row = tl.minimum(num_rows - 1 - first_row, BLOCK_ROWS - 1).to(tl.int32)
    row = tl.arange(0, BLOCK_ROWS)
    r = tl.minimum(row, last_row)
    y, _, _ = read_target(target + first_row, r, ignore_index, V)
    c = tl.maximum(y, 0).to(tl.int64)  # these classes are no tile: 32 bits need not hold their distances
    v = c[None, :]
    base_rows = HeadBlock(base, first_row, scale_of(base, first_row, r))
    aux_rows = HeadBlock(aux, first_row, scale_of(aux, first_row, r))
    zeros = tl.zeros([BLOCK_ROWS, BLOCK_ROWS], tl.float32)
    product, aux_product = add_product(zeros, base_rows, r, 0, c, BLOCK_DEPTH, EVEN_DEPTH), 0.0
    if TWO:
        aux_product = add_product(zeros, aux_rows, r, 0, c, BLOCK_DEPTH, EVEN_DEPTH)
    elif aux.hidden is not None:
        if base.softcap is not None or base.scale is not None:
            product = strip_logits(product, base_rows, v, BLOCK_ROWS)
        product = add_product(product, aux_rows, r, 0, c, BLOCK_DEPTH, EVEN_DEPTH)
    s, z_base = logits_of_products(product, aux_product, base_rows, aux_rows, v, BLOCK_ROWS, TWO)
    is_own, place = row[:, None] == row[None, :], target_logits + 2 * (first_row + row)
    tl.store(place, tl.sum(tl.where(is_own, s, 0.0), axis=1), mask=row <= last_row)
    tl.store(place + 1, tl.sum(tl.where(is_own, z_base, 0.0), axis=1), mask=row <= last_row)


@triton.jit(do_not_specialize=["ignore_index", "num_rows", "num_blocks", "num_splits", "split_size", "blocks_together"])
def head_scan_kernel(
    base,
    aux,
    target,
    weight,
    ignore_index: tl.int64,
    V,
    num_rows: tl.int64,
    num_blocks: tl.int32,
    num_splits: tl.int32,
    split_size: tl.int32,
    blocks_together: tl.int32,
    floats,
    ints,
    target_logits,
    WANTED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
    STRIP: tl.constexpr,
    TWO: tl.constexpr,
):
    """States of a block of rows and a range of classes, [num_splits, rows of all blocks, PARTS], without the targets.

    target_logits   as many pairs (s_y, z_y), 0 but for the state that has the target's column. Where ranks are wanted,
                    those that `head_target_kernel` has made are read instead.
    A block of ignored rows alone writes nothing.
    """
    HAS_TO_FIND_TARGETS: tl.constexpr = target is not None and not (TARGET_RANK & WANTED)
    LANES: tl.constexpr = BLOCK_ROWS * PARTS
    WIDTH: tl.constexpr = BLOCK_COLS // PARTS
    at = place_of_program(V, num_blocks, num_splits, split_size, blocks_together)
    first_row = at.block.to(tl.int64) * BLOCK_ROWS  # other rows are counted from it, in 32 bits
    last_row = tl.minimum(num_rows - 1 - first_row, BLOCK_ROWS - 1).to(tl.int32)
    lane = tl.arange(0, LANES)
    # unsigned: the sign of a distance would take a register of its own through all of the scan
    part, row = lane % PARTS, tl.minimum(lane // PARTS, last_row).to(tl.uint32)
    # beyond the last row and the last class the last one is read again: products need no mask there
    y, ignored, _ = read_target(None if target is None else target + first_row, row, ignore_index, V)
    counts = lane // PARTS <= last_row
    if target is None:
        y = tl.full([LANES], -1, tl.int32)
    else:
        counts = counts & (ignored == 0)
    if tl.max(counts.to(tl.int32), axis=0) > 0:
        base_rows = HeadBlock(base, first_row, scale_of(base, first_row, row))
        aux_rows = HeadBlock(aux, first_row, scale_of(aux, first_row, row))
        r = tl.minimum(tl.arange(0, BLOCK_ROWS), last_row)
        lanes = no_columns([LANES], WANTED)
        s_y, z_y = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
        y_in_lane = (y - part * WIDTH)[:, None]
        ranked = 0.0
        if TARGET_RANK & WANTED:
            ranked = tl.load(target_logits + 2 * first_row + 2 * row)[:, None]
        for start in range(at.start, at.stop, BLOCK_COLS):
            products, aux_products = tile_products(
                base_rows, aux_rows, r, start, V, BLOCK_COLS, BLOCK_DEPTH, EVEN_DEPTH, PARTS, RUN, STRIP, TWO
            )
            # a strip at a time: registers are full of logits, there are none for a copy of each
            for i in tl.static_range(WIDTH // STRIP):
                v = classes_of_strip(start, i, V, WIDTH, PARTS, STRIP)
                aux_product = aux_products[i] if TWO else 0.0
                s, z_base = logits_of_products(products[i], aux_product, base_rows, aux_rows, v, BLOCK_ROWS, TWO)
                w = None
                if weight is not None and WEIGHTED_SUM & WANTED:
                    # made of the logits as well: else the sums over w get a layout of their own, and shared memory
                    w = tl.where(s == s, of_classes(weight, v, BLOCK_ROWS), float("nan"))
                first = start + i * STRIP + (part * WIDTH)[:, None]
                here = within(LANES, STRIP, True)
                at_y = here + (start + i * STRIP) == y_in_lane
                if HAS_TO_FIND_TARGETS:
                    s_y += tile_sum(tl.where(at_y, s, 0.0))
                    if BASE & WANTED:
                        z_y += tile_sum(tl.where(at_y, z_base, 0.0))
                lanes = absorb(lanes, s, z_base, w, first, first + here < V, at_y, ranked, WANTED, True)
        state = (at.split.to(tl.int64) * num_blocks + at.block) * LANES
        store_state(floats + state * NUM_FLOATS, ints + state * NUM_INTS, lane, lanes, WANTED)
        if HAS_TO_FIND_TARGETS:
            tl.store(target_logits + 2 * state + 2 * lane, s_y)
            if BASE & WANTED:
                tl.store(target_logits + 2 * state + 2 * lane + 1, z_y)


@triton.jit
def merge_states(
    floats, ints, row, num_splits, states_per_split, WANTED: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr
):
    """The state of a row from the states that programs have stored, LANES at a time."""
    state, nothing = no_columns([], WANTED), no_columns([LANES], WANTED)
    num_states = num_splits * PARTS
    for first in range(0, num_states, LANES):
        i = first + tl.arange(0, LANES)
        j = tl.minimum(i, num_states - 1)
        stored = load_state(floats, ints, j // PARTS * states_per_split + row * PARTS + j % PARTS, WANTED)
        is_one = i < num_states
        lanes = RowState(
            tl.where(is_one, stored.max, nothing.max),
            tl.where(is_one, stored.denom, nothing.denom),
            tl.where(is_one, stored.mean_sum, nothing.mean_sum),
            tl.where(is_one, stored.mean_base, nothing.mean_base),
            tl.where(is_one, stored.base_max, nothing.base_max),
            tl.where(is_one, stored.base_denom, nothing.base_denom),
            tl.where(is_one, stored.weighted_sum, nothing.weighted_sum),
            tl.where(is_one, stored.weight, nothing.weight),
            tl.where(is_one, stored.argmax, nothing.argmax),
            tl.where(is_one, stored.base_argmax, nothing.base_argmax),
            tl.where(is_one, stored.num_above, nothing.num_above),
        )
        state = merge(state, collapse(lanes, WANTED), WANTED)
    return state


@triton.jit(do_not_specialize=["ignore_index", "num_rows", "num_splits", "split_size", "states_per_split"])
def head_finish_kernel(
    target,
    weight,
    ignore_index: tl.int64,
    V,
    num_rows: tl.int64,
    num_splits: tl.int32,
    split_size: tl.int32,
    states_per_split: tl.int64,
    floats,
    ints,
    target_logits,
    float_fields,
    int_fields,
    FIELDS: tl.constexpr,
    WANTED: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """The fields of a row from its states and its target's logits."""
    row = tl.program_id(0).to(tl.int64)
    y, ignored, poisoned = read_target(target, row, ignore_index, V)
    if ignored:
        store_fields(float_fields, int_fields, row, num_rows, 0.0, -1, None, FIELDS)
    else:
        rest = merge_states(floats, ints, row, num_splits, states_per_split, WANTED, PARTS, LANES)
        s_y, z_y, w_y = 0.0, 0.0, 1.0
        if target is not None:
            place = target_logits + 2 * row
            if not (TARGET_RANK & WANTED):
                part = y % split_size % BLOCK_COLS // (BLOCK_COLS // PARTS)
                place = target_logits + 2 * (y // split_size * states_per_split + row * PARTS + part)
            s_y = tl.load(place, mask=y >= 0, other=0.0)
            z_y = s_y
            if BASE & WANTED:
                z_y = tl.load(place + 1, mask=y >= 0, other=0.0)
            if weight is not None:
                w_y = tl.load(weight + y, mask=y >= 0, other=0.0)
        end = end_of_logits(rest, y, s_y, z_y, w_y, WANTED, target is not None)
        if poisoned:
            store_fields(float_fields, int_fields, row, num_rows, float("nan"), None, end, FIELDS)
        else:
            store_fields(float_fields, int_fields, row, num_rows, None, None, end, FIELDS)
