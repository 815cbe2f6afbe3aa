"""The parts of a cache, its shards and its base's head: whether they are there, what they hold, whether it is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from itertools import pairwise

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .files import json_bytes, sha256_of, write_whole
from .layout import header_of, size_of
from .manifest import Manifest

_ADVICE = "remove its two files and write the cache again, which computes this part alone"


def data_path(folder: str, part: str) -> str:
    return os.path.join(folder, f"{part}.safetensors")


def sum_path(folder: str, part: str) -> str:
    """Of the file that says a part's size and SHA-256, and is written behind it."""
    return os.path.join(folder, f"{part}.json")


def write_part(folder: str, manifest: Manifest, part: str, data: Iterable[bytes | memoryview]) -> None:
    """data: the elements of the part's fields in their `layout.ordered` order."""
    header = header_of(manifest.fields(part), manifest.metadata(part))
    num_bytes, digest = write_whole(data_path(folder, part), _behind(header, data))
    write_whole(sum_path(folder, part), [json_bytes({"bytes": num_bytes, "sha256": digest})])


def _behind(header: bytes, data: Iterable[bytes | memoryview]) -> Iterable[bytes | memoryview]:
    yield header
    yield from data


def is_written(folder: str, part: str) -> bool:
    """Whether a part has been written to its end: its checksum comes last."""
    return os.path.exists(sum_path(folder, part)) and os.path.exists(data_path(folder, part))


def check_part(folder: str, manifest: Manifest, part: str) -> str:
    """The SHA-256 that a part must have, after its size and header have been found to be right.

    Raises   FileNotFoundError, ValueError naming the part's file
    """
    path = data_path(folder, part)
    for needed in (path, sum_path(folder, part)):
        if not os.path.exists(needed):
            raise FileNotFoundError(f"{needed} is missing, the cache is not whole: write it again, for the rest alone")
    fields, metadata = manifest.fields(part), manifest.metadata(part)
    header, want, got = header_of(fields, metadata), size_of(fields, metadata), os.path.getsize(path)
    digest = _expected_digest(sum_path(folder, part), want)
    if got != want:
        raise ValueError(f"{path} must have {want} bytes, got {got}: {_ADVICE}")
    with open(path, "rb") as file:
        found = file.read(len(header))
    if found != header:
        raise ValueError(f"{path} must be {part} of this cache, {_other(found, manifest, part)}: {_ADVICE}")
    return digest


def _expected_digest(path: str, num_bytes: int) -> str:
    """Raises ValueError where a checksum's file is none, or is of a part of another size."""
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(4096))
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.keys() != {"bytes", "sha256"}:
        raise ValueError(f"{path} must hold bytes and sha256: {_ADVICE}")
    if found["bytes"] != num_bytes or not isinstance(found["sha256"], str):
        raise ValueError(f"{path} must say {num_bytes} bytes, got {found['bytes']!r}: {_ADVICE}")
    return found["sha256"]


def _other(header: bytes, manifest: Manifest, part: str) -> str:
    """What a file is, by its header, that is not the part that its name says."""
    try:
        length = int.from_bytes(header[:8], "little")
        said = json.loads(header[8 : 8 + length])["__metadata__"]
        found, key = said["part"], said["manifest"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "its header is another one"
    if key != manifest.key:
        return "got one that was written under another manifest"
    return f"got {found!r}" if found != part else "its header is another one"


def verify_part(folder: str, manifest: Manifest, part: str) -> None:
    """`check_part`, and ValueError where a part's bytes are not those that were written."""
    want, path = check_part(folder, manifest, part), data_path(folder, part)
    if sha256_of(path) != want:
        raise ValueError(f"{path} has another SHA-256 than was written: it was changed. {_ADVICE.capitalize()}")


class Part:
    """A memory-mapped part, checked (`check_part`) when it is opened."""

    def __init__(self, folder: str, manifest: Manifest, part: str) -> None:
        check_part(folder, manifest, part)
        self.path = data_path(folder, part)
        try:
            self._file = safe_open(self.path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{self.path} is no safetensors file, {error}: {_ADVICE}") from error

    def whole(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """A copy of some rows."""
        return self._file.get_slice(name)[begin:end].clone()


class Shard(Part):
    """A part with examples."""

    def __init__(self, folder: str, manifest: Manifest, part: str) -> None:
        super().__init__(folder, manifest, part)
        offsets = self.whole("offsets").tolist()
        num_tokens = next(field.shape[0] for field in manifest.fields(part) if field.name == "hidden")
        is_ascending = all(begin < end for begin, end in pairwise(offsets))
        if offsets[0] != 0 or offsets[-1] != num_tokens or not is_ascending:
            raise ValueError(f"offsets in {self.path} must ascend from 0 to {num_tokens}: {_ADVICE}")
        self.offsets = offsets
