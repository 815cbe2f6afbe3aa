"""aux_cross_entropy on CPU: from tensors to the pointers, sizes and strides that the compiled module takes.

Arguments are those of ops.py and have been checked, by the public function or by the op; where an op takes a 0-d tensor
for a number (scale, normalizer), a number will do as well.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import ops
from ..checks import in_range_message
from ..layout import as_rows
from . import DTYPE_CODES, cpu

_NO_SOURCE = (0, 0, 0, 1, 0, 0, 0, 0)
_NUM_FIELDS = len(ops.FIELDS)


class _Call:
    """The leading arguments of a compiled function, and the tensors that must outlive it."""

    __slots__ = ("alive", "compute", "ignore_index", "leading", "shape", "vocab_size")

    def __init__(
        self, base, aux, target, weight, base_scale, aux_scale, base_softcap, aux_softcap, ignore_index, vocab_size
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
                torch.get_num_threads(),
                self.compute == torch.float64,
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

    def run(self, function, *rest) -> None:
        try:
            function(*self.leading, *rest)
        except IndexError as error:
            row, value = map(int, str(error).split())
            message = in_range_message(self.shape, row, value, self.vocab_size, self.ignore_index)
            raise IndexError(message) from None


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
    return [i for i in range(_NUM_FIELDS) if wanted >> i & 1]


def _output_pointers(wanted: int, needs: int, fields: list[Tensor], grads: list[Tensor]) -> list[int]:
    """One pointer for each field and gradient of the compiled module's list, 0 where it is not wanted."""
    pointers = [0] * (_NUM_FIELDS + 4)
    first = 0
    for stacked in fields:
        address, step, num_rows = stacked.data_ptr(), stacked.stride(0) * stacked.element_size(), len(stacked)
        for row, place in enumerate(_places(wanted)[first : first + num_rows]):
            pointers[place] = address + row * step
        first += num_rows
    if needs:
        for i, grad in zip([i for i in range(4) if needs >> i & 1], grads, strict=True):
            pointers[_NUM_FIELDS + i] = grad.data_ptr()
    return pointers


def scan(
    base, aux, target, weight, base_scale, aux_scale, base_softcap, aux_softcap, ignore_index, vocab_size, wanted
) -> list[Tensor]:
    """The wanted fields of every row."""
    call = _Call(base, aux, target, weight, base_scale, aux_scale, base_softcap, aux_softcap, ignore_index, vocab_size)
    fields = ops.empty_fields(base, aux, wanted)
    call.run(cpu().scan, _output_pointers(wanted, 0, fields, []))
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
    call = _Call(base, aux, target, weight, base_scale, aux_scale, base_softcap, aux_softcap, ignore_index, vocab_size)
    value = base.new_empty((), dtype=call.compute)
    fields = ops.empty_fields(base, aux, wanted)
    grads = ops.empty_grads(base, aux, needs) if grads is None else grads
    divisor = 1.0 if normalizer is None else float(normalizer)
    call.run(
        cpu().loss,
        _output_pointers(wanted, needs, fields, grads),
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
    call = _Call(base, aux, target, weight, base_scale, aux_scale, base_softcap, aux_softcap, ignore_index, vocab_size)
    grads = ops.empty_grads(base, aux, needs) if grads is None else grads
    state = zip(
        ("max", "log_denom", "nll", "base_max", "base_log_denom"),
        (max, log_denom, nll, base_max, base_log_denom),
        strict=True,
    )
    call.run(
        cpu().backward,
        _output_pointers(0, needs, [], grads),
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
