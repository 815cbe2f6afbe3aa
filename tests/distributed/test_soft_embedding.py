"""Mixtures of label embeddings that are sharded over processes, against float64 on one process."""

import pytest
import sharded
import sharded_lookups
import torch
from inputs import head, logits
from soft_oracle import Case, check_results
from tolerance import assert_alike

from auxkernels import Logits, VocabShard, soft_embedding

pytestmark = pytest.mark.timeout(120, func_only=True)  # not of the processes' start
short = {torch.float32: "f32", torch.bfloat16: "bf16"}.get
LIMIT = 60.0  # seconds: none waits, which gloo would for half an hour


def cases(K: int, dtype: torch.dtype) -> list[tuple[Case, tuple[str, ...]]]:
    """(case, tensors that all processes hold whole)."""
    shape, D = (3, 4), 6

    def scores(**options):
        return Logits(logits(*shape, K, dtype=dtype, requires_grad=True), **options)

    def table(*tables):
        return torch.randn(*tables, K, D).to(dtype).requires_grad_()

    T, one = (torch.rand(shape) + 0.4).requires_grad_(), torch.tensor(0.7, requires_grad=True)
    scale, mask = (torch.rand(shape) + 0.5).requires_grad_(), torch.rand(*shape, K) < 0.3
    mask[0, 0], mask[0, 1, K // 2 :] = True, True
    return [
        (Case(scores(), table()), ()),
        (Case(scores(scale=scale), table(3), {"temperature": T}), ()),
        (Case(scores(softcap=4.0), table(), {"temperature": one, "mask": mask}), ()),
        (Case(head(*shape, vocab_size=K, width=9, bias=True, dtype=dtype), table(), {"temperature": 0.3}), ()),
        (Case([scores(), scores(scale=-0.5)], table(), {"mask": mask[0, 1]}), ("values 1", "table")),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("K", [1025, 5, 4])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_mixtures_and_gradients(running, world, K, dtype):
    for case, whole in cases(K, dtype):
        for make in sharded.LAYOUTS.values():
            upstream, bounds = case.upstream(), make(K, world)
            shares = running.run(world, sharded_lookups.run_share, case, bounds, upstream["out"], whole)
            got = sharded_lookups.joined(shares, bounds, whole)
            assert got["out"].dtype == case.table.dtype
            check_results(case, got, upstream, more=sharded_lookups.of_rounded_mixtures(case, upstream))


def test_one_process_has_the_bits_of_no_shard():
    for case, _ in cases(20, torch.float32):
        upstream = case.upstream()
        want = case.run("auto", upstream)
        case.options["shard"] = VocabShard(0, 20, 20)
        for name, value in case.run("auto", upstream).items():
            assert torch.equal(value, want[name])


def test_confident_rows_have_the_gradient_of_one_process(running):
    """Where a process has all but 1e-9 of the probability, and where it has 1e-9."""
    scores = torch.full((4, 10), -20.0) + torch.randn(4, 10)
    scores[torch.arange(4), torch.tensor([0, 4, 5, 9])] = 0.0
    case = Case(scores.requires_grad_(), torch.randn(10, 6, requires_grad=True))
    upstream, bounds = case.upstream(), sharded.even(10, 2)
    got = sharded_lookups.joined(running.run(2, sharded_lookups.run_share, case, bounds, upstream["out"]), bounds)
    check_results(case, got, upstream)


def test_rows_of_minus_infinity_and_nan(running):
    scores = logits(4, 10)
    scores[0] = -torch.inf
    scores[1, :5] = -torch.inf
    scores[2, 7] = torch.nan
    case, bounds = Case(scores.requires_grad_(), torch.randn(10, 6, requires_grad=True)), sharded.even(10, 2)
    upstream = case.upstream()
    shares = running.run(2, sharded_lookups.run_share, case, bounds, upstream["out"])
    got, want = sharded_lookups.joined(shares, bounds), case.run("native", upstream)
    assert (got["out"][0] == 0).all() and got["out"][2].isnan().all() and not got["out"][[0, 1, 3]].isnan().any()
    assert got["grad values 0"][2].isnan().all()
    for name in ("out", "grad values 0"):
        rows = [0, 1, 3]
        assert_alike(got[name][rows], want[name][rows])


@pytest.mark.parametrize("is_hidden_cut", [False, True], ids=["replicated", "cut"])
def test_dtensors(running, is_hidden_cut):
    made = {"vocab_size": 11, "width": 9}
    sources = [head(6, **made), *([] if is_hidden_cut else [logits(6, 11, requires_grad=True)])]
    for source in sources:
        for table in (torch.randn(11, 5, requires_grad=True), torch.randn(2, 11, 5, requires_grad=True)):
            case = Case(source, table, {"temperature": 0.5})
            upstream = case.upstream()
            for got in running.run(3, sharded_lookups.run_dtensors, case, upstream["out"], is_hidden_cut):
                check_results(case, got, upstream)


def test_what_is_sent(running):
    """Two numbers of a row, and the mixture; backward nothing, but for what all processes hold."""
    N, K, D = 12, 20, 6
    case, bounds = Case(logits(N, K, requires_grad=True), torch.randn(K, D, requires_grad=True)), sharded.even(K, 2)
    want = [("allgather_base", 416), ("allgather_base", 4 * (2 * N + 3)), ("allreduce", 4 * N * D)]
    for forward, backward in running.run(2, sharded_lookups.count_collectives, case, bounds):
        assert forward == want and backward == []
    case = Case(head(N, vocab_size=K, width=9), case.table)
    for forward, backward in running.run(2, sharded_lookups.count_collectives, case, bounds):
        assert forward == want and backward == [("allreduce", 4 * N * 9)]


# -- wrong use ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other, kind, said",
    [
        ({"hard": True}, ValueError, "hard must not be given"),
        ({"gumbel": 1.0}, ValueError, "gumbel must not be given"),
        ({"top_k": 2}, ValueError, "top_k must not be given"),
        ({"return_stats": True}, ValueError, "return_stats must not be given"),
        ({"temperature": 0.5}, ValueError, "disagree about options"),
        ({"temperature": -1.0}, ValueError, "temperature must be positive"),
        ({"table": torch.zeros(4, 3)}, ValueError, "table must have a row for each of the shard's 5 labels"),
        ({"table": torch.zeros(5, 4)}, ValueError, "disagree about function"),
        ({"logits": torch.zeros(3, 5)}, ValueError, "the number of rows"),
        ({"mask": torch.zeros(5, dtype=torch.bool)}, ValueError, "mask must be"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_processes_that_do_not_make_the_same_call(running, other, kind, said):
    good = {"logits": torch.zeros(2, 5), "table": torch.zeros(5, 3)}
    shards = [(0, 5, 10), (5, 10, 10)]
    for pair in ([good, good | other], [good | other, good]):
        of_rank = list(zip(pair, shards, strict=True))
        for _, error in running.tried(2, sharded_lookups.call, of_rank=of_rank, limit=LIMIT):
            assert error is not None and error[0] is kind and said in error[1]


def test_a_table_of_fsdps_shards_is_no_table_of_labels(running):
    for _, error in running.tried(2, sharded_lookups.table_of_shards_alone, torch.zeros(2, 10), torch.zeros(10, 3)):
        assert error[0] is TypeError and "table must be a plain tensor, got DTensor" in error[1]


def test_one_process_must_hold_all_labels():
    with pytest.raises(ValueError, match="must hold all 6 labels"):
        soft_embedding(torch.zeros(2, 3), torch.zeros(3, 2), shard=VocabShard(0, 3, 6))
    with pytest.raises(TypeError, match="shard must be a VocabShard"):
        soft_embedding(torch.zeros(2, 3), torch.zeros(3, 2), shard=3)
