"""soft_embedding over labels that are sharded over processes: its arguments, and that all processes make one call.

Lookups over all allowed labels are in lookup.py, those of the likeliest ones (top_k) in selection.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, dispatch
from ..heads.rows import settings
from ..soft_embedding import api, ops
from ..soft_embedding.request import mask_of
from ..sources import Source, SourceLike, as_sources, has_dtensor, leaves_of
from . import local, lookup, selection
from .agreement import Facts, agree, digest, digest_of
from .collectives import gathered
from .lookup import WHO
from .shard import VocabShard


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


class Options(NamedTuple):
    """Options of `soft_embedding` as they were given."""

    temperature: float | Tensor
    hard: bool
    gumbel: float | Tensor
    clean_gradient: bool
    seed: int | Tensor | None
    mask: Tensor | None
    top_k: int | None
    return_stats: bool


def soft_embedding(given: Resolved, options: Options, backend: str) -> tuple[Tensor, dict[str, Tensor] | None]:
    """The mixture and the fields of `LookupStats`, with several processes."""
    logits, table, shard, summed = given
    assert shard is not None, "there are several processes"
    group = shard.processes()
    assert group is not None, "there are several processes"
    error: Exception | None = None
    facts, part, sources, temperature = Facts(), None, [], options.temperature
    try:
        sources = as_sources("logits", logits)
        facts, part, temperature = _checked(sources, table, shard, options, backend)
    except (TypeError, ValueError, RuntimeError) as raised:
        error = raised
    device = table.device if isinstance(table, Tensor) else torch.device("cpu")
    agreement = agree(group, device, facts, error)
    assert part is not None, "its error has been raised"
    if part.gumbel is not None and options.seed is None and part.seed is not None:
        # each has drawn one, the first process's is everybody's
        part = part._replace(seed=gathered(part.seed.view(1), group)[0, 0])
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
        leaves = [*leaves, *leaves_of(source, api.number(scale, part.compute, device))]
    is_plain = not isinstance(temperature, Tensor) and temperature == 1.0
    tensors = (*leaves, None if is_plain else api.number(temperature, part.compute, device), table)
    wanted = lookup.ALL_STATS if options.return_stats else 0
    run = selection.lookup if part.options.top_k else lookup.lookup
    mixture, fields = run(part, tensors, wanted)
    if not options.return_stats:
        return mixture, None
    return mixture, fields | {"row_entropy": _row_entropy(part, tensors, fields["entropy"])}


def _row_entropy(part: lookup.Part, tensors: lookup.Tensors, entropy: Tensor) -> Tensor:
    """The entropy of the softmax that the gradient is of, without top_k."""
    if not part.options.top_k:
        return entropy
    whole = part._replace(options=part.options._replace(top_k=0, hard=True))  # hard, of no columns: no mixture
    if part.is_clean:
        whole = whole._replace(gumbel=None, seed=None, is_clean=False)
    table = tensors[-1].detach()[..., :0]
    return lookup.lookup(whole, (*tensors[:-1], table), mask_of("entropy"))[1]["entropy"]


def _checked(
    sources: list[Source], table: Any, shard: VocabShard, given: Options, backend: str
) -> tuple[Facts, lookup.Part, float | Tensor]:
    """One process's arguments by themselves; the last is the temperature."""
    checks.tables(table, may_lack_labels=True)
    shape, device = checks.leading("logits", sources[0])
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    of_sources = local.checked_sources(_named(sources), shard, shard.size, shape, device, autocast)
    num_rows = table.shape[-2]
    is_own, is_all = num_rows == shard.width, num_rows == shard.size
    if not (is_own or is_all) or table.device != device:
        raise ValueError(
            f"table must have a row for each of the shard's {shard.width} labels or for all {shard.size}, on the "
            f"scores' device {device}, got {list(table.shape)} on {table.device}"
        )
    temperature, hard, gumbel, seed, top_k = checks.lookup_options(
        *given[:3], given.seed, given.mask, given.top_k, shape, shard.size, device
    )
    clean_gradient = checks.gradient_option(given.clean_gradient, hard)
    compute = torch.float64 if table.dtype == torch.float64 else of_sources.compute
    if type(temperature) is float:
        temperature = api.in_range(temperature, compute)
    backend = dispatch.resolve(backend, device, compute)
    if backend == "reference":
        raise RuntimeError("labels in shards need backend='native' or 'triton', there is none for these tensors")
    bit = len(sources)
    how = [local.layout_of(source) for source in sources]
    tensors = [t for t in (table, temperature) if isinstance(t, Tensor)]
    trained = [t.requires_grad for t in tensors]
    said = [(t.dim(), digest(t)) if isinstance(t, Tensor) else t for t in (temperature, gumbel, seed)]
    facts = Facts(
        start=shard.start,
        stop=shard.stop,
        could_be_own=of_sources.could_be_own | is_own << bit,
        could_be_all=of_sources.could_be_all | is_all << bit,
        size=shard.size,
        num_rows=shape.numel(),
        outputs=digest_of(
            *(WHO, how, table.dtype, table.shape[:-2], table.shape[-1], autocast, settings.num_bytes),
            bool(given.return_stats),
        ),
        options=digest_of(
            *(backend, said, hard, clean_gradient, top_k, given.mask is None, torch.is_grad_enabled()),
        ),
        gradients=digest_of(local.trained(sources), trained),
    )
    mask = given.mask
    own_mask = None if mask is None else mask[..., shard.start : shard.stop].contiguous()
    softcaps = tuple([float(source.softcap or 0.0) for source in sources])
    is_cast = autocast is not None and table.dtype != torch.float64
    out_dtype = autocast if is_cast and autocast is not None else table.dtype
    has_noise = isinstance(gumbel, Tensor) or gumbel != 0
    part = lookup.Part(
        shard,
        # of all labels there are no likeliest ones
        ops.Options(softcaps, autocast, top_k if top_k < shard.size else 0, hard, backend),
        own_mask,
        _detached(api.number(gumbel, compute, device)) if has_noise else None,
        _detached(api.seed_of(seed, device)) if has_noise else None,
        clean_gradient and has_noise,
        compute,
        out_dtype,
    )
    return facts, part, temperature


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
