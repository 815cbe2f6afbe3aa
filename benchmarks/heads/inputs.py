"""Hidden states, head weights and targets whose logits look like those of `cross_entropy.make_inputs`."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
CHUNK_ELEMENTS = 1 << 24
ALIGNING_STEPS = 6


class Heads(NamedTuple):
    """h_base [N, D_b], w_base [V, D_b], h_aux [N, D_a], w_aux [V, D_a], target [N].

    With a LoRA on the head h_aux is None: it is `h_base @ a.T` with a [D_a, D_b], and `scale` multiplies its logits.
    """

    h_base: Tensor
    w_base: Tensor
    h_aux: Tensor | None
    w_aux: Tensor
    target: Tensor
    a: Tensor | None = None
    scale: float = 1.0

    @property
    def is_lora(self) -> bool:
        return self.a is not None


def make_heads(shape, dtype: torch.dtype, inputs: str, is_lora: bool, device: torch.device, seed: int) -> Heads:
    """Heads of the shape (N, V, D_b, D_a).

    flat     each source's logits have standard deviation 0.1: every probability near 1 / V, the loss near log V.
    peaked   the sum has standard deviation 10 or a little more; in three rows of four the hidden state is pulled
             towards the target's weight until its logit leads all others by 2.3 to 27.3, as in a trained model's easy
             tokens (heads narrower than about 64 cannot lead by so much).
    """
    num_rows, num_columns, d_base, d_aux = shape
    generator = torch.Generator(device).manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator, device=device)
    target = torch.randint(num_columns, (num_rows,), generator=generator, device=device)
    std = 0.1 if inputs == "flat" else 10 / math.sqrt(2)
    w_base, w_aux = ((draw(num_columns, width) / math.sqrt(width)).to(dtype) for width in (d_base, d_aux))
    h_base = (std * draw(num_rows, d_base)).to(dtype)
    if is_lora:
        heads = Heads(h_base, w_base, None, w_aux, target, (draw(d_aux, d_base) / math.sqrt(d_base)).to(dtype), 2.0)
    else:
        heads = Heads(h_base, w_base, (std * draw(num_rows, d_aux)).to(dtype), w_aux, target)
    if inputs == "peaked":
        margin = 2.3 + 25 * torch.rand(num_rows, generator=generator, device=device)
        heads = _with_confident_rows(heads, margin)
    return heads


def with_half_ignored(heads: Heads, seed: int) -> Heads:
    """Half of the targets, drawn at random, become IGNORE_INDEX."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(heads.target), generator=generator)[: len(heads.target) // 2]
    return heads._replace(target=heads.target.index_fill(0, rows.to(heads.target.device), IGNORE_INDEX))


def _with_confident_rows(heads: Heads, margin: Tensor) -> Heads:
    """Moves the auxiliary's hidden states, or the base's where a LoRA's follow from them; see `make_heads`."""
    name = "h_base" if heads.is_lora else "h_aux"
    hidden = getattr(heads, name).float()
    weight, other_weight = heads.w_aux.float(), heads.w_base.float()
    if heads.is_lora:
        weight, other_weight = other_weight + heads.scale * (weight @ heads.a.float()), None
    chunk = max(1, CHUNK_ELEMENTS // len(weight))
    rows = torch.arange(len(hidden), device=hidden.device)
    for some in rows[rows % 4 > 0].split(chunk):
        logits = hidden[some] @ weight.T
        if other_weight is not None:
            logits += heads.h_base[some].float() @ other_weight.T
        hidden[some] += _pull_to_target(logits, weight, heads.target[some], margin[some])
    return heads._replace(**{name: hidden.to(heads.w_base.dtype)})


def _pull_to_target(logits: Tensor, weight: Tensor, target: Tensor, margin: Tensor) -> Tensor:
    """What to add to the hidden states so that the target's logit exceeds all others by the margin."""
    direction = weight[target] / weight[target].square().sum(1, keepdim=True)
    slope, index = direction @ weight.T, target[:, None]
    s_target = logits.gather(1, index)
    logits, slope = (values.scatter(1, index, low) for values, low in ((logits, -math.inf), (slope, 0.0)))
    pull = torch.zeros_like(s_target)
    for _ in range(ALIGNING_STEPS):  # Newton's: the largest other logit is convex and piecewise linear in the pull
        leader = (logits + pull * slope).argmax(1, keepdim=True)
        gap = logits.gather(1, leader) + margin[:, None] - s_target
        pull = gap / (1 - slope.gather(1, leader)).clamp_min(0.25)
    return pull * direction
