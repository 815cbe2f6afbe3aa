"""Where the compiled CUDA kernels were measured to be faster than Triton's: what backend="auto" goes by.

`native/cuda_choices.json`, written by `python -m benchmarks.choices` from measurements on devices on which the test
suite has passed, holds boxes of sizes for each compute capability. Without it, and outside of its boxes, "auto" is
Triton.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch

from .sources import Logits, Source

PATH = Path(__file__).parent / "native" / "cuda_choices.json"


class Workload(NamedTuple):
    """A call of the kind that is measured: one base and one auxiliary of one dtype, without options."""

    pass_name: str  # forward, training (a gradient for the auxiliary), both, stats, stats_training
    num_bytes: int  # of a logit
    vocab_size: int
    num_rows: int


def read_table(path: Path) -> dict[str, dict]:
    return json.loads(path.read_text()) if path.exists() else {}


# read once, at import: to torch.compile it is a constant
_TABLE = read_table(PATH)


def _capability(device: torch.device) -> str:
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


# torch.compiler.assume_constant_result does this too, but imports the compiler, which takes seconds
_capability._dynamo_marked_constant = True


def workload_of(base: list[Source], aux: list[Source], vocab_size: int, has_statistics: bool) -> Workload | None:
    """The workload of a call on these sources; None where it is of no kind that is measured."""
    if len(base) != 1 or len(aux) != 1 or not all(_is_plain(source) for source in (*base, *aux)):
        return None
    z_base, z_aux = base[0].values, aux[0].values
    if z_base.dtype != z_aux.dtype:
        return None
    needs_base, needs_aux = (torch.is_grad_enabled() and z.requires_grad for z in (z_base, z_aux))
    if needs_base:
        pass_name = None if has_statistics or not needs_aux else "both"
    elif has_statistics:
        pass_name = "stats_training" if needs_aux else "stats"
    else:
        pass_name = "training" if needs_aux else "forward"
    if pass_name is None:
        return None
    return Workload(pass_name, z_base.element_size(), vocab_size, z_base.shape[:-1].numel())


def _is_plain(source: Source) -> bool:
    if not isinstance(source, Logits) or isinstance(source.scale, torch.Tensor):
        return False
    return source.scale == 1.0 and source.softcap is None


def prefers_cuda(device: torch.device, workload: Workload) -> bool:
    """Whether measurements on this kind of device say that the compiled kernels are faster here."""
    if not _TABLE:
        return False
    boxes = _TABLE.get(_capability(device), {}).get("faster", [])
    return any(_is_inside(box, workload) for box in boxes)


def _is_inside(box: dict, workload: Workload) -> bool:
    if (box["pass"], box["num_bytes"]) != (workload.pass_name, workload.num_bytes):
        return False
    if not box["min_vocab"] <= workload.vocab_size <= box["max_vocab"]:
        return False
    # the number of rows changes from step to step, and torch.compile would compile again where a box ends
    return torch.compiler.is_compiling() or box["min_rows"] <= workload.num_rows <= box["max_rows"]
