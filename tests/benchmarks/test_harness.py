"""The harness's own promises: a wrong result is not timed, a failure is one row, files are whole or untouched."""

import math
import os
import random
import types

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import files
from benchmarks.cross_entropy import cases as cross_entropy
from benchmarks.cross_entropy.oracle import Oracle
from benchmarks.timing import harness, machine_info, report
from benchmarks.timing.harness import Implementation, Settings, Unavailable

CPU = torch.device("cpu")
SETTINGS = Settings(rounds=2, seconds=1.0, minimum_rounds=1, rng=random.Random(0))


def rows_with(function, pass_name="training", dtype="bf16", inputs="flat", role="ours"):
    """The rows of eager and of `function`, which stands where auxkernels would."""
    case = cross_entropy.build(cross_entropy.Spec(pass_name, (65, 1023), dtype, inputs), CPU, seed=0)
    base, aux, target, _ = cross_entropy._inputs_and_oracle((65, 1023), dtype, inputs, "cpu", 0)
    candidate = Implementation(
        "candidate", lambda: cross_entropy.loss_call(function, pass_name, base, aux, target), role
    )
    case.implementations = [case.implementations[0], candidate]
    return harness.run_case(case, SETTINGS)


def accurate(base, aux, target):
    """In float64, and without cancellation in confident rows."""
    s, index = base.double() + aux.double(), target[:, None]
    rest = (s - s.gather(1, index)).exp().scatter(1, index, 0.0).sum(1)
    return rest.log1p().mean()


class WrongGradient(torch.autograd.Function):
    """Passes its input on, and the gradient times (1 + error); `columns` limits the error."""

    @staticmethod
    def forward(ctx, values, error, columns):
        ctx.error, ctx.columns = error, columns
        return values.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[..., ctx.columns] *= 1 + ctx.error
        return grad, None, None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("inputs", ["flat", "peaked"])
def test_an_accurate_result_is_timed(dtype, inputs):
    eager, candidate = rows_with(accurate, dtype=dtype, inputs=inputs)
    assert (eager["status"], candidate["status"]) == ("ok", "ok")
    assert candidate["time_us_p25"] <= candidate["time_us"] <= candidate["time_us_p75"]
    assert candidate["eager_fp64_error"] == eager["fp64_error"]


@pytest.mark.slow
@pytest.mark.parametrize("pass_name", ["forward", "training"])
@pytest.mark.parametrize(
    "wrong",
    [
        lambda *xs: accurate(*xs) * (1 + 1e-3),
        lambda *xs: accurate(*xs) * math.nan,
        lambda base, aux, target: accurate(base, aux, target.roll(1)),
        lambda base, aux, target: accurate(base + aux, torch.zeros_like(aux) + 0 * aux, target),
    ],
    ids=["loss off by a thousandth", "NaN", "targets of other rows", "sum in bfloat16"],
)
def test_a_wrong_result_is_not_timed(wrong, pass_name):
    _, candidate = rows_with(wrong, pass_name=pass_name, inputs="peaked")
    assert candidate["status"].startswith("wrong: ")
    assert candidate["time_us"] is None


@pytest.mark.parametrize("error, columns", [(1e-4, slice(None)), (0.01, [1022]), (math.nan, [0])])
def test_a_wrong_gradient_is_not_timed(error, columns):
    wrong = lambda base, aux, target: accurate(base, WrongGradient.apply(aux, error, columns), target)  # noqa: E731
    _, candidate = rows_with(wrong, dtype="fp32")
    assert candidate["status"].startswith("wrong: gradient")


def test_a_baseline_of_other_mathematics_is_not_timed():
    _, candidate = rows_with(
        lambda base, aux, target: cross_entropy.eager_upcast(base, 2 * aux, target), role="baseline"
    )
    assert candidate["status"].startswith("wrong: ")


def test_a_failure_is_one_row_without_paths():
    def fails(base, aux, target):
        raise RuntimeError("no compiler at /home/someone/bin/c++ here\nsecond line")

    eager, candidate = rows_with(fails)
    assert eager["status"] == "ok"
    assert candidate["status"] == "failed: RuntimeError: no compiler at c++ here"


def test_what_is_unavailable_says_why():
    def missing(base, aux, target):
        raise Unavailable("not built")

    assert rows_with(missing)[1]["status"] == "unavailable: not built"


def test_peak_memory_counts_what_a_call_holds_at_once():
    size = 32 << 20
    measured = harness.peak_bytes(lambda: torch.ones(size, dtype=torch.uint8) + 1, CPU)
    if measured is None:
        pytest.skip("this system keeps no resettable high-water mark")
    assert abs(measured - 2 * size) < 1 << 20


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "device.jsonl"
    rows = rows_with(accurate)
    report.append_rows(path, rows)
    before = path.read_text()

    def interrupted(temporary):
        temporary.write_text("half a li")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(path, interrupted)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]
    report.append_rows(path, rows)
    assert len(report.read_rows(path)) == 4


def test_an_infinite_error_is_valid_json(tmp_path):
    rows = rows_with(lambda *xs: accurate(*xs) * math.nan)
    report.append_rows(tmp_path / "device.jsonl", rows)
    assert report.read_rows(tmp_path / "device.jsonl")[1]["fp64_error"]["loss"] == "inf"


def test_a_coarse_baseline_may_say_so_where_its_loss_does_not():
    """A composite on a bfloat16 sum whose loss is float32: held to the sum's arithmetic, not to the loss's."""
    on_rounded_sum = lambda base, aux, target: cross_entropy.eager_upcast(base + aux, 0 * aux, target)  # noqa: E731
    statuses = []
    for arithmetic in (None, torch.bfloat16):
        case = cross_entropy.build(cross_entropy.Spec("training", (65, 1023), "bf16", "peaked"), CPU, seed=0)
        base, aux, target, _ = cross_entropy._inputs_and_oracle((65, 1023), "bf16", "peaked", "cpu", 0)
        prepare = lambda: cross_entropy.loss_call(on_rounded_sum, "training", base, aux, target)  # noqa: E731, B023
        case.implementations = [Implementation("composite", prepare, arithmetic=arithmetic)]
        statuses.append(harness.run_case(case, SETTINGS)[0]["status"][:5])
    assert statuses == ["wrong", "ok"]


@pytest.mark.parametrize("host_us, fills", [(0.0, 2), (50.0, 2), (150.0, 3), (1000.0, 20), (1e9, harness.MAX_FILLS)])
def test_a_gpu_is_kept_busy_for_twice_as_long_as_the_host_needs(host_us, fills):
    assert harness.fills_to_cover(host_us, fill_us=100.0) == fills


def test_a_call_on_a_gpu_is_timed_after_an_untimed_one_and_with_a_cold_cache(monkeypatch):
    """With stand-ins for the device: the order of what is queued, and which time is reported."""
    queued = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            queued.append("event")

        def synchronize(self):
            queued.append("wait")

        def elapsed_time(self, end):
            return 0.25

    class Buffer:
        def zero_(self):
            queued.append("fill")

    properties = types.SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    sizes = []
    monkeypatch.setattr(torch, "empty", lambda size, **options: sizes.append(size) or Buffer())
    case = types.SimpleNamespace(calls_per_sample=1, device=torch.device("cuda"))
    time_call = harness._cuda_timer(case)
    queued.clear()
    assert time_call(lambda: queued.append("call")) == 250.0
    assert queued == ["call", "fill", "fill", "event", "call", "event", "wait"]
    assert sizes == [256 << 20]


def test_chunks_of_the_inputs_and_of_the_oracle_make_no_difference(monkeypatch):
    """In what they promise: the draws themselves depend on the chunks."""
    losses = []
    for elements in (1 << 21, 1023 * 7, 1):
        for module in ("cases", "oracle"):
            monkeypatch.setattr(f"benchmarks.cross_entropy.{module}.CHUNK_ELEMENTS", {"cpu": elements})
        base, aux, target = cross_entropy.make_inputs((65, 1023), torch.bfloat16, "peaked", CPU, 0)
        s = base.double() + aux.double()
        index = target[:, None]
        lead = s.gather(1, index)[:, 0] - s.scatter(1, index, -math.inf).amax(1)
        is_confident = torch.arange(65) % 4 > 0
        assert lead[is_confident].min() > 2.0 and 20 < lead[is_confident].max() < 27.7
        assert lead[~is_confident].median() < 0 and 9 < s[~is_confident].std() < 11
        losses.append(Oracle(base, aux, target, 0).loss)
        monkeypatch.setattr("benchmarks.cross_entropy.oracle.CHUNK_ELEMENTS", {"cpu": 1 << 21})
        assert Oracle(base, aux, target, 0).loss == pytest.approx(losses[-1], rel=1e-13)


def test_equal_seeds_give_equal_inputs_and_others_do_not():
    a, b, c = (cross_entropy.make_inputs((9, 33), torch.float32, "peaked", CPU, seed) for seed in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) and not torch.equal(a[1], c[1])


def test_a_backend_that_cannot_be_used_is_unavailable_and_a_failure_of_its_own_is_not():
    def unusable(base, aux, target):
        return cross_entropy.ours_on("triton", "training", base.double(), aux.double(), target)

    assert rows_with(unusable)[1]["status"].startswith("unavailable: backend='triton' cannot be used")

    def fails(*xs):
        with cross_entropy.unusable_is_unavailable():
            raise RuntimeError("CUDA error")

    assert rows_with(fails)[1]["status"] == "failed: RuntimeError: CUDA error"


@pytest.mark.slow
@pytest.mark.parametrize("pass_name", ["forward", "training", "stats", "stats_training"])
def test_each_pass_runs_on_a_named_backend(pass_name):
    on_reference = lambda *xs: cross_entropy.ours_on("reference", pass_name, *xs)  # noqa: E731
    assert rows_with(on_reference, pass_name, dtype="fp32")[1]["status"] == "ok"


def test_the_longer_of_two_floors_holds():
    """On a GPU a launch bounds what few rows cost, a copy what many do."""
    case = cross_entropy.build(cross_entropy.Spec("forward", (65, 1023), "bf16", "flat"), CPU, seed=0)
    case.implementations = [i for i in case.implementations if i.role in ("yardstick", "floor")]
    case.implementations.append(harness.launch_floor(CPU))
    rows = {i.name: harness._empty_row(case, i) for i in case.implementations}
    case.implementations[-1].prepare()()
    harness._fill_times(case, rows, {"eager": [20.0], "copy (floor)": [2.0], "launch (floor)": [5.0]})
    assert [rows[name]["share_of_floor"] for name in rows] == [0.25, None, 1.0]


def test_device_slugs_are_short_and_portable():
    assert machine_info.slug("Intel(R) Xeon(R) Processor 2 threads") == "intel-xeon-2-threads"
    assert machine_info.slug("AMD EPYC 7B13 64-Core Processor 8 threads") == "amd-epyc-7b13-8-threads"
    assert machine_info.slug("Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz 6 threads") == "intel-core-i7-9750h-6-threads"
    assert machine_info.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_a_benchmark_with_memory_kept_is_a_process_of_its_own_and_its_rows_a_file(monkeypatch):
    class Started(Exception):
        pass

    def execve(*given):
        raise Started(*given)

    monkeypatch.setattr(os, "execve", execve)
    for name in machine_info.KEEPS_MEMORY:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine_info, "copy_gbps", lambda device: 1.0)
    monkeypatch.setattr(machine_info, "gemm_gflops", lambda device, name: 1.0)
    plain = machine_info.describe(CPU)
    assert plain["memory"] == "as it comes" and not plain["device_slug"].endswith("memory-kept")
    with pytest.raises(Started) as started:
        command.main(["--keep-memory", "--dtype", "fp32"])
    _, given, environment = started.value.args
    assert given[1:] == ["-m", "benchmarks", "--keep-memory", "--dtype", "fp32"]
    for name in machine_info.KEEPS_MEMORY:
        monkeypatch.setenv(name, environment[name])
    kept = machine_info.describe(CPU)
    assert kept["memory"] == "kept" and kept["device_slug"] == plain["device_slug"] + "-memory-kept"
    monkeypatch.setattr(machine_info, "bfloat16_instructions", lambda: "AMX")
    other = machine_info.describe(CPU)
    assert other["bfloat16"] == "AMX" and "-amx-" in other["device_slug"]
    assert command.main(["--keep-memory", "--op", "cross_entropy", "--pass", "lora"]) == 2, (
        "no case, and no other process"
    )
