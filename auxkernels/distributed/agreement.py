"""That all processes make the same call, before any of them waits for what another does not send.

On CPU each tells the others, in one gather of a few hundred bytes, what its call looks like and what is wrong with it.
On GPU nothing can be compared without waiting for the device: there the exchange of the rows carries targets and
bounds, and rows that disagree become NaN.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .collectives import gathered

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_ERRORS: tuple[type[Exception], ...] = (TypeError, ValueError, IndexError, RuntimeError)
_TEXT_BYTES = 320


class Facts(NamedTuple):
    """What a call looks like on one process, integers of 64 bits. The first ones may differ between processes."""

    start: int = 0
    stop: int = 0
    could_be_own: int = 0  # bit for each source: it may hold the process's columns,
    could_be_all: int = 0  # or all columns
    size: int = 0
    num_rows: int = 0
    rows: int = 0  # digest of the targets
    outputs: int = 0  # digest of what is computed, and how
    options: int = 0  # digest of the options
    gradients: int = 0  # bit for each tensor that requires one


_AGREED = {
    "size": "the size of the shard",
    "num_rows": "the number of rows",
    "rows": "the targets: the rows of all processes must be the same",
    "outputs": "function, sources, dtypes, return_stats, recompute or chunk_settings",
    "options": (
        "options (vocab_size, ignore_index, weight, label_smoothing, z_loss, reduction, normalizer, backend; of "
        "soft_embedding temperature, hard, gumbel, clean_gradient, seed, mask, top_k)"
    ),
    "gradients": "which tensors require a gradient",
}


class Agreement(NamedTuple):
    """What is known of all processes. No facts: nothing has been compared."""

    facts: list[Facts]

    def is_of_all_columns(self, source: int, own: Facts) -> bool:
        """Whether a source holds all columns on each process, and not the process's own. Raises ValueError."""
        of_all = self.facts or [own]
        if all(f.could_be_own >> source & 1 for f in of_all):
            return False
        if all(f.could_be_all >> source & 1 for f in of_all):
            return True
        raise ValueError(f"source {source} must hold each process's own columns, or all columns on each of them")

    def widest(self, size: int, world: int) -> int:
        """The most columns of a process; what an even shard has where that is not known."""
        return max(f.stop - f.start for f in self.facts) if self.facts else -(-size // world)


def agree(group: ProcessGroup, device: torch.device, facts: Facts, error: Exception | None) -> Agreement:
    """Raises the error, on CPU on all processes; and ValueError on all of them where the calls are not the same."""
    if device.type != "cpu":
        if error is not None:
            raise error
        return Agreement([])
    told = gathered(_encoded(facts, error), group)
    if error is not None:
        raise error
    numbers = [row[: len(facts) + 2].tolist() for row in told]
    for rank, (kind, length, *_) in enumerate(numbers):
        if kind:
            text = bytes(told[rank, len(facts) + 2 :].view(torch.uint8)[:length].tolist()).decode(errors="replace")
            raise _ERRORS[kind - 1](f"rank {rank}: {text}")
    of_ranks = [Facts(*row[2:]) for row in numbers]
    for name, said in _AGREED.items():
        values = [getattr(f, name) for f in of_ranks]
        for rank, value in enumerate(values):
            if value != values[0]:
                shown = f": {values[0]} and {value}" if name in ("size", "num_rows") else ""
                raise ValueError(f"shard: rank 0 and rank {rank} disagree about {said}{shown}")
    _check_bounds([(f.start, f.stop) for f in of_ranks], facts.size)
    return Agreement(of_ranks)


def _encoded(facts: Facts, error: Exception | None) -> Tensor:
    """int64: kind of the error, length of its text, the facts, the text."""
    text = b"" if error is None else str(error).encode()[:_TEXT_BYTES]
    kind = 0 if error is None else 1 + next(i for i, of in enumerate(_ERRORS) if isinstance(error, of))
    padded = torch.tensor(list(text.ljust(_TEXT_BYTES, b"\0")), dtype=torch.uint8).view(torch.int64)
    return torch.cat([torch.tensor([kind, len(text), *facts], dtype=torch.int64), padded])


def _check_bounds(bounds: list[tuple[int, int]], size: int) -> None:
    end = 0
    for start, stop in sorted(bounds):
        if start != end:
            break
        end = stop
    else:
        if end == size:
            return
    listed = ", ".join(f"[{start}, {stop})" for start, stop in bounds)
    raise ValueError(f"shard: the processes must hold each of the {size} columns once, got {listed}")


# -- digests: the same number on all processes for the same contents ---------------------------------------------------


def digest_of(*values: object) -> int:
    """Of what `repr` tells apart."""
    return zlib.crc32(repr(values).encode())


def digest(tensor: Tensor | None) -> int:
    """Of a tensor's numbers and shape, of CPU tensors alone."""
    if tensor is None or tensor.device.type != "cpu":
        return 0
    values = tensor.detach().double().contiguous().view(torch.int64) if tensor.is_floating_point() else tensor.long()
    values = values.flatten()
    mixed = (values ^ (values >> 29)) * -0x61C8864680B583EB  # odd numbers of no pattern, modulo 2**64
    places = torch.arange(1, values.numel() + 1) * 0x2545F4914F6CDD1D
    return int(((mixed ^ places) * 0x1B873593).sum()) ^ digest_of(tuple(tensor.shape))
