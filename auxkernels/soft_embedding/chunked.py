"""soft_embedding over chunks of rows: softmax or selection by a row kernel, products with the tables by the library.

Probabilities live for one chunk; row state and selected labels are saved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .. import dispatch, memory
from ..heads.operands import Buffers, Context, bytes_per_row, padded, plain_operand_of
from ..heads.products import WeightGradient, multiply, plan_of
from ..heads.rows import Rows, chunks_of, fewest_rows, settings
from ..sources import Leaves
from .request import OUTPUTS, ROW_FIELDS, Kernels, Request, SoftRows, State, Upstream

CPU_BYTES = 4 << 20  # of a chunk whose scores need no product: it should not leave the caches
CPU_MIN_ROWS = 256


def with_whole_rows(tensor: Tensor) -> Tensor:
    """The tensor, a copy where its last dimension is not contiguous: row kernels know of no stride there."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class LookupCall:
    """One call: its chunks, its scores, its tables."""

    def __init__(self, request: Request, needs: list[Leaves], backend: str, num_matrices: int):
        self.request = request
        self.kernels: Kernels = dispatch.implementation("soft_embedding", backend)
        table, first, K = request.table, request.first(), request.num_labels()
        self.plan = plan_of(table.dtype, request.autocast, table.device)
        self.tables = with_whole_rows(self.plan.operand(table if table.dim() == 3 else table.unsqueeze(0)))
        self.rows = Rows(request.shape(), None)
        sources, compute = request.sources, request.compute()
        of_source = needs or [Leaves(False, False, False, False)] * len(sources)
        shared, in_place = (K, compute, request.autocast), backend == "native"
        row_bytes = num_matrices * padded(K) * self.plan.operands.itemsize
        has_products = any(source.weight is not None for source in sources)
        if has_products or len(sources) > 1:
            row_bytes += bytes_per_row([sources], [[any(n) for n in of_source]], *shared, in_place)
        is_small = first.device.type == "cpu" and not has_products and settings.num_bytes is None
        bounds = (CPU_BYTES, CPU_MIN_ROWS) if is_small else (settings.budget(first.device), fewest_rows(first.device))
        self.chunks = chunks_of(self.rows.num_rows, max(row_bytes, 1), *bounds)
        context = Context(self.rows, self.chunks, None, *shared, in_place, False)
        self.buffers = Buffers(context, first)
        self.scores = plain_operand_of(sources, context, of_source, self.buffers)

    @functools.cached_property
    def joined_tables(self) -> Tensor:
        """[K, L * D]."""
        return self.tables.transpose(0, 1).reshape(self.request.num_labels(), -1)

    def soft_rows(self, start: int, stop: int) -> SoftRows:
        """The chunk as the row kernels take it."""
        request = self.request
        matrix = self.scores.matrix(start, stop)
        assert matrix is not None, "there is at least one source"
        scores = with_whole_rows(matrix.values[:, : request.num_labels()])
        temperature: float | Tensor = 1.0 if request.temperature is None else request.temperature
        mask = request.mask
        if isinstance(temperature, Tensor) and temperature.dim():
            temperature = self.rows.take(temperature, start, stop)
        if mask is not None and mask.dim() > 1:
            mask = self.rows.take(mask, start, stop)
        return SoftRows(scores, request.compute(), start, temperature, request.gumbel, request.seed, mask)

    def matrix(self, name: str, dtype: torch.dtype, num_rows: int) -> Tensor:
        """A [C, K] buffer."""
        return self.buffers.get(name, dtype, num_rows)[:, : self.request.num_labels()]

    def in_double(self) -> bool:
        return self.request.compute() == torch.float64

    def weights_of_argmax(self, maxima: Tensor) -> Tensor:
        """[C, 1]: what the chosen label counts where the choice is hard; NaN for a row that is no distribution."""
        return torch.where(maxima.isfinite(), 1.0, torch.nan).to(self.request.compute()).unsqueeze(-1)


# -- forward -----------------------------------------------------------------------------------------------------------


def empty_outputs(request: Request, wanted: int) -> dict[str, Tensor]:
    like, shape = request.first(), request.shape()
    shapes = {"usage": (request.num_labels(),), "labels": (*shape, request.kept())}
    outputs = {}
    for i, name in enumerate(OUTPUTS):
        if wanted >> i & 1:
            dtype = torch.int64 if name in ("argmax", "labels") else request.compute()
            outputs[name] = like.new_empty(shapes.get(name, shape), dtype=dtype)
    return outputs


def forward(request: Request, wanted: int, backend: str) -> list[Tensor]:
    """[mixture, the wanted outputs]."""
    outputs = empty_outputs(request, wanted)
    if "usage" in outputs:
        outputs["usage"].zero_()
    mixture = memory.empty(request.first(), request.out_shape(), request.out_dtype())
    call = LookupCall(request, [], backend, num_matrices=1)
    flat = mixture.view(len(call.tables), call.rows.num_rows, request.table.shape[-1])
    run = _selected if request.top_k else _softmaxed
    for start, stop in call.chunks:
        fields = {name: outputs[name].view(-1)[start:stop] for name in ROW_FIELDS if name in outputs}
        run(call, start, stop, fields, outputs, flat[:, start:stop])
    if "usage" in outputs and call.rows.num_rows:
        outputs["usage"].div_(call.rows.num_rows)
    return [mixture, *outputs.values()]


def _softmaxed(
    call: LookupCall, start: int, stop: int, fields: dict[str, Tensor], outputs: dict[str, Tensor], mixture: Tensor
) -> None:
    """One chunk over all labels."""
    request, size, usage = call.request, stop - start, outputs.get("usage")
    rows, compute = call.soft_rows(start, stop), request.compute()
    probabilities: Tensor | None = None
    if usage is not None:
        probabilities = call.matrix("exact probabilities", compute, size)
    elif not request.hard:
        probabilities = call.matrix("probabilities", call.plan.operands, size)
    if request.hard:
        for name, dtype in (("max", compute), ("argmax", torch.int64)):
            fields.setdefault(name, rows.scores.new_empty(size, dtype=dtype))
    call.kernels.softmax(rows, fields, probabilities)
    if usage is not None and probabilities is not None:
        usage += probabilities.sum(0)
    if request.hard or probabilities is None:
        weights = call.weights_of_argmax(fields["max"])
        call.kernels.gather(call.tables, fields["argmax"].unsqueeze(-1), weights, mixture, call.in_double())
        return
    _mix(call, probabilities.to(call.plan.operands), mixture)


def _mix(call: LookupCall, probabilities: Tensor, mixture: Tensor) -> None:
    for table, out in zip(call.tables, mixture, strict=True):
        if out.dtype == call.plan.operands:
            multiply(probabilities, table, out)
        else:
            out.copy_(torch.mm(probabilities, table))


def _selected(
    call: LookupCall, start: int, stop: int, fields: dict[str, Tensor], outputs: dict[str, Tensor], mixture: Tensor
) -> None:
    """One chunk over the likeliest labels of each row."""
    request, size, k = call.request, stop - start, call.request.kept()
    rows, in_double = call.soft_rows(start, stop), call.in_double()
    like = rows.scores
    if "labels" in outputs:
        labels = outputs["labels"].view(-1, k)[start:stop]
    else:
        labels = like.new_empty((size, k), dtype=torch.int64)
    weights = like.new_empty((size, k), dtype=request.compute())
    if request.hard:
        fields.setdefault("max", like.new_empty(size, dtype=request.compute()))
    call.kernels.select(rows, fields, labels, weights)
    if "usage" in outputs:
        ones = weights.new_ones((1, size, 1))
        call.kernels.scatter(outputs["usage"].view(1, -1, 1), labels, weights, ones, in_double)
    if request.hard:
        labels, weights = labels[:, :1].contiguous(), call.weights_of_argmax(fields["max"])
    call.kernels.gather(call.tables, labels, weights, mixture, in_double)


# -- backward ----------------------------------------------------------------------------------------------------------


class TableGradients:
    """Gradient of the tables [L, K, D], summed over the chunks in float32 (float64)."""

    def __init__(self, call: LookupCall, has_terms: bool):
        request = call.request
        self.call, self.is_scattered = call, request.hard or bool(request.top_k) or not has_terms
        if self.is_scattered:
            self.sum = call.tables.new_zeros(call.tables.shape, dtype=request.compute())
        else:
            shared = (request.num_labels(), call.plan, len(call.chunks), request.table.dtype)
            self.out = memory.empty(request.table, call.tables.shape)
            self.parts = [WeightGradient(t, *shared, out=out) for t, out in zip(call.tables, self.out, strict=True)]

    def add_products(self, probabilities: Tensor, grad: Tensor) -> None:
        """probabilities [C, K], grad [L, C, D]."""
        for part, of_table in zip(self.parts, grad, strict=True):
            part.add(probabilities, of_table)

    def scatter(self, labels: Tensor, weights: Tensor, grad: Tensor) -> None:
        self.call.kernels.scatter(self.sum, labels, weights, grad, self.call.in_double())

    def result(self) -> Tensor:
        table = self.call.request.table
        return (self.sum.to(table.dtype) if self.is_scattered else self.out).view(table.shape)


def backward(
    request: Request,
    state: State,
    grad: Tensor | None,
    upstream: Upstream,
    needs: list[Leaves],
    needs_temperature: bool,
    needs_table: bool,
    backend: str,
) -> tuple[list[Leaves], Tensor | None, Tensor | None]:
    """Gradients of the sources, of the temperature for each row, and of the table."""
    call = LookupCall(request, needs, backend, num_matrices=2)
    shape, width = request.shape(), request.table.shape[-1]
    num_rows = call.rows.num_rows
    upstream = Upstream(*(None if t is None else t.to(request.compute()) for t in upstream))
    if upstream.usage is not None:
        upstream = upstream._replace(usage=upstream.usage / num_rows)
    rows = {name: getattr(state, name).reshape(-1).contiguous() for name in ("max", "log_denom", "argmax")}
    grads = None if grad is None else grad.reshape(len(call.tables), num_rows, width)
    grad_temperature = state.max.new_empty(shape) if needs_temperature else None
    of_table = TableGradients(call, has_terms=grad is not None) if needs_table else None
    run: Callable[..., None] = _backward_selected if request.top_k else _backward_softmaxed
    for start, stop in call.chunks:
        fields = {name: values[start:stop] for name, values in rows.items()}
        of_rows = _rows_of(upstream, start, stop)
        chunk = None if grads is None else with_whole_rows(grads[:, start:stop].to(call.plan.operands))
        of_temperature = None if grad_temperature is None else grad_temperature.view(-1)[start:stop]
        chosen = None
        if state.labels is not None:
            chosen = state.labels.reshape(num_rows, request.kept())[start:stop].contiguous()
        run(call, start, stop, fields, of_rows, chunk, of_temperature, of_table, chosen)
    return call.scores.gradients(), grad_temperature, None if of_table is None else of_table.result()


def _rows_of(upstream: Upstream, start: int, stop: int) -> Upstream:
    """That of one chunk."""
    of_chunk = {name: None if t is None else t.reshape(-1)[start:stop] for name, t in upstream._asdict().items()}
    return Upstream(**of_chunk | {"usage": upstream.usage})


def _backward_softmaxed(
    call: LookupCall,
    start: int,
    stop: int,
    fields: dict[str, Tensor],
    upstream: Upstream,
    grad: Tensor | None,
    grad_temperature: Tensor | None,
    of_table: TableGradients | None,
    labels: None,
) -> None:
    request, size = call.request, stop - start
    if of_table is not None and request.hard and grad is not None:
        of_table.scatter(fields["argmax"].unsqueeze(-1), call.weights_of_argmax(fields["max"]), grad)
    needs_scores, _ = call.scores.needs()
    wants_products = of_table is not None and not request.hard and grad is not None
    if not (needs_scores or grad_temperature is not None or wants_products):
        return
    rows = call.soft_rows(start, stop)
    of_probabilities = None
    if grad is not None and (needs_scores or grad_temperature is not None):
        of_probabilities = call.matrix("gradient of probabilities", call.plan.logits, size)
        # all tables in one product, which is then rounded once
        joined = grad.transpose(0, 1).reshape(size, -1)
        multiply(joined, call.joined_tables.T, of_probabilities)
    probabilities = call.matrix("probabilities", call.plan.operands, size) if wants_products else None
    buffer = call.scores.gradient_buffer(start, stop) if needs_scores else None
    own = None if buffer is None else buffer[:, : request.num_labels()]
    call.kernels.softmax_backward(rows, fields, of_probabilities, upstream, own, grad_temperature, probabilities)
    if of_table is not None and grad is not None and probabilities is not None:
        of_table.add_products(probabilities, grad)
    _give_back(call, start, stop, buffer)


def _backward_selected(
    call: LookupCall,
    start: int,
    stop: int,
    fields: dict[str, Tensor],
    upstream: Upstream,
    grad: Tensor | None,
    grad_temperature: Tensor | None,
    of_table: TableGradients | None,
    labels: Tensor,
) -> None:
    request, in_double = call.request, call.in_double()
    rows = call.soft_rows(start, stop)
    weights = rows.scores.new_empty(labels.shape, dtype=request.compute())
    of_weights = None
    if grad is not None:
        of_weights = torch.empty_like(weights)
        call.kernels.products(call.tables, labels, grad, of_weights, in_double)
    needs_scores, _ = call.scores.needs()
    buffer = call.scores.gradient_buffer(start, stop) if needs_scores else None
    own = None if buffer is None else buffer[:, : request.num_labels()]
    call.kernels.select_backward(rows, fields, labels, weights, of_weights, upstream, own, grad_temperature)
    if of_table is not None and grad is not None:
        if request.hard:
            labels, weights = labels[:, :1].contiguous(), call.weights_of_argmax(fields["max"])
        of_table.scatter(labels, weights, grad)
    _give_back(call, start, stop, buffer)


def _give_back(call: LookupCall, start: int, stop: int, grad: Tensor | None) -> None:
    if grad is not None:
        grad[:, call.request.num_labels() :] = 0  # labels that the table has no row for
        call.scores.take_gradient(start, stop, grad, None)
