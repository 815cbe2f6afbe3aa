"""The reduced loss of small plain matrices on CPU, as the native implementation has it whole.

A small call is nothing but Python: here it takes half of the general path (ops.py with native.py), which every other
call takes. The kernel is the same, and so are the bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import dispatch
from ..dispatch import is_plain_on_cpu
from ..native import DTYPE_CODES
from ..sources import Logits
from . import native as kernels
from .request import empty_rows

# logits of a source. Beyond them a call is bound by its work, and the pages of its outputs matter
SMALL = 1 << 16
_F32 = torch.float32
_CODES = {dtype: code for dtype, code in DTYPE_CODES.items() if dtype != torch.float64}
_MIN_SOFTCAP, _MAX_SOFTCAP = 2.0**-126, 2.0**126
_NO_SOURCE = (0, 0, 0, 0, False, 1.0, 0.0)


class PlainLoss(NamedTuple):
    """A call that `served` accepts."""

    base: Tensor
    aux: Tensor | None
    target: Tensor
    ignore_index: int
    alive: tuple[Any, ...]  # what the addresses among the arguments are of
    of_rows: tuple[Any, ...]  # arguments of the compiled function, before its outputs
    terms: tuple[Any, ...]  # and after
    needs: tuple[bool, bool]  # of base and aux


def served(
    base: object,
    aux: object,
    target: object,
    ignore_index: Any,
    weight: object,
    label_smoothing: Any,
    z_loss: Any,
    reduction: object,
    normalizer: Any,
    vocab_size: Any,
    recompute: object,
    backend: object,
) -> PlainLoss | None:
    """The call, if the arguments are such a one's, and valid: of what is not, the general path says the error.

    They are those of `aux_cross_entropy`.
    """
    if not dispatch.is_eager_without_compiler() or (backend != "auto" and backend != "native"):
        return None
    if dispatch.native_missing() is not None:
        return None
    # another may stand in its place: the CUDA module, emulated for tests
    if dispatch.implementation("cross_entropy", "native") is not kernels:
        return None
    if forward_ad._current_level >= 0 or not is_plain_on_cpu(target):
        return None
    if type(ignore_index) is not int or not -(2**63) <= ignore_index < 2**63:
        return None
    shape, target_dtype, target_at = target.shape, target.dtype, target.data_ptr()
    of_base, of_aux = _source_of(base, shape), None if aux is None else _source_of(aux, shape)
    if of_base is None or (of_aux is None and aux is not None) or not target_at:
        return None
    width, aux_width = of_base[1][2], of_base[1][2] if of_aux is None else of_aux[1][2]
    if vocab_size is None:
        vocab_size = width
        if aux_width != width:
            return None
    elif type(vocab_size) is not int or not 0 < vocab_size <= min(width, aux_width):
        return None
    weight_at = 0
    if weight is not None:
        if (
            not is_plain_on_cpu(weight)
            or weight.dtype is not _F32
            or weight.shape != (vocab_size,)
            or weight.requires_grad
        ):
            return None
        weight_at = weight.data_ptr()
    terms = _terms_of(label_smoothing, z_loss, reduction, normalizer)
    needs = _needs_of(of_base[0], None if of_aux is None else of_aux[0], recompute)
    is_int32 = target_dtype is torch.int32
    if terms is None or needs is None or not (is_int32 or target_dtype is torch.int64):
        return None
    classes = (target.numel(), vocab_size, target_at, is_int32, ignore_index, weight_at, torch.get_num_threads())
    of_rows = (*classes, *of_base[1], *(_NO_SOURCE if of_aux is None else of_aux[1]))
    matrices = of_base[0], None if of_aux is None else of_aux[0]
    return PlainLoss(*matrices, target, ignore_index, (base, aux, weight), of_rows, terms, needs)


def _source_of(source: object, shape: torch.Size) -> tuple[Tensor, tuple[Any, ...]] | None:
    """The matrix, and the arguments that the compiled function takes of a source."""
    scale_at, scale_is_per_row, number, softcap = 0, False, 1.0, None
    values = source
    if type(source) is Logits:
        values, scale, softcap = source.values, source.scale, source.softcap
        if type(scale) is float:
            number = scale
        elif not is_plain_on_cpu(scale) or scale.dtype is not _F32 or scale.requires_grad:
            return None
        else:
            scale_at, scale_is_per_row = scale.data_ptr(), scale.dim() > 0
            if not scale_at or (scale_is_per_row and scale.shape != shape):
                return None
        if softcap is not None and not (type(softcap) is float and _MIN_SOFTCAP <= softcap <= _MAX_SOFTCAP):
            return None
    if not is_plain_on_cpu(values):
        return None
    code, full, at = _CODES.get(values.dtype), values.shape, values.data_ptr()
    if code is None or not at or not full or full[:-1] != shape or values.numel() > SMALL:
        return None
    return values, (at, code, full[-1], scale_at, scale_is_per_row, number, softcap or 0.0)


def _terms_of(label_smoothing: Any, z_loss: Any, reduction: object, normalizer: Any) -> tuple[Any, ...] | None:
    """What a reduced loss is made of, as the compiled function takes it."""
    if type(label_smoothing) is not float or not 0.0 <= label_smoothing <= 1.0:
        return None
    if type(z_loss) is not float or not z_loss >= 0.0:
        return None
    if normalizer is None:
        return (False, 1.0, label_smoothing, z_loss, reduction == "mean") if reduction in ("mean", "sum") else None
    if reduction != "mean" or type(normalizer) not in (float, int) or not -1e300 < normalizer < 1e300:
        return None
    return True, float(normalizer), label_smoothing, z_loss, True


_NO_NEEDS = False, False


def _needs_of(base: Tensor, aux: Tensor | None, recompute: object) -> tuple[bool, bool] | None:
    """Whose gradients are made with the loss; None where they have to be made in backward."""
    if not torch.is_grad_enabled():
        return _NO_NEEDS
    of_base, of_aux = base.requires_grad, aux is not None and aux.requires_grad
    if not (of_base or of_aux):
        return _NO_NEEDS
    has_half = (of_base and base.dtype is torch.float16) or (aux is not None and of_aux and aux.dtype is torch.float16)
    return None if recompute or has_half else (of_base, of_aux)


def loss(call: PlainLoss, wanted: int) -> list[Tensor]:
    """[loss, the wanted fields, the gradients], as `ops.loss` gives them. Raises IndexError without a message."""
    base, aux = call.base, call.aux
    value = base.new_empty((), dtype=_F32)
    made = [value]
    floats = ints = of_base = of_aux = 0
    if wanted:
        fields = empty_rows(base, call.target.shape, _F32, wanted)
        floats, ints = (field.data_ptr() for field in fields)
        made += fields
    if call.needs[0]:
        made.append(torch.empty_like(base))
        of_base = made[-1].data_ptr()
    if call.needs[1] and aux is not None:
        made.append(torch.empty_like(aux))
        of_aux = made[-1].data_ptr()
    kernels.cpu().small_loss(*call.of_rows, wanted, floats, ints, of_base, of_aux, value.data_ptr(), *call.terms)
    return made
