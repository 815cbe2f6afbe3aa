"""Which columns of the vocabulary a process holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch.distributed as dist

from .. import checks

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

MAX_SIZE = 2**31 - 1  # classes travel as 32 bits


@dataclass(frozen=True, eq=False)
class VocabShard:
    """Columns [start, stop) of a vocabulary of `size`, of which each process of `group` holds its own.

    start, stop   this process's columns, 0 <= start <= stop <= size. Processes may hold unequally many, or none; each
                  column belongs to exactly one of them, in any order.
    size          columns of all processes together, less than 2**31.
    group         the processes, None: the default group, or this process alone where there is none.
    Raises        TypeError, ValueError: no integers, or out of order.
    """

    start: int
    stop: int
    size: int
    group: ProcessGroup | None = field(default=None)

    def __post_init__(self) -> None:
        for name in ("start", "stop", "size"):
            object.__setattr__(self, name, checks.integer(f"{name} of shard", getattr(self, name)))
        if not 0 < self.size <= MAX_SIZE:
            raise ValueError(f"size of shard must be in [1, 2**31), got {self.size}")
        if not 0 <= self.start <= self.stop <= self.size:
            raise ValueError(
                f"shard must have 0 <= start <= stop <= size, got start={self.start}, stop={self.stop}, "
                f"size={self.size}"
            )

    @classmethod
    def from_dtensor(cls, tensor: Tensor) -> VocabShard:
        """The shard of a DTensor that is cut along its classes: a head's weight, `Shard(0)`, or logits, `Shard(-1)`.

        Raises TypeError: not cut, or over more than one dimension of its mesh.
        """
        from torch.distributed.tensor import DTensor  # takes a second

        from .dtensors import shard_of

        if not isinstance(tensor, DTensor):
            raise TypeError(f"tensor must be a DTensor, got {type(tensor).__name__}")
        return shard_of("tensor", tensor)

    @property
    def width(self) -> int:
        """How many columns this process holds."""
        return self.stop - self.start

    def processes(self) -> ProcessGroup | None:
        """The group; None where there is none."""
        if self.group is not None:
            return self.group
        return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None

    def world_size(self) -> int:
        group = self.processes()
        return 1 if group is None else group.size()

    def rank(self) -> int:
        """This process's number in the group."""
        group = self.processes()
        return 0 if group is None else group.rank()

    def up_to(self, vocab_size: int) -> VocabShard:
        """The leading columns alone."""
        return VocabShard(min(self.start, vocab_size), min(self.stop, vocab_size), vocab_size, self.group)
