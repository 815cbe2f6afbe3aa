"""The autograd functions of cross-entropy: gradients made with the loss, or from row fields when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import dispatch
from ..autograd import anchors, apply, apply_in_eager, distinct, is_traced_in_transform, once, saveable
from ..sources import LAYOUTS, NUMBERS, ROWS, by_source
from . import native_plain, ops
from .native_plain import PlainLoss
from .request import DERIVED, LossTerms, RowState, fields_in, is_ignored, mask_of, named_fields
from .rows import coefficients_of

_WHO = "aux_cross_entropy or logit_stats"


def needs_of(call: ops.Call) -> tuple[bool, ...]:
    """Of which leaves a call with a gradient has to give it."""
    return tuple([isinstance(leaf, Tensor) and leaf.requires_grad for leaf in call.leaves])


def requires_grad(call: ops.Call) -> bool:
    if forward_ad._current_level >= 0:  # a dual number: autograd says that it has no forward mode here
        return True
    if torch.is_grad_enabled():
        for leaf in call.leaves:  # any() would take a microsecond of a call's thirty
            if leaf is not None and isinstance(leaf, Tensor) and leaf.requires_grad:
                return True
    return is_traced_in_transform()


def is_better_from_rows(call: ops.Call, has_gradient: bool, recompute: bool) -> bool:
    """Whether the row state is made first and a gradient when it is asked for, if at all."""
    if not has_gradient:
        # Triton has a kernel for the row fields of heads that stores no logits
        return call.options.backend == "triton" and not call.options.is_of_matrices
    return recompute or _has_half_gradient(call)


def _has_half_gradient(call: ops.Call) -> bool:
    # fp16 gradients made in the forward pass would underflow before the grad scaler's factor arrives. those of a head's
    # tensors wait in float32
    if not torch.is_grad_enabled() or all(t is None or t.dtype != torch.float16 for t in call.leaves[:: len(LAYOUTS)]):
        return False
    for source in by_source(call.leaves):
        if source.weight is None and source.values.dtype == torch.float16 and source.values.requires_grad:
            return True
    return False


def row_fields(call: ops.Call, has_gradient: bool, wanted: int) -> dict[str, Tensor]:
    """The wanted fields by name, each [*], differentiable where they can be."""
    if not has_gradient:
        return named_fields(wanted, ops.scan(call, wanted))[0]
    leaves = distinct(ops.tensors_of(call.leaves))
    given = saveable(call.target), saveable(call.weight)
    rows = apply(RowScan, _WHO, call.options, wanted, *given, *leaves)
    return dict(zip(fields_in(wanted), rows, strict=True))


def loss_in_one_pass(
    call: ops.Call,
    has_gradient: bool,
    normalizer: float | Tensor | None,
    terms: LossTerms,
    wanted: int,
    made: list[Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(0-d loss, the wanted fields). made: what `ops.loss` gives for the call, where that is there already."""
    if has_gradient:
        leaves = distinct(call.leaves)
        given = call.options, terms, wanted, anchors(leaves), made, saveable(call.target), call.weight, normalizer
        loss, *fields = apply(OnePass, _WHO, *given, *leaves)
    else:
        loss, *fields = made or ops.loss(call, normalizer, terms, wanted, ())
    return loss, named_fields(wanted, fields)[0] if wanted else {}


def plain_loss(call: PlainLoss, wanted: int) -> Sequence[Tensor] | None:
    """(0-d loss, the wanted fields stacked) of a call that `native_plain.served` accepts; None if a target is wrong."""
    try:
        made = native_plain.loss(call, wanted)
    except IndexError:  # before anything was written
        return None
    needs_base, needs_aux = call.needs
    if not (needs_base or needs_aux):
        return made
    matrices = call.base, call.aux
    return apply_in_eager(_OnePassPlain, made, anchors(matrices), saveable(call.target), call.ignore_index, *matrices)


# what backward reads, and which part of it the scan has to give beside the fields that are wanted
SAVED = (*RowState._fields, "mean_sum", "mean_base")
_STATE, _STATE_OF_BASE = mask_of("max", "log_denom"), mask_of("base_max", "base_log_denom")
_NEEDS_STATE_OF_BASE = mask_of("base_log_denom", "base_nll", "mean_base")
# the maxima are constants of the formulas above the scan: any shift of them cancels there. finished statistics come
# along detached
CONSTANTS = ("max", "base_max", "argmax", "base_argmax", "target_rank", *DERIVED)


def state_for(wanted: int) -> int:
    """The fields that a gradient of the wanted ones is made of."""
    return _STATE | _STATE_OF_BASE if wanted & _NEEDS_STATE_OF_BASE else _STATE


class RowScan(torch.autograd.Function):
    """Row fields with a reread in backward: exact for any upstream gradients, and as often as wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        options: ops.Options,
        wanted: int,
        target: Tensor | None,
        weight: Tensor | None,
        *leaves: Tensor | None,
    ) -> tuple[Tensor, ...]:
        state = state_for(wanted)
        call = ops.Call(leaves, target, weight, options)
        fields, _ = named_fields(wanted | state, ops.scan(call, wanted | state))
        ctx.save_for_backward(target, weight, *[fields.get(name) for name in SAVED], *leaves)
        ctx.options, ctx.wanted = options, wanted
        ctx.set_materialize_grads(False)
        # copies: an output that is a view could not be modified in place by its user
        outputs = {name: fields[name].clone() for name in fields_in(wanted)}
        ctx.mark_non_differentiable(*[output for name, output in outputs.items() if name in CONSTANTS])
        return tuple(outputs.values())

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        target, weight, m, log_denom, nll, m_b, log_denom_b, mean_sum, mean_base, *leaves = ctx.saved_tensors
        given = dict(zip(fields_in(ctx.wanted), upstream, strict=True))
        coefficients = coefficients_of(given, mean_sum, mean_base)
        needs = ctx.needs_input_grad[-len(leaves) :]
        grads: list[Tensor | None] = [None] * len(needs)
        if any(c is not None for c in coefficients):
            call, state = (
                ops.Call(tuple(leaves), target, weight, ctx.options),
                RowState(m, log_denom, nll, m_b, log_denom_b),
            )
            grads = spread(ops.backward(call, state, coefficients, needs), needs)
            grads = per_leaf(grads, leaves)
        return (None, None, None, None, *once(_WHO, grads, (*leaves, *upstream)))


def _layout_of(leaf: int) -> str:
    """How the gradient of a leaf lies, by its number."""
    return LAYOUTS[leaf % len(LAYOUTS)]


def per_leaf(grads: list[Tensor | None], leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """The numbers for each row of a 0-d scale, added up."""
    found = list(grads)
    for i, (grad, leaf) in enumerate(zip(grads, leaves, strict=True)):
        if grad is not None and _layout_of(i) == NUMBERS and leaf.dim() == 0:
            found[i] = grad.sum()
    return found


def spread(grads: list[Tensor], needs: tuple[bool, ...]) -> list[Tensor | None]:
    """The gradients that an op has made, one place for each leaf."""
    remaining = iter(grads)
    return [next(remaining) if need else None for need in needs]


class OnePass(torch.autograd.Function):
    """Loss and gradients made together; backward only rescales where the upstream gradient is not 1."""

    @staticmethod
    def forward(
        ctx: Any,
        options: ops.Options,
        terms: LossTerms,
        wanted: int,
        edges: list[Tensor],
        made: list[Tensor] | None,
        target: Tensor | None,
        weight: Tensor | None,
        normalizer: float | Tensor | None,
        *leaves: Tensor | float | None,
    ) -> tuple[Tensor, ...]:
        needs = ctx.needs_input_grad[-len(leaves) :]
        loss, *rest = made or ops.loss(ops.Call(leaves, target, weight, options), normalizer, terms, wanted, needs)
        num_grads = sum(needs)
        fields, grads = rest[: len(rest) - num_grads], rest[len(rest) - num_grads :]
        ctx.save_for_backward(target, *grads)
        ctx.options, ctx.needs = options, needs
        # no inputs: compiled autograd adds a gradient of None to the one that the leaf has
        ctx.edges = edges
        ctx.likes = [(leaf.dtype, leaf.dim()) if isinstance(leaf, Tensor) else None for leaf in leaves]
        ctx.handed_out = False
        ctx.mark_non_differentiable(*fields)
        return (loss, *fields)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        _hand_out(ctx)
        target, *saved = ctx.saved_tensors
        grads = spread(saved, ctx.needs)
        factor, rows = upstream.detach(), (ctx.options.ignore_index, ctx.options.backend)
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            (dtype, dim), layout = ctx.likes[i], _layout_of(i)
            if layout == NUMBERS:
                per_row = (grad * factor).masked_fill(is_ignored(target, ctx.options.ignore_index), 0.0)
                grads[i] = per_row if dim else per_row.sum()
            else:
                grads[i] = _rescaled(grad, factor, target if layout == ROWS else None, *rows).to(dtype)
        return (None, None, None, None, None, None, None, None, *once(_WHO, grads, (*ctx.edges, upstream)))


class _OnePassPlain(torch.autograd.Function):
    """OnePass for base and auxiliary alone, from what `native_plain.loss` has made."""

    @staticmethod
    def forward(
        ctx: Any, made: list[Tensor], edges: list[Tensor], target: Tensor, ignore_index: int, *matrices: Tensor | None
    ) -> tuple[Tensor, ...]:
        needs = ctx.needs_input_grad[-2:]
        num_outputs = len(made) - sum(needs)
        ctx.save_for_backward(target, *made[num_outputs:])
        ctx.needs, ctx.edges, ctx.ignore_index, ctx.handed_out = needs, edges, ignore_index, False
        if num_outputs > 1:
            ctx.mark_non_differentiable(*made[1:num_outputs])
        return tuple(made[:num_outputs])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        _hand_out(ctx)
        target, *saved = ctx.saved_tensors
        factor = upstream.detach()
        made = [_rescaled(grad, factor, target, ctx.ignore_index, "native") for grad in saved]
        return (None, None, None, None, *once(_WHO, spread(made, ctx.needs), (*ctx.edges, upstream)))


def _hand_out(ctx: Any) -> None:
    """Once: what is handed out may be written."""
    if torch.compiler.is_compiling():
        return
    if ctx.handed_out:
        raise RuntimeError(
            "the gradient of aux_cross_entropy was made in the forward pass and has been handed out in a first "
            "backward: pass recompute=True to go backward again"
        )
    ctx.handed_out = True


def _rescaled(grad: Tensor, factor: Tensor, target: Tensor | None, ignore_index: int, backend: str) -> Tensor:
    """grad * factor, ignored rows left at +0.0; in place in eager mode, where a factor of 1 costs nothing."""
    if torch.compiler.is_compiling():
        scaled = (grad.to(factor.dtype) * factor).to(grad.dtype)
        if target is None:
            return scaled
        return torch.where(is_ignored(target, ignore_index).unsqueeze(-1), grad, scaled)
    is_one = dispatch.is_direct((grad, factor, target), backend) and factor.is_cpu and factor.item() == 1.0
    if not is_one:
        ops.rescale_(grad, factor, target, ignore_index, backend)
    torch.autograd.graph.increment_version(grad)
    return grad
