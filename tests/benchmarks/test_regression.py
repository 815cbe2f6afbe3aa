"""Regression cases for pytest-benchmark (``--benchmark-autosave``, ``--benchmark-compare``).

Each checks its result against the float64 oracle before it is timed. Eager is timed too, so that a slower machine is
not taken for a slower kernel.
"""

import pytest
import torch

from benchmarks.cross_entropy import cases as cross_entropy
from benchmarks.cross_entropy.cases import OVERHEAD_SHAPE, Spec
from benchmarks.heads import cases as cross_entropy_heads
from benchmarks.soft_embedding import cases as soft_embedding

HEAD_SHAPE = (1200, 8192, 96, 64)
LOOKUP_SHAPE = (1024, 1024, 128)
SPECS = [
    *(Spec(name, (64, 32000), dtype, "flat") for name in ("forward", "training") for dtype in ("bf16", "fp32")),
    *(Spec("training", (257, 1023), dtype, "peaked") for dtype in ("bf16", "fp32")),
    *(Spec(name, (64, 32000), "bf16", "flat") for name in ("both", "stats", "stats_training")),
    Spec("overhead", OVERHEAD_SHAPE, "fp32", "flat"),
    *(cross_entropy_heads.Spec("training", HEAD_SHAPE, dtype, "peaked", "eager") for dtype in ("bf16", "fp32")),
    *(cross_entropy_heads.Spec(name, HEAD_SHAPE, "bf16", "flat", "eager") for name in ("forward", "half_ignored")),
    *(soft_embedding.Spec(name, LOOKUP_SHAPE, "fp32", "peaked") for name in ("forward", "gumbel", "planner")),
    *(soft_embedding.Spec("training", LOOKUP_SHAPE, dtype, "peaked") for dtype in ("bf16", "fp32")),
    *(soft_embedding.Spec(name, LOOKUP_SHAPE, "bf16", "peaked") for name in ("straight_through", "decode_top_k")),
]
OPS = {op.Spec: op for op in (cross_entropy, cross_entropy_heads, soft_embedding)}

NAMES = {
    "training": ("eager", "auxkernels kernel alone", "auxkernels"),
    "stats": ("eager", "auxkernels logit_stats"),
    "stats_training": ("eager", "auxkernels return_stats"),
    "overhead": ("eager", "plain", "every option", "eager, with gradient", "plain, with gradient"),
}
DEFAULT_NAMES = ("eager", "auxkernels")


def names(spec):
    if isinstance(spec, soft_embedding.Spec):
        return (soft_embedding.yardstick_name(spec.pass_name), "auxkernels")
    return DEFAULT_NAMES if isinstance(spec, cross_entropy_heads.Spec) else NAMES.get(spec.pass_name, DEFAULT_NAMES)


CASES = [(spec, name) for spec in SPECS for name in names(spec)]


def _id(value):
    if isinstance(value, str):
        return value.replace(" ", "_")
    return f"{value.pass_name}-{'x'.join(map(str, value.shape))}-{value.dtype}-{value.inputs}"


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "name"), CASES, ids=_id)
def test_result_is_right_and_its_time_is_recorded(benchmark, spec, name):
    case = OPS[type(spec)].build(spec, torch.device("cpu"), seed=0)
    benchmark.group = case.title
    for implementation in case.implementations:
        if implementation.role == "yardstick" or implementation.name == name:
            call = implementation.prepare()
            accuracy = case.check(implementation, call())
            assert accuracy.problem is None
    benchmark.extra_info["fp64_error"] = accuracy.errors
    benchmark.pedantic(call, rounds=7, warmup_rounds=1, iterations=case.calls_per_sample)
