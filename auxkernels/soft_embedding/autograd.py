"""The autograd functions of soft_embedding: row state is saved, probabilities are made again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import dispatch
from ..autograd import apply, apply_in_eager, called_directly, distinct, is_traced_in_transform, once, saveable
from ..dispatch import is_plain_on_cpu
from ..sources import LAYOUTS, NUMBERS
from . import native_plain, ops
from .request import NO_UPSTREAM, State, Upstream, mask_of, outputs_in

_WHO = "soft_embedding"
_STATE = mask_of("max", "log_denom", "argmax")
_DIFFERENTIABLE = Upstream._fields


def requires_grad(call: ops.Call) -> bool:
    if forward_ad._current_level >= 0:  # a dual number: autograd says that it has no forward mode here
        return True
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in call.differentiable()):
        return True
    return is_traced_in_transform()


def lookup(call: ops.Call, wanted: int, clean_gradient: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The mixture and the wanted outputs by name.

    clean_gradient   straight-through by noise, with the gradient of the softmax without it
    """
    if requires_grad(call):
        numbers = (saveable(None if t is None else t.detach()) for t in (call.gumbel, call.seed, call.mask))
        function = _CleanStraightThrough if clean_gradient else _SoftEmbedding
        mixture, *fields = apply(function, _WHO, call.options, wanted, *numbers, *distinct(call.differentiable()))
    elif clean_gradient:
        mixture, chosen = ops.forward(_noisy_choice(call), mask_of("argmax"))
        given = _clean_fields(call, wanted) if wanted else {}
        fields = [chosen if name == "argmax" else value for name, value in given.items()]
    else:
        mixture, *fields = ops.forward(call, wanted)
    return mixture, dict(zip(outputs_in(wanted), fields, strict=True))


def first_column(table: Tensor) -> Tensor:
    """A table for calls whose mixture nobody reads."""
    return table.detach().narrow(-1, 0, min(1, table.shape[-1]))


def _call_of(
    options: ops.Options, gumbel: Tensor | None, seed: Tensor | None, mask: Tensor | None, tensors: Sequence[Any]
) -> ops.Call:
    *leaves, temperature, table = tensors
    return ops.Call(tuple(leaves), temperature, table, gumbel, seed, mask, options)


def _saved(options: ops.Options, wanted: int) -> int:
    return wanted | _STATE | (mask_of("labels") if options.top_k else 0)


def _state_of(fields: dict[str, Tensor]) -> State:
    return State(fields["max"], fields["log_denom"], fields["argmax"], fields.get("labels"))


def given_out(ctx: Any, fields: dict[str, Tensor], wanted: int) -> list[Tensor]:
    """The wanted ones, marked; the argmax as a copy: what is saved must not be what its user may write."""
    given = {name: fields[name].clone() if name == "argmax" else fields[name] for name in outputs_in(wanted)}
    ctx.mark_non_differentiable(*(t for name, t in given.items() if name not in _DIFFERENTIABLE))
    return list(given.values())


def upstream_of(wanted: int, of_fields: Sequence[Tensor | None]) -> Upstream:
    given = dict(zip(outputs_in(wanted), of_fields, strict=True))
    return Upstream(*(given.get(name) for name in _DIFFERENTIABLE))


def per_tensor(grads: list[Tensor | None], tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """The numbers for each row of a 0-d scale or temperature, added up."""
    found = list(grads)
    num_leaves = len(tensors) - 2
    for i, (grad, tensor) in enumerate(zip(grads, tensors, strict=True)):
        is_numbers = i == num_leaves or (i < num_leaves and LAYOUTS[i % len(LAYOUTS)] == NUMBERS)
        if grad is not None and is_numbers and tensor.dim() == 0:
            found[i] = grad.sum()
    return found


class _SoftEmbedding(torch.autograd.Function):
    """Any upstream gradients, as often as wanted. tensors: what can have a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        options: ops.Options,
        wanted: int,
        gumbel: Tensor | None,
        seed: Tensor | None,
        mask: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        saved = _saved(options, wanted)
        mixture, *outputs = ops.forward(_call_of(options, gumbel, seed, mask, tensors), saved)
        fields = dict(zip(outputs_in(saved), outputs, strict=True))
        ctx.save_for_backward(gumbel, seed, mask, *_state_of(fields), *tensors)
        ctx.options, ctx.wanted = options, wanted
        ctx.set_materialize_grads(False)
        return (mixture, *given_out(ctx, fields, wanted))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *of_fields: Tensor | None) -> tuple[Tensor | None, ...]:
        gumbel, seed, mask, max, log_denom, argmax, labels, *tensors = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[-len(tensors) :])
        grads: list[Tensor | None] = [None] * len(needs)
        if grad is not None or any(t is not None for t in of_fields):
            call, upstream = _call_of(ctx.options, gumbel, seed, mask, tensors), upstream_of(ctx.wanted, of_fields)
            made = iter(ops.backward(call, State(max, log_denom, argmax, labels), grad, upstream, needs))
            grads = per_tensor([next(made) if need else None for need in needs], tensors)
        return (None, None, None, None, None, *once(_WHO, grads, (*tensors, grad, *of_fields)))


# -- a lookup without options, as the native implementation has it whole -----------------------------------------------


def plain_lookup(scores: Tensor, table: Tensor, temperature: float | Tensor) -> Tensor:
    """The mixture [*, D] of a call that `native_plain.serves` accepts."""
    if torch.is_autocast_enabled("cpu"):
        table = table.to(torch.get_autocast_dtype("cpu"))
    if torch.is_grad_enabled() and (scores.requires_grad or table.requires_grad):
        return apply_in_eager(_PlainLookup, float(temperature), scores, table)
    mixture = native_plain.small_forward(scores, table, float(temperature))
    return native_plain.forward(scores, table, float(temperature), None) if mixture is None else mixture


@called_directly
class _PlainLookup(torch.autograd.Function):
    """Likewise. Of a small call no row state is saved: the tensor costs more than making it again."""

    @staticmethod
    def forward(ctx: Any, temperature: float, scores: Tensor, table: Tensor) -> Tensor:
        ctx.temperature = temperature
        mixture = native_plain.small_forward(scores, table, temperature)
        if mixture is not None:
            ctx.save_for_backward(scores, table)
            return mixture
        state = scores.new_empty((2, scores.numel() // table.shape[0]), dtype=torch.float32)
        ctx.save_for_backward(scores, table, state)
        return native_plain.forward(scores, table, temperature, state)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        _, *needs = ctx.needs_input_grad
        if dispatch.is_eager() and not torch.is_grad_enabled() and is_plain_on_cpu(grad):
            scores, table, *state = saved
            if is_plain_on_cpu(scores) and is_plain_on_cpu(table):
                if not state:
                    return None, *native_plain.small_backward(scores, table, ctx.temperature, grad, *needs)
                if is_plain_on_cpu(state[0]) and not torch.is_autocast_enabled("cpu"):
                    return None, *native_plain.backward(scores, table, state[0], ctx.temperature, grad, *needs)
        grad = grad.resolve_neg()
        if not dispatch.is_direct((*saved, grad), "native"):
            grads = _traced_gradients(saved, ctx.temperature, grad, needs)
        elif torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                grads = _native_gradients(saved, ctx.temperature, grad, needs)
        else:
            grads = _native_gradients(saved, ctx.temperature, grad, needs)
        return (None, *once(_WHO, grads, (*saved[:2], grad)))


def _native_gradients(
    saved: Sequence[Tensor], temperature: float, grad: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    scores, table, *state = map(native_plain.plain, saved)
    if state:
        return native_plain.backward(scores, table, state[0], temperature, grad, *needs)
    return [*native_plain.small_backward(scores, table, temperature, grad.contiguous(), *needs)]


def _traced_gradients(
    saved: Sequence[Tensor], temperature: float, grad: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """By the operators, which what is tracing knows."""
    scores, table, *state = saved
    number = dispatch.number_tensor(temperature, torch.float32, scores.device)
    options = ops.Options((0.0,), None, 0, False, "native")
    call = _call_of(options, None, None, None, (scores, None, None, None, number, table))
    if state:
        max, log_denom = state[0].view(2, *scores.shape[:-1])
    else:
        _, max, log_denom = ops.forward(call._replace(table=first_column(table)), mask_of("max", "log_denom"))
    argmax = torch.empty_like(max, dtype=torch.int64)  # read for straight-through and statistics alone
    wanted = [needs[0], False, False, False, False, needs[1]]
    made = iter(ops.backward(call, State(max, log_denom, argmax, None), grad, NO_UPSTREAM, wanted))
    return [next(made) if need else None for need in needs]


# -- a noisy choice with the gradient of the softmax without noise -----------------------------------------------------


def _noisy_choice(call: ops.Call) -> ops.Call:
    """The lookup of the chosen labels' rows; the choice is among all labels."""
    return call._replace(options=call.options._replace(top_k=0))


def _clean_fields(call: ops.Call, wanted: int) -> dict[str, Tensor]:
    """The wanted fields of the softmax without noise."""
    _, *fields = ops.forward(call._replace(table=first_column(call.table), gumbel=None, seed=None), wanted)
    return dict(zip(outputs_in(wanted), fields, strict=True))


class _CleanStraightThrough(torch.autograd.Function):
    """Two lookups in one: the noisy one's rows and gradient of the table, the other one's gradient of the rest."""

    @staticmethod
    def forward(
        ctx: Any,
        options: ops.Options,
        wanted: int,
        gumbel: Tensor | None,
        seed: Tensor | None,
        mask: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        call = _call_of(options, gumbel, seed, mask, tensors)
        mixture, chosen = ops.forward(_noisy_choice(call), mask_of("argmax"))
        fields = _clean_fields(call, _saved(options, wanted))
        ctx.save_for_backward(gumbel, seed, mask, chosen, *_state_of(fields), *tensors)
        ctx.options, ctx.wanted = options, wanted
        ctx.set_materialize_grads(False)
        return (mixture, *given_out(ctx, fields | {"argmax": chosen}, wanted))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *of_fields: Tensor | None) -> tuple[Tensor | None, ...]:
        gumbel, seed, mask, chosen, max, log_denom, argmax, labels, *tensors = ctx.saved_tensors
        call, state = _call_of(ctx.options, gumbel, seed, mask, tensors), State(max, log_denom, argmax, labels)
        *needs_rest, needs_table = ctx.needs_input_grad[-len(tensors) :]
        grads: list[Tensor | None] = [None] * len(tensors)
        if any(needs_rest) and (grad is not None or any(t is not None for t in of_fields)):
            clean, upstream = call._replace(gumbel=None, seed=None), upstream_of(ctx.wanted, of_fields)
            made = iter(ops.backward(clean, state, grad, upstream, [*needs_rest, False]))
            grads = per_tensor([*(next(made) if need else None for need in needs_rest), None], tensors)
        if needs_table and grad is not None:
            # of the state it reads the label, and whether the row is a distribution, which noise does not change
            noisy = state._replace(argmax=chosen, labels=None)
            of_table = [*(False for _ in needs_rest), True]
            (grads[-1],) = ops.backward(_noisy_choice(call), noisy, grad, NO_UPSTREAM, of_table)
        return (None, None, None, None, None, *once(_WHO, grads, (*tensors, grad, *of_fields)))
