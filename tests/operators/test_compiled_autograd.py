"""Backward under compiled autograd, which traces the autograd engine's calls: the gradients of eager."""

import pytest
import torch
from operators import FEW, OPERATORS, gradient, operator
from torch._dynamo import compiled_autograd

from auxkernels import Head, Logits, aux_cross_entropy


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_backward(loss, backend="eager", **options):
    with compiled_autograd._enable(torch.compile(backend=backend, fullgraph=True)):
        loss.backward(**options)


def assert_gradients(leaves, want, times=1.0):
    for leaf, one in zip(leaves, want, strict=True):
        torch.testing.assert_close(leaf.grad, times * one, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_has_the_gradient_of_eager(native, name):
    f, x = operator(name, "native")
    x = x.clone().requires_grad_()
    compiled_backward(f(x))
    assert_gradients([x], [gradient(f, x.detach())])


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_several_losses_of_one_leaf_accumulate(native, name):
    f, x = operator(name, "native")
    want = gradient(lambda v: 2 * f(v) + f(v * 3), x)
    x = x.clone().requires_grad_()
    compiled_backward(2 * f(x) + f(x * 3))
    compiled_backward(2 * f(x) + f(x * 3))
    assert_gradients([x], [want], times=2)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_of_all_parts_of_several_sources(native, reduction):
    z, hidden, weight, scale = (torch.randn(s, requires_grad=True) for s in ((4, 9), (4, 3), (9, 3), ()))
    y = torch.tensor([0, 8, -100, 3])

    def loss():
        return aux_cross_entropy(Logits(z, scale=scale), [Head(hidden, weight, scale=scale), z], y, reduction=reduction)

    leaves = (z, hidden, weight, scale)
    want = torch.autograd.grad(loss(), leaves)
    compiled_backward(loss())
    assert_gradients(leaves, want)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mean", "none"])
def test_a_whole_training_step_compiles(native, name):
    f, x = operator(name, "native")
    leaf = x.clone().requires_grad_()

    def step():
        loss = f(leaf * 2)
        loss.backward()
        return loss.detach()

    with torch._dynamo.config.patch(compiled_autograd=True):
        compiled = torch.compile(step, backend="aot_eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(), f(x * 2))
    assert_gradients([leaf], [gradient(lambda v: f(v * 2), x)], times=2)


@pytest.mark.slow
def test_generated_code_of_a_backward_has_the_gradient_of_eager(native):
    f, x = operator("mean", "native")
    x = x.clone().requires_grad_()
    compiled_backward(f(x), "inductor")
    assert_gradients([x], [gradient(f, x.detach())])


def test_hooks_see_and_change_the_gradient(native):
    f, x = operator("mean", "native")
    x = x.clone().requires_grad_()
    x.register_hook(lambda grad: grad * 2)
    compiled_backward(f(x))
    assert_gradients([x], [gradient(f, x.detach())], times=2)


def test_a_gradient_that_was_handed_out_and_rescaled_is_not_given_again(native):
    f, x = operator("mean", "native")
    x = x.clone().requires_grad_()
    loss = f(x) * 3
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"handed out|modified by an inplace operation"):
        compiled_backward(loss)


def test_compiled_backwards_of_one_graph_give_the_same(native):
    """Nothing is rescaled in place there."""
    f, x = operator("mean", "native")
    x = x.clone().requires_grad_()
    loss = f(x) * 3
    for count in (1, 2):
        compiled_backward(loss, retain_graph=True)
        assert_gradients([x], [gradient(f, x.detach())], times=3 * count)
