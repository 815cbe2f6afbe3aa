"""What of a training depends on the step alone: the learning rate and the order of the batches."""

from __future__ import annotations

import math

import torch


def warm_up_and_decay(step: int, steps: int, warmup_steps: int) -> float:
    """Share of the learning rate: linear warm-up, then cosine to a tenth."""
    return min((step + 1) / warmup_steps, 0.55 + 0.45 * math.cos(math.pi * step / steps))


def batch_order(window_count: int, batch_size: int, steps: int, seed: int) -> torch.Tensor:
    """Window indices [steps, batch_size]: every window once before any comes again, in an order fixed by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps * batch_size / window_count)
    order = torch.cat([torch.randperm(window_count, generator=generator) for _ in range(epochs)])
    return order[: steps * batch_size].view(steps, batch_size)
