"""Tokens: their distribution, what they follow from, rows that are no distribution, statistics."""

import pytest
import torch
import torch.nn.functional as F

from auxkernels import Head, Logits, sample_logits
from auxkernels.sampling import arithmetic
from auxkernels.soft_embedding import noise

F64 = torch.float64


def draws(impl, s, num_draws, at_once=5000, **options):
    """Tokens of one row [V], at as many positions."""
    rows = s.to(impl.device).expand(at_once, -1)
    found = []
    for start in range(0, num_draws, at_once):
        positions = torch.arange(start, start + at_once, device=impl.device)
        found.append(sample_logits(rows, position=positions, backend=impl.backend, **options))
    return torch.cat(found).cpu()


def chi_square(tokens, p):
    """The statistic and its degrees of freedom; p float64 [V], classes of fewer than 5 expected draws in one cell."""
    expected, observed = p * len(tokens), torch.bincount(tokens, minlength=len(p)).double()
    assert (observed[p == 0] == 0).all()
    is_rare = expected < 5
    cells = [(expected[~is_rare], observed[~is_rare])]
    if expected[is_rare].sum() > 0:
        cells.append((expected[is_rare].sum().view(1), observed[is_rare].sum().view(1)))
    expected, observed = (torch.cat(parts) for parts in zip(*cells, strict=True))
    return ((observed - expected) ** 2 / expected).sum().item(), len(expected) - 1


def is_within_five_sigma(statistic, freedom):
    """By Wilson and Hilferty's cube root, which is normal: one in 3.5 million falls outside of 5 sigma."""
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    return z < 5


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"temperature": 1.7, "top_k": 40}, {"top_p": 0.8}, {"min_p": 0.05, "temperature": 1.3}],
    ids=str,
)
def test_draws_have_the_filtered_distribution(impl, options):
    s = torch.randn(60, generator=torch.Generator().manual_seed(1)) * 2
    tokens = draws(impl, s, 100_000, seed=11, **options)
    scores = s.double() / options.get("temperature", 1.0)
    if "top_k" in options:
        scores = scores.masked_fill(scores < scores.topk(options["top_k"]).values[-1], -torch.inf)
    p, places = scores.softmax(-1).sort(descending=True)
    is_kept = torch.ones(60, dtype=torch.bool)
    is_kept[places] = (p.cumsum(0) - p < options.get("top_p", 1.1)) & (p >= options.get("min_p", 0) * p[0])
    p = scores.masked_fill(~is_kept, -torch.inf).softmax(-1)
    assert is_within_five_sigma(*chi_square(tokens, p))


def test_the_test_of_the_distribution_can_fail():
    p = torch.full((60,), 1 / 60, dtype=F64)
    tokens = torch.multinomial(p, 100_000, replacement=True)
    assert is_within_five_sigma(*chi_square(tokens, p))
    p[0] *= 1.3
    assert not is_within_five_sigma(*chi_square(tokens, p / p.sum()))


def test_the_noise_is_that_of_the_lookups_generator(impl):
    """The token is the largest of scores and noise, computed here by torch's own logarithms."""
    s = torch.randn(50, 333, device=impl.device)
    position, seed = torch.arange(50) + 2**33, torch.arange(50) * 10**15 - 7
    bits = noise.random_bits(position, 333, seed.unsqueeze(1))
    u = (bits.double() + 0.5) / 2**32
    want = (s.cpu().double() / 0.7 - (-u.log()).log()).argmax(-1)
    on_device = {"position": position.to(impl.device), "seed": seed.to(impl.device)}
    assert torch.equal(sample_logits(s, temperature=0.7, backend=impl.backend, **on_device).cpu(), want)


def test_the_words_are_those_of_the_lookups():
    uniform = noise.uniform(5, 37, torch.tensor(12))
    bits = noise.random_bits(torch.arange(5), 37, torch.tensor(12))
    assert torch.equal(uniform, ((bits >> 9).float() + 0.5) * 2.0**-23)


def test_a_row_does_not_depend_on_its_place(impl):
    base = torch.randn(9, 500, dtype=torch.bfloat16, device=impl.device)
    aux = torch.randn(9, 500, device=impl.device)
    options = {"seed": torch.arange(9) + 100, "position": torch.arange(9) * 3, "temperature": torch.rand(9) + 0.2}
    options |= {"top_k": torch.arange(9) * 20, "top_p": torch.rand(9)}
    options = {name: values.to(impl.device) for name, values in options.items()}
    whole, stats = sample_logits(base, aux, backend=impl.backend, return_stats=True, **options)
    for order in (torch.randperm(9), torch.tensor([4]), torch.tensor([8, 2, 2])):
        order = order.to(impl.device)
        of_some = {name: values[order] for name, values in options.items()}
        token, some = sample_logits(base[order], aux[order], backend=impl.backend, return_stats=True, **of_some)
        assert torch.equal(token, whole[order])
        for name, values in vars(some).items():
            assert torch.equal(values, vars(stats)[name][order]), name


def test_rows_of_one_seed_differ_by_their_number_where_no_position_is_given(impl):
    s = torch.zeros(64, 1000, device=impl.device)
    tokens = sample_logits(s, seed=1, backend=impl.backend)
    positions = torch.arange(64, device=impl.device)
    assert len(tokens.unique()) > 50
    assert torch.equal(tokens, sample_logits(s, seed=1, position=positions, backend=impl.backend))
    assert torch.equal(tokens.view(4, 16), sample_logits(s.view(4, 16, 1000), seed=1, backend=impl.backend))


def test_without_a_seed_torchs_generator_says_it(impl):
    s = torch.zeros(8, 1000, device=impl.device)
    torch.manual_seed(3)
    one, other = (sample_logits(s, backend=impl.backend) for _ in range(2))
    torch.manual_seed(3)
    again = sample_logits(s, backend=impl.backend)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_greedy_is_the_argmax(impl):
    s = torch.randn(20, 300, device=impl.device).bfloat16()  # ties
    s[0, :] = 1.0
    assert torch.equal(sample_logits(s, temperature=0, backend=impl.backend), s.float().argmax(-1))
    token, stats = sample_logits(s, temperature=0, top_k=3, top_p=0.1, return_stats=True, backend=impl.backend)
    assert torch.equal(token, s.float().argmax(-1))
    assert (stats.num_kept == 1).all()
    assert (stats.kept_log_prob == 0).all()
    want = s.double().log_softmax(-1).gather(-1, token.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(stats.log_prob.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40, 1e-4])
def test_a_tiny_temperature_leaves_the_largest(impl, temperature):
    s = torch.randn(20, 300, device=impl.device)
    options = {"temperature": temperature, "seed": 1, "backend": impl.backend}
    assert torch.equal(sample_logits(s, **options), s.argmax(-1))
    assert torch.equal(sample_logits(s, top_p=0.9, top_k=4, min_p=0.1, **options), s.argmax(-1))


@pytest.mark.parametrize("size, temperature", [(1e38, 1e308), (1e38, 1e37), (1e-44, 1e-300), (1e-44, 1e-44)])
def test_statistics_are_finite_at_every_size_of_logits_and_temperature(impl, size, temperature):
    s = (torch.randn(3, 50, dtype=torch.float64) * size).clamp(-3e38, 3e38).float()
    found = sample_logits(s, temperature=temperature, seed=3, return_stats=True, backend=impl.backend)[1]
    want = sample_logits(s, temperature=temperature, seed=3, return_stats=True, backend="reference")[1]
    for name in ("log_prob", "kept_log_prob"):
        torch.testing.assert_close(getattr(found, name), getattr(want, name), rtol=1e-4, atol=1e-4)
        assert getattr(found, name).isfinite().all()


def test_a_huge_temperature_makes_all_alike(impl):
    s = torch.randn(50) * 5
    tokens = draws(impl, s, 20_000, seed=1, temperature=1e300)
    assert is_within_five_sigma(*chi_square(tokens, torch.full((50,), 1 / 50, dtype=F64)))


def test_statistics_are_those_of_the_distributions(impl):
    base, aux = (torch.randn(30, 200, device=impl.device) * 3 for _ in range(2))
    options = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "plausibility": 1e-3}
    token, stats = sample_logits(base, aux, seed=2, return_stats=True, backend=impl.backend, **options)
    s, z = (base + aux).double() / 0.8, base.double()
    picked = token.unsqueeze(-1)
    want = s.log_softmax(-1).gather(-1, picked).squeeze(-1)
    torch.testing.assert_close(stats.log_prob.double(), want, rtol=2e-6, atol=2e-6)
    assert torch.equal(stats.base_rank, (z > z.gather(-1, picked)).sum(-1))
    # the kept ones are the num_kept largest of what is plausible
    allowed = s.masked_fill(z - z.amax(-1, keepdim=True) < torch.tensor(1e-3).double().log(), -torch.inf)
    ordered = allowed.sort(-1, descending=True).values
    smallest = ordered.gather(-1, stats.num_kept.unsqueeze(-1) - 1)
    kept = allowed.masked_fill(allowed < smallest, -torch.inf)
    want = kept.log_softmax(-1).gather(-1, picked).squeeze(-1)
    torch.testing.assert_close(stats.kept_log_prob.double(), want, rtol=2e-6, atol=2e-6)
    assert (stats.num_kept <= 20).all()


def test_statistics_of_float64_are_exact(doubles):
    s = torch.randn(10, 100, dtype=F64, device=doubles.device) * 5
    token, stats = sample_logits(s, top_p=0.9, seed=1, return_stats=True, backend=doubles.backend)
    assert stats.log_prob.dtype == F64
    want = s.log_softmax(-1).gather(-1, token.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(stats.log_prob, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 3, "top_p": 0.5, "min_p": 0.1}], ids=str)
def test_a_row_that_is_no_distribution_has_token_minus_one(impl, options):
    inf, nan = torch.inf, torch.nan
    s = torch.randn(6, 40, device=impl.device)
    s[0], s[1, 3], s[2, 39] = -inf, nan, inf
    s[3, 5:] = -inf  # fine
    base = s.clone()
    base[4], aux = -inf, torch.zeros_like(s)
    aux[5, 0] = nan
    token, stats = sample_logits(base, aux, seed=1, return_stats=True, backend=impl.backend, **options)
    is_none = torch.tensor([True, True, True, False, True, True])
    assert torch.equal(token.cpu() == -1, is_none)
    assert 0 <= token[3] < 5
    assert torch.equal(stats.log_prob.isnan().cpu(), is_none)
    assert torch.equal(stats.kept_log_prob.isnan().cpu(), is_none)
    assert torch.equal((stats.num_kept == 0).cpu(), is_none)
    assert torch.equal((stats.base_rank == -1).cpu(), is_none)


def test_a_row_whose_plausible_classes_are_masked_has_none(impl):
    base, aux = torch.zeros(1, 9, device=impl.device), torch.zeros(1, 9, device=impl.device)
    base[0, 4], aux[0, 4] = 5.0, -torch.inf
    assert sample_logits(base, aux, plausibility=0.5, seed=1, backend=impl.backend).item() == -1
    assert sample_logits(base, aux, seed=1, backend=impl.backend).item() not in (-1, 4)


def test_sources_are_those_of_the_other_operators(impl):
    hidden, weight = torch.randn(2, 5, 8, device=impl.device), torch.randn(60, 8, device=impl.device)
    bias, scale = torch.randn(60, device=impl.device), torch.rand(2, 5, device=impl.device)
    base = [torch.randn(2, 5, 64, device=impl.device), Logits(torch.randn(2, 5, 61, device=impl.device), scale=-0.5)]
    aux = [Head(hidden, weight, bias=bias, scale=scale), Logits(torch.randn(2, 5, 60, device=impl.device), softcap=2.0)]
    s = base[0][..., :60] - 0.5 * base[1].values[..., :60]
    s = s + F.linear(hidden, weight, bias) * scale.unsqueeze(-1) + 2 * torch.tanh(aux[1].values / 2)
    options = {"vocab_size": 60, "temperature": 0.9, "top_k": 12, "seed": 4, "backend": impl.backend}
    assert torch.equal(sample_logits(base, aux, **options), sample_logits(s, **options))
    assert torch.equal(sample_logits(base, aux, **options | {"temperature": 0}), s.argmax(-1))


def test_rows_may_lie_anywhere_and_require_gradients(impl):
    wide = torch.randn(3, 4, 2, 120, device=impl.device)
    base = wide[..., :100].transpose(0, 1)
    aux = torch.randn(4, 3, 2, 100, device=impl.device, requires_grad=True)
    token = sample_logits(base, aux, seed=1, top_k=9, backend=impl.backend)
    assert token.shape == (4, 3, 2) and token.dtype == torch.int64 and not token.requires_grad
    assert torch.equal(token, sample_logits(base.contiguous(), aux.detach(), seed=1, top_k=9, backend=impl.backend))


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (7,), (1, 1)])
def test_shapes_of_no_rows_and_of_one_class(impl, shape):
    token, stats = sample_logits(torch.randn(shape, device=impl.device), return_stats=True, backend=impl.backend)
    assert token.shape == shape[:-1]
    assert all(values.shape == shape[:-1] for values in vars(stats).values())
    if shape == (1, 1):
        assert token.item() == 0


def test_inputs_are_not_written(impl):
    given = [torch.randn(4, 50, device=impl.device), torch.randn(4, 50, device=impl.device)]
    before = [t.clone() for t in given]
    sample_logits(*given, top_k=5, top_p=0.9, seed=1, backend=impl.backend)
    assert all(map(torch.equal, given, before))


def test_the_fixed_logarithm_and_exponential_are_accurate():
    x = torch.rand(100_000, dtype=F64, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, 1 - x * 1e-9, x * 1e-9, 1 + x, 23 * x, torch.tensor([1.0, 2.0**-33], dtype=F64)])
    found, want = arithmetic.log(x), x.log()
    assert ((found - want).abs() <= 2 * 2.0**-52 * want.abs()).all()
    assert arithmetic.log_of_probability(torch.tensor([0.0, 1.0, 1e-320], dtype=F64)).tolist() == [
        -torch.inf,
        0.0,
        -torch.inf,
    ]
    x = -87 * torch.rand(100_000)
    found, want = arithmetic.exp(x).double(), x.double().exp()
    assert ((found - want).abs() <= 2.0**-24 * (2 + x.abs()) * want).all()
    assert arithmetic.exp(torch.tensor([0.0, -torch.inf, -100.0])).tolist() == [1.0, 0.0, 0.0]
