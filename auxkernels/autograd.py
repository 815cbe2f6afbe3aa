"""What the autograd functions of the operators share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad


def distinct(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
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


def anchors(tensors: Iterable[Any]) -> list[Tensor]:
    """Empty tensors that depend on the tensors: edges for `once`, where saving the tensors would keep their memory."""
    if torch.compiler.is_compiling():
        return []
    return [_empty_of(t) for t in tensors if isinstance(t, Tensor) and t.requires_grad]


def _empty_of(tensor: Tensor) -> Tensor:
    # one operator, and no view, which would keep the memory
    return (tensor if tensor.dim() else tensor.unsqueeze(0)).narrow_copy(-1, 0, 0)


def _has_transform() -> bool:
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None


# a constant of the trace: torch.compile enters the transforms that it traces, and guards those around it. set by hand,
# because torch.compiler.assume_constant_result imports the compiler, which takes seconds
_has_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_traced_in_transform() -> bool:
    """Whether torch.compile traces inside a transform of torch.func or forward-mode differentiation.

    There it says of inputs that no gradient is wanted, and runs an autograd function without its derivative.
    """
    return torch.compiler.is_compiling() and _has_transform()


def apply(function: type[torch.autograd.Function], who: str, *args: Any) -> Any:
    """function.apply(*args); what torch.compile would trace wrongly is left to eager mode, which has an error."""
    if is_traced_in_transform():
        # raised in a call that does nothing else, so that eager mode, without fullgraph, takes up all of it
        raise RuntimeError(
            f"{who} has no rule for torch.func's transforms (grad, vjp, jvp, vmap, ...) and forward-mode "
            "differentiation: use torch.autograd.grad, or backend='reference'"
        )
    return function.apply(*args)


def apply_in_eager(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply(*args) without what it does about transforms, of which there are none here: 2 us of a call."""
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def called_directly(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The function, whose `backward` autograd then calls itself: torch's own way there asks first whether it has a
    `vjp` beside it, which is 2 us of a call."""
    function._backward_cls.apply = function.backward  # type: ignore[attr-defined]
    return function


class DelayedError(torch.autograd.Function):
    """Passes gradients through; differentiating them again raises instead of silently dropping a term.

    Takes the gradients and then, as edges of the graph, the tensors that they depend on: without those, a second
    differentiation with respect to such a tensor would not come through here.
    """

    @staticmethod
    def forward(ctx: Any, who: str, num_grads: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.who = who
        return tuple(g.view_as(g) for g in tensors[:num_grads])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise RuntimeError(f"{ctx.who} cannot be differentiated twice; use backend='reference' for that")


def once(who: str, grads: list[Tensor | None], depend_on: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """With create_graph=True, make a second differentiation of these gradients an error that says who gave them."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return grads
    there = [g.detach() for g in grads if g is not None]
    edges = [t for t in depend_on if t is not None and t.requires_grad]
    given = iter(DelayedError.apply(who, len(there), *there, *edges) if there else ())
    return [None if g is None else next(given) for g in grads]
