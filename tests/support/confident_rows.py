"""Rows whose target has almost all the probability."""

import torch
from inputs import confident_row, split_in_two
from oracle import Case, expected

RESTS = [0.1, 1e-2, 1e-3, 1e-6, 1e-9, 1e-12]  # 1 - p


def confident_problem(vocab_size, offset, device, place=1):
    """Rows of all RESTS; the sum of base and aux is exact in float32, so that the row is what it says it is."""
    targets = torch.full((len(RESTS),), min(place, vocab_size - 1))
    rows = [confident_row(vocab_size, int(y), rest, offset) for y, rest in zip(targets, RESTS, strict=True)]
    base, aux = split_in_two(torch.stack(rows), device)
    return base, aux.requires_grad_(), targets.to(device)


def true_class_errors(case: Case, got: dict, upstream=None) -> torch.Tensor:
    """Relative error of the gradient at the target, in each row."""
    want = expected(case, upstream, confident=True)["aux[0]"][0]
    at = case.target.unsqueeze(-1)
    want, got = want.gather(-1, at), got["aux[0]"].double().gather(-1, at)
    return ((got - want) / want).abs()
