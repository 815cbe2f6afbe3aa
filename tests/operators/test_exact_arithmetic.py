"""The reference and the oracles against 700 digits: rows of probability up to 1 - 1e-300, divergences near 0.

A difference of nearly equal numbers (p - 1, log of p near 1, lse - s_y, log p - log q) loses in float64 too, beyond
p = 1 - 1e-11: what others are measured against must not form one.
"""

import mpmath
import pytest
import torch
from oracle import Case, Rows, expected
from row_statistics import expected_statistics

from auxkernels import aux_cross_entropy, logit_stats, soft_embedding
from benchmarks.cross_entropy.oracle import _expected_statistics, terms

F64, EPS = torch.float64, 2.0**-52
GAPS = [0.5, 5.0, 20.0, 36.7, 100.0, 300.0, 690.0]  # 1 - p from a half to 1e-299
TARGET = 2


@pytest.fixture(autouse=True)
def _digits():
    with mpmath.workdps(700):
        yield


def row(gap: float, size: float):
    """float64 base with one likely class, and an auxiliary of that size, [1, 6] each."""
    base, aux = torch.randn(6, dtype=F64), (torch.randn(6, dtype=F64) * size)
    base[TARGET] += gap
    return base.unsqueeze(0), aux.unsqueeze(0)


def exact(base, aux) -> dict:
    """Of a row, in 700 digits."""
    z = [mpmath.mpf(x) for x in base[0].tolist()]
    s = [x + mpmath.mpf(y) for x, y in zip(z, aux[0].tolist(), strict=True)]
    p, q = ([mpmath.exp(x) / sum(map(mpmath.exp, row)) for x in row] for row in (s, z))
    entropy = -sum(x * mpmath.log(x) for x in p)
    divergence = sum(x * mpmath.log(x / y) for x, y in zip(p, q, strict=True))
    return {
        "loss": -mpmath.log(p[TARGET]),
        "log_prob": mpmath.log(p[TARGET]),
        "base_log_prob": mpmath.log(q[TARGET]),
        "lse": mpmath.log(sum(map(mpmath.exp, s))),
        "entropy": entropy,
        "kl_to_base": divergence,
        "d loss": [x - (i == TARGET) for i, x in enumerate(p)],
        "d entropy": [-x * (mpmath.log(x) + entropy) for x in p],
        "d kl_to_base": [x * (mpmath.log(x / y) - divergence) for x, y in zip(p, q, strict=True)],
    }


def relative_error(got, want) -> float:
    """The largest of the numbers'."""
    wanted = want if isinstance(want, list) else [want]
    pairs = zip(torch.as_tensor(got, dtype=F64).detach().flatten().tolist(), wanted, strict=True)
    return max(float(abs(x - y) / max(abs(y), mpmath.mpf(2) ** -1000)) for x, y in pairs)


def allowed(gap: float, size: float) -> float:
    """Relative, by the error model of oracle.py: the condition of exp is the size of the logits."""
    return 64 * EPS * (8 + gap + 4 * size)


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-9])
@pytest.mark.parametrize("gap", GAPS)
def test_the_reference_is_exact_to_float64_in_confident_rows(gap, size):
    base, aux = row(gap, size)
    want, aux, target = exact(base, aux), aux.requires_grad_(), torch.tensor([TARGET])
    loss = aux_cross_entropy(base, aux, target, backend="reference")
    stats = logit_stats(base, aux, target, backend="reference")
    got = {
        "loss": loss,
        **{name: getattr(stats, name) for name in want if not name.startswith("d ") and name != "loss"},
    }
    for name in ("loss", "entropy", "kl_to_base"):
        got[f"d {name}"] = torch.autograd.grad(got[name], aux, torch.ones_like(got[name]), retain_graph=True)[0]
    for name, value in want.items():
        error = relative_error(got[name], value)
        assert error <= allowed(gap, size), f"{name}: {error:.1e}"


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-9])
@pytest.mark.parametrize("gap", GAPS)
def test_the_oracles_are_exact_to_float64_in_confident_rows(gap, size):
    base, aux = row(gap, size)
    want, aux, target = exact(base, aux), aux.requires_grad_(), torch.tensor([TARGET])
    case = Case(base, aux, target)
    found = expected(case, confident=True)
    got = {"loss": found["loss"][0], "d loss": found["aux[0]"][0]}
    got |= {name: pair[0] for name, pair in expected_statistics(Rows(case)).items() if pair[1] is not None}
    for name, value in got.items():
        error = relative_error(value, want[name])
        assert error <= allowed(gap, size), f"{name}: {error:.1e}"
    t, b = terms(base, aux.detach(), target), terms(base, None, target)
    assert relative_error(t.nll, want["loss"]) <= allowed(gap, size)
    for name, value in _expected_statistics(t, b).items():
        if name != "kl_to_base" or size == 1.0:  # held to an absolute bound, and near 0 accurate to that
            assert relative_error(value, want[name]) <= allowed(gap, size), name


@pytest.mark.parametrize("gap", GAPS)
def test_the_entropy_of_a_lookup_and_its_gradient_are_exact_to_float64(gap):
    base, aux = row(gap, 1.0)
    want, scores, table = exact(base, torch.zeros_like(aux)), base.requires_grad_(), torch.eye(6, dtype=F64)
    for backend in ("reference", "native"):
        _, stats = soft_embedding(scores, table, return_stats=True, backend=backend)
        (grad,) = torch.autograd.grad(stats.entropy, scores)
        assert relative_error(stats.entropy, want["entropy"]) <= allowed(gap, 1.0), backend
        assert relative_error(grad, want["d entropy"]) <= allowed(gap, 1.0), backend


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("noise", [{}, {"hard": True, "gumbel": 1.0, "seed": 3, "clean_gradient": True}])
def test_the_entropy_of_a_whole_row_is_exact_to_float64_where_few_labels_are_kept(gap, noise):
    base, aux = row(gap, 1.0)
    want, scores, table = exact(base, torch.zeros_like(aux)), base.requires_grad_(), torch.eye(6, dtype=F64)
    for backend in ("reference", "native"):
        _, stats = soft_embedding(scores, table, top_k=2, **noise, return_stats=True, backend=backend)
        (grad,) = torch.autograd.grad(stats.row_entropy, scores)
        assert relative_error(stats.row_entropy, want["entropy"]) <= allowed(gap, 1.0), backend
        assert relative_error(grad, want["d entropy"]) <= allowed(gap, 1.0), backend


@pytest.mark.parametrize("gap", [0.5, 20.0, 60.0])
def test_the_reference_has_second_derivatives_of_confident_rows(gap):
    """d2 loss = diag(p) - p p', whose row of the target sums up p of the others."""
    base, aux = row(gap, 1.0)
    leaf = (base + aux).requires_grad_()
    loss = aux_cross_entropy(leaf, None, torch.tensor([TARGET]), backend="reference")
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    (second,) = torch.autograd.grad(grad[0, TARGET], leaf)
    p = exact(leaf.detach(), torch.zeros_like(aux))["d loss"]
    p_y = 1 + p[TARGET]
    want = [-p[TARGET] * p_y if i == TARGET else -p_y * x for i, x in enumerate(p)]
    assert relative_error(second, want) <= allowed(gap, 1.0)
