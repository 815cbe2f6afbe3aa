"""aux_cross_entropy on CUDA devices, compiled; arguments as in ops.py. Nothing is read from the device."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ..native import DTYPE_CODES, cuda
from . import ops
from .compiled_arguments import Call, output_pointers

# what the loss is divided by: enum Divisor of csrc/cuda/cross_entropy.h
BY_ONE, BY_NUMBER, BY_TENSOR, BY_KEPT_ROWS = range(4)


def _on_device_of(tensor: Tensor):
    """Kernels start on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _place_of(tensor: Tensor) -> tuple[int, int]:
    """(current stream, device) as the compiled functions take them."""
    if not tensor.is_cuda:  # the module that the tests compile for the CPU
        return 0, 0
    return torch.cuda.current_stream(tensor.device).cuda_stream, tensor.device.index


def _ticket(like: Tensor) -> Tensor | None:
    """A counter for the blocks of one kernel, 0 before and after it; None: the module has one for every stream.

    A captured graph may be replayed beside anything, and a stream that torch did not make may be destroyed and its
    handle given to another: those get a counter of their own.
    """
    if not like.is_cuda:
        return None
    stream = torch.cuda.current_stream(like.device)
    is_external = stream.cuda_stream != 0 and stream.stream_id == stream.cuda_stream
    if is_external or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=like.device)
    return None


def scan(
    base, aux, target, weight, base_scale, aux_scale, base_softcap, aux_softcap, ignore_index, vocab_size, wanted
) -> list[Tensor]:
    """The wanted fields of every row."""
    with _on_device_of(base):
        leading = (base, aux, target, weight, base_scale, aux_scale, base_softcap, aux_softcap, ignore_index)
        call = Call(*leading, vocab_size, *_place_of(base))
        fields = ops.empty_fields(base, aux, wanted)
        cuda().scan(*call.leading, output_pointers(wanted, 0, fields, []))
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
    """The reduced loss, the wanted fields and the requested gradients, divided too, by one kernel.

    grads   where the gradients go, contiguous and as wide as the sources, in any dtype; may be a source's own memory,
            in its dtype.
    """
    with _on_device_of(base):
        leading = (base, aux, target, weight, base_scale, aux_scale, base_softcap, aux_softcap, ignore_index)
        call = Call(*leading, vocab_size, *_place_of(base))
        value = base.new_empty((), dtype=call.compute)
        row_loss = base.new_empty(call.shape.numel(), dtype=call.compute)
        fields = ops.empty_fields(base, aux, wanted)
        grads = ops.empty_grads(base, aux, needs) if grads is None else grads
        divisor, number, ticket = BY_KEPT_ROWS if mean else BY_ONE, 1.0, _ticket(base)
        if mean and isinstance(normalizer, Tensor) and normalizer.device == base.device and base.is_cuda:
            divisor, normalizer = BY_TENSOR, normalizer.detach().to(torch.float64)
        elif mean and normalizer is not None:
            divisor, number, normalizer = BY_NUMBER, float(normalizer), None
        cuda().loss(
            *call.leading,
            output_pointers(wanted, needs, fields, grads),
            (
                # an empty tensor has no address, and one of no rows still has a loss
                row_loss.data_ptr() or value.data_ptr(),
                value.data_ptr(),
                0 if ticket is None else ticket.data_ptr(),
                divisor,
                0 if normalizer is None else normalizer.data_ptr(),
            ),
            number,
            label_smoothing,
            z_loss,
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
    with _on_device_of(base):
        leading = (base, aux, target, weight, base_scale, aux_scale, base_softcap, aux_softcap, ignore_index)
        call = Call(*leading, vocab_size, *_place_of(base))
        grads = ops.empty_grads(base, aux, needs) if grads is None else grads
        state = {"max": max, "log_denom": log_denom, "nll": nll, "base_max": base_max, "base_log_denom": base_log_denom}
        named = zip(ops.COEFFICIENTS, coefficients, strict=True)
        cuda().backward(
            *call.leading,
            output_pointers(0, needs, [], grads),
            [call.row_pointer(name, values) for name, values in state.items()],
            [call.row_pointer(f"coefficient {name}", values) for name, values in named],
        )
    return grads


def plan(
    num_rows: int,
    vocab_size: int,
    base: torch.dtype,
    aux: torch.dtype | None = None,
    *,
    has_gradient: bool = True,
    has_statistics: bool = False,
    device: int = 0,
) -> dict[str, int | bool]:
    """How a device shares such a call out, to stand beside a measurement: nothing is started or waited for.

    Among others `cluster` blocks have a row, cut into `num_segments` of `num_tiles` tiles of `tile` columns; each block
    has `num_slots` slots of `slot_bytes` for them, and `clusters_at_once` run.
    """
    codes = DTYPE_CODES[base], -1 if aux is None else DTYPE_CODES[aux]
    with torch.cuda.device(device) if torch.cuda.is_available() else contextlib.nullcontext():
        return cuda().plan_on(device, num_rows, vocab_size, *codes, has_gradient, has_statistics)


def rescale_(grad: Tensor, factor: Tensor, target: Tensor | None, ignore_index: int) -> None:
    """grad [*, V] *= factor (0-d, read on the device) in place, but for ignored rows, which stay +0.0."""
    with _on_device_of(grad):
        target = None if target is None else target.contiguous()
        factor = factor.detach().to(device=grad.device)
        if factor.dtype not in DTYPE_CODES:
            factor = factor.to(torch.float32)
        cuda().rescale(
            grad.data_ptr(),
            DTYPE_CODES[grad.dtype],
            grad.shape[:-1].numel(),
            grad.shape[-1],
            0 if target is None else target.data_ptr(),
            target is not None and target.dtype == torch.int32,
            ignore_index,
            factor.data_ptr(),
            DTYPE_CODES[factor.dtype],
            *_place_of(grad),
        )
