"""float64 oracle of cross_entropy on the exact input values, with the bounds that a result is held to.

The loss is a mean over all rows, so all rows are summed, a few at a time; gradients and statistics are compared on a
random sample of rows. No [N, V] tensor in float64 is ever stored.

Bounds (EPS = 2**-23, spacing of float32 at one; s the sum of the sources, m its row maximum, d = sum(exp(s - m))):
"ours" must sum, exponentiate and accumulate in float32 whatever the inputs' dtype; a baseline need only be the same
mathematics in its own arithmetic, so that a wrong baseline is not timed and a coarse one is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

from benchmarks.timing.harness import Accuracy, Implementation, Outputs
from benchmarks.timing.oracle import EPS, nan_to_inf, note

# float64 numbers worked on at once: what a CPU's caches hold, or what keeps a GPU busy (2 GiB with temporaries)
CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 25}
SAMPLED_ROWS = 64
# probabilities below this are compared as if they were this large: float32's exp underflows a little further down
PROBABILITY_FLOOR = 1e-30
FLOAT_STATISTICS = ("log_prob", "base_log_prob", "lse", "entropy", "kl_to_base")


class Terms(NamedTuple):
    """Per-row float64 quantities of [R, V] sources; every one but `s` and `exp` has shape [R, 1]."""

    s: torch.Tensor
    exp: torch.Tensor
    s_max: torch.Tensor
    s_target: torch.Tensor
    rest: torch.Tensor
    log_sum: torch.Tensor
    nll: torch.Tensor
    magnitude: torch.Tensor


def terms(base: torch.Tensor, aux: torch.Tensor | None, target: torch.Tensor) -> Terms:
    """Row terms without cancellation: the target's own exp is kept apart, so a confident row's loss is not 0."""
    s = base.double() if aux is None else base.double() + aux.double()
    index = target[:, None].long()
    s_max, s_target = s.amax(-1, keepdim=True), s.gather(1, index)
    exp = (s - s_max).exp()
    exp_target = exp.gather(1, index)
    rest = exp.scatter(1, index, 0.0).sum(-1, keepdim=True)
    log_sum = exp.scatter(1, s.argmax(-1, keepdim=True), 0.0).sum(-1, keepdim=True).log1p()  # not beside the 1
    nll = torch.where(exp_target > rest, (rest / exp_target).log1p(), log_sum - (s_target - s_max))
    return Terms(s, exp, s_max, s_target, rest, log_sum, nll, s.abs().amax(-1, keepdim=True))


class Oracle:
    """Expected results for one set of inputs; `check` remembers the yardstick's errors for the checks after it."""

    def __init__(self, base: torch.Tensor, aux: torch.Tensor, target: torch.Tensor, seed: int):
        self.base, self.aux, self.target = base, aux, target
        self.num_rows, self.num_columns = base.shape
        generator = torch.Generator().manual_seed(seed)
        self.rows = torch.randperm(self.num_rows, generator=generator)[:SAMPLED_ROWS].sort().values.tolist()
        self.loss = self.loss_bound = self.magnitude = 0.0
        self.yardstick: dict[str, float] = {}
        chunk = max(1, CHUNK_ELEMENTS[base.device.type] // self.num_columns)
        for start in range(0, self.num_rows, chunk):
            t = self._terms(slice(start, start + chunk))
            bound = 4 * EPS * (1 + (t.s_target - t.s_max).abs() + t.log_sum) + EPS * t.magnitude
            # one wait for the device, not three
            loss, loss_bound, magnitude = torch.stack((t.nll.sum(), bound.sum(), t.magnitude.max())).tolist()
            self.loss += loss / self.num_rows
            self.loss_bound += loss_bound / self.num_rows
            self.magnitude = max(self.magnitude, magnitude)
        self.loss_bound += (8 + math.sqrt(self.num_rows)) * EPS * self.loss

    def check(self, implementation: Implementation, outputs: Outputs) -> Accuracy:
        """Errors of one implementation, and the first bound it breaks."""
        ours = implementation.role == "ours"
        unit = EPS if ours else arithmetic_eps(implementation, outputs, self.base.dtype)
        errors, problems = {}, []
        if outputs.loss is not None:
            self._check_loss(outputs.loss, ours, unit, errors, problems)
        for gradient in outputs.gradients:
            self._check_gradient(gradient, ours, unit, errors, problems)
        if outputs.statistics is not None:
            self._check_statistics(outputs.statistics, 8 * unit if ours else 64 * unit, errors, problems)
        if implementation.role == "yardstick":
            self.yardstick = errors
        elif ours:
            ulp = EPS if self.base.dtype == torch.float32 else torch.finfo(self.base.dtype).eps
            for name, error in errors.items():
                # two float32 routes to one number round alike, and which has the larger worst case is chance
                factor = 2 if name == "statistics" or self.base.dtype == torch.float32 else 1
                allowed = factor * self.yardstick.get(name, math.inf) + ulp
                if not error <= allowed:
                    problems.append(f"{name} error {error:.2g} above eager's and one ulp, {allowed:.2g}")
        return Accuracy(errors, problems[0] if problems else None)

    def _terms(self, rows: slice) -> Terms:
        return terms(self.base[rows], self.aux[rows], self.target[rows])

    def _check_loss(self, loss, ours: bool, unit: float, errors: dict, problems: list) -> None:
        error = nan_to_inf(abs(loss.double().item() - self.loss))
        bound = self.loss_bound if ours else 4 * unit * (1 + self.magnitude + math.log(self.num_columns))
        note("loss", error / self.loss, error / bound, errors, problems)

    def _check_gradient(self, gradient, ours: bool, unit: float, errors: dict, problems: list) -> None:
        info = torch.finfo(gradient.dtype)
        floor = max(PROBABILITY_FLOOR / self.num_rows, info.tiny if gradient.dtype == torch.float16 else 0.0)
        worst_error = worst_excess = 0.0
        for row in self.rows:
            t, y = self._terms(slice(row, row + 1)), self.target[row].item()
            expected = t.exp[0] / t.log_sum.exp()[0]
            expected[y] = -(t.rest / t.log_sum.exp())
            expected /= self.num_rows
            difference = (gradient[row].double() - expected).abs()
            error = difference / (expected.abs() + floor)
            if ours:
                spread = (t.s_max - t.s)[0]
                # the target's gradient is made of all other exps, so the largest of them sets its relative error
                spread[y] = (t.s_max - t.s.scatter(1, self.target[row].view(1, 1).long(), -math.inf).amax()).item()
                relative = 8 * EPS * (1 + spread + t.log_sum[0]) + EPS * t.magnitude[0] + info.eps
                bound = expected.abs() * relative + floor * max(info.eps, 1e-3)
            else:
                relative = math.expm1(min(unit * (4 + 2 * t.magnitude.item() + math.log(self.num_columns)), 40))
                bound = expected.abs() * (relative + info.eps) + floor
                bound[y] += (relative + unit) / self.num_rows  # p - 1 cancels: the error is that of p, not of p - 1
            worst_error = max(worst_error, nan_to_inf(error.max().item()))
            worst_excess = max(worst_excess, nan_to_inf((difference / bound).max().item()))
        note("gradient", worst_error, worst_excess, errors, problems)

    def _check_statistics(self, statistics, tolerance: float, errors: dict, problems: list) -> None:
        def rows():
            for row in self.rows:
                only = slice(row, row + 1)
                yield row, self._terms(only), terms(self.base[only], None, self.target[only])

        check_statistics(statistics, rows(), tolerance, errors, problems)


def check_statistics(statistics, rows: Iterable, tolerance: float, errors: dict, problems: list) -> None:
    """Compares LogitStats with `rows`, each (number, Terms of the sum, Terms of the base)."""
    worst_error = worst_excess = 0.0
    for row, t, b in rows:
        bound = tolerance * (1 + t.magnitude + b.magnitude + math.log(t.s.shape[1])).item()
        for name, expected in _expected_statistics(t, b).items():
            error = nan_to_inf(abs(getattr(statistics, name)[row].double().item() - expected))
            worst_error = max(worst_error, error / max(1.0, abs(expected)))
            worst_excess = max(worst_excess, error / bound)
        # rounding makes ties, so an argmax is right if its logit is the maximum up to the rounding of a sum
        for name, source in (("argmax", t), ("base_argmax", b)):
            gap = source.s_max[0, 0] - source.s[0, getattr(statistics, name)[row]]
            if not gap.item() <= tolerance * source.magnitude.item():
                problems.append(f"{name} of row {row} is {gap.item():.2g} below the maximum")
        # and as many columns are ahead of the target as are so by more than that, or some that may be
        ahead, reach = t.s - t.s_target, tolerance * t.magnitude
        fewest, most = (ahead > reach).sum().item(), (ahead >= -reach).sum().item() - 1
        if not fewest <= statistics.target_rank[row].item() <= most:
            problems.append(f"target_rank of row {row} is not in [{fewest}, {most}]")
    note("statistics", worst_error, worst_excess, errors, problems)


def _divergence(t: Terms, b: Terms) -> torch.Tensor:
    """KL of the sum's softmax from the base's: p log(p / q) + q - p has no negative term, so that little is lost."""
    p, q = t.exp / t.log_sum.exp(), b.exp / b.log_sum.exp()
    log_ratio = torch.where(p == 0, 0.0, (t.s - t.s_max - t.log_sum) - (b.s - b.s_max - b.log_sum))
    series = sum((-log_ratio) ** n / math.factorial(n) for n in range(2, 14))
    return torch.where((log_ratio.abs() < 0.1) & (p > 0), p * series, p * log_ratio + (q - p)).sum()


def _expected_statistics(t: Terms, b: Terms) -> dict[str, float]:
    p = t.exp / t.log_sum.exp()
    mean_s = (p * (t.s - t.s_max)).sum()
    values = {
        "log_prob": -t.nll,
        "base_log_prob": -b.nll,
        "lse": t.s_max + t.log_sum,
        "entropy": t.log_sum - mean_s,
        "kl_to_base": _divergence(t, b),
    }
    return {name: value.item() for name, value in values.items()}


def arithmetic_eps(implementation: Implementation, outputs: Outputs, dtype: torch.dtype) -> float:
    """Spacing of the dtype that a baseline computes in: its own word for it, else the dtype that its loss has.

    eager keeps the inputs' dtype in its loss; an upcast one returns float32, and is then held to float32.
    """
    reported = outputs.loss if outputs.loss is not None else getattr(outputs.statistics, "lse", None)
    return torch.finfo(implementation.arithmetic or (dtype if reported is None else reported.dtype)).eps
