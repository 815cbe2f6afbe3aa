"""Transforms and compilation together: an error or the truth, never a gradient of zero.

torch.compile says of the inputs of torch.func's transforms that they require no gradient, drops forward mode's
tangents, and would run an autograd function without its derivative.
"""

import pytest
import torch
from operators import FEW, OPERATORS, gradient, operator
from tolerance import OF_A_ROW, assert_alike, unit
from torch import func
from torch.autograd import forward_ad, functional
from torch.utils.checkpoint import checkpoint

ERRORS = (RuntimeError, NotImplementedError, torch._dynamo.exc.TorchDynamoException)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def direction(x):
    """Not the same along all classes: a gradient of logits adds up to zero."""
    return torch.linspace(-0.5, 1.5, x.numel()).view(x.shape)


def dual(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, direction(x)))).tangent


def twofold(x):
    return torch.stack([x, x * 2])


def _doubled(f):
    return lambda v: func.grad(lambda u: f(u * 2))(v / 2) / 2


# what a transform makes of f at x, compiled by c
TO_GRADIENT = {
    "grad": lambda f, x, c: c(func.grad(f))(x),
    "grad of a leaf": lambda f, x, c: c(func.grad(f))(x.clone().requires_grad_()),
    "grad without grad mode": lambda f, x, c: torch.no_grad()(c(func.grad(f)))(x),
    "grad of an intermediate": lambda f, x, c: c(_doubled(f))(x),
    "grad_and_value": lambda f, x, c: c(func.grad_and_value(f))(x)[0],
    "vjp": lambda f, x, c: c(lambda v: func.vjp(f, v)[1](torch.ones(()))[0])(x),
    "jacrev": lambda f, x, c: c(func.jacrev(f))(x),
    "jacfwd": lambda f, x, c: c(func.jacfwd(f))(x),
    "grad of a checkpoint": lambda f, x, c: c(func.grad(lambda v: checkpoint(f, v, use_reentrant=False)))(x),
    "grad around compile": lambda f, x, c: func.grad(c(f))(x),
    "functionalize": lambda f, x, c: gradient(c(func.functionalize(f)), x),
}
TO_TANGENT = {
    "jvp": lambda f, x, c: c(lambda v: func.jvp(f, (v,), (direction(v),))[1])(x),
    "linearize": lambda f, x, c: c(lambda v: func.linearize(f, v)[1](direction(v)))(x),
    "dual number": lambda f, x, c: c(lambda v: dual(f, v))(x),
    "dual number around compile": lambda f, x, c: dual(c(f), x),
}
TO_EACH = {
    "vmap of grad": lambda f, x, c: c(func.vmap(func.grad(f)))(twofold(x)),
    "grad of vmap": lambda f, x, c: c(func.grad(lambda v: func.vmap(f)(v).sum()))(twofold(x)),
    "gradient of vmap": lambda f, x, c: gradient(c(lambda v: func.vmap(f)(v).sum()), twofold(x)),
}
TRANSFORMS = TO_GRADIENT | TO_TANGENT | TO_EACH


def truth(transform: str, f, x):
    """The right value, and what it is a sum of where that may cancel."""
    if transform in TO_EACH:
        return torch.stack([gradient(f, row) for row in twofold(x)]), None
    grad = gradient(f, x)
    terms = grad * direction(x)
    return (terms.sum(), terms) if transform in TO_TANGENT else (grad, None)


def assert_error_or_truth(transform: str, name: str, backend: str, compiler):
    f, x = operator(name, backend)
    want, terms = truth(transform, f, x)
    try:
        got = TRANSFORMS[transform](f, x, compiler)
    except ERRORS:
        return
    assert got is not None
    if terms is None:
        assert_alike(got, want)
    else:
        assert abs(got - want) <= 2 * OF_A_ROW * unit(torch.float32) * terms.abs().sum() < abs(want)


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["grad", "jvp"])
@pytest.mark.parametrize("name", OPERATORS)
def test_compiled_transforms_are_errors_that_say_what_to_do(native, name, transform):
    f, x = operator(name, "native")
    for compiler in ({"backend": "eager", "fullgraph": True}, {"backend": "aot_eager"}):
        with pytest.raises(ERRORS, match=r"torch\.func's transforms|setup_context|functorch transforms"):
            TRANSFORMS[transform](f, x, lambda g, options=compiler: torch.compile(g, **options))


@pytest.mark.slow
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ["mean", "tables and stats"])
def test_compiled_transforms_are_an_error_or_the_truth(native, name, transform):
    assert_error_or_truth(transform, name, "native", lambda g: torch.compile(g, backend="aot_eager"))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_whole_graphs_without_a_compiler_are_an_error_or_the_truth(native, transform):
    assert_error_or_truth(transform, "mean", "native", lambda g: torch.compile(g, backend="eager", fullgraph=True))


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_generated_code_of_a_transform_is_an_error_or_the_truth(native, transform):
    assert_error_or_truth(transform, "mean", "native", torch.compile)


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap of grad", "dual number"])
@pytest.mark.parametrize("name", ["mean", "logit_stats", "hard"])
def test_compiled_transforms_of_the_reference_are_an_error_or_the_truth(name, transform):
    assert_error_or_truth(transform, name, "reference", lambda g: torch.compile(g, backend="aot_eager"))


def test_the_reference_has_the_compiled_gradient_that_the_error_promises():
    for name in ("mean", "logit_stats", "soft"):
        f, x = operator(name, "reference")
        got = torch.compile(func.grad(f), backend="aot_eager", fullgraph=True)(x)
        assert_alike(got, gradient(f, x))


def test_a_graph_compiled_before_a_transform_does_not_serve_inside_it(native):
    f, x = operator("mean", "native")
    compiled = torch.compile(f, backend="aot_eager")
    assert compiled(x).isfinite() and gradient(compiled, x).any()
    for transform in (func.grad, lambda g: lambda v: dual(g, v)):
        with pytest.raises(ERRORS):
            transform(compiled)(x)
    assert_alike(gradient(compiled, x), gradient(f, x))


# -- what has a right value --------------------------------------------------------------------------------------------

RIGHT = {
    "autograd.grad around": lambda f, x, c: gradient(c(f), x),
    "autograd.grad within": lambda f, x, c: c(lambda v: gradient(f, v))(x),
    "jacobian": lambda f, x, c: functional.jacobian(c(f), x),
    "functional.vjp": lambda f, x, c: functional.vjp(c(f), x)[1],
    "checkpoint": lambda f, x, c: gradient(c(lambda v: checkpoint(f, v, use_reentrant=False)), x),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", RIGHT)
@pytest.mark.parametrize("name", FEW)
def test_compiled_autograd_functions_have_the_gradients_of_eager(native, name, way):
    f, x = operator(name, "native")
    got = RIGHT[way](f, x, lambda g: torch.compile(g, backend="aot_eager"))
    assert_alike(got, gradient(f, x))


@pytest.mark.parametrize("name", FEW)
def test_compiled_functional_call_has_the_gradient_of_the_given_parameter(native, name):
    f, x = operator(name, "native")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.x = torch.nn.Parameter(torch.zeros_like(x))

        def forward(self):
            return f(self.x)

    model = Model()
    called = torch.compile(lambda v: func.functional_call(model, {"x": v}), backend="aot_eager", fullgraph=True)
    assert_alike(gradient(called, x), gradient(f, x))
    assert model.x.grad is None


@pytest.mark.parametrize("name", FEW)
def test_a_compiled_gradient_penalty_is_an_error(native, name):
    f, x = operator(name, "native")
    x = x.clone().requires_grad_()
    loss = torch.compile(f, backend="aot_eager")(x)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward|differentiated twice"):
        (loss + grad.square().sum()).backward()
