"""Heads of one weight: (scale_1 * h_1 + scale_2 * h_2 + ...) @ weight.T is one product, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import memory
from ..sources import Leaves, SourceTensors, row_scale
from .products import CPU_COLUMNS, Plan, WeightGradient, converted, multiply, plan_of
from .rows import Rows

_EXACT = (torch.float32, torch.float64)


def are_added_first(one: SourceTensors, other: SourceTensors, autocast: torch.dtype | None) -> bool:
    """Whether two heads have one weight and are linear in it, and their hidden states' sum is as exact as they are.

    A sum of 16-bit hidden states does not fit into 16 bits, and no library multiplies float32 by a 16-bit weight: those
    keep their two products. Under autocast float32 hidden states are rounded in any case, here once instead of twice.
    """
    if one.weight is None or other.weight is None or not _are_one_tensor(one.weight, other.weight):
        return False
    if one.softcap is not None or other.softcap is not None:
        return False
    plans = [plan_of(part.values.dtype, autocast, part.values.device) for part in (one, other)]
    if plans[0] != plans[1]:
        return False
    are_exact = [part.values.dtype in _EXACT for part in (one, other)]
    if plans[0].rounding is not None and any(are_exact):  # which would round the others' sum with it
        return all(are_exact)
    return plans[0].operands in _EXACT or all(are_exact)


def _are_one_tensor(one: Tensor, other: Tensor) -> bool:
    return one is other or (
        one.data_ptr() == other.data_ptr()
        and (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
    )


def groups_of(
    parts: list[SourceTensors],
    needs: list[Leaves],
    num_base: int,
    autocast: torch.dtype | None,
    is_base_wanted: bool,
) -> tuple[list[list[int]], list[list[int]]]:
    """The sources of base and auxiliary by number, those that are added before their product in one group.

    Groups span both where the base does not count by itself, and then belong to the base.
    """
    operands: tuple[list[list[int]], list[list[int]]] = ([], [])
    for i in range(len(parts)):
        operand = operands[i >= num_base]
        candidates = operand if is_base_wanted else [*operands[0], *(operand if i >= num_base else [])]
        group = next((group for group in candidates if _joins(i, group, parts, needs, autocast)), None)
        if group is None:
            operand.append([i])
        else:
            group.append(i)
    return operands


def _joins(
    i: int, group: list[int], parts: list[SourceTensors], needs: list[Leaves], autocast: torch.dtype | None
) -> bool:
    is_shared = are_added_first(parts[group[0]], parts[i], autocast)
    return is_shared and all(_has_constant_bias(parts[j], needs[j]) for j in (group[0], i))


def _has_constant_bias(part: SourceTensors, needs: Leaves) -> bool:
    """Whether a head adds the same to all rows; a scale for each row, or one that learns, makes its bias a product."""
    return part.bias is None or part.scale is None or (part.scale.dim() == 0 and not needs.scale)


def as_one(parts: list[SourceTensors]) -> SourceTensors:
    """A group as a source without softcap and scale, for what asks only for dtypes and sizes."""
    return parts[0] if len(parts) == 1 else SourceTensors(parts[0].values, parts[0].weight, None, None, None)


class SummedHeads:
    """Stands for the `HeadProducts` of a group. needs: of hidden, weight, bias and scale of each head."""

    def __init__(
        self,
        parts: list[SourceTensors],
        plan: Plan,
        V: int,
        rows: Rows,
        num_chunks: int,
        needs: list[Leaves],
        grad_dtype: Callable[[torch.dtype], torch.dtype],
        compute: torch.dtype,
    ) -> None:
        self.parts, self.plan, self.rows, self.needs, self.compute = parts, plan, rows, needs, compute
        self.grad_dtype = grad_dtype
        first = parts[0].weight
        assert first is not None, "heads have one"
        self.weight = converted(first[:V], plan)
        biases = [_scaled(part.bias[:V].to(compute), part.scale) for part in parts if part.bias is not None]
        self.bias = plan.operand(sum(biases[1:], biases[0])).to(plan.logits) if biases else None
        self.grads = [self._new_gradients(*of, V, num_chunks) for of in zip(parts, needs, strict=True)]
        self.num_columns = V

    def _new_gradients(self, part: SourceTensors, needs: Leaves, V: int, num_chunks: int) -> Leaves:
        """Where they are collected; None: not wanted."""
        hidden, weight, bias = part.values, part.weight, part.bias
        assert weight is not None, "heads have one"
        of_bias = torch.promote_types(self.plan.operands, torch.float32)
        return Leaves(
            self.rows.new_output(hidden, hidden.shape[-1:], self.grad_dtype(hidden.dtype)) if needs.values else None,
            WeightGradient(weight, V, self.plan, num_chunks, self.grad_dtype(weight.dtype)) if needs.weight else None,
            bias.new_zeros(bias.shape, dtype=of_bias) if needs.bias and bias is not None else None,
            self.rows.new_output(hidden, (), self.compute) if needs.scale else None,
        )

    def logits(self, start: int, stop: int, ignored: Tensor | None, out: Tensor, accumulate: bool = False) -> None:
        """Writes (adds) the chunk's logits to `out` [stop - start, V]."""
        self.hidden: list[Tensor] = []
        self.scales: list[Tensor | None] = []
        terms = []
        for part in self.parts:
            hidden, scale = self.rows.take(part.values, start, stop).to(self.compute), part.scale
            if scale is not None and scale.dim():
                scale = self.rows.take(scale, start, stop)
            if ignored is not None:  # may hold NaN, which a gradient of zero would not keep out of the others'
                hidden = hidden.masked_fill(ignored.unsqueeze(-1), 0.0)
                if scale is not None and scale.dim():
                    scale = scale.masked_fill(ignored, 0.0)
            self.hidden.append(hidden)
            self.scales.append(scale)
            terms.append(_scaled(hidden, scale))
        multiply(self._operand(sum(terms[1:], terms[0])), self.weight.T, out, accumulate, self.bias)

    def _operand(self, hidden: Tensor) -> Tensor:
        """What of hidden states enters a product: 16-bit ones are rounded no more than they are."""
        if any(part.values.dtype in _EXACT for part in self.parts):
            return self.plan.operand(hidden)
        return hidden.to(self.plan.operands)

    def add_gradient(self, start: int, stop: int, ignored: Tensor | None, grad: Tensor) -> None:
        """From the gradient [stop - start, V] of a chunk's logits; of the chunk that `logits` has been called with."""
        of_sum: Tensor | None = None
        if any(needs.values or needs.scale for needs in self.needs):
            dtype = torch.float32 if self.plan.is_wide else self.plan.operands
            of_sum = memory.empty(grad, (stop - start, self.weight.shape[1]), dtype)
            multiply(grad, self.weight, of_sum)
        of_bias = self._sum_of_rows(grad) if any(needs.bias for needs in self.needs) else None
        for hidden, scale, grads in zip(self.hidden, self.scales, self.grads, strict=True):
            if grads.values is not None and of_sum is not None:
                self.rows.put(grads.values, start, stop, _without(ignored, _scaled(of_sum, scale)))
            if grads.weight is not None:
                grads.weight.add(grad, self._operand(_scaled(hidden, scale)))
            if grads.bias is not None and of_bias is not None:
                grads.bias[: self.num_columns] += _scaled(of_bias, scale)
            if grads.scale is not None and of_sum is not None:
                self.rows.put(grads.scale, start, stop, _without(ignored, (of_sum * hidden).sum(-1)))

    def _sum_of_rows(self, grad: Tensor) -> Tensor:
        dtype = torch.promote_types(self.plan.operands, torch.float32)
        slabs = grad.split(CPU_COLUMNS, dim=1)  # torch would make a float32 copy of what it sums
        return torch.cat([slab.sum(0, dtype=dtype) for slab in slabs])

    def gradients(self) -> list[Leaves]:
        """Of each head; None where none was asked for."""
        found = []
        for part, (hidden, weight, bias, scale) in zip(self.parts, self.grads, strict=True):
            found.append(
                Leaves(
                    None if hidden is None else hidden.view(part.values.shape),
                    None if weight is None else weight.out,
                    None if bias is None or part.bias is None else bias.to(self.grad_dtype(part.bias.dtype)),
                    None if scale is None else scale.view(self.rows.shape),
                )
            )
        return found


def _scaled(values: Tensor, scale: Tensor | None) -> Tensor:
    return values if scale is None else values * row_scale(scale, torch.promote_types(values.dtype, scale.dtype))


def _without(ignored: Tensor | None, grad: Tensor) -> Tensor:
    """A gradient of the chunk's rows, those of ignored ones +0.0 whatever they were multiplied by."""
    return grad if ignored is None else grad.masked_fill(ignored.view(-1, *[1] * (grad.dim() - 1)), 0.0)
