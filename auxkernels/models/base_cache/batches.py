"""Examples of unequal length in one batch: the same where a cache is written and where a model is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..collators import IGNORE_INDEX, DataCollatorForPrefixes

STATES = ("base_hidden_states", "base_trunk_states")


def packed_positions(positions: Sequence[Tensor], side: str) -> Tensor:
    """[batch, seq] of rows that hold several texts. Padding is one more text, because packed rows have no mask."""
    length = max(map(len, positions))
    rows = []
    for one in positions:
        padding = torch.arange(length - len(one))
        rows.append(torch.cat([one, padding] if side == "right" else [padding, one]))
    return torch.stack(rows)


@dataclass
class DataCollatorForBaseCache(DataCollatorForPrefixes):
    """Batches for `AuxiliaryForCausalLM` of examples of a `BaseCacheDataset`, or of the same without hidden states.

    As `DataCollatorForPrefixes`, with base_hidden_states and base_trunk_states [batch, seq, D] (a dict of them by layer
    where the examples have one) where the examples have them, zeros on padding. Examples with position_ids [n] hold
    several texts: there is then no attention mask, padding counts as one more text, and no text's first token is
    predicted.
    """

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().__call__(examples)
        packed = [example.get("position_ids") is not None for example in examples]
        if any(packed):
            if not all(packed):
                raise ValueError("position_ids must be given for every example or for none")
            positions = [torch.as_tensor(example["position_ids"], dtype=torch.int64) for example in examples]
            for i, (one, example) in enumerate(zip(positions, examples, strict=True)):
                if len(one) != len(example["input_ids"]):
                    raise ValueError(
                        f"examples[{i}] must have a position for each of {len(example['input_ids'])} tokens, got "
                        f"{len(one)}"
                    )
            batch["position_ids"] = packed_positions(positions, self.padding_side)
            del batch["attention_mask"]
            begins = batch["position_ids"].diff(dim=1, prepend=batch["position_ids"][:, :1]) != 1
            batch["labels"][begins] = IGNORE_INDEX
        for name in STATES:
            given = [example[name] for example in examples if example.get(name) is not None]
            if given and len(given) < len(examples):
                raise ValueError(f"{name} must be given for every example or for none")
            if given and isinstance(given[0], Mapping):
                batch[name] = {layer: self._padded([one[layer] for one in given]) for layer in given[0]}
            elif given:
                batch[name] = self._padded(given)
        return batch

    def _padded(self, states: list[Tensor]) -> Tensor:
        return pad_sequence(states, batch_first=True, padding_side=self.padding_side)
