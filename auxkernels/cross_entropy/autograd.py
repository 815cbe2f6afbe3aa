"""The autograd functions of cross-entropy, for sources that are matrices of logits and for those in chunks.

A call's `parts` are the tensors that may get a gradient; its form says what they are and which operators take them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import dispatch
from ..autograd import anchors, apply, distinct, is_traced_in_transform, once, saveable
from . import chunked, ops

# what a part's gradient is: one row for each row of the target, one for all rows, or a number for each row
ROWS, SHARED, SCALE = range(3)
_WHO = "aux_cross_entropy or logit_stats"


class Matrices(NamedTuple):
    """One matrix of logits for the base and at most one for the auxiliary; parts: base, aux, base scale, aux scale."""

    base_softcap: float | None
    aux_softcap: float | None
    ignore_index: int
    vocab_size: int
    backend: str

    def kinds(self) -> tuple[int, ...]:
        return (ROWS, ROWS, SCALE, SCALE)

    def has_scan_of_its_own(self) -> bool:
        return False

    def logits(self, parts: tuple) -> tuple:
        return parts[:2]

    def tensors(self, parts: tuple) -> tuple:
        """The parts in a form that autograd can save: scales may be numbers."""
        base, aux, *scales = parts
        compute = ops.compute_dtype(base, aux)
        return (base, aux, *(dispatch.number_tensor(scale, compute, base.device) for scale in scales))

    def arguments(self, parts: tuple, target: Tensor | None, weight: Tensor | None) -> tuple:
        base, aux, base_scale, aux_scale = parts
        return (base, aux, target, weight, base_scale, aux_scale, *self[:4])

    def scan(self, parts, target, weight, wanted: int) -> list[Tensor]:
        return ops.cross_entropy_scan(*self.arguments(parts, target, weight), wanted, self.backend)

    def loss(self, parts, target, weight, options: tuple, needs: tuple[bool, ...]) -> list[Tensor]:
        arguments = self.arguments(parts, target, weight)
        return ops.cross_entropy_loss(*arguments, *options, _mask(needs) if needs else 0, self.backend)

    def backward(self, parts, target, weight, state: list, coefficients: list, needs) -> list[Tensor]:
        arguments = self.arguments(parts, target, weight)
        return ops.cross_entropy_backward(*arguments, *state, coefficients, _mask(needs), self.backend)


class Chunks(NamedTuple):
    """Any sources, in chunks of rows; parts: values or hidden, weight, bias and scale of each."""

    softcaps: tuple[float, ...]
    num_base: int
    is_head: tuple[bool, ...]
    autocast: torch.dtype | None
    ignore_index: int
    vocab_size: int
    backend: str

    def kinds(self) -> tuple[int, ...]:
        return (ROWS, SHARED, SHARED, SCALE) * len(self.softcaps)

    def has_scan_of_its_own(self) -> bool:
        """Whether row fields without a gradient may come from a kernel that stores no logits."""
        return self.backend == "triton"

    def logits(self, parts: tuple) -> tuple:
        return tuple(values for values, is_head in zip(parts[0::4], self.is_head, strict=True) if not is_head)

    def tensors(self, parts: tuple) -> tuple:
        return parts

    def arguments(self, parts: tuple, target: Tensor | None, weight: Tensor | None) -> tuple:
        return (
            *(list(parts), list(self.softcaps), self.num_base, self.autocast, target, weight),
            *(self.ignore_index, self.vocab_size),
        )

    def scan(self, parts, target, weight, wanted: int) -> list[Tensor]:
        return chunked.scan(*self.arguments(parts, target, weight), wanted, self.backend)

    def loss(self, parts, target, weight, options: tuple, needs: tuple[bool, ...]) -> list[Tensor]:
        normalizer, *rest = options
        normalizer = dispatch.number_tensor(normalizer, torch.float64, parts[0].device)
        needs = list(needs) or [False] * len(parts)
        return chunked.loss(*self.arguments(parts, target, weight), normalizer, *rest, needs, self.backend)

    def backward(self, parts, target, weight, state: list, coefficients: list, needs) -> list[Tensor]:
        arguments = self.arguments(parts, target, weight)
        return chunked.backward(*arguments, *state, coefficients, list(needs), self.backend)


def _mask(needs: tuple[bool, ...]) -> int:
    return sum(1 << i for i, need in enumerate(needs) if need)


class Call(NamedTuple):
    """Checked arguments in one of the forms."""

    form: Matrices | Chunks
    parts: tuple
    target: Tensor | None

    def requires_grad(self) -> bool:
        if forward_ad._current_level >= 0:  # a dual number: autograd says that it has no forward mode here
            return True
        if torch.is_grad_enabled():
            for part in self.parts:  # any() would take a microsecond of a call's thirty
                if isinstance(part, Tensor) and part.requires_grad:
                    return True
        return is_traced_in_transform()

    def has_half_gradient(self) -> bool:
        # fp16 gradients made in the forward pass would underflow before the grad scaler's factor arrives. those of a
        # head's tensors wait in float32
        for logits in self.form.logits(self.parts):
            if logits is not None and logits.dtype == torch.float16 and logits.requires_grad:
                return torch.is_grad_enabled()
        return False

    def is_better_from_rows(self, recompute: bool) -> bool:
        """Whether the row state is made first and a gradient when it is asked for, if at all."""
        if not self.requires_grad():
            return self.form.has_scan_of_its_own()
        return recompute or self.has_half_gradient()

    def row_fields(self, weight: Tensor | None, wanted: int) -> dict[str, Tensor]:
        """The wanted fields by name, each [*], differentiable where they can be."""
        if not self.requires_grad():
            return ops.named_fields(wanted, self.form.scan(self.parts, self.target, weight, wanted))[0]
        parts = distinct(self.form.tensors(self.parts))
        rows = apply(RowScan, _WHO, self.form, saveable(self.target), saveable(weight), wanted, *parts)
        return dict(zip(ops.fields_in(wanted), rows, strict=True))

    def loss_in_one_pass(self, weight: Tensor | None, options: tuple) -> tuple[Tensor, dict[str, Tensor]]:
        """(0-d loss, the wanted fields); options: normalizer, label_smoothing, z_loss, is mean, wanted."""
        wanted = options[-1]
        if self.requires_grad():
            parts = distinct(self.parts)
            edges = anchors(parts)
            loss, *fields = apply(OnePass, _WHO, self.form, saveable(self.target), weight, *options, edges, *parts)
        else:
            loss, *fields = self.form.loss(self.parts, self.target, weight, options, ())
        return loss, ops.named_fields(wanted, fields)[0] if wanted else {}


class RowScan(torch.autograd.Function):
    """Row fields with a reread in backward: exact for any upstream gradients, and as often as wanted."""

    @staticmethod
    def forward(ctx, form, target, weight, wanted, *parts):
        state = ops.mask_of("max", "log_denom")
        if wanted & ops.mask_of("base_log_denom", "base_nll", "mean_base"):
            state |= ops.mask_of("base_max", "base_log_denom")
        fields, _ = ops.named_fields(wanted | state, form.scan(parts, target, weight, wanted | state))
        saved = ("max", "log_denom", "nll", "base_max", "base_log_denom", "mean_sum", "mean_base")
        ctx.save_for_backward(target, weight, *(fields.get(name) for name in saved), *parts)
        ctx.form, ctx.wanted = form, wanted
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
        target, weight, m, log_denom, nll, m_b, log_denom_b, mean_sum, mean_base, *parts = ctx.saved_tensors
        given = dict(zip(ops.fields_in(ctx.wanted), upstream, strict=True))
        coefficients = _coefficients(given, mean_sum, mean_base)
        needs = ctx.needs_input_grad[4:]
        grads: list = [None] * len(needs)
        if any(c is not None for c in coefficients):
            state = [m, log_denom, nll, m_b, log_denom_b]
            grads = _spread(ctx.form.backward(parts, target, weight, state, coefficients, needs), needs)
            for i, kind in enumerate(ctx.form.kinds()):
                if grads[i] is not None and kind == SCALE and parts[i].dim() == 0:
                    grads[i] = grads[i].sum()
        return (None, None, None, None, *once(_WHO, grads, (*parts, *upstream)))


def _spread(grads: list[Tensor], needs: tuple[bool, ...]) -> list[Tensor | None]:
    """The gradients that an op has made, one place for each part."""
    remaining = iter(grads)
    return [next(remaining) if need else None for need in needs]


def _coefficients(given: dict[str, Tensor | None], mean_sum, mean_base) -> list[Tensor | None]:
    """ops.COEFFICIENTS from the upstream gradients of the fields (None: no gradient)."""

    def total(*terms: Tensor | None) -> Tensor | None:
        present = [t for t in terms if t is not None]
        return sum(present[1:], present[0]) if present else None

    g_mean_sum, g_mean_base, g_base_nll = given.get("mean_sum"), given.get("mean_base"), given.get("base_nll")
    # the entropy's and the divergence's ones cancel before anything small is added, which they would swallow
    a = total(
        given.get("log_denom"),
        g_mean_sum,
        None if g_mean_sum is None else -g_mean_sum * mean_sum,
        None if g_mean_base is None else -g_mean_base * mean_base,
    )
    q_b = total(given.get("base_log_denom"), g_base_nll)
    b_b = None if g_base_nll is None else -g_base_nll
    return [a, g_mean_sum, g_mean_base, None, given.get("nll"), given.get("weighted_sum"), q_b, b_b]


class OnePass(torch.autograd.Function):
    """Loss and gradients made together; backward only rescales where the upstream gradient is not 1."""

    @staticmethod
    def forward(ctx, form, target, weight, normalizer, eps, z_loss, mean, wanted, edges, *parts):
        needs = ctx.needs_input_grad[9:]
        loss, *rest = form.loss(parts, target, weight, (normalizer, eps, z_loss, mean, wanted), needs)
        num_grads = sum(needs)
        fields, grads = rest[: len(rest) - num_grads], rest[len(rest) - num_grads :]
        ctx.save_for_backward(target, *grads)
        ctx.form, ctx.needs = form, needs
        # no inputs: compiled autograd adds a gradient of None to the one that the part has
        ctx.edges = edges
        ctx.layouts = [(part.dtype, part.dim()) if isinstance(part, Tensor) else None for part in parts]
        ctx.handed_out = False
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
        grads = _spread(saved, ctx.needs)
        factor = upstream.detach()
        for i, (kind, grad) in enumerate(zip(ctx.form.kinds(), grads, strict=True)):
            if grad is None:
                continue
            dtype, dim = ctx.layouts[i]
            if kind == SCALE:
                per_row = (grad * factor).masked_fill(ops.is_ignored(target, ctx.form.ignore_index), 0.0)
                grads[i] = per_row if dim else per_row.sum()
            else:
                grads[i] = _rescaled(grad, factor, target if kind == ROWS else None, ctx.form).to(dtype)
        return (*[None] * 9, *once(_WHO, grads, (*ctx.edges, upstream)))


def _rescaled(grad: Tensor, factor: Tensor, target: Tensor | None, form: Matrices | Chunks) -> Tensor:
    """grad * factor, ignored rows left at +0.0; in place in eager mode, where a factor of 1 costs nothing."""
    if torch.compiler.is_compiling():
        scaled = (grad.to(factor.dtype) * factor).to(grad.dtype)
        if target is None:
            return scaled
        return torch.where(ops.is_ignored(target, form.ignore_index).unsqueeze(-1), grad, scaled)
    ops.cross_entropy_rescale_(grad, factor, target, form.ignore_index, form.backend)
    torch.autograd.graph.increment_version(grad)
    return grad
