"""What the operators' float64 oracles share: errors, and what is said of the first bound that one breaks."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps


def note(name: str, error: float, excess: float, errors: dict, problems: list) -> None:
    errors[name] = max(errors.get(name, 0.0), float(f"{error:.3g}"))
    if not excess <= 1.0:
        problems.append(f"{name} error {error:.2g} is {excess:.2g} times its bound")


def nan_to_inf(value: float) -> float:
    return math.inf if math.isnan(value) else value


def relative_distance(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """||values - expected|| / ||expected|| over all pairs, without a second float64 copy of a large tensor."""
    distance = norm = 0.0
    for values, expected in pairs:
        for part, exact in zip(values.split(1 << 14), expected.split(1 << 14), strict=True):
            distance += (part.double() - exact).square_().sum().item()
            norm += exact.square().sum().item()
    if norm == 0:
        return 0.0 if distance == 0 else math.inf
    return math.sqrt(distance / norm)
