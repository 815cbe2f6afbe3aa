"""Generation written out: loops without a cache, which `generate` is compared with."""

import torch

from auxkernels import sample_logits

NEW = 8


def padded(tokens, lengths):
    """tokens cut to their last `lengths`, padded on the left, and the mask."""
    mask = (torch.arange(tokens.shape[1]) >= tokens.shape[1] - torch.tensor(lengths)[:, None]).long()
    return tokens * mask, mask


@torch.no_grad()
def next_logits(model, tokens, mask, **kwargs):
    """[batch, V] of the last position, computed from nothing."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(tokens, attention_mask=mask, position_ids=positions, use_cache=False, **kwargs).logits[:, -1]


def loop(model, tokens, mask, choose, new=NEW, **kwargs):
    """Generation without a cache, and the logits of every step [batch, new, V]."""
    steps = []
    for _ in range(new):
        steps.append(next_logits(model, tokens, mask, **kwargs))
        tokens = torch.cat([tokens, choose(steps[-1])], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return tokens, torch.stack(steps, dim=1)


def greedy(logits):
    return logits.argmax(-1, keepdim=True)


class Draws:
    """The choices of `generate`, which draws a seed for each text first, and then by `sample_logits`."""

    def __init__(self, batch, first, **options):
        """first: the position of the first new token."""
        self.seeds, self.position, self.options = torch.randint(2**63 - 1, (batch,)), first, options

    def __call__(self, logits):
        chosen = sample_logits(logits, seed=self.seeds, position=self.position, **self.options)
        self.position += 1
        return chosen[:, None]


def generate(model, tokens, mask, **kwargs):
    options = {"max_new_tokens": NEW, "eos_token_id": None, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(tokens, attention_mask=mask, **{**options, **kwargs})
