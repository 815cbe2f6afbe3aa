"""Cross-entropy and row statistics of softmax(base + aux): the public functions, their checks and their autograd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, checks, ops, reference
from .sources import Logits, SourceLike, as_sources, sum_sources


@dataclass(frozen=True, eq=False)
class LogitStats:
    """Statistics of each row, all of the target's shape, with p = softmax(base + aux) and q = softmax(base).

    log_prob, base_log_prob   log p(target), log q(target), nats; None without a target
    lse                       logsumexp(base + aux)
    entropy                   entropy of p, nats
    kl_to_base                KL(p || q), nats
    argmax, base_argmax       int64, most likely class of p and of q: lowest index on a tie, the first NaN wins
    Ignored rows hold 0.0, and -1 in the argmaxes.
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

    base, aux        [*, V] floating point, `Logits` (with scale and softcap), or a sequence of these (their sum);
                     aux=None is plain cross-entropy. Any strides but the last dimension's, which is contiguous; the sum
                     is formed in float32 (float64 if a source is). Each gets a gradient in its dtype, if required.
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
    checks.reduction(reduction, normalizer)
    checks.real_number("label_smoothing", label_smoothing, minimum=0.0, maximum=1.0)
    checks.real_number("z_loss", z_loss, minimum=0.0)
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
    if reduction == "none" or (recompute and call.requires_grad()) or call.has_half_gradient():
        loss, fields = _loss_from_rows(call, *options, wanted)
    else:
        loss, fields = _loss_in_one_pass(call, *options, wanted)
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

    base: list[Logits]
    aux: list[Logits]
    target: Tensor | None
    ignore_index: int
    vocab_size: int
    compute: torch.dtype
    backend: str


class _Call(NamedTuple):
    """The leading arguments of every op: at most one source a side, tensor scales in the compute dtype."""

    base: Tensor
    aux: Tensor | None
    target: Tensor | None
    base_scale: float | Tensor | None
    aux_scale: float | Tensor | None
    base_softcap: float | None
    aux_softcap: float | None
    ignore_index: int
    vocab_size: int
    backend: str

    def differentiable(self) -> tuple[float | Tensor | None, ...]:
        return self.base, self.aux, self.base_scale, self.aux_scale

    def with_tensor_scales(self) -> _Call:
        """The same call with its scales in a form that autograd can save."""
        compute = ops.compute_dtype(self.base, self.aux)
        scales = (ops.number_tensor(s, compute, self.base.device) for s in (self.base_scale, self.aux_scale))
        return self._replace(**dict(zip(("base_scale", "aux_scale"), scales, strict=True)))

    def constants(self) -> tuple:
        return self.base_softcap, self.aux_softcap, self.ignore_index, self.vocab_size

    def requires_grad(self) -> bool:
        if forward_ad._current_level >= 0:  # a dual number: autograd says that it has no forward mode here
            return True
        if not torch.is_grad_enabled():
            return False
        for source in (self.base, self.aux, self.base_scale, self.aux_scale):
            if isinstance(source, Tensor) and source.requires_grad:
                return True
        return False

    def has_half_gradient(self) -> bool:
        # fp16 gradients made in the forward pass would underflow before the grad scaler's factor arrives
        for source in (self.base, self.aux):
            if source is not None and source.dtype == torch.float16 and source.requires_grad:
                return torch.is_grad_enabled()
        return False


def _problem(base, aux, target, ignore_index, vocab_size, backend) -> _Problem:
    checks.int64("ignore_index", ignore_index)
    base = as_sources("base", base)
    aux = [] if aux is None else as_sources("aux", aux)
    first = checks.floating("base", base[0].values)
    if first.dim() == 0:
        raise ValueError("base must be [*, V], got a 0-d tensor")
    shape, device = first.shape[:-1], first.device
    if target is not None:
        shape, device = target.shape, target.device
    compute = torch.float32
    widths = []
    for side, sources in (("base", base), ("aux", aux)):
        for i, source in enumerate(sources):
            name = side if len(sources) == 1 else f"{side}[{i}]"
            checks.source(name, source, shape, device)
            widths.append((name, source.values.shape[-1]))
            if source.values.dtype == torch.float64:
                compute = torch.float64
    vocab_size = checks.common_width(widths, vocab_size)
    return _Problem(base, aux, target, ignore_index, vocab_size, compute, backends.resolve(backend, device, compute))


def _number(value: float | Tensor | None, dtype: torch.dtype, device: torch.device) -> float | Tensor | None:
    """A number as the ops take it: a tensor while torch.compile traces, otherwise as it is."""
    if isinstance(value, Tensor):
        return value.detach().to(device=device, dtype=dtype)
    return ops.number_tensor(value, dtype, device) if torch.compiler.is_compiling() else value


def _scale_of(source: Logits, compute: torch.dtype) -> float | Tensor | None:
    scale = source.scale
    if isinstance(scale, Tensor):
        return scale if scale.dtype == compute else scale.to(compute)
    return None if scale == 1.0 else _number(scale, compute, source.values.device)


def _prepare(problem: _Problem) -> _Call:
    base, aux = (_one_source(sources, problem) for sources in (problem.base, problem.aux))
    return _Call(
        base.values,
        None if aux is None else aux.values,
        problem.target,
        _scale_of(base, problem.compute),
        None if aux is None else _scale_of(aux, problem.compute),
        base.softcap,
        None if aux is None else aux.softcap,
        problem.ignore_index,
        problem.vocab_size,
        problem.backend,
    )


def _one_source(sources: list[Logits], problem: _Problem) -> Logits | None:
    if len(sources) < 2:
        return sources[0] if sources else None
    ignored = None if problem.target is None else ops.is_ignored(problem.target, problem.ignore_index)
    return Logits(sum_sources(sources, problem.compute, problem.vocab_size, ignored))


# -- reference ---------------------------------------------------------------------------------------------------------


def _reference_loss(problem, weight, label_smoothing, z_loss, reduction, normalizer) -> Tensor:
    return reference.cross_entropy(
        problem.base,
        problem.aux,
        problem.target,
        compute=problem.compute,
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
                vocab_size=problem.vocab_size,
                ignore_index=problem.ignore_index,
            )
        )
    call = _prepare(problem)
    has_target = call.target is not None
    if not call.requires_grad():
        return _finished_stats(_row_scan(call, None, _FINISHED | _FINISHED_OF_TARGET if has_target else _FINISHED))
    return _stats_of_parts(_row_scan(call, None, _PARTS | _PARTS_OF_TARGET if has_target else _PARTS))


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


def _row_scan(call: _Call, weight: Tensor | None, wanted: int) -> dict[str, Tensor]:
    if call.requires_grad():
        sources = _distinct(call.with_tensor_scales().differentiable())
        small = (_saveable(call.target), _saveable(weight))
        fields = _RowScan.apply(*sources, *small, call.constants(), wanted, call.backend)
        return dict(zip(ops.fields_in(wanted), fields, strict=True))
    return ops.named_fields(wanted, ops.cross_entropy_scan(*_op_args(call, weight), wanted, call.backend))[0]


def _loss_from_rows(call, weight, label_smoothing, z_loss, reduction, normalizer, wanted):
    wanted |= ops.mask_of("nll")
    if label_smoothing:
        wanted |= ops.mask_of("log_denom", "weighted_sum")
    if z_loss:
        wanted |= ops.mask_of("max", "log_denom")
    fields = _row_scan(call, weight, wanted)
    loss = fields["nll"]
    if weight is not None:
        kept = ~ops.is_ignored(call.target, call.ignore_index)
        classes = call.target.long().masked_fill(~kept, 0).clamp(0, call.vocab_size - 1)
        w_y = torch.where(kept, weight.to(loss.dtype)[classes], 0.0)  # an ignored row's class may have any weight
        loss = loss * w_y
    if label_smoothing:
        total = call.vocab_size if weight is None else weight.sum(dtype=loss.dtype)
        smooth = total * fields["log_denom"] - fields["weighted_sum"]
        loss = (1 - label_smoothing) * loss + (label_smoothing / call.vocab_size) * smooth
    if z_loss:
        loss = loss + z_loss * (fields["max"] + fields["log_denom"]).square()
    if reduction == "none":
        return loss, fields
    total = loss.sum(dtype=torch.float64)
    if reduction == "mean":
        if normalizer is None:
            normalizer = (~ops.is_ignored(call.target, call.ignore_index)).sum() if weight is None else w_y.sum()
        total = total / normalizer
    return total.to(loss.dtype), fields


def _op_args(call: _Call, weight: Tensor | None) -> tuple:
    """The ten arguments that every op begins with."""
    return (call.base, call.aux, call.target, weight, call.base_scale, call.aux_scale, *call.constants())


def _grads_by_input(grads: list[Tensor], needs: tuple[bool, ...], scales: tuple[Tensor | None, ...]) -> list:
    """Spread an op's gradients over (base, aux, base_scale, aux_scale); a 0-d scale sums its rows."""
    remaining = iter(grads)
    spread = [next(remaining) if need else None for need in needs]
    for i, scale in zip((2, 3), scales, strict=True):
        if spread[i] is not None and scale.dim() == 0:
            spread[i] = spread[i].sum()
    return spread


def _needs_mask(needs: tuple[bool, ...]) -> int:
    return sum(1 << i for i, need in enumerate(needs) if need)


def _distinct(sources: tuple) -> tuple:
    """While torch.compile traces, which refuses one tensor as two arguments, the second one as a view of itself."""
    if not torch.compiler.is_compiling():
        return sources
    seen: list[Tensor] = []
    for source in sources:
        again = isinstance(source, Tensor) and any(source is other for other in seen)
        seen.append(source.view_as(source) if again else source)
    return tuple(seen)


def _saveable(tensor: Tensor | None) -> Tensor | None:
    """A small tensor in a form that autograd can save, also if it was made in inference mode."""
    if tensor is None or torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    return tensor.clone()


class _DelayedError(torch.autograd.Function):
    """Passes gradients through; differentiating them again raises instead of silently dropping a term.

    Takes the gradients and then, as edges of the graph, the tensors that they depend on: without those, a second
    differentiation with respect to such a tensor would not come through here.
    """

    @staticmethod
    def forward(ctx, num_grads, *tensors):
        return tuple(g.view_as(g) for g in tensors[:num_grads])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "aux_cross_entropy and logit_stats cannot be differentiated twice; use backend='reference' for that"
        )


def _once(grads: list[Tensor | None], depend_on: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """With create_graph=True, make a second differentiation of these gradients an error."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return grads
    there = [g.detach() for g in grads if g is not None]
    edges = [t for t in depend_on if t is not None and t.requires_grad]
    given = iter(_DelayedError.apply(len(there), *there, *edges) if there else ())
    return [None if g is None else next(given) for g in grads]


class _RowScan(torch.autograd.Function):
    """Row fields with a reread in backward: exact for any upstream gradients, and as often as wanted."""

    @staticmethod
    def forward(ctx, base, aux, base_scale, aux_scale, target, weight, constants, wanted, backend):
        state = ops.mask_of("max", "log_denom")
        if wanted & ops.mask_of("base_log_denom", "base_nll", "mean_base"):
            state |= ops.mask_of("base_max", "base_log_denom")
        args = (base, aux, target, weight, base_scale, aux_scale, *constants)
        fields, _ = ops.named_fields(wanted | state, ops.cross_entropy_scan(*args, wanted | state, backend))
        saved = ("max", "log_denom", "nll", "base_max", "base_log_denom", "mean_sum", "mean_base")
        ctx.save_for_backward(base, aux, target, weight, base_scale, aux_scale, *(fields.get(name) for name in saved))
        ctx.constants, ctx.wanted, ctx.backend = constants, wanted, backend
        ctx.set_materialize_grads(False)
        # copies: an output that is a view could not be modified in place by its user
        outputs = {name: fields[name].clone() for name in ops.fields_in(wanted)}
        # the maxima are constants of the formulas above the scan: any shift of them cancels there. finished statistics
        # come along detached
        constants_of_gradient = ("max", "base_max", "argmax", "base_argmax", *ops.DERIVED)
        ctx.mark_non_differentiable(*(outputs[name] for name in constants_of_gradient if name in outputs))
        return tuple(outputs.values())

    @staticmethod
    def backward(ctx, *upstream):
        *args, m, log_denom, nll, m_b, log_denom_b, mean_sum, mean_base = ctx.saved_tensors
        given = dict(zip(ops.fields_in(ctx.wanted), upstream, strict=True))
        coefficients = _coefficients(given, mean_sum, mean_base)
        needs = ctx.needs_input_grad[:4]
        grads: list = [None] * 4
        if any(c is not None for c in coefficients):
            made = ops.cross_entropy_backward(
                *args,
                *ctx.constants,
                m,
                log_denom,
                nll,
                m_b,
                log_denom_b,
                coefficients,
                _needs_mask(needs),
                ctx.backend,
            )
            grads = _grads_by_input(made, needs, (args[4], args[5]))
        return (*_once(grads, (args[0], args[1], args[4], args[5], *upstream)), None, None, None, None, None)


def _coefficients(given: dict[str, Tensor | None], mean_sum, mean_base) -> list[Tensor | None]:
    """ops.COEFFICIENTS from the upstream gradients of the fields (None: no gradient)."""

    def total(*terms: Tensor | None) -> Tensor | None:
        present = [t for t in terms if t is not None]
        return sum(present[1:], present[0]) if present else None

    g_mean_sum, g_mean_base, g_base_nll = given.get("mean_sum"), given.get("mean_base"), given.get("base_nll")
    a = total(
        given.get("log_denom"),
        None if g_mean_sum is None else g_mean_sum * (1 - mean_sum),
        None if g_mean_base is None else -g_mean_base * mean_base,
    )
    q_b = total(given.get("base_log_denom"), g_base_nll)
    b_b = None if g_base_nll is None else -g_base_nll
    return [a, g_mean_sum, g_mean_base, None, given.get("nll"), given.get("weighted_sum"), q_b, b_b]


# -- loss and gradient in one pass: "mean" and "sum" -------------------------------------------------------------------


def _loss_in_one_pass(call, weight, label_smoothing, z_loss, reduction, normalizer, wanted):
    options = (normalizer, float(label_smoothing), float(z_loss), reduction == "mean", wanted)
    if call.requires_grad():
        sources = _distinct(call.differentiable())
        loss, *fields = _OnePass.apply(
            *sources, _saveable(call.target), weight, call.constants(), *options, call.backend, *_anchors(sources)
        )
    else:
        loss, *fields = ops.cross_entropy_loss(*_op_args(call, weight), *options, 0, call.backend)
    return loss, ops.named_fields(wanted, fields)[0] if wanted else {}


def _anchors(sources: tuple) -> list[Tensor]:
    """Empty tensors that depend on the sources: edges for `_once`, where saving the sources would keep their memory."""
    if torch.compiler.is_compiling():
        return []
    return [t[..., None][:0].clone() for t in sources if isinstance(t, Tensor) and t.requires_grad]


class _OnePass(torch.autograd.Function):
    """Loss and gradients made together, 3 units of N*V traffic; backward only rescales where upstream is not 1."""

    @staticmethod
    def forward(
        ctx,
        base,
        aux,
        base_scale,
        aux_scale,
        target,
        weight,
        constants,
        normalizer,
        eps,
        z_loss,
        mean,
        wanted,
        backend,
        *anchors,
    ):
        needs = ctx.needs_input_grad[:4]
        args = (base, aux, target, weight, base_scale, aux_scale, *constants)
        loss, *rest = ops.cross_entropy_loss(*args, normalizer, eps, z_loss, mean, wanted, _needs_mask(needs), backend)
        num_grads = sum(needs)
        fields, grads = rest[: len(rest) - num_grads], rest[len(rest) - num_grads :]
        ctx.save_for_backward(target, *anchors, *grads)
        ctx.num_anchors = len(anchors)
        ctx.sums_scale = [isinstance(scale, Tensor) and scale.dim() == 0 for scale in (base_scale, aux_scale)]
        ctx.ignore_index, ctx.backend, ctx.handed_out = constants[2], backend, False
        ctx.mark_non_differentiable(*fields)
        return (loss, *fields)

    @staticmethod
    def backward(ctx, upstream, *_):
        if not torch.compiler.is_compiling():
            if ctx.handed_out:
                raise RuntimeError(
                    "the gradient of aux_cross_entropy was made in the forward pass and has been handed out in a first "
                    "backward: pass recompute=True to go backward again"
                )
            ctx.handed_out = True
        target, *saved = ctx.saved_tensors
        anchors, grads = saved[: ctx.num_anchors], saved[ctx.num_anchors :]
        needs = ctx.needs_input_grad[:4]
        remaining = iter(grads)
        spread = [next(remaining) if need else None for need in needs]
        for i, grad in enumerate(spread):
            if grad is None:
                continue
            if i < 2:
                spread[i] = _rescaled(grad, upstream.detach(), target, ctx.ignore_index, ctx.backend)
            else:
                per_row = (grad * upstream.detach()).masked_fill(ops.is_ignored(target, ctx.ignore_index), 0.0)
                spread[i] = per_row.sum() if ctx.sums_scale[i - 2] else per_row
        return (*_once(spread, (*anchors, upstream)), *([None] * (9 + ctx.num_anchors)))


def _rescaled(grad: Tensor, upstream: Tensor, target: Tensor, ignore_index: int, backend: str) -> Tensor:
    """grad * upstream, ignored rows left at +0.0; in place in eager mode, where a factor of 1 costs nothing."""
    if torch.compiler.is_compiling():
        return torch.where(ops.is_ignored(target, ignore_index).unsqueeze(-1), grad, grad * upstream.to(grad.dtype))
    ops.cross_entropy_rescale_(grad, upstream, target, ignore_index, backend)
    torch.autograd.graph.increment_version(grad)
    return grad
