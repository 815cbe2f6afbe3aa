"""The Triton kernels' arithmetic, interpreted on CPU: values and gradients against float64.

Interpreted and compiled kernels cannot live in one process, so an ordinary run starts this file once more with
TRITON_INTERPRET=1. The interpreter's bf16 is not to be trusted; that dtype waits for a GPU, where every test of the
other files runs through Triton.
"""

import pytest
import torch
from implementations import Implementation
from inputs import logits, targets
from interpreted import INTERPRETED, check_interpreted, compiles, interpreted
from oracle import Case, Rows, assert_close, check

from auxkernels import Logits, aux_cross_entropy, logit_stats

pytest.importorskip("triton")

from auxkernels.cross_entropy.triton import launch as cross_entropy
from auxkernels.tritonlib import launch

TRITON = Implementation("triton", "cpu")


@pytest.fixture(autouse=True)
def _many_segments(monkeypatch):
    """Small tiles and segments, so that every loop runs several times over rows of a few hundred columns."""
    if INTERPRETED:
        monkeypatch.setattr(cross_entropy, "cut_of", lambda V, num_bytes, *_: cross_entropy.Cut(4, 16 // num_bytes, 64))
        monkeypatch.setattr(cross_entropy, "tiles_at_once", lambda *_: 2)


@pytest.mark.slow
@compiles
def test_the_interpreted_kernels_pass():
    check_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("vocab_size", [1, 33, 300])  # one class, less than a tile, several segments with a ragged end
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("options", ["mean", "none", "everything"])
def test_loss_and_gradients_match_the_oracle(vocab_size, dtype, options):
    base, aux = (logits(3, vocab_size, dtype=dtype, requires_grad=True) for _ in range(2))
    target = targets(3, vocab_size=vocab_size)
    target[1] = -100
    given = {"mean": {}, "none": {"reduction": "none"}}.get(options)
    upstream = torch.randn(3) if options == "none" else None
    if options == "everything":
        weight = torch.rand(vocab_size) + 0.1
        given = {"weight": weight, "label_smoothing": 0.1, "z_loss": 1e-2, "normalizer": 7.0}
        base = Logits(base, scale=torch.tensor(0.7, requires_grad=True), softcap=4.0)
        aux = Logits(aux, scale=(torch.rand(3) + 0.5).requires_grad_())
    check(Case(base, aux, target, given), TRITON, upstream)


@interpreted
@pytest.mark.parametrize("has_gradient", [False, True])
@pytest.mark.parametrize("option", ["mean", "weight", "normalizer", "sum"])
def test_sums_over_many_rows_are_those_of_few(monkeypatch, has_gradient, option):
    """11 rows in blocks of 2, whose 6 sums are three blocks again."""
    base, aux = logits(11, 9), logits(11, 9, requires_grad=has_gradient)
    target = targets(11, vocab_size=9)
    target[[2, 6, 7]] = -100
    given = {
        "weight": {"weight": torch.rand(9) + 0.1},
        "normalizer": {"normalizer": 7.0},
        "sum": {"reduction": "sum"},
    }
    case = Case(base, aux, target, given.get(option, {}))
    few = check(case, TRITON)
    monkeypatch.setattr(cross_entropy, "FEW_ROWS", 4)
    monkeypatch.setattr(cross_entropy, "REDUCE_BLOCK", 2)
    many = check(case, TRITON)
    for name, value in few.items():
        # float64 sums in another order: the same float32, but for a tie
        torch.testing.assert_close(many[name], value, rtol=2**-23, atol=0)


@interpreted
@pytest.mark.parametrize("multiprocessors", [0, 1, 100])  # of a CPU; programs that walk all blocks; one a block
@pytest.mark.parametrize("has_target", [True, False])
def test_rescaling_reaches_every_column_but_those_of_ignored_rows(monkeypatch, multiprocessors, has_target):
    monkeypatch.setattr(launch, "device_of", lambda _: launch.Device("cpu", multiprocessors, 32))
    monkeypatch.setattr(cross_entropy, "RESCALE_BLOCK", 16)
    monkeypatch.setattr(cross_entropy, "RESCALE_PROGRAMS", 2)
    grad, target = logits(5, 35), targets(5, vocab_size=35)
    target[[1, 4]] = -100
    before = grad.clone()
    cross_entropy.rescale_(grad, torch.tensor(1.0), target if has_target else None, -100)
    assert torch.equal(grad, before)
    kept = target != -100 if has_target else torch.ones(5, dtype=torch.bool)
    grad[~kept] = 0.0
    before[~kept] = 0.0
    cross_entropy.rescale_(grad, torch.tensor(-0.5), target if has_target else None, -100)
    assert torch.equal(grad[kept], before[kept] * -0.5)
    assert not grad[~kept].signbit().any() and not grad[~kept].any()
    cross_entropy.rescale_(grad, torch.tensor(torch.inf), target if has_target else None, -100)
    assert torch.equal(grad[kept], before[kept] * -torch.inf) and not grad[~kept].any()


@interpreted
def test_masked_blocks_and_poisoned_rows_stay_in_their_rows():
    base, aux = logits(5, 300), logits(5, 300)
    base[0, 64:192] = -torch.inf
    aux[1, 7] = torch.nan
    base[2] = -torch.inf
    base[3] = torch.nan
    aux.requires_grad_()
    target = torch.tensor([3, 3, 3, -100, 299])
    loss = aux_cross_entropy(base, aux, target, reduction="none", backend="triton")
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, True, False, False]
    assert aux.grad.isnan().all(-1).tolist() == [False, True, True, False, False]
    assert not aux.grad[0, 64:192].any() and loss[3] == 0 and not aux.grad[3].any()
    kept = [0, 4]
    check(Case(base[kept], aux.detach()[kept].requires_grad_(), target[kept]), TRITON)


@interpreted
@pytest.mark.parametrize("bad", [-1, 300, 2**31, 2**32 + 5, -(2**63), 2**63 - 1])
def test_a_target_out_of_range_poisons_its_row_alone(bad):
    base, aux = logits(3, 300), logits(3, 300, requires_grad=True)
    target = torch.tensor([5, bad, 7])
    loss = aux_cross_entropy(base, aux, target, reduction="none", backend="triton")
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, False]
    assert aux.grad.isnan().all(-1).tolist() == [False, True, False]
    ranks = logit_stats(base, aux, target, backend="triton").target_rank.tolist()
    assert ranks[1] == -1 and min(ranks[0], ranks[2]) >= 0


@interpreted
@pytest.mark.parametrize("vocab_size, is_split", [(1, False), (33, True), (300, False), (300, True)])
def test_ranks_count_what_is_greater_and_no_tie(monkeypatch, vocab_size, is_split):
    monkeypatch.setattr(launch, "is_split", lambda *_: is_split)
    base, aux = (logits(6, vocab_size, dtype=torch.float16).round() for _ in range(2))
    target = targets(6, vocab_size=vocab_size)
    base[0], target[1], target[2] = -torch.inf, -100, vocab_size - 1
    aux[3, target[3]] = -torch.inf
    s = (base.double() + aux.double()).masked_fill(torch.tensor([0, 1, 0, 0, 0, 0], dtype=torch.bool)[:, None], 0.0)
    want = vocab_size - (s <= s.gather(-1, target.clamp(min=0)[:, None])).sum(-1)
    want[:2] = -1
    if vocab_size == 1:
        want[3] = -1  # of -inf alone
    _, with_loss = aux_cross_entropy(base, aux, target, return_stats=True, backend="triton")
    for stats in (logit_stats(base, aux, target, backend="triton"), with_loss):
        assert torch.equal(stats.target_rank, want)
    narrow = logit_stats(base, aux, target.clamp(max=0), vocab_size=1, backend="triton")
    is_of_minus_inf = bool(target[3] == 0)
    assert narrow.target_rank.tolist() == [-1, -1, 0, -1 if is_of_minus_inf else 0, 0, 0]


@interpreted
def test_statistics_match_the_oracle():
    base, aux = logits(4, 300), logits(4, 300)
    target = targets(4, vocab_size=300)
    target[2] = -100
    got = logit_stats(base, aux, target, backend="triton")
    want = logit_stats(base.double(), aux.double(), target, backend="reference")
    rows = Rows(Case(base, aux, target))
    error = (8 * rows.eps * (4 + rows.sum.log_d + rows.sum.max.abs() + rows.base.max.abs())).squeeze(-1)
    for name, value in vars(want).items():
        if value.is_floating_point():
            assert_close(name, getattr(got, name), value, error)
        else:
            assert torch.equal(getattr(got, name), value)
