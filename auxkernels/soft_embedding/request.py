"""What the row kernels of soft_embedding take; their implementations are {native,triton}/soft_embedding.py.

With v = scores + gumbel * noise, u = v / T, -inf where forbidden, and p = softmax(u), possibly over the k likeliest
labels alone, a row has the fields

    max           the largest v                   log_denom     log sum_k exp((v_k - max) / T)
    entropy       of p, nats                      max_prob      the largest p
    sum_squares   sum_k p_k^2                     argmax        int64, its label: lowest on a tie, the first NaN wins

A row without an allowed label has max -inf, argmax -1 and zeros. From g_k, the gradient with respect to p_k,

    du_k = p_k (g_k - sum_j p_j g_j)      dscores_k = du_k / T      dT = -(1 / T) sum_k du_k log p_k

where the statistics add to g_k: usage its upstream at k, sum_squares 2 p_k, entropy -log p_k, max_prob 1 at the argmax.
Noise of row n and label k: Philox4x32-10 with key = seed and counter = (k >> 2, n low, n high, 0), lane k & 3 of it,
as u = ((bits >> 9) + 0.5) * 2**-23, which is strictly inside (0, 1), and then -log(-log(u)).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROW_FIELDS = ("max", "log_denom", "entropy", "max_prob", "sum_squares", "argmax")


class SoftRows(NamedTuple):
    """A chunk of rows."""

    scores: Tensor  # [C, K], rows contiguous
    compute: torch.dtype
    first_row: int  # number of the first row, for its noise
    temperature: float | Tensor  # (), [C]
    gumbel: float | Tensor | None  # None: no noise
    seed: int | Tensor | None
    mask: Tensor | None  # bool [C, K] or [K], True: forbidden


class Upstream(NamedTuple):
    """Upstream gradients of the statistics, in the compute dtype: [C], but [K] for usage. None: no gradient."""

    entropy: Tensor | None
    max_prob: Tensor | None
    sum_squares: Tensor | None
    usage: Tensor | None
