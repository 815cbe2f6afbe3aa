"""Several auxiliaries beside one base that is a head: its products are made once, and no result shows it."""

import pytest
import torch
from implementations import NATIVE
from inputs import cut_rows, head, logits, targets
from many import Shared, assert_same_bits, check_many, numbers_of, singles
from profiled import products

from auxkernels import Head, aux_cross_entropies, aux_cross_entropy, chunk_settings

VOCAB = 65


@pytest.fixture
def shared(monkeypatch):
    return Shared(monkeypatch)


def sources(device, *rows, num_auxes=3, dtype=torch.float32, bias=False, **options):
    rows, made = rows or (12,), {"vocab_size": VOCAB, "dtype": dtype, "device": device}
    base = head(*rows, width=24, bias=bias, grad=False, **made)
    auxes = [head(*rows, width=8, bias=bias, **made) for _ in range(num_auxes)]
    return base, auxes, targets(*rows, vocab_size=VOCAB, device=device, **options)


# -- the bits of single calls ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.parametrize("return_stats", [False, True])
def test_results_are_those_of_single_calls(impl, shared, monkeypatch, dtype, ignored, return_stats):
    if dtype == torch.float64 and impl.backend == "triton":
        pytest.skip("has no float64")
    base, auxes, target = sources(impl.device, dtype=dtype, ignored=ignored, bias=True)
    for rows_of_chunk in (1024, 3):
        cut_rows(monkeypatch, rows_of_chunk)
        check_many(base, auxes, target, return_stats=return_stats, backend=impl.backend)
    if impl == NATIVE:
        assert shared.beside_others == [3, 3]


OPTIONS = {
    "weight of each": {"weight": [None, torch.linspace(0, 1, VOCAB), torch.ones(VOCAB)]},
    "smoothing": {"label_smoothing": 0.1, "z_loss": [0.0, 0.01, 0.1]},
    "reductions": {"reduction": ["sum", "mean", "none"]},
    "normalizers": {"normalizer": [3.0, torch.tensor(4.0), None]},
    "vocab_size": {"vocab_size": VOCAB - 3},
    "vocab_size of each": {"vocab_size": [VOCAB - 3, VOCAB, VOCAB - 3]},
    "ignore_index of each": {"ignore_index": [-100, 5, 5]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_those_of_single_calls(fused, monkeypatch, name):
    base, auxes, target = sources(fused.device)
    target[2] = 5
    target %= VOCAB - 3
    cut_rows(monkeypatch, 4)
    given = {
        key: [v.to(fused.device) if isinstance(v, torch.Tensor) else v for v in value]
        if isinstance(value, list)
        else value
        for key, value in OPTIONS[name].items()
    }
    check_many(base, auxes, target, **given, backend=fused.backend)


@pytest.mark.parametrize("num_auxes", [1, 2, 8])
@pytest.mark.parametrize("rows", [(0,), (1,), (3, 4)], ids=str)
def test_any_number_of_rows_and_auxiliaries(impl, rows, num_auxes):
    base, auxes, target = sources(impl.device, *rows, num_auxes=num_auxes)
    check_many(base, auxes, target, backend=impl.backend)


@pytest.mark.parametrize("base_options", [{}, {"scale": 0.5}, {"softcap": 4.0}], ids=str)
def test_auxiliaries_of_every_form_are_beside_one_head(fused, shared, monkeypatch, base_options):
    base, auxes, target = sources(fused.device, num_auxes=2, ignored=0.2)
    base = Head(base.hidden, base.weight, **base_options)
    made = {"vocab_size": VOCAB, "device": fused.device}
    per_row = torch.rand(12, device=fused.device, requires_grad=True)
    auxes = [
        auxes[0],
        head(12, scale=per_row, softcap=3.0, **made),
        [auxes[1], head(12, **made)],
        [head(12, scale=2.0, **made), logits(12, VOCAB, device=fused.device, requires_grad=True)],
        head(12, grad=False, **made),
        head(12, bias=True, **made),
        None,
    ]
    cut_rows(monkeypatch, 4)
    check_many(base, auxes, target, backend=fused.backend)
    check_many([base, logits(12, VOCAB, device=fused.device)], auxes, target, backend=fused.backend)
    alone = {"auxes": [logits(12, VOCAB, device=fused.device, requires_grad=True) for _ in range(2)]}
    check_many(base, **alone, target=target, backend=fused.backend)
    if fused == NATIVE:
        assert max(shared.beside_others) >= 5


def test_several_heads_as_base(fused, shared, monkeypatch):
    base, auxes, target = sources(fused.device)
    other = head(12, vocab_size=VOCAB, grad=False, device=fused.device)
    cut_rows(monkeypatch, 5)
    check_many([base, other], auxes, target, backend=fused.backend)
    check_many([base, other], auxes, target, return_stats=True, backend=fused.backend)
    if fused == NATIVE:
        assert shared.beside_others == [3, 3]


def test_auxiliaries_on_the_bases_own_weight_are_one_product_with_it(native, shared):
    base, auxes, target = sources("cpu")
    hidden = [logits(12, 24, requires_grad=True) for _ in range(2)]
    check_many(base, [*(Head(h, base.weight) for h in hidden), *auxes], target, backend="native")
    assert sorted(shared.beside_others) == [1, 1, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(fused, shared, dtype):
    base, auxes, target = sources(fused.device)
    with torch.autocast(fused.device, dtype=dtype):
        check_many(base, auxes, target, backend=fused.backend)
        check_many(base, auxes, target, return_stats=True, backend=fused.backend)
    if fused == NATIVE:
        assert shared.beside_others == [3, 3]


def test_targets_of_each_with_the_same_rows_ignored_share_the_base(native, shared):
    base, auxes, target = sources("cpu", num_auxes=4, ignored=0.3)
    same = torch.where(target == -100, -100, (target + 1) % VOCAB).to(torch.int32)
    others = [target, same, target.roll(1), target]
    check_many(base, auxes, others, backend="native")
    assert sorted(shared.beside_others) == [1, 3]
    check_many(base, auxes, [y.masked_fill(y == -100, 0) for y in others], backend="native")
    assert shared.beside_others[2:] == [4]


def test_an_ignored_row_may_hold_anything(fused):
    base, auxes, target = sources(fused.device, ignored=0.3)
    bad = target == -100
    base.hidden[bad] = torch.nan
    with torch.no_grad():
        auxes[1].hidden[bad] = torch.inf
    check_many(base, auxes, target, backend=fused.backend)
    found = aux_cross_entropies(base, auxes, target, backend=fused.backend)
    for aux, loss in zip(auxes, found, strict=True):
        numbers = numbers_of(loss, aux)
        assert all(bool(values.isfinite().all()) for values in numbers.values())


# -- what is shared ----------------------------------------------------------------------------------------------------


def test_the_base_has_one_product_for_each_chunk(native, monkeypatch):
    base, auxes, target = sources("cpu", num_auxes=5)
    cut_rows(monkeypatch, 4)
    of_base = (4, 24, VOCAB)
    found = products(lambda: aux_cross_entropies(base, auxes, target, backend="native"))
    assert found.count(of_base) == 3 and found.count((4, 8, VOCAB)) == 15
    assert products(lambda: singles(base, auxes, target, backend="native")).count(of_base) == 15


def test_auxiliaries_work_in_one_set_of_buffers(native, monkeypatch):
    base, auxes, target = sources("cpu", num_auxes=6)
    monkeypatch.setattr(chunk_settings, "num_bytes", 1)
    plain, made = torch.Tensor.new_empty, []

    def counted(self, *args, **kwargs):
        tensor = plain(self, *args, **kwargs)
        if tensor.dim() == 2 and tensor.shape[1] >= VOCAB:
            made.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", counted)
    aux_cross_entropies(base, auxes, target, backend="native")
    assert len(made) == 2  # the base's and the sum's


def test_a_base_with_a_gradient_gets_the_sum_of_the_single_ones(fused, shared):
    base, auxes, target = sources(fused.device)
    base.weight.requires_grad_()
    leaves = [base.weight, *(aux.hidden for aux in auxes)]
    found = torch.autograd.grad(sum(aux_cross_entropies(base, auxes, target, backend=fused.backend)), leaves)
    expected = torch.autograd.grad(sum(singles(base, auxes, target, backend=fused.backend)), leaves)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)) and found[0].any()
    assert shared.beside_others == []


# -- autograd and errors -----------------------------------------------------------------------------------------------


def test_gradients_of_one_auxiliary_are_its_own_and_made_once(fused):
    base, auxes, target = sources(fused.device)
    losses = aux_cross_entropies(base, auxes, target, backend=fused.backend)
    losses[2].backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="pass recompute=True"):
        losses[2].backward()
    assert auxes[0].hidden.grad is None
    alone = aux_cross_entropy(base, auxes[2], target, backend=fused.backend)
    assert torch.equal(auxes[2].weight.grad, torch.autograd.grad(alone, auxes[2].weight)[0])


def test_torch_compile_gives_the_same(fused):
    base, auxes, target = sources(fused.device)

    def losses(hidden, weight):
        given = [Head(hidden, weight), auxes[1]]
        return aux_cross_entropies(base, given, target, backend=fused.backend)

    compiled = torch.compile(losses, backend="aot_eager", fullgraph=True)
    leaves = auxes[0].hidden, auxes[0].weight
    one, other = ([*of(*leaves)] for of in (compiled, losses))
    for found, expected in zip(one, other, strict=True):
        assert torch.equal(found, expected)
    assert_same_bits(numbers_of(one[0], auxes[0]), numbers_of(other[0], auxes[0]))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_target_out_of_range_says_of_which_auxiliary(on_cpu, which):
    base, auxes, target = sources(on_cpu.device)
    others = [target.clone() for _ in auxes]
    others[which][7] = VOCAB
    with pytest.raises(IndexError, match=rf"^auxes\[{which}\]: target must be in .* got target\[7\] = {VOCAB}"):
        aux_cross_entropies(base, auxes, others, backend=on_cpu.backend)


def test_refused_heads_are_named(impl):
    base, auxes, target = sources(impl.device)
    auxes[1] = Head(auxes[1].hidden, auxes[1].weight[:, :3])
    with pytest.raises(ValueError, match=r"^auxes\[1\]: weight of aux must be \[V, D\]"):
        aux_cross_entropies(base, auxes, target, backend=impl.backend)
