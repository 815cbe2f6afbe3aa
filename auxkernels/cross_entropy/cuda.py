"""The row kernels of cross-entropy on CUDA devices, compiled; see request.Kernels. Nothing is read from the device."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..native import DTYPE_CODES
from .compiled_arguments import Arguments, checked, output_pointers
from .request import Coefficients, Gradients, LossTerms, Problem, RowState, empty_fields

# what the loss is divided by: enum Divisor of csrc/cuda/cross_entropy.h
BY_ONE, BY_NUMBER, BY_TENSOR, BY_KEPT_ROWS = range(4)


@functools.cache
def cuda() -> ModuleType:
    return checked(native.cuda())


def _on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Kernels start on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _place_of(tensor: Tensor) -> tuple[int, int]:
    """(current stream, device) as the compiled functions take them."""
    if not tensor.is_cuda:  # the module that the tests compile for the CPU
        return 0, 0
    return torch.cuda.current_stream(tensor.device).cuda_stream, tensor.device.index


def _counter(like: Tensor) -> Tensor | None:
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


def scan(problem: Problem, wanted: int) -> list[Tensor]:
    base = problem.base.values
    with _on_device_of(base):
        arguments = Arguments(problem, *_place_of(base))
        fields = empty_fields(problem, wanted)
        cuda().scan(*arguments.leading, output_pointers(wanted, fields, Gradients()))
    return fields


def loss(
    problem: Problem, normalizer: float | Tensor | None, terms: LossTerms, wanted: int, grads: Gradients
) -> tuple[Tensor, list[Tensor]]:
    """By one kernel; gradients may have any dtype, or be a source's own memory, in its dtype."""
    base = problem.base.values
    with _on_device_of(base):
        arguments = Arguments(problem, *_place_of(base))
        value = base.new_empty((), dtype=arguments.compute)
        row_loss = base.new_empty(arguments.shape.numel(), dtype=arguments.compute)
        fields = empty_fields(problem, wanted)
        divisor, number, counter = BY_KEPT_ROWS if terms.mean else BY_ONE, 1.0, _counter(base)
        divided_by: Tensor | None = None
        if terms.mean and isinstance(normalizer, Tensor) and normalizer.device == base.device and base.is_cuda:
            divisor, divided_by = BY_TENSOR, normalizer.detach().to(torch.float64)
        elif terms.mean and normalizer is not None:
            divisor, number = BY_NUMBER, float(normalizer)
        cuda().loss(
            *arguments.leading,
            output_pointers(wanted, fields, grads),
            (  # LossSlot of csrc/cuda/bindings.cpp
                # an empty tensor has no address, and one of no rows still has a loss
                row_loss.data_ptr() or value.data_ptr(),
                value.data_ptr(),
                0 if counter is None else counter.data_ptr(),
                divisor,
                0 if divided_by is None else divided_by.data_ptr(),
            ),
            number,
            terms.label_smoothing,
            terms.z_loss,
        )
    return value, fields


def backward(problem: Problem, state: RowState, coefficients: Coefficients, grads: Gradients) -> None:
    base = problem.base.values
    with _on_device_of(base):
        arguments = Arguments(problem, *_place_of(base))
        of_rows = arguments.row_pointers(state), arguments.row_pointers(coefficients)
        cuda().backward(*arguments.leading, output_pointers(0, [], grads), *of_rows)


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
