"""One row for each segment, broadcast to the segment's tokens; backward is a sum over each segment in fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, checks, native, ops
from .autograd import once

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
    backend = backends.resolve(backend, rows.device, rows.dtype if rows.dtype == torch.float64 else torch.float32)
    return _SegmentsToTokens.apply(rows, segment_ids, backend)


class _SegmentsToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, segment_ids, backend):
        ctx.save_for_backward(segment_ids)
        ctx.num_segments, ctx.backend = rows.shape[-2], backend
        return _to_tokens(rows, segment_ids, backend)

    @staticmethod
    def backward(ctx, grad):
        (segment_ids,) = ctx.saved_tensors
        return (*once([_sum(grad, segment_ids, ctx.num_segments, ctx.backend)], (grad,)), None, None)


def _compute(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _gather(rows: Tensor, segment_ids: Tensor, backend: str) -> Tensor:
    checks.segments(rows, segment_ids)
    ops.raise_unknown_segment(segment_ids, rows.shape[-2])
    leading, width = rows.shape[:-2], rows.shape[-1]
    out = native.brought_in(rows.new_empty((*leading, *segment_ids.shape, width)))
    labels = segment_ids.reshape(-1, 1).long()
    if backend == "reference":
        picked = rows[..., labels.squeeze(1).clamp(0, max(rows.shape[-2] - 1, 0)), :] if rows.shape[-2] else 0.0
        mask = (labels < 0) if rows.shape[-2] else torch.ones_like(labels, dtype=torch.bool)
        flat = torch.where(mask, 0.0, picked).to(rows.dtype)
        return flat.expand(*leading, len(labels), width).reshape(out.shape)
    if out.numel():
        tables, flat = rows.reshape(-1, *rows.shape[-2:]).contiguous(), out.view(-1, len(labels), width)
        kernels = ops.implementation(backend, "soft_embedding")
        kernels.gather(tables, labels, None, flat, _compute(rows) == torch.float64)
    return out


def _sum_of(tokens: Tensor, segment_ids: Tensor, num_segments: int, backend: str) -> Tensor:
    leading = tokens.shape[: tokens.dim() - segment_ids.dim() - 1]
    compute, width = _compute(tokens), tokens.shape[-1]
    total = tokens.new_zeros((max(leading.numel(), 1) if leading else 1, num_segments, width), dtype=compute)
    labels = segment_ids.reshape(-1, 1).long()
    flat = tokens.reshape(-1, len(labels), width).contiguous() if tokens.numel() else None
    if flat is not None and backend == "reference":
        kept = (labels.squeeze(1) >= 0).nonzero().squeeze(1)
        total.index_add_(1, labels.squeeze(1)[kept], flat[:, kept].to(compute))
    elif flat is not None:
        kernels = ops.implementation(backend, "soft_embedding")
        kernels.scatter(total, labels, None, flat, compute == torch.float64)
    return total.to(tokens.dtype).view(*leading, num_segments, width)


def _gather_fake(rows, segment_ids, backend):
    return rows.new_empty((*rows.shape[:-2], *segment_ids.shape, rows.shape[-1]))


def _sum_fake(tokens, segment_ids, num_segments, backend):
    leading = tokens.shape[: tokens.dim() - segment_ids.dim() - 1]
    return tokens.new_empty((*leading, num_segments, tokens.shape[-1]))


for _name, _kernel, _fake in (
    ("segments_to_tokens", _gather, _gather_fake),
    ("sum_of_segments", _sum_of, _sum_fake),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"auxkernels::{_name}", _fake, lib=_library)
