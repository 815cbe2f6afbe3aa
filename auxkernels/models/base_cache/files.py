"""Files that are there whole or not at all, whenever the process or the machine stops."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # not a Unix: two writers are then not told apart
    fcntl = None  # type: ignore[assignment]

_AT_ONCE = 2**26


def write_whole(path: str, parts: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Writes a file beside its place, brings it to the disk and moves it there: (bytes, SHA-256).

    What an interrupted call leaves is overwritten by the next one, and never read.
    """
    folder, name = os.path.split(path)
    unfinished = os.path.join(folder, unfinished_name(name))
    digest, total = hashlib.sha256(), 0
    file = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for part in parts:
            left = memoryview(part)
            while len(left):
                written = os.write(file, left[:_AT_ONCE])
                digest.update(left[:written])
                left, total = left[written:], total + written
        os.fsync(file)
    finally:
        os.close(file)
    os.replace(unfinished, path)
    sync_folder(folder)
    return total, digest.hexdigest()


def unfinished_name(name: str) -> str:
    return f".{name}.part"


def sync_folder(folder: str) -> None:
    """Brings a folder's list of files to the disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def bytes_of(tensor: Tensor) -> memoryview:
    """A CPU tensor's elements as they lie in a file."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def sha256_of(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(_AT_ONCE):
            digest.update(part)
    return digest.hexdigest()


@contextlib.contextmanager
def only_writer(folder: str) -> Iterator[None]:
    """Lets one process at a time write to a folder. Raises BlockingIOError where another one does."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BlockingIOError(f"{folder} is being written by another process") from error
            except OSError:
                pass  # a file system without locks
        yield
    finally:
        os.close(opened)
