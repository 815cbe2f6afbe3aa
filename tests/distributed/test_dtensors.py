"""Sources that are DTensors: what they mean, and what they do not."""

import re
from pathlib import Path

import dtensor_cases
import pytest
import sharded
import torch
from dtensor_cases import PLAIN
from inputs import logits, targets
from oracle import Case, assert_close, expected
from tolerance import assert_alike, check_results
from torch.distributed.tensor import Replicate, Shard

import auxkernels
from auxkernels import Logits, VocabShard, logit_stats

pytestmark = pytest.mark.timeout(120, func_only=True)  # not of the processes' start
short = {torch.float32: "f32", torch.bfloat16: "bf16"}.get
LAYOUTS = {
    "replicated rows": {},
    "all replicated but the weight": {"target": Replicate(), "scale": Replicate()},
    "rows in shards": {"hidden": Shard(1)},
    "rows and targets in shards": {"hidden": Shard(1), "target": Shard(1)},
    "batch in shards": {"hidden": Shard(0)},
}


def heads(vocab_size: int, dtype: torch.dtype, shape=(2, 5)) -> Case:
    bias = torch.randn(vocab_size).to(dtype).requires_grad_()
    scale = (torch.rand(shape) + 0.5).requires_grad_()
    aux = sharded.head(shape, vocab_size, 8, dtype, bias=bias, scale=scale)
    return Case(sharded.head(shape, vocab_size, 16, dtype), aux, targets(*shape, vocab_size=vocab_size, ignored=0.2))


def check(case: Case, of_ranks: list[dict], upstream=None) -> None:
    for of_rank in of_ranks:
        for name, value in of_rank.items():
            sharded.assert_same_bits(value, of_ranks[0][name])
    if any(name.startswith("weight") for name in case.leaves()):
        check_results(case, of_ranks[0], upstream)
        return
    for name, (want, error) in expected(case, upstream, confident=True).items():
        assert_close(name, of_ranks[0][name], want, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("world", [2, 3])
def test_heads(running, world, layout, dtype):
    for vocab_size in (5, 1000):
        case = heads(vocab_size, dtype)
        check(case, running.run(world, dtensor_cases.run_dtensors, case, layout))


def test_heads_of_a_real_vocabulary(running):
    case = heads(50257, torch.bfloat16)
    check(case, running.run(4, dtensor_cases.run_dtensors, case, {"hidden": Shard(1)}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_logits(running, world, dtype):
    for vocab_size in (4, 5, 50257):
        base, aux = (logits(2, 3, vocab_size, dtype=dtype, requires_grad=True) for _ in range(2))
        case = Case(Logits(base, softcap=8.0), aux, targets(2, 3, vocab_size=vocab_size, ignored=0.2))
        check(case, running.run(world, dtensor_cases.run_dtensors, case, {}))


def test_rows_that_are_all_ignored_on_one_process(running):
    """Of a sequence in shards: the process takes part in everything."""
    case = heads(50, torch.float32, (2, 6))
    case.target[:, 3:] = -100
    check(case, running.run(2, dtensor_cases.run_dtensors, case, {"hidden": Shard(1), "target": Shard(1)}))


def test_plain_sources_beside_dtensors_are_those_of_all_processes(running):
    case = heads(50, torch.float32)
    check(case, running.run(2, dtensor_cases.run_dtensors, case, {"aux[0]": PLAIN}))
    case = Case(logits(6, 50, requires_grad=True), heads(50, torch.float32, (6,)).aux, targets(6, vocab_size=50))
    check(case, running.run(2, dtensor_cases.run_dtensors, case, {"aux[0]": PLAIN}))
    case = heads(50, torch.float32)
    for layout in ({"weight": Replicate(), "base[0]": PLAIN}, {"weight": Replicate()}):
        found = running.tried(2, dtensor_cases.run_dtensors, case, layout)
        for _, error in found:  # nothing is sharded: replicated tensors are gathered by their user
            assert error[0] is TypeError and "got DTensor" in error[1]


def test_statistics(running):
    case = heads(50, torch.float32)
    want = logit_stats(case.base, case.aux, case.target)
    grads = sharded.stats_gradients(want, case)
    for of_rank in running.run(3, dtensor_cases.stats_of_dtensors, case, {"hidden": Shard(1)}):
        for name, value in vars(of_rank.pop("stats")).items():
            assert_alike(value, getattr(want, name).detach())
        for name, value in of_rank.items():
            assert_alike(value, grads[name])


def test_rows_in_shards_are_gathered_once_and_their_gradient_scattered(running):
    case = Case(sharded.head((2, 6), 50, 8, torch.float32), None, targets(2, 6, vocab_size=50))
    N, D = 12, 8
    for forward, backward in running.run(2, dtensor_cases.count_collectives, case, {"hidden": Shard(1)}):
        (gather, size), check, rows = forward
        assert gather.startswith("all_gather") and size == 4 * N * D // 2
        assert check == ("allgather_base", 416) and rows == ("allgather_base", 4 * (4 * N + 3))
        ((scatter, size),) = backward
        assert scatter.startswith("reduce_scatter") and size == 4 * N * D


# -- what says nothing -------------------------------------------------------------------------------------------------


def test_what_fsdp_has_sharded_is_no_vocabulary(running):
    """Never a number: its rows are columns of a vocabulary to no one but who says so."""
    hidden, weight, y = torch.randn(4, 8), torch.randn(12, 8), torch.tensor([0, 3, 7, 11])
    of_rank = [(hidden + rank, weight, y) for rank in range(2)]
    for _, error in running.tried(2, dtensor_cases.call_with_fully_sharded_head, of_rank=of_rank):
        assert error[0] is TypeError and "weight of base must be a plain tensor beside plain hidden states" in error[1]
        for way in ("forward", "one group", "register_fsdp_forward_method", "VocabShard.from_dtensor(weight)"):
            assert way in error[1]


def test_a_weight_whose_shard_is_given(running):
    case = Case(logits(4, 12), sharded.head((4,), 12, 8, torch.float32), torch.tensor([0, 3, 7, 11]))
    case.base = sharded.head((4,), 12, 16, torch.float32)
    check(case, running.run(2, dtensor_cases.with_shard_of_weight, case))


@pytest.mark.parametrize(
    "function, world, kind, said",
    [
        (dtensor_cases.call_with_other_bounds, 2, ValueError, "the shard and weight of"),
        # on all processes: torch numbers the groups of a new mesh, and those that took no part would count on behind
        (dtensor_cases.call_on_two_dimensions, 4, TypeError, "must be on a mesh of one dimension, got 2"),
        (dtensor_cases.call_with_partial_hidden, 2, TypeError, "hidden of base must be Replicate or cut along its"),
    ],
    ids=["bounds", "mesh", "partial"],
)
def test_what_cannot_be_meant(running, function, world, kind, said):
    case = Case(None, sharded.head((4,), 12, 8, torch.float32), torch.tensor([0, 3, 7, 11]))
    case.base = case.aux if function is dtensor_cases.call_with_other_bounds else None
    for _, error in running.tried(world, function, case, limit=60.0):
        assert error is not None and error[0] is kind and said in error[1], error


def test_sources_that_disagree(running):
    base, aux = (sharded.head((4,), size, 8, torch.float32) for size in (12, 10))
    for _, error in running.tried(2, dtensor_cases.call, Case(base, aux, torch.zeros(4).long()), {}, limit=60.0):
        assert error[0] is ValueError and "must hold the same columns" in error[1]
    case = Case(sharded.head((4,), 12, 8, torch.float32), logits(4, 12), torch.zeros(4).long())
    for _, error in running.tried(2, dtensor_cases.call, case, {"logits": Shard(0)}, limit=60.0):
        assert error[0] is TypeError and "aux must be Shard(-1) or Replicate" in error[1]


def test_a_shard_is_of_dtensors_that_are_cut():
    with pytest.raises(TypeError, match="tensor must be a DTensor, got Tensor"):
        VocabShard.from_dtensor(torch.zeros(2, 2))


def test_nothing_that_is_trained_is_gathered_by_full_tensor():
    """Its backward takes each process's own rows of what is a share of the gradient, and drops the others' shares."""
    package, found = Path(auxkernels.__file__).parent, []
    for path in package.rglob("*.py"):
        for line in path.read_text().splitlines():
            if re.search(r"\.full_tensor\(\)", line) and "models" not in path.parts:
                found.append(line.strip())
    assert len(found) == 1 and found[0].startswith("target = target.full_tensor()")
