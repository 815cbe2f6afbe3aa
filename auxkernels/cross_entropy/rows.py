"""A row's arithmetic above the scan: statistics and losses from its fields, coefficients from their gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .request import Coefficients, is_ignored, mask_of


@dataclass(frozen=True, eq=False)
class LogitStats:
    """Statistics of each row, all of the target's shape, with p = softmax(base + aux) and q = softmax(base).

    log_prob, base_log_prob   log p(target), log q(target), nats; None without a target
    lse                       logsumexp(base + aux)
    entropy                   entropy of p, nats
    kl_to_base                KL(p || q), nats
    argmax, base_argmax       int64, most likely class of p and of q: lowest index on a tie, the first NaN wins
    target_rank               int64, how many classes have a greater base + aux than the target, ties not counted: 0
                              where the target is (one of) the likeliest, 0 <= rank < k where it is among the first k.
                              None without a target
    Ignored rows hold 0.0, and -1 in argmaxes and rank. In a row that is no distribution (all -inf, any +inf or NaN)
    every float of p is NaN, lse too, and base_log_prob where q is none; the rank is -1, as it is on GPU where the
    target names no class. The sum is float32, so that a large scale (a small temperature) rounds it: by half an ulp of
    the largest |base + aux|, absolutely. Entropies are accurate beside that, relative to themselves also where one
    class is all but certain. Ranks compare the rounded sums.
    """

    log_prob: Tensor | None
    base_log_prob: Tensor | None
    lse: Tensor
    entropy: Tensor
    kl_to_base: Tensor
    argmax: Tensor
    base_argmax: Tensor
    target_rank: Tensor | None


# with a gradient to come, statistics are arithmetic on the fields that the scan differentiates; without, the scan's own
_ARGMAXES = mask_of("argmax", "base_argmax")
FINISHED = mask_of("lse", "entropy", "kl_to_base") | _ARGMAXES
FINISHED_OF_TARGET = mask_of("log_prob", "base_log_prob", "target_rank")
PARTS = mask_of("max", "log_denom", "mean_sum", "mean_base", "base_max", "base_log_denom") | _ARGMAXES
PARTS_OF_TARGET = mask_of("nll", "base_nll", "target_rank")


def finished_stats(fields: dict[str, Tensor]) -> LogitStats:
    """Of the fields in `FINISHED`, without gradients."""
    return LogitStats(
        fields.get("log_prob"),
        fields.get("base_log_prob"),
        fields["lse"],
        fields["entropy"],
        fields["kl_to_base"],
        fields["argmax"],
        fields["base_argmax"],
        fields.get("target_rank"),
    )


def stats_of_parts(fields: dict[str, Tensor]) -> LogitStats:
    """Of the fields in `PARTS`, by arithmetic that can be differentiated."""
    log_denom = fields["log_denom"]
    # + 0.0: ignored rows are +0.0, not -0.0. Differences of like terms first, so that aux=None has KL exactly 0.
    return LogitStats(
        log_prob=fields["nll"].neg() + 0.0 if "nll" in fields else None,
        base_log_prob=fields["base_nll"].neg() + 0.0 if "base_nll" in fields else None,
        lse=fields["max"] + log_denom,
        entropy=log_denom - fields["mean_sum"],
        kl_to_base=(fields["mean_sum"] - fields["mean_base"]) + (fields["base_log_denom"] - log_denom),
        argmax=fields["argmax"],
        base_argmax=fields["base_argmax"],
        target_rank=fields.get("target_rank"),
    )


_OF_LOSS, _OF_SMOOTHING, _OF_LSE = mask_of("nll"), mask_of("log_denom", "weighted_sum"), mask_of("max", "log_denom")


def fields_of_loss(label_smoothing: float, z_loss: float) -> int:
    """The fields that `loss_of` needs."""
    wanted = _OF_LOSS
    if label_smoothing:
        wanted |= _OF_SMOOTHING
    if z_loss:
        wanted |= _OF_LSE
    return wanted


def loss_of(
    fields: dict[str, Tensor],
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    vocab_size: int,
    *,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    normalizer: float | Tensor | None,
) -> Tensor:
    """The loss as plain arithmetic, [*] or reduced to 0-d."""
    loss = fields["nll"]
    if weight is not None:
        kept = ~is_ignored(target, ignore_index)
        classes = target.long().masked_fill(~kept, 0).clamp(0, vocab_size - 1)
        w_y = torch.where(kept, weight.to(loss.dtype)[classes], 0.0)  # an ignored row's class may have any weight
        loss = loss * w_y
    if label_smoothing:
        total = vocab_size if weight is None else weight.sum(dtype=loss.dtype)
        smooth = total * fields["log_denom"] - fields["weighted_sum"]
        loss = (1 - label_smoothing) * loss + (label_smoothing / vocab_size) * smooth
    if z_loss:
        loss = loss + z_loss * (fields["max"] + fields["log_denom"]).square()
    if reduction == "none":
        return loss
    total = loss.sum(dtype=torch.float64)
    if reduction == "mean":
        if normalizer is None:
            normalizer = (~is_ignored(target, ignore_index)).sum() if weight is None else w_y.sum()
        total = total / normalizer
    return total.to(loss.dtype)


def coefficients_of(given: dict[str, Tensor | None], mean_sum: Tensor | None, mean_base: Tensor | None) -> Coefficients:
    """From the upstream gradients of the fields (None: no gradient)."""

    def total(*terms: Tensor | None) -> Tensor | None:
        present = [t for t in terms if t is not None]
        return sum(present[1:], present[0]) if present else None

    g_mean_sum, g_mean_base, g_base_nll = given.get("mean_sum"), given.get("mean_base"), given.get("base_nll")
    # the entropy's and the divergence's ones cancel before anything small is added, which they would swallow
    a = total(
        given.get("log_denom"),
        g_mean_sum,
        None if g_mean_sum is None else -g_mean_sum * mean_sum,  # type: ignore[operator]  # given with its gradient
        None if g_mean_base is None else -g_mean_base * mean_base,  # type: ignore[operator]
    )
    q_b = total(given.get("base_log_denom"), g_base_nll)
    b_b = None if g_base_nll is None else -g_base_nll
    nll, weighted_sum = given.get("nll"), given.get("weighted_sum")
    return Coefficients(A=a, C=g_mean_sum, D=g_mean_base, G=nll, S=weighted_sum, Q_b=q_b, B_b=b_b)
