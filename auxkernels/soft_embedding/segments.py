"""One row for each segment, broadcast to the segment's tokens; backward is a sum over each segment in fixed order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks, dispatch, memory
from ..autograd import apply, once

_library = torch.library.Library("auxkernels", "FRAGMENT")
_library.define("segments_to_tokens(Tensor rows, Tensor segment_ids, str backend) -> Tensor")
_library.define("sum_of_segments(Tensor tokens, Tensor segment_ids, SymInt num_segments, str backend) -> Tensor")
_to_tokens = torch.ops.auxkernels.segments_to_tokens.default
_sum = torch.ops.auxkernels.sum_of_segments.default


def segments_to_tokens(rows: Tensor, segment_ids: Tensor, backend: str = "auto") -> Tensor:
    """rows[..., segment_ids, :], zeros where the id is negative, with a gradient that repeats bit for bit.

    rows          [S, D] or [L, S, D] floating point, one row for each of S segments.
    segment_ids   [*] int64 or int32, below S; negative: a token of no segment.
    Returns       [*, D] or [L, *, D]. Segments without tokens get a gradient of zero.
    Raises        TypeError, ValueError: dtype, shape, device. IndexError: an id of S or more, on CPU; on GPU such a
                  token's row is NaN.
    """
    checks.segments(rows, segment_ids)
    backend = dispatch.resolve(backend, rows.device, rows.dtype if rows.dtype == torch.float64 else torch.float32)
    return apply(_SegmentsToTokens, "segments_to_tokens", rows, segment_ids, backend)


class _SegmentsToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, segment_ids: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(segment_ids)
        ctx.num_segments, ctx.backend = rows.shape[-2], backend
        return _to_tokens(rows, segment_ids, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (segment_ids,) = ctx.saved_tensors
        total = _sum(grad, segment_ids, ctx.num_segments, ctx.backend)
        return (*once("segments_to_tokens", [total], (grad,)), None, None)


def _compute(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _labels(segment_ids: Tensor) -> Tensor:
    """The segments as the row kernels take labels, [tokens, 1]."""
    return segment_ids.reshape(-1, 1).long().contiguous()


def _raise_unknown_segment(segment_ids: Tensor, num_segments: int) -> None:
    """IndexError for a CPU id of no segment."""
    if segment_ids.device.type == "cpu" and segment_ids.numel() and int(segment_ids.max()) >= num_segments:
        raise IndexError(f"segment_ids must be below {num_segments}, got {int(segment_ids.max())}")


def _gather(rows: Tensor, segment_ids: Tensor, backend: str) -> Tensor:
    checks.segments(rows, segment_ids)
    num_segments, width = rows.shape[-2:]
    _raise_unknown_segment(segment_ids, num_segments)
    out = memory.empty(rows, (*rows.shape[:-2], *segment_ids.shape, width))
    if out.numel() == 0:
        return out
    labels, num_tables = _labels(segment_ids), rows.shape[:-2].numel()
    tables, flat = rows.reshape(num_tables, num_segments, width), out.view(num_tables, len(labels), width)
    if backend == "reference":
        index = labels.squeeze(1)
        if num_segments == 0:
            return out.zero_()
        unknown = (index >= num_segments).unsqueeze(1)
        picked = tables[:, index.clamp(0, num_segments - 1)].masked_fill(unknown, torch.nan)
        flat.copy_(picked.masked_fill(labels < 0, 0.0))
    else:
        kernels = dispatch.implementation("soft_embedding", backend)
        kernels.gather(tables.contiguous(), labels, None, flat, _compute(rows) == torch.float64)
    return out


def _sum_of(tokens: Tensor, segment_ids: Tensor, num_segments: int, backend: str) -> Tensor:
    checks.segment_tokens(tokens, segment_ids, num_segments)
    _raise_unknown_segment(segment_ids, num_segments)
    leading, width = tokens.shape[: tokens.dim() - segment_ids.dim() - 1], tokens.shape[-1]
    total = tokens.new_zeros((leading.numel(), num_segments, width), dtype=_compute(tokens))
    if tokens.numel() and num_segments:
        labels = _labels(segment_ids)
        flat = tokens.reshape(leading.numel(), len(labels), width).contiguous()
        if backend == "reference":
            kept = ((labels >= 0) & (labels < num_segments)).squeeze(1).nonzero().squeeze(1)
            total.index_add_(1, labels.squeeze(1)[kept], flat[:, kept].to(total.dtype))
        else:
            kernels = dispatch.implementation("soft_embedding", backend)
            kernels.scatter(total, labels, None, flat, total.dtype == torch.float64)
    return total.to(tokens.dtype).view(*leading, num_segments, width)


def _gather_fake(rows: Tensor, segment_ids: Tensor, backend: str) -> Tensor:
    checks.segments(rows, segment_ids)
    return rows.new_empty((*rows.shape[:-2], *segment_ids.shape, rows.shape[-1]))


def _sum_fake(tokens: Tensor, segment_ids: Tensor, num_segments: int, backend: str) -> Tensor:
    checks.segment_tokens(tokens, segment_ids, num_segments)
    leading = tokens.shape[: tokens.dim() - segment_ids.dim() - 1]
    return tokens.new_empty((*leading, num_segments, tokens.shape[-1]))


for _name, _kernel, _fake in (
    ("segments_to_tokens", _gather, _gather_fake),
    ("sum_of_segments", _sum_of, _sum_fake),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"auxkernels::{_name}", _fake, lib=_library)
