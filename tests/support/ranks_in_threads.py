"""Ranks that are threads of one process, each with a gloo group of its own: more of them than processes would fit.

torch's own simulation of many ranks in one thread (`LocalTensorMode`) cannot stand in for them: its tensors are
wrappers without memory for a kernel to read, and numbers that differ between its ranks, as the bounds of shards do,
cannot be compared.
"""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from processes import Place

LIMIT = timedelta(seconds=100)  # what a rank waits for others


def _group(store: Any, rank: int, size: int) -> Any:
    group, kind = dist.ProcessGroup(store, rank, size), dist.ProcessGroup.BackendType.GLOO
    group._set_default_backend(kind)
    group._register_backend(torch.device("cpu"), kind, dist.ProcessGroupGloo(store, rank, size, LIMIT))
    return group


class Ranks:
    """As `processes.Processes`, of any number."""

    def run(self, size: int, function, *arguments) -> list[Any]:
        """What function(place, *arguments) returns on each rank."""
        store, found, errors = dist.HashStore(), [None] * size, [None] * size

        def run(rank: int) -> None:
            try:
                found[rank] = function(Place(rank, size, _group(store, rank, size), None), *arguments)
            except BaseException as error:
                errors[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for error in errors:
            if error is not None:
                raise error
        return found
