"""Processes that stay: started once, they are given functions to call, all of them or the first few, as a group.

A function is one of an importable module. Its first argument is a `Place`; what it returns, or raises, comes back.
"""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WORLD = 4
START, LIMIT = 900.0, 100.0  # seconds for the start and for a call, of processes that share their cores with others


@dataclass
class Place:
    """Where a function is called: a group of the first `size` processes, over which `mesh` goes too."""

    rank: int
    size: int
    group: Any
    mesh: Any


def _serve(rank: int, folder: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    meshes = {size: dist.device_mesh.DeviceMesh("cpu", list(range(size))) for size in range(2, WORLD + 1)}
    connection.send_bytes(b"ready")
    while True:
        given = connection.recv_bytes()
        if not given:
            return
        function, size, arguments = pickle.loads(given)
        place = Place(rank, size, meshes[size].get_group(), meshes[size])
        try:
            answer = function(place, *arguments), None
        except Exception as error:
            answer = None, (type(error), str(error), traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))


class Processes:
    """All of them, and whether they still are in step: where one did not answer in time, the others may wait for it."""

    def __init__(self, folder: str):
        self.are_in_step = True
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(WORLD)]
        self.connections = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, folder, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()
        assert self._answers(range(WORLD), START) == [b"ready"] * WORLD

    def _answers(self, ranks, limit: float) -> list[bytes]:
        end, answers = time.monotonic() + limit, []
        for rank in ranks:
            if not self.connections[rank].poll(max(0.0, end - time.monotonic())):
                self.stop()
                raise TimeoutError(f"process {rank} has not answered within {limit} s")
            answers.append(self.connections[rank].recv_bytes())
        return answers

    def tried(self, size: int, function, *arguments, of_rank=None, limit: float = LIMIT) -> list[Any]:
        """function(place, *arguments) on the first `size` processes: (result, None), or (None, (type, text, trace)).

        of_rank   arguments of each process, in place of what all are given
        """
        for rank in range(size):
            given = arguments if of_rank is None else of_rank[rank]
            self.connections[rank].send_bytes(pickle.dumps((function, size, given)))
        return [pickle.loads(answer) for answer in self._answers(range(size), limit)]

    def run(self, size: int, function, *arguments, of_rank=None, limit: float = LIMIT) -> list[Any]:
        """What the function returns on each process."""
        found = self.tried(size, function, *arguments, of_rank=of_rank, limit=limit)
        for rank, (_, error) in enumerate(found):
            assert error is None, f"process {rank}: {error[2]}"
        return [result for result, _ in found]

    def stop(self) -> None:
        self.are_in_step = False
        for process in self.processes:
            process.kill()
            process.join()


class Pool:
    """Processes, started when they are needed."""

    def __init__(self):
        self.started: Processes | None = None

    def __enter__(self) -> Pool:
        return self

    def processes(self) -> Processes:
        if self.started is None or not self.started.are_in_step:
            self.folder = tempfile.TemporaryDirectory()
            self.started = Processes(self.folder.name)
        return self.started

    def __exit__(self, *_) -> None:
        if self.started is not None:
            self.started.stop()
            self.folder.cleanup()
