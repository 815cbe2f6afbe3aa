"""Autograd as a user meets it: which gradients exist, how often, what is saved, and what is refused."""

import itertools

import pytest
import torch
from inputs import logits, targets
from oracle import Case, assert_close, check, expected
from tolerance import assert_alike, product_error
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from auxkernels import Logits, aux_cross_entropy, logit_stats

# what decides where the gradient is made: in the forward pass, or from the row state in backward
PATHS = {
    "mean": {"reduction": "mean"},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "recompute": {"reduction": "mean", "recompute": True},
}
REREAD = ("none", "recompute")


@pytest.fixture(params=PATHS)
def path(request):
    return request.param


def sources(device, dtype=torch.float32, rows=5, vocab_size=40):
    base, aux = (logits(rows, vocab_size, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
    target = targets(rows, vocab_size=vocab_size, device=device, ignored=0.2)
    return base, aux, target


def loss_of(impl, path, base, aux, target, **options):
    return aux_cross_entropy(base, aux, target, backend=impl.backend, **PATHS[path], **options)


# -- which gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)), ids=str)
def test_exactly_the_requested_gradients_are_made(impl, path, needs):
    base, aux, target = sources(impl.device)
    scales = [torch.rand((), device=impl.device), torch.rand(5, device=impl.device)]
    for tensor, need in zip((base, aux, *scales), needs, strict=True):
        tensor.requires_grad_(need)
    case = Case(Logits(base, scale=scales[0]), Logits(aux, scale=scales[1]), target, PATHS[path])
    upstream = torch.randn(5, device=impl.device) if path == "none" else None
    check(case, impl, upstream)
    loss = loss_of(impl, path, case.base, case.aux, target)
    assert loss.requires_grad == any(needs)
    if any(needs):
        loss.sum().backward()
    assert [t.grad is not None for t in (base, aux, *scales)] == list(needs)


def test_gradients_of_two_sources_never_share_memory(impl, path):
    base, aux, target = sources(impl.device)
    grads = torch.autograd.grad(loss_of(impl, path, base, aux, target).sum(), (base, aux))
    places = [(grad.data_ptr(), grad.data_ptr() + grad.nbytes) for grad in grads]
    assert places[0][1] <= places[1][0] or places[1][1] <= places[0][0]
    grads[0].zero_()
    assert grads[1].any()


def test_gradients_are_contiguous_and_may_be_changed_in_place(impl, path):
    base, aux, target = sources(impl.device)
    aux = aux.detach()[:, 3:].requires_grad_()
    loss_of(impl, path, base[:, 3:], aux, target.clamp(max=30)).sum().backward()
    assert aux.grad.is_contiguous()
    aux.grad.mul_(2)


def test_no_grad_and_inference_mode_give_the_same_loss(impl, path):
    base, aux, target = sources(impl.device)
    recorded = loss_of(impl, path, base, aux, target)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = loss_of(impl, path, base, aux, target)
        assert not loss.requires_grad and torch.equal(loss, recorded.detach())


def test_a_base_made_in_inference_mode_may_be_used_where_nothing_is_reread(impl):
    base, aux, target = sources(impl.device)
    with torch.inference_mode():
        frozen = base * 1.0
    for path in ("mean", "sum"):
        got = torch.autograd.grad(loss_of(impl, path, frozen, aux, target), aux)[0]
        want = torch.autograd.grad(loss_of(impl, path, base.detach(), aux, target), aux)[0]
        assert torch.equal(got, want)


@pytest.mark.parametrize("path", REREAD)
def test_an_inference_tensor_that_would_be_reread_is_refused(fused, path):
    base, aux, target = sources(fused.device)
    with torch.inference_mode():
        frozen = base * 1.0
    with pytest.raises(RuntimeError, match=r"[Ii]nference tensors cannot be saved for backward"):
        loss_of(fused, path, frozen, aux, target)


# -- more than once ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", REREAD)
def test_a_second_backward_gives_the_same_bits(impl, path, dtype):
    base, aux, target = sources(impl.device, dtype)
    loss = loss_of(impl, path, base, Logits(aux, scale=torch.tensor(0.5, device=impl.device)), target)
    upstream = torch.randn_like(loss)
    first = [g.clone() for g in torch.autograd.grad(loss, (base, aux), upstream, retain_graph=True)]
    second = torch.autograd.grad(loss, (base, aux), upstream, retain_graph=True)
    assert all(map(torch.equal, first, second))
    third = torch.autograd.grad(loss, (base, aux), 2 * upstream)
    subnormal = 2.0**-23 if dtype == torch.float16 else 0.0  # two halves of the smallest number round apart
    for once, twice in zip(first, third, strict=True):
        torch.testing.assert_close(2 * once.float(), twice.float(), rtol=0, atol=subnormal)


@pytest.mark.parametrize("path", ["mean", "sum"])
def test_a_second_backward_through_a_gradient_already_handed_out_names_recompute(fused, path):
    base, aux, target = sources(fused.device)
    loss = loss_of(fused, path, base, aux, target)
    (first,) = torch.autograd.grad(loss, aux, torch.tensor(3.0, device=fused.device), retain_graph=True)
    kept = first.clone()
    with pytest.raises(RuntimeError, match="recompute=True"):
        torch.autograd.grad(loss, aux)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("path", ["mean", "sum"])
def test_fp16_gradients_are_reread_and_so_may_be_asked_for_twice(fused, path):
    base, aux, target = sources(fused.device, torch.float16)
    loss = loss_of(fused, path, base, aux, target)
    first, second = (torch.autograd.grad(loss, aux, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.any()


def test_without_retain_graph_torch_itself_refuses_a_second_backward(impl, path):
    base, aux, target = sources(impl.device)
    loss = loss_of(impl, path, base, aux, target).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match=r"backward through the graph a second time|recompute=True"):
        loss.backward()


def test_two_losses_on_the_same_logits_add_their_gradients(impl, path):
    base, aux, target = sources(impl.device)
    other = targets(5, vocab_size=40, device=impl.device)
    losses = [loss_of(impl, path, base, aux, t).sum() for t in (target, other)]
    apart = [torch.autograd.grad(loss, aux, retain_graph=True)[0] for loss in losses] if path in REREAD else None
    (losses[0] + 2 * losses[1]).backward()
    if apart is None:
        apart = [torch.autograd.grad(loss_of(impl, path, base, aux, t), aux)[0] for t in (target, other)]
    assert_alike(aux.grad, apart[0] + 2 * apart[1])


def test_a_loss_used_twice_gets_both_upstreams(impl, path):
    base, aux, target = sources(impl.device)
    case = Case(base, aux, target, PATHS[path])
    loss = loss_of(impl, path, base, aux, target)
    (loss * 0.25 + loss.square() * 0).sum().backward()
    upstream = torch.full_like(loss, 0.25)
    assert_close("aux", aux.grad, *expected(case, upstream, confident=impl.backend != "reference")["aux[0]"])


def test_gradients_accumulate_into_grad(impl, path):
    base, aux, target = sources(impl.device)
    loss_of(impl, path, base, aux, target).sum().backward()
    once = aux.grad.clone()
    loss_of(impl, path, base, aux, target).sum().backward()
    assert_alike(aux.grad, 2 * once)


# -- differentiating gradients -----------------------------------------------------------------------------------------


def test_double_differentiation_is_an_error(fused, path):
    base, aux, target = sources(fused.device)
    loss = loss_of(fused, path, base, aux, target).sum()
    (grad,) = torch.autograd.grad(loss, aux, create_graph=True)
    assert grad.requires_grad  # or a gradient penalty would be dropped silently
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.square().sum().backward()


def test_double_differentiation_of_a_penalty_on_another_tensor_is_an_error(fused, path):
    """The gradient flows on to a parameter: its penalty must not silently lose the part that went through the loss."""
    hidden = torch.randn(5, 6, device=fused.device)
    table = torch.randn(6, 40, device=fused.device, requires_grad=True)
    base, _, target = sources(fused.device)
    loss = loss_of(fused, path, base.detach(), hidden @ table, target).sum()
    (grad,) = torch.autograd.grad(loss, table, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        (loss + grad.square().sum()).backward()


def test_double_differentiation_of_the_statistics_is_an_error(fused):
    base, aux, _ = sources(fused.device)
    (grad,) = torch.autograd.grad(logit_stats(base, aux, backend=fused.backend).entropy.sum(), aux, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.sum().backward()


def test_double_differentiation_of_a_sum_of_sources_and_of_scales_is_an_error(fused, path):
    base, aux, target = sources(fused.device)
    scale = torch.tensor(0.7, device=fused.device, requires_grad=True)
    for source in (Logits(aux, scale=scale), [Logits(aux, scale=scale), base.detach()]):
        loss = loss_of(fused, path, base, source, target).sum()
        for grad in torch.autograd.grad(loss, (aux, scale), create_graph=True):
            with pytest.raises(RuntimeError, match=r"differentiate|once_differentiable"):
                grad.sum().backward(retain_graph=True)


def test_the_reference_may_be_differentiated_twice():
    base, aux, target = sources("cpu", torch.float64, rows=2, vocab_size=5)
    base.requires_grad_(False)

    def loss(aux):
        return aux_cross_entropy(base, aux, target.clamp(min=0), label_smoothing=0.1, z_loss=0.1, backend="reference")

    assert torch.autograd.gradgradcheck(loss, aux)


# -- transforms --------------------------------------------------------------------------------------------------------


def test_forward_mode_is_an_error_and_not_a_lost_tangent(fused, path):
    base, aux, target = sources(fused.device)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda a: loss_of(fused, path, base.detach(), a, target), (aux.detach(),), (aux.detach(),))


def test_forward_mode_of_the_statistics_is_an_error_and_not_a_lost_tangent(fused):
    base, aux, _ = sources(fused.device)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(
            lambda a: logit_stats(base.detach(), a, backend=fused.backend).lse, (aux.detach(),), (aux.detach(),)
        )


@pytest.mark.parametrize("requires_grad", [False, True])
def test_dual_numbers_are_an_error_and_not_a_lost_tangent(fused, path, requires_grad):
    base, aux, target = sources(fused.device)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(aux.detach().requires_grad_(requires_grad), torch.ones_like(aux))
        with pytest.raises((RuntimeError, NotImplementedError)):
            loss_of(fused, path, base.detach(), dual, target)
        with pytest.raises((RuntimeError, NotImplementedError)):
            logit_stats(base.detach(), dual, backend=fused.backend)


def test_func_grad_is_an_error(fused, path):
    base, aux, target = sources(fused.device)
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda a: loss_of(fused, path, base.detach(), a, target).sum())(aux.detach())


@pytest.mark.parametrize("requires_grad", [False, True])
def test_vmap_is_an_error_or_the_truth(impl, requires_grad):
    base, aux, target = (torch.stack([t.detach()] * 3) for t in sources(impl.device))
    aux = (aux + torch.randn_like(aux)).requires_grad_(requires_grad)

    def one(b, a, t):
        return aux_cross_entropy(b, a, t, backend=impl.backend)

    want = torch.stack([one(*row) for row in zip(base, aux, target, strict=True)])
    try:
        got = torch.vmap(one)(base, aux, target)
    except RuntimeError:
        return
    assert_alike(got, want)


def test_functional_call_replaces_parameters(impl):
    base, aux, target = sources(impl.device)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(40, device=impl.device))

        def forward(self):
            return aux_cross_entropy(base.detach(), aux.detach() + self.bias, target, backend=impl.backend)

    model, bias = Model(), torch.randn(40, device=impl.device, requires_grad=True)
    loss = torch.func.functional_call(model, {"bias": bias})
    want = Case(base.detach(), aux.detach() + bias, target)
    assert_close("loss", loss, *expected(want, confident=False)["loss"])
    loss.backward()
    assert bias.grad.any() and model.bias.grad is None


# -- what is saved, what is touched ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_are_never_written(impl, path, dtype):
    base, aux, target = sources(impl.device, dtype)
    scale = torch.rand(5, device=impl.device, requires_grad=True)
    weight, normalizer = torch.rand(40, device=impl.device), torch.tensor(3.0, device=impl.device)
    options = {"weight": weight, "label_smoothing": 0.1}
    if PATHS[path]["reduction"] == "mean":
        options["normalizer"] = normalizer
    inputs = (base, aux, target, scale, weight, normalizer)
    before = [(t._version, t.detach().clone()) for t in inputs]
    loss = loss_of(impl, path, base, Logits(aux, scale=scale, softcap=9.0), target, **options)
    loss.sum().backward()
    logit_stats(base, aux, target, backend=impl.backend).entropy.sum().backward()
    for tensor, (version, value) in zip(inputs, before, strict=True):
        assert tensor._version == version and torch.equal(tensor, value)


def test_the_upstream_gradient_is_never_written(impl, path):
    base, aux, target = sources(impl.device)
    loss = loss_of(impl, path, base, aux, target)
    upstream = torch.full_like(loss, 0.5)
    torch.autograd.grad(loss, aux, upstream)
    assert upstream._version == 0 and (upstream == 0.5).all()


@pytest.mark.parametrize("changed", ["base", "aux", "target", "scale"])
def test_an_input_changed_before_backward_is_noticed_or_harmless(impl, path, changed):
    base, aux, target = sources(impl.device)
    scale = torch.rand(5, device=impl.device, requires_grad=True)
    base, values = base.detach(), aux * 1  # not leaves, which torch protects itself
    inputs = {"base": base, "aux": values, "target": target, "scale": scale * 1}

    def loss():
        return loss_of(impl, path, inputs["base"], Logits(inputs["aux"], scale=inputs["scale"]), inputs["target"]).sum()

    want = torch.autograd.grad(loss(), (aux, scale), retain_graph=True)
    pending = loss()
    with torch.no_grad():
        inputs[changed].fill_(1)
    try:
        got = torch.autograd.grad(pending, (aux, scale))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("path", REREAD)
@pytest.mark.parametrize("changed", ["base", "target"])
def test_what_will_be_reread_may_not_be_changed_in_between(fused, path, changed):
    base, aux, target = sources(fused.device)
    inputs = {"base": base.detach(), "target": target}
    loss = loss_of(fused, path, inputs["base"], aux, target).sum()
    inputs[changed].fill_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_hook_may_replace_the_gradient(impl, path):
    base, aux, target = sources(impl.device)
    loss_of(impl, path, base, aux, target).sum().backward()
    plain, aux.grad = aux.grad, None
    seen = []
    aux.register_hook(lambda grad: seen.append(grad) or grad * 3)
    loss_of(impl, path, base, aux, target).sum().backward()
    assert torch.equal(seen[0], plain) and torch.equal(aux.grad, plain * 3)


def test_saved_tensor_hooks_see_what_is_saved_and_may_move_it(impl, path):
    base, aux, target = sources(impl.device)
    want = torch.autograd.grad(loss_of(impl, path, base, aux, target).sum(), aux)[0]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        loss = loss_of(impl, path, base, aux, target).sum()
    assert torch.equal(torch.autograd.grad(loss, aux)[0], want)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradient(impl, path, use_reentrant):
    base, aux, target = sources(impl.device)

    def step(a):
        return loss_of(impl, path, base.detach(), a * 2, target).sum()

    (want,) = torch.autograd.grad(step(aux), aux)
    checkpoint(step, aux, use_reentrant=use_reentrant).backward()
    assert torch.equal(aux.grad, want)


def test_gradients_flow_on_into_what_made_the_logits(impl, path):
    hidden = torch.randn(5, 6, device=impl.device, dtype=torch.float64)
    table = torch.randn(6, 40, device=impl.device, dtype=torch.float64, requires_grad=True)
    base, _, target = sources(impl.device)
    if impl.backend == "triton":
        hidden, table = hidden.float(), table.detach().float().requires_grad_()
    aux = hidden @ table
    loss_of(impl, path, base.detach(), aux, target).sum().backward()
    want, error = expected(Case(base.detach(), aux.detach().requires_grad_(), target, PATHS[path]), confident=False)[
        "aux[0]"
    ]
    hidden_t = hidden.double().t()
    allowed = hidden_t.abs() @ error + product_error(hidden_t, want, table.dtype)
    assert_close("table", table.grad, hidden_t @ want, allowed)


# -- mixed precision ---------------------------------------------------------------------------------------------------


def test_fp16_gradients_do_not_underflow_before_the_loss_scale_arrives(impl):
    """mean over many rows: 1e-7 each, below the smallest fp16 number until it is multiplied by 2**16."""
    base = torch.zeros(4096, 64, dtype=torch.float16, device=impl.device)
    aux = torch.zeros_like(base).requires_grad_()
    target = torch.zeros(4096, dtype=torch.int64, device=impl.device)
    loss = aux_cross_entropy(base, aux, target, normalizer=4096 * 64, backend=impl.backend)
    (grad,) = torch.autograd.grad(loss * 2.0**16, aux)
    want = 2.0**16 / 4096 / 64 / 64
    assert_alike(grad[:, 1:], torch.full_like(grad[:, 1:], want, dtype=torch.float64))


def test_a_grad_scaler_skips_steps_with_infinite_gradients_and_takes_the_others(impl):
    aux = torch.zeros(4, 8, device=impl.device, requires_grad=True)
    optimizer = torch.optim.SGD([aux], lr=1.0)
    scaler = torch.amp.GradScaler(impl.device, init_scale=2.0**8)
    target = targets(4, vocab_size=8, device=impl.device)
    for first in (torch.inf, 0.0):
        base = torch.zeros(4, 8, dtype=torch.float16, device=impl.device)
        base[0, 0] = first
        before = aux.detach().clone()
        optimizer.zero_grad()
        scaler.scale(aux_cross_entropy(base, aux.half(), target, backend=impl.backend)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(aux, before) == (first == torch.inf)
    assert scaler.get_scale() == 2.0**7
    want = torch.softmax(torch.zeros(8, dtype=torch.float64), -1) - torch.nn.functional.one_hot(target, 8).cpu()
    assert_alike(aux.detach().half().cpu(), -want / 4)  # a step of float16 gradients with a rate of one


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_does_not_touch_the_loss_or_its_gradient(impl, path, autocast):
    base, aux, target = sources(impl.device)
    scale = torch.tensor(0.3, device=impl.device, requires_grad=True)
    outside = loss_of(impl, path, base, Logits(aux, scale=scale), target, z_loss=0.1, label_smoothing=0.1)
    with torch.autocast(impl.device, autocast):
        inside = loss_of(impl, path, base, Logits(aux, scale=scale), target, z_loss=0.1, label_smoothing=0.1)
    assert torch.equal(inside, outside)
    upstream = torch.rand_like(inside)
    got, want = (torch.autograd.grad(loss, (base, aux, scale), upstream) for loss in (inside, outside))
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_does_not_touch_sums_of_sources_or_statistics(impl, autocast):
    base, aux, target = (t.detach() for t in sources(impl.device))
    several = [Logits(aux, scale=0.5), Logits(base, softcap=4.0)]
    outside = logit_stats(base, several, target, backend=impl.backend)
    with torch.autocast(impl.device, autocast):
        inside = logit_stats(base, several, target, backend=impl.backend)
    for name, value in vars(inside).items():
        assert torch.equal(value, getattr(outside, name)), name
