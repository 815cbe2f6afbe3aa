"""softmax(scores / temperature) @ table without any option, as the native implementation has it whole.

A small call is nothing but Python: here it takes a fifth of the general path (chunked.py with native.py), which every
other call takes. The two sum up in other orders, so their results differ by roundings.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import dispatch
from ..heads.operands import padded_matrix
from ..heads.products import Plan, WeightGradient, multiply, plan_of
from ..heads.rows import chunks_of, settings
from ..native import brought_in
from . import chunked
from . import native as kernels

# of a chunk's [rows, K] matrices, one forward and two backward: caches keep small ones, products like tall ones
FORWARD_BYTES, BACKWARD_BYTES = chunked.CPU_BYTES, 16 << 20
# multiplications up to which one compiled call beats calls of a library's product: always; forward, if the rows are
# enough for whole tiles and the table stays in the second-level cache
SMALL, SMALL_FORWARD = 1 << 17, 1 << 24
SMALL_FORWARD_ROWS, SMALL_FORWARD_TABLE = 32, 1 << 17
_SCORES = (torch.float32, torch.bfloat16, torch.float16)
_TABLES = (torch.float32, torch.bfloat16)  # those whose products torch has for CPU, and fast


def serves(scores: object, table: object, temperature: Any, seed: object, backend: str) -> TypeGuard[Tensor]:
    """Whether the arguments are such a call's, and valid: what is not, the general path has an answer or error for."""
    tensors = (scores, table)
    if backend == "auto":
        backend = "native"
    if (
        not dispatch.is_direct(tensors, backend)
        or dispatch.native_missing() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    if not (isinstance(scores, Tensor) and isinstance(table, Tensor) and type(temperature) in (float, int)):
        return False
    if not 1e-30 < temperature < 1e30 or scores.dim() < 1 or table.dim() != 2:
        return False
    if seed is not None and not (type(seed) is int and -(2**63) <= seed < 2**63):
        return False
    num_labels, width = table.shape
    if scores.shape[-1] != num_labels or num_labels == 0 or width == 0 or scores.numel() == 0:
        return False
    if scores.dtype not in _SCORES or table.dtype not in _TABLES or not (scores.is_cpu and table.is_cpu):
        return False
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") not in _TABLES:
        return False
    return _is_plain(scores) and _is_plain(table) and settings.num_bytes is None


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.is_contiguous()


class PlainLookup(NamedTuple):
    """What of a call that `serves` accepts is no tensor."""

    temperature: float


def _is_small(scores: Tensor, table: Tensor, is_forward: bool) -> bool:
    """Whether one compiled call is the faster path."""
    if not scores.dtype == table.dtype == torch.float32:
        return False
    num_products = scores.numel() * table.shape[1]
    if num_products <= SMALL or not is_forward:
        return num_products <= SMALL
    has_tiles = scores.numel() >= SMALL_FORWARD_ROWS * table.shape[0]
    return has_tiles and num_products <= SMALL_FORWARD and table.numel() <= SMALL_FORWARD_TABLE


def _chunks(
    scores: Tensor, table: Tensor, plan: Plan, num_matrices: int, num_bytes: int
) -> tuple[list[tuple[int, int]], int]:
    """The chunks and the rows of the largest."""
    num_labels = table.shape[0]
    num_rows = scores.numel() // num_labels
    row_bytes = num_matrices * num_labels * plan.operands.itemsize
    chunks = chunks_of(num_rows, row_bytes, num_bytes, chunked.CPU_MIN_ROWS)
    return chunks, max(stop - start for start, stop in chunks)


def _matrix(table: Tensor, plan: Plan, num_rows: int) -> Tensor:
    """[num_rows, K], as the left operand of a product takes it."""
    num_labels = table.shape[0]
    if plan.operands == torch.float32:
        return table.new_empty((num_rows, num_labels), dtype=torch.float32)
    return padded_matrix(table, num_rows, num_labels, plan.operands)[:, :num_labels]


def _put_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, where out may be of a narrower dtype than a."""
    if out.dtype == a.dtype:
        multiply(a, b, out)
    else:
        product = torch.empty(out.shape, dtype=a.dtype)
        multiply(a, b, product)
        out.copy_(product)


def forward(scores: Tensor, table: Tensor, temperature: float, state: Tensor | None) -> Tensor:
    """state [2, N]: max and log_denom of each row, written if wanted."""
    width = table.shape[1]
    mixture = table.new_empty((*scores.shape[:-1], width))  # not a view, which could not be changed in place
    if _is_small(scores, table, is_forward=True):
        kernels.small_lookup(scores, table, temperature, state, mixture)
        return mixture
    plan = plan_of(table.dtype, None, table.device)
    chunks, most = _chunks(scores, table, plan, 1, FORWARD_BYTES)
    probabilities, flat = _matrix(table, plan, most), brought_in(mixture).detach().view(-1, width)
    for start, stop in chunks:
        part = probabilities[: stop - start]
        kernels.plain_softmax(scores, start, temperature, state, part)
        _put_product(part, table.detach(), flat[start:stop])
    return mixture


def _plain(tensor: Tensor) -> Tensor:
    """As kernels read tensors: saved-tensor hooks and autograd may hand out other strides and lazy negations."""
    return tensor if tensor.is_contiguous() and not tensor.is_neg() else tensor.resolve_neg().contiguous()


def backward(
    scores: Tensor,
    table: Tensor,
    state: Tensor,
    temperature: float,
    grad: Tensor,
    needs_scores: bool,
    needs_table: bool,
) -> list[Tensor | None]:
    """The gradients that are wanted of scores and table, from what `forward` wrote into `state`."""
    scores, table, state = _plain(scores), _plain(table), _plain(state)
    num_labels, width = table.shape
    grad_scores = brought_in(torch.empty_like(scores)) if needs_scores else None
    if _is_small(scores, table, is_forward=False):
        grad_table = torch.empty_like(table) if needs_table else None
        kernels.small_lookup_backward(scores, table, temperature, state, grad.contiguous(), grad_scores, grad_table)
        return [grad_scores, grad_table]
    plan = plan_of(table.dtype, None, table.device)
    chunks, most = _chunks(scores, table, plan, 2, BACKWARD_BYTES)
    grad = grad.reshape(-1, width)
    probabilities = table.new_empty((most, num_labels), dtype=plan.operands) if needs_table else None
    of_probabilities = table.new_empty((most, num_labels), dtype=plan.operands) if needs_scores else None
    of_table = None
    if needs_table and (len(chunks) > 1 or table.dtype != plan.operands):
        of_table = WeightGradient(table, num_labels, plan, len(chunks), table.dtype)
    for start, stop in chunks:
        rows = grad[start:stop].to(plan.operands)
        p = None if probabilities is None else probabilities[: stop - start]
        g = None if of_probabilities is None else of_probabilities[: stop - start]
        if g is not None:
            multiply(rows, table.T, g)
        kernels.plain_softmax_backward(scores, start, temperature, state, g, grad_scores, p, stop - start)
        if of_table is not None and p is not None:
            of_table.add(p, rows)
    if of_table is not None:
        return [grad_scores, of_table.out]
    return [grad_scores, None if probabilities is None else torch.mm(probabilities.T, grad)]
