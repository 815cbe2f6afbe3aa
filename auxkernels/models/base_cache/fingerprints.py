"""What tells a tokenizer, and the tokens of a data set, from others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's serialised form, hexadecimal.

    Without padding and truncation, which every call sets anew. Of one that is not serialised (written in Python): of
    its class, vocabulary and added tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        form = json.loads(backend.to_str())
        form.pop("truncation", None)
        form.pop("padding", None)
    elif hasattr(tokenizer, "get_vocab"):
        form = [type(tokenizer).__name__, tokenizer.get_vocab(), sorted(map(str, tokenizer.all_special_tokens))]
    else:
        raise TypeError(f"tokenizer must be one of transformers', got {type(tokenizer).__name__}")
    return hashlib.sha256(json.dumps(form, sort_keys=True).encode()).hexdigest()


def row_of(example: Mapping[str, Any], where: str) -> tuple[Tensor, Tensor | None]:
    """(input_ids [n], position_ids [n] or None) of an example, int64 on the CPU. Raises ValueError naming where."""
    ids = _numbers(example, "input_ids", where)
    if not len(ids):
        raise ValueError(f"{where} must have at least one token, got none")
    mask = example.get("attention_mask")
    if mask is not None and not torch.as_tensor(mask).bool().all():
        raise ValueError(f"{where} must have no padding: its attention_mask has zeros")
    if example.get("position_ids") is None:
        return ids, None
    positions = _numbers(example, "position_ids", where)
    if positions.shape != ids.shape or positions.min() < 0 or positions.max() >= 2**31:
        raise ValueError(f"position_ids of {where} must be {list(ids.shape)}, in [0, 2**31)")
    return ids, positions


def _numbers(example: Mapping[str, Any], name: str, where: str) -> Tensor:
    if name not in example:
        raise ValueError(f"{where} must have {name}, got {', '.join(sorted(example)) or 'nothing'}")
    numbers = torch.as_tensor(example[name])
    if numbers.dim() != 1 or (numbers.is_floating_point() and len(numbers)):
        raise ValueError(f"{name} of {where} must be integers [n], got {numbers.dtype} {list(numbers.shape)}")
    return numbers.to("cpu", torch.int64)


def digest_of(ids: Tensor, positions: Tensor | None) -> bytes:
    """Of an example."""
    digest = hashlib.sha256(torch.tensor([len(ids), positions is not None]).numpy().tobytes())
    for numbers in (ids,) if positions is None else (ids, positions):
        digest.update(numbers.contiguous().numpy().tobytes())
    return digest.digest()


def joined(digests: Iterable[bytes]) -> str:
    """Of a data set, of its examples' digests in their order."""
    digest = hashlib.sha256()
    for one in digests:
        digest.update(one)
    return digest.hexdigest()


def data_fingerprint(examples: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 over the examples' token ids and, where they are packed, positions; hexadecimal.

    examples   each with `input_ids` [n] and, where it holds several texts, `position_ids` [n] that begin anew in each;
               other columns do not count
    """
    return joined(digest_of(*row_of(examples[i], f"examples[{i}]")) for i in range(len(examples)))
