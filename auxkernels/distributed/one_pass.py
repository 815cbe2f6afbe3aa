"""A reduced loss with heads or sums: loss and gradients of each chunk of rows while its logits are there.

The rows of a chunk are exchanged by themselves, so that products are made once: one gather for each chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..cross_entropy import autograd, ops, rows
from ..cross_entropy.chunked import LossCall
from ..cross_entropy.request import LossTerms, Problem, RowState, fields_in, mask_of, named_fields
from ..cross_entropy.rows import coefficients_of
from ..heads.columns import sums_at
from ..sources import SourceTensors, by_source
from . import row_state, scan
from .scan import Part


def loss_and_gradients(
    part: Part,
    call: ops.Call,
    weight: Tensor | None,
    ignore_index: int,
    normalizer: float | Tensor | None,
    terms: LossTerms,
    wanted: int,
    widest: int,
) -> list[Tensor]:
    """What `ops.loss` gives for the call of the own columns, with the loss and the fields of whole rows.

    weight, ignore_index   as given
    widest                 columns of the process that has the most: all cut the same chunks
    """
    leaves = ops.tensors_of(call.leaves)
    bound = scan.rank_bounds(part, leaves) if wanted & scan.RANK else None
    needs = autograd.needs_of(call)
    device = leaves[0].device  # type: ignore[union-attr]  # a source's first leaf is there
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        divisor = dispatch.number_tensor(normalizer, torch.float64, device)
        made = _ShardedLoss(part, call, weight, ignore_index, divisor, terms, wanted, needs, bound, widest)
        for start, stop in made.chunks.chunks:
            made.run(start, stop)
        return made.outputs()


class _ShardedLoss(LossCall):
    """See `loss_and_gradients`."""

    exact_targets = False  # whole rows' numbers are made of sums as each process has stored them

    def __init__(
        self,
        part: Part,
        call: ops.Call,
        weight: Tensor | None,
        ignore_index: int,
        divisor: Tensor | None,
        terms: LossTerms,
        wanted: int,
        needs: tuple[bool, ...],
        bound: Tensor | None,
        widest: int,
    ):
        self.part, self.weight, self.ignore_index, self.bound = part, weight, ignore_index, bound
        self.leaves, self.needs = ops.tensors_of(call.leaves), needs
        request = ops.request_without_columns(call) if part.is_empty() else ops.request_of(call)
        super().__init__(request, divisor, terms, wanted, by_source(needs), call.options.backend, widest)
        if not part.is_empty():
            self.chunks.make_operands()
        self.of_loss = rows.fields_of_loss(terms.label_smoothing, terms.z_loss)
        self.needed = wanted | self.of_loss | mask_of("max", "log_denom")

    def run(self, start: int, stop: int) -> None:
        part, call = self.part, self.chunks

        def take(values: Tensor) -> Tensor:
            return call.rows.take(values, start, stop)

        sent = row_state.sent_fields(self.needed)
        problem = None
        if part.is_empty():
            own = scan.of_no_columns(part, torch.Size((stop - start,)), self.request.first().device, sent)
        else:
            problem = call.problem(start, stop)
            grads = call.buffers_of_gradients(start, stop)
            own = scan.finished(part, self._own_fields(problem, start, stop, sent), take)
        fields = scan.exchanged(part, own, self.needed, take)
        loss, upstream = self._loss(fields, take)
        self.losses.append(loss)
        self._put(start, stop, fields)
        if problem is not None:
            state = RowState(fields["max"], fields["log_denom"], fields["nll"])
            assert part.is_own is not None, "a loss has a target"
            coefficients = scan.own_coefficients(take(part.is_own), coefficients_of(upstream, None, None))
            call.kernels.backward(problem, state, coefficients, grads)
            call.take_gradients(start, stop, grads)

    def _own_fields(self, problem: Problem, start: int, stop: int, sent: int) -> dict[str, Tensor]:
        """Of the own columns, as `scan.own_fields` gives them."""

        def scanned(wanted: int) -> dict[str, Tensor]:
            found = scan.ranked(self.part, self.chunks, problem, start, stop, wanted, self.bound)
            return named_fields(wanted, found)[0]

        def sums(of_base: bool, classes: Tensor) -> Tensor:
            matrices = [problem.base] if of_base or problem.aux is None else [problem.base, problem.aux]
            sources = [SourceTensors(m.values, scale=scan.scale_tensor(m), softcap=m.softcap) for m in matrices]
            return sums_at(sources, classes, problem.compute(), None)

        return scan.looked_at(scanned, sums, sent, problem.base.values.device.type == "cpu")

    def _loss(self, fields: dict[str, Tensor], take: scan.Rows) -> tuple[Tensor, dict[str, Tensor | None]]:
        """The chunk's loss, and its gradients with respect to the fields."""
        part, names = self.part, fields_in(self.of_loss)
        assert part.target is not None, "a loss has one"
        with torch.enable_grad():
            given = {name: fields[name].detach().requires_grad_() for name in names}
            loss = rows.loss_of(
                given,
                take(part.target),
                self.weight,
                self.ignore_index,
                part.shard.size,
                label_smoothing=self.terms.label_smoothing,
                z_loss=self.terms.z_loss,
                reduction="sum" if self.divides_last else "mean",
                normalizer=self.of_chunk,
            )
            grads = torch.autograd.grad(loss, list(given.values()))
        return loss.detach(), dict(zip(names, grads, strict=True))

    def _put(self, start: int, stop: int, fields: dict[str, Tensor]) -> None:
        wanted = [fields[name] for name in fields_in(self.wanted)]
        kinds = [[v for v in wanted if v.is_floating_point()], [v for v in wanted if not v.is_floating_point()]]
        self.chunks.put_fields(start, stop, self.fields, [torch.stack(of) for of in kinds if of])

    def outputs(self) -> list[Tensor]:
        if self.part.is_empty():
            total, made = self.total(), scan.no_gradients(self.leaves, self.needs)
            return [total, *self.fields, *[grad for grad in made if grad is not None]]
        total, fields, of_leaves = self.result()
        made = [leaf for one in of_leaves for leaf in one]
        return [total, *fields, *[g for g, need in zip(made, self.needs, strict=True) if need and g is not None]]
