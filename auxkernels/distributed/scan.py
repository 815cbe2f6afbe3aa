"""A scan of the own columns, exchanged: the fields of whole rows, and gradients of the own columns from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd import apply, distinct, once, saveable
from ..cross_entropy import autograd, ops
from ..cross_entropy.chunked import ChunkedCall
from ..cross_entropy.request import (
    FIELD_BIT,
    OF_BASE,
    Coefficients,
    Problem,
    RowState,
    fields_in,
    is_ignored,
    mask_of,
    named_fields,
)
from ..cross_entropy.rows import coefficients_of
from ..heads.columns import sums_at
from ..heads.sums import Term, sum_of
from ..sources import Matrix
from . import row_state
from .collectives import gathered
from .shard import VocabShard

# what the kernels are told of an ignored row: no class of a process has this number
IGNORED = -1
Rows = Callable[[Tensor], Tensor]  # from [*] to the rows that are worked on, [C]
_WHO = "aux_cross_entropy or logit_stats"
RANK = FIELD_BIT["target_rank"]


class Part(NamedTuple):
    """What a process knows of a call beside its sources.

    shard        its columns of those that count
    options      of the operators, with its number of columns; ignored rows have the target IGNORED
    target       as given, [*]; None: no target
    own_target   [*] int64: the target as a class of the own columns, 0 where it is none of them
    is_own       bool [*], whether it is one of them
    poisoned     bool [*], rows whose target is no class (None on CPU, where that is an error)
    weight       class weights of the own columns
    compute      dtype of the arithmetic
    """

    shard: VocabShard
    options: ops.Options
    target: Tensor | None
    own_target: Tensor | None
    is_own: Tensor | None
    ignored: Tensor | None
    poisoned: Tensor | None
    weight: Tensor | None
    weight_sum: float
    compute: torch.dtype

    def call(self, leaves: tuple[Any, ...]) -> ops.Call:
        return ops.Call(leaves, self.own_target, self.weight, self.options)

    def is_empty(self) -> bool:
        return self.shard.width == 0


def part_of(
    shard: VocabShard,
    options: ops.Options,
    target: Tensor | None,
    ignore_index: int,
    weight: Tensor | None,
    compute: torch.dtype,
) -> Part:
    """options: of a call with the own columns' number and IGNORED. weight: of all columns."""
    own_target = is_own = ignored = poisoned = None
    if target is not None:
        classes, ignored = target.long(), is_ignored(target, ignore_index)
        is_own = (classes >= shard.start) & (classes < shard.stop) & ~ignored
        own_target = torch.where(is_own, classes - shard.start, 0).masked_fill(ignored, IGNORED)
        if target.device.type != "cpu":
            poisoned = ((classes < 0) | (classes >= shard.size)) & ~ignored
    weight_sum = float(shard.width)
    if weight is not None:
        weight = weight.detach()[shard.start : shard.stop]
        weight_sum = float(weight.sum(dtype=torch.float64))
    return Part(shard, options, target, own_target, is_own, ignored, poisoned, weight, weight_sum, compute)


# -- the scan of the own columns ---------------------------------------------------------------------------------------


def own_fields(part: Part, leaves: tuple[Any, ...], wanted: int, rank_bound: Tensor | None) -> dict[str, Tensor]:
    """The fields [*] that the process sends, `row_state.sent_fields` of what is wanted.

    rank_bound   [*]: what the sums of columns are compared with for the target's rank
    """
    sent = row_state.sent_fields(wanted)
    if part.is_empty():
        return of_no_columns(part, leaves[0].shape[:-1], leaves[0].device, sent)
    call = part.call(leaves)
    request = ops.request_of(call)

    def scanned(fields: int) -> dict[str, Tensor]:
        if rank_bound is None:
            return named_fields(fields, ops.scan(call, fields))[0]
        return _ranked(part, call, fields, rank_bound)

    def sums(of_base: bool, classes: Tensor) -> Tensor:
        sources = request.sources[: request.num_base] if of_base else request.sources
        return sums_at(sources, classes, request.compute(), request.autocast)

    # heads: a second scan would multiply again
    looks_twice = call.options.is_of_matrices and leaves[0].device.type == "cpu"
    return finished(part, looked_at(scanned, sums, sent, looks_twice))


def looked_at(
    scanned: Callable[[int], dict[str, Tensor]], sums: Callable[[bool, Tensor], Tensor], sent: int, looks_twice: bool
) -> dict[str, Tensor]:
    """The fields to be sent of some rows, by a kernel's scan; of what the kernels say of rows that are no distribution.

    scanned      the fields of a mask
    sums         of the base alone or of all sources, at a column of each row
    looks_twice  whether a further scan says where the largest numbers are, if there are such rows; otherwise the first
                 one says it, and on GPU nobody waits to see whether there are
    """
    more = (mask_of("argmax", "base_argmax") if sent & OF_BASE else mask_of("argmax")) & ~sent
    fields = scanned(sent if looks_twice else sent | more)
    if looks_twice:
        if not bool(fields["log_denom"].isnan().any()):
            return fields
        fields = fields | scanned(more) if more else fields
    look_at_maxima(fields, "", sums(False, fields["argmax"].clamp(min=0)))
    if sent & OF_BASE:
        look_at_maxima(fields, "base_", sums(True, fields["base_argmax"].clamp(min=0)))
    return {name: fields[name] for name in fields_in(sent)}


def look_at_maxima(fields: dict[str, Tensor], side: str, at_argmax: Tensor) -> None:
    """Replaces maxima that kernels have formed without NaN, and log 0 of columns that are all -inf.

    A kernel's row that is no distribution says where its largest number is, and at_argmax [*] what that is.
    """
    log_denom = fields[side + "log_denom"]
    is_none = log_denom.isnan()
    is_nothing = is_none & (at_argmax == -torch.inf)
    is_nan = is_none & at_argmax.isnan()
    fields[side + "max"] = fields[side + "max"].masked_fill(is_nan, torch.nan).masked_fill(is_nothing, -torch.inf)
    fields[side + "log_denom"] = log_denom.masked_fill(is_nothing, 0.0)
    if side + "nll" in fields:
        fields[side + "nll"] = fields[side + "nll"].masked_fill(is_nothing, torch.inf)


def finished(part: Part, fields: dict[str, Tensor], rows: Rows | None = None) -> dict[str, Tensor]:
    """Classes as they are numbered in the vocabulary; nothing of targets that others hold."""
    is_own = part.is_own if part.is_own is None or rows is None else rows(part.is_own)
    found = dict(fields)
    for name in ("argmax", "base_argmax"):
        if name in found:
            found[name] = found[name] + part.shard.start
    for name in ("nll", "base_nll"):
        if name in found and is_own is not None:
            found[name] = torch.where(is_own, found[name], torch.inf)
    return found


def of_no_columns(part: Part, shape: torch.Size, device: torch.device, sent: int) -> dict[str, Tensor]:
    values = {"max": -torch.inf, "base_max": -torch.inf, "nll": torch.inf, "base_nll": torch.inf}
    found = {}
    for name in fields_in(sent):
        if name in row_state.INTEGERS:
            # of no column: no class of the vocabulary, and none ahead of the target
            found[name] = torch.full(shape, 0 if name == "target_rank" else part.shard.size, device=device)
        else:
            found[name] = torch.full(shape, values.get(name, 0.0), dtype=part.compute, device=device)
    return found


# -- ranks -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def rank_bounds(part: Part, leaves: tuple[Any, ...]) -> Tensor:
    """The targets' sums [*], which the processes that hold them tell the others: an exchange of its own."""
    assert part.is_own is not None, "ranks are of targets"
    group = part.shard.processes()
    assert group is not None, "there are several processes"
    own = torch.zeros(part.is_own.shape, dtype=part.compute, device=part.is_own.device)
    if not part.is_empty() and own.numel():
        request = ops.request_of(part.call(leaves))
        assert request.target is not None
        classes = request.target.clamp(min=0)
        at_target = sums_at(request.sources, classes, request.compute(), request.autocast)
        own = torch.where(part.is_own, at_target, own)
    # others hold 0. not a sum: a target of -inf, or NaN, is what it is
    of_ranks = gathered(torch.stack([own, part.is_own.to(own.dtype)]), group)
    bounds, holders = of_ranks[:, 0], of_ranks[:, 1]
    return torch.where(holders > 0, bounds, -torch.inf).amax(0)


def _ranked(part: Part, call: ops.Call, wanted: int, bound: Tensor) -> dict[str, Tensor]:
    """The wanted fields, with the rank of targets that other processes hold."""
    request = ops.request_of(call)
    with torch.no_grad(), torch.autocast(request.first().device.type, enabled=False):
        chunks = ChunkedCall(
            request, [], call.options.backend, bool(wanted & OF_BASE), exact_targets=False
        ).make_operands()
        fields = chunks.new_fields(wanted)
        for start, stop in chunks.chunks:
            problem = chunks.problem(start, stop)
            found = ranked(part, chunks, problem, start, stop, wanted, bound)
            chunks.put_fields(start, stop, fields, found)
    return named_fields(wanted, fields)[0]


def ranked(
    part: Part, chunks: ChunkedCall, problem: Problem, start: int, stop: int, wanted: int, bound: Tensor | None
) -> list[Tensor]:
    """The scan of one chunk, stacked, with the rank of targets that other processes hold."""
    found = chunks.kernels.scan(problem, wanted)
    if not wanted & RANK or bound is None or part.is_own is None:
        return found
    of_chunk, is_own = (chunks.rows.take(t, start, stop) for t in (bound, part.is_own))
    own_ranks = found[-1][-1]  # the last of the integers
    own_ranks.copy_(torch.where(is_own, own_ranks, _num_above(problem, of_chunk)))
    return found


_RANK_BYTES = 16 << 20


def _num_above(problem: Problem, bound: Tensor) -> Tensor:
    """How many columns of each row of matrices [C, >= V] are greater than a number, int64 [C]."""
    V, compute = problem.vocab_size, problem.compute()
    counts = [bound.new_zeros(0, dtype=torch.int64)]
    step = max(1, _RANK_BYTES // (V * compute.itemsize))
    for first in range(0, len(bound), step):
        rows = slice(first, first + step)
        terms = [_term(matrix, rows) for matrix in (problem.base, problem.aux) if matrix is not None]
        out = bound.new_empty((len(bound[rows]), V), dtype=compute)
        sum_of(terms, out, torch.empty_like(out) if len(terms) > 1 else out)
        counts.append((out > bound[rows].unsqueeze(-1)).sum(-1))
    return torch.cat(counts)


def _term(matrix: Matrix, rows: slice) -> Term:
    scale = scale_tensor(matrix)
    return Term(matrix.values[rows], scale[rows] if scale is not None and scale.dim() else scale, matrix.softcap)


def scale_tensor(matrix: Matrix) -> Tensor | None:
    scale = matrix.scale
    if scale is None or isinstance(scale, Tensor):
        return scale
    return torch.full((), scale, dtype=torch.float64, device=matrix.values.device)


# -- the exchange ------------------------------------------------------------------------------------------------------


def exchanged(part: Part, fields: dict[str, Tensor], wanted: int, rows: Rows | None = None) -> dict[str, Tensor]:
    """The wanted fields of whole rows, from what each process has of its own columns: the same bits on all of them.

    fields   [*], `row_state.sent_fields` of what is wanted
    """
    group, take = part.shard.processes(), rows or (lambda values: values.flatten())
    assert group is not None, "there are several processes"
    shape = next(iter(fields.values())).shape
    target = None if part.target is None else take(part.target)
    own = row_state.packed(fields, target, part.shard.start, part.shard.stop, part.weight_sum, part.compute)
    sent = row_state.unpacked(gathered(own, group), list(fields), target is not None)
    bad = row_state.disagreeing(sent, part.shard.size)
    if part.poisoned is not None:
        bad = bad | take(part.poisoned)
    found = {}
    for name, values in row_state.merged(sent, wanted).items():
        is_integer = name in row_state.INTEGERS
        values = values if is_integer else values.to(part.compute).masked_fill(bad, torch.nan)
        if name == "target_rank":
            values = values.masked_fill(bad, -1)
        if part.ignored is not None:
            values = values.masked_fill(take(part.ignored), -1 if is_integer else 0.0)
        found[name] = values.view(shape)
    return found


def row_fields(part: Part, leaves: tuple[Any, ...], has_gradient: bool, wanted: int) -> dict[str, Tensor]:
    """The wanted fields of whole rows by name, each [*], differentiable where they can be."""
    bound = rank_bounds(part, ops.tensors_of(leaves)) if wanted & RANK else None
    if not has_gradient:
        return exchanged(part, own_fields(part, leaves, wanted, bound), wanted)
    tensors = distinct(ops.tensors_of(leaves))
    found = apply(ShardedRowScan, _WHO, part, wanted, bound, *tensors)
    return dict(zip(fields_in(wanted), found, strict=True))


# -- gradients ---------------------------------------------------------------------------------------------------------


def own_coefficients(is_own: Tensor | None, coefficients: Coefficients) -> Coefficients:
    """For the own columns: those of a target that another process holds are of the probabilities alone."""
    if is_own is None:
        return coefficients
    a, g, b_b = coefficients.A, coefficients.G, coefficients.B_b
    if g is not None:
        elsewhere = torch.where(is_own, 0.0, g)
        a = elsewhere if a is None else a + elsewhere
        g = torch.where(is_own, g, 0.0)
    if b_b is not None:
        b_b = torch.where(is_own, b_b, 0.0)
    return coefficients._replace(A=a, G=g, B_b=b_b)


def no_gradients(leaves: tuple[Any, ...], needs: tuple[bool, ...]) -> list[Tensor | None]:
    """Those of a process without columns."""
    return [torch.zeros_like(leaf) if need else None for leaf, need in zip(leaves, needs, strict=True)]


class ShardedRowScan(torch.autograd.Function):
    """Row fields of all columns with a reread of the own ones in backward, which communicates nothing."""

    @staticmethod
    def forward(
        ctx: Any, part: Part, wanted: int, rank_bound: Tensor | None, *leaves: Tensor | None
    ) -> tuple[Tensor, ...]:
        needed = wanted | autograd.state_for(wanted)
        fields = exchanged(part, own_fields(part, leaves, needed, rank_bound), needed)
        saved = [saveable(fields.get(name)) for name in autograd.SAVED]
        ctx.save_for_backward(*saved, *leaves)
        ctx.part, ctx.wanted = part, wanted
        ctx.set_materialize_grads(False)
        # copies: what is saved must not be what its user may write
        outputs = {name: fields[name].clone() for name in fields_in(wanted)}
        ctx.mark_non_differentiable(*[output for name, output in outputs.items() if name in autograd.CONSTANTS])
        return tuple(outputs.values())

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        m, log_denom, nll, m_b, log_denom_b, mean_sum, mean_base, *leaves = ctx.saved_tensors
        part, needs = ctx.part, ctx.needs_input_grad[-len(leaves) :]
        given = dict(zip(fields_in(ctx.wanted), upstream, strict=True))
        coefficients = own_coefficients(part.is_own, coefficients_of(given, mean_sum, mean_base))
        grads: list[Tensor | None] = no_gradients(tuple(leaves), needs) if part.is_empty() else [None] * len(needs)
        if not part.is_empty() and any(c is not None for c in coefficients):
            state = RowState(m, log_denom, nll, m_b, log_denom_b)
            made = ops.backward(part.call(tuple(leaves)), state, coefficients, needs)
            grads = autograd.per_leaf(autograd.spread(made, needs), leaves)
        return (None, None, None, *once(_WHO, grads, (*leaves, *upstream)))
