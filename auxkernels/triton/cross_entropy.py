"""Cross-entropy of summed logits in Triton: row scan, loss with gradients, gradients of the general form, rescaling.

The mathematics is in auxkernels/ops.py, the arithmetic of a row in row_state.py. One program works on one row: it scans the
row's columns and, where gradients are wanted, reads them again, last columns first because those are still in L2. With few
and long rows the segments of a row go to several programs, with the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks, ops
from ..sources import Logits
from . import launch
from .columns import (
    Coefficients,
    Gradients,
    Softmax,
    at_row,
    Source,
    fill_gradients,
    fill_tails,
    gradients_at_row,
    load_logits_at,
    merge_segments,
    read_target,
    scan_row,
    scan_segment,
    write_gradients,
)
from .row_state import NUM_FLOATS, NUM_INTS, merge, nll_of, of_target, one_minus_exp, lane_sum, store_state, column_of

# what the loss is divided by
BY_ONE = tl.constexpr(0)
BY_NORMALIZER = tl.constexpr(1)
BY_KEPT_ROWS = tl.constexpr(2)

NUM_FIELDS = tl.constexpr(len(ops.FIELDS))
NUM_FLOAT_FIELDS = tl.constexpr(ops.NUM_FLOAT_FIELDS)


class RowEnd(NamedTuple):
    """The row fields of ops.FIELDS in their order, then what losses and gradients need besides. None: not wanted."""

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
    residual: Any  # 1 - p of the target
    weight: Any  # sum of the class weights
    target_weight: Any


# -- one row -----------------------------------------------------------------------------------------------------------


@triton.jit
def checked(new_max, denom):
    """(max, denom): a row of -inf alone has no distribution; its running maximum has stepped over NaN, its sum has not."""
    denom = tl.where(new_max == float("-inf"), float("nan"), denom)
    is_number = (denom == denom) | (tl.abs(new_max) == float("inf"))
    return tl.where(is_number, new_max, float("nan")), denom


@triton.jit
def end_of_row(rest, base, aux, weight, y, HAS_TARGET: tl.constexpr):
    """From the state of a row without its target to the row's numbers."""
    whole, w_y = rest, 1.0
    nll, base_nll, residual, base_max, base_log_denom = None, None, None, None, None
    if HAS_TARGET:
        s_y, z_y = load_logits_at(base, aux, y)
        if weight is not None:
            w_y = tl.load(weight + y, mask=y >= 0, other=0.0)
        whole = merge(rest, of_target(s_y, z_y, w_y, rest))
    row_max, denom = checked(whole.max, whole.denom)
    if HAS_TARGET:
        nll, residual = nll_of(rest.max, rest.denom, whole.max, denom, s_y)
    if whole.base_max is not None:
        base_max = whole.base_max
    if whole.base_denom is not None:
        base_max, base_denom = checked(whole.base_max, whole.base_denom)
        base_log_denom = tl.log(base_denom)
        if HAS_TARGET:
            base_nll, _ = nll_of(rest.base_max, rest.base_denom, whole.base_max, base_denom, z_y)
    log_denom = tl.log(denom)
    mean_sum = None if whole.mean_sum is None else tl.math.div_rn(whole.mean_sum, denom)
    mean_base = None if whole.mean_base is None else tl.math.div_rn(whole.mean_base, denom)
    kl_to_base = None
    if mean_sum is not None:
        if mean_base is not None:
            if base_log_denom is not None:
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
        None if mean_sum is None else log_denom - mean_sum,
        kl_to_base,
        None if nll is None else 0.0 - nll,
        None if base_nll is None else 0.0 - base_nll,
        None if whole.argmax is None else column_of(whole.argmax),
        None if whole.base_argmax is None else column_of(whole.base_argmax),
        residual,
        whole.weight,
        w_y,
    )


@triton.jit
def store_fields(float_fields, int_fields, row, num_rows, floats, ints, end, FIELDS: tl.constexpr):
    """The fields of the mask `FIELDS`, [F, num_rows] and [A, num_rows]: `floats`, `ints`, or the row's where these are None."""
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
    """(the row's loss, not divided; its gradient's coefficients, divided).

    kept, share   1 - label_smoothing and label_smoothing / V, or None and None
    """
    a, s = None, None
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
        a = pull if a is None else a + pull
    return loss, Coefficients(a, None, None, None, g, s, None, None)


# -- divisor -----------------------------------------------------------------------------------------------------------


@triton.jit
def kept_rows(target, weight, ignore_index, V, num_rows, BLOCK: tl.constexpr):
    """Number of rows that are not ignored, or the sum of their targets' weights; float32."""
    lanes = tl.zeros([BLOCK], tl.int64 if weight is None else tl.float32)
    for first in range(0, num_rows, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        y = tl.load(target + rows, mask=rows < num_rows, other=0).to(tl.int64)
        kept = (rows < num_rows) & (y != ignore_index)
        if weight is None:
            lanes += kept.to(tl.int64)
        else:
            lanes += tl.load(weight + y, mask=kept & (y >= 0) & (y < V), other=0.0)
    return lane_sum(lanes).to(tl.float32)


@triton.jit
def divisor_of(normalizer, target, weight, ignore_index, V, num_rows, DIVISOR: tl.constexpr, BLOCK: tl.constexpr):
    if DIVISOR == BY_NORMALIZER:
        return tl.load(normalizer).to(tl.float32)
    if DIVISOR == BY_KEPT_ROWS:
        return kept_rows(target, weight, ignore_index, V, num_rows, BLOCK)
    return 1.0


@triton.jit(do_not_specialize=["ignore_index", "num_rows"])
def cross_entropy_divisor_kernel(
    target, weight, ignore_index: tl.int64, V, num_rows: tl.int64, divisor, BLOCK: tl.constexpr
):
    tl.store(divisor, kept_rows(target, weight, ignore_index, V, num_rows, BLOCK))


@triton.jit(do_not_specialize=["ignore_index", "num_rows"])
def cross_entropy_reduce_kernel(
    row_loss,
    loss,
    normalizer,
    target,
    weight,
    ignore_index: tl.int64,
    V,
    num_rows: tl.int64,
    DIVISOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The 0-d loss: a sum in an order that depends on the number of rows alone."""
    lanes = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_rows, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        lanes += tl.load(row_loss + rows, mask=rows < num_rows, other=0.0)
    divisor = divisor_of(normalizer, target, weight, ignore_index, V, num_rows, DIVISOR, BLOCK)
    tl.store(loss, tl.math.div_rn(lane_sum(lanes), divisor))


# -- kernels over rows -------------------------------------------------------------------------------------------------


@triton.jit
def place_of(program, V, SEGMENT: tl.constexpr, SPLIT: tl.constexpr):
    """(row, first column, one past the last, number of segments) of a program; rows in 64 bits."""
    program = program.to(tl.int64)
    if not SPLIT:
        return program, 0, V, 1
    num_segments = tl.cdiv(V, SEGMENT)
    start = (program % num_segments).to(tl.int32) * SEGMENT
    return program // num_segments, start, tl.minimum(start + SEGMENT, V), num_segments


@triton.jit(do_not_specialize=["ignore_index"], do_not_specialize_on_alignment=["weight"])
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
    if not ignored:
        base, aux = at_row(base, row), at_row(aux, row)
        state = scan_segment(base, aux, weight, y, start, stop, WANTED, ROWS, LANES, WIDTH, EVEN)
        store_state(floats, ints, program.to(tl.int64), state)


@triton.jit(do_not_specialize=["ignore_index", "num_rows"], do_not_specialize_on_alignment=["weight"])
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
    base, aux = at_row(base, row), at_row(aux, row)
    if ignored:
        if start == 0:
            store_fields(float_fields, int_fields, row, num_rows, 0.0, -1, None, FIELDS)
            if row_loss is not None:
                tl.store(row_loss + row, 0.0)
        fill_gradients(gradients_at_row(grads, row, base, aux), row, start, stop, 0.0, LANES * WIDTH)
    else:
        if SPLIT:
            rest = merge_segments(floats, ints, row, num_segments, WANTED)
        else:
            rest = scan_row(base, aux, weight, y, V, WANTED, ROWS, LANES, WIDTH, SEGMENT, EVEN)
        end = end_of_row(rest, base, aux, weight, y, target is not None)
        if start == 0:
            # a target that names no class makes the floats NaN; the argmaxes do not depend on it
            if poisoned:
                store_fields(float_fields, int_fields, row, num_rows, float("nan"), None, end, FIELDS)
            else:
                store_fields(float_fields, int_fields, row, num_rows, None, None, end, FIELDS)
        if row_loss is not None:
            divisor = 1.0
            if HAS_GRADIENT:
                divisor = divisor_of(normalizer, target, weight, ignore_index, V, num_rows, DIVISOR, COUNT_BLOCK)
            loss, k = loss_of(end, kept, share, z_loss, divisor)
            if start == 0:
                tl.store(row_loss + row, tl.where(poisoned, float("nan"), loss))
            if HAS_GRADIENT:
                soft = Softmax(end.max, end.log_denom, None, None, end.residual)
                at = gradients_at_row(grads, row, base, aux)
                if poisoned:
                    fill_gradients(at, row, start, stop, float("nan"), LANES * WIDTH)
                else:
                    write_gradients(base, aux, weight, y, start, stop, soft, k, at, row, ROWS, LANES, WIDTH, EVEN)
    fill_tails(gradients_at_row(grads, row, base, aux), base, aux, stop, V, LANES * WIDTH)


@triton.jit
def load_or_none(ptr, row):
    return None if ptr is None else tl.load(ptr + row)


@triton.jit(do_not_specialize=["ignore_index"], do_not_specialize_on_alignment=["weight", "saved", "nll", "coefficients"])
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
    base, aux = at_row(base, row), at_row(aux, row)
    grads = gradients_at_row(grads, row, base, aux)
    if ignored:
        fill_gradients(grads, row, start, stop, 0.0, LANES * WIDTH)
    elif poisoned:
        fill_gradients(grads, row, start, stop, float("nan"), LANES * WIDTH)
    else:
        soft = Softmax(
            tl.load(saved.max + row),
            tl.load(saved.log_denom + row),
            load_or_none(saved.base_max, row),
            load_or_none(saved.base_log_denom, row),
            None if nll is None else one_minus_exp(tl.load(nll + row)),
        )
        k = Coefficients(
            load_or_none(coefficients.A, row),
            load_or_none(coefficients.C, row),
            load_or_none(coefficients.D, row),
            load_or_none(coefficients.Q, row),
            load_or_none(coefficients.G, row),
            load_or_none(coefficients.S, row),
            load_or_none(coefficients.Q_b, row),
            load_or_none(coefficients.B_b, row),
        )
        write_gradients(base, aux, weight, y, start, stop, soft, k, grads, row, ROWS, LANES, WIDTH, EVEN)
    fill_tails(grads, base, aux, stop, V, LANES * WIDTH)


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_rescale_kernel(grad, factor, target, ignore_index: tl.int64, width, BLOCK: tl.constexpr):
    """grad *= factor on the rows that count: 0 * -1 is -0.0 and 0 * inf NaN, which ignored rows must not become."""
    factor = tl.load(factor).to(tl.float32)
    if factor != 1.0:
        program = tl.program_id(0).to(tl.int64)
        blocks = tl.cdiv(width, BLOCK)
        row = program // blocks
        if tl.load(target + row).to(tl.int64) != ignore_index:
            cols = (program % blocks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
            place = grad + row * width + cols
            g = tl.load(place, mask=cols < width, other=0.0).to(tl.float32)
            tl.store(place, (g * factor).to(grad.dtype.element_ty), mask=cols < width)


# -- operators ---------------------------------------------------------------------------------------------------------

COUNT_BLOCK = 1024
COUNTED_IN_PLACE = 2048  # up to here every row's program counts the kept rows itself, which saves a launch
RESCALE_BLOCK = 4096
_PLAIN_FIELDS = ops.mask_of("max", "log_denom", "nll")


class _Call(NamedTuple):
    """Checked arguments, as the kernels take them."""

    problem: tuple  # base, aux, target, weight, ignore_index, V
    num_rows: int
    cut: launch.Cut
    split: bool
    device: launch.Device

    def num_programs(self) -> int:
        return self.num_rows * (triton.cdiv(self.problem[-1], self.cut.segment) if self.split else 1)

    def sizes(self, has_statistics: bool, sums_row: bool) -> dict[str, int]:
        base, aux, *_ = self.problem
        has_bends = sums_row or base.softcap is not None or aux.softcap is not None
        even = self.problem[-1] % 16 == 0  # what Triton compiles for anyway
        return {
            "ROWS": launch.tiles_at_once(has_statistics, has_bends, even, self.device),
            "LANES": self.cut.lanes,
            "WIDTH": self.cut.width,
            "SEGMENT": self.cut.segment,
            "EVEN": even,
            **launch.options(self.cut, has_statistics, has_bends, self.device),
        }


def _call(base, aux, target, weight, base_scale, aux_scale, base_softcap, aux_softcap, ignore_index, V) -> _Call:
    launch.check_problem(base, aux, V)
    device = launch.device_of(base.device)
    num_bytes = max(t.element_size() for t in (base, aux) if t is not None)
    cut = launch.cut_of(V, num_bytes, device)
    num_rows = base.shape[:-1].numel()
    problem = (
        launch.source(base, base_scale, base_softcap),
        launch.source(aux, aux_scale, aux_softcap),
        None if target is None else target.contiguous(),
        launch.aligned(launch.numbers(weight)),
        ignore_index,
        V,
    )
    split = launch.is_split(V, num_rows, cut.segment, device.multiprocessors)
    return _Call(problem, num_rows, cut, split, device)


def _gradients(base: Tensor, aux: Tensor | None, needs: int) -> tuple[list[Tensor], Gradients]:
    if aux is None and needs & (ops.NEEDS_AUX | ops.NEEDS_AUX_SCALE):
        raise ValueError(f"needs must not ask for gradients of aux where aux is None, got {needs}")
    grads = ops.empty_grads(base, aux, needs)
    remaining = iter(grads)
    return grads, Gradients(*(next(remaining) if needs >> i & 1 else None for i in range(4)))


def _forward(call: _Call, wanted: int, fields: list[Tensor], row_loss, divide, terms, grads: Gradients) -> None:
    """Fields and, with a `row_loss`, losses and gradients. divide: (normalizer, mode), terms: (kept, share, z_loss)."""
    scanned = ops.with_sources_of_derived(wanted)
    if terms[1] is not None:
        scanned |= ops.mask_of("weighted_sum")
    has_gradient = any(grad is not None for grad in grads)
    sums_row = grads.base_scale is not None or grads.aux_scale is not None
    call = call._replace(split=call.split and not sums_row)
    sizes = call.sizes(bool(scanned & ~_PLAIN_FIELDS), sums_row)
    floats = ints = None
    if call.split:
        base = call.problem[0].ptr
        floats = base.new_empty(call.num_programs() * NUM_FLOATS.value, dtype=torch.float32)
        ints = base.new_empty(call.num_programs() * NUM_INTS.value, dtype=torch.int64)
        launch.run(
            cross_entropy_segment_kernel,
            call.num_programs(),
            *call.problem,
            floats,
            ints,
            WANTED=scanned,
            **sizes,
        )
    normalizer, divisor = divide
    launch.run(
        cross_entropy_fwd_kernel,
        call.num_programs(),
        *call.problem,
        call.num_rows,
        floats,
        ints,
        next((t for t in fields if t.dtype == torch.float32), None),
        next((t for t in fields if t.dtype == torch.int64), None),
        row_loss,
        normalizer,
        *terms,
        grads,
        FIELDS=wanted,
        WANTED=scanned,
        DIVISOR=divisor if has_gradient else BY_ONE,
        HAS_GRADIENT=has_gradient,
        SPLIT=call.split,
        COUNT_BLOCK=COUNT_BLOCK,
        **sizes,
    )


def _need_target(target: Tensor | None, what: str) -> None:
    if target is None:
        raise ValueError(f"target must be given for {what}, got None")


def scan(
    base, aux, target, weight, base_scale, aux_scale, base_softcap, aux_softcap, ignore_index, vocab_size, wanted
) -> list[Tensor]:
    """ops.cross_entropy_scan: the wanted row fields."""
    if wanted & ops.mask_of("nll", "base_nll", "log_prob", "base_log_prob"):
        _need_target(target, "nll and log_prob")
    call = _call(
        base, aux, target, weight, base_scale, aux_scale, base_softcap, aux_softcap, ignore_index, vocab_size
    )
    fields = ops.empty_fields(base, aux, wanted)
    if fields:
        with launch.on_device_of(base):
            _forward(call, wanted, fields, None, (None, BY_ONE), (None, None, None), Gradients(None, None, None, None))
    return fields


def _divisor(call: _Call, normalizer: Tensor | None, mean: bool, has_gradient: bool) -> tuple[Tensor | None, tl.constexpr]:
    """(0-d tensor on the device or None, what to divide by). Nothing is read from the device."""
    base, _, target, weight, ignore_index, V = call.problem
    if not mean:
        return None, BY_ONE
    if normalizer is not None:
        if normalizer.device != base.ptr.device:  # a number on the CPU
            normalizer = torch.full((), normalizer.item(), dtype=torch.float32, device=base.ptr.device)
        return normalizer.to(torch.float32), BY_NORMALIZER
    if not has_gradient or call.num_rows <= COUNTED_IN_PLACE:
        return None, BY_KEPT_ROWS
    divisor = base.ptr.new_empty((), dtype=torch.float32)
    launch.run(
        cross_entropy_divisor_kernel, 1, target, weight, ignore_index, V, call.num_rows, divisor, BLOCK=COUNT_BLOCK
    )
    return divisor, BY_NORMALIZER


def loss(
    base,
    aux,
    target,
    weight,
    base_scale,
    aux_scale,
    base_softcap,
    aux_softcap,
    ignore_index,
    vocab_size,
    normalizer,
    label_smoothing,
    z_loss,
    mean,
    wanted,
    needs,
) -> list[Tensor]:
    """ops.cross_entropy_loss: the 0-d loss, the wanted row fields, the gradients with the divisor in them."""
    _need_target(target, "a loss")
    call = _call(
        base, aux, target, weight, base_scale, aux_scale, base_softcap, aux_softcap, ignore_index, vocab_size
    )
    if normalizer is not None and normalizer.dim():
        raise ValueError(f"normalizer must be a 0-d tensor, got shape {list(normalizer.shape)}")
    fields = ops.empty_fields(base, aux, wanted)
    grads, named_grads = _gradients(base, aux, needs)
    row_loss = base.new_empty(call.num_rows, dtype=torch.float32)
    total = base.new_empty((), dtype=torch.float32)
    kept = share = None
    if label_smoothing:
        kept, share = 1.0 - label_smoothing, label_smoothing / vocab_size
    with launch.on_device_of(base):
        divide = _divisor(call, normalizer, mean, bool(grads))
        _forward(call, wanted, fields, row_loss, divide, (kept, share, z_loss or None), named_grads)
        normalizer, divisor = divide
        launch.run(
            cross_entropy_reduce_kernel,
            1,
            row_loss,
            total,
            normalizer,
            *call.problem[2:],
            call.num_rows,
            DIVISOR=divisor,
            BLOCK=COUNT_BLOCK,
        )
    return [total, *fields, *grads]


def backward(
    base,
    aux,
    target,
    weight,
    base_scale,
    aux_scale,
    base_softcap,
    aux_softcap,
    ignore_index,
    vocab_size,
    max,
    log_denom,
    nll,
    base_max,
    base_log_denom,
    coefficients,
    needs,
) -> list[Tensor]:
    """ops.cross_entropy_backward: gradients of the general form, one number per row for each coefficient."""
    call = _call(
        base, aux, target, weight, base_scale, aux_scale, base_softcap, aux_softcap, ignore_index, vocab_size
    )
    k = _coefficients(base, coefficients, needs)
    state = {"max": max, "log_denom": log_denom, "nll": nll, "base_max": base_max, "base_log_denom": base_log_denom}
    if k.G is not None or k.B_b is not None:
        _need_target(target, "the coefficients G and B_b")
    required = {"max", "log_denom"}
    required |= {"nll"} if k.G is not None else set()
    required |= {"base_max"} if k.D is not None else set()
    required |= {"base_max", "base_log_denom"} if k.Q is not None or k.Q_b is not None else set()
    for name in sorted(required):
        if state[name] is None:
            raise ValueError(f"{name} must be given for these coefficients, got None")
        launch.check_rows(name, state[name], base)
    state = {name: launch.numbers(value) if name in required else None for name, value in state.items()}
    grads, named_grads = _gradients(base, aux, needs)
    # every program can write its own columns, but a scale's gradient is a sum over the row
    sums_row = bool(needs & (ops.NEEDS_BASE_SCALE | ops.NEEDS_AUX_SCALE))
    call = call._replace(split=vocab_size > call.cut.segment and not sums_row)
    if grads:
        with launch.on_device_of(base):
            launch.run(
                cross_entropy_bwd_kernel,
                call.num_programs(),
                *call.problem,
                Softmax(state["max"], state["log_denom"], state["base_max"], state["base_log_denom"], None),
                state["nll"],
                k,
                named_grads,
                SPLIT=call.split,
                **call.sizes(sum(c is not None for c in k) > 1, sums_row),
            )
    return grads


def _coefficients(base: Tensor, given: list[Tensor | None], needs: int) -> Coefficients:
    if len(given) != len(ops.COEFFICIENTS):
        raise ValueError(f"coefficients must be the {len(ops.COEFFICIENTS)} of ops.COEFFICIENTS, got {len(given)}")
    k = Coefficients(*given)
    for name, value in zip(ops.COEFFICIENTS, given, strict=True):
        launch.check_rows(f"coefficient {name}", value, base)
    if not needs & (ops.NEEDS_BASE | ops.NEEDS_BASE_SCALE):
        k = k._replace(Q_b=None, B_b=None)
    return Coefficients(*map(launch.numbers, k))


def rescale_(grad, factor, target, ignore_index) -> None:
    """ops.cross_entropy_rescale_: grad [*, V] or [*] times a 0-d factor, in place; the factor stays on the device."""
    launch.check_device(grad)
    launch.check_float("grad", grad)
    checks.classes(target)
    if not grad.is_contiguous():
        raise ValueError(f"grad must be contiguous, got strides {grad.stride()}")
    if grad.shape[: target.dim()] != target.shape or grad.dim() > target.dim() + 1:
        raise ValueError(f"grad must be {list(target.shape)} or [*, V] of it, got {list(grad.shape)}")
    if target.device != grad.device:
        raise ValueError(f"target must be on {grad.device}, got {target.device}")
    if factor.dim() or factor.device != grad.device:
        raise ValueError(f"factor must be 0-d and on {grad.device}, got {list(factor.shape)} on {factor.device}")
    if grad.numel() == 0:
        return
    width = grad.numel() // target.numel()
    with launch.on_device_of(grad):
        launch.run(
            cross_entropy_rescale_kernel,
            target.numel() * triton.cdiv(width, RESCALE_BLOCK),
            grad,
            factor.to(torch.float32),
            target.contiguous(),
            ignore_index,
            width,
            BLOCK=RESCALE_BLOCK,
            num_warps=8,
        )
