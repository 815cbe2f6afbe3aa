"""Sampling from summed logits: the public function and its checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import checks, dispatch
from ..sources import Source, SourceLike, SourceTensors, as_sources, leaves_of
from . import ops, reference
from .request import ORDERS, Parameters, Request, check_parameters, check_size, check_values


@dataclass(frozen=True, eq=False)
class SampleStats:
    """What `sample_logits` says of each row's token, of the sources' leading shape; without gradients.

    log_prob       its log-probability under softmax(s / temperature) over all classes, before any filter, nats; where
                   the temperature is 0, under softmax(s)
    kept_log_prob  the same over the kept classes alone: that with which it was drawn; 0 where the temperature is 0
    num_kept       int64, how many classes it was drawn from; 1 where the temperature is 0
    base_rank      int64, how many classes have larger logits than it in the base alone: 0 is the base's own choice
    Numbers are float32 (float64 if a source is). A row whose token is -1 has NaN, NaN, 0, -1.
    """

    log_prob: Tensor
    kept_log_prob: Tensor
    num_kept: Tensor
    base_rank: Tensor


def sample_logits(
    base: SourceLike,
    aux: SourceLike | None = None,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    plausibility: float | Tensor | None = None,
    order: str = "transformers",
    seed: int | Tensor | None = None,
    position: int | Tensor | None = None,
    vocab_size: int | None = None,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, SampleStats]:
    """The next token of each row: drawn from softmax((base + aux) / temperature) over the classes that filters keep.

    base, aux      as in `aux_cross_entropy`: logits [*, V], `Logits`, `Head`, or a sequence of these (their sum);
                   aux=None: the base alone. Their sum s is formed in float32 (float64 if a source is) and stored for no
                   more than a row at a time. No gradient flows.
    Each of the following is one number or a tensor with one for each row, of shape () or [*], on the sources' device:
    temperature    finite, at least 0; 0 is greedy: the largest s of what `plausibility` allows, the lowest on a tie.
    top_k          int: keep the k largest s; more than there are, 0 or None: all.
    top_p          in [0, 1]: of those (see `order`) keep the smallest set of the largest whose probability reaches
                   top_p, that is every class with less than top_p ahead of it; None or 1: all.
    min_p          in [0, 1]: keep classes at least min_p times as likely as the likeliest; None or 0: all.
    plausibility   in [0, 1]: contrastive decoding's floor on the base alone, at temperature 1 and before the other
                   filters: keep classes that the base takes for at least plausibility times as likely as its likeliest;
                   None or 0: all.
    seed           int64: what the noise follows from, with the position. None: drawn with torch's generator.
    position       int64, at least 0: which draw of its seed a row is, for a request the number of the token to come.
                   The same seed, position and row give the same token, wherever in a batch, on every device and
                   backend.
                   None: the row's number in the batch, so that rows of one seed differ.
    order          whose top-p: "transformers" takes its probabilities over the classes that top-k keeps, "vllm" over
                   those that top-k and min-p keep. Nothing else depends on it.
    vocab_size     how many leading columns count, where the sources are not equally wide or padded.
    return_stats   also return `SampleStats`.
    backend        "auto", or "reference", "native", "triton": that one or an error.
    Returns        int64 [*]. -1 for a row that is no distribution: one with a NaN or +inf, without an allowed class,
                   or, on GPU, with a parameter out of range.
    Raises         TypeError, ValueError: dtype, shape, device, option, on CPU a parameter out of range. RuntimeError:
                   an unavailable backend.
    The largest s is always kept, and classes that tie at a threshold are kept all: transformers' `TopPLogitsWarper`
    cuts among them as its sort happens to leave them. Probabilities of top-p are exact sums of exp((s - max) / T) in
    float32, cut to multiples of 2**-40; min-p and plausibility compare differences of logits with a logarithm in
    float64. So a class is kept or not by a rounding where transformers' cumulated float32 sum is within one of 1 - p.
    The token is bit for bit the same everywhere for logits without a softcap; products of heads and tanh round
    differently on other hardware, and two classes that a rounding brings within 1e-6 of each other may change places.
    Source         Fan et al. 2018 (top-k), Holtzman et al. 2020 (top-p), Nguyen et al. 2024 (min-p), Li et al. 2023
                   (plausibility); Gumbel 1954, Maddison et al. 2014 (choice by noise).
    """
    given = Parameters(temperature, top_k, top_p, min_p, plausibility, 0 if seed is None else seed, position)
    call = _checked(base, aux, given, order, vocab_size, return_stats, backend)
    request = call.request
    if seed is None:  # drawn here, so that graph replay draws it again
        drawn = torch.randint(2**63 - 1, (), dtype=torch.int64, device=request.first().device)
        request = request._replace(parameters=request.parameters._replace(seed=drawn))
    if call.backend == "reference":
        if not torch.compiler.is_compiling():
            check_values(request.parameters)
        token, *stats = reference.sample(request)
    else:
        token, *stats = ops.sample(call._replace(request=request))
    return (token, SampleStats(*stats)) if request.wants_stats else token


def _checked(
    base: SourceLike,
    aux: SourceLike | None,
    parameters: Parameters,
    order: str,
    vocab_size: int | None,
    return_stats: bool,
    backend: str,
) -> ops.Call:
    of_base = as_sources("base", base)
    of_aux = [] if aux is None else as_sources("aux", aux)
    shape, device = checks.leading("base", of_base[0])
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    widths, compute, sources = [], torch.float32, []
    for side, given in (("base", of_base), ("aux", of_aux)):
        for i, source in enumerate(given):
            name = side if len(given) == 1 else f"{side}[{i}]"
            width, dtype = checks.source(name, source, shape, device, autocast)
            widths.append((name, width))
            compute = dtype if dtype == torch.float64 else compute
            sources.append(SourceTensors(*leaves_of(source, _scale_of(source)), source.softcap))
    vocab_size = checks.common_width(widths, vocab_size)
    check_size(vocab_size)
    checks.one_of("order", order, ORDERS)
    wants_stats = checks.boolean("return_stats", return_stats)
    shared = autocast, vocab_size, check_parameters(parameters, shape, device), order, wants_stats
    return ops.Call(Request(sources, len(of_base), *shared), dispatch.resolve(backend, device, compute))


def _scale_of(source: Source) -> Any:
    """None for 1."""
    return source.scale if isinstance(source.scale, Tensor) or source.scale != 1.0 else None
