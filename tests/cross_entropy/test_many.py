"""Several auxiliaries beside one base: every result is that of its single call, and the base is worked on once."""

import pytest
import torch
from implementations import NATIVE
from inputs import HOSTILE_TARGETS, head, integer, logits, strided, targets
from many import Shared, check_many, numbers_of, singles

from auxkernels import Logits, aux_cross_entropies, aux_cross_entropy
from auxkernels.cross_entropy.compiled_arguments import Arguments, output_pointers
from auxkernels.cross_entropy.request import Gradients, Problem
from auxkernels.sources import Matrix

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def shared(monkeypatch):
    return Shared(monkeypatch)


def sources(device, *rows, vocab_size=40, num_auxes=3, dtype=torch.float32, **options):
    rows = rows or (6,)
    base = logits(*rows, vocab_size, dtype=dtype, device=device)
    auxes = [logits(*rows, vocab_size, dtype=dtype, device=device, requires_grad=True) for _ in range(num_auxes)]
    return base, auxes, targets(*rows, vocab_size=vocab_size, device=device, **options)


# -- the bits of single calls ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_those_of_single_calls(impl, dtype):
    if dtype == torch.float64 and impl.backend == "triton":
        pytest.skip("has no float64")
    base, auxes, target = sources(impl.device, dtype=dtype, ignored=0.3)
    check_many(base, auxes, target, backend=impl.backend)
    check_many(base, auxes, target, return_stats=True, backend=impl.backend)


OPTIONS = {
    "weight": lambda device: {"weight": torch.rand(40, device=device)},
    "label_smoothing": lambda device: {"label_smoothing": 0.1},
    "z_loss": lambda device: {"z_loss": 0.01},
    "sum": lambda device: {"reduction": "sum"},
    "none": lambda device: {"reduction": "none"},
    "normalizer": lambda device: {"normalizer": torch.tensor(5, device=device)},
    "ignore_index": lambda device: {"ignore_index": 3},
    "vocab_size": lambda device: {"vocab_size": 39},
    "recompute": lambda device: {"recompute": True},
    "smoothing of each": lambda device: {"label_smoothing": [0.0, 0.2, 0.4], "z_loss": (0.1, 0.0, 0.2)},
    "weight of each": lambda device: {"weight": [None, torch.rand(40, device=device), torch.ones(40, device=device)]},
    "reduction of each": lambda device: {"reduction": ["mean", "none", "sum"]},
    "normalizer of each": lambda device: {"normalizer": [7.0, None, torch.tensor(3.0, device=device)]},
    "ignore_index of each": lambda device: {"ignore_index": [1, 2, -100]},
    "vocab_size of each": lambda device: {"vocab_size": [40, 38, None]},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("return_stats", [False, True])
def test_options_are_those_of_single_calls(impl, name, return_stats):
    base, auxes, target = sources(impl.device)
    target = target % 38
    check_many(base, auxes, target, **OPTIONS[name](impl.device), return_stats=return_stats, backend=impl.backend)


def test_each_auxiliary_may_have_targets_of_its_own(impl, shared):
    base, auxes, target = sources(impl.device, ignored=0.3)
    others = [target, target.roll(1).to(torch.int32), torch.full_like(target, -100)]
    check_many(base, auxes, others, backend=impl.backend)
    if impl == NATIVE:
        assert shared.in_one_pass == [3]


def test_auxiliaries_may_have_scales_softcaps_and_other_dtypes_and_none_a_gradient(impl, shared):
    base, auxes, target = sources(impl.device, num_auxes=4)
    base = Logits(base, scale=torch.rand(6, device=impl.device), softcap=5.0)
    scale = torch.rand(6, device=impl.device, requires_grad=True)
    auxes = [
        Logits(auxes[0], scale=scale, softcap=3.0),
        Logits(auxes[1].detach(), scale=torch.rand((), device=impl.device).requires_grad_()),
        auxes[2].detach(),
        auxes[3].detach().to(torch.bfloat16).requires_grad_(),
        None,
    ]
    check_many(base, auxes, target, return_stats=True, backend=impl.backend)
    if impl == NATIVE:
        assert shared.in_one_pass == [5]


def test_auxiliaries_of_two_compute_dtypes_are_two_passes(doubles, shared):
    base, auxes, target = sources(doubles.device, num_auxes=4)
    auxes[1:3] = [aux.detach().double().requires_grad_() for aux in auxes[1:3]]
    check_many(base, auxes, target, backend=doubles.backend)
    if doubles == NATIVE:
        assert sorted(shared.in_one_pass) == [2, 2]


@pytest.mark.parametrize("rows", [(0,), (1,), (2, 3), (2, 0)], ids=str)
@pytest.mark.parametrize("num_auxes", [1, 2, 8])
def test_any_number_of_rows_and_auxiliaries(impl, rows, num_auxes):
    base, auxes, target = sources(impl.device, *rows, num_auxes=num_auxes)
    check_many(base, auxes, target, return_stats=True, backend=impl.backend)


@pytest.mark.parametrize("vocab_size", [1, 33, 4097, 50257])
def test_any_vocabulary(fused, vocab_size):
    base, auxes, target = sources(fused.device, 9, vocab_size=vocab_size, ignored=0.2)
    check_many(base, auxes, target, return_stats=True, backend=fused.backend)
    # working memory is that of the widest, and of one that has a gradient, wherever they stand
    half = vocab_size // 2 + 1
    target = torch.where(target < 0, target, target % half)
    widths = [half, vocab_size, half]
    check_many(base, [auxes[0].detach(), *auxes[1:]], target, vocab_size=widths, backend=fused.backend)
    check_many(base, [*auxes[:2], auxes[2].detach()], target, vocab_size=widths, backend=fused.backend)


@pytest.mark.parametrize("num_rows", [1, 3, 8, 9, 100])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_rows_are_shared_out_over_threads_without_a_trace(native, num_rows, threads):
    """Few long rows are cut over threads in single calls; then every loss is one."""
    before = torch.get_num_threads()
    base, auxes, target = sources("cpu", num_rows, vocab_size=9000)
    weights = [None, torch.rand(9000), None]
    try:
        torch.set_num_threads(threads)
        check_many(base, auxes, target, weight=weights, return_stats=True, backend="native")
    finally:
        torch.set_num_threads(before)


def test_wide_tails_and_views_have_the_gradients_of_single_calls(impl):
    base, _, target = sources(impl.device)
    wide = strided(logits(6, 45, device=impl.device), "padded rows").requires_grad_()
    other = strided(logits(6, 41, device=impl.device), "every second row").requires_grad_()
    options = {"vocab_size": 40, "backend": impl.backend}
    check_many(base, [wide, other], target, **options)
    losses = aux_cross_entropies(base, [wide, other], target, **options)
    grads = torch.autograd.grad(sum(losses), (wide, other))
    assert all(not grad[:, 40:].any() and grad.is_contiguous() for grad in grads)


def test_sums_of_sources_and_logits_and_heads_beside_each_other(impl, shared):
    base, auxes, target = sources(impl.device)
    made = {"vocab_size": 40, "device": impl.device}
    auxes = [auxes[0], [auxes[1], auxes[2]], head(6, **made), [head(6, **made), auxes[1]]]
    check_many(base, auxes, target, backend=impl.backend)
    check_many([base, base * 2], auxes, target, return_stats=True, backend=impl.backend)
    if impl.backend != "reference":
        assert shared.beside_others == [1, 1, 1, 4]  # one matrix is there already, a sum is made once


# -- one pass ----------------------------------------------------------------------------------------------------------


def test_logits_on_cpu_are_one_pass(native, shared):
    base, auxes, target = sources("cpu")
    aux_cross_entropies(base, auxes, target, backend="native")
    with torch.no_grad():
        aux_cross_entropies(base, auxes, target, backend="native", return_stats=True)
    assert shared.in_one_pass == [3, 3] and shared.alone == 0


def test_what_cannot_be_shared_is_single_calls(native, shared):
    base, auxes, target = sources("cpu")
    auxes.append(auxes[0].detach().half().requires_grad_())
    check_many(base, auxes, target, backend="native")
    assert shared.in_one_pass == [3]  # all but the float16 one
    check_many(base, auxes, target, backend="native", recompute=True)
    check_many(base, auxes, target, backend="native", reduction="none")
    check_many(base, auxes[:1], target, backend="native")
    assert shared.in_one_pass == [3]


def test_a_base_with_a_gradient_gets_the_sum_of_the_single_ones(impl, shared):
    base, auxes, target = sources(impl.device)
    base.requires_grad_()
    found = aux_cross_entropies(base, auxes, target, backend=impl.backend)
    expected = singles(base, auxes, target, backend=impl.backend)
    grads = [torch.autograd.grad(sum(losses), (base, *auxes)) for losses in (found, expected)]
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True)) and grads[0][0].any()
    assert shared.in_one_pass == []
    with torch.no_grad():
        check_many(base, auxes, target, backend=impl.backend)


# -- autograd ----------------------------------------------------------------------------------------------------------


def test_each_loss_goes_backward_by_itself_and_once(fused):
    base, auxes, target = sources(fused.device)
    losses = aux_cross_entropies(base, auxes, target, backend=fused.backend)
    losses[1].backward(retain_graph=True)
    assert [aux.grad is not None for aux in auxes] == [False, True, False]
    with pytest.raises(RuntimeError, match="pass recompute=True to go backward again"):
        losses[1].backward()
    losses[0].backward()
    losses[2].backward()
    for aux in auxes:
        (expected,) = torch.autograd.grad(aux_cross_entropy(base, aux, target, backend=fused.backend), aux)
        assert torch.equal(aux.grad, expected)


def test_double_differentiation_is_refused(fused):
    base, auxes, target = sources(fused.device)
    losses = aux_cross_entropies(base, auxes, target, backend=fused.backend)
    grads = torch.autograd.grad(sum(losses), auxes, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(sum(grad.square().sum() for grad in grads), auxes)


def test_with_recompute_the_graph_is_used_twice(impl):
    base, auxes, target = sources(impl.device)
    losses = aux_cross_entropies(base, auxes, target, recompute=True, backend=impl.backend)
    first, second = (torch.autograd.grad(sum(losses), auxes, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_one_tensor_as_several_auxiliaries_gets_the_sum(fused):
    base, (aux, *_), target = sources(fused.device)
    others = [target, target.roll(1), target.roll(2)]
    found = torch.autograd.grad(sum(aux_cross_entropies(base, [aux] * 3, others, backend=fused.backend)), aux)
    expected = torch.autograd.grad(sum(singles(base, [aux] * 3, others, backend=fused.backend)), aux)
    assert torch.equal(found[0], expected[0])


def test_statistics_carry_no_gradient_and_losses_no_fields(fused):
    base, auxes, target = sources(fused.device)
    for loss, stats in aux_cross_entropies(base, auxes, target, return_stats=True, backend=fused.backend):
        assert loss.requires_grad and not any(t.requires_grad for t in vars(stats).values())


def test_inference_mode_and_saved_tensor_hooks(fused):
    base, auxes, target = sources(fused.device)
    expected = aux_cross_entropies(base, auxes, target, backend=fused.backend)
    with torch.inference_mode():
        found = aux_cross_entropies(base, auxes, target, backend=fused.backend)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    with torch.autograd.graph.save_on_cpu():
        hooked = aux_cross_entropies(base, auxes, target, backend=fused.backend)
    for aux, one, other in zip(auxes, hooked, expected, strict=True):
        assert torch.equal(numbers_of(one, aux)["gradient 0"], numbers_of(other, aux)["gradient 0"])


@pytest.mark.parametrize("return_stats", [False, True])
def test_torch_compile_gives_the_same(fused, return_stats):
    base, auxes, target = sources(fused.device)

    def losses(base, auxes, target):
        options = {"label_smoothing": [0.0, 0.1, 0.2], "return_stats": return_stats, "backend": fused.backend}
        found = aux_cross_entropies(base, auxes, target, **options)
        return [one[0] + 0 * one[1].entropy.sum() for one in found] if return_stats else found

    compiled = torch.compile(losses, backend="aot_eager", fullgraph=True)
    found, expected = compiled(base, auxes, target), losses(base, auxes, target)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    grads = [torch.autograd.grad(sum(of), auxes) for of in (found, expected)]
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_transforms_have_the_error_of_a_single_call(fused):
    base, auxes, target = sources(fused.device)

    def total(aux):
        return sum(aux_cross_entropies(base, [aux, aux], target, backend=fused.backend))

    with pytest.raises(RuntimeError) as found:
        torch.func.grad(total)(auxes[0].detach())
    with pytest.raises(RuntimeError) as expected:
        torch.func.grad(lambda aux: aux_cross_entropy(base, aux, target, backend=fused.backend))(auxes[0].detach())
    assert str(found.value) == str(expected.value)


# -- refused arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", HOSTILE_TARGETS)
@pytest.mark.parametrize("which", [0, 2])
def test_a_target_out_of_range_says_of_which_auxiliary(on_cpu, which, bad):
    base, auxes, target = sources(on_cpu.device)
    others = [target, target.clone(), target.clone()]
    others[which][4] = integer(bad, 40)
    with pytest.raises(IndexError) as single:
        aux_cross_entropy(base, auxes[which], others[which], backend=on_cpu.backend)
    with pytest.raises(IndexError) as found:
        aux_cross_entropies(base, auxes, others, backend=on_cpu.backend)
    assert str(found.value) == f"auxes[{which}]: {single.value}"


def compiled_arguments(target, value, grad=None):
    """What the compiled function takes for one loss of a base alone, [len(target), 40]."""
    problem = Problem(Matrix(logits(len(target), 40)), None, target, None, -100, 40)
    arguments = Arguments(problem, 1)
    outputs = output_pointers(0, [], Gradients(grad))
    return arguments, (*arguments.leading, outputs, value.data_ptr(), False, 1.0, 0.0, 0.0, True)


def test_nothing_is_written_before_all_targets_are_checked(native):
    target = targets(6, vocab_size=40)
    values = [torch.full((), 7.0) for _ in range(3)]
    grads = [torch.full((6, 40), 7.0) for _ in range(3)]
    others = [target, target, torch.full_like(target, 40)]
    made = [compiled_arguments(*one) for one in zip(others, values, grads, strict=True)]
    with pytest.raises(IndexError, match=r"^2 0 40$"):
        native.losses([given for _, given in made])
    assert all(bool((t == 7).all()) for t in (*values, *grads))


def test_the_compiled_function_refuses_losses_of_different_rows(native):
    value = torch.zeros(())
    made = [compiled_arguments(targets(num_rows, vocab_size=40), value) for num_rows in (3, 4)]
    with pytest.raises(ValueError, match="one number of rows"):
        native.losses([given for _, given in made])
    native.losses([])


def test_arguments_that_are_refused(impl):
    base, auxes, target = sources(impl.device)

    def refused(error, match, auxes=auxes, target=target, **options):
        with pytest.raises(error, match=match):
            aux_cross_entropies(base, auxes, target, backend=impl.backend, **options)

    refused(TypeError, "^auxes must be a list or tuple with an entry for each auxiliary, got Tensor", auxes[0])
    refused(ValueError, "^auxes must hold at least one auxiliary, got an empty list", [])
    refused(ValueError, "^target must have an entry for each of the 3 auxiliaries, got 2", target=[target, target])
    for name in ("ignore_index", "weight", "label_smoothing", "z_loss", "reduction", "normalizer", "vocab_size"):
        refused(ValueError, f"^{name} must have an entry for each of the 3 auxiliaries, got 2", **{name: [None, None]})
    refused(ValueError, r"^auxes\[2\]: aux must be \[\*, V\]", [*auxes[:2], auxes[2][:, None]])
    refused(TypeError, r"^auxes\[1\]: aux must be a tensor, Logits", [auxes[0], "aux", auxes[2]])
    refused(ValueError, r"^auxes\[1\]: label_smoothing must be in", label_smoothing=[0.0, 2.0, 0.0])
    refused(TypeError, r"^auxes\[1\]: target must be int32 or int64", target=[target, target.float(), target])
    with pytest.raises(TypeError, match=r"^base must be a tensor"):
        aux_cross_entropies("base", auxes, target, backend=impl.backend)
