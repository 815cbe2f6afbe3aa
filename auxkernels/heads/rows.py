"""Rows of [*, X] tensors: which of them count, and the chunks in which they are worked on."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks, memory

# fewer rows starve the GEMMs: each chunk streams the weights once, whatever its height. On CPUs 256 are enough: losses
# of 1,020 to 2,047 rows, 49,152 to 151,936 columns and widths of 128 to 2,048 took no longer than with 1,024
MIN_ROWS, CPU_MIN_ROWS = 1024, 256
DEFAULT_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}


@dataclass
class ChunkSettings:
    """How sources that are heads are cut into chunks of rows; `auxkernels.chunk_settings` is read by every call.

    num_bytes              budget for the [rows, V] buffers of a chunk: logits of each head and their gradients. No
                           chunk has fewer than 1,024 rows (on CPU 256) where there are as many, so that one may have up
                           to 2,047 (511) whatever the budget. None: 256 MiB on CPU, 1 GiB on GPU.
    drops_ignored_on_gpu   on GPU, too, leave ignored rows out of the GEMMs, as is always done on CPU. Counting them
                           makes the host wait for the device; during graph capture it is not done.
    """

    num_bytes: int | None = None
    drops_ignored_on_gpu: bool = False

    def budget(self, device: torch.device) -> int:
        if self.num_bytes is None:
            return DEFAULT_BYTES.get(device.type, DEFAULT_BYTES["cuda"])
        num_bytes = checks.integer("chunk_settings.num_bytes", self.num_bytes)
        if num_bytes < 1:
            raise ValueError(f"chunk_settings.num_bytes must be positive, got {num_bytes}")
        return num_bytes


settings = ChunkSettings()


def fewest_rows(device: torch.device) -> int:
    """Of a chunk, where there are as many."""
    return min(MIN_ROWS, CPU_MIN_ROWS) if device.type == "cpu" else MIN_ROWS


def chunks_of(num_rows: int, bytes_per_row: int, budget: int, min_rows: int) -> list[tuple[int, int]]:
    """[start, stop) of nearly equal chunks within the budget, but of no fewer than `min_rows` rows."""
    if num_rows == 0:
        return []
    rows_in_budget = max(budget // bytes_per_row, 1)
    num_chunks = max(1, min(-(-num_rows // rows_in_budget), num_rows // min_rows))
    bounds = [i * num_rows // num_chunks for i in range(num_chunks + 1)]
    return list(itertools.pairwise(bounds))


class Rows:
    """The rows that are worked on, numbered from 0: all of them, or those that count.

    shape   leading dimensions of the tensors
    kept    int64 [num_rows], the flat rows that count in their order; None: all
    """

    def __init__(self, shape: torch.Size, kept: Tensor | None):
        self.shape, self.kept = shape, kept
        self.num_rows = shape.numel() if kept is None else kept.numel()

    def take(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of [*, X] or [*]: a view where they lie at one stride, otherwise a copy of these rows."""
        trailing = tensor.shape[len(self.shape) :]
        try:
            flat = tensor.view(self.shape.numel(), *trailing)
        except RuntimeError:  # leading dimensions of unrelated strides
            flat = None
        if self.kept is None:
            if flat is not None:
                return flat[start:stop]
            index = torch.arange(start, stop, device=tensor.device)
        else:
            index = self.kept[start:stop]
        if flat is not None:
            return flat.index_select(0, index)
        places = []
        for size in reversed(self.shape):  # torch.unravel_index would wait for the device
            places.append(index % size)
            index = index // size
        return tensor[tuple(reversed(places))]

    def keeps_all(self) -> bool:
        """Whether rows [start, stop) are those of a contiguous tensor of all rows."""
        return self.kept is None

    def put(self, flat: Tensor, start: int, stop: int, values: Tensor) -> None:
        """Writes rows [start, stop) of a contiguous [all rows, X] or [all rows] tensor."""
        if self.kept is None:
            flat[start:stop].copy_(values)
        else:
            flat.index_copy_(0, self.kept[start:stop], values.to(flat.dtype))

    def new_output(self, like: Tensor, trailing: tuple[int, ...], dtype: torch.dtype, fill: float = 0) -> Tensor:
        """[all rows, *trailing], to be written by `put`; rows that do not count hold `fill`."""
        size = (self.shape.numel(), *trailing)
        if self.kept is None:
            return memory.empty(like, size, dtype)
        return like.new_full(size, fill, dtype=dtype)


def rows_that_count(shape: torch.Size, ignored: Tensor | None, fewest_to_drop: int | None) -> Rows:
    """All rows, or those that are not ignored (bool [*], or None): where at least so many are (None: never), and where
    counting them costs no waiting."""
    if ignored is None or fewest_to_drop is None or not _may_drop(ignored.device):
        return Rows(shape, None)
    kept = (~ignored).flatten().nonzero().squeeze(1)
    return Rows(shape, None if shape.numel() - kept.numel() < fewest_to_drop else kept)


def _may_drop(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    return settings.drops_ignored_on_gpu and not torch.cuda.is_current_stream_capturing()
