"""The operators of cross-entropy as PyTorch sees them: schemas, fakes, and who serves a call.

The one place where arguments have positions. Sources come flat: `leaves` holds four entries each, `softcaps` one (0:
none), the first `num_base` are the base. Gradients come back for the leaves that `needs` names, in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, dispatch
from ..sources import LAYOUTS, NUMBERS, Leaves, Matrix, SourceTensors, by_source
from . import chunked
from .request import (
    OF_TARGET,
    BadTarget,
    Coefficients,
    Gradients,
    Kernels,
    LossTerms,
    Problem,
    Request,
    RowState,
    check_coefficients,
    check_wanted,
    compute_dtype,
    empty_gradients,
    empty_rows,
    raise_out_of_range,
)

_SOURCES = (
    "Tensor?[] leaves, float[] softcaps, int num_base, ScalarType? autocast, Tensor? target, Tensor? weight, "
    "int ignore_index, SymInt vocab_size"
)
_library = torch.library.Library("auxkernels", "DEF")
_library.define(f"cross_entropy_scan({_SOURCES}, int wanted, str backend) -> Tensor[]")
_library.define(
    f"cross_entropy_loss({_SOURCES}, Tensor? normalizer, float label_smoothing, float z_loss, bool mean, "
    "int wanted, bool[] needs, str backend) -> Tensor[]"
)
_library.define(
    f"cross_entropy_backward({_SOURCES}, Tensor max, Tensor log_denom, Tensor? nll, Tensor? base_max, "
    "Tensor? base_log_denom, Tensor?[] coefficients, bool[] needs, str backend) -> Tensor[]"
)
_library.define(
    "cross_entropy_rescale_(Tensor(a!) grad, Tensor factor, Tensor? target, int ignore_index, str backend) -> ()"
)
_library.define("check_target(Tensor target, SymInt vocab_size, int ignore_index) -> Tensor")

scan_op = torch.ops.auxkernels.cross_entropy_scan.default
loss_op = torch.ops.auxkernels.cross_entropy_loss.default
backward_op = torch.ops.auxkernels.cross_entropy_backward.default
rescale_ = torch.ops.auxkernels.cross_entropy_rescale_.default
check_target = torch.ops.auxkernels.check_target.default


class Options(NamedTuple):
    """What of a call is no tensor."""

    softcaps: tuple[float, ...]
    num_base: int
    autocast: torch.dtype | None
    ignore_index: int
    vocab_size: int
    backend: str
    is_of_matrices: bool  # see Request.is_of_matrices


class Call(NamedTuple):
    """Checked arguments that all operators take. Scales may be numbers until a dispatcher has to see them."""

    leaves: tuple[Any, ...]  # four of each source, as in `Leaves`
    target: Tensor | None
    weight: Tensor | None
    options: Options

    def is_plain(self) -> bool:
        """Whether what serves the operators may be called without the dispatcher."""
        return dispatch.are_plain((*self.leaves, self.target, self.weight))

    def is_direct(self) -> bool:
        """Whether the row kernels are called without the dispatcher, which takes a fifth of a small call."""
        options = self.options
        return options.is_of_matrices and dispatch.is_direct((*self.leaves, self.target, self.weight), options.backend)

    def kernels(self) -> Kernels:
        return dispatch.implementation("cross_entropy", self.options.backend, self.leaves[0].is_cuda)

    def problem(self) -> Problem:
        """For the row kernels, of a call that is of matrices."""
        leaves, options = self.leaves, self.options
        base = Matrix(leaves[0], leaves[3], options.softcaps[0] or None)
        aux = Matrix(leaves[4], leaves[7], options.softcaps[1] or None) if len(leaves) > 4 else None
        return Problem(base, aux, self.target, self.weight, options.ignore_index, options.vocab_size)

    def flat(self) -> tuple[Any, ...]:
        """As the schemas have it."""
        options = self.options
        return (
            *(list(tensors_of(self.leaves)), list(options.softcaps), options.num_base, options.autocast),
            *(self.target, self.weight, options.ignore_index, options.vocab_size),
        )


def tensors_of(leaves: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """The leaves, those that are numbers as 0-d tensors of the compute dtype."""
    if all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves):
        return leaves
    compute, device = compute_dtype(*(one.values for one in by_source(leaves))), leaves[0].device
    return tuple(dispatch.number_tensor(leaf, compute, device) for leaf in leaves)


def request_of(call: Call) -> Request:
    """A call as implementations take it, checked."""
    return _request(*call.flat())


def request_without_columns(call: Call) -> Request:
    """Of a call whose sources have none: what its rows are, not to be computed."""
    sources = [SourceTensors(*one) for one in by_source(tensors_of(call.leaves))]
    options = call.options
    classes = call.target, call.weight, options.ignore_index, options.vocab_size
    return Request(sources, options.num_base, options.autocast, *classes)


def scan(call: Call, wanted: int) -> list[Tensor]:
    """The wanted fields, stacked."""
    if call.is_direct():
        return call.kernels().scan(call.problem(), wanted)
    return scan_op(*call.flat(), wanted, call.options.backend)


def loss(
    call: Call, normalizer: float | Tensor | None, terms: LossTerms, wanted: int, needs: tuple[bool, ...]
) -> list[Tensor]:
    """[loss, the wanted fields, the gradients of the leaves that `needs` names (empty: of none)]."""
    if call.is_direct():
        return _loss_of_matrices(call.kernels(), call.problem(), normalizer, terms, wanted, needs)
    normalizer = dispatch.number_tensor(normalizer, torch.float64, call.leaves[0].device)
    of_leaves = list(needs) or [False] * len(call.leaves)
    return loss_op(*call.flat(), normalizer, *terms, wanted, of_leaves, call.options.backend)


def backward(call: Call, state: RowState, coefficients: Coefficients, needs: tuple[bool, ...]) -> list[Tensor]:
    """The gradients of the leaves that `needs` names."""
    return backward_op(*call.flat(), *state, list(coefficients), list(needs), call.options.backend)


# -- several losses of one base, all of plain tensors ------------------------------------------------------------------


class LossOf(NamedTuple):
    """One of several losses: what `loss` takes."""

    call: Call
    normalizer: float | Tensor | None
    terms: LossTerms
    needs: tuple[bool, ...]


def losses(given: list[LossOf], wanted: int) -> list[list[Tensor]]:
    """What `loss` gives for each. Their bases and backends are the same, bases have no gradient. Raises BadTarget."""
    made: dict[int, list[Tensor]] = {}
    in_chunks: list[int] = []
    of_matrices: dict[torch.dtype, list[int]] = {}  # in one pass of one compute dtype
    for i, (call, normalizer, terms, needs) in enumerate(given):
        if not call.options.is_of_matrices:
            in_chunks.append(i)
        elif hasattr(call.kernels(), "losses"):
            of_matrices.setdefault(call.problem().compute(), []).append(i)
        else:
            made[i] = loss(call, normalizer, terms, wanted, needs)
    groups = [(group, _losses_of_matrices) for group in of_matrices.values()]
    for group, function in [*groups, (in_chunks, _losses_in_chunks)]:
        try:
            made.update(zip(group, function([given[i] for i in group], wanted), strict=True))
        except BadTarget as error:
            raise BadTarget(group[error.number], error) from None
    return [made[i] for i in range(len(given))]


def _losses_of_matrices(given: list[LossOf], wanted: int) -> list[list[Tensor]]:
    kernels, problems = given[0].call.kernels(), [one.call.problem() for one in given]
    grads = [
        empty_gradients(problem, by_source(one.needs)) if one.needs else Gradients()
        for problem, one in zip(problems, given, strict=True)
    ]
    normalizers, terms = [one.normalizer for one in given], [one.terms for one in given]
    found = kernels.losses(problems, normalizers, terms, wanted, grads)  # type: ignore[attr-defined]
    return [[value, *fields, *_in_order(of_one)] for (value, fields), of_one in zip(found, grads, strict=True)]


def _losses_in_chunks(given: list[LossOf], wanted: int) -> list[list[Tensor]]:
    if not given:
        return []
    device, backend = given[0].call.leaves[0].device, given[0].call.options.backend
    needs = [list(one.needs) or [False] * len(one.call.leaves) for one in given]
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        requests = [_request(*one.call.flat(), needs=n) for one, n in zip(given, needs, strict=True)]
        for i, request in enumerate(requests):
            assert request.target is not None, "a loss has one"
            try:
                raise_out_of_range(request.target, request.vocab_size, request.ignore_index)
            except IndexError as error:
                raise BadTarget(i, error) from None
        calls = []
        for one, request, n in zip(given, requests, needs, strict=True):
            normalizer = dispatch.number_tensor(one.normalizer, torch.float64, device)
            calls.append(chunked.LossCall(request, normalizer, one.terms, wanted, by_source(n), backend))
        found = chunked.losses(calls)
    return [[total, *fields, *_picked(grads, n)] for (total, fields, grads), n in zip(found, needs, strict=True)]


# -- one matrix each: the row kernels alone ----------------------------------------------------------------------------


def _loss_of_matrices(
    kernels: Kernels,
    problem: Problem,
    normalizer: float | Tensor | None,
    terms: LossTerms,
    wanted: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    grads = empty_gradients(problem, by_source(needs)) if needs else Gradients()
    value, fields = kernels.loss(problem, normalizer, terms, wanted, grads)
    return [value, *fields, *_in_order(grads)]


def _in_order(grads: Gradients) -> list[Tensor]:
    leaves = (grads.base, grads.base_scale, grads.aux, grads.aux_scale)
    return [grad for grad in leaves if grad is not None]


# -- implementations: anyone may call an operator, so that all is checked ----------------------------------------------


def _request(
    leaves: Sequence[Tensor | None],
    softcaps: Sequence[float],
    num_base: int,
    autocast: torch.dtype | None,
    target: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    vocab_size: int,
    *,
    needs: Sequence[bool] | None = None,
) -> Request:
    checks.flat_sources(leaves, softcaps, num_base, autocast, needs)
    sources = [SourceTensors(*one, cap or None) for one, cap in zip(by_source(leaves), softcaps, strict=True)]
    request = Request(sources, num_base, autocast, target, weight, ignore_index, vocab_size)
    checks.cross_entropy_request(request)
    return request


def _run(
    request: Request,
    backend: str,
    of_matrices: Callable[[Kernels, Problem], list[Tensor]],
    in_chunks: Callable[[], list[Tensor]],
) -> list[Tensor]:
    """One of the two, out of autograd's and autocast's sight."""
    device = request.first().device
    kernels: Kernels = dispatch.implementation("cross_entropy", backend, device.type == "cuda")
    if backend == "native" and device.type not in ("cpu", "cuda"):
        raise RuntimeError(f"the sources must be CPU or CUDA tensors for backend='native', got {device}")
    if request.is_of_matrices():
        return of_matrices(kernels, request.problem())
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        if request.target is not None:  # all of it, before a chunk's is used
            raise_out_of_range(request.target, request.vocab_size, request.ignore_index)
        return in_chunks()


def _picked(leaves: list[Leaves], needs: list[bool]) -> list[Tensor]:
    flat = [leaf for one in leaves for leaf in one]
    return [leaf for leaf, need in zip(flat, needs, strict=True) if need]


def _scan(*args: Any) -> list[Tensor]:
    *sources, wanted, backend = args
    request = _request(*sources)
    check_wanted(wanted, request.target)

    def of_matrices(kernels: Kernels, problem: Problem) -> list[Tensor]:
        return kernels.scan(problem, wanted)

    return _run(request, backend, of_matrices, lambda: chunked.scan(request, wanted, backend))


def _loss(*args: Any) -> list[Tensor]:
    *sources, normalizer, label_smoothing, z_loss, mean, wanted, needs, backend = args
    request, terms = _request(*sources, needs=needs), LossTerms(label_smoothing, z_loss, mean)
    check_wanted(wanted | OF_TARGET, request.target)

    def of_matrices(kernels: Kernels, problem: Problem) -> list[Tensor]:
        return _loss_of_matrices(kernels, problem, normalizer, terms, wanted, needs)

    def in_chunks() -> list[Tensor]:
        total, fields, grads = chunked.loss(request, normalizer, terms, wanted, by_source(needs), backend)
        return [total, *fields, *_picked(grads, needs)]

    return _run(request, backend, of_matrices, in_chunks)


def _backward(*args: Any) -> list[Tensor]:
    *sources, max, log_denom, nll, base_max, base_log_denom, coefficients, needs, backend = args
    request, state = _request(*sources, needs=needs), RowState(max, log_denom, nll, base_max, base_log_denom)
    coefficients = check_coefficients(coefficients, state, request)

    def of_matrices(kernels: Kernels, problem: Problem) -> list[Tensor]:
        grads = empty_gradients(problem, by_source(needs))
        kernels.backward(problem, state, coefficients, grads)
        return _in_order(grads)

    def in_chunks() -> list[Tensor]:
        return _picked(chunked.backward(request, state, coefficients, by_source(needs), backend), needs)

    return _run(request, backend, of_matrices, in_chunks)


def _rescale_(grad: Tensor, factor: Tensor, target: Tensor | None, ignore_index: int, backend: str) -> None:
    checks.rescaled(grad, factor, target)
    kernels: Kernels = dispatch.implementation("cross_entropy", backend, grad.is_cuda)
    kernels.rescale_(grad, factor, target, ignore_index)


def _check_target(target: Tensor, vocab_size: int, ignore_index: int) -> Tensor:
    raise_out_of_range(target, vocab_size, ignore_index)
    return target.clone()


# -- fakes -------------------------------------------------------------------------------------------------------------


def _scan_fake(*args: Any) -> list[Tensor]:
    *sources, wanted, _ = args
    request = _request(*sources)
    return empty_rows(request.first(), request.shape(), request.compute(), wanted)


def _loss_fake(*args: Any) -> list[Tensor]:
    *sources, _, _, _, _, wanted, needs, _ = args
    request = _request(*sources)
    total = request.first().new_empty((), dtype=request.compute())
    fields = empty_rows(request.first(), request.shape(), request.compute(), wanted)
    return [total, *fields, *_empty_leaves(request, needs, keeps_wide=True)]


def _backward_fake(*args: Any) -> list[Tensor]:
    *sources, _, _, _, _, _, _, needs, _ = args
    return _empty_leaves(_request(*sources), needs, keeps_wide=False)


def _empty_leaves(request: Request, needs: list[bool], keeps_wide: bool) -> list[Tensor]:
    """Room for the gradients. keeps_wide: those of float16 heads are float32, to be scaled before they are rounded."""
    found: list[Any] = []
    for source in request.sources:
        is_wide = keeps_wide and source.weight is not None
        leaves: tuple[Any, ...] = source[: len(LAYOUTS)]
        for layout, leaf in zip(LAYOUTS, leaves, strict=True):
            if leaf is None:
                found.append(None)
            elif layout == NUMBERS:
                found.append(leaf.new_empty(request.shape(), dtype=request.compute()))
            else:
                wide = torch.float32 if is_wide and leaf.dtype == torch.float16 else leaf.dtype
                found.append(leaf.new_empty(leaf.shape, dtype=wide))
    return [leaf for leaf, need in zip(found, needs, strict=True) if need]


for _name, _kernel, _fake in (
    ("cross_entropy_scan", _scan, _scan_fake),
    ("cross_entropy_loss", _loss, _loss_fake),
    ("cross_entropy_backward", _backward, _backward_fake),
    ("cross_entropy_rescale_", _rescale_, lambda *args: None),
    ("check_target", _check_target, lambda target, vocab_size, ignore_index: torch.empty_like(target)),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"auxkernels::{_name}", _fake, lib=_library)
