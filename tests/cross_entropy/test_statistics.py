"""`logit_stats` and `return_stats`: values and gradients against the float64 oracle, argmaxes as torch picks them."""

from dataclasses import dataclass, fields

import pytest
import torch
from inputs import covering_pairs, label, logits, strided, targets
from oracle import Case, Rows, assert_close, check, expected
from row_statistics import FLOATS, INTEGERS, check_statistics, expected_statistics
from tolerance import assert_alike

from auxkernels import Logits, LogitStats, aux_cross_entropy, logit_stats

# -- values and gradients ----------------------------------------------------------------------------------------------

AXES = {
    "vocab_size": [65, 1, 7, 1030],
    "lead": [(5,), (2, 3), ()],
    "base_dtype": [torch.bfloat16, torch.float32, torch.float16],
    "aux_dtype": [torch.bfloat16, torch.float32, torch.float16, None],
    "target": [torch.int64, torch.int32, None],
    "ignored": [0.0, 0.4, 1.0],
    "scale": [1.0, -0.7, "tensor", "per row"],
    "softcap": [None, 6.0],
    "tail": [0, 3],
    "grads": ["both", "base", "aux", "none"],
}


def case_of(row, device):
    lead, vocab_size, sources = row["lead"], row["vocab_size"], []
    for side in ("base", "aux"):
        needs, dtype = row["grads"] in (side, "both"), row[f"{side}_dtype"]
        scale = row["scale"] if side == "aux" else 1.0
        if scale == "tensor":
            scale = torch.tensor(0.8, device=device, requires_grad=needs)
        elif scale == "per row":
            scale = torch.rand(lead, device=device).add(0.25).requires_grad_(needs)
        if dtype is None:
            sources.append(None)
            continue
        values = logits(*lead, vocab_size + row["tail"], dtype=dtype, device=device, requires_grad=needs)
        sources.append(Logits(values, scale=scale, softcap=row["softcap"]))
    target = None
    if row["target"]:
        target = targets(*lead, vocab_size=vocab_size, dtype=row["target"], device=device, ignored=row["ignored"])
    return Case(*sources, target, {"vocab_size": vocab_size})


@pytest.mark.parametrize("row", covering_pairs(AXES), ids=label)
def test_statistics_match_the_oracle(impl, row):
    check_statistics(case_of(row, impl.device), impl)


@pytest.mark.parametrize("row", covering_pairs(AXES, seed=2)[:12], ids=label)
def test_statistics_match_the_oracle_in_float64(doubles, row):
    check_statistics(case_of(row | {"base_dtype": torch.float64}, doubles.device), doubles)


@pytest.mark.parametrize("name", FLOATS)
def test_each_statistic_alone_has_its_own_gradient(impl, name):
    base, aux = (logits(4, 70, device=impl.device, requires_grad=True) for _ in range(2))
    target = targets(4, vocab_size=70, device=impl.device, ignored=0.25)
    check_statistics(Case(base, aux, target), impl, wanted_gradients=(name,))


@pytest.mark.parametrize("aux", ["tensor", None])
def test_sequences_of_sources_are_summed_in_the_statistics(impl, aux):
    base = [logits(4, 70, device=impl.device, requires_grad=True) for _ in range(2)]
    aux = [Logits(logits(4, 70, device=impl.device, requires_grad=True), scale=-0.5), base[0].detach()] if aux else None
    check_statistics(Case(base, aux, targets(4, vocab_size=70, device=impl.device, ignored=0.25)), impl)


@pytest.mark.parametrize("offset", [0.0, -1e4, 1e4])
def test_entropy_and_divergence_do_not_lose_accuracy_at_an_offset(impl, offset):
    base = (logits(4, 300, device=impl.device) + offset).round().requires_grad_()
    aux = logits(4, 300, device=impl.device, requires_grad=True)
    stats = check_statistics(Case(base, aux, targets(4, vocab_size=300, device=impl.device)), impl)
    exact = expected_statistics(Rows(Case(base, aux, None)))
    assert (stats.entropy.double() - exact["entropy"][0]).abs().max() < 1e-3  # lse - E[s] would be off by 3e-2


def test_without_aux_the_divergence_is_exactly_zero(impl):
    stats = logit_stats(logits(5, 100, device=impl.device), None, backend=impl.backend)
    assert torch.equal(stats.kl_to_base, torch.zeros(5, device=impl.device))
    assert torch.equal(stats.argmax, stats.base_argmax)


def test_minus_log_prob_is_the_loss_of_each_row(fused):
    base, aux = (logits(6, 129, device=fused.device) for _ in range(2))
    target = targets(6, vocab_size=129, device=fused.device, ignored=0.3)
    loss = aux_cross_entropy(base, aux, target, reduction="none", backend=fused.backend)
    log_prob = logit_stats(base, aux, target, backend=fused.backend).log_prob
    _, error = expected(Case(base, aux, target, {"reduction": "none"}), confident=True)["loss"]
    assert_close("loss", loss, -log_prob.double(), 2 * error)  # the passes sum in other orders


def test_views_give_the_statistics_of_their_copies(impl):
    base, aux = (logits(3, 4, 33, device=impl.device) for _ in range(2))
    views = [strided(tensor, "shifted") for tensor in (base, aux)]
    check_statistics(Case(*views, targets(3, 4, vocab_size=33, device=impl.device)), impl)


# -- infinities --------------------------------------------------------------------------------------------------------


def masked_case(device, block):
    """The sum masked through aux, which leaves base finite, or through both; gradients of both."""
    base, aux = (logits(4, 100, device=device) for _ in range(2))
    aux[:, block] = -torch.inf
    base[2:, block] = -torch.inf
    target = torch.full((4,), 50, device=device)
    return base.requires_grad_(), aux.requires_grad_(), target


@pytest.mark.parametrize("block", [slice(0, 1), slice(0, 48), slice(60, 100)], ids=["one", "first", "last"])
def test_a_masked_class_counts_zero_in_value_and_gradient(impl, block):
    base, aux, target = masked_case(impl.device, block)
    stats = logit_stats(base, aux, target, backend=impl.backend)
    keep = torch.ones(100, dtype=torch.bool, device=impl.device)
    keep[block] = False
    small = Case(base.detach()[:, keep], aux.detach()[:, keep], None)
    rows = Rows(small)
    assert_close("entropy", stats.entropy, *expected_statistics(rows)["entropy"])
    assert_close("lse", stats.lse, *expected_statistics(rows)["lse"])
    exact = Rows(Case(base.detach(), aux.detach(), target))
    assert_close("kl", stats.kl_to_base, *expected_statistics(exact)["kl_to_base"])
    total = stats.entropy.sum() + stats.kl_to_base.sum() + stats.log_prob.sum() + stats.lse.sum()
    grads = torch.autograd.grad(total, (base, aux))
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[1][:, block].any()


def test_a_base_that_masks_what_the_sum_allows_is_infinitely_far(impl):
    """Not reachable by adding: -inf in the base is -inf in the sum. With a scale of 0 it would be NaN, as in torch."""
    base, aux = (logits(2, 20, device=impl.device) for _ in range(2))
    base[0, 5] = -torch.inf
    target = torch.tensor([5, 5], device=impl.device)
    stats = logit_stats(base, aux, target, backend=impl.backend)
    assert stats.log_prob[0] == stats.base_log_prob[0] == -torch.inf and stats.target_rank[0] == 19
    assert stats.kl_to_base.isfinite().all() and stats.log_prob[1].isfinite()


@pytest.mark.parametrize("fill", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_a_distribution_is_nan_and_alone(impl, fill):
    base, aux = (logits(3, 40, device=impl.device) for _ in range(2))
    target = targets(3, vocab_size=40, device=impl.device)
    clean = logit_stats(base, aux, target, backend=impl.backend)
    base[1, 7 if fill != -torch.inf else slice(None)] = fill
    stats = logit_stats(base, aux, target, backend=impl.backend)
    for name in FLOATS:
        got = getattr(stats, name)
        assert got.isnan().tolist() == [False, True, False], name
        assert torch.equal(got[::2], getattr(clean, name)[::2]), name


# (changes of base, changes of aux) in a row of zeros -> the argmax of the sum and of the base; whether q is no
# distribution either. Every statistic of p is NaN there, and of q's log-probability where q is none
NO_DISTRIBUTIONS = {
    "all -inf by the base": ([(slice(None), -torch.inf)], [], (0, 0), True),
    "all -inf by aux": ([], [(slice(None), -torch.inf)], (0, 0), False),
    "all -inf by both": ([(slice(0, 4000), -torch.inf)], [(slice(4000, None), -torch.inf)], (0, 4000), False),
    "+inf in the base": ([(77, torch.inf)], [], (77, 77), True),
    "+inf in aux": ([], [(77, torch.inf)], (77, 0), False),
    "+inf twice": ([], [(5, torch.inf), (8000, torch.inf)], (5, 0), False),
    "+inf among -inf": ([], [(slice(None), -torch.inf), (4500, torch.inf)], (4500, 0), False),
    "NaN in the base": ([(8299, torch.nan)], [], (8299, 8299), True),
    "NaN in aux": ([], [(0, torch.nan)], (0, 0), False),
    "NaN behind +inf": ([], [(3, torch.inf), (5000, torch.nan)], (5000, 0), False),
    "inf - inf": ([(9, torch.inf)], [(9, -torch.inf)], (9, 9), True),
    "NaN among -inf": ([], [(slice(None), -torch.inf), (8298, torch.nan)], (8298, 0), False),
}


@pytest.mark.parametrize("form", ["logits", "few rows", "sequence", "differentiable", "with a loss"])
@pytest.mark.parametrize("name", NO_DISTRIBUTIONS)
def test_rows_without_a_distribution_have_one_answer_everywhere(impl, name, form):
    of_base, of_aux, argmaxes, base_is_none = NO_DISTRIBUTIONS[name]
    num_rows = 1 if form == "few rows" else 16
    base, aux = (torch.zeros(num_rows, 8300, device=impl.device) for _ in range(2))
    for tensor, changes in ((base, of_base), (aux, of_aux)):
        for place, value in changes:
            tensor[0, place] = value
    target = torch.full((num_rows,), 4100, device=impl.device)
    if form == "differentiable":
        aux.requires_grad_()
    source = [aux, torch.zeros_like(aux)] if form == "sequence" else aux
    if form == "with a loss":
        _, stats = aux_cross_entropy(base, source, target, return_stats=True, backend=impl.backend)
    else:
        stats = logit_stats(base, source, target, backend=impl.backend)
    for field in ("log_prob", "lse", "entropy", "kl_to_base"):
        assert getattr(stats, field)[0].isnan(), field
        assert getattr(stats, field)[1:].isfinite().all(), field
    assert stats.base_log_prob[0].isnan() == base_is_none
    assert (int(stats.argmax[0]), int(stats.base_argmax[0])) == argmaxes
    assert stats.target_rank.tolist() == [-1] + [0] * (num_rows - 1)


# -- argmax ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [2, 33, 129, 1025, 5000])
def test_argmax_is_the_lowest_index_of_a_tie(impl, vocab_size):
    base = torch.zeros(4, vocab_size, device=impl.device)
    aux = torch.zeros(4, vocab_size, device=impl.device)
    base[1, vocab_size // 2 :] = 1.0
    base[2, -1] = 1.0
    aux[3, vocab_size // 3 :: 2] = 2.0
    stats = logit_stats(base, aux, backend=impl.backend)
    assert stats.argmax.tolist() == [0, vocab_size // 2, vocab_size - 1, vocab_size // 3]
    assert stats.base_argmax.tolist() == [0, vocab_size // 2, vocab_size - 1, 0]


@pytest.mark.parametrize("vocab_size", [1, 2, 33, 129, 1025, 5000])
@pytest.mark.parametrize("kind", ["number", "tensor", "per row", "softcap"])
def test_a_scaled_sum_has_an_argmax_in_every_row(impl, kind, vocab_size):
    """The maximum of a pass that fuses multiply and add is not among the numbers of one that does not."""
    base, aux = (logits(100, vocab_size, device=impl.device) for _ in range(2))
    scale = {"number": -0.7, "tensor": torch.tensor(0.3), "per row": torch.rand(100), "softcap": 1.7}[kind]
    scale = scale.to(impl.device) if isinstance(scale, torch.Tensor) else scale
    cap = 3.0 if kind == "softcap" else None
    stats = logit_stats(Logits(base, scale=1.3), Logits(aux, scale=scale, softcap=cap), backend=impl.backend)
    rows = Rows(Case(Logits(base, scale=1.3), Logits(aux, scale=scale, softcap=cap), None))
    for argmax, softmax in ((stats.argmax, rows.sum), (stats.base_argmax, rows.base)):
        assert ((argmax >= 0) & (argmax < vocab_size)).all()
        off = -softmax.z.gather(-1, argmax.unsqueeze(-1))  # how far below the largest; 0 but for rounding
        assert (off <= 2 * softmax.sum_error.amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("vocab_size", [3, 33, 129, 1025, 5000])
def test_the_first_nan_wins_the_argmax(impl, vocab_size):
    base, aux = (logits(4, vocab_size, device=impl.device) for _ in range(2))
    base[0, vocab_size // 2] = torch.nan
    base[1, [1, vocab_size - 1]] = torch.nan
    aux[2, vocab_size - 1] = torch.nan
    base[2, 0] = torch.inf
    base[3, 0], aux[3, 0] = torch.inf, -torch.inf  # their sum is NaN
    stats = logit_stats(base, aux, backend=impl.backend)
    assert torch.equal(stats.argmax, (base + aux).argmax(-1))
    assert stats.argmax.tolist() == [vocab_size // 2, 1, vocab_size - 1, 0]
    assert stats.base_argmax.tolist()[:2] == [vocab_size // 2, 1] and torch.equal(stats.base_argmax, base.argmax(-1))


@pytest.mark.parametrize("fill", [-torch.inf, torch.inf])
def test_argmax_of_a_constant_row_of_infinities_is_torchs(impl, fill):
    base = torch.full((2, 70), fill, device=impl.device)
    stats = logit_stats(base, torch.zeros_like(base), backend=impl.backend)
    assert torch.equal(stats.argmax, base.argmax(-1)) and torch.equal(stats.base_argmax, base.argmax(-1))


def test_argmax_of_random_half_precision_sums_is_that_of_the_exact_sum(impl):
    base, aux = (logits(50, 300, dtype=torch.bfloat16, device=impl.device) for _ in range(2))
    stats = logit_stats(base, aux, backend=impl.backend)
    assert torch.equal(stats.argmax, (base.float() + aux.float()).argmax(-1))


# -- return_stats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_return_stats_gives_the_same_loss_and_detached_statistics(doubles, reduction, dtype, recompute):
    base = logits(2, 3, 70, dtype=dtype, device=doubles.device)
    aux = logits(2, 3, 70, dtype=dtype, device=doubles.device, requires_grad=True)
    target = targets(2, 3, vocab_size=70, device=doubles.device, ignored=0.3)
    options = {"reduction": reduction, "recompute": recompute, "backend": doubles.backend, "z_loss": 0.1}
    rows = Rows(Case(base, aux, target)).sum
    loss, stats = aux_cross_entropy(base, aux, target, return_stats=True, **options)
    plain = aux_cross_entropy(base, aux, target, **options)
    assert_alike(loss, plain)
    alone = logit_stats(base, aux, target, backend=doubles.backend)
    for name in FLOATS + INTEGERS:
        assert_alike(getattr(stats, name), getattr(alone, name).detach())
        assert not getattr(stats, name).requires_grad
        assert getattr(stats, name).shape == target.shape
    upstream = torch.rand_like(loss)
    (with_stats,), (without,) = (torch.autograd.grad(out, aux, upstream) for out in (loss, plain))
    # a confident row's log d is formed otherwise where its entropy is wanted: p is as wrong as the error model says
    spread = rows.z.abs().amax() + rows.log_d.amax() + 1
    rtol = max(torch.finfo(dtype).eps, 8 * torch.finfo(loss.dtype).eps * float(spread))
    torch.testing.assert_close(with_stats, without, rtol=rtol, atol=torch.finfo(dtype).tiny)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_return_stats_losses_match_the_oracle(impl, reduction):
    base, aux = (logits(4, 70, device=impl.device, requires_grad=True) for _ in range(2))
    target = targets(4, vocab_size=70, device=impl.device, ignored=0.25)
    case = Case(base, aux, target, {"reduction": reduction})
    check(case, impl, torch.rand(4, device=impl.device) if reduction == "none" else None)
    _, stats = aux_cross_entropy(base, aux, target, reduction=reduction, return_stats=True, backend=impl.backend)
    for name, (want, error) in expected_statistics(Rows(case)).items():
        if error is not None:
            assert_close(name, getattr(stats, name), want, error)


# -- ignored rows, and the container -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ignore_index", [-100, 3, -(2**63)])
def test_ignored_rows_hold_plus_zero_and_minus_one(impl, ignore_index):
    base, aux = (logits(4, 20, device=impl.device) for _ in range(2))
    base[1] = torch.nan
    aux[2] = torch.inf
    base, aux = base.requires_grad_(), aux.requires_grad_()
    target = torch.tensor([0, ignore_index, ignore_index, 5], device=impl.device)
    stats = logit_stats(base, aux, target, ignore_index=ignore_index, backend=impl.backend)
    for name in FLOATS:
        value = getattr(stats, name)[1:3]
        assert not value.any() and not torch.signbit(value).any(), name
    assert all(getattr(stats, name)[1:3].tolist() == [-1, -1] for name in INTEGERS)
    total = sum(getattr(stats, name).sum() for name in FLOATS)
    for grad in torch.autograd.grad(total, (base, aux)):
        assert not grad[1:3].any() and not torch.signbit(grad[1:3]).any()
        assert grad[0].any() and grad.isfinite().all()


def test_without_a_target_no_row_is_ignored_and_log_probs_are_none(impl):
    stats = logit_stats(logits(3, 20, device=impl.device), logits(3, 20, device=impl.device), backend=impl.backend)
    assert stats.log_prob is None and stats.base_log_prob is None and stats.target_rank is None
    assert stats.entropy.shape == (3,) and (stats.argmax >= 0).all()


def test_argmaxes_and_rank_are_not_differentiable_and_the_rest_is(impl):
    aux = logits(3, 20, device=impl.device, requires_grad=True)
    stats = logit_stats(logits(3, 20, device=impl.device), aux, targets(3, vocab_size=20), backend=impl.backend)
    assert all(getattr(stats, name).requires_grad for name in ("log_prob", "lse", "entropy", "kl_to_base"))
    assert not any(getattr(stats, name).requires_grad for name in INTEGERS)


def test_logit_stats_is_frozen_and_has_the_documented_fields():
    assert tuple(field.name for field in fields(LogitStats)) == (*FLOATS, *INTEGERS)

    @dataclass(frozen=True, eq=False)
    class Extended(LogitStats):  # what frozen is for: fields can be added
        more: int = 0

    stats = Extended(*[torch.zeros(1)] * 8)
    with pytest.raises(AttributeError):
        stats.lse = torch.ones(1)
