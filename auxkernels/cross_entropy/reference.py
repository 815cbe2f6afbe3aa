"""The operators in plain PyTorch: the oracle of the tests, and the implementation where nothing faster exists.

Any floating dtype, any device, differentiable by autograd (twice, if asked). On CPU the arithmetic is float64 whatever
the sources are, elsewhere that of the sources. Written for clarity: nothing here is shared with the fused
implementations, so that a mistake in their formulas cannot hide.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..soft_embedding import noise
from ..sources import Head, Logits, Source, row_scale
from . import ops


def _arithmetic(compute: torch.dtype, device: torch.device) -> torch.dtype:
    return torch.float64 if device.type == "cpu" else compute


def logits_of(
    source: Source, compute: torch.dtype, autocast: torch.dtype | None, vocab_size: int, ignored: Tensor | None
) -> Tensor:
    """The source's logits [*, V] before softcap and scale, ignored rows zeros; a head's, from its tensors in autocast's
    dtype where that is on."""

    def cast(tensor: Tensor) -> Tensor:
        if autocast is not None and isinstance(source, Head) and tensor.dtype != torch.float64:
            tensor = tensor.to(autocast)
        return tensor.to(compute)

    z = cast(source.hidden if isinstance(source, Head) else source.values[..., :vocab_size])
    if ignored is not None:
        z = z.masked_fill(ignored.unsqueeze(-1), 0.0)
    if isinstance(source, Logits):
        return z
    z = torch.nn.functional.linear(z, cast(source.weight)[:vocab_size])
    if source.bias is not None:
        z = z + cast(source.bias)[:vocab_size]
    return z if ignored is None else z.masked_fill(ignored.unsqueeze(-1), 0.0)


def sum_of(
    sources: list[Source],
    compute: torch.dtype,
    autocast: torch.dtype | None,
    vocab_size: int,
    ignored: Tensor | None,
) -> Tensor:
    """Sum of the sources [*, V] in the compute dtype; ignored rows become zeros, so no gradient enters them."""
    total = None
    for source in sources:
        z = logits_of(source, compute, autocast, vocab_size, ignored)
        if source.softcap is not None:
            z = source.softcap * torch.tanh(z / source.softcap)
        z = _scaled(z, row_scale(source.scale, compute))
        if ignored is not None:  # a scale may be NaN or Inf in an ignored row as well
            z = z.masked_fill(ignored.unsqueeze(-1), 0.0)
        total = z if total is None else total + z
    return total


def _scaled(z: Tensor, scale: float | Tensor) -> Tensor:
    """z * scale, where a masked class (-inf, gradient 0) adds 0 to the gradient of the scale and not 0 * (-inf)."""
    if not isinstance(scale, Tensor):
        return z * scale
    masked = z == -torch.inf
    return torch.where(masked, z * scale.detach(), z.masked_fill(masked, 0.0) * scale)


def _picked(logits: Tensor, target: Tensor) -> Tensor:
    return logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)


class _Softmax(NamedTuple):
    """log softmax of rows, and logsumexp [*]: both NaN where a row is no distribution (all -inf, any +inf, NaN)."""

    log_p: Tensor
    lse: Tensor


def _softmax(s: Tensor) -> _Softmax:
    """As torch.log_softmax; accurate relative to itself, in value and gradients, also where one p is all but 1.

    There log p is the small -log1p(rest), with the sum of the other exponentials relative to the largest, and the
    gradient p - 1 of the largest minus the sum of the other p: neither is a difference of nearly equal numbers.
    """
    largest, place = s.max(-1, keepdim=True)
    z = (s - largest).scatter(-1, place, 0.0)  # not by way of the largest: its gradient would be two that cancel
    rest = z.exp().scatter(-1, place, 0.0).sum(-1, keepdim=True)
    is_confident = (rest < 1) & largest.isfinite()
    log_denom = torch.log1p(rest)
    log_p = torch.where(is_confident, z - log_denom, torch.log_softmax(s, -1))
    lse = torch.where(is_confident, largest + log_denom, torch.logsumexp(s, -1, keepdim=True))
    lse = lse * torch.ones_like(lse).masked_fill(~largest.isfinite(), torch.nan)
    return _Softmax(log_p, lse.squeeze(-1))


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
    small, series = d.clamp(-0.1, 0.1), 1.0  # p (d + expm1(-d)) cancels there
    for n in range(12, 2, -1):
        series = 1.0 - small * series / n
    terms = torch.where((d.abs() < 0.1) & ~is_masked, 0.5 * p * small * small * series, p * d + (q - p))
    return terms.sum(-1)


def _expectation(p: Tensor, z: Tensor) -> Tensor:
    """E_p[z] with 0 * (-inf) = 0, in value and gradient."""
    masked = (p == 0) & (z == -torch.inf)
    return (p * z.masked_fill(masked, 0.0)).sum(-1)


def _classes(target: Tensor, vocab_size: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Target safe to gather with, which rows are ignored, which hold no class (poisoned; none on CPU, which raises)."""
    target = ops.check_target(target, vocab_size, ignore_index).long()
    ignored = ops.is_ignored(target, ignore_index)
    poisoned = ((target < 0) | (target >= vocab_size)) & ~ignored
    return target.clamp(0, vocab_size - 1).masked_fill(ignored, 0), ignored, poisoned


def cross_entropy(
    base: list[Source],
    aux: list[Source],
    target: Tensor,
    *,
    compute: torch.dtype,
    autocast: torch.dtype | None,
    vocab_size: int,
    ignore_index: int,
    weight: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    normalizer: float | Tensor | None,
) -> Tensor:
    """The loss as `aux_cross_entropy` defines it. Logits [*, V], target [*]; 0-d, or [*] for reduction="none"."""
    classes, ignored, poisoned = _classes(target, vocab_size, ignore_index)
    arithmetic = _arithmetic(compute, target.device)
    s = sum_of([*base, *aux], arithmetic, autocast, vocab_size, ignored)
    w = s.new_ones(vocab_size) if weight is None else weight.to(arithmetic)
    w_y = w[classes].masked_fill(ignored, 0.0)
    log_p, lse = _softmax(s)
    loss = (1 - label_smoothing) * w[classes] * -_picked(log_p, classes)
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


def statistics(
    base: list[Source],
    aux: list[Source],
    target: Tensor | None,
    *,
    compute: torch.dtype,
    autocast: torch.dtype | None,
    vocab_size: int,
    ignore_index: int,
) -> dict[str, Tensor | None]:
    """The fields of `LogitStats` as a dict, each [*]."""
    ignored = poisoned = classes = None
    if target is not None:
        classes, ignored, poisoned = _classes(target, vocab_size, ignore_index)
    first = base[0].hidden if isinstance(base[0], Head) else base[0].values
    arithmetic = _arithmetic(compute, first.device)
    z_b = sum_of(base, arithmetic, autocast, vocab_size, ignored)
    a = sum_of(aux, arithmetic, autocast, vocab_size, ignored) if aux else torch.zeros_like(z_b)
    s = z_b + a
    (log_p, lse), (log_q, _) = _softmax(s), _softmax(z_b)
    stats = {
        "log_prob": None if classes is None else _picked(log_p, classes),
        "base_log_prob": None if classes is None else _picked(log_q, classes),
        "lse": lse,
        "entropy": -_expectation(log_p.exp(), log_p),
        "kl_to_base": _divergence(log_p, log_q, a),
        "argmax": s.argmax(-1),
        "base_argmax": z_b.argmax(-1),
    }
    stats = {name: v.to(compute) if v is not None and v.is_floating_point() else v for name, v in stats.items()}
    if ignored is None:
        return stats
    for name, value in stats.items():
        if value.is_floating_point():
            value = value * torch.ones_like(value).masked_fill(poisoned, torch.nan)
            stats[name] = value.masked_fill(ignored, 0.0)
        else:
            stats[name] = value.masked_fill(ignored, -1)
    return stats


# -- soft_embedding ----------------------------------------------------------------------------------------------------


def soft_embedding(
    sources: list[Source],
    table: Tensor,
    *,
    temperature: float | Tensor,
    hard: bool,
    gumbel: float | Tensor,
    clean_gradient: bool,
    seed: Tensor | None,
    mask: Tensor | None,
    top_k: int | None,
    autocast: torch.dtype | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mixture [*, D] or [L, *, D] as `soft_embedding` defines it, and the fields of `LookupStats`."""
    first = sources[0].hidden if isinstance(sources[0], Head) else sources[0].values
    values = [source.hidden if isinstance(source, Head) else source.values for source in sources]
    is_double = any(t.dtype == torch.float64 for t in (*values, table))
    compute = torch.float64 if is_double else torch.float32
    arithmetic, num_labels = _arithmetic(compute, first.device), table.shape[-2]
    v = sum_of(sources, arithmetic, autocast, num_labels, None)
    noisy = v
    if seed is not None:
        noise_of = noise.gumbel(v.shape[:-1].numel(), num_labels, seed, arithmetic)
        noisy = v + noise_of.view(v.shape) * (gumbel.to(arithmetic) if isinstance(gumbel, Tensor) else gumbel)
    v = v if clean_gradient else noisy
    if mask is not None:
        v, noisy = v.masked_fill(mask, -torch.inf), noisy.masked_fill(mask, -torch.inf)
    factor = row_scale(temperature, arithmetic) if isinstance(temperature, Tensor) else temperature
    poisoned = v.isnan().any(-1, keepdim=True)
    empty = (v == -torch.inf).all(-1, keepdim=True)
    log_p, p = whole = _softmax_or_zeros(v, factor, empty)
    if top_k is not None:
        kept = torch.zeros_like(v, dtype=torch.bool)
        order = v.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
        kept.scatter_(-1, order, True)
        v = v.masked_fill(~kept & ~poisoned, -torch.inf)
        log_p, p = _softmax_or_zeros(v, factor, empty)
    v, noisy = v.masked_fill(empty, 0.0), noisy.masked_fill(empty, 0.0)
    best, argmax = v.argmax(-1), noisy.argmax(-1)
    is_cast = autocast is not None and table.dtype != torch.float64
    out_dtype = autocast if is_cast else table.dtype
    embeddings = table.to(out_dtype).to(arithmetic)
    weights = p
    if hard:
        chosen = torch.zeros_like(p).scatter_(-1, argmax.unsqueeze(-1), 1.0).masked_fill(empty, 0.0)
        chosen = chosen.masked_fill(poisoned | p.isnan().any(-1, keepdim=True), torch.nan)
        mixture = torch.einsum("...k,kd->...d", chosen, embeddings) if table.dim() == 2 else _each(chosen, embeddings)
        # the soft mixture's gradient of the scores, nothing of its value
        frozen = embeddings.detach()
        soft = torch.einsum("...k,kd->...d", weights, frozen) if table.dim() == 2 else _each(weights, frozen)
        mixture = mixture + (soft - soft.detach())
    else:
        mixture = torch.einsum("...k,kd->...d", weights, embeddings) if table.dim() == 2 else _each(weights, embeddings)
    num_rows = max(p.shape[:-1].numel(), 1)
    stats = {
        "entropy": -_expectation(p, log_p).to(compute),
        "max_prob": p.gather(-1, best.unsqueeze(-1)).squeeze(-1).to(compute),
        "argmax": argmax.masked_fill(empty.squeeze(-1), -1),
        "sum_squares": p.square().sum(-1).to(compute),
        "usage": (p.flatten(0, -2) if p.dim() > 1 else p.unsqueeze(0)).sum(0).div(num_rows).to(compute),
        "row_entropy": -_expectation(whole[1], whole[0]).to(compute),
    }
    return mixture.to(out_dtype), stats


def _softmax_or_zeros(v: Tensor, factor: float | Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax(v / factor) and its exponential, which is zero in the rows that are empty."""
    v = v.masked_fill(empty, 0.0)
    x = v - v.detach().amax(-1, keepdim=True)
    masked = (x == -torch.inf).detach()
    x = torch.where(masked, x.detach(), x.masked_fill(masked, 0.0) / factor)
    log_p, _ = _softmax(x)
    return log_p, log_p.exp().masked_fill(empty, 0.0)


def _each(weights: Tensor, tables: Tensor) -> Tensor:
    """[*, K] with each of [L, K, D]: [L, *, D]."""
    return torch.einsum("...k,lkd->l...d", weights, tables)
