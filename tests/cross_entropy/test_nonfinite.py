"""Rows with infinities and NaN: the pattern of float64 torch, in that row only, whatever its neighbours hold."""

import pytest
import torch
import torch.nn.functional as F
from inputs import logits, targets
from nonfinite import (
    INF,
    OPTIONS,
    PATTERNS,
    TARGET,
    V,
    extremes,
    pattern,
    run,
    torch_result,
)
from oracle import assert_close
from tolerance import OF_A_ROW, assert_alike, unit

from auxkernels import Logits, aux_cross_entropy

# every dtype meets every pattern, and so does every set of options; half-precision none is what reads twice in fp16
MEETINGS = [(torch.float32, name) for name in OPTIONS] + [(torch.bfloat16, "sum"), (torch.float16, "none")]


@pytest.mark.parametrize("dtype, options", MEETINGS)
@pytest.mark.parametrize("name", PATTERNS)
def test_a_row_has_the_pattern_of_float64_torch_and_its_neighbours_are_untouched(impl, name, dtype, options):
    options = OPTIONS[options]
    if PATTERNS[name] is extremes:
        # the square of such an lse overflows in float32; whether a row's loss does before it is averaged is left open
        options = {"reduction": options["reduction"].replace("mean", "sum")}
    base, aux = (logits(3, V, dtype=dtype, device=impl.device, scale=1.0) for _ in range(2))
    target = torch.tensor([7, TARGET, V - 1], device=impl.device)
    clean = run(base, aux, target, options, impl)
    PATTERNS[name](base[1], aux[1])
    loss, grad_base, grad_aux = run(base, aux, target, options, impl)
    want_rows, want_grad = torch_result(base, aux, target, options)
    want_loss = want_rows
    if options["reduction"] != "none":
        want_loss = want_rows.sum()  # the pattern of a mean is that of a sum
    assert torch.equal(pattern(loss), pattern(want_loss.float()))
    for grad, before in ((grad_base, clean[1]), (grad_aux, clean[2])):
        assert torch.equal(pattern(grad), pattern(want_grad))
        assert torch.equal(grad[::2], before[::2])
        masked = (base + aux)[1] == -INF
        finite = want_grad[1].isfinite()
        if finite.all() and "label_smoothing" not in options:
            masked[TARGET] = False
            assert not grad[1][masked].any()
        # signs and sizes; the tight tolerances, 8 eps (1 + |z| + log d), are elsewhere
        close = 1e-4 + torch.finfo(dtype).eps
        error = close * want_grad[1].abs() + 1e-7
        assert_close("gradient", grad[1][finite], want_grad[1][finite], error[finite])
    if options["reduction"] == "none":
        assert torch.equal(loss[::2], clean[0][::2])


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_masked_target_has_infinite_loss_and_the_gradient_p_minus_onehot(impl, smoothing, reduction):
    base, aux = logits(1, 9, device=impl.device), logits(1, 9, device=impl.device)
    aux[0, 4] = -INF
    target = torch.tensor([4], device=impl.device)
    options = {"label_smoothing": smoothing, "reduction": reduction}
    loss, grad, _ = run(base, aux, target, options, impl)
    assert loss.item() == INF
    p = torch.softmax((base + aux).double(), -1)
    onehot = F.one_hot(target, 9)
    want = (1 - smoothing) * (p - onehot) + smoothing * (p - 1 / 9)
    assert_alike(grad, want)


def test_a_masked_class_gets_no_gradient_and_does_not_poison_that_of_the_scale(impl):
    aux = logits(2, 300, device=impl.device)
    aux[0, 10:290] = -INF
    scale = torch.tensor([0.5, 2.0], device=impl.device, requires_grad=True)
    base, target = logits(2, 300, device=impl.device), torch.tensor([0, 5], device=impl.device)
    aux.requires_grad_()
    loss = aux_cross_entropy(base, Logits(aux, scale=scale), target, reduction="sum", backend=impl.backend)
    loss.backward()
    assert not aux.grad[0, 10:290].any() and aux.grad.isfinite().all()
    z = torch.where(aux == -INF, 0.0, aux).detach().double()
    terms = aux.grad.double() / scale.detach().unsqueeze(-1) * z
    assert_close("scale", scale.grad, terms.sum(-1), OF_A_ROW * unit(torch.float32) * terms.abs().sum(-1))


@pytest.mark.parametrize("scale", [-1.0, 0.0])
def test_a_scale_that_turns_minus_inf_into_something_else_makes_that_row_nan(impl, scale):
    aux = logits(2, 300, device=impl.device)
    aux[1, 4] = -INF  # -1 * -inf = +inf, 0 * -inf = NaN
    base, target = logits(2, 300, device=impl.device), torch.tensor([0, 5], device=impl.device)
    options = {"reduction": "none", "backend": impl.backend}
    loss = aux_cross_entropy(base, Logits(aux, scale=torch.tensor(scale, device=impl.device)), target, **options)
    assert loss.isnan().tolist() == [False, True]


def test_a_softcap_makes_infinities_finite_and_gives_them_no_gradient(impl):
    aux = logits(1, 300, device=impl.device)
    aux[0, 0], aux[0, 1] = INF, -INF
    base, target = logits(1, 300, device=impl.device), torch.tensor([5], device=impl.device)
    aux.requires_grad_()
    loss = aux_cross_entropy(base, Logits(aux, softcap=4.0), target, backend=impl.backend)
    loss.backward()
    want = F.cross_entropy(base.double() + 4 * torch.tanh(aux.detach().double() / 4), target)
    assert_alike(loss, want)
    assert aux.grad.isfinite().all() and not aux.grad[0, :2].any()


@pytest.mark.parametrize("fill", [torch.nan, INF, -INF])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}, {"recompute": True}], ids=str)
def test_ignored_rows_may_hold_anything(impl, reduction, fill, options):
    base, aux = (logits(4, 100, device=impl.device) for _ in range(2))
    scale = torch.rand(4, device=impl.device)
    target = targets(4, vocab_size=100, device=impl.device)
    target[[1, 2]] = -100
    weight = torch.rand(100, device=impl.device)
    base[1], aux[2], scale[1] = fill, fill, fill
    for t in (base, aux, scale):
        t.requires_grad_()
    sources = (base, Logits(aux, scale=scale))
    loss = aux_cross_entropy(*sources, target, weight=weight, reduction=reduction, backend=impl.backend, **options)
    upstream = torch.randn_like(loss)
    for grad in torch.autograd.grad(loss, (base, aux, scale), upstream):
        assert not grad[1:3].any() and not torch.signbit(grad[1:3]).any()
        assert grad.isfinite().all() and grad[0].any()
    assert loss.isfinite().all()
    if reduction == "none":
        assert not loss[1:3].any() and not torch.signbit(loss[1:3]).any()


@pytest.mark.parametrize("shape", [(3, 7), (0, 7)], ids=["all ignored", "no rows"])
def test_with_nothing_to_average_mean_is_nan_and_gradients_are_zero(impl, shape):
    base, aux = (torch.full(shape, torch.nan, device=impl.device, requires_grad=True) for _ in range(2))
    target = torch.full(shape[:1], -100, device=impl.device)
    for reduction, want in (("mean", torch.nan), ("sum", 0.0), ("none", 0.0)):
        loss = aux_cross_entropy(base, aux, target, reduction=reduction, backend=impl.backend)
        torch.testing.assert_close(loss, torch.full_like(loss, want), equal_nan=True, rtol=0, atol=0)
        assert loss.shape == (shape[:1] if reduction == "none" else ())
        for grad in torch.autograd.grad(loss, (base, aux), torch.ones_like(loss)):
            assert grad.shape == shape and not grad.any() and not torch.signbit(grad).any()


@pytest.mark.parametrize("weighted", [False, True])
def test_all_ignored_with_weights_and_a_normalizer(impl, weighted):
    aux = logits(3, 7, device=impl.device, requires_grad=True)
    target = torch.full((3,), -100, device=impl.device)
    weight = torch.rand(7, device=impl.device) if weighted else None
    loss = aux_cross_entropy(aux.detach(), aux, target, weight=weight, normalizer=5, backend=impl.backend)
    assert loss.item() == 0.0
    assert not torch.autograd.grad(loss, aux)[0].any()
    loss = aux_cross_entropy(aux.detach(), aux, target, weight=weight, backend=impl.backend)
    assert loss.isnan() and not torch.autograd.grad(loss, aux)[0].any()
