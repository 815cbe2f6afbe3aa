"""The sum of several sources on a chunk of rows, in plain torch, and the gradients of its terms."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sources import row_scale


def bend(z: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(z / softcap)


def sum_of(terms: list[tuple[Tensor, Tensor | None, float | None]], out: Tensor) -> None:
    """out [C, V] = sum of scale * softcap(values) over (values [C, >= V], scale, softcap), in out's dtype."""
    for i, (values, scale, softcap) in enumerate(terms):
        z = values[:, : out.shape[1]].to(out.dtype)
        if softcap is not None:
            z = bend(z, softcap)
        if scale is not None:
            z = z * row_scale(scale, out.dtype)
        out.add_(z) if i else out.copy_(z)


def value_gradient(
    grad: Tensor,
    factor: Tensor | None,
    bent: Tensor | None,
    softcap: float | None,
    ignored: Tensor | None,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of values [C, width] from that of their sum [C, V]; bent: softcap(values); ignored: rows of zeros."""
    if factor is not None:
        grad = grad * factor
    if bent is not None:
        grad = grad * (1 - (bent / softcap).square())
    if ignored is not None:
        grad = grad.masked_fill(ignored.unsqueeze(-1), 0.0)
    grad = grad.to(dtype)
    tail = width - grad.shape[-1]
    return torch.nn.functional.pad(grad, (0, tail)) if tail else grad


def scale_gradient(grad: Tensor, unscaled: Tensor, ignored: Tensor | None) -> Tensor:
    """Gradient of a scale, one number per row, from that of the sum and from softcap(values), both [C, V]."""
    # a probability of zero has gradient zero: a masked class (-inf) must not turn the product into NaN
    per_row = torch.where(grad == 0, 0.0, grad * unscaled).sum(-1)
    return per_row if ignored is None else per_row.masked_fill(ignored, 0.0)
