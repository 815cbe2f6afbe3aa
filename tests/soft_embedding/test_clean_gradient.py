"""A noisy choice with the gradient of the softmax without noise, and the entropy of whole rows beside top_k."""

import pytest
import torch
from inputs import head, logits
from soft_oracle import cut_lookup
from torch.autograd import forward_ad

from auxkernels import Head, Logits, logit_stats, nn, soft_embedding
from auxkernels.soft_embedding import noise

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
NOISE = {"gumbel": 1.5, "seed": 11}
CASES = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"temperature": 0.6, "top_k": 4},
    "all kept": {"top_k": 50},
    "mask": {"mask": "rows"},
    "mask top_k": {"mask": "labels", "top_k": 3},
}
STATS = ("entropy", "max_prob", "sum_squares", "usage", "row_entropy")


def options_of(name, rows, K, device):
    options = dict(CASES[name])
    if "mask" in options:
        shape = (rows, K) if options["mask"] == "rows" else (K,)
        options["mask"] = torch.rand(shape, device=device) < 0.4
    return options


def source_of(kind, rows, K, device, dtype=F32):
    """A source and its leaves."""
    if kind == "head":
        source = head(rows, vocab_size=K, width=6, bias=True, device=device, dtype=dtype)
        return source, [source.hidden, source.weight, source.bias]
    leaf = logits(rows, K, device=device, dtype=dtype, requires_grad=True)
    if kind == "sum":
        other = logits(rows, K, device=device, dtype=dtype, requires_grad=True)
        scale = torch.tensor(0.7, device=device, requires_grad=True)
        return [leaf, Logits(other, scale=scale, softcap=5.0)], [leaf, other, scale]
    return leaf, [leaf]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("kind", "tables"), [("tensor", ()), ("tensor", (2,)), ("sum", ()), ("head", (2,))])
def test_one_call_gives_the_bits_of_the_noisy_and_of_the_clean_one(impl, monkeypatch, name, kind, tables):
    cut_lookup(monkeypatch, 7)
    rows, K = 24, 23
    source, leaves = source_of(kind, rows, K, impl.device)
    table = logits(*tables, K, 5, device=impl.device, requires_grad=True)
    options = options_of(name, rows, K, impl.device) | {"hard": True, "return_stats": True, "backend": impl.backend}
    if "temperature" in options:
        options["temperature"] = (torch.rand(rows, device=impl.device) + 0.4).requires_grad_()
        leaves.append(options["temperature"])
    out, stats = soft_embedding(source, table, clean_gradient=True, **NOISE, **options)
    noisy, noisy_stats = soft_embedding(source, table, **NOISE, **options)
    clean, clean_stats = soft_embedding(source, table, **options)
    assert torch.equal(out, noisy) and torch.equal(stats.argmax, noisy_stats.argmax)
    assert not torch.equal(stats.argmax, clean_stats.argmax), "noise that changes no choice shows nothing"
    for field in STATS:
        assert torch.equal(getattr(stats, field), getattr(clean_stats, field)), field
    upstream = torch.randn_like(out)

    def slopes(mixture, of, wrt):
        total = (mixture * upstream).sum() + (of.max_prob * 3 + of.entropy).sum() - of.usage.square().sum()
        return torch.autograd.grad(total, wrt, retain_graph=True)

    for got, want in zip(slopes(out, stats, leaves), slopes(clean, clean_stats, leaves), strict=True):
        assert torch.equal(got, want) and want.abs().max() > 0
    assert torch.equal(*(slopes(*pair, [table])[0] for pair in ((out, stats), (noisy, noisy_stats))))


def test_it_is_the_straight_through_of_vector_quantisation(impl):
    """one_hot + p - p.detach() times the table, as is written where codebooks are learned, in float64."""
    scores, table = (logits(*size, device=impl.device, requires_grad=True) for size in ((40, 17), (17, 6)))
    out = soft_embedding(
        scores, table, temperature=0.5, hard=True, gumbel=0.5, clean_gradient=True, seed=3, backend=impl.backend
    )
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, (scores, table), upstream)
    s, t = (x.detach().cpu().to(F64).requires_grad_() for x in (scores, table))
    p = torch.softmax(s / 0.5, -1)
    sample = (s / 0.5 + noise.gumbel(40, 17, torch.tensor(3), F64)).argmax(-1)  # gumbel=temperature: a sample from p
    one_hot = torch.nn.functional.one_hot(sample, 17) + p - p.detach()
    want = torch.autograd.grad(one_hot @ t, (s, t), upstream.cpu().to(F64))
    torch.testing.assert_close(out.cpu(), t[sample].to(F32))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b.to(F32), rtol=1e-5, atol=1e-5)


def test_choices_are_samples_of_the_softmax_where_the_noise_has_its_temperature(impl):
    scores = logits(1, 4, device=impl.device)
    p = torch.softmax(scores / 0.7, -1).squeeze(0)
    many = scores.expand(20000, 4)
    table = torch.eye(4, device=impl.device)
    options = {"temperature": 0.7, "hard": True, "gumbel": 0.7, "clean_gradient": True, "backend": impl.backend}
    shares = soft_embedding(many, table, seed=5, **options).mean(0)
    assert ((shares - p).abs() < 5 * (p * (1 - p) / 20000).sqrt()).all()


@pytest.mark.parametrize("top_k", [None, 3])
def test_rows_that_are_no_distribution(impl, top_k):
    scores = logits(4, 9, device=impl.device)
    scores[0], scores[1, 4], scores[2] = -torch.inf, torch.nan, torch.inf
    scores.requires_grad_()
    table = logits(9, 5, device=impl.device, requires_grad=True)
    options = {"hard": True, "return_stats": True, "top_k": top_k, "backend": impl.backend}
    out, stats = soft_embedding(scores, table, clean_gradient=True, **NOISE, **options)
    assert (out[0] == 0).all() and out[1:3].isnan().all() and out[3].isfinite().all()
    assert stats.argmax[:2].tolist() == [-1, 4] and stats.row_entropy[0] == 0 and stats.row_entropy[1].isnan()
    (of_scores,) = torch.autograd.grad(out[[0, 3]].sum(), scores, retain_graph=True)
    assert (of_scores[0] == 0).all() and of_scores[3].isfinite().all() and of_scores[1].isnan().all()


def test_no_rows(impl):
    scores = logits(0, 9, device=impl.device, requires_grad=True)
    table = logits(9, 5, device=impl.device, requires_grad=True)
    out, stats = soft_embedding(
        scores, table, hard=True, clean_gradient=True, **NOISE, top_k=2, return_stats=True, backend=impl.backend
    )
    assert out.shape == (0, 5) and stats.row_entropy.shape == (0,)
    assert [g.shape for g in torch.autograd.grad(out.sum(), (scores, table))] == [(0, 9), (9, 5)]


def test_without_noise_it_is_an_ordinary_straight_through(impl):
    scores, table = (logits(*size, device=impl.device, requires_grad=True) for size in ((6, 9), (9, 5)))
    results = []
    for options in ({}, {"clean_gradient": True}):
        out = soft_embedding(scores, table, hard=True, **options, backend=impl.backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), (scores, table))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("requires", [(True, False), (False, True), (False, False)])
def test_only_required_gradients_are_made(impl, requires):
    scores, table = (
        logits(*size, device=impl.device).requires_grad_(need)
        for size, need in zip(((6, 9), (9, 5)), requires, strict=True)
    )
    options = {"hard": True, "clean_gradient": True, "backend": impl.backend}
    out, stats = soft_embedding(scores, table, **NOISE, **options, return_stats=True)
    full = soft_embedding(scores, table, **NOISE, hard=True, backend=impl.backend)
    assert torch.equal(out, full) and out.requires_grad == any(requires)
    if any(requires):
        out.sum().backward()
    assert [t.grad is not None for t in (scores, table)] == list(requires)
    assert stats.entropy.requires_grad == requires[0] or impl.backend != "reference"


@pytest.mark.parametrize("dtype", [BF16, F64], ids=str)
def test_dtypes_are_those_of_any_call(impl, dtype):
    if impl.backend == "triton" and dtype == F64:
        pytest.skip("float64 is the CPU module's")
    scores, table = (logits(*size, dtype=dtype, device=impl.device, requires_grad=True) for size in ((6, 9), (9, 5)))
    out = soft_embedding(scores, table, hard=True, clean_gradient=True, **NOISE, backend=impl.backend)
    of_scores, of_table = torch.autograd.grad(out.sum(), (scores, table))
    assert out.dtype == of_scores.dtype == of_table.dtype == dtype


@pytest.mark.parametrize("top_k", [None, 3])
def test_compiled_equals_eager(impl, top_k):
    table = logits(9, 5, device=impl.device, requires_grad=True)

    def step(scores):
        out, stats = soft_embedding(
            scores, table, hard=True, clean_gradient=True, **NOISE, top_k=top_k, return_stats=True, backend=impl.backend
        )
        return out.square().sum() + stats.row_entropy.sum(), stats.argmax

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    scores = logits(6, 9, device=impl.device, requires_grad=True)
    results = [(*call(scores),) for call in (step, compiled)]
    grads = [torch.autograd.grad(total, (scores, table)) for total, _ in results]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*grads)


def test_a_second_differentiation_is_refused(impl):
    if impl.backend == "reference":
        pytest.skip("the reference is differentiable twice")
    scores, table = (logits(*size, device=impl.device, requires_grad=True) for size in ((6, 9), (9, 5)))
    out = soft_embedding(scores, table, hard=True, clean_gradient=True, **NOISE, backend=impl.backend)
    (grad,) = torch.autograd.grad(out.square().sum(), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(grad.square().sum(), scores)
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
        dual = forward_ad.make_dual(scores.detach(), torch.ones_like(scores))
        soft_embedding(dual, table, hard=True, clean_gradient=True, **NOISE, backend=impl.backend)


def test_a_drawn_seed_is_torchs_generators(impl):
    scores, table = logits(40, 9, device=impl.device), logits(9, 5, device=impl.device)

    def drawn():
        return soft_embedding(scores, table, hard=True, gumbel=1.0, clean_gradient=True, backend=impl.backend)

    torch.manual_seed(1)
    first, second = drawn(), drawn()
    torch.manual_seed(1)
    assert torch.equal(first, drawn()) and not torch.equal(first, second)


def test_wrong_options_are_refused(impl):
    scores, table = logits(4, 9, device=impl.device), logits(9, 5, device=impl.device)
    with pytest.raises(ValueError, match="clean_gradient needs hard=True"):
        soft_embedding(scores, table, gumbel=1.0, clean_gradient=True, backend=impl.backend)
    with pytest.raises(TypeError, match="clean_gradient must be a bool, got int"):
        soft_embedding(scores, table, hard=True, clean_gradient=1, backend=impl.backend)


def test_the_module_passes_it_on():
    module = nn.SoftEmbedding(9, 5, hard=True, gumbel=1.0, clean_gradient=True)
    assert "clean_gradient=True" in repr(module)
    scores = logits(6, 9, requires_grad=True)
    (got,) = torch.autograd.grad(module(scores, seed=3).sum(), scores)
    want = torch.autograd.grad(soft_embedding(scores, module.weight, hard=True).sum(), scores)[0]
    assert torch.equal(got, want)


# -- whole rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noisy", [False, True])
def test_row_entropy_is_that_of_all_labels(impl, noisy):
    options = {"temperature": 0.6, "backend": impl.backend, "return_stats": True, **(NOISE if noisy else {})}
    scores = logits(6, 40, device=impl.device, requires_grad=True)
    table = logits(40, 5, device=impl.device)
    _, kept = soft_embedding(scores, table, top_k=3, **options)
    _, whole = soft_embedding(scores, table, **options)
    assert (kept.row_entropy - kept.entropy > 0.1).any()
    torch.testing.assert_close(kept.row_entropy, whole.entropy)
    torch.testing.assert_close(whole.row_entropy, whole.entropy, rtol=0, atol=0)
    got, want = (torch.autograd.grad(e.square().sum(), scores)[0] for e in (kept.row_entropy, whole.entropy))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("p", [0.9, 0.97, 0.999])
def test_row_entropy_does_not_call_a_long_tail_sure(impl, p):
    rest = torch.rand(4, 999, device=impl.device, dtype=F64)
    tail = (1 - p) * rest / rest.sum(-1, keepdim=True)
    probabilities = torch.cat((torch.full((4, 1), p, device=impl.device, dtype=F64), tail), 1)
    scores, table = probabilities.log().float(), logits(1000, 4, device=impl.device)
    _, stats = soft_embedding(scores, table, top_k=10, return_stats=True, backend=impl.backend)
    exact = torch.special.entr(probabilities).sum(-1)
    torch.testing.assert_close(stats.row_entropy, exact.float())
    torch.testing.assert_close(stats.row_entropy, logit_stats(scores, None).entropy)
    assert (stats.entropy < 0.1).all() and (stats.row_entropy < 0.1).all() == (p == 0.999)


def test_row_entropy_of_a_head(impl):
    source = head(6, vocab_size=30, width=7, device=impl.device)
    table = logits(30, 5, device=impl.device)
    _, kept = soft_embedding(source, table, top_k=3, return_stats=True, backend=impl.backend)
    values = source.hidden.detach() @ source.weight.detach().T
    assert isinstance(source, Head)
    torch.testing.assert_close(kept.row_entropy, torch.special.entr(values.softmax(-1)).sum(-1), rtol=1e-4, atol=1e-5)
