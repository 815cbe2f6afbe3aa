"""Float64 oracle of the row statistics, and a check of an implementation's values and gradients."""

import math

import torch
from oracle import Case, Coefficients, Rows, assert_close, expected_gradients

from auxkernels import LogitStats, logit_stats

FLOATS = ("log_prob", "base_log_prob", "lse", "entropy", "kl_to_base")


INTEGERS = ("argmax", "base_argmax", "target_rank")


def stats_of(case: Case, backend: str) -> LogitStats:
    options = {name: case.options[name] for name in ("ignore_index", "vocab_size") if name in case.options}
    return logit_stats(case.base, case.aux, case.target, backend=backend, **options)


def divergence(rows: Rows) -> torch.Tensor:
    """KL(p || q), [*, 1]: sum p (log p - log q) + q - p has no negative term, and is a series where p is all but q."""
    s, b = rows.sum, rows.base
    p, q, is_masked = s.p, b.p, s.z == -torch.inf
    d = torch.where(is_masked, 0.0, s.z) - torch.where(is_masked, 0.0, b.z) - (s.log_d - b.log_d)
    aux = sum((term.logits() for term in rows.aux_terms), torch.zeros_like(s.s))
    is_near = (aux.abs() < 0.5).all(-1, keepdim=True)
    near = torch.where(is_near, aux, 0.0)
    d = torch.where(is_near, near - torch.log1p((q * torch.expm1(near)).sum(-1, keepdim=True)), d)
    series = sum((-d) ** n / math.factorial(n) for n in range(2, 14))
    return torch.where((d.abs() < 0.1) & ~is_masked, p * series, p * d + (q - p)).sum(-1, keepdim=True)


def expected_statistics(rows: Rows) -> dict:
    """Value and tolerance of each floating statistic, the argmaxes with None."""
    s, b, eps = rows.sum, rows.base, rows.eps
    p_z_b = torch.where(s.p == 0, 0.0, b.z)
    mean_base = (s.p * p_z_b).sum(-1, keepdim=True)
    mean_base_error = (s.p * (p_z_b.abs() + mean_base.abs() + 1) * (s.p_error + b.p_error)).sum(-1, keepdim=True)
    sum_error = (s.p * s.sum_error).sum(-1, keepdim=True)
    found = {
        "log_prob": (-s.nll(rows.onehot), rows.at_target(s.loss_error)),
        "base_log_prob": (-b.nll(rows.onehot), rows.at_target(b.loss_error)),
        "lse": (s.max + s.log_d, 4 * eps * (1 + s.max.abs() + s.log_d) + sum_error),
        "entropy": (s.log_d - s.mean, 4 * eps * (1 + s.log_d) + s.mean_error),
        "kl_to_base": (
            divergence(rows),
            4 * eps * (2 + s.log_d + b.log_d) + s.mean_error + mean_base_error,
        ),
    }
    found = {k: tuple(torch.where(rows.ignored, 0.0, t).squeeze(-1) for t in v) for k, v in found.items()}
    for name, softmax in (("argmax", s), ("base_argmax", b)):
        found[name] = (torch.where(rows.ignored.squeeze(-1), -1, softmax.s.argmax(-1)), None)
    return found


def statistics_coefficients(rows: Rows, upstream: dict) -> Coefficients:
    s, b = rows.sum, rows.base
    g = {name: upstream[name].double().unsqueeze(-1) if name in upstream else 0.0 for name in FLOATS}
    mean_base = (s.p * torch.where(s.p == 0, 0.0, b.z)).sum(-1, keepdim=True)
    entropy, kl = g["entropy"], g["kl_to_base"]
    return Coefficients(
        A=g["lse"] + entropy * s.mean + kl * (mean_base - s.mean),
        A_size=abs(g["lse"]) + abs(entropy * s.mean) + abs(kl) * (mean_base.abs() + s.mean.abs()),
        A_error=(abs(entropy) + abs(kl)) * s.mean_error
        + abs(kl) * s.mean_error.maximum(mean_base.abs() * s.mean_error),
        C=kl - entropy,
        D=-kl,
        G=-g["log_prob"],
        Q_b=kl - g["base_log_prob"],
        B_b=g["base_log_prob"],
    )


def check_statistics(case: Case, impl, wanted_gradients=FLOATS) -> LogitStats:
    rows, stats = Rows(case), stats_of(case, impl.backend)
    if case.target is None:
        assert stats.target_rank is None
    else:
        assert stats.target_rank.dtype == torch.int64
        fewest, most = rows.rank_bounds()
        assert ((fewest <= stats.target_rank) & (stats.target_rank <= most)).all(), "target_rank"
    for name, (want, error) in expected_statistics(rows).items():
        if case.target is None and "log_prob" in name:
            assert getattr(stats, name) is None
        elif error is None:
            assert getattr(stats, name).dtype == torch.int64
            assert torch.equal(getattr(stats, name), want), name
        else:
            assert getattr(stats, name).dtype == rows.compute
            assert_close(name, getattr(stats, name), want, error)
    leaves = case.leaves()
    if leaves:
        # a statistic of base alone has no gradient where only aux wants one
        present = [name for name in wanted_gradients if getattr(getattr(stats, name), "requires_grad", False)]
        upstream = {name: torch.randn_like(getattr(stats, name)) for name in present}
        outputs = [getattr(stats, name) for name in present]
        grads = torch.autograd.grad(outputs, list(leaves.values()), list(upstream.values()), allow_unused=True)
        k = statistics_coefficients(rows, upstream)
        wanted = expected_gradients(case, rows, k, confident=impl.backend != "reference")
        for name, got in zip(leaves, grads, strict=True):
            got = torch.zeros_like(leaves[name]) if got is None else got
            assert_close(f"gradient of {name}", got, *wanted[name])
    return stats
