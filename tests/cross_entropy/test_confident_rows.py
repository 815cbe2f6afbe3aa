"""Rows whose target has almost all the probability: loss and true-class gradient keep four digits in float32.

Elsewhere the gradient of such rows has been wrong by 2, 20 and 100 % at p = 0.9, 0.99 and 0.999 (it was rounded to bf16
before 1 was subtracted), and the loss exactly 0 (1 - 1e-12 is 1 in float32). Plain float32 torch cannot do this either,
so these are promises of the fused implementations; the reference keeps them in float64.
"""

import pytest
import torch
from confident_rows import RESTS, confident_problem, true_class_errors
from inputs import confident_row, split_in_two
from oracle import Case, Softmax, Term, check, expected

from auxkernels import Logits, aux_cross_entropy, logit_stats

OFFSETS = [0.0, 30.0, -300.0, 1000.0]
WIDTHS = [2, 33, 1025, 8300]  # one other class, one vector and a tail, several trips, three blocks of 4096


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("vocab_size", WIDTHS)
def test_loss_and_true_class_gradient_of_confident_rows_are_accurate(fused, vocab_size, offset):
    case = Case(*confident_problem(vocab_size, offset, fused.device), {"reduction": "none"})
    upstream = torch.linspace(0.3, 3, len(RESTS), device=fused.device)
    got = case.run(fused.backend, upstream)
    want = expected(case, upstream, confident=True)["loss"][0]
    assert want.min() < 2e-12 and want.max() > 0.09  # the rows are as confident as this file claims
    assert ((got["loss"].double() - want) / want).abs().max() < 1e-4
    assert true_class_errors(case, got, upstream).max() < 1e-4


REDUCED = [
    {"reduction": "sum"},
    {"reduction": "mean"},  # a divisor of 6, which no float holds the inverse of
    {"reduction": "mean", "normalizer": 7},
    {"reduction": "mean", "recompute": True},
    {"reduction": "sum", "label_smoothing": 1e-15},  # smoothing's term is there and does not matter
    {"reduction": "sum", "z_loss": 1e-18},
]


@pytest.mark.parametrize("options", REDUCED, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("vocab_size", WIDTHS)
def test_reduced_losses_keep_the_true_class_gradient_accurate(fused, vocab_size, options):
    case = Case(*confident_problem(vocab_size, 30.0, fused.device), options)
    upstream = torch.tensor(0.7, device=fused.device)
    got = case.run(fused.backend, upstream)
    assert true_class_errors(case, got, upstream).max() < 1e-4


@pytest.mark.parametrize("rest", [*RESTS, 1e-16, 1e-24])  # the last two are log1p's: 1 + 1e-16 is 1 in float64 too
def test_the_loss_of_one_confident_row_is_accurate_in_every_reduction(fused, rest):
    base, aux = split_in_two(confident_row(300, 17, rest, 5.0), fused.device)
    target = torch.tensor(17, device=fused.device)
    want = expected(Case(base, aux, target), confident=True)["loss"][0]
    for reduction in ("mean", "sum", "none"):
        got = aux_cross_entropy(base, aux, target, reduction=reduction, backend=fused.backend)
        assert abs(float(got) / float(want) - 1) < 1e-4


@pytest.mark.parametrize("place", [0, 15, 16, 4095, 4096, 8299])  # first, ends of vectors and of blocks, last
def test_the_place_of_the_target_does_not_matter(fused, place):
    case = Case(*confident_problem(8300, 0.0, fused.device, place), {"reduction": "sum"})
    assert true_class_errors(case, case.run(fused.backend)).max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_half_gradient_is_rounded_after_the_subtraction(fused, dtype, reduction):
    """Logits that a half holds exactly; the error is then one rounding of the result, never a lost difference."""
    base = torch.zeros(4, 64, dtype=dtype, device=fused.device)
    aux = torch.full_like(base, -1.0)
    aux[:, 3] = torch.tensor([4.0, 6.0, 8.0, 12.0], dtype=dtype)
    target = torch.full((4,), 3, device=fused.device)
    case = Case(base, aux.requires_grad_(), target, {"reduction": reduction})
    upstream = torch.ones(4, device=fused.device) if reduction == "none" else None
    got = check(case, fused, upstream)
    assert true_class_errors(case, got, upstream).max() <= torch.finfo(dtype).eps


def test_smoothing_and_weights_do_not_spoil_the_loss_of_a_confident_row(fused):
    base, aux, target = confident_problem(33, 0.0, fused.device)
    options = {"reduction": "none", "weight": torch.rand(33, device=fused.device) + 0.5, "z_loss": 1e-4}
    for smoothing in (0.0, 1e-3):
        case = Case(base, aux, target, options | {"label_smoothing": smoothing})
        check(case, fused, torch.rand(len(RESTS), device=fused.device))


@pytest.mark.parametrize("vocab_size", WIDTHS)
def test_statistics_of_confident_rows_are_accurate(fused, vocab_size):
    """log_prob to four digits; the entropy of a distribution that is almost one point is small, and not negative."""
    base, aux, target = confident_problem(vocab_size, 100.0, fused.device)
    stats = logit_stats(base, aux, target, backend=fused.backend)
    want = -expected(Case(base, aux, target, {"reduction": "none"}), confident=True)["loss"][0]
    assert ((stats.log_prob.double() - want) / want).abs().max() < 1e-4
    eps = torch.finfo(torch.float32).eps
    softmax = Softmax([Term(None, 1.0, base.double() + aux.detach().double(), 1.0, 1)], eps)
    exact = (softmax.log_d - softmax.mean).squeeze(-1)
    allowed = (4 * eps * (1 + softmax.log_d) + softmax.mean_error).squeeze(-1)
    assert ((stats.entropy.double() - exact).abs() <= allowed).all()


def test_a_confident_row_through_scale_and_softcap(fused):
    row = confident_row(200, 9, 1e-5, 0.0).float().to(fused.device)
    base, target = torch.zeros(1, 200, device=fused.device), torch.tensor([9], device=fused.device)
    values = (row / 2).clamp(-20, 20).unsqueeze(0).requires_grad_()
    scale = torch.tensor(2.0, device=fused.device, requires_grad=True)
    check(Case(base, Logits(values, scale=scale, softcap=60.0), target), fused)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_the_reference_is_as_accurate_in_float64(doubles, offset):
    base, aux, target = confident_problem(1025, 0.0, doubles.device)
    base = base.double() + offset
    case = Case(base, aux.detach().double().requires_grad_(), target, {"reduction": "none"})
    upstream = torch.ones(len(RESTS), dtype=torch.float64, device=doubles.device)
    got = case.run(doubles.backend, upstream)
    want = expected(case, upstream, confident=True)["loss"][0]
    moderate = torch.tensor(RESTS) >= 1e-9
    assert ((got["loss"] - want) / want).abs()[moderate].max() < 1e-4
    assert true_class_errors(case, got, upstream)[moderate].max() < 1e-4
