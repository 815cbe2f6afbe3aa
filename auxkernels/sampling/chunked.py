"""Sampling by row kernels: logits as they are, those of heads by the library's products in chunks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .. import dispatch
from ..heads.operands import Buffers, Context, bytes_per_row, operand_of, source_chunks
from ..heads.rows import Rows, chunks_of, fewest_rows, settings
from ..heads.shared_weights import groups_of
from ..sources import Leaves, Matrix, SourceTensors
from .request import Parameters, Request, SampleRows, empty_fields

_NO_GRADIENT = Leaves(False, False, False, False)


def sample(request: Request, backend: str) -> list[Tensor]:
    """The token of each row and, where wanted, the fields of `SampleStats`."""
    kernels = dispatch.implementation("sampling", backend)
    fields = empty_fields(request)
    num_rows = request.shape().numel()
    if num_rows == 0:
        return fields
    if kernels.TAKES_SUMS and all(source.weight is None for source in request.sources):
        matrices = [Matrix(source.values, source.scale, source.softcap) for source in request.sources]
        base, aux = matrices[: request.num_base], matrices[request.num_base :]
        kernels.sample(_rows(request, base, aux, request.parameters, 0, num_rows), fields)
        return fields
    flat = [field.view(-1) for field in fields]
    for start, stop, base, aux in _matrices_in_chunks(request, kernels.TAKES_SUMS, backend == "native"):
        parameters = _of_chunk(request.parameters, start, stop)
        kernels.sample(_rows(request, base, aux, parameters, start, stop), [field[start:stop] for field in flat])
    return fields


def _rows(
    request: Request, base: list[Matrix], aux: list[Matrix], parameters: Parameters, start: int, stop: int
) -> SampleRows:
    shared = request.vocab_size, request.compute(), request.order
    return SampleRows(base, aux, stop - start, start, *shared, parameters)


def _of_chunk(parameters: Parameters, start: int, stop: int) -> Parameters:
    """Those of rows [start, stop)."""
    chunk: dict[str, Any] = parameters._asdict()
    for name, value in chunk.items():
        if isinstance(value, Tensor) and value.dim():
            chunk[name] = value.reshape(-1)[start:stop]
    return Parameters(**chunk)


def _matrices_in_chunks(
    request: Request, takes_sums: bool, in_place: bool
) -> Iterator[tuple[int, int, list[Matrix], list[Matrix]]]:
    """Chunks of rows with the matrices of each side: those of its sources, or that of their sum."""
    first, compute = request.first(), request.compute()
    scales = [dispatch.number_tensor(one.scale, compute, first.device) for one in request.sources]
    sources = [one._replace(scale=scale) for one, scale in zip(request.sources, scales, strict=True)]
    needs = [_NO_GRADIENT] * len(sources)
    is_base_wanted = request.wants_stats or request.parameters.plausibility is not None
    groups = groups_of(sources, needs, request.num_base, request.autocast, is_base_wanted)
    rows = Rows(request.shape(), None)
    sides = [sources[: request.num_base], sources[request.num_base :]]
    wants = [[False] * len(side) for side in sides]
    row_bytes = bytes_per_row(sides, wants, request.vocab_size, compute, request.autocast, in_place)
    chunks = chunks_of(rows.num_rows, row_bytes, settings.budget(first.device), fewest_rows(first.device))
    context = Context(rows, chunks, None, request.vocab_size, compute, request.autocast, in_place, False)
    buffers = Buffers(context, first)
    parts: list[list[list[SourceTensors]]] = [[[sources[i] for i in group] for group in side] for side in groups]
    of_parts = [[[_NO_GRADIENT] * len(group) for group in side] for side in parts]
    if takes_sums:
        chunked = [
            [source_chunks(group, context, need, buffers) for group, need in zip(side, of_side, strict=True)]
            for side, of_side in zip(parts, of_parts, strict=True)
        ]
        for start, stop in chunks:
            base, aux = (
                [Matrix(one.values(start, stop), one.scale(start, stop), one.part.softcap) for one in side]
                for side in chunked
            )
            yield start, stop, base, aux
        return
    operands = [operand_of(side, context, need, buffers) for side, need in zip(parts, of_parts, strict=True)]
    for start, stop in chunks:
        base, aux = ([m] if (m := one.matrix(start, stop)) is not None else [] for one in operands)
        yield start, stop, base, aux
