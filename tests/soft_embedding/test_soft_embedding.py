"""soft_embedding against float64 autograd of the plain formula: values, gradients, and what they cost."""

import itertools

import pytest
import torch
from inputs import covering_pairs, head, label, logits, strided
from profiled import products
from soft_oracle import F32, F64, FLOATS, STATS, Case, check, cut_lookup, expected
from tolerance import assert_alike

from auxkernels import Head, Logits, soft_embedding

BF16, F16 = torch.bfloat16, torch.float16
LABELS = [1, 2, 3, 31, 33, 1023, 1025, 4097]
WIDTHS = [1, 3, 64, 300]
SHAPES = {"[]": (), "[N]": (7,), "[B, T]": (2, 5), "4-d": (2, 1, 3, 2)}

AXES = {
    "scores": [F32, BF16, F16, F64],
    "table": [F32, BF16, F16, F64],
    "num_tables": [0, 1, 3],
    "T": ["1", "number", "0-d", "per row"],
    "hard": [False, True, "clean gradient"],
    "gumbel": [0.0, 1.0, "tensor"],
    "mask": [None, "[K]", "[*, K]"],
    "top_k": [None, 1, 4, 5000],
    "shape": list(SHAPES),
    "layout": ["contiguous", "padded rows", "transposed rows", "expanded"],
    "K": [1, 2, 3, 31, 33, 1025],
    "D": WIDTHS,
    "upstream": ["out", "statistics", "all"],
    "source": ["tensor", "scaled", "softcapped", "sum", "head"],
}


def temperature_of(kind: str, shape, device, low=0.4):
    if kind == "1":
        return 1.0
    if kind == "number":
        return 0.7
    return (torch.rand(() if kind == "0-d" else shape, device=device) + low).requires_grad_()


def scores_of(layout: str, *shape: int, dtype, device):
    """Scores that require a gradient, laid out as named."""
    if layout == "expanded" and len(shape) > 1:
        values = logits(*shape[:-2], 1, shape[-1], dtype=dtype, device=device).expand(shape)
    elif layout in ("contiguous", "expanded") or len(shape) == 1:
        values = logits(*shape, dtype=dtype, device=device)
    else:
        values = strided(logits(*shape, dtype=dtype, device=device), layout)
    return values.requires_grad_()


def sources_of_kind(kind: str, values, shape, K, device):
    dtype = values.dtype
    compute = F64 if dtype == F64 else F32
    if kind == "scaled":
        return Logits(values, scale=(torch.rand(shape, device=device, dtype=compute) + 0.5).requires_grad_())
    if kind == "softcapped":
        return Logits(values, softcap=4.0)
    if kind == "sum":
        return [values, Logits(logits(*shape, K, dtype=dtype, device=device, requires_grad=True), scale=-0.5)]
    if kind == "head":
        return head(*shape, vocab_size=K, width=9, bias=True, dtype=dtype, device=device)
    return values


def case_of(device, *, scores, table, num_tables, T, hard, gumbel, mask, top_k, shape, layout, K, D, source) -> Case:
    shape = SHAPES[shape]
    values = scores_of(layout, *shape, K, dtype=scores, device=device)
    tables = logits(*([num_tables] if num_tables else []), K, D, dtype=table, device=device, requires_grad=True)
    options = {"temperature": temperature_of(T, shape, device), "hard": bool(hard), "top_k": top_k}
    options["clean_gradient"] = hard == "clean gradient"
    if gumbel:
        options["gumbel"] = torch.tensor(0.5, device=device) if gumbel == "tensor" else gumbel
        options["seed"] = 1234567
    if mask is not None:
        options["mask"] = torch.rand((K,) if mask == "[K]" else (*shape, K), device=device) < 0.3
    return Case(sources_of_kind(source, values, shape, K, device), tables, options)


@pytest.mark.parametrize("row", covering_pairs(AXES), ids=label)
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_every_pair_of_options_matches_float64(impl, monkeypatch, row, num_chunks):
    if impl.backend == "triton":
        row = row | {name: F32 for name in ("scores", "table") if row[name] == F64}
    if num_chunks > 1:
        cut_lookup(monkeypatch, 2)
    choice = dict(row)
    names = {"out": ("out",), "statistics": FLOATS, "all": ("out", *FLOATS)}[choice.pop("upstream")]
    case = case_of(impl.device, **choice)
    check(case, impl.backend, case.upstream(*names))


@pytest.mark.slow
@pytest.mark.parametrize("K", LABELS)
@pytest.mark.parametrize("table_dtype", [F32, BF16, F16])
@pytest.mark.parametrize("scores_dtype", [F32, BF16])
def test_every_number_of_labels_and_width(impl, K, scores_dtype, table_dtype):
    for D in WIDTHS:
        scores = logits(9, K, dtype=scores_dtype, device=impl.device, requires_grad=True)
        table = logits(K, D, dtype=table_dtype, device=impl.device, requires_grad=True)
        check(Case(scores, table, {"temperature": 0.7}), impl.backend)


@pytest.mark.parametrize("K", LABELS)
@pytest.mark.parametrize("options", [{"hard": True}, {"top_k": 5}, {"gumbel": 1.0, "seed": 5}], ids=str)
def test_every_number_of_labels_with_each_choice(impl, K, options):
    scores = logits(9, K, device=impl.device, requires_grad=True)
    case = Case(scores, logits(K, 65, device=impl.device, requires_grad=True), {"temperature": 0.7, **options})
    check(case, impl.backend, case.upstream("out", *FLOATS))


@pytest.mark.parametrize("K", LABELS)
def test_every_number_of_labels_in_float64(doubles, K):
    T = torch.rand(9, device=doubles.device, dtype=F64).add(0.5).requires_grad_()
    scores, table = (logits(*s, dtype=F64, device=doubles.device, requires_grad=True) for s in ((9, K), (K, 7)))
    for options in ({}, {"hard": True}, {"top_k": 5}, {"mask": torch.rand(K, device=doubles.device) < 0.4}):
        case = Case(scores, table, {"temperature": T, **options})
        check(case, doubles.backend, case.upstream("out", *FLOATS))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("options", [{}, {"hard": True}, {"gumbel": 1.0, "seed": 1}, {"top_k": 16}], ids=str)
def test_a_batch_of_many_rows_matches_float64(impl, dtype, options):
    scores = logits(700, 1024, dtype=dtype, device=impl.device, requires_grad=True)
    table = logits(1024, 32, dtype=dtype, device=impl.device, requires_grad=True)
    check(Case(scores, table, {"temperature": 0.7, **options}), impl.backend)


# -- temperature -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"hard": True}, {"top_k": 7}], ids=str)
@pytest.mark.parametrize("spread", ["of the temperature", "of one"])
@pytest.mark.parametrize("T", [1e-4, 1e-3, 0.05, 1.0, 30.0, 1e4])
def test_temperatures_from_cold_to_hot(impl, T, spread, options):
    """(v - max) / T in float32: v / T first would be off by |v| / T ulps."""
    scores = logits(40, 130, device=impl.device, scale=T if spread == "of the temperature" else 1.0)
    scores = (scores + 100 * min(T, 1.0)).requires_grad_()
    kinds = [T, torch.tensor(T), torch.full((40,), T)]
    table = logits(130, 33, device=impl.device, requires_grad=True)
    for given in kinds:
        given = given.to(impl.device).requires_grad_() if isinstance(given, torch.Tensor) else given
        case = Case(scores, table, {"temperature": given, **options})
        check(case, impl.backend, case.upstream("out", *FLOATS))


def test_a_cold_row_does_not_lose_its_second_label(impl):
    """Scores of 50 that differ by 2e-5 at T = 1e-4: 50 / 1e-4 in float32 could not tell them apart."""
    gap = torch.tensor(50.0).nextafter(torch.tensor(60.0)) - 50.0
    scores = torch.tensor([[50.0, 50.0 + gap.item() * 5, 0.0]], device=impl.device)
    out = soft_embedding(scores, torch.eye(3, device=impl.device), temperature=1e-4, backend=impl.backend)
    want = torch.softmax(scores.double() / 1e-4, -1)
    assert_alike(out, want, 16)


@pytest.mark.usefixtures("general_path")
def test_a_number_and_tensors_of_that_number_are_one_temperature(fused):
    scores, table = logits(6, 70, device=fused.device), logits(70, 9, device=fused.device)
    T = torch.tensor(0.3, device=fused.device)
    plain = soft_embedding(scores, table, temperature=0.3, backend=fused.backend)
    for given in (T, T.expand(6), T.expand(6).contiguous(), T.to(F64)):
        assert torch.equal(soft_embedding(scores, table, temperature=given, backend=fused.backend), plain)
    half = T.to(BF16)
    scaled = soft_embedding(scores, table, temperature=half, backend=fused.backend)
    assert torch.equal(scaled, soft_embedding(scores, table, temperature=half.item(), backend=fused.backend))


def test_temperatures_get_gradients_of_their_own_dtype_and_shape(impl):
    scores, table = logits(6, 70, device=impl.device), logits(70, 9, device=impl.device)
    for shape, dtype in itertools.product([(), (6,)], [F32, BF16, F64]):
        if impl.backend == "triton" and dtype == F64:
            continue
        T = torch.full(shape, 0.5, dtype=dtype, device=impl.device, requires_grad=True)
        soft_embedding(scores, table, temperature=T, backend=impl.backend).square().sum().backward()
        assert T.grad.dtype == dtype and T.grad.shape == shape and T.grad.all()


# -- statistics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize(
    "options", [{}, {"hard": True}, {"top_k": 3}, {"mask": True}, {"gumbel": 1.0, "seed": 3}], ids=str
)
def test_each_statistic_alone_has_a_gradient(impl, monkeypatch, name, options):
    cut_lookup(monkeypatch, 3)
    options = dict(options)
    if "mask" in options:
        options["mask"] = torch.rand(8, 37, device=impl.device) < 0.5
    options["temperature"] = torch.rand(8, device=impl.device).add(0.5).requires_grad_()
    scores, table = (logits(*s, device=impl.device, requires_grad=True) for s in ((8, 37), (37, 5)))
    case = Case(scores, table, options)
    got = check(case, impl.backend, case.upstream(name))
    assert got["grad values 0"].any() and (got["grad table"] is None or not got["grad table"].any())


def test_statistics_without_a_gradient_are_those_with_one(impl):
    scores, table = logits(3, 4, 37, device=impl.device), logits(37, 5, device=impl.device)
    plain = Case(scores, table, {"top_k": 9}).call(impl.backend)
    recorded = Case(scores.clone().requires_grad_(), table, {"top_k": 9}).call(impl.backend)
    for name in ("out", *STATS):
        assert torch.equal(plain[name], recorded[name].detach()), name
        assert recorded[name].requires_grad == (name != "argmax") and not plain[name].requires_grad


@pytest.mark.usefixtures("general_path")
def test_asking_for_statistics_does_not_change_the_mixture(fused):
    options = ({}, {"hard": True}, {"top_k": 3}, {"gumbel": 2.0, "seed": 1})
    for num_labels, given in itertools.product((30, 64, 70), options):
        scores, table = logits(9, num_labels, device=fused.device), logits(num_labels, 9, device=fused.device)
        plain = soft_embedding(scores, table, **given, backend=fused.backend)
        assert torch.equal(Case(scores, table, given).call(fused.backend)["out"], plain)


def test_usage_is_the_mean_over_every_chunk_and_zero_for_no_rows(impl, monkeypatch):
    cut_lookup(monkeypatch, 4)
    table = logits(11, 3, device=impl.device)
    for shape in ((23,), (3, 9)):
        scores = logits(*shape, 11, device=impl.device)
        usage = Case(scores, table).call(impl.backend)["usage"]
        assert_alike(usage, torch.softmax(scores, -1).reshape(-1, 11).mean(0))
    assert torch.equal(
        Case(logits(0, 11, device=impl.device), table).call(impl.backend)["usage"].cpu(), torch.zeros(11)
    )


# -- which gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_chunks", [1, 3])
@pytest.mark.parametrize("options", [{}, {"hard": True}, {"top_k": 4}, {"gumbel": 1.0, "seed": 2}], ids=str)
def test_every_subset_of_scores_table_and_temperature_gets_its_gradients(impl, monkeypatch, options, num_chunks):
    if num_chunks > 1:
        cut_lookup(monkeypatch, 3)
    scores, tables = logits(9, 21, device=impl.device), logits(2, 21, 6, device=impl.device)
    T = torch.rand(9, device=impl.device) + 0.5
    for needs in itertools.product([False, True], repeat=3):
        leaves = [t.detach().requires_grad_(need) for t, need in zip((scores, tables, T), needs, strict=True)]
        case = Case(leaves[0], leaves[1], {"temperature": leaves[2], **options})
        got = check(case, impl.backend)
        assert sum(name.startswith("grad ") for name in got) == sum(needs)
        out = soft_embedding(leaves[0], leaves[1], temperature=leaves[2], **options, backend=impl.backend)
        assert out.requires_grad == any(needs)


@pytest.mark.parametrize("options", [{}, {"hard": True}, {"top_k": 4}], ids=str)
def test_every_subset_of_a_heads_tensors_gets_its_gradients(impl, monkeypatch, options):
    cut_lookup(monkeypatch, 4)
    scale = torch.rand(9, device=impl.device) + 0.5
    given = head(9, vocab_size=21, bias=True, device=impl.device, grad=False)
    table = logits(21, 6, device=impl.device)
    for needs in itertools.product([False, True], repeat=5):
        tensors = (given.hidden, given.weight, given.bias, scale, table)
        hidden, weight, bias, own, tables = (t.detach().requires_grad_(n) for t, n in zip(tensors, needs, strict=True))
        case = Case(Head(hidden, weight, bias=bias, scale=own, softcap=20.0), tables, options)
        check(case, impl.backend)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_heads_and_sums_of_heads_match_float64(impl, monkeypatch, dtype, scaled):
    cut_lookup(monkeypatch, 16)
    made = {"vocab_size": 130, "dtype": dtype, "device": impl.device}
    options = {"scale": 0.7} if scaled else {}
    pair = [head(40, width=16, bias=True, **made, **options), head(40, width=9, **made)]
    table = logits(130, 31, dtype=dtype, device=impl.device, requires_grad=True)
    values = logits(40, 130, dtype=dtype, device=impl.device, requires_grad=True)
    for given in (pair[0], pair, [values, pair[1]]):
        check(Case(given, table, {"temperature": 0.8}), impl.backend)


def test_gradients_are_contiguous_own_their_memory_and_may_be_changed(fused):
    scores = logits(9, 40, device=fused.device)[:, 3:].requires_grad_()
    tables = logits(2, 37, 5, device=fused.device, requires_grad=True)
    for options in ({}, {"hard": True}, {"top_k": 2}):
        out = soft_embedding(scores, tables, **options, backend=fused.backend)
        first, second = (torch.autograd.grad(out.sum(), (scores, tables), retain_graph=i == 0) for i in range(2))
        for one, two in zip(first, second, strict=True):
            assert one.is_contiguous() and one.data_ptr() != two.data_ptr()
            one.zero_()
            assert two.any()


def test_an_upstream_gradient_of_any_strides_is_read_as_it_is(impl):
    scores, tables = (logits(*s, device=impl.device, requires_grad=True) for s in ((6, 21), (2, 21, 5)))
    for options in ({}, {"hard": True}, {"top_k": 3}):
        out = soft_embedding(scores, tables, **options, backend=impl.backend)
        for upstream in (
            torch.randn(5, 6, 2, device=impl.device).permute(2, 1, 0),
            torch.randn(2, 1, 5, device=impl.device).expand(2, 6, 5),
            torch.randn((), device=impl.device).expand(2, 6, 5),
            torch.randn(2, 6, 11, device=impl.device)[..., 1::2],
        ):
            got = torch.autograd.grad(out, (scores, tables), upstream, retain_graph=True)
            want = torch.autograd.grad(out, (scores, tables), upstream.contiguous(), retain_graph=True)
            for one, two in zip(got, want, strict=True):
                assert_alike(one, two)


# -- what they cost ----------------------------------------------------------------------------------------------------

N, K, D, H, L = 24, 21, 6, 16, 2
SOFT_NEEDS = {  # which tensors, and the products of backward as (m, k, n)
    ("scores",): [(N, L * D, K)],
    ("temperature",): [(N, L * D, K)],
    ("table",): [(K, N, D)] * L,
    ("scores", "table"): [(N, L * D, K)] + [(K, N, D)] * L,
}


@pytest.mark.parametrize("needs", SOFT_NEEDS, ids=str)
def test_backward_launches_the_products_that_its_gradients_need_and_no_other(fused, needs):
    tensors = {"scores": logits(N, K), "table": logits(L, K, D), "temperature": torch.rand(N) + 0.5}
    tensors = {name: t.to(fused.device).requires_grad_(name in needs) for name, t in tensors.items()}
    results = []

    def run(options):
        out = soft_embedding(
            tensors["scores"], tensors["table"], temperature=tensors["temperature"], **options, backend=fused.backend
        )
        results.append(out)

    assert products(lambda: run({})) == [(N, K, D)] * L
    found = products(lambda: results[-1].sum().backward())
    assert sorted(found) == sorted(SOFT_NEEDS[needs])
    for options in ({"hard": True}, {"top_k": 3}):
        assert products(lambda options=options: run(options)) == []
    assert products(lambda: results[-1].sum().backward()) == []  # top_k gathers
    found = products(lambda: results[-2].sum().backward())  # straight-through: the table's gradient is scattered
    assert found == ([] if needs == ("table",) else [(N, L * D, K)])


@pytest.mark.parametrize("needs", [(), ("hidden",), ("weight",), ("hidden", "weight", "bias")], ids=str)
def test_a_heads_products_are_made_only_where_they_are_needed(fused, needs):
    given = head(N, vocab_size=K, bias=True, device=fused.device, grad=False)
    for name in needs:
        getattr(given, name).requires_grad_()
    table, results = logits(K, D, device=fused.device).requires_grad_(not needs), []
    forward = products(lambda: results.append(soft_embedding(given, table, backend=fused.backend)))
    assert sorted(forward) == sorted([(N, H, K), (N, K, D)])
    found = products(lambda: results[0].sum().backward())
    of_head = {"hidden": (N, K, H), "weight": (K, N, H)}
    own = [of_head[name] for name in needs if name in of_head]
    assert sorted(found) == sorted([(N, H, K), *([(N, D, K)] if needs else [(K, N, D)]), *own])


@pytest.mark.usefixtures("general_path")
def test_scores_are_read_in_place_whatever_their_strides(fused):
    """Two leading dimensions of one stride, as in scores[:, :-1]: no copy. NaN beside them shows a wrong read."""
    table = logits(37, 5, device=fused.device, requires_grad=True)
    for layout in ("padded rows", "every second row", "shifted", "transposed rows"):
        scores = strided(logits(4, 6, 37, device=fused.device), layout).requires_grad_()
        got = Case(scores, table).run(fused.backend, upstream := Case(scores, table).upstream())
        plain = scores.detach().contiguous().requires_grad_()
        want = Case(plain, table).run(fused.backend, upstream)
        assert all(torch.equal(got[name], want[name]) for name in want), layout


def test_tables_of_any_strides_are_read_as_they_are(impl):
    scores = logits(6, 21, device=impl.device, requires_grad=True)
    plain = logits(2, 21, 5, device=impl.device)
    views = [
        plain.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        plain.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([plain, plain], -1)[..., 5:],
        torch.stack([plain, plain], -1)[..., 1],
        plain[:1].expand(2, 21, 5),
    ]
    for view, options in itertools.product(views, ({}, {"hard": True}, {"top_k": 3})):
        check(Case(scores, view.detach().requires_grad_(), options), impl.backend)


def test_expected_values_do_not_come_from_the_package(impl):
    """The oracle and a formula by hand agree on one case that can be checked with pencil and paper."""
    scores = torch.tensor([[0.0, 2.0**0.5, -1.0]], device=impl.device, requires_grad=True)
    table = torch.tensor([[1.0], [2.0], [4.0]], device=impl.device)
    case = Case(scores, table)
    e = scores.detach().cpu().double().squeeze().exp()
    p = e / e.sum()
    mean = p @ table.cpu().double().squeeze()
    upstream = {"out": torch.ones(1, 1, device=impl.device)}
    got, want = case.run(impl.backend, upstream), expected(case, upstream)
    for found in (got, want):
        assert_alike(found["out"].cpu().squeeze(), mean.squeeze(), 16)
        by_hand = p * (table.cpu().double().squeeze() - mean)
        assert_alike(found["grad values 0"].cpu().squeeze(), by_hand, 16)
