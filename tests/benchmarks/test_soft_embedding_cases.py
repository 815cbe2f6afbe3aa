"""What the soft_embedding cases promise: a strict float64 check of every output, and floors of the right size."""

import math
import random

import pytest
import torch

from benchmarks.soft_embedding import cases as soft_embedding
from benchmarks.soft_embedding.cases import Spec
from benchmarks.soft_embedding.inputs import MODES, SEED, TEMPERATURE, Mode, make_inputs
from benchmarks.soft_embedding.oracle import LookupOracle
from benchmarks.timing import harness, thresholds
from benchmarks.timing.harness import Implementation, Settings

CPU = torch.device("cpu")
SETTINGS = Settings(rounds=2, seconds=1.0, minimum_rounds=1, rng=random.Random(0))
SHAPE = (65, 130, 24)


def rows_with(function, pass_name="training", dtype="fp32", inputs="flat", role="ours"):
    """The rows of the yardstick and of `function(mode, scores, table, segment_ids)`, which stands where ours would."""
    case = soft_embedding.build(Spec(pass_name, SHAPE, dtype, inputs), CPU, seed=0)
    mode = MODES[pass_name]
    drawn = Mode(is_autocast=mode.is_autocast, is_planner=mode.is_planner, top_k=mode.top_k)
    given = soft_embedding._inputs(SHAPE, dtype, inputs, drawn, "cpu", 0)
    call = lambda: soft_embedding.lookup_call(lambda *xs: function(mode, *xs), mode, given)  # noqa: E731
    case.implementations = [case.implementations[0], Implementation("candidate", call, role)]
    return harness.run_case(case, SETTINGS)


def accurate(mode, scores, table, segment_ids, seed=SEED, temperature=TEMPERATURE):
    """In float64, from scores and tables of any dtype."""
    from auxkernels.soft_embedding import noise

    u = scores.double()
    if mode.gumbel:
        u = u + mode.gumbel * noise.gumbel(*u.shape, torch.tensor(seed), torch.float64)
    if mode.hard:
        return table[u.argmax(1)]
    if mode.top_k:
        kept = u.topk(mode.top_k).indices
        u = torch.full_like(u, -math.inf).scatter(1, kept, u.gather(1, kept))
    with torch.autocast("cpu", enabled=False):
        mixture = torch.softmax(u / temperature, -1) @ table.double()
    mixture = mixture.to(torch.bfloat16 if mode.is_autocast else table.dtype)
    return mixture if segment_ids is None else mixture.index_select(-2, segment_ids)


@pytest.mark.slow
@pytest.mark.parametrize("pass_name", soft_embedding.PASSES)
@pytest.mark.parametrize("inputs", ["flat", "peaked"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_accurate_result_is_timed(pass_name, inputs, dtype):
    yardstick, candidate = rows_with(accurate, pass_name, dtype, inputs)
    assert (yardstick["status"], candidate["status"]) == ("ok", "ok")
    names = ["mixture", "dscores", "dtable"] if MODES[pass_name].is_training else ["mixture"]
    assert list(candidate["fp64_error"]) == names
    assert list(yardstick["fp64_error"]) == ([] if MODES[pass_name].gumbel else names)


@pytest.mark.slow
@pytest.mark.parametrize("pass_name", ["forward", "training", "planner", "gumbel", "decode_top_k"])
@pytest.mark.parametrize(
    "wrong",
    [
        lambda *xs: accurate(*xs, temperature=TEMPERATURE * (1 + 1e-4)),
        lambda *xs: accurate(*xs) * (1 + 1e-5),
        lambda *xs: accurate(*xs) * math.nan,
        lambda mode, scores, table, ids: accurate(mode, scores, table.bfloat16(), ids).to(table.dtype),
        lambda *xs: accurate(*xs)[..., :-1],
    ],
    ids=["other temperature", "off by a hundred-thousandth", "NaN", "table in bfloat16", "a column missing"],
)
def test_a_wrong_result_is_not_timed(wrong, pass_name):
    _, candidate = rows_with(wrong, pass_name, inputs="peaked")
    assert candidate["time_us"] is None
    assert candidate["status"].startswith(("wrong: mixture", "failed: RuntimeError"))


@pytest.mark.slow
@pytest.mark.parametrize("index, name", [(0, "dscores"), (1, "dtable")])
@pytest.mark.parametrize("error", [1e-3, math.nan])
def test_a_wrong_gradient_is_not_timed(index, name, error):
    def function(mode, *arguments):
        arguments = list(arguments)
        arguments[index] = arguments[index].view_as(arguments[index])
        factor = torch.ones(len(arguments[index]), 1)
        factor[7] += error
        arguments[index].register_hook(lambda gradient: gradient * factor)
        return accurate(mode, *arguments)

    _, candidate = rows_with(function)
    assert candidate["status"].startswith(f"wrong: {name} error")


@pytest.mark.slow
def test_ours_is_held_to_its_noise_and_a_baseline_to_finite_values():
    other_seed = lambda *xs: accurate(*xs, seed=SEED + 1)  # noqa: E731
    assert rows_with(other_seed, "gumbel")[1]["status"].startswith("wrong: mixture")
    assert rows_with(other_seed, "gumbel", role="baseline")[1]["status"] == "ok"
    nan = lambda *xs: accurate(*xs) * math.nan  # noqa: E731
    assert rows_with(nan, "gumbel", role="baseline")[1]["status"] == "wrong: mixture is not finite"


def test_a_baseline_of_other_mathematics_is_not_timed():
    other = lambda *xs: accurate(*xs, temperature=1.0)  # noqa: E731
    for dtype in ("fp32", "bf16"):
        assert rows_with(other, dtype=dtype, inputs="peaked", role="baseline")[1]["status"].startswith("wrong: ")


def test_segments_share_rows_and_lie_in_order():
    inputs = make_inputs((4096, 33, 8), torch.float32, "flat", MODES["planner"], CPU, 0)
    assert inputs.sizes() == (10, 200, 4096, 33, 8)
    assert inputs.segment_ids.diff().min() >= 0
    assert inputs.segment_ids.min() >= 0 and inputs.segment_ids.max() < 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", ["flat", "peaked"])
def test_no_tie_decides_which_labels_lead(dtype, inputs):
    scores = make_inputs((64, 5000, 4), dtype, inputs, MODES["decode_top_k"], CPU, 0).scores
    leaders = scores.double().topk(soft_embedding.TOP_K + 1).values
    assert torch.equal(leaders[:, :-1] - leaders[:, 1:], torch.full((64, soft_embedding.TOP_K), 0.25).double())


@pytest.mark.parametrize(
    "pass_name, flops, elements",
    [
        ("forward", lambda n, k, d: 2 * n * k * d, lambda n, k, d: n * k + k * d + n * d),
        ("training", lambda n, k, d: 6 * n * k * d, lambda n, k, d: 3 * n * k + 3 * k * d + 2 * n * d),
        ("straight_through", lambda n, k, d: 0, lambda n, k, d: n * k + 2 * n * d),
        ("decode_top_k", lambda n, k, d: 0, lambda n, k, d: n * k + 17 * n * d),
        ("planner", lambda n, k, d: 20 * 4 * k * d, lambda n, k, d: 4 * k + 10 * (k * d + n * d)),
    ],
)
def test_floors_are_what_the_pass_cannot_do_without(pass_name, flops, elements):
    shape = (82, 33, 16)
    case = soft_embedding.build(Spec(pass_name, shape, "fp32", "flat"), CPU, seed=0)
    assert (case.floor_flops, case.floor_bytes) == (flops(*shape), 4 * elements(*shape))
    floors = [i for i in case.implementations if i.role == "floor"]
    assert len(floors) == (2 if case.floor_flops else 1)
    for floor in floors:
        floor.prepare()()


def test_of_two_floors_the_higher_counts():
    case = soft_embedding.build(Spec("forward", SHAPE, "fp32", "flat"), CPU, seed=0)
    rows = {i.name: harness._empty_row(case, i) for i in case.implementations}
    times_us = {"eager": 40.0, "auxkernels": 20.0, "bare GEMMs (floor)": 10.0, "copy (floor)": 5.0}
    harness._fill_times(case, rows, {name: [time_us] for name, time_us in times_us.items()})
    assert [rows[name]["share_of_floor"] for name in times_us] == [0.25, 0.5, 1.0, None]


def test_the_slowest_case_is_found():
    def rows(shape, yardstick_us, own_us):
        case = {"op": "soft_embedding", "pass": "forward", "shape": shape, "dtype": "fp32", "inputs": "flat"}
        yardstick = case | {"implementation": "eager", "role": "yardstick", "time_us": yardstick_us}
        return [yardstick, case | {"implementation": "auxkernels", "role": "ours", "time_us": own_us}]

    found = [*rows([1, 2, 3], 10.0, 5.0), *rows([4, 5, 6], 9.0, 10.0), *rows([7, 8, 9], 1.0, None)]
    assert thresholds.worst_speed_up("soft_embedding", found) == 0.9
    assert thresholds.worst_speed_up("cross_entropy", found) is None


def test_chunks_of_the_oracle_make_no_difference(monkeypatch):
    mode = MODES["planner_training"]
    inputs = make_inputs((300, 33, 8), torch.float32, "peaked", mode, CPU, 0)
    whole = LookupOracle(inputs, mode).expected
    monkeypatch.setattr("benchmarks.soft_embedding.oracle.CHUNK_ELEMENTS", 33 * 4)
    for name, values in LookupOracle(inputs, mode).expected.items():
        torch.testing.assert_close(values, whole[name], rtol=1e-13, atol=1e-13)
