"""What the cases on heads promise: inputs as described, a strict float64 check, a floor of the right size."""

import argparse
import io
import math
import random

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks import chart
from benchmarks.cross_entropy import cases as cross_entropy
from benchmarks.cross_entropy.baselines import COMPOSITES
from benchmarks.heads import cases as cross_entropy_heads
from benchmarks.heads.baselines import FUSED_LOSSES, joined_call
from benchmarks.heads.cases import Spec
from benchmarks.heads.inputs import make_heads, with_half_ignored
from benchmarks.soft_embedding import cases as soft_embedding
from benchmarks.timing import harness, report
from benchmarks.timing.harness import Implementation, Settings
from benchmarks.timing.thresholds import Measure

CPU = torch.device("cpu")
SETTINGS = Settings(rounds=2, seconds=1.0, minimum_rounds=1, rng=random.Random(0))
SHAPE = (65, 1023, 48, 16)


def rows_with(function, pass_name="training", dtype="fp32", inputs="flat", role="ours"):
    """The rows of eager and of `function`, which stands where auxkernels would."""
    case = cross_entropy_heads.build(Spec(pass_name, SHAPE, dtype, inputs, "eager"), CPU, seed=0)
    drawn = (SHAPE, dtype, inputs, pass_name == "lora", "cpu", 0)
    wanted = cross_entropy_heads.WANTED[pass_name]
    heads, _ = cross_entropy_heads._heads_and_oracle(drawn, pass_name == "half_ignored", wanted)
    candidate = Implementation("candidate", lambda: cross_entropy_heads.loss_call(function, pass_name, heads), role)
    case.implementations = [case.implementations[0], candidate]
    return harness.run_case(case, SETTINGS)


def accurate(h_base, w_base, h_aux, w_aux, target, scale):
    """In float64, and without cancellation in confident rows."""
    s = h_base.double() @ w_base.double().T + scale * (h_aux.double() @ w_aux.double().T)
    s, target = s[target >= 0], target[target >= 0]
    index = target[:, None]
    rest = (s - s.gather(1, index)).exp().scatter(1, index, 0.0).sum(1)
    return rest.log1p().mean()


@pytest.mark.slow
@pytest.mark.parametrize("pass_name", ["forward", "training", "both", "half_ignored", "lora"])
@pytest.mark.parametrize("inputs", ["flat", "peaked"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_accurate_result_is_timed(pass_name, inputs, dtype):
    eager, candidate = rows_with(accurate, pass_name, dtype, inputs)
    assert (eager["status"], candidate["status"]) == ("ok", "ok")
    wanted = [f"d{name}" for name in cross_entropy_heads.WANTED[pass_name]]
    assert list(candidate["fp64_error"]) == ["loss", *wanted]
    assert candidate["eager_fp64_error"] == eager["fp64_error"]


def with_wrong_gradient(name, error):
    """`accurate`, but the gradient of one row of one input is (1 + error) times what it is."""

    def function(h_base, w_base, h_aux, w_aux, target, scale):
        arguments = {"h_base": h_base, "w_base": w_base, "h_aux": h_aux, "w_aux": w_aux}
        factor = torch.ones(len(arguments[name]), 1)
        factor[7 if name.startswith("h_") else target[7]] += error
        arguments[name] = arguments[name].view_as(arguments[name])
        arguments[name].register_hook(lambda gradient: gradient * factor)
        return accurate(**arguments, target=target, scale=scale)

    return function


@pytest.mark.slow
@pytest.mark.parametrize("name", ["h_base", "w_base", "h_aux", "w_aux"])
@pytest.mark.parametrize("error", [1e-3, math.nan])
def test_a_wrong_gradient_is_not_timed(name, error):
    _, candidate = rows_with(with_wrong_gradient(name, error), "both")
    assert candidate["status"].startswith(f"wrong: d{name}")
    assert candidate["time_us"] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    [
        lambda *xs: accurate(*xs) * (1 + 1e-4),
        lambda *xs: accurate(*xs) * math.nan,
        lambda h_base, w_base, h_aux, w_aux, target, scale: accurate(h_base, w_base, h_aux, w_aux, target.roll(1), 1),
        lambda *xs: accurate(*(x.bfloat16() for x in xs[:4]), *xs[4:]),
    ],
    ids=["loss off by a ten-thousandth", "NaN", "targets of other rows", "heads in bfloat16"],
)
@pytest.mark.parametrize("pass_name", ["forward", "training"])
def test_a_wrong_result_is_not_timed(wrong, pass_name):
    _, candidate = rows_with(wrong, pass_name, inputs="peaked")
    assert candidate["status"].startswith("wrong: ")


def test_a_baseline_of_other_mathematics_is_not_timed():
    def with_other_scale(h_base, w_base, h_aux, w_aux, target, scale):
        return cross_entropy_heads.eager(h_base, w_base, 2 * h_aux, w_aux, target, scale)

    _, candidate = rows_with(with_other_scale, dtype="bf16", role="baseline")
    assert candidate["status"].startswith("wrong: ")


def test_a_gradient_in_an_ignored_row_is_refused():
    def leaking(h_base, w_base, h_aux, w_aux, target, scale):
        return accurate(h_base, w_base, h_aux, w_aux, target, scale) + 1e-20 * (h_aux - h_aux.detach()).sum()

    _, candidate = rows_with(leaking, "half_ignored")
    assert candidate["status"] == "wrong: dh_aux of an ignored row is not 0"


def test_three_rows_of_four_are_confident_in_peaked_inputs():
    for is_lora in (False, True):
        heads = make_heads((256, 4096, 256, 128), torch.float32, "peaked", is_lora, CPU, 0)
        h_aux = heads.h_base @ heads.a.T if is_lora else heads.h_aux
        logits = heads.h_base @ heads.w_base.T + heads.scale * (h_aux @ heads.w_aux.T)
        index = heads.target[:, None]
        lead = logits.gather(1, index)[:, 0] - logits.scatter(1, index, -math.inf).amax(1)
        is_pulled = torch.arange(256) % 4 > 0
        assert 2.25 < lead[is_pulled].min() < 4 and 25 < lead[is_pulled].max() < 27.35
        assert lead[~is_pulled].median() < 0
        assert 8 < logits.std() < 25


def test_half_of_the_targets_are_ignored():
    heads = with_half_ignored(make_heads((101, 64, 8, 4), torch.float32, "flat", False, CPU, 0), 0)
    assert (heads.target == -100).sum() == 50


@pytest.mark.parametrize(
    "pass_name, flops",
    [
        ("forward", lambda n, v, b, a: 2 * n * v * (b + a)),
        ("stats", lambda n, v, b, a: 2 * n * v * (b + a)),
        ("training", lambda n, v, b, a: 2 * n * v * b + 6 * n * v * a),
        ("both", lambda n, v, b, a: 6 * n * v * (b + a)),
        ("half_ignored", lambda n, v, b, a: (2 * n * v * b + 6 * n * v * a) // 2),
        ("lora", lambda n, v, b, a: 2 * n * v * b + 6 * n * v * a + 4 * n * b * a),
    ],
)
def test_the_floor_is_the_products_that_the_pass_cannot_do_without(pass_name, flops):
    shape = (66, 1023, 48, 16)
    case = cross_entropy_heads.build(Spec(pass_name, shape, "fp32", "flat", "none"), CPU, seed=0)
    assert case.floor_flops == flops(*shape)
    case.implementations[-1].prepare()()


@pytest.mark.parametrize("pass_name", ["forward", "training", "both"])
def test_joined_heads_give_the_gradients_of_the_two(pass_name, monkeypatch):
    if not hasattr(F, "linear_cross_entropy"):
        monkeypatch.setitem(FUSED_LOSSES, "F.linear_cross_entropy", lambda: lambda h, w, y: F.cross_entropy(h @ w.T, y))
    wanted = cross_entropy_heads.WANTED[pass_name]
    heads = make_heads(SHAPE, torch.float64, "flat", False, CPU, 0)
    expected = cross_entropy_heads.loss_call(cross_entropy_heads.eager, pass_name, heads)()
    joined = joined_call("F.linear_cross_entropy", heads, wanted)()
    torch.testing.assert_close(joined.loss, expected.loss)
    for gradient, other in zip(joined.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(gradient, other)


def test_packages_that_are_not_installed_are_rows_with_a_reason():
    heads = make_heads(SHAPE, torch.float32, "flat", False, CPU, 0)
    for name in ("Liger", "Cut Cross Entropy", "QuACK"):
        try:
            FUSED_LOSSES[name]()
        except harness.Unavailable as error:
            assert "No module named" in str(error)
            with pytest.raises(harness.Unavailable):
                joined_call(name, heads, ())


def test_a_slow_baseline_takes_part_in_the_first_rounds_alone():
    case = cross_entropy_heads.build(Spec("forward", SHAPE, "fp32", "flat", "none"), CPU, seed=0)
    calls = {"quick": lambda: None, "slow": lambda: None}
    case.implementations = [Implementation("quick", None), Implementation("slow", None, max_rounds=2)]
    (times_us,) = harness._time_rounds([(case, calls)], Settings(rounds=5, seconds=60.0))
    assert {name: len(samples) for name, samples in times_us.items()} == {"quick": 5, "slow": 2}


def test_measures_tell_operators_and_shapes_apart():
    def row(op, shape, name, time_us, inputs="flat"):
        row = {"op": op, "pass": "training", "shape": list(shape), "dtype": "bf16", "inputs": inputs}
        return row | {"implementation": name, "time_us": time_us, "share_of_floor": 10 / time_us, "peak_bytes": 50}

    rows = [
        row("heads", (2, 3, 4, 5), "auxkernels", 10.0),
        row("heads", (2, 3, 4, 5), "eager", 30.0),
        row("heads", (2, 3, 4, 5), "quick", 20.0),
        row("heads", (2, 3, 4, 5), "auxkernels", 20.0, "peaked"),
        row("heads", (2, 3, 4, 5), "eager", 70.0, "peaked"),
        row("heads", (9, 9, 9, 9), "eager", 1.0),
        row("logits", (2, 3), "eager", 1.0),
    ]
    measure = Measure("heads", ((2, 3, 4, 5),))
    assert measure.speed_up("training", "bf16", ("eager",), rows) == 3
    assert measure.speed_up("training", "bf16", ("eager", "quick", "absent"), rows) == 2
    assert measure.speed_up("training", "fp32", ("eager",), rows) is None
    assert measure.share_of_floor("training", "bf16", "auxkernels", rows) == 50
    assert measure.relative_time("training", "bf16", "auxkernels", "eager", rows) == pytest.approx(100 / 3)
    assert measure.peak_share("training", "bf16", lambda row: 100, rows) == 50


def test_shapes_choose_their_operator():
    assert command._shape("1024x50257") == (1024, 50257)
    assert command._shape("2048X50257x768x256") == (2048, 50257, 768, 256)
    assert command._shape("4096x1024x256") == (4096, 1024, 256)
    for wrong in ("1024", "1x2x3x4x5", "1x2x3x0", "axb"):
        with pytest.raises(argparse.ArgumentTypeError):
            command._shape(wrong)
    shapes = {cross_entropy: (64, 1023), cross_entropy_heads: (65, 1023, 48, 16), soft_embedding: (65, 33, 8)}
    options = command.parse_arguments(["--shape", *("x".join(map(str, s)) for s in shapes.values()), "--dtype", "fp32"])
    for op, shape in shapes.items():
        specs = command.choose_specs(op, options, CPU)
        assert {spec.shape for spec in specs} == {shape} and {spec.dtype for spec in specs} == {"fp32"}


def run_quietly(tmp_path, monkeypatch, *arguments):
    """The command's rows and what it printed, for three cases that take no time."""
    environment = {"device_slug": "d", "date": "today", "commit": "0", "is_dirty": False, "device": "d", "threads": 1}
    monkeypatch.setattr(command.machine_info, "describe", lambda device: environment)
    options = command.parse_arguments(["--rounds", "1", "--seconds", "1", "--output", str(tmp_path), *arguments])
    console = Console(record=True, quiet=False, file=io.StringIO(), width=200)
    specs = [(cross_entropy, cross_entropy.Spec("forward", (n, 33), "fp32", "flat", "eager")) for n in (4, 5, 6)]
    rows, _ = command.run(specs, options, CPU, console)
    return {tuple(row["shape"]) for row in rows}, console.export_text()


def test_no_case_begins_once_the_time_is_over(tmp_path, monkeypatch):
    shapes, said = run_quietly(tmp_path, monkeypatch, "--time-limit", "1000")
    assert shapes == {(4, 33), (5, 33), (6, 33)} and "3/3 " in said
    shapes, said = run_quietly(tmp_path, monkeypatch, "--time-limit", "1e-9")
    assert shapes == set() and "time is over: 0 of 3 cases finished" in said


def test_a_case_that_does_not_fit_the_device_is_left_out(tmp_path, monkeypatch):
    build = cross_entropy.build

    def build_small(spec, *others):
        if spec.shape[0] == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build(spec, *others)

    monkeypatch.setattr(cross_entropy, "build", build_small)
    shapes, said = run_quietly(tmp_path, monkeypatch)
    assert shapes == {(4, 33), (6, 33)} and "2/3 forward 5 x 33 fp32: does not fit the device" in said


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_bar_speaks_of_a_case_of_the_quick_grid(device):
    """A row for each case of the grid, with every implementation that a bar may ask for, gives each bar a number."""
    device = torch.device(device)
    for op in command.OPS.values():
        asked_for = {"eager", "eager upcast", "compile upcast", *FUSED_LOSSES, "plain", "every option", "auxkernels"}
        asked_for |= set(COMPOSITES)
        asked_for |= {f"auxkernels{end}" for end in (" kernel alone", " return_stats", " logit_stats")}
        asked_for |= {"auxkernels, no row ignored", "compile", "F.gumbel_softmax", "F.one_hot"}
        asked_for |= {"eager, each token", "eager, each segment", cross_entropy.EAGER_STEP, cross_entropy.OUR_STEP}
        own = cross_entropy.OWN_BACKENDS
        asked_for |= {*own, *(f"{name} {cross_entropy.LOSS_ALONE}" for name in own)}
        rows = [
            {"op": op.OP, "pass": spec.pass_name, "shape": list(spec.shape), "dtype": spec.dtype}
            | {"inputs": spec.inputs, "implementation": name, "time_us": 1.0, "share_of_floor": 1.0}
            | {"peak_bytes": 1, "threads": 2, "role": "yardstick" if name == "eager" else "baseline"}
            for spec in op.quick_specs(device)
            for name in asked_for
        ]
        for bar in op.THRESHOLDS.get(device.type, []):
            assert bar.measure(rows) is not None, bar.text


@pytest.mark.slow
def test_operators_share_a_chart_and_a_table(tmp_path):
    pytest.importorskip("matplotlib")
    rows = []
    for op, spec in (
        (cross_entropy, cross_entropy.Spec("training", (65, 1023), "fp32", "flat")),
        (cross_entropy_heads, Spec("training", SHAPE, "fp32", "flat", "eager")),
        (soft_embedding, soft_embedding.Spec("training", (600, 512, 64), "fp32", "flat")),
    ):
        case = op.build(spec, CPU, seed=0)
        case.implementations = [i for i in case.implementations if i.name.startswith(("eager", "bare", "copy"))]
        environment = {"date": "today", "commit": "0", "is_dirty": False, "device": "test", "threads": 1}
        rows += [row | environment for row in harness.run_case(case, SETTINGS)]
    assert [row["gflops"] is not None for row in rows] == [False, False, True, True, True, True, True]
    assert [row["gbps"] is not None for row in rows] == [True, True, False, False, True, True, True]
    assert chart.draw(rows, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000
    assert list(chart.newest_cases(rows)) == [report.case_key(rows[i]) for i in (0, 2, 4)]
    for op, num_rows in ((cross_entropy, 3), (cross_entropy_heads, 3), (soft_embedding, 4)):
        table = report.results_table(op.OP, [row for row in rows if row["op"] == op.OP])
        assert table.row_count == num_rows
    assert report.case_text(rows[2]) == "training 65 x 1023 (48 + 16) fp32 flat"
