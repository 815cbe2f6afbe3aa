"""Softmax-weighted lookup of label embeddings: the public function, its checks and its autograd."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import checks, dispatch
from ..sources import Source, SourceLike, as_sources, has_dtensor, leaves_of
from . import autograd, native_plain, ops, reference
from .request import mask_of

if TYPE_CHECKING:
    from ..distributed.shard import VocabShard


@dataclass(frozen=True, eq=False)
class LookupStats:
    """Statistics of each row's label probabilities p, of the scores' leading shape, float32 (float64 if an input is).

    entropy      of p, nats
    max_prob     the largest p
    argmax       int64, its label: lowest on a tie, the first NaN wins; -1 for a row without an allowed label
    sum_squares  sum_k p_k**2, the inverse of the effective number of labels
    usage        [K], mean of p over all rows; 0 for no rows
    row_entropy  of the softmax over all allowed labels, nats: with top_k p is over the kept ones alone, and its entropy
                 says nothing of the rest. Costs a pass over the scores there; without top_k it is `entropy`.
    With clean_gradient p is without noise, but argmax is the chosen label.
    """

    entropy: Tensor
    max_prob: Tensor
    argmax: Tensor
    sum_squares: Tensor
    usage: Tensor
    row_entropy: Tensor


def soft_embedding(
    logits: SourceLike,
    table: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    hard: bool = False,
    gumbel: float | Tensor = 0.0,
    clean_gradient: bool = False,
    seed: int | Tensor | None = None,
    mask: Tensor | None = None,
    top_k: int | None = None,
    return_stats: bool = False,
    backend: str = "auto",
    shard: VocabShard | None = None,
) -> Tensor | tuple[Tensor, LookupStats]:
    """softmax(logits / temperature) @ table: label embeddings mixed by predicted probabilities, which are never saved.

    logits        scores [*, K] floating point, `Logits`, `Head` or a sequence of these (their sum).
    table         [K, D], or tables [L, K, D] that share one softmax, floating point.
    temperature   positive number, or tensor of shape () or [*]; gets a gradient if it requires one. Divides scores
                  relative to their maximum, so that a small one costs no digits, as a scale of the scores would.
    hard          straight-through: the row of the likeliest label forward, the gradient of the soft mixture backward;
                  the table's gradient goes to the chosen rows only.
    gumbel        scale of the Gumbel noise that is added to the scores before the temperature; gets no gradient.
    clean_gradient  needs hard: the noise decides which label is chosen, and nothing else. The gradient of scores and
                  temperature is that of softmax(logits / temperature) @ table, as in vector quantisation. With
                  gumbel=temperature the choice is a sample from that softmax. The choice is among all allowed labels,
                  top_k cuts the gradient alone.
    seed          of the noise: int, 0-d int64 tensor, or None: drawn with torch's generator. The noise of a row and
                  label follows from it alone, on every device.
    mask          bool, [*, K] or [K], True: forbidden. A row without an allowed label gives zeros.
    top_k         mix the likeliest labels only, renormalised; the others get no gradient. Ties: lowest label.
    return_stats  also return `LookupStats` of the probabilities, differentiable but for the argmax.
    backend       "auto", or "reference", "native", "triton": that one or an error.
    shard         the labels that this process holds, of scores and table, where they are sharded over processes (what
                  has all labels is cut); the mask is of all labels. See docs/heads.md.
    Returns       [*, D] or [L, *, D] in the table's dtype (under autocast in autocast's).
    Raises        TypeError, ValueError: dtype, shape, device, option. RuntimeError: an unavailable backend; double
                  differentiation.
    Source        Cornille et al. 2024 (planner with soft labels); Jang et al. 2017 (Gumbel-softmax, straight-through);
                  Bengio et al. 2013 (straight-through).
    """
    has_option = hard is not False or mask is not None or top_k is not None or return_stats is not False
    has_option = has_option or clean_gradient is not False
    is_plain = not has_option and type(gumbel) in (float, int) and gumbel == 0
    if is_plain and shard is None and native_plain.serves(logits, table, temperature, seed, backend):
        return autograd.plain_lookup(logits, table, temperature)
    if shard is not None or has_dtensor(logits, table):
        from ..distributed import soft_embedding as sharded

        resolved = sharded.resolved(logits, table, shard)
        if resolved.shard is not None:
            options = sharded.Options(temperature, hard, gumbel, clean_gradient, seed, mask, top_k, return_stats)
            mixture, of_rows = sharded.soft_embedding(resolved, options, backend)
            return mixture if of_rows is None else (mixture, LookupStats(**of_rows))
        logits, table = resolved[:2]
        if is_plain and native_plain.serves(logits, table, temperature, seed, backend):
            return autograd.plain_lookup(logits, table, temperature)
    given = _checked(logits, table, temperature, hard, gumbel, clean_gradient, seed, mask, top_k, backend)
    if given.call.options.backend == "reference":
        mixture, stats = reference.soft_embedding(
            given.sources,
            table,
            temperature=given.options.temperature,
            hard=given.options.hard,
            gumbel=given.options.gumbel,
            clean_gradient=given.clean_gradient,
            seed=given.call.seed,
            mask=mask,
            top_k=given.options.top_k or None,
            autocast=given.call.options.autocast,
        )
        return (mixture, LookupStats(**stats)) if return_stats else mixture
    mixture, fields = autograd.lookup(given.call, _STATS if return_stats else 0, given.clean_gradient)
    if not return_stats:
        return mixture
    return mixture, LookupStats(
        **fields, row_entropy=_row_entropy(given) if given.call.options.top_k else fields["entropy"]
    )


# -- arguments ---------------------------------------------------------------------------------------------------------


class _Arguments(NamedTuple):
    """What `soft_embedding` was given, checked, and the same as the operators take it."""

    sources: list[Source]
    options: checks.LookupOptions
    clean_gradient: bool  # and there is noise
    call: ops.Call


def _checked(
    logits: SourceLike,
    table: Tensor,
    temperature: float | Tensor,
    hard: bool,
    gumbel: float | Tensor,
    clean_gradient: bool,
    seed: int | Tensor | None,
    mask: Tensor | None,
    top_k: int | None,
    backend: str,
) -> _Arguments:
    sources = as_sources("logits", logits)
    checks.tables(table)
    shape, device = checks.leading("logits", sources[0])
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    widths, compute = [], torch.float64 if table.dtype == torch.float64 else torch.float32
    for i, source in enumerate(sources):
        name = "logits" if len(sources) == 1 else f"logits[{i}]"
        width, dtype = checks.source(name, source, shape, device, autocast)
        widths.append((name, width))
        if dtype == torch.float64:
            compute = dtype
    num_labels = checks.common_width(widths, None)
    checks.table_of(table, num_labels, device)
    options = checks.lookup_options(temperature, hard, gumbel, seed, mask, top_k, shape, num_labels, device)
    temperature, hard, gumbel, seed, top_k = options
    if type(temperature) is float:
        temperature = in_range(temperature, compute)
    clean_gradient = checks.gradient_option(clean_gradient, hard)
    backend = dispatch.resolve(backend, device, compute)
    has_noise = isinstance(gumbel, Tensor) or gumbel != 0
    leaves: list[Tensor | None] = []
    for source in sources:
        scale = source.scale if isinstance(source.scale, Tensor) or source.scale != 1.0 else None
        leaves = [*leaves, *leaves_of(source, number(scale, compute, device))]
    is_plain = not isinstance(temperature, Tensor) and temperature == 1.0
    softcaps = tuple([float(source.softcap or 0.0) for source in sources])
    call = ops.Call(
        tuple(leaves),
        None if is_plain else number(temperature, compute, device),
        table,
        number(gumbel, compute, device) if has_noise else None,
        seed_of(seed, device) if has_noise else None,
        mask,
        ops.Options(softcaps, autocast, top_k, hard, backend),
    )
    return _Arguments(sources, options, clean_gradient and has_noise, call)


def in_range(temperature: float, compute: torch.dtype) -> float:
    """A temperature that the compute dtype has: neither rounded to 0 nor, if it is not infinite, beyond the largest."""
    finfo = torch.finfo(compute)
    return max(temperature, finfo.smallest_normal) if temperature <= finfo.max else math.inf


def number(value: float | Tensor | None, compute: torch.dtype, device: torch.device) -> Tensor | None:
    if isinstance(value, Tensor):
        return value if value.dtype == compute else value.to(compute)
    return dispatch.number_tensor(value, compute, device)


def seed_of(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if seed is None:  # drawn here, so that checkpointing and graph replay draw it again
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed.to(device=device, dtype=torch.int64)
    return torch.full((), seed, dtype=torch.int64, device=device)


# -- statistics --------------------------------------------------------------------------------------------------------

_STATS = mask_of("entropy", "max_prob", "sum_squares", "usage", "argmax")


def _row_entropy(given: _Arguments) -> Tensor:
    """The entropy of the softmax that the gradient is of, without top_k."""
    table = autograd.first_column(given.call.table)
    options = given.call.options._replace(top_k=0, hard=True)  # hard: no product with the table
    whole = given.call._replace(table=table, options=options)
    if given.clean_gradient:
        whole = whole._replace(gumbel=None, seed=None)
    return autograd.lookup(whole, mask_of("entropy"), False)[1]["entropy"]
