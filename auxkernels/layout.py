"""How a [*, V] tensor is walked row by row."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """Row n of `tensor` starts at element `(n // num_inner) * stride_outer + (n % num_inner) * stride_inner`."""

    tensor: Tensor
    num_inner: int
    stride_outer: int
    stride_inner: int


def as_rows(tensor: Tensor) -> Rows:
    """The leading dimensions of [*, V] as at most two strided ones; copies only where three would remain."""
    if tensor.dim() == 2:
        return Rows(tensor, max(tensor.shape[0], 1), 0, tensor.stride(0))
    if tensor.dim() == 3:
        return Rows(tensor, max(tensor.shape[1], 1), tensor.stride(0), tensor.stride(1))
    num_rows = 1
    dims: list[tuple[int, int]] = []  # (size, stride), outermost first, dimensions of size one dropped
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        num_rows *= size
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    if len(dims) > 2:
        tensor = tensor.contiguous()
        dims = [(num_rows, tensor.stride(-2))]
    dims = [(1, 0)] * (2 - len(dims)) + dims
    return Rows(tensor, max(dims[1][0], 1), dims[0][1], dims[1][1])
