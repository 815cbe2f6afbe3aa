"""How the parts of a cache are laid out in safetensors files, to the byte: a header is known before its data are."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int32: "I32",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class Field:
    """A tensor of a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def ordered(fields: Sequence[Field]) -> list[Field]:
    """The order in a file: wide elements first, so that all of them are aligned."""
    return sorted(fields, key=lambda field: -field.dtype.itemsize)


def header_of(fields: Sequence[Field], metadata: dict[str, str]) -> bytes:
    """What stands in front of the data of fields in their `ordered` order."""
    described: dict[str, Any] = {"__metadata__": metadata}
    begin = 0
    for field in ordered(fields):
        end = begin + field.num_bytes
        described[field.name] = {"dtype": _NAMES[field.dtype], "shape": field.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def size_of(fields: Sequence[Field], metadata: dict[str, str]) -> int:
    """Of the file, bytes."""
    return len(header_of(fields, metadata)) + sum(field.num_bytes for field in fields)


def shard_fields(
    num_examples: int,
    num_tokens: int,
    *,
    dtype: torch.dtype,
    hidden_size: int,
    trunk_layers: Sequence[int],
    trunk_size: int,
    has_lse: bool,
    is_packed: bool,
) -> list[Field]:
    """The tensors of a shard. offsets: where each example's tokens begin, and where the last one's end."""
    fields = [
        Field("offsets", torch.int64, (num_examples + 1,)),
        Field("input_ids", torch.int32, (num_tokens,)),
        Field("hidden", dtype, (num_tokens, hidden_size)),
    ]
    if is_packed:
        fields.append(Field("position_ids", torch.int32, (num_tokens,)))
    if has_lse:
        fields.append(Field("lse", torch.float32, (num_tokens,)))
    return fields + [Field(trunk_name(layer), dtype, (num_tokens, trunk_size)) for layer in trunk_layers]


def trunk_name(layer: int) -> str:
    return f"trunk.{layer}"


def shard_name(index: int) -> str:
    """Of a shard's files, without the ending."""
    return f"shard-{index:06d}"
