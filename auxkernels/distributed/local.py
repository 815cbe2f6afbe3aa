"""The own columns of sources: of those that hold them, and of those that hold all columns on each process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..sources import Head, Logits, Source, leaves_of
from .agreement import Agreement, Facts
from .collectives import replicated
from .shard import VocabShard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Checked(NamedTuple):
    """Sources of one process after their checks. Bits by the number of the source.

    widths   of those that hold more columns than all that the shard has
    """

    widths: list[int]
    compute: torch.dtype
    could_be_own: int
    could_be_all: int


def checked_sources(
    named: list[tuple[str, Source]],
    shard: VocabShard,
    vocab_size: int,
    shape: torch.Size,
    device: torch.device,
    autocast: torch.dtype | None,
) -> Checked:
    """Every source by itself. shard: as given; vocab_size: how many of its columns count."""
    compute, own, whole, widths = torch.float32, 0, 0, []
    for i, (name, source) in enumerate(named):
        width, dtype = checks.source(name, source, shape, device, autocast)
        if dtype == torch.float64:
            compute = dtype
        is_own, is_whole = width == shard.width, width == shard.size or width >= vocab_size != shard.size
        if not (is_own or is_whole):
            raise ValueError(
                f"{name} must have the shard's {shard.width} columns, [{shard.start}, {shard.stop}), or all "
                f"{shard.size}, got {width}"
            )
        widths.append(0 if is_own or width == shard.size else width)
        own |= is_own << i
        whole |= is_whole << i
    return Checked(widths, compute, own, whole)


def own_sources(
    sources: list[Source],
    shard: VocabShard,
    agreement: Agreement,
    facts: Facts,
    group: ProcessGroup,
    summed: tuple[Tensor, ...] = (),
    also: Sequence[Tensor] = (),
) -> tuple[list[Source], list[Tensor]]:
    """(the sources' own columns, `also`), with gradients of what all processes hold that are added up over them.

    shard    the columns that count
    summed   tensors whose gradients are added up elsewhere
    also     further tensors that all processes hold
    """
    of_all = [agreement.is_of_all_columns(i, facts) for i in range(len(sources))]
    held = list(also)  # by all processes
    for source, is_of_all in zip(sources, of_all, strict=True):
        held += [
            t for t in _held_by_all(source, is_of_all) if isinstance(t, Tensor) and not any(t is s for s in summed)
        ]
    made = {id(t): new for t, new in zip(held, replicated(held, group), strict=True)}

    def of(tensor: Tensor) -> Tensor:
        return made.get(id(tensor), tensor)

    found: list[Source] = []
    for source, is_of_all in zip(sources, of_all, strict=True):
        columns = slice(shard.start, shard.stop) if is_of_all else slice(None)
        scale = of(source.scale) if isinstance(source.scale, Tensor) else source.scale
        if isinstance(source, Logits):
            found.append(Logits(of(source.values)[..., columns], scale=scale, softcap=source.softcap))
            continue
        bias = None if source.bias is None else of(source.bias)[columns]
        weight = of(source.weight)[columns]
        found.append(Head(of(source.hidden), weight, bias=bias, scale=scale, softcap=source.softcap))
    return found, [of(tensor) for tensor in also]


def _held_by_all(source: Source, is_of_all: bool) -> list[object]:
    """Tensors whose gradient every process has a share of."""
    if isinstance(source, Logits):
        return [source.scale, source.values if is_of_all else None]
    return [source.hidden, source.scale, *([source.weight, source.bias] if is_of_all else [])]


def tensors_of(source: Source) -> list[object]:
    if isinstance(source, Logits):
        return [source.values, source.scale]
    return [source.hidden, source.weight, source.bias, source.scale]


def layout_of(source: Source) -> tuple[object, ...]:
    """What of a source has to be the same on all processes."""
    kinds = [t.dtype if isinstance(t, Tensor) else t for t in tensors_of(source)]
    sizes = source.scale.dim() if isinstance(source.scale, Tensor) else 0, leaves_of(source, None).values.dim()
    width = source.hidden.shape[-1] if isinstance(source, Head) else 0
    return (type(source).__name__, *kinds, source.softcap, *sizes, width)


def trained(sources: list[Source]) -> int:
    """A bit for each tensor that requires a gradient."""
    tensors = [t for source in sources for t in tensors_of(source)]
    return sum(1 << i for i, t in enumerate(tensors) if isinstance(t, Tensor) and t.requires_grad)
