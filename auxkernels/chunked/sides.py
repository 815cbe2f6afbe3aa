"""Base or auxiliary, chunk by chunk: one matrix of logits as the row kernels take it, and its gradient passed on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import native
from ..sources import row_scale
from .products import HeadProducts, Plan, plan_of
from .rows import Rows
from .sums import bend, scale_gradient, sum_of, value_gradient

ALIGNMENT = 64  # elements between the rows of a buffer: GEMMs and row kernels load whole vectors


class Part(NamedTuple):
    """One source. `weight` None: `values` are its logits [*, V]; otherwise hidden states [*, D]."""

    values: Tensor
    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    softcap: float | None


class Operand(NamedTuple):
    """One side of a chunk as the row kernels take it."""

    values: Tensor
    scale: Tensor | None
    softcap: float | None


class Setting(NamedTuple):
    """What all sources of a call share."""

    rows: Rows
    chunks: list[tuple[int, int]]
    ignored: Tensor | None  # bool [all rows], where ignored rows are worked on
    vocab_size: int
    compute: torch.dtype
    autocast: torch.dtype | None
    in_place: bool  # the row kernels may write a gradient over the logits it belongs to
    keeps_wide: bool  # float16 heads get float32 gradients, undivided

    def grad_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self.keeps_wide and dtype == torch.float16 else dtype

    def ignored_in(self, start: int, stop: int) -> Tensor | None:
        return None if self.ignored is None else self.ignored[start:stop]

    def chunk_size(self) -> int:
        return max(stop - start for start, stop in self.chunks)


def padded(vocab_size: int) -> int:
    return -(-vocab_size // ALIGNMENT) * ALIGNMENT


def are_one_product(parts: list[Part], autocast: torch.dtype | None) -> bool:
    """Whether the parts are heads whose products can be added up where they are stored: [h, g] @ [W, U].T."""
    plans = set()
    for part in parts:
        if part.weight is None or part.scale is not None or part.softcap is not None:
            return False
        plans.add(plan_of(part.values.dtype, autocast, part.values.device))
    return len(plans) == 1 and plans.pop().is_exact()


def bytes_per_row(sides, wants, vocab_size: int, compute, autocast, in_place: bool) -> int:
    """What the buffers of a chunk take for each of its rows. sides: parts; wants: whether each gets a gradient."""
    total = 0
    for parts, wanted in zip(sides, wants, strict=True):
        is_one = are_one_product(parts, autocast)
        heads = [(part, wants) for part, wants in zip(parts, wanted, strict=True) if part.weight is not None]
        for part, wants_gradient in [(parts[0], any(wanted))] if is_one else heads:
            plan = plan_of(part.values.dtype, autocast, part.values.device)
            total += plan.logits.itemsize + (0 if in_place or not wants_gradient else plan.operands.itemsize)
        if len(parts) > 1 and not is_one:
            total += compute.itemsize * (1 if in_place or not any(wanted) else 2)
    return max(total, 1) * padded(vocab_size)


class Buffers:
    """The [rows, V] matrices of a chunk, each made once for a call and used for all of its chunks."""

    def __init__(self, setting: Setting, like: Tensor):
        self.size, self.like = (setting.chunk_size(), padded(setting.vocab_size)) if setting.chunks else None, like
        self.made: dict = {}

    def get(self, key, dtype: torch.dtype, num_rows: int) -> Tensor:
        if key not in self.made:
            self.made[key] = self.like.new_empty(self.size, dtype=dtype)
            native.bring_in(self.made[key])
        return self.made[key][:num_rows]


class PartChunks:
    """One source over the chunks of a call. needs: of values or hidden, weight, bias, scale."""

    def __init__(self, part: Part, setting: Setting, needs: list[bool], buffers: Buffers):
        self.part, self.setting, self.needs, self.buffers = part, setting, needs, buffers
        self.head = self.plan = self.grad_values = self.grad_scale = None
        rows, values = setting.rows, part.values
        if part.weight is not None:
            self.plan: Plan = plan_of(values.dtype, setting.autocast, values.device)
            self.head = HeadProducts(
                values,
                part.weight,
                part.bias,
                self.plan,
                setting.vocab_size,
                rows,
                len(setting.chunks),
                needs[:3],
                setting.grad_dtype,
            )
        elif needs[0]:
            self.grad_values = rows.new_output(values, values.shape[-1:], values.dtype)
        if needs[3]:
            self.grad_scale = rows.new_output(values, (), setting.compute)

    def needs_values(self) -> bool:
        return any(self.needs[:3])

    def values(self, start: int, stop: int) -> Tensor:
        """The chunk's logits before softcap and scale, [C, >= V]."""
        if self.head is None:
            return self.setting.rows.take(self.part.values, start, stop)
        z = self.buffers.get(("logits", id(self)), self.plan.logits, stop - start)
        self.head.logits(start, stop, self.setting.ignored_in(start, stop), z[:, : self.setting.vocab_size])
        return z

    def scale(self, start: int, stop: int) -> Tensor | None:
        scale = self.part.scale
        return scale if scale is None or scale.dim() == 0 else self.setting.rows.take(scale, start, stop)

    def gradient_buffer(self, values: Tensor, start: int, stop: int) -> Tensor:
        """Where the row kernels write the gradient of `values`, the chunk's logits."""
        rows = self.setting.rows
        if self.head is None and rows.is_view():
            return self.grad_values[start:stop]
        if self.setting.in_place:
            return values  # a head's buffer, or a copy of the rows
        if self.head is None:
            return torch.empty_like(values)
        return self.buffers.get(("gradient", id(self)), self.plan.operands, stop - start)

    def take_gradient(self, start: int, stop: int, grad: Tensor | None, grad_scale: Tensor | None) -> None:
        """From the gradient of `values` [C, >= V] and of the scale [C]."""
        rows, V = self.setting.rows, self.setting.vocab_size
        if grad is not None and self.head is not None:
            self.head.add_gradient(start, stop, self.setting.ignored_in(start, stop), grad[:, :V])
        elif grad is not None and not (rows.is_view() and grad.data_ptr() == self.grad_values[start:].data_ptr()):
            rows.put(self.grad_values, start, stop, grad)
        if grad_scale is not None:
            rows.put(self.grad_scale, start, stop, grad_scale)

    def gradients(self) -> list[Tensor | None]:
        """Of values or hidden, weight, bias and scale (one number per row)."""
        shape = self.setting.rows.shape
        values, weight, bias = [self.grad_values, None, None] if self.head is None else self.head.gradients()
        if self.grad_values is not None:
            values = values.view(self.part.values.shape)
        return [values, weight, bias, None if self.grad_scale is None else self.grad_scale.view(shape)]


class SideChunks:
    """The sum of some sources over the chunks of a call."""

    def __init__(self, parts: list[Part], setting: Setting, needs: list[list[bool]], buffers: Buffers):
        self.parts = [PartChunks(part, setting, n, buffers) for part, n in zip(parts, needs, strict=True)]
        self.setting, self.buffers = setting, buffers
        self.is_sum = len(parts) > 1

    def needs(self) -> tuple[bool, bool]:
        """Whether the row kernels have to give the gradient of the values, and of the scale."""
        if self.is_sum:
            return any(any(part.needs) for part in self.parts), False
        return (self.parts[0].needs_values(), self.parts[0].needs[3]) if self.parts else (False, False)

    def operand(self, start: int, stop: int) -> Operand:
        if not self.is_sum:
            part = self.parts[0]
            self.values = part.values(start, stop)
            return Operand(self.values, part.scale(start, stop), part.part.softcap)
        total = self.buffers.get(("sum", id(self)), self.setting.compute, stop - start)
        self.terms = [(part.values(start, stop), part.scale(start, stop), part.part.softcap) for part in self.parts]
        sum_of(self.terms, total[:, : self.setting.vocab_size])
        self.values = total
        return Operand(total, None, None)

    def gradient_buffer(self, start: int, stop: int) -> Tensor:
        if not self.is_sum:
            return self.parts[0].gradient_buffer(self.values, start, stop)
        if self.setting.in_place:
            return self.values
        return self.buffers.get(("gradient of sum", id(self)), self.setting.compute, stop - start)

    def take_gradient(self, start: int, stop: int, grad: Tensor | None, grad_scale: Tensor | None) -> None:
        """What the row kernels have given for the chunk's operand."""
        if not self.is_sum:
            self.parts[0].take_gradient(start, stop, grad, grad_scale)
            return
        if grad is None:
            return
        V, ignored = self.setting.vocab_size, self.setting.ignored_in(start, stop)
        grad = grad[:, :V]
        for part, (values, scale, softcap) in zip(self.parts, self.terms, strict=True):
            z = values[:, :V].to(grad.dtype)
            bent = None if softcap is None else bend(z, softcap)
            own = own_scale = None
            if part.needs_values():
                dtype = part.plan.operands if part.head is not None else values.dtype
                width = V if part.head is not None else values.shape[1]
                factor = None if scale is None else row_scale(scale, grad.dtype)
                own = value_gradient(grad, factor, bent, softcap, ignored, width, dtype)
            if part.needs[3]:
                own_scale = scale_gradient(grad, z if bent is None else bent, ignored)
            part.take_gradient(start, stop, own, own_scale)

    def gradients(self) -> list[Tensor | None]:
        return [grad for part in self.parts for grad in part.gradients()]


class ProductChunks:
    """The sum of heads whose products are added up in one buffer (`are_one_product`), over the chunks of a call.

    It takes one buffer instead of one each, and its gradient is that of every head's logits.
    """

    def __init__(self, parts: list[Part], setting: Setting, needs: list[list[bool]], buffers: Buffers):
        self.parts = [PartChunks(part, setting, n, buffers) for part, n in zip(parts, needs, strict=True)]
        self.setting, self.buffers, self.plan = setting, buffers, self.parts[0].plan

    def needs(self) -> tuple[bool, bool]:
        return any(part.needs_values() for part in self.parts), False

    def operand(self, start: int, stop: int) -> Operand:
        self.values = self.buffers.get(("product", id(self)), self.plan.logits, stop - start)
        logits, ignored = self.values[:, : self.setting.vocab_size], self.setting.ignored_in(start, stop)
        for i, part in enumerate(self.parts):
            part.head.logits(start, stop, ignored, logits, accumulate=i > 0)
        return Operand(self.values, None, None)

    def gradient_buffer(self, start: int, stop: int) -> Tensor:
        if self.setting.in_place:
            return self.values
        return self.buffers.get(("gradient of product", id(self)), self.plan.operands, stop - start)

    def take_gradient(self, start: int, stop: int, grad: Tensor | None, grad_scale: None) -> None:
        for part in self.parts if grad is not None else ():
            part.take_gradient(start, stop, grad, None)

    def gradients(self) -> list[Tensor | None]:
        return [grad for part in self.parts for grad in part.gradients()]


def side_chunks(parts: list[Part], setting: Setting, needs: list[list[bool]], buffers: Buffers):
    kind = ProductChunks if parts and are_one_product(parts, setting.autocast) else SideChunks
    return kind(parts, setting, needs, buffers)
