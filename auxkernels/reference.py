"""Sources and their softmax in plain PyTorch: what the operators' references share.

Written for clarity, and apart from the fused implementations, so that a mistake in their formulas cannot hide.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .sources import Head, Logits, Source, row_scale


def arithmetic_of(compute: torch.dtype, device: torch.device) -> torch.dtype:
    return torch.float64 if device.type == "cpu" else compute


def logits_of(
    source: Source, compute: torch.dtype, autocast: torch.dtype | None, vocab_size: int, ignored: Tensor | None
) -> Tensor:
    """The source's logits [*, V] before softcap and scale, ignored rows zeros; a head's, from its tensors in autocast's
    dtype where that is on."""

    def cast(tensor: Tensor) -> Tensor:
        if autocast is not None and isinstance(source, Head) and tensor.dtype != torch.float64:
            tensor = tensor.to(autocast)
        return tensor.to(compute)

    z = cast(source.hidden if isinstance(source, Head) else source.values[..., :vocab_size])
    if ignored is not None:
        z = z.masked_fill(ignored.unsqueeze(-1), 0.0)
    if isinstance(source, Logits):
        return z
    z = torch.nn.functional.linear(z, cast(source.weight)[:vocab_size])
    if source.bias is not None:
        z = z + cast(source.bias)[:vocab_size]
    return z if ignored is None else z.masked_fill(ignored.unsqueeze(-1), 0.0)


def sum_of(
    sources: list[Source],
    compute: torch.dtype,
    autocast: torch.dtype | None,
    vocab_size: int,
    ignored: Tensor | None,
) -> Tensor:
    """Sum of the sources [*, V] in the compute dtype; ignored rows become zeros, so no gradient enters them."""
    total: Tensor | None = None
    for source in sources:
        z = logits_of(source, compute, autocast, vocab_size, ignored)
        if source.softcap is not None:
            z = source.softcap * torch.tanh(z / source.softcap)
        z = scaled(z, row_scale(source.scale, compute))
        if ignored is not None:  # a scale may be NaN or Inf in an ignored row as well
            z = z.masked_fill(ignored.unsqueeze(-1), 0.0)
        total = z if total is None else total + z
    assert total is not None, "there is at least one source"
    return total


def scaled(z: Tensor, scale: float | Tensor) -> Tensor:
    """z * scale, where a masked class (-inf, gradient 0) adds 0 to the gradient of the scale and not 0 * (-inf)."""
    if not isinstance(scale, Tensor):
        return z * scale
    masked = z == -torch.inf
    return torch.where(masked, z * scale.detach(), z.masked_fill(masked, 0.0) * scale)


def picked(logits: Tensor, target: Tensor) -> Tensor:
    return logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)


class Softmax(NamedTuple):
    """log softmax of rows, and logsumexp [*]: both NaN where a row is no distribution (all -inf, any +inf, NaN)."""

    log_p: Tensor
    lse: Tensor


def softmax(s: Tensor) -> Softmax:
    """As torch.log_softmax; accurate relative to itself, in value and gradients, also where one p is all but 1.

    There log p is the small -log1p(rest), with the sum of the other exponentials relative to the largest, and the
    gradient p - 1 of the largest minus the sum of the other p: neither is a difference of nearly equal numbers.
    """
    largest, place = s.max(-1, keepdim=True)
    z = (s - largest).scatter(-1, place, 0.0)  # not by way of the largest: its gradient would be two that cancel
    rest = z.exp().scatter(-1, place, 0.0).sum(-1, keepdim=True)
    is_confident = (rest < 1) & largest.isfinite()
    log_denom = torch.log1p(rest)
    log_p = torch.where(is_confident, z - log_denom, torch.log_softmax(s, -1))
    lse = torch.where(is_confident, largest + log_denom, torch.logsumexp(s, -1, keepdim=True))
    lse = lse * torch.ones_like(lse).masked_fill(~largest.isfinite(), torch.nan)
    return Softmax(log_p, lse.squeeze(-1))


def expectation(p: Tensor, z: Tensor) -> Tensor:
    """E_p[z] with 0 * (-inf) = 0, in value and gradient."""
    masked = (p == 0) & (z == -torch.inf)
    return (p * z.masked_fill(masked, 0.0)).sum(-1)
