"""What processes tell each other of a row, and the fields that the rows of all columns have.

A process sends, of the scan of its own columns with m the largest of them and d = sum exp(s - m),

    max, log_denom             m, log d
    nll                        of the target, +inf on processes that do not hold its class
    mean_sum, mean_base        E[s - m], E[z_b - m_b] of the softmax of its own columns
    base_max, base_log_denom, base_nll
    weighted_sum               sum w (s - m)
    argmax, base_argmax        classes, numbered as in the whole vocabulary
    target_rank                how many of its own columns are ahead of the target

so that, with M the largest m, a process counts d exp(m - M) of the denominator, of which the target's share is
exp(-nll): the rest is formed by expm1, and a confident row's loss is not a difference. A process whose columns are all
-inf sends max -inf and log_denom 0, and counts nothing; NaN among them is sent as max NaN.
Everything is merged in float64, in the order of the ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..cross_entropy.request import (
    DERIVED,
    FIELDS,
    NUM_FLOAT_FIELDS,
    OF_BASE,
    fields_in,
    mask_of,
    with_sources_of_derived,
)

INTEGERS = FIELDS[NUM_FLOAT_FIELDS:]
_DERIVED = mask_of(*DERIVED)


def sent_fields(wanted: int) -> int:
    """The mask of what processes send so that they can make the wanted fields."""
    wanted = with_sources_of_derived(wanted) & ~_DERIVED | mask_of("max", "log_denom")
    return wanted | mask_of("base_max", "base_log_denom") if wanted & OF_BASE else wanted


def weighted_by_nothing(weights: Tensor) -> Tensor:
    """weighted_sum of columns that are all -inf: -inf times the sum of their weights, where 0 (-inf) = 0."""
    return torch.where(weights != 0, -torch.inf * weights, 0.0)


class Bounds(NamedTuple):
    """The columns of each process and the sum of their class weights."""

    start: Tensor  # int64 [R]
    stop: Tensor
    weights: Tensor  # [R, 1]


class Sent(NamedTuple):
    """What all processes have sent."""

    rows: dict[str, Tensor]  # [R, N] of the fields that are sent; float64, int64
    targets: Tensor | None  # int32 [R, N], the leading bits of 64 mixed into the others
    bounds: Bounds


def packed(
    fields: dict[str, Tensor], target: Tensor | None, start: int, stop: int, weights: float, compute: torch.dtype
) -> Tensor:
    """One process's fields [N] in one tensor of the compute dtype, integers as bits."""
    ints = torch.int64 if compute == torch.float64 else torch.int32
    parts = []
    for name, values in fields.items():
        flat = values.reshape(-1)
        parts.append(flat.to(ints).view(compute) if name in INTEGERS else flat.to(compute))
    device = next(iter(fields.values())).device
    if target is not None:
        parts.append(_mixed(target).reshape(-1).to(ints).view(compute))
    parts += [torch.full((1,), bound, dtype=ints, device=device).view(compute) for bound in (start, stop)]
    parts.append(torch.full((1,), weights, dtype=compute, device=device))
    return torch.cat(parts)


def _mixed(target: Tensor) -> Tensor:
    target = target.long()
    return (target ^ (target >> 32)).to(torch.int32)


def unpacked(gathered: Tensor, names: list[str], has_target: bool) -> Sent:
    """gathered: [R, L], what `packed` made of the fields of these names."""
    ints = torch.int64 if gathered.dtype == torch.float64 else torch.int32
    *of_rows, tail = gathered[:, :-3].tensor_split(len(names) + has_target, dim=1), gathered[:, -3:]
    parts = list(of_rows[0])
    targets = parts.pop().contiguous().view(ints).to(torch.int32) if has_target else None
    rows = {}
    for name, part in zip(names, parts, strict=True):
        rows[name] = part.contiguous().view(ints).long() if name in INTEGERS else part.double()
    bounds = tail[:, :2].contiguous().view(ints).long()
    return Sent(rows, targets, Bounds(bounds[:, 0], bounds[:, 1], tail[:, 2:].double()))


def disagreeing(sent: Sent, size: int) -> Tensor:
    """bool [N] (or [1]): the rows of which processes hold different targets; all of them if their columns, put side by
    side, are not 0 to `size`."""
    start, stop, _ = sent.bounds
    order = (start * (size + 1) + stop).argsort()
    start, stop = start[order], stop[order]
    ends = torch.cat([stop.new_zeros(1), stop]) != torch.cat([start, start.new_full((1,), size)])
    found = ends.any().unsqueeze(0)
    return found if sent.targets is None else found | (sent.targets != sent.targets[:1]).any(0)


class Softmax(NamedTuple):
    """A softmax over all columns, from those of the processes."""

    max: Tensor  # [N]
    shift: Tensor  # [R, N], the processes' maxima less it
    share: Tensor  # [R, N], what a process's columns count of the denominator
    log_denom: Tensor  # [N]

    def nll(self, of_ranks: Tensor, log_denoms: Tensor) -> Tensor:
        e = (self.share * of_ranks.neg().exp()).sum(0)
        rest = (self.share * -torch.expm1(-of_ranks)).sum(0)
        relative = (self.shift + log_denoms - of_ranks).amax(0)
        return torch.where(e > rest, torch.log1p(rest / e), self.log_denom - relative)

    def mean(self, of_ranks: Tensor, maxima: Tensor) -> Tensor:
        """E[z - max z] from those over the processes' columns, z having these maxima there."""
        p = self.share / self.log_denom.exp()
        return torch.where(p == 0, 0.0, p * (of_ranks + (maxima - maxima.amax(0)))).sum(0)


def softmax_of(maxima: Tensor, log_denoms: Tensor) -> Softmax:
    largest = maxima.amax(0)  # NaN if one is
    shift = maxima - largest
    share = shift.exp() * log_denoms.exp()
    # the denominator without the 1 of a largest column, which would round what is beside it
    first = (maxima == largest).int().argmax(0, keepdim=True)
    is_first = torch.zeros_like(maxima, dtype=torch.bool).scatter_(0, first, True)
    others = torch.where(is_first, torch.expm1(log_denoms) + (share - share), share).sum(0)
    return Softmax(largest, shift, share, torch.log1p(others))


def argmax_of(classes: Tensor, maxima: Tensor, largest: Tensor) -> Tensor:
    """The lowest class among those of the processes that hold a largest number; NaN is larger than any."""
    holds = torch.where(largest.isnan(), maxima.isnan(), maxima == largest)
    return torch.where(holds, classes, torch.iinfo(torch.int64).max).amin(0)


def merged(sent: Sent, wanted: int) -> dict[str, Tensor]:
    """The wanted fields [N] of the whole rows, float64 and int64."""
    rows = sent.rows
    of_sum = softmax_of(rows["max"], rows["log_denom"])
    found = {"max": of_sum.max, "log_denom": of_sum.log_denom}
    if "nll" in rows:
        found["nll"] = of_sum.nll(rows["nll"], rows["log_denom"])
    if "mean_sum" in rows:
        found["mean_sum"] = of_sum.mean(rows["mean_sum"], rows["max"])
    if "base_max" in rows:
        of_base = softmax_of(rows["base_max"], rows["base_log_denom"])
        found |= {"base_max": of_base.max, "base_log_denom": of_base.log_denom}
        if "mean_base" in rows:
            found["mean_base"] = of_sum.mean(rows["mean_base"], rows["base_max"])
        if "base_nll" in rows:
            found["base_nll"] = of_base.nll(rows["base_nll"], rows["base_log_denom"])
        if "base_argmax" in rows:
            found["base_argmax"] = argmax_of(rows["base_argmax"], rows["base_max"], of_base.max)
    if "weighted_sum" in rows:
        weights = sent.bounds.weights
        rebased = rows["weighted_sum"] + of_sum.shift * weights
        is_nothing = rows["max"] == -torch.inf
        found["weighted_sum"] = torch.where(is_nothing, weighted_by_nothing(weights), rebased).sum(0)
    if "argmax" in rows:
        found["argmax"] = argmax_of(rows["argmax"], rows["max"], of_sum.max)
    if "target_rank" in rows:
        found["target_rank"] = rows["target_rank"].sum(0).masked_fill(of_sum.log_denom.isnan(), -1)
    found |= _derived(found, wanted)
    return {name: found[name] for name in fields_in(wanted)}


def _derived(found: dict[str, Tensor], wanted: int) -> dict[str, Tensor]:
    """The finished statistics, as csrc/common/row_numbers.h forms them."""
    made = {}
    log_denom, names = found["log_denom"], fields_in(wanted)
    if "lse" in names:
        made["lse"] = found["max"] + log_denom
    if "entropy" in names:
        made["entropy"] = log_denom - found["mean_sum"]
    if "kl_to_base" in names:
        made["kl_to_base"] = (found["mean_sum"] - found["mean_base"]) + (found["base_log_denom"] - log_denom)
    if "log_prob" in names:
        made["log_prob"] = 0.0 - found["nll"]
    if "base_log_prob" in names:
        made["base_log_prob"] = 0.0 - found["base_nll"]
    return made
