"""Cross-entropy over chunks of rows, for any sources: library products around the row kernels.

Needs and gradients come with one `Leaves` for each source; a scale's gradient is one number for each row.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .. import dispatch
from ..heads.columns import sums_at
from ..heads.operands import (
    AddedProducts,
    Buffers,
    Context,
    NoOperand,
    Operand,
    SharedOperand,
    are_one_product,
    bytes_per_row,
    operand_of,
)
from ..heads.products import operand_dtype, plan_of
from ..heads.rows import Rows, chunks_of, fewest_rows, rows_that_count, settings
from ..heads.shared_weights import as_one, groups_of
from ..sources import LAYOUTS, NUMBERS, ROWS, SHARED, Leaves, SourceTensors
from .request import (
    OF_BASE,
    Coefficients,
    Gradients,
    Kernels,
    LossTerms,
    Problem,
    Request,
    RowState,
    empty_rows,
    is_ignored,
)

if TYPE_CHECKING:
    from .triton.head_launch import Head

_NOTHING = Leaves(False, False, False, False)
_T = TypeVar("_T")
_Numbers = TypeVar("_Numbers", RowState, Coefficients)


class ChunkedCall:
    """One call: its rows, its operands, and what the row kernels are given for each chunk.

    is_base_wanted   whether the base counts by itself; otherwise its products and the auxiliary's become one where they
                     can
    keeps_wide       whether gradients of float16 heads stay in float32
    num_columns      what the chunks are cut for, where that is not how many columns the request has
    exact_targets    whether the row kernels get the sum at the target as a float32 product has it, where products are
                     stored in 16 bits. A confident row's gradients are as wrong as that sum: with logits of 20, which
                     bfloat16 rounds by up to 0.06, by 6 %. The other columns' errors mostly cancel

    `make_operands` is still to be called: beside others that share its base, or alone.
    """

    base: Operand
    aux: Operand

    def __init__(
        self,
        request: Request,
        needs: list[Leaves],
        backend: str,
        is_base_wanted: bool,
        keeps_wide: bool = False,
        num_columns: int | None = None,
        exact_targets: bool = True,
    ):
        is_cuda = request.first().is_cuda
        self.request, self.in_place = request, backend == "native" and not is_cuda
        self.kernels: Kernels = dispatch.implementation("cross_entropy", backend, is_cuda)
        sources, needs = request.sources, needs or [_NOTHING] * len(request.sources)
        groups = groups_of(sources, needs, request.num_base, request.autocast, is_base_wanted)
        ones = [[as_one([sources[i] for i in group]) for group in operand] for operand in groups]
        self.is_one = not is_base_wanted and are_one_product([*ones[0], *ones[1]], request.autocast)
        if self.is_one:
            ones = [[*ones[0], *ones[1]], []]  # the auxiliary's onto the base's
        self.groups, self.needs = groups, needs
        self.exact_targets = exact_targets and self.in_place and self._rounds_products()
        self.order = [i for operand in groups for group in operand for i in group]
        ignored, num_rows = request.ignored(), request.shape().numel()
        self.rows = rows_that_count(request.shape(), ignored, _fewest_to_drop(sources, num_rows))
        wants = [[any(any(needs[i]) for i in group) for group in operand] for operand in groups]
        if self.is_one:
            wants = [[*wants[0], *wants[1]], []]
        shared = (request.vocab_size, request.compute(), request.autocast)
        of_chunks = (num_columns or request.vocab_size, *shared[1:])
        row_bytes = bytes_per_row(ones, wants, *of_chunks, self.in_place, self.rows.keeps_all())
        device = request.first().device
        self.chunks = chunks_of(self.rows.num_rows, row_bytes, settings.budget(device), fewest_rows(device))
        if ignored is not None:
            ignored = None if self.rows.kept is not None else ignored.flatten()
        self.context = Context(self.rows, self.chunks, ignored, *shared, self.in_place, keeps_wide)

    def make_operands(self) -> ChunkedCall:
        buffers = Buffers(self.context, self.request.first())
        if self.is_one:
            self.base, self.aux = self._operand([*self.groups[0], *self.groups[1]], buffers), NoOperand()
        else:
            self.base, self.aux = self._operand(self.groups[0], buffers), self._operand(self.groups[1], buffers)
        return self

    def _operand(self, groups: list[list[int]], buffers: Buffers) -> Operand:
        return operand_of(_picked(self.request.sources, groups), self.context, _picked(self.needs, groups), buffers)

    def _rounds_products(self) -> bool:
        request = self.request
        heads = [source.values for source in request.sources if source.weight is not None]
        return any(not plan_of(h.dtype, request.autocast, h.device).is_exact() for h in heads)

    # -- calls that share their base -----------------------------------------------------------------------------------

    def has_shareable_base(self) -> bool:
        """Whether the base is made anew for each chunk, has no gradient, and no head that the auxiliary's is added to
        before their product."""
        num_base, sources = self.request.num_base, self.request.sources
        return (
            (num_base > 1 or sources[0].weight is not None)
            and not any(any(needs) for needs in self.needs[:num_base])
            and all(i < num_base for group in self.groups[0] for i in group)
        )

    def shares_base(self, other: ChunkedCall) -> bool:
        """Whether the base's matrices are the same in both calls, given that their bases are."""
        return (
            self.chunks == other.chunks
            and self.context.compute == other.context.compute
            and self.context.autocast == other.context.autocast
            and self.context.vocab_size == other.context.vocab_size
            and (self.rows.kept is None) == (other.rows.kept is None)
            and (self.context.ignored is None) == (other.context.ignored is None)
            and self._ignores_the_same(other)
        )

    def _ignores_the_same(self, other: ChunkedCall) -> bool:
        one, two = self.request, other.request
        if one.target is two.target and one.ignore_index == two.ignore_index:
            return True
        if one.first().device.type != "cpu":
            return False  # a comparison would wait for the device
        if self.rows.kept is not None and other.rows.kept is not None:
            return torch.equal(self.rows.kept, other.rows.kept)
        if self.context.ignored is not None and other.context.ignored is not None:
            return torch.equal(self.context.ignored, other.context.ignored)
        return True

    def shared_base(self) -> SharedOperand:
        """The base, for all the calls that share it; in memory of its own, as the others work in common buffers."""
        return SharedOperand(self._operand(self.groups[0], Buffers(self.context, self.request.first())))

    def make_operands_beside(self, base: SharedOperand, made: dict[Hashable, Tensor]) -> None:
        """With a base that others made. made: the buffers that all the calls beside it work in."""
        groups, buffers = self.groups[1], Buffers(self.context, self.request.first(), made)
        self.base, self.aux = base, NoOperand()
        if not self.is_one:
            self.aux = self._operand(groups, buffers)
        elif groups:
            of_groups = _picked(self.request.sources, groups), self.context, _picked(self.needs, groups), buffers
            self.base = AddedProducts(base, *of_groups)

    # -- chunks --------------------------------------------------------------------------------------------------------

    def problem(self, start: int, stop: int) -> Problem:
        """One chunk of the request, for the row kernels."""
        base, aux, request = self.base.matrix(start, stop), self.aux.matrix(start, stop), self.request
        assert base is not None, "there is at least one source"
        target = None if request.target is None else self.rows.take(request.target, start, stop)
        made = base, aux, target, request.weight, request.ignore_index, request.vocab_size
        if target is None or not self.exact_targets:
            return Problem(*made)
        return Problem(*made, self._target_logits(target, start, stop))

    def _target_logits(self, target: Tensor, start: int, stop: int) -> Tensor:
        """The sum at the target of each row of a chunk; of rows that have none, at any class."""
        request, take = self.request, self.rows.take
        classes = target.long().clamp(0, request.vocab_size - 1)
        of_rows = [
            source._replace(
                values=take(source.values, start, stop),
                scale=take(source.scale, start, stop)
                if source.scale is not None and source.scale.dim()
                else source.scale,
            )
            for source in request.sources
        ]
        return sums_at(of_rows, classes, request.compute(), request.autocast, is_exact=True)

    def buffers_of_gradients(self, start: int, stop: int) -> Gradients:
        """Where the row kernels write the gradients of a chunk, after `problem`."""
        values: list[Tensor | None] = []
        scales: list[Tensor | None] = []
        for operand in (self.base, self.aux):
            needs_values, needs_scale = operand.needs()
            values.append(operand.gradient_buffer(start, stop) if needs_values else None)
            like, compute = self.request.first(), self.request.compute()
            scales.append(like.new_empty(stop - start, dtype=compute) if needs_scale else None)
        return Gradients(*values, *scales)

    def take_gradients(self, start: int, stop: int, grads: Gradients) -> None:
        self.base.take_gradient(start, stop, grads.base, grads.base_scale)
        self.aux.take_gradient(start, stop, grads.aux, grads.aux_scale)

    def gradients(self) -> list[Leaves]:
        """Of every source."""
        made = dict(zip(self.order, [*self.base.gradients(), *self.aux.gradients()], strict=True))
        return [made[i] for i in range(len(made))]

    def new_fields(self, wanted: int) -> list[Tensor]:
        """Room for the wanted fields of all rows, those of the rows that are left out filled."""
        fields = empty_rows(self.request.first(), self.request.shape(), self.request.compute(), wanted)
        if self.rows.kept is not None:
            for stacked in fields:
                stacked.fill_(0 if stacked.is_floating_point() else -1)
        return fields

    def put_fields(self, start: int, stop: int, fields: list[Tensor], of_chunk: list[Tensor]) -> None:
        for stacked, rows in zip(fields, of_chunk, strict=True):
            self.rows.put(stacked.view(len(stacked), -1).T, start, stop, rows.T)

    def divisor(self, normalizer: Tensor | None, mean: bool) -> Tensor:
        """What the summed loss is divided by: float64, 0-d, on the sources' device."""
        request, target = self.request, self.request.target
        like = request.first().new_ones((), dtype=torch.float64)
        if not mean:
            return like
        if normalizer is not None:
            return normalizer.to(like)
        assert target is not None, "a loss has a target"
        counts = ~is_ignored(target, request.ignore_index)
        if request.weight is None:
            return counts.sum().to(like)
        classes = target.long()
        in_range = counts & (classes >= 0) & (classes < request.vocab_size)
        return torch.where(in_range, request.weight[classes.where(in_range, 0)].to(like), 0.0).sum()


def _picked(of_sources: list[_T], groups: list[list[int]]) -> list[list[_T]]:
    """What belongs to the sources of each group."""
    return [[of_sources[i] for i in group] for group in groups]


def _fewest_to_drop(sources: list[SourceTensors], num_rows: int) -> int | None:
    """From how many ignored rows on leaving them out saves work; None: never, there is no product.

    Materialised logits have to be copied without them: as dear as the rest of their row, so half of the rows must go.
    """
    if all(source.weight is None for source in sources):
        return None
    return 1 if all(source.weight is not None for source in sources) else max(num_rows // 2, 1)


# -- float16 -----------------------------------------------------------------------------------------------------------


def _in_half(request: Request, needs: list[Leaves]) -> tuple[Request, bool]:
    """(the request, whether float16 gradients of logits enter products).

    Such gradients are formed at a size of one, so that they do not underflow, and brought to their own in float32. That
    goes for all gradients of a call or for none: beside others, float16 heads are computed in float32.
    """
    is_half, is_other = False, False
    for source, of_source in zip(request.sources, needs, strict=True):
        if of_source.values or of_source.weight or of_source.bias:
            plan = None
            if source.weight is not None:
                plan = plan_of(source.values.dtype, request.autocast, source.values.device)
            if plan is not None and plan.operands == torch.float16:
                is_half = True
            else:
                is_other = True
    if is_half and is_other:
        return request._replace(autocast=torch.float32), False
    return request, is_half


def _scale(grads: list[Leaves], factor: Tensor, request: Request) -> None:
    """grads *= factor in place; ignored rows, and classes from vocab_size on, stay +0.0 whatever the factor."""
    ignored = request.ignored()
    for layout, grad in _each(grads):
        counted = grad[: request.vocab_size] if layout == SHARED else grad
        counted.mul_(factor.to(grad.dtype))
        if ignored is None:  # without a target none is
            continue
        if layout == ROWS:
            grad.masked_fill_(ignored.unsqueeze(-1), 0.0)
        elif layout == NUMBERS:
            grad.masked_fill_(ignored, 0.0)


def _each(grads: list[Leaves]) -> Iterator[tuple[str, Tensor]]:
    """(layout, gradient) of each that there is."""
    for of_source in grads:
        for layout, grad in zip(LAYOUTS, of_source, strict=True):
            if grad is not None:
                yield layout, grad


def _in_own_dtypes(grads: list[Leaves], request: Request) -> list[Leaves]:
    """Gradients of tensors in the tensors' dtypes."""
    found: list[Leaves] = []
    for source, of_source in zip(request.sources, grads, strict=True):
        tensors: tuple[Any, ...] = source[: len(LAYOUTS)]
        leaves = zip(LAYOUTS, tensors, of_source, strict=True)
        found.append(Leaves(*(g if g is None or layout == NUMBERS else g.to(leaf.dtype) for layout, leaf, g in leaves)))
    return found


def _largest(coefficients: Coefficients, request: Request) -> Tensor:
    """Size of the largest coefficient, 1 where there is none to speak of; 0-d, on the sources' device."""
    ignored = request.ignored()
    given = [c if ignored is None else c.masked_fill(ignored, 0.0) for c in coefficients if c is not None and c.numel()]
    if not given:
        return request.first().new_ones((), dtype=request.compute())
    largest = torch.stack([c.abs().amax() for c in given]).amax()
    return torch.where((largest > 0) & largest.isfinite(), largest, 1.0)


# -- calls -------------------------------------------------------------------------------------------------------------


def scan(request: Request, wanted: int, backend: str) -> list[Tensor]:
    """The wanted fields of every row."""
    found = _scan_without_logits(request, wanted) if backend == "triton" else None
    if found is not None:
        return found
    call = ChunkedCall(request, [], backend, bool(wanted & OF_BASE)).make_operands()
    fields = call.new_fields(wanted)
    for start, stop in call.chunks:
        call.put_fields(start, stop, fields, call.kernels.scan(call.problem(start, stop), wanted))
    return fields


def _scan_without_logits(request: Request, wanted: int) -> list[Tensor] | None:
    """The fields by the kernel that keeps logits in registers; None where it does not fit: for other than one head or
    two, other dtypes than 16-bit ones, other devices."""
    operands = request.sources[: request.num_base], request.sources[request.num_base :]
    if max(map(len, operands)) > 1 or any(s.weight is None or s.values.shape[-1] % 16 for s in request.sources):
        return None
    from .triton import head_launch  # imports Triton

    rows = Rows(request.shape(), None)

    def head_of(source: SourceTensors) -> Head:
        dtype = operand_dtype(source.values.dtype, request.autocast)
        hidden = rows.take(source.values, 0, rows.num_rows)
        assert source.weight is not None, "sources without one have been ruled out"
        bias = None if source.bias is None else source.bias.to(dtype)
        scale = source.scale if source.scale is None or source.scale.dim() == 0 else source.scale.flatten()
        return head_launch.Head(hidden.to(dtype), source.weight.to(dtype), bias, scale, source.softcap)

    base, aux = head_of(operands[0][0]), head_of(operands[1][0]) if operands[1] else None
    if head_launch.fits(base, aux, wanted) is not None:
        return None
    target = None if request.target is None else request.target.flatten()
    of_sources = (target, request.weight, request.ignore_index, request.vocab_size)
    fields = head_launch.scan(base, aux, *of_sources, wanted)
    return [stacked.view(len(stacked), *request.shape()) for stacked in fields]


class LossCall:
    """A loss and its gradients, chunk by chunk; operands are to be made first."""

    exact_targets = True  # as of ChunkedCall

    def __init__(
        self,
        request: Request,
        normalizer: Tensor | None,
        terms: LossTerms,
        wanted: int,
        needs: list[Leaves],
        backend: str,
        num_columns: int | None = None,
    ):
        self.request, self.divides_last = _in_half(request, needs)
        is_base_wanted = bool(wanted & OF_BASE)
        self.chunks = ChunkedCall(self.request, needs, backend, is_base_wanted, True, num_columns, self.exact_targets)
        self.divisor = self.chunks.divisor(normalizer, terms.mean)
        self.of_chunk = None if self.divides_last else self.divisor
        self.terms, self.wanted = terms._replace(mean=not self.divides_last), wanted
        self.fields = self.chunks.new_fields(wanted)
        self.losses: list[Tensor] = []

    def run(self, start: int, stop: int) -> None:
        """One chunk."""
        call = self.chunks
        problem = call.problem(start, stop)
        grads = call.buffers_of_gradients(start, stop)
        value, found = call.kernels.loss(problem, self.of_chunk, self.terms, self.wanted, grads)
        self.losses.append(value)
        call.put_fields(start, stop, self.fields, found)
        call.take_gradients(start, stop, grads)

    def result(self) -> tuple[Tensor, list[Tensor], list[Leaves]]:
        """(0-d loss, the wanted fields, the gradients), after all chunks."""
        made = self.chunks.gradients()
        if self.divides_last and self.losses:
            _scale(made, 1 / self.divisor, self.request)
        return self.total(), self.fields, made

    def total(self) -> Tensor:
        """The loss, 0-d, after all chunks."""
        losses = self.losses
        total = torch.stack(losses).sum(dtype=torch.float64) if losses else 0.0 / self.divisor
        if self.divides_last and losses:
            total = total / self.divisor
        return total.to(self.request.compute())


def loss(
    request: Request, normalizer: Tensor | None, terms: LossTerms, wanted: int, needs: list[Leaves], backend: str
) -> tuple[Tensor, list[Tensor], list[Leaves]]:
    """(0-d loss, the wanted fields, the gradients)."""
    call = LossCall(request, normalizer, terms, wanted, needs, backend)
    call.chunks.make_operands()
    for start, stop in call.chunks.chunks:
        call.run(start, stop)
    return call.result()


def losses(calls: list[LossCall]) -> list[tuple[Tensor, list[Tensor], list[Leaves]]]:
    """`loss` of each, of one base: its logits of a chunk are made once for all the calls that can share them."""
    for together in _with_one_base(calls):
        first = together[0].chunks
        if len(together) == 1:
            first.make_operands()
        else:
            base = first.shared_base()
            made: dict[Hashable, Tensor] = {}
            for call in together:
                call.chunks.make_operands_beside(base, made)
        for start, stop in first.chunks:
            for call in together:
                call.run(start, stop)
    return [call.result() for call in calls]


def _with_one_base(calls: list[LossCall]) -> list[list[LossCall]]:
    found: list[list[LossCall]] = []
    for call in calls:
        beside = [
            together
            for together in found
            if call.chunks.has_shareable_base()
            and together[0].chunks.has_shareable_base()
            and together[0].chunks.shares_base(call.chunks)
        ]
        if beside:
            beside[0].append(call)
        else:
            found.append([call])
    return found


def backward(
    request: Request, state: RowState, coefficients: Coefficients, needs: list[Leaves], backend: str
) -> list[Leaves]:
    """The gradients for one number per row and coefficient."""
    request, is_half = _in_half(request, needs)
    factor: Tensor | None = None
    if is_half:
        factor = _largest(coefficients, request)
        coefficients = Coefficients(*(None if c is None else c / factor for c in coefficients))
    call = ChunkedCall(request, needs, backend, coefficients.are_of_base(), keeps_wide=is_half).make_operands()

    def chunk_of(values: _Numbers, start: int, stop: int) -> _Numbers:
        of_rows: list[Any] = [None if v is None else call.rows.take(v, start, stop) for v in values]
        return type(values)(*of_rows)

    for start, stop in call.chunks:
        problem, grads = call.problem(start, stop), call.buffers_of_gradients(start, stop)
        rows, upstream = chunk_of(state, start, stop), chunk_of(coefficients, start, stop)
        call.kernels.backward(problem, rows, upstream, grads)
        call.take_gradients(start, stop, grads)
    made = call.gradients()
    if factor is None:
        return made
    _scale(made, factor, request)
    return _in_own_dtypes(made, request)
