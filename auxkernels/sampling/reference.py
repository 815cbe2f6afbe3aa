"""The operator in plain PyTorch: the oracle of the implementations, and the one where nothing faster exists.

Any floating dtype, any device, by a sort of each row. Rows are worked on in chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import sum_of
from ..soft_embedding.noise import random_bits
from ..sources import Head, Logits, Source
from . import arithmetic
from .request import DEFAULTS, INTEGERS, WEIGHT_BITS, Parameters, Request, empty_fields

_CHUNK = 1 << 21  # columns of a chunk's rows together


def sample(request: Request) -> list[Tensor]:
    """The token of each row [*] and, where wanted, the fields of `SampleStats`."""
    shape, like = request.shape(), request.first()
    num_rows = shape.numel()
    outputs = empty_fields(request)
    fields = [field.view(num_rows) for field in outputs]
    parameters = _by_row(request.parameters, num_rows, like.device)
    at_once = max(_CHUNK // request.vocab_size, 1)
    with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        for start in range(0, num_rows, at_once):
            stop = min(start + at_once, num_rows)
            sources = [_rows_of(source, shape, start, stop) for source in _sources_of(request)]
            shared = request.compute(), request.autocast, request.vocab_size, None
            base = sum_of(sources[: request.num_base], *shared)
            total = base
            if len(sources) > request.num_base:
                total = base + sum_of(sources[request.num_base :], *shared)
            of_chunk = _Rows(base, total, *(t[start:stop] for t in parameters))
            for field, values in zip(fields, sample_rows(of_chunk, request.order, request.wants_stats), strict=True):
                field[start:stop] = values
    return outputs


def _sources_of(request: Request) -> list[Source]:
    found: list[Source] = []
    for values, weight, bias, scale, softcap in request.sources:
        factor = 1.0 if scale is None else scale
        if weight is None:
            found.append(Logits(values, scale=factor, softcap=softcap))
        else:
            found.append(Head(values, weight, bias=bias, scale=factor, softcap=softcap))
    return found


def _rows_of(source: Source, shape: torch.Size, start: int, stop: int) -> Source:
    """Rows [start, stop) of the flat leading dimensions, without a gradient."""

    def taken(tensor: Tensor) -> Tensor:
        return tensor.detach().reshape(shape.numel(), *tensor.shape[len(shape) :])[start:stop]

    scale = source.scale
    if isinstance(scale, Tensor):
        scale = taken(scale) if scale.dim() else scale.detach()
    if isinstance(source, Logits):
        return Logits(taken(source.values), scale=scale, softcap=source.softcap)
    return Head(taken(source.hidden), source.weight, bias=source.bias, scale=scale, softcap=source.softcap)


class _Rows(NamedTuple):
    """A chunk of rows; the parameters [C], those of absent filters as numbers that keep everything."""

    base: Tensor  # [C, V], compute dtype
    total: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    plausibility: Tensor
    seed: Tensor
    position: Tensor


def _by_row(given: Parameters, num_rows: int, device: torch.device) -> list[Tensor]:
    """One number for each row of each parameter, float64 or int64."""
    if given.position is None:
        given = given._replace(position=torch.arange(num_rows, device=device))
    found = []
    for name, value in given._asdict().items():
        dtype = torch.int64 if name in INTEGERS else torch.float64
        value = DEFAULTS[name] if value is None else value
        if isinstance(value, Tensor):
            value = value.detach().to(device=device, dtype=dtype)
            found.append(value.expand(num_rows) if value.dim() == 0 else value.reshape(num_rows))
        else:
            found.append(torch.full((num_rows,), value, dtype=dtype, device=device))
    return found


def sample_rows(rows: _Rows, order: str, wants_stats: bool) -> list[Tensor]:
    """Token and statistics [C]."""
    kept, largest, is_valid = kept_classes(rows, order)
    is_greedy = rows.temperature == 0
    d = rows.total.double() - largest.unsqueeze(-1).double()
    # a row that is no distribution is worked on as one of zeros
    d = d.masked_fill(~is_valid.unsqueeze(-1), 0.0)
    temperature = torch.where(is_valid & ~is_greedy, rows.temperature, 1.0).unsqueeze(-1)
    scores = d / temperature
    noise = arithmetic.gumbel(random_bits(rows.position, rows.total.shape[-1], rows.seed.unsqueeze(-1)))
    noise = noise.masked_fill(is_greedy.unsqueeze(-1), 0.0)
    token = (scores + noise).masked_fill(~kept, -torch.inf).argmax(-1)
    answer = token.masked_fill(~is_valid, -1)
    if not wants_stats:
        return [answer]
    token = token.unsqueeze(-1)
    chosen = scores.gather(-1, token)
    # relative to the largest of all classes, which may not have been allowed
    ahead = scores.amax(-1, keepdim=True)
    log_prob = (chosen - ahead) - (scores - ahead).exp().sum(-1, keepdim=True).log()
    kept_log_prob = chosen - scores.masked_fill(~kept, -torch.inf).exp().sum(-1, keepdim=True).log()
    num_kept = kept.sum(-1)
    base_rank = (rows.base > rows.base.gather(-1, token)).sum(-1)
    compute = rows.total.dtype
    return [
        answer,
        log_prob.squeeze(-1).masked_fill(~is_valid, torch.nan).to(compute),
        kept_log_prob.squeeze(-1).masked_fill(is_greedy, 0.0).masked_fill(~is_valid, torch.nan).to(compute),
        num_kept.masked_fill(is_greedy, 1).masked_fill(~is_valid, 0),
        base_rank.masked_fill(~is_valid, -1),
    ]


def kept_classes(rows: _Rows, order: str) -> tuple[Tensor, Tensor, Tensor]:
    """Which classes are kept [C, V], the largest allowed s [C], and which rows are distributions [C]."""
    s, vocab_size = rows.total, rows.total.shape[-1]
    is_valid = ~(s.isnan() | (s == torch.inf)).any(-1) & _are_in_range(rows)
    allowed = s > -torch.inf
    below = rows.base.double() - rows.base.amax(-1, keepdim=True).double()
    is_plausible = below >= arithmetic.log_of_probability(rows.plausibility).unsqueeze(-1)
    allowed &= is_plausible | (rows.plausibility == 0).unsqueeze(-1)
    s = s.masked_fill(~allowed, -torch.inf)
    largest = s.amax(-1)
    is_valid &= largest > -torch.inf
    m = largest.unsqueeze(-1)

    size = torch.where(rows.top_k == 0, vocab_size, rows.top_k).clamp(1, vocab_size)
    ordered, places = s.sort(dim=-1, descending=True, stable=True)
    in_top_k = allowed & (s >= ordered.gather(-1, size.unsqueeze(-1) - 1))
    floor = (rows.temperature * arithmetic.log_of_probability(rows.min_p)).unsqueeze(-1)
    in_min_p = (s.double() - m.double() >= floor) | (rows.min_p == 0).unsqueeze(-1)
    of_mass = in_top_k if order == "transformers" else in_top_k & in_min_p

    weights = weight_of(s, m, rows.temperature).masked_fill(~of_mass, 0)
    total = weights.sum(-1, keepdim=True)
    # of each class in order the weight before it, then for those that tie that before the first of them
    before = weights.gather(-1, places)
    before = before.cumsum(-1) - before
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    before = before.masked_fill(~is_first, -1).cummax(-1).values
    limit = rows.top_p.unsqueeze(-1) * total.double()
    in_top_p = torch.empty_like(allowed).scatter_(-1, places, before.double() < limit)
    in_top_p |= (rows.top_p == 1).unsqueeze(-1)
    kept = in_top_k & in_min_p & in_top_p
    return kept | (allowed & (s == m)), largest, is_valid


def weight_of(s: Tensor, m: Tensor, temperature: Tensor) -> Tensor:
    """exp((s - m) / T) [C, V] in units of 2**-40, int64. temperature: float64 [C]."""
    finfo = torch.finfo(s.dtype)
    inverse = (1.0 / temperature).clamp(finfo.smallest_normal, finfo.max).to(s.dtype)
    x = ((s - m) * inverse.unsqueeze(-1)).float()
    return (arithmetic.exp(x.masked_fill(x.isnan(), -torch.inf)) * 2.0**WEIGHT_BITS).to(torch.int64)


def _are_in_range(rows: _Rows) -> Tensor:
    """Which rows' parameters are what they have to be [C]."""
    in_range = (rows.temperature >= 0) & (rows.temperature < torch.inf) & (rows.top_k >= 0)
    for fraction in (rows.top_p, rows.min_p, rows.plausibility):
        in_range &= (fraction >= 0) & (fraction <= 1)
    return in_range
