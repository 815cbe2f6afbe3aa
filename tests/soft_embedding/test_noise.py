"""Gumbel noise: the published numbers of Philox, the same for every tiling, device and pass, and a true Gumbel."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from inputs import logits
from soft_oracle import F32, F64, Case, check, cut_lookup, expected
from tolerance import assert_alike, unit
from torch.utils.checkpoint import checkpoint

from auxkernels import soft_embedding
from auxkernels.soft_embedding import noise
from auxkernels.soft_embedding.request import SoftRows

WORD = 0xFFFFFFFF
SEEDS = [0, 1, -1, 2**32, 2**63 - 1, -(2**63), 0x0123456789ABCDEF]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


# counter, key, output: the known answers that come with the generator's authors' library (philox4x32, 10 rounds)
GOLDEN = [
    ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def philox_by_hand(counter: list[int], key: list[int]) -> list[int]:
    """Python's own integers: no wrapping to get wrong."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & WORD, (a >> 32) ^ c[3] ^ k[1], a & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return c


def noise_by_hand(rows, labels, seed: int, dtype=F64) -> torch.Tensor:
    """float64 Gumbel numbers of rows and labels."""
    key = [seed & WORD, seed >> 32 & WORD]
    made = []
    for row, label in itertools.product(rows, labels):
        bits = philox_by_hand([label >> 2, row & WORD, row >> 32, 0], key)[label & 3]
        made.append(((bits >> 9) + 0.5) * 2.0**-23)
    return -(-torch.tensor(made, dtype=F64).log()).log().view(len(rows), len(labels)).to(dtype)


def of_backend(impl, num_rows: int, labels, K: int, seed, gumbel=1.0) -> torch.Tensor:
    """Noise of the rows at some of K labels as the backend adds it: all other labels are forbidden, so that the log of
    the exp-sum of scores that are zero is that label's noise."""
    scores = torch.zeros(num_rows, K, device=impl.device)
    columns = []
    for label in labels:
        mask = torch.ones(K, dtype=torch.bool, device=impl.device)
        mask[label] = False
        columns.append(largest(impl, scores, mask, seed, gumbel))
    return torch.stack(columns, 1)


def largest(impl, scores, mask, seed, gumbel):
    seed = torch.tensor(seed, device=impl.device)
    number = torch.tensor(gumbel, device=impl.device)
    table = scores.new_zeros(scores.shape[1], 1)
    arguments = ([scores, None, None, None], [0.0], None, table, None, number, seed, mask, 0, False)
    return torch.ops.auxkernels.soft_embedding(*arguments, 1, impl.backend)[1]  # the first field: max


def within_4_ulp(got: torch.Tensor, want: torch.Tensor) -> bool:
    want = want.double()
    return bool(((got.double() - want).abs() <= 4 * 2.0**-23 * want.abs().clamp(min=1.0)).all())


# -- the generator -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counter, key, output", GOLDEN)
def test_philox_gives_the_published_words(counter, key, output):
    low, high = words(key)
    given = tuple(torch.tensor([word]) for word in words(counter))
    found = noise.philox(given, torch.tensor(signed(high << 32 | low)))
    assert [word.item() for word in found] == words(output) == philox_by_hand(words(counter), words(key))


@pytest.mark.parametrize("seed", SEEDS)
def test_numbers_follow_from_seed_row_and_label(seed):
    got = noise.gumbel(5, 11, torch.tensor(seed), F64)
    assert_alike(got, noise_by_hand(range(5), range(11), seed))


def test_uniform_numbers_are_strictly_inside_zero_and_one_at_the_extremes(monkeypatch):
    """2**32 - 1 rounded to 24 bits would be 1, whose Gumbel number is infinite; 0 would be minus infinity."""
    extremes = [torch.full((3, 2), word) for word in (0, WORD, 511, WORD - 511)]
    monkeypatch.setattr(noise, "philox", lambda counter, seed: extremes)
    u = noise.uniform(3, 8, torch.tensor(0))
    assert u.dtype == F32 and (u > 0).all() and (u < 1).all()
    assert u[0, :4].tolist() == [2.0**-24, 1 - 2.0**-24, 2.0**-24, 1 - 2.0**-24]
    for dtype in (F32, F64):
        found = noise.gumbel(3, 8, torch.tensor(0), dtype)
        assert found.isfinite().all() and found.min() < -2.8 and found.max() > 16.6


def test_numbers_are_gumbel_and_uncorrelated():
    """Mean 0.5772, variance pi**2 / 6, and the distribution function in 64 bins."""
    found = noise.gumbel(500, 2000, torch.tensor(7), F64)
    count = found.numel()
    assert abs(found.mean() - 0.5772156649) < 5 * (1.6449 / count) ** 0.5
    assert abs(found.var() / 1.6449340668 - 1) < 5 * (4.4 / count) ** 0.5  # excess kurtosis 2.4
    bins = torch.histc(torch.exp(-torch.exp(-found)), 64, 0, 1)
    assert ((bins - count / 64).square() / (count / 64)).sum() < 63 + 5 * (2 * 63) ** 0.5
    centered = found - found.mean()
    for shifted in (
        centered[:, 1:] * centered[:, :-1],
        centered[1:] * centered[:-1],
        centered[:, 4:] * centered[:, :-4],
    ):
        assert abs(shifted.mean() / 1.6449) < 5 / shifted.numel() ** 0.5
    other = noise.gumbel(500, 2000, torch.tensor(8), F64)
    assert abs(((other - other.mean()) * centered).mean() / 1.6449) < 5 / count**0.5


# -- the implementations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_is_within_4_ulp_of_the_reference(fused, seed):
    got = of_backend(fused, 6, range(70), 70, seed).cpu()
    assert within_4_ulp(got, noise_by_hand(range(6), range(70), seed))
    assert within_4_ulp(got, noise.gumbel(6, 70, torch.tensor(seed), F64))


def test_noise_is_within_4_ulp_over_many_numbers(fused):
    """Both tails, and labels on both sides of every block."""
    labels = [0, 1, 3, 4, 255, 256, 257, 1023, 1024, 4095, 4096, 4097, 5001]
    got = of_backend(fused, 3000, labels, 5002, 11).cpu()
    want = noise.gumbel(3000, 5002, torch.tensor(11), F64)[:, labels]
    assert within_4_ulp(got, want) and want.max() > 8 and want.min() < -2


@pytest.mark.parametrize("scale", [0.25, 3.0])
def test_the_scale_multiplies_the_noise(fused, scale):
    got, one = (of_backend(fused, 4, range(9), 9, 5, gumbel=g) for g in (scale, 1.0))
    torch.testing.assert_close(got, one * scale, rtol=2 * unit(F32), atol=0)  # one product, rounded before or after


def test_rows_beyond_32_bits_have_numbers_of_their_own(native):
    from auxkernels.soft_embedding import native as kernels

    for first_row in (0, 2**31 - 1, 2**32 - 1, 2**40 + 3):
        for label in (0, 5):
            mask = torch.ones(7, dtype=torch.bool)
            mask[label] = False
            rows = SoftRows(torch.zeros(2, 7), F32, first_row, 1.0, torch.tensor(1.0), torch.tensor(3), mask)
            fields = {"max": torch.empty(2)}
            kernels.softmax(rows, fields, None)
            want = noise_by_hand([first_row, first_row + 1], [label], 3).squeeze(1)
            assert within_4_ulp(fields["max"], want), first_row


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_noise_is_that_of_every_instruction_set(native, name):
    class Cpu:
        backend, device = "native", "cpu"

    if name not in native.instruction_sets():
        pytest.skip(f"this processor has no {name}")
    try:
        native.set_instruction_set(name)
        got = of_backend(Cpu, 50, [0, 1, 2, 3, 4, 250, 299], 300, 99)
    finally:
        native.set_instruction_set(native.instruction_sets()[0])
    assert within_4_ulp(got, noise.gumbel(50, 300, torch.tensor(99), F64)[:, [0, 1, 2, 3, 4, 250, 299]])


def test_tiny_and_huge_bits_give_the_kernels_finite_noise(fused):
    """Rows and labels whose 23 bits are all zeros or all ones, found by search with the reference's generator."""
    u = noise.uniform(4000, 2000, torch.tensor(123))
    for place in (u.argmin().item(), u.argmax().item()):
        row, label = divmod(place, 2000)
        got = of_backend(fused, row + 1, [label], 2000, 123)[row].cpu()
        assert got.isfinite().all() and within_4_ulp(got, noise_by_hand([row], [label], 123)[0])
    assert u.min() < 2.0**-20 and u.max() > 1 - 2.0**-20


def test_noise_does_not_depend_on_chunks_rows_threads_or_strides(fused, monkeypatch):
    scores, table = logits(40, 300, device=fused.device), torch.eye(300, device=fused.device)
    options = {"gumbel": 1.0, "seed": 17, "hard": True, "backend": fused.backend}
    want = soft_embedding(scores, table, **options)
    fields = Case(scores, table, {"gumbel": 1.0, "seed": 17}).call(fused.backend)
    padded = torch.cat([scores, scores], 1)[:, :300]
    assert torch.equal(soft_embedding(padded, table, **options), want)
    assert torch.equal(soft_embedding(scores.view(5, 8, 300), table, **options).view(40, 300), want)
    assert torch.equal(soft_embedding(scores[:7], table, **options), want[:7])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(soft_embedding(scores, table, **options), want)
    finally:
        torch.set_num_threads(before)
    for num_rows in (1, 7, 16):
        cut_lookup(monkeypatch, num_rows)
        assert torch.equal(soft_embedding(scores, table, **options), want)
        for name, value in Case(scores, table, {"gumbel": 1.0, "seed": 17}).call(fused.backend).items():
            assert_alike(value, fields[name])


@pytest.mark.parametrize("choice", [{}, {"hard": True}, {"top_k": 5}, {"mask": True}], ids=str)
def test_forward_and_backward_draw_the_same_noise(impl, monkeypatch, choice):
    """The gradient is that of scores + noise: with other noise in backward it would be another softmax's."""
    cut_lookup(monkeypatch, 7)
    scores, table = logits(30, 41, device=impl.device), logits(41, 6, device=impl.device)
    options = {"temperature": 0.6} | choice
    if "mask" in choice:
        options["mask"] = torch.rand(30, 41, device=impl.device) < 0.5
    drawn = noise.gumbel(30, 41, torch.tensor(5, device=impl.device), F32)
    noisy = Case(scores.clone().requires_grad_(), table.requires_grad_(), options | {"gumbel": 1.0, "seed": 5})
    plain = Case((scores + drawn).requires_grad_(), table, options)
    upstream = plain.upstream("out", "entropy", "usage")
    got, want = noisy.run(impl.backend, upstream), plain.run(impl.backend, upstream)
    assert torch.equal(got["argmax"], want["argmax"])
    for name in want:
        assert_alike(got[name], want[name])


def test_all_backends_draw_the_same(impl):
    """The chosen labels are those of the scores with the noise added in plain torch."""
    scores = logits(200, 100, device=impl.device)
    drawn = noise.gumbel(200, 100, torch.tensor(-9, device=impl.device), F32)
    found = Case(scores, torch.eye(100, device=impl.device), {"gumbel": 1.0, "seed": -9}).call(impl.backend)["argmax"]
    assert torch.equal(found, (scores + drawn).argmax(-1))


def test_float64_scores_get_the_same_noise(doubles):
    case = Case(logits(9, 40, dtype=F64, device=doubles.device), torch.eye(40, dtype=F64, device=doubles.device))
    case.options = {"gumbel": 1.0, "seed": 12}
    check(case, doubles.backend)


# -- seeds -------------------------------------------------------------------------------------------------------------


def draw(impl, **options):
    scores, table = torch.zeros(40, 30, device=impl.device), torch.eye(30, device=impl.device)
    return soft_embedding(scores, table, gumbel=1.0, hard=True, backend=impl.backend, **options)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_int_and_a_tensor_seed_agree(impl, seed):
    given = torch.tensor(seed, device=impl.device)
    assert torch.equal(draw(impl, seed=seed), draw(impl, seed=given))
    assert torch.equal(draw(impl, seed=seed), draw(impl, seed=given.cpu()))
    assert given.item() == seed


def test_every_bit_of_the_seed_counts(impl):
    found = [draw(impl, seed=seed) for seed in (0, 1, 2**31, 2**32, 2**62, -1, -(2**63))]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(found, 2))


def test_no_seed_draws_one_from_torchs_generator(impl):
    torch.manual_seed(3)
    first, second = draw(impl), draw(impl)
    torch.manual_seed(3)
    assert torch.equal(draw(impl), first) and torch.equal(draw(impl), second) and not torch.equal(first, second)


def test_a_given_seed_and_no_noise_leave_torchs_generator_alone(impl):
    get = torch.cuda.get_rng_state if impl.device == "cuda" else torch.get_rng_state
    before = get()
    draw(impl, seed=1)
    soft_embedding(torch.zeros(2, 3, device=impl.device), torch.zeros(3, 2, device=impl.device), backend=impl.backend)
    assert torch.equal(get(), before)


@pytest.mark.usefixtures("general_path")
def test_no_noise_ignores_the_seed(impl):
    scores, table = logits(5, 7, device=impl.device), logits(7, 3, device=impl.device)
    plain = soft_embedding(scores, table, backend=impl.backend)
    assert torch.equal(soft_embedding(scores, table, gumbel=0.0, seed=4, backend=impl.backend), plain)
    assert torch.equal(soft_embedding(scores, table, gumbel=0, seed=4, backend=impl.backend), plain)
    zero = torch.zeros((), device=impl.device)
    assert torch.equal(soft_embedding(scores, table, gumbel=zero, seed=4, backend=impl.backend), plain)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("seed", [None, 7])
def test_a_checkpoint_draws_again_what_it_has_drawn(impl, use_reentrant, seed):
    scores, table = (logits(*s, device=impl.device, requires_grad=True) for s in ((12, 9), (9, 4)))

    def run(scores, table):
        return soft_embedding(scores, table, gumbel=1.0, seed=seed, backend=impl.backend).square()

    results = []
    for wrapped in (run, lambda *args: checkpoint(run, *args, use_reentrant=use_reentrant)):
        torch.manual_seed(5)
        out = wrapped(scores, table)
        results.append((out, *torch.autograd.grad(out.sum(), (scores, table))) if not use_reentrant else None)
        if use_reentrant:
            out.sum().backward()
            results[-1] = (out, scores.grad, table.grad)
            scores.grad = table.grad = None
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_a_seed_may_be_changed_after_the_call_but_not_silently(impl):
    """What backward draws from is what forward drew from, or torch says that it was changed."""
    scores, table = logits(5, 7, device=impl.device, requires_grad=True), logits(7, 3, device=impl.device)
    seed = torch.tensor(4, device=impl.device)
    out = soft_embedding(scores, table, gumbel=1.0, seed=seed, backend=impl.backend)
    (want,) = torch.autograd.grad(out.sum(), scores, retain_graph=True)
    seed.add_(1)
    try:
        (got,) = torch.autograd.grad(out.sum(), scores)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert torch.equal(got, want)


# -- F.gumbel_softmax --------------------------------------------------------------------------------------------------


def chi_square(counts: torch.Tensor, share: torch.Tensor) -> float:
    want = share * counts.sum()
    return ((counts - want).square() / want).sum().item()


@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_hard_gumbel_chooses_as_often_as_torch_does(impl, tau):
    """With probability softmax(scores), whatever the temperature. 29.9: chi-square with 9 degrees at 5e-4."""
    scores, rows = torch.linspace(-1.5, 1.5, 10), 40000
    given = scores.expand(rows, 10).to(impl.device)
    out = soft_embedding(
        given, torch.eye(10, device=impl.device), temperature=tau, hard=True, gumbel=1.0, seed=31, backend=impl.backend
    )
    assert torch.equal(out.sum(-1), torch.ones_like(out[:, 0])) and torch.equal(out.amax(-1), out.sum(-1))
    torch.manual_seed(0)
    theirs = F.gumbel_softmax(scores.expand(rows, 10), tau=tau, hard=True).sum(0).double()
    ours, share = out.sum(0).double().cpu(), torch.softmax(scores.double(), 0)
    assert chi_square(ours, share) < 29.9 and chi_square(theirs, share) < 29.9
    both = (ours + theirs) / (2 * rows)
    assert chi_square(ours, both) + chi_square(theirs, both) < 29.9


@pytest.mark.parametrize("hard", [False, True])
def test_given_the_noise_output_and_gradient_are_those_of_torch(impl, monkeypatch, hard):
    scores, table = (logits(*s, device=impl.device, requires_grad=True) for s in ((50, 33), (33, 8)))
    case = Case(scores, table, {"temperature": 0.8, "gumbel": 1.0, "seed": 77, "hard": hard})
    upstream = case.upstream()
    check(case, impl.backend, upstream)
    exponential = torch.exp(-noise.gumbel(50, 33, torch.tensor(77), F64))  # torch's noise is -log of this
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: self.copy_(exponential))
    wide = [t.detach().cpu().double().requires_grad_() for t in (scores, table)]
    out = F.gumbel_softmax(wide[0], tau=0.8, hard=hard) @ wide[1]
    want = (out, *torch.autograd.grad(out, wide, upstream["out"].cpu().double()))
    ours = expected(case, upstream)
    assert_alike([ours[name].cpu() for name in ("out", "grad values 0", "grad table")], want)


@pytest.mark.parametrize("first_row, first_label", [(0, 5), (3, 4), (2, 7), (1, 0)])
def test_a_part_of_the_noise_has_its_bits(first_row, first_label):
    whole, seed = noise.uniform(8, 20, torch.tensor(3)), torch.tensor(3)
    for num_labels in (0, 1, 3, 9):
        part = noise.uniform(4, num_labels, seed, first_row, first_label)
        assert torch.equal(part, whole[first_row : first_row + 4, first_label : first_label + num_labels])
