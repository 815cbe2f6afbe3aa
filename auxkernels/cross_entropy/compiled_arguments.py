"""From tensors to what the compiled functions of cross-entropy take: pointers, sizes, strides.

Lists go by number: the enums that comments here name are those of csrc/common/arguments.h. Arguments have been checked,
by the public function or by the operator.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from ..layout import as_rows
from ..native import DTYPE_CODES, with_orders
from ..sources import Matrix
from .request import COEFFICIENTS, FIELDS, Coefficients, Gradients, Problem, RowState

_NO_SOURCE, _NO_NUMBERS = (0,) * 8, (1.0, 0.0)
NUM_FIELDS = len(FIELDS)


def checked(module: ModuleType) -> ModuleType:
    """The compiled module. Raises RuntimeError unless its fields, coefficients and row state are those of request."""
    return with_orders(module, field_names=FIELDS, coefficient_names=COEFFICIENTS, state_names=RowState._fields)


class Arguments:
    """The leading arguments of a compiled function, and the tensors that must outlive it."""

    __slots__ = ("alive", "compute", "leading", "problem", "shape")

    def __init__(self, problem: Problem, threads_or_stream: int, device: int = 0):
        base, aux, target, weight, ignore_index, vocab_size, target_logits = problem
        self.problem, self.shape = problem, base.values.shape[:-1]
        self.compute = problem.compute()
        self.alive: list[Tensor] = []
        self.leading = (
            (  # ProblemSlot
                self.shape.numel(),
                vocab_size,
                0 if target is None else self._pointer(target),
                target is not None and target.dtype == torch.int32,
                ignore_index,
                0 if weight is None else self._converted_pointer(weight),
                0 if target_logits is None else self._converted_pointer(target_logits),
                threads_or_stream,
                self.compute == torch.float64,
                device,
            ),
            self._source(base),
            _numbers(base),
            _NO_SOURCE if aux is None else self._source(aux),
            _NO_NUMBERS if aux is None else _numbers(aux),
        )

    def _pointer(self, tensor: Tensor) -> int:
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
        self.alive.append(tensor)
        return _address(tensor)

    def _converted_pointer(self, tensor: Tensor) -> int:
        """Of a tensor in the compute dtype; a conversion that changes nothing still costs half a microsecond."""
        return self._pointer(tensor if tensor.dtype == self.compute else tensor.to(self.compute))

    def _source(self, matrix: Matrix) -> tuple[int, ...]:
        values, scale = matrix.values, matrix.scale
        code, width = DTYPE_CODES[values.dtype], values.shape[-1]
        values, *rows = as_rows(values)
        self.alive.append(values)
        scale_pointer = scale_stride = 0
        if isinstance(scale, Tensor):
            scale_pointer, scale_stride = self._converted_pointer(scale), int(scale.dim() > 0)
        return (_address(values), code, width, *rows, scale_pointer, scale_stride)  # SourceSlot

    def row_pointers(self, numbers: RowState | Coefficients) -> list[int]:
        """Of [*] tensors of the compute dtype, contiguous."""
        return [0 if values is None else self._converted_pointer(values) for values in numbers]


def _address(tensor: Tensor) -> int:
    address = tensor.data_ptr()
    if address == 0 and tensor.numel():
        # the compiled module would take it for an argument that was not given
        raise TypeError(f"tensors must have memory of their own, got one of type {type(tensor).__name__} without")
    return address


def _numbers(matrix: Matrix) -> tuple[float, float]:
    scale = matrix.scale
    return (1.0 if scale is None or isinstance(scale, Tensor) else float(scale)), matrix.softcap or 0.0  # SourceNumber


@functools.cache
def _places(wanted: int) -> list[int]:
    return [i for i in range(NUM_FIELDS) if wanted >> i & 1]


def output_pointers(wanted: int, fields: list[Tensor], grads: Gradients) -> list[int]:
    """OutputSlot: a pointer for each field and gradient, 0 where it is not wanted, and the dtypes of two gradients."""
    pointers = [0] * (NUM_FIELDS + 6)
    first = 0
    for stacked in fields:
        address, step, num_rows = stacked.data_ptr(), stacked.stride(0) * stacked.element_size(), stacked.shape[0]
        for row, place in enumerate(_places(wanted)[first : first + num_rows]):
            pointers[place] = address + row * step
        first += num_rows
    for place, grad in enumerate(grads, NUM_FIELDS):
        if grad is not None:
            pointers[place] = grad.data_ptr()
    for place, grad in enumerate((grads.base, grads.aux), NUM_FIELDS + 4):
        if grad is not None:
            pointers[place] = DTYPE_CODES[grad.dtype]
    return pointers
