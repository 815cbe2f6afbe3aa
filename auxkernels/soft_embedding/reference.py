"""The lookup in plain PyTorch: the oracle of the tests, and the implementation where nothing faster exists.

Any floating dtype, any device, differentiable by autograd (twice, if asked). On CPU the arithmetic is float64 whatever
the scores are, elsewhere that of the scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import arithmetic_of, expectation, softmax, sum_of
from ..sources import Head, Source, row_scale
from . import noise


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
    arithmetic, num_labels = arithmetic_of(compute, first.device), table.shape[-2]
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
        "entropy": -expectation(p, log_p).to(compute),
        "max_prob": p.gather(-1, best.unsqueeze(-1)).squeeze(-1).to(compute),
        "argmax": argmax.masked_fill(empty.squeeze(-1), -1),
        "sum_squares": p.square().sum(-1).to(compute),
        "usage": (p.flatten(0, -2) if p.dim() > 1 else p.unsqueeze(0)).sum(0).div(num_rows).to(compute),
        "row_entropy": -expectation(whole[1], whole[0]).to(compute),
    }
    return mixture.to(out_dtype), stats


def _softmax_or_zeros(v: Tensor, factor: float | Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax(v / factor) and its exponential, which is zero in the rows that are empty."""
    v = v.masked_fill(empty, 0.0)
    x = v - v.detach().amax(-1, keepdim=True)
    masked = (x == -torch.inf).detach()
    x = torch.where(masked, x.detach(), x.masked_fill(masked, 0.0) / factor)
    log_p, _ = softmax(x)
    return log_p, log_p.exp().masked_fill(empty, 0.0)


def _each(weights: Tensor, tables: Tensor) -> Tensor:
    """[*, K] with each of [L, K, D]: [L, *, D]."""
    return torch.einsum("...k,lkd->l...d", weights, tables)
