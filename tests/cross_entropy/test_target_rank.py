"""`LogitStats.target_rank`: how many classes are ahead of the target, where the other statistics' tests do not look.

Logits are multiples of 1/8 of a few bits, whose sums are exact in every dtype and often equal, unless a test says
otherwise: then the sums lie further apart than their roundings reach.
"""

import pytest
import torch
from inputs import LAYOUTS, WIDTHS_SMALL, cut_rows, strided, targets
from oracle import Case, Rows, Term, term_of
from torch import Tensor

from auxkernels import Head, Logits, aux_cross_entropy, logit_stats

HALVES_AND_SINGLE = (torch.bfloat16, torch.float16, torch.float32)


def eighths(*shape: int, dtype=torch.float32, device="cpu") -> Tensor:
    """At most 12 in size: seven bits."""
    return (torch.randn(*shape, dtype=torch.float64) * 16).round().clamp(-96, 96).div(8).to(device, dtype)


def ranks_in(sums: Tensor, target: Tensor) -> Tensor:
    """Places in descending order, [*]: of exact sums [*, V], by sorting them."""
    at_target = sums.gather(-1, target.long().clamp(min=0).unsqueeze(-1))
    return sums.shape[-1] - torch.searchsorted(sums.sort(-1).values, at_target, right=True).squeeze(-1)


def exact(*tensors: Tensor) -> Tensor:
    return sum(tensor.detach().double() for tensor in tensors)


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES_AND_SINGLE, ids=str)
@pytest.mark.parametrize("vocab_size", [*WIDTHS_SMALL, 12289])
def test_ranks_are_those_of_the_sorted_row(impl, vocab_size, dtype):
    base, aux = (eighths(3, vocab_size, dtype=dtype, device=impl.device) for _ in range(2))
    target = targets(3, vocab_size=vocab_size, device=impl.device)
    target[0] = vocab_size - 1
    want = ranks_in(exact(base, aux), target)
    assert torch.equal(logit_stats(base, aux, target, backend=impl.backend).target_rank, want)
    alone = logit_stats(base, None, target, backend=impl.backend).target_rank
    assert torch.equal(alone, ranks_in(exact(base), target))


@pytest.mark.parametrize("vocab_size", [1, 33, 4097])
def test_every_place_of_a_row_is_found(impl, vocab_size):
    """0 for the likeliest, V - 1 for the last, and what lies between."""
    places = torch.randperm(vocab_size)
    step = max(vocab_size // 11, 1)
    target = torch.arange(0, vocab_size, step)
    base = -places.float().expand(len(target), -1).to(impl.device)
    stats = logit_stats(base, torch.zeros_like(base), target.to(impl.device), backend=impl.backend)
    assert stats.target_rank.tolist() == places[target].tolist()
    likeliest = logit_stats(base, None, stats.argmax, backend=impl.backend)
    assert not likeliest.target_rank.any()


def test_top_k_accuracy_is_a_comparison(impl):
    base = torch.stack([torch.randperm(500) for _ in range(200)]).float().to(impl.device)
    target = targets(200, vocab_size=500, device=impl.device)
    rank = logit_stats(base, None, target, backend=impl.backend).target_rank
    for k in (1, 5, 50, 500):
        found = (base.topk(k).indices == target[:, None]).any(-1)
        assert torch.equal(rank < k, found), k


def gaps(terms: list[Term], eps: float) -> Tensor:
    """The distance of neighbouring sums of each row less what their roundings make of it, [*, V - 1]."""
    s = sum(term.logits() for term in terms).sort(-1).values
    size = sum((term.logits().abs() * term.roundings).amax(-1, keepdim=True) for term in terms)
    return s.diff(dim=-1) - 2 * eps * size


@pytest.mark.parametrize("scale", [-0.7, "tensor", "per row"])
@pytest.mark.parametrize("softcap", [None, 6.0])
def test_scales_and_softcaps_are_in_the_sums_that_are_compared(impl, scale, softcap):
    vocab_size, device = 1030, impl.device
    steps = torch.stack([torch.randperm(vocab_size) for _ in range(4)]).double()
    base = Logits((steps / 128 - 4).float().to(device), scale=1.3, softcap=softcap)
    number = {"tensor": torch.tensor(0.3), "per row": torch.rand(4) + 0.2}.get(scale, scale)
    number = number.to(device) if isinstance(number, Tensor) else number
    aux = Logits(torch.full((4, vocab_size), 2.7, device=device), scale=number, softcap=softcap)
    terms = [term_of(source, vocab_size) for source in (base, aux)]
    assert (gaps(terms, torch.finfo(torch.float32).eps) > 0).all()
    target = targets(4, vocab_size=vocab_size, device=device)
    want = ranks_in(sum(term.logits() for term in terms), target)
    assert torch.equal(logit_stats(base, aux, target, backend=impl.backend).target_rank, want)
    swapped = logit_stats(aux, base, target, backend=impl.backend).target_rank
    assert torch.equal(swapped, want)


@pytest.mark.parametrize("vocab_size", [2, 37, 129, 5000])
@pytest.mark.parametrize("dtype", HALVES_AND_SINGLE, ids=str)
def test_equal_columns_tie_through_any_arithmetic(impl, vocab_size, dtype):
    """Wherever they stand: in a vector or behind the last, in the target's block or another."""
    base, aux = (torch.full((3, vocab_size), number, device=impl.device).to(dtype) for number in (1.37, -0.61))
    base[1, 0] = 1.5  # one is ahead
    base[2, -1] = torch.nan if vocab_size == 2 else 1.25  # one is behind
    target = torch.full((3,), vocab_size // 2, device=impl.device)
    scale = torch.rand(3, device=impl.device) + 0.5
    for sources in (
        (base, aux),
        (Logits(base, scale=0.77), Logits(aux, scale=1.3)),
        (Logits(base, scale=0.77, softcap=3.3), Logits(aux, scale=scale, softcap=2.1)),
    ):
        stats = logit_stats(*sources, target, backend=impl.backend)
        assert stats.target_rank.tolist() == [0, 1, -1 if vocab_size == 2 else 0]


def test_float64_sums_are_compared_as_such(doubles):
    base = 1.0 + torch.randperm(300, device=doubles.device).double() * 2.0**-40
    target = torch.arange(0, 300, 7, device=doubles.device)
    base = base.expand(len(target), -1)
    rank = logit_stats(base, torch.zeros_like(base), target, backend=doubles.backend).target_rank
    assert torch.equal(rank, ranks_in(base, target))


def test_counts_beyond_what_float32_can_count(native):
    vocab_size = 2**24 + 9
    base = torch.zeros(2, vocab_size, dtype=torch.bfloat16)
    base[0, 12345], base[1, -1] = -1.0, -1.0
    base[1, 5] = -1.0
    rank = logit_stats(base, None, torch.tensor([12345, vocab_size - 1]), backend="native").target_rank
    assert rank.tolist() == [vocab_size - 1, vocab_size - 2]


# -- which columns and rows have one -----------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [1, 33, 4096])
def test_columns_from_vocab_size_on_are_not_ahead(impl, vocab_size):
    base, aux = (eighths(3, vocab_size + more, device=impl.device) for more in (3, 70))
    base[:, vocab_size:], aux[:, vocab_size:] = 100.0, torch.inf
    target = targets(3, vocab_size=vocab_size, device=impl.device)
    rank = logit_stats(base, aux, target, vocab_size=vocab_size, backend=impl.backend).target_rank
    assert torch.equal(rank, ranks_in(exact(base[:, :vocab_size], aux[:, :vocab_size]), target))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("ignore_index", [-100, 7])
def test_ignored_rows_have_none(impl, dtype, ignore_index):
    base, aux = (eighths(2, 6, 50, device=impl.device) for _ in range(2))
    target = targets(2, 6, vocab_size=50, dtype=dtype, device=impl.device, ignored=0.4, ignore_index=ignore_index)
    rank = logit_stats(base, aux, target, ignore_index=ignore_index, backend=impl.backend).target_rank
    want = ranks_in(exact(base, aux), target).masked_fill(target == ignore_index, -1)
    assert torch.equal(rank, want) and rank.shape == target.shape and (rank == -1).any() and (rank >= 0).any()


@pytest.mark.parametrize("vocab_size", [40, 8300])
def test_classes_of_minus_infinity_are_behind_all_and_tie_with_each_other(impl, vocab_size):
    base = eighths(4, vocab_size, device=impl.device)
    aux = torch.zeros_like(base)
    aux[0, : vocab_size // 2] = -torch.inf  # the target's too
    aux[1, vocab_size // 2 :] = -torch.inf
    aux[2, :-1] = -torch.inf  # only the target is left
    target = torch.tensor([3, 3, vocab_size - 1, 3], device=impl.device)
    rank = logit_stats(base, aux, target, backend=impl.backend).target_rank
    assert rank[0] == vocab_size - vocab_size // 2 and rank[2] == 0
    assert torch.equal(rank, ranks_in(exact(base, aux), target))


@pytest.mark.parametrize("bad", [-1, 300, 2**31, 2**32 + 5, -(2**63)])
def test_a_target_that_names_no_class_has_none_on_gpu(on_gpu, bad):
    base, aux = (eighths(3, 300, device=on_gpu.device) for _ in range(2))
    target = torch.tensor([5, bad, 7], device=on_gpu.device)
    rank = logit_stats(base, aux, target, backend=on_gpu.backend).target_rank
    want = ranks_in(exact(base, aux), target.clamp(0, 299))
    assert rank.tolist() == [int(want[0]), -1, int(want[2])]


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_rows_have_no_ranks(impl, shape):
    base, target = torch.zeros(*shape, 9, device=impl.device), torch.zeros(shape, dtype=torch.int64, device=impl.device)
    rank = logit_stats(base, base, target, backend=impl.backend).target_rank
    assert rank.shape == shape and rank.dtype == torch.int64


# -- sources -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_are_read_in_place(impl, layout):
    base, aux = (eighths(3, 4, 33, device=impl.device) for _ in range(2))
    target = targets(3, 4, vocab_size=33, device=impl.device)
    views = [strided(tensor, layout) for tensor in (base, aux)]
    rank = logit_stats(*views, target.mT.contiguous().mT, backend=impl.backend).target_rank
    assert torch.equal(rank, ranks_in(exact(base, aux), target))


@pytest.mark.parametrize("has_gradient", [False, True])
def test_several_sources_are_summed_first(impl, has_gradient):
    base, aux = ([eighths(5, 70, device=impl.device) for _ in range(2)] for _ in range(2))
    aux[0].requires_grad_(has_gradient)
    target = targets(5, vocab_size=70, device=impl.device, ignored=0.2)
    rank = logit_stats(base, aux, target, backend=impl.backend).target_rank
    assert torch.equal(rank, ranks_in(exact(*base, *aux), target).masked_fill(target == -100, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["two heads", "head beside logits", "trained", "with a loss"])
def test_heads_have_the_ranks_of_their_logits_in_every_chunk(impl, monkeypatch, form, dtype):
    """Products of small integers, which are exact and, of 16-bit heads on CPU, stay so when they are rounded."""
    cut_rows(monkeypatch, 3)
    num_rows, vocab_size, width = 11, 61, 8
    made = {"device": impl.device, "dtype": dtype}

    def numbers(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape).to(**made)

    hidden, weight, bias = numbers(num_rows, width), numbers(vocab_size, width), numbers(vocab_size)
    weight[40:] = weight[:21]  # ties
    base = Head(hidden, weight, bias=bias)
    s = hidden.double() @ weight.double().T + bias.double()
    if form == "head beside logits":
        aux = numbers(num_rows, vocab_size)
        s = s + aux.double()
    else:
        aux = Head(numbers(num_rows, 4).requires_grad_(form == "trained"), numbers(vocab_size, 4), scale=0.5)
        s = s + 0.5 * (aux.hidden.detach().double() @ aux.weight.double().T)
    target = targets(num_rows, vocab_size=vocab_size, device=impl.device, ignored=0.3)
    if form == "with a loss":
        _, stats = aux_cross_entropy(base, aux, target, return_stats=True, backend=impl.backend)
    else:
        stats = logit_stats(base, aux, target, backend=impl.backend)
    assert torch.equal(stats.target_rank, ranks_in(s, target).masked_fill(target == -100, -1))


# -- beside losses, and compiled ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"label_smoothing": 0.1, "z_loss": 0.1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_loss_returns_it(impl, reduction, options, dtype):
    base, aux = (eighths(4, 70, dtype=dtype, device=impl.device) for _ in range(2))
    aux.requires_grad_()
    target = targets(4, vocab_size=70, device=impl.device, ignored=0.25)
    given = {"reduction": reduction, "backend": impl.backend, **options}
    loss, stats = aux_cross_entropy(base, aux, target, return_stats=True, **given)
    want = ranks_in(exact(base, aux), target).masked_fill(target == -100, -1)
    assert torch.equal(stats.target_rank, want) and not stats.target_rank.requires_grad
    loss.sum().backward()
    assert aux.grad.isfinite().all() and aux.grad.any()


def test_it_leaves_gradients_of_the_others_as_they_are(impl):
    base, aux = (eighths(40, 70, device=impl.device) for _ in range(2))
    aux.requires_grad_()
    target = targets(40, vocab_size=70, device=impl.device)
    stats = logit_stats(base, aux, target, backend=impl.backend)
    hit = (stats.target_rank < 20).float()
    (grad,) = torch.autograd.grad((stats.log_prob * hit).sum(), aux)
    onehot = torch.arange(70, device=impl.device) == target[:, None]
    want = hit.double()[:, None] * (onehot.double() - exact(base, aux).softmax(-1))
    assert hit.any() and not hit.all()
    torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["forward", "differentiable", "with a loss"])
def test_compiled_graphs_give_it(impl, form):
    torch._dynamo.reset()

    def of(base, aux, target):
        if form == "with a loss":
            return aux_cross_entropy(base, aux, target, return_stats=True, backend=impl.backend)[1].target_rank
        return logit_stats(base, aux, target, backend=impl.backend).target_rank

    compiled = torch.compile(of, fullgraph=True, backend="aot_eager")
    for num_rows in (5, 8):
        base, aux = (eighths(num_rows, 40, device=impl.device) for _ in range(2))
        aux.requires_grad_(form != "forward")
        target = targets(num_rows, vocab_size=40, device=impl.device, ignored=0.3)
        got = compiled(base, aux, target)
        assert got.dtype == torch.int64 and not got.requires_grad
        assert torch.equal(got, ranks_in(exact(base, aux), target).masked_fill(target == -100, -1))
    torch._dynamo.reset()


def test_the_oracles_bounds_are_one_number_where_sums_are_exact_and_apart():
    base = torch.stack([torch.randperm(50) for _ in range(6)]).float()
    target = targets(6, vocab_size=50, ignored=0.3)
    rows = Rows(Case(base, torch.zeros_like(base), target))
    want = ranks_in(exact(base), target).masked_fill(target == -100, -1)
    for bound in rows.rank_bounds():
        assert torch.equal(bound, want)
