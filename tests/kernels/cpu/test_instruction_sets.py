"""The CPU kernels for each instruction set in turn: the same tolerances, the same patterns of NaN and infinity."""

import itertools

import pytest
import torch
from inputs import WIDTHS_SMALL, confident_row, logits, split_in_two, targets
from nonfinite import OPTIONS, PATTERNS, TARGET, V, pattern, run, torch_result
from oracle import Case, check, expected

from auxkernels import Logits, aux_cross_entropy, logit_stats

NAMES = ("baseline", "avx2", "avx512", "avx512bf16")


class Cpu:
    backend, device = "native", "cpu"


@pytest.fixture(params=NAMES)
def instruction_set(request, native):
    """One instruction set, and the best one again afterwards."""
    if request.param not in native.instruction_sets():
        pytest.skip(f"this processor has no {request.param}")
    native.set_instruction_set(request.param)
    assert native.instruction_set() == request.param
    yield request.param
    native.set_instruction_set(native.instruction_sets()[0])


def test_every_processor_has_the_baseline_and_uses_its_best(native):
    assert set(native.instruction_sets()) <= set(NAMES) and "baseline" in native.instruction_sets()
    assert native.instruction_set() == native.instruction_sets()[0]


@pytest.mark.parametrize("vocab_size", [*WIDTHS_SMALL, 12289])  # and three blocks and a single class
def test_losses_and_gradients_match_the_oracle(instruction_set, vocab_size):
    for dtype, reduction in itertools.product((torch.float32, torch.bfloat16, torch.float16), ("mean", "none")):
        base, aux = (logits(3, vocab_size, dtype=dtype, requires_grad=True) for _ in range(2))
        target = targets(3, vocab_size=vocab_size, ignored=0.3)
        upstream = torch.randn(3) if reduction == "none" else None
        check(Case(base, aux, target, {"reduction": reduction}), Cpu, upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_option_matches_the_oracle(instruction_set, dtype):
    base, aux = (logits(5, 1030, dtype=dtype, requires_grad=True) for _ in range(2))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.rand(5, dtype=compute).requires_grad_()
    target = targets(5, vocab_size=1027, ignored=0.2)
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "vocab_size": 1027, "weight": torch.rand(1027, dtype=compute)}
    sources = (Logits(base, softcap=5.0), Logits(aux, scale=scale))
    for reduction in ("mean", "none"):
        upstream = torch.randn(5, dtype=compute) if reduction == "none" else None
        check(Case(*sources, target, options | {"reduction": reduction}), Cpu, upstream)


@pytest.mark.parametrize("name", PATTERNS)
def test_nonfinite_rows_have_the_pattern_of_float64_torch(instruction_set, name):
    options = OPTIONS["none"]
    base, aux = (logits(2, V, scale=1.0) for _ in range(2))
    target = torch.tensor([7, TARGET])
    PATTERNS[name](base[1], aux[1])
    loss, grad_base, grad_aux = run(base, aux, target, options, Cpu)
    want_loss, want_grad = torch_result(base, aux, target, options)
    assert torch.equal(pattern(loss), pattern(want_loss.float()))
    assert torch.equal(pattern(grad_base), pattern(want_grad)) and torch.equal(pattern(grad_aux), pattern(want_grad))


@pytest.mark.parametrize("rest", [1e-2, 1e-6, 1e-12])
def test_confident_rows_keep_four_digits(instruction_set, rest):
    base, aux = split_in_two(confident_row(1025, 17, rest, 30.0).unsqueeze(0))
    case = Case(base, aux.requires_grad_(), torch.tensor([17]), {"reduction": "none"})
    got, want = case.run("native", torch.ones(1)), expected(case, torch.ones(1), confident=True)
    assert abs(got["loss"].item() / want["loss"][0].item() - 1) < 1e-4
    assert abs(got["aux[0]"][0, 17].item() / want["aux[0]"][0][0, 17].item() - 1) < 1e-4


@pytest.mark.parametrize("vocab_size", [1, 33, 1025, 5000])
def test_argmaxes_are_found_among_scaled_sums_ties_and_nans(instruction_set, vocab_size):
    base, aux = (logits(60, vocab_size) for _ in range(2))
    base[20:40] = base[20:40].round()
    aux[20:40] = aux[20:40].round()
    base[40:, vocab_size // 2] = torch.nan
    plain = logit_stats(base, aux, backend="native")
    assert torch.equal(plain.argmax, (base + aux).argmax(-1)) and torch.equal(plain.base_argmax, base.argmax(-1))
    scaled = logit_stats(Logits(base, scale=1.3), Logits(aux, scale=-0.7), backend="native")
    assert ((scaled.argmax >= 0) & (scaled.argmax < vocab_size)).all()


@pytest.mark.parametrize("vocab_size", [1, 33, 1025, 5000])
def test_ranks_count_what_is_greater_and_no_tie(instruction_set, vocab_size):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        base, aux = (logits(40, vocab_size).round().to(dtype) for _ in range(2))
        target = targets(40, vocab_size=vocab_size)
        s, at_target = base.double() + aux.double(), torch.arange(vocab_size) == target[:, None]
        want = vocab_size - (s <= s[at_target][:, None]).sum(-1)
        assert torch.equal(logit_stats(base, aux, target, backend="native").target_rank, want)
        # the same number in every column, through arithmetic that rounds
        base, aux = (torch.full((40, vocab_size), number).to(dtype) for number in (1.37, -0.61))
        sources = (Logits(base, scale=0.77, softcap=3.3), Logits(aux, scale=1.3, softcap=2.1))
        assert not logit_stats(*sources, target, backend="native").target_rank.any()


HALVES = torch.cat([torch.arange(-300, 300) / 256.0 + 1, 2.0 ** torch.arange(-30.0, 18.0), torch.arange(1, 2001) / 700])


def test_halves_are_rounded_to_nearest_even_through_the_whole_range(instruction_set):
    """Gradients of known size, at ties and near them, subnormal and overflowing, against torch's own conversion."""
    numbers = torch.cat([HALVES, torch.randn(2000)])
    for dtype in (torch.bfloat16, torch.float16):
        aux = torch.zeros(len(numbers), 2, dtype=dtype, requires_grad=True)
        case = Case(
            torch.zeros(len(numbers), 2), aux, torch.zeros(len(numbers), dtype=torch.int64), {"reduction": "none"}
        )
        got = case.run("native", numbers)["aux[0]"]
        want = torch.stack([-numbers / 2, numbers / 2], -1).to(dtype)  # p is exactly one half
        assert torch.equal(got, want)


def test_whole_vectors_of_a_summed_loss_are_rounded_so_too(instruction_set):
    """Class weights are the sizes here: of a loss that is summed, the pass that computes it makes the gradient."""
    vocab_size = 131
    numbers = torch.cat([HALVES[HALVES > 0], torch.rand(500)])
    for part in numbers.split(vocab_size):
        rows = torch.arange(len(part))
        other = (rows * 7 + 1 + rows % 5) % vocab_size
        other = torch.where(other == rows, (other + 1) % vocab_size, other)
        for dtype in (torch.bfloat16, torch.float16):
            aux = torch.full((len(rows), vocab_size), -torch.inf, dtype=dtype)
            aux[rows, rows], aux[rows, other] = 0, 0
            weight = torch.ones(vocab_size)
            weight[rows] = part
            loss = aux_cross_entropy(aux.requires_grad_(), None, rows, weight=weight, reduction="sum", backend="native")
            (got,) = torch.autograd.grad(loss, aux)
            want = torch.zeros(aux.shape, dtype=dtype)
            want[rows, rows], want[rows, other] = (-part / 2).to(dtype), (part / 2).to(dtype)
            assert torch.equal(got, want)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"weight": True, "label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])  # made by the pass that computes the loss, or by a second one
def test_gradients_past_the_caches_have_the_bits_of_others(instruction_set, reduction, dtype, options):
    """Those of 2 MiB and more go there by lines, in which rows of an odd width begin anywhere. Signs of zero count."""
    vocab_size, few = 12289, 20
    rows = 180 if dtype.itemsize == 2 else 90
    values = logits(rows, vocab_size, dtype=dtype)
    values[:, ::3] = 400  # with a negative scale: p = 0, and zeros that have a sign
    target = torch.randint(vocab_size, (rows,))
    target[:4] = torch.tensor([0, 1, 4095, vocab_size - 1])
    given = {**options, "weight": torch.rand(vocab_size).to(dtype) + 0.5} if "weight" in options else options
    grads = []
    for n in (rows, few):
        source = values[:n].clone().requires_grad_()
        loss = aux_cross_entropy(
            Logits(source, scale=-0.5), None, target[:n], reduction=reduction, backend="native", **given
        )
        (grad,) = torch.autograd.grad(loss.sum(), source)
        grads.append(grad[:few])
    assert values.nbytes > 2 << 20 > few * vocab_size * dtype.itemsize
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(grads[0].view(bits), grads[1].view(bits))


def test_an_unknown_instruction_set_is_a_value_error_and_changes_nothing(native):
    before = native.instruction_set()
    with pytest.raises(ValueError, match="instruction set must be one that this processor has, got 'avx1024'"):
        native.set_instruction_set("avx1024")
    assert native.instruction_set() == before
