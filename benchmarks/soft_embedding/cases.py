"""Cases and implementations of soft_embedding: what is timed, against what, and the thresholds."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.soft_embedding.inputs import MODES, SEED, TEMPERATURE, TOP_K, Inputs, Mode, make_inputs
from benchmarks.soft_embedding.oracle import LookupOracle
from benchmarks.timing.harness import Case, Implementation, Unavailable, copy_floor
from benchmarks.timing.implementations import (
    DTYPES,
    OWN_BACKENDS,
    compiled,
    is_unusable,
    ours_package,
    unusable_is_unavailable,
)
from benchmarks.timing.thresholds import Measure, Threshold, at_least, at_most, worst_speed_up

OP = "soft_embedding"
PASSES = tuple(MODES)
INPUTS = ("flat", "peaked")
SHAPE_FORM = "NxKxD"
MAIN_SHAPE = (4096, 1024, 256)
PLANNER_SHAPE = (4096, 1024, 768)
DECODE_SHAPE = (8, 151936, 256)
GPU_SHAPE = (8192, 1024, 256)
GPU_WIDE_SHAPES = ((8192, 1024, 768), (8192, 1024, 1024))
GPU_DECODE_SHAPE = (64, 151936, 2048)
# few and many labels, narrow and wide tables: where a library product does less well, or a call is small
CPU_SHAPES = (
    *((64, 32, 16), (64, 1024, 64), (64, 8192, 256), (64, 50257, 64)),
    *((512, 256, 768), (512, 8192, 64), (4096, 32, 64), (4096, 256, 16), (4096, 1024, 768)),
)
BASELINES = ("eager", "compiled")
# a call below this many multiplications is timed several at a time
SMALL_CALL_PRODUCTS = 1 << 24


class Spec(NamedTuple):
    """Names one case without building it; `baselines` is one of BASELINES."""

    pass_name: str
    shape: tuple[int, int, int]
    dtype: str
    inputs: str
    baselines: str = "eager"


def quick_specs(device: torch.device) -> list[Spec]:
    """Every bar and pass, and shapes of all sizes for the bar that no case be slower than eager."""
    if device.type == "cuda":
        return _quick_specs_cuda()
    lookups = ["forward", "training"]
    return [
        *product_specs(lookups, [MAIN_SHAPE], ["fp32", "bf16"], ["flat"], "compiled"),
        *product_specs(lookups, [MAIN_SHAPE], ["fp32", "bf16"], ["peaked"]),
        Spec("gumbel", MAIN_SHAPE, "fp32", "flat", "compiled"),
        *product_specs(["gumbel_training", "straight_through"], [MAIN_SHAPE], ["fp32"], ["flat"]),
        *product_specs(["gumbel", "straight_through"], [MAIN_SHAPE], ["bf16"], ["flat"]),
        Spec("autocast", MAIN_SHAPE, "bf16", "flat", "compiled"),
        Spec("autocast", (4096, 1024, 768), "bf16", "flat"),
        *product_specs(["planner", "planner_training"], [PLANNER_SHAPE], ["fp32"], ["flat"]),
        *product_specs(["decode", "decode_top_k"], [DECODE_SHAPE], ["fp32", "bf16"], ["peaked"]),
        *product_specs(lookups, CPU_SHAPES, ["fp32"], ["flat"]),
    ]


def _quick_specs_cuda() -> list[Spec]:
    """Every bar, in half a minute: torch.compile where a bar asks for it."""
    return [
        Spec("training", GPU_SHAPE, "bf16", "flat", "compiled"),
        *product_specs(["forward", "gumbel", "straight_through"], [GPU_SHAPE], ["bf16"], ["flat"]),
        *product_specs(["training", "autocast"], GPU_WIDE_SHAPES, ["bf16"], ["flat"]),
        Spec("planner", PLANNER_SHAPE, "bf16", "flat"),
        *product_specs(["decode", "decode_top_k"], [GPU_DECODE_SHAPE], ["bf16"], ["peaked"]),
        *product_specs(["training"], [(64, 32, 16), (512, 8192, 64)], ["bf16"], ["flat"]),
    ]


def full_specs(device: torch.device) -> list[Spec]:
    """Forward and training over a grid of sizes, every other pass on its own, in both dtypes and kinds of input."""
    grid = itertools.product((64, 512, 4096), (32, 256, 1024, 8192, 50257), (16, 64, 256, 768))
    main, decode = (GPU_SHAPE, GPU_DECODE_SHAPE) if device.type == "cuda" else (MAIN_SHAPE, DECODE_SHAPE)
    grid = [shape for shape in grid if shape[0] * shape[1] <= 1 << 25 and shape != main]
    others = [name for name in PASSES[2:] if not (MODES[name].is_planner or name.startswith("decode"))]
    both = ("fp32", "bf16")
    return [
        *product_specs(["forward", "training"], grid, both, INPUTS),
        *product_specs(PASSES[:2], [main], both, INPUTS, "compiled"),
        *product_specs(others, [main, (4096, 1024, 768), (1023, 1025, 100)], both, INPUTS, "compiled"),
        *product_specs(["planner", "planner_training"], [PLANNER_SHAPE], both, INPUTS, "compiled"),
        *product_specs(["decode", "decode_top_k"], [decode, (1, 50257, 768)], both, INPUTS, "compiled"),
    ]


def product_specs(passes, shapes, dtypes, inputs, baselines: str = "eager") -> list[Spec]:
    """Shapes outermost and passes innermost, so that cases on the same inputs follow each other and share them."""
    return [Spec(p, s, d, i, baselines) for s, d, i, p in itertools.product(shapes, dtypes, inputs, passes)]


def build(spec: Spec, device: torch.device, seed: int, with_reference: bool = False) -> Case:
    """The case of a spec, with inputs drawn from `seed`; equal seeds give equal values on one kind of device."""
    mode = MODES[spec.pass_name]
    # the inputs depend on these alone, so that passes which share them find them drawn
    drawn = Mode(is_autocast=mode.is_autocast, is_planner=mode.is_planner, top_k=mode.top_k)
    inputs = _inputs(spec.shape, spec.dtype, spec.inputs, drawn, str(device), seed)
    oracle = LookupOracle(inputs, mode)
    implementations = _implementations(spec, mode, inputs, device, with_reference)
    floor_bytes, floor_flops = _floor_bytes(inputs, mode), _floor_flops(inputs, mode)
    if mode.has_products():
        implementations.append(bare_products(inputs, mode))
    implementations.append(copy_floor(floor_bytes, device))
    num_products = spec.shape[0] * spec.shape[1] * (spec.shape[2] if mode.has_products() else 16)
    calls_per_sample = max(1, min(SMALL_CALL_PRODUCTS // num_products, 50))
    place = (OP, spec.pass_name, spec.shape, spec.dtype, spec.inputs, device)
    return Case(*place, floor_bytes, implementations, oracle.check, calls_per_sample, floor_flops)


@functools.lru_cache(maxsize=1)
def _inputs(shape, dtype: str, inputs: str, mode: Mode, device: str, seed: int) -> Inputs:
    return make_inputs(shape, DTYPES[dtype], inputs, mode, torch.device(device), seed)


# -- implementations ---------------------------------------------------------------------------------------------------


def eager(scores, table, segment_ids):
    return torch.softmax(scores / TEMPERATURE, -1) @ table


def eager_gumbel(scores, table, segment_ids):
    return F.gumbel_softmax(scores, TEMPERATURE) @ table


def eager_one_hot(scores, table, segment_ids):
    return F.one_hot(scores.argmax(-1), scores.shape[-1]).to(table.dtype) @ table


def eager_top_k(scores, table, segment_ids):
    """What decoding loops run: select, renormalise, gather [N, k, D], multiply, sum."""
    values, labels = torch.topk(scores, TOP_K)
    weights = torch.softmax(values / TEMPERATURE, -1)
    return (weights.unsqueeze(-1) * table[labels]).sum(1)


def eager_each_token(scores, tables, segment_ids):
    """What the planner's public code does: every conditioned layer mixes its labels anew for every token."""
    return tuple(torch.softmax(scores[segment_ids] / TEMPERATURE, -1) @ table for table in tables)


def eager_each_segment(scores, tables, segment_ids):
    """The same mixtures, once for each segment, and then spread over its tokens."""
    return (torch.softmax(scores / TEMPERATURE, -1) @ tables).index_select(1, segment_ids)


def ours(mode: Mode, backend: str) -> Callable:
    """The call as a program makes it, with the options that the pass has."""
    lookup = getattr(ours_package(), "soft_embedding", None)
    if lookup is None:
        raise Unavailable("this auxkernels has no soft_embedding")
    chosen = {"hard": mode.hard, "gumbel": mode.gumbel, "top_k": mode.top_k, "seed": SEED if mode.gumbel else None}
    options = {name: value for name, value in chosen.items() if value} | {"temperature": TEMPERATURE}
    if backend != "auto":
        options["backend"] = backend

    def call(scores, table, segment_ids):
        try:  # unusable_is_unavailable would be a fifth of the shortest call
            return lookup(scores, table, **options)
        except RuntimeError as error:
            if is_unusable(error):
                raise Unavailable(str(error)) from error
            raise

    return call


def our_planner(backend: str, scores, tables, segment_ids):
    with unusable_is_unavailable():
        return _planner_module(tables, backend)(scores, segment_ids=segment_ids)


@functools.lru_cache(maxsize=4)  # a module for each backend that is timed in turn
def _planner_module(tables: nn.Parameter, backend: str) -> nn.Module:
    """The module around tables that exist."""
    ours_package()
    from auxkernels.nn import SoftEmbedding

    num_tables, num_labels, width = tables.shape
    module = SoftEmbedding(num_labels, width, num_tables, temperature=TEMPERATURE, backend=backend, device="meta")
    module.weight = tables
    return module


def lookup_call(function: Callable, mode: Mode, inputs: Inputs) -> Callable[[], tuple]:
    """The work of a pass as one call without arguments, which returns the mixture and the gradients of the pass.

    `function` returns the mixture as one tensor, or a tuple with that of each table.
    """
    scores = inputs.scores.detach().requires_grad_(mode.is_training)
    table = nn.Parameter(inputs.table, requires_grad=mode.is_training)
    device_type = scores.device.type

    def call() -> tuple:
        cast = torch.autocast(device_type, torch.bfloat16) if mode.is_autocast else contextlib.nullcontext()
        with cast:
            mixture = function(scores, table, inputs.segment_ids)
        if not mode.is_training:
            return (mixture,)
        if isinstance(mixture, tuple):
            return mixture, *torch.autograd.grad(mixture, (scores, table), tuple(inputs.grad))
        gradients = torch.autograd.grad(mixture, (scores, table), inputs.grad.to(mixture.dtype))
        return mixture.detach(), *gradients

    return call


def _eager_forms(mode: Mode) -> dict[str, Callable]:
    """What plain torch offers for a pass, by name; the first is the yardstick."""
    if mode.is_planner:
        return {"eager, each token": eager_each_token, "eager, each segment": eager_each_segment}
    if mode.gumbel:
        return {"F.gumbel_softmax": eager_gumbel}
    if mode.hard:
        return {"F.one_hot": eager_one_hot}
    return {"eager": eager_top_k if mode.top_k else eager}


def yardstick_name(pass_name: str) -> str:
    return next(iter(_eager_forms(MODES[pass_name])))


def _implementations(spec: Spec, mode: Mode, inputs: Inputs, device, with_reference: bool) -> list[Implementation]:
    def entry(name: str, get_function: Callable, role: str = "baseline"):
        return Implementation(name, lambda: lookup_call(get_function(), mode, inputs), role)

    def own(backend: str) -> Callable:
        return functools.partial(our_planner, backend) if mode.is_planner else ours(mode, backend)

    forms = _eager_forms(mode)
    entries = [
        entry(name, lambda form=form: form, "baseline" if index else "yardstick")
        for index, (name, form) in enumerate(forms.items())
    ]
    if spec.baselines == "compiled":
        entries.append(entry("compile", compiled(list(forms.values())[-1])))
    if with_reference:
        entries.append(entry("auxkernels reference", lambda: own("reference"), "ours"))
    for name, backend in OWN_BACKENDS.items() if device.type == "cuda" else ():
        entries.append(entry(name, lambda backend=backend: own(backend), "ours"))
    return [*entries, entry("auxkernels", lambda: own("auto"), "ours")]


# -- floors ------------------------------------------------------------------------------------------------------------


def _floor_bytes(inputs: Inputs, mode: Mode) -> int:
    """Every input read once by each of forward and backward, every output written once."""
    num_tables, num_segments, num_rows, num_labels, width = inputs.sizes()
    scores = num_segments * num_labels * inputs.scores.element_size()
    table = inputs.table.numel() * inputs.table.element_size()
    mixture = num_tables * num_rows * width * inputs.grad.element_size()
    if mode.hard or mode.top_k:  # of the table only the chosen rows are read
        return scores + mixture * (1 + (mode.top_k or 1))
    return 3 * scores + 3 * table + 2 * mixture if mode.is_training else scores + table + mixture


def _floor_flops(inputs: Inputs, mode: Mode) -> int:
    if not mode.has_products():
        return 0
    num_tables, num_segments, _, num_labels, width = inputs.sizes()
    return (6 if mode.is_training else 2) * num_tables * num_segments * num_labels * width


def bare_products(inputs: Inputs, mode: Mode) -> Implementation:
    """The pass's matrix products alone, each into fresh memory: a floor, measured in every round."""

    def prepare():
        num_tables, num_segments, _, num_labels, width = inputs.sizes()
        dtype = torch.bfloat16 if mode.is_autocast else inputs.scores.dtype
        draw = functools.partial(torch.randn, device=inputs.scores.device)
        p, table, grad = (
            draw(*size).to(dtype) for size in ((num_segments, num_labels), (num_labels, width), (num_segments, width))
        )

        def call():
            for _ in range(num_tables):
                p @ table
                if mode.is_training:
                    grad @ table.T
                    p.T @ grad

        return call

    return Implementation("bare GEMMs (floor)", prepare, role="floor")


# -- bars --------------------------------------------------------------------------------------------------------------


def _cpu_bars() -> list[Threshold]:
    main, planner = Measure(OP, (MAIN_SHAPE,)).speed_up, Measure(OP, (PLANNER_SHAPE,)).speed_up
    token, segment = ("eager, each token",), ("eager, each segment",)
    return [
        at_least("fp32 forward, times faster than eager", 1.15, "x", main, "forward", "fp32", ("eager",)),
        at_least("fp32 training, times faster than eager", 1.1, "x", main, "training", "fp32", ("eager",)),
        at_least("fp32 with noise, than F.gumbel_softmax", 5, "x", main, "gumbel", "fp32", ("F.gumbel_softmax",)),
        at_least("fp32 straight-through, than F.one_hot", 5, "x", main, "straight_through", "fp32", ("F.one_hot",)),
        at_least("fp32 planner, than a mixture for each token", 10, "x", planner, "planner", "fp32", token),
        at_least("fp32 planner, than one for each segment", 0.97, "x", planner, "planner", "fp32", segment),
        at_least("the slowest case, times faster than eager", 0.97, "x", worst_speed_up, OP),
    ]


def _cuda_bars() -> list[Threshold]:
    main, wide = Measure(OP, (GPU_SHAPE,)).speed_up, Measure(OP, GPU_WIDE_SHAPES).speed_up
    decode_us, gumbel = Measure(OP, (GPU_DECODE_SHAPE,)).time_us, ("F.gumbel_softmax",)
    return [
        at_least("bf16 training, D 256, times faster than eager", 1.7, "x", main, "training", "bf16", ("eager",)),
        at_least("bf16 training, D 256, than compile", 1.2, "x", main, "training", "bf16", ("compile",)),
        at_least("bf16 training, D 768 and 1024, than eager", 1.25, "x", wide, "training", "bf16", ("eager",)),
        at_least("autocast training, D 768 and 1024, than eager", 2, "x", wide, "autocast", "bf16", ("eager",)),
        at_least("bf16 with noise, than F.gumbel_softmax", 3, "x", main, "gumbel", "bf16", gumbel),
        # a few launches: the first measurement sets the bar
        at_most("bf16 top 16 of 151936 labels, 64 rows", None, "us", decode_us, "decode_top_k", "bf16", "auxkernels"),
        at_least("the slowest case, times faster than eager", 0.97, "x", worst_speed_up, OP),
    ]


THRESHOLDS = {"cpu": _cpu_bars(), "cuda": _cuda_bars()}
