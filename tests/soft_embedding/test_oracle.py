"""The oracle of soft_embedding itself: it is the formula, and its tolerances notice small errors."""

import pytest
import torch
import torch.nn.functional as F
from inputs import logits
from soft_oracle import (
    F32,
    F64,
    FLOATS,
    Case,
    check_results,
    expected,
    formula,
)
from torch import Tensor

# -- the oracle itself -------------------------------------------------------------------------------------------------


def test_the_formula_is_softmax_times_table():
    v, table = logits(4, 6, dtype=F64), logits(2, 6, 3, dtype=F64)
    want = torch.softmax(v / 0.3, -1) @ table
    torch.testing.assert_close(formula(v, table, 0.3)["out"], want)
    torch.testing.assert_close(formula(v, table[0], torch.full((4,), 0.3, dtype=F64))["out"], want[0])


def test_the_formula_masks_as_masked_fill_and_selects_as_topk():
    v, table, mask = logits(5, 9, dtype=F64), logits(9, 3, dtype=F64), torch.rand(5, 9) < 0.3
    kept = torch.topk(v.masked_fill(mask, -torch.inf), 3)
    want = torch.zeros_like(v).scatter(-1, kept.indices, torch.softmax(kept.values / 0.5, -1)) @ table
    torch.testing.assert_close(formula(v, table, 0.5, mask=mask, top_k=3)["out"], want)


def test_the_formula_is_torchs_gumbel_softmax_given_its_noise(monkeypatch):
    """Its noise is -log of an exponential number."""
    drawn = torch.rand(6, 8, dtype=F64)
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: self.copy_(-drawn.log()))
    for hard in (False, True):
        v, table = (logits(*shape, dtype=F64, requires_grad=True) for shape in ((6, 8), (8, 3)))
        want = F.gumbel_softmax(v, tau=0.7, hard=hard) @ table
        got = formula(v - (-drawn.log()).log(), table, 0.7, hard=hard)["out"]
        torch.testing.assert_close(got, want)
        upstream = torch.randn_like(want)
        grads = [torch.autograd.grad(out, (v, table), upstream) for out in (got, want)]
        torch.testing.assert_close(*grads)


def test_statistics_of_the_formula_are_those_of_its_probabilities():
    v = logits(7, 12, dtype=F64)
    p, found = torch.softmax(v, -1), formula(v, torch.eye(12, dtype=F64), 1.0)
    torch.testing.assert_close(found["entropy"], torch.distributions.Categorical(p).entropy())
    torch.testing.assert_close(found["max_prob"], p.amax(-1))
    torch.testing.assert_close(found["sum_squares"], p.square().sum(-1))
    torch.testing.assert_close(found["usage"], p.mean(0))
    assert torch.equal(found["argmax"], v.argmax(-1))
    whole = formula(v, torch.eye(12, dtype=F64), 1.0, top_k=3)["row_entropy"]
    torch.testing.assert_close(whole, found["entropy"])


def test_noise_of_the_choice_alone_is_in_no_probability():
    (v, noisy), table = logits(2, 7, 12, dtype=F64), logits(12, 3, dtype=F64)
    found, clean = (formula(v, table, 0.7, True, top_k=2, chosen_by=by) for by in ((v, noisy), None))
    assert torch.equal(found["argmax"], noisy.argmax(-1)) and torch.equal(found["out"], table[noisy.argmax(-1)])
    assert torch.equal(found["max_prob"], clean["max_prob"]) and not torch.equal(found["argmax"], clean["argmax"])


FAULTS = {
    "out is a ten thousandth too large": lambda got: got | {"out": got["out"] * 1.0001},
    "a gradient is a ten thousandth too large": lambda got: got | {"grad table": got["grad table"] * 1.0001},
    "a temperature's gradient of one row is lost": lambda got: (
        got | {"grad temperature": got["grad temperature"].roll(1)}
    ),
    "probabilities are stored in float16": lambda got: got | {"out": in_float16(got)},
    "entropy lacks a label": lambda got: got | {"entropy": got["entropy"] * (1 - 1e-4)},
    "usage counts a row too many": lambda got: got | {"usage": got["usage"] * 40 / 41},
}


def in_float16(got: dict[str, Tensor]) -> Tensor:
    return got["out"] + 2.0**-11 * got["out"] * torch.rand_like(got["out"])


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_seen(name):
    T = torch.rand(40, dtype=F64).add(0.5).to(F32).requires_grad_()
    scores, table = logits(40, 300, requires_grad=True), logits(300, 50, requires_grad=True)
    case = Case(scores, table, {"temperature": T})
    upstream = case.upstream("out", *FLOATS)
    got = {name: t if name == "argmax" else t.to(F32) for name, t in expected(case, upstream).items()}
    check_results(case, got, upstream)
    with pytest.raises(AssertionError, match="off, allowed"):
        check_results(case, FAULTS[name](got), upstream)
