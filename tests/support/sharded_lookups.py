"""Cases of soft_embedding whose labels are sharded over processes, and what a process does with its share."""

from __future__ import annotations

from dataclasses import replace

import torch
from processes import Place
from sharded import Collectives, assert_same_bits, cut
from soft_oracle import (
    F64,
    Case,
    allowed_of,
    assert_argmax,
    blind_to,
    called,
    check_results,
    sources_of,
    unsure_rows,
)
from tolerance import unit
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from auxkernels import Head, Logits, VocabShard, chunk_settings, soft_embedding

OF_LABELS = {"values": -1, "weight": 0, "bias": 0, "table": -2}  # along which dimension tensors are cut


def share_of(case: Case, start: int, stop: int, whole: tuple[str, ...] = ()) -> Case:
    """whole: names, as of `Case.tensors`, that keep all labels."""
    columns, found = slice(start, stop), []
    for i, source in enumerate(sources_of(case.logits)):
        if f"values {i}" in whole or f"weight {i}" in whole:
            found.append(source)
        elif isinstance(source, Logits):
            found.append(replace(source, values=cut(source.values, columns, -1)))
        else:
            weight, bias = cut(source.weight, columns, 0), cut(source.bias, columns, 0)
            found.append(replace(source, weight=weight, bias=bias))
    table = case.table
    if "table" not in whole:
        table = table.detach()[..., columns, :].clone().requires_grad_(table.requires_grad)
    return Case(found, table, case.options)


def run_share(
    place: Place, case: Case, bounds: list[tuple[int, int]], upstream: dict[str, Tensor], whole: tuple[str, ...] = ()
) -> dict:
    """As `Case.run`, of a process's share."""
    start, stop = bounds[place.rank]
    own = share_of(case, start, stop, whole)
    shard = VocabShard(start, stop, max(stop for _, stop in bounds), place.group)
    return Case(own.logits, own.table, own.options | {"shard": shard}).run("auto", upstream)


def check(running, case: Case, layouts: list[list[tuple[int, int]]], upstream: dict[str, Tensor], whole=()) -> None:
    """Results and gradients within what roundings may make of float64's on one process, for each of the layouts."""
    exact = called(case, {})
    unsure, margin = unsure_rows(case, exact)
    upstream = blind_to(unsure, upstream)
    is_mixed = not (case.options.get("hard") or case.options.get("top_k"))
    more = of_rounded_mixtures(case, upstream) if is_mixed and "out" in upstream else None
    allowed = allowed_of(case, upstream)
    for bounds in layouts:
        shares = running.run(len(bounds), run_share, case, bounds, upstream, whole)
        got = joined(shares, bounds, whole)
        assert got["out"].dtype == case.table.dtype and tuple(got["out"].shape) == case.out_shape()
        if "argmax" in got:
            assert_argmax(got["argmax"], exact, unsure, margin)
        check_results(case, got, upstream, unsure=unsure, more=more, allowed=allowed)


def joined(shares: list[dict], bounds: list[tuple[int, int]], whole: tuple[str, ...] = ()) -> dict[str, Tensor]:
    order, found = sorted(range(len(bounds)), key=lambda rank: bounds[rank]), {}
    for name in shares[0]:
        tensor = name.removeprefix("grad ")
        dim = None if tensor in whole else OF_LABELS.get(tensor.split()[0])
        if dim is not None:
            found[name] = torch.cat([shares[rank][name] for rank in order], dim)
            continue
        for share in shares:
            assert_same_bits(share[name], shares[0][name])
        found[name] = shares[0][name]
    return found


def of_rounded_mixtures(case: Case, upstream: dict[str, Tensor]) -> dict[str, float]:
    """What it makes of the numbers of a row that each process's mixture is rounded to the table's dtype.

    Its product with the upstream is off by u |grad| |mixture| at most, which all labels of the row have in common: in
    the scores' gradients it is one rounding among many, but in a sum over the labels, of a scale or a temperature, it
    adds up, times the scores or the log-probabilities that it is weighted with.
    """
    if case.table.dtype == F64:
        return {}
    exact = called(case, {})
    grad, out = upstream["out"].double(), exact.found["out"].double()
    off = unit(case.table.dtype) * (grad.abs() * out.abs()).sum(-1)
    off = off if case.table.dim() == 2 else off.sum(0)
    T, (source, *_) = case.options.get("temperature", 1.0), sources_of(case.logits)
    T = T.detach().double() if isinstance(T, Tensor) else torch.tensor(T)
    scores = exact.scores[0]
    p, log_p = _softmax(scores, T, case.options.get("mask"))
    scale = source.scale.detach().double() if isinstance(source.scale, Tensor) else torch.tensor(1.0)
    rows = {"grad scale 0": (p * scores.abs()).sum(-1) / scale, "grad temperature": (p * log_p.abs()).sum(-1)}
    return {name: float((off * by / T).norm()) for name, by in rows.items()}


def _softmax(scores: Tensor, T: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    u = scores / (T.unsqueeze(-1) if T.dim() else T)
    u = u if mask is None else u.masked_fill(mask, -torch.inf)
    log_p = u.log_softmax(-1).nan_to_num(0.0, neginf=0.0)
    return log_p.exp() * (u != -torch.inf), log_p


def count_collectives(place: Place, case: Case, bounds: list[tuple[int, int]]):
    start, stop = bounds[place.rank]
    own = share_of(case, start, stop)
    shard = VocabShard(start, stop, bounds[-1][1], place.group)
    with Collectives() as forward:
        out = soft_embedding(own.logits, own.table, shard=shard, **own.options)
        out = out[0] if isinstance(out, tuple) else out
    with Collectives() as backward:
        out.sum().backward()
    return forward.seen, backward.seen


def run_in_chunks(place: Place, *arguments) -> dict:
    """In the smallest chunks that there are."""
    chunk_settings.num_bytes = 1
    try:
        return run_share(place, *arguments)
    finally:
        chunk_settings.num_bytes = None


def run_under_autocast(place: Place, *arguments) -> dict:
    with torch.autocast("cpu", torch.bfloat16):
        return run_share(place, *arguments)


def chosen_twice(place: Place, case: Case, bounds: list[tuple[int, int]]) -> list[Tensor]:
    """The likeliest labels of two calls, of generators that differ between processes."""
    torch.manual_seed(place.rank)
    return [run_share(place, case, bounds, {"out": None, "entropy": None})["argmax"] for _ in range(2)]


def differentiated_twice(place: Place, case: Case, bounds: list[tuple[int, int]]) -> tuple[bool, str]:
    """Whether a second backward has the same bits, and the error of differentiating the gradient."""
    start, stop = bounds[place.rank]
    own, shard = share_of(case, start, stop), VocabShard(start, stop, bounds[-1][1], place.group)
    out, stats = soft_embedding(own.logits, own.table, shard=shard, return_stats=True, **own.options)
    total, leaves = out.square().sum() + stats.entropy.sum(), list(own.leaves().values())
    first, second = (torch.autograd.grad(total, leaves, retain_graph=True) for _ in range(2))
    (grad, _) = torch.autograd.grad(total, leaves, create_graph=True)
    try:
        grad.sum().backward()
    except RuntimeError as error:
        return all(map(torch.equal, first, second)), str(error)
    return False, "no error"


def call(place: Place, arguments: dict, shard: tuple[int, int, int]) -> str:
    soft_embedding(**arguments, shard=VocabShard(*shard, place.group))
    return "no error"


def run_dtensors(place: Place, case: Case, upstream: Tensor, is_hidden_cut: bool) -> dict:
    """Scores and table, or hidden states, weight and table, as DTensors; gradients of all labels."""

    def placed(tensor: Tensor, placement) -> Tensor:
        made = distribute_tensor(tensor.detach(), place.mesh, [placement])
        return made.requires_grad_(tensor.requires_grad)

    (source,) = sources_of(case.logits)
    if isinstance(source, Head):
        hidden = placed(source.hidden, Shard(0) if is_hidden_cut else Replicate())
        source = replace(source, hidden=hidden, weight=placed(source.weight, Shard(0)))
    else:
        source = replace(source, values=placed(source.values, Shard(source.values.dim() - 1)))
    own = Case(source, placed(case.table, Shard(case.table.dim() - 2)), case.options)
    out, leaves = soft_embedding(own.logits, own.table, **own.options), own.leaves()
    grads = torch.autograd.grad(out, list(leaves.values()), upstream)
    whole = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads]
    return {"out": out.detach()} | {f"grad {name}": grad for name, grad in zip(leaves, whole, strict=True)}


def table_of_shards_alone(place: Place, scores: Tensor, table: Tensor) -> str:
    soft_embedding(scores, distribute_tensor(table, place.mesh, [Shard(0)]))
    return "no error"
