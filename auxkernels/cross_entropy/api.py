"""Cross-entropy and row statistics of softmax(base + aux): the public functions, their checks and their arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import checks, dispatch
from ..sources import Head, Source, SourceLike, as_sources, has_dtensor, leaves_of
from . import autograd, native_plain, ops, reference, rows
from .request import Arguments, LossTerms, fields_in
from .rows import LogitStats

if TYPE_CHECKING:
    from ..distributed.shard import VocabShard

OF_STATS = rows.FINISHED | rows.FINISHED_OF_TARGET
_STATS = [field.name for field in dataclasses.fields(LogitStats)]


def aux_cross_entropy(
    base: SourceLike,
    aux: SourceLike | None,
    target: Tensor,
    *,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    vocab_size: int | None = None,
    return_stats: bool = False,
    recompute: bool = False,
    backend: str = "auto",
    shard: VocabShard | None = None,
) -> Tensor | tuple[Tensor, LogitStats]:
    """Cross-entropy of softmax(base + aux) against class indices, in nats, without storing the sum.

    base, aux        [*, V] floating point, `Logits` (with scale and softcap), `Head` (hidden [*, D] and weight [V, D]:
                     logits are never stored whole), or a sequence of these (their sum); aux=None is plain
                     cross-entropy. Any strides but the last dimension's of logits, which is contiguous; the sum is
                     formed in float32 (float64 if a source is). Each tensor gets a gradient in its dtype, if required.
    target           [*] int32 or int64, each in [0, V) or equal to ignore_index.
    ignore_index     rows with this target have loss 0 and gradient exactly 0, whatever they hold.
    weight           [V] class weights, floating point, as in torch.nn.functional.cross_entropy; gets no gradient.
    label_smoothing  in [0, 1], torch's semantics with and without weights.
    z_loss           adds z_loss * lse**2 to each row; not class-weighted, same divisor.
    reduction        "mean" (over kept rows; with weights over the sum of w[target]), "sum", or "none".
    normalizer       number or 0-d tensor: the divisor of "mean" instead (the whole batch's count makes gradient
                     accumulation exact). Gets no gradient.
    vocab_size       how many leading columns count, where the sources are not equally wide.
    return_stats     also return `LogitStats`, detached, from the same pass.
    recompute        keep the row state instead of a gradient: the graph can be used twice.
    backend          "auto", or "reference", "native", "triton": that one or an error.
    shard            the columns that this process holds of a vocabulary that is sharded over processes (sources that
                     have all columns are cut); targets, class weights and results are of the whole vocabulary. See
                     docs/heads.md.
    Returns          float32 (float64 if a source is): 0-d, or [*] for reduction="none".
    Raises           TypeError, ValueError: dtype, shape, device, option. IndexError: a target out of range, on CPU; on
                     GPU such a row is NaN in loss and gradient, and nothing is read out of bounds. RuntimeError: an
                     unavailable backend; a second backward without recompute=True; double differentiation.
    Source           Zeldes et al. 2020 (auxiliary tuning); Milakov & Gimelshein 2018 (online softmax).
    """
    if shard is not None or has_dtensor(base, aux, target):
        from ..distributed import cross_entropy as sharded

        resolved = sharded.resolved(base, aux, target, shard, vocab_size)
        if resolved.shard is not None:
            more = sharded.Options(weight, label_smoothing, z_loss, reduction, normalizer, return_stats, recompute)
            return sharded.aux_cross_entropy(resolved, ignore_index, vocab_size, backend, more)
        base, aux, target = resolved[:3]
    options = weight, label_smoothing, z_loss, reduction, normalizer
    wanted = OF_STATS if return_stats else 0
    plain = native_plain.served(base, aux, target, ignore_index, *options, vocab_size, recompute, backend)
    if plain is not None and (made := autograd.plain_loss(plain, wanted)) is not None:
        return (made[0], rows.finished_stats(_stats_in(made[1:]))) if return_stats else made[0]
    given, terms, normalizer = checked_loss(base, aux, target, ignore_index, vocab_size, backend, *options)
    label_smoothing, z_loss, _ = terms
    if given.backend == "reference":
        loss = reference.cross_entropy(
            given,
            weight=weight,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            reduction=reduction,
            normalizer=normalizer,
        )
        return (loss, _detached(_statistics(given))) if return_stats else loss
    call = call_of(given, weight, target.device)
    has_gradient = autograd.requires_grad(call)
    if reduction == "none" or autograd.is_better_from_rows(call, has_gradient, recompute):
        fields = autograd.row_fields(call, has_gradient, wanted | rows.fields_of_loss(label_smoothing, z_loss))
        loss = rows.loss_of(
            fields,
            target,
            weight,
            given.ignore_index,
            given.vocab_size,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            reduction=reduction,
            normalizer=normalizer,
        )
    else:
        loss, fields = autograd.loss_in_one_pass(call, has_gradient, normalizer, terms, wanted)
    return (loss, rows.finished_stats(fields)) if return_stats else loss


def logit_stats(
    base: SourceLike,
    aux: SourceLike | None,
    target: Tensor | None = None,
    *,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: str = "auto",
    shard: VocabShard | None = None,
) -> LogitStats:
    """Statistics of softmax(base + aux) for each row, in one pass and each differentiable but argmaxes and rank.

    Arguments as in `aux_cross_entropy`; without a target no row is ignored and what is of the target is None.
    `-log_prob` is the loss of reduction="none".
    Returns   `LogitStats` of tensors [*], float32 (float64 if a source is) and int64.
    Raises    as `aux_cross_entropy`.
    """
    if shard is not None or has_dtensor(base, aux, target):
        from ..distributed import cross_entropy as sharded

        resolved = sharded.resolved(base, aux, target, shard, vocab_size)
        if resolved.shard is not None:
            return sharded.logit_stats(resolved, ignore_index, vocab_size, backend)
        base, aux, target = resolved[:3]
    if target is not None:
        checks.classes(target)
    return _statistics(_checked(base, aux, target, ignore_index, vocab_size, backend))


# -- arguments ---------------------------------------------------------------------------------------------------------


def checked_loss(
    base: SourceLike,
    aux: SourceLike | None,
    target: Tensor,
    ignore_index: int,
    vocab_size: int | None,
    backend: str,
    weight: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    normalizer: float | Tensor | None,
) -> tuple[Arguments, LossTerms, float | Tensor | None]:
    """The arguments of a loss, checked; the last is its normalizer."""
    checks.classes(target)
    normalizer = checks.reduction(reduction, normalizer)
    label_smoothing = checks.real_number("label_smoothing", label_smoothing, minimum=0.0, maximum=1.0)
    z_loss = checks.real_number("z_loss", z_loss, minimum=0.0)
    given = _checked(base, aux, target, ignore_index, vocab_size, backend)
    if weight is not None:
        checks.class_weight(weight, given.vocab_size, target.device)
    terms = LossTerms(label_smoothing, z_loss, reduction == "mean")
    return given, terms, number(normalizer, torch.float64, target.device)


def _checked(
    base: SourceLike,
    aux: SourceLike | None,
    target: Tensor | None,
    ignore_index: int,
    vocab_size: int | None,
    backend: str,
) -> Arguments:
    ignore_index = checks.int64("ignore_index", ignore_index)
    of_base = as_sources("base", base)
    of_aux = [] if aux is None else as_sources("aux", aux)
    if target is None:
        shape, device = checks.leading("base", of_base[0])
    else:
        shape, device = target.shape, target.device
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    compute = torch.float32
    widths = []
    for side, sources in (("base", of_base), ("aux", of_aux)):
        for i, source in enumerate(sources):
            name = side if len(sources) == 1 else f"{side}[{i}]"
            width, dtype = checks.source(name, source, shape, device, autocast)
            widths.append((name, width))
            if dtype == torch.float64:
                compute = dtype
    vocab_size = checks.common_width(widths, vocab_size)
    backend = dispatch.resolve(backend, device, compute, has_cuda_kernels=True)
    return Arguments(of_base, of_aux, target, ignore_index, vocab_size, compute, autocast, backend)


def number(value: float | Tensor | None, dtype: torch.dtype, device: torch.device) -> float | Tensor | None:
    """A number as the operators take it: a tensor while torch.compile traces, otherwise as it is."""
    if isinstance(value, Tensor):
        if value.device != device and value.device.type == "cpu" and not torch.compiler.is_compiling():
            return torch.full((), value.item(), dtype=dtype, device=device)  # a copy would wait for the device
        return value.detach().to(device=device, dtype=dtype)
    return dispatch.number_tensor(value, dtype, device) if torch.compiler.is_compiling() else value


def _scale_of(source: Source, compute: torch.dtype, device: torch.device) -> float | Tensor | None:
    """In the compute dtype; None for 1."""
    scale = source.scale
    if isinstance(scale, Tensor):
        return scale if scale.dtype == compute else scale.to(compute)
    return None if scale == 1.0 else number(scale, compute, device)


def call_of(given: Arguments, weight: Tensor | None, device: torch.device) -> ops.Call:
    sources = [*given.base, *given.aux]
    leaves: tuple[Tensor | float | None, ...] = ()
    is_of_matrices = len(given.base) == 1 and len(given.aux) < 2
    for source in sources:
        leaves = (*leaves, *leaves_of(source, _scale_of(source, given.compute, device)))
        if isinstance(source, Head):
            is_of_matrices = False
    options = ops.Options(
        tuple([float(source.softcap or 0.0) for source in sources]),
        len(given.base),
        given.autocast,
        given.ignore_index,
        given.vocab_size,
        given.backend,
        is_of_matrices,
    )
    return ops.Call(leaves, given.target, weight, options)


# -- statistics --------------------------------------------------------------------------------------------------------


def _statistics(given: Arguments) -> LogitStats:
    if given.backend == "reference":
        return LogitStats(**reference.statistics(given))
    has_target = given.target is not None
    call = call_of(given, None, leaves_of(given.base[0], None).values.device)
    if not autograd.requires_grad(call):
        wanted = OF_STATS if has_target else rows.FINISHED
        return rows.finished_stats(autograd.row_fields(call, False, wanted))
    wanted = rows.PARTS | rows.PARTS_OF_TARGET if has_target else rows.PARTS
    return rows.stats_of_parts(autograd.row_fields(call, True, wanted))


_STATS_NAMES = fields_in(OF_STATS)


def _stats_in(stacked: Sequence[Tensor]) -> dict[str, Tensor]:
    """The fields of `OF_STATS` by name."""
    floats, ints = stacked
    return dict(zip(_STATS_NAMES, (*floats.unbind(), *ints.unbind()), strict=True))


def _detached(stats: LogitStats) -> LogitStats:
    tensors = {name: getattr(stats, name) for name in _STATS}  # torch 2.11 traces no vars()
    detached: dict[str, Any] = {name: None if t is None else t.detach() for name, t in tensors.items()}
    return LogitStats(**detached)
