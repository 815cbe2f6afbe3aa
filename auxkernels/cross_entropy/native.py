"""aux_cross_entropy on CPU, compiled; arguments as in ops.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import in_range_message
from ..native import DTYPE_CODES, cpu
from . import ops
from .compiled_arguments import Call, output_pointers


def _run(call: Call, function, *rest) -> None:
    try:
        function(*call.leading, *rest)
    except IndexError as error:
        row, value = map(int, str(error).split())
        message = in_range_message(call.shape, row, value, call.vocab_size, call.ignore_index)
        raise IndexError(message) from None


def scan(
    base, aux, target, weight, base_scale, aux_scale, base_softcap, aux_softcap, ignore_index, vocab_size, wanted
) -> list[Tensor]:
    """The wanted fields of every row."""
    leading = (base, aux, target, weight, base_scale, aux_scale, base_softcap, aux_softcap, ignore_index, vocab_size)
    call = Call(*leading, torch.get_num_threads())
    fields = ops.empty_fields(base, aux, wanted)
    _run(call, cpu().scan, output_pointers(wanted, 0, fields, []))
    return fields


def loss(
    base,
    aux,
    target,
    weight,
    base_scale,
    aux_scale,
    base_softcap,
    aux_softcap,
    ignore_index,
    vocab_size,
    normalizer,
    label_smoothing,
    z_loss,
    mean,
    wanted,
    needs,
    grads: list[Tensor] | None = None,
) -> list[Tensor]:
    """The reduced loss, the wanted fields and the requested gradients, in one pass over the sources.

    grads   where the gradients go, contiguous and as `ops.empty_grads` makes them; may be the sources' own memory.
    """
    leading = (base, aux, target, weight, base_scale, aux_scale, base_softcap, aux_softcap, ignore_index, vocab_size)
    call = Call(*leading, torch.get_num_threads())
    value = base.new_empty((), dtype=call.compute)
    fields = ops.empty_fields(base, aux, wanted)
    grads = ops.empty_grads(base, aux, needs) if grads is None else grads
    divisor = 1.0 if normalizer is None else float(normalizer)
    _run(
        call,
        cpu().loss,
        output_pointers(wanted, needs, fields, grads),
        value.data_ptr(),
        normalizer is not None,
        divisor,
        label_smoothing,
        z_loss,
        mean,
    )
    return [value, *fields, *grads]


def backward(
    base,
    aux,
    target,
    weight,
    base_scale,
    aux_scale,
    base_softcap,
    aux_softcap,
    ignore_index,
    vocab_size,
    max,
    log_denom,
    nll,
    base_max,
    base_log_denom,
    coefficients,
    needs,
    grads: list[Tensor] | None = None,
) -> list[Tensor]:
    """The requested gradients for one number per row and coefficient; `grads` as for `loss`."""
    leading = (base, aux, target, weight, base_scale, aux_scale, base_softcap, aux_softcap, ignore_index, vocab_size)
    call = Call(*leading, torch.get_num_threads())
    grads = ops.empty_grads(base, aux, needs) if grads is None else grads
    state = zip(
        ("max", "log_denom", "nll", "base_max", "base_log_denom"),
        (max, log_denom, nll, base_max, base_log_denom),
        strict=True,
    )
    _run(
        call,
        cpu().backward,
        output_pointers(0, needs, [], grads),
        [call.row_pointer(name, values) for name, values in state],
        [
            call.row_pointer(f"coefficient {name}", values)
            for name, values in zip(ops.COEFFICIENTS, coefficients, strict=True)
        ],
    )
    return grads


def rescale_(grad: Tensor, factor: Tensor, target: Tensor | None, ignore_index: int) -> None:
    """grad [*, V] *= factor (0-d) in place, but for ignored rows, which stay +0.0."""
    factor = float(factor.detach())
    if factor == 1.0:
        return
    target = None if target is None else target.contiguous()
    cpu().rescale(
        grad.data_ptr(),
        DTYPE_CODES[grad.dtype],
        grad.shape[:-1].numel(),
        grad.shape[-1],
        0 if target is None else target.data_ptr(),
        target is not None and target.dtype == torch.int32,
        ignore_index,
        factor,
        torch.get_num_threads(),
    )
