"""Composites of other packages' kernels, with stand-ins for the packages that keep to their signatures."""

import random
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from invented_rows import case_rows
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks.cross_entropy import cases as cross_entropy
from benchmarks.cross_entropy.baselines import COMPOSITES
from benchmarks.cross_entropy.cases import GPU_SHAPE, Spec
from benchmarks.heads import cases as cross_entropy_heads
from benchmarks.heads.baselines import FUSED_LOSSES
from benchmarks.soft_embedding import cases as soft_embedding
from benchmarks.timing import baselines, harness, thresholds
from benchmarks.timing.thresholds import Measure

CPU = torch.device("cpu")
SETTINGS = harness.Settings(rounds=2, seconds=1.0, minimum_rounds=1, rng=random.Random(0))


class LigerFunction(torch.autograd.Function):
    """Writes the gradient over its input, as the real one does."""

    @staticmethod
    def forward(ctx, values, target):
        with torch.enable_grad():
            leaf = values.detach().clone().requires_grad_()
            loss = F.cross_entropy(leaf, target)
        if values.requires_grad:
            values.detach().copy_(torch.autograd.grad(loss, leaf)[0])
            ctx.save_for_backward(values.detach())
        return loss.detach()

    @staticmethod
    def backward(ctx, upstream):
        return ctx.saved_tensors[0], None


def quack_forward(x, target, target_logit=None, weight=None, ignore_index=-100, return_lse=False, return_dx=False):
    """Losses and gradients of rows, each times its target's weight, unreduced, in float32 and x's dtype."""
    log_p = x.float().log_softmax(-1)
    share = weight[target]
    loss = -log_p.gather(1, target[:, None])[:, 0] * share
    if not return_dx:
        return loss
    one_hot = F.one_hot(target, x.shape[1])
    return loss, ((log_p.exp() - one_hot) * share[:, None]).to(x.dtype)


@pytest.fixture
def stand_ins(monkeypatch):
    def module(name, **content):
        made = types.ModuleType(name)
        made.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, made)

    for package in ("liger_kernel", "liger_kernel.transformers", "quack"):
        module(package, __path__=[])
    liger = {"liger_cross_entropy": lambda input, target, weight=None: LigerFunction.apply(input, target)}
    module("liger_kernel.transformers.functional", **liger)
    quack = {"cross_entropy": lambda x, target: F.cross_entropy(x.float(), target), "cross_entropy_fwd": quack_forward}
    module("quack.cross_entropy", **quack)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("pass_name", ["forward", "training", "both"])
@pytest.mark.parametrize("name", COMPOSITES)
def test_composites_give_the_loss_and_gradient_of_the_sum(stand_ins, name, pass_name, dtype):
    case = cross_entropy.build(Spec(pass_name, (65, 1023), dtype, "peaked"), CPU, seed=0)
    base, aux, target, _ = cross_entropy._inputs_and_oracle((65, 1023), dtype, "peaked", "cpu", 0)
    before = base.clone(), aux.clone()
    call = lambda: cross_entropy.loss_call(COMPOSITES[name](), pass_name, base, aux, target)  # noqa: E731
    case.implementations = [harness.Implementation(name, call, arithmetic=base.dtype)]
    (row,) = harness.run_case(case, SETTINGS)
    assert row["status"] == "ok" and row["time_us"]
    assert list(row["fp64_error"]) == ["loss", "gradient"][: 1 + (pass_name != "forward")]
    assert torch.equal(base, before[0]) and torch.equal(aux, before[1])


def test_packages_that_are_not_installed_are_unavailable_with_a_reason(monkeypatch):
    for package in ("liger_kernel", "quack", "cut_cross_entropy"):
        monkeypatch.setitem(sys.modules, package, None)
    for getter in (*COMPOSITES.values(), *(FUSED_LOSSES[name] for name in baselines.DISTRIBUTIONS)):
        with pytest.raises(harness.Unavailable, match=r"No module named|import of"):
            getter()


def test_an_older_package_without_the_function_is_unavailable(stand_ins):
    with pytest.raises(harness.Unavailable, match="has no attribute 'absent'"):
        baselines.imported("quack.cross_entropy", "absent")


def names_on(device_type, spec):
    """A case's implementations on that kind of device, by name, without building the case."""
    base = torch.empty(2, 3, dtype=cross_entropy.DTYPES[spec.dtype])
    found = cross_entropy._implementations(spec, base, base, None, torch.device(device_type), False)
    return {i.name: i for i in found}


def test_on_gpus_ours_are_timed_by_name_beside_other_packages():
    spec = Spec("training", GPU_SHAPE, "bf16", "flat")
    on_gpu = names_on("cuda", spec)
    assert {"auxkernels", "auxkernels (triton)", "auxkernels (cuda)", *COMPOSITES, "compile upcast"} <= set(on_gpu)
    assert "auxkernels kernel alone" not in on_gpu
    assert {on_gpu[name].arithmetic for name in COMPOSITES} == {torch.bfloat16}
    assert {on_gpu[name].role for name in ("auxkernels (triton)", "auxkernels (cuda)")} == {"ours"}
    few = names_on("cuda", spec._replace(baselines="eager"))
    assert not {*COMPOSITES, "compile upcast"} & set(few)
    on_cpu = names_on("cpu", spec)
    assert set(on_cpu) == {"eager", "eager upcast", "compile upcast", "auxkernels kernel alone", "auxkernels"}
    stats = names_on("cuda", spec._replace(pass_name="stats"))
    assert {"auxkernels logit_stats", "auxkernels return_stats", "auxkernels (cuda)"} <= set(stats)
    assert not set(COMPOSITES) & set(stats)


OWN = ("auxkernels", "auxkernels (cuda)", "auxkernels (triton)")
SMALL = {
    "cross_entropy": (65, 1023),
    "cross_entropy_heads": (65, 1023, 48, 16),
    "soft_embedding": (65, 130, 24),
}
SMALL_SPECS = [
    (op, op.Spec(pass_name, SMALL[op.OP], "fp32", "flat", "eager"))
    for op in (cross_entropy, cross_entropy_heads, soft_embedding)
    for pass_name in op.PASSES
    if pass_name != "overhead"
]


@pytest.mark.slow
@pytest.mark.parametrize("op, spec", SMALL_SPECS, ids=lambda value: getattr(value, "pass_name", None) or value.OP)
def test_ours_by_name_pass_the_check_or_are_unavailable(op, spec, monkeypatch):
    """On CPU tensors: "native" is the CPU's module there, and Triton has to say that it cannot."""
    listed = op._implementations
    monkeypatch.setattr(op, "_implementations", lambda *xs: listed(*xs[:-2], torch.device("cuda"), xs[-1]))
    case = op.build(spec, CPU, seed=0)
    case.implementations = [i for i in case.implementations if i.role == "yardstick" or i.name in OWN]
    rows = {row["implementation"]: row["status"] for row in harness.run_case(case, SETTINGS)}
    assert rows.pop("auxkernels (triton)").startswith("unavailable: backend='triton' cannot be used")
    assert set(rows.values()) == {"ok"} and len(rows) == 3


def bar_values(rows):
    return {bar.text: bar.measure(rows) for bar in cross_entropy.THRESHOLDS["cuda"]}


def test_the_best_composite_is_of_all_and_needs_one_of_another_package():
    text = "(cuda) bf16 training, times faster than the best composite of existing kernels"
    spec = Spec("training", GPU_SHAPE, "bf16", "flat")
    times_us = {"copy (floor)": 90.0, "auxkernels (cuda)": 100.0, "eager": 500.0, "compile upcast": 210.0}
    assert bar_values(case_rows("cross_entropy", spec, times_us, 90.0))[text] is None
    rows = case_rows("cross_entropy", spec, times_us | {"Liger": 250.0, "QuACK": 180.0}, 90.0)
    assert bar_values(rows)[text] == 1.8
    rows = case_rows("cross_entropy", spec, times_us | {"Liger": 250.0}, 90.0)
    assert bar_values(rows)[text] == 2.1
    assert bar_values(rows)["(cuda) bf16 training 8192 x 128256, share of floor"] == 90


def test_bars_on_gpus_are_of_each_implementation_and_not_of_the_one_that_is_chosen():
    spec = Spec("training", GPU_SHAPE, "bf16", "flat")
    times_us = {"auxkernels": 95.0, "auxkernels (cuda)": 100.0, "auxkernels (triton)": 180.0, "eager": 360.0}
    values = bar_values(case_rows("cross_entropy", spec, times_us | {"Liger": 360.0}, 90.0))
    for name, share, times in (("cuda", 90, 3.6), ("triton", 50, 2.0)):
        assert values[f"({name}) bf16 training 8192 x 128256, share of floor"] == share
        assert values[f"({name}) bf16 training, times faster than the best composite of existing kernels"] == times
    heads = Spec("training", cross_entropy_heads.GPU_SHAPE, "bf16", "flat")
    rows = case_rows("cross_entropy_heads", heads, times_us, 90.0)
    shares = [bar.measure(rows) for bar in cross_entropy_heads.THRESHOLDS["cuda"] if "share" in bar.text]
    assert shares == [50, 90]


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_statistics_cost_what_they_take_over_the_same_implementations_loss(name):
    own, alone = f"auxkernels ({name})", f"auxkernels ({name}) loss alone"
    rows = []
    for pass_name, cost in (("stats", 1.5), ("stats_training", 1.25)):
        assert {own, alone} <= set(names_on("cuda", Spec(pass_name, GPU_SHAPE, "bf16", "flat")))
        times_us = {alone: 100.0, own: 100.0 * cost, "auxkernels": 50.0}
        rows += case_rows("cross_entropy", Spec(pass_name, GPU_SHAPE, "bf16", "flat"), times_us, 90.0)
    values = bar_values(rows)
    assert values[f"({name}) bf16 logit_stats over plain forward"] == 50
    assert values[f"({name}) bf16 all statistics, training"] == 25


def test_decode_is_measured_by_its_worst_shape_and_has_no_bar_before_it_was():
    rows = []
    for i, shape in enumerate(cross_entropy.GPU_DECODE_SHAPES):
        spec = Spec("forward", shape, "bf16", "flat")
        rows += case_rows("cross_entropy", spec, {"launch (floor)": 4.0, "auxkernels (triton)": 4.0 + i}, 4.0)
    text = "(triton) bf16 decode, 1 to 64 rows, of the floor's time"
    assert bar_values(rows)[text] == pytest.approx(2.25, rel=1e-3)
    assert Measure("cross_entropy", ((9, 9),)).of_floor("forward", "bf16", "auxkernels", rows) is None
    (bar,) = [bar for bar in cross_entropy.THRESHOLDS["cuda"] if bar.text == text]
    assert bar.bar is None
    console = Console(width=160)
    with console.capture() as captured:
        console.print(thresholds.thresholds_table([bar], rows, "title"))
    (line,) = [line for line in captured.get().splitlines() if "decode" in line]
    assert "not set" in line and "2.25 x" in line and "yes" not in line and "no " not in line.replace("not set", "")


def test_no_more_baselines_are_timed_than_are_wanted():
    options = ["--shape", "8192x128256", "--pass", "training", "--dtype", "bf16", "--inputs", "flat"]
    device = torch.device("cuda")

    def levels(op, *more):
        return {spec.baselines for spec in command.choose_specs(op, command.parse_arguments([*options, *more]), device)}

    assert levels(cross_entropy) == {"all"} and levels(cross_entropy, "--baselines", "eager") == {"eager"}
    assert levels(cross_entropy, "--baselines", "slow") == {"all"}  # a level of heads alone
    quick = command.choose_specs(cross_entropy_heads, command.parse_arguments(["--baselines", "upcast"]), device)
    assert {spec.baselines for spec in quick} == {"eager", "upcast"}


def test_the_lattice_is_of_the_operator_that_has_a_choice():
    options = command.parse_arguments(["--lattice", "--dtype", "bf16"])
    found = command.choose_specs(cross_entropy, options, torch.device("cuda"))
    assert {spec.dtype for spec in found} == {"bf16"} and {spec.shape[0] for spec in found} == {64, 1024, 8192}
    assert command.choose_specs(soft_embedding, options, torch.device("cuda")) == []
