"""Cross-entropy and row statistics over a sharded vocabulary: see `aux_cross_entropy` and `logit_stats`."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, dispatch
from ..cross_entropy import api, autograd, ops, rows
from ..cross_entropy.request import Arguments, LossTerms, raise_out_of_range
from ..cross_entropy.rows import LogitStats
from ..heads.rows import settings
from ..sources import Logits, Source, SourceLike, as_sources, has_dtensor
from . import local, scan
from .agreement import Agreement, Facts, agree, digest, digest_of
from .one_pass import loss_and_gradients
from .shard import VocabShard


class Options(NamedTuple):
    """Options of a loss; those of a call for statistics are of no consequence."""

    weight: Tensor | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    reduction: str = "mean"
    normalizer: float | Tensor | None = None
    return_stats: bool = False
    recompute: bool = False


class _Call(NamedTuple):
    """Checked on all processes."""

    part: scan.Part
    call: ops.Call  # of the own columns
    terms: LossTerms
    normalizer: float | Tensor | None
    widest: int  # columns of the process that has the most


class Resolved(NamedTuple):
    """Arguments of a call in which DTensors are plain tensors.

    shard    None: of one process, which holds all columns
    summed   tensors whose gradients are added up over the processes on their way back
    """

    base: SourceLike
    aux: SourceLike | None
    target: Any
    shard: VocabShard | None
    summed: tuple[Tensor, ...] = ()


def resolved(
    base: SourceLike, aux: SourceLike | None, target: Any, shard: VocabShard | None, vocab_size: int | None
) -> Resolved:
    """Which shard a call means, given or by DTensors. Of what means none, nothing is changed."""
    if shard is not None and not isinstance(shard, VocabShard):
        raise TypeError(f"shard must be a VocabShard, got {type(shard).__name__}")
    summed: tuple[Tensor, ...] = ()
    if has_dtensor(base, aux, target):
        from .dtensors import localised  # imports DTensors

        of_base, of_aux = as_sources("base", base), [] if aux is None else as_sources("aux", aux)
        plain = localised(named(of_base, of_aux), len(of_base), target, shard)
        if plain.shard is None:
            return Resolved(base, aux, target, None)
        base, aux, target, shard, summed = plain.base, plain.aux or None, *plain[2:]
    if shard is None:
        return Resolved(base, aux, target, None)
    if shard.world_size() > 1:
        if torch.compiler.is_compiling():
            raise RuntimeError("a sharded vocabulary cannot be compiled: call it outside of torch.compile")
        return Resolved(base, aux, target, shard, summed)
    if shard.width != shard.size:
        raise ValueError(
            f"shard: the one process of the group must hold all {shard.size} columns, got [{shard.start}, {shard.stop})"
        )
    sources = [*as_sources("base", base), *([] if aux is None else as_sources("aux", aux))]
    widths = [source.values.shape[-1] if isinstance(source, Logits) else len(source.weight) for source in sources]
    if vocab_size is None and any(width != shard.size for width in widths):
        raise ValueError(f"shard: the sources must have its {shard.size} columns, got widths {widths}")
    return Resolved(base, aux, target, None)


def named(base: list[Source], aux: list[Source]) -> list[tuple[str, Source]]:
    """The sources with what errors call them."""
    return [
        (side if len(sources) == 1 else f"{side}[{i}]", source)
        for side, sources in (("base", base), ("aux", aux))
        for i, source in enumerate(sources)
    ]


def aux_cross_entropy(
    given: Resolved, ignore_index: int, vocab_size: int | None, backend: str, options: Options
) -> Tensor | tuple[Tensor, LogitStats]:
    """With several processes; other arguments as they were given."""
    part, call, terms, normalizer, widest = _agreed(given, ignore_index, vocab_size, backend, options)
    label_smoothing, z_loss, _ = terms
    has_gradient = autograd.requires_grad(call)
    wanted = api.OF_STATS if options.return_stats else 0
    is_from_rows = (
        options.reduction == "none"
        or call.options.is_of_matrices
        or not has_gradient
        or autograd.is_better_from_rows(call, has_gradient, options.recompute)
    )
    if is_from_rows:
        fields = scan.row_fields(part, call.leaves, has_gradient, wanted | rows.fields_of_loss(label_smoothing, z_loss))
        loss = rows.loss_of(
            fields,
            given.target,
            options.weight,
            ignore_index,
            part.shard.size,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            reduction=options.reduction,
            normalizer=normalizer,
        )
    else:
        made = loss_and_gradients(part, call, options.weight, ignore_index, normalizer, terms, wanted, widest)
        loss, fields = autograd.loss_in_one_pass(call, has_gradient, normalizer, terms, wanted, made)
    return (loss, rows.finished_stats(fields)) if options.return_stats else loss


def logit_stats(given: Resolved, ignore_index: int, vocab_size: int | None, backend: str) -> LogitStats:
    """With several processes; other arguments as they were given."""
    part, call, *_ = _agreed(given, ignore_index, vocab_size, backend, None)
    if not autograd.requires_grad(call):
        wanted = api.OF_STATS if given.target is not None else rows.FINISHED
        return rows.finished_stats(scan.row_fields(part, call.leaves, False, wanted))
    wanted = rows.PARTS | rows.PARTS_OF_TARGET if given.target is not None else rows.PARTS
    return rows.stats_of_parts(scan.row_fields(part, call.leaves, True, wanted))


# -- arguments ---------------------------------------------------------------------------------------------------------


class _Checked(NamedTuple):
    """One process's arguments, after its own checks. base, aux: as they were given."""

    base: list[Source]
    aux: list[Source]
    of_sources: local.Checked
    terms: LossTerms
    normalizer: float | Tensor | None
    arguments: Arguments  # without sources
    facts: Facts


def _agreed(given: Resolved, ignore_index: int, vocab_size: int | None, backend: str, options: Options | None) -> _Call:
    """The call on the own columns. Raises on all processes what any of them finds wrong, on CPU."""
    base, aux, target, shard, summed = given
    assert shard is not None, "there are several processes"
    group = shard.processes()
    assert group is not None, "there are several processes"
    found, error = None, None
    try:
        found = _checked(base, aux, target, shard, ignore_index, vocab_size, backend, options)
    except (TypeError, ValueError, IndexError, RuntimeError) as raised:
        error = raised
    device = _device_of(base, target)
    agreement = agree(group, device, Facts() if found is None else found.facts, error)
    assert found is not None, "its error has been raised"
    return _own_call(found, agreement, shard, summed, options or Options())


def _device_of(base: SourceLike, target: Tensor | None) -> torch.device:
    """Of a call that may be wrong."""
    tensors: list[Any] = [target]
    with contextlib.suppress(TypeError, ValueError):
        tensors += [t for source in as_sources("base", base) for t in local.tensors_of(source)]
    return next((t.device for t in tensors if isinstance(t, Tensor)), torch.device("cpu"))


def _checked(
    base: SourceLike,
    aux: SourceLike | None,
    target: Tensor | None,
    shard: VocabShard,
    ignore_index: int,
    vocab_size: int | None,
    backend: str,
    options: Options | None,
) -> _Checked:
    given = options or Options()
    if options is not None or target is not None:
        checks.classes(target)
    normalizer = checks.reduction(given.reduction, given.normalizer)
    label_smoothing = checks.real_number("label_smoothing", given.label_smoothing, minimum=0.0, maximum=1.0)
    z_loss = checks.real_number("z_loss", given.z_loss, minimum=0.0)
    ignore_index = checks.int64("ignore_index", ignore_index)
    of_base = as_sources("base", base)
    of_aux = [] if aux is None else as_sources("aux", aux)
    if target is None:
        shape, device = checks.leading("base", of_base[0])
    else:
        shape, device = target.shape, target.device
    num_columns = shard.size if vocab_size is None else checks.integer("vocab_size", vocab_size)
    if not 0 < num_columns <= shard.size:
        raise ValueError(f"vocab_size must be in [1, {shard.size}], the shard's size, got {num_columns}")
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    sources = named(of_base, of_aux)
    of_sources = local.checked_sources(sources, shard, num_columns, shape, device, autocast)
    if given.weight is not None:
        checks.class_weight(given.weight, num_columns, device)
    backend = dispatch.resolve(backend, device, of_sources.compute, has_cuda_kernels=True)
    if backend == "reference":
        raise RuntimeError("a sharded vocabulary needs backend='native' or 'triton', there is none for these tensors")
    if target is not None:
        raise_out_of_range(target, num_columns, ignore_index)
    terms = LossTerms(label_smoothing, z_loss, given.reduction == "mean")
    everything: tuple[object, ...] = (num_columns, ignore_index, label_smoothing, z_loss, given.reduction, backend)
    if device.type == "cpu":
        shown = normalizer.item() if isinstance(normalizer, Tensor) else normalizer
        everything = (*everything, shown, digest(given.weight))
    how = [local.layout_of(source) for _, source in sources]
    what = options is not None, target is not None, given.return_stats, given.recompute, torch.is_grad_enabled()
    facts = Facts(
        start=shard.start,
        stop=shard.stop,
        could_be_own=of_sources.could_be_own,
        could_be_all=of_sources.could_be_all,
        size=shard.size,
        num_rows=shape.numel(),
        rows=digest(target),
        outputs=digest_of(*what, len(of_base), how, of_sources.widths, autocast, settings.num_bytes),
        options=digest_of(*everything),
        gradients=local.trained([source for _, source in sources]),
    )
    arguments = Arguments([], [], target, ignore_index, num_columns, of_sources.compute, autocast, backend)
    normalizer = api.number(normalizer, torch.float64, device)
    return _Checked(of_base, of_aux, of_sources, terms, normalizer, arguments, facts)


def _own_call(
    found: _Checked, agreement: Agreement, shard: VocabShard, summed: tuple[Tensor, ...], options: Options
) -> _Call:
    base, aux, arguments = found.base, found.aux, found.arguments
    group = shard.processes()
    assert group is not None, "there are several processes"
    shard = shard.up_to(arguments.vocab_size)
    sources, _ = local.own_sources([*base, *aux], shard, agreement, found.facts, group, summed)
    target, ignore_index = arguments.target, arguments.ignore_index
    own = arguments._replace(
        base=sources[: len(base)],
        aux=sources[len(base) :],
        target=None,
        ignore_index=scan.IGNORED,
        vocab_size=shard.width,
    )
    call = api.call_of(own, None, _device_of(base[0], target))
    part = scan.part_of(shard, call.options, target, ignore_index, options.weight, arguments.compute)
    normalizer = found.normalizer
    if found.terms.mean and normalizer is None and target is not None:
        normalizer = _divisor(part, options.weight)
    widest = agreement.widest(arguments.vocab_size, group.size())
    return _Call(part, part.call(call.leaves), found.terms, normalizer, widest)


def _divisor(part: scan.Part, weight: Tensor | None) -> Tensor:
    """Of the mean over the kept rows: how many, or the sum of their classes' weights; float64, 0-d."""
    assert part.ignored is not None and part.target is not None, "a loss has a target"
    kept = ~part.ignored
    if weight is None:
        return kept.sum().double()
    classes = part.target.long().masked_fill(part.ignored, 0).clamp(0, part.shard.size - 1)
    return torch.where(kept, weight.double()[classes], 0.0).sum()
