"""Where logits come from: the source types shared by every operator."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter


@dataclass(frozen=True, eq=False)
class Logits:
    """Materialised logits: `scale * softcap * tanh(values / softcap)`, or `scale * values` without a softcap.

    values    [*, V] floating point, last dimension contiguous, any strides in front of it.
    scale     number, or tensor of shape () or [*] (the target's shape); gets a gradient if it requires one.
    softcap   None, or a positive number: applied to the values before the scale.
    """

    values: Tensor
    scale: float | Tensor = field(default=1.0, kw_only=True)
    softcap: float | None = field(default=None, kw_only=True)


@dataclass(frozen=True, eq=False)
class Head:
    """Logits of a linear head, `scale * softcap(hidden @ weight.T + bias)`, which are never stored whole.

    hidden    [*, D] floating point, any strides.
    weight    [V, D], any strides; hidden, weight and bias share one dtype, except under autocast.
    bias      None, or [V].
    scale     number, or tensor of shape () or [*] (the target's shape).
    softcap   None, or a positive number: applied to the logits before the scale, as in `Logits`.
    Each of hidden, weight, bias and a tensor scale gets a gradient if it requires one.

    Heads of one weight (the same tensor, or the same memory in the same strides) are added up before their product,
    which then is one, as is that of their gradients: where they have no softcap, a bias is scaled by one number without
    a gradient, and the sum is as exact as its terms. That is so for float32 and float64, for float16 on CPU, and for
    float32 hidden states under autocast; a sum of 16-bit hidden states does not fit into 16 bits, so there are two
    products. A base and an auxiliary that share a weight cost two products as well where the base counts by itself:
    `base_log_prob`, `kl_to_base` and `base_argmax` do, so `logit_stats` and return_stats=True. Who wants statistics of
    the sum alone adds the hidden states and passes one head, with aux=None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = field(default=None, kw_only=True)
    scale: float | Tensor = field(default=1.0, kw_only=True)
    softcap: float | None = field(default=None, kw_only=True)


Source = Logits | Head
SourceLike = Tensor | Source | Sequence[Tensor | Source]


class Leaves(NamedTuple):
    """One entry for each tensor of a source: the tensor, whether its gradient is wanted, or its gradient.

    values   logits [*, V], or hidden states [*, D] where there is a weight
    scale    None, or one number for each row or all; its gradient is one number for each row
    """

    values: Any
    weight: Any = None
    bias: Any = None
    scale: Any = None


class SourceTensors(NamedTuple):
    """A source as the operators take it: its leaves and its softcap (None: none)."""

    values: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    softcap: float | None = None


class Matrix(NamedTuple):
    """Logits scale * softcap(values) as row kernels take them; `values` [*, >= V], `scale` a number, () or [*]."""

    values: Tensor
    scale: float | Tensor | None = None
    softcap: float | None = None


# how the gradient of a leaf lies: a row for each row of the target, one tensor for all rows, a number for each row
ROWS, SHARED, NUMBERS = "rows", "shared", "numbers"
LAYOUTS = Leaves(ROWS, SHARED, SHARED, NUMBERS)


def leaves_of(source: Source, scale: float | Tensor | None) -> Leaves:
    """The source's tensors, with its scale in another form."""
    if isinstance(source, Head):
        return Leaves(source.hidden, source.weight, source.bias, scale)
    return Leaves(source.values, None, None, scale)


def by_source(flat: Sequence[Any]) -> list[Leaves]:
    """What an operator takes or gives for all leaves of its sources, four entries each, as one `Leaves` a source."""
    size = len(Leaves._fields)
    return [Leaves(*flat[i : i + size]) for i in range(0, len(flat), size)]


def as_sources(name: str, given: SourceLike) -> list[Source]:
    """The sources meant by one argument: a tensor, a `Logits`, a `Head`, or a sequence of these (their sum)."""
    if isinstance(given, Tensor):
        return [Logits(given)]
    if isinstance(given, (Logits, Head)):
        return [_with_plain_numbers(given)]
    if isinstance(given, (list, tuple)):
        if not given:
            raise ValueError(f"{name} must hold at least one source, got an empty {type(given).__name__}")
        return [source for item in given for source in as_sources(name, item)]
    raise TypeError(f"{name} must be a tensor, Logits, Head or a sequence of these, got {type(given).__name__}")


def has_dtensor(*given: Any) -> bool:
    """Whether a DTensor is among tensors and sources, without importing what that is."""
    for one in given:
        if one is None or type(one) is Tensor or type(one) is Parameter:
            continue
        if isinstance(one, Logits):
            found = has_dtensor(one.values, one.scale)
        elif isinstance(one, Head):
            found = has_dtensor(one.hidden, one.weight, one.bias, one.scale)
        elif isinstance(one, (list, tuple)):
            found = has_dtensor(*one)
        else:
            found = isinstance(one, Tensor) and type(one).__name__ == "DTensor"
        if found:
            return True
    return False


def _with_plain_numbers(source: Source) -> Source:
    """The source with numbers of other types (int, NumPy's, fractions) as floats; what is no number as it is."""
    scale, softcap = source.scale, source.softcap
    if (type(scale) is float or isinstance(scale, Tensor)) and (softcap is None or type(softcap) is float):
        return source
    scale, softcap = _plain(scale), _plain(softcap)
    if isinstance(source, Logits):
        return Logits(source.values, scale=scale, softcap=softcap)
    return Head(source.hidden, source.weight, bias=source.bias, scale=scale, softcap=softcap)


def _plain(value: Any) -> Any:
    if type(value) is float or isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    try:
        return float(value)
    except OverflowError:  # for the checks to refuse
        return value


def row_scale(scale: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """A scale that multiplies [*, V]: a number or 0-d tensor as it is, a per-row tensor with one more dimension."""
    if not isinstance(scale, Tensor):
        return scale
    return scale.to(dtype) if scale.dim() == 0 else scale.to(dtype).unsqueeze(-1)
