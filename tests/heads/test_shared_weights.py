"""Heads of one weight: one product where a sum of hidden states is exact, and the same numbers everywhere."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from inputs import covering_pairs, cut_rows, head, label, logits, targets
from oracle import HALVES, Case, relative_error
from tolerance import assert_alike, check_plain, check_statistics

from auxkernels import Head, aux_cross_entropy, logit_stats
from auxkernels.heads import products as product_module
from auxkernels.heads import shared_weights as shared_module

N, V, D = 24, 37, 16
BF16 = torch.bfloat16
SCALES = {
    "": lambda made: 1.0,
    "number": lambda made: -0.7,
    "one": lambda made: torch.tensor(0.6, **made),
    "per row": lambda made: torch.randn(N, **made),
}


def shared(device="cpu", *, dtype=torch.float32, bias="", scale="", scaled="aux", trained="aux", hidden_only=False):
    """Base and auxiliary of one weight; trained: which hidden states, scales and biases get a gradient."""
    made = {"dtype": dtype, "device": device}
    weight = logits(V, D, scale=2 * D**-0.5, requires_grad=trained == "all", **made)
    sides = []
    for side in ("base", "aux"):
        grad = trained in (side, "both", "all")
        of_scale = {"dtype": torch.float32 if dtype in HALVES else dtype, "device": device}
        factor = SCALES[scale if scaled in (side, "both") else ""](of_scale)
        if isinstance(factor, torch.Tensor):
            factor.requires_grad_(grad and not hidden_only)
        own = logits(V, scale=1.0, requires_grad=grad, **made) if bias in (side, "both") else None
        sides.append(Head(logits(N, D, scale=1.0, requires_grad=grad, **made), weight, bias=own, scale=factor))
    return sides


@pytest.fixture
def products(monkeypatch):
    """The sizes (rows, columns) of the products that a call makes."""
    made, plain = [], product_module.multiply

    def spy(a, b, out, *args, **kwargs):
        made.append(tuple(out.shape))
        return plain(a, b, out, *args, **kwargs)

    for module in (product_module, shared_module):
        monkeypatch.setattr(module, "multiply", spy)
    return made


# -- the same numbers --------------------------------------------------------------------------------------------------

AXES = {
    "dtype": [torch.float32, torch.bfloat16, torch.float16, torch.float64],
    "bias": ["", "base", "aux", "both"],
    "scale": list(SCALES),
    "scaled": ["aux", "base", "both"],
    "trained": ["aux", "base", "both", "all"],
    "hidden_only": [False, True],
    "options": [{}, {"reduction": "none"}, {"recompute": True}, {"label_smoothing": 0.1, "z_loss": 0.01}],
    "chunks": [1, 3],
    "ignored": [0.0, 0.3],
}


@pytest.mark.parametrize("row", covering_pairs(AXES), ids=label)
def test_every_pair_of_options_has_the_loss_and_gradients_of_float64(impl, monkeypatch, row):
    row = dict(row)
    if row["dtype"] == torch.float64 and impl.backend == "triton":
        pytest.skip("the Triton kernels have no float64")
    if row.pop("chunks") > 1:
        cut_rows(monkeypatch, 7)
    options, ignored = row.pop("options"), row.pop("ignored")
    base, aux = shared(impl.device, **row)
    case = Case(base, aux, targets(N, vocab_size=V, device=impl.device, ignored=ignored), options)
    upstream = torch.randn(N, device=impl.device) if options.get("reduction") == "none" else None
    check_plain(case, impl, upstream)


@pytest.mark.parametrize("sides", ["[W,U]+[U,W]", "U+[W,W]", "[W,U]+W", "capped W+[W,W]", "logits+[W,W]"])
@pytest.mark.parametrize("vocab_size", [None, 31])
def test_beside_other_sources_each_tensor_has_its_own_gradient(impl, sides, vocab_size):
    one, other = shared(impl.device, trained="both", scale="per row")
    u = head(N, vocab_size=V, width=5, bias=True, device=impl.device)
    values = logits(N, V, device=impl.device, requires_grad=True)
    third = Head(logits(N, D, scale=1.0, device=impl.device, requires_grad=True), one.weight, scale=0.3)
    base, aux = {
        "[W,U]+[U,W]": ([one, u], [replace(u, scale=-0.5), other]),
        "U+[W,W]": (u, [one, other]),
        "[W,U]+W": ([one, u], other),
        "capped W+[W,W]": (replace(third, softcap=3.0), [one, other]),
        "logits+[W,W]": (values, [one, other]),
    }[sides]
    target = targets(N, vocab_size=vocab_size or V, device=impl.device, ignored=0.2)
    case = Case(base, aux, target, {} if vocab_size is None else {"vocab_size": vocab_size})
    check_plain(case, impl)
    check_statistics(logit_stats(base, aux, target, vocab_size=vocab_size, backend=impl.backend), case)


def test_ignored_rows_get_exact_zero_gradient_whatever_they_hold(impl):
    base, aux = shared(impl.device, scale="per row", trained="both", scaled="both")
    target = targets(N, vocab_size=V, device=impl.device)
    target[[2, 5, 6, 11]] = -100
    with torch.no_grad():
        base.hidden[2], aux.hidden[5], aux.scale[6], base.scale[11] = torch.nan, torch.inf, torch.nan, -torch.inf
        aux.scale[2] = -1.0
    leaves = [base.hidden, aux.hidden, base.scale, aux.scale]
    for options in ({}, {"reduction": "none"}, {"recompute": True}):
        loss = aux_cross_entropy(base, aux, target, backend=impl.backend, **options)
        grads = torch.autograd.grad(loss.sum(), leaves)
        for grad in grads:
            of_ignored = grad[[2, 5, 6, 11]]
            assert not of_ignored.any() and not of_ignored.signbit().any()
            assert grad.isfinite().all()


def test_a_masked_class_of_a_bias_is_a_masked_class_of_the_sum(impl):
    base, aux = (replace(h, bias=h.bias.detach()) for h in shared(impl.device, bias="both", scale="number"))
    base.bias[3:9] = -torch.inf
    target = targets(N, vocab_size=3, device=impl.device)
    doubles = [Head(h.hidden.detach().double(), h.weight.double(), bias=h.bias.double()) for h in (base, aux)]
    doubles[1] = replace(doubles[1], hidden=doubles[1].hidden.requires_grad_(), scale=aux.scale)
    loss = aux_cross_entropy(base, aux, target, backend=impl.backend)
    want = aux_cross_entropy(*doubles, target, backend="reference")
    assert want.isfinite()
    assert_alike(loss, want)
    assert_alike(torch.autograd.grad(loss, aux.hidden), torch.autograd.grad(want, doubles[1].hidden))


# -- the products that are made ----------------------------------------------------------------------------------------


def step(base, aux, target, backend="auto", **options):
    loss = aux_cross_entropy(base, aux, target, backend=backend, **options)
    (loss[0] if isinstance(loss, tuple) else loss).sum().backward()


@pytest.mark.parametrize("scale", list(SCALES))
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}], ids=str)
def test_a_frozen_shared_weight_costs_one_product_forward_and_one_backward(products, scale, options):
    for trained in ("aux", "both"):
        base, aux = shared(scale=scale, trained=trained)
        step(base, aux, targets(N, vocab_size=V), **options)
        again = 2 if options else 1  # "none" makes the logits anew in backward
        assert products.count((N, V)) == again and products.count((N, D)) == 1 and len(products) == again + 1
        products.clear()


def test_views_of_one_memory_are_one_weight_and_equal_copies_are_not(products):
    base, aux = shared()
    target = targets(N, vocab_size=V)
    for weight, num_products in ((aux.weight[:], 1), (aux.weight.detach(), 1), (aux.weight.clone(), 2)):
        with torch.no_grad():
            aux_cross_entropy(base, replace(aux, weight=weight), target)
        assert products == [(N, V)] * num_products
        products.clear()


TOO_MUCH = ["softcap", "bias of scaled rows", "learned scale of a bias", "statistics of the base"]


@pytest.mark.parametrize("which", TOO_MUCH)
def test_what_a_sum_of_hidden_states_cannot_express_costs_two_products(products, which):
    base, aux = shared(scale="per row" if which == "bias of scaled rows" else "one", bias="aux")
    options = {}
    if which == "softcap":
        base = replace(base, softcap=3.0)
    elif which == "statistics of the base":
        base, aux = shared()
        options = {"return_stats": True}
    with torch.no_grad():
        aux = aux if which == "learned scale of a bias" else replace(aux, scale=getattr(aux.scale, "detach", float)())
    step(base, aux, targets(N, vocab_size=V), **options)
    assert products.count((N, V)) == 2


def test_statistics_of_the_sum_alone_cost_one_product(products):
    base, aux = shared()
    target = targets(N, vocab_size=V)
    want = logit_stats(base, aux, target)
    products.clear()
    stats = logit_stats(Head(base.hidden + aux.hidden, base.weight), None, target)
    assert products == [(N, V)]
    for name in ("log_prob", "lse", "entropy", "argmax"):
        assert_alike(getattr(stats, name), getattr(want, name))


# -- 16 bits -----------------------------------------------------------------------------------------------------------


def test_hidden_states_of_16_bits_are_not_rounded_to_their_sum(products, monkeypatch):
    """A sum of 300 and 0.5 is 300 in bfloat16: it takes two products of that, or one of float32."""
    hidden = [torch.full((N, D), value) for value in (300.0, 0.5)]
    weight, target = torch.randn(V, D), targets(N, vocab_size=V)
    # on CPU, float16 is computed in float32, and so is what the processor has no instructions for
    for dtype, has_bfloat16, num_products in ((BF16, True, 2), (BF16, False, 1), (torch.float16, True, 1)):
        monkeypatch.setattr(product_module, "has_bfloat16", lambda has=has_bfloat16: has)
        products.clear()
        rounded = weight.to(dtype)
        base, aux = (Head(h.to(dtype), rounded) for h in hidden)
        loss = aux_cross_entropy(base, aux, target, backend="native")
        assert products.count((N, V)) == num_products
    exact = F.cross_entropy((hidden[0] + hidden[1]).double() @ rounded.double().T, target)
    assert relative_error(loss, exact) < 2e-6


def test_under_autocast_the_sum_is_rounded_once_and_no_worse_than_eagers(products):
    ours, eagers = [], []
    for _ in range(20):
        base, aux = shared(scale="number")
        target = targets(N, vocab_size=V)
        with torch.autocast("cpu", BF16):
            products.clear()
            rows = aux_cross_entropy(base, aux, target, reduction="none")
            assert products == [(N, V)]
            eager = F.linear(base.hidden, base.weight) - 0.7 * F.linear(aux.hidden, aux.weight)
        eager = F.cross_entropy(eager.float(), target, reduction="none")
        summed = base.hidden.double() - 0.7 * aux.hidden.double()
        exact = F.cross_entropy(summed @ base.weight.to(BF16).double().T, target, reduction="none")
        ours.append((rows - exact).square().mean())
        eagers.append((eager - exact).square().mean())
    assert torch.stack(ours).mean() <= torch.stack(eagers).mean()


def test_a_shared_weight_compiles(products):
    base, aux = shared(scale="per row")
    target = targets(N, vocab_size=V)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(h_base, h_aux, weight, scale):
        return aux_cross_entropy(Head(h_base, weight), Head(h_aux, weight, scale=scale), target)

    want = aux_cross_entropy(base, aux, target)
    products.clear()
    got = call(base.hidden, aux.hidden, base.weight, aux.scale)
    assert torch.equal(got, want) and products.count((N, V)) == 1
    grads = [torch.autograd.grad(loss, [aux.hidden, aux.scale]) for loss in (got, want)]
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
