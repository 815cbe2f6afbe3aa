"""float64 oracle of soft_embedding on the exact inputs: the mixture and the gradients of scores and table.

It runs over chunks of rows, and over segments where tokens share them. An error is that of a whole output, relative to
its norm. Bounds, with u the unit roundoff of float32:

ours        against the noise of noise.py: what p may err by, 4 u (1 + |log p|) and so, weighted by p, 4 u
            (1 + log K) at most, twice in a difference from the row's mean; sqrt(n) u of a product's n terms, whose
            order of summation is the library's; noise that is within 4 ulp. In 16 bit and under 16-bit autocast three
            roundings more: of probabilities or their gradient, of a chunk's product, of the result. Or the yardstick's
            own error, where that is larger: it goes through the same library on the same machine.
baselines   the same mathematics in their own arithmetic, so that a wrong one is not timed and a coarse one is.
            Those that draw noise of their own are held to shapes and finite values alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from benchmarks.soft_embedding.inputs import SEED, TEMPERATURE, Inputs, Mode
from benchmarks.timing.harness import Accuracy, Implementation
from benchmarks.timing.oracle import EPS, nan_to_inf, note, relative_distance

NAMES = ("mixture", "dscores", "dtable")
CHUNK_ELEMENTS = 1 << 23


class LookupOracle:
    """Expected outputs of one pass, in float64 and by name; the mixture [L, S, D] is that before tokens get it."""

    def __init__(self, inputs: Inputs, mode: Mode):
        self.inputs, self.mode = inputs, mode
        num_tables, num_segments, num_rows, num_labels, width = inputs.sizes()
        self.shapes = (inputs.grad.shape, inputs.scores.shape, inputs.table.shape)
        self.tables = inputs.table.double().view(num_tables, num_labels, width)
        grad = inputs.grad.view(num_tables, num_rows, width)
        new = self.tables.new_zeros
        self.expected = {"mixture": new(num_tables, num_segments, width)}
        if mode.is_training:
            self.expected |= {"dscores": new(num_segments, num_labels), "dtable": new(self.tables.shape)}
        self.magnitude = inputs.scores.abs().amax().item() / TEMPERATURE if num_segments else 0.0
        self.num_terms = {"mixture": num_labels, "dscores": num_tables * width, "dtable": num_segments}
        self.yardstick: dict[str, float] = {}
        noise = _noise(num_segments, num_labels, inputs.scores.device) if mode.gumbel else None
        rows = torch.arange(num_segments, device=inputs.scores.device)
        for some in rows.split(max(1, CHUNK_ELEMENTS // num_labels)):
            scores = inputs.scores[some].double()
            if noise is not None:
                scores += mode.gumbel * noise[some]
            self._add_rows(some, scores / TEMPERATURE, self._grad_of_rows(grad, some) if mode.is_training else None)
        del self.tables

    def _grad_of_rows(self, grad: Tensor, some: Tensor) -> Tensor:
        """float64 upstream gradient of some rows, summed over the tokens of each."""
        ids = self.inputs.segment_ids
        if ids is None:
            return grad[:, some].double()
        first, size = some[0], len(some)
        tokens = ((ids >= first) & (ids < first + size)).nonzero()[:, 0]
        total = self.tables.new_zeros(len(grad), size, grad.shape[-1])
        return total.index_add_(1, ids[tokens] - first, grad[:, tokens].double())

    def _add_rows(self, some: Tensor, u: Tensor, grad: Tensor | None) -> None:
        if self.mode.hard:
            self.expected["mixture"][:, some] = self.tables[:, u.argmax(1)]
            return
        if self.mode.top_k:
            kept = u.topk(min(self.mode.top_k, u.shape[1])).indices
            u = torch.full_like(u, -math.inf).scatter_(1, kept, u.gather(1, kept))
        p = u.softmax(1)
        self.expected["mixture"][:, some] = p @ self.tables
        if grad is not None:
            g = sum(of_table @ table.T for of_table, table in zip(grad, self.tables, strict=True))
            g = g - g.gather(1, p.argmax(1, keepdim=True))  # or a confident row's mean would cancel its largest g
            self.expected["dscores"][some] = p * (g - (p * g).sum(1, keepdim=True)) / TEMPERATURE
            self.expected["dtable"] += p.T @ grad

    def check(self, implementation: Implementation, outputs: Sequence) -> Accuracy:
        """Errors of one implementation's mixture and gradients, and the first bound that one of them breaks."""
        ours = implementation.role == "ours"
        errors, problems = {}, []
        for name, values, shape in zip(NAMES, outputs, self.shapes, strict=False):
            if _shape_of(values) != shape:
                problems.append(f"{name} has shape {list(_shape_of(values))}, not {list(shape)}")
            elif self.mode.gumbel and not ours:
                if not values.isfinite().all():
                    problems.append(f"{name} is not finite")
            else:
                error = nan_to_inf(relative_distance(self._pairs(name, values)))
                note(name, error, error / self._allowed(name, ours), errors, problems)
        if len(outputs) != len(self.expected):
            problems.append(f"{len(outputs)} outputs instead of {len(self.expected)}")
        if implementation.role == "yardstick":
            self.yardstick = errors
        return Accuracy(errors, problems[0] if problems else None)

    def _pairs(self, name: str, values: Tensor | tuple[Tensor, ...]) -> Iterable[tuple[Tensor, Tensor]]:
        expected, ids = self.expected[name], self.inputs.segment_ids
        if name != "mixture":
            return [(values.view(expected.shape), expected)]
        if not isinstance(values, tuple):
            values = values.view(len(expected), -1, values.shape[-1])
        return ((v, e if ids is None else e[ids]) for v, e in zip(values, expected, strict=True))

    def _allowed(self, name: str, ours: bool) -> float:
        bound = self._bound(name)
        if ours:
            eager_error = self.yardstick.get(name, math.inf)
            return max(bound, eager_error if math.isfinite(eager_error) else 0.0)
        # torch's softmax on CPU adds up to K / 16 exponentials one by one
        of_sum = EPS * math.sqrt(self.inputs.scores.shape[1])
        eps = torch.finfo(self._dtype()).eps
        return max(math.expm1(min(eps * (4 + 2 * self.magnitude) + of_sum, 40)), bound)

    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.mode.is_autocast else self.inputs.scores.dtype

    def _bound(self, name: str) -> float:
        num_labels = self.inputs.scores.shape[1]
        of_rows = 2 * EPS * (1 + math.log(num_labels)) * (2 if name == "dscores" else 1)
        of_noise = 4 * EPS * self.mode.gumbel / TEMPERATURE
        bound = of_rows + of_noise + EPS / 2 * math.sqrt(self.num_terms[name])
        if self._dtype() != torch.float32:
            bound += 1.5 * torch.finfo(self._dtype()).eps
        if self._dtype() == torch.float16:
            bound += num_labels * 2.0**-25  # small probabilities are subnormal
        return bound


def _shape_of(values: Tensor | tuple[Tensor, ...]) -> torch.Size:
    return torch.Size((len(values), *values[0].shape)) if isinstance(values, tuple) else values.shape


def _noise(num_rows: int, num_labels: int, device: torch.device) -> Tensor:
    from auxkernels.soft_embedding import noise

    return noise.gumbel(num_rows, num_labels, torch.tensor(SEED, device=device), torch.float64)
