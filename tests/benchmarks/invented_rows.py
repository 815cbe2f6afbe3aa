"""Rows as a GPU would leave them, with invented times: for tests of what is made of rows, never for results."""

from __future__ import annotations

import torch

from benchmarks.cross_entropy import cases as cross_entropy
from benchmarks.cross_entropy.baselines import COMPOSITES
from benchmarks.heads import cases as cross_entropy_heads
from benchmarks.heads.baselines import FUSED_LOSSES
from benchmarks.soft_embedding import cases as soft_embedding

CUDA = torch.device("cuda")
PEERS = {"eager": "2.13", "compile": "2.13", "Liger": "0.8.5", "QuACK": "unavailable: quack-kernels is not installed"}


def environment(device: str = "Imaginary H100", capability: str = "9.0", date: str = "2026-12-01", **changes) -> dict:
    """The part of a row that does not depend on the case."""
    return {
        "device": device,
        "device_slug": device.lower().replace(" ", "-"),
        "capability": capability,
        "driver": "570.1",
        "cuda": "12.8",
        "torch": "2.13.0",
        "triton": "3.9.0",
        "threads": 8,
        "commit": "0123456789ab",
        "is_dirty": False,
        "date": f"{date}T00:00:00+00:00",
        "copy_gbps": 3000.0,
        "gemm_gflops": {"float32": 50_000, "bfloat16": 700_000},
        "peers": PEERS,
    } | changes


def check_row(part: str, status: str = "passed", detail: str = "3000 passed, 12 skipped in 99.1s", **changes) -> dict:
    found = {"part": part, "status": status, "detail": detail, "seconds": 1.0}
    return found | {"unusable": {"triton": None, "native": None}} | environment(**changes)


def rows_of_tests(status: str = "passed", **changes) -> list[dict]:
    """The rows of both implementations' tests."""
    return [check_row(f"tests-{name}", status, **changes) for name in ("triton", "native")]


def case_rows(op: str, spec, times_us: dict[str, float], floor_us: float, **changes) -> list[dict]:
    """One row for each implementation of a case."""
    roles = {"eager": "yardstick", "copy (floor)": "floor", "bare GEMMs (floor)": "floor"}
    case = {"op": op, "pass": spec.pass_name, "shape": list(spec.shape), "dtype": spec.dtype, "inputs": spec.inputs}
    return [
        case
        | {"implementation": name, "time_us": time_us, "share_of_floor": round(floor_us / time_us, 4)}
        | {"role": roles.get(name, "ours" if name.startswith("auxkernels") else "baseline"), "status": "ok"}
        | environment(**changes)
        for name, time_us in times_us.items()
    ]


def quick_grid(**changes) -> list[dict]:
    """Rows of the quick grid of every operator."""
    own = {"auxkernels (triton)": 1.35, "auxkernels (cuda)": 1.1, "auxkernels": 1.1}
    eager = {"eager": 4.0, "eager upcast": 7.0}
    found = []
    for op, floor, peers in (
        (cross_entropy, "copy (floor)", COMPOSITES),
        (cross_entropy_heads, "bare GEMMs (floor)", FUSED_LOSSES),
        (soft_embedding, "bare GEMMs (floor)", ()),
    ):
        for spec in op.quick_specs(CUDA):
            relative = {floor: 1.0, **own, **eager}
            if spec.baselines not in ("eager", "none"):
                relative |= {"compile" if op is soft_embedding else "compile upcast": 2.2}
            if spec.baselines in ("all", "slow"):
                relative |= {name: 2.0 + i for i, name in enumerate(peers)}
            if spec.pass_name.startswith("stats"):
                relative |= {"auxkernels logit_stats": 1.2, "auxkernels return_stats": 1.25}
            floor_us = max(4.0, spec.shape[0] * spec.shape[1] * 6 / 3e6)
            times_us = {name: floor_us * factor for name, factor in relative.items()}
            found += case_rows(op.OP, spec, times_us, floor_us, **changes)
    return found
