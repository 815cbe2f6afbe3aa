"""Heads in autograd as a user meets it: twice, accumulated, tied, checkpointed, under autocast, scaled."""

import copy
import itertools
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from inputs import cut_rows, head, logits, targets
from oracle import Case
from tolerance import assert_same_course, check_plain, check_results, check_values, gradients_of
from torch.utils.checkpoint import checkpoint

from auxkernels import Head, Logits, aux_cross_entropy, logit_stats, nn

N, V = 12, 37
PATHS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "recompute": {"recompute": True},
}
REREAD = ("none", "recompute")
# the gradients of fp16 heads, too, are made in the forward pass
HELD = ("mean", "sum")


@pytest.fixture(params=PATHS)
def path(request):
    return request.param


@pytest.fixture(autouse=True)
def _chunks(monkeypatch):
    cut_rows(monkeypatch, 4)


def problem(device, dtype=torch.float32, grad=True, ignored=0.2, **options):
    made = {"vocab_size": V, "dtype": dtype, "device": device, "grad": grad} | options
    base, aux = head(N, width=8, **made), head(N, width=5, bias=True, **made)
    return base, aux, targets(N, vocab_size=V, device=device, ignored=ignored)


def leaves_of(*sources):
    return [
        tensor
        for source in sources
        for tensor in (source.hidden, source.weight, source.bias, source.scale)
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad
    ]


def loss_of(impl, path, base, aux, target, **options):
    return aux_cross_entropy(base, aux, target, backend=impl.backend, **PATHS[path], **options)


# -- more than once ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("path", REREAD)
def test_a_second_backward_gives_the_same_bits(impl, path, dtype):
    base, aux, target = problem(impl.device, dtype)
    loss = loss_of(impl, path, base, aux, target)
    upstream = torch.randn_like(loss)
    first, second = (
        [grad.clone() for grad in torch.autograd.grad(loss, leaves_of(base, aux), upstream, retain_graph=True)]
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("path", HELD)
def test_a_second_backward_through_a_gradient_already_handed_out_names_recompute(fused, path, dtype):
    base, aux, target = problem(fused.device, dtype)
    loss = loss_of(fused, path, base, aux, target)
    leaves = leaves_of(base, aux)
    first = torch.autograd.grad(loss, leaves, torch.full_like(loss, 3.0), retain_graph=True)
    kept = [grad.clone() for grad in first]
    with pytest.raises(RuntimeError, match="recompute=True"):
        torch.autograd.grad(loss, leaves)
    assert all(map(torch.equal, first, kept))


def test_gradients_never_share_memory_and_may_be_changed_in_place(impl, path):
    base, aux, target = problem(impl.device)
    grads = torch.autograd.grad(loss_of(impl, path, base, aux, target).sum(), leaves_of(base, aux))
    places = sorted((grad.data_ptr(), grad.data_ptr() + grad.nbytes) for grad in grads)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(places))
    for grad in grads:
        assert grad.is_contiguous()
        grad.mul_(2)


def test_double_differentiation_is_an_error(fused, path):
    base, aux, target = problem(fused.device)
    scaled = replace(aux, scale=torch.tensor(0.7, device=fused.device, requires_grad=True))
    for sources in ((base, scaled), (base, None), ([base, scaled], scaled)):
        leaves = leaves_of(*(source for source in (sources[0], scaled) if isinstance(source, Head)))
        loss = loss_of(fused, path, *sources, target).sum()
        for grad in torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True):
            if grad is not None:
                assert grad.requires_grad  # or a gradient penalty would be dropped silently
                with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
                    grad.square().sum().backward(retain_graph=True)


def test_double_differentiation_of_statistics_is_an_error(fused):
    base, aux, target = problem(fused.device)
    stats = logit_stats(base, aux, target, backend=fused.backend)
    (grad,) = torch.autograd.grad(stats.entropy.sum(), aux.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.sum().backward()


# -- upstream gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["one", "other", "zero", "stride 0", "per row"])
def test_every_upstream_gradient(impl, path, kind, dtype):
    if (kind in ("stride 0", "per row")) != (path == "none"):
        pytest.skip("a loss per row has an upstream gradient per row")
    upstream = {
        "one": torch.tensor(1.0),
        "other": torch.tensor(-2.5),
        "zero": torch.tensor(0.0),
        "stride 0": torch.tensor(0.3).expand(N),
        "per row": torch.randn(N) * torch.tensor([1e-4, 0.0, 1.0] * (N // 3)),
    }[kind].to(impl.device)
    base, aux, target = problem(impl.device, dtype, scale=torch.rand(N, device=impl.device).requires_grad_())
    version, value = upstream._version, upstream.clone()
    got = check_plain(Case(base, aux, target, PATHS[path]), impl, upstream)
    assert upstream._version == version and torch.equal(upstream, value)
    if kind == "zero":
        assert not any(grad.any() for name, grad in got.items() if name != "loss")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_micro_batches_with_the_whole_normalizer_add_up_to_the_whole_batch(impl, dtype):
    if dtype == torch.float64 and impl.backend == "triton":
        pytest.skip("the Triton kernels have no float64")
    base, aux, target = problem(impl.device, dtype, ignored=0.3)
    leaves, kept = leaves_of(base, aux), (target != -100).sum()

    def step(pieces):
        for tensor in leaves:
            tensor.grad = None
        total = torch.zeros((), dtype=torch.float64)
        for piece in pieces:
            sources = [replace(source, hidden=source.hidden[piece]) for source in (base, aux)]
            loss = aux_cross_entropy(*sources, target[piece], normalizer=kept, backend=impl.backend)
            loss.backward()
            total += loss.item()
        return {"loss": total.to(impl.device), **dict(zip(case.leaves(), (t.grad for t in leaves), strict=True))}

    case = Case(base, aux, target)
    for pieces in ([slice(None)], [slice(0, 5), slice(5, N)], [slice(i, i + 1) for i in range(N)]):
        check_results(case, step(pieces))


# -- one tensor in several places --------------------------------------------------------------------------------------


def test_tied_weights_get_the_gradient_of_both_heads(impl, path):
    base, _, target = problem(impl.device)
    other = head(N, width=8, vocab_size=V, device=impl.device)
    check_plain(Case(base, replace(other, weight=base.weight), target, PATHS[path]), impl, per_row(impl, path))


def test_hidden_states_shared_by_both_heads_get_both_gradients(impl, path):
    base, _, target = problem(impl.device)
    other = head(N, width=8, vocab_size=V, device=impl.device)
    check_plain(Case(base, replace(other, hidden=base.hidden), target, PATHS[path]), impl, per_row(impl, path))
    check_plain(Case(base, base, target, PATHS[path]), impl, per_row(impl, path))


def test_one_tensor_may_be_logits_and_hidden_states(impl, path):
    base = head(N, width=V, vocab_size=V, device=impl.device)
    target = targets(N, vocab_size=V, device=impl.device, ignored=0.2)
    check_plain(Case(Logits(base.hidden), base, target, PATHS[path]), impl, per_row(impl, path))


def test_one_scale_may_stand_at_every_source(impl, path):
    scale = torch.tensor(0.6, device=impl.device, requires_grad=True)
    base, aux, target = problem(impl.device, scale=scale)
    values = Logits(logits(N, V, device=impl.device, requires_grad=True), scale=scale)
    check_plain(Case([values, base], aux, target, PATHS[path]), impl, per_row(impl, path))


def per_row(impl, path):
    return torch.randn(N, device=impl.device) if path == "none" else None


# -- layouts -----------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "transposed": lambda t: t.T.contiguous().T,
    "padded": lambda t: F.pad(t, (3, 2))[:, 3:-2],
    "every second row": lambda t: t.repeat_interleave(2, 0)[::2],
    "every second column": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "offset": lambda t: F.pad(t.flatten(), (1, 0))[1:].view(t.shape),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("part", ["hidden", "weight"])
def test_hidden_and_weight_may_have_any_strides(impl, part, layout, dtype):
    base, aux, target = problem(impl.device, dtype)
    changed = LAYOUTS[layout](getattr(aux, part).detach()).requires_grad_()
    assert torch.equal(changed, getattr(aux, part))
    check_plain(Case(base, replace(aux, **{part: changed}), target), impl)


@pytest.mark.parametrize("part", ["hidden", "weight", "bias"])
def test_expanded_tensors_are_read_as_such(impl, path, part):
    base, aux, target = problem(impl.device)
    dim = 1 if part == "weight" else 0  # equal rows of a weight would make no gradient of the hidden states
    original = getattr(aux, part).detach().narrow(dim, 0, 1).clone()
    shape = getattr(aux, part).shape
    expanded = original.expand(shape).requires_grad_()
    assert expanded.stride(dim) == 0
    case = Case(base, replace(aux, **{part: expanded}), target, PATHS[path])
    upstream, name = per_row(impl, path), f"{part} of aux[0]"
    check_plain(case, impl, upstream)
    leaf = original.requires_grad_()
    loss = loss_of(impl, path, base, replace(aux, **{part: leaf.expand(shape)}), target)

    def values_of(call):
        return {part: gradients_of(call.loss(), call, upstream)[name].sum(dim, keepdim=True)}

    check_values(values_of, {part: torch.autograd.grad(loss, leaf, upstream)[0]}, case)


@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_targets_scales_and_logits_may_have_any_strides(impl, path, ignored):
    """Leading dimensions that no single stride walks: each tensor in an order of its own."""
    base = head(3, 2, 4, vocab_size=V, device=impl.device)
    hidden = logits(2, 4, 3, 5, scale=1.0, device=impl.device).permute(2, 0, 1, 3).detach().requires_grad_()
    scale = torch.rand(3, 1, 1, device=impl.device).expand(3, 2, 4).requires_grad_()
    aux = Head(hidden, head(1, width=5, vocab_size=V, device=impl.device).weight, scale=scale)
    values = logits(4, 3, 2, V, device=impl.device).permute(1, 2, 0, 3).detach().requires_grad_()
    target = targets(4, 2, 3, vocab_size=V, device=impl.device, ignored=ignored).permute(2, 1, 0)
    assert not any(tensor.is_contiguous() for tensor in (hidden, scale, values, target))
    for sources in ((base, aux), (values, aux), ([base, values], aux)):
        upstream = torch.randn(3, 2, 4, device=impl.device) if path == "none" else None
        check_plain(Case(*sources, target, PATHS[path]), impl, upstream)


def test_inputs_are_never_written(impl, path):
    scale = torch.rand(N, device=impl.device, requires_grad=True)
    base, aux, target = problem(impl.device, scale=scale)
    values = logits(N, V, device=impl.device, requires_grad=True)
    weight = torch.rand(V, device=impl.device)
    inputs = [*leaves_of(base, aux), values, target, weight]
    before = [(tensor._version, tensor.detach().clone()) for tensor in inputs]
    for sources in ((base, aux), (values, aux), ([base, values], [aux, Logits(values, softcap=4.0)])):
        loss_of(impl, path, *sources, target, weight=weight, label_smoothing=0.1).sum().backward()
        logit_stats(*sources, target, backend=impl.backend).entropy.sum().backward()
    for tensor, (version, value) in zip(inputs, before, strict=True):
        assert tensor._version == version and torch.equal(tensor, value)


@pytest.mark.parametrize("changed", ["hidden", "weight", "target"])
def test_an_input_changed_before_backward_is_noticed_or_harmless(impl, path, changed):
    base, aux, target = problem(impl.device, grad=False)
    leaf = aux.weight.clone().requires_grad_()

    def made():
        given = {"hidden": aux.hidden.clone(), "weight": leaf * 1, "target": target.clone()}
        return given, loss_of(impl, path, base, Head(given["hidden"], given["weight"]), given["target"]).sum()

    (want,) = torch.autograd.grad(made()[1], leaf)
    given, loss = made()
    with torch.no_grad():
        given[changed].add_(1)
    try:
        (grad,) = torch.autograd.grad(loss, leaf)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert torch.equal(grad, want)


# -- modes and modules -------------------------------------------------------------------------------------------------


def test_no_grad_and_inference_mode_give_the_same_loss(impl, path):
    base, aux, target = problem(impl.device)
    recorded = loss_of(impl, path, base, aux, target)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = loss_of(impl, path, base, aux, target)
            assert logit_stats(base, aux, target, backend=impl.backend).lse.isfinite().all()
        assert not loss.requires_grad
        # which kernel reads the logits, and whether both products are one, is the plan's to choose
        for value in (loss, recorded):
            check_results(Case(base, aux, target, PATHS[path]), {"loss": value}, per_row(impl, path))


@pytest.mark.parametrize("path", HELD)
def test_a_frozen_head_made_in_inference_mode_may_be_used_where_nothing_is_reread(impl, path):
    base, aux, target = problem(impl.device)
    with torch.inference_mode():
        frozen = Head(base.hidden * 1, base.weight * 1)
    if impl.backend == "reference":
        frozen = Head(frozen.hidden.clone(), frozen.weight.clone())  # plain torch saves what it multiplies
    got = torch.autograd.grad(loss_of(impl, path, frozen, aux, target), leaves_of(aux))
    want = torch.autograd.grad(loss_of(impl, path, base, aux, target), leaves_of(aux))
    assert all(map(torch.equal, got, want))


class Model(torch.nn.Module):
    """Hidden states of a small network, and a head."""

    def __init__(self, device="cpu", seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = torch.nn.Linear(6, 8, device=device), torch.nn.Linear(8, V, device=device)

    def forward(self, x):
        return Head(torch.tanh(self.body(x)), self.head.weight, bias=self.head.bias)


def dense(source):
    return F.linear(source.hidden, source.weight, source.bias)


def test_checkpointing_gives_the_same_gradients(impl, path):
    model, base = Model(impl.device), Model(impl.device, 1).requires_grad_(False)
    x, target = logits(N, 6, device=impl.device), targets(N, vocab_size=V, device=impl.device, ignored=0.2)

    def loss(x):
        return loss_of(impl, path, base(x), model(x), target).sum()

    grads = [
        torch.autograd.grad(value, list(model.parameters()))
        for value in (loss(x), checkpoint(loss, x, use_reentrant=False))
    ]
    assert all(map(torch.equal, *grads))


def test_functional_call_replaces_the_head(impl):
    model, base = Model(impl.device), Model(impl.device, 1).requires_grad_(False)
    x, target = logits(N, 6, device=impl.device), targets(N, vocab_size=V, device=impl.device, ignored=0.2)
    replaced = {name: torch.randn_like(p).requires_grad_() for name, p in model.named_parameters()}
    aux = torch.func.functional_call(model, replaced, x)
    loss = aux_cross_entropy(base(x), aux, target, backend=impl.backend)
    grads = torch.autograd.grad(loss, list(replaced.values()), retain_graph=True)
    leaves = {name: getattr(aux, name) for name in ("hidden", "weight", "bias")}
    case = Case(base(x), Head(**{name: t.detach().requires_grad_() for name, t in leaves.items()}), target)

    def values_of(call):
        of_head = gradients_of(call.loss(), call)
        states = of_head["hidden of aux[0]"] * (1 - torch.tanh(inner).square())
        return {
            "body.weight": states.T @ x.double(),
            "body.bias": states.sum(0),
            **{f"head.{name}": of_head[f"{name} of aux[0]"] for name in ("weight", "bias")},
        }

    inner = F.linear(x.double(), replaced["body.weight"].detach().double(), replaced["body.bias"].detach().double())
    check_values(values_of, dict(zip(replaced, grads, strict=True)), case)
    assert all(p.grad is None for p in model.parameters())


class Trained(torch.nn.Module):
    """A whole model with its loss, as a user would write it."""

    def __init__(self, backend, device):
        super().__init__()
        self.base, self.aux = Model(device).requires_grad_(False), Model(device, 1)
        self.scale = torch.nn.Parameter(torch.tensor(0.5, device=device))
        self.loss = nn.AuxCrossEntropyLoss(torch.ones(V, device=device), label_smoothing=0.1, backend=backend)

    def forward(self, x, target):
        return self.loss(self.base(x), replace(self.aux(x), scale=self.scale), target)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_module_around_it_survives_deepcopy_and_pickle(impl, again):
    model = Trained(impl.backend, impl.device)
    x, target = logits(N, 6, device=impl.device), targets(N, vocab_size=V, device=impl.device, ignored=0.2)
    model(x, target).backward()
    other = again(model)
    other.zero_grad()
    other(x, target).backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None) and one.data_ptr() != two.data_ptr()
        if one.grad is not None:
            assert torch.equal(one.grad, two.grad)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_head_itself_survives_deepcopy_and_pickle(again):
    base = head(N, vocab_size=V, bias=True, scale=0.5, softcap=3.0)
    other = again(base)
    assert torch.equal(other.hidden, base.hidden) and other.weight is not base.weight
    assert (other.scale, other.softcap) == (base.scale, base.softcap) and other.bias.requires_grad


def test_the_loss_module_is_the_function(impl):
    base, aux, target = problem(impl.device)
    weight = torch.rand(V, device=impl.device)
    module = nn.AuxCrossEntropyLoss(weight, z_loss=0.1, return_stats=True, backend=impl.backend)
    loss, stats = module(base, [aux, base], target, normalizer=5)
    options = {"weight": weight, "z_loss": 0.1, "normalizer": 5, "return_stats": True}
    want, want_stats = aux_cross_entropy(base, [aux, base], target, backend=impl.backend, **options)
    assert torch.equal(loss, want) and torch.equal(stats.entropy, want_stats.entropy)
    for one, two in zip(*(torch.autograd.grad(value, leaves_of(base, aux)) for value in (loss, want)), strict=True):
        assert torch.equal(one, two)


def test_training_takes_the_course_of_dense_logits(impl):

    def course_of(loss_of_models):
        base, aux = Model(impl.device).requires_grad_(False), Model(impl.device, 1)
        optimizer = torch.optim.AdamW(aux.parameters(), lr=3e-2)
        generator, course = torch.Generator().manual_seed(0), []
        for _ in range(30):
            x = torch.randn(16, 6, generator=generator).to(impl.device)
            y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
            y[:3] = -100
            loss = loss_of_models(base(x), aux(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            course.append(loss.item())
        return [torch.tensor(course)]

    (course,) = assert_same_course(
        course_of,
        lambda base, aux, y, changed: F.cross_entropy(changed(dense(base) + dense(aux)), y),
        lambda base, aux, y: aux_cross_entropy(base, aux, y, backend=impl.backend),
    )
    assert course[-1] < 0.6 * course[0]  # it learns
