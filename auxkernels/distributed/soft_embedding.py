"""Label embeddings mixed by a softmax over labels that are sharded over processes: see `soft_embedding`.

Each process mixes its own labels' embeddings by the softmax over them, with max m, log denominator l and mixture e. The
processes' m and l are gathered, which gives the share w of the probability that each one's labels have, and the
mixtures are added up, w e of each. Backward, with p of all labels and g_k the upstream's product with embedding k,

    du_k = p_k (g_k - sum_j p_j g_j)

The others' part of the sum is (1 - w) h, with h the upstream's product with the others' mixture, so that nothing more
has to be sent. The row kernel sums over its own labels alone: it is given g_k - h, from which it makes
p_k (g_k - h - sum_own p_j (g_j - h)), which is the same, since the own p add up to w. The number -h of each row comes
as two more columns of the upstream, beside ones in the table: what its dtype rounds off the first is the second, since
an error that all labels of a row have in common would not cancel in a scale's gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks, dispatch
from ..autograd import apply, once
from ..cross_entropy.autograd import spread
from ..heads.rows import settings
from ..soft_embedding import api, autograd, ops
from ..soft_embedding.request import NO_UPSTREAM, State, mask_of, outputs_in
from ..sources import Source, SourceLike, as_sources, has_dtensor, leaves_of
from . import local, row_state
from .agreement import Facts, agree, digest_of
from .collectives import gathered
from .shard import VocabShard

_WHO = "soft_embedding"
_FIELDS = mask_of("max", "log_denom")


class Resolved(NamedTuple):
    """Arguments of a call in which DTensors are plain tensors; shard None: of one process."""

    logits: SourceLike
    table: Any
    shard: VocabShard | None
    summed: tuple[Tensor, ...] = ()


def resolved(logits: SourceLike, table: Any, shard: VocabShard | None) -> Resolved:
    """Which shard a call means, given or by DTensors. Of what means none, nothing is changed."""
    if shard is not None and not isinstance(shard, VocabShard):
        raise TypeError(f"shard must be a VocabShard, got {type(shard).__name__}")
    summed: tuple[Tensor, ...] = ()
    if has_dtensor(logits, table):
        from .dtensors import columns_of, localised  # imports DTensors

        sources = as_sources("logits", logits)
        plain = localised(_named(sources), len(sources), None, shard)
        if plain.shard is None:
            return Resolved(logits, table, None)
        logits, shard, summed = plain.base, plain.shard, plain.summed
        table = columns_of("table", table, -2, shard)
    if shard is None:
        return Resolved(logits, table, None)
    if shard.world_size() > 1:
        if torch.compiler.is_compiling():
            raise RuntimeError("labels in shards cannot be compiled: call it outside of torch.compile")
        return Resolved(logits, table, shard, summed)
    if shard.width != shard.size or (isinstance(table, Tensor) and table.dim() > 1 and table.shape[-2] != shard.size):
        raise ValueError(
            f"shard: the one process of the group must hold all {shard.size} labels, got [{shard.start}, {shard.stop}) "
            f"and a table {list(getattr(table, 'shape', []))}"
        )
    return Resolved(logits, table, None)


def _named(sources: list[Source]) -> list[tuple[str, Source]]:
    return [("logits" if len(sources) == 1 else f"logits[{i}]", source) for i, source in enumerate(sources)]


class _Part(NamedTuple):
    """What a process knows of a call beside its tensors."""

    shard: VocabShard
    options: ops.Options
    mask: Tensor | None  # of the own labels
    compute: torch.dtype
    out_dtype: torch.dtype

    def call(self, tensors: tuple[Any, ...]) -> ops.Call:
        """tensors: in the order of `ops.Call.differentiable`."""
        *leaves, temperature, table = tensors
        return ops.Call(tuple(leaves), temperature, table, None, None, self.mask, self.options)


def soft_embedding(
    given: Resolved, temperature: float | Tensor, mask: Tensor | None, backend: str, unsupported: Mapping[str, object]
) -> Tensor:
    """With several processes; arguments as they were given. unsupported: options that there are only without shards."""
    logits, table, shard, summed = given
    assert shard is not None, "there are several processes"
    group = shard.processes()
    assert group is not None, "there are several processes"
    error: Exception | None = None
    facts, part, sources = Facts(), None, []
    try:
        sources = as_sources("logits", logits)
        facts, part, temperature = _checked(sources, table, shard, temperature, mask, backend, unsupported)
    except (TypeError, ValueError, RuntimeError) as raised:
        error = raised
    device = table.device if isinstance(table, Tensor) else torch.device("cpu")
    agreement = agree(group, device, facts, error)
    assert part is not None, "its error has been raised"
    is_of_all = agreement.is_of_all_columns(len(sources), facts)
    also = [t for t in (temperature, table if is_of_all else None) if isinstance(t, Tensor)]
    sources, also = local.own_sources(sources, shard, agreement, facts, group, summed, also)
    if is_of_all:
        table = also.pop()[..., shard.start : shard.stop, :]
    if also:
        temperature = also[0]
    leaves: list[Tensor | None] = []
    for source in sources:
        scale = source.scale if isinstance(source.scale, Tensor) or source.scale != 1.0 else None
        leaves += leaves_of(source, api.number(scale, part.compute, device))
    is_plain = not isinstance(temperature, Tensor) and temperature == 1.0
    tensors = (*leaves, None if is_plain else api.number(temperature, part.compute, device), table)
    if autograd.requires_grad(part.call(tensors)):
        return apply(_ShardedLookup, _WHO, part, *tensors)
    return _mixed(part, tensors).mixture


def _checked(
    sources: list[Source],
    table: Any,
    shard: VocabShard,
    temperature: float | Tensor,
    mask: Tensor | None,
    backend: str,
    unsupported: Mapping[str, object],
) -> tuple[Facts, _Part, float | Tensor]:
    """One process's arguments by themselves; the last is the temperature."""
    checks.tables(table, may_lack_labels=True)
    shape, device = checks.leading("logits", sources[0])
    for name, value in unsupported.items():
        if value is not None and value is not False and not (type(value) in (float, int) and value == 0):
            raise ValueError(f"{name} must not be given where labels are sharded over processes")
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    of_sources = local.checked_sources(_named(sources), shard, shard.size, shape, device, autocast)
    num_rows = table.shape[-2]
    is_own, is_all = num_rows == shard.width, num_rows == shard.size
    if not (is_own or is_all) or table.device != device:
        raise ValueError(
            f"table must have a row for each of the shard's {shard.width} labels or for all {shard.size}, on the "
            f"scores' device {device}, got {list(table.shape)} on {table.device}"
        )
    options = checks.lookup_options(temperature, False, 0.0, None, mask, None, shape, shard.size, device)
    compute = torch.float64 if table.dtype == torch.float64 else of_sources.compute
    temperature = options.temperature
    if type(temperature) is float:
        temperature = api.in_range(temperature, compute)
    backend = dispatch.resolve(backend, device, compute)
    if backend == "reference":
        raise RuntimeError("labels in shards need backend='native' or 'triton', there is none for these tensors")
    bit = len(sources)
    how = [local.layout_of(source) for source in sources]
    tensors = [t for t in (table, temperature) if isinstance(t, Tensor)]
    trained = [t.requires_grad for t in tensors]
    said = temperature if not isinstance(temperature, Tensor) else temperature.dim()
    facts = Facts(
        start=shard.start,
        stop=shard.stop,
        could_be_own=of_sources.could_be_own | is_own << bit,
        could_be_all=of_sources.could_be_all | is_all << bit,
        size=shard.size,
        num_rows=shape.numel(),
        outputs=digest_of(_WHO, how, table.dtype, table.shape[:-2], table.shape[-1], autocast, settings.num_bytes),
        options=digest_of(backend, said, mask is None, torch.is_grad_enabled()),
        gradients=digest_of(local.trained(sources), trained),
    )
    own_mask = None if mask is None else mask[..., shard.start : shard.stop].contiguous()
    softcaps = tuple([float(source.softcap or 0.0) for source in sources])
    is_cast = autocast is not None and table.dtype != torch.float64
    out_dtype = autocast if is_cast and autocast is not None else table.dtype
    part = _Part(shard, ops.Options(softcaps, autocast, 0, False, backend), own_mask, compute, out_dtype)
    return facts, part, temperature


class _Mixed(NamedTuple):
    """A mixture of all labels, and what gradients are made of.

    mixture      [*, D] or [L, *, D]
    max          [*], the largest score of all labels
    log_denom    [*], over all labels
    of_others    as the mixture, that of the other processes' labels, in the compute dtype
    """

    mixture: Tensor
    max: Tensor
    log_denom: Tensor
    of_others: Tensor


@torch.no_grad()
def _mixed(part: _Part, tensors: tuple[Any, ...]) -> _Mixed:
    call, group = part.call(tensors), part.shard.processes()
    assert group is not None, "there are several processes"
    first, compute = call.leaves[0], part.compute
    assert first is not None, "a source has its values"
    shape, table = first.shape[:-1], call.table
    if part.shard.width:
        own, *outputs = ops.forward(call, _FIELDS)
        fields = dict(zip(outputs_in(_FIELDS), outputs, strict=True))
    else:
        own = table.new_zeros((*table.shape[:-2], *shape, table.shape[-1]))
        fields = {
            "max": first.new_full(shape, -torch.inf, dtype=compute),
            "log_denom": first.new_zeros(shape, dtype=compute),
        }
    packed = row_state.packed(fields, None, part.shard.start, part.shard.stop, 0.0, compute)
    sent = row_state.unpacked(gathered(packed, group), list(fields), False)
    maxima, log_denoms = sent.rows["max"], sent.rows["log_denom"]
    scaled = maxima
    if call.temperature is not None:
        by = call.temperature.detach().double().reshape(-1)
        scaled = torch.where(maxima == -torch.inf, maxima, maxima / by)
    whole = row_state.softmax_of(scaled, log_denoms)
    is_empty = whole.max == -torch.inf
    total = whole.share.sum(0)
    share, rank = whole.share / total, part.shard.rank()
    rest = torch.cat([whole.share[:rank], whole.share[rank + 1 :]]).sum(0) / total
    bad = row_state.disagreeing(sent, part.shard.size)
    share = share[rank].masked_fill(is_empty, 0.0).masked_fill(bad, torch.nan)
    own = own.to(compute) * _of_rows(share, shape, compute)
    mixture = own.clone()
    dist.all_reduce(mixture, group=group)
    rest = _of_rows(rest, shape, compute)
    of_others = torch.where(rest > torch.finfo(compute).eps, (mixture - own) / rest, 0.0)
    largest = maxima.amax(0).to(compute).view(shape)
    log_denom = whole.log_denom.masked_fill(is_empty, 0.0).to(compute).view(shape)
    return _Mixed(mixture.to(part.out_dtype), largest, log_denom, of_others)


def _of_rows(numbers: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """[*, 1], which multiplies mixtures."""
    return numbers.to(dtype).view(*shape, 1)


class _ShardedLookup(torch.autograd.Function):
    """A mixture, and gradients of the own labels, which communicate nothing."""

    @staticmethod
    def forward(ctx: Any, part: _Part, *tensors: Tensor | None) -> Tensor:
        found = _mixed(part, tensors)
        ctx.save_for_backward(found.max, found.log_denom, found.of_others, *tensors)
        ctx.part = part
        return found.mixture

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        largest, log_denom, of_others, *tensors = ctx.saved_tensors
        part, needs = ctx.part, ctx.needs_input_grad[-len(tensors) :]
        if part.shard.width == 0:
            grads = [torch.zeros_like(t) if need else None for t, need in zip(tensors, needs, strict=True)]
            return (None, *once(_WHO, grads, (*tensors, grad)))
        with torch.no_grad():
            *others, table = tensors
            width, compute = table.shape[-1], part.compute
            h = (grad.to(compute) * of_others).sum(-1)
            columns = _in_two(-(h if table.dim() == 2 else h.sum(0)), grad.dtype)
            if table.dim() == 3:  # of all tables, in the first one's columns
                columns = torch.cat([columns.unsqueeze(0), columns.new_zeros((len(table) - 1, *columns.shape))])
            wide = torch.cat([table, table.new_ones((*table.shape[:-1], 2))], -1)
            upstream = torch.cat([grad, columns], -1)
            state = State(largest, log_denom, torch.zeros_like(largest, dtype=torch.int64), None)
            made = ops.backward(part.call((*others, wide)), state, upstream, NO_UPSTREAM, list(needs))
            found = autograd.per_tensor(spread(made, needs), tensors)
            of_table = found[-1]
            if of_table is not None:
                found[-1] = of_table[..., :width].contiguous()
        return (None, *once(_WHO, found, (*tensors, grad)))


def _in_two(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """[*, 2] in a dtype, which add up to the numbers [*]."""
    first = numbers.to(dtype)
    return torch.stack([first, (numbers - first).to(dtype)], -1)
