"""The reproductions' own language model, a small GPT-2 from transformers."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel

HEAD_WIDTH = 32
END_OF_TEXT_ID = 0


def gpt2_config(vocab_size: int, positions: int, width: int, layers: int, dropout: float = 0.0) -> GPT2Config:
    """GPT-2 with heads of width 32; END_OF_TEXT begins and ends a text."""
    return GPT2Config(
        vocab_size=vocab_size,
        n_positions=positions,
        n_embd=width,
        n_layer=layers,
        n_head=max(1, width // HEAD_WIDTH),
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
    )


def build_gpt2(config: GPT2Config, seed: int) -> GPT2LMHeadModel:
    """A model whose initial weights depend on `config` and `seed` alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)
