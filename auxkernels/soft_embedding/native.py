"""Row kernels of soft_embedding on CPU: from tensors to the pointers, sizes and strides that the compiled module takes.

Lists go by number: the enums that comments here name are those of csrc/cpu/soft_bindings.cpp. Arguments have been
checked by the operator (chunked.py), which works on chunks of rows.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..native import DTYPE_CODES, with_orders
from .request import ROW_FIELDS, SoftRows, Upstream

_NO_MATRIX = (0, 0, 0)
SHORT = 64  # kShort in csrc/cpu/simd/softmax.inl
_NO_UPSTREAM = (0,) * len(Upstream._fields)


@functools.cache
def cpu() -> ModuleType:
    return with_orders(native.cpu(), soft_field_names=ROW_FIELDS, soft_upstream_names=Upstream._fields)


@functools.cache
def has_avx512() -> bool:
    return cpu().instruction_set().startswith("avx512")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _matrix(tensor: Tensor | None) -> tuple[int, int, int]:
    """A [C, X] tensor whose rows are contiguous."""
    if tensor is None:
        return _NO_MATRIX
    return tensor.data_ptr(), DTYPE_CODES[tensor.dtype], tensor.stride(0)  # MatrixSlot


class _Problem:
    """The leading arguments of a compiled function, and the tensors that must outlive it."""

    def __init__(self, rows: SoftRows):
        scores, temperature, mask = rows.scores, rows.temperature, rows.mask
        self.alive: list[Tensor] = []
        temperature_value, temperature_pointer, temperature_stride = 1.0, 0, 0
        if isinstance(temperature, Tensor):
            temperature_stride = int(temperature.dim() > 0)
            temperature_pointer = _address(self.contiguous(temperature.to(rows.compute)))
        else:
            temperature_value = float(temperature)
        mask_stride = 0
        if mask is not None:
            mask = self.contiguous(mask.view(torch.uint8) if mask.dtype == torch.bool else mask)
            mask_stride = mask.stride(0) if mask.dim() == 2 else 0
        self.leading = (
            (  # SoftProblemSlot
                scores.data_ptr(),
                DTYPE_CODES[scores.dtype],
                max(scores.shape[0], 1),
                0,
                scores.stride(0),
                *scores.shape,
                rows.first_row,
                temperature_pointer,
                temperature_stride,
                0 if rows.seed is None else int(rows.seed),
                _address(mask),
                mask_stride,
                torch.get_num_threads(),
                rows.compute == torch.float64,
            ),
            # SoftProblemNumber
            (temperature_value, 0.0 if rows.gumbel is None else float(rows.gumbel)),
        )

    def contiguous(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        self.alive.append(tensor)
        return tensor


def _fields(state: Mapping[str, Tensor | None]) -> tuple[int, ...]:
    return tuple(_address(state.get(name)) for name in ROW_FIELDS)


def _upstream(problem: _Problem, upstream: Upstream | None) -> tuple[int, ...]:
    if upstream is None:
        return _NO_UPSTREAM
    return tuple(_address(None if t is None else problem.contiguous(t)) for t in upstream)


def _selection(labels: Tensor, weights: Tensor | None) -> tuple[int, int, int]:
    return labels.shape[-1], labels.data_ptr(), _address(weights)  # SelectionSlot


def softmax(rows: SoftRows, fields: dict[str, Tensor], probabilities: Tensor | None) -> None:
    """Writes the wanted fields [C] and, where given, the probabilities [C, K]."""
    problem = _Problem(rows)
    if rows.scores.shape[-1] <= SHORT and "argmax" not in fields:
        # as a call with statistics is made: the other form of short rows sums up in another order
        fields = {**fields, "argmax": torch.empty(len(rows.scores), dtype=torch.int64, device=rows.scores.device)}
    cpu().soft_rows(*problem.leading, _fields(fields), _matrix(probabilities))


def select(rows: SoftRows, fields: dict[str, Tensor], labels: Tensor, weights: Tensor) -> None:
    """Writes labels and weights [C, k] of the likeliest labels, and the wanted fields of the softmax over these."""
    problem = _Problem(rows)
    cpu().soft_select(*problem.leading, _fields(fields), _selection(labels, weights))


def softmax_backward(
    rows: SoftRows,
    fields: dict[str, Tensor],
    grad_probabilities: Tensor | None,
    upstream: Upstream | None,
    grad_scores: Tensor | None,
    grad_temperature: Tensor | None,
    probabilities: Tensor | None,
) -> None:
    """From max, log_denom (and argmax) of the rows: gradients of scores [C, K] and temperature [C], probabilities."""
    problem = _Problem(rows)
    cpu().soft_backward(
        *problem.leading,
        _fields(fields),
        _matrix(grad_probabilities),
        _upstream(problem, upstream),
        _matrix(grad_scores),
        _address(grad_temperature),
        _matrix(probabilities),
    )


def select_backward(
    rows: SoftRows,
    fields: dict[str, Tensor],
    labels: Tensor,
    weights: Tensor,
    grad_weights: Tensor | None,
    upstream: Upstream | None,
    grad_scores: Tensor | None,
    grad_temperature: Tensor | None,
) -> None:
    """The same for selected labels [C, k]; writes their weights too."""
    problem = _Problem(rows)
    cpu().soft_select_backward(
        *problem.leading,
        _fields(fields),
        _selection(labels, weights),
        _address(grad_weights),
        _upstream(problem, upstream),
        _matrix(grad_scores),
        _address(grad_temperature),
    )


# -- the same for rows of nothing but contiguous scores, from row `start` on, with less around it ----------------------


def _plain_leading(
    scores: Tensor, start: int, num_rows: int, temperature: float, state: Tensor | None
) -> tuple[Any, ...]:
    """state [2, all rows] float32: max and log_denom."""
    num_labels = scores.shape[-1]
    max = log_denom = 0
    if state is not None:
        max = state.data_ptr()
        log_denom = max + 4 * state.shape[1]
    rows = scores.data_ptr(), DTYPE_CODES[scores.dtype], num_rows, num_labels, start
    return *rows, temperature, torch.get_num_threads(), max, log_denom


def plain_softmax(scores: Tensor, start: int, temperature: float, state: Tensor | None, probabilities: Tensor) -> None:
    """softmax, whose rows are those of `probabilities`."""
    leading = _plain_leading(scores, start, probabilities.shape[0], temperature, state)
    cpu().plain_softmax(*leading, probabilities.data_ptr(), DTYPE_CODES[probabilities.dtype], probabilities.stride(0))


def plain_softmax_backward(
    scores: Tensor,
    start: int,
    temperature: float,
    state: Tensor,
    grad_probabilities: Tensor | None,
    grad_scores: Tensor | None,
    probabilities: Tensor | None,
    num_rows: int,
) -> None:
    """softmax_backward, all contiguous; grad_scores is that of all rows."""
    given = 0, 0  # the gradient of the probabilities, and its dtype
    if grad_probabilities is not None:
        given = grad_probabilities.data_ptr(), DTYPE_CODES[grad_probabilities.dtype]
    made = 0, 0
    if probabilities is not None:
        made = probabilities.data_ptr(), DTYPE_CODES[probabilities.dtype]
    of_scores = 0 if grad_scores is None else grad_scores.data_ptr()
    leading = _plain_leading(scores, start, num_rows, temperature, state)
    cpu().plain_softmax_backward(*leading, *given, of_scores, *made)


def _small_leading(scores: Tensor, table: Tensor, temperature: float) -> tuple[Any, ...]:
    num_labels, width = table.shape
    matrices = scores.data_ptr(), table.data_ptr(), DTYPE_CODES[scores.dtype], DTYPE_CODES[table.dtype]
    return *matrices, scores.numel() // num_labels, num_labels, width, temperature, torch.get_num_threads()


def small_lookup(scores: Tensor, table: Tensor, temperature: float, state: Tensor | None, mixture: Tensor) -> None:
    """mixture = softmax(scores / temperature) @ table, all contiguous and none float64; state as above, or none."""
    of_rows = 0 if state is None else state.data_ptr()
    cpu().small_lookup(*_small_leading(scores, table, temperature), of_rows, mixture.data_ptr())


def small_lookup_backward(
    scores: Tensor,
    table: Tensor,
    temperature: float,
    grad: Tensor,
    grad_scores: Tensor | None,
    grad_table: Tensor | None,
) -> None:
    """Its gradients, those that are given a place; the softmax is made again."""
    gradients = grad.data_ptr(), _address(grad_scores), _address(grad_table)
    cpu().small_lookup_backward(*_small_leading(scores, table, temperature), *gradients)


# -- rows of tables ----------------------------------------------------------------------------------------------------


def _tables(tables: Tensor, rows: Tensor) -> tuple[int, ...]:
    num_tables, num_labels, width = tables.shape
    return (  # TablesSlot
        *(tables.data_ptr(), DTYPE_CODES[tables.dtype], tables.stride(1), tables.stride(0)),
        *(num_tables, num_labels, width, rows.stride(0)),
    )


def gather(tables: Tensor, labels: Tensor, weights: Tensor | None, out: Tensor, in_double: bool) -> None:
    """out [L, C, D] = sum over j of weights [C, k] (1) times the rows of tables [L, K, D] that labels [C, k] name."""
    selection = _selection(labels, weights)
    cpu().gather_labels(
        _tables(tables, out), selection, len(labels), _matrix(out[0]), torch.get_num_threads(), in_double
    )


def products(tables: Tensor, labels: Tensor, rows: Tensor, out: Tensor, in_double: bool) -> None:
    """out [C, k] = sum over tables of <rows [L, C, D], the table's row that labels [C, k] name>."""
    arguments = (_tables(tables, rows), _selection(labels, None), len(labels), _matrix(rows[0]), out.data_ptr())
    cpu().gather_products(*arguments, torch.get_num_threads(), in_double)


def scatter(tables: Tensor, labels: Tensor, weights: Tensor | None, rows: Tensor, in_double: bool) -> None:
    """tables [L, K, D] += weights times rows [L, C, D] where labels [C, k] say, in the order of the rows."""
    selection = _selection(labels, weights)
    cpu().scatter_labels(
        _tables(tables, rows), selection, len(labels), _matrix(rows[0]), torch.get_num_threads(), in_double
    )
