"""The row kernels of cross-entropy in Triton, see request.Kernels: from checked arguments to launches."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...layout import as_rows
from ...sources import Matrix
from ...tritonlib import launch
from ..request import (
    Coefficients,
    Gradients,
    LossTerms,
    Problem,
    RowState,
    empty_fields,
    mask_of,
    with_sources_of_derived,
)
from .columns import Coefficients as KernelCoefficients
from .columns import Gradients as KernelGradients
from .columns import Softmax, Source
from .kernels import (
    BY_KEPT_ROWS,
    BY_NORMALIZER,
    BY_ONE,
    BY_PARTS,
    cross_entropy_bwd_kernel,
    cross_entropy_fwd_kernel,
    cross_entropy_parts_kernel,
    cross_entropy_reduce_kernel,
    cross_entropy_rescale_kernel,
    cross_entropy_segment_kernel,
)
from .row_state import NUM_FLOATS, NUM_INTS

REDUCE_BLOCK = 1024
FEW_ROWS = 2048  # up to here one program sums the losses and every row's counts the kept rows, which saves launches
COUNT_BLOCK = 256
RESCALE_BLOCK = 2048
RESCALE_PROGRAMS = 8  # for each multiprocessor, as many as one of sm_90 holds at a time
_PLAIN_FIELDS = mask_of("max", "log_denom", "nll", "lse", "log_prob")
_NO_GRADIENTS = Gradients()


# -- policy ------------------------------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """How the columns of a row are cut.

    The bits of a result depend on these numbers: they follow from V, dtypes and options, never from the number of rows.
    """

    lanes: int  # each with its own running maximum; a thread has one
    width: int  # columns of a lane in a tile
    segment: int  # columns whose sums are formed together


def cut_of(vocab_size: int, num_bytes: int, is_scaled: bool, device: launch.Device) -> Cut:
    """The cut of rows of `vocab_size` logits of up to `num_bytes` bytes; `is_scaled`: with scales or softcaps.

    A lane's columns in a tile are one 128-bit load; fewer on AMD, whose scalar registers hold a mask for each column.
    Wide rows get many threads, so that few rows are in flight on a multiprocessor and the second read finds them in L2;
    a segment is then long enough for the reduction over its lanes, where all warps wait, to cost a few percent.
    Reasoned, not measured.
    """
    lanes, segment = 512, 32768
    if vocab_size <= 1024:
        lanes, segment = 32, 1024
    elif vocab_size <= 8192:
        lanes, segment = 128, 8192
    elif vocab_size <= 32768:
        lanes = 256
    width = 16 // num_bytes
    if device.backend == "hip":
        width = 2 if is_scaled else 4
    return Cut(lanes, width, segment)


def tiles_at_once(is_plain: bool, even: bool, device: launch.Device) -> int:
    """How many tiles are loaded before the first is used; no bit depends on it.

    64 bytes of each source in flight for every thread hide the memory's latency. Statistics, softcaps and scale
    gradients need the registers, and have arithmetic to hide it; 16-bit logits that come one by one take one each.
    """
    if not is_plain:
        return 1
    return 4 if even and device.backend != "hip" else 2


def options_of(cut: Cut, has_softcaps: bool, device: launch.Device) -> dict[str, int]:
    """Launch options: warps, and on NVIDIA how many registers a thread may have."""
    num_warps = max(cut.lanes // device.warp_size, 1)
    if device.backend != "cuda":
        return {"num_warps": num_warps}
    # left to itself ptxas spills a register or two for one more resident block
    return {"num_warps": num_warps, "maxnreg": min(65536 // (32 * num_warps), 255) if has_softcaps else 128}


# -- arguments ---------------------------------------------------------------------------------------------------------


def check(base: Tensor, aux: Tensor | None, vocab_size: int) -> None:
    """What the kernels cannot do, of arguments that the op has checked."""
    launch.check_device(base)
    for name, tensor in (("base", base), ("aux", aux)):
        if tensor is not None and tensor.dtype == torch.float64:
            raise TypeError(f"{name} must be float32, bfloat16 or float16, got torch.float64: triton has no float64")
    if vocab_size > launch.MAX_INT32 // 2:
        raise ValueError(f"vocab_size must be at most {launch.MAX_INT32 // 2}, got {vocab_size}")


def source(matrix: Matrix | None) -> Source:
    """A source as kernels read it. A matrix has one row per outer step: Triton would compile for some N again."""
    if matrix is None:
        return Source(None, 1, 0, 0, 0, None, 0, None)
    values, scale, softcap = matrix
    assert scale is None or isinstance(scale, Tensor), "the dispatcher has made tensors of numbers"
    tensor, num_inner, stride_outer, stride_inner = as_rows(values)
    if stride_outer == 0 and values.numel() == num_inner * values.shape[-1]:
        num_inner, stride_outer, stride_inner = 1, stride_inner, 0
    scale_stride = 0 if scale is None or scale.dim() == 0 else 1
    return Source(
        tensor, num_inner, stride_outer, stride_inner, values.shape[-1], launch.numbers(scale), scale_stride, softcap
    )


class _Arguments(NamedTuple):
    """The leading arguments of the kernels over rows."""

    base: Source
    aux: Source
    target: Tensor | None
    weight: Tensor | None
    ignore_index: int
    vocab_size: int


class _Launch(NamedTuple):
    """A problem and how its kernels are launched."""

    problem: _Arguments
    num_rows: int
    cut: Cut
    is_split: bool
    device: launch.Device

    def num_programs(self) -> int:
        return self.num_rows * (triton.cdiv(self.problem.vocab_size, self.cut.segment) if self.is_split else 1)

    def options(self, has_statistics: bool, sums_row: bool) -> dict[str, int]:
        """Constants of the kernels over rows, and launch options."""
        has_softcaps = sums_row or self.problem.base.softcap is not None or self.problem.aux.softcap is not None
        is_even = self.problem.vocab_size % 16 == 0  # Triton compiles a kernel for this and one for the rest anyway
        return {
            "ROWS": tiles_at_once(not (has_statistics or has_softcaps), is_even, self.device),
            "LANES": self.cut.lanes,
            "WIDTH": self.cut.width,
            "SEGMENT": self.cut.segment,
            "EVEN": is_even,
            **options_of(self.cut, has_softcaps, self.device),
        }


def _launch(problem: Problem) -> _Launch:
    base, aux, V = problem.base, problem.aux, problem.vocab_size
    matrices = [base] if aux is None else [base, aux]
    check(base.values, None if aux is None else aux.values, V)
    device = launch.device_of(base.values.device)
    num_bytes = max(matrix.values.element_size() for matrix in matrices)
    is_scaled = any(matrix.scale is not None or matrix.softcap is not None for matrix in matrices)
    cut = cut_of(V, num_bytes, is_scaled, device)
    num_rows = problem.shape().numel()
    arguments = _Arguments(
        source(base),
        source(aux),
        None if problem.target is None else problem.target.contiguous(),
        launch.numbers(problem.weight),
        problem.ignore_index,
        V,
    )
    return _Launch(arguments, num_rows, cut, launch.is_split(V, num_rows, cut.segment, device), device)


def _sums_row(grads: Gradients) -> bool:
    """A scale's gradient is a sum over its row, which is then not split."""
    return grads.base_scale is not None or grads.aux_scale is not None


def _forward(
    call: _Launch,
    wanted: int,
    fields: list[Tensor],
    row_loss: Tensor | None,
    divide: tuple[Tensor | None, int],
    terms: tuple[float | None, float | None, float | None],
    grads: Gradients,
) -> None:
    """Fields and, with a `row_loss`, losses and gradients. divide: (normalizer, mode), terms: (kept, share, z_loss)."""
    scanned = with_sources_of_derived(wanted)
    if terms[1] is not None:
        scanned |= mask_of("weighted_sum")
    call = call._replace(is_split=call.is_split and not _sums_row(grads))
    options = call.options(bool(scanned & ~_PLAIN_FIELDS), _sums_row(grads))
    floats = ints = None
    if call.is_split:
        values = call.problem.base.ptr
        floats = values.new_empty(call.num_programs() * NUM_FLOATS.value, dtype=torch.float32)
        ints = values.new_empty(call.num_programs() * NUM_INTS.value, dtype=torch.int64)
        args = (*call.problem, floats, ints)
        launch.run(cross_entropy_segment_kernel, call.num_programs(), *args, WANTED=scanned, **options)
    normalizer, divisor = divide
    has_gradient = any(grad is not None for grad in grads)
    launch.run(
        cross_entropy_fwd_kernel,
        call.num_programs(),
        *call.problem,
        call.num_rows,
        floats,
        ints,
        next((stacked for stacked in fields if stacked.dtype == torch.float32), None),
        next((stacked for stacked in fields if stacked.dtype == torch.int64), None),
        row_loss,
        normalizer,
        *terms,
        KernelGradients(*grads),
        FIELDS=wanted,
        WANTED=scanned,
        DIVISOR=divisor if has_gradient else BY_ONE,
        HAS_GRADIENT=has_gradient,
        SPLIT=call.is_split,
        COUNT_BLOCK=COUNT_BLOCK,
        **options,
    )


def scan(problem: Problem, wanted: int) -> list[Tensor]:
    call = _launch(problem)
    fields = empty_fields(problem, wanted)
    if fields:
        with launch.on_device_of(problem.base.values):
            _forward(call, wanted, fields, None, (None, BY_ONE), (None, None, None), _NO_GRADIENTS)
    return fields


def _parts(call: _Launch, row_loss: Tensor | None, has_kept: bool) -> tuple[Tensor | None, Tensor | None]:
    """Sums over blocks of rows: of the losses, where there are any, and of what keeps a row."""
    num_parts = triton.cdiv(call.num_rows, REDUCE_BLOCK)
    losses, kept = (
        call.problem.base.ptr.new_empty(num_parts, dtype=torch.float64) if wanted else None
        for wanted in (row_loss is not None, has_kept)
    )
    args = (row_loss, *call.problem[2:], call.num_rows, losses, kept)
    launch.run(cross_entropy_parts_kernel, num_parts, *args, BLOCK=REDUCE_BLOCK, num_warps=8)
    return losses, kept


def _reduce(call: _Launch, parts: Tensor | None, total: Tensor, normalizer: Tensor | None, divisor: int) -> None:
    """total, 0-d: the sum of `parts`, divided."""
    assert parts is not None, "there are losses, or numbers of kept rows"
    _, _, target, weight, *numbers = call.problem
    if divisor != BY_KEPT_ROWS:
        target = weight = None
    args = (parts, parts.numel(), total, normalizer, target, weight, *numbers, call.num_rows)
    launch.run(cross_entropy_reduce_kernel, 1, *args, DIVISOR=divisor, BLOCK=REDUCE_BLOCK)


def _divisor(call: _Launch, normalizer: Tensor | None, mean: bool, has_gradient: bool) -> tuple[Tensor | None, int]:
    """(0-d tensor on the device or None, what to divide by). Nothing is read from the device."""
    values = call.problem.base.ptr
    if not mean:
        return None, BY_ONE
    if normalizer is not None:
        if normalizer.device != values.device:  # a number on the CPU, beside sources on a GPU
            normalizer = torch.full((), normalizer.item(), dtype=torch.float64, device=values.device)
        return (normalizer.to(torch.float32) if normalizer.dtype == torch.bool else normalizer), BY_NORMALIZER
    if not has_gradient or call.num_rows <= FEW_ROWS:
        return None, BY_KEPT_ROWS
    divisor = values.new_empty((), dtype=torch.float64)
    _, kept = _parts(call, None, True)
    _reduce(call, kept, divisor, None, BY_ONE)
    return divisor, BY_NORMALIZER


def _total(call: _Launch, row_loss: Tensor, total: Tensor, normalizer: Tensor | None, divisor: int) -> None:
    """The reduced loss. Its bits depend on the number of rows alone, as what is added to what does."""
    parts: Tensor | None = row_loss
    if call.num_rows > FEW_ROWS:
        parts, kept = _parts(call, row_loss, divisor == BY_KEPT_ROWS)
        if kept is not None:
            normalizer, divisor = kept, BY_PARTS
    _reduce(call, parts, total, normalizer, divisor)


def loss(
    problem: Problem, normalizer: float | Tensor | None, terms: LossTerms, wanted: int, grads: Gradients
) -> tuple[Tensor, list[Tensor]]:
    """Gradients may have any dtype; they do not go to the sources' own memory."""
    call, base = _launch(problem), problem.base.values
    fields = empty_fields(problem, wanted)
    row_loss = base.new_empty(call.num_rows, dtype=torch.float32)
    total = base.new_empty((), dtype=torch.float32)
    kept = share = None
    if terms.label_smoothing:
        kept, share = 1.0 - terms.label_smoothing, terms.label_smoothing / problem.vocab_size
    has_gradient = any(grad is not None for grad in grads)
    assert normalizer is None or isinstance(normalizer, Tensor), "the dispatcher has made tensors of numbers"
    with launch.on_device_of(base):
        divide = _divisor(call, normalizer, terms.mean, has_gradient)
        _forward(call, wanted, fields, row_loss, divide, (kept, share, terms.z_loss or None), grads)
        _total(call, row_loss, total, *divide)
    return total, fields


def backward(problem: Problem, state: RowState, coefficients: Coefficients, grads: Gradients) -> None:
    call, base = _launch(problem), problem.base.values
    if grads.base is None and grads.base_scale is None:
        coefficients = coefficients._replace(Q_b=None, B_b=None)
    k = KernelCoefficients(*map(launch.numbers, coefficients))
    needed = _state_of(k)
    saved = {}
    for name, values in state._asdict().items():
        if name in needed and values is None:
            raise ValueError(f"{name} must be given for these coefficients, got None")
        saved[name] = launch.numbers(values) if name in needed else None
    nll = saved.pop("nll")
    call = call._replace(is_split=problem.vocab_size > call.cut.segment and not _sums_row(grads))
    options = call.options(sum(c is not None for c in k) > 1, _sums_row(grads))
    if any(grad is not None for grad in grads):
        with launch.on_device_of(base):
            args = (*call.problem, Softmax(**saved, residual=None), nll, k, KernelGradients(*grads))
            launch.run(cross_entropy_bwd_kernel, call.num_programs(), *args, SPLIT=call.is_split, **options)


def _state_of(k: KernelCoefficients) -> set[str]:
    """What of a row's saved state these coefficients need."""
    needed = {"max", "log_denom"}
    if k.G is not None:
        needed.add("nll")
    if k.D is not None or k.Q is not None or k.Q_b is not None:
        needed.add("base_max")
    if k.Q is not None or k.Q_b is not None:
        needed.add("base_log_denom")
    return needed


def rescale_(grad: Tensor, factor: Tensor, target: Tensor | None, ignore_index: int) -> None:
    """grad [*, V] *= factor (0-d, read on the device) in place, but for ignored rows, which stay +0.0."""
    check(grad, None, 1)
    if grad.numel() == 0:
        return
    num_rows, width = grad.shape[:-1].numel(), grad.shape[-1]
    if target is None and grad.numel() <= launch.MAX_INT32:  # narrow rows would leave most of a block empty
        num_rows, width = 1, grad.numel()
    args = (grad, factor, None if target is None else target.contiguous(), ignore_index, num_rows, width)
    most = RESCALE_PROGRAMS * max(launch.device_of(grad.device).multiprocessors, 1)
    num_programs = min(num_rows * triton.cdiv(width, RESCALE_BLOCK), most)
    with launch.on_device_of(grad):
        launch.run(cross_entropy_rescale_kernel, num_programs, *args, BLOCK=RESCALE_BLOCK, num_warps=8)
