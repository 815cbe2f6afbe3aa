"""Texts as examples: cut to a length, each in rows of its own, or one after the other in full rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ... import checks


def rows_of_texts(
    texts: Iterable[str], tokenizer: Any, max_length: int, *, is_packed: bool = False
) -> list[dict[str, Tensor]]:
    """Examples for `BaseCache.create` of texts, each ended by the tokenizer's end-of-text token.

    max_length   of a row, in tokens
    is_packed    False: a text is cut into rows of its own. True: all texts stand one after the other in rows of
                 max_length, the last one shorter, with position_ids that begin anew in each text, and in each row
    Returns      dicts of input_ids [n] and, packed, position_ids [n]; int64. A row that is left with a single token,
                 of which nothing can be predicted, is dropped.
    Raises       ValueError: max_length below 2; texts without tokens
    """
    max_length = checks.integer("max_length", max_length)
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")
    pieces: list[Tensor] = []
    for text in texts:
        ids = list(tokenizer(text, verbose=False)["input_ids"])
        end = tokenizer.eos_token_id
        if end is not None and ids and ids[-1] != end:
            ids.append(end)
        if ids:
            pieces.append(torch.tensor(ids))
    if is_packed and pieces:
        positions = torch.cat([torch.arange(len(piece)) for piece in pieces])
        rows = [
            {"input_ids": ids, "position_ids": _from_row(one)}
            for ids, one in zip(torch.cat(pieces).split(max_length), positions.split(max_length), strict=True)
        ]
    else:
        rows = [{"input_ids": ids} for piece in pieces for ids in piece.split(max_length)]
    rows = [{name: one.clone() for name, one in row.items()} for row in rows if len(row["input_ids"]) > 1]
    if not rows:
        raise ValueError("texts must have at least two tokens, got none")
    return rows


def _from_row(positions: Tensor) -> Tensor:
    """The rest of a text with which a row begins counts from 0 there."""
    begins = (positions == 0).nonzero()
    end = int(begins[0]) if len(begins) else len(positions)
    return torch.cat([torch.arange(end), positions[end:]])
