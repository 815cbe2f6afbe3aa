"""Native's loss of small plain matrices (native_plain.py): the general path's bits, and that others do not take it."""

import itertools
import math

import pytest
import torch
from inputs import logits, targets
from torch.autograd import grad

from auxkernels import Head, Logits, aux_cross_entropy
from auxkernels.cross_entropy import autograd, native_plain

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
V = 33

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture
def taken(monkeypatch):
    """The calls that go this way."""
    taken, loss = [], autograd.plain_loss

    def counted(*args):
        taken.append(args)
        return loss(*args)

    monkeypatch.setattr(autograd, "plain_loss", counted)
    return taken


@pytest.fixture
def general(monkeypatch):
    """Of a call: the same by the general path."""

    def run(function, *args, **options):
        with monkeypatch.context() as patched:
            patched.setattr(native_plain, "served", lambda *_: None)
            return function(*args, **options)

    return run


def results(base, aux, target, upstream, **options):
    """Loss, statistics and gradients, flat."""
    leaves = [t for t in (base, aux) if t is not None]
    leaves = [t.values if isinstance(t, Logits) else t for t in leaves]
    loss = aux_cross_entropy(base, aux, target, **options)
    loss, stats = loss if isinstance(loss, tuple) else (loss, None)
    found = [loss.detach()] + ([] if stats is None else list(vars(stats).values()))
    wanted = [t for t in leaves if t.requires_grad]
    return [*found, *(grad(loss, wanted, torch.tensor(upstream)) if wanted else ())]


OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "ignored": {"ignore_index": 3},
    "weighted": {"weight": torch.linspace(0.5, 1.5, V - 2), "vocab_size": V - 2},
    "smoothed": {"label_smoothing": 0.1, "z_loss": 1e-2},
    "normalizer": {"normalizer": 7, "return_stats": True},
    "everything": {
        "weight": torch.linspace(0.5, 1.5, V),
        "label_smoothing": 0.1,
        "z_loss": 1e-2,
        "normalizer": 0.5,
        "vocab_size": V,
        "return_stats": True,
        "ignore_index": 2**62,
    },
}
SOURCES = {
    "tensors": lambda t, of_rows: t,
    "scale": lambda t, of_rows: Logits(t, scale=0.5, softcap=3.0),
    "tensor scale": lambda t, of_rows: Logits(t, scale=torch.tensor(-0.5)),
    "a scale for each row": lambda t, of_rows: Logits(t, scale=of_rows, softcap=3.0),
}


NEEDS = ((False, False), (False, True), (True, True))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_bits_are_those_of_the_general_path(taken, general, source, options, dtype):
    for shape, needs in itertools.product(((), (1,), (2, 3)), NEEDS):
        base, aux = (logits(*shape, V, dtype=dtype, requires_grad=need) for need in needs)
        of_rows = torch.linspace(0.5, 2.0, math.prod(shape)).view(shape)
        target = targets(*shape, vocab_size=V - 2, ignored=0.3, ignore_index=options.get("ignore_index", -100))
        sources = (source(base, of_rows), source(aux, of_rows)), (source(base, of_rows), None)
        for (of_base, of_aux), upstream in itertools.product(sources, (1.0, -0.3)):
            arguments = (of_base, of_aux, target, upstream)
            got, want = results(*arguments, **options), general(results, *arguments, **options)
            for a, b in zip(got, want, strict=True):
                if a is not None:
                    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)  # dtypes, too
                    assert torch.equal(a.signbit(), b.signbit()) or a.isnan().any()
    assert len(taken) == (36 if dtype != F16 else 18)  # float16 gradients are made in backward


def test_int32_targets(taken):
    base, aux, target = logits(5, V), logits(5, V), targets(5, vocab_size=V, ignored=0.3)
    assert torch.equal(aux_cross_entropy(base, aux, target.int()), aux_cross_entropy(base, aux, target))
    assert len(taken) == 2


@pytest.mark.parametrize("dtype", [BF16, F16, F64], ids=str)
def test_the_default_dtype_and_device_do_not_matter(taken, dtype):
    aux, base, target = logits(5, V, requires_grad=True), logits(5, V), targets(5, vocab_size=V)
    want = results(base, aux, target, 1.0, return_stats=True)
    torch.set_default_dtype(dtype)
    try:
        upstream = 1.0 if dtype == F64 else torch.tensor(1.0, dtype=F32)
        with torch.device("meta"):
            loss, stats = aux_cross_entropy(base, aux, target, return_stats=True)
        got = [loss.detach(), *vars(stats).values(), *grad(loss, aux, torch.ones((), dtype=F32) * upstream)]
    finally:
        torch.set_default_dtype(F32)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)) and len(taken) == 2


def test_a_wrong_target_has_the_general_message_and_nothing_is_written(taken):
    base, aux, target = logits(2, 3, V), logits(2, 3, V, requires_grad=True), targets(2, 3, vocab_size=V)
    target[1, 2] = V
    with pytest.raises(IndexError, match=r"target\[1, 2\] = 33 \(row 5\)"):
        aux_cross_entropy(base, aux, target)
    assert len(taken) == 1


def test_gradients_are_handed_out_once_and_not_differentiated_again(taken):
    base, aux, target = logits(3, V), logits(3, V, requires_grad=True), targets(3, vocab_size=V)
    loss = aux_cross_entropy(base, aux, target)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="recompute=True"):
        loss.backward()
    (first,) = grad(aux_cross_entropy(base, aux, target), aux, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        grad(first.sum(), aux)
    assert len(taken) == 2


def test_the_sources_may_be_written_before_backward(taken):
    aux = logits(3, V, requires_grad=True)
    base, target, middle = logits(3, V), targets(3, vocab_size=V), aux * 1
    want = grad(aux_cross_entropy(base, aux, target), aux)[0]
    loss = aux_cross_entropy(base, middle, target)
    base.zero_(), middle.detach().zero_()
    assert torch.equal(grad(loss, aux)[0], want) and len(taken) == 2


def test_saved_tensors_may_come_back_with_other_strides(taken):
    base, aux, target = logits(4, V), logits(4, V, requires_grad=True), targets(4, vocab_size=V, ignored=0.3)
    want = grad(aux_cross_entropy(base, aux, target), aux)[0]

    def transposed(t):
        return t.detach().t().contiguous() if t.dim() == 2 else t.detach()

    with torch.autograd.graph.saved_tensors_hooks(transposed, lambda t: t.t() if t.dim() == 2 else t):
        loss = aux_cross_entropy(base, aux, target)
    assert torch.equal(grad(loss, aux)[0], want) and len(taken) == 2


def test_tensors_made_in_inference_mode(taken):
    with torch.inference_mode():
        base, target, inferred = logits(3, V), targets(3, vocab_size=V), logits(3, V)
        loss = aux_cross_entropy(base, inferred, target)
    aux = inferred.clone().requires_grad_()
    trained = aux_cross_entropy(base, aux, target)
    trained.backward()
    assert torch.equal(trained.detach(), loss.clone()) and aux.grad is not None and len(taken) == 2


def head():
    return Head(torch.randn(4, 5), torch.randn(V, 5))


@pytest.mark.parametrize(
    "change",
    [
        {"reduction": "none"},
        {"backend": "reference"},
        {"aux": [torch.randn(4, V)]},
        {"aux": head()},
        {"aux": torch.randn(4, V, dtype=F64)},
        {"aux": torch.randn(4, 2 * V)[:, :V]},
        {"aux": torch.randn(4, V, dtype=F16, requires_grad=True)},
        {"aux": torch.randn(4, V, requires_grad=True), "recompute": True},
        {"aux": Logits(torch.randn(4, V), scale=torch.tensor(1.0, requires_grad=True))},
        {"aux": Logits(torch.randn(4, V), scale=torch.tensor(1.0, dtype=BF16))},
        {"base": torch.randn(0, V), "aux": torch.randn(0, V), "target": torch.zeros(0, dtype=torch.int64)},
        {"base": torch.randn(4, 1 << 15), "aux": torch.randn(4, 1 << 15)},
        {"weight": torch.ones(V, dtype=F64)},
        {"normalizer": torch.tensor(3.0)},
        {"target": torch.zeros(8, dtype=torch.int64)[::2]},
        {"label_smoothing": 1},
    ],
    ids=lambda change: "-".join(change),
)
def test_anything_else_goes_the_general_path(taken, change):
    given = {"base": torch.randn(4, V), "aux": torch.randn(4, V), "target": torch.zeros(4, dtype=torch.int64)}
    aux_cross_entropy(**{**given, **change})
    assert not taken


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"reduction": "median"}, ValueError),
        ({"backend": "fast"}, ValueError),
        ({"aux": torch.randn(4, V + 1)}, ValueError),
        ({"aux": torch.randn(3, V)}, ValueError),
        ({"aux": torch.randn(())}, ValueError),
        ({"aux": torch.zeros(4, V, dtype=torch.int64)}, TypeError),
        ({"aux": torch.randn(4, V).to_sparse_csr()}, TypeError),
        ({"aux": torch.randn(4, V).to_mkldnn()}, TypeError),
        ({"aux": torch.randn(4, V, device="meta")}, ValueError),
        ({"aux": Logits(torch.randn(4, V), softcap=0.0)}, ValueError),
        ({"aux": Logits(torch.randn(4, V), scale=torch.ones(3))}, ValueError),
        ({"target": torch.zeros(4)}, TypeError),
        ({"target": [0, 0, 0, 0]}, TypeError),
        ({"weight": torch.ones(V + 1)}, ValueError),
        ({"weight": torch.ones(V, requires_grad=True)}, ValueError),
        ({"label_smoothing": 1.5}, ValueError),
        ({"label_smoothing": float("nan")}, ValueError),
        ({"z_loss": -1.0}, ValueError),
        ({"z_loss": True}, TypeError),
        ({"normalizer": float("nan")}, ValueError),
        ({"normalizer": 2.0, "reduction": "sum"}, ValueError),
        ({"normalizer": 10**400}, ValueError),
        ({"ignore_index": 2**63}, ValueError),
        ({"ignore_index": 0.5}, TypeError),
        ({"vocab_size": V + 1}, ValueError),
        ({"vocab_size": 0}, ValueError),
    ],
)
def test_wrong_arguments_are_refused_as_ever(taken, change, error):
    given = {"base": torch.randn(4, V), "aux": torch.randn(4, V), "target": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(error):
        aux_cross_entropy(**{**given, **change})
    assert not taken


def test_transforms_and_tracing_do_not_come_here(taken):
    base, target = torch.randn(3, 4, 9), torch.zeros(4, dtype=torch.int64)
    for transform in (torch.func.vmap, lambda f: torch.func.grad(lambda z: f(z).sum())):
        with pytest.raises(RuntimeError):  # what the operator says, which has no rule for either
            transform(lambda z: aux_cross_entropy(z, None, target if z.dim() == 2 else target.expand(3, 4)))(base)
    assert not taken
