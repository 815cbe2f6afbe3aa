"""Heads: loss, statistics and gradients of every mixture of sources against float64, and a LoRA on the head."""

import pytest
import torch
import torch.nn.functional as F
from inputs import covering_pairs, cut_rows, head, label, logits, targets
from oracle import HALVES, Case, Plain, relative_error
from tolerance import (
    OF_A_ROW,
    assert_alike,
    assert_same_course,
    check_plain,
    check_results,
    check_statistics,
    check_values,
    gradients_of,
)

from auxkernels import Head, Logits, aux_cross_entropy, logit_stats

WIDE, V = 43, 37
short = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}.get

# what is at each side: H a head, L logits
SOURCES = {
    "H+H": ("H", "H"),
    "L+H": ("L", "H"),
    "H+L": ("H", "L"),
    "H alone": ("H", ""),
    "[H,L]+H": ("HL", "H"),
    "H+[H,H]": ("H", "HH"),
    "[L,H]+[H,L]": ("LH", "HL"),
}
SHAPES = {"[24]": (24,), "[4,6]": (4, 6), "[2,3,2,2]": (2, 3, 2, 2), "[]": ()}
SCALES = {
    "": lambda shape, made: 1.0,
    "number": lambda shape, made: -0.7,
    "one": lambda shape, made: torch.tensor(0.6, **made),
    "per row": lambda shape, made: torch.rand(shape, **made) + 0.5,
}


def scale_dtype(dtype):
    return torch.float32 if dtype in HALVES else dtype


def make_source(kind, shape, dtype, device, *, bias=False, softcap=None, scale="", grad=True, vocab_size=WIDE):
    made = {"dtype": scale_dtype(dtype), "device": device}
    options = {"softcap": softcap, "scale": SCALES[scale](shape, made)}
    if isinstance(options["scale"], torch.Tensor):
        options["scale"].requires_grad_(grad)
    if kind == "H":
        return head(*shape, vocab_size=vocab_size, bias=bias, dtype=dtype, device=device, grad=grad, **options)
    values = logits(*shape, vocab_size, dtype=dtype, device=device, scale=1.5, requires_grad=grad)
    return Logits(values, **options)


def make_sources(names, shape, dtype, device, *, softcap="", scale="", bias=False, **options):
    """Base and aux; softcap: at which side; the odd ones of several sources have no scale."""
    sides = []
    for side, kinds in zip(("base", "aux"), SOURCES[names], strict=True):
        cap = 4.0 if softcap in (side, "both") else None
        of_side = [
            make_source(kind, shape, dtype, device, bias=bias, softcap=cap, scale=scale if i == 0 else "", **options)
            for i, kind in enumerate(kinds)
        ]
        sides.append(of_side if len(of_side) > 1 else of_side[0] if of_side else None)
    return sides


# -- loss and gradients ------------------------------------------------------------------------------------------------

AXES = {
    "sources": list(SOURCES),
    "dtype": [torch.float32, torch.bfloat16, torch.float16, torch.float64],
    "shape": list(SHAPES),
    "scale": list(SCALES),
    "softcap": ["", "base", "aux", "both"],
    "bias": [False, True],
    "chunks": [1, 3],
    "reduction": ["mean", "sum", "none"],
    "normalizer": [None, 7.5],
    "label_smoothing": [0.0, 0.1],
    "z_loss": [0.0, 0.01],
    "weighted": [False, True],
    "recompute": [False, True],
    "return_stats": [False, True],
    "vocab_size": [None, V],
    "ignored": [0.0, 0.3],
    "target_dtype": [torch.int64, torch.int32],
}


def case_of(row: dict, device: str) -> Case:
    row = dict(row)
    shape, dtype, vocab_size = SHAPES[row["shape"]], row["dtype"], row["vocab_size"] or WIDE
    chosen = {name: row[name] for name in ("scale", "softcap", "bias")}
    base, aux = make_sources(row["sources"], shape, dtype, device, **chosen)
    ignored = row["ignored"] if shape else 0.0
    target = targets(*shape, vocab_size=vocab_size, dtype=row["target_dtype"], device=device, ignored=ignored)
    options = {name: row[name] for name in ("reduction", "label_smoothing", "z_loss", "recompute", "vocab_size")}
    if row["weighted"]:
        options["weight"] = torch.rand(vocab_size, device=device) + 0.1
    if row["normalizer"] and row["reduction"] == "mean":
        options["normalizer"] = row["normalizer"]
    return Case(base, aux, target, options)


@pytest.mark.parametrize("row", covering_pairs(AXES), ids=label)
def test_every_pair_of_options_has_the_loss_and_gradients_of_float64(impl, monkeypatch, row):
    if row["dtype"] == torch.float64 and impl.backend == "triton":
        pytest.skip("the Triton kernels have no float64")
    if row["chunks"] > 1:
        cut_rows(monkeypatch, 5)
    case = case_of(row, impl.device)
    upstream = torch.randn(case.target.shape, device=impl.device) if row["reduction"] == "none" else None
    check_plain(case, impl, upstream)
    if row["return_stats"]:
        loss, stats = aux_cross_entropy(
            case.base, case.aux, case.target, backend=impl.backend, return_stats=True, **case.options
        )
        alone = aux_cross_entropy(case.base, case.aux, case.target, backend=impl.backend, **case.options)
        assert_alike(loss, alone)  # other sums are formed beside it, and a compiler orders them as it likes
        assert not any(value.requires_grad for value in vars(stats).values())
        check_statistics(stats, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("width", [1, 7, 64])
@pytest.mark.parametrize("vocab_size", [1, 2, 33, 4097])
def test_every_width_of_hidden_and_vocabulary(impl, monkeypatch, vocab_size, width, dtype):
    cut_rows(monkeypatch, 4)
    made = {"vocab_size": vocab_size, "width": width, "dtype": dtype, "device": impl.device}
    base, aux = head(9, grad=False, **made), head(9, bias=True, **made)
    check_plain(Case(base, aux, targets(9, vocab_size=vocab_size, device=impl.device, ignored=0.2)), impl)


@pytest.mark.parametrize("pair", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str)
@pytest.mark.parametrize("names", ["H+H", "L+H", "[L,H]+[H,L]"])
def test_sources_of_two_dtypes(impl, names, pair):
    base, _ = make_sources(names, (12,), pair[0], impl.device)
    _, aux = make_sources(names, (12,), pair[1], impl.device)
    check_plain(Case(base, aux, targets(12, vocab_size=WIDE, device=impl.device, ignored=0.2)), impl)


@pytest.mark.parametrize("dtype", HALVES, ids=short)
@pytest.mark.parametrize("names", ["H+H", "H+L"])
def test_losses_of_many_16_bit_rows_are_no_worse_than_eagers(impl, monkeypatch, names, dtype):
    """Without an allowance: over many rows luck evens out."""
    cut_rows(monkeypatch, 100)
    base, aux = make_sources(names, (300,), dtype, impl.device, grad=False)
    case = Case(base, aux, targets(300, vocab_size=WIDE, device=impl.device), {"reduction": "none"})
    got, want, eager = case.run(impl.backend)["loss"], Plain(case).loss(), Plain(case, None).loss()
    assert relative_error(got, want) < relative_error(eager, want)


@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16], ids=short)
def test_a_float64_head_makes_the_loss_float64_and_leaves_the_others_their_dtype(doubles, other):
    base = head(9, vocab_size=V, dtype=torch.float64, device=doubles.device)
    aux = head(9, vocab_size=V, dtype=other, device=doubles.device)
    loss = aux_cross_entropy(base, aux, targets(9, vocab_size=V, device=doubles.device), backend=doubles.backend)
    assert loss.dtype == torch.float64
    leaves = (base.hidden, base.weight, aux.hidden, aux.weight)
    assert [grad.dtype for grad in torch.autograd.grad(loss, leaves)] == [leaf.dtype for leaf in leaves]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=short)
@pytest.mark.parametrize("form", ["alone", "in a sum"])
def test_a_scale_of_any_dtype_gets_a_gradient_of_that_dtype(impl, form, dtype):
    scale = torch.rand(9, device=impl.device).to(dtype).requires_grad_()
    base, aux = head(9, vocab_size=V, device=impl.device), head(9, vocab_size=V, device=impl.device, scale=scale)
    target = targets(9, vocab_size=V, device=impl.device, ignored=0.2)
    case = Case(base, aux if form == "alone" else [aux, base], target)
    got = case.run(impl.backend)
    assert got["scale of aux[0]"].dtype == dtype
    assert got["loss"].dtype == torch.float32
    check_results(case, got)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_head_is_its_logits(impl, reduction):
    """Plain cross-entropy of one head is torch's own of hidden @ weight.T + bias: both are float64's."""
    base = head(11, vocab_size=V, bias=True, device=impl.device)
    target = targets(11, vocab_size=V, device=impl.device, ignored=0.2)
    leaves = (base.hidden, base.weight, base.bias)
    case = Case(base, None, target, {"reduction": reduction})
    upstream = torch.ones(11, device=impl.device) if reduction == "none" else None
    want = F.cross_entropy(F.linear(*leaves), target, reduction=reduction)
    grads = torch.autograd.grad(want, leaves, upstream)
    check_results(case, {"loss": want, **dict(zip(case.leaves(), grads, strict=True))}, upstream)
    check_plain(case, impl, upstream)


def test_a_head_in_a_list_is_the_head(impl):
    base, aux = (head(11, vocab_size=V, device=impl.device) for _ in range(2))
    target = targets(11, vocab_size=V, device=impl.device, ignored=0.2)
    losses = [aux_cross_entropy(b, a, target, backend=impl.backend) for b, a in ((base, aux), ([base], (aux,)))]
    assert torch.equal(*losses)


def test_rows_of_weights_past_vocab_size_get_gradient_zero_and_are_read_by_nobody(impl, monkeypatch):
    cut_rows(monkeypatch, 4)
    base, aux = (head(9, vocab_size=WIDE, bias=True, device=impl.device) for _ in range(2))
    values = logits(9, WIDE, device=impl.device)
    with torch.no_grad():
        for place in (base.weight, aux.weight, base.bias, aux.bias, values.T):
            place[V:] = torch.nan
    values.requires_grad_()
    leaves = (base.weight, base.bias, aux.weight, aux.bias)
    target = targets(9, vocab_size=V, device=impl.device, ignored=0.2)
    for sources in ((base, aux), ([values, base], aux)):
        for options in ({}, {"reduction": "none"}):
            loss = aux_cross_entropy(*sources, target, vocab_size=V, backend=impl.backend, **options)
            assert loss.isfinite().all()
            for grad in torch.autograd.grad(loss.sum(), leaves):
                assert grad.isfinite().all() and grad[:V].any()
                assert not grad[V:].any() and not torch.signbit(grad[V:]).any()
    loss = aux_cross_entropy([values, base], aux, target, vocab_size=V, backend=impl.backend)
    (grad,) = torch.autograd.grad(loss, values)
    assert grad.isfinite().all() and not grad[:, V:].any()


# -- statistics --------------------------------------------------------------------------------------------------------

FLOATS = ("log_prob", "base_log_prob", "lse", "entropy", "kl_to_base")


STATISTICS = {
    "sources": list(SOURCES),
    "dtype": [torch.float32, torch.bfloat16, torch.float64],
    "shape": list(SHAPES),
    "scale": list(SCALES),
    "softcap": ["", "both"],
    "bias": [True, False],
    "chunks": [1, 3],
    "target": ["none", "all", "some"],
    "vocab_size": [None, V],
}


@pytest.mark.parametrize("row", covering_pairs(STATISTICS, seed=1), ids=label)
def test_statistics_and_their_gradients_are_those_of_float64(impl, monkeypatch, row):
    if row["dtype"] == torch.float64 and impl.backend == "triton":
        pytest.skip("the Triton kernels have no float64")
    if row["chunks"] > 1:
        cut_rows(monkeypatch, 5)
    shape, vocab_size = SHAPES[row["shape"]], row["vocab_size"] or WIDE
    chosen = {name: row[name] for name in ("scale", "softcap", "bias")}
    base, aux = make_sources(row["sources"], shape, row["dtype"], impl.device, **chosen)
    target = None
    if row["target"] != "none":
        ignored = 0.3 if row["target"] == "some" and shape else 0.0
        target = targets(*shape, vocab_size=vocab_size, device=impl.device, ignored=ignored)
    case = Case(base, aux, target, {"vocab_size": row["vocab_size"]})
    stats = logit_stats(base, aux, target, vocab_size=row["vocab_size"], backend=impl.backend)
    check_statistics(stats, case)
    with torch.no_grad():
        check_statistics(logit_stats(base, aux, target, **case.options, backend=impl.backend), case)
    check_gradients_of_statistics(stats, case, impl)


def check_gradients_of_statistics(stats, case: Case, impl) -> None:
    names = [name for name in FLOATS if getattr(stats, name) is not None]
    if case.aux is None:
        names.remove("kl_to_base")  # zero, with a gradient of rounding errors
    leaves, upstream = case.leaves(), torch.randn(stats.lse.shape, device=impl.device)
    got = {}
    for name in names:
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        grads = torch.autograd.grad(getattr(stats, name), leaves.values(), upstream, **options)
        got |= {f"{name}: gradient of {place}": grad for place, grad in zip(leaves, grads, strict=True)}

    def values_of(call):
        found, values = call.statistics(), {}
        for name in names:
            values |= gradients_of(getattr(found, name), call, upstream, f"{name}: gradient of ")
        return values

    check_values(values_of, got, case)


# -- a LoRA on the head ------------------------------------------------------------------------------------------------

ALPHA, RANK = 0.75, 4


def lora(device, dtype=torch.float32, rows=20, width=12):
    made = {"dtype": dtype, "device": device}
    hidden = logits(rows, width, scale=1.0, **made).requires_grad_()
    weight = logits(V, width, scale=0.5, **made)
    down = logits(RANK, width, scale=0.3, **made).requires_grad_()
    up = logits(V, RANK, scale=0.3, **made).requires_grad_()
    return hidden, weight, down, up


def lora_loss(hidden, weight, down, up, target, **options):
    return aux_cross_entropy(Head(hidden, weight), Head(hidden @ down.T, up, scale=ALPHA), target, **options)


def dense_loss(hidden, weight, down, up, target, changed=lambda s: s):
    return F.cross_entropy(changed(hidden @ (weight + ALPHA * up @ down).T), target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short)
@pytest.mark.parametrize("learns_weight", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_lora_on_the_head_has_the_gradients_of_the_summed_weight(impl, monkeypatch, dtype, learns_weight, recompute):
    if dtype == torch.float64 and impl.backend == "triton":
        pytest.skip("the Triton kernels have no float64")
    cut_rows(monkeypatch, 6)
    tensors = lora(impl.device, dtype)
    tensors[1].requires_grad_(learns_weight)
    target = targets(20, vocab_size=V, device=impl.device, ignored=0.2)
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    loss = lora_loss(*tensors, target, recompute=recompute, backend=impl.backend)
    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]
    want = dense_loss(*exact, target)
    grads = torch.autograd.grad(loss, leaves)
    wanted = torch.autograd.grad(want, [tensor for tensor in exact if tensor.requires_grad])
    assert_alike([loss, *grads], [want, *wanted], OF_A_ROW + V)  # and products of up to V terms


def test_training_a_lora_on_the_head_follows_the_dense_formula(impl, monkeypatch):
    cut_rows(monkeypatch, 6)
    hidden, weight, down, up = lora(impl.device)
    target = targets(20, vocab_size=V, device=impl.device, ignored=0.2)

    def course_of(loss_of):
        parameters = [tensor.detach().clone().requires_grad_() for tensor in (down, up)]
        optimizer = torch.optim.AdamW(parameters, lr=3e-2)
        course = []
        for _ in range(25):
            loss = loss_of(hidden.detach(), weight, *parameters, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            course.append(loss.item())
        return [torch.tensor(course)]

    (course,) = assert_same_course(course_of, dense_loss, lambda *args: lora_loss(*args, backend=impl.backend))
    assert course[-1] < 0.6 * course[0]  # it learns


def test_hidden_sliced_from_a_sequence_gets_its_gradient_in_place(impl):
    """The usual causal shift, of hidden states: `h[:, :-1]` against `labels[:, 1:]`."""
    states = logits(3, 6, 16, scale=1.0, device=impl.device, requires_grad=True)
    other, weight = head(3, 5, vocab_size=V, device=impl.device), head(1, vocab_size=V, device=impl.device).weight
    labels = targets(3, 6, vocab_size=V, device=impl.device, ignored=0.2)
    loss = aux_cross_entropy(other, Head(states[:, :-1], weight), labels[:, 1:], backend=impl.backend)
    case = Case(other, Head(states.detach()[:, :-1].clone().requires_grad_(), weight), labels[:, 1:])
    (grad,) = torch.autograd.grad(loss, states)
    check_results(case, {"hidden of aux[0]": grad[:, :-1]})
    assert not grad[:, -1].any()
