"""The harness's own promises: a wrong result is not timed, a failure is one row, files are whole or untouched."""

import math
import random

import pytest
import torch

from . import cross_entropy, harness, machine, report
from .harness import Implementation, Settings, Unavailable

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


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("inputs", ["flat", "peaked"])
def test_an_accurate_result_is_timed(dtype, inputs):
    eager, candidate = rows_with(accurate, dtype=dtype, inputs=inputs)
    assert (eager["status"], candidate["status"]) == ("ok", "ok")
    assert candidate["time_us_p25"] <= candidate["time_us"] <= candidate["time_us_p75"]
    assert candidate["eager_fp64_error"] == eager["fp64_error"]


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
        report.write_atomically(path, interrupted)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]
    report.append_rows(path, rows)
    assert len(report.read_rows(path)) == 4


def test_an_infinite_error_is_valid_json(tmp_path):
    rows = rows_with(lambda *xs: accurate(*xs) * math.nan)
    report.append_rows(tmp_path / "device.jsonl", rows)
    assert report.read_rows(tmp_path / "device.jsonl")[1]["fp64_error"]["loss"] == "inf"


def test_device_slugs_are_short_and_portable():
    assert machine.slug("Intel(R) Xeon(R) Processor 2 threads") == "intel-xeon-2-threads"
    assert machine.slug("AMD EPYC 7B13 64-Core Processor 8 threads") == "amd-epyc-7b13-8-threads"
    assert machine.slug("Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz 6 threads") == "intel-core-i7-9750h-6-threads"
    assert machine.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
