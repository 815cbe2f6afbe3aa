"""Rows without an allowed label, infinities and NaN, no rows, and the properties that any mixture has."""

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import given as for_all
from hypothesis import strategies as st
from inputs import head, logits
from oracle import assert_close
from soft_oracle import F32, F64, FLOATS, Case, check, cut_lookup
from tolerance import OF_A_ROW, assert_alike, product_error, unit

from auxkernels import Logits, soft_embedding

MODES = {
    "soft": {},
    "hard": {"hard": True},
    "top_k": {"top_k": 3},
    "hard top_k": {"hard": True, "top_k": 3},
    "noisy": {"gumbel": 1.0, "seed": 3},
    "cold": {"temperature": 1e-3},
}
NAN, INF = torch.nan, torch.inf


@pytest.fixture(params=MODES)
def mode(request):
    return MODES[request.param]


def leaves(impl, rows=6, K=37, D=5, tables=()):
    return (logits(*shape, device=impl.device, requires_grad=True) for shape in ((rows, K), (*tables, K, D)))


def with_rows(scores: torch.Tensor, *changes: tuple) -> torch.Tensor:
    """The same scores but for (row, label, value)."""
    changed = scores.detach().clone()
    for row, label, value in changes:
        changed[row, label] = value
    return changed.requires_grad_()


# -- no allowed label --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["mask", "mask of all rows", "scores", "both"])
def test_a_row_without_an_allowed_label_is_zero_in_value_and_gradient(impl, monkeypatch, mode, how):
    cut_lookup(monkeypatch, 2)
    scores, tables = leaves(impl, tables=(2,))
    mask = torch.zeros(6, 37, dtype=torch.bool, device=impl.device)
    empty = [1, 4, 5]
    if how == "mask of all rows":
        mask, empty = torch.ones(37, dtype=torch.bool, device=impl.device), [0, 1, 2, 3, 4, 5]
    elif how == "mask":
        mask[empty] = True
    else:
        scores = with_rows(scores, (empty, slice(None), -INF))
        if how == "both":
            mask[empty, :20] = True
    T = torch.full((6,), mode.get("temperature", 0.7), device=impl.device, requires_grad=True)
    case = Case(scores, tables, mode | {"temperature": T} | ({} if how == "scores" else {"mask": mask}))
    got = check(case, impl.backend, case.upstream("out", *FLOATS))
    assert got["argmax"][empty].eq(-1).all()
    assert not got["out"][:, empty].any() and not got["out"].isnan().any()
    assert not got["grad values 0"][empty].any() and not got["grad temperature"][empty].any()
    for name in ("entropy", "max_prob", "sum_squares"):
        assert not got[name][empty].any()
    if how == "mask of all rows":
        assert not got["grad table"].any() and not got["usage"].any()


def test_rows_without_a_label_hide_nan_and_infinity_that_are_forbidden(impl, mode):
    """The mask is as masked_fill: what it covers is not looked at, and gets no gradient."""
    scores, table = leaves(impl)
    mask = torch.rand(6, 37, device=impl.device) < 0.5
    mask[:, 7], mask[:, 8] = True, False
    for value in (NAN, INF, -INF):
        bad = with_rows(scores, (slice(None), 7, value))
        results = []
        for given in (bad, scores):
            case = Case(given, table, mode | {"mask": mask})
            torch.manual_seed(1)
            results.append(case.run(impl.backend, case.upstream("out", *FLOATS)))
        for name in results[0]:
            assert torch.equal(results[0][name], results[1][name]), (name, value)


# -- infinities and NaN ------------------------------------------------------------------------------------------------


def test_scores_of_minus_infinity_are_forbidden_labels(impl, mode):
    scores, table = leaves(impl)
    mask = torch.rand(6, 37, device=impl.device) < 0.5
    mask[:, 0] = False
    forbidden = with_rows(scores, (*mask.nonzero(as_tuple=True), -INF))
    cases = Case(forbidden, table, mode), Case(scores, table, mode | {"mask": mask})
    upstream = cases[0].upstream("out", *FLOATS)
    got, want = (case.run(impl.backend, upstream) for case in cases)
    for name in want:
        assert torch.equal(got[name], want[name]), name
    assert not got["grad values 0"][mask].any() and not got["grad values 0"].isnan().any()


@pytest.mark.parametrize("value", [NAN, INF], ids=str)
@pytest.mark.parametrize("label", [0, 17, 36])
def test_nan_and_infinity_poison_their_row_and_no_other(impl, monkeypatch, mode, value, label):
    cut_lookup(monkeypatch, 2)
    scores, tables = leaves(impl, tables=(2,))
    bad = with_rows(scores, (2, label, value))
    T = torch.full((6,), mode.get("temperature", 0.7), device=impl.device, requires_grad=True)
    results = []
    for given in (bad, scores):
        case = Case(given, tables, mode | {"temperature": T})
        torch.manual_seed(1)
        results.append(case.run(impl.backend, case.upstream("out", "entropy", "max_prob", "sum_squares")))
    got, want = results
    others = [0, 1, 3, 4, 5]
    for name in ("entropy", "max_prob", "sum_squares", "grad values 0", "grad temperature"):
        assert_alike(got[name][others], want[name][others])
        assert got[name][2].isnan().any(), name
    assert_alike(got["out"][:, others], want["out"][:, others])
    assert got["out"][:, 2].isnan().all() and got["grad values 0"][2, label].isnan()
    assert torch.equal(got["argmax"][others], want["argmax"][others]) and got["argmax"][2] == label
    if "top_k" not in mode and value != INF:
        assert got["grad values 0"][2].isnan().all()


def test_the_first_nan_is_the_argmax(impl, mode):
    scores, table = leaves(impl, K=1030)
    bad = with_rows(scores, (1, [900, 300], NAN), (2, 1029, NAN), (3, 5, INF), (3, 700, NAN), (4, 0, NAN))
    found = Case(bad, table, mode).call(impl.backend)
    assert found["argmax"].tolist()[1:5] == [300, 1029, 700, 0]
    assert found["out"][1:5].isnan().all() and not found["out"][[0, 5]].isnan().any()


@pytest.mark.parametrize("payload", [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF], ids=hex)
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16], ids=str)
def test_every_nan_is_one_whatever_its_bits(impl, mode, payload, dtype):
    scores, table = logits(3, 37, dtype=dtype), logits(37, 5, dtype=dtype, device=impl.device, requires_grad=True)
    if dtype == F32:
        bits, value = scores.view(torch.int32), payload
    else:
        exponent = 0x7F80 if dtype == torch.bfloat16 else 0x7C00
        bits, value = scores.view(torch.int16), (payload >> 31 << 15) | exponent | (payload & 0x7F or 1)
    width = 32 if dtype == F32 else 16
    bits[1, 20] = value - 2**width if value >= 2 ** (width - 1) else value
    assert scores[1].isnan().sum() == 1
    scores = scores.to(impl.device).requires_grad_()
    got = Case(scores, table, mode).run(impl.backend, Case(scores, table).upstream())
    assert got["out"][1].isnan().all() and not got["out"][[0, 2]].isnan().any()
    grad = got["grad values 0"]
    assert grad[1].isnan().any() and not grad[[0, 2]].isnan().any()


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00001], ids=hex)
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16], ids=str)
def test_nan_in_an_upstream_gradient_survives_rounding(impl, dtype, bits):
    """Rounded as a number, a NaN of all ones becomes zero in 16 bits."""
    scores, table = (
        logits(3, 37, dtype=dtype, device=impl.device, requires_grad=True),
        logits(37, 1, device=impl.device),
    )
    upstream = torch.ones(3, 1)
    upstream.view(torch.int32)[1] = bits
    for options in ({}, {"hard": True}):
        out = soft_embedding(scores, table, **options, backend=impl.backend)
        (grad,) = torch.autograd.grad(out, scores, upstream.to(impl.device))
        assert grad[1].isnan().all() and grad[[0, 2]].isfinite().all()


def test_nan_in_the_table_reaches_the_rows_that_use_it(impl):
    scores, table = leaves(impl)
    bad = with_rows(table, (4, 1, NAN))
    out = soft_embedding(scores, bad, backend=impl.backend)
    assert out[:, 1].isnan().all() and not out[:, [0, 2, 3, 4]].isnan().any()
    mask = torch.zeros(6, 37, dtype=torch.bool, device=impl.device)
    mask[:3, 4] = True
    for options in ({"hard": True}, {"top_k": 3}):  # gathered: rows that are not chosen are not read
        out = soft_embedding(scores, bad, mask=mask, **options, backend=impl.backend)
        assert impl.backend == "reference" or not out[:3].isnan().any()


def test_a_huge_row_of_a_forbidden_label_changes_nothing(impl):
    scores, table = leaves(impl)
    table = with_rows(table, (9, slice(None), 3e38))
    bad = with_rows(scores, (slice(None), 9, -INF))
    got = Case(bad, table, {}).run(impl.backend, Case(bad, table).upstream())
    assert got["out"].isfinite().all()


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (3, 0, 2)], ids=str)
def test_no_rows_give_no_rows_and_gradients_of_zero(impl, mode, shape):
    for tables in ((), (2,)):
        scores = torch.zeros(*shape, 7, device=impl.device, requires_grad=True)
        table = logits(*tables, 7, 3, device=impl.device, requires_grad=True)
        T = torch.ones((), device=impl.device, requires_grad=True)
        case = Case(scores, table, mode | {"temperature": T})
        got = case.run(impl.backend, case.upstream("out", *FLOATS))
        assert got["out"].shape == (*tables, *shape, 3) and got["grad values 0"].shape == scores.shape
        assert not got["grad table"].any() and not got["grad temperature"].any() and not got["usage"].any()
        assert soft_embedding(scores, table, **mode, backend=impl.backend).shape == (*tables, *shape, 3)


def test_no_rows_of_a_head_give_gradients_of_zero(impl):
    given = head(0, vocab_size=7, bias=True, device=impl.device)
    table = logits(7, 3, device=impl.device, requires_grad=True)
    soft_embedding(given, table, backend=impl.backend).sum().backward()
    for tensor in (given.hidden, given.weight, given.bias, table):
        assert tensor.grad.shape == tensor.shape and not tensor.grad.any()


def test_one_label_gives_its_row_and_a_gradient_of_zero(impl, mode):
    scores, table = leaves(impl, K=1)
    got = Case(scores, table, mode).run(impl.backend, Case(scores, table).upstream())
    assert torch.equal(got["out"], table.detach().expand(6, 5)) and not got["grad values 0"].any()


# -- values that are known ---------------------------------------------------------------------------------------------


def assert_is_mean(out, table):
    """Of labels that are all as likely: 1 / K is rounded a few times, then there is a product."""
    p = torch.full((len(out), len(table)), 1 / len(table), dtype=F64, device=table.device)
    few = 8 * unit(F32) * (p @ table.double().abs())
    assert_close("mean", out, p @ table.double(), product_error(p, table.double(), F32) + few)


@pytest.mark.parametrize("K", [1, 2, 33, 1025])
def test_scores_of_zero_give_the_mean_of_the_table(impl, K):
    table = logits(K, 6, device=impl.device)
    for value, T in ((0.0, 1.0), (0.0, 1e-4), (7.5, 0.3), (-1e30, 1.0), (1e30, 1.0)):
        out = soft_embedding(torch.full((3, K), value, device=impl.device), table, temperature=T, backend=impl.backend)
        assert_is_mean(out, table)


@pytest.mark.parametrize("options", [{}, {"hard": True}, {"top_k": 3}, {"hard": True, "top_k": 1}], ids=str)
def test_scores_that_are_all_but_one_hot_return_the_row(impl, options):
    labels, table = torch.tensor([0, 36, 17, 4]), logits(37, 6, device=impl.device)
    scores = torch.nn.functional.one_hot(labels, 37).float().to(impl.device)
    for T in (1e-2, 1e-4):
        out = soft_embedding(scores, table, temperature=T, **options, backend=impl.backend)
        assert torch.equal(out, table[labels])
    masked = torch.where(scores > 0, scores, -INF)
    assert torch.equal(soft_embedding(masked, table, **options, backend=impl.backend), table[labels])


def test_temperatures_at_their_extremes_are_argmax_and_mean(impl):
    scores, table = leaves(impl)
    scores, table = scores.detach(), table.detach()
    cold = soft_embedding(scores, table, temperature=1e-30, backend=impl.backend)
    assert torch.equal(cold, table[scores.argmax(-1)])
    hot = soft_embedding(scores, table, temperature=1e30, backend=impl.backend)
    assert_is_mean(hot, table)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"hard": True}], ids=str)
@pytest.mark.parametrize("kind", ["number", "0-d", "per row"])
@pytest.mark.parametrize("T", [1e-50, 1e-44, 1e-40, 1e-38, 1e-30, 1e30, 1e38, 1e39])
def test_no_positive_temperature_makes_nan_of_a_row_with_masked_and_huge_scores(impl, T, kind, options):
    """Its inverse may be no float32 number, and 0 times infinity is NaN."""
    scores, table = leaves(impl)
    scores = with_rows(
        scores, (0, 3, -INF), (1, slice(None), -INF), (2, [4, 5], 2e38), (2, 6, -2e38), (3, slice(None), 7.0)
    )
    given = T
    if kind != "number":
        given = torch.full((6,) if kind == "per row" else (), min(max(T, 1e-44), 3e38), device=impl.device)
        given.requires_grad_()
    mask = torch.zeros(37, dtype=torch.bool, device=impl.device)
    mask[9] = True
    case = Case(scores, table, {"temperature": given, "mask": mask, **options})
    got = case.run(impl.backend, case.upstream("out", *FLOATS))
    for name, value in got.items():
        if name != "grad temperature":  # it may be infinity times 0
            assert not value.isnan().any(), name
    if T <= 1e-30 and not options:
        chosen = scores.detach().masked_fill(mask, -INF).argmax(-1)
        assert torch.equal(got["out"][[0, 4, 5]], table.detach()[chosen[[0, 4, 5]]])
        assert torch.equal(got["out"][2].double().float(), (table.detach()[4] + table.detach()[5]) / 2)


@pytest.mark.parametrize("size", [1e4, 1e30, 3e38])
def test_scores_as_large_as_they_may_be_do_not_overflow(impl, size):
    scores = torch.tensor([[size, -size, 0.0], [size, size, -size]], device=impl.device, requires_grad=True)
    out = soft_embedding(scores, torch.eye(3, device=impl.device), backend=impl.backend)
    assert torch.equal(out.detach().cpu(), torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0]]))
    (grad,) = torch.autograd.grad(out, scores, torch.tensor([[1.0, 2, 3]] * 2, device=impl.device))
    assert torch.equal(grad.cpu(), torch.tensor([[0.0, 0, 0], [-0.25, 0.25, 0]]))


def test_a_scale_of_zero_is_the_mean_even_of_large_scores(impl):
    table = logits(37, 5, device=impl.device)
    scores = Logits(logits(4, 37, scale=1e3, device=impl.device), scale=0.0)
    assert_is_mean(soft_embedding(scores, table, backend=impl.backend), table)


# -- properties --------------------------------------------------------------------------------------------------------

few = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
sizes = {
    "rows": st.integers(1, 9),
    "K": st.integers(1, 70),
    "D": st.integers(1, 9),
    "T": st.floats(0.01, 20.0),
    "seed": st.integers(0, 2**31),
    "name": st.sampled_from(sorted(MODES)),
}


def drawn(impl, rows, K, D, T, seed, name):
    generator = torch.Generator().manual_seed(seed)
    scores, table = (torch.randn(*s, generator=generator).to(impl.device) * 3 for s in ((rows, K), (K, D)))
    return scores, table, MODES[name] | {"temperature": T, "backend": impl.backend}


@few
@for_all(**sizes)
def test_the_mixture_is_inside_the_tables_range(impl, **sizes):
    scores, table, options = drawn(impl, **sizes)
    out = soft_embedding(scores, table, **options)
    room = OF_A_ROW * unit(F32) * table.abs().amax(0)  # p add up to 1
    assert (out <= table.amax(0) + room).all() and (out >= table.amin(0) - room).all()


@few
@for_all(**sizes)
def test_permuting_the_labels_changes_nothing_but_rounding(impl, **sizes):
    scores, table, options = drawn(impl, **sizes)
    options = {k: v for k, v in options.items() if k not in ("gumbel", "seed")}  # noise belongs to a label's number
    order = torch.randperm(scores.shape[1], generator=torch.Generator().manual_seed(sizes["seed"])).to(impl.device)
    got, want = soft_embedding(scores[:, order], table[order], **options), soft_embedding(scores, table, **options)
    assert_alike(got, want)


@few
@for_all(**sizes)
def test_adding_a_number_to_a_row_changes_nothing_but_rounding(impl, **sizes):
    scores, table, options = drawn(impl, **sizes)
    scores = (scores * 8).round() / 8  # adding 64 is exact
    if "gumbel" in options:
        return
    got, want = (soft_embedding(given, table, **options) for given in (scores + 64.0, scores))
    assert torch.equal(got, want)


@few
@for_all(**sizes)
def test_bits_repeat(fused, **sizes):
    scores, table, options = drawn(fused, **sizes)
    results = []
    for _ in range(2):
        own = scores.clone().requires_grad_(), table.clone().requires_grad_()
        out = soft_embedding(*own, **options)
        results.append((out, *torch.autograd.grad(out.sum(), own)))
    assert all(map(torch.equal, *results))


@few
@for_all(**sizes)
def test_a_row_does_not_depend_on_the_scores_of_another(fused, **sizes):
    scores, table, options = drawn(fused, **sizes)
    kept = sizes["seed"] % sizes["rows"]
    other = torch.randn_like(scores) * 50
    other[kept] = scores[kept]
    results = []
    for given in (scores, other):
        given = given.clone().requires_grad_()
        out, stats = soft_embedding(given, table, return_stats=True, **options)
        (grad,) = torch.autograd.grad(out.sum() + stats.entropy.sum(), given)
        results.append((out[kept], stats.entropy[kept], stats.max_prob[kept], stats.sum_squares[kept], grad[kept]))
    assert all(map(torch.equal, *results))


@few
@for_all(**sizes)
def test_statistics_are_those_of_a_distribution(impl, **sizes):
    scores, table, options = drawn(impl, **sizes)
    found = Case(scores, table, {k: v for k, v in options.items() if k != "backend"}).call(impl.backend)
    K, room = sizes["K"], OF_A_ROW * unit(F32)
    kept = min(options.get("top_k", K), K)
    log_kept = torch.tensor(float(kept)).log().item()
    assert (found["entropy"] >= -room).all() and (found["entropy"] <= log_kept + room).all()
    assert (found["max_prob"] >= 1 / kept - room).all() and (found["max_prob"] <= 1 + room).all()
    assert (found["sum_squares"] >= found["max_prob"].square() - room).all()
    assert (found["sum_squares"] <= found["max_prob"] + room).all()
    assert abs(found["usage"].sum().item() - 1) <= room and (found["usage"] >= 0).all()
    assert found["entropy"].dtype == F32 if scores.dtype != F64 else True
