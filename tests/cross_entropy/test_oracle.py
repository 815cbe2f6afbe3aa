"""The oracle itself: its closed forms are those of float64 autograd, and its tolerances notice small errors."""

import pytest
import torch
import torch.nn.functional as F
from inputs import covering_pairs, logits, targets
from oracle import Case, Coefficients, Rows, assert_close, expected, expected_gradients

from auxkernels import Logits


def double_case(reduction, label_smoothing, weighted, vocab_size=33):
    base, aux = (logits(5, vocab_size, dtype=torch.float64, requires_grad=True) for _ in range(2))
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    if weighted:
        options["weight"] = torch.rand(vocab_size, dtype=torch.float64)
    return Case(base, aux, targets(5, vocab_size=vocab_size, ignored=0.2), options)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_oracle_is_float64_torch(reduction, label_smoothing, weighted):
    case = double_case(reduction, label_smoothing, weighted)
    loss = F.cross_entropy(case.base + case.aux, case.target, **case.options)
    upstream = torch.randn_like(loss)
    grads = torch.autograd.grad(loss, (case.base, case.aux), upstream)
    wanted = expected(case, upstream, confident=True)
    for name, got in zip(("loss", "base[0]", "aux[0]"), (loss, *grads), strict=True):
        torch.testing.assert_close(wanted[name][0], got.detach(), rtol=1e-13, atol=1e-15)


def test_oracle_gradients_of_scale_and_softcap_are_those_of_autograd():
    values = logits(4, 9, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.5, -1.0, 2.0, 0.1], dtype=torch.float64, requires_grad=True)
    base, target = logits(4, 9, dtype=torch.float64), targets(4, vocab_size=9)
    case = Case(base, Logits(values, scale=scale, softcap=4.0), target, {"z_loss": 0.1, "reduction": "sum"})
    s = base + scale.unsqueeze(-1) * 4 * torch.tanh(values / 4)
    loss = F.cross_entropy(s, target, reduction="sum") + 0.1 * s.logsumexp(-1).square().sum()
    grads = torch.autograd.grad(loss, (values, scale))
    wanted = expected(case, confident=True)
    for name, got in zip(("loss", "aux[0]", "scale of aux[0]"), (loss, *grads), strict=True):
        torch.testing.assert_close(wanted[name][0], got.detach(), rtol=1e-12, atol=1e-14)


def test_oracle_tolerance_of_a_float32_gradient_is_a_few_ulps():
    base, aux = logits(3, 100, scale=0.1), logits(3, 100, scale=0.1, requires_grad=True)
    case = Case(base, aux, targets(3, vocab_size=100), {"reduction": "sum"})
    want, error = expected(case, confident=True)["aux[0]"]
    assert (error / want.abs()).max() < 1e-5
    with pytest.raises(AssertionError, match=r"aux\[0\]: 1 of 300 elements out of tolerance, worst at \[2, 40\]"):
        wrong = want.clone()
        wrong[2, 40] *= 1 + 2e-5
        assert_close("aux[0]", wrong, want, error)


@pytest.mark.parametrize("got", [0.0, 1.0, torch.nan, -torch.inf])
def test_an_infinity_is_only_matched_by_itself(got):
    want = torch.tensor([torch.inf], dtype=torch.float64)
    with pytest.raises(AssertionError, match="out of tolerance"):
        assert_close("loss", torch.tensor([got]), want, torch.tensor([torch.inf], dtype=torch.float64))


def test_ignored_rows_have_no_tolerance():
    aux = logits(2, 7, requires_grad=True)
    case = Case(logits(2, 7), aux, torch.tensor([-100, 3]), {"reduction": "sum"})
    want, error = expected_gradients(case, Rows(case), Coefficients(G=torch.ones(2, 1)), confident=True)["aux[0]"]
    assert not want[0].any() and not error[0].any()
    assert want[1].all() and error[1].all()


def test_covering_pairs_holds_every_pair():
    axes = {"a": [1, 2, 3], "b": ["x", "y"], "c": [None, 0.5], "d": [True, False]}
    rows = covering_pairs(axes)
    for one in axes:
        for two in axes:
            if one != two:
                assert {(row[one], row[two]) for row in rows} == {(i, j) for i in axes[one] for j in axes[two]}
    assert len(rows) < 3 * 2 * 2 * 2
