"""The manifest of a cache: written before anything else, and what everything else is compared with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from .files import json_bytes
from .layout import DTYPES, Field, shard_fields, shard_name, size_of

FORMAT, VERSION = "auxkernels.base_cache", 1
NAME = "manifest.json"
HEAD = "head"
_MOST_BYTES = 2**30  # of a manifest
_MOST = 2**40  # examples, tokens, widths
_BASE = ("config", "fingerprint", "generation_config", "name_or_path", "options", "revision")
_SIDES = ("right", "left")
AUTOCAST = ("bfloat16", "float16")


@dataclass(frozen=True)
class Manifest:
    """What a cache holds, of which base, tokenizer and data, and how it was computed.

    base          name_or_path, revision and options (how its weights are loaded), fingerprint of its weights, config,
                  generation_config
    tokenizer     `tokenizer_fingerprint`, or None where it was not given
    data          `data_fingerprint`
    dtype         of the hidden states: a key of `layout.DTYPES`
    hidden_size   of what enters the base's head, behind its final norm; trunk_size: of the hidden states inside
    trunk_layers  which of those are held (0: the embeddings), ascending
    has_lse       whether the log-sum-exp of the base's logits is held
    is_packed     whether examples hold several texts, which position_ids that begin anew keep apart
    batch_size, padding_side, pad_token_id   of the batches in which the base ran
    autocast      the dtype under which it ran, or None
    head_shape, head_dtype, head_has_bias    of the base's output head, [V, D]
    shards        [examples, tokens] of each
    software      versions of torch and transformers, which may change the last bits
    """

    base: dict[str, Any]
    tokenizer: str | None
    data: str
    dtype: str
    hidden_size: int
    trunk_size: int
    trunk_layers: list[int]
    has_lse: bool
    is_packed: bool
    batch_size: int
    padding_side: str
    pad_token_id: int
    autocast: str | None
    head_shape: list[int]
    head_dtype: str
    head_has_bias: bool
    shards: list[list[int]]
    software: dict[str, str]
    format: str = FORMAT
    version: int = VERSION

    @property
    def num_examples(self) -> int:
        return sum(examples for examples, _ in self.shards)

    @property
    def num_tokens(self) -> int:
        return sum(tokens for _, tokens in self.shards)

    def to_bytes(self) -> bytes:
        return json_bytes(asdict(self))

    @cached_property
    def key(self) -> str:
        """SHA-256 of the manifest, which every other file of the cache says."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    # -- parts ---------------------------------------------------------------------------------------------------------

    @property
    def parts(self) -> list[str]:
        """Names, without the ending, of the files that the cache consists of beside the manifest."""
        return [HEAD, *map(shard_name, range(len(self.shards)))]

    def metadata(self, part: str) -> dict[str, str]:
        return {"manifest": self.key, "part": part}

    def fields(self, part: str) -> list[Field]:
        """The tensors of a part."""
        if part == HEAD:
            dtype, bias = DTYPES[self.head_dtype], Field("bias", DTYPES[self.head_dtype], (self.head_shape[0],))
            return [Field("weight", dtype, tuple(self.head_shape)), *([bias] if self.head_has_bias else [])]
        return shard_fields(
            *self.shards[int(part.rpartition("-")[2])],
            dtype=DTYPES[self.dtype],
            hidden_size=self.hidden_size,
            trunk_layers=self.trunk_layers,
            trunk_size=self.trunk_size,
            has_lse=self.has_lse,
            is_packed=self.is_packed,
        )

    @property
    def num_bytes(self) -> int:
        """Of all parts."""
        key = "0" * 64
        return sum(size_of(self.fields(part), {"manifest": key, "part": part}) for part in self.parts)


# -- reading -----------------------------------------------------------------------------------------------------------


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < _MOST


def _are_counts(value: Any, length: int | None = None, least: int = 0) -> bool:
    is_list = isinstance(value, list) and length in (None, len(value))
    return is_list and all(_is_count(one, least) for one in value)


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _is_base(value: Any) -> bool:
    if not isinstance(value, dict) or sorted(value) != sorted(_BASE):
        return False
    are_dicts = all(isinstance(value[name], dict) for name in ("config", "fingerprint", "generation_config", "options"))
    names = value["name_or_path"], value["revision"]
    return are_dicts and all(one is None or isinstance(one, str) for one in names)


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "base": (_is_base, f"an object of {', '.join(_BASE)}"),
    "tokenizer": (lambda value: value is None or _is_digest(value), "64 hexadecimal digits or null"),
    "data": (_is_digest, "64 hexadecimal digits"),
    "dtype": (lambda value: isinstance(value, str) and value in DTYPES, f"one of {', '.join(DTYPES)}"),
    "hidden_size": (lambda value: _is_count(value, 1), "a positive integer"),
    "trunk_size": (lambda value: _is_count(value, 1), "a positive integer"),
    "trunk_layers": (
        lambda value: _are_counts(value) and sorted(set(value)) == value,
        "ascending integers that are not negative",
    ),
    "has_lse": (lambda value: isinstance(value, bool), "true or false"),
    "is_packed": (lambda value: isinstance(value, bool), "true or false"),
    "batch_size": (lambda value: _is_count(value, 1), "a positive integer"),
    "padding_side": (lambda value: value in _SIDES, "'right' or 'left'"),
    "pad_token_id": (_is_count, "an integer that is not negative"),
    "autocast": (lambda value: value in (None, *AUTOCAST), f"null or one of {', '.join(AUTOCAST)}"),
    "head_shape": (lambda value: _are_counts(value, 2, 1), "two positive integers"),
    "head_dtype": (lambda value: isinstance(value, str) and value in DTYPES, f"one of {', '.join(DTYPES)}"),
    "head_has_bias": (lambda value: isinstance(value, bool), "true or false"),
    "shards": (
        lambda value: _is_list(value) and all(_are_counts(one, 2, 1) and one[0] <= one[1] for one in value),
        "a list of [examples, tokens], positive, with a token for each example",
    ),
    "software": (
        lambda value: isinstance(value, dict) and all(isinstance(one, str) for one in value.values()),
        "an object of strings",
    ),
}


def read_manifest(folder: str) -> Manifest:
    """Raises FileNotFoundError: no cache; ValueError naming the field that no version of this format can have."""
    path = os.path.join(folder, NAME)
    try:
        if os.path.getsize(path) > _MOST_BYTES:
            raise ValueError(f"{path} must have at most {_MOST_BYTES} bytes")
        with open(path, "rb") as file:
            written = file.read()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} holds no BaseCache: it has no {NAME}") from error
    try:
        found = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"format in {path} must be {FORMAT!r}")
    if found.get("version") != VERSION or type(found["version"]) is not int:
        raise ValueError(f"version in {path} must be {VERSION}, got {found.get('version')!r}")
    known = {field.name for field in fields(Manifest)}
    for name in sorted(known ^ found.keys()):
        raise ValueError(f"{path} {'lacks' if name in known else 'has the unknown field'} {name}")
    for name, (holds, rule) in _RULES.items():
        if not holds(found[name]):
            raise ValueError(f"{name} in {path} must be {rule}, got {_short(found[name])}")
    manifest = Manifest(**found)
    if manifest.head_shape[1] != manifest.hidden_size:
        raise ValueError(f"head_shape in {path} must be [V, hidden_size], got {manifest.head_shape}")
    if manifest.to_bytes() != written:
        raise ValueError(f"{path} was edited: it is not as it was written")
    return manifest


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def check_same(expected: Manifest, found: Manifest, folder: str) -> None:
    """ValueError naming the first field in which a folder's manifest is another one than what is to be written."""
    for field in fields(Manifest):
        wanted, got = (getattr(one, field.name) for one in (expected, found))
        if isinstance(wanted, dict):
            for name in sorted(wanted.keys() | got.keys()):
                _compare(f"{field.name}.{name}", wanted.get(name), got.get(name), folder)
        else:
            _compare(field.name, wanted, got, folder)


def _compare(name: str, wanted: Any, got: Any, folder: str) -> None:
    if json_bytes(wanted) != json_bytes(got):
        raise ValueError(
            f"{folder} holds a cache with another {name}, {_short(got)}, than {_short(wanted)}: write to another "
            "folder, or remove this one"
        )
