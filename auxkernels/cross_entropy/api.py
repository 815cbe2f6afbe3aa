"""Cross-entropy and row statistics of softmax(base + aux): the public functions, their checks and their arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks, dispatch
from ..sources import Head, Logits, Source, SourceLike, as_sources
from . import ops, reference
from .autograd import Call, Chunks, Matrices


@dataclass(frozen=True, eq=False)
class LogitStats:
    """Statistics of each row, all of the target's shape, with p = softmax(base + aux) and q = softmax(base).

    log_prob, base_log_prob   log p(target), log q(target), nats; None without a target
    lse                       logsumexp(base + aux)
    entropy                   entropy of p, nats
    kl_to_base                KL(p || q), nats
    argmax, base_argmax       int64, most likely class of p and of q: lowest index on a tie, the first NaN wins
    Ignored rows hold 0.0, and -1 in the argmaxes. In a row that is no distribution (all -inf, any +inf or NaN) every
    float of p is NaN, lse too, and base_log_prob where q is none. The sum is float32, so that a large scale (a small
    temperature) rounds it: by half an ulp of the largest |base + aux|, absolutely. Entropies are accurate beside that,
    relative to themselves also where one class is all but certain.
    """

    log_prob: Tensor | None
    base_log_prob: Tensor | None
    lse: Tensor
    entropy: Tensor
    kl_to_base: Tensor
    argmax: Tensor
    base_argmax: Tensor


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
    Returns          float32 (float64 if a source is): 0-d, or [*] for reduction="none".
    Raises           TypeError, ValueError: dtype, shape, device, option. IndexError: a target out of range, on CPU; on
                     GPU such a row is NaN in loss and gradient, and nothing is read out of bounds. RuntimeError: an
                     unavailable backend; a second backward without recompute=True; double differentiation.
    Source           Zeldes et al. 2020 (auxiliary tuning); Milakov & Gimelshein 2018 (online softmax).
    """
    checks.classes(target)
    normalizer = checks.reduction(reduction, normalizer)
    label_smoothing = checks.real_number("label_smoothing", label_smoothing, minimum=0.0, maximum=1.0)
    z_loss = checks.real_number("z_loss", z_loss, minimum=0.0)
    problem = _problem(base, aux, target, ignore_index, vocab_size, backend)
    if weight is not None:
        checks.class_weight(weight, problem.vocab_size, target.device)
    normalizer = _number(normalizer, torch.float64, target.device)
    options = (weight, label_smoothing, z_loss, reduction, normalizer)
    if problem.backend == "reference":
        loss = _reference_loss(problem, *options)
        return (loss, _detached(_statistics(problem))) if return_stats else loss
    call = _prepare(problem)
    wanted = _FINISHED | _FINISHED_OF_TARGET if return_stats else 0
    if reduction == "none" or call.is_better_from_rows(recompute):
        loss, fields = _loss_from_rows(call, *options, wanted)
    else:
        terms = (normalizer, label_smoothing, z_loss, reduction == "mean", wanted)
        loss, fields = call.loss_in_one_pass(weight, terms)
    return (loss, _finished_stats(fields)) if return_stats else loss


def logit_stats(
    base: SourceLike,
    aux: SourceLike | None,
    target: Tensor | None = None,
    *,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> LogitStats:
    """Statistics of softmax(base + aux) for each row, in one pass and each differentiable but the argmaxes.

    Arguments as in `aux_cross_entropy`; without a target no row is ignored and the log-probabilities are None.
    `-log_prob` is the loss of reduction="none".
    Returns   `LogitStats` of tensors [*], float32 (float64 if a source is) and int64.
    Raises    as `aux_cross_entropy`.
    """
    if target is not None:
        checks.classes(target)
    return _statistics(_problem(base, aux, target, ignore_index, vocab_size, backend))


# -- arguments ---------------------------------------------------------------------------------------------------------


class _Problem(NamedTuple):
    """Checked arguments."""

    base: list[Source]
    aux: list[Source]
    target: Tensor | None
    ignore_index: int
    vocab_size: int
    compute: torch.dtype
    autocast: torch.dtype | None  # dtype of the heads' products, where autocast is on
    backend: str


def _problem(base, aux, target, ignore_index, vocab_size, backend) -> _Problem:
    ignore_index = checks.int64("ignore_index", ignore_index)
    base = as_sources("base", base)
    aux = [] if aux is None else as_sources("aux", aux)
    if target is None:
        shape, device = checks.leading("base", base[0])
    else:
        shape, device = target.shape, target.device
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    compute = torch.float32
    widths = []
    for side, sources in (("base", base), ("aux", aux)):
        for i, source in enumerate(sources):
            name = side if len(sources) == 1 else f"{side}[{i}]"
            width, dtype = checks.source(name, source, shape, device, autocast)
            widths.append((name, width))
            if dtype == torch.float64:
                compute = dtype
    vocab_size = checks.common_width(widths, vocab_size)
    backend = dispatch.resolve(backend, device, compute, has_cuda_kernels=True)
    return _Problem(base, aux, target, ignore_index, vocab_size, compute, autocast, backend)


def _number(value: float | Tensor | None, dtype: torch.dtype, device: torch.device) -> float | Tensor | None:
    """A number as the ops take it: a tensor while torch.compile traces, otherwise as it is."""
    if isinstance(value, Tensor):
        if value.device != device and value.device.type == "cpu" and not torch.compiler.is_compiling():
            return torch.full((), value.item(), dtype=dtype, device=device)  # a copy would wait for the device
        return value.detach().to(device=device, dtype=dtype)
    return dispatch.number_tensor(value, dtype, device) if torch.compiler.is_compiling() else value


def _scale_of(source: Source, compute: torch.dtype, device: torch.device) -> float | Tensor | None:
    scale = source.scale
    if isinstance(scale, Tensor):
        return scale if scale.dtype == compute else scale.to(compute)
    return None if scale == 1.0 else _number(scale, compute, device)


def _prepare(problem: _Problem) -> Call:
    """The call in the form that its sources have: matrices of logits, or anything else in chunks."""
    if len(problem.base) == 1 and len(problem.aux) < 2:
        base, aux = problem.base[0], problem.aux[0] if problem.aux else None
        if isinstance(base, Logits) and not isinstance(aux, Head):
            return _matrices(base, aux, problem)
    return _chunks(problem)


def _matrices(base: Logits, aux: Logits | None, problem: _Problem) -> Call:
    compute, device = problem.compute, base.values.device
    form = Matrices(
        base.softcap, None if aux is None else aux.softcap, problem.ignore_index, problem.vocab_size, problem.backend
    )
    parts = (
        base.values,
        None if aux is None else aux.values,
        _scale_of(base, compute, device),
        None if aux is None else _scale_of(aux, compute, device),
    )
    return Call(form, parts, problem.target)


def _chunks(problem: _Problem) -> Call:
    sources = [*problem.base, *problem.aux]
    parts: list[Tensor | None] = []
    for source in sources:
        is_head = isinstance(source, Head)
        parts += (source.hidden, source.weight, source.bias) if is_head else (source.values, None, None)
        device = parts[0].device
        parts.append(dispatch.number_tensor(_scale_of(source, problem.compute, device), problem.compute, device))
    form = Chunks(
        tuple(float(source.softcap or 0.0) for source in sources),
        len(problem.base),
        tuple(isinstance(source, Head) for source in sources),
        problem.autocast,
        problem.ignore_index,
        problem.vocab_size,
        problem.backend,
    )
    return Call(form, tuple(parts), problem.target)


# -- reference ---------------------------------------------------------------------------------------------------------


def _reference_loss(problem, weight, label_smoothing, z_loss, reduction, normalizer) -> Tensor:
    return reference.cross_entropy(
        problem.base,
        problem.aux,
        problem.target,
        compute=problem.compute,
        autocast=problem.autocast,
        vocab_size=problem.vocab_size,
        ignore_index=problem.ignore_index,
        weight=weight,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        reduction=reduction,
        normalizer=normalizer,
    )


# -- statistics --------------------------------------------------------------------------------------------------------

# with a gradient to come, statistics are arithmetic on the fields that the scan differentiates; without, the scan's own
_ARGMAXES = ops.mask_of("argmax", "base_argmax")
_FINISHED = ops.mask_of("lse", "entropy", "kl_to_base") | _ARGMAXES
_FINISHED_OF_TARGET = ops.mask_of("log_prob", "base_log_prob")
_PARTS = ops.mask_of("max", "log_denom", "mean_sum", "mean_base", "base_max", "base_log_denom") | _ARGMAXES
_PARTS_OF_TARGET = ops.mask_of("nll", "base_nll")


def _statistics(problem: _Problem) -> LogitStats:
    if problem.backend == "reference":
        return LogitStats(
            **reference.statistics(
                problem.base,
                problem.aux,
                problem.target,
                compute=problem.compute,
                autocast=problem.autocast,
                vocab_size=problem.vocab_size,
                ignore_index=problem.ignore_index,
            )
        )
    call = _prepare(problem)
    has_target = call.target is not None
    if not call.requires_grad():
        return _finished_stats(call.row_fields(None, _FINISHED | _FINISHED_OF_TARGET if has_target else _FINISHED))
    return _stats_of_parts(call.row_fields(None, _PARTS | _PARTS_OF_TARGET if has_target else _PARTS))


def _finished_stats(fields: dict[str, Tensor]) -> LogitStats:
    return LogitStats(
        fields.get("log_prob"),
        fields.get("base_log_prob"),
        fields["lse"],
        fields["entropy"],
        fields["kl_to_base"],
        fields["argmax"],
        fields["base_argmax"],
    )


def _stats_of_parts(fields: dict[str, Tensor]) -> LogitStats:
    log_denom = fields["log_denom"]
    # + 0.0: ignored rows are +0.0, not -0.0. Differences of like terms first, so that aux=None has KL exactly 0.
    return LogitStats(
        log_prob=fields["nll"].neg() + 0.0 if "nll" in fields else None,
        base_log_prob=fields["base_nll"].neg() + 0.0 if "base_nll" in fields else None,
        lse=fields["max"] + log_denom,
        entropy=log_denom - fields["mean_sum"],
        kl_to_base=(fields["mean_sum"] - fields["mean_base"]) + (fields["base_log_denom"] - log_denom),
        argmax=fields["argmax"],
        base_argmax=fields["base_argmax"],
    )


def _detached(stats: LogitStats) -> LogitStats:
    return LogitStats(**{name: None if t is None else t.detach() for name, t in vars(stats).items()})


# -- loss as plain arithmetic on row fields: "none", recompute, fp16 gradients -----------------------------------------


def _loss_from_rows(call, weight, label_smoothing, z_loss, reduction, normalizer, wanted):
    wanted |= ops.mask_of("nll")
    if label_smoothing:
        wanted |= ops.mask_of("log_denom", "weighted_sum")
    if z_loss:
        wanted |= ops.mask_of("max", "log_denom")
    fields = call.row_fields(weight, wanted)
    loss = fields["nll"]
    if weight is not None:
        kept = ~ops.is_ignored(call.target, call.form.ignore_index)
        classes = call.target.long().masked_fill(~kept, 0).clamp(0, call.form.vocab_size - 1)
        w_y = torch.where(kept, weight.to(loss.dtype)[classes], 0.0)  # an ignored row's class may have any weight
        loss = loss * w_y
    if label_smoothing:
        total = call.form.vocab_size if weight is None else weight.sum(dtype=loss.dtype)
        smooth = total * fields["log_denom"] - fields["weighted_sum"]
        loss = (1 - label_smoothing) * loss + (label_smoothing / call.form.vocab_size) * smooth
    if z_loss:
        loss = loss + z_loss * (fields["max"] + fields["log_denom"]).square()
    if reduction == "none":
        return loss, fields
    total = loss.sum(dtype=torch.float64)
    if reduction == "mean":
        if normalizer is None:
            normalizer = (~ops.is_ignored(call.target, call.form.ignore_index)).sum() if weight is None else w_y.sum()
        total = total / normalizer
    return total.to(loss.dtype), fields
