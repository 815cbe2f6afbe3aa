"""What the autograd functions of the operators share."""

from __future__ import annotations

import torch
from torch import Tensor


def distinct(tensors: tuple) -> tuple:
    """While torch.compile traces, which refuses one tensor as two arguments, the second one as a view of itself."""
    if not torch.compiler.is_compiling():
        return tensors
    seen: list[Tensor] = []
    for tensor in tensors:
        again = isinstance(tensor, Tensor) and any(tensor is other for other in seen)
        seen.append(tensor.view_as(tensor) if again else tensor)
    return tuple(seen)


def saveable(tensor: Tensor | None) -> Tensor | None:
    """A small tensor in a form that autograd can save, also if it was made in inference mode."""
    if tensor is None or torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    return tensor.clone()


def anchors(tensors: tuple) -> list[Tensor]:
    """Empty tensors that depend on the tensors: edges for `once`, where saving the tensors would keep their memory."""
    if torch.compiler.is_compiling():
        return []
    return [t[..., None][:0].clone() for t in tensors if isinstance(t, Tensor) and t.requires_grad]


class DelayedError(torch.autograd.Function):
    """Passes gradients through; differentiating them again raises instead of silently dropping a term.

    Takes the gradients and then, as edges of the graph, the tensors that they depend on: without those, a second
    differentiation with respect to such a tensor would not come through here.
    """

    @staticmethod
    def forward(ctx, who, num_grads, *tensors):
        ctx.who = who
        return tuple(g.view_as(g) for g in tensors[:num_grads])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.who} cannot be differentiated twice; use backend='reference' for that")


def once(who: str, grads: list[Tensor | None], depend_on: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """With create_graph=True, make a second differentiation of these gradients an error that says who gave them."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return grads
    there = [g.detach() for g in grads if g is not None]
    edges = [t for t in depend_on if t is not None and t.requires_grad]
    given = iter(DelayedError.apply(who, len(there), *there, *edges) if there else ())
    return [None if g is None else next(given) for g in grads]
