"""What the reproductions ask of any causal language model of transformers: its loss, and its cost in FLOPs."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from auxkernels import aux_cross_entropy
from auxkernels.models.heads import output_head
from benchmarks.training.text import IGNORE_INDEX


def lm_loss(model: PreTrainedModel, tokens: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of the last targets.shape[1] positions, without stored logits.

    tokens   int64 [batch, prefix + length]: what the model reads; the prefix has no target and no head product.
    targets  int64 [batch, length]: the token that follows each of the last `length` positions, or IGNORE_INDEX.
    """
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    source = output_head(model).source(hidden[:, tokens.shape[1] - targets.shape[1] :])
    return aux_cross_entropy(source, None, targets, ignore_index=IGNORE_INDEX, reduction=reduction)


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a model whose base model holds them in a list, as those of GPT-2 and Llama do."""
    return next(module for module in model.base_model.children() if isinstance(module, nn.ModuleList))


def _weights(modules: nn.Module, only_trained: bool = False) -> int:
    layers = (module for module in modules.modules() if isinstance(module, (Conv1D, nn.Linear)))
    return sum(m.weight.numel() for m in layers if m.weight.requires_grad or not only_trained)


def forward_flops(model: PreTrainedModel, length: int, predicted: int | None = None, layers: int | None = None) -> int:
    """FLOPs of a forward pass over one sequence of `length` tokens, two for each multiply-add of a matrix product.

    `predicted` positions (default: all) go through the head; with `layers`, only that many of the first layers are run
    and no head. Counted are the products with weights and, whole though half of it is masked, attention's two products.
    Embedding look-ups, norms and the optimizer count nothing.
    """
    config = model.config
    blocks = blocks_of(model)[:layers]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * length**2 * config.num_attention_heads * head_dim * len(blocks)
    num_predicted = 0 if layers is not None else length if predicted is None else predicted
    return 2 * length * _weights(blocks) + attention + 2 * num_predicted * head_size(model)


def training_flops(model: PreTrainedModel, length: int, predicted: int | None = None) -> int:
    """FLOPs of both passes over one sequence, of a model in which at least adapters are trained.

    Three times the forward pass where all weights are trained. Through frozen weights the backward pass takes the
    gradients of the activations alone, which cost as much as the forward pass.
    """
    head = model.get_output_embeddings().weight
    num_predicted = length if predicted is None else predicted
    frozen = 2 * length * (_weights(blocks_of(model)) - _weights(blocks_of(model), only_trained=True))
    frozen += 0 if head.requires_grad else 2 * num_predicted * head.numel()
    return 3 * forward_flops(model, length, predicted) - frozen


def head_size(model: PreTrainedModel) -> int:
    """Elements of the output head's weight."""
    return model.get_output_embeddings().weight.numel()
