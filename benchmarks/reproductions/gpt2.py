"""The reproductions' language model, a small GPT-2 from transformers, its loss and its cost in FLOPs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from auxkernels import aux_cross_entropy
from auxkernels.models.heads import output_head
from benchmarks.training.text import IGNORE_INDEX

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


def lm_loss(model: GPT2LMHeadModel, tokens: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of the last targets.shape[1] positions, without stored logits.

    tokens   int64 [batch, prefix + length]: what the model reads; the prefix has no target and no head product.
    targets  int64 [batch, length]: the token that follows each of the last `length` positions, or IGNORE_INDEX.
    """
    hidden = model.transformer(input_ids=tokens, use_cache=False).last_hidden_state
    source = output_head(model).source(hidden[:, tokens.shape[1] - targets.shape[1] :])
    return aux_cross_entropy(source, None, targets, ignore_index=IGNORE_INDEX, reduction=reduction)


def forward_flops(model: GPT2LMHeadModel, length: int, predicted: int | None = None, layers: int | None = None) -> int:
    """FLOPs of a forward pass over one sequence of `length` tokens, two for each multiply-add of a matrix product.

    `predicted` positions (default: all) go through the head; with `layers`, only that many of the first layers are run
    and no head. Counted are the products with weights and, whole though half of it is masked, attention's two products.
    Training what is run costs three times as much, as usual; embedding look-ups, norms and the optimizer count nothing.
    """
    head = model.get_output_embeddings().weight.numel()
    blocks = model.transformer.h[:layers]
    weights = sum(m.weight.numel() for m in blocks.modules() if isinstance(m, (Conv1D, nn.Linear)))
    attention = 4 * length**2 * model.config.n_embd * len(blocks)
    num_predicted = 0 if layers is not None else length if predicted is None else predicted
    return 2 * length * weights + attention + 2 * num_predicted * head
