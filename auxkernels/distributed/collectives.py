"""What is sent: one gather for each exchange, one sum for the gradients of what all processes hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def gathered(values: Tensor, group: ProcessGroup) -> Tensor:
    """[world, *] from a contiguous tensor of one shape on all processes, in the order of the ranks."""
    found = values.new_empty(group.size() * values.numel())
    # the newer name since torch 2.13, where the older one warns
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(found, values.view(-1), group=group)
    return found.view(group.size(), *values.shape)


def summed(tensors: list[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Each added up over the processes, all in one collective: in float32, float64 if one is, and rounded once."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    flat = torch.cat([t.reshape(-1).to(dtype) for t in tensors])
    dist.all_reduce(flat, group=group)
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]


class Replicated(torch.autograd.Function):
    """Tensors that all processes hold: as they are forward, the sum of the processes' gradients backward.

    Each process's gradient is of its own columns' share of the loss; without the sum the others' would be lost.
    """

    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # gradients that did not arrive are zeros: every process has to take part
        with torch.no_grad():
            return (None, *summed(list(grads), ctx.group))


def replicated(tensors: list[Tensor], group: ProcessGroup) -> list[Tensor]:
    """The tensors, those that require a gradient with one that is added up over the processes."""
    trained = {id(t): t for t in tensors if t.requires_grad} if torch.is_grad_enabled() else {}
    if not trained:
        return tensors
    found = dict(zip(trained, Replicated.apply(group, *trained.values()), strict=True))
    return [found.get(id(t), t) for t in tensors]
