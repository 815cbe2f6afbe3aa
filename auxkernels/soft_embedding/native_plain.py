"""softmax(scores / temperature) @ table without any option, as the native implementation has it whole.

A small call is nothing but Python: here it takes a fifth of the general path (chunked.py with native.py), which every
other call takes. The two sum up in other orders, so their results differ by roundings.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import dispatch, memory
from ..dispatch import is_plain_on_cpu
from ..heads.operands import padded_matrix
from ..heads.products import CPU_COLUMNS, Plan, WeightGradient, has_bfloat16, multiply, plan_of
from ..heads.rows import chunks_of, settings
from . import chunked
from . import native as kernels

# of a chunk's [rows, K] matrices, one forward and two backward: caches keep small ones, products like tall ones
FORWARD_BYTES, BACKWARD_BYTES = chunked.CPU_BYTES, 16 << 20
# multiplications and labels up to which one compiled call beats calls of a library's products, but for bfloat16 where
# the processor multiplies it; forward, if the rows are enough for whole tiles and the second-level cache has the table
SMALL, SMALL_FORWARD, SMALL_LABELS, SMALL_BFLOAT16 = 1 << 24, 1 << 28, 1 << 11, 1 << 21
SMALL_FORWARD_ROWS, SMALL_FORWARD_TABLE, SMALL_FORWARD_WIDTH = 32, 1 << 18, 512
# with other vectors than those of AVX-512 a library's products are ahead of ours sooner
SMALL_OTHERWISE, SMALL_FORWARD_OTHERWISE = 1 << 22, 1 << 24
BLOCK = 32  # labels that a bfloat16 product reads at once (`padded_matrix`)
_SCORES = (torch.float32, torch.bfloat16, torch.float16)
_TABLES = (torch.float32, torch.bfloat16)  # those whose products torch has for CPU, and fast


def serves(scores: object, table: object, temperature: Any, seed: object, backend: str) -> TypeGuard[Tensor]:
    """Whether the arguments are such a call's, and valid: what is not, the general path has an answer or error for."""
    if not dispatch.is_eager_without_compiler() or (backend != "auto" and backend != "native"):
        return False
    if dispatch.native_missing() is not None:
        return False
    if forward_ad._current_level >= 0 or not (is_plain_on_cpu(scores) and is_plain_on_cpu(table)):
        return False
    if type(temperature) not in (float, int) or not 1e-30 < temperature < 1e30:
        return False
    if seed is not None and not (type(seed) is int and -(2**63) <= seed < 2**63):
        return False
    of_table = table.shape
    if len(of_table) != 2 or scores.dim() < 1 or scores.shape[-1] != of_table[0]:
        return False
    if scores.dtype not in _SCORES or table.dtype not in _TABLES or not (scores.numel() and of_table[1]):
        return False
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") not in _TABLES:
        return False
    return settings.num_bytes is None


def is_small(scores: Tensor, table: Tensor) -> bool:
    """Whether one compiled call is the faster path, forward and backward."""
    return _is_small(scores.numel() * table.shape[1], table)


def _is_small(num_products: int, table: Tensor) -> bool:
    if num_products <= SMALL_BFLOAT16:
        return True
    limit = SMALL if kernels.has_avx512() else min(SMALL, SMALL_OTHERWISE)
    if num_products > limit or table.shape[0] > SMALL_LABELS:
        return False
    return not (table.dtype == torch.bfloat16 and has_bfloat16())


def _is_small_forward(scores: Tensor, table: Tensor) -> bool:
    """Whether it is so forward, of a call that is not small."""
    if not scores.dtype == table.dtype == torch.float32:
        return False
    if table.numel() > SMALL_FORWARD_TABLE or table.shape[1] > SMALL_FORWARD_WIDTH:
        return False
    num_numbers, limit = scores.numel(), SMALL_FORWARD if kernels.has_avx512() else SMALL_FORWARD_OTHERWISE
    return num_numbers >= SMALL_FORWARD_ROWS * table.shape[0] and num_numbers * table.shape[1] <= limit


def _is_whole(scores: Tensor, table: Tensor, num_bytes: int, most_bytes: int) -> bool:
    """Whether the matrices of a call, num_bytes in all, are one chunk, and enter products as they are: what is asked of
    other calls is Python that takes as long as a product of 64 x 256 x 256."""
    dtype = table.dtype
    if num_bytes > most_bytes or scores.dtype != dtype:
        return False
    if dtype == torch.float32:
        return True
    num_labels = table.shape[0]
    is_one_product = num_labels <= CPU_COLUMNS and num_labels % BLOCK == 0
    return dtype == torch.bfloat16 and has_bfloat16() and is_one_product


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
        return memory.empty(table, (num_rows, num_labels), torch.float32)
    return padded_matrix(table, num_rows, num_labels, plan.operands)[:, :num_labels]


def _put_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, where out may be of a narrower dtype than a."""
    if out.dtype == a.dtype:
        multiply(a, b, out)
    else:
        product = memory.empty(a, out.shape)
        multiply(a, b, product)
        out.copy_(product)


def _new_mixture(scores: Tensor, table: Tensor, width: int) -> Tensor:
    """Not a view, which could not be changed in place. A tuple of sizes costs a microsecond."""
    shape = scores.shape
    return table.new_empty(shape[0], width) if len(shape) == 2 else table.new_empty((*shape[:-1], width))


def _in_large_memory(tensor: Tensor) -> Tensor:
    return tensor if tensor.nbytes < memory.LARGE else memory.empty(tensor, tensor.shape)


def small_forward(scores: Tensor, table: Tensor, temperature: float) -> Tensor | None:
    """The mixture of a call that `is_small`, from contiguous tensors; None of another."""
    width = table.shape[1]
    num_products = scores.numel() * width
    if not _is_small(num_products, table):
        return None
    mixture = _new_mixture(scores, table, width)
    if num_products >= memory.LARGE // 4:  # a mixture has no more numbers than there are products
        mixture = _in_large_memory(mixture)
    kernels.small_lookup(scores, table, temperature, None, mixture)
    return mixture


def forward(scores: Tensor, table: Tensor, temperature: float, state: Tensor | None) -> Tensor:
    """state [2, N]: max and log_denom of each row, written if wanted. Of a call that is not small."""
    width = table.shape[1]
    mixture = _in_large_memory(_new_mixture(scores, table, width))
    if _is_small_forward(scores, table):
        kernels.small_lookup(scores, table, temperature, state, mixture)
        return mixture
    if _is_whole(scores, table, scores.nbytes, FORWARD_BYTES):
        probabilities = torch.empty_like(scores).view(-1, table.shape[0])
        kernels.plain_softmax(scores, 0, temperature, state, probabilities)
        flat = mixture if mixture.dim() == 2 else mixture.detach().view(-1, width)
        torch.mm(probabilities, table, out=flat)  # nothing here is recorded: autograd's function does that
        return mixture
    plan = plan_of(table.dtype, None, table.device)
    chunks, most = _chunks(scores, table, plan, 1, FORWARD_BYTES)
    probabilities, flat = _matrix(table, plan, most), mixture.detach().view(-1, width)
    for start, stop in chunks:
        part = probabilities[: stop - start]
        kernels.plain_softmax(scores, start, temperature, state, part)
        _put_product(part, table.detach(), flat[start:stop])
    return mixture


def plain(tensor: Tensor) -> Tensor:
    """As kernels read tensors: saved-tensor hooks and autograd may hand out other strides and lazy negations."""
    return tensor if tensor.is_contiguous() and not tensor.is_neg() else tensor.resolve_neg().contiguous()


def small_backward(
    scores: Tensor, table: Tensor, temperature: float, grad: Tensor, needs_scores: bool, needs_table: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients that are wanted of a call that `is_small`, from contiguous tensors and without row state."""
    grad_scores = _in_large_memory(torch.empty_like(scores)) if needs_scores else None
    grad_table = _in_large_memory(torch.empty_like(table)) if needs_table else None
    kernels.small_lookup_backward(scores, table, temperature, grad, grad_scores, grad_table)
    return grad_scores, grad_table


def backward(
    scores: Tensor,
    table: Tensor,
    state: Tensor,
    temperature: float,
    grad: Tensor,
    needs_scores: bool,
    needs_table: bool,
) -> list[Tensor | None]:
    """The gradients that are wanted of scores and table, `plain`, from what `forward` wrote into `state`."""
    num_labels, width = table.shape
    grad_scores = _in_large_memory(torch.empty_like(scores)) if needs_scores else None
    if _is_whole(scores, table, 2 * scores.nbytes, BACKWARD_BYTES):
        probabilities = _in_large_memory(torch.empty_like(scores)).view(-1, num_labels) if needs_table else None
        grad = grad if grad.dim() == 2 else grad.reshape(-1, width)
        return _whole_backward(scores, table, state, temperature, grad, grad_scores, None, probabilities)
    plan = plan_of(table.dtype, None, table.device)
    chunks, most = _chunks(scores, table, plan, 2, BACKWARD_BYTES)
    grad = grad.reshape(-1, width)
    probabilities = memory.empty(table, (most, num_labels), plan.operands) if needs_table else None
    of_probabilities = None
    if grad_scores is not None and grad_scores.dtype != plan.operands:
        of_probabilities = memory.empty(table, (most, num_labels), plan.operands)
    if len(chunks) == 1 and table.dtype == plan.operands:
        return _whole_backward(scores, table, state, temperature, grad, grad_scores, of_probabilities, probabilities)
    of_table = WeightGradient(table, num_labels, plan, len(chunks), table.dtype) if needs_table else None
    for start, stop in chunks:
        rows = grad[start:stop].to(plan.operands)
        p = None if probabilities is None else probabilities[: stop - start]
        g = None
        if grad_scores is not None:
            g = _of_probabilities(grad_scores, of_probabilities, start, stop)
            multiply(rows, table.T, g)
        kernels.plain_softmax_backward(scores, start, temperature, state, g, grad_scores, p, stop - start)
        if of_table is not None and p is not None:
            of_table.add(p, rows)
    return [grad_scores, None if of_table is None else of_table.out]


def _of_probabilities(grad_scores: Tensor, room: Tensor | None, start: int, stop: int) -> Tensor:
    """Where the gradient of a chunk's probabilities goes: where it becomes that of the scores, if it fits there."""
    return grad_scores.view(-1, grad_scores.shape[-1])[start:stop] if room is None else room[: stop - start]


def _whole_backward(
    scores: Tensor,
    table: Tensor,
    state: Tensor,
    temperature: float,
    grad: Tensor,
    grad_scores: Tensor | None,
    of_probabilities: Tensor | None,
    probabilities: Tensor | None,
) -> list[Tensor | None]:
    """`backward` in one chunk, whose products are of the table's dtype; with less Python."""
    num_rows, num_labels, g = grad.shape[0], table.shape[0], None
    if grad_scores is not None:
        g = of_probabilities
        if g is None:
            g = grad_scores if grad_scores.dim() == 2 else grad_scores.view(num_rows, num_labels)
        is_one_product = table.dtype == torch.float32 or num_labels <= CPU_COLUMNS
        torch.mm(grad, table.T, out=g) if is_one_product else multiply(grad, table.T, g)
    kernels.plain_softmax_backward(scores, 0, temperature, state, g, grad_scores, probabilities, num_rows)
    return [grad_scores, None if probabilities is None else torch.mm(probabilities.T, grad)]
