"""Sources that are DTensors: the shard that they mean, and what this process has of them, as plain tensors.

Of a head, weight and bias are cut along their rows, `Shard(0)`; logits along their last dimension. Hidden states are
`Replicate`, or cut along another dimension than the last (sequence parallel): these are gathered, and their gradients
added up and scattered. Anything may be `Replicate`.

A weight alone does not say what it is: a parameter that FSDP has sharded over data-parallel processes is `Shard(0)` on
a mesh of one dimension as well, and to merge the rows of processes that hold different data would give a number. A
shard is inferred where hidden states or logits are DTensors too, and has to be given otherwise.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed import get_process_group_ranks
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ..sources import Head, Logits, Source
from .shard import VocabShard

_WAYS_OUT = (
    "a parameter that FSDP has sharded looks like this. Call the loss where it is gathered: in the forward of the "
    "module that FSDP wraps, with norm and head in one group, or by register_fsdp_forward_method. If these are columns "
    "of the vocabulary, pass the hidden states as a DTensor too, or shard=VocabShard.from_dtensor(weight)"
)


class Plain(NamedTuple):
    """Arguments without DTensors.

    shard    None: none of the sources means one
    summed   tensors whose gradients are added up over the processes on their way back
    """

    base: list[Source]
    aux: list[Source]
    target: Any
    shard: VocabShard | None
    summed: tuple[Tensor, ...] = ()


def shard_of(name: str, tensor: DTensor) -> VocabShard:
    """The columns that a DTensor is cut into, along its one sharded dimension."""
    mesh, placement = tensor.device_mesh, _placement(name, tensor)
    if type(placement) is not Shard:
        raise TypeError(f"{name} must be sharded over its mesh, got {placement}")
    size, world = tensor.shape[placement.dim], mesh.size()
    step = -(-size // world)  # as torch.chunk
    start, stop = (min(rank * step, size) for rank in (mesh.get_local_rank(), mesh.get_local_rank() + 1))
    held = tensor.to_local().shape[placement.dim]
    if held != stop - start:
        raise ValueError(f"{name} must have {stop - start} of its {size} columns on this process, got {held}")
    return VocabShard(start, stop, size, mesh.get_group())


def _placement(name: str, tensor: DTensor) -> Any:
    if tensor.device_mesh.ndim != 1:
        raise TypeError(
            f"{name} must be on a mesh of one dimension, got {tensor.device_mesh.ndim} of them, {tensor.placements}: "
            "gather what FSDP shards, and slice the mesh (mesh['tp'])"
        )
    return tensor.placements[0]


def _dim(placement: Any, tensor: Tensor) -> int | None:
    """The dimension along which a tensor is cut; None: it is not."""
    return placement.dim % tensor.dim() if type(placement) is Shard else None


def localised(named: list[tuple[str, Source]], num_base: int, target: Any, shard: VocabShard | None) -> Plain:
    """Sources by name, DTensors among them, as plain tensors of this process."""
    if shard is None:
        shard = _inferred(named)
        if shard is None:
            return Plain([s for _, s in named[:num_base]], [s for _, s in named[num_base:]], target, None)
    summed: list[Tensor] = []
    found = [_own(name, source, shard, summed) for name, source in named]
    if isinstance(target, DTensor):
        _check_group("target", target, shard)
        placement = _placement("target", target)
        # class indices: nothing of this has a gradient
        target = target.full_tensor() if isinstance(placement, Shard) else target.to_local()
    return Plain(found[:num_base], found[num_base:], target, shard, tuple(summed))


def _inferred(named: list[tuple[str, Source]]) -> VocabShard | None:
    """Of the sources that say what they are; ValueError where they disagree."""
    found: list[tuple[str, VocabShard]] = []
    for name, source in named:
        if isinstance(source, Logits):
            values = source.values
            if isinstance(values, DTensor) and _dim(_placement(name, values), values) == values.dim() - 1:
                found.append((name, shard_of(name, values)))
        elif isinstance(source.weight, DTensor):
            of = f"weight of {name}"
            if not isinstance(source.hidden, DTensor):
                raise TypeError(
                    f"{of} must be a plain tensor beside plain hidden states, got DTensor "
                    f"{source.weight.placements}: {_WAYS_OUT}"
                )
            if _dim(_placement(of, source.weight), source.weight) == 0:
                found.append((of, shard_of(of, source.weight)))
    for name, shard in found[1:]:
        _check_same(found[0][0], found[0][1], name, shard)
    return found[0][1] if found else None


def _check_same(name: str, shard: VocabShard, other_name: str, other: VocabShard) -> None:
    ranks = [get_process_group_ranks(of.processes()) for of in (shard, other)]
    if ranks[0] != ranks[1]:
        raise ValueError(
            f"{name} and {other_name} must be sharded over the same processes, got {ranks[0]} and {ranks[1]}"
        )
    if (shard.start, shard.stop, shard.size) != (other.start, other.stop, other.size):
        shown = [f"[{of.start}, {of.stop}) of {of.size}" for of in (shard, other)]
        raise ValueError(f"{name} and {other_name} must hold the same columns, got {shown[0]} and {shown[1]}")


def _check_group(name: str, tensor: DTensor, shard: VocabShard) -> None:
    _placement(name, tensor)
    ranks = [get_process_group_ranks(group) for group in (tensor.device_mesh.get_group(), shard.processes())]
    if ranks[0] != ranks[1]:
        raise ValueError(f"{name} must be on the shard's processes {ranks[1]}, got {ranks[0]}")


def _own(name: str, source: Source, shard: VocabShard, summed: list[Tensor]) -> Source:
    scale = _whole(f"scale of {name}", source.scale, shard)
    if isinstance(source, Logits):
        return replace(source, values=columns_of(name, source.values, -1, shard), scale=scale)
    hidden = _hidden(f"hidden of {name}", source.hidden, shard, summed)
    weight, bias = (columns_of(f"{part} of {name}", getattr(source, part), 0, shard) for part in ("weight", "bias"))
    return Head(hidden, weight, bias=bias, scale=scale, softcap=source.softcap)


def columns_of(name: str, tensor: Any, dim: int, shard: VocabShard) -> Any:
    """The own columns of what is cut along `dim`, all columns of what is not cut."""
    if not isinstance(tensor, DTensor):
        return tensor
    _check_group(name, tensor, shard)
    placement = tensor.placements[0]
    if isinstance(placement, Replicate):
        return _whole(name, tensor, shard)
    if _dim(placement, tensor) != dim % tensor.dim():
        raise TypeError(f"{name} must be Shard({dim}) or Replicate, got {placement}")
    _check_same("the shard", shard, name, shard_of(name, tensor))
    return tensor.to_local()


def _whole(name: str, tensor: Any, shard: VocabShard) -> Any:
    """What every process holds. Its gradient will be added up, so that it is Replicate as well."""
    if not isinstance(tensor, DTensor):
        return tensor
    _check_group(name, tensor, shard)
    if not isinstance(tensor.placements[0], Replicate):
        raise TypeError(f"{name} must be Replicate, got {tensor.placements[0]}")
    return tensor.to_local(grad_placements=[Replicate()])


def _hidden(name: str, tensor: Any, shard: VocabShard, summed: list[Tensor]) -> Any:
    if not isinstance(tensor, DTensor) or isinstance(_placement(name, tensor), Replicate):
        return _whole(name, tensor, shard)
    _check_group(name, tensor, shard)
    dim = _dim(tensor.placements[0], tensor)
    if dim is None or dim == tensor.dim() - 1:
        raise TypeError(f"{name} must be Replicate or cut along its rows, got {tensor.placements[0]}")
    gathered = tensor.redistribute(placements=[Replicate()])
    # each process has a share of the gradient of all rows: added up, and scattered
    found = gathered.to_local(grad_placements=[Partial()])
    summed.append(found)
    return found
