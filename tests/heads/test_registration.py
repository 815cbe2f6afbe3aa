"""The three operators of heads as torch.library sees them: opcheck, gradcheck, and raw calls that are refused."""

from dataclasses import replace

import pytest
import torch
from inputs import cut_rows, head, logits, targets
from raw import backward_op, loss_op, scan_op
from torch.library import opcheck

from auxkernels import Head, Logits, aux_cross_entropy, logit_stats
from auxkernels.cross_entropy import request

V = 9


@pytest.fixture(autouse=True)
def _chunks(monkeypatch):
    cut_rows(monkeypatch, 2)


def parts_of(*sources) -> list:
    found = []
    for source in sources:
        is_head = isinstance(source, Head)
        found += (source.hidden, source.weight, source.bias) if is_head else (source.values, None, None)
        found.append(source.scale if isinstance(source.scale, torch.Tensor) else None)
    return found


class Given:
    """The leading arguments of the ops, every one of them by name."""

    def __init__(self, device="cpu", rows=(5,), dtype=torch.float32, bare=False, num_base=2, **changes):
        made = {"vocab_size": V, "dtype": dtype, "device": device, "grad": False}
        scale = torch.rand(rows, device=device)
        one = head(*rows, width=4, bias=not bare, scale=1.0 if bare else scale, **made)
        two = head(*rows, width=3, scale=1.0 if bare else torch.rand((), device=device), **made)
        sources = [one, two] if bare else [one, Logits(logits(*rows, V, dtype=dtype, device=device)), two]
        self.parts, self.num_base = parts_of(*sources), 1 if bare else num_base
        self.softcaps = [0.0, 0.0] if bare else [5.0, 0.0, 0.0]
        self.autocast, self.ignore_index, self.vocab_size = None, -100, V
        self.target = targets(*rows, vocab_size=V - 2, device=device, ignored=0.3)
        self.weight = None if bare else torch.rand(V, device=device)
        for name, value in changes.items():
            setattr(self, name, value)

    def arguments(self):
        names = ("parts", "softcaps", "num_base", "autocast", "target", "weight", "ignore_index", "vocab_size")
        return [getattr(self, name) for name in names]

    def needs(self):
        return [part is not None for part in self.parts]

    def compute(self):
        return torch.float64 if self.parts[0].dtype == torch.float64 else torch.float32

    def scan(self, *wanted, backend):
        mask = request.mask_of(*wanted)
        return request.named_fields(mask, scan_op(*self.arguments(), mask, backend))[0]

    def loss(self, backend, *, needs=None, wanted=0, normalizer=None, mean=True):
        needs = self.needs() if needs is None else needs
        return loss_op(*self.arguments(), normalizer, 0.1, 0.01, mean, wanted, needs, backend)

    def state(self, backend):
        names = ["max", "log_denom", "nll", "base_max", "base_log_denom"]
        found = self.scan(*(n for n in names if n != "nll" or self.target is not None), backend=backend)
        return [None if name not in found else found[name].clone() for name in names]

    def backward(self, backend, *, needs=None, state=None, coefficients=None):
        state = state or self.state(backend)
        if coefficients is None:
            coefficients = [torch.randn_like(state[0]) if i % 3 else None for i in range(len(request.COEFFICIENTS))]
        needs = self.needs() if needs is None else needs
        return backward_op(*self.arguments(), *state, coefficients, needs, backend)


SAMPLES = {
    "everything": lambda d: Given(d),
    "only what must be": lambda d: Given(d, bare=True),
    "no rows": lambda d: Given(d, rows=(0,)),
    "three leading dimensions": lambda d: Given(d, rows=(2, 1, 3)),
    "no leading dimension": lambda d: Given(d, rows=()),
    "bf16": lambda d: Given(d, dtype=torch.bfloat16),
    "fp16": lambda d: Given(d, dtype=torch.float16, bare=True),
    "autocast": lambda d: Given(d, autocast=torch.bfloat16),
    "narrower than its sources": lambda d: Given(d, vocab_size=7, weight=torch.rand(7, device=d)),
    "all base": lambda d: Given(d, num_base=3),
    "all ignored": lambda d: Given(d, target=torch.full((5,), -100, device=d)),
}


@pytest.fixture(params=SAMPLES)
def given(request, fused):
    return SAMPLES[request.param](fused.device)


# -- opcheck -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_scan_passes_opcheck(fused, given):
    opcheck(scan_op, (*given.arguments(), request.mask_of(*request.FIELDS), fused.backend))


@pytest.mark.slow
def test_loss_passes_opcheck(fused, given):
    check_loss(fused, given, given.needs())


@pytest.mark.parametrize("which", ["none", "aux"])
def test_loss_without_some_gradients_passes_opcheck(fused, which):
    given = Given(fused.device)
    needs = [need and which == "aux" and i >= 4 * given.num_base for i, need in enumerate(given.needs())]
    check_loss(fused, given, needs)


def check_loss(fused, given, needs):
    # without a normalizer the mean of no rows is NaN, which opcheck does not find equal to itself
    normalizer = torch.tensor(3.0, dtype=torch.float64, device=fused.device)
    rest = (normalizer, 0.1, 0.01, True, request.mask_of("nll", "argmax"), needs, fused.backend)
    opcheck(loss_op, (*given.arguments(), *rest))


@pytest.mark.slow
def test_backward_passes_opcheck(fused, given):
    state = given.state(fused.backend)
    coefficients = [torch.randn_like(state[0]) if i % 3 else None for i in range(len(request.COEFFICIENTS))]
    opcheck(backward_op, (*given.arguments(), *state, coefficients, given.needs(), fused.backend))


def test_the_outputs_of_an_op_are_none_of_its_inputs(fused, given):
    inputs = {part.data_ptr() for part in given.parts if part is not None and part.numel()}
    for outputs in (given.loss(fused.backend), given.backward(fused.backend)):
        places = [t.data_ptr() for t in outputs if t.numel()]
        assert len(set(places)) == len(places) and not inputs & set(places)


# -- the raw boundary --------------------------------------------------------------------------------------------------


def calls(given, backend, state, needs=None):
    needs = given.needs() if needs is None else needs
    mask = request.mask_of("nll", "max")
    coefficients = [None if name != "G" else torch.ones(5) for name in request.COEFFICIENTS]
    return {
        "scan": lambda: scan_op(*given.arguments(), mask, backend),
        "loss": lambda: loss_op(*given.arguments(), None, 0.0, 0.0, True, mask, needs, backend),
        "backward": lambda: backward_op(*given.arguments(), *state, coefficients, needs, backend),
    }


def changed_part(index, value):
    def change(given):
        given.parts[index] = value

    return change


def changed(**values):
    return lambda given: vars(given).update(values)


BAD = {
    "target out of range": (IndexError, "got target[4] = 9 (row 4)", changed(target=torch.tensor([0, 1, 1, 1, 9]))),
    "negative target": (IndexError, "got target[1] = -1 (row 1)", changed(target=torch.tensor([0, -1, 1, 1, 1]))),
    "int16 target": (TypeError, "target", changed(target=torch.zeros(5, dtype=torch.int16))),
    "float target": (TypeError, "target", changed(target=torch.zeros(5))),
    "short target": (ValueError, "", changed(target=torch.zeros(4, dtype=torch.int64))),
    "long target": (ValueError, "", changed(target=torch.zeros(6, dtype=torch.int64))),
    "fewer rows of hidden": (ValueError, "hidden", changed_part(8, torch.zeros(4, 3))),
    "fewer rows of logits": (ValueError, "", changed_part(4, torch.zeros(4, V))),
    "another width of hidden": (ValueError, "weight", changed_part(8, torch.zeros(5, 4))),
    "a flat weight": (ValueError, "weight", changed_part(1, torch.zeros(V * 4))),
    "a weight of other dtype": (TypeError, "weight", changed_part(1, torch.zeros(V, 4, dtype=torch.bfloat16))),
    "integer hidden": (TypeError, "hidden", changed_part(0, torch.zeros(5, 4, dtype=torch.int64))),
    "integer weight": (TypeError, "weight", changed_part(1, torch.zeros(V, 4, dtype=torch.int64))),
    "logits with gaps": (ValueError, "contiguous", changed_part(4, torch.zeros(5, 2 * V)[:, ::2])),
    "fewer classes in a weight": (ValueError, "", changed_part(9, torch.zeros(V - 1, 3))),
    "short bias": (ValueError, "bias", changed_part(2, torch.zeros(V - 1))),
    "short scale": (ValueError, "scale", changed_part(3, torch.zeros(4))),
    "a first part that is not there": (ValueError, "leaves", changed_part(4, None)),
    "a part too few": (ValueError, "leaves", lambda given: given.parts.pop()),
    "a source too many": (ValueError, "leaves", changed(softcaps=[0.0] * 4)),
    "a softcap too few": (ValueError, "leaves", changed(softcaps=[0.0] * 2)),
    "no sources": (ValueError, "leaves", changed(parts=[], softcaps=[], num_base=0)),
    "no base": (ValueError, "num_base", changed(num_base=0)),
    "more base than sources": (ValueError, "num_base", changed(num_base=4)),
    "a negative softcap": (ValueError, "softcap", changed(softcaps=[-1.0, 0.0, 0.0])),
    "short class weight": (ValueError, "weight", changed(weight=torch.ones(V - 1))),
    "too many classes": (ValueError, "", changed(vocab_size=V + 1, weight=None)),
    "no classes": (ValueError, "", changed(vocab_size=0, weight=None)),
    "negative classes": (ValueError, "", changed(vocab_size=-1, weight=None)),
    "an integer autocast": (TypeError, "autocast", changed(autocast=torch.int32)),
}


@pytest.mark.parametrize("op", ["scan", "loss", "backward"])
@pytest.mark.parametrize("what", BAD)
def test_a_raw_call_refuses_what_the_public_function_refuses(native, op, what):
    error, message, change = BAD[what]
    given = Given()
    state, needs = given.state("native"), given.needs()
    change(given)
    with pytest.raises(error) as caught:
        calls(given, "native", state, needs)[op]()
    assert message in str(caught.value)


@pytest.mark.parametrize("backend", ["cuda", "", "reference", "triton.launch", ".."])
@pytest.mark.parametrize("op", ["scan", "loss", "backward"])
def test_a_raw_call_of_a_backend_that_is_none_is_refused_in_its_name(native, op, backend):
    given = Given()
    with pytest.raises((ValueError, RuntimeError), match="backend"):
        calls(given, backend, given.state("native"))[op]()


@pytest.mark.parametrize("op", ["scan", "loss", "backward"])
def test_a_raw_call_on_another_device_is_refused(native, op):
    state = Given().state("native")
    for index in (0, 1, 2, 3, 4, 8, 9):
        given = Given()
        given.parts[index] = given.parts[index].to("meta")
        with pytest.raises((TypeError, ValueError, RuntimeError, NotImplementedError)):
            calls(given, "native", state)[op]()


def test_fields_and_gradients_that_do_not_exist_are_refused(native):
    for wanted in (-1, 1 << len(request.FIELDS)):
        with pytest.raises(ValueError, match="wanted"):
            scan_op(*Given().arguments(), wanted, "native")
        with pytest.raises(ValueError, match="wanted"):
            Given().loss("native", wanted=wanted)
    absent = [True] * 12  # a weight of logits, among others
    for call in (Given().loss, Given().backward):
        for needs in (absent, [True], [True] * 13, []):
            with pytest.raises(ValueError, match="needs"):
                call("native", needs=needs)


def test_a_raw_call_without_a_target_that_it_needs_is_a_value_error(native):
    given = Given(target=None)
    with pytest.raises(ValueError, match="target"):
        given.loss("native")
    with pytest.raises(ValueError, match="target"):
        given.scan("nll", backend="native")
    with pytest.raises(ValueError, match="target"):
        given.backward("native", state=Given().state("native"))
    assert given.scan("lse", backend="native")["lse"].isfinite().all()


@pytest.mark.parametrize("length", [0, 4, 6])
@pytest.mark.parametrize("place", [*range(5), "coefficient"])
def test_a_raw_backward_with_row_numbers_of_another_length_is_a_value_error(native, place, length):
    given = Given()
    state, coefficients = given.state("native"), [torch.ones(5) for _ in request.COEFFICIENTS]
    if place == "coefficient":
        coefficients[4] = torch.ones(length)
    else:
        state[place] = torch.ones(length)
    with pytest.raises(ValueError, match="must have shape"):
        given.backward("native", state=state, coefficients=coefficients)


@pytest.mark.parametrize("count", [0, 7, 9])
def test_a_raw_backward_with_another_number_of_coefficients_is_refused(native, count):
    with pytest.raises((TypeError, ValueError)):
        Given().backward("native", coefficients=[None] * count)


def test_a_raw_backward_without_the_state_that_it_needs_is_refused(native):
    for missing in (2, 3, 4):
        state = Given().state("native")
        state[missing] = None
        with pytest.raises(ValueError, match="must be given for the coefficients"):
            Given().backward("native", state=state, coefficients=[torch.ones(5)] * len(request.COEFFICIENTS))


# -- gradcheck ---------------------------------------------------------------------------------------------------------


def leaf(device, *shape):
    return logits(*shape, dtype=torch.float64, device=device, scale=0.7, requires_grad=True)


def check_gradients(function, *leaves):
    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-6, rtol=1e-4)


FORMS = {
    "two heads": lambda h, w, b, g, u, s: (Head(h, w, bias=b), Head(g, u, scale=s, softcap=3.0)),
    "logits and a head": lambda h, w, b, g, u, s: (h @ w.T, Head(g, u, bias=b, scale=s)),
    "sums": lambda h, w, b, g, u, s: ([Head(h, w, bias=b, scale=s), g @ u.T], [Head(g, u, softcap=3.0), Head(h, w)]),
}


def gradcheck_leaves(device, scalar):
    scale = torch.rand(() if scalar else 3, dtype=torch.float64, device=device).requires_grad_()
    shapes = ((3, 2), (4, 2), (4,), (3, 3), (4, 3))
    return *(leaf(device, *shape) for shape in shapes), scale


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"reduction": "none"}, {"recompute": True, "label_smoothing": 0.2, "z_loss": 0.1}])
@pytest.mark.parametrize("scalar", [False, True], ids=["scale per row", "one scale"])
@pytest.mark.parametrize("form", FORMS)
def test_losses_pass_gradcheck(doubles, monkeypatch, form, scalar, options):
    cut_rows(monkeypatch, 1)
    target = torch.tensor([0, 3, -100], device=doubles.device)

    def loss(*leaves):
        return aux_cross_entropy(*FORMS[form](*leaves), target, backend=doubles.backend, **options)

    check_gradients(loss, *gradcheck_leaves(doubles.device, scalar))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_pass_gradients_are_slopes(doubles, monkeypatch, form, reduction):
    """By hand, because gradcheck goes backward more than once: central differences along random directions."""
    cut_rows(monkeypatch, 1)
    target = torch.tensor([0, 3, -100], device=doubles.device)
    leaves = gradcheck_leaves(doubles.device, False)

    def loss(*leaves):
        return aux_cross_entropy(*FORMS[form](*leaves), target, reduction=reduction, backend=doubles.backend)

    grads = torch.autograd.grad(loss(*leaves), leaves)
    for _ in range(3):
        directions = [torch.randn_like(t) for t in leaves]
        ends = [loss(*(t.detach() + e * d for t, d in zip(leaves, directions, strict=True))) for e in (1e-6, -1e-6)]
        want = sum((grad * d).sum() for grad, d in zip(grads, directions, strict=True))
        assert abs((ends[0] - ends[1]) / 2e-6 - want) < 1e-6 + 1e-4 * abs(want)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["log_prob", "base_log_prob", "lse", "entropy", "kl_to_base"])
@pytest.mark.parametrize("form", FORMS)
def test_statistics_pass_gradcheck(doubles, monkeypatch, form, name):
    cut_rows(monkeypatch, 1)
    target = torch.tensor([0, 3, -100], device=doubles.device)

    def statistic(*leaves):
        return getattr(logit_stats(*FORMS[form](*leaves), target, backend=doubles.backend), name)

    check_gradients(statistic, *gradcheck_leaves(doubles.device, False))


def test_the_reference_may_be_differentiated_twice():
    leaves = gradcheck_leaves("cpu", False)
    target = torch.tensor([0, 3, 1])

    def loss(*leaves):
        base, aux = FORMS["two heads"](*leaves)
        return aux_cross_entropy(replace(base, softcap=2.0), aux, target, backend="reference")

    assert torch.autograd.gradgradcheck(loss, leaves)
