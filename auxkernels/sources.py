"""Where logits come from: the source types shared by every operator, and the sum of several sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Logits:
    """Materialised logits: `scale * softcap * tanh(values / softcap)`, or `scale * values` without a softcap.

    values    [*, V] floating point, last dimension contiguous, any strides in front of it.
    scale     number, or tensor of shape () or [*] (the target's shape); gets a gradient if it requires one.
    softcap   None, or a positive number: applied to the values before the scale.
    """

    values: Tensor
    scale: float | Tensor = field(default=1.0, kw_only=True)
    softcap: float | None = field(default=None, kw_only=True)


SourceLike = Tensor | Logits | Sequence[Tensor | Logits]


def as_sources(name: str, given: SourceLike) -> list[Logits]:
    """The sources meant by one argument: a tensor, a `Logits`, or a sequence of these (their sum)."""
    if isinstance(given, Tensor):
        return [Logits(given)]
    if isinstance(given, Logits):
        return [given]
    if isinstance(given, (list, tuple)):
        if not given:
            raise ValueError(f"{name} must hold at least one source, got an empty {type(given).__name__}")
        return [source for item in given for source in as_sources(name, item)]
    raise TypeError(f"{name} must be a tensor, Logits or a sequence of these, got {type(given).__name__}")


def sum_sources(sources: list[Logits], compute_dtype: torch.dtype, vocab_size: int, ignored: Tensor | None) -> Tensor:
    """The sum of the sources as one [*, vocab_size] tensor of `compute_dtype`, differentiable in each of them.

    ignored   bool [*]: rows whose gradients are exactly zero, whatever the rows hold. None: no such row.
    """
    args = []
    for part in (part for source in sources for part in (source.values, source.scale)):
        # torch.compile refuses one tensor as two arguments of a function
        again = torch.compiler.is_compiling() and isinstance(part, Tensor) and any(part is other for other in args)
        args.append(part.view_as(part) if again else part)
    softcaps = tuple(source.softcap for source in sources)
    return _SumSources.apply(compute_dtype, vocab_size, ignored, softcaps, *args)


def row_scale(scale: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """A scale that multiplies [*, V]: a number or 0-d tensor as it is, a per-row tensor with one more dimension."""
    if not isinstance(scale, Tensor):
        return scale
    return scale.to(dtype) if scale.dim() == 0 else scale.to(dtype).unsqueeze(-1)


class _SumSources(torch.autograd.Function):
    @staticmethod
    def forward(ctx, compute_dtype, vocab_size, ignored, softcaps, *args):
        values, scales = args[0::2], args[1::2]
        total = None
        for value, scale, softcap in zip(values, scales, softcaps, strict=True):
            z = value[..., :vocab_size].to(compute_dtype)
            if softcap is not None:
                z = softcap * torch.tanh(z / softcap)
            z = z * row_scale(scale, compute_dtype)
            total = z if total is None else total.add_(z)
        # values are read again only for the slope of a softcap and the gradient of a scale
        needs = ctx.needs_input_grad[4:]
        tensors = list(args)
        for i, softcap in enumerate(softcaps):
            if not needs[2 * i + 1] and (softcap is None or not needs[2 * i]):
                tensors[2 * i] = None
        ctx.save_for_backward(ignored, *(part if isinstance(part, Tensor) else None for part in tensors))
        ctx.numbers = tuple(None if isinstance(part, Tensor) else part for part in args)
        ctx.layouts = tuple((value.shape[-1], value.dtype) for value in values)
        ctx.softcaps, ctx.vocab_size, ctx.compute_dtype = softcaps, vocab_size, compute_dtype
        return total

    @staticmethod
    def backward(ctx, grad):
        ignored, *tensors = ctx.saved_tensors
        parts = [number if tensor is None else tensor for tensor, number in zip(tensors, ctx.numbers, strict=True)]
        grads: list[Tensor | None] = []
        for i, softcap in enumerate(ctx.softcaps):
            needs_value, needs_scale = ctx.needs_input_grad[4 + 2 * i : 6 + 2 * i]
            value, scale = parts[2 * i], parts[2 * i + 1]
            z = None
            if value is not None:
                z = value[..., : ctx.vocab_size].to(ctx.compute_dtype)
            bent = None if softcap is None or z is None else torch.tanh(z / softcap)
            grads += [
                _value_grad(grad, *ctx.layouts[i], scale, bent, ignored) if needs_value else None,
                _scale_grad(grad, scale, z if bent is None else softcap * bent, ignored) if needs_scale else None,
            ]
        return (None, None, None, None, *grads)


def _value_grad(
    grad: Tensor,
    width: int,
    dtype: torch.dtype,
    scale: float | Tensor,
    bent: Tensor | None,
    ignored: Tensor | None,
):
    g = grad * row_scale(scale, grad.dtype)
    if bent is not None:
        g = g * (1 - bent * bent)
    if ignored is not None:
        g = g.masked_fill(ignored.unsqueeze(-1), 0.0)
    tail = width - grad.shape[-1]
    g = g.to(dtype)
    return torch.nn.functional.pad(g, (0, tail)) if tail else g


def _scale_grad(grad: Tensor, scale: Tensor, unscaled: Tensor, ignored: Tensor | None):
    # a probability of zero has gradient zero: a masked class (-inf) must not turn the product into NaN
    per_row = torch.where(grad == 0, 0.0, grad * unscaled).sum(-1)
    if ignored is not None:
        per_row = per_row.masked_fill(ignored, 0.0)
    return (per_row.sum() if scale.dim() == 0 else per_row).to(scale.dtype)
