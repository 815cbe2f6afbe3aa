"""Cross-entropy of summed logits in Triton: from the arguments of the operators, checked in ops.py, to launches."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...tritonlib import launch
from .. import ops
from .columns import Coefficients, Gradients, Softmax, Source
from .kernels import (
    BY_KEPT_ROWS,
    BY_NORMALIZER,
    BY_ONE,
    BY_PARTS,
    cross_entropy_bwd_kernel,
    cross_entropy_fwd_kernel,
    cross_entropy_parts_kernel,
    cross_entropy_reduce_kernel,
    cross_entropy_rescale_kernel,
    cross_entropy_segment_kernel,
)
from .row_state import NUM_FLOATS, NUM_INTS

REDUCE_BLOCK = 1024
FEW_ROWS = 2048  # up to here one program sums the losses and every row's counts the kept rows, which saves launches
COUNT_BLOCK = 256
RESCALE_BLOCK = 2048
RESCALE_PROGRAMS = 8  # for each multiprocessor, as many as one of sm_90 holds at a time
_PLAIN_FIELDS = ops.mask_of("max", "log_denom", "nll", "lse", "log_prob")
_NO_GRADIENTS = Gradients(None, None, None, None)


class _Problem(NamedTuple):
    """The leading arguments of the kernels over rows."""

    base: Source
    aux: Source
    target: Tensor | None
    weight: Tensor | None
    ignore_index: int
    vocab_size: int


class _Call(NamedTuple):
    """A problem and how its kernels are launched."""

    problem: _Problem
    num_rows: int
    cut: launch.Cut
    is_split: bool
    device: launch.Device

    def num_programs(self) -> int:
        return self.num_rows * (triton.cdiv(self.problem.vocab_size, self.cut.segment) if self.is_split else 1)

    def options(self, has_statistics: bool, sums_row: bool) -> dict[str, int]:
        """Constants of the kernels over rows, and launch options."""
        has_bends = sums_row or self.problem.base.softcap is not None or self.problem.aux.softcap is not None
        is_even = self.problem.vocab_size % 16 == 0  # Triton compiles a kernel for this and one for the rest anyway
        return {
            "ROWS": launch.tiles_at_once(not (has_statistics or has_bends), is_even, self.device),
            "LANES": self.cut.lanes,
            "WIDTH": self.cut.width,
            "SEGMENT": self.cut.segment,
            "EVEN": is_even,
            **launch.options(self.cut, has_bends, self.device),
        }


def _call(base, aux, target, weight, base_scale, aux_scale, base_softcap, aux_softcap, ignore_index, V) -> _Call:
    launch.check(base, aux, V)
    device = launch.device_of(base.device)
    num_bytes = max(t.element_size() for t in (base, aux) if t is not None)
    is_bent = any(option is not None for option in (base_scale, aux_scale, base_softcap, aux_softcap))
    cut = launch.cut_of(V, num_bytes, is_bent, device)
    num_rows = base.shape[:-1].numel()
    problem = _Problem(
        launch.source(base, base_scale, base_softcap),
        launch.source(aux, aux_scale, aux_softcap),
        None if target is None else target.contiguous(),
        launch.numbers(weight),
        ignore_index,
        V,
    )
    return _Call(problem, num_rows, cut, launch.is_split(V, num_rows, cut.segment, device), device)


def _gradients(base: Tensor, aux: Tensor | None, needs: int, given: list | None) -> tuple[list[Tensor], Gradients]:
    """Room for the requested gradients, in their order and by name."""
    grads = ops.empty_grads(base, aux, needs) if given is None else given
    remaining = iter(grads)
    return grads, Gradients(*(next(remaining) if needs >> i & 1 else None for i in range(4)))


def _sums_row(grads: Gradients) -> bool:
    """A scale's gradient is a sum over its row, which is then not split."""
    return grads.base_scale is not None or grads.aux_scale is not None


def _forward(call: _Call, wanted: int, fields: list[Tensor], row_loss, divide, terms, grads: Gradients) -> None:
    """Fields and, with a `row_loss`, losses and gradients. divide: (normalizer, mode), terms: (kept, share, z_loss)."""
    scanned = ops.with_sources_of_derived(wanted)
    if terms[1] is not None:
        scanned |= ops.mask_of("weighted_sum")
    call = call._replace(is_split=call.is_split and not _sums_row(grads))
    options = call.options(bool(scanned & ~_PLAIN_FIELDS), _sums_row(grads))
    floats = ints = None
    if call.is_split:
        values = call.problem.base.ptr
        floats = values.new_empty(call.num_programs() * NUM_FLOATS.value, dtype=torch.float32)
        ints = values.new_empty(call.num_programs() * NUM_INTS.value, dtype=torch.int64)
        args = (*call.problem, floats, ints)
        launch.run(cross_entropy_segment_kernel, call.num_programs(), *args, WANTED=scanned, **options)
    normalizer, divisor = divide
    has_gradient = any(grad is not None for grad in grads)
    launch.run(
        cross_entropy_fwd_kernel,
        call.num_programs(),
        *call.problem,
        call.num_rows,
        floats,
        ints,
        next((stacked for stacked in fields if stacked.dtype == torch.float32), None),
        next((stacked for stacked in fields if stacked.dtype == torch.int64), None),
        row_loss,
        normalizer,
        *terms,
        grads,
        FIELDS=wanted,
        WANTED=scanned,
        DIVISOR=divisor if has_gradient else BY_ONE,
        HAS_GRADIENT=has_gradient,
        SPLIT=call.is_split,
        COUNT_BLOCK=COUNT_BLOCK,
        **options,
    )


def scan(
    base, aux, target, weight, base_scale, aux_scale, base_softcap, aux_softcap, ignore_index, vocab_size, wanted
) -> list[Tensor]:
    """The wanted fields of every row; arguments as in ops.py."""
    call = _call(base, aux, target, weight, base_scale, aux_scale, base_softcap, aux_softcap, ignore_index, vocab_size)
    fields = ops.empty_fields(base, aux, wanted)
    if fields:
        with launch.on_device_of(base):
            _forward(call, wanted, fields, None, (None, BY_ONE), (None, None, None), _NO_GRADIENTS)
    return fields


def _parts(call: _Call, row_loss: Tensor | None, has_kept: bool) -> tuple[Tensor | None, Tensor | None]:
    """Sums over blocks of rows: of the losses, where there are any, and of what keeps a row."""
    num_parts = triton.cdiv(call.num_rows, REDUCE_BLOCK)
    losses, kept = (
        call.problem.base.ptr.new_empty(num_parts, dtype=torch.float64) if wanted else None
        for wanted in (row_loss is not None, has_kept)
    )
    args = (row_loss, *call.problem[2:], call.num_rows, losses, kept)
    launch.run(cross_entropy_parts_kernel, num_parts, *args, BLOCK=REDUCE_BLOCK, num_warps=8)
    return losses, kept


def _reduce(call: _Call, parts: Tensor, total: Tensor, normalizer: Tensor | None, divisor: int) -> None:
    """total, 0-d: the sum of `parts`, divided."""
    _, _, target, weight, *numbers = call.problem
    if divisor != BY_KEPT_ROWS:
        target = weight = None
    args = (parts, parts.numel(), total, normalizer, target, weight, *numbers, call.num_rows)
    launch.run(cross_entropy_reduce_kernel, 1, *args, DIVISOR=divisor, BLOCK=REDUCE_BLOCK)


def _divisor(call: _Call, normalizer: Tensor | None, mean: bool, has_gradient: bool) -> tuple:
    """(0-d tensor on the device or None, what to divide by). Nothing is read from the device."""
    values = call.problem.base.ptr
    if not mean:
        return None, BY_ONE
    if normalizer is not None:
        if normalizer.device != values.device:  # a number on the CPU, beside sources on a GPU
            normalizer = torch.full((), normalizer.item(), dtype=torch.float64, device=values.device)
        return (normalizer.to(torch.float32) if normalizer.dtype == torch.bool else normalizer), BY_NORMALIZER
    if not has_gradient or call.num_rows <= FEW_ROWS:
        return None, BY_KEPT_ROWS
    divisor = values.new_empty((), dtype=torch.float64)
    _, kept = _parts(call, None, True)
    _reduce(call, kept, divisor, None, BY_ONE)
    return divisor, BY_NORMALIZER


def _total(call: _Call, row_loss: Tensor, total: Tensor, normalizer: Tensor | None, divisor: int) -> None:
    """The reduced loss. Its bits depend on the number of rows alone, as what is added to what does."""
    if call.num_rows > FEW_ROWS:
        row_loss, kept = _parts(call, row_loss, divisor == BY_KEPT_ROWS)
        if kept is not None:
            normalizer, divisor = kept, BY_PARTS
    _reduce(call, row_loss, total, normalizer, divisor)


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
    grads: list[Tensor] | None = None,
) -> list[Tensor]:
    """The reduced loss, the wanted fields and the requested gradients, divided too; arguments as in ops.py.

    grads   where the gradients go, contiguous and as wide as the sources, in any dtype; not the sources' own memory.
    """
    call = _call(base, aux, target, weight, base_scale, aux_scale, base_softcap, aux_softcap, ignore_index, vocab_size)
    fields = ops.empty_fields(base, aux, wanted)
    grads, named_grads = _gradients(base, aux, needs, grads)
    row_loss = base.new_empty(call.num_rows, dtype=torch.float32)
    total = base.new_empty((), dtype=torch.float32)
    kept = share = None
    if label_smoothing:
        kept, share = 1.0 - label_smoothing, label_smoothing / vocab_size
    with launch.on_device_of(base):
        divide = _divisor(call, normalizer, mean, bool(grads))
        _forward(call, wanted, fields, row_loss, divide, (kept, share, z_loss or None), named_grads)
        _total(call, row_loss, total, *divide)
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
    grads: list[Tensor] | None = None,
) -> list[Tensor]:
    """The requested gradients for one number per row and coefficient; arguments as in ops.py, `grads` as for `loss`."""
    call = _call(base, aux, target, weight, base_scale, aux_scale, base_softcap, aux_softcap, ignore_index, vocab_size)
    k = _coefficients(base, coefficients, needs)
    saved = {"max": max, "log_denom": log_denom, "nll": nll, "base_max": base_max, "base_log_denom": base_log_denom}
    for name in _state_of(k):
        if saved[name] is None:
            raise ValueError(f"{name} must be given for these coefficients, got None")
        launch.check_rows(name, saved[name], base)
    saved = {name: launch.numbers(saved[name]) if name in _state_of(k) else None for name in saved}
    nll = saved.pop("nll")
    grads, named_grads = _gradients(base, aux, needs, grads)
    call = call._replace(is_split=vocab_size > call.cut.segment and not _sums_row(named_grads))
    options = call.options(sum(c is not None for c in k) > 1, _sums_row(named_grads))
    if grads:
        with launch.on_device_of(base):
            args = (*call.problem, Softmax(**saved, residual=None), nll, k, named_grads)
            launch.run(cross_entropy_bwd_kernel, call.num_programs(), *args, SPLIT=call.is_split, **options)
    return grads


def _state_of(k: Coefficients) -> set[str]:
    """What of a row's saved state these coefficients need."""
    needed = {"max", "log_denom"}
    if k.G is not None:
        needed.add("nll")
    if k.D is not None or k.Q is not None or k.Q_b is not None:
        needed.add("base_max")
    if k.Q is not None or k.Q_b is not None:
        needed.add("base_log_denom")
    return needed


def _coefficients(base: Tensor, given: list[Tensor | None], needs: int) -> Coefficients:
    k = Coefficients(*given)
    for name, value in zip(ops.COEFFICIENTS, given, strict=True):
        launch.check_rows(f"coefficient {name}", value, base)
    if not needs & (ops.NEEDS_BASE | ops.NEEDS_BASE_SCALE):
        k = k._replace(Q_b=None, B_b=None)
    return Coefficients(*map(launch.numbers, k))


def rescale_(grad: Tensor, factor: Tensor, target: Tensor | None, ignore_index: int) -> None:
    """grad [*, V] *= factor (0-d, read on the device) in place, but for ignored rows, which stay +0.0."""
    launch.check(grad, None, 1)
    if grad.numel() == 0:
        return
    num_rows, width = grad.shape[:-1].numel(), grad.shape[-1]
    if target is None and grad.numel() <= launch.MAX_INT32:  # narrow rows would leave most of a block empty
        num_rows, width = 1, grad.numel()
    args = (grad, factor, None if target is None else target.contiguous(), ignore_index, num_rows, width)
    most = RESCALE_PROGRAMS * max(launch.device_of(grad.device).multiprocessors, 1)
    num_programs = min(num_rows * triton.cdiv(width, RESCALE_BLOCK), most)
    with launch.on_device_of(grad):
        launch.run(cross_entropy_rescale_kernel, num_programs, *args, BLOCK=RESCALE_BLOCK, num_warps=8)
