"""The contract of heads: what is refused and how, targets out of range, and logits that are not finite."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
import torch.nn.functional as F
from inputs import cut_rows, head, logits, targets
from refusals import refuses
from tolerance import assert_alike

from auxkernels import Head, aux_cross_entropy, logit_stats

N, V, D = 6, 8, 5
INF = torch.inf


class Arguments:
    """A correct call with two heads, of which a test changes one thing."""

    def __init__(self, device="cpu"):
        self.device = device
        self.base = head(N, width=D + 1, vocab_size=V, device=device)
        self.aux = head(N, width=D, vocab_size=V, bias=True, device=device)
        self.target = targets(N, vocab_size=V, device=device, ignored=0.2)

    def call(self, impl, base=None, aux=None, target=None, **options):
        given = (base or self.base, aux or self.aux, self.target if target is None else target)
        return aux_cross_entropy(*given, backend=impl.backend, **options)

    def refused(self, impl, error, message, *, side="aux", options=None, **changes):
        """By both functions, wherever in the sum the changed head stands."""
        changed = replace(getattr(self, side), **changes)
        both = {"base": self.base, "aux": self.aux} | {side: changed}
        refuses(error, message.format(side), self.call, impl, **both, **(options or {}))
        refuses(error, message.format(side), logit_stats, both["base"], both["aux"], self.target, backend=impl.backend)
        listed = {side: [self.base, changed]}
        refuses(error, message.format(f"{side}[1]"), self.call, impl, **listed, **(options or {}))


@pytest.fixture
def arguments(impl):
    return Arguments(impl.device)


# -- types -------------------------------------------------------------------------------------------------------------

PARTS = ("hidden", "weight", "bias")
FLOATING = "{} of {{}} must be float32, bfloat16, float16 or float64, got torch."
WRONG_TYPES = {
    "no tensor": (lambda t: t.tolist(), "{} of {{}} must be a tensor, got list"),
    "integers": (
        lambda t: t.to(torch.int64),
        FLOATING + "int64",
    ),
    "complex": (
        lambda t: t.to(torch.complex64),
        FLOATING + "complex64",
    ),
    "float8": (
        lambda t: t.to(torch.float8_e5m2),
        FLOATING + "float8_e5m2",
    ),
    "sparse": (lambda t: t.to_sparse(), "{} of {{}} must be a dense tensor, got layout torch.sparse_coo"),
    "quantised": (
        lambda t: torch.quantize_per_tensor(t.cpu(), 0.1, 0, torch.qint8),
        "{} of {{}} must not be quantised, got torch.qint8",
    ),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("side", ["base", "aux"])
@pytest.mark.parametrize("what", WRONG_TYPES)
@pytest.mark.parametrize("part", PARTS)
def test_a_tensor_of_another_type_is_a_type_error_that_names_it(arguments, impl, part, what, side):
    if side == "base" and part == "bias":
        arguments.base = replace(arguments.base, bias=arguments.aux.bias)
    make, message = WRONG_TYPES[what]
    value = make(getattr(getattr(arguments, side), part).detach())
    arguments.refused(impl, TypeError, message.format(part), side=side, **{part: value})


@pytest.mark.parametrize("part", ["hidden", "weight"])
def test_hidden_and_weight_are_not_optional(arguments, impl, part):
    arguments.refused(impl, TypeError, f"{part} of {{}} must be a tensor, got NoneType", **{part: None})
    with pytest.raises(TypeError, match="weight"):
        Head(arguments.aux.hidden)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_the_tensors_of_a_head_share_one_dtype(arguments, impl, part, dtype):
    value = getattr(arguments.aux, part).detach().to(dtype)
    message = f"{part} of {{}} must have the hidden states' dtype torch.float32, got {dtype}"
    arguments.refused(impl, TypeError, message, **{part: value})


def test_what_is_no_head_is_a_type_error(arguments, impl):
    pair = (arguments.aux.hidden, torch.nn.Linear(D, V))
    refuses(TypeError, "must be a tensor, Logits, Head or a sequence of these", arguments.call, impl, aux=pair)


def test_options_of_a_head_are_keyword_only_and_it_does_not_change(arguments):
    with pytest.raises(TypeError, match="positional"):
        Head(arguments.aux.hidden, arguments.aux.weight, arguments.aux.bias)
    with pytest.raises(FrozenInstanceError):
        arguments.aux.scale = 2.0


# -- shapes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(N + 1, D), (1, D), (D,), (N, 1, D)], ids=str)
def test_hidden_states_have_the_targets_shape_and_are_not_broadcast(impl, arguments, shape):
    message = f"hidden of aux must be [*, D] with leading shape [{N}], got {list(shape)}"
    changed = replace(arguments.aux, hidden=torch.zeros(shape, device=impl.device))
    refuses(ValueError, message, arguments.call, impl, aux=changed)
    message = message.replace("of aux", "of base[0]")
    refuses(ValueError, message, arguments.call, impl, base=[changed, arguments.base])


def test_hidden_states_without_a_width_are_a_value_error(impl, arguments):
    flat = replace(arguments.aux, hidden=torch.zeros((), device=impl.device))
    refuses(ValueError, "hidden of base must", logit_stats, flat, None, backend=impl.backend)
    refuses(ValueError, "hidden of aux must", arguments.call, impl, aux=flat)


@pytest.mark.parametrize("shape", [(V, D + 1), (D, V), (V,), (V, D, 1), (1, V, D), ()], ids=str)
def test_a_weight_is_v_by_d(arguments, impl, shape):
    message = f"weight of {{}} must be [V, D] with the hidden states' D={D}, got {list(shape)}"
    arguments.refused(impl, ValueError, message, weight=torch.zeros(shape, device=impl.device))


@pytest.mark.parametrize("shape", [(V + 1,), (1,), (), (1, V), (N, V)], ids=str)
def test_a_bias_has_one_number_per_class(arguments, impl, shape):
    message = f"bias of {{}} must be [{V}], got {list(shape)}"
    arguments.refused(impl, ValueError, message, bias=torch.zeros(shape, device=impl.device))


@pytest.mark.parametrize("shape", [(1,), (V,), (N, 1), (N, V)], ids=str)
def test_a_scale_is_one_number_or_one_per_row(arguments, impl, shape):
    message = f"scale of {{}} must have shape [] or [{N}], got {list(shape)}"
    arguments.refused(impl, ValueError, message, scale=torch.ones(shape, device=impl.device))


@pytest.mark.parametrize("value", [0, -1.0, INF, torch.nan])
def test_a_softcap_is_positive_and_finite(arguments, impl, value):
    arguments.refused(impl, ValueError, f"softcap of {{}} must be positive and finite, got {value}", softcap=value)


def test_heads_of_unequal_width_are_a_value_error_that_lists_them(arguments, impl):
    wide = head(N, width=3, vocab_size=V + 1, device=impl.device)
    values = logits(N, V, device=impl.device)
    message = f"equally wide, or vocab_size must be given, got widths base {V}, aux[0] {V}, aux[1] {V + 1}"
    refuses(ValueError, message, arguments.call, impl, aux=[values, wide])
    message = f"vocab_size must be at most the width of base, {V}, got {V + 1}"
    refuses(ValueError, message, arguments.call, impl, aux=wide, vocab_size=V + 1)
    assert arguments.call(impl, aux=[values, wide], vocab_size=V).isfinite()


@pytest.mark.parametrize("num_rows", [0, 3])
def test_a_head_without_classes_is_a_value_error(impl, num_rows):
    empty = Head(torch.zeros(num_rows, D, device=impl.device), torch.zeros(0, D, device=impl.device))
    target = torch.zeros(num_rows, dtype=torch.int64, device=impl.device)
    refuses(ValueError, "at least one class, got 0", aux_cross_entropy, empty, None, target, backend=impl.backend)


def test_a_head_without_width_has_logits_of_zero_and_its_bias(impl):
    """D = 0: an empty sum."""
    hidden, weight = torch.zeros(3, 0, device=impl.device), torch.zeros(V, 0, device=impl.device)
    bias, target = logits(V, device=impl.device), torch.tensor([0, 3, V - 1], device=impl.device)
    loss = aux_cross_entropy(Head(hidden, weight, bias=bias), None, target, backend=impl.backend)
    assert_alike(loss, F.cross_entropy(bias.expand(3, V), target))


def test_a_class_weight_that_wants_a_gradient_is_a_value_error(arguments, impl):
    weight = torch.ones(V, device=impl.device, requires_grad=True)
    refuses(ValueError, "weight must not require a gradient", arguments.call, impl, weight=weight)
    refuses(ValueError, f"weight must have shape [{V}]", arguments.call, impl, weight=torch.ones(V + 1))


@pytest.mark.parametrize("part", [*PARTS, "scale"])
def test_tensors_on_another_device_are_a_value_error_that_names_them(part):
    arguments = Arguments()
    arguments.aux = replace(arguments.aux, scale=torch.ones(N))
    value = getattr(arguments.aux, part).detach().to("meta")
    rule = "the hidden states' device" if part in ("weight", "bias") else "the target's device"
    message = f"{part} of aux must be on {rule} cpu, got meta"
    changed = replace(arguments.aux, **{part: value})
    refuses(ValueError, message, aux_cross_entropy, arguments.base, changed, arguments.target)


def test_triton_says_that_it_has_no_float64_heads():
    base, target = head(3, vocab_size=V, dtype=torch.float64), targets(3, vocab_size=V)
    message = "backend='triton' cannot be used: the Triton kernels have no float64"
    refuses(RuntimeError, message, aux_cross_entropy, base, None, target, backend="triton")


def test_auto_is_native_for_heads(native):
    given = Arguments()
    losses = [aux_cross_entropy(given.base, given.aux, given.target, backend=name) for name in ("auto", "native")]
    assert torch.equal(*losses)


# -- targets out of range ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"recompute": True}, {"return_stats": True}], ids=str)
@pytest.mark.parametrize("value", [V, -1, -101, 2**31, 2**32 + 5, -(2**63), 2**63 - 1])
def test_a_target_out_of_range_in_any_chunk_is_an_index_error_before_anything_is_made(
    on_cpu, monkeypatch, value, options
):
    cut_rows(monkeypatch, 2)
    base, aux = (head(2, 3, vocab_size=V) for _ in range(2))
    target = torch.tensor([[0, -100, 1], [2, V - 1, -100]])
    made = []
    for place in ((0, 0), (1, 1), (1, 2)):
        wrong = target.clone()
        wrong[place] = value
        row = 3 * place[0] + place[1]
        message = (
            f"target must be in [0, {V}) or ignore_index=-100, got target[{place[0]}, {place[1]}] = {value} (row {row})"
        )
        with monkeypatch.context() as patch:
            for name in ("mm", "addmm"):
                patch.setattr(torch, name, lambda *args, **kwargs: made.append(1))
            refuses(IndexError, message, aux_cross_entropy, base, aux, wrong, backend=on_cpu.backend, **options)
            refuses(IndexError, message, logit_stats, base, aux, wrong, backend=on_cpu.backend)
        assert not made or on_cpu.backend == "reference"
    assert aux_cross_entropy(base, aux, target, backend=on_cpu.backend).isfinite()


def test_an_int32_target_out_of_range_is_an_index_error(on_cpu):
    base, target = head(3, vocab_size=V), torch.tensor([0, -100, V], dtype=torch.int32)
    refuses(IndexError, f"got target[2] = {V} (row 2)", aux_cross_entropy, base, None, target, backend=on_cpu.backend)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"recompute": True}], ids=str)
def test_on_gpu_a_target_out_of_range_is_nan_in_its_row(on_gpu, options):
    base, aux = (head(N, vocab_size=V, device="cuda") for _ in range(2))
    target = torch.tensor([0, 1, 2**40, -100, 3, 4], device="cuda")
    loss = aux_cross_entropy(base, aux, target, backend=on_gpu.backend, **options)
    (grad,) = torch.autograd.grad(loss.sum(), aux.hidden)
    assert loss.isnan().any() and grad.isnan().any(-1).tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("ignore_index", [0, V - 1, V + 5, 2**40, -1])
def test_any_number_may_be_ignore_index(impl, ignore_index):
    base, aux = (head(4, vocab_size=V, device=impl.device) for _ in range(2))
    target = torch.tensor([3, ignore_index, 5, ignore_index], device=impl.device)
    loss = aux_cross_entropy(base, aux, target, ignore_index=ignore_index, reduction="none", backend=impl.backend)
    assert not loss[1::2].any() and loss[::2].all()
    assert not torch.autograd.grad(loss.sum(), base.hidden)[0][1::2].any()


# -- logits that are not finite ----------------------------------------------------------------------------------------


def dense(*sources):
    total = 0
    for source in sources:
        z = source.hidden.detach().double() @ source.weight.detach().double().T
        total = total + z + (0 if source.bias is None else source.bias.detach().double())
    return total


BIASES = {
    "one class masked": ([3], -INF),
    "half of the classes masked": (range(20), -INF),
    "all masked but one": ([*range(30), *range(31, 40)], -INF),
    "all masked": (range(40), -INF),
    "a class of +inf": ([3], INF),
    "a class of NaN": ([3], torch.nan),
}


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"label_smoothing": 0.1, "z_loss": 0.01}], ids=str)
@pytest.mark.parametrize("side", ["base", "aux", "sum"])
@pytest.mark.parametrize("what", BIASES)
def test_a_bias_that_is_not_finite_has_the_pattern_of_float64_torch(impl, monkeypatch, what, side, options):
    cut_rows(monkeypatch, 2)
    classes, value = BIASES[what]
    base, aux = (head(5, vocab_size=40, device=impl.device, bias=True) for _ in range(2))
    with torch.no_grad():
        (base if side == "base" else aux).bias[list(classes)] = value
    target = torch.tensor([30, 30, -100, 30, 30], device=impl.device)
    sources = ([base, aux], None) if side == "sum" else (base, aux)
    loss = aux_cross_entropy(*sources, target, backend=impl.backend, **options)
    leaves = (base.hidden, aux.bias)
    grad, grad_bias = torch.autograd.grad(loss.sum(), leaves)
    s = dense(base, aux).masked_fill((target == -100).unsqueeze(-1), 0.0).requires_grad_()
    given = {k: v for k, v in options.items() if k in ("label_smoothing", "reduction")}
    want = F.cross_entropy(s, target, **given)
    if "z_loss" in options:
        want = want + options["z_loss"] * s.logsumexp(-1).square()[target >= 0].mean()
    (ds,) = torch.autograd.grad(want.sum(), s)
    for got, wanted in ((loss, want.detach()), (grad_bias, ds.sum(0))):
        assert torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got == INF, wanted == INF)
        finite = wanted.isfinite()
        assert_alike(got[finite], wanted[finite])
    rows = ds.isnan().any(-1)
    assert torch.equal(grad.isnan().any(-1), rows) and not grad[2].any()
    if value == -INF and "label_smoothing" not in options and not rows.any():
        masked = torch.zeros(40, dtype=torch.bool)
        masked[list(classes)] = True
        assert not grad_bias[masked].any()
        (grad_weight,) = torch.autograd.grad(
            aux_cross_entropy(*sources, target, backend=impl.backend, **options).sum(), aux.weight
        )
        assert not grad_weight[masked].any() and grad_weight.isfinite().all()


def test_a_masked_target_has_infinite_loss_and_the_gradient_p_minus_onehot(impl):
    base, aux = (head(3, vocab_size=V, device=impl.device, bias=True) for _ in range(2))
    with torch.no_grad():
        aux.bias[4] = -INF
    target = torch.tensor([4, 1, 4], device=impl.device)
    loss = aux_cross_entropy(base, aux, target, reduction="none", backend=impl.backend)
    assert loss.isinf().tolist() == [True, False, True]
    (grad,) = torch.autograd.grad(loss.sum(), aux.bias)
    want = (torch.softmax(dense(base, aux), -1) - F.one_hot(target, V)).sum(0)
    assert_alike(grad, want)


def test_hidden_states_that_are_not_finite_make_their_row_nan_and_no_other(impl, monkeypatch):
    cut_rows(monkeypatch, 2)
    base, aux = (head(6, vocab_size=V, device=impl.device) for _ in range(2))
    with torch.no_grad():
        aux.hidden[1, 0], base.hidden[4, 2] = torch.nan, INF
    target = targets(6, vocab_size=V, device=impl.device)
    bad = torch.tensor([False, True, False, False, True, False], device=impl.device)
    loss = aux_cross_entropy(base, aux, target, reduction="none", backend=impl.backend)
    stats = logit_stats(base, aux, target, backend=impl.backend)
    assert torch.equal(loss.isnan(), bad) and torch.equal(stats.entropy.isnan(), bad)
    for grad in torch.autograd.grad(loss.sum(), (base.hidden, aux.hidden)):
        assert torch.equal(grad.isnan().any(-1), bad)


@pytest.mark.parametrize("form", ["alone", "in a sum"])
def test_a_masked_class_does_not_poison_the_gradient_of_the_scale(impl, form):
    base, aux = (head(4, vocab_size=V, device=impl.device, bias=True) for _ in range(2))
    scale = torch.rand(4, device=impl.device).add_(0.5).requires_grad_()
    with torch.no_grad():
        aux.bias[[0, 3]] = -INF
    target = torch.tensor([1, 2, -100, 5], device=impl.device)
    scaled = replace(aux, scale=scale)
    loss = aux_cross_entropy(base, scaled if form == "alone" else [scaled, base], target, backend=impl.backend)
    grad, grad_hidden = torch.autograd.grad(loss, (scale, aux.hidden))
    assert grad.isfinite().all() and grad_hidden.isfinite().all() and grad[[0, 1, 3]].all() and grad[2] == 0
    z, base_z = dense(aux), dense(base) * (1 if form == "alone" else 2)
    leaf = scale.detach().double().requires_grad_()
    masked = z == -INF
    s = torch.where(masked, -INF, base_z + leaf.unsqueeze(-1) * torch.where(masked, 0.0, z))
    want = torch.autograd.grad(F.cross_entropy(s, target), leaf)[0]
    assert_alike(grad, want)


def test_16_bit_logits_that_overflow_are_not_silently_finite(impl):
    """fp16: a product past 65504 may be exact (float32 products) or infinite (eager torch), never another number."""
    base = head(3, vocab_size=V, width=4, dtype=torch.float16, device=impl.device)
    with torch.no_grad():
        base.hidden.fill_(250.0)
        base.weight.fill_(1.0)
        base.weight[5].fill_(100.0)
    target = torch.full((3,), 5, device=impl.device)
    loss = aux_cross_entropy(base, None, target, reduction="none", backend=impl.backend)
    assert (loss.isnan() | (loss == 0)).all()
