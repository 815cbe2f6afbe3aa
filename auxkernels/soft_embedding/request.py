"""What is asked of soft_embedding and of its row kernels (native.py, triton/launch.py): by name, and the mathematics.

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

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..sources import SourceTensors

ROW_FIELDS = ("max", "log_denom", "entropy", "max_prob", "sum_squares", "argmax")
# what a lookup can return after the mixture, as bits of `wanted`, in this order
OUTPUTS = (*ROW_FIELDS, "usage", "labels")


def mask_of(*names: str) -> int:
    return sum(1 << OUTPUTS.index(name) for name in names)


def outputs_in(wanted: int) -> list[str]:
    """The names of the outputs in a mask, in the order in which they come back."""
    return [name for i, name in enumerate(OUTPUTS) if wanted >> i & 1]


class Request(NamedTuple):
    """What the operators are asked about."""

    sources: list[SourceTensors]
    autocast: torch.dtype | None
    table: Tensor  # [K, D] or [L, K, D]
    temperature: Tensor | None
    gumbel: Tensor | None
    seed: Tensor | None
    mask: Tensor | None
    top_k: int  # 0: all
    hard: bool

    def first(self) -> Tensor:
        return self.sources[0].values

    def shape(self) -> torch.Size:
        return self.first().shape[:-1]

    def num_labels(self) -> int:
        return self.table.shape[-2]

    def compute(self) -> torch.dtype:
        is_double = any(t.dtype == torch.float64 for t in (*(one.values for one in self.sources), self.table))
        return torch.float64 if is_double else torch.float32

    def out_shape(self) -> tuple[int, ...]:
        return (*self.table.shape[:-2], *self.shape(), self.table.shape[-1])

    def out_dtype(self) -> torch.dtype:
        if self.autocast is None or self.table.dtype == torch.float64:
            return self.table.dtype
        return self.autocast

    def kept(self) -> int:
        return min(self.top_k, self.num_labels())


class State(NamedTuple):
    """What a lookup leaves for its backward: [*] each, labels [*, k] with top_k."""

    max: Tensor
    log_denom: Tensor
    argmax: Tensor
    labels: Tensor | None


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


NO_UPSTREAM = Upstream(None, None, None, None)


class Kernels(Protocol):
    """An implementation, on one chunk of rows at a time. Arguments have been checked."""

    def softmax(self, rows: SoftRows, fields: dict[str, Tensor], probabilities: Tensor | None) -> None:
        """Writes the fields [C] that are given and p [C, K]."""

    def softmax_backward(
        self,
        rows: SoftRows,
        fields: dict[str, Tensor],
        grad_probabilities: Tensor | None,
        upstream: Upstream | None,
        grad_scores: Tensor | None,
        grad_temperature: Tensor | None,
        probabilities: Tensor | None,
    ) -> None:
        """Writes the gradients [C, K] and [C] that are given a place, and p again, from max and log_denom."""

    def select(self, rows: SoftRows, fields: dict[str, Tensor], labels: Tensor, weights: Tensor) -> None:
        """Writes the k likeliest labels [C, k], likeliest first, their probabilities, and the fields."""

    def select_backward(
        self,
        rows: SoftRows,
        fields: dict[str, Tensor],
        labels: Tensor,
        weights: Tensor,
        grad_weights: Tensor | None,
        upstream: Upstream | None,
        grad_scores: Tensor | None,
        grad_temperature: Tensor | None,
    ) -> None:
        """Writes the weights again and the gradients that are given a place."""

    def gather(self, tables: Tensor, labels: Tensor, weights: Tensor | None, out: Tensor, in_double: bool) -> None:
        """out [L, C, D] = sum over j of weights [C, k] (1) times the rows of tables [L, K, D] at labels [C, k]."""

    def products(self, tables: Tensor, labels: Tensor, rows: Tensor, out: Tensor, in_double: bool) -> None:
        """out [C, k] = sum over tables of <rows [L, C, D], the table's row that labels [C, k] name>."""

    def scatter(self, tables: Tensor, labels: Tensor, weights: Tensor | None, rows: Tensor, in_double: bool) -> None:
        """tables [L, K, D] += weights times rows [L, C, D] where labels [C, k] say, in the order of the rows."""
