"""A lookup of labels in shards, over all allowed ones: what processes tell each other of its rows, and its gradients.

Each process mixes its own labels' embeddings by the softmax over them, with max m, log denominator l and mixture e. The
processes' m and l are gathered, which gives the share w of the probability that each one's labels have, and the
mixtures are added up, w e of each. A hard choice is the embedding of the process that holds the likeliest label, and
zeros of the others. With statistics, a process sends its labels' entropy h and sum of squares q too, of which the row's
are sum w (h - log w) and sum w**2 q.

Backward, with p of all labels and g_k the upstream's product with embedding k (and what the statistics add to it),

    du_k = p_k (g_k - sum_j p_j g_j)

Let h be the others' part of the sum over their part 1 - w of the probability. The row kernel sums over its own labels
alone: it is given g_k - h, from which it makes p_k (g_k - h - sum_own p_j (g_j - h)), which is the same, since the own
p add up to w. Of a mixture h is the upstream's product with the others' mixture, which is known, so that nothing more
has to be sent; of a hard choice and of statistics it is made of one number a row that each process sends. The number -h
of each row comes as two more columns of the upstream, beside ones in the table: what its dtype rounds off the first is
the second, since an error that all labels of a row have in common would not cancel in a scale's gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..autograd import apply, once, saveable
from ..cross_entropy.autograd import spread
from ..reference import arithmetic_of
from ..soft_embedding import autograd, noise, ops
from ..soft_embedding.request import NO_UPSTREAM, OUTPUTS, State, Upstream, mask_of, outputs_in
from ..sources import Leaves
from . import row_state
from .collectives import gathered
from .shard import VocabShard

WHO = "soft_embedding"
ALL_STATS = mask_of("entropy", "max_prob", "sum_squares", "usage", "argmax")
_NOISE_CHUNK = 1 << 18  # numbers that are drawn at once
Tensors = tuple[Any, ...]  # in the order of `ops.Call.differentiable`


class Part(NamedTuple):
    """What a process knows of a call beside its tensors.

    options   without noise, which is a source of its own: the kernels number labels from 0
    mask      of the own labels
    gumbel    scale of the noise and its seed, 0-d; None: no noise
    is_clean  the noise chooses, and does nothing else
    drawn     the noise [*, own labels], where it is read more than once
    """

    shard: VocabShard
    options: ops.Options
    mask: Tensor | None
    gumbel: Tensor | None
    seed: Tensor | None
    is_clean: bool
    compute: torch.dtype
    out_dtype: torch.dtype
    drawn: Tensor | None = None

    def call(self, tensors: Tensors) -> ops.Call:
        """Without noise."""
        *leaves, temperature, table = tensors
        return ops.Call(tuple(leaves), temperature, table, None, None, self.mask, self.options)

    def noisy_call(self, tensors: Tensors) -> ops.Call:
        call, options = self.call(tensors), self.options
        if self.gumbel is None or self.seed is None:
            return call
        drawn = Leaves(self._noise(tensors) if self.drawn is None else self.drawn, scale=self.gumbel)
        return call._replace(leaves=(*call.leaves, *drawn), options=options._replace(softcaps=(*options.softcaps, 0.0)))

    def with_noise(self, tensors: Tensors) -> Part:
        """With that of the calls that the probabilities are of drawn, for a pass."""
        if self.gumbel is None or self.is_clean or self.shard.width == 0:
            return self
        return self._replace(drawn=self._noise(tensors))

    def call_of_gradient(self, tensors: Tensors) -> ops.Call:
        """The one that the probabilities are of."""
        return self.call(tensors) if self.is_clean else self.noisy_call(tensors)

    def needs(self, call: ops.Call, needs: list[bool]) -> list[bool]:
        """The needs of a call that may have noise, from those without."""
        return [*needs[:-2], *[False] * (len(call.leaves) + 2 - len(needs)), *needs[-2:]]

    def _noise(self, tensors: Tensors) -> Tensor:
        assert self.seed is not None, "there is noise"
        shape, device, width = shape_of(tensors), tensors[0].device, self.shard.width
        num_rows, arithmetic = shape.numel(), arithmetic_of(self.compute, device)
        found = torch.empty((num_rows, width), dtype=self.compute, device=device)
        step = max(1, _NOISE_CHUNK // max(width, 1))
        for first in range(0, num_rows, step):
            size = min(step, num_rows - first)
            drawn = noise.gumbel(size, width, self.seed, arithmetic, first, self.shard.start)
            found[first : first + size] = drawn
        return found.view(*shape, width)

    def local(self, labels: Tensor) -> Tensor:
        """Labels as the own ones are numbered, -1: of another process."""
        is_own = (labels >= self.shard.start) & (labels < self.shard.stop)
        return torch.where(is_own, labels - self.shard.start, -1)


def group_of(part: Part) -> Any:
    group = part.shard.processes()
    assert group is not None, "there are several processes"
    return group


def shape_of(tensors: Tensors) -> torch.Size:
    return tensors[0].shape[:-1]


def lookup(part: Part, tensors: Tensors, wanted: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The mixture and the wanted outputs by name, over all allowed labels."""
    if autograd.requires_grad(part.call(tensors)):
        mixture, *fields = apply(_ShardedLookup, WHO, part, wanted, *tensors)
    else:
        found = _found(part, tensors, wanted, False)
        mixture, fields = found.mixture, [found.fields[name] for name in outputs_in(wanted)]
    return mixture, dict(zip(outputs_in(wanted), fields, strict=True))


# -- forward -----------------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Numbers [*] of the rows for their gradients, in the compute dtype; labels as the own ones are numbered.

    max, log_denom        of all labels
    best                  the likeliest label, -1: another process's
    chosen                the same of a hard choice
    share, rest           the probability of the own labels, and of the others
    entropy, sum_squares  what the own labels count of them; None: without statistics
    """

    max: Tensor
    log_denom: Tensor
    best: Tensor
    chosen: Tensor
    share: Tensor
    rest: Tensor
    entropy: Tensor | None
    sum_squares: Tensor | None


class _Found(NamedTuple):
    """of_others: the mixture of the other processes' labels, in the compute dtype; None where it is not asked for."""

    mixture: Tensor
    fields: dict[str, Tensor]
    rows: Rows
    of_others: Tensor | None


@torch.no_grad()
def _found(part: Part, tensors: Tensors, wanted: int, has_gradient: bool) -> _Found:
    hard, group, compute = part.options.hard, group_of(part), part.compute
    shape, table = shape_of(tensors), tensors[-1]
    chosen = choice_of(part, tensors) if part.is_clean else None
    part = part.with_noise(tensors) if wanted & mask_of("usage") else part
    names = ["max", "log_denom"]
    if hard or wanted:
        names.append("argmax")
    if wanted:
        names += ["entropy", "sum_squares"]
    own, fields = _scanned(part, tensors, names)
    packed = row_state.packed(fields, None, part.shard.start, part.shard.stop, 0.0, compute)
    sent = row_state.unpacked(gathered(packed, group), list(fields), False)
    maxima, log_denoms = sent.rows["max"], sent.rows["log_denom"]
    whole = row_state.softmax_of(_tempered(maxima, tensors[-2]), log_denoms)
    is_empty, bad = whole.max == -torch.inf, row_state.disagreeing(sent, part.shard.size)
    shares = (whole.share / whole.share.sum(0)).masked_fill(is_empty, 0.0)
    others = torch.stack([_without(whole.share, rank).sum(0) for rank in range(len(shares))])
    rests = (others / whole.share.sum(0)).masked_fill(is_empty, 0.0)

    def of_rows(numbers: Tensor) -> Tensor:
        return numbers.masked_fill(is_empty, 0.0).masked_fill(bad, torch.nan).to(compute).view(shape)

    largest = maxima.amax(0).masked_fill(bad, torch.nan).to(compute).view(shape)
    rank, found = part.shard.rank(), {}
    of_own: tuple[Tensor | None, Tensor | None] = (None, None)
    best = torch.full(shape, -1, dtype=torch.int64, device=largest.device)
    if "argmax" in fields:
        best = row_state.argmax_of(sent.rows["argmax"], maxima, maxima.amax(0)).masked_fill(is_empty, -1).view(shape)
        chosen = best if chosen is None else chosen
        found["argmax"] = chosen
    if wanted:
        logs = torch.where(shares > 0.5, torch.log1p(-rests), whole.shift + log_denoms - whole.log_denom)
        entropies = torch.where(shares == 0, 0.0, shares * (sent.rows["entropy"] - logs))
        squares = shares.square() * sent.rows["sum_squares"]
        found |= {"entropy": of_rows(entropies.sum(0)), "sum_squares": of_rows(squares.sum(0))}
        found["max_prob"] = of_rows(whole.log_denom.neg().exp())
        of_own = of_rows(entropies[rank]), of_rows(squares[rank])
    share, rest = of_rows(shares[rank]), of_rows(rests[rank])
    log_denom = of_rows(whole.log_denom)
    local, chosen = (part.local(best if labels is None else labels) for labels in (best, chosen))
    rows = Rows(largest, log_denom, local, chosen, share, rest, *of_own)
    mixture, of_others = _mixed(part, table, own, rows, has_gradient)
    if wanted & mask_of("usage"):
        found["usage"] = _usage(part, tensors, rows)
    return _Found(mixture, found, rows, of_others)


def _without(numbers: Tensor, rank: int) -> Tensor:
    """[R, N]: those of the other processes."""
    return torch.cat([numbers[:rank], numbers[rank + 1 :]])


def _tempered(maxima: Tensor, temperature: Tensor | None) -> Tensor:
    if temperature is None:
        return maxima
    return torch.where(maxima == -torch.inf, maxima, maxima / temperature.detach().double().reshape(-1))


def _scanned(part: Part, tensors: Tensors, names: list[str]) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The own labels' mixture, of a call that is not hard, and the fields to be sent."""
    shape, device, table = shape_of(tensors), tensors[0].device, tensors[-1]
    if part.shard.width == 0:
        own = None
        if not part.options.hard:
            own = table.new_zeros((*table.shape[:-2], *shape, table.shape[-1]))
        return own, _of_no_labels(part, names, shape, device)
    call = part.call_of_gradient(tensors)
    if part.options.hard:
        call = call._replace(table=unread(table))
    wanted = mask_of(*names)
    own, *outputs = ops.forward(call, wanted)
    fields = dict(zip(outputs_in(wanted), outputs, strict=True))
    if "argmax" in fields:
        fields["argmax"] = fields["argmax"] + part.shard.start
    return None if part.options.hard else own, fields


def unread(table: Tensor) -> Tensor:
    """A table for scans whose mixture nobody reads."""
    return table.new_zeros((table.shape[-2], 1))


def _of_no_labels(part: Part, names: list[str], shape: torch.Size, device: torch.device) -> dict[str, Tensor]:
    values = {"max": -torch.inf, "argmax": part.shard.size}
    return {
        name: torch.full(
            shape, values.get(name, 0), dtype=torch.int64 if name == "argmax" else part.compute, device=device
        )
        for name in OUTPUTS
        if name in names
    }


@torch.no_grad()
def choice_of(part: Part, tensors: Tensors) -> Tensor:
    """The likeliest label [*] with the noise, as it is numbered in the vocabulary; -1: none is allowed."""
    names, shape = ["max", "argmax"], shape_of(tensors)
    if part.shard.width == 0:
        fields = _of_no_labels(part, names, shape, tensors[0].device)
    else:
        call = part.noisy_call((*tensors[:-1], unread(tensors[-1])))
        call = call._replace(options=call.options._replace(top_k=0, hard=True))
        _, *outputs = ops.forward(call, mask_of(*names))
        fields = dict(zip(names, outputs, strict=True))
        fields["argmax"] = fields["argmax"] + part.shard.start
    packed = row_state.packed(fields, None, part.shard.start, part.shard.stop, 0.0, part.compute)
    sent = row_state.unpacked(gathered(packed, group_of(part)), names, False)
    maxima = sent.rows["max"]
    largest = maxima.amax(0)
    return row_state.argmax_of(sent.rows["argmax"], maxima, largest).masked_fill(largest == -torch.inf, -1).view(shape)


def _mixed(
    part: Part, table: Tensor, own: Tensor | None, rows: Rows, has_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    if own is None:
        return chosen_rows(part, table, rows.chosen, rows.max), None
    own = own.to(part.compute) * rows.share.unsqueeze(-1)
    mixture = own.clone()
    dist.all_reduce(mixture, group=group_of(part))
    rest, of_others = rows.rest.unsqueeze(-1), None
    if has_gradient:
        of_others = torch.where(rest > torch.finfo(part.compute).eps, (mixture - own) / rest, 0.0)
    return mixture.to(part.out_dtype), of_others


def chosen_rows(part: Part, table: Tensor, chosen: Tensor, maxima: Tensor) -> Tensor:
    """The table's rows of hard choices, from the processes that hold them; NaN for rows that are no distribution.

    Of a table without columns nothing is sent.
    """
    found = torch.zeros((*table.shape[:-2], *chosen.shape, table.shape[-1]), dtype=part.compute, device=table.device)
    if part.shard.width:
        picked = table.index_select(-2, chosen.clamp(min=0).flatten()).to(part.out_dtype).view(found.shape)
        found = torch.where((chosen >= 0).unsqueeze(-1), picked.to(part.compute), found)
    if table.shape[-1]:
        dist.all_reduce(found, group=group_of(part))
    is_none = ~maxima.isfinite() & (maxima != -torch.inf)
    return found.masked_fill(is_none.unsqueeze(-1), torch.nan).to(part.out_dtype)


def _usage(part: Part, tensors: Tensors, rows: Rows) -> Tensor:
    """[K]: a table of ones has it as its gradient."""
    shard, num_rows = part.shard, rows.max.numel()
    usage = torch.zeros(shard.size, dtype=part.compute, device=rows.max.device)
    if shard.width and num_rows:
        ones = usage.new_ones((shard.width, 1))
        call = part.call_of_gradient((*tensors[:-1], ones))
        call = call._replace(options=call.options._replace(hard=False))
        needs = part.needs(call, [*[False] * (len(tensors) - 1), True])
        of_rows = usage.new_ones((*rows.max.shape, 1))
        (found,) = ops.backward(call, _state(rows, rows.best), of_rows, NO_UPSTREAM, needs)
        usage[shard.start : shard.stop] = found.view(-1) / num_rows
    dist.all_reduce(usage, group=group_of(part))
    return usage


def _state(rows: Rows, labels: Tensor) -> State:
    return State(rows.max, rows.log_denom, labels, None)


# -- gradients ---------------------------------------------------------------------------------------------------------


def sums_of_others(part: Part, own: Tensor) -> Tensor:
    """What the other processes have sent of numbers [*], added up; float64."""
    found = gathered(own.to(part.compute).reshape(-1).contiguous(), group_of(part)).double()
    return _without(found, part.shard.rank()).sum(0).view(own.shape)


class _ShardedLookup(torch.autograd.Function):
    """A mixture and statistics, and gradients of the own labels."""

    @staticmethod
    def forward(ctx: Any, part: Part, wanted: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        found = _found(part, tensors, wanted, True)
        seed, gumbel = saveable(part.seed), saveable(part.gumbel)
        ctx.save_for_backward(gumbel, seed, part.mask, found.of_others, *found.rows, *tensors)
        ctx.part, ctx.wanted = part._replace(gumbel=None, seed=None, mask=None), wanted
        ctx.set_materialize_grads(False)
        return (found.mixture, *autograd.given_out(ctx, found.fields, wanted))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *of_fields: Tensor | None) -> tuple[Tensor | None, ...]:
        gumbel, seed, mask, of_others, *saved = ctx.saved_tensors
        rows, tensors = Rows(*saved[: len(Rows._fields)]), tuple(saved[len(Rows._fields) :])
        part = ctx.part._replace(gumbel=gumbel, seed=seed, mask=mask)
        needs = list(ctx.needs_input_grad[-len(tensors) :])
        grads: list[Tensor | None] = [None] * len(tensors)
        if grad is not None or any(t is not None for t in of_fields):
            upstream = autograd.upstream_of(ctx.wanted, of_fields)
            with torch.no_grad():
                grads = _gradients(part, tensors, rows, of_others, grad, upstream, needs)
        return (None, None, *once(WHO, grads, (*tensors, grad, *of_fields)))


def _gradients(
    part: Part,
    tensors: Tensors,
    rows: Rows,
    of_others: Tensor | None,
    grad: Tensor | None,
    upstream: Upstream,
    needs: list[bool],
) -> list[Tensor | None]:
    *needs_rest, needs_table = needs
    part = part.with_noise(tensors)
    if upstream.usage is not None:
        own = upstream.usage[part.shard.start : part.shard.stop]
        upstream = upstream._replace(usage=own.to(part.compute))
    shift = _shift(part, tensors, rows, of_others, grad, upstream) if any(needs_rest) else None
    if part.shard.width == 0:
        return [torch.zeros_like(t) if need else None for t, need in zip(tensors, needs, strict=True)]
    found: list[Tensor | None] = [None] * len(tensors)
    of_mixture = needs_table and not part.options.hard and grad is not None
    if any(needs_rest) or of_mixture:
        found = _of_mixture(part, tensors, rows, shift, grad, upstream, [*needs_rest, of_mixture])
    if needs_table and part.options.hard and grad is not None:
        # of the state it reads the label and whether the row is a distribution
        of_table = [*[False] * len(needs_rest), True]
        (found[-1],) = ops.backward(part.call(tensors), _state(rows, rows.chosen), grad, NO_UPSTREAM, of_table)
    return found


def _shift(
    part: Part, tensors: Tensors, rows: Rows, of_others: Tensor | None, grad: Tensor | None, upstream: Upstream
) -> Tensor | None:
    """h [*] of the rows, in the compute dtype."""
    shift, own = None, torch.zeros_like(rows.share)
    if grad is not None and of_others is not None:
        shift = _dot(grad.to(part.compute), of_others, rows)
    is_hard = grad is not None and part.options.hard
    if not is_hard and all(t is None for t in upstream):
        return shift
    call = None
    if part.shard.width and (is_hard or upstream.usage is not None):
        call = part.call_of_gradient(tensors)
        call = call._replace(options=call.options._replace(hard=False))
    if is_hard and call is not None and grad is not None:
        # not rounded to the table's dtype
        (mixture,) = ops.forward(call._replace(table=call.table.to(part.compute)), 0)
        own = rows.share * _dot(grad.to(part.compute), mixture.to(part.compute), rows)
    if upstream.usage is not None and call is not None:
        (of_usage,) = ops.forward(call._replace(table=upstream.usage.unsqueeze(-1).contiguous()), 0)
        own = own + rows.share * of_usage.to(part.compute).squeeze(-1) / max(own.numel(), 1)
    if upstream.entropy is not None and rows.entropy is not None:
        own = own + upstream.entropy * rows.entropy
    if upstream.sum_squares is not None and rows.sum_squares is not None:
        own = own + 2 * upstream.sum_squares * rows.sum_squares
    if upstream.max_prob is not None:
        own = own + torch.where(rows.best >= 0, upstream.max_prob * rows.log_denom.neg().exp(), 0.0)
    own = torch.where(rows.share == 0, 0.0, own)
    sent = torch.where(rows.rest > 0, sums_of_others(part, own) / rows.rest, 0.0).to(part.compute)
    return sent if shift is None else shift + sent


def _dot(grad: Tensor, mixture: Tensor, rows: Rows) -> Tensor:
    """[*], of all tables."""
    products = (grad * mixture).sum(-1)
    return products if products.dim() == rows.max.dim() else products.sum(0)


def _of_mixture(
    part: Part,
    tensors: Tensors,
    rows: Rows,
    shift: Tensor | None,
    grad: Tensor | None,
    upstream: Upstream,
    needs: list[bool],
) -> list[Tensor | None]:
    """The gradients of the mixture that is not hard."""
    table = tensors[-1]
    if any(t is not None for t in upstream):
        # statistics do not depend on the table's dtype
        table, grad = table.to(part.compute), None if grad is None else grad.to(part.compute)
    if grad is None:
        table, grad = table[..., :0], table.new_zeros((*table.shape[:-2], *rows.max.shape, 0))
    if shift is None:
        shift = torch.zeros_like(rows.max)
    columns = _in_two(-shift, grad.dtype)
    if table.dim() == 3:  # of all tables, in the first one's columns
        columns = torch.cat([columns.unsqueeze(0), columns.new_zeros((len(table) - 1, *columns.shape))])
    wide = torch.cat([table, table.new_ones((*table.shape[:-1], 2))], -1)
    call = part.call_of_gradient((*tensors[:-1], wide))
    call = call._replace(options=call.options._replace(hard=False))
    made = ops.backward(
        call, _state(rows, rows.best), torch.cat([grad, columns], -1), upstream, part.needs(call, needs)
    )
    found = autograd.per_tensor(spread(made, tuple(needs)), tensors)
    of_table = found[-1]
    if of_table is not None:
        found[-1] = of_table[..., : table.shape[-1]].to(tensors[-1].dtype).contiguous()
    return found


def _in_two(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """[*, 2] in a dtype, which add up to the numbers [*]."""
    first = numbers.to(dtype)
    return torch.stack([first, (numbers - first).to(dtype)], -1)
