"""From tensors to what the compiled functions of cross-entropy take: pointers, sizes, strides; see csrc/arguments.h.

Arguments are those of ops.py and have been checked, by the public function or by the op; where an op takes a 0-d tensor
for a number (scale, normalizer), a number will do as well.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..layout import as_rows
from ..native import DTYPE_CODES
from . import ops

_NO_SOURCE = (0, 0, 0, 1, 0, 0, 0, 0)
NUM_FIELDS = len(ops.FIELDS)


class Call:
    """The leading arguments of a compiled function, and the tensors that must outlive it."""

    __slots__ = ("alive", "compute", "ignore_index", "leading", "shape", "vocab_size")

    def __init__(
        self,
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
        threads_or_stream,
        device=0,
    ):
        self.compute = ops.compute_dtype(base, aux)
        self.alive: list[Tensor] = []
        self.shape, self.ignore_index, self.vocab_size = base.shape[:-1], ignore_index, vocab_size
        self.leading = (
            (
                self.shape.numel(),
                vocab_size,
                0 if target is None else self._pointer(target),
                target is not None and target.dtype == torch.int32,
                ignore_index,
                0 if weight is None else self._converted_pointer(weight),
                threads_or_stream,
                self.compute == torch.float64,
                device,
            ),
            self._source(base, base_scale),
            _numbers(base_scale, base_softcap),
            _NO_SOURCE if aux is None else self._source(aux, aux_scale),
            _numbers(aux_scale, aux_softcap),
        )

    def _pointer(self, tensor: Tensor) -> int:
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
        self.alive.append(tensor)
        return _address(tensor)

    def _converted_pointer(self, tensor: Tensor) -> int:
        """Of a tensor in the compute dtype; a conversion that changes nothing still costs half a microsecond."""
        return self._pointer(tensor if tensor.dtype == self.compute else tensor.to(self.compute))

    def _source(self, values: Tensor, scale: float | Tensor | None) -> tuple[int, ...]:
        code, width = DTYPE_CODES[values.dtype], values.shape[-1]
        values, *rows = as_rows(values)
        self.alive.append(values)
        scale_pointer = scale_stride = 0
        if isinstance(scale, Tensor):
            scale_pointer, scale_stride = self._converted_pointer(scale), int(scale.dim() > 0)
        return (_address(values), code, width, *rows, scale_pointer, scale_stride)

    def row_pointer(self, name: str, values: Tensor | None) -> int:
        """A [*] tensor of the compute dtype, contiguous."""
        if values is None:
            return 0
        if values.shape != self.shape:
            raise ValueError(f"{name} must have shape {list(self.shape)}, got {list(values.shape)}")
        return self._converted_pointer(values)


def _address(tensor: Tensor) -> int:
    address = tensor.data_ptr()
    if address == 0 and tensor.numel():
        # the compiled module would take it for an argument that was not given
        raise TypeError(f"tensors must have memory of their own, got one of type {type(tensor).__name__} without")
    return address


def _numbers(scale: float | Tensor | None, softcap: float | None) -> tuple[float, float]:
    return (1.0 if scale is None or isinstance(scale, Tensor) else float(scale)), softcap or 0.0


@functools.cache
def _places(wanted: int) -> list[int]:
    return [i for i in range(NUM_FIELDS) if wanted >> i & 1]


def output_pointers(wanted: int, needs: int, fields: list[Tensor], grads: list[Tensor]) -> list[int]:
    """One pointer for each field and gradient of the compiled module's list, 0 where it is not wanted; two dtypes."""
    pointers = [0] * (NUM_FIELDS + 6)
    first = 0
    for stacked in fields:
        address, step, num_rows = stacked.data_ptr(), stacked.stride(0) * stacked.element_size(), len(stacked)
        for row, place in enumerate(_places(wanted)[first : first + num_rows]):
            pointers[place] = address + row * step
        first += num_rows
    if needs:
        for i, grad in zip([i for i in range(4) if needs >> i & 1], grads, strict=True):
            pointers[NUM_FIELDS + i] = grad.data_ptr()
            if i < 2:
                pointers[NUM_FIELDS + 4 + i] = DTYPE_CODES[grad.dtype]
    return pointers
