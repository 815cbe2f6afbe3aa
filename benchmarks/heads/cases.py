"""Cases and implementations of aux_cross_entropy on `Head` sources: what is timed, against what, and the thresholds."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.cross_entropy.cases import eager_statistics
from benchmarks.heads.baselines import FUSED_LOSSES, TORCH_CHUNKED, TORCH_PLAIN, joined_call
from benchmarks.heads.inputs import Heads, make_heads, with_half_ignored
from benchmarks.heads.oracle import HeadsOracle
from benchmarks.timing.harness import Case, Implementation, Outputs, Unavailable
from benchmarks.timing.implementations import DTYPES, OWN_BACKENDS, compiled, ours_package, unusable_is_unavailable
from benchmarks.timing.thresholds import Measure, Threshold, at_least, at_most

OP = "cross_entropy_heads"
PASSES = ("forward", "training", "both", "stats", "half_ignored", "lora")
INPUTS = ("flat", "peaked")
# inputs whose gradient a pass computes; the base is frozen unless it is named
WANTED = {
    "forward": (),
    "training": ("h_aux", "w_aux"),
    "both": ("h_base", "w_base", "h_aux", "w_aux"),
    "stats": (),
    "half_ignored": ("h_aux", "w_aux"),
    "lora": ("a", "w_aux"),
}
SHAPE_FORM = "NxVxD_bxD_a"
MAIN_SHAPE = (2048, 50257, 768, 256)
LORA_SHAPE = (2048, 50257, 768, 16)
MEMORY_SHAPE = (4096, 65536, 768, 256)
GPU_SHAPE = (8192, 128256, 4096, 256)
GPU_LORA_SHAPE = (8192, 128256, 4096, 16)
# what is timed beside auxkernels and the bare matrix products, each level with those before it
BASELINES = ("none", "eager", "upcast", "compiled", "slow")
SLOW_ROUNDS = 3


class Spec(NamedTuple):
    """Names one case without building it; `baselines` is one of BASELINES."""

    pass_name: str
    shape: tuple[int, int, int, int]
    dtype: str
    inputs: str
    baselines: str = "compiled"


def quick_specs(device: torch.device) -> list[Spec]:
    """One case for every bar and pass, in a few minutes on two cores; larger shapes on a GPU."""
    if device.type == "cuda":
        # the last takes half of the time: other packages compile and tune themselves
        return [
            Spec("training", GPU_SHAPE, "bf16", "peaked", "eager"),
            *product_specs(["forward", "stats"], [GPU_SHAPE], ["bf16"], ["flat"], "eager"),
            Spec("lora", GPU_LORA_SHAPE, "bf16", "flat", "eager"),
            Spec("training", GPU_SHAPE, "bf16", "flat", "slow"),
        ]
    return [
        Spec("training", MAIN_SHAPE, "bf16", "flat"),
        *product_specs(["forward", "both", "stats", "half_ignored"], [MAIN_SHAPE], ["bf16"], ["flat"], "eager"),
        Spec("training", MAIN_SHAPE, "bf16", "peaked", "upcast"),
        Spec("training", MAIN_SHAPE, "fp32", "flat", "eager"),
        # eager's gradients of confident rows are full of denormals here, which make its products many times slower
        Spec("training", MAIN_SHAPE, "fp32", "peaked", "none"),
        Spec("lora", LORA_SHAPE, "bf16", "flat", "eager"),
        *product_specs(["training"], [MEMORY_SHAPE], ["bf16", "fp32"], ["flat"], "none"),
    ]


def full_specs(device: torch.device) -> list[Spec]:
    """Every pass, dtype and kind of input over some vocabularies, a wide base, and rows that fill no chunk."""
    if device.type == "cuda":
        shapes = [GPU_SHAPE, (4096, 128256, 2048, 256), (8191, 50257, 768, 256), (2048, 262144, 2048, 512)]
    else:
        shapes = [MAIN_SHAPE, (512, 128256, 512, 64), (1023, 4095, 256, 256), (64, 32000, 1024, 128)]
    specs = product_specs(PASSES, shapes, ("bf16", "fp32"), INPUTS, "slow")
    return specs + product_specs(["training"], [MEMORY_SHAPE], ("bf16", "fp32"), ["flat"], "none")


def product_specs(passes, shapes, dtypes, inputs, baselines: str = "compiled") -> list[Spec]:
    """Shapes outermost and passes innermost, so that cases on the same inputs follow each other and share them."""
    return [Spec(p, s, d, i, baselines) for s, d, i, p in itertools.product(shapes, dtypes, inputs, passes)]


def build(spec: Spec, device: torch.device, seed: int, with_reference: bool = False) -> Case:
    """The case of a spec, with inputs drawn from `seed`; equal seeds give equal values on one kind of device."""
    is_lora, has_ignored = spec.pass_name == "lora", spec.pass_name == "half_ignored"
    drawn = (spec.shape, spec.dtype, spec.inputs, is_lora, str(device), seed)
    heads, oracle = _heads_and_oracle(drawn, has_ignored, WANTED[spec.pass_name])
    check = oracle.check
    implementations = _implementations(spec, heads, device, with_reference)
    if has_ignored:
        whole_heads, whole_oracle = _heads_and_oracle(drawn, False, WANTED[spec.pass_name])
        whole = Implementation(
            "auxkernels, no row ignored", lambda: loss_call(ours, spec.pass_name, whole_heads), "ours"
        )
        implementations.append(whole)

        def check(implementation, outputs):
            return (whole_oracle if implementation is whole else oracle).check(implementation, outputs)

    num_rows = len(oracle.kept)
    implementations.append(bare_products(spec, num_rows, device))
    place = (OP, spec.pass_name, spec.shape, spec.dtype, spec.inputs, device)
    return Case(*place, 0, implementations, check, floor_flops=_floor_flops(spec, num_rows))


@functools.lru_cache(maxsize=2)
def _heads_and_oracle(drawn: tuple, has_ignored: bool, wanted: tuple[str, ...]) -> tuple[Heads, HeadsOracle]:
    heads, seed = _heads(*drawn), drawn[-1]
    heads = with_half_ignored(heads, seed) if has_ignored else heads
    return heads, HeadsOracle(heads, wanted, seed)


@functools.lru_cache(maxsize=1)
def _heads(shape, dtype: str, inputs: str, is_lora: bool, device: str, seed: int) -> Heads:
    return make_heads(shape, DTYPES[dtype], inputs, is_lora, torch.device(device), seed)


def _head_class():
    try:
        return ours_package().Head
    except AttributeError as error:
        raise Unavailable("this auxkernels has no Head") from error


def _logits(h_base, w_base, h_aux, w_aux, scale: float):
    base, aux = h_base @ w_base.T, h_aux @ w_aux.T
    return base, aux if scale == 1 else scale * aux


def eager(h_base, w_base, h_aux, w_aux, target, scale):
    """What torch does with stored logits whose sum is in the inputs' dtype."""
    base, aux = _logits(h_base, w_base, h_aux, w_aux, scale)
    return F.cross_entropy(base + aux, target)


def eager_upcast(h_base, w_base, h_aux, w_aux, target, scale):
    """What Hugging Face's causal language models run: the sum in float32."""
    base, aux = _logits(h_base, w_base, h_aux, w_aux, scale)
    return F.cross_entropy(base.float() + aux.float(), target)


def eager_head_statistics(h_base, w_base, h_aux, w_aux, target, scale):
    return eager_statistics(*_logits(h_base, w_base, h_aux, w_aux, scale), target)


def ours(h_base, w_base, h_aux, w_aux, target, scale, **options):
    head = _head_class()
    return ours_package().aux_cross_entropy(head(h_base, w_base), head(h_aux, w_aux, scale=scale), target, **options)


def ours_on(backend: str, pass_name: str, *heads_and_target):
    function = our_statistics if pass_name == "stats" else ours
    with unusable_is_unavailable():
        return function(*heads_and_target, backend=backend)


def ours_on_stored_logits(h_base, w_base, h_aux, w_aux, target, scale):
    package = ours_package()
    aux = package.Logits(h_aux @ w_aux.T, scale=scale)
    return package.aux_cross_entropy(h_base @ w_base.T, aux, target)


def our_statistics(h_base, w_base, h_aux, w_aux, target, scale, **options):
    head = _head_class()
    return ours_package().logit_stats(head(h_base, w_base), head(h_aux, w_aux, scale=scale), target, **options)


def loss_call(function: Callable, pass_name: str, heads: Heads) -> Callable[[], Outputs]:
    """The work of a pass as one call without arguments. `function` returns the loss or statistics."""
    wanted = WANTED[pass_name]
    leaves = heads._replace(**{name: getattr(heads, name).detach().requires_grad_() for name in wanted})

    def call() -> Outputs:
        h_aux = leaves.h_base @ leaves.a.T if leaves.is_lora else leaves.h_aux
        result = function(leaves.h_base, leaves.w_base, h_aux, leaves.w_aux, leaves.target, leaves.scale)
        if not isinstance(result, torch.Tensor):
            return Outputs(statistics=result)
        gradients = torch.autograd.grad(result, [getattr(leaves, name) for name in wanted]) if wanted else ()
        return Outputs(result.detach(), gradients)

    return call


def _implementations(spec: Spec, heads: Heads, device: torch.device, with_reference: bool) -> list[Implementation]:
    """The yardstick comes first: the checks of ours compare with its error."""
    is_cuda, is_stats = device.type == "cuda", spec.pass_name == "stats"
    has = {name: BASELINES.index(spec.baselines) >= level for level, name in enumerate(BASELINES)}

    def entry(name: str, function: Callable | None, role: str = "baseline", get_function: Callable | None = None):
        get_function = get_function or (lambda: function)
        max_rounds = SLOW_ROUNDS if role != "ours" and not is_cuda else None
        return Implementation(name, lambda: loss_call(get_function(), spec.pass_name, heads), role, max_rounds)

    entries = []
    if has["eager"]:
        entries.append(entry("eager", eager_head_statistics if is_stats else eager, "yardstick"))
    if has["upcast"] and not is_stats:
        if spec.dtype != "fp32":
            entries.append(entry("eager upcast", eager_upcast))
        entries.append(entry("auxkernels, stored logits", ours_on_stored_logits))
    if has["compiled"] and not is_stats:
        entries.append(entry("compile upcast", None, get_function=compiled(eager_upcast)))
        entries += _joined_implementations(spec, heads, is_cuda)
    if with_reference and not is_stats:
        entries.append(entry("auxkernels reference", functools.partial(ours, backend="reference"), "ours"))
    if is_stats:
        entries.append(entry("auxkernels logit_stats", our_statistics, "ours"))
    for name, backend in OWN_BACKENDS.items() if is_cuda else ():
        entries.append(entry(name, functools.partial(ours_on, backend, spec.pass_name), "ours"))
    return [*entries, entry("auxkernels", ours, "ours")]


def _joined_implementations(spec: Spec, heads: Heads, is_cuda: bool) -> list[Implementation]:
    """Fused losses that take one head, on both heads side by side: each computes the frozen base's gradients too."""
    if heads.is_lora:
        return []
    names = [TORCH_PLAIN, TORCH_CHUNKED] if spec.baselines == "slow" else [TORCH_PLAIN]
    if is_cuda:
        names = list(FUSED_LOSSES)
    wanted, max_rounds = WANTED[spec.pass_name], None if is_cuda else SLOW_ROUNDS
    return [
        Implementation(name, functools.partial(joined_call, name, heads, wanted), max_rounds=max_rounds)
        for name in names
    ]


def _products(pass_name: str) -> list[tuple[str, str]]:
    """The matrix products that a pass cannot do without, by operands; g is the gradient of one source's logits."""
    products = [("h_base", "w_base.T"), ("h_aux", "w_aux.T")]
    wanted = WANTED[pass_name]
    if pass_name == "lora":
        products += [("h_base", "a.T"), ("g", "w_aux"), ("h_aux.T", "h_base")]
    products += [("g", name.replace("h_", "w_")) for name in wanted if name.startswith("h_")]
    return products + [("g.T", name.replace("w_", "h_")) for name in wanted if name.startswith("w_")]


def _operand_shapes(spec: Spec, num_rows: int) -> dict[str, tuple[int, int]]:
    _, num_columns, d_base, d_aux = spec.shape
    shapes = {"g": (num_rows, num_columns), "a": (d_aux, d_base)}
    for source, width in (("base", d_base), ("aux", d_aux)):
        shapes |= {f"h_{source}": (num_rows, width), f"w_{source}": (num_columns, width)}
    return shapes | {f"{name}.T": (columns, rows) for name, (rows, columns) in shapes.items()}


def _floor_flops(spec: Spec, num_rows: int) -> int:
    shapes = _operand_shapes(spec, num_rows)
    return sum(2 * shapes[left][0] * shapes[left][1] * shapes[right][1] for left, right in _products(spec.pass_name))


def bare_products(spec: Spec, num_rows: int, device: torch.device) -> Implementation:
    """The pass's matrix products alone, each into fresh memory: the floor, measured in every round."""

    def prepare():
        shapes, products = _operand_shapes(spec, num_rows), _products(spec.pass_name)
        names = {operand.removesuffix(".T") for product in products for operand in product}
        tensors = {name: torch.empty(shapes[name], dtype=DTYPES[spec.dtype], device=device) for name in sorted(names)}
        for values in tensors.values():
            values.normal_()
        tensors |= {f"{name}.T": values.T for name, values in tensors.items()}

        def call():
            for left, right in products:
                tensors[left] @ tensors[right]

        return call

    return Implementation("bare GEMMs (floor)", prepare, role="floor")


def _one_logit_tensor(row: dict) -> int:
    return row["shape"][0] * row["shape"][1] * DTYPES[row["dtype"]].itemsize


def _cpu_bars() -> list[Threshold]:
    main, large = Measure(OP, (MAIN_SHAPE,)), Measure(OP, (MEMORY_SHAPE,))
    speed_up, share, own = main.speed_up, main.share_of_floor, "auxkernels"
    upcast, half = ("eager upcast",), ("half_ignored", "bf16", own, "auxkernels, no row ignored")
    memory = "training, peak memory of one [N, V] tensor"
    return [
        at_least("bf16 training, times faster than eager upcast", 4.5, "x", speed_up, "training", "bf16", upcast),
        at_least("bf16 training, times faster than eager", 1.6, "x", speed_up, "training", "bf16", ("eager",)),
        at_least("bf16 training, share of the bare GEMMs", 80, "%", share, "training", "bf16", own),
        at_least("fp32 training, times faster than eager", 1.05, "x", speed_up, "training", "fp32", ("eager",)),
        at_least("fp32 training, share of the bare GEMMs", 80, "%", share, "training", "fp32", own),
        at_most("bf16 half of the rows ignored, of the whole's time", 60, "%", main.relative_time, *half),
        at_most(f"bf16 {memory}", 100, "%", large.peak_share, "training", "bf16", _one_logit_tensor),
        at_most(f"fp32 {memory}", 100, "%", large.peak_share, "training", "fp32", _one_logit_tensor),
    ]


def _cuda_bars() -> list[Threshold]:
    """Of each implementation by its name: which of them "auto" is changes with what has been measured."""
    bars = []
    for name in OWN_BACKENDS:
        main, title = Measure(OP, (GPU_SHAPE,), name), f"{name.removeprefix('auxkernels ')} bf16 training"
        share, fused = f"{title}, share of the bare GEMMs", f"{title}, times faster than the best fused loss"
        bars.append(at_least(share, 69, "%", main.share_of_floor, "training", "bf16", name))
        bars.append(at_least(fused, 2, "x", main.speed_up, "training", "bf16", tuple(FUSED_LOSSES)))
    return bars


THRESHOLDS = {"cpu": _cpu_bars(), "cuda": _cuda_bars()}
