"""Properties that hold for any input: hypothesis looks for one for which they do not.

Derandomised, so that a failure is the same for everybody; sizes are small, because the shapes at which code changes are
in the grids of the other files, except where a row is long enough to be split over threads.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Case, Rows, assert_close, expected
from tolerance import assert_alike

from auxkernels import Logits, aux_cross_entropy, logit_stats

properties = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
REDUCTIONS = st.sampled_from(["mean", "sum", "none"])


@st.composite
def problems(draw, max_rows=6, max_width=70):
    """Base, aux, target and options of any legal kind; logits from flat to peaked, some masked."""
    rows, width = draw(st.integers(1, max_rows)), draw(st.integers(1, max_width))
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([0.0, 0.1, 1.0, 10.0, 100.0]))
    base, aux = ((torch.randn(rows, width) * scale).to(draw(DTYPES)) for _ in range(2))
    target = torch.randint(width, (rows,))
    if draw(st.booleans()):
        mask = torch.rand(rows, width) < draw(st.sampled_from([0.1, 0.5, 0.9]))
        mask[torch.arange(rows), target] = False
        aux = aux.masked_fill(mask, -torch.inf)
    if draw(st.booleans()):
        target[torch.rand(rows) < 0.3] = -100
    options = {"label_smoothing": 0.0, "z_loss": draw(st.sampled_from([0.0, 1e-3]))}
    if not aux.isinf().any():
        options["label_smoothing"] = draw(st.sampled_from([0.0, 0.1]))
    if draw(st.booleans()):
        options["weight"] = torch.rand(width)
    return base, aux, target, options


def run(impl, base, aux, target, options, upstream=None, **changes):
    """Loss and gradients of both sources."""
    base, aux = (t.detach().clone().to(impl.device).requires_grad_() for t in (base, aux))
    options = {k: v.to(impl.device) if isinstance(v, torch.Tensor) else v for k, v in (options | changes).items()}
    loss = aux_cross_entropy(base, aux, target.to(impl.device), backend=impl.backend, **options)
    if upstream is None:
        upstream = torch.ones_like(loss)
    return loss.detach(), *torch.autograd.grad(loss, (base, aux), upstream.to(impl.device))


def bits(*tensors):
    """Tensors as integers: NaN equals itself, and -0.0 is not 0.0."""
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [t.contiguous().view(sizes[t.element_size()]) for t in tensors]


def assert_same_bits(got, want):
    for one, two in zip(bits(*got), bits(*want), strict=True):
        assert torch.equal(one, two)


@properties
@given(problem=problems(), reduction=REDUCTIONS)
def test_any_call_matches_the_oracle(impl, problem, reduction):
    base, aux, target, options = problem
    case = Case(
        base.to(impl.device).requires_grad_(),
        aux.to(impl.device).requires_grad_(),
        target.to(impl.device),
        {k: v.to(impl.device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        | {"reduction": reduction},
    )
    upstream = torch.rand(target.shape, device=impl.device) if reduction == "none" else None
    got = case.run(impl.backend, upstream)
    for name, (want, error) in expected(case, upstream, confident=impl.backend != "reference").items():
        assert_close(name, got[name], want, error)


@properties
@given(problem=problems(), shift=st.sampled_from([-64.0, -1.0, 0.5, 8.0, 1024.0]))
def test_adding_a_number_to_every_class_changes_nothing(impl, problem, shift):
    base, aux, target, options = problem
    base = (base.float() * 16).round() / 16  # so that the shifted sum is as exact as the plain one
    aux = (aux.float() * 16).round() / 16
    options = options | {"z_loss": 0.0}
    plain = run(impl, base, aux, target, options, reduction="none")
    shifted = run(impl, base + shift, aux, target, options, reduction="none")
    exact = Case(base, aux.requires_grad_(), target, options | {"reduction": "none"})
    error = expected(exact, torch.ones(target.shape), confident=False)
    assert_close("loss", shifted[0].cpu(), plain[0].double().cpu(), 2 * error["loss"][1])
    assert_close("gradient", shifted[2].cpu(), plain[2].double().cpu(), 2 * error["aux[0]"][1])


@properties
@given(problem=problems(max_rows=12), reduction=st.sampled_from(["sum", "none"]))
def test_permuting_rows_permutes_bits(fused, problem, reduction):
    base, aux, target, options = problem
    order = torch.randperm(len(target))
    upstream = torch.rand(target.shape) if reduction == "none" else torch.tensor(0.5)
    plain = run(fused, base, aux, target, options, upstream, reduction=reduction)
    moved = upstream[order] if reduction == "none" else upstream
    permuted = run(fused, base[order], aux[order], target[order], options, moved, reduction=reduction)
    assert_same_bits(permuted[1:], [t[order] for t in plain[1:]])
    if reduction == "none":
        assert_same_bits(permuted[:1], [plain[0][order]])


@properties
@given(problem=problems(max_rows=12), reduction=st.sampled_from(["sum", "none"]))
def test_a_row_alone_has_the_bits_it_has_among_others(fused, problem, reduction):
    base, aux, target, options = problem
    together = run(fused, base, aux, target, options, reduction=reduction)
    for n in range(len(target)):
        alone = run(fused, base[n : n + 1], aux[n : n + 1], target[n : n + 1], options, reduction=reduction)
        assert_same_bits(alone[1:], [t[n : n + 1] for t in together[1:]])
        if reduction == "none":
            assert_same_bits(alone[:1], [together[0][n : n + 1]])


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("vocab_size", [4096, 40000, 131072])  # one block; split over threads where there are few rows
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.01}, {"scaled": True}], ids=str)
def test_a_long_row_alone_has_the_bits_it_has_among_others(fused, vocab_size, reduction, options):
    base = torch.randn(40, vocab_size, dtype=torch.bfloat16, device=fused.device)
    aux = torch.randn(40, vocab_size, dtype=torch.bfloat16, device=fused.device)
    target = torch.randint(vocab_size, (40,), device=fused.device)
    scale = torch.rand(40, device=fused.device)
    results = []
    for rows in (slice(None), slice(0, 7), slice(3, 4)):
        leaf, factor = aux[rows].clone().requires_grad_(), scale[rows].clone().requires_grad_()
        source = Logits(leaf, scale=factor) if "scaled" in options else leaf
        given = {k: v for k, v in options.items() if k != "scaled"} | {"reduction": reduction, "backend": fused.backend}
        loss = aux_cross_entropy(base[rows], source, target[rows], **given)
        leaves = (leaf, factor) if "scaled" in options else (leaf,)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves, torch.ones_like(loss))])
    places = (slice(0, 7), slice(3, 4))
    for part, rows in zip(results[1:], places, strict=True):
        skip = 1 if reduction == "sum" else 0
        assert_same_bits(part[skip:], [t[rows] for t in results[0][skip:]])


@properties
@given(problem=problems(max_rows=12))
def test_statistics_of_a_row_do_not_depend_on_the_others(fused, problem):
    base, aux, target, _ = (t.to(fused.device) if isinstance(t, torch.Tensor) else t for t in problem)
    together = logit_stats(base, aux, target, backend=fused.backend)
    for n in range(len(target)):
        alone = logit_stats(base[n : n + 1], aux[n : n + 1], target[n : n + 1], backend=fused.backend)
        assert_same_bits(vars(alone).values(), [t[n : n + 1] for t in vars(together).values()])


@properties
@given(problem=problems(), reduction=REDUCTIONS)
def test_base_and_aux_may_be_swapped(fused, problem, reduction):
    base, aux, target, options = problem
    loss, grad_base, grad_aux = run(fused, base, aux, target, options, reduction=reduction)
    swapped = run(fused, aux, base, target, options, reduction=reduction)
    assert_same_bits(swapped, (loss, grad_aux, grad_base))


@properties
@given(problem=problems(), reduction=REDUCTIONS)
def test_an_aux_of_zeros_is_plain_cross_entropy(fused, problem, reduction):
    base, _, target, options = problem
    loss, grad, _ = run(fused, base, torch.zeros_like(base), target, options, reduction=reduction)
    leaf = base.clone().to(fused.device).requires_grad_()
    options = {k: v.to(fused.device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    plain = aux_cross_entropy(
        leaf, None, target.to(fused.device), reduction=reduction, backend=fused.backend, **options
    )
    assert_same_bits((plain.detach(), torch.autograd.grad(plain, leaf, torch.ones_like(plain))[0]), (loss, grad))


@properties
@given(problem=problems(), reduction=REDUCTIONS)
def test_calls_repeat_bit_for_bit(impl, problem, reduction):
    assert_same_bits(run(impl, *problem, reduction=reduction), run(impl, *problem, reduction=reduction))


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fifty_calls_with_work_between_them_are_one(fused, reduction):
    """Rows go to whichever thread is free, and results must not show it; memory is used again and may hold anything."""
    base = torch.randn(37, 9000, dtype=torch.bfloat16, device=fused.device)
    aux = torch.randn(37, 9000, device=fused.device, requires_grad=True)
    scale = torch.rand(37, device=fused.device, requires_grad=True)
    target = torch.randint(9000, (37,), device=fused.device)
    first = None
    for i in range(50):
        loss = aux_cross_entropy(base, Logits(aux, scale=scale), target, reduction=reduction, backend=fused.backend)
        got = [loss.detach(), *torch.autograd.grad(loss, (aux, scale), torch.ones_like(loss))]
        first = first or [t.clone() for t in got]
        assert_same_bits(got, first)
        del loss, got
        torch.full((37, 9000 + i), torch.nan, device=fused.device)


def test_deterministic_algorithms_are_all_there(impl):
    torch.use_deterministic_algorithms(True)
    try:
        aux = torch.randn(3, 9, device=impl.device, requires_grad=True)
        target = torch.tensor([0, 8, -100], device=impl.device)
        for reduction in ("mean", "none"):
            loss = aux_cross_entropy(aux.detach(), aux, target, reduction=reduction, backend=impl.backend)
            torch.autograd.grad(loss.sum(), aux)
        torch.autograd.grad(logit_stats(aux.detach(), aux, target, backend=impl.backend).entropy.sum(), aux)
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_comparison_of_bits_notices_one_flipped_bit():
    """The negative control of this file."""
    numbers = torch.randn(1000)
    flipped = numbers.clone()
    flipped.view(torch.int32)[567] ^= 1
    with pytest.raises(AssertionError):
        assert_same_bits([flipped], [numbers])
    with pytest.raises(AssertionError):
        assert_same_bits([torch.tensor(-0.0)], [torch.tensor(0.0)])
    assert_same_bits([torch.tensor(torch.nan)], [torch.tensor(torch.nan)])


@properties
@given(problem=problems(), reduction=REDUCTIONS)
def test_rows_of_the_gradient_sum_to_zero(impl, problem, reduction):
    """Adding a number to every class changes nothing, so its derivative is zero (but for the z-loss)."""
    base, aux, target, options = problem
    options = options | {"z_loss": 0.0}
    _, grad, _ = run(impl, base.float(), aux.float(), target, options, reduction=reduction)
    case = Case(base.float(), aux.float().requires_grad_(), target, options | {"reduction": reduction})
    upstream = torch.ones(target.shape) if reduction == "none" else None
    error = expected(case, upstream, confident=impl.backend != "reference")["aux[0]"][1]
    kept = target != -100
    assert (grad.double().sum(-1).cpu().abs()[kept] <= error.sum(-1)[kept]).all()


@properties
@given(problem=problems(max_rows=10))
def test_ignored_rows_count_as_if_they_were_not_there(impl, problem):
    base, aux, target, options = problem
    target[0] = -100
    kept = target != -100
    for reduction in ("sum", "none"):
        ignored = run(impl, base, aux, target, options, reduction=reduction)
        removed = run(impl, base[kept], aux[kept], target[kept], options, reduction=reduction)
        loss = ignored[0] if reduction == "sum" else ignored[0][kept]
        assert_alike(loss, removed[0])
        if impl.backend != "reference":  # to the bit, but for the order in which the rows' losses are added
            assert_same_bits([t[kept] for t in ignored[1:]], removed[1:])
            if reduction == "none":
                assert_same_bits([loss], removed[:1])


@properties
@given(problem=problems())
def test_a_loss_is_not_negative(impl, problem):
    base, aux, target, options = problem
    loss, *_ = run(impl, base, aux, target, options, reduction="none")
    case = Case(base, aux, target, options)
    assert (
        loss.double().cpu()
        >= -expected(Case(base, aux, target, options | {"reduction": "none"}), confident=True)["loss"][1]
    ).all()
    if impl.backend != "reference" and not options["label_smoothing"]:
        assert (loss >= 0).all()
    assert Rows(case).compute == torch.float32


@properties
@given(problem=problems(), order=st.randoms(use_true_random=False))
def test_permuting_classes_permutes_gradients(impl, problem, order):
    base, aux, target, options = problem
    permutation = torch.tensor(order.sample(range(base.shape[1]), base.shape[1]))
    place = permutation.argsort()
    moved = torch.where(target == -100, -100, place[target.clamp(min=0)])
    changed = options | ({"weight": options["weight"][permutation]} if "weight" in options else {})
    plain = run(impl, base, aux, target, options, reduction="none")
    permuted = run(impl, base[:, permutation], aux[:, permutation], moved, changed, reduction="none")
    case = Case(base, aux.requires_grad_(), target, options | {"reduction": "none"})
    error = expected(case, torch.ones(target.shape), confident=False)
    assert_close("loss", permuted[0].cpu(), plain[0].double().cpu(), 2 * error["loss"][1])
    assert_close(
        "gradient", permuted[2].cpu(), plain[2][:, permutation].double().cpu(), 2 * error["aux[0]"][1][:, permutation]
    )
