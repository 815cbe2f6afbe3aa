"""The output head of a causal language model as a `Head` source, so that its [N, V] logits are never made."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..sources import Head


class OutputHead(NamedTuple):
    """What turns the last hidden states of a model into its logits: scale * softcap(hidden @ weight.T + bias)."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def source(self, hidden: Tensor) -> Head:
        """hidden [*, D] -> Head."""
        return Head(hidden, self.weight, bias=self.bias, scale=self.scale, softcap=self.softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [*, D] -> [*, V]: for decoding, where there are few rows."""
        z = nn.functional.linear(hidden, self.weight, self.bias)
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z if self.scale == 1.0 else self.scale * z


def output_head(model) -> OutputHead:
    """The head of a transformers causal LM, as its configuration says. `check_output_head` compares with the model."""
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"the output embeddings of {type(model).__name__} must be a Linear, got {type(layer).__name__}")
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite divides
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return OutputHead(layer.weight, layer.bias, scale, None if softcap is None else float(softcap))


@torch.no_grad()
def check_output_head(model) -> None:
    """Raises ValueError where the model's own logits are not what `output_head` makes of its last hidden states."""
    was_training = model.training
    model.eval()
    try:
        tokens = torch.zeros((1, 2), dtype=torch.long, device=model.get_output_embeddings().weight.device)
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        want, got = model(input_ids=tokens, use_cache=False).logits.float(), output_head(model).logits(hidden).float()
    finally:
        model.train(was_training)
    tolerance = 64 * torch.finfo(model.get_output_embeddings().weight.dtype).eps * want.abs().max().item()
    if want.shape != got.shape or not torch.allclose(want, got, rtol=0.0, atol=tolerance):
        raise ValueError(f"the logits of {type(model).__name__} are not those of a linear head with scale and softcap")
