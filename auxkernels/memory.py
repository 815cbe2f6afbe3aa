"""Memory of large results and buffers on CPU: blocks that wait, when their tensor has died, for the next of their size.

A tensor that lies in a block is one like any other, but that `resize_` cannot enlarge it, as it cannot a tensor of
NumPy's: PyTorch's allocator knows nothing of its memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from . import checks, dispatch, native

# bytes from which on memory is the cache's, and pages are brought in (csrc/cpu/pages.h). the GNU C library keeps blocks
# below 32 MiB itself, but hands the end of its heap back when several lie there, as those of ten tables do
LARGE = 4 << 20
_MIB = 1 << 20


class CacheSettings:
    """The cache of large blocks of CPU memory; `auxkernels.cache_settings` is the process's.

    num_bytes   how many bytes may wait for a call that needs them; 0: none, memory comes from PyTorch and goes back to
                it. None, as at the start: an eighth of the machine's memory. What waits beyond a new value is given
                back at once.
    """

    def __init__(self) -> None:
        self._num_bytes: int | None = None

    @property
    def num_bytes(self) -> int | None:
        return self._num_bytes

    @num_bytes.setter
    def num_bytes(self, value: int | None) -> None:
        if value is not None:
            value = checks.integer("cache_settings.num_bytes", value)
            if not 0 <= value < 2**63:
                raise ValueError(f"cache_settings.num_bytes must be None or in [0, 2**63), got {value}")
        self._num_bytes = value
        if native.missing() is None:
            native.cpu().allow_waiting(-1 if value is None else value)


cache_settings = CacheSettings()


def empty_cache() -> None:
    """Gives all memory that waits in the cache of CPU blocks back to the operating system, as
    `torch.cuda.empty_cache` does for a GPU's; that of tensors that are alive stays theirs."""
    if native.missing() is None:
        native.cpu().give_waiting_back()


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous tensor on the device of `like`, of its dtype unless another is given.

    On CPU, the pages of a large one are brought in: a GEMM that has to do it takes three times as long.
    """
    dtype = like.dtype if dtype is None else dtype
    num_bytes = math.prod(shape) * dtype.itemsize
    is_small = num_bytes < LARGE or like.device.type != "cpu" or native.missing() is not None
    if is_small or not dispatch.are_plain((like,)):  # a mode or a transform is to see the allocation
        return like.new_empty(shape, dtype=dtype)
    # and a profiler of memory, which blocks would pass by
    if dtype in native.DTYPE_CODES and not torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        capsule = native.cpu().take_block(list(shape), native.DTYPE_CODES[dtype], torch.get_num_threads())
        if capsule is not None:
            return from_dlpack(capsule)
    return native.brought_in(like.new_empty(shape, dtype=dtype))


def describe() -> str:
    """The cache in one line."""
    if native.missing() is not None:
        return f"unavailable: {native.missing()}"
    counts = native.cpu().block_counts()
    if not counts["allowed"]:
        return "off"
    in_mib = {name: f"{counts[name] / _MIB:,.0f} MiB" for name in ("allowed", "waiting_bytes", "used_bytes")}
    return (
        f"{in_mib['waiting_bytes']} in {counts['waiting']} blocks wait, of {in_mib['allowed']} allowed, and "
        f"{in_mib['used_bytes']} in {counts['used']} are in use; {counts['found']} of "
        f"{counts['found'] + counts['mapped']} tensors found a block"
    )
