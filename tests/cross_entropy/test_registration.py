"""The operators as torch.library sees them (opcheck), their raw calls with bad arguments, and gradcheck in float64."""

import pytest
import raw
import torch
from inputs import logits, targets
from row_kernels import NEEDS_AUX, NEEDS_AUX_SCALE, NEEDS_BASE_SCALE
from torch.library import opcheck

from auxkernels import Logits, aux_cross_entropy, logit_stats
from auxkernels.cross_entropy import request

ALL_NEEDS = 15


def sample(device, rows=3, vocab_size=9, dtype=torch.float32, **changes):
    """Named source arguments of an op with every optional tensor present."""
    lead = (rows,) if isinstance(rows, int) else rows
    given = {
        "base": logits(*lead, vocab_size, dtype=dtype, device=device),
        "aux": logits(*lead, vocab_size, dtype=dtype, device=device),
        "target": targets(*lead, vocab_size=vocab_size, device=device, ignored=0.3),
        "weight": torch.rand(vocab_size, device=device),
        "base_scale": torch.rand((), device=device),
        "aux_scale": torch.rand(lead, device=device),
        "base_softcap": 5.0,
        "aux_softcap": None,
    }
    return given | changes


SAMPLES = {
    "everything": lambda d: sample(d),
    "only what must be": lambda d: {"base": logits(3, 9, device=d), "target": targets(3, vocab_size=9, device=d)},
    "no rows": lambda d: sample(d, rows=0),
    "two leading dimensions": lambda d: sample(d, rows=(2, 3)),
    "no leading dimension": lambda d: sample(d, rows=()),
    "halves": lambda d: sample(d, dtype=torch.bfloat16),
    "mixed": lambda d: sample(d, aux=logits(3, 9, dtype=torch.float16, device=d)),
    "narrower than its sources": lambda d: sample(d, vocab_size=9, weight=torch.rand(7, device=d)) | {"vocab_size": 7},
    "views": lambda d: sample(d, base=logits(3, 12, device=d)[:, 2:11], aux=logits(6, 9, device=d)[::2]),
    "expanded": lambda d: sample(d, aux=logits(1, 9, device=d).expand(3, 9)),
    "int32": lambda d: sample(d, target=targets(3, vocab_size=9, dtype=torch.int32, device=d)),
    "all ignored": lambda d: sample(d, target=torch.full((3,), -100, device=d)),
}


@pytest.fixture(params=SAMPLES)
def given(request, fused):
    found = SAMPLES[request.param](fused.device)
    if found.get("vocab_size") == 7:
        found["target"] = found["target"].clamp(max=6)
    return found


def needs_of(given):
    return [leaf is not None for leaf in raw.sources(given)[0]]


# -- opcheck -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [("nll",), ("argmax",), request.FIELDS, ()], ids=lambda names: f"{len(names)} of")
def test_scan_passes_opcheck(fused, given, wanted):
    opcheck(raw.scan_op, (*raw.sources(given), request.mask_of(*wanted), fused.backend))


@pytest.mark.slow
@pytest.mark.parametrize("has_gradient", [False, True], ids=["no gradient", "all gradients"])
def test_loss_passes_opcheck(fused, given, has_gradient):
    needs = [need and has_gradient for need in needs_of(given)]
    normalizer = torch.tensor(3.0, dtype=torch.float64, device=fused.device) if any(needs) else None
    # without a normalizer the mean of no rows is NaN, which opcheck does not find equal to itself
    rest = (normalizer, 0.1, 0.01, any(needs), request.mask_of("nll", "argmax"), needs, fused.backend)
    opcheck(raw.loss_op, (*raw.sources(given), *rest))


def test_backward_passes_opcheck(fused, given):
    fields = ("max", "log_denom", "nll", "base_max", "base_log_denom")
    state = [field.clone() for field in raw.scan(fused.backend, *fields, **given).values()]
    rows = state[0].shape
    coefficients = [torch.randn(rows, device=fused.device) if i % 3 else None for i in range(len(request.COEFFICIENTS))]
    rest = (*state, coefficients, needs_of(given), fused.backend)
    opcheck(raw.backward_op, (*raw.sources(given), *rest))


@pytest.mark.parametrize("factor", [1.0, -0.5])
def test_rescale_passes_opcheck(fused, given, factor):
    grad = torch.randn(given["base"].shape, device=fused.device)
    arguments = (grad, torch.tensor(factor, device=fused.device), given["target"], -100, fused.backend)
    opcheck(raw.rescale_op, arguments)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (0,), ()], ids=str)
def test_check_target_passes_opcheck(impl, shape, dtype):
    target = targets(*shape, vocab_size=9, dtype=dtype, device=impl.device)
    opcheck(raw.check_target_op, (target, 9, -100))


# -- the raw boundary --------------------------------------------------------------------------------------------------

BAD = {
    "target out of range": (IndexError, "got target[1] = 9 (row 1)", {"target": torch.tensor([0, 9, 1])}),
    "negative target": (IndexError, "got target[2] = -1 (row 2)", {"target": torch.tensor([0, 1, -1])}),
    "int16 target": (TypeError, "target", {"target": torch.zeros(3, dtype=torch.int16)}),
    "float target": (TypeError, "target", {"target": torch.zeros(3)}),
    "short target": (ValueError, "target", {"target": torch.zeros(2, dtype=torch.int64)}),
    "long target": (ValueError, "target", {"target": torch.zeros(4, dtype=torch.int64)}),
    "fewer rows in aux": (ValueError, "source 1", {"aux": torch.zeros(2, 9)}),
    "fewer classes in aux": (ValueError, "source 1", {"aux": torch.zeros(3, 8)}),
    "flat aux": (ValueError, "source 1", {"aux": torch.zeros(27)}),
    "integer base": (TypeError, "source 0", {"base": torch.zeros(3, 9, dtype=torch.int64)}),
    "integer aux": (TypeError, "source 1", {"aux": torch.zeros(3, 9, dtype=torch.int8)}),
    "base with gaps": (ValueError, "source 0", {"base": torch.zeros(3, 18)[:, ::2]}),
    "aux with gaps": (ValueError, "source 1", {"aux": torch.zeros(9, 3).t()}),
    "short weight": (ValueError, "weight", {"weight": torch.ones(8)}),
    "long weight": (ValueError, "weight", {"weight": torch.ones(10)}),
    "short scale": (ValueError, "scale", {"aux_scale": torch.ones(2)}),
    "square scale": (ValueError, "scale", {"base_scale": torch.ones(3, 9)}),
    "too many classes": (ValueError, "", {"vocab_size": 10}),
    "no classes": (ValueError, "", {"vocab_size": 0}),
    "negative classes": (ValueError, "", {"vocab_size": -1}),
}


@pytest.mark.parametrize("op", ["scan", "loss", "backward"])
@pytest.mark.parametrize("what", BAD)
def test_a_raw_call_refuses_what_the_public_function_refuses(native, op, what):
    error, message, change = BAD[what]
    given = {"base": logits(3, 9), "aux": logits(3, 9), "target": torch.tensor([0, 5, -100]), "vocab_size": 9} | change
    with pytest.raises(error) as caught:
        raw.calls("native")[op](**given)
    assert message in str(caught.value)


@pytest.mark.parametrize("op", ["scan", "loss", "backward"])
def test_a_raw_call_on_another_device_is_refused(native, op):
    given = {"base": logits(3, 9), "aux": logits(3, 9), "target": torch.tensor([0, 5, -100])}
    for name in ("base", "aux", "target"):
        with pytest.raises((TypeError, ValueError, RuntimeError, NotImplementedError)):
            raw.calls("native")[op](**given | {name: given[name].to("meta")})


def test_a_raw_loss_without_a_target_is_a_value_error(native):
    with pytest.raises(ValueError, match="target"):
        raw.loss("native", base=logits(3, 9))


def test_a_raw_gradient_of_a_source_that_is_not_there_is_refused(native):
    for needs in (NEEDS_AUX, NEEDS_AUX_SCALE, NEEDS_BASE_SCALE):
        with pytest.raises((TypeError, ValueError), match="needs"):
            raw.loss("native", base=logits(3, 9), target=torch.tensor([0, 5, -100]), needs=needs)


def test_raw_fields_of_a_target_that_is_not_there_are_refused_or_zero(native):
    """They may not be uninitialised memory."""
    try:
        fields = raw.scan("native", "nll", "base_nll", base=logits(3, 9))
    except ValueError:
        return
    assert not any(field.any() for field in fields.values())


@pytest.mark.parametrize("length", [0, 2, 4])
@pytest.mark.parametrize("place", ["max", "coefficient"])
def test_a_raw_backward_with_row_numbers_of_another_length_is_a_value_error(native, place, length):
    given = {"base": logits(3, 9), "aux": logits(3, 9), "target": torch.tensor([0, 5, -100])}
    state, row = [torch.zeros(3) for _ in range(5)], torch.ones(3)
    if place == "max":
        state[0] = torch.zeros(length)
    else:
        row = torch.zeros(length)
    with pytest.raises(ValueError):
        raw.backward_op(*raw.sources(given), *state, [row] + [None] * 7, needs_of(given), "native")


@pytest.mark.parametrize("count", [0, 7, 9])
def test_a_raw_backward_with_another_number_of_coefficients_is_refused(native, count):
    given = {"base": logits(3, 9), "aux": logits(3, 9), "target": torch.tensor([0, 5, -100])}
    state = [torch.zeros(3) for _ in range(5)]
    with pytest.raises((TypeError, ValueError)):
        raw.backward_op(*raw.sources(given), *state, [None] * count, needs_of(given), "native")


@pytest.mark.parametrize(
    "grad, target",
    [
        (torch.ones(3, 9), torch.zeros(2, dtype=torch.int64)),  # fewer rows to skip than to scale
        (torch.ones(3, 9), torch.zeros(4, dtype=torch.int64)),  # rows that are not there
        (torch.ones(3, 18)[:, ::2], torch.zeros(3, dtype=torch.int64)),
        (torch.ones(9, 3).t(), torch.zeros(3, dtype=torch.int64)),
        (torch.ones(3, 9, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)),
        (torch.ones(3, 9), torch.zeros(3)),
    ],
    ids=["short target", "long target", "gaps", "transposed", "integer gradient", "float target"],
)
def test_a_raw_rescale_of_something_else_is_refused_before_it_is_written(native, grad, target):
    with pytest.raises((TypeError, ValueError)):
        raw.rescale_op(grad, torch.tensor(0.5), target, -100, "native")
    assert (grad == 1).all()


@pytest.mark.parametrize("backend", ["cuda", "", "reference", "triton.launch", ".."])
def test_a_raw_call_of_a_backend_that_is_none_is_refused_in_its_name(backend):
    given = {"base": logits(3, 9), "aux": logits(3, 9), "target": torch.tensor([0, 5, -100])}
    for op in raw.calls(backend).values():
        with pytest.raises((ValueError, RuntimeError), match="backend"):
            op(**given)


def test_the_compiled_module_checks_what_it_indexes_with(native):
    """Past the Python side: wrong argument lists and sizes are exceptions, not crashes."""
    for function in (native.scan, native.loss, native.backward, native.rescale):
        with pytest.raises(TypeError):
            function()
    with pytest.raises(ValueError, match="instruction set"):
        native.set_instruction_set("sse9")


# -- gradcheck ---------------------------------------------------------------------------------------------------------


def leaf(*shape):
    return logits(*shape, dtype=torch.float64, scale=1.0, requires_grad=True)


def check_gradients(function, *leaves):
    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "z_loss": 0.1}], ids=["plain", "smoothed"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_pass_gradcheck(doubles, reduction, weighted, options, recompute):
    if not recompute and reduction != "none" and doubles.backend != "reference":
        pytest.skip("gradcheck goes backward many times; test_one_pass_gradients_pass_gradcheck goes once")
    base, aux = (leaf(3, 5).to(doubles.device) for _ in range(2))
    target = torch.tensor([0, 4, -100], device=doubles.device)
    weight = torch.rand(5, device=doubles.device, dtype=torch.float64) if weighted else None

    def loss(base, aux):
        return aux_cross_entropy(
            base,
            aux,
            target,
            weight=weight,
            reduction=reduction,
            recompute=recompute,
            backend=doubles.backend,
            **options,
        )

    check_gradients(loss, base, aux)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_pass_gradients_pass_gradcheck(doubles, reduction, weighted):
    """By hand, because gradcheck goes backward more than once: central differences along random directions."""
    base, aux = leaf(4, 7).to(doubles.device), leaf(4, 7).to(doubles.device)
    scale = torch.rand(4, dtype=torch.float64, device=doubles.device).requires_grad_()
    target = torch.tensor([0, 6, -100, 3], device=doubles.device)
    weight = torch.rand(7, device=doubles.device, dtype=torch.float64) if weighted else None
    leaves = (base, aux, scale)

    def loss(base, aux, scale):
        options = {"weight": weight, "reduction": reduction, "label_smoothing": 0.2, "z_loss": 0.1}
        return aux_cross_entropy(
            base, Logits(aux, scale=scale, softcap=3.0), target, backend=doubles.backend, **options
        )

    grads = torch.autograd.grad(loss(*leaves), leaves)
    for _ in range(5):
        directions = [torch.randn_like(t) for t in leaves]
        ends = (
            loss(*(t.detach() + step * d for t, d in zip(leaves, directions, strict=True))) for step in (1e-6, -1e-6)
        )
        slope = (next(ends) - next(ends)) / 2e-6
        want = sum((grad * d).sum() for grad, d in zip(grads, directions, strict=True))
        assert abs(slope - want) < 1e-6 + 1e-4 * abs(want)


@pytest.mark.parametrize("kind", [(), (3,)], ids=["one scale", "a scale per row"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_scales_and_softcaps_pass_gradcheck(doubles, kind, softcap):
    base, aux = leaf(3, 5).to(doubles.device), leaf(3, 5).to(doubles.device)
    scales = [torch.rand(kind, dtype=torch.float64, device=doubles.device).requires_grad_() for _ in range(2)]
    target = torch.tensor([0, 4, -100], device=doubles.device)

    def loss(base, aux, base_scale, aux_scale):
        sources = (Logits(base, scale=base_scale), Logits(aux, scale=aux_scale, softcap=softcap))
        return aux_cross_entropy(*sources, target, reduction="none", backend=doubles.backend)

    check_gradients(loss, base, aux, *scales)


def test_sums_of_sources_pass_gradcheck(doubles):
    tensors = [leaf(3, 5).to(doubles.device) for _ in range(3)]
    scale = torch.rand(3, dtype=torch.float64, device=doubles.device).requires_grad_()
    target = torch.tensor([0, 4, -100], device=doubles.device)

    def loss(one, two, three, scale):
        sources = ([one, Logits(two, scale=scale, softcap=2.0)], [Logits(three, scale=-0.5), one])
        return aux_cross_entropy(*sources, target, reduction="none", backend=doubles.backend)

    check_gradients(loss, *tensors, scale)


@pytest.mark.parametrize("name", ["log_prob", "base_log_prob", "lse", "entropy", "kl_to_base"])
def test_statistics_pass_gradcheck(doubles, name):
    base, aux = leaf(3, 4).to(doubles.device), leaf(3, 4).to(doubles.device)
    scale = torch.rand(3, dtype=torch.float64, device=doubles.device).requires_grad_()
    target = torch.tensor([0, 3, -100], device=doubles.device)

    def statistic(base, aux, scale):
        return getattr(
            logit_stats(Logits(base, softcap=4.0), Logits(aux, scale=scale), target, backend=doubles.backend), name
        )

    check_gradients(statistic, base, aux, scale)
