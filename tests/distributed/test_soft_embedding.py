"""Mixtures of label embeddings that are sharded over processes, against float64 on one process."""

import pytest
import sharded
import sharded_lookups
import torch
from inputs import head, logits
from soft_oracle import Case, blind_to, called, check_results, unsure_rows
from tolerance import assert_alike

from auxkernels import Logits, VocabShard, soft_embedding

pytestmark = pytest.mark.timeout(120, func_only=True)  # not of the processes' start
short = {torch.float32: "f32", torch.bfloat16: "bf16"}.get
LIMIT = 60.0  # seconds, after which a process that waits is stopped


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


def layouts(K: int) -> list[list[tuple[int, int]]]:
    return [make(K, world) for world in (2, 3, 4) for make in sharded.LAYOUTS.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("K", [1025, 5, 4])
def test_mixtures_and_gradients(running, K, dtype):
    for case, whole in cases(K, dtype):
        sharded_lookups.check(running, case, layouts(K), case.upstream(), whole)


STATS = ("out", "entropy", "max_prob", "sum_squares", "usage", "row_entropy")


def option_cases(K: int, dtype: torch.dtype) -> dict[str, Case]:
    shape, D = (3, 4), 6

    def scores(**options):
        return Logits(2 * logits(*shape, K, dtype=dtype).requires_grad_(), **options)

    def table(*tables):
        return torch.randn(*tables, K, D).to(dtype).requires_grad_()

    T, one = (torch.rand(shape) + 0.4).requires_grad_(), torch.tensor(0.7, requires_grad=True)
    mask = torch.rand(*shape, K) < 0.3
    mask[0, 0], mask[0, 1, K // 2 :] = True, True
    noise = {"gumbel": 0.8, "seed": 5}
    of_head = head(*shape, vocab_size=K, width=9, bias=True, dtype=dtype)
    return {
        "hard": Case(scores(), table(), {"hard": True, "temperature": T, "mask": mask}),
        "noise": Case(scores(scale=torch.tensor(0.9, requires_grad=True)), table(2), {"temperature": one, **noise}),
        "hard noise": Case(of_head, table(2), {"hard": True, "mask": mask, **noise}),
        "clean": Case(scores(), table(), {"hard": True, "clean_gradient": True, "temperature": T, **noise}),
        "top_k": Case(scores(), table(), {"top_k": 3, "temperature": 0.6}),
        "top_k noise": Case(of_head, table(3), {"top_k": 2, "temperature": T, "mask": mask, **noise}),
        "hard top_k": Case([scores(), scores(scale=-0.4)], table(), {"top_k": 2, "hard": True, "temperature": one}),
        "clean top_k": Case(
            scores(softcap=6.0),
            table(),
            {"top_k": 3, "hard": True, "clean_gradient": True, "temperature": T, "mask": mask, **noise},
        ),
        "no option": Case(scores(), table(), {"temperature": T, "mask": mask}),
    }


OPTIONS = list(option_cases(2, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("K", [131, 5, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_those_of_one_process(running, name, K, dtype):
    """With the gradient of the mixture alone, and of the statistics too."""
    case = option_cases(K, dtype)[name]
    for upstream in (case.upstream(), case.upstream(*STATS)):
        sharded_lookups.check(running, case, layouts(K), upstream)


def test_one_process_has_the_bits_of_no_shard():
    for case, _ in cases(20, torch.float32):
        upstream = case.upstream()
        want = case.run("auto", upstream)
        case.options["shard"] = VocabShard(0, 20, 20)
        for name, value in case.run("auto", upstream).items():
            assert torch.equal(value, want[name])


EDGES = [{}, {"hard": True}, {"top_k": 2}, {"top_k": 2, "hard": True}]


@pytest.mark.parametrize("options", EDGES, ids=map("-".join, EDGES))
def test_confident_rows_have_the_results_of_one_process(running, options):
    """Where a process has all but 1e-9 of the probability, and where it has 1e-9."""
    scores = torch.full((4, 10), -20.0) + torch.randn(4, 10)
    scores[torch.arange(4), torch.tensor([0, 4, 5, 9])] = 0.0
    case = Case(scores.requires_grad_(), torch.randn(10, 6, requires_grad=True), options)
    for upstream in (case.upstream(), case.upstream(*STATS)):
        sharded_lookups.check(running, case, [sharded.even(10, 2), sharded.uneven(10, 3)], upstream)


@pytest.mark.parametrize("options", EDGES, ids=map("-".join, EDGES))
def test_rows_of_infinities_and_nan(running, options):
    scores = logits(7, 10)
    scores[0] = -torch.inf
    scores[1, :5] = -torch.inf
    scores[2, 7] = torch.nan
    scores[3, [1, 8]] = torch.inf
    scores[4, [2, 9]] = torch.nan
    case = Case(scores.requires_grad_(), torch.randn(10, 6, requires_grad=True), options)
    upstream, bounds = case.upstream("out", "entropy", "sum_squares", "max_prob"), sharded.even(10, 2)
    got = sharded_lookups.joined(running.run(2, sharded_lookups.run_share, case, bounds, upstream), bounds)
    want = case.run("native", upstream)
    assert (got["out"][0] == 0).all() and got["out"][2].isnan().all() and not got["out"][[0, 1, 5, 6]].isnan().any()
    is_good = [0, 1, 5, 6]
    for name in ("out", "entropy", "max_prob", "sum_squares", "grad values 0"):
        assert_alike(got[name][is_good], want[name][is_good])
        assert torch.equal(got[name].isnan(), want[name].isnan()) and want[name][2:5].isnan().any()
    rows = [0, 1, 2, 4, 5, 6]  # of two +inf neither is the likeliest
    assert torch.equal(got["argmax"][rows], want["argmax"][rows]) and want["argmax"].tolist()[4] == 2
    assert torch.equal(got["usage"].isnan(), want["usage"].isnan()) and want["usage"].isnan().any()


@pytest.mark.parametrize("options", EDGES[1:], ids=map("-".join, EDGES[1:]))
def test_among_equals_the_lowest_label_of_all_processes_is_first(running, options):
    scores = torch.randint(0, 3, (64, 12)).float().requires_grad_()
    case = Case(scores, torch.randn(12, 5, requires_grad=True), options)
    for make in sharded.LAYOUTS.values():
        bounds, upstream = make(12, 4), case.upstream("out", "entropy")
        got = sharded_lookups.joined(running.run(4, sharded_lookups.run_share, case, bounds, upstream), bounds)
        want = case.run("native", upstream)
        assert torch.equal(got["argmax"], want["argmax"])
        assert torch.equal(got["grad values 0"] == 0, want["grad values 0"] == 0)  # the same labels are kept


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"hard": True, "gumbel": 1.0, "seed": 2}], ids="-".join)
def test_chunks_of_rows(running, options):
    case = Case(head(600, vocab_size=21, width=5), torch.randn(21, 4, requires_grad=True), options)
    upstream, bounds = case.upstream(*STATS), sharded.even(21, 2)
    whole, cut = (
        sharded_lookups.joined(running.run(2, run, case, bounds, upstream), bounds)
        for run in (sharded_lookups.run_share, sharded_lookups.run_in_chunks)
    )
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", EDGES, ids=map("-".join, EDGES))
def test_no_rows(running, options):
    case = Case(
        logits(0, 12, requires_grad=True), torch.randn(2, 12, 4, requires_grad=True), {**options, "gumbel": 0.5}
    )
    upstream, bounds = case.upstream("out", "entropy", "usage"), sharded.even(12, 3)
    got = sharded_lookups.joined(running.run(3, sharded_lookups.run_share, case, bounds, upstream), bounds)
    assert got["out"].shape == (2, 0, 4) and not got["usage"].any() and got["usage"].shape == (12,)
    assert got["grad values 0"].shape == (0, 12) and not got["grad table"].any()


@pytest.mark.parametrize("options", [{"top_k": 3}, {"hard": True}], ids="-".join)
def test_noise_without_a_seed_is_the_same_on_all_processes(running, options):
    """Their generators are not; and it is drawn anew for each call."""
    case = Case(torch.zeros(40, 20), torch.randn(20, 3), {**options, "gumbel": 1.0})
    found = running.run(3, sharded_lookups.chosen_twice, case, sharded.even(20, 3))
    assert all(torch.equal(one[0], found[0][0]) and torch.equal(one[1], found[0][1]) for one in found)
    assert not torch.equal(*found[0])


@pytest.mark.parametrize("options", [{}, {"hard": True}, {"top_k": 2}], ids="-".join)
def test_backward_repeats_and_is_not_differentiated_twice(running, options):
    case = Case(logits(5, 12, requires_grad=True), torch.randn(12, 4, requires_grad=True), options)
    for repeats, error in running.run(2, sharded_lookups.differentiated_twice, case, sharded.even(12, 2)):
        assert repeats and "soft_embedding cannot be differentiated twice" in error


@pytest.mark.parametrize("options", EDGES, ids=map("-".join, EDGES))
def test_autocast(running, options):
    case = Case(head(4, 3, vocab_size=12, width=5), torch.randn(12, 6, requires_grad=True), {"temperature": 0.5})
    case.options |= options
    with torch.autocast("cpu", torch.bfloat16):
        exact = called(case, {})
    unsure, _ = unsure_rows(case, exact, torch.bfloat16)
    upstream, bounds = blind_to(unsure, case.upstream()), sharded.even(12, 3)
    shares = running.run(3, sharded_lookups.run_under_autocast, case, bounds, upstream)
    got = sharded_lookups.joined(shares, bounds)
    assert got["out"].dtype == torch.bfloat16 and got["grad weight 0"].dtype == torch.float32
    check_results(case, got, upstream, products=torch.bfloat16, unsure=unsure)


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


def test_what_options_send(running):
    """Of hard choices the likeliest label too, of statistics four numbers more and the usage, of top_k 2 k of a row;
    backward one number of a row."""
    N, K, D = 12, 20, 6
    bounds, scores, table = (
        sharded.even(K, 2),
        logits(N, K, requires_grad=True),
        torch.randn(K, D, requires_grad=True),
    )
    check, mixture = ("allgather_base", 416), ("allreduce", 4 * N * D)
    rows, again = [("allgather_base", 4 * (n * N + 3)) for n in range(7)], ("allgather_base", 4 * N)
    noise, drawn = {"gumbel": 1.0, "seed": 1}, ("allgather_base", 8)
    for options, forward, backward in (
        ({"hard": True}, [rows[3], mixture], [again]),
        ({"hard": True, "clean_gradient": True, **noise}, [rows[2], rows[3], mixture], [again]),
        ({"gumbel": 1.0}, [drawn, rows[2], mixture], []),
        ({"return_stats": True}, [rows[5], mixture, ("allreduce", 4 * K)], []),
        ({"top_k": 3}, [rows[6], mixture], [again]),
        ({"top_k": 3, "return_stats": True}, [rows[6], mixture, rows[5]], [again]),  # and the rows' own entropy
    ):
        case = Case(scores, table, options)
        for found in running.run(2, sharded_lookups.count_collectives, case, bounds):
            assert found == ([check, *forward], backward), options


# -- wrong use ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other, kind, said",
    [
        ({"hard": True}, ValueError, "disagree about options"),
        ({"gumbel": 1.0}, ValueError, "disagree about options"),
        ({"gumbel": 1.0, "seed": 3}, ValueError, "disagree about options"),
        ({"top_k": 2}, ValueError, "disagree about options"),
        ({"return_stats": True}, ValueError, "return_stats"),
        ({"clean_gradient": True}, ValueError, "clean_gradient needs hard=True"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1"),
        ({"seed": torch.zeros(2).long()}, ValueError, "seed must be a 0-d int64 tensor"),
        ({"temperature": torch.tensor(0.5)}, ValueError, "disagree about options"),
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
        of_rank = [(sharded_lookups.call, *one) for one in zip(pair, shards, strict=True)]
        for found, text, sent in running.run(2, sharded.refusal, of_rank=of_rank, limit=LIMIT):
            assert found is kind and said in text
            assert sent == [("allgather_base", 416)]  # there is nothing else to wait for


def test_a_table_of_fsdps_shards_is_no_table_of_labels(running):
    for _, error in running.tried(2, sharded_lookups.table_of_shards_alone, torch.zeros(2, 10), torch.zeros(10, 3)):
        assert error[0] is TypeError and "table must be a plain tensor, got DTensor" in error[1]


def test_one_process_must_hold_all_labels():
    with pytest.raises(ValueError, match="must hold all 6 labels"):
        soft_embedding(torch.zeros(2, 3), torch.zeros(3, 2), shard=VocabShard(0, 3, 6))
    with pytest.raises(TypeError, match="shard must be a VocabShard"):
        soft_embedding(torch.zeros(2, 3), torch.zeros(3, 2), shard=3)
