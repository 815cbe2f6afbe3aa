"""Row statistics over a sharded vocabulary: their values and gradients are those of one process."""

import pytest
import sharded
import torch
from inputs import confident_row, logits, split_in_two, targets
from oracle import Case
from tolerance import assert_alike

from auxkernels import Logits, logit_stats

pytestmark = pytest.mark.timeout(120, func_only=True)  # not of the processes' start
V = 50


def one_process(case: Case) -> dict:
    stats = logit_stats(case.base, case.aux, case.target)
    return {"stats": sharded.detached(stats), **sharded.stats_gradients(stats, case)}


def check(running, case: Case, bounds, whole=()) -> dict:
    got = sharded.joined(case, running.run(len(bounds), sharded.stats_of_share, case, bounds, whole), bounds, whole)
    want = one_process(case)
    for name, value in vars(want.pop("stats")).items():
        if value is not None:
            assert_alike(getattr(got["stats"], name), value)
    for name, value in want.items():
        assert_alike(got[name], value)
    return got


def cases(dtype: torch.dtype, grad: bool) -> list[Case]:
    def pair():
        return [logits(3, 4, V, dtype=dtype, requires_grad=grad) for _ in range(2)]

    def head(width, **options):
        found = sharded.head((3, 4), V, width, dtype, **options)
        for tensor in (found.hidden, found.weight):
            tensor.requires_grad_(grad)
        return found

    y, scale = targets(3, 4, vocab_size=V, ignored=0.2), torch.rand(3, 4) + 0.5
    return [
        Case(*pair(), y),
        Case(pair()[0], None, y),
        Case(Logits(pair()[0], softcap=6.0), Logits(pair()[1], scale=scale), None),
        Case(head(16), head(8, scale=scale), y),
        Case([head(16), pair()[0]], [head(8), head(4)], y),
    ]


@pytest.mark.parametrize("grad", [False, True], ids=["values", "gradients"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_statistics_are_those_of_one_process(running, world, grad):
    for case in cases(torch.float32, grad):
        for make in sharded.LAYOUTS.values():
            check(running, case, make(V, world))


def test_bfloat16_logits_are_summed_in_float32(running):
    for case in cases(torch.bfloat16, True)[:3]:
        check(running, case, sharded.even(V, 3))


def test_a_sources_columns_may_be_held_by_all(running):
    case = cases(torch.float32, True)[3]
    check(running, case, sharded.even(V, 2), ("aux[0]",))


def test_a_loss_gives_the_same_statistics(running):
    for case in cases(torch.float32, True)[:2] + cases(torch.float32, True)[3:]:
        case.options |= {"return_stats": True}
        bounds = sharded.even(V, 3)
        got = sharded.joined(case, running.run(3, sharded.run_share, case, bounds), bounds)["stats"]
        want = logit_stats(case.base, case.aux, case.target)
        for name, value in vars(want).items():
            assert_alike(getattr(got, name), value.detach())


def test_the_lowest_of_equal_classes_is_the_likeliest(running):
    base = torch.zeros(3, V)
    base[1, [7, 30]] = 2.0
    base[2, [49, 20]] = torch.nan
    for make in sharded.LAYOUTS.values():
        bounds = make(V, 3)
        found = running.run(3, sharded.stats_of_share, Case(base, None, torch.tensor([49, 30, 0])), bounds)
        for stats in (of_rank["stats"] for of_rank in found):
            assert stats.argmax.tolist() == stats.base_argmax.tolist() == [0, 7, 20]
            assert stats.target_rank.tolist() == [0, 0, -1]


def test_entropies_of_confident_rows_are_accurate_relative_to_themselves(running):
    rows = torch.stack([confident_row(V, target, 1e-9, 30.0) for target in (0, 20, 49)])
    base, aux = split_in_two(rows)
    exact = (base.double() + aux.double()).log_softmax(-1)
    entropy = -(exact.exp() * exact).sum(-1)
    for of_rank in running.run(3, sharded.stats_of_share, Case(base, aux, None), sharded.even(V, 3)):
        assert ((of_rank["stats"].entropy - entropy).abs() <= 1e-4 * entropy).all()
