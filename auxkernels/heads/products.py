"""The GEMMs of one head, chunk by chunk: logits of the rows, then gradients of hidden, weight and bias."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import memory, native
from ..sources import Leaves
from .rows import Rows


class Plan(NamedTuple):
    """Dtypes of a head's products.

    operands   hidden, weight and the logits' gradient, as they enter a product
    logits     what the product of hidden and weight is stored in
    is_wide    whether 16-bit operands can give a float32 product
    rounding   what hidden and weight are rounded to before they become operands; None: nothing narrower
    """

    operands: torch.dtype
    logits: torch.dtype
    is_wide: bool
    rounding: torch.dtype | None = None

    def operand(self, tensor: Tensor) -> Tensor:
        """Hidden states, or a weight as a whole, as they enter a product."""
        return (tensor if self.rounding is None else tensor.to(self.rounding)).to(self.operands)

    def is_exact(self) -> bool:
        """Whether products are stored as they were summed, so that another can be added to them."""
        return self.is_wide or self.operands in (torch.float32, torch.float64)


def operand_dtype(dtype: torch.dtype, autocast: torch.dtype | None) -> torch.dtype:
    """What autocast, if it is on, makes of a head's tensors."""
    return dtype if autocast is None or dtype == torch.float64 else autocast


def plan_of(dtype: torch.dtype, autocast: torch.dtype | None, device: torch.device) -> Plan:
    """The plan for a head of this dtype.

    A float32 product of 16-bit operands costs an NVIDIA GPU nothing, and torch has none for CPU. There float16 is
    computed in float32: its products are no faster, and a weight's gradient could overflow. So is bfloat16 where the
    processor has no instruction for it: its products then take five times as long as float32's.
    """
    operands, rounding = operand_dtype(dtype, autocast), None
    if device.type == "cpu" and operands == torch.bfloat16 and not has_bfloat16():
        operands, rounding = torch.float32, torch.bfloat16
    elif device.type == "cpu" and operands == torch.float16:
        operands = torch.float32
    is_half = operands in (torch.float16, torch.bfloat16)
    is_wide = is_half and device.type == "cuda" and torch.version.hip is None
    return Plan(operands, torch.float32 if is_wide else operands, is_wide, rounding)


@functools.cache
def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 numbers. Of others than x86 it is taken for granted."""
    if platform.machine().lower() not in ("x86_64", "amd64", "x86", "i686"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


CPU_COLUMNS = 16384  # of a 16-bit product: torch takes 1.4 to 1.8 times as long for 50257 columns at once


CONVERTED_AT_ONCE = 1 << 22  # numbers of a 16-bit matrix that a product needs in float32


def multiply(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False, bias: Tensor | None = None) -> None:
    """out (+)= a @ b + bias in out's dtype, which is the operands' or, where the plan is wide, float32.

    b may be of a narrower dtype than a: it is converted part by part, never as a whole.
    """
    if b.dtype != a.dtype:
        _multiply_converted(a, b, out, accumulate, bias)
        return
    num_columns = out.shape[1]
    step = CPU_COLUMNS if a.dtype == torch.bfloat16 and a.device.type == "cpu" else max(num_columns, 1)
    for first in range(0, num_columns, step):
        columns = slice(first, first + step)
        _multiply(a, b[:, columns], out[:, columns], accumulate, None if bias is None else bias[columns])


def _multiply_converted(a: Tensor, b: Tensor, out: Tensor, accumulate: bool, bias: Tensor | None) -> None:
    inner, num_columns = b.shape
    if inner > num_columns:
        for part in _parts(inner, num_columns):
            _multiply(a[:, part], _in_dtype(b[part], a.dtype), out, accumulate or part.start > 0, None)
        if bias is not None:
            out.add_(bias)
        return
    for part in _parts(num_columns, inner):
        _multiply(a, _in_dtype(b[:, part], a.dtype), out[:, part], accumulate, None if bias is None else bias[part])


def _in_dtype(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in another dtype, in memory that waits for the next part: PyTorch's may be brought in page by page."""
    is_transposed = matrix.stride(0) == 1
    rows = matrix.T if is_transposed else matrix
    copy = memory.empty(rows, rows.shape, dtype).copy_(rows)
    return copy.T if is_transposed else copy


def _parts(count: int, each: int) -> Iterator[slice]:
    """Slices of `count` things, of `each` numbers a thing."""
    step = max(CONVERTED_AT_ONCE // max(each, 1), 1)
    return (slice(first, first + step) for first in range(0, count, step))


def converted(weight: Tensor, plan: Plan) -> Tensor:
    """A head's weight as `multiply` takes it: in the plan's dtype, or in 16 bits where that is float32."""
    if plan.rounding is not None:
        weight = weight.to(plan.rounding)
    elif not (weight.dtype == torch.float16 and plan.operands == torch.float32):
        weight = weight.to(plan.operands)
    return weight if 1 in weight.stride() else weight.contiguous()  # else every product would copy it


def _multiply(a: Tensor, b: Tensor, out: Tensor, accumulate: bool, bias: Tensor | None) -> None:
    if accumulate and out.dtype == a.dtype:
        out.addmm_(a, b)
    elif accumulate:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    elif out.dtype != a.dtype:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    elif bias is not None:
        torch.addmm(bias, a, b, out=out)
        return
    else:
        torch.mm(a, b, out=out)
    if bias is not None:
        out.add_(bias)


class HeadProducts:
    """One head over the chunks of a call.

    hidden [*, D], weight [>= V, D], bias [>= V] or None; needs: `Leaves`, which of them get a gradient.
    grad_dtype(dtype) is what a gradient is returned in.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        plan: Plan,
        V: int,
        rows: Rows,
        num_chunks: int,
        needs: Leaves,
        grad_dtype: Callable[[torch.dtype], torch.dtype],
    ) -> None:
        self.hidden, self.plan, self.rows = hidden, plan, rows
        self.weight = converted(weight[:V], plan)
        self.bias = None if bias is None else plan.operand(bias[:V]).to(plan.logits)
        width = hidden.shape[-1]
        self.grad_hidden: Tensor | None = None
        self.grad_weight: WeightGradient | None = None
        self.grad_bias: Tensor | None = None
        if needs.values:
            self.grad_hidden = rows.new_output(hidden, (width,), grad_dtype(hidden.dtype))
        if needs.weight:
            self.grad_weight = WeightGradient(weight, V, plan, num_chunks, grad_dtype(weight.dtype))
        if needs.bias and bias is not None:
            dtype = torch.promote_types(plan.operands, torch.float32)
            self.grad_bias = bias.new_zeros(bias.shape, dtype=dtype)
            self.bias_dtype = grad_dtype(bias.dtype)

    def logits(self, start: int, stop: int, ignored: Tensor | None, out: Tensor, accumulate: bool = False) -> None:
        """Writes (adds) hidden @ weight.T + bias of a chunk to `out` [stop - start, V]."""
        self.chunk = self.plan.operand(self.rows.take(self.hidden, start, stop))
        if ignored is not None:
            # an ignored row may hold NaN, which a gradient of zero would not keep out of the weight's
            self.chunk = self.chunk.masked_fill(ignored.unsqueeze(-1), 0.0)
        multiply(self.chunk, self.weight.T, out, accumulate, self.bias)

    def add_gradient(self, start: int, stop: int, ignored: Tensor | None, grad: Tensor) -> None:
        """From the gradient [stop - start, V] of a chunk's logits; of the chunk that `logits` has been called with."""
        if self.grad_hidden is not None:
            self._put_hidden(self.grad_hidden, start, stop, ignored, grad)
        if self.grad_weight is not None:
            self.grad_weight.add(grad, self.chunk)
        if self.grad_bias is not None:
            for first in range(0, grad.shape[1], CPU_COLUMNS):  # torch would make a float32 copy of what it sums
                columns = slice(first, min(first + CPU_COLUMNS, grad.shape[1]))
                self.grad_bias[columns] += grad[:, columns].sum(0, dtype=self.grad_bias.dtype)

    def _put_hidden(self, out: Tensor, start: int, stop: int, ignored: Tensor | None, grad: Tensor) -> None:
        wanted = out.dtype
        dtype = wanted if self.plan.is_wide and wanted == torch.float32 else self.plan.operands
        if self.rows.keeps_all() and dtype == wanted:
            product = out[start:stop]
            multiply(grad, self.weight, product)
        else:
            product = memory.empty(grad, (stop - start, self.weight.shape[1]), dtype)
            multiply(grad, self.weight, product)
            self.rows.put(out, start, stop, product)
        if ignored is not None:  # whatever the weight holds
            out[start:stop].masked_fill_(ignored.unsqueeze(-1), 0.0)

    def gradients(self) -> list[Leaves]:
        """Of the one head: of hidden, weight and bias; None where none was asked for."""
        hidden = None if self.grad_hidden is None else self.grad_hidden.view(self.hidden.shape)
        weight = None if self.grad_weight is None else self.grad_weight.out
        bias = None if self.grad_bias is None else self.grad_bias.to(self.bias_dtype)
        return [Leaves(hidden, weight, bias)]


class WeightGradient:
    """Sum over the chunks of grad.T @ hidden [V, D], in float32 (float64) and in the chunks' order.

    Where a product cannot be written in that dtype, each is rounded to the operands' and the sum once more at its end.
    out: where the result goes, if not into a tensor of its own.
    """

    def __init__(
        self, weight: Tensor, V: int, plan: Plan, num_chunks: int, dtype: torch.dtype, out: Tensor | None = None
    ):
        self.out = memory.empty(weight, weight.shape, dtype) if out is None else out
        self.out[V if num_chunks else 0 :] = 0
        self.rows = self.sum = self.out[:V]
        self.num_chunks, self.num_added = num_chunks, 0
        sum_dtype = torch.promote_types(plan.operands, torch.float32)
        self.is_exact = plan.is_exact()
        rounds_directly = num_chunks <= 1 and dtype == plan.operands if self.is_exact else num_chunks <= 2
        if dtype != sum_dtype and not rounds_directly and (num_chunks > 1 or plan.is_wide):
            self.sum = memory.empty(weight, self.rows.shape, sum_dtype)
        if not self.is_exact:
            self.product = memory.empty(weight, (min(V, CPU_COLUMNS), weight.shape[1]), plan.operands)
        self.is_narrowed = self.is_exact and self.sum.dtype != plan.operands and not plan.is_wide

    def add(self, grad: Tensor, hidden: Tensor) -> None:
        self._add_exact(grad.T, hidden) if self.is_exact else self._add_rounded(grad.T, hidden)
        self.num_added += 1

    def _add_exact(self, grad: Tensor, hidden: Tensor) -> None:
        if self.is_narrowed:  # a single chunk's, whose sum needs no memory
            for slab in _parts(len(self.rows), hidden.shape[1]):
                self.rows[slab] = grad[slab] @ hidden
            return
        multiply(grad, hidden, self.sum, accumulate=self.num_added > 0)
        if self.num_added + 1 == self.num_chunks and self.sum is not self.rows:
            self.rows.copy_(self.sum)

    def _add_rounded(self, grad: Tensor, hidden: Tensor) -> None:
        """Slab by slab of V: the first chunk's products go to the result, which the last chunk's sum replaces."""
        is_last = self.num_added + 1 == self.num_chunks
        for first in range(0, len(self.rows), len(self.product)):
            slab = slice(first, min(first + len(self.product), len(self.rows)))
            rows = self.rows[slab]
            if self.num_added == 0 and rows.dtype == grad.dtype:
                multiply(grad[slab], hidden, rows)
                continue
            product = self.product[: len(rows)]
            multiply(grad[slab], hidden, product)
            if self.num_added == 0:
                rows.copy_(product)
            else:
                so_far = rows if self.num_added == 1 else self.sum[slab]
                add_rounded_once(rows if is_last else self.sum[slab], so_far, product)


def add_rounded_once(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a + b in float32; of any floating dtypes, out may be a."""
    if native.can_add(out, a, b):
        native.add(out, a, b)  # torch would convert through a temporary: six times as slow
    else:
        out.copy_(torch.add(a.float(), b))
