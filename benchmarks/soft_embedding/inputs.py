"""Scores, tables and segments of the soft_embedding cases, and what each pass does with them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

TEMPERATURE = 0.7
TOP_K = 16
SEED = 20240229  # of our Gumbel noise
# a planner scores sentences, and conditions this many layers' tokens on them
PLANNER_TABLES = 10
TOKENS_PER_SEGMENT = 20.48


class Mode(NamedTuple):
    """What a pass computes; `is_training` adds the gradients of scores and table to the mixture."""

    is_training: bool = False
    is_autocast: bool = False
    is_planner: bool = False
    hard: bool = False
    gumbel: float = 0.0
    top_k: int | None = None

    def has_products(self) -> bool:
        return not (self.hard or self.top_k)


MODES = {
    "forward": Mode(),
    "training": Mode(is_training=True),
    "gumbel": Mode(gumbel=1.0),
    "gumbel_training": Mode(is_training=True, gumbel=1.0),
    "straight_through": Mode(hard=True),
    "planner": Mode(is_planner=True),
    "planner_training": Mode(is_training=True, is_planner=True),
    "decode": Mode(),
    "decode_top_k": Mode(top_k=TOP_K),
    "autocast": Mode(is_training=True, is_autocast=True),
}


class Inputs(NamedTuple):
    """scores [S, K], table [K, D] or [L, K, D], grad [N, D] or [L, N, D], segment_ids [N] below S or None: S = N."""

    scores: Tensor
    table: Tensor
    grad: Tensor
    segment_ids: Tensor | None

    def sizes(self) -> tuple[int, int, int, int, int]:
        """L, S, N, K, D."""
        num_tables = self.table.shape[0] if self.table.dim() == 3 else 1
        return num_tables, len(self.scores), self.grad.shape[-2], *self.table.shape[-2:]


def make_inputs(shape, dtype: torch.dtype, inputs: str, mode: Mode, device: torch.device, seed: int) -> Inputs:
    """Inputs of the shape (N, K, D) for a pass; under autocast scores in `dtype` and a float32 table.

    flat     scores of standard deviation 0.1: every probability near 1 / K.
    peaked   of 3: a few labels have most of a row's weight.
    For a top-k pass each row's leading labels differ by a quarter, so that no tie decides which are chosen.
    """
    num_rows, num_labels, width = shape
    generator = torch.Generator(device).manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator, device=device)
    num_tables = (PLANNER_TABLES,) if mode.is_planner else ()
    num_segments = max(1, round(num_rows / TOKENS_PER_SEGMENT)) if mode.is_planner else num_rows
    scores = ((0.1 if inputs == "flat" else 3.0) * draw(num_segments, num_labels)).to(dtype)
    if mode.top_k:
        scores = _with_distinct_leaders(scores, min(2 * mode.top_k, num_labels))
    table = draw(*num_tables, num_labels, width)
    table = table if mode.is_autocast else table.to(dtype)
    grad = draw(*num_tables, num_rows, width).to(dtype)
    segment_ids = None
    if mode.is_planner:
        segment_ids = torch.randint(num_segments, (num_rows,), generator=generator, device=device).sort().values
    return Inputs(scores, table, grad, segment_ids)


def _with_distinct_leaders(scores: Tensor, num_leaders: int) -> Tensor:
    labels = scores.topk(num_leaders, sorted=True).indices
    bonus = 0.25 * torch.arange(num_leaders, 0, -1, device=scores.device, dtype=torch.float32)
    # a multiple of a quarter is exact in bfloat16 up to 64
    highest = scores.amax(1, keepdim=True).float().mul(4).ceil() / 4
    return scores.scatter(1, labels, (highest + bonus).to(scores.dtype))
