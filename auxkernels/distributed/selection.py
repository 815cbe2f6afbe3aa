"""A lookup of the k likeliest labels, of labels in shards.

Each process sends the k largest of its own labels' scores, noise included, and their numbers. The k largest of all of
these are the row's: each process has their probabilities p and the statistics, and adds up the embeddings of those that
it holds. Backward, with g_j the upstream's product with embedding j, which the process that holds it knows alone,

    du_j = p_j (g_j - sum_i p_i g_i)

of which each process sends its part of the sum, one number a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..autograd import apply, once
from ..cross_entropy.autograd import spread
from ..soft_embedding import autograd
from ..soft_embedding.chunked import LookupCall, TableGradients, with_whole_rows
from ..soft_embedding.request import Upstream, outputs_in
from ..sources import by_source
from . import row_state
from .collectives import gathered
from .lookup import WHO, Part, Tensors, choice_of, chosen_rows, group_of, shape_of, unread


def lookup(part: Part, tensors: Tensors, wanted: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The mixture and the wanted outputs by name, over the `top_k` likeliest labels."""
    if autograd.requires_grad(part.call(tensors)):
        mixture, *fields = apply(_ShardedSelection, WHO, part, wanted, *tensors)
    else:
        mixture, found, _ = _found(part, tensors)
        fields = [found[name] for name in outputs_in(wanted)]
    return mixture, dict(zip(outputs_in(wanted), fields, strict=True))


class Kept(NamedTuple):
    """The kept labels of each row, [N, k], likeliest first; places that have none have label -1 and p 0.

    labels      as they are numbered in the vocabulary
    p, log_p    in the compute dtype
    max         [N], the largest score, with the noise that counts
    log_denom   [N]
    chosen      [N], of a hard choice; -1: none is allowed
    """

    labels: Tensor
    p: Tensor
    log_p: Tensor
    max: Tensor
    log_denom: Tensor
    chosen: Tensor


def _own_kept(part: Part, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Scores and labels [N, k] of the likeliest own labels, -inf where there are less; a row with NaN has it alone."""
    k, shape, device = part.options.top_k, shape_of(tensors), tensors[0].device
    num_rows = shape.numel()
    values = torch.full((num_rows, k), -torch.inf, dtype=part.compute, device=device)
    labels = torch.full((num_rows, k), part.shard.size, dtype=torch.int64, device=device)
    if part.shard.width == 0:
        return values, labels
    call = part.call_of_gradient((*tensors[:-1], unread(tensors[-1])))
    with torch.autocast(device.type, enabled=False):
        chunks = LookupCall(call.request(), [], call.options.backend, num_matrices=1)
        own_k = chunks.request.kept()
        for start, stop in chunks.chunks:
            rows, size = chunks.soft_rows(start, stop), stop - start
            chosen = torch.empty((size, own_k), dtype=torch.int64, device=device)
            weights = torch.empty((size, own_k), dtype=part.compute, device=device)
            fields = {
                "max": torch.empty(size, dtype=part.compute, device=device),
                "argmax": torch.empty(size, dtype=torch.int64, device=device),
            }
            chunks.kernels.select(rows, fields, chosen, weights)
            is_nan = fields["max"].isnan().unsqueeze(-1)
            found = rows.scores.gather(1, chosen.clamp(min=0)).to(part.compute).masked_fill(chosen < 0, -torch.inf)
            values[start:stop, :own_k] = found.masked_fill(is_nan, torch.nan)
            chosen = torch.where(is_nan, fields["argmax"].unsqueeze(-1), chosen)
            labels[start:stop, :own_k] = torch.where(chosen < 0, part.shard.size, chosen + part.shard.start)
    return values, labels


def _kept(part: Part, tensors: Tensors) -> Kept:
    k, compute = part.options.top_k, part.compute
    chosen = choice_of(part, tensors).flatten() if part.is_clean else None
    values, labels = _own_kept(part, tensors)
    fields = {"max": values, "argmax": labels}
    packed = row_state.packed(fields, None, part.shard.start, part.shard.stop, 0.0, compute)
    sent = row_state.unpacked(gathered(packed, group_of(part)), list(fields), False)
    bad = row_state.disagreeing(sent, part.shard.size)
    of_ranks = [
        sent.rows[name].view(len(sent.bounds.start), *values.shape).transpose(0, 1).flatten(1) for name in fields
    ]
    # among equals the lowest label first, and NaN before all
    order = of_ranks[1].argsort(stable=True, dim=1)
    v, y = (t.gather(1, order) for t in of_ranks)
    order = v.argsort(stable=True, dim=1, descending=True)[:, :k]
    v, y = v.gather(1, order), y.gather(1, order)
    largest, is_none = v[:, 0], v == -torch.inf
    x = (v - v[:, :1]).masked_fill(is_none, 0.0)
    temperature = tensors[-2]
    if temperature is not None:
        by = temperature.detach().double().flatten()
        x = torch.where(x == 0, 0.0, x / (by.unsqueeze(-1) if by.numel() > 1 else by))
    e = x.exp().masked_fill(is_none, 0.0)
    is_bad = bad | v.isnan().any(1)
    log_denom = torch.log1p((e[:, :1] - 1).sum(1) + e[:, 1:].sum(1)).masked_fill(is_none[:, 0], 0.0)
    log_denom = log_denom.masked_fill(is_bad, torch.nan)
    log_p = (x - log_denom.unsqueeze(-1)).masked_fill(is_none & ~is_bad.unsqueeze(-1), 0.0)
    p = (e / e.sum(1, keepdim=True)).masked_fill(is_none, 0.0).masked_fill(is_bad.unsqueeze(-1), torch.nan)
    y = y.masked_fill(is_none, -1)
    chosen = y.narrow_copy(1, 0, 1).flatten() if chosen is None else chosen
    largest = largest.masked_fill(is_bad, torch.nan)
    return Kept(y, p, log_p, largest, log_denom, chosen)


@torch.no_grad()
def _found(part: Part, tensors: Tensors) -> tuple[Tensor, dict[str, Tensor], Kept]:
    """The mixture, the statistics [*] by name, and what gradients are made of."""
    kept, shape, table = _kept(part, tensors), shape_of(tensors), tensors[-1]
    y, p, log_p, largest, log_denom, chosen = kept
    stats = {
        "entropy": -torch.where(p == 0, 0.0, p * log_p).sum(1),
        "max_prob": torch.where(y[:, 0] < 0, 0.0, log_denom.neg().exp()),
        "sum_squares": p.square().sum(1),
    }
    fields = {name: value.to(part.compute).view(shape) for name, value in stats.items()}
    fields["argmax"] = chosen.view(shape)
    usage = torch.zeros(part.shard.size, dtype=torch.float64, device=p.device)
    is_nan = largest.isnan().unsqueeze(1)  # counts as NaN of label 0, as with one process
    weights = torch.where((y < 0) & ~is_nan, 0.0, p)
    usage.index_add_(0, y.clamp(min=0).masked_fill(is_nan, 0).flatten(), weights.flatten())
    fields["usage"] = usage.div(max(len(p), 1)).to(part.compute)
    numbers = [t.to(part.compute) for t in (p, log_p, largest, log_denom)]
    kept = Kept(y, numbers[0], numbers[1], numbers[2], numbers[3], part.local(chosen).view(shape))
    if part.options.hard:
        return chosen_rows(part, table, kept.chosen, kept.max.view(shape)), fields, kept
    mixture = torch.zeros((*table.shape[:-2], *shape, table.shape[-1]), dtype=part.compute, device=p.device)
    if part.shard.width and len(p):
        with torch.autocast(p.device.type, enabled=False):
            chunks = LookupCall(part.call(tensors).request(), [], part.options.backend, num_matrices=1)
            flat = mixture.view(len(chunks.tables), len(p), table.shape[-1])
            labels = part.local(y)
            weights = kept.p.masked_fill(labels < 0, 0.0)
            chunks.kernels.gather(chunks.tables, labels, weights, flat, chunks.in_double())
    dist.all_reduce(mixture, group=group_of(part))
    is_none = kept.max.isnan().view(*shape, 1)
    return mixture.masked_fill(is_none, torch.nan).to(part.out_dtype), fields, kept


# -- gradients ---------------------------------------------------------------------------------------------------------


class _ShardedSelection(torch.autograd.Function):
    """A mixture of the likeliest labels and its statistics, and gradients of the own labels."""

    @staticmethod
    def forward(ctx: Any, part: Part, wanted: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        mixture, fields, kept = _found(part, tensors)
        ctx.save_for_backward(part.mask, *kept, *tensors)
        ctx.part, ctx.wanted = part._replace(gumbel=None, seed=None, mask=None), wanted
        ctx.set_materialize_grads(False)
        return (mixture, *autograd.given_out(ctx, fields, wanted))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *of_fields: Tensor | None) -> tuple[Tensor | None, ...]:
        mask, *saved = ctx.saved_tensors
        kept, tensors = Kept(*saved[: len(Kept._fields)]), tuple(saved[len(Kept._fields) :])
        part = ctx.part._replace(mask=mask)
        needs = list(ctx.needs_input_grad[-len(tensors) :])
        grads: list[Tensor | None] = [None] * len(tensors)
        if grad is not None or any(t is not None for t in of_fields):
            upstream = autograd.upstream_of(ctx.wanted, of_fields)
            device = kept.p.device.type
            with torch.no_grad(), torch.autocast(device, enabled=False):
                grads = _gradients(part, tensors, kept, grad, upstream, needs)
        return (None, None, *once(WHO, grads, (*tensors, grad, *of_fields)))


def _gradients(
    part: Part, tensors: Tensors, kept: Kept, grad: Tensor | None, upstream: Upstream, needs: list[bool]
) -> list[Tensor | None]:
    num_rows, labels = len(kept.p), part.local(kept.labels)
    *needs_rest, needs_table = needs
    call = part.call(tensors)  # noise is added to the scores, whose gradients know nothing of it
    of_leaves = by_source(needs[:-2])
    chunks = grads = None
    if part.shard.width:
        chunks = LookupCall(call.request(), of_leaves, part.options.backend, num_matrices=2)
        if grad is not None:
            grads = with_whole_rows(grad.reshape(len(chunks.tables), num_rows, grad.shape[-1]).to(chunks.plan.operands))
    du = None
    if any(needs_rest):
        du = _of_kept(part, chunks, kept, labels, grads, grad is not None, upstream)
    if chunks is None:
        return [torch.zeros_like(t) if need else None for t, need in zip(tensors, needs, strict=True)]
    made: list[Tensor] = []
    if du is not None:
        for leaf, need in zip(_of_scores(chunks, tensors, kept, labels, du), needs_rest[:-1], strict=True):
            made += [leaf] if need and leaf is not None else []
        if needs_rest[-1]:
            log_p = torch.where(du == 0, 0.0, kept.log_p)
            made.append(-_over(tensors[-2], (du * log_p).sum(1)).view(shape_of(tensors)))
    if needs_table:
        of_table = TableGradients(chunks, has_terms=False)
        if grads is not None and part.options.hard:
            finite = torch.where(kept.max.isfinite(), 1.0, torch.nan).to(part.compute).unsqueeze(-1)
            of_table.scatter(kept.chosen.reshape(-1, 1), finite, grads)
        elif grads is not None:
            of_table.scatter(labels, kept.p.masked_fill(labels < 0, 0.0), grads)
        made.append(of_table.result())
    return autograd.per_tensor(spread(made, tuple(needs)), tensors)


def _over(temperature: Tensor | None, numbers: Tensor) -> Tensor:
    """numbers [N] or [N, k] over the temperature."""
    if temperature is None:
        return numbers
    by = temperature.flatten()
    return numbers / (by.unsqueeze(-1) if by.numel() > 1 and numbers.dim() == 2 else by)


def _of_kept(
    part: Part,
    chunks: LookupCall | None,
    kept: Kept,
    labels: Tensor,
    grads: Tensor | None,
    has_grad: bool,
    upstream: Upstream,
) -> Tensor:
    """du [N, k] of the own labels, zeros elsewhere."""
    p, is_own = kept.p, labels >= 0
    is_none = p == 0
    g, total = torch.zeros_like(p), p.new_zeros(len(p), dtype=torch.float64)
    if has_grad:
        if chunks is not None and grads is not None:
            chunks.kernels.products(chunks.tables, labels, grads, g, chunks.in_double())
        own = torch.where(is_own & ~is_none, p * g, 0.0).sum(1)
        total = gathered(own.contiguous(), group_of(part)).double().sum(0)
    of_stats = torch.zeros_like(p)
    if upstream.usage is not None:
        of_labels = upstream.usage.to(p.dtype) / max(len(p), 1)
        of_stats += of_labels[kept.labels.clamp(min=0)]
    if upstream.sum_squares is not None:
        of_stats += 2 * upstream.sum_squares.reshape(-1, 1) * p
    if upstream.entropy is not None:
        of_stats -= upstream.entropy.reshape(-1, 1) * kept.log_p
    if upstream.max_prob is not None:
        of_stats[:, 0] += upstream.max_prob.reshape(-1)
    total = total + torch.where(is_none, 0.0, p * of_stats).sum(1)
    du = p * (g + of_stats - total.to(p.dtype).unsqueeze(-1))
    return torch.where(is_own & ~is_none, du, 0.0)


def _of_scores(chunks: LookupCall, tensors: Tensors, kept: Kept, labels: Tensor, du: Tensor) -> list[Tensor | None]:
    """Gradients of the leaves, of scores' gradients that are zero but for the kept labels."""
    grads, places = _over(tensors[-2], du), labels.clamp(min=0)
    num_labels = chunks.request.num_labels()
    needs_scores, _ = chunks.scores.needs()
    if needs_scores:
        for start, stop in chunks.chunks:
            chunks.soft_rows(start, stop)  # their memory may become the gradient's
            buffer = chunks.scores.gradient_buffer(start, stop)
            assert buffer is not None, "there is at least one source"
            buffer.zero_()
            own = buffer[:, :num_labels]
            own.scatter_add_(1, places[start:stop], grads[start:stop].to(own.dtype))
            own.masked_fill_(kept.max[start:stop].isnan().unsqueeze(-1), torch.nan)
            chunks.scores.take_gradient(start, stop, buffer, None)
    return [leaf for one in chunks.scores.gradients() for leaf in one]
