"""Tensors that are not what they seem: subclasses, transforms, lazy signs, inference mode, one tensor in two places."""

import pytest
import torch
from inputs import logits
from subclasses import Wrapped
from tolerance import assert_alike

from auxkernels import Logits, aux_cross_entropy, logit_stats

TARGET = torch.tensor([1, 2, -100, 3])


@pytest.mark.parametrize("place", ["base", "aux", "weight", "scale", "target"])
def test_a_tensor_subclass_counts_for_what_it_holds(native, place):
    given = {
        "base": logits(4, 7),
        "aux": logits(4, 7),
        "weight": torch.rand(7),
        "scale": torch.tensor(3.0),
        "target": TARGET,
    }

    def loss(base, aux, weight, scale, target):
        return aux_cross_entropy(base, Logits(aux, scale=scale), target, weight=weight, backend="native")

    want = loss(**given)
    assert torch.equal(loss(**given | {place: Wrapped(given[place])}), want)


def test_functionalization_sees_the_operator(native):
    base, aux = logits(4, 7), logits(4, 7)

    def loss(base, aux):
        return aux_cross_entropy(base, aux, TARGET, backend="native")

    assert torch.equal(torch.func.functionalize(loss)(base, aux), loss(base, aux))


def test_a_traced_call_computes(native):
    base, aux = logits(4, 7), logits(4, 7)

    def loss(base, aux):
        return aux_cross_entropy(base, aux, TARGET, backend="native")

    try:
        traced = torch.jit.trace(loss, (base, aux), check_trace=False)
    except (RuntimeError, TypeError):
        pytest.skip("this torch does not trace the operator")
    assert torch.equal(traced(aux, aux), loss(aux, aux))


def test_a_lazy_minus_sign_is_read(impl):
    base, aux = logits(4, 7, device=impl.device), logits(4, 7, device=impl.device)
    scale = torch.tensor(1 + 2j, device=impl.device).conj().imag
    target = TARGET.to(impl.device)
    got = aux_cross_entropy(base, Logits(torch._neg_view(aux), scale=scale), target, backend=impl.backend)
    want = aux_cross_entropy(base, Logits(-aux, scale=-2.0), target, backend=impl.backend)
    assert_alike(got, want)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_is_not_trained_may_come_from_inference_mode(impl, reduction):
    aux = logits(4, 7, device=impl.device, requires_grad=True)
    with torch.inference_mode():
        target, weight = TARGET.to(impl.device).clone(), torch.rand(7, device=impl.device)
        frozen = logits(4, 7, device=impl.device)
    base = frozen if reduction == "mean" and impl.backend != "reference" else frozen.clone()
    loss = aux_cross_entropy(base, aux, target, weight=weight, reduction=reduction, backend=impl.backend)
    loss.sum().backward()
    assert aux.grad.isfinite().all() and aux.grad.any()


def test_a_frozen_source_of_a_sum_is_not_kept_for_backward(fused):
    base, aux = (logits(4, 7, device=fused.device) for _ in range(2))
    frozen, target = logits(4, 7, device=fused.device), TARGET.to(fused.device)
    loss = aux_cross_entropy(base, [frozen, aux.requires_grad_()], target, backend=fused.backend)
    frozen.zero_()
    loss.backward()
    assert aux.grad.any()


def test_a_learned_scale_and_logits_may_stand_in_two_places_when_compiled(impl):
    scale = torch.tensor(0.7, device=impl.device, requires_grad=True)
    aux, target = logits(4, 7, device=impl.device, requires_grad=True), TARGET.to(impl.device)

    def loss(aux, scale):
        pair = aux_cross_entropy(Logits(aux, scale=scale), Logits(aux, scale=scale), target, backend=impl.backend)
        return pair + aux_cross_entropy([aux, aux], None, target, backend=impl.backend)

    fast = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(fast(aux, scale), (aux, scale))
    want = torch.autograd.grad(loss(aux, scale), (aux, scale))
    for one, two in zip(got, want, strict=True):
        assert_alike(one, two)


DOUBLE = {
    "hessian": lambda f, aux: torch.autograd.functional.hessian(f, aux.detach()),
    "grad of grad": lambda f, aux: torch.autograd.grad(first_gradient(f, aux).pow(2).sum(), aux),
    "penalty": lambda f, aux: torch.autograd.grad(f(aux) + first_gradient(f, aux).pow(2).sum(), aux),
    "inputs": lambda f, aux: first_gradient(f, aux).pow(2).sum().backward(inputs=[aux]),
    "plain": lambda f, aux: first_gradient(f, aux).pow(2).sum().backward(),
}
PATHS = {
    "mean": lambda base, aux, **kw: aux_cross_entropy(base, aux, **kw),
    "none": lambda base, aux, **kw: aux_cross_entropy(base, aux, reduction="none", **kw).mean(),
    "recompute": lambda base, aux, **kw: aux_cross_entropy(base, aux, recompute=True, **kw),
    "sum of sources": lambda base, aux, **kw: aux_cross_entropy(base, [aux, base], **kw),
    "entropy": lambda base, aux, **kw: logit_stats(base, aux, **kw).entropy.sum(),
}


def first_gradient(function, aux):
    return torch.autograd.grad(function(aux), aux, create_graph=True)[0]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("how", DOUBLE)
def test_every_way_to_differentiate_twice_is_an_error_and_not_a_lost_term(fused, how, path):
    base, aux = (logits(4, 7, device=fused.device) for _ in range(2))
    target = TARGET.to(fused.device)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        DOUBLE[how](lambda x: PATHS[path](base, x, target=target, backend=fused.backend), aux.requires_grad_())


def test_an_ignored_row_takes_no_weight_from_a_class(impl):
    base, aux = logits(4, 7, device=impl.device), logits(4, 7, device=impl.device)
    weight = torch.ones(7, device=impl.device)
    weight[0] = torch.inf
    target = torch.tensor([-100, 1, 2, -100], device=impl.device)
    for options in ({"reduction": "none"}, {"recompute": True}, {}):
        loss = aux_cross_entropy(base, aux, target, weight=weight, backend=impl.backend, **options)
        assert loss.isfinite().all()


@pytest.mark.parametrize("softcap", [1e-50, 1e39, 10**400])
def test_a_softcap_that_float32_cannot_hold_is_refused(impl, softcap):
    base = logits(4, 7, device=impl.device)
    with pytest.raises(ValueError, match="softcap of base"):
        aux_cross_entropy(Logits(base, softcap=softcap), None, TARGET.to(impl.device), backend=impl.backend)


def test_a_tiny_loss_has_the_same_bits_in_few_rows_and_in_many(native):
    """Split rows and whole rows must flush results below the normal numbers alike."""
    row = torch.zeros(131072)
    row[3] = 100.0
    few, many = (
        aux_cross_entropy(row.expand(n, -1), None, torch.full((n,), 3), reduction="none", backend="native")
        for n in (1, 64)
    )
    assert torch.equal(few.view(torch.int32)[0], many.view(torch.int32)[0])
