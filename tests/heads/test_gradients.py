"""Heads: which gradients are made and what they cost in products and memory; rows that are ignored cost nothing."""

import itertools
from dataclasses import replace

import pytest
import torch
from inputs import cut_rows, head, logits, targets
from oracle import Case
from profiled import products
from tolerance import check_plain, check_values, gradients_of

from auxkernels import Head, Logits, aux_cross_entropy, logit_stats
from auxkernels.heads import products as product_module
from auxkernels.heads import rows as row_module

N, V, D_BASE, D_AUX = 12, 37, 8, 5
PATHS = {"mean": {}, "none": {"reduction": "none"}, "recompute": {"recompute": True}}


def problem(device, dtype=torch.float32, grad=True, scaled=True, ignored=0.0, rows=N):
    def scale(shape):
        return (torch.rand(shape, device=device) + 0.5).requires_grad_(grad) if scaled else 1.0

    made = {"vocab_size": V, "bias": True, "dtype": dtype, "device": device, "grad": grad}
    base = head(rows, width=D_BASE, scale=scale(()), **made)
    aux = head(rows, width=D_AUX, scale=scale((rows,)), **made)
    return base, aux, targets(rows, vocab_size=V, device=device, ignored=ignored)


def tensors(*sources: Head):
    found = [getattr(source, name) for source in sources for name in ("hidden", "weight", "bias", "scale")]
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


# -- which gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("num_chunks", [1, 3])
@pytest.mark.parametrize("path", PATHS)
def test_every_subset_of_the_tensors_gets_its_gradients_and_no_other(impl, monkeypatch, path, num_chunks):
    if num_chunks > 1:
        cut_rows(monkeypatch, 4)
    base, aux, target = problem(impl.device, ignored=0.1)
    case = Case(base, aux, target, PATHS[path])
    upstream = torch.randn(N, device=impl.device) if path == "none" else torch.ones((), device=impl.device)
    leaves, got = case.leaves(), {}
    assert len(leaves) == 8
    for needs in itertools.product([False, True], repeat=len(leaves)):
        for tensor, need in zip(leaves.values(), needs, strict=True):
            tensor.requires_grad_(need)
            tensor.grad = None
        loss = aux_cross_entropy(base, aux, target, backend=impl.backend, **PATHS[path])
        assert loss.requires_grad == any(needs)
        if any(needs):
            loss.backward(upstream)
        for (name, tensor), need in zip(leaves.items(), needs, strict=True):
            assert (tensor.grad is not None) == need, f"{name} of {needs}"
            if need:
                got.setdefault(name, []).append(tensor.grad)
    for tensor in leaves.values():
        tensor.requires_grad_()
    check_gradients_of_many_calls(case, upstream, got)


def check_gradients_of_many_calls(case, upstream, got) -> None:
    """got: by the name of the leaf, its gradient from each call that needed it."""

    def values_of(call):
        grads = gradients_of(call.loss(), call, upstream)
        return {(name, i): grads[name] for name, values in got.items() for i in range(len(values))}

    check_values(values_of, {(name, i): grad for name, values in got.items() for i, grad in enumerate(values)}, case)


@pytest.mark.parametrize("path", PATHS)
def test_every_pair_of_the_tensors_of_a_sum_gets_its_gradients(impl, monkeypatch, path):
    cut_rows(monkeypatch, 4)
    base, aux, target = problem(impl.device, ignored=0.1)
    values = logits(N, V, device=impl.device, requires_grad=True)
    case = Case([Logits(values, scale=base.scale), base], [aux, replace(base, scale=-0.5)], target, PATHS[path])
    upstream = torch.randn(N, device=impl.device) if path == "none" else torch.ones((), device=impl.device)
    names = {id(tensor): name for name, tensor in case.leaves().items()}
    everything, got = {id(tensor): tensor for tensor in case.leaves().values()}, {}
    for needed in itertools.combinations_with_replacement(everything, 2):
        for key, tensor in everything.items():
            tensor.requires_grad_(key in needed)
            tensor.grad = None
        loss = aux_cross_entropy(case.base, case.aux, target, backend=impl.backend, **PATHS[path])
        loss.backward(upstream)
        for key, tensor in everything.items():
            assert (tensor.grad is not None) == (key in needed)
            if key in needed:
                got.setdefault(names[key], []).append(tensor.grad)
    for tensor in everything.values():
        tensor.requires_grad_()
    check_gradients_of_many_calls(case, upstream, got)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_every_subset_of_the_tensors_of_unscaled_heads_in_a_sum_gets_its_gradients(impl, monkeypatch, path, dtype):
    """[h, g] @ [W, U].T: products that may be added up where they are stored."""
    cut_rows(monkeypatch, 4)
    made = {"vocab_size": V, "dtype": dtype, "device": impl.device}
    pair = [head(N, width=D_BASE, bias=True, **made), head(N, width=D_AUX, **made)]
    values, target = logits(N, V, device=impl.device), targets(N, vocab_size=V, device=impl.device, ignored=0.2)
    upstream = torch.randn(N, device=impl.device) if path == "none" else None
    leaves = tensors(*pair)
    assert len(leaves) == 5
    for needs in itertools.product([False, True], repeat=5):
        for tensor, need in zip(leaves, needs, strict=True):
            tensor.requires_grad_(need)
        for sources in ((values, pair), (pair, None)):
            case = Case(*sources, target, PATHS[path])
            assert len(case.leaves()) == sum(needs)
            check_plain(case, impl, upstream)


# -- what they cost ----------------------------------------------------------------------------------------------------


def flops(shapes) -> int:
    return sum(2 * m * k * n for m, k, n in shapes)


def trains(*needed):
    def of(base, aux):
        chosen = {"base": base, "aux": aux}
        for source in chosen.values():
            for tensor in tensors(source):
                tensor.requires_grad_(False)
        for name in needed:
            side, part = name.split(".")
            getattr(chosen[side], part).requires_grad_()

    return of


# what is trained, and the products of each width beside the forward one of each head: gradients of hidden, of weight
COSTS = {
    "nothing": (trains(), 0, 0),
    "aux": (trains("aux.hidden", "aux.weight", "aux.bias"), 0, 2),
    "aux hidden": (trains("aux.hidden"), 0, 1),
    "aux weight": (trains("aux.weight"), 0, 1),
    "aux bias": (trains("aux.bias"), 0, 0),
    "aux scale": (trains("aux.scale"), 0, 0),
    "base scale": (trains("base.scale"), 0, 0),
    "base": (trains("base.hidden", "base.weight"), 2, 0),
    "both hidden": (trains("base.hidden", "aux.hidden"), 1, 1),
    "everything": (trains(*(f"{s}.{p}" for s in ("base", "aux") for p in ("hidden", "weight", "bias"))), 2, 2),
}


def at_most(fused, count: int, allowed: int) -> None:
    """A kernel of its own may do without a product of the library, on CPU none does."""
    assert count == allowed if fused.backend == "native" else count <= allowed


@pytest.mark.parametrize("path", ["mean", "recompute", "none"])
@pytest.mark.parametrize("trained", COSTS)
def test_a_step_costs_the_forward_products_and_those_of_the_requested_gradients(fused, monkeypatch, trained, path):
    cut_rows(monkeypatch, 4)
    base, aux, target = problem(fused.device)
    choose, of_base, of_aux = COSTS[trained]
    choose(base, aux)

    def step():
        loss = aux_cross_entropy(base, aux, target, backend=fused.backend, **PATHS[path])
        if loss.requires_grad:
            loss.sum().backward()

    times = 2 if path != "mean" and trained != "nothing" else 1  # rereading makes the logits again
    allowed = 2 * N * V * ((times + of_base) * D_BASE + (times + of_aux) * D_AUX)
    at_most(fused, flops(products(step)), allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_frozen_base_launches_its_forward_product_alone(fused, monkeypatch, dtype):
    cut_rows(monkeypatch, 4)
    base, aux, target = problem(fused.device, dtype, scaled=False)
    trains("aux.hidden", "aux.weight", "aux.bias")(base, aux)

    def step():
        aux_cross_entropy(base, aux, target, backend=fused.backend).backward()

    of_base = [shape for shape in products(step) if D_BASE in shape]
    assert all((k, n) == (D_BASE, V) for _, k, n in of_base)
    at_most(fused, sum(m for m, _, _ in of_base), N)


def test_a_frozen_term_of_a_sum_launches_its_forward_product_alone(fused, monkeypatch):
    cut_rows(monkeypatch, 4)
    base, aux, target = problem(fused.device, scaled=False)
    trains("aux.hidden", "aux.weight")(base, aux)

    def step():
        values = logits(N, V, device=fused.device)
        aux_cross_entropy(values, [base, aux], target, backend=fused.backend).backward()

    of_base = [shape for shape in products(step) if D_BASE in shape]
    assert all((k, n) == (D_BASE, V) for _, k, n in of_base)
    at_most(fused, sum(m for m, _, _ in of_base), N)


def test_statistics_launch_the_forward_products_alone(fused, monkeypatch):
    cut_rows(monkeypatch, 4)
    base, aux, target = problem(fused.device, grad=False)
    count = flops(products(lambda: logit_stats(base, aux, target, backend=fused.backend)))
    at_most(fused, count, 2 * N * V * (D_BASE + D_AUX))


def test_return_stats_launches_no_product_more(fused, monkeypatch):
    cut_rows(monkeypatch, 4)
    base, aux, target = problem(fused.device)

    def step(**options):
        loss = aux_cross_entropy(base, aux, target, backend=fused.backend, **options)
        (loss[0] if options else loss).backward()

    assert flops(products(step)) == flops(products(lambda: step(return_stats=True)))


def test_a_source_without_a_gradient_gets_no_buffer_for_one(fused, monkeypatch):
    """Shapes of what is allocated: no [N, D] of a frozen hidden, no [V, D] of a frozen weight."""
    cut_rows(monkeypatch, 4)
    shapes = []

    def spy(name):
        plain = getattr(torch.Tensor, name)

        def counted(self, *args, **kwargs):
            made = plain(self, *args, **kwargs)
            shapes.append(tuple(made.shape))
            return made

        monkeypatch.setattr(torch.Tensor, name, counted)

    for name in ("new_empty", "new_zeros", "new_full"):
        spy(name)
    base, aux, target = problem(fused.device, scaled=False)
    of = {"base.hidden": (N, D_BASE), "base.weight": (V, D_BASE), "aux.hidden": (N, D_AUX), "aux.weight": (V, D_AUX)}
    for needed in itertools.chain.from_iterable(itertools.combinations(of, n) for n in range(5)):
        trains(*needed)(base, aux)
        for options in PATHS.values():
            shapes.clear()
            loss = aux_cross_entropy(base, aux, target, backend=fused.backend, **options)
            if needed:
                loss.sum().backward()
            assert {name for name, shape in of.items() if shape in shapes} == set(needed)


# -- ignored rows ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["dropped", "kept"])
def dropping(request, monkeypatch):
    """Whether ignored rows are left out, as on CPU, or worked on, as on GPU."""
    if request.param == "kept":
        monkeypatch.setattr(row_module, "_may_drop", lambda device: False)
    return request.param


def with_nothing_to_read(base, aux, target, fill):
    """What ignored rows hold is replaced, in hidden states and scales."""
    ignored = target == -100
    with torch.no_grad():
        for tensor in (base.hidden, aux.hidden, aux.scale):
            tensor[ignored] = fill
    return ignored


SUMS = {
    "two heads": lambda base, aux, values: (base, aux),
    "sums": lambda base, aux, values: ([base, values], [aux, replace(base, scale=0.5)]),
    "logits and a head": lambda base, aux, values: (values, aux),
    "unscaled heads": lambda base, aux, values: ([replace(base, scale=1.0), replace(base, scale=1.0)], [aux, values]),
}


@pytest.mark.parametrize("fill", [torch.nan, torch.inf])
@pytest.mark.parametrize("form", SUMS)
@pytest.mark.parametrize("options", [*PATHS.values(), {"label_smoothing": 0.1, "z_loss": 0.1}], ids=str)
def test_ignored_rows_may_hold_anything(impl, monkeypatch, dropping, options, form, fill):
    cut_rows(monkeypatch, 3)
    base, aux, target = problem(impl.device, ignored=0.4)
    values = logits(N, V, device=impl.device)
    ignored = with_nothing_to_read(base, aux, target, fill)
    values[ignored] = fill
    case = Case(*SUMS[form](base, aux, values.requires_grad_()), target, options)
    upstream = torch.randn(N, device=impl.device) if options.get("reduction") == "none" else None
    got = check_plain(case, impl, upstream)
    assert got["loss"].isfinite().all()
    if upstream is not None:
        assert not got["loss"][ignored].any() and not torch.signbit(got["loss"][ignored]).any()
    for name, leaf in case.leaves().items():
        assert got[name].isfinite().all() and got[name].any(), name
        if leaf.dim() and leaf.shape[0] == N:
            assert not got[name][ignored].any() and not torch.signbit(got[name][ignored]).any(), name


@pytest.mark.parametrize("path", PATHS)
def test_ignored_rows_get_zero_gradient_whatever_the_weight_holds(impl, monkeypatch, dropping, path):
    cut_rows(monkeypatch, 3)
    base, aux, target = problem(impl.device, ignored=0.4)
    with torch.no_grad():
        base.weight[3], aux.weight[5, 2] = torch.nan, torch.inf
    loss = aux_cross_entropy(base, aux, target, backend=impl.backend, **PATHS[path])
    assert loss.isnan().any()
    for grad in torch.autograd.grad(loss.sum(), (base.hidden, aux.hidden, aux.scale)):
        rows = grad[target == -100]
        assert not rows.any() and not torch.signbit(rows).any()
        assert grad.isnan().any()


@pytest.mark.parametrize("upstream", [-1.0, torch.inf])
def test_ignored_rows_keep_their_zeros_whatever_the_upstream_gradient(impl, dropping, upstream):
    base, aux, target = problem(impl.device, ignored=0.4)
    loss = aux_cross_entropy(base, aux, target, backend=impl.backend)
    loss.backward(torch.full_like(loss, upstream))
    for grad in (base.hidden.grad, aux.hidden.grad, aux.scale.grad):
        rows = grad[target == -100]
        assert not rows.any() and not torch.signbit(rows).any()


def test_statistics_of_ignored_rows_are_zero_whatever_they_hold(impl, monkeypatch, dropping):
    cut_rows(monkeypatch, 3)
    base, aux, target = problem(impl.device, ignored=0.4)
    ignored = with_nothing_to_read(base, aux, target, torch.nan)
    stats = logit_stats(base, aux, target, backend=impl.backend)
    for name, value in vars(stats).items():
        if value.is_floating_point():
            assert not value[ignored].any() and not torch.signbit(value[ignored]).any() and value.isfinite().all()
        else:
            assert (value[ignored] == -1).all() and (value[~ignored] >= 0).all(), name
    sum(value.sum() for value in vars(stats).values() if value.is_floating_point()).backward()
    for tensor in tensors(base, aux):
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_dropped_rows_change_nothing_for_the_others(fused, monkeypatch, dropping, path, dtype):
    """But in which order a library sums: other heights of a product may go through other kernels."""
    cut_rows(monkeypatch, 3)
    base, aux, target = problem(fused.device, dtype, ignored=0.4)
    case = Case(base, aux, target, PATHS[path])
    upstream = torch.linspace(-1, 1, N, device=fused.device) if path == "none" else None
    check_plain(case, fused, upstream)


def test_dropped_rows_do_not_enter_the_products(native, monkeypatch):
    cut_rows(monkeypatch, 3)
    base, aux, target = problem("cpu", ignored=0.5)
    kept = int((target != -100).sum())
    assert 0 < kept < N
    count = flops(products(lambda: aux_cross_entropy(base, aux, target, backend="native").backward()))
    assert count == 3 * 2 * kept * V * (D_BASE + D_AUX)
    target.fill_(-100)
    assert products(lambda: aux_cross_entropy(base, aux, target, backend="native").backward()) == []


@pytest.mark.parametrize("num_rows", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_with_nothing_to_average_mean_is_nan_and_gradients_are_zero(impl, dropping, dtype, num_rows):
    base, aux, _ = problem(impl.device, dtype, rows=num_rows)
    target = torch.full((num_rows,), -100, device=impl.device)
    with_nothing_to_read(base, aux, target, torch.nan)
    for options, want in (
        ({}, torch.nan),
        ({"recompute": True}, torch.nan),
        ({"normalizer": 3}, 0.0),
        ({"reduction": "sum"}, 0.0),
        ({"reduction": "none"}, 0.0),
    ):
        for sources in ((base, aux), (base, None), ([base, aux], aux)):
            loss = aux_cross_entropy(*sources, target, backend=impl.backend, **options)
            torch.testing.assert_close(loss, torch.full_like(loss, want), equal_nan=True, rtol=0, atol=0)
            assert loss.shape == ((num_rows,) if options.get("reduction") == "none" else ())
            leaves = tensors(base) if sources[1] is None else tensors(base, aux)
            grads = torch.autograd.grad(loss, leaves, torch.ones_like(loss))
            for leaf, grad in zip(leaves, grads, strict=True):
                assert grad.shape == leaf.shape and not grad.any() and not torch.signbit(grad).any()
    stats = logit_stats(base, aux, target, backend=impl.backend)
    assert not stats.lse.any() and stats.argmax.tolist() == [-1] * num_rows


@pytest.mark.parametrize("share, dropped", [(0.1, 0), (0.5, 8)])
def test_beside_materialised_logits_ignored_rows_are_dropped_from_half_of_them_on(monkeypatch, native, share, dropped):
    """Their copies would cost more than the products that a few rows save."""
    heights, plain = [], product_module.multiply

    def spy(a, b, out, *rest, **options):
        heights.append(len(a))
        plain(a, b, out, *rest, **options)

    monkeypatch.setattr(product_module, "multiply", spy)
    target = targets(16, vocab_size=40)
    target[: int(share * 16)] = -100
    aux_cross_entropy(logits(16, 40), head(16, vocab_size=40), target, backend="native").backward()
    assert heights[0] == 16 - dropped
