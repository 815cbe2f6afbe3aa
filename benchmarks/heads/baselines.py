"""Fused linear cross-entropy losses of other packages, on two heads joined side by side into one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.heads.inputs import Heads
from benchmarks.timing.baselines import imported
from benchmarks.timing.harness import Outputs, Unavailable

TORCH_PLAIN, TORCH_CHUNKED = "F.linear_cross_entropy", "F.linear_cross_entropy chunked"


def _torch(is_chunked: bool) -> Callable:
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions() if is_chunked else None
    return lambda hidden, weight, target: F.linear_cross_entropy(hidden, weight, target, options=options)


# each getter returns loss(hidden [N, D], weight [V, D], target [N]), a mean over the rows whose target is not -100
FUSED_LOSSES: dict[str, Callable[[], Callable]] = {
    TORCH_PLAIN: lambda: _torch(False),
    TORCH_CHUNKED: lambda: _torch(True),
    "Liger": lambda: imported("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"),
    "Cut Cross Entropy": lambda: imported("cut_cross_entropy", "linear_cross_entropy"),
    "QuACK": lambda: imported("quack.linear_cross_entropy", "chunked_linear_cross_entropy"),
}


def joined_call(name: str, heads: Heads, wanted: tuple[str, ...]) -> Callable[[], Outputs]:
    """The call of one of FUSED_LOSSES. Joining is not timed, and what is not wanted of the gradients is dropped."""
    loss_function = FUSED_LOSSES[name]()
    d_base = heads.h_base.shape[1]
    hidden, weight = torch.cat((heads.h_base, heads.h_aux), 1), torch.cat((heads.w_base, heads.w_aux), 1)
    for joined in (hidden, weight) if wanted else ():
        joined.requires_grad_()

    def call() -> Outputs:
        loss = loss_function(hidden, weight, heads.target)
        if not wanted:
            return Outputs(loss.detach())
        d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
        gradients = {
            "h_base": d_hidden[:, :d_base],
            "w_base": d_weight[:, :d_base],
            "h_aux": d_hidden[:, d_base:],
            "w_aux": d_weight[:, d_base:],
        }
        return Outputs(loss.detach(), tuple(gradients[name] for name in wanted))

    return call
