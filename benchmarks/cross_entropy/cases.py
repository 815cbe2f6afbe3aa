"""Cases and implementations of aux_cross_entropy and logit_stats: what is timed, against what, and the thresholds."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.cross_entropy.baselines import COMPOSITES
from benchmarks.cross_entropy.oracle import CHUNK_ELEMENTS, Oracle
from benchmarks.timing.harness import Accuracy, Case, Implementation, Outputs, Unavailable, copy_floor, launch_floor
from benchmarks.timing.implementations import DTYPES, OWN_BACKENDS, compiled, ours_package, unusable_is_unavailable
from benchmarks.timing.thresholds import Measure, Threshold, at_least, at_most

OP = "cross_entropy"
PASSES = ("forward", "training", "both", "stats", "stats_training", "overhead")
INPUTS = ("flat", "peaked")
# [N, V] tensors that a perfect kernel reads or writes: both sources, and a gradient for each source that wants one
FLOOR_UNITS = {"forward": 2, "training": 3, "both": 4, "stats": 2, "stats_training": 3, "overhead": 2}
SHAPE_FORM = "NxV"
OVERHEAD_SHAPE = (1, 32)
MAIN_SHAPE = (1024, 50257)
GPU_SHAPE = (8192, 128256)
GPU_NARROW_SHAPES = ((8192, 32000), (8192, 50257))
GPU_WIDE_SHAPES = ((8192, 151936), (4096, 262144))
GPU_DECODE_SHAPES = tuple((rows, columns) for columns in (32000, 128256) for rows in (1, 8, 64))
# sizes for the choice between implementations: at least two numbers of rows, so that a box is more than a point
LATTICE = tuple(itertools.product((8192, 1024, 64), (32000, 128256, 50257, 151936)))
# what is timed beside auxkernels and the copy, each level with those before it; other packages are for GPUs
BASELINES = ("eager", "compiled", "all")
# a pass with statistics and the pass that does the same without them
PLAIN = {"stats": "forward", "stats_training": "training"}
LOSS_ALONE = "loss alone"
# beside the calls that are bound by overhead: the same with the auxiliary's gradient
EAGER_STEP, OUR_STEP = "eager, with gradient", "plain, with gradient"


class Spec(NamedTuple):
    """Names one case without building it; `baselines` is one of BASELINES."""

    pass_name: str
    shape: tuple[int, int]
    dtype: str
    inputs: str
    baselines: str = "all"


def quick_specs(device: torch.device) -> list[Spec]:
    """One case or two for every bar and every regime of the width, in a few minutes on two cores."""
    if device.type == "cuda":
        return _quick_specs_cuda()
    main = product_specs(PASSES[:-1], [MAIN_SHAPE], ["bf16"], ["flat"])
    main += product_specs(["forward", "training", "stats", "stats_training"], [MAIN_SHAPE], ["fp32"], ["flat"])
    main += [Spec("training", MAIN_SHAPE, dtype, "peaked") for dtype in ("bf16", "fp32")]
    shapes = [(512, 128256), (256, 262144), (4096, 4096), (64, 32000)]
    main += [Spec("training", shape, "bf16", "flat") for shape in shapes]
    # a number of rows whose reciprocal is not exact, and a ragged end of every row
    main += [Spec("training", (1023, 4095), dtype, "peaked") for dtype in ("bf16", "fp32")]
    return [*main, _overhead_spec()]


def _quick_specs_cuda() -> list[Spec]:
    """Every bar, in a minute that compiling takes most of: torch.compile at two shapes, other packages at one."""
    narrow, odd = GPU_NARROW_SHAPES
    return [
        Spec("training", GPU_SHAPE, "bf16", "flat", "all"),
        *product_specs(["stats", "stats_training"], [GPU_SHAPE], ["bf16"], ["flat"], "eager"),
        Spec("training", GPU_SHAPE, "bf16", "peaked", "eager"),
        Spec("training", GPU_SHAPE, "fp32", "flat", "eager"),
        Spec("training", narrow, "bf16", "flat", "compiled"),
        *product_specs(["training"], [odd, *GPU_WIDE_SHAPES], ["bf16"], ["flat"], "eager"),
        *product_specs(["forward"], GPU_DECODE_SHAPES, ["bf16"], ["flat"], "eager"),
        *product_specs(["forward"], GPU_DECODE_SHAPES[::5], ["fp32"], ["flat"], "eager"),
        Spec("training", GPU_DECODE_SHAPES[-1], "bf16", "flat", "eager"),
        _overhead_spec(),
    ]


def lattice_specs() -> list[Spec]:
    """Sizes beside the quick grid's, to tell where on a GPU which implementation is the faster, beside eager alone.

    A few seconds each, in the order of their worth: 16-bit logits first, many rows first.
    """
    specs = []
    for dtype in ("bf16", "fp32"):
        specs += product_specs(("training", "forward"), LATTICE, [dtype], ["flat"], "eager")
    quick = {spec[:4] for spec in _quick_specs_cuda()}
    return [spec for spec in specs if spec[:4] not in quick]


def _full_specs_cuda() -> list[Spec]:
    """The quick grid's shapes with every baseline, and a lattice of sizes for the choice between implementations."""
    named = [GPU_SHAPE, *GPU_NARROW_SHAPES, *GPU_WIDE_SHAPES]
    rows, columns = (1, 8, 64, 1024, 8192), (4096, 16384, 32000, 50257, 65536, 128256, 151936, 262144)
    lattice = [
        shape for shape in itertools.product(rows, columns) if math.prod(shape) <= 1 << 30 and shape not in named
    ]
    odd = [(4096, 4096), (1023, 4095), (8191, 50257), (65536, 1023)]
    specs = product_specs(PASSES[:-1], named, ("bf16", "fp32"), INPUTS, "all")
    specs += product_specs(("forward", "training", "stats"), lattice, ("bf16", "fp32"), INPUTS, "eager")
    return [
        *specs,
        *product_specs(("forward", "training"), odd, ("bf16", "fp32"), INPUTS, "compiled"),
        _overhead_spec(),
    ]


def full_specs(device: torch.device) -> list[Spec]:
    """Every pass, dtype and kind of input over the widths of common vocabularies and some odd ones."""
    if device.type == "cuda":
        return _full_specs_cuda()
    shapes = [MAIN_SHAPE, (512, 128256), (256, 262144), (4096, 4096), (64, 32000)]
    shapes += [(512, 151936), (2048, 32000), (1023, 50257), (4097, 4095), (8192, 1023), (1, 128256)]
    return product_specs(PASSES, shapes, ("bf16", "fp32"), INPUTS)


def product_specs(passes, shapes, dtypes, inputs, baselines: str = "all") -> list[Spec]:
    """Shapes outermost and passes innermost, so that cases on the same inputs follow each other and share them."""
    large = [name for name in passes if name != "overhead"]
    specs = [Spec(p, s, d, i, baselines) for s, d, i, p in itertools.product(shapes, dtypes, inputs, large)]
    return specs + [_overhead_spec()] * ("overhead" in passes)


def _overhead_spec() -> Spec:
    return Spec("overhead", OVERHEAD_SHAPE, "fp32", "flat", "eager")


def build(spec: Spec, device: torch.device, seed: int, with_reference: bool = False) -> Case:
    """The case of a spec, with inputs drawn from `seed`; equal seeds give equal values on one kind of device."""
    base, aux, target, oracle = _inputs_and_oracle(spec.shape, spec.dtype, spec.inputs, str(device), seed)
    floor_bytes = FLOOR_UNITS[spec.pass_name] * base.numel() * base.element_size()
    if spec.pass_name == "overhead":
        implementations, check = _overhead_implementations(base, aux, target, oracle)
    else:
        implementations, check = _implementations(spec, base, aux, target, device, with_reference), oracle.check
        implementations.append(copy_floor(floor_bytes, device))
        if device.type == "cuda":
            implementations.append(launch_floor(device))
    calls_per_sample = 100 if spec.pass_name == "overhead" else 1
    place = (OP, spec.pass_name, spec.shape, spec.dtype, spec.inputs, device)
    return Case(*place, floor_bytes, implementations, check, calls_per_sample)


@functools.lru_cache(maxsize=1)
def _inputs_and_oracle(shape, dtype: str, inputs: str, device: str, seed: int):
    base, aux, target = make_inputs(shape, DTYPES[dtype], inputs, torch.device(device), seed)
    return base, aux, target, Oracle(base, aux, target, seed)


def make_inputs(shape, dtype: torch.dtype, inputs: str, device: torch.device, seed: int):
    """base, aux [N, V] and target [N].

    flat     0.1 * randn: every probability near 1 / V, the loss near log V.
    peaked   the sum has standard deviation 10; in three rows of four the target's probability lies between 0.9 and
             1 - 1e-12, as in a trained model's easy tokens.
    """
    num_rows, num_columns = shape
    generator = torch.Generator(device).manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator, device=device)
    target = torch.randint(num_columns, (num_rows,), generator=generator, device=device)
    base, aux = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
    scale = 0.1 if inputs == "flat" else 10 / math.sqrt(2)
    margin = 2.3 + 25 * torch.rand(num_rows, generator=generator, device=device)
    for rows in torch.arange(num_rows, device=device).split(max(1, CHUNK_ELEMENTS[device.type] // num_columns)):
        some = slice(int(rows[0]), int(rows[-1]) + 1)
        for source in (base, aux):
            source[some] = draw(len(rows), num_columns).mul_(scale)
        if inputs == "peaked":
            s_max = (base[some].float() + aux[some].float()).amax(1)
            confident = rows % 4 > 0
            rows, s_max = rows[confident], s_max[confident]
            lead = s_max + margin[rows] - base[rows, target[rows]].float()
            aux[rows, target[rows]] = lead.to(dtype)
    return base, aux, target


def eager(base, aux, target):
    """What torch does with the sum in the inputs' dtype."""
    return F.cross_entropy(base + aux, target)


def eager_upcast(base, aux, target):
    """What Hugging Face's causal language models run: the sum in float32."""
    return F.cross_entropy(base.float() + aux.float(), target)


def ours(base, aux, target):
    return ours_package().aux_cross_entropy(base, aux, target)


def ours_with_statistics(base, aux, target):
    return ours_package().aux_cross_entropy(base, aux, target, return_stats=True)


def ours_on(backend: str, pass_name: str, base, aux, target):
    """A pass by the named implementation: statistics without a loss, a loss with statistics, or the plain loss."""
    package = ours_package()
    options = {"return_stats": True} if pass_name == "stats_training" else {}
    function = package.logit_stats if pass_name == "stats" else package.aux_cross_entropy
    with unusable_is_unavailable():
        return function(base, aux, target, backend=backend, **options)


def reference(base, aux, target):
    return ours_package().aux_cross_entropy(base, aux, target, backend="reference")


def eager_statistics(base, aux, target):
    """All of LogitStats in plain torch, in the inputs' dtype."""
    s, index = base + aux, target[:, None]
    log_p, log_q = s.log_softmax(-1), base.log_softmax(-1)
    p = log_p.exp()
    return SimpleNamespace(
        log_prob=log_p.gather(1, index)[:, 0],
        base_log_prob=log_q.gather(1, index)[:, 0],
        lse=s.logsumexp(-1),
        entropy=-(p * log_p).sum(-1),
        kl_to_base=(p * (log_p - log_q)).sum(-1),
        argmax=s.argmax(-1),
        base_argmax=base.argmax(-1),
        target_rank=(s > s.gather(1, index)).sum(-1),
    )


def eager_upcast_statistics(base, aux, target):
    return eager_statistics(base.float(), aux.float(), target)


def _implementations(spec: Spec, base, aux, target, device, with_reference: bool) -> list[Implementation]:
    """The yardstick comes first: the checks of ours compare with its error."""
    is_cuda, is_stats = device.type == "cuda", spec.pass_name == "stats"
    has = {name: BASELINES.index(spec.baselines) >= level for level, name in enumerate(BASELINES)}

    def entry(name: str, function: Callable | None, role: str = "baseline", get_function: Callable | None = None):
        get_function = get_function or (lambda: function)
        return Implementation(name, lambda: loss_call(get_function(), spec.pass_name, base, aux, target), role)

    entries = [entry("eager", eager_statistics if is_stats else eager, "yardstick")]
    if spec.dtype != "fp32" and not is_stats:
        entries.append(entry("eager upcast", eager_upcast))
    if has["compiled"]:
        function = eager_upcast_statistics if is_stats else eager_upcast
        entries.append(entry("compile upcast", None, get_function=compiled(function)))
    if has["all"] and is_cuda and spec.pass_name in ("forward", "training", "both"):
        # their losses are float32, made of a sum in the inputs' dtype
        composites = (entry(name, None, get_function=getter) for name, getter in COMPOSITES.items())
        entries += [replace(composite, arithmetic=base.dtype) for composite in composites]
    if with_reference and not is_stats:
        entries.append(entry("auxkernels reference", reference, "ours"))
    if is_stats:
        entries.append(entry("auxkernels logit_stats", lambda *xs: ours_package().logit_stats(*xs), "ours"))
    if spec.pass_name in ("stats", "stats_training"):
        entries.append(entry("auxkernels return_stats", ours_with_statistics, "ours"))
    if spec.pass_name in ("forward", "training") and not is_cuda:
        prepare_kernel = functools.partial(native_kernel_call, spec.pass_name, base, aux, target)
        entries.append(Implementation("auxkernels kernel alone", prepare_kernel, "ours"))
    for name, backend in OWN_BACKENDS.items() if is_cuda else ():
        entries.append(entry(name, functools.partial(ours_on, backend, spec.pass_name), "ours"))
        if spec.pass_name in PLAIN:  # what statistics cost is their time over that of the loss alone
            loss_alone = functools.partial(ours_on, backend, PLAIN[spec.pass_name])
            entries.append(entry(f"{name} {LOSS_ALONE}", loss_alone, "ours"))
    return [*entries, entry("auxkernels", ours, "ours")]


def loss_call(function: Callable, pass_name: str, base, aux, target) -> Callable[[], Outputs]:
    """The work of a pass as one call without arguments. `function` returns loss, (loss, statistics) or statistics."""
    base, aux = base.detach(), aux.detach()
    wanted = {"training": [aux], "stats_training": [aux], "both": [base, aux]}.get(pass_name, [])
    for source in wanted:
        source.requires_grad_()

    def call() -> Outputs:
        result = function(base, aux, target)
        loss, statistics = result if isinstance(result, tuple) else (result, None)
        if not isinstance(loss, torch.Tensor):
            return Outputs(statistics=loss)
        gradients = torch.autograd.grad(loss, wanted) if wanted else ()
        return Outputs(loss.detach(), gradients, statistics)

    return call


def native_kernel_call(pass_name: str, base, aux, target) -> Callable[[], Outputs]:
    """The compiled kernel itself, into a gradient buffer that exists: no page faults, no autograd, no dispatch."""
    ours_package()
    from auxkernels.cross_entropy import native as cross_entropy
    from auxkernels.cross_entropy.request import Gradients, LossTerms, Problem
    from auxkernels.native import missing
    from auxkernels.sources import Matrix

    if base.device.type != "cpu" or missing():
        raise Unavailable(missing() or f"the compiled module serves CPU tensors, these are on {base.device}")
    # NaN shows the check whatever the kernel leaves unwritten
    gradients = Gradients(aux=torch.full_like(aux, math.nan) if pass_name == "training" else None)
    problem = Problem(Matrix(base), Matrix(aux), target, None, -100, base.shape[-1])
    terms, no_fields = LossTerms(label_smoothing=0.0, z_loss=0.0, mean=True), 0

    def call() -> Outputs:
        loss, _ = cross_entropy.loss(problem, None, terms, no_fields, gradients)
        return Outputs(loss, tuple(grad for grad in gradients if grad is not None))

    return call


def _overhead_options(num_columns: int, device: torch.device) -> dict[str, dict]:
    weight = torch.linspace(0.5, 1.5, num_columns, device=device)
    options = {
        "ignore_index": {"ignore_index": -1},
        "weight": {"weight": weight},
        "label_smoothing": {"label_smoothing": 0.1},
        "z_loss": {"z_loss": 1e-4},
        "normalizer": {"normalizer": 7},
        "vocab_size": {"vocab_size": num_columns},
        "return_stats": {"return_stats": True},
        "recompute": {"recompute": True},
        "scale and softcap": {"scale": 0.5, "softcap": 30.0},
        "tensor scale": {"scale": torch.tensor(0.5, device=device)},
    }
    everything = {name: value for option in options.values() for name, value in option.items()}
    return {"plain": {}, **{f"+ {name}": option for name, option in options.items()}, "every option": everything}


def _overhead_implementations(base, aux, target, oracle: Oracle):
    """A call too small for its arithmetic to matter, without options, with each, and with all of them; a step of it."""
    options = _overhead_options(base.shape[1], base.device)

    def call_with(option: dict, base, aux, **fixed):
        package = ours_package()
        keywords = {name: value for name, value in option.items() if name not in ("scale", "softcap")} | fixed
        source = {name: option[name] for name in ("scale", "softcap") if name in option}

        def call():
            sources = [package.Logits(values, **source) for values in (base, aux)] if source else (base, aux)
            return package.aux_cross_entropy(*sources, target, **keywords)

        return call

    def check(implementation: Implementation, result) -> Accuracy:
        if implementation.name not in options:
            return oracle.check(implementation, result if isinstance(result, Outputs) else Outputs(result))
        option = options[implementation.name]
        expected = call_with(option, base.double(), aux.double(), backend="reference")()
        result, expected = (value[0] if isinstance(value, tuple) else value for value in (result, expected))
        error = (abs(result.double() - expected) / abs(expected)).item()
        problem = None if error <= 64 * torch.finfo(torch.float32).eps else f"loss error {error:.2g}"
        return Accuracy({"loss": float(f"{error:.3g}")}, problem)

    entries = [Implementation("eager", lambda: lambda: eager(base, aux, target), "yardstick")]
    for name, option in options.items():
        entries.append(Implementation(name, functools.partial(call_with, option, base, aux), "ours"))
    for name, function, role in ((EAGER_STEP, eager, "baseline"), (OUR_STEP, ours, "ours")):
        prepare = functools.partial(loss_call, function, "training", base, aux.clone(), target)
        entries.append(Implementation(name, prepare, role))
    return entries, check


def _allowed_bytes(row: dict) -> int:
    """The gradient, 32 bytes a row, and a row of float32 and 256 KiB a thread."""
    num_rows, num_columns = row["shape"]
    gradient_bytes = num_rows * num_columns * DTYPES[row["dtype"]].itemsize
    return gradient_bytes + 32 * num_rows + (4 * num_columns + (256 << 10)) * row["threads"]


def _cpu_bars() -> list[Threshold]:
    main, overhead = Measure(OP, (MAIN_SHAPE,)), Measure(OP, (OVERHEAD_SHAPE,))
    speed_up, share, cost, memory = main.speed_up, main.share_of_floor, main.extra_cost, main.peak_share
    own, kernel, relative = "auxkernels", "auxkernels kernel alone", overhead.relative_time
    in_loss, alone = "auxkernels return_stats", "auxkernels logit_stats"
    eager, upcast, compiled_upcast = ("eager",), ("eager upcast",), ("compile upcast",)
    return [
        at_least("bf16 training, times faster than eager upcast", 10, "x", speed_up, "training", "bf16", upcast),
        at_least("bf16 training, times faster than eager", 4.5, "x", speed_up, "training", "bf16", eager),
        at_least("bf16 training, times faster than compile", 2.5, "x", speed_up, "training", "bf16", compiled_upcast),
        at_least("fp32 training, times faster than eager", 4.5, "x", speed_up, "training", "fp32", eager),
        at_least("bf16 forward, times faster than eager", 6, "x", speed_up, "forward", "bf16", eager),
        at_least("bf16 training, kernel alone, share of floor", 65, "%", share, "training", "bf16", kernel),
        at_least("fp32 training, kernel alone, share of floor", 80, "%", share, "training", "fp32", kernel),
        at_least("bf16 training, whole call, share of floor", 45, "%", share, "training", "bf16", own),
        at_least("fp32 training, whole call, share of floor", 55, "%", share, "training", "fp32", own),
        at_most("bf16 all statistics over plain forward", 120, "%", cost, "stats", "bf16", in_loss, own),
        at_most("bf16 logit_stats over plain forward", 120, "%", cost, "stats", "bf16", alone, own),
        at_most("fp32 all statistics over plain forward", 70, "%", cost, "stats", "fp32", in_loss, own),
        at_most("fp32 logit_stats over plain forward", 70, "%", cost, "stats", "fp32", alone, own),
        at_most("bf16 all statistics, training", 70, "%", cost, "stats_training", "bf16", in_loss, own),
        at_most("fp32 all statistics, training", 45, "%", cost, "stats_training", "fp32", in_loss, own),
        at_most("bf16 training, peak memory of what is allowed", 100, "%", memory, "training", "bf16", _allowed_bytes),
        at_most("fp32 training, peak memory of what is allowed", 100, "%", memory, "training", "fp32", _allowed_bytes),
        at_most("plain call on [1, 32], of eager's time", 500, "%", relative, "overhead", "fp32", "plain", "eager"),
        at_most("with every option, of eager's", 1000, "%", relative, "overhead", "fp32", "every option", "eager"),
        at_most("with gradient, of eager's", 250, "%", relative, "overhead", "fp32", OUR_STEP, EAGER_STEP),
    ]


def _over_best_composite(name: str, rows: list[dict]) -> float | None:
    """Times faster than the fastest of eager, torch.compile and the other packages' kernels on a sum.

    None where no other package was timed: the best of what is left says nothing of them.
    """
    measure = Measure(OP, (GPU_SHAPE,), name)
    if measure.speed_up("training", "bf16", tuple(COMPOSITES), rows) is None:
        return None
    return measure.speed_up("training", "bf16", ("eager", "eager upcast", "compile upcast", *COMPOSITES), rows)


def _cuda_bars() -> list[Threshold]:
    """Of each implementation by its name: which of them "auto" is changes with what has been measured."""
    return [bar for name in OWN_BACKENDS for bar in _cuda_bars_of(name)]


def _cuda_bars_of(name: str) -> list[Threshold]:
    main, decode = Measure(OP, (GPU_SHAPE,)), Measure(OP, GPU_DECODE_SHAPES)
    title, plain = name.removeprefix("auxkernels "), f"{name} {LOSS_ALONE}"
    composite = f"{title} bf16 training, times faster than the best composite of existing kernels"

    def share(shape: tuple[int, int], bar: float) -> Threshold:
        text = f"{title} bf16 training {shape[0]} x {shape[1]}, share of floor"
        return at_least(text, bar, "%", Measure(OP, (shape,)).share_of_floor, "training", "bf16", name)

    def statistics(text: str, pass_name: str) -> Threshold:
        return at_most(f"{title} {text}", 5, "%", main.extra_cost, pass_name, "bf16", name, plain)

    def of_decode(dtype: str) -> Threshold:
        # where a call is a few launches there is no model to take a bar from: the first measurement sets it
        text = f"{title} {dtype} decode, 1 to 64 rows, of the floor's time"
        return at_most(text, None, "x", decode.of_floor, "forward", dtype, name)

    return [
        share(GPU_SHAPE, 90),
        at_least(composite, 1.6, "x", _over_best_composite, name),
        *(share(shape, 85) for shape in GPU_NARROW_SHAPES),
        statistics("bf16 logit_stats over plain forward", "stats"),
        statistics("bf16 all statistics, training", "stats_training"),
        *(of_decode(dtype) for dtype in ("bf16", "fp32")),
    ]


THRESHOLDS = {"cpu": _cpu_bars(), "cuda": _cuda_bars()}
