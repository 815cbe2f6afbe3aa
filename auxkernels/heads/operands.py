"""Base or auxiliary, chunk by chunk: one matrix of logits as the row kernels take it, and its gradient passed on."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import memory
from ..sources import Leaves, Matrix, SourceTensors
from .products import HeadProducts, plan_of
from .rows import Rows
from .shared_weights import SummedHeads, as_one
from .sums import Term, scale_gradient, sum_of, value_gradient, with_tail

ALIGNMENT = 64  # elements between the rows of a buffer: GEMMs and row kernels load whole vectors


class Context(NamedTuple):
    """What all sources of a call share."""

    rows: Rows
    chunks: list[tuple[int, int]]
    ignored: Tensor | None  # bool [all rows], where ignored rows are worked on
    vocab_size: int
    compute: torch.dtype
    autocast: torch.dtype | None
    in_place: bool  # the row kernels may write a gradient over the logits it belongs to
    keeps_wide: bool  # float16 heads get float32 gradients, undivided

    def grad_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self.keeps_wide and dtype == torch.float16 else dtype

    def ignored_in(self, start: int, stop: int) -> Tensor | None:
        return None if self.ignored is None else self.ignored[start:stop]

    def chunk_size(self) -> int:
        return max(stop - start for start, stop in self.chunks)


def padded(vocab_size: int) -> int:
    return -(-vocab_size // ALIGNMENT) * ALIGNMENT


def padded_matrix(like: Tensor, num_rows: int, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """[num_rows, padded V], uninitialised but for the columns beyond V.

    Those are zero: oneDNN's bfloat16 products on CPUs with AMX read whole blocks of 32 beyond the end of a row and
    multiply them by 0 (its issue 5717), which leaves 0 only where they are finite.
    """
    matrix = memory.empty(like, (num_rows, padded(vocab_size)), dtype)
    matrix[:, vocab_size:] = 0
    return matrix


def are_one_product(parts: list[SourceTensors], autocast: torch.dtype | None) -> bool:
    """Whether the parts are heads whose products can be added up where they are stored: [h, g] @ [W, U].T."""
    plans = set()
    for part in parts:
        if part.weight is None or part.scale is not None or part.softcap is not None:
            return False
        plans.add(plan_of(part.values.dtype, autocast, part.values.device))
    return len(plans) == 1 and plans.pop().is_exact()


def bytes_per_row(
    operands: Sequence[list[SourceTensors]],
    wants: Sequence[list[bool]],
    vocab_size: int,
    compute: torch.dtype,
    autocast: torch.dtype | None,
    in_place: bool,
    keeps_all: bool = True,
) -> int:
    """What the buffers of a chunk take for each of its rows. operands: parts; wants: whether each gets a gradient."""
    total = 0
    for parts, wanted in zip(operands, wants, strict=True):
        is_one = are_one_product(parts, autocast)
        heads = [(part, want) for part, want in zip(parts, wanted, strict=True) if part.weight is not None]
        for part, wants_gradient in [(parts[0], any(wanted))] if is_one else heads:
            plan = plan_of(part.values.dtype, autocast, part.values.device)
            total += plan.logits.itemsize + (0 if in_place or not wants_gradient else plan.operands.itemsize)
        if not keeps_all:  # the rows that count, copied
            total += sum(part.values.element_size() for part in parts if part.weight is None)
        if len(parts) > 1 and not is_one:
            total += compute.itemsize * (2 if in_place or not any(wanted) else 3)  # sum, scratch, gradient
    return max(total, 1) * padded(vocab_size)


class Buffers:
    """The [rows, V] matrices of a chunk, each made once for a call and used for all of its chunks."""

    def __init__(self, context: Context, like: Tensor, made: dict[Hashable, Tensor] | None = None):
        """made: where they are kept, if calls with the same chunks work in the same memory, one after the other."""
        self.num_rows = context.chunk_size() if context.chunks else 0
        self.like, self.vocab_size = like, context.vocab_size
        self.made = {} if made is None else made
        self.num_users = 0

    def new_user(self) -> int:
        """A number for keys, so that what is at one place in two calls has one matrix in both."""
        self.num_users += 1
        return self.num_users

    def get(self, name: Hashable, dtype: torch.dtype, num_rows: int) -> Tensor:
        key = name, dtype
        if key not in self.made:
            self.made[key] = padded_matrix(self.like, self.num_rows, self.vocab_size, dtype)
        return self.made[key][:num_rows]


class SourceChunks:
    """One source over the chunks of a call. needs: of values or hidden, weight, bias, scale."""

    def __init__(self, part: SourceTensors, context: Context, needs: Leaves, buffers: Buffers):
        self.part, self.context, self.buffers, self.number = part, context, buffers, buffers.new_user()
        self.needs_values, self.needs_scale = needs.values or needs.weight or needs.bias, needs.scale
        self.grad_scale = context.rows.new_output(part.values, (), context.compute) if needs.scale else None

    def scale(self, start: int, stop: int) -> Tensor | None:
        scale = self.part.scale
        return scale if scale is None or scale.dim() == 0 else self.context.rows.take(scale, start, stop)

    def put_scale_gradient(self, start: int, stop: int, grad: Tensor | None) -> None:
        """One number for each row of the chunk, or None."""
        if grad is not None and self.grad_scale is not None:
            self.context.rows.put(self.grad_scale, start, stop, grad)

    def scale_gradient(self) -> Tensor | None:
        return None if self.grad_scale is None else self.grad_scale.view(self.context.rows.shape)


class LogitsChunks(SourceChunks):
    """Materialised logits, read where they are and their gradient written where it stays, if rows lie in order."""

    def __init__(self, part: SourceTensors, context: Context, needs: Leaves, buffers: Buffers):
        super().__init__(part, context, needs, buffers)
        self.grad_dtype, self.width = part.values.dtype, part.values.shape[-1]
        self.grad: Tensor | None = None
        if needs.values:
            self.grad = context.rows.new_output(part.values, (self.width,), self.grad_dtype)

    def values(self, start: int, stop: int) -> Tensor:
        """The chunk's logits before softcap and scale, [C, >= V]."""
        return self.context.rows.take(self.part.values, start, stop)

    def gradient_buffer(self, values: Tensor, start: int, stop: int) -> Tensor:
        """Where the row kernels write the gradient of `values`, the chunk's logits."""
        if self.grad is not None and self.context.rows.keeps_all():
            return self.grad[start:stop]
        return values if self.context.in_place else torch.empty_like(values)  # `values` are a copy of the rows

    def take_gradient(self, start: int, stop: int, grad: Tensor | None) -> None:
        if grad is not None and self.grad is not None and grad.data_ptr() != self.grad[start:].data_ptr():
            self.context.rows.put(self.grad, start, stop, grad)

    def gradients(self) -> list[Leaves]:
        """Of each source."""
        grad = None if self.grad is None else self.grad.view(self.part.values.shape)
        return [Leaves(grad, scale=self.scale_gradient())]


class HeadChunks(SourceChunks):
    """A head: its products into a buffer, the buffer's gradient into its products."""

    def __init__(self, part: SourceTensors, context: Context, needs: Leaves, buffers: Buffers):
        super().__init__(part, context, needs, buffers)
        self.plan = plan_of(part.values.dtype, context.autocast, part.values.device)
        self.grad_dtype, self.width = self.plan.operands, context.vocab_size
        assert part.weight is not None, "a head has one"
        tensors, shared = (part.values, part.weight, part.bias), (context.rows, len(context.chunks))
        self.products: HeadProducts | SummedHeads
        self.products = HeadProducts(*tensors, self.plan, self.width, *shared, needs, context.grad_dtype)

    def add_values(self, start: int, stop: int, out: Tensor, accumulate: bool) -> None:
        logits = out[:, : self.context.vocab_size]
        self.products.logits(start, stop, self.context.ignored_in(start, stop), logits, accumulate)

    def values(self, start: int, stop: int) -> Tensor:
        z = self.buffers.get(("logits", self.number), self.plan.logits, stop - start)
        self.add_values(start, stop, z, accumulate=False)
        return z

    def gradient_buffer(self, values: Tensor, start: int, stop: int) -> Tensor:
        if self.context.in_place:
            return values
        return self.buffers.get(("gradient", self.number), self.plan.operands, stop - start)

    def take_gradient(self, start: int, stop: int, grad: Tensor | None) -> None:
        if grad is not None:
            ignored = self.context.ignored_in(start, stop)
            self.products.add_gradient(start, stop, ignored, grad[:, : self.context.vocab_size])

    def gradients(self) -> list[Leaves]:
        return [of_head._replace(scale=self.scale_gradient()) for of_head in self.products.gradients()]


class SharedHeadChunks(HeadChunks):
    """Heads of one weight, which are added up before their product: one source without softcap and scale."""

    def __init__(self, parts: list[SourceTensors], context: Context, needs: list[Leaves], buffers: Buffers):
        SourceChunks.__init__(self, as_one(parts), context, Leaves(any(map(any, needs)), False, False, False), buffers)
        self.plan = plan_of(parts[0].values.dtype, context.autocast, parts[0].values.device)
        self.grad_dtype, self.width = self.plan.operands, context.vocab_size
        shared = (context.rows, len(context.chunks), needs, context.grad_dtype, context.compute)
        self.products = SummedHeads(parts, self.plan, self.width, *shared)

    def gradients(self) -> list[Leaves]:
        return self.products.gradients()


def source_chunks(
    group: list[SourceTensors], context: Context, needs: list[Leaves], buffers: Buffers
) -> LogitsChunks | HeadChunks:
    """Of one source, or of a group of heads that share their weight."""
    if len(group) > 1:
        return SharedHeadChunks(group, context, needs, buffers)
    return (LogitsChunks if group[0].weight is None else HeadChunks)(group[0], context, needs[0], buffers)


# -- operands: what the row kernels take as base or auxiliary, of groups of sources (`shared_weights.groups_of`) and
# what each source needs. needs() is whether they have to give the gradient of the values, and of the scale ------------


class NoOperand:
    """No auxiliary."""

    def needs(self) -> tuple[bool, bool]:
        return False, False

    def matrix(self, start: int, stop: int) -> None:
        return None

    def gradient_buffer(self, start: int, stop: int) -> None:
        return None

    def take_gradient(self, start: int, stop: int, grad: Tensor | None, grad_scale: Tensor | None) -> None:
        pass

    def gradients(self) -> list[Leaves]:
        return []


class OneSource:
    """One source: the row kernels apply its softcap and scale."""

    def __init__(
        self, groups: list[list[SourceTensors]], context: Context, needs: list[list[Leaves]], buffers: Buffers
    ):
        self.source = source_chunks(groups[0], context, needs[0], buffers)

    def needs(self) -> tuple[bool, bool]:
        return self.source.needs_values, self.source.needs_scale

    def matrix(self, start: int, stop: int) -> Matrix:
        self.values = self.source.values(start, stop)
        return Matrix(self.values, self.source.scale(start, stop), self.source.part.softcap)

    def gradient_buffer(self, start: int, stop: int) -> Tensor:
        return self.source.gradient_buffer(self.values, start, stop)

    def take_gradient(self, start: int, stop: int, grad: Tensor | None, grad_scale: Tensor | None) -> None:
        """What the row kernels have given for the chunk's matrix."""
        self.source.take_gradient(start, stop, grad)
        self.source.put_scale_gradient(start, stop, grad_scale)

    def gradients(self) -> list[Leaves]:
        return self.source.gradients()


class SumOfSources:
    """Several sources, summed in the compute dtype."""

    def __init__(
        self, groups: list[list[SourceTensors]], context: Context, needs: list[list[Leaves]], buffers: Buffers
    ):
        self.sources = [source_chunks(group, context, n, buffers) for group, n in zip(groups, needs, strict=True)]
        self.context, self.buffers, self.number = context, buffers, buffers.new_user()
        self.dtype = self.grad_dtype = context.compute

    def needs(self) -> tuple[bool, bool]:
        return any(source.needs_values or source.needs_scale for source in self.sources), False

    def matrix(self, start: int, stop: int) -> Matrix:
        self.values = self.buffers.get(("sum", self.number), self.dtype, stop - start)
        self.add_up(start, stop)
        return Matrix(self.values, None, None)

    def scratch(self) -> Tensor:
        """Another [C, V] for the chunk."""
        return self.buffers.get("scratch", self.dtype, len(self.values))[:, : self.context.vocab_size]

    def add_up(self, start: int, stop: int) -> None:
        sources = self.sources
        self.terms = [Term(s.values(start, stop), s.scale(start, stop), s.part.softcap) for s in sources]
        sum_of(self.terms, self.values[:, : self.context.vocab_size], self.scratch())

    def gradient_buffer(self, start: int, stop: int) -> Tensor:
        if self.context.in_place:
            return self.values
        return self.buffers.get(("gradient of sum", self.number), self.grad_dtype, stop - start)

    def take_gradient(self, start: int, stop: int, grad: Tensor | None, grad_scale: Tensor | None) -> None:
        if grad is None:
            return
        ignored, scratch = self.context.ignored_in(start, stop), self.scratch()
        grad = grad[:, : self.context.vocab_size]
        for source, term in zip(self.sources, self.terms, strict=True):
            if source.needs_scale:
                source.put_scale_gradient(start, stop, scale_gradient(term, grad, ignored, scratch))
            if source.needs_values:
                own = value_gradient(term, grad, ignored, scratch)
                source.take_gradient(start, stop, with_tail(own, source.width, source.grad_dtype))

    def gradients(self) -> list[Leaves]:
        return [grad for source in self.sources for grad in source.gradients()]


class SumOfProducts(SumOfSources):
    """Heads whose products are added up in one buffer (`are_one_product`), whose gradient is that of each head."""

    def __init__(
        self, groups: list[list[SourceTensors]], context: Context, needs: list[list[Leaves]], buffers: Buffers
    ):
        super().__init__(groups, context, needs, buffers)
        self.heads = [source for source in self.sources if isinstance(source, HeadChunks)]  # which all of them are
        plan = self.heads[0].plan
        self.dtype, self.grad_dtype = plan.logits, plan.operands

    def add_up(self, start: int, stop: int) -> None:
        for i, source in enumerate(self.heads):
            source.add_values(start, stop, self.values, accumulate=i > 0)

    def take_gradient(self, start: int, stop: int, grad: Tensor | None, grad_scale: Tensor | None) -> None:
        for source in self.sources:
            if source.needs_values:
                source.take_gradient(start, stop, grad)


class SharedOperand:
    """An operand without gradients whose matrix of a chunk is made once for all the calls that take it."""

    def __init__(self, operand: Operand):
        self.operand = operand
        self.chunk: tuple[int, int] | None = None
        self.made: Matrix | None = None

    def needs(self) -> tuple[bool, bool]:
        return False, False

    def matrix(self, start: int, stop: int) -> Matrix | None:
        if self.chunk != (start, stop):
            self.chunk, self.made = (start, stop), self.operand.matrix(start, stop)
        return self.made

    def gradient_buffer(self, start: int, stop: int) -> None:
        return None

    def take_gradient(self, start: int, stop: int, grad: Tensor | None, grad_scale: Tensor | None) -> None:
        pass

    def gradients(self) -> list[Leaves]:
        return self.operand.gradients()


class AddedProducts(SumOfProducts):
    """Heads whose products are added to a copy of what a shared operand holds: bit for bit as if added to itself."""

    def __init__(
        self,
        shared: SharedOperand,
        groups: list[list[SourceTensors]],
        context: Context,
        needs: list[list[Leaves]],
        buffers: Buffers,
    ):
        super().__init__(groups, context, needs, buffers)
        self.shared = shared

    def add_up(self, start: int, stop: int) -> None:
        matrix = self.shared.matrix(start, stop)
        assert matrix is not None, "there is something to add to"
        self.values.copy_(matrix.values)
        for source in self.heads:
            source.add_values(start, stop, self.values, accumulate=True)

    def gradients(self) -> list[Leaves]:
        return [*self.shared.gradients(), *super().gradients()]


Operand = NoOperand | OneSource | SumOfSources | SharedOperand


def operand_of(
    groups: list[list[SourceTensors]], context: Context, needs: list[list[Leaves]], buffers: Buffers
) -> Operand:
    if not groups:
        return NoOperand()
    if len(groups) == 1:
        return OneSource(groups, context, needs, buffers)
    is_one = are_one_product([as_one(group) for group in groups], context.autocast)
    return (SumOfProducts if is_one else SumOfSources)(groups, context, needs, buffers)


def plain_operand_of(parts: list[SourceTensors], context: Context, needs: list[Leaves], buffers: Buffers) -> Operand:
    """One whose matrix has neither scale nor softcap: for row kernels that know of none."""
    groups, of_group = [[part] for part in parts], [[of_part] for of_part in needs]
    if len(parts) == 1 and (parts[0].scale is not None or parts[0].softcap is not None):
        return SumOfSources(groups, context, of_group, buffers)
    return operand_of(groups, context, of_group, buffers)
