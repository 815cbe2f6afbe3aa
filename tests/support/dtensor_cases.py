"""Cases as DTensors, and what processes do with them."""

from __future__ import annotations

from dataclasses import replace

import torch
from oracle import Case, sources_of
from processes import Place
from sharded import Collectives, detached, stats_gradients
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from auxkernels import Head, Logits, VocabShard, aux_cross_entropy, logit_stats

PLAIN = "plain"  # as it is, on every process


def placed(place: Place, tensor, placement):
    """A leaf of its own."""
    if not isinstance(tensor, Tensor):
        return tensor
    if placement == PLAIN:
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)
    return distribute_tensor(tensor.detach(), place.mesh, [placement]).requires_grad_(tensor.requires_grad)


def as_dtensors(place: Place, case: Case, layout: dict) -> Case:
    """layout: by "hidden", "weight" (and bias), "logits", "scale", "target"; and of a source alone, "aux[0]": PLAIN."""
    made = {"hidden": Replicate(), "weight": Shard(0), "logits": Shard(-1), "scale": PLAIN, "target": PLAIN} | layout

    def of_source(name: str, source):
        own = {key: PLAIN if made.get(name) == PLAIN else value for key, value in made.items()}
        scale = placed(place, source.scale, own["scale"])
        if isinstance(source, Logits):
            dim = own["logits"]
            dim = Shard(source.values.dim() - 1) if dim == Shard(-1) else dim
            return replace(source, values=placed(place, source.values, dim), scale=scale)
        hidden, weight = placed(place, source.hidden, own["hidden"]), placed(place, source.weight, own["weight"])
        return replace(
            source, hidden=hidden, weight=weight, bias=placed(place, source.bias, own["weight"]), scale=scale
        )

    sides = []
    for side, given in (("base", case.base), ("aux", case.aux)):
        found = [of_source(f"{side}[{i}]", source) for i, source in enumerate(sources_of(given))]
        sides.append(None if given is None else found)
    return Case(*sides, placed(place, case.target, made["target"]), case.options)


def whole(grad: Tensor) -> Tensor:
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def run_dtensors(place: Place, case: Case, layout: dict, upstream=None) -> dict:
    """Loss and whole gradients by name."""
    own = as_dtensors(place, case, layout)
    loss, leaves = aux_cross_entropy(own.base, own.aux, own.target, **own.options), own.leaves()
    assert type(loss) is Tensor
    grads = torch.autograd.grad(loss, list(leaves.values()), upstream)
    for grad, leaf in zip(grads, leaves.values(), strict=True):
        if isinstance(leaf, DTensor):
            assert grad.placements == leaf.placements and grad.shape == leaf.shape
    return {"loss": loss.detach(), **dict(zip(leaves, map(whole, grads), strict=True))}


def stats_of_dtensors(place: Place, case: Case, layout: dict) -> dict:
    own = as_dtensors(place, case, layout)
    stats = logit_stats(own.base, own.aux, own.target)
    grads = stats_gradients(stats, own)
    return {"stats": detached(stats), **{name: whole(grad) for name, grad in grads.items()}}


def count_collectives(place: Place, case: Case, layout: dict):
    own = as_dtensors(place, case, layout)
    with Collectives() as forward:
        loss = aux_cross_entropy(own.base, own.aux, own.target, **own.options)
    with Collectives() as backward:
        loss.backward()
    return forward.seen, backward.seen


# -- wrong use, and weights that say nothing ---------------------------------------------------------------------------


def call(place: Place, case: Case, layout: dict) -> str:
    own = as_dtensors(place, case, layout)
    aux_cross_entropy(own.base, own.aux, own.target, **own.options)
    return "no error"


def call_with_fully_sharded_head(place: Place, hidden: Tensor, weight: Tensor, target: Tensor):
    """A head whose parameters FSDP holds in shards, outside of its forward."""
    from torch.distributed.fsdp import fully_shard

    head = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    head.weight.data.copy_(weight)
    fully_shard(head, mesh=place.mesh)
    return aux_cross_entropy(Head(hidden, head.weight), None, target)


def with_shard_of_weight(place: Place, case: Case) -> dict:
    """Plain hidden states beside a sharded weight, which the caller says holds columns."""
    own = as_dtensors(place, case, {"hidden": PLAIN})
    shard = VocabShard.from_dtensor(own.aux[0].weight)
    loss, leaves = aux_cross_entropy(own.base, own.aux, own.target, shard=shard), own.leaves()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, map(whole, grads), strict=True))}


def call_with_other_bounds(place: Place, case: Case) -> str:
    own = as_dtensors(place, case, {"hidden": PLAIN})
    size = case.aux.weight.shape[0]
    bounds = [(0, size - 1), (size - 1, size)][place.rank]
    aux_cross_entropy(own.base, own.aux, own.target, shard=VocabShard(*bounds, size, place.group))
    return "no error"


def call_on_two_dimensions(place: Place, case: Case) -> str:
    """Of a mesh whose first dimension has one process."""
    mesh = torch.distributed.device_mesh.DeviceMesh("cpu", torch.arange(place.size).view(1, -1))
    hidden, weight = case.aux.hidden.detach(), case.aux.weight.detach()
    head = Head(
        distribute_tensor(hidden, mesh, [Replicate(), Replicate()]),
        distribute_tensor(weight, mesh, [Replicate(), Shard(0)]),
    )
    aux_cross_entropy(head, None, case.target)
    return "no error"


def call_with_partial_hidden(place: Place, case: Case) -> str:
    own = as_dtensors(place, case, {})
    head = own.aux[0]
    partial = DTensor.from_local(head.hidden.to_local().detach(), place.mesh, [Partial()])
    aux_cross_entropy(replace(head, hidden=partial), None, own.target)
    return "no error"
