"""The operators of soft_embedding as PyTorch sees them: schemas, fakes, and who serves a call.

The one place where arguments have positions. Scores come flat, as in cross_entropy/ops.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, dispatch
from ..sources import SourceTensors, by_source
from . import chunked
from .request import OUTPUTS, Request, State, Upstream

_LEADING = (
    "Tensor?[] leaves, float[] softcaps, ScalarType? autocast, Tensor table, Tensor? temperature, Tensor? gumbel, "
    "Tensor? seed, Tensor? mask, int top_k, bool hard"
)
_library = torch.library.Library("auxkernels", "FRAGMENT")
_library.define(f"soft_embedding({_LEADING}, int wanted, str backend) -> Tensor[]")
_library.define(
    f"soft_embedding_backward({_LEADING}, Tensor max, Tensor log_denom, Tensor argmax, Tensor? labels, Tensor? grad, "
    "Tensor?[] upstream, bool[] needs, str backend) -> Tensor[]"
)
forward_op = torch.ops.auxkernels.soft_embedding.default
backward_op = torch.ops.auxkernels.soft_embedding_backward.default


class Options(NamedTuple):
    """What of a call is no tensor."""

    softcaps: tuple[float, ...]
    autocast: torch.dtype | None
    top_k: int
    hard: bool
    backend: str


class Call(NamedTuple):
    """Checked arguments that both operators take."""

    leaves: tuple[Tensor | None, ...]
    temperature: Tensor | None
    table: Tensor
    gumbel: Tensor | None
    seed: Tensor | None
    mask: Tensor | None
    options: Options

    def differentiable(self) -> tuple[Tensor | None, ...]:
        """In the order of `needs`."""
        return (*self.leaves, self.temperature, self.table)

    def request(self) -> Request:
        softcaps, autocast, top_k, hard, _ = self.options
        sources = [SourceTensors(*one, cap or None) for one, cap in zip(by_source(self.leaves), softcaps, strict=True)]
        noise = self.gumbel, self.seed
        return Request(sources, autocast, self.table, self.temperature, *noise, self.mask, top_k, hard)

    def flat(self) -> tuple[Any, ...]:
        """As the schemas have it."""
        softcaps, autocast, top_k, hard, _ = self.options
        scores = list(self.leaves), list(softcaps), autocast
        return (*scores, self.table, self.temperature, self.gumbel, self.seed, self.mask, top_k, hard)

    def is_direct(self, *more: Tensor | None) -> bool:
        """Whether no dispatcher has to see the call, nor autograd or autocast."""
        tensors = (*self.differentiable(), self.gumbel, self.seed, self.mask, *more)
        if torch.is_autocast_enabled("cpu"):
            return False
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            return False
        return dispatch.is_direct(tensors, self.options.backend)


def forward(call: Call, wanted: int) -> list[Tensor]:
    """[mixture, the wanted outputs]."""
    if call.is_direct():
        return chunked.forward(call.request(), wanted, call.options.backend)
    return forward_op(*call.flat(), wanted, call.options.backend)


def backward(call: Call, state: State, grad: Tensor | None, upstream: Upstream, needs: list[bool]) -> list[Tensor]:
    """The gradients of what `needs` names of `differentiable`; scales' and the temperature's for each row."""
    if call.is_direct(*state, grad, *upstream):
        return _gradients(call.request(), state, grad, upstream, needs, call.options.backend)
    return backward_op(*call.flat(), *state, grad, list(upstream), needs, call.options.backend)


def _gradients(
    request: Request, state: State, grad: Tensor | None, upstream: Upstream, needs: list[bool], backend: str
) -> list[Tensor]:
    *of_leaves, needs_temperature, needs_table = needs
    more = needs_temperature, needs_table, backend
    sources, *rest = chunked.backward(request, state, grad, upstream, by_source(of_leaves), *more)
    made = [*(leaf for one in sources for leaf in one), *rest]
    return [found for found, need in zip(made, needs, strict=True) if need]


# -- implementations: anyone may call an operator, so that all is checked ----------------------------------------------


def _request(
    leaves: Sequence[Tensor | None],
    softcaps: Sequence[float],
    autocast: torch.dtype | None,
    table: Tensor,
    temperature: Tensor | None,
    gumbel: Tensor | None,
    seed: Tensor | None,
    mask: Tensor | None,
    top_k: int,
    hard: bool,
) -> Request:
    checks.flat_sources(leaves, softcaps, 1, autocast, None)
    sources = [SourceTensors(*one, cap or None) for one, cap in zip(by_source(leaves), softcaps, strict=True)]
    request = Request(sources, autocast, table, temperature, gumbel, seed, mask, top_k, hard)
    checks.lookup(request)
    return request


def _on_its_device(request: Request, backend: str) -> torch.autocast:
    """Out of autograd's and autocast's sight."""
    device = request.first().device
    if backend == "native" and device.type != "cpu":
        raise RuntimeError(f"the scores must be on CPU for backend='native', got {device}")
    return torch.autocast(device.type, enabled=False)


def _forward(*args: Any) -> list[Tensor]:
    *leading, wanted, backend = args
    request = _request(*leading)
    if wanted < 0 or wanted >> len(OUTPUTS):
        raise ValueError(f"wanted must be a mask of the outputs, got {wanted}")
    with torch.no_grad(), _on_its_device(request, backend):
        return chunked.forward(request, wanted, backend)


def _backward(*args: Any) -> list[Tensor]:
    *leading, max, log_denom, argmax, labels, grad, upstream, needs, backend = args
    request, state = _request(*leading), State(max, log_denom, argmax, labels)
    checks.lookup_gradients(request, state, grad, upstream, needs)
    with torch.no_grad(), _on_its_device(request, backend):
        return _gradients(request, state, grad, Upstream(*upstream), needs, backend)


def _forward_fake(*args: Any) -> list[Tensor]:
    *leading, wanted, _ = args
    request = _request(*leading)
    mixture = request.first().new_empty(request.out_shape(), dtype=request.out_dtype())
    return [mixture, *chunked.empty_outputs(request, wanted).values()]


def _backward_fake(*args: Any) -> list[Tensor]:
    *leading, _, _, _, _, _, _, needs, _ = args
    request = _request(*leading)
    row = request.first().new_empty((), dtype=request.compute()).expand(request.shape())
    likes: list[Any] = []
    for source in request.sources:
        likes += [source.values, source.weight, source.bias, None if source.scale is None else row]
    likes += [row, request.table]
    return [like.new_empty(like.shape) for like, need in zip(likes, needs, strict=True) if need]


for _name, _kernel, _fake in (
    ("soft_embedding", _forward, _forward_fake),
    ("soft_embedding_backward", _backward, _backward_fake),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"auxkernels::{_name}", _fake, lib=_library)
