"""Plans and ends of segments that depend on all tokens so far."""

import torch
from planner_models import NUM_LABELS
from torch.nn.functional import one_hot

ENDS = set(range(3, 30))  # token ids that end a segment: about half of all


def scores_of(tokens_so_far, attention_mask):
    """Scores [batch, K] that depend on all tokens so far, not on the padding."""
    weights = torch.arange(1, tokens_so_far.shape[1] + 1)
    place = (attention_mask.cumsum(1) * attention_mask) if attention_mask is not None else weights
    return 4.0 * one_hot((tokens_so_far * place).sum(1) % NUM_LABELS, NUM_LABELS).float()


def ends_by_token(row: list[int]) -> bool:
    return row[-1] in ENDS


def ends_by_sum(row: list[int]) -> bool:
    """About every third token, also where greedy search repeats one token."""
    return (sum(row) + len(row)) % 3 == 0


def end_by_sum(tokens_so_far):
    return torch.tensor([ends_by_sum(row) for row in tokens_so_far.tolist()])
