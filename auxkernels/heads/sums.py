"""The sum of several sources on a chunk of rows, in plain torch, and the gradients of its terms.

Everything is done in place in a few [C, V] buffers of the sum's dtype: fresh ones cost several times the arithmetic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..sources import row_scale


class Term(NamedTuple):
    """One source's share of a sum: scale * softcap(values)."""

    values: Tensor  # [C, >= V]
    scale: Tensor | None  # () or [C]
    softcap: float | None


def capped(term: Term, out: Tensor) -> Tensor:
    """out = softcap(values), [C, V]."""
    out.copy_(term.values[:, : out.shape[1]])
    return out if term.softcap is None else out.div_(term.softcap).tanh_().mul_(term.softcap)


def sum_of(terms: list[Term], out: Tensor, scratch: Tensor) -> None:
    """out = the sum of the terms, [C, V] in out's dtype."""
    for i, term in enumerate(terms):
        z = capped(term, scratch if i else out)
        if term.scale is not None:
            z.mul_(row_scale(term.scale, out.dtype))
        if i:
            out.add_(z)


def value_gradient(term: Term, grad: Tensor, ignored: Tensor | None, out: Tensor) -> Tensor:
    """out = gradient of the term's values [C, V] from that of the sum; ignored: bool [C], rows of zeros."""
    if term.softcap is None:
        out.copy_(grad)
    else:
        out.copy_(term.values[:, : out.shape[1]]).div_(term.softcap).tanh_().square_().neg_().add_(1).mul_(grad)
    if term.scale is not None:
        out.mul_(row_scale(term.scale, out.dtype))
    return out if ignored is None else out.masked_fill_(ignored.unsqueeze(-1), 0.0)


def scale_gradient(term: Term, grad: Tensor, ignored: Tensor | None, scratch: Tensor) -> Tensor:
    """Gradient of the term's scale, one number for each row, from that of the sum [C, V]."""
    # a probability of zero has gradient zero: a masked class (-inf) must not turn the product into NaN
    per_row = capped(term, scratch).mul_(grad).masked_fill_(grad == 0, 0.0).sum(-1)
    return per_row if ignored is None else per_row.masked_fill(ignored, 0.0)


def with_tail(grad: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The gradient in its own dtype, zeros for the columns from V to `width`."""
    return torch.nn.functional.pad(grad.to(dtype), (0, width - grad.shape[1]))
