"""Cross-entropy over chunks of rows: what ops.py does for one or two matrices of logits, for any sources.

A source is given by five entries: `values` (logits or hidden states), `weight`, `bias` and `scale` in the list `parts`,
and `softcap` (0: none). The first `num_base` sources are the base. Gradients come back for the entries of `parts` that
`needs` names, in their order; a scale's as one number per row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks, dispatch
from ..heads.products import operand_dtype, plan_of
from ..heads.rows import Rows, chunks_of, rows_that_count, settings
from ..heads.shared_weights import Part, as_one, groups_of
from ..heads.sides import Buffers, Setting, are_one_product, bytes_per_row, side_of
from . import ops

_SOURCES = (
    "Tensor?[] parts, float[] softcaps, int num_base, ScalarType? autocast, Tensor? target, Tensor? weight, "
    "int ignore_index, SymInt vocab_size"
)
_library = torch.library.Library("auxkernels", "FRAGMENT")
_library.define(f"chunked_cross_entropy_scan({_SOURCES}, int wanted, str backend) -> Tensor[]")
_library.define(
    f"chunked_cross_entropy_loss({_SOURCES}, Tensor? normalizer, float label_smoothing, float z_loss, bool mean, "
    "int wanted, bool[] needs, str backend) -> Tensor[]"
)
_library.define(
    f"chunked_cross_entropy_backward({_SOURCES}, Tensor max, Tensor log_denom, Tensor? nll, Tensor? base_max, "
    "Tensor? base_log_denom, Tensor?[] coefficients, bool[] needs, str backend) -> Tensor[]"
)
scan = torch.ops.auxkernels.chunked_cross_entropy_scan.default
loss = torch.ops.auxkernels.chunked_cross_entropy_loss.default
backward = torch.ops.auxkernels.chunked_cross_entropy_backward.default


class Sources(NamedTuple):
    """The leading arguments of the ops."""

    parts: list[Tensor | None]
    softcaps: list[float]
    num_base: int
    autocast: torch.dtype | None
    target: Tensor | None
    weight: Tensor | None
    ignore_index: int
    vocab_size: int

    def as_parts(self) -> list[Part]:
        return [Part(*self.parts[4 * i : 4 * i + 4], cap or None) for i, cap in enumerate(self.softcaps)]

    def sides(self, of_sources: list) -> list[list]:
        """One entry for each source, as those of the base and those of the auxiliary."""
        return [list(of_sources[: self.num_base]), list(of_sources[self.num_base :])]

    def first(self) -> Tensor:
        return self.parts[0]

    def shape(self) -> torch.Size:
        return self.first().shape[:-1]

    def compute(self) -> torch.dtype:
        is_double = any(values.dtype == torch.float64 for values in self.parts[0::4])
        return torch.float64 if is_double else torch.float32

    def ignored(self) -> Tensor | None:
        return None if self.target is None else ops.is_ignored(self.target, self.ignore_index)


class ChunkedCall:
    """One call: its rows, its sides, and what the row kernels are given for each chunk.

    is_base_wanted   whether the base counts by itself; otherwise its products and the auxiliary's become one where they
                     can
    keeps_wide       whether gradients of float16 heads stay in float32
    """

    def __init__(
        self, sources: Sources, needs: list[bool], backend: str, is_base_wanted: bool, keeps_wide: bool = False
    ):
        is_cuda = sources.first().is_cuda
        self.sources, self.in_place = sources, backend == "native" and not is_cuda
        self.kernels = dispatch.implementation("cross_entropy", backend, is_cuda=is_cuda)
        parts, num = sources.as_parts(), len(sources.softcaps)
        of_source = [list(needs[4 * i : 4 * i + 4]) or [False] * 4 for i in range(num)]
        groups = groups_of(parts, of_source, sources.num_base, sources.autocast, is_base_wanted)
        ones = [[as_one([parts[i] for i in group]) for group in side] for side in groups]
        if not is_base_wanted and are_one_product([*ones[0], *ones[1]], sources.autocast):
            groups, ones = ([*groups[0], *groups[1]], []), [[*ones[0], *ones[1]], []]  # the auxiliary's onto the base's
        self.order = [i for side in groups for group in side for i in group]
        ignored = sources.ignored()
        self.rows = rows_that_count(sources.shape(), ignored, _fewest_to_drop(parts, sources.shape().numel()))
        wants = [[any(any(of_source[i]) for i in group) for group in side] for side in groups]
        shared = (sources.vocab_size, sources.compute(), sources.autocast)
        row_bytes = bytes_per_row(ones, wants, *shared, self.in_place, self.rows.keeps_all())
        self.chunks = chunks_of(self.rows.num_rows, row_bytes, settings.budget(sources.first().device))
        if ignored is not None:
            ignored = None if self.rows.kept is not None else ignored.flatten()
        setting = Setting(self.rows, self.chunks, ignored, *shared, self.in_place, keeps_wide)
        buffers = Buffers(setting, sources.first())
        self.base, self.aux = (
            side_of(_picked(parts, side), setting, _picked(of_source, side), buffers) for side in groups
        )

    def leading(self, start: int, stop: int) -> tuple:
        """The ten arguments that every op of ops.py begins with, for one chunk."""
        base, aux, sources = self.base.operand(start, stop), self.aux.operand(start, stop), self.sources
        target = None if sources.target is None else self.rows.take(sources.target, start, stop)
        return (
            *(base.values, aux.values, target, sources.weight, base.scale, aux.scale, base.softcap, aux.softcap),
            *(sources.ignore_index, sources.vocab_size),
        )

    def room_for_gradients(self, start: int, stop: int) -> tuple[int, list[Tensor]]:
        """(mask of the gradients that the row kernels are to give, where they go)."""
        needs = (self.base.needs(), self.aux.needs())
        room = [
            side.gradient_buffer(start, stop) for side, (n, _) in zip((self.base, self.aux), needs, strict=True) if n
        ]
        for _, needs_scale in needs:
            if needs_scale:
                room.append(self.sources.first().new_empty(stop - start, dtype=self.sources.compute()))
        bits = (needs[0][0], needs[1][0], needs[0][1], needs[1][1])
        return sum(1 << i for i, bit in enumerate(bits) if bit), room

    def take_gradients(self, start: int, stop: int, mask: int, grads: list[Tensor]) -> None:
        given = iter(grads)
        base, aux, base_scale, aux_scale = (next(given) if mask >> i & 1 else None for i in range(4))
        self.base.take_gradient(start, stop, base, base_scale)
        self.aux.take_gradient(start, stop, aux, aux_scale)

    def gradients(self, needs: list[bool]) -> list[Tensor]:
        grads = self.base.gradients() + self.aux.gradients()
        of_source = {i: grads[4 * place : 4 * place + 4] for place, i in enumerate(self.order)}
        grads = [grad for i in range(len(of_source)) for grad in of_source[i]]
        return [grad for grad, need in zip(grads, needs, strict=True) if need]

    def new_fields(self, wanted: int) -> list[Tensor]:
        """Room for the wanted fields of all rows, those of the rows that are left out filled."""
        fields = ops.empty_rows(self.sources.first(), self.sources.shape(), self.sources.compute(), wanted)
        if self.rows.kept is not None:
            for stacked in fields:
                stacked.fill_(0 if stacked.is_floating_point() else -1)
        return fields

    def put_fields(self, start: int, stop: int, fields: list[Tensor], of_chunk: list[Tensor]) -> None:
        for stacked, rows in zip(fields, of_chunk, strict=True):
            self.rows.put(stacked.view(len(stacked), -1).T, start, stop, rows.T)

    def divisor(self, normalizer: Tensor | None, mean: bool) -> Tensor:
        """What the summed loss is divided by: float64, 0-d, on the sources' device."""
        sources = self.sources
        like = sources.first().new_ones((), dtype=torch.float64)
        if not mean:
            return like
        if normalizer is not None:
            return normalizer.to(like)
        counts = ~sources.ignored()
        if sources.weight is None:
            return counts.sum().to(like)
        classes = sources.target.long()
        in_range = counts & (classes >= 0) & (classes < sources.vocab_size)
        return torch.where(in_range, sources.weight[classes.where(in_range, 0)].to(like), 0.0).sum()


def _picked(of_sources: list, groups: list[list[int]]) -> list[list]:
    """What belongs to the sources of each group."""
    return [[of_sources[i] for i in group] for group in groups]


def _fewest_to_drop(parts: list[Part], num_rows: int) -> int | None:
    """From how many ignored rows on leaving them out saves work; None: never, there is no product.

    Materialised logits have to be copied without them: as dear as the rest of their row, so half of the rows must go.
    """
    if all(part.weight is None for part in parts):
        return None
    return 1 if all(part.weight is not None for part in parts) else max(num_rows // 2, 1)


def _op(function):
    """An implementation: checked like any raw call, out of autograd's and autocast's sight."""

    def run(*args):
        sources, rest, backend = Sources(*args[:8]), args[8:-1], args[-1]
        checks.chunked_sources(sources)
        device = sources.first().device
        if backend == "native" and device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"the sources must be CPU or CUDA tensors for backend='native', got {device}")
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            if sources.target is not None:  # all of them, before a chunk's are used
                ops.raise_out_of_range(sources.target, sources.vocab_size, sources.ignore_index)
            return function(sources, *rest, backend)

    return run


def _in_half(sources: Sources, needs: list[bool]) -> tuple[Sources, bool]:
    """(the sources, whether float16 gradients of logits enter products).

    Such gradients are formed at a size of one, so that they do not underflow, and brought to their own in float32. That
    goes for all gradients of a call or for none: beside others, float16 heads are computed in float32.
    """
    is_half, is_other = False, False
    for i, part in enumerate(sources.as_parts()):
        if any(needs[4 * i : 4 * i + 3]):
            plan = None
            if part.weight is not None:
                plan = plan_of(part.values.dtype, sources.autocast, part.values.device)
            if plan is not None and plan.operands == torch.float16:
                is_half = True
            else:
                is_other = True
    if is_half and is_other:
        return sources._replace(autocast=torch.float32), False
    return sources, is_half


def _scaled(grads: list[Tensor], factor: Tensor, sources: Sources, needs: list[bool]) -> list[Tensor]:
    """grads * factor in place; ignored rows, and classes from vocab_size on, stay +0.0 whatever the factor."""
    ignored = sources.ignored()
    kinds = [i % 4 for i, need in enumerate(needs) if need]
    for kind, grad in zip(kinds, grads, strict=True):
        counted = grad[: sources.vocab_size] if kind in (1, 2) else grad
        counted.mul_(factor.to(grad.dtype))
        if kind in (0, 3):
            grad.masked_fill_(ignored.unsqueeze(-1) if kind == 0 else ignored, 0.0)
    return grads


def _scan_without_logits(sources: Sources, wanted: int) -> list[Tensor] | None:
    """The fields by the kernel that keeps logits in registers; None where it does not fit: for other than one head or
    two, other dtypes than 16-bit ones, other devices."""
    parts = sources.as_parts()
    sides = sources.sides(parts)
    if max(map(len, sides)) > 1 or any(part.weight is None or part.values.shape[-1] % 16 for part in parts):
        return None
    from .triton import head_launch as heads

    rows = Rows(sources.shape(), None)

    def head_of(part: Part):
        dtype = operand_dtype(part.values.dtype, sources.autocast)
        hidden = rows.take(part.values, 0, rows.num_rows)
        tensors = [None if t is None else t.to(dtype) for t in (hidden, part.weight, part.bias)]
        scale = part.scale if part.scale is None or part.scale.dim() == 0 else part.scale.flatten()
        return heads.Head(*tensors, scale, part.softcap)

    base, aux = (head_of(side[0]) if side else None for side in sides)
    if heads.fits(base, aux, wanted) is not None:
        return None
    target = None if sources.target is None else sources.target.flatten()
    of_sources = (target, sources.weight, sources.ignore_index, sources.vocab_size)
    fields = heads.scan(base, aux, *of_sources, wanted)
    return [stacked.view(len(stacked), *sources.shape()) for stacked in fields]


def _scan(sources: Sources, wanted: int, backend: str) -> list[Tensor]:
    ops.check_wanted(wanted, sources.target)
    fields = _scan_without_logits(sources, wanted) if backend == "triton" else None
    if fields is not None:
        return fields
    call = ChunkedCall(sources, [], backend, bool(wanted & ops.OF_BASE))
    fields = call.new_fields(wanted)
    for start, stop in call.chunks:
        call.put_fields(start, stop, fields, call.kernels.scan(*call.leading(start, stop), wanted))
    return fields


def _loss(
    sources: Sources, normalizer, label_smoothing, z_loss, mean, wanted: int, needs: list[bool], backend: str
) -> list[Tensor]:
    checks.chunked_outputs(sources, needs)
    ops.check_wanted(wanted | ops.OF_TARGET, sources.target)
    sources, divides_last = _in_half(sources, needs)
    call = ChunkedCall(sources, needs, backend, bool(wanted & ops.OF_BASE), keeps_wide=True)
    divisor = call.divisor(normalizer, mean)
    divide = (None, label_smoothing, z_loss, False) if divides_last else (divisor, label_smoothing, z_loss, True)
    fields, losses = call.new_fields(wanted), []
    for start, stop in call.chunks:
        leading = call.leading(start, stop)
        mask, room = call.room_for_gradients(start, stop)
        value, *rest = call.kernels.loss(*leading, *divide, wanted, mask, grads=room)
        losses.append(value)
        call.put_fields(start, stop, fields, rest[: len(fields)])
        call.take_gradients(start, stop, mask, rest[len(fields) :])
    grads = call.gradients(needs)
    total = torch.stack(losses).sum(dtype=torch.float64) if losses else 0.0 / divisor
    if divides_last and losses:
        total, grads = total / divisor, _scaled(grads, 1 / divisor, sources, needs)
    return [total.to(sources.compute()), *fields, *grads]


def _backward(sources: Sources, *args) -> list[Tensor]:
    *state, coefficients, needs, backend = args
    checks.chunked_outputs(sources, needs)
    ops.check_coefficients(coefficients, *state[2:], sources.target)
    shape = sources.shape()
    for name, values in zip((*_STATE, *ops.COEFFICIENTS), (*state, *coefficients), strict=True):
        checks.row_numbers(name, values, shape)
    sources, is_half = _in_half(sources, needs)
    factor = None
    if is_half:
        factor = _largest(coefficients, sources)
        coefficients = [None if c is None else c / factor for c in coefficients]
    is_base_wanted = any(coefficients[ops.COEFFICIENTS.index(name)] is not None for name in ("D", "Q", "Q_b", "B_b"))
    call = ChunkedCall(sources, needs, backend, is_base_wanted, keeps_wide=is_half)

    def chunk_of(values: list, start: int, stop: int) -> list:
        return [None if v is None else call.rows.take(v, start, stop) for v in values]

    for start, stop in call.chunks:
        leading = call.leading(start, stop)
        mask, room = call.room_for_gradients(start, stop)
        rows, upstream = chunk_of(state, start, stop), chunk_of(coefficients, start, stop)
        call.take_gradients(start, stop, mask, call.kernels.backward(*leading, *rows, upstream, mask, grads=room))
    grads = call.gradients(needs)
    if is_half:
        dtypes = [like.dtype for like, need in zip(_gradient_likes(sources), needs, strict=True) if need]
        grads = _scaled(grads, factor, sources, needs)
        grads = [grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]
    return grads


_STATE = ("max", "log_denom", "nll", "base_max", "base_log_denom")


def _largest(coefficients: list[Tensor | None], sources: Sources) -> Tensor:
    """Size of the largest coefficient, 1 where there is none to speak of; 0-d, on the sources' device."""
    ignored = sources.ignored()
    given = [c if ignored is None else c.masked_fill(ignored, 0.0) for c in coefficients if c is not None and c.numel()]
    if not given:
        return sources.first().new_ones((), dtype=sources.compute())
    largest = torch.stack([c.abs().amax() for c in given]).amax()
    return torch.where((largest > 0) & largest.isfinite(), largest, 1.0)


# -- fakes -------------------------------------------------------------------------------------------------------------


def _gradient_likes(sources: Sources) -> list[Tensor | None]:
    """Shape and dtype of the gradient of each entry of `parts`, as a tensor without memory of its own."""
    rows = sources.first().new_empty((), dtype=sources.compute()).expand(sources.shape())
    likes = list(sources.parts)
    likes[3::4] = [None if scale is None else rows for scale in sources.parts[3::4]]
    return likes


def _empty_gradients(sources: Sources, needs: list[bool], keeps_wide: bool) -> list[Tensor]:
    grads = []
    is_head = [weight is not None for weight in sources.parts[1::4]]
    for i, (like, need) in enumerate(zip(_gradient_likes(sources), needs, strict=True)):
        if need:
            is_wide = keeps_wide and is_head[i // 4] and like.dtype == torch.float16
            grads.append(like.new_empty(like.shape, dtype=torch.float32 if is_wide else like.dtype))
    return grads


def _scan_fake(*args):
    sources = Sources(*args[:8])
    checks.chunked_sources(sources)
    return ops.empty_rows(sources.first(), sources.shape(), sources.compute(), args[-2])


def _loss_fake(*args):
    sources = Sources(*args[:8])
    checks.chunked_sources(sources)
    wanted, needs = args[-3:-1]
    total = sources.first().new_empty((), dtype=sources.compute())
    fields = ops.empty_rows(sources.first(), sources.shape(), sources.compute(), wanted)
    return [total, *fields, *_empty_gradients(sources, needs, keeps_wide=True)]


def _backward_fake(*args):
    sources = Sources(*args[:8])
    checks.chunked_sources(sources)
    return _empty_gradients(sources, args[-2], keeps_wide=False)


for _name, _kernel, _fake in (
    ("chunked_cross_entropy_scan", _scan, _scan_fake),
    ("chunked_cross_entropy_loss", _loss, _loss_fake),
    ("chunked_cross_entropy_backward", _backward, _backward_fake),
):
    _library.impl(_name, _op(_kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"auxkernels::{_name}", _fake, lib=_library)
