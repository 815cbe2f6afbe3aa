"""What is wrong on any process is an error on all of them, and none is left waiting.

That takes no time but for one exchange, which all of them reach, and which is the only one: nothing else is sent that a
process could wait for. How long a loaded machine takes to come so far is not tested.
"""

import pytest
import sharded
import torch

from auxkernels import Head, Logits, VocabShard, aux_cross_entropy, logit_stats
from auxkernels.distributed import row_state

pytestmark = pytest.mark.timeout(120, func_only=True)  # not of the processes' start
V, LIMIT = 12, 60.0  # seconds, after which a process that waits is stopped
CHECK = ("allgather_base", 416)


def arguments(**other) -> dict:
    return {"base": torch.zeros(4, 6), "aux": torch.zeros(4, 6), "target": torch.tensor([0, 3, 7, 11]), **other}


def shards(*bounds) -> list:
    return [(*bound, V) for bound in bounds]


def refused(running, of_rank, bounds=((0, 6), (6, 12)), function="loss") -> list[tuple]:
    """The error of each process. of_rank: arguments of each."""
    functions = function if isinstance(function, list) else [function] * len(of_rank)
    given = [(sharded.call, *one) for one in zip(functions, of_rank, shards(*bounds), strict=True)]
    found = running.run(len(of_rank), sharded.refusal, of_rank=given, limit=LIMIT)
    assert all(error is not None for error in found), found
    assert all(sent == [CHECK] for _, _, sent in found)
    errors = [error[:2] for error in found]
    # and they are still in step
    good = [("loss", arguments(), shard) for shard in shards((0, 6), (6, 12))]
    assert running.run(2, sharded.call, of_rank=good) == ["no error"] * 2
    return errors


def test_a_target_out_of_range_on_one_process(running):
    bad = arguments(target=torch.tensor([0, 3, 12, 11]))
    for of_rank in ([arguments(), bad], [bad, arguments()], [bad, bad]):
        for kind, text in refused(running, of_rank):
            assert kind is IndexError and "target[2] = 12" in text and f"[0, {V})" in text


def test_a_target_in_no_class_of_vocab_size(running):
    given = arguments(vocab_size=11)
    for kind, text in refused(running, [given, given]):
        assert kind is IndexError and "target[3] = 11" in text


@pytest.mark.parametrize(
    "other, kind, said",
    [
        ({"target": torch.tensor([0, 3, 7, 10])}, ValueError, "the targets: the rows of all processes"),
        ({"target": torch.tensor([3, 0, 7, 11])}, ValueError, "the targets: the rows of all processes"),
        ({"base": torch.zeros(5, 6), "aux": None, "target": torch.zeros(5).long()}, ValueError, "the number of rows: "),
        ({"base": torch.zeros(4, 6).double()}, ValueError, "dtypes"),
        ({"base": torch.zeros(4, 6).requires_grad_()}, ValueError, "require a gradient"),
        ({"label_smoothing": 0.1}, ValueError, "label_smoothing"),
        ({"weight": torch.ones(V)}, ValueError, "weight"),
        ({"reduction": "sum"}, ValueError, "reduction"),
        ({"normalizer": 3.0}, ValueError, "normalizer"),
        ({"return_stats": True}, ValueError, "return_stats"),
        ({"aux": torch.zeros(4, 5)}, ValueError, r"aux must have the shard's 6 columns"),
        ({"base": torch.zeros(4, 6).int()}, TypeError, "base must be float32"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be"),
        ({"backend": "reference"}, RuntimeError, "native"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_processes_that_do_not_make_the_same_call(running, other, kind, said):
    for of_rank in ([arguments(), arguments(**other)], [arguments(**other), arguments()]):
        for found, text in refused(running, of_rank):
            assert found is kind and said in text


def test_different_functions(running):
    for kind, text in refused(running, [arguments(), arguments()], function=["loss", "stats"]):
        assert kind is ValueError and "function" in text


@pytest.mark.parametrize("bounds", [((0, 6), (5, 11)), ((0, 6), (0, 6)), ((1, 7), (6, 12))], ids=str)
def test_columns_that_are_held_twice_or_never(running, bounds):
    for kind, text in refused(running, [arguments(), arguments()], bounds):
        assert kind is ValueError and "each of the 12 columns once" in text and str(bounds[1][0]) in text


def test_a_source_is_of_own_columns_or_of_all_on_every_process(running):
    of_rank = [arguments(aux=torch.zeros(4, 12)), arguments()]
    for kind, text in refused(running, of_rank):
        assert kind is ValueError and "source 1" in text


# -- without processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bounds, kind",
    [((0, 5, 4), ValueError), ((3, 2, 4), ValueError), ((-1, 2, 4), ValueError), ((0, 0, 0), ValueError)],
)
def test_a_shard_has_its_columns_in_order(bounds, kind):
    with pytest.raises(kind, match="shard must"):
        VocabShard(*bounds)


def test_a_shard_is_of_integers():
    with pytest.raises(TypeError, match="stop of shard must be an int, got float"):
        VocabShard(0, 4.0, 4)


def test_one_process_must_hold_all_columns():
    shard, logits, target = VocabShard(0, 3, 6), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    for call in (
        lambda: aux_cross_entropy(logits, None, target, shard=shard),
        lambda: logit_stats(logits, None, shard=shard),
    ):
        with pytest.raises(ValueError, match=r"must hold all 6 columns, got \[0, 3\)"):
            call()
    with pytest.raises(ValueError, match=r"must have its 6 columns, got widths \[3\]"):
        logit_stats(logits, None, shard=VocabShard(0, 6, 6))
    with pytest.raises(TypeError, match="shard must be a VocabShard, got tuple"):
        logit_stats(logits, None, shard=(0, 6))


# -- where nothing can be compared beforehand, as on GPU: rows that disagree are NaN -----------------------------------


def merged(targets, bounds) -> torch.Tensor:
    fields = {"max": torch.zeros(3), "log_denom": torch.zeros(3)}
    sent = [
        row_state.packed(fields, torch.tensor(y), *bound, 1.0, torch.float32)
        for y, bound in zip(targets, bounds, strict=True)
    ]
    return row_state.disagreeing(row_state.unpacked(torch.stack(sent), list(fields), True), V)


def test_rows_of_different_targets_are_known():
    big = 2**32
    found = merged([[1, 2, 3], [1, 2, 4]], [(0, 6), (6, 12)])
    assert found.tolist() == [False, False, True]
    assert merged([[1, big + 2, -100], [1, 2, -100]], [(6, 12), (0, 6)]).tolist() == [False, True, False]


@pytest.mark.parametrize("bounds", [[(0, 6), (5, 12)], [(0, 6), (7, 12)], [(0, 5), (5, 11)]], ids=str)
def test_columns_that_are_not_side_by_side_are_known(bounds):
    assert merged([[1, 2, 3]] * 2, bounds).all()
    assert not merged([[1, 2, 3]] * 3, [(6, 12), (6, 6), (0, 6)]).any()


# -- never without a word ----------------------------------------------------------------------------------------------


def test_gradients_of_what_all_hold_are_those_of_all_columns(running):
    """A source of all columns, and hidden states: not the own columns' share of the gradient alone."""
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(V, 3, requires_grad=True)
    given = arguments(base=Head(hidden, weight), aux=Logits(torch.randn(4, V, requires_grad=True)))
    want = torch.autograd.grad(aux_cross_entropy(**given), (hidden, weight, given["aux"].values))
    found = running.run(2, sharded.gradients_of_whole_sources, given, [(0, 6), (6, 12)])
    for of_rank in found:
        for one, two in zip(of_rank, want, strict=True):
            torch.testing.assert_close(one, two)
