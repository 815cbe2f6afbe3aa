"""Composites of existing kernels for materialised logits: the sum in the inputs' dtype, then a package's cross-entropy.

No package takes two sources, so each composite writes the sum once and reads it again: 3 units of traffic before the
cross-entropy's own. Each takes (base, aux, target) and returns the mean loss.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.timing.baselines import imported


def liger() -> Callable:
    """Loss and gradient in one kernel, which writes the gradient over the sum."""
    loss = imported("liger_kernel.transformers.functional", "liger_cross_entropy")
    return lambda base, aux, target: loss(base + aux, target)


def quack() -> Callable:
    """The public function: the loss in forward, the gradient in backward from the sum and its lse."""
    loss = imported("quack.cross_entropy", "cross_entropy")
    return lambda base, aux, target: loss(base + aux, target)


def quack_in_one_pass() -> Callable:
    """The same package's kernel that makes loss and gradient at once, which its public function does not use."""
    kernel = imported("quack.cross_entropy", "cross_entropy_fwd")
    return functools.partial(_loss_and_gradient, kernel)


def _loss_and_gradient(kernel: Callable, base: Tensor, aux: Tensor, target: Tensor) -> Tensor:
    # as class weights, so that the mean takes no pass of its own
    share = torch.full((base.shape[-1],), 1 / len(base), device=base.device)
    if not torch.is_grad_enabled() or not (base.requires_grad or aux.requires_grad):
        return kernel(base + aux, target, weight=share).sum()
    return _InOnePass.apply(base + aux, target, share, kernel)


class _InOnePass(torch.autograd.Function):
    """Hands the gradient out as it is: the benchmark's upstream gradient is one."""

    @staticmethod
    def forward(ctx, s, target, share, kernel):
        loss, gradient = kernel(s, target, weight=share, return_dx=True)
        ctx.save_for_backward(gradient)
        return loss.sum()

    @staticmethod
    def backward(ctx, upstream):
        return ctx.saved_tensors[0], None, None, None


# each getter raises Unavailable where its package is missing
COMPOSITES: dict[str, Callable[[], Callable]] = {
    "Liger": liger,
    "QuACK": quack,
    "QuACK, gradient in forward": quack_in_one_pass,
}
