"""Data collators for a Trainer: segments of unequal number, padded or packed, and prefixes of unequal length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .labels import collate_segments, joined_segments, positions_of

IGNORE_INDEX = -100


def _check_side(name: str, side: str) -> None:
    if side not in ("right", "left"):
        raise ValueError(f"{name} must be 'right' or 'left', got {side!r}")


@dataclass
class DataCollatorForSegments:
    """Batches for `PlannerForCausalLM`; examples and what is made of them are those of `labels.collate_segments`.

    pad_token_id, padding_side   of the padding; with is_packed there is none
    is_packed   all examples in one row, without attention mask, with position_ids that begin anew in each: no example's
                first token is predicted
    For `TrainingArguments(remove_unused_columns=False)`.
    """

    pad_token_id: int = 0
    padding_side: str = "right"
    is_packed: bool = False

    def __post_init__(self) -> None:
        _check_side("padding_side", self.padding_side)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not self.is_packed:
            return collate_segments(examples, self.pad_token_id, self.padding_side)
        segment_ids, of_segments = joined_segments(examples)
        ids = [torch.as_tensor(example["input_ids"]) for example in examples]
        labels = [torch.as_tensor(e.get("labels", e["input_ids"])).clone() for e in examples]
        for one in labels:
            one[:1] = IGNORE_INDEX
        rows = {
            "input_ids": ids,
            "labels": labels,
            "segment_ids": segment_ids,
            "position_ids": [torch.arange(len(one)) for one in ids],
        }
        return {name: torch.cat(parts).unsqueeze(0) for name, parts in rows.items()} | of_segments


@dataclass
class DataCollatorForPrefixes:
    """Batches for `AuxiliaryForCausalLM` of examples with prefixes for the auxiliary alone, of any lengths.

    Examples have `input_ids` [n] and any of `labels` [n] (default: the input ids) and `aux_input_ids` [m], m may be 0.
    Returns input_ids, attention_mask and labels (-100 on padding) [batch, seq], with padding on the left also
    position_ids that count tokens alone, and, unless all prefixes are empty, aux_input_ids and aux_attention_mask
    [batch, prefix].

    pad_token_id        of the text; aux_pad_token_id: of the prefix, None: the same
    padding_side, aux_padding_side   of the text and of the prefix, whose padding on the left keeps it next to its text
    """

    pad_token_id: int = 0
    aux_pad_token_id: int | None = None
    padding_side: str = "right"
    aux_padding_side: str = "left"

    def __post_init__(self) -> None:
        _check_side("padding_side", self.padding_side)
        _check_side("aux_padding_side", self.aux_padding_side)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        texts = [torch.as_tensor(example["input_ids"], dtype=torch.int64) for example in examples]
        labels = [torch.as_tensor(e.get("labels", e["input_ids"]), dtype=torch.int64) for e in examples]
        prefixes = [torch.as_tensor(example.get("aux_input_ids", ()), dtype=torch.int64) for example in examples]
        for i, (text, target) in enumerate(zip(texts, labels, strict=True)):
            if len(text) != len(target):
                raise ValueError(f"examples[{i}] must have a label for each of {len(text)} tokens, got {len(target)}")
        batch = {
            "input_ids": _padded(texts, self.pad_token_id, self.padding_side),
            "attention_mask": _mask_of(texts, self.padding_side),
            "labels": _padded(labels, IGNORE_INDEX, self.padding_side),
        }
        if self.padding_side == "left":
            begins = batch["attention_mask"].diff(dim=1, prepend=batch["attention_mask"][:, :1]) == 1
            batch["labels"][begins] = IGNORE_INDEX  # padding would predict it
            batch["position_ids"] = positions_of(batch["attention_mask"])
        if any(len(prefix) for prefix in prefixes):
            fill = self.pad_token_id if self.aux_pad_token_id is None else self.aux_pad_token_id
            batch["aux_input_ids"] = _padded(prefixes, fill, self.aux_padding_side)
            batch["aux_attention_mask"] = _mask_of(prefixes, self.aux_padding_side)
        return batch


def _padded(rows: list[Tensor], fill: int, side: str) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill, padding_side=side)


def _mask_of(rows: list[Tensor], side: str) -> Tensor:
    return _padded([torch.ones_like(row) for row in rows], 0, side)
