"""Heads in mixed precision: autocast, gradient scaling, and rows whose loss is almost nothing."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from inputs import confident_row, cut_rows, head, logits, targets
from oracle import Case, Plain, relative_error
from tolerance import check_results, check_statistics, check_values, gradients_of

from auxkernels import Head, Logits, aux_cross_entropy, logit_stats
from auxkernels.cross_entropy import chunked as loop_module
from auxkernels.heads import operands as operand_module
from auxkernels.heads import products as product_module

N, V = 48, 53
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _chunks(monkeypatch):
    cut_rows(monkeypatch, 16)


def problem(device, dtype=torch.float32, **options):
    made = {"vocab_size": V, "dtype": dtype, "device": device} | options
    base, aux = head(N, width=24, **made), head(N, width=8, bias=True, **made)
    return base, aux, targets(N, vocab_size=V, device=device, ignored=0.2)


def rounded(source: Head, dtype) -> Head:
    """The head that autocast sees: its tensors in the lower precision."""
    changed = {name: getattr(source, name) for name in ("hidden", "weight", "bias")}
    changed = {name: None if t is None else t.detach().to(dtype).requires_grad_() for name, t in changed.items()}
    return replace(source, **changed)


def linear(source: Head) -> torch.Tensor:
    return F.linear(source.hidden, source.weight, source.bias)


def leaves_of(*sources):
    return [t for s in sources for t in (s.hidden, s.weight, s.bias) if t is not None and t.requires_grad]


# -- autocast ----------------------------------------------------------------------------------------------------------


def seen_by_autocast(base, aux, target, **options) -> Case:
    return Case(rounded(base, BF16), rounded(aux, BF16), target, options)


def as_good_as_its_roundings(impl, base, aux, target, options):
    """Loss and gradients of a call under autocast, against float64 of what autocast makes of the tensors."""
    leaves = leaves_of(base, aux)
    with torch.autocast(impl.device, BF16):
        loss = aux_cross_entropy(base, aux, target, backend=impl.backend, **options)
    assert loss.dtype == torch.float32
    grads, case = torch.autograd.grad(loss, leaves), seen_by_autocast(base, aux, target)
    assert all(grad.dtype == leaf.dtype for grad, leaf in zip(grads, leaves, strict=True))
    check_results(case, {"loss": loss, **dict(zip(case.leaves(), grads, strict=True))})


@pytest.mark.parametrize("options", [{}, {"recompute": True}], ids=str)
def test_under_autocast_products_are_bf16_and_gradients_those_of_their_tensors(impl, options):
    base, aux, target = problem(impl.device)
    as_good_as_its_roundings(impl, base, aux, target, options)


@pytest.mark.parametrize("mixed", ["hidden", "weight", "bias"])
def test_under_autocast_the_tensors_of_a_head_may_differ_in_dtype(impl, mixed):
    base, aux, target = problem(impl.device)
    changed = getattr(aux, mixed).detach().to(BF16).requires_grad_()
    as_good_as_its_roundings(impl, base, replace(aux, **{mixed: changed}), target, {})


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"reduction": "none"}], ids=str)
def test_under_autocast_float32_heads_are_their_bf16_selves(fused, options):
    """The very same products of the same numbers, but that gradients do not pass through bf16 on their way out."""
    base, aux, target = problem(fused.device)
    halves = rounded(base, BF16), rounded(aux, BF16)
    with torch.autocast(fused.device, BF16):
        loss = aux_cross_entropy(base, aux, target, backend=fused.backend, **options)
    want = aux_cross_entropy(*halves, target, backend=fused.backend, **options)
    assert torch.equal(loss, want)
    grads = torch.autograd.grad(loss.sum(), leaves_of(base, aux))
    for got, other in zip(grads, torch.autograd.grad(want.sum(), leaves_of(*halves)), strict=True):
        # what float32 still tells apart may be rounded to either side
        assert got.dtype == torch.float32 and relative_error(got, other) <= torch.finfo(BF16).eps / 2


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"reduction": "none"}], ids=str)
def test_backward_outside_of_autocast_remembers_it(impl, options):
    base, aux, target = problem(impl.device)
    results = []
    for inside in (True, False):
        with torch.autocast(impl.device, BF16):
            loss = aux_cross_entropy(base, aux, target, backend=impl.backend, **options)
            if inside:
                results.append(torch.autograd.grad(loss.sum(), leaves_of(base, aux)))
        if not inside:
            results.append(torch.autograd.grad(loss.sum(), leaves_of(base, aux)))
    assert all(map(torch.equal, *results))
    plain = aux_cross_entropy(base, aux, target, backend=impl.backend, **options)
    unlike = torch.autograd.grad(plain.sum(), leaves_of(base, aux))
    assert not torch.equal(plain, loss) and not torch.equal(unlike[0], results[0][0])


def test_backward_inside_of_autocast_of_a_loss_made_outside_stays_float32(impl):
    base, aux, target = problem(impl.device)
    for options in ({}, {"recompute": True}, {"reduction": "none"}):
        loss = aux_cross_entropy(base, aux, target, backend=impl.backend, **options)
        with torch.autocast(impl.device, BF16):
            grads = torch.autograd.grad(loss.sum(), leaves_of(base, aux))
        case = Case(base, aux, target, {"reduction": "sum"} if options.get("reduction") else {})
        check_results(case, dict(zip(case.leaves(), grads, strict=True)))


def test_logits_and_float64_heads_are_untouched_by_autocast(impl):
    values = logits(N, V, device=impl.device, requires_grad=True)
    base, aux, target = problem(impl.device, dtype=torch.float64 if impl.backend != "triton" else torch.float32)
    cases = [(values, None), (Logits(values, softcap=3.0), values)]
    if impl.backend != "triton":
        cases += [(base, aux), (base, values)]
    for sources in cases:
        want = aux_cross_entropy(*sources, target, backend=impl.backend)
        with torch.autocast(impl.device, BF16):
            got = aux_cross_entropy(*sources, target, backend=impl.backend)
        assert torch.equal(got, want)
    # beside a head of lower precision, too
    with torch.autocast(impl.device, BF16):
        got = logit_stats(values, rounded(aux, BF16), target, backend=impl.backend)
    assert torch.equal(got.base_log_prob, logit_stats(values, None, target, backend=impl.backend).base_log_prob)


def test_statistics_under_autocast_are_of_bf16_products(impl):
    base, aux, target = problem(impl.device)
    with torch.autocast(impl.device, BF16):
        got = logit_stats(base, aux, target, backend=impl.backend)
        (grad,) = torch.autograd.grad(got.entropy.sum(), aux.weight)
    assert grad.dtype == torch.float32 and got.entropy.dtype == torch.float32
    check_statistics(got, seen_by_autocast(base, aux, target))


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_without_autocast_another_dtype_is_a_type_error_that_names_the_tensor(impl, part):
    base, aux, target = problem(impl.device)
    for dtype in (BF16, torch.float64):
        changed = replace(aux, **{part: getattr(aux, part).detach().to(dtype)})
        message = f"{part} of aux must have the hidden states' dtype torch.float32, got {dtype}"
        with pytest.raises(TypeError, match=message):
            aux_cross_entropy(base, changed, target, backend=impl.backend)
        with pytest.raises(TypeError, match=message.replace("aux", r"base\[1\]")):
            logit_stats([base, changed], None, target, backend=impl.backend)


def test_autocast_makes_no_dtype_of_float64(impl):
    base, aux, target = problem(impl.device)
    changed = replace(aux, weight=aux.weight.detach().double())
    with torch.autocast(impl.device, BF16), pytest.raises(TypeError, match="weight of aux must have"):
        aux_cross_entropy(base, changed, target, backend=impl.backend)


# -- float16 and the gradient scaler -----------------------------------------------------------------------------------


@pytest.fixture(params=["own", "half"])
def products(request, monkeypatch):
    """The machine's own products of float16, and such as a GPU has: operands in float16, here the results as well.

    The dtype for `Drawn`: None for the machine's own.
    """
    if request.param == "half":

        def plan_of(dtype, autocast, device):
            plan = product_module.plan_of(dtype, autocast, device)
            is_half = product_module.operand_dtype(dtype, autocast) == torch.float16
            return product_module.Plan(torch.float16, torch.float16, False) if is_half else plan

        monkeypatch.setattr(operand_module, "plan_of", plan_of)
        monkeypatch.setattr(loop_module, "plan_of", plan_of)
    return torch.float16 if request.param == "half" else None


def check_scaled(case, grads, upstream, factor, products):
    """Gradients of `factor` times the loss; upstream: of the loss itself, None: 1."""
    got = {name: grad.double() / factor for name, grad in zip(case.leaves(), grads, strict=True)}
    check_results(case, got, upstream, products=products)


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"reduction": "sum"}], ids=str)
def test_fp16_gradients_of_a_scaled_loss_are_the_scaled_gradients(impl, products, options):
    base, aux, target = problem(impl.device, torch.float16)
    leaves, factor = leaves_of(base, aux), 64.0 if options.get("reduction") else 65536.0
    loss = aux_cross_entropy(base, aux, target, backend=impl.backend, **options)
    grads = torch.autograd.grad(loss * factor, leaves)
    assert all(grad.dtype == torch.float16 and grad.isfinite().all() for grad in grads)
    check_scaled(Case(base, aux, target, options), grads, None, factor, products)


def test_fp16_heads_get_the_gradients_of_statistics_without_a_target(impl, products):
    base, aux, _ = problem(impl.device, torch.float16)
    case = Case(base, aux, None)

    def total(stats):
        return (stats.entropy + stats.kl_to_base).sum()

    grads = torch.autograd.grad(total(logit_stats(base, aux, backend=impl.backend)), leaves_of(base, aux))
    got = dict(zip(case.leaves(), grads, strict=True))
    check_values(lambda call: gradients_of(total(call.statistics()), call), got, case, products)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_gradient_of_logits_beside_an_fp16_head_is_not_scaled_in_16_bits(impl, products, dtype, reduction):
    base, _, target = problem(impl.device, torch.float16)
    base.hidden.requires_grad_()
    values = logits(*target.shape, base.weight.shape[0], dtype=dtype, device=impl.device, requires_grad=True)
    loss = aux_cross_entropy(base, values, target, reduction=reduction, backend=impl.backend).sum()
    case = Case(base, values, target, {"reduction": "sum"})
    exact = Plain(case)
    want = exact.gradients(exact.loss())["aux[0]"][0]
    factor = 1024.0 if dtype == torch.float16 else 65536.0
    got = torch.autograd.grad(loss * factor, [values])[0].double() / factor
    assert got.isfinite().all()

    def values_of(call):
        grad = gradients_of(call.loss(), call)["aux[0]"]
        # a factor rounded to 16 bits would be an error common to all elements, whose own ones cancel here
        return {"gradient": grad, "common factor": (grad * want).sum() / want.square().sum()}

    common = (got * want).sum() / want.square().sum()
    check_values(values_of, {"gradient": got, "common factor": common}, case, products)


@pytest.mark.parametrize("normalizer", [0.0, -2.0])
def test_an_ignored_row_of_fp16_has_plus_zeros_whatever_the_divisor(impl, products, normalizer):
    base, aux, target = problem(impl.device, torch.float16)
    ignored = target == -100
    assert ignored.any()
    loss = aux_cross_entropy(base, aux, target, normalizer=normalizer, backend=impl.backend)
    grad = torch.autograd.grad(loss, [aux.hidden])[0][ignored]
    assert (grad == 0).all() and not grad.signbit().any()


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"reduction": "none"}], ids=str)
def test_fp16_gradients_that_would_underflow_survive_the_scaler(impl, products, options):
    """A mean over a million tokens: unscaled, hardly an element of the gradient is a float16 number."""
    base, aux, target = problem(impl.device, torch.float16)
    leaves, tokens, factor = leaves_of(base, aux), 2**20, 65536.0
    if options.get("reduction"):
        loss = aux_cross_entropy(base, aux, target, backend=impl.backend, **options).sum() / tokens
    else:
        loss = aux_cross_entropy(base, aux, target, normalizer=tokens, backend=impl.backend, **options)
    case = Case(base, aux, target, {"normalizer": tokens})
    exact = Plain(case)
    for want, _ in exact.gradients(exact.loss()).values():
        assert (want.to(torch.float16).double() - want).norm() > 0.01 * want.norm()  # it would underflow
    check_scaled(case, torch.autograd.grad(loss * factor, leaves), None, factor, products)


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"reduction": "none"}], ids=str)
def test_fp16_gradients_of_a_tiny_upstream_keep_their_precision(impl, products, options):
    """Large hidden states make a float16 number of a weight's gradient whose logits' gradients are hardly any."""
    base, aux, target = problem(impl.device, torch.float16)
    with torch.no_grad():
        for source in (base, aux):
            source.hidden.mul_(64)
            source.weight.div_(64)
    leaves, upstream = (base.weight, aux.weight), 2e-4
    loss = aux_cross_entropy(base, aux, target, backend=impl.backend, **options)
    if options.get("reduction"):
        loss = loss.sum() / (target != -100).sum()
    grads = torch.autograd.grad(loss * upstream, leaves)
    results = {f"weight of {name}[0]": grad for name, grad in zip(("base", "aux"), grads, strict=True)}
    upstream = torch.tensor(upstream, device=impl.device)
    check_results(Case(base, aux, target), results, upstream, products=products)


def test_an_fp16_weight_gradient_that_overflows_is_infinite_and_not_wrong(impl):
    """As torch's own: the scaler skips the step when it finds an infinity."""
    base, aux, target = problem(impl.device, torch.float16)
    loss = aux_cross_entropy(base, aux, target, reduction="sum", backend=impl.backend)
    grads = torch.autograd.grad(loss * 1e7, leaves_of(base, aux))
    assert any(grad.isinf().any() for grad in grads)


@pytest.mark.parametrize("value", [1e30, torch.inf, torch.nan])
def test_the_upstream_gradient_of_an_ignored_row_takes_nothing_from_the_others(impl, products, value):
    """An importance ratio at a padded token, say: it must not become the scale at which the others are formed."""
    base, aux, target = problem(impl.device, torch.float16)
    upstream = torch.full((N,), 1e-3, device=impl.device)
    loss = aux_cross_entropy(base, aux, target, reduction="none", backend=impl.backend)
    others = upstream.clone()
    others[target == -100] = value
    grads = torch.autograd.grad(loss, leaves_of(base, aux), others)
    check_scaled(Case(base, aux, target, {"reduction": "none"}), grads, upstream, 1.0, products)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"recompute": True}], ids=str)
def test_a_division_by_zero_shows_in_loss_and_gradients(impl, options, dtype):
    base, aux, target = problem(impl.device, dtype)
    loss = aux_cross_entropy(base, aux, target, normalizer=0.0, backend=impl.backend, **options)
    assert loss == torch.inf
    for grad in torch.autograd.grad(loss, leaves_of(base, aux)):
        assert not grad.isfinite().any(-1).all()


# -- confident rows ----------------------------------------------------------------------------------------------------


def confident_heads(device, rest, offset):
    """Float32 heads with D = V whose summed logits give the target probability 1 - rest, exactly what float64 makes of
    the very same numbers: an identity times the rows, so that products do not round."""
    classes = torch.tensor([0, 17, V - 1, 5])
    wanted = torch.stack([confident_row(V, int(y), rest, offset) for y in classes])
    halves = (wanted / 2).float()
    eye = torch.eye(V, device=device)
    sources = [Head(z.to(device).requires_grad_(), eye.clone()) for z in (halves, wanted.float() - halves)]
    return *sources, classes.to(device)


@pytest.mark.parametrize("offset", [0.0, 500.0])
@pytest.mark.parametrize("rest", [1e-4, 1e-8, 1e-12])
def test_confident_rows_keep_their_loss_and_gradient(fused, rest, offset):
    base, aux, target = confident_heads(fused.device, rest, offset)
    s = (base.hidden.double() + aux.hidden.double()).float().double().detach()
    others = torch.arange(V, device=fused.device) != target.unsqueeze(-1)
    gap = s - s.gather(-1, target.unsqueeze(-1))
    want = torch.log1p(torch.where(others, gap.exp(), 0.0).sum(-1))
    for options in ({"reduction": "none"}, {"reduction": "sum"}, {"reduction": "sum", "recompute": True}):
        loss = aux_cross_entropy(base, aux, target, backend=fused.backend, **options)
        total = want if options["reduction"] == "none" else want.sum()
        assert (total > 0).all() and relative_error(loss, total) < 1e-5
        (grad,) = torch.autograd.grad(loss.sum(), aux.hidden)
        p = torch.where(others, gap.exp(), 0.0) / (1 + torch.where(others, gap.exp(), 0.0).sum(-1, keepdim=True))
        residual = torch.where(others, p, -p.sum(-1, keepdim=True))
        assert relative_error(grad, residual) < 1e-4
