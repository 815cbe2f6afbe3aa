"""Calls of an implementation's row kernels of cross-entropy (request.Kernels), past checks and autograd."""

import torch
from torch import Tensor

from auxkernels.cross_entropy.request import Coefficients, Gradients, LossTerms, Problem, RowState, empty_gradients
from auxkernels.sources import Leaves, Matrix

# which gradients a call computes, as bits; they come back in this order
NEEDS_BASE, NEEDS_AUX, NEEDS_BASE_SCALE, NEEDS_AUX_SCALE = 1, 2, 4, 8
NEEDS_BOTH = NEEDS_BASE | NEEDS_AUX


def problem_of(
    base,
    aux,
    target,
    *,
    weight=None,
    base_scale=None,
    aux_scale=None,
    base_softcap=None,
    aux_softcap=None,
    ignore_index=-100,
    vocab_size=None,
) -> Problem:
    return Problem(
        Matrix(base, base_scale, base_softcap),
        None if aux is None else Matrix(aux, aux_scale, aux_softcap),
        target,
        weight,
        ignore_index,
        base.shape[-1] if vocab_size is None else vocab_size,
    )


def buffers_for(problem: Problem, needs: int, grads: list[Tensor] | None = None) -> Gradients:
    """Where the gradients go: new tensors, or `grads` in their order."""
    if grads is not None:
        given = iter(grads)
        return Gradients(*(next(given) if needs >> i & 1 else None for i in range(4)))
    sides = [Leaves(bool(needs >> i & 1), scale=bool(needs >> (i + 2) & 1)) for i in range(2)]
    return empty_gradients(problem, sides)


def present(grads: Gradients) -> list[Tensor]:
    return [grad for grad in grads if grad is not None]


def loss(
    kernels,
    problem: Problem,
    *,
    mean=False,
    wanted=0,
    needs=NEEDS_BOTH,
    grads=None,
    normalizer=None,
    label_smoothing=0.0,
    z_loss=0.0,
) -> list[Tensor]:
    """[loss, fields, gradients] as the kernels leave them."""
    buffers = buffers_for(problem, needs, grads)
    value, fields = kernels.loss(problem, normalizer, LossTerms(label_smoothing, z_loss, mean), wanted, buffers)
    return [value, *fields, *present(buffers)]


def backward(
    kernels, problem: Problem, state: list, coefficients: dict | list, *, needs=NEEDS_BOTH, grads=None
) -> list[Tensor]:
    """`coefficients` by name, or all in their order."""
    buffers = buffers_for(problem, needs, grads)
    given = Coefficients(**coefficients) if isinstance(coefficients, dict) else Coefficients(*coefficients)
    kernels.backward(problem, RowState(*state), given, buffers)
    return present(buffers)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
