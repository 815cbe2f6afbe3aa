"""Cross-entropy in plain PyTorch: the oracle of the tests, and the implementation where nothing faster exists.

Any floating dtype, any device, differentiable by autograd (twice, if asked). On CPU the arithmetic is float64 whatever
the sources are, elsewhere that of the sources.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import arithmetic_of, expectation, picked, softmax, sum_of
from ..sources import leaves_of
from . import ops
from .request import Arguments, is_ignored


def _divergence(log_p: Tensor, log_q: Tensor, a: Tensor) -> Tensor:
    """KL(p || q) of p = softmax(z + a) and q = softmax(z), not below 0 and accurate relative to itself also near 0.

    As the sum of p d + (q - p) with d = log p - log q: q - p add up to 0, and with them no term is negative. For small
    a, d is a - log E_q[exp(a)], rather than a difference of what z makes large.
    """
    p, q = log_p.exp(), log_q.exp()
    is_masked = log_p == -torch.inf
    d = log_p.masked_fill(is_masked, 0.0) - log_q.masked_fill(is_masked, 0.0)
    is_near = (a.abs() < 0.5).all(-1, keepdim=True)
    near = torch.where(is_near, a, 0.0)
    shift = torch.log1p((q * torch.expm1(near)).sum(-1, keepdim=True))
    d = torch.where(is_near, near - shift, d)
    small: Tensor = d.clamp(-0.1, 0.1)
    series: float | Tensor = 1.0  # p (d + expm1(-d)) cancels there
    for n in range(12, 2, -1):
        series = 1.0 - small * series / n
    terms = torch.where((d.abs() < 0.1) & ~is_masked, 0.5 * p * small * small * series, p * d + (q - p))
    return terms.sum(-1)


def _rank(s: Tensor, classes: Tensor) -> Tensor:
    """How many numbers of each row are greater than the one at its class, [*]."""
    return (s > s.gather(-1, classes.unsqueeze(-1))).sum(-1)


def _classes(target: Tensor | None, vocab_size: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Target safe to gather with, which rows are ignored, which hold no class (poisoned; none on CPU, which raises)."""
    checked: Tensor = ops.check_target(target, vocab_size, ignore_index)
    target = checked.long()
    ignored = is_ignored(target, ignore_index)
    poisoned = ((target < 0) | (target >= vocab_size)) & ~ignored
    return target.clamp(0, vocab_size - 1).masked_fill(ignored, 0), ignored, poisoned


def cross_entropy(
    given: Arguments,
    *,
    weight: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    normalizer: float | Tensor | None,
) -> Tensor:
    """The loss as `aux_cross_entropy` defines it. Logits [*, V], target [*]; 0-d, or [*] for reduction="none"."""
    compute, vocab_size = given.compute, given.vocab_size
    classes, ignored, poisoned = _classes(given.target, vocab_size, given.ignore_index)
    dtype = arithmetic_of(compute, classes.device)
    s = sum_of([*given.base, *given.aux], dtype, given.autocast, vocab_size, ignored)
    w = s.new_ones(vocab_size) if weight is None else weight.to(dtype)
    w_y = w[classes].masked_fill(ignored, 0.0)
    log_p, lse = softmax(s)
    loss = (1 - label_smoothing) * w[classes] * -picked(log_p, classes)
    if label_smoothing:
        loss = loss + label_smoothing / vocab_size * -(log_p * w).sum(-1)
    if z_loss:
        loss = loss + z_loss * lse.square()
    # poison by multiplication: the row's loss and, through it, its gradient are NaN
    loss = loss * torch.ones_like(loss).masked_fill(poisoned, torch.nan)
    loss = loss.masked_fill(ignored, 0.0)
    if reduction == "none":
        return loss.to(compute)
    if reduction == "sum":
        return loss.sum().to(compute)
    if normalizer is None:
        normalizer = (~ignored).sum() if weight is None else w_y.sum()
    return (loss.sum() / normalizer).to(compute)  # a 0-d float64 count must not promote a 0-d float32 loss


def statistics(given: Arguments) -> dict[str, Any]:
    """The fields of `LogitStats` as a dict, each [*]."""
    compute, options = given.compute, (given.autocast, given.vocab_size)
    ignored = poisoned = classes = None
    if given.target is not None:
        classes, ignored, poisoned = _classes(given.target, given.vocab_size, given.ignore_index)
    dtype = arithmetic_of(compute, leaves_of(given.base[0], None).values.device)
    z_b = sum_of(given.base, dtype, *options, ignored)
    a = sum_of(given.aux, dtype, *options, ignored) if given.aux else torch.zeros_like(z_b)
    s = z_b + a
    (log_p, lse), (log_q, _) = softmax(s), softmax(z_b)
    stats: dict[str, Any] = {
        "log_prob": None if classes is None else picked(log_p, classes),
        "base_log_prob": None if classes is None else picked(log_q, classes),
        "lse": lse,
        "entropy": -expectation(log_p.exp(), log_p),
        "kl_to_base": _divergence(log_p, log_q, a),
        "argmax": s.argmax(-1),
        "base_argmax": z_b.argmax(-1),
        "target_rank": None,
    }
    if classes is not None and poisoned is not None:
        stats["target_rank"] = _rank(s, classes).masked_fill(lse.isnan() | poisoned, -1)
    stats = {name: v.to(compute) if v is not None and v.is_floating_point() else v for name, v in stats.items()}
    if ignored is None or poisoned is None:
        return stats
    for name, value in stats.items():
        if value.is_floating_point():
            value = value * torch.ones_like(value).masked_fill(poisoned, torch.nan)
            stats[name] = value.masked_fill(ignored, 0.0)
        else:
            stats[name] = value.masked_fill(ignored, -1)
    return stats
