"""The row kernel of sampling in Triton: from tensors, checked in chunked.py, to a launch.

Nothing is read from the device: parameters are tensors there.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...sources import Matrix
from ...tritonlib import launch
from ..request import INTEGERS, SampleRows
from .kernels import WIDTH, Fields, Given, Source, sample_kernel

TAKES_SUMS = False
MOST_LANES = 512  # a lane for each thread: with two of them float64 spills


def sample(rows: SampleRows, fields: list[Tensor]) -> None:
    """Writes the token of each row and, where there is room for them, the fields of `SampleStats`."""
    base, aux = (_source(side) for side in (rows.base, rows.aux))
    like = rows.base[0].values
    launch.check_device(like)
    given: dict[str, object] = {}
    for name, value in rows.parameters._asdict().items():
        dtype = torch.int64 if name in INTEGERS else torch.float64
        if isinstance(value, Tensor):
            value = value.to(dtype).contiguous()
        elif value is not None:
            value = torch.full((), value, dtype=dtype, device=like.device)
        given |= {name: value, f"{name}_stride": int(value is not None and value.dim() > 0)}
    lanes = lanes_of(rows.vocab_size)
    outputs = Fields(*fields, *[None] * (len(Fields._fields) - len(fields)))
    with launch.on_device_of(like):
        launch.run(
            sample_kernel,
            rows.num_rows,
            base,
            aux,
            Given(**given),
            outputs,
            rows.first_row,
            rows.vocab_size,
            VLLM=rows.order == "vllm",
            LANES=lanes,
            num_warps=max(lanes // launch.device_of(like.device).warp_size, 1),
        )


def lanes_of(vocab_size: int) -> int:
    return min(triton.next_power_of_2(triton.cdiv(vocab_size, WIDTH.value)), MOST_LANES)


def _source(side: list[Matrix]) -> Source | None:
    if not side:
        return None
    (matrix,) = side
    values, scale = matrix.values, matrix.scale
    if values.stride(-1) != 1 and values.shape[-1] > 1:
        values = values.contiguous()
    if scale is not None and not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=torch.float32, device=values.device)
    stride = int(scale is not None and scale.dim() > 0)
    return Source(values, values.stride(0), launch.numbers(scale), stride, matrix.softcap)
