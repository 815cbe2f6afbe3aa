"""The operator of sampling as PyTorch sees it: schema, fake, and who serves a call.

The one place where arguments have positions. Sources come flat, as in cross_entropy/ops.py; numbers are 0-d tensors, so
that torch.compile does not compile again for every value.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, dispatch
from ..sources import SourceTensors, by_source
from . import chunked
from .request import INTEGERS, Parameters, Request, check, check_values, empty_fields

_library = torch.library.Library("auxkernels", "FRAGMENT")
_library.define(
    "sample_logits(Tensor?[] leaves, float[] softcaps, int num_base, ScalarType? autocast, SymInt vocab_size, "
    "Tensor temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p, Tensor? plausibility, Tensor seed, "
    "Tensor? position, str order, bool wants_stats, str backend) -> Tensor[]"
)
sample_op = torch.ops.auxkernels.sample_logits.default


class Call(NamedTuple):
    """A checked call. Parameters and scales may be numbers until a dispatcher has to see them."""

    request: Request
    backend: str

    def tensors(self) -> list[Any]:
        sources = self.request.sources
        found = [leaf for one in sources for leaf in (one.values, one.weight, one.bias, one.scale)]
        return [*found, *self.request.parameters]

    def is_direct(self) -> bool:
        return dispatch.is_direct(self.tensors(), self.backend)

    def flat(self) -> tuple[Any, ...]:
        """As the schema has it."""
        request = self.request
        device, compute = request.first().device, request.compute()
        leaves: list[Tensor | None] = []
        for one in request.sources:
            leaves += [one.values, one.weight, one.bias, dispatch.number_tensor(one.scale, compute, device)]
        softcaps = [float(one.softcap or 0.0) for one in request.sources]
        parameters = [
            dispatch.number_tensor(value, torch.int64 if name in INTEGERS else torch.float64, device)
            for name, value in request.parameters._asdict().items()
        ]
        sources = (leaves, softcaps, request.num_base, request.autocast, request.vocab_size)
        return (*sources, *parameters, request.order, request.wants_stats, self.backend)


def sample(call: Call) -> list[Tensor]:
    """[the tokens], and where wanted the fields of `SampleStats`."""
    if call.is_direct():
        check_values(call.request.parameters)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return chunked.sample(call.request, call.backend)
    with torch.no_grad():
        return sample_op(*call.flat())


# -- implementations: anyone may call an operator, so that all is checked ----------------------------------------------


def _request(*args: Any) -> Request:
    leaves, softcaps, num_base, autocast, vocab_size, *parameters, order, wants_stats = args
    checks.flat_sources(leaves, softcaps, num_base, autocast, None)
    sources = [SourceTensors(*one, cap or None) for one, cap in zip(by_source(leaves), softcaps, strict=True)]
    request = Request(sources, num_base, autocast, vocab_size, Parameters(*parameters), order, wants_stats)
    check(request)
    return request


def _sample(*args: Any) -> list[Tensor]:
    *leading, backend = args
    request = _request(*leading)
    device = request.first().device
    if backend == "native" and device.type != "cpu":
        raise RuntimeError(f"the sources must be on CPU for backend='native', got {device}")
    check_values(request.parameters)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        return chunked.sample(request, backend)


def _sample_fake(*args: Any) -> list[Tensor]:
    return empty_fields(_request(*args[:-1]))


_library.impl("sample_logits", _sample, "CompositeExplicitAutograd")
torch.library.register_fake("auxkernels::sample_logits", _sample_fake, lib=_library)
