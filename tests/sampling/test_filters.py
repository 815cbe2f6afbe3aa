"""Which classes are kept: those of transformers' warpers, in float64 and in the order of either library."""

import itertools

import pytest
import torch

from auxkernels import sample_logits
from auxkernels.sampling import reference
from auxkernels.sampling.request import Parameters

transformers = pytest.importorskip("transformers")
from transformers.generation.logits_process import (  # noqa: E402
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

NUM_ROWS, V = 40, 97
TEMPERATURES, TOP_KS = (1e-4, 0.3, 1.0, 2.5), (None, 1, 5, 50, 200)
TOP_PS, MIN_PS = (None, 0.0, 0.35, 0.9, 0.999, 1.0), (None, 0.02, 0.3, 1.0)
# 480 combinations of 40 rows: 19,200 rows
COMBINATIONS = list(itertools.product(TEMPERATURES, TOP_KS, TOP_PS, MIN_PS))


def rows(num_rows=NUM_ROWS, width=V, seed=0):
    """Random rows: plain ones, bfloat16 ones with many ties, masked ones, confident ones, two largest."""
    generator = torch.Generator().manual_seed(seed)
    s = torch.randn(num_rows, width, generator=generator) * 3
    s[0::5] = s[0::5].bfloat16().float().mul(2).round().div(2)
    s[1::5] = s[1::5].masked_fill(torch.rand(s[1::5].shape, generator=generator) < 0.7, -torch.inf)
    s[1::5, 3] = 0.0  # not all of them
    s[2::5, 7] += 30
    s[3::5, 11] = s[3::5, 12] = s[3::5].amax(-1) + 1
    return s


def warped(s, temperature, top_k, top_p, min_p, order):
    """The scores [N, V] in float64 after transformers' warpers, -inf where they remove a class."""
    warpers = [TemperatureLogitsWarper(temperature)]
    of_top_k = [] if top_k is None else [TopKLogitsWarper(top_k)]
    of_top_p = [] if top_p in (None, 1.0) else [TopPLogitsWarper(top_p)]  # generate() leaves out that of 1
    of_min_p = [] if min_p is None else [MinPLogitsWarper(min_p)]
    if order == "transformers":
        warpers += [*of_top_k, *of_top_p, *of_min_p]
    else:
        warpers += [*of_min_p, *of_top_k, *of_top_p]
    scores = s.double()
    for warper in warpers:
        scores = warper(None, scores)
    return scores


def kept(s, temperature, top_k, top_p, min_p, order):
    """What the reference keeps."""
    parameters = Parameters(float(temperature), top_k, top_p, min_p, None, 0, None)
    given = reference._Rows(s, s, *reference._by_row(parameters, len(s), s.device))
    return reference.kept_classes(given, order)[0]


def is_close_to_top_p(s, temperature, top_k, top_p, min_p, order):
    """Rows where top_p is within the weights' error of what is ahead of some class.

    A weight is exp in float32, relative to 2**-23 of its value and |x| 2**-23 of its argument, of which one up to 40
    counts for anything, and a sum of V of them lacks V 2**-40.
    """
    if top_p in (None, 0.0, 1.0):
        return torch.zeros(len(s), dtype=torch.bool)
    before = warped(s, temperature, top_k, None, None if order == "transformers" else min_p, "vllm")
    p = before.softmax(-1).sort(-1, descending=True).values
    ahead = p.cumsum(-1) - p
    error = 2.0**-23 * (1 + 40) * 2 + V * 2.0**-40
    return ((ahead - top_p).abs() <= error).any(-1)


@pytest.mark.parametrize("order", ["transformers", "vllm"])
def test_the_kept_set_is_that_of_transformers_warpers(order):
    num_equal = num_ties = num_close = 0
    for i, combination in enumerate(COMBINATIONS):
        s = rows(seed=i)
        ours, scores = kept(s, *combination, order), warped(s, *combination, order)
        theirs = scores > -torch.inf
        is_close = is_close_to_top_p(s, *combination, order)
        assert not (theirs & ~ours)[~is_close].any(), combination
        # what is kept beyond theirs ties with the smallest that they keep: their sort has cut among these
        smallest = s.masked_fill(~theirs, torch.inf).amin(-1, keepdim=True)
        beyond = ours & ~theirs
        assert (s == smallest)[beyond & ~is_close.unsqueeze(-1)].all(), combination
        num_close += int(is_close.sum())
        num_ties += int((beyond.any(-1) & ~is_close).sum())
        num_equal += int((~beyond.any(-1) & ~is_close).sum())
    assert num_equal > 10_000
    assert num_ties > 100
    assert num_close < 0.01 * NUM_ROWS * len(COMBINATIONS)


def test_without_ties_the_sets_are_equal():
    for order, combination in itertools.product(["transformers", "vllm"], COMBINATIONS[::7]):
        s = torch.randn(20, V) * 4
        is_close = is_close_to_top_p(s, *combination, order)
        theirs = warped(s, *combination, order) > -torch.inf
        assert torch.equal(kept(s, *combination, order)[~is_close], theirs[~is_close]), (order, combination)


def test_the_orders_differ_where_top_p_normalises(impl):
    s = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]], device=impl.device).log()
    options = {"top_p": 0.8, "min_p": 0.25, "seed": 0, "return_stats": True, "backend": impl.backend}
    # 0.5 + 0.2 of all are less than 0.8, of the three that min-p keeps they are 0.82
    assert sample_logits(s, order="transformers", **options)[1].num_kept.item() == 3
    assert sample_logits(s, order="vllm", **options)[1].num_kept.item() == 2


def test_classes_that_tie_at_a_threshold_are_all_kept(impl):
    s = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0, -0.0]], device=impl.device)
    for options, num_kept in (
        ({"top_k": 1}, 1),
        ({"top_k": 2}, 4),
        ({"top_k": 4}, 4),
        ({"top_k": 6}, 7),
        ({"top_p": 0.5}, 4),
        ({"top_p": 0.0}, 1),
        ({"min_p": 1.0}, 1),
        ({"min_p": 0.9 / 2.718281828459045}, 4),
    ):
        stats = sample_logits(s, seed=0, return_stats=True, backend=impl.backend, **options)[1]
        assert stats.num_kept.item() == num_kept, options


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
def test_plausibility_is_of_the_base_alone_and_comes_first(impl, alpha):
    base, aux = torch.randn(6, 50, device=impl.device), 9 * torch.randn(6, 50, device=impl.device)
    is_plausible = base.double() - base.double().amax(-1, keepdim=True) >= torch.tensor(alpha).double().log()
    options = {"plausibility": alpha, "return_stats": True, "backend": impl.backend}
    token, stats = sample_logits(base, aux, temperature=0.7, seed=3, **options)
    assert torch.equal(stats.num_kept, is_plausible.sum(-1))
    assert is_plausible.gather(-1, token.unsqueeze(-1)).all()
    # the largest of what is plausible, which is not the largest sum; what min-p compares with
    masked = (base + aux).masked_fill(~is_plausible, -torch.inf)
    assert torch.equal(sample_logits(base, aux, temperature=0, **options)[0], masked.argmax(-1))
    assert torch.equal(sample_logits(base, aux, min_p=1.0, seed=1, **options)[0], masked.argmax(-1))


def test_each_row_has_its_own_parameters(impl):
    base, aux = torch.randn(7, 64, device=impl.device), torch.randn(7, 64, device=impl.device)
    by_row = {
        "temperature": torch.tensor([0.0, 0.3, 1.0, 1.0, 1.0, 1e-4, 2.0]),
        "top_k": torch.tensor([0, 0, 3, 1, 500, 7, 20]),
        "top_p": torch.tensor([1.0, 0.5, 1.0, 0.2, 0.9, 1.0, 0.7]),
        "min_p": torch.tensor([0.0, 0.1, 0.3, 0.0, 0.05, 0.0, 0.2]),
        "plausibility": torch.tensor([0.0, 0.0, 0.2, 0.0, 0.1, 0.3, 0.0]),
        "seed": torch.tensor([5, 4, 3, -2, 2**63 - 1, -(2**63), 0]),
        "position": torch.tensor([0, 1, 2, 3, 2**40, 2**63 - 1, 9]),
    }
    on_device = {name: values.to(impl.device) for name, values in by_row.items()}
    token, stats = sample_logits(base, aux, return_stats=True, backend=impl.backend, **on_device)
    for n in range(7):
        alone = {name: values[n].item() for name, values in by_row.items()}
        found, of_row = sample_logits(base[n], aux[n], return_stats=True, backend=impl.backend, **alone)
        assert found.shape == ()
        assert found == token[n]
        assert of_row.num_kept == stats.num_kept[n]
