"""bfloat16 heads on CPU: products of bfloat16, or of float32 without instructions for them; targets' exact logits."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from auxkernels import Head, aux_cross_entropies, aux_cross_entropy, logit_stats, soft_embedding
from auxkernels.heads import products

BF16, F32 = torch.bfloat16, torch.float32
N, V = 300, 97


@pytest.fixture
def without(monkeypatch):
    """As on a processor that has no instructions for bfloat16, and with parts of a weight of a few rows."""
    monkeypatch.setattr(products, "has_bfloat16", lambda: False)
    monkeypatch.setattr(products, "CONVERTED_AT_ONCE", 200)


def problem(dtype=BF16):
    made = torch.Generator().manual_seed(3)
    hidden, other = (torch.randn(N, width, generator=made).to(BF16).to(dtype) for width in (24, 8))
    weights = [(torch.randn(V, width, generator=made) / 3).to(BF16).to(dtype) for width in (24, 8)]
    bias = torch.randn(V, generator=made).to(BF16).to(dtype)
    leaves = [t.requires_grad_() for t in (hidden, weights[0], other, weights[1], bias)]
    return leaves, torch.randint(V, (N,), generator=made)


def results(leaves, target, **options):
    h, w, g, u, b = leaves
    loss = aux_cross_entropy(Head(h, w), Head(g, u, bias=b, scale=0.5), target, backend="native", **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaves)


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"reduction": "none"}], ids=str)
def test_without_instructions_results_are_those_of_float32_copies(without, options):
    loss, grads = results(*problem(), **options)
    want, exact = results(*problem(F32), **options)
    # products in parts are added up in another order
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-6)
    for got, other in zip(grads, exact, strict=True):
        assert got.dtype == BF16
        # rounded once to the nearest, or to its neighbour where float32's roundings decide
        torch.testing.assert_close(got.float(), other, rtol=torch.finfo(BF16).eps, atol=1e-7)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_a_weight_is_never_converted_as_a_whole(without, dtype, monkeypatch):
    monkeypatch.setattr(products, "CONVERTED_AT_ONCE", 240)
    sizes, multiply = [], products._multiply

    def seen(a, b, *args):
        sizes.append(b.numel())
        return multiply(a, b, *args)

    monkeypatch.setattr(products, "_multiply", seen)
    hidden = torch.randn(N, 24, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, 24, dtype=dtype)
    aux_cross_entropy(Head(hidden, weight), None, torch.randint(V, (N,)), backend="native").backward()
    assert max(sizes) <= 240 and sum(sizes) == 2 * weight.numel()


def test_autocast_rounds_to_bfloat16_on_every_processor(without):
    leaves, target = problem(F32)
    wide = [t.detach() * (1 + 1e-3) for t in leaves]  # which bfloat16 does not hold
    h, w, g, u, b = wide
    with torch.autocast("cpu", BF16):
        loss = aux_cross_entropy(Head(h, w), Head(g, u, bias=b), target, backend="native")
    h, w, g, u, b = (t.to(BF16) for t in wide)
    assert torch.equal(loss, aux_cross_entropy(Head(h, w), Head(g, u, bias=b), target, backend="native"))


def test_heads_of_one_weight_are_added_before_their_product_unrounded(without):
    made = torch.Generator().manual_seed(4)
    h, g = (torch.randn(N, 24, generator=made).to(BF16) for _ in range(2))
    weight, target = torch.randn(V, 24, generator=made).to(BF16), torch.randint(V, (N,), generator=made)
    loss = aux_cross_entropy(Head(h, weight), Head(g, weight), target, backend="native")
    want = aux_cross_entropy(Head(h.double() + g.double(), weight.double()), None, target, backend="reference")
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)


def test_under_autocast_hidden_states_of_two_dtypes_are_not_rounded_as_their_sum(without):
    """The auxiliary's are less than a rounding of the base's: they would be lost."""
    made = torch.Generator().manual_seed(6)
    h = (30 * torch.randn(N, 24, generator=made)).to(BF16)
    g, weight = 0.02 * torch.randn(N, 24, generator=made), torch.randn(V, 24, generator=made).to(BF16)
    target = torch.randint(V, (N,), generator=made)
    with torch.autocast("cpu", BF16):
        loss = aux_cross_entropy(Head(h, weight), Head(g, weight), target, backend="native")
    total = h.double() + g.to(BF16).double()
    want = aux_cross_entropy(Head(total, weight.double()), None, target, backend="reference")
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)


def test_several_losses_have_the_bits_of_single_ones(without):
    (h, w, g, u, _), target = problem()
    heads = [Head(g, u), Head(g, u, scale=2.0)]
    losses = aux_cross_entropies(Head(h.detach(), w.detach()), heads, target, backend="native")
    for loss, aux in zip(losses, heads, strict=True):
        assert torch.equal(loss, aux_cross_entropy(Head(h.detach(), w.detach()), aux, target, backend="native"))


@pytest.mark.parametrize("top_k", [None, 5])
def test_lookups_of_bfloat16_tables_agree_with_float64(without, top_k):
    made = torch.Generator().manual_seed(5)
    scores = torch.randn(N, 40, generator=made).to(BF16).requires_grad_()
    table = torch.randn(40, 16, generator=made).to(BF16).requires_grad_()
    out = soft_embedding(scores, table, backend="native", top_k=top_k)
    exact = [t.detach().double().requires_grad_() for t in (scores, table)]
    want = soft_embedding(*exact, backend="reference", top_k=top_k)
    upstream = torch.randn(out.shape, generator=made).to(BF16)
    got = torch.autograd.grad(out, (scores, table), upstream)
    for a, b in zip((out, *got), (want, *torch.autograd.grad(want, exact, upstream.double())), strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < 2 * torch.finfo(BF16).eps


# -- the target's logit, where products are stored in bfloat16 ---------------------------------------------------------


@pytest.fixture
def rounded_products(monkeypatch):
    """As on a processor that has instructions for bfloat16."""
    monkeypatch.setattr(products, "has_bfloat16", lambda: True)


def confident_problem(num_rows=64, vocab_size=3000, widths=(256, 64)):
    """Leaves and targets; logits of up to 55, which bfloat16 rounds by up to 1/8, lead by 25."""
    made = torch.Generator().manual_seed(11)
    target = torch.randint(vocab_size, (num_rows,), generator=made)
    leaves = []
    for width in widths:
        weight = (torch.randn(vocab_size, width, generator=made) / width**0.5).to(BF16)
        towards = weight.float()[target]
        hidden = 3 * torch.randn(num_rows, width, generator=made) + 30 * towards / towards.norm(dim=1, keepdim=True)
        leaves += [hidden.to(BF16).requires_grad_(), weight.requires_grad_()]
    bias = torch.randn(vocab_size, generator=made).to(BF16).requires_grad_()
    return [*leaves, bias], target


def heads_of(leaves):
    h, w, g, u, b = leaves
    return Head(h, w), Head(g, u, bias=b, scale=0.5)


class Expected(NamedTuple):
    """In float64: rows' losses [N], and the gradients of their mean."""

    nll: torch.Tensor
    grads: list[torch.Tensor]


def expected(leaves, target, rounds_others=False, rounds_target=False) -> Expected:
    """Of logits whose products have been rounded to bfloat16, or have not: at the target, and at the other columns."""
    h, w, g, u, b = (t.detach().double() for t in leaves)

    def logits_of(rounds):
        parts = h @ w.T, g @ u.T + b
        return sum(scale * (z.to(BF16).double() if rounds else z) for scale, z in zip((1, 0.5), parts, strict=True))

    at_target = F.one_hot(target, len(w)).bool()
    s = torch.where(at_target, logits_of(rounds_target), logits_of(rounds_others))
    rest = s.masked_fill(at_target, -torch.inf).logsumexp(1) - s[at_target]
    ds = (s - s.logsumexp(1, keepdim=True)).exp().masked_fill(at_target, 0)
    ds = torch.where(at_target, -ds.sum(1, keepdim=True), ds) / len(target)
    return Expected(rest.exp().log1p(), [ds @ w, ds.T @ h, 0.5 * ds @ u, 0.5 * ds.T @ g, 0.5 * ds.sum(0)])


def errors(got, want):
    return [((one.double() - other).norm() / other.norm()).item() for one, other in zip(got, want, strict=True)]


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"reduction": "none"}, {"z_loss": 1e-12}], ids=str)
def test_gradients_of_confident_rows_are_those_of_their_targets_exact_logit(rounded_products, options):
    leaves, target = confident_problem()
    loss = aux_cross_entropy(*heads_of(leaves), target, backend="native", **options)
    grads = torch.autograd.grad(loss.sum() / (len(target) if loss.dim() else 1), leaves)
    # the logits' gradient is rounded to bfloat16, and so is each result: by half an eps of it at most. At the other
    # columns a product may be rounded to either neighbour, as it is summed in another order
    want, eps = expected(leaves, target, rounds_others=True).grads, torch.finfo(BF16).eps
    assert max(errors(grads, want)) <= eps
    rounded = expected(leaves, target, rounds_others=True, rounds_target=True).grads
    assert min(errors(rounded, want)) > 2 * eps, "a rounded target would pass as well"


def test_log_probabilities_of_confident_targets_are_those_of_their_exact_logit(rounded_products):
    leaves, target = confident_problem()
    stats = logit_stats(*heads_of([t.detach() for t in leaves]), target, backend="native")
    want, rounded = (expected(leaves, target, True, rounds_target).nll for rounds_target in (False, True))
    (error,), (distance,) = errors([-stats.log_prob], [want]), errors([rounded], [want])
    assert error < 0.1 * distance
    assert torch.equal(stats.target_rank == 0, stats.argmax == target)  # both of the logits as they are stored


@pytest.mark.parametrize("kept", ["all", "some"])
def test_bad_and_ignored_targets_are_as_without_an_exact_logit(rounded_products, kept):
    leaves, target = confident_problem(num_rows=40)
    if kept == "some":
        target[::3] = -100
        leaves[0].data[0] = torch.nan
    loss, grads = results(leaves, target)
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads)
    target[5] = 3000
    with pytest.raises(IndexError, match="3000"):
        results(leaves, target)
