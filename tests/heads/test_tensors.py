"""Heads whose tensors are not what they seem: subclasses, lazy signs, inference mode, transforms; and what is kept."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from inputs import cut_rows, head, logits, targets
from subclasses import Wrapped
from tolerance import assert_alike
from torch.autograd import forward_ad

from auxkernels import Head, Logits, aux_cross_entropy, logit_stats

N, V = 8, 11
PATHS = {"mean": {}, "none": {"reduction": "none"}, "recompute": {"recompute": True}}


@pytest.fixture(params=PATHS)
def path(request):
    return request.param


@pytest.fixture(autouse=True)
def _chunks(monkeypatch):
    cut_rows(monkeypatch, 3)


def problem(device, grad=False):
    scale = torch.rand(N, device=device).requires_grad_(grad)
    base = head(N, vocab_size=V, device=device, grad=grad)
    aux = head(N, vocab_size=V, device=device, bias=True, grad=grad, scale=scale)
    return base, aux, targets(N, vocab_size=V, device=device, ignored=0.2)


def loss_of(impl, path, base, aux, target):
    return aux_cross_entropy(base, aux, target, backend=impl.backend, **PATHS[path])


@pytest.mark.parametrize("part", ["hidden", "weight", "bias", "scale"])
def test_a_tensor_subclass_counts_for_what_it_holds(native, part):
    base, aux, target = problem("cpu")
    wrapped = replace(aux, **{part: Wrapped(getattr(aux, part))})
    for sources in (lambda one: (base, one), lambda one: (one, None), lambda one: (base, [base, one])):
        got, want = (aux_cross_entropy(*sources(one), target, backend="native") for one in (wrapped, aux))
        assert torch.equal(got, want)


def test_functionalization_sees_the_operator(native):
    base, aux, target = problem("cpu")

    def loss(hidden, weight):
        return aux_cross_entropy(base, Head(hidden, weight), target, backend="native")

    want = loss(aux.hidden, aux.weight)
    assert torch.equal(torch.func.functionalize(loss)(aux.hidden, aux.weight), want)


def test_a_lazy_minus_sign_is_read(impl):
    base, aux, target = problem(impl.device)
    signed = {name: torch._neg_view(getattr(aux, name)) for name in ("hidden", "weight", "bias", "scale")}
    got = aux_cross_entropy(base, replace(aux, **signed), target, backend=impl.backend)
    turned = {name: -getattr(aux, name) for name in signed}
    assert_alike(got, aux_cross_entropy(base, replace(aux, **turned), target, backend=impl.backend))


@pytest.mark.parametrize("path", ["none", "recompute"])
def test_an_inference_tensor_that_would_be_reread_is_refused(fused, path):
    base, aux, target = problem(fused.device, grad=True)
    with torch.inference_mode():
        frozen = Head(base.hidden * 1, base.weight * 1)
    with pytest.raises(RuntimeError, match=r"[Ii]nference tensors cannot be saved for backward"):
        loss_of(fused, path, frozen, aux, target)


def test_target_and_class_weight_may_come_from_inference_mode(fused, path):
    base, aux, target = problem(fused.device, grad=True)
    with torch.inference_mode():
        target, weight = target.clone(), torch.rand(V, device=fused.device)
    weight = weight if path == "mean" else weight.clone()
    loss = aux_cross_entropy(base, aux, target, weight=weight, backend=fused.backend, **PATHS[path])
    loss.sum().backward()
    assert aux.weight.grad.any()


def test_a_loss_whose_gradient_is_made_keeps_no_input_alive(fused):
    """Frozen weights and hidden states of a step may be freed before its backward."""
    made = {"hidden": (N, 6), "weight": (V, 6)}
    tensors = {f"{side}.{name}": logits(*shape, device=fused.device) for side in "ab" for name, shape in made.items()}
    for name in ("b.hidden", "b.weight"):
        tensors[name] = tensors[name].requires_grad_() * 1
    alive = {name: weakref.ref(tensor) for name, tensor in tensors.items()}
    target = targets(N, vocab_size=V, device=fused.device)
    heads = [Head(tensors[f"{side}.hidden"], tensors[f"{side}.weight"]) for side in "ab"]
    loss = aux_cross_entropy(*heads, target, backend=fused.backend)
    del tensors, heads
    gc.collect()
    assert not [name for name, reference in alive.items() if reference() is not None]
    loss.backward()


# -- transforms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["hidden", "weight", "bias", "scale"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_dual_numbers_are_an_error_and_not_a_lost_tangent(fused, path, part, requires_grad):
    base, aux, target = problem(fused.device)
    with forward_ad.dual_level():
        primal = getattr(aux, part).detach().requires_grad_(requires_grad)
        dual = replace(aux, **{part: forward_ad.make_dual(primal, torch.ones_like(primal))})
        for sources in ((base, dual), ([base, Logits(logits(N, V, device=fused.device))], dual)):
            with pytest.raises((RuntimeError, NotImplementedError)):
                loss_of(fused, path, *sources, target)
            with pytest.raises((RuntimeError, NotImplementedError)):
                logit_stats(*sources, target, backend=fused.backend)


def test_func_grad_is_an_error(fused, path):
    base, aux, target = problem(fused.device)
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda w: loss_of(fused, path, base, replace(aux, weight=w), target).sum())(aux.weight)


def test_vmap_is_an_error_or_the_truth(impl, path):
    base, aux, target = problem(impl.device)
    hidden = torch.stack([aux.hidden, aux.hidden + 1, aux.hidden * 2])

    def one(h):
        return loss_of(impl, path, base, replace(aux, hidden=h), target)

    want = torch.stack([one(h) for h in hidden])
    try:
        got = torch.vmap(one)(hidden)
    except RuntimeError:
        return
    assert_alike(got, want)


# -- sharded tensors ---------------------------------------------------------------------------------------------------


def test_a_sharded_tensor_is_a_type_error_that_names_it(on_cpu):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    base, aux, target = problem("cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        for part in ("hidden", "weight", "bias", "scale"):
            sharded = replace(aux, **{part: distribute_tensor(getattr(aux, part), mesh, [Shard(0)])})
            for sources in ((base, sharded), (sharded, None)):
                with pytest.raises(TypeError, match=rf"{part} of (aux|base) must be .*got DTensor"):
                    aux_cross_entropy(*sources, target, backend=on_cpu.backend)
    finally:
        dist.destroy_process_group()


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_nothing_waits_for_the_device(on_gpu):
    base, aux, target = problem("cuda", grad=True)
    leaves = (base.hidden, aux.hidden, aux.weight, aux.bias, aux.scale)
    for options in PATHS.values():  # once outside: libraries may wait when they are first used
        torch.autograd.grad(aux_cross_entropy(base, aux, target, backend=on_gpu.backend, **options).sum(), leaves)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for options in PATHS.values():
            torch.autograd.grad(aux_cross_entropy(base, aux, target, backend=on_gpu.backend, **options).sum(), leaves)
        logit_stats(base, [aux, base], target, backend=on_gpu.backend)
        shifted = Head(base.hidden.detach().view(1, N, -1)[:, :-1].expand(2, -1, -1), base.weight)
        aux_cross_entropy(shifted, None, target[1:].expand(2, -1), backend=on_gpu.backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_captured_graph_replays_with_new_inputs(on_gpu):
    base, aux, target = problem("cuda", grad=True)
    leaves = (base.hidden, aux.hidden, aux.weight, aux.bias, aux.scale)

    def step():
        loss = aux_cross_entropy(base, aux, target, backend=on_gpu.backend)
        return loss, *torch.autograd.grad(loss, leaves)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for ignored in (0.0, 0.5, 1.0):
        with torch.no_grad():
            for leaf in leaves:
                leaf.copy_(torch.rand_like(leaf))
            target.copy_(targets(N, vocab_size=V, device="cuda", ignored=ignored))
        graph.replay()
        for one, two in zip(captured, step(), strict=True):
            assert_alike(one, two)


@pytest.mark.gpu
def test_ignored_rows_dropped_on_gpu_change_nothing(on_gpu, monkeypatch):
    from auxkernels import chunk_settings

    base, aux, target = problem("cuda", grad=True)
    leaves, results = (base.hidden, aux.hidden, aux.weight, aux.bias, aux.scale), []
    for drops in (False, True):
        monkeypatch.setattr(chunk_settings, "drops_ignored_on_gpu", drops)
        loss = aux_cross_entropy(base, aux, target, backend=on_gpu.backend)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for one, two in zip(*results, strict=True):
        assert_alike(one, two)


@pytest.mark.gpu
def test_a_cpu_normalizer_goes_with_gpu_heads(on_gpu):
    base, aux, target = problem("cuda")
    losses = [
        aux_cross_entropy(base, aux, target, normalizer=torch.tensor(5, device=device), backend=on_gpu.backend)
        for device in ("cpu", "cuda")
    ]
    assert torch.equal(*losses)
