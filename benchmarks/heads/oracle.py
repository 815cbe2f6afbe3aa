"""float64 oracle of cross_entropy on linear heads: the loss, whole gradients, and statistics of a sample of rows.

It runs over chunks of rows, so no [N, V] tensor in float64 is stored. A gradient's error is that of the whole tensor,
relative to its norm. Bounds:

ours, 32 bit   4 u (1 + log V) of a row's probabilities and u of each of a few sums, u the unit roundoff; or twice the
               yardstick's own error where products are too coarse for that: it goes through the same library, which
               may sum products of other shapes in another order.
ours, 16 bit   the products are rounded to the inputs' dtype where the library has no other output: the yardstick's
               error and a quarter of an ulp (what rounding the result costs in the mean) for loss and hidden states,
               1.5 times its error for weights.
baselines      the same mathematics in their own arithmetic, so that a wrong one is not timed and a coarse one is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.cross_entropy.oracle import SAMPLED_ROWS, check_statistics, terms
from benchmarks.heads.inputs import CHUNK_ELEMENTS, IGNORE_INDEX, Heads
from benchmarks.timing.harness import Accuracy, Implementation, Outputs
from benchmarks.timing.oracle import nan_to_inf, note, relative_distance


class HeadsOracle:
    """Expected loss and gradients of the inputs in `wanted`; remembers the yardstick's errors for later checks."""

    def __init__(self, heads: Heads, wanted: tuple[str, ...], seed: int):
        self.heads, self.wanted = heads, wanted
        self.dtype = heads.w_base.dtype
        self.ignored = heads.target == IGNORE_INDEX
        self.kept = (~self.ignored).nonzero()[:, 0]
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.kept), generator=generator)[:SAMPLED_ROWS]
        self.sample = self.kept[order.sort().values.to(self.kept.device)]
        self.yardstick: dict[str, float] = {}
        self.loss = self.magnitude = 0.0
        self.gradients = {name: _float64_zeros(getattr(heads, name)) for name in wanted}
        weights = heads.w_base.double(), heads.w_aux.double()
        for rows in self.kept.split(max(1, CHUNK_ELEMENTS // len(heads.w_base))):
            self._add_rows(rows, *weights)

    def _hidden(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        h_base = self.heads.h_base[rows].double()
        return h_base, h_base @ self.heads.a.double().T if self.heads.is_lora else self.heads.h_aux[rows].double()

    def _add_rows(self, rows: Tensor, w_base: Tensor, w_aux: Tensor) -> None:
        h_base, h_aux = self._hidden(rows)
        t = terms(h_base @ w_base.T, self.heads.scale * (h_aux @ w_aux.T), self.heads.target[rows])
        self.loss += t.nll.sum().item() / len(self.kept)
        self.magnitude = max(self.magnitude, t.magnitude.max().item())
        if not self.wanted:
            return
        total = t.log_sum.exp()
        ds = (t.exp / total).scatter_(1, self.heads.target[rows, None].long(), -t.rest / total).div_(len(self.kept))
        if "w_base" in self.wanted:
            self.gradients["w_base"].addmm_(ds.T, h_base)
            self.gradients["h_base"][rows] = ds @ w_base
        dz = ds.mul_(self.heads.scale)
        self.gradients["w_aux"].addmm_(dz.T, h_aux)
        if self.heads.is_lora:
            self.gradients["a"].addmm_((dz @ w_aux).T, h_base)
        else:
            self.gradients["h_aux"][rows] = dz @ w_aux

    def check(self, implementation: Implementation, outputs: Outputs) -> Accuracy:
        """Errors of one implementation, and the first bound it breaks."""
        ours = implementation.role == "ours"
        errors, problems = {}, []
        if outputs.loss is not None:
            error = nan_to_inf(abs(outputs.loss.double().item() / self.loss - 1))
            note("loss", error, error / self._allowed("loss", ours), errors, problems)
        for name, gradient in zip(self.wanted if outputs.gradients else (), outputs.gradients, strict=True):
            error = nan_to_inf(relative_distance([(gradient, self.gradients[name])]))
            note(f"d{name}", error, error / self._allowed(name, ours), errors, problems)
            if ours and name.startswith("h_") and gradient[self.ignored].count_nonzero():
                problems.append(f"d{name} of an ignored row is not 0")
        if outputs.statistics is not None:
            self._check_statistics(outputs.statistics, ours, errors, problems)
        if implementation.role == "yardstick":
            self.yardstick = errors
        return Accuracy(errors, problems[0] if problems else None)

    def _allowed(self, name: str, ours: bool) -> float:
        eps = torch.finfo(self.dtype).eps
        coarse = math.expm1(min(eps * (4 + 2 * self.magnitude), 40))
        if not ours:
            return coarse
        eager_error = self.yardstick.get(name if name == "loss" else f"d{name}", math.inf)
        if self.dtype == torch.float32:
            of_rows = eps / 2 * (4 * (1 + math.log(len(self.heads.w_base))) + 4)
            return max(of_rows, 2 * eager_error if math.isfinite(eager_error) else 0.0)
        is_summed_over_rows = name in ("w_base", "w_aux", "a")
        return min(coarse, 1.5 * eager_error if is_summed_over_rows else eager_error + eps / 4)

    def _check_statistics(self, statistics, ours: bool, errors: dict, problems: list) -> None:
        h_base, h_aux = self._hidden(self.sample)
        z_base = h_base @ self.heads.w_base.double().T
        z_aux = self.heads.scale * (h_aux @ self.heads.w_aux.double().T)
        target = self.heads.target[self.sample]

        def rows():
            for i, row in enumerate(self.sample.tolist()):
                one = slice(i, i + 1)
                yield row, terms(z_base[one], z_aux[one], target[one]), terms(z_base[one], None, target[one])

        is_half = self.dtype != torch.float32
        tolerance = torch.finfo(self.dtype).eps * (64 if not ours else 2 if is_half else 16)
        check_statistics(statistics, rows(), tolerance, errors, problems)
        if ours:
            # two routes to an expectation round alike, and which has the larger worst case is chance
            allowed = 2 * self.yardstick.get("statistics", math.inf) + torch.finfo(self.dtype).eps
            if not errors["statistics"] <= allowed:
                problems.append(f"statistics error {errors['statistics']:.2g} above twice eager's, {allowed:.2g}")


def _float64_zeros(values: Tensor) -> Tensor:
    return torch.zeros(values.shape, dtype=torch.float64, device=values.device)
