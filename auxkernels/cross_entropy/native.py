"""The row kernels of cross-entropy on CPU, compiled; see request.Kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..checks import in_range_message
from ..native import DTYPE_CODES
from .compiled_arguments import Arguments, checked, output_pointers
from .request import BadTarget, Coefficients, Gradients, LossTerms, Problem, RowState, empty_fields

_NO_GRADIENTS = Gradients()


@functools.cache
def cpu() -> ModuleType:
    return checked(native.cpu())


def _run(arguments: Arguments, function: Callable[..., Any], *rest: Any) -> None:
    try:
        function(*arguments.leading, *rest)
    except IndexError as error:
        raise IndexError(_message(arguments, *map(int, str(error).split()))) from None


def _message(arguments: Arguments, row: int, value: int) -> str:
    problem = arguments.problem
    return in_range_message(arguments.shape, row, value, problem.vocab_size, problem.ignore_index)


def _loss_options(normalizer: float | Tensor | None, terms: LossTerms) -> tuple[bool, float, float, float, bool]:
    return (
        *(normalizer is not None, 1.0 if normalizer is None else float(normalizer)),
        *(terms.label_smoothing, terms.z_loss, terms.mean),
    )


def scan(problem: Problem, wanted: int) -> list[Tensor]:
    fields = empty_fields(problem, wanted)
    arguments = Arguments(problem, torch.get_num_threads())
    _run(arguments, cpu().scan, output_pointers(wanted, fields, _NO_GRADIENTS))
    return fields


def loss(
    problem: Problem, normalizer: float | Tensor | None, terms: LossTerms, wanted: int, grads: Gradients
) -> tuple[Tensor, list[Tensor]]:
    """In one pass over the sources; gradients may go to the sources' own memory."""
    arguments = Arguments(problem, torch.get_num_threads())
    value = problem.base.values.new_empty((), dtype=arguments.compute)
    fields = empty_fields(problem, wanted) if wanted else []
    _run(
        arguments,
        cpu().loss,
        output_pointers(wanted, fields, grads),
        value.data_ptr(),
        *_loss_options(normalizer, terms),
    )
    return value, fields


def losses(
    problems: list[Problem],
    normalizers: list[float | Tensor | None],
    terms: list[LossTerms],
    wanted: int,
    grads: list[Gradients],
) -> list[tuple[Tensor, list[Tensor]]]:
    """`loss` of each, in one pass over the rows: of one base, one compute dtype, gradients in memory of their own.

    Raises BadTarget before anything is written.
    """
    found, given, alive = [], [], []
    for problem, normalizer, of_loss, of_grads in zip(problems, normalizers, terms, grads, strict=True):
        arguments = Arguments(problem, torch.get_num_threads())
        alive.append(arguments)
        value = problem.base.values.new_empty((), dtype=arguments.compute)
        fields = empty_fields(problem, wanted) if wanted else []
        found.append((value, fields))
        outputs = output_pointers(wanted, fields, of_grads)
        given.append((*arguments.leading, outputs, value.data_ptr(), *_loss_options(normalizer, of_loss)))
    try:
        cpu().losses(given)
    except IndexError as error:
        number, row, value_there = map(int, str(error).split())
        raise BadTarget(number, _message(alive[number], row, value_there)) from None
    return found


def backward(problem: Problem, state: RowState, coefficients: Coefficients, grads: Gradients) -> None:
    arguments = Arguments(problem, torch.get_num_threads())
    of_rows = arguments.row_pointers(state), arguments.row_pointers(coefficients)
    _run(arguments, cpu().backward, output_pointers(0, [], grads), *of_rows)


def rescale_(grad: Tensor, factor: Tensor, target: Tensor | None, ignore_index: int) -> None:
    number = float(factor.detach())
    if number == 1.0:
        return
    target = None if target is None else target.contiguous()
    cpu().rescale(
        grad.data_ptr(),
        DTYPE_CODES[grad.dtype],
        grad.shape[:-1].numel(),
        grad.shape[-1],
        0 if target is None else target.data_ptr(),
        target is not None and target.dtype == torch.int32,
        ignore_index,
        number,
        torch.get_num_threads(),
    )
