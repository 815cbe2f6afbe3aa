"""bfloat16 heads on CPU: products of bfloat16 where the processor has them, of float32 where it has not."""

import pytest
import torch

from auxkernels import Head, aux_cross_entropies, aux_cross_entropy, soft_embedding
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
