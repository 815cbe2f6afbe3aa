"""Straight-through and top_k: which labels are chosen, what they weigh, and where gradients go."""

import itertools

import pytest
import torch
from inputs import logits
from oracle import assert_close
from soft_oracle import F32, F64, FLOATS, Case, check, cut_lookup, relative_error
from tolerance import OF_A_ROW, assert_alike, unit

from auxkernels import soft_embedding

BF16, F16 = torch.bfloat16, torch.float16


def ties(*shape: int, values=4, device="cpu", dtype=F32) -> torch.Tensor:
    """Scores of few different values, so that every row has many likeliest labels."""
    return torch.randint(values, shape).to(device, dtype)


# -- straight-through --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table_dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"mask": True}, {"temperature": 0.01}], ids=str)
def test_the_forward_is_exactly_the_row_of_the_likeliest_label(impl, monkeypatch, options, table_dtype):
    cut_lookup(monkeypatch, 5)
    options = dict(options)
    scores, tables = logits(3, 7, 130, device=impl.device), logits(2, 130, 67, dtype=table_dtype, device=impl.device)
    if "mask" in options:
        options["mask"] = torch.rand(130, device=impl.device) < 0.5
    for given in (scores, scores.round(), ties(3, 7, 130, device=impl.device)):
        allowed = given.masked_fill(options["mask"], -torch.inf) if "mask" in options else given
        best = allowed.argmax(-1) if impl.device == "cpu" else (allowed == allowed.amax(-1, True)).int().argmax(-1)
        for table in (tables, tables[0]):
            out = soft_embedding(given, table, hard=True, **options, backend=impl.backend)
            assert torch.equal(out, table[..., best, :])


@pytest.mark.parametrize("num_chunks", [1, 4])
def test_the_gradient_of_the_scores_is_that_of_the_soft_mixture(impl, monkeypatch, num_chunks):
    """The row dot is sum_k p_k g_k of the soft p, not <upstream, output>: the output is another row."""
    if num_chunks > 1:
        cut_lookup(monkeypatch, 5)
    scores, tables = logits(20, 33, device=impl.device, requires_grad=True), logits(2, 33, 9, device=impl.device)
    T = torch.rand(20, device=impl.device).add(0.5).requires_grad_()
    hard, soft = (Case(scores, tables, {"temperature": T, "hard": h}) for h in (True, False))
    upstream = hard.upstream()
    got, want = hard.run(impl.backend, upstream), soft.run(impl.backend, upstream)
    for name in ("grad values 0", "grad temperature"):
        assert_alike(got[name], want[name])
    wrong = torch.softmax(scores.detach() / T.detach().unsqueeze(-1), -1) * (
        torch.einsum("lnd,lkd->nk", upstream["out"], tables)
        - torch.einsum("lnd,lnd->n", upstream["out"], got["out"]).unsqueeze(-1)
    )
    assert relative_error(wrong / T.detach().unsqueeze(-1), got["grad values 0"].double()) > 0.1


def test_the_gradient_of_the_scores_sums_to_zero_in_every_row(impl):
    for options in ({"hard": True}, {}, {"top_k": 5}, {"hard": True, "top_k": 5}, {"hard": True, "gumbel": 1.0}):
        scores = logits(30, 65, device=impl.device, requires_grad=True)
        table = logits(65, 9, device=impl.device)
        out = soft_embedding(scores, table, **options, backend=impl.backend)
        (grad,) = torch.autograd.grad(out, scores, upstream := torch.randn_like(out))
        largest = (upstream @ table.T).abs().amax(-1)  # p (g - mean), whose p add up to 1
        assert grad.any(-1).all() and (grad.sum(-1).abs() <= OF_A_ROW * unit(F32) * largest).all()


def test_the_tables_gradient_is_the_sum_of_the_upstream_over_the_rows_that_chose_a_label(impl, monkeypatch):
    cut_lookup(monkeypatch, 8)
    scores, tables = logits(50, 20, device=impl.device), logits(2, 20, 9, device=impl.device, requires_grad=True)
    out = soft_embedding(scores, tables, hard=True, backend=impl.backend)
    upstream = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, tables, upstream)
    best = scores.argmax(-1)
    none = torch.zeros(2, 20, 9, dtype=F64, device=impl.device)
    want, size = (none.index_add(1, best, g) for g in (upstream.double(), upstream.double().abs()))
    assert_close("gradient", grad, want, int(best.bincount().max()) * unit(F32) * (size + want.abs()))
    unused = torch.ones(20, dtype=torch.bool, device=impl.device).index_fill_(0, best, False)
    assert unused.any() and not grad[:, unused].any()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("options", [{"hard": True}, {"top_k": 2}], ids=str)
def test_a_label_chosen_by_every_row_sums_its_gradient_in_float32(fused, dtype, options):
    """4096 terms of 1 in 16 bits would stop at 256 (bf16) or 2048 (fp16)."""
    scores = torch.zeros(4096, 3, device=fused.device)
    scores[:, 1] = 20.0
    table = logits(3, 5, dtype=dtype, device=fused.device, requires_grad=True)
    out = soft_embedding(scores, table, **options, backend=fused.backend)
    (grad,) = torch.autograd.grad(out, table, torch.ones_like(out))
    assert torch.equal(grad[1], torch.full_like(grad[1], 4096))


@pytest.mark.parametrize(
    "options", [{"hard": True}, {"top_k": 4}, {"hard": True, "gumbel": 1.0, "seed": 3}, {}], ids=str
)
def test_outputs_and_gradients_repeat_bit_for_bit(fused, options):
    """Scattered gradients too: many rows choose one label."""
    scores, table = (logits(*s, device=fused.device, requires_grad=True) for s in ((3000, 9), (9, 130)))
    upstream = torch.randn(3000, 130, device=fused.device)
    results = []
    for _ in range(4):
        out = soft_embedding(scores, table, **options, backend=fused.backend)
        results.append((out, *torch.autograd.grad(out, (scores, table), upstream)))
    for again in results[1:]:
        assert all(map(torch.equal, again, results[0]))


def test_threads_do_not_change_the_bits_of_a_scattered_gradient(native):
    before, results = torch.get_num_threads(), []
    scores, table = (logits(*s, requires_grad=True) for s in ((700, 9), (9, 300)))
    upstream = torch.randn(700, 300)
    try:
        for threads in (1, 2, 3, 17):
            torch.set_num_threads(threads)
            for options in ({"hard": True}, {"top_k": 4}):
                out = soft_embedding(scores, table, **options, backend="native")
                grads = torch.autograd.grad(out, table, upstream)
                results.append((out.detach(), *grads))
    finally:
        torch.set_num_threads(before)
    for i, found in enumerate(results):
        assert all(map(torch.equal, found, results[i % 2]))


def test_a_hard_choice_agrees_with_its_argmax_and_keeps_soft_statistics(impl):
    scores, table = logits(9, 33, device=impl.device), logits(33, 4, device=impl.device)
    hard, soft = (Case(scores, table, {"hard": h}).call(impl.backend) for h in (True, False))
    assert torch.equal(hard["out"], table[hard["argmax"]])
    for name in (*FLOATS, "argmax"):
        assert torch.equal(hard[name], soft[name]), name


# -- top_k -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 2, 33, 257, 1025])
@pytest.mark.parametrize("k", [1, 2, 7, 32])
def test_ties_go_to_the_lowest_label(impl, K, k):
    """Rows with a handful of values: every boundary of the selection is a tie."""
    for values in (1, 2, 5):
        scores = ties(12, K, values=values, device=impl.device)
        out = soft_embedding(scores, torch.eye(K, device=impl.device), top_k=k, backend=impl.backend)
        order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :k]
        want = torch.zeros(12, K, dtype=torch.bool, device=impl.device).scatter_(1, order, True)
        assert torch.equal(out > 0, want)


def test_signed_zeros_tie(impl):
    scores = torch.tensor([[-0.0, 0.0, -0.0, 0.0], [0.0, -0.0, 0.0, -0.0]], device=impl.device)
    for options, want in (({"top_k": 1}, [1, 0, 0, 0]), ({"top_k": 3}, [1, 1, 1, 0]), ({"hard": True}, [1, 0, 0, 0])):
        found = Case(scores, torch.eye(4, device=impl.device), options).call(impl.backend)
        assert (found["out"] > 0).int().tolist() == [want] * 2 and found["argmax"].tolist() == [0, 0]


@pytest.mark.parametrize("choice", [{}, {"hard": True}, {"mask": True}, {"gumbel": 1.0, "seed": 1}], ids=str)
def test_at_least_as_many_as_there_are_is_no_selection(impl, choice):
    scores, table = (logits(*s, device=impl.device, requires_grad=True) for s in ((9, 21), (21, 6)))
    options = dict(choice)
    if "mask" in choice:
        options["mask"] = torch.rand(9, 21, device=impl.device) < 0.4
    plain = Case(scores, table, options)
    upstream = plain.upstream("out", *FLOATS)
    want = plain.run(impl.backend, upstream)
    for top_k in (21, 22, 1000, 2**40):
        got = Case(scores, table, options | {"top_k": top_k}).run(impl.backend, upstream)
        for name in want:
            assert_alike(got[name], want[name])


@pytest.mark.parametrize("hard", [False, True])
def test_labels_that_are_not_kept_get_a_gradient_of_exactly_zero(impl, monkeypatch, hard):
    cut_lookup(monkeypatch, 6)
    scores, table = (logits(*s, device=impl.device, requires_grad=True) for s in ((25, 65), (65, 6)))
    out, stats = soft_embedding(scores, table, top_k=5, hard=hard, return_stats=True, backend=impl.backend)
    loss = (
        (out * torch.randn_like(out)).sum() + stats.entropy.sum() + (stats.usage * torch.randn_like(stats.usage)).sum()
    )
    of_scores, of_table = torch.autograd.grad(loss, (scores, table))
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(5).indices, True)
    assert not of_scores[~kept].any() and of_scores[kept].all()
    counts = torch.ones_like(scores, dtype=torch.bool).scatter_(1, scores.argmax(1, True), False) if hard else ~kept
    unused = counts.all(0)
    assert not of_table[unused].any() and of_table[~unused].any(-1).all()


def test_fewer_allowed_labels_than_k_are_all_kept(impl):
    mask = torch.ones(4, 40, dtype=torch.bool, device=impl.device)
    mask[0, [3, 17]] = mask[1, 39] = mask[3, [0, 1, 2, 3, 4, 5]] = False
    scores, table = (logits(*s, device=impl.device, requires_grad=True) for s in ((4, 40), (40, 6)))
    for hard in (False, True):
        case = Case(scores, table, {"mask": mask, "top_k": 5, "hard": hard})
        got = check(case, impl.backend, case.upstream("out", *FLOATS))
        assert not got["out"][2].any() and got["argmax"].tolist()[1:3] == [39, -1]
        assert not got["grad values 0"][mask].any()


@pytest.mark.parametrize("shape", ["[K]", "[*, K]"])
@pytest.mark.parametrize("options", list(itertools.product([False, True], [0.0, 1.5], [None, 1, 3])), ids=str)
def test_choice_noise_mask_and_selection_combine(impl, monkeypatch, options, shape):
    cut_lookup(monkeypatch, 4)
    hard, gumbel, top_k = options
    scores, tables = (logits(*s, device=impl.device, requires_grad=True) for s in ((2, 7, 19), (2, 19, 6)))
    mask = torch.rand((19,) if shape == "[K]" else (2, 7, 19), device=impl.device) < 0.6
    T = torch.rand(2, 7, device=impl.device).add(0.6).requires_grad_()
    chosen = {"temperature": T, "hard": hard, "top_k": top_k, "mask": mask}
    case = Case(scores, tables, chosen | ({"gumbel": gumbel, "seed": 6} if gumbel else {}))
    got = check(case, impl.backend, case.upstream("out", *FLOATS))
    assert not got["grad values 0"][mask.expand(2, 7, 19)].any()


def test_what_is_kept_is_chosen_after_mask_and_noise(impl):
    """The mask comes before the selection: forbidden labels take no place in it."""
    scores = torch.tensor([[9.0, 8.0, 1.0, 0.5, 0.0]], device=impl.device)
    mask = torch.tensor([True, True, False, False, False], device=impl.device)
    out = soft_embedding(scores, torch.eye(5, device=impl.device), mask=mask, top_k=2, backend=impl.backend)
    assert (out > 0).tolist() == [[False, False, True, True, False]]


@pytest.mark.slow
@pytest.mark.parametrize("num_labels", [5000, 151936])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_few_of_a_vocabulary(impl, num_labels, dtype):
    scores = logits(3, num_labels, dtype=dtype, device=impl.device, requires_grad=True)
    table = logits(num_labels, 8, dtype=dtype, device=impl.device, requires_grad=True)
    for options in ({"top_k": 16}, {"top_k": 16, "hard": True, "gumbel": 1.0, "seed": 1}):
        check(Case(scores, table, options), impl.backend)


@pytest.mark.parametrize("order", ["rising", "falling", "alike"])
def test_selection_does_not_depend_on_the_order_of_the_scores(impl, order):
    K = 3000
    row = torch.arange(K, dtype=F32) * 1e-3 if order != "alike" else torch.zeros(K)
    row = row.flip(0) if order == "falling" else row
    out = soft_embedding(
        row.expand(2, K).to(impl.device), torch.eye(K, device=impl.device), top_k=40, backend=impl.backend
    )
    kept = (out[0] > 0).nonzero().squeeze(1).tolist()
    assert kept == list(range(K - 40, K) if order == "rising" else range(40)) and torch.equal(out[0], out[1])


def test_float64_choices(doubles):
    for options in ({"hard": True}, {"top_k": 3}, {"hard": True, "top_k": 3}):
        made = {"dtype": F64, "device": doubles.device, "requires_grad": True}
        case = Case(logits(9, 21, **made), logits(2, 21, 4, **made), options)
        check(case, doubles.backend, case.upstream("out", *FLOATS))
