"""Every gradient has one form, with one number per row for each of eight coefficients: against float64 autograd.

The scalar function below is written from the definitions (logsumexp, expectations, picked logits), not from the form,
so the form is proved and not only the kernel.
"""

import pytest
import raw
import torch
from inputs import logits, targets
from oracle import Case, Coefficients, Rows, assert_close, expected_gradients
from row_kernels import NEEDS_AUX, NEEDS_AUX_SCALE, NEEDS_BASE, NEEDS_BASE_SCALE

from auxkernels import Logits
from auxkernels.cross_entropy import request

ALL_NEEDS = NEEDS_BASE | NEEDS_AUX | NEEDS_BASE_SCALE | NEEDS_AUX_SCALE


def scalar_function(s, z_b, target, weight, k):
    """A scalar whose gradient in the sources is the form with coefficients k."""
    p, q = torch.softmax(s, -1), torch.softmax(z_b, -1).detach()
    rel, rel_b = s - s.detach().amax(-1, keepdim=True), z_b - z_b.detach().amax(-1, keepdim=True)
    lse, lse_b = torch.logsumexp(s, -1), torch.logsumexp(z_b, -1)
    mean, mean_b = (p * rel).sum(-1), (p * rel_b).sum(-1)
    total = k["A"] * lse
    total = total + k["C"] * (mean + (mean.detach() - 1) * lse)  # d E_p[rel] = p (rel - E + 1)
    total = total + k["D"] * (mean_b + mean_b.detach() * lse)  # d E_p[rel_b] = p (rel_b - E), and p in the base
    total = total + k["Q"] * (q * s).sum(-1) + k["S"] * (weight * s).sum(-1) + k["Q_b"] * lse_b
    if target is not None:
        y = target.long().unsqueeze(-1)
        total = total + k["G"] * (lse - s.gather(-1, y).squeeze(-1)) + k["B_b"] * z_b.gather(-1, y).squeeze(-1)
    return total.sum()


class Problem:
    """Two sources with softcaps and scales as leaves, and what the operator takes."""

    def __init__(
        self, dtype, device, *, softcaps=(None, None), scales=(None, None), vocab_size=70, rows=4, target=True
    ):
        self.values = [logits(rows, vocab_size, dtype=dtype, device=device, requires_grad=True) for _ in range(2)]
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        self.scales = []
        for kind in scales:
            scale = {"one": torch.rand(()) + 0.3, "rows": torch.rand(rows) - 0.5, None: None}[kind]
            self.scales.append(None if scale is None else scale.to(device, compute).requires_grad_())
        self.softcaps = softcaps
        self.target = targets(rows, vocab_size=vocab_size, device=device) if target else None
        self.weight = torch.rand(vocab_size, device=device, dtype=compute)

    def sources(self):
        for values, scale, softcap in zip(self.values, self.scales, self.softcaps, strict=True):
            yield Logits(values, scale=1.0 if scale is None else scale, softcap=softcap)

    def arguments(self):
        named = {"base": self.values[0], "aux": self.values[1], "target": self.target, "weight": self.weight}
        named |= dict(zip(("base_scale", "aux_scale"), self.scales, strict=True))
        named |= dict(zip(("base_softcap", "aux_softcap"), self.softcaps, strict=True))
        return {name: t.detach() if isinstance(t, torch.Tensor) else t for name, t in named.items()}

    def needs(self):
        bits = (NEEDS_BASE_SCALE, NEEDS_AUX_SCALE)
        scales = sum(bit for bit, scale in zip(bits, self.scales, strict=True) if scale is not None)
        return NEEDS_BASE | NEEDS_AUX | scales

    def by_autograd(self, k):
        parts = []
        leaves = [t.detach().double().requires_grad_() for t in self.values]
        scales = [None if t is None else t.detach().double().requires_grad_() for t in self.scales]
        for z, scale, cap in zip(leaves, scales, self.softcaps, strict=True):
            part = z if cap is None else cap * torch.tanh(z / cap)
            parts.append(part if scale is None else part * (scale.unsqueeze(-1) if scale.dim() else scale))
        k = {name: torch.zeros(()) if value is None else value.double() for name, value in k.items()}
        s = parts[0] + parts[1]
        total = scalar_function(s, parts[0], self.target, self.weight.double(), k)
        return torch.autograd.grad(total, leaves + [scale for scale in scales if scale is not None])

    def check(self, impl, k):
        """The op's gradients against autograd's, within the error model."""
        got = raw.backward(
            impl.backend, {n: v for n, v in k.items() if v is not None}, self.needs(), **self.arguments()
        )
        base, aux = self.sources()
        case = Case(base, aux, self.target, {"weight": self.weight})
        as_columns = {name: 0.0 if value is None else value.double().unsqueeze(-1) for name, value in k.items()}
        wanted = expected_gradients(case, Rows(case), Coefficients(**as_columns), confident=True)
        exact = dict(zip(self.names(), self.by_autograd(k), strict=True))
        for name, value in zip(self.names(), got, strict=True):
            if "scale" in name and self.scales["aux" in name].dim() == 0:
                value = value.sum()
            assert_close(f"{name}, {sorted(n for n in k if k[n] is not None)}", value, exact[name], wanted[name][1])

    def names(self):
        sides = ("base[0]", "aux[0]")
        given = zip(sides, self.scales, strict=True)
        return [*sides, *(f"scale of {side}" for side, scale in given if scale is not None)]


def random_coefficients(names, problem):
    rows, compute = problem.values[0].shape[0], problem.weight.dtype
    k = dict.fromkeys(request.COEFFICIENTS)
    return k | {name: torch.randn(rows, dtype=compute, device=problem.weight.device) for name in names}


@pytest.fixture(params=[torch.float64, torch.float32, torch.bfloat16], ids=["f64", "f32", "bf16"])
def dtype(request, fused):
    if request.param == torch.float64 and fused.backend == "triton":
        pytest.skip("the Triton kernels have no float64")
    return request.param


@pytest.mark.parametrize("name", request.COEFFICIENTS)
def test_each_coefficient_is_the_derivative_it_is_said_to_be(fused, dtype, name):
    problem = Problem(dtype, fused.device)
    problem.check(fused, random_coefficients([name], problem))


@pytest.mark.parametrize("round_number", range(6))
def test_all_coefficients_together(fused, dtype, round_number):
    problem = Problem(dtype, fused.device, vocab_size=(7, 33, 70, 129, 1025, 4100)[round_number])
    problem.check(fused, random_coefficients(request.COEFFICIENTS, problem))


@pytest.mark.parametrize("scales", [("one", None), (None, "rows"), ("rows", "one"), ("rows", "rows")], ids=str)
@pytest.mark.parametrize("softcaps", [(None, None), (5.0, None), (None, 3.0), (8.0, 4.0)], ids=str)
def test_the_form_goes_through_scales_and_softcaps(fused, dtype, softcaps, scales):
    problem = Problem(dtype, fused.device, softcaps=softcaps, scales=scales)
    problem.check(fused, random_coefficients(request.COEFFICIENTS, problem))


@pytest.mark.parametrize("left_out", request.COEFFICIENTS)
def test_any_coefficient_may_be_left_out(fused, left_out):
    problem = Problem(torch.float32, fused.device, scales=("one", "rows"))
    problem.check(fused, random_coefficients(set(request.COEFFICIENTS) - {left_out}, problem))


@pytest.mark.parametrize("names", [("A", "C"), ("D", "Q", "Q_b"), ("S",)], ids=str)
def test_without_a_target_there_is_no_true_class(fused, dtype, names):
    problem = Problem(dtype, fused.device, target=False, scales=(None, "rows"))
    problem.check(fused, random_coefficients(names, problem))


def test_no_coefficient_at_all_is_no_gradient(fused):
    problem = Problem(torch.float32, fused.device, scales=("one", "rows"))
    for grad in raw.backward(fused.backend, {}, problem.needs(), **problem.arguments()):
        assert not grad.any()


@pytest.mark.parametrize("needs", range(1, ALL_NEEDS + 1))
def test_only_the_needed_gradients_come_back_and_they_are_the_same(fused, needs):
    problem = Problem(torch.float32, fused.device, scales=("rows", "rows"), softcaps=(6.0, None))
    k = random_coefficients(request.COEFFICIENTS, problem)
    everything = raw.backward(fused.backend, k, ALL_NEEDS, **problem.arguments())
    some = raw.backward(fused.backend, k, needs, **problem.arguments())
    wanted = [grad for i, grad in enumerate(everything) if needs >> i & 1]
    assert len(some) == len(wanted) and all(map(torch.equal, some, wanted))


def test_ignored_rows_are_plus_zero_for_any_coefficient(fused):
    problem = Problem(torch.float32, fused.device, scales=("rows", "rows"))
    problem.target[1] = -100
    problem.values[0].data[1] = torch.nan
    k = {name: torch.full((4,), -1.0, device=fused.device) for name in request.COEFFICIENTS}
    k["G"][1] = torch.nan
    for grad in raw.backward(fused.backend, k, ALL_NEEDS, **problem.arguments()):
        assert not grad[1].any() and not torch.signbit(grad[1]).any()
        assert grad[0].any() and grad[0].isfinite().all()


def test_a_masked_class_has_gradient_zero_under_moments(fused):
    """p = 0 there, and 0 * (-inf) = 0 although C and D multiply infinite numbers."""
    problem = Problem(torch.float32, fused.device, scales=("rows", None))
    with torch.no_grad():
        problem.values[0][:, 10:30] = -torch.inf
        problem.scales[0].abs_()
    problem.target.fill_(5)
    names = [name for name in request.COEFFICIENTS if name != "S"]
    k = random_coefficients(names, problem)
    for grad in raw.backward(fused.backend, k, problem.needs(), **problem.arguments()):
        assert grad.isfinite().all()
        if grad.dim() == 2:
            assert not grad[:, 10:30].any()


def test_the_fields_of_a_scan_are_their_definitions(fused, dtype):
    problem = Problem(dtype, fused.device, softcaps=(None, 5.0), scales=("rows", "one"), vocab_size=4100)
    got = raw.scan(fused.backend, **problem.arguments())
    rows = Rows(Case(*problem.sources(), problem.target, {"weight": problem.weight}))
    s, b = rows.sum, rows.base
    error = 8 * rows.eps * (2 + s.log_d + s.max.abs()) + s.sum_error.amax(-1, keepdim=True)
    mean_base = (s.p * b.z).sum(-1, keepdim=True)
    spread_b = (s.p * (b.z.abs() + mean_base.abs() + 1) * (s.p_error + b.p_error)).sum(-1, keepdim=True)
    wanted = {
        "max": (s.max, error),
        "log_denom": (s.log_d, error),
        "nll": (s.nll(rows.onehot), rows.at_target(s.loss_error)),
        "mean_sum": (s.mean, s.mean_error + error),
        "mean_base": (mean_base, spread_b + error),
        "base_max": (b.max, error),
        "base_log_denom": (b.log_d, error),
        "base_nll": (b.nll(rows.onehot), rows.at_target(b.loss_error)),
        "weighted_sum": (
            (rows.weight * s.z).sum(-1, keepdim=True),
            (rows.weight * (s.loss_error + 8 * rows.eps * s.z.abs())).sum(-1, keepdim=True),
        ),
    }
    for name, (want, allowed) in wanted.items():
        assert_close(name, got[name], want.squeeze(-1), allowed.squeeze(-1))
    assert torch.equal(got["argmax"], s.s.argmax(-1)) and torch.equal(got["base_argmax"], b.s.argmax(-1))


@pytest.mark.parametrize("name", ["max", "base_max", "argmax", "base_argmax"])
@pytest.mark.parametrize("scales", [(None, None), ("rows", "one")], ids=str)
def test_the_sum_has_the_same_bits_whatever_is_asked_for(fused, name, scales):
    """An argmax is found by comparing with the maximum: a product fused in one pass and not in another misses it."""
    problem = Problem(torch.float32, fused.device, scales=scales, vocab_size=4100, rows=40)
    everything = raw.scan(fused.backend, **problem.arguments())
    assert torch.equal(raw.scan(fused.backend, name, **problem.arguments())[name], everything[name])
    assert (everything["argmax"] >= 0).all() and (everything["base_argmax"] >= 0).all()
