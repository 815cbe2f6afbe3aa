"""soft_embedding over chunks of rows: softmax or selection by a row kernel, products with the tables by the library.

Scores are given as in cross_entropy/chunked.py, by four entries of `parts` and one of `softcaps` for each source. What
the row kernels do is in request.py. Probabilities live for one chunk; row state and selected labels are saved.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks, dispatch, native
from ..heads.products import WeightGradient, multiply, plan_of
from ..heads.rows import Rows, chunks_of, settings
from ..heads.sides import Buffers, Setting, bytes_per_row, padded, plain_side_of
from ..sources import Leaves, SourceTensors, by_source
from .request import ROW_FIELDS, SoftRows, Upstream

# what the forward op can return after the mixture, as bits of `wanted`, in this order
OUTPUTS = (*ROW_FIELDS, "usage", "labels")
CPU_BYTES = 4 << 20  # of a chunk whose scores need no product: it should not leave the caches
CPU_MIN_ROWS = 256

_LEADING = (
    "Tensor?[] parts, float[] softcaps, ScalarType? autocast, Tensor table, Tensor? temperature, Tensor? gumbel, "
    "Tensor? seed, Tensor? mask, int top_k, bool hard"
)
_library = torch.library.Library("auxkernels", "FRAGMENT")
_library.define(f"soft_embedding({_LEADING}, int wanted, str backend) -> Tensor[]")
_library.define(
    f"soft_embedding_backward({_LEADING}, Tensor max, Tensor log_denom, Tensor argmax, Tensor? labels, Tensor? grad, "
    "Tensor?[] upstream, bool[] needs, str backend) -> Tensor[]"
)
_forward_op = torch.ops.auxkernels.soft_embedding.default
_backward_op = torch.ops.auxkernels.soft_embedding_backward.default


def mask_of(*names: str) -> int:
    return sum(1 << OUTPUTS.index(name) for name in names)


class Lookup(NamedTuple):
    """The leading arguments of the ops."""

    parts: list[Tensor | None]
    softcaps: list[float]
    autocast: torch.dtype | None
    table: Tensor  # [K, D] or [L, K, D]
    temperature: Tensor | None
    gumbel: Tensor | None
    seed: Tensor | None
    mask: Tensor | None
    top_k: int  # 0: all
    hard: bool

    def sources(self) -> list[SourceTensors]:
        return [SourceTensors(*one, cap or None) for one, cap in zip(by_source(self.parts), self.softcaps, strict=True)]

    def first(self) -> Tensor:
        return self.parts[0]

    def shape(self) -> torch.Size:
        return self.first().shape[:-1]

    def num_labels(self) -> int:
        return self.table.shape[-2]

    def compute(self) -> torch.dtype:
        is_double = any(t.dtype == torch.float64 for t in (*(one.values for one in by_source(self.parts)), self.table))
        return torch.float64 if is_double else torch.float32

    def out_shape(self) -> tuple[int, ...]:
        return (*self.table.shape[:-2], *self.shape(), self.table.shape[-1])

    def out_dtype(self) -> torch.dtype:
        is_cast = self.autocast is not None and self.table.dtype != torch.float64
        return self.autocast if is_cast else self.table.dtype

    def kept(self) -> int:
        return min(self.top_k, self.num_labels())


def with_whole_rows(tensor: Tensor) -> Tensor:
    """The tensor, a copy where its last dimension is not contiguous: row kernels know of no stride there."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class LookupCall:
    """One call: its chunks, its scores, its tables."""

    def __init__(self, lookup: Lookup, needs: list[bool], backend: str, num_matrices: int):
        self.lookup, self.kernels = lookup, dispatch.implementation("soft_embedding", backend)
        table, first, K = lookup.table, lookup.first(), lookup.num_labels()
        self.plan = plan_of(table.dtype, lookup.autocast, table.device)
        self.tables = with_whole_rows((table if table.dim() == 3 else table.unsqueeze(0)).to(self.plan.operands))
        self.rows = Rows(lookup.shape(), None)
        sources, compute = lookup.sources(), lookup.compute()
        of_source = by_source(needs) or [Leaves(False, False, False, False)] * len(sources)
        shared, in_place = (K, compute, lookup.autocast), backend == "native"
        row_bytes = num_matrices * padded(K) * self.plan.operands.itemsize
        has_products = any(source.weight is not None for source in sources)
        if has_products or len(sources) > 1:
            row_bytes += bytes_per_row([sources], [[any(n) for n in of_source]], *shared, in_place)
        is_small = first.device.type == "cpu" and not has_products and settings.num_bytes is None
        bounds = (CPU_BYTES, CPU_MIN_ROWS) if is_small else (settings.budget(first.device),)
        self.chunks = chunks_of(self.rows.num_rows, max(row_bytes, 1), *bounds)
        setting = Setting(self.rows, self.chunks, None, *shared, in_place, False)
        self.buffers = Buffers(setting, first)
        self.scores = plain_side_of(sources, setting, of_source, self.buffers)

    @functools.cached_property
    def joined_tables(self) -> Tensor:
        """[K, L * D]."""
        return self.tables.transpose(0, 1).reshape(self.lookup.num_labels(), -1)

    def soft_rows(self, start: int, stop: int) -> SoftRows:
        """The chunk as the row kernels take it."""
        lookup = self.lookup
        scores = with_whole_rows(self.scores.operand(start, stop).values[:, : lookup.num_labels()])
        temperature, mask = lookup.temperature, lookup.mask
        if temperature is None:
            temperature = 1.0
        elif temperature.dim():
            temperature = self.rows.take(temperature, start, stop)
        if mask is not None and mask.dim() > 1:
            mask = self.rows.take(mask, start, stop)
        return SoftRows(scores, lookup.compute(), start, temperature, lookup.gumbel, lookup.seed, mask)

    def matrix(self, name: str, dtype: torch.dtype, num_rows: int) -> Tensor:
        """A [C, K] buffer."""
        return self.buffers.get(name, dtype, num_rows)[:, : self.lookup.num_labels()]

    def in_double(self) -> bool:
        return self.lookup.compute() == torch.float64

    def weights_of_argmax(self, maxima: Tensor) -> Tensor:
        """[C, 1]: what the chosen label counts where the choice is hard; NaN for a row that is no distribution."""
        return torch.where(maxima.isfinite(), 1.0, torch.nan).to(self.lookup.compute()).unsqueeze(-1)


def _is_direct(args: tuple, *more: Tensor | None) -> bool:
    tensors = (*args[0], *args[3:8], *more)
    if torch.is_autocast_enabled("cpu"):
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return False
    return dispatch.is_direct(tensors, args[-1])


def forward(*args) -> list[Tensor]:
    """The op of that name on checked arguments."""
    return _forward(Lookup(*args[:10]), *args[10:]) if _is_direct(args) else _forward_op(*args)


def backward(*args) -> list[Tensor]:
    """The op of that name on checked arguments."""
    is_direct = _is_direct(args, *args[10:15], *args[15])  # with row state, labels and upstream gradients
    return _backward(Lookup(*args[:10]), *args[10:]) if is_direct else _backward_op(*args)


# -- forward -----------------------------------------------------------------------------------------------------------


def _op(function):
    """An implementation: checked like any raw call, out of autograd's and autocast's sight."""

    def run(*args):
        lookup, backend = Lookup(*args[:10]), args[-1]
        checks.lookup(lookup)
        device = lookup.first().device
        if backend == "native" and device.type != "cpu":
            raise RuntimeError(f"the scores must be on CPU for backend='native', got {device}")
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return function(lookup, *args[10:])

    return run


def _empty_outputs(lookup: Lookup, wanted: int) -> dict[str, Tensor]:
    like, shape, K = lookup.first(), lookup.shape(), lookup.num_labels()
    shapes = {"usage": (K,), "labels": (*shape, lookup.kept())}
    outputs = {}
    for i, name in enumerate(OUTPUTS):
        if wanted >> i & 1:
            dtype = torch.int64 if name in ("argmax", "labels") else lookup.compute()
            outputs[name] = like.new_empty(shapes.get(name, shape), dtype=dtype)
    return outputs


def _forward(lookup: Lookup, wanted: int, backend: str) -> list[Tensor]:
    if wanted < 0 or wanted >> len(OUTPUTS):
        raise ValueError(f"wanted must be a mask of the outputs, got {wanted}")
    outputs = _empty_outputs(lookup, wanted)
    if "usage" in outputs:
        outputs["usage"].zero_()
    mixture = native.brought_in(lookup.first().new_empty(lookup.out_shape(), dtype=lookup.out_dtype()))
    call = LookupCall(lookup, [], backend, num_matrices=1)
    flat = mixture.view(len(call.tables), call.rows.num_rows, lookup.table.shape[-1])
    run = _selected if lookup.top_k else _softmaxed
    for start, stop in call.chunks:
        fields = {name: outputs[name].view(-1)[start:stop] for name in ROW_FIELDS if name in outputs}
        run(call, start, stop, fields, outputs, flat[:, start:stop])
    if "usage" in outputs and call.rows.num_rows:
        outputs["usage"].div_(call.rows.num_rows)
    return [mixture, *outputs.values()]


def _softmaxed(call: LookupCall, start: int, stop: int, fields: dict, outputs: dict, mixture: Tensor) -> None:
    """One chunk over all labels."""
    lookup, size, usage = call.lookup, stop - start, outputs.get("usage")
    rows, compute = call.soft_rows(start, stop), lookup.compute()
    probabilities = None
    if usage is not None:
        probabilities = call.matrix("exact probabilities", compute, size)
    elif not lookup.hard:
        probabilities = call.matrix("probabilities", call.plan.operands, size)
    if lookup.hard:
        for name, dtype in (("max", compute), ("argmax", torch.int64)):
            fields.setdefault(name, rows.scores.new_empty(size, dtype=dtype))
    call.kernels.softmax(rows, fields, probabilities)
    if usage is not None:
        usage += probabilities.sum(0)
    if lookup.hard:
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


def _selected(call: LookupCall, start: int, stop: int, fields: dict, outputs: dict, mixture: Tensor) -> None:
    """One chunk over the likeliest labels of each row."""
    lookup, size, k = call.lookup, stop - start, call.lookup.kept()
    rows, in_double = call.soft_rows(start, stop), call.in_double()
    like = rows.scores
    if "labels" in outputs:
        labels = outputs["labels"].view(-1, k)[start:stop]
    else:
        labels = like.new_empty((size, k), dtype=torch.int64)
    weights = like.new_empty((size, k), dtype=lookup.compute())
    if lookup.hard:
        fields.setdefault("max", like.new_empty(size, dtype=lookup.compute()))
    call.kernels.select(rows, fields, labels, weights)
    if "usage" in outputs:
        ones = weights.new_ones((1, size, 1))
        call.kernels.scatter(outputs["usage"].view(1, -1, 1), labels, weights, ones, in_double)
    if lookup.hard:
        labels, weights = labels[:, :1].contiguous(), call.weights_of_argmax(fields["max"])
    call.kernels.gather(call.tables, labels, weights, mixture, in_double)


# -- backward ----------------------------------------------------------------------------------------------------------


class TableGradients:
    """Gradient of the tables [L, K, D], summed over the chunks in float32 (float64)."""

    def __init__(self, call: LookupCall, has_terms: bool):
        lookup = call.lookup
        self.call, self.is_scattered = call, lookup.hard or bool(lookup.top_k) or not has_terms
        if self.is_scattered:
            self.sum = call.tables.new_zeros(call.tables.shape, dtype=lookup.compute())
        else:
            shared = (lookup.num_labels(), call.plan, len(call.chunks), lookup.table.dtype)
            self.out = native.brought_in(lookup.table.new_empty(call.tables.shape))
            self.parts = [WeightGradient(t, *shared, out=out) for t, out in zip(call.tables, self.out, strict=True)]

    def add_products(self, probabilities: Tensor, grad: Tensor) -> None:
        """probabilities [C, K], grad [L, C, D]."""
        for part, of_table in zip(self.parts, grad, strict=True):
            part.add(probabilities, of_table)

    def scatter(self, labels: Tensor, weights: Tensor, grad: Tensor) -> None:
        self.call.kernels.scatter(self.sum, labels, weights, grad, self.call.in_double())

    def result(self) -> Tensor:
        table = self.call.lookup.table
        return (self.sum.to(table.dtype) if self.is_scattered else self.out).view(table.shape)


_STATE = ("max", "log_denom", "argmax")


def _backward(lookup: Lookup, max, log_denom, argmax, labels, grad, upstream, needs, backend) -> list[Tensor]:
    checks.lookup_gradients(lookup, (max, log_denom, argmax), labels, grad, upstream, needs)
    *source_needs, needs_temperature, needs_table = needs
    call = LookupCall(lookup, source_needs, backend, num_matrices=2)
    shape, width = lookup.shape(), lookup.table.shape[-1]
    num_rows = call.rows.num_rows
    upstream = Upstream(*(None if t is None else t.to(lookup.compute()) for t in upstream))
    if upstream.usage is not None:
        upstream = upstream._replace(usage=upstream.usage / num_rows)
    state = {name: t.reshape(-1).contiguous() for name, t in zip(_STATE, (max, log_denom, argmax), strict=True)}
    grads = None if grad is None else grad.reshape(len(call.tables), num_rows, width)
    grad_temperature = max.new_empty(shape) if needs_temperature else None
    of_table = TableGradients(call, has_terms=grad is not None) if needs_table else None
    run = _backward_selected if lookup.top_k else _backward_softmaxed
    for start, stop in call.chunks:
        fields = {name: values[start:stop] for name, values in state.items()}
        of_rows = Upstream(*(None if t is None else t.reshape(-1)[start:stop] for t in upstream[:3]), upstream.usage)
        chunk = None if grads is None else with_whole_rows(grads[:, start:stop].to(call.plan.operands))
        of_temperature = None if grad_temperature is None else grad_temperature.view(-1)[start:stop]
        chosen = None if labels is None else labels.reshape(num_rows, lookup.kept())[start:stop].contiguous()
        run(call, start, stop, fields, of_rows, chunk, of_temperature, of_table, chosen)
    of_sources = [leaf for one in call.scores.gradients() for leaf in one]
    made = [*of_sources, grad_temperature, None if of_table is None else of_table.result()]
    return [g for g, need in zip(made, needs, strict=True) if need]


def _backward_softmaxed(call, start, stop, fields, upstream, grad, grad_temperature, of_table, labels) -> None:
    lookup, size = call.lookup, stop - start
    if of_table is not None and lookup.hard and grad is not None:
        of_table.scatter(fields["argmax"].unsqueeze(-1), call.weights_of_argmax(fields["max"]), grad)
    needs_scores, _ = call.scores.needs()
    wants_products = of_table is not None and not lookup.hard and grad is not None
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
    room = call.scores.gradient_buffer(start, stop) if needs_scores else None
    own = None if room is None else room[:, : lookup.num_labels()]
    call.kernels.softmax_backward(rows, fields, of_probabilities, upstream, own, grad_temperature, probabilities)
    if wants_products:
        of_table.add_products(probabilities, grad)
    _give_back(call, start, stop, room)


def _backward_selected(call, start, stop, fields, upstream, grad, grad_temperature, of_table, labels) -> None:
    lookup, in_double = call.lookup, call.in_double()
    rows = call.soft_rows(start, stop)
    weights = rows.scores.new_empty(labels.shape, dtype=lookup.compute())
    of_weights = None
    if grad is not None:
        of_weights = torch.empty_like(weights)
        call.kernels.products(call.tables, labels, grad, of_weights, in_double)
    needs_scores, _ = call.scores.needs()
    room = call.scores.gradient_buffer(start, stop) if needs_scores else None
    own = None if room is None else room[:, : lookup.num_labels()]
    call.kernels.select_backward(rows, fields, labels, weights, of_weights, upstream, own, grad_temperature)
    if of_table is not None and grad is not None:
        if lookup.hard:
            labels, weights = labels[:, :1].contiguous(), call.weights_of_argmax(fields["max"])
        of_table.scatter(labels, weights, grad)
    _give_back(call, start, stop, room)


def _give_back(call: LookupCall, start: int, stop: int, grad: Tensor | None) -> None:
    if grad is not None:
        grad[:, call.lookup.num_labels() :] = 0  # labels that the table has no row for
        call.scores.take_gradient(start, stop, grad, None)


# -- fakes -------------------------------------------------------------------------------------------------------------


def _forward_fake(*args):
    lookup = Lookup(*args[:10])
    checks.lookup(lookup)
    mixture = lookup.first().new_empty(lookup.out_shape(), dtype=lookup.out_dtype())
    return [mixture, *_empty_outputs(lookup, args[-2]).values()]


def _backward_fake(*args):
    lookup, needs = Lookup(*args[:10]), args[-2]
    checks.lookup(lookup)
    row = lookup.first().new_empty((), dtype=lookup.compute()).expand(lookup.shape())
    sources = [one._replace(scale=None if one.scale is None else row) for one in by_source(lookup.parts)]
    likes = [*(leaf for one in sources for leaf in one), row, lookup.table]
    return [like.new_empty(like.shape) for like, need in zip(likes, needs, strict=True) if need]


for _name, _kernel, _fake in (
    ("soft_embedding", _forward, _forward_fake),
    ("soft_embedding_backward", _backward, _backward_fake),
):
    _library.impl(_name, _op(_kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"auxkernels::{_name}", _fake, lib=_library)
