"""The demo's models in plain PyTorch: a small causal language model and the auxiliary that corrects its logits."""

import torch
import torch.nn.functional as F
from torch import nn

HEAD_WIDTH = 32


class Block(nn.Module):
    """Pre-norm transformer block: causal self-attention, then a GELU feed-forward of four times the width."""

    def __init__(self, width):
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.heads = width // HEAD_WIDTH

    def forward(self, hidden):
        q, k, v = self.qkv(self.norm_attention(hidden)).unflatten(-1, (3, self.heads, HEAD_WIDTH)).unbind(-3)
        mixed = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
        hidden = hidden + self.project(mixed.transpose(1, 2).flatten(-2))
        return hidden + self.mlp(self.norm_mlp(hidden))


class BaseModel(nn.Module):
    """GPT with learned positions and a tied head: its logits are `hidden(tokens) @ head.T`."""

    def __init__(self, vocab_size, length, width, layers):
        super().__init__()
        self.embedding, self.position = nn.Embedding(vocab_size, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for embedding in (self.embedding, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def hidden(self, tokens):
        positions = torch.arange(tokens.shape[-1], device=tokens.device)
        return self.norm(self.blocks(self.embedding(tokens) + self.position(positions)))

    @property
    def head(self):
        return self.embedding.weight


class Auxiliary(nn.Module):
    """A smaller causal model that reads the frozen base's hidden states, as the auxiliary of the paper does.

    Its logits are `auxiliary(base_hidden) @ head.T`, and its head starts at zero, so that before the first step
    base + auxiliary is the base.
    """

    def __init__(self, vocab_size, base_width, width, layers):
        super().__init__()
        self.reduce = nn.Linear(base_width, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Parameter(torch.zeros(vocab_size, width))

    def forward(self, base_hidden):
        return self.norm(self.blocks(self.reduce(base_hidden)))


def parameter_count(model):
    return sum(parameter.numel() for parameter in model.parameters())
