"""Gumbel noise from a counter-based generator, in plain torch: the same numbers as the kernels draw.

Source: Salmon et al. 2011 (Philox4x32-10).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> list[Tensor]:
    """Four words of 32 random bits for each counter of four words, all held in int64; seed: int64, 0-d or alike."""
    c = list(counter)
    key = [seed & _MASK, (seed >> 32) & _MASK]
    for _ in range(10):
        # products wrap around in int64, whose bits are those of the unsigned one
        a, b = c[0] * _MULTIPLIERS[0], c[2] * _MULTIPLIERS[1]
        c = [
            ((b >> 32) & _MASK) ^ c[1] ^ key[0],
            b & _MASK,
            ((a >> 32) & _MASK) ^ c[3] ^ key[1],
            a & _MASK,
        ]
        key = [(k + step) & _MASK for k, step in zip(key, _KEY_STEPS, strict=True)]
    return c


def random_bits(row: Tensor, num_labels: int, seed: Tensor, first_label: int = 0) -> Tensor:
    """32 random bits, held in int64, for each row and label: [N, num_labels] of rows [N]; seed: 0-d, or [N, 1]."""
    row, skipped = row.unsqueeze(1), first_label % 4
    words_of_labels = torch.arange(first_label // 4, -(-(first_label + num_labels) // 4), device=row.device)
    column = words_of_labels.expand(len(row), -1)
    counter = (column, (row & _MASK).expand_as(column), ((row >> 32) & _MASK).expand_as(column))
    words = philox((*counter, torch.zeros_like(column)), seed)
    return torch.stack(words, -1).flatten(-2)[:, skipped : skipped + num_labels]


def uniform(num_rows: int, num_labels: int, seed: Tensor, first_row: int = 0, first_label: int = 0) -> Tensor:
    """float32 [num_rows, num_labels] strictly inside (0, 1), each number a function of seed, row and label."""
    rows = torch.arange(first_row, first_row + num_rows, device=seed.device)
    bits = random_bits(rows, num_labels, seed, first_label)
    return ((bits >> 9).float() + 0.5) * 2.0**-23


def gumbel(
    num_rows: int, num_labels: int, seed: Tensor, dtype: torch.dtype, first_row: int = 0, first_label: int = 0
) -> Tensor:
    """Gumbel noise [num_rows, num_labels], -log(-log(uniform)) in `dtype`."""
    return uniform(num_rows, num_labels, seed, first_row, first_label).to(dtype).log().neg().log().neg()
