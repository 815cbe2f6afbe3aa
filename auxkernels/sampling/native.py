"""The row kernel of sampling on CPU, compiled: from tensors to the pointers, sizes and strides that it takes.

Lists go by number: the enums that comments here name are those of csrc/cpu/sampling_bindings.cpp and
csrc/common/arguments.h. Arguments have been checked.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from .. import native
from ..layout import as_rows
from ..native import DTYPE_CODES, with_orders
from ..sources import Matrix
from .request import DEFAULTS, FIELDS, INTEGERS, Parameters, SampleRows

TAKES_SUMS = True  # several sources of a side as they are


@functools.cache
def cpu() -> ModuleType:
    return with_orders(native.cpu(), sample_parameter_names=Parameters._fields, sample_field_names=FIELDS)


def sample(rows: SampleRows, fields: list[Tensor]) -> None:
    """Writes the token of each row and, where there is room for them, the fields of `SampleStats`."""
    alive: list[Tensor] = []

    def address(tensor: Tensor, dtype: torch.dtype) -> int:
        alive.append(tensor.detach().to(dtype).contiguous())
        return alive[-1].data_ptr()

    sources, numbers = [], []
    for matrix in (*rows.base, *rows.aux):
        arguments, values = _source(matrix, rows, alive)
        sources.append(arguments)
        numbers.append(values)
    addresses, fractions, integers = [], [], []
    for name, value in rows.parameters._asdict().items():
        is_integer = name in INTEGERS
        place, stride, number = 0, 0, DEFAULTS[name] if value is None else value
        if isinstance(value, Tensor):
            place, stride = address(value, torch.int64 if is_integer else torch.float64), int(value.dim() > 0)
            number = 0
        addresses.append((place, stride))
        fractions.append(0.0 if is_integer else float(number))
        integers.append(int(number) if is_integer else 0)
    cpu().sample(
        (  # SampleSlot
            rows.num_rows,
            rows.vocab_size,
            len(rows.base),
            rows.first_row,
            rows.parameters.position is not None,
            rows.order == "vllm",
            torch.get_num_threads(),
            rows.compute == torch.float64,
        ),
        sources,
        numbers,
        addresses,
        fractions,
        integers,
        [fields[i].data_ptr() if i < len(fields) else 0 for i in range(len(FIELDS))],
    )


def _source(matrix: Matrix, rows: SampleRows, alive: list[Tensor]) -> tuple[tuple[int, ...], tuple[float, float]]:
    values, num_inner, stride_outer, stride_inner = as_rows(matrix.values.detach())
    alive.append(values)
    scale, number, stride = 0, 1.0, 0
    if isinstance(matrix.scale, Tensor):
        alive.append(matrix.scale.detach().to(rows.compute).contiguous())
        scale, stride = alive[-1].data_ptr(), int(matrix.scale.dim() > 0)
    elif matrix.scale is not None:
        number = matrix.scale
    layout = (values.shape[-1], num_inner, stride_outer, stride_inner)
    # SourceSlot, SourceNumber
    return (
        (values.data_ptr(), DTYPE_CODES[values.dtype], *layout, scale, stride),
        (number, matrix.softcap or 0.0),
    )
