"""The compared ways to a model that is conditioned on a keyword, behind one interface."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedModel

from auxkernels.models import AuxiliaryForCausalLM
from benchmarks.reproductions.gpt2 import END_OF_TEXT_ID, build_gpt2, gpt2_config
from benchmarks.reproductions.language_models import blocks_of, forward_flops, head_size, lm_loss, training_flops
from benchmarks.training.text import Windows


class PlainLM:
    """A language model; with `is_conditional` it reads a keyword in front of a passage, without one it ignores it."""

    def __init__(self, model: PreTrainedModel, is_conditional: bool):
        self.model, self.is_conditional = model, is_conditional

    def loss(self, windows: Windows, keyword_ids: Tensor | None, reduction: str = "mean") -> Tensor:
        """Nats over the passages' tokens [batch, length], given keywords [batch, prefix] or (None) without any."""
        return lm_loss(self.model, self._inputs(windows.tokens, keyword_ids), windows.targets, reduction)

    def _inputs(self, tokens: Tensor, keyword_ids: Tensor | None) -> Tensor:
        if keyword_ids is None or not self.is_conditional:
            return tokens
        return torch.cat([keyword_ids, tokens], dim=1)

    def generate(self, start: Tensor, keyword_ids: Tensor, length: int) -> Tensor:
        """Continuations [batch, <= length] of `start` [batch, 1], sampled at temperature 1 from all tokens."""
        inputs = self._inputs(start, keyword_ids)
        return _sample(self.model, inputs, length)[:, inputs.shape[1] :]

    def training_flops(self, length: int, prefix: int) -> int:
        """Of one passage of `length` tokens after a keyword of `prefix` tokens: both passes over what is trained."""
        return training_flops(self.model, length + (prefix if self.is_conditional else 0), predicted=length)


class AuxiliaryTuning:
    """The frozen base and an auxiliary that alone reads the keyword: `beside_gpt2`, or of a model that is given."""

    def __init__(self, model: AuxiliaryForCausalLM):
        self.model = model

    @classmethod
    def beside_gpt2(
        cls, base: GPT2LMHeadModel, trunk_layer: int | None, layers: int, dropout: float, seed: int
    ) -> AuxiliaryTuning:
        """With a GPT-2 as auxiliary; untrained it is the base.

        With a trunk layer the auxiliary begins as a copy of the base's layers above it and of its head, and reads the
        base's hidden states below them, as they are; its last norm is zero, and so are its logits. Without one it is a
        random model with a head of zeros and embeddings of its own.
        """
        width = base.config.n_embd
        layers = layers if trunk_layer is None else base.config.n_layer - trunk_layer
        aux = build_gpt2(gpt2_config(base.config.vocab_size, base.config.n_positions, width, layers, dropout), seed)
        aux.to(base.device)
        if trunk_layer is None:
            return cls(AuxiliaryForCausalLM.from_base_and_aux(base, aux))
        copy_layers(base, aux, trunk_layer)
        zero_gpt2_logits(base, aux)
        model = AuxiliaryForCausalLM.from_base_and_aux(base, aux, trunk_layer=trunk_layer, zero_init=False)
        return cls(reading_the_trunk_as_it_is(model))

    def loss(self, windows: Windows, keyword_ids: Tensor | None, reduction: str = "mean") -> Tensor:
        """Nats over the passages' tokens; without keywords the auxiliary is left out, and what remains is the base."""
        if keyword_ids is None:
            return lm_loss(self.model.base, windows.tokens, windows.targets, reduction)
        inputs = {"input_ids": windows.tokens, "aux_input_ids": keyword_ids, "shift_labels": windows.targets}
        output = self.model(**inputs, use_cache=False, skip_logits=True)
        return output.loss if reduction == "mean" else output.loss * output.num_valid_tokens

    def generate(self, start: Tensor, keyword_ids: Tensor, length: int) -> Tensor:
        """Continuations [batch, <= length] of `start` [batch, 1], sampled at temperature 1 from all tokens."""
        return _sample(self.model, start, length, aux_input_ids=keyword_ids)[:, start.shape[1] :]

    def training_flops(self, length: int, prefix: int, is_base_cached: bool = False) -> int:
        """Of one passage of `length` tokens: forward through the base, and three times the auxiliary's forward.

        With a trunk, the keyword runs through the base's blocks too, and the projection counts with the auxiliary.
        Through a shared head, which is frozen, the backward pass costs as much as the forward pass.
        prefix           tokens of a keyword
        is_base_cached   the base's hidden states of the passage, though not of the keyword, are read
        """
        base, aux, config = self.model.base, self.model.aux, self.model.config
        total = 0 if is_base_cached else forward_flops(base, length, predicted=0)
        total += 2 * length * head_size(base) * (2 if config.head == "shared" else 1)
        total += 3 * forward_flops(aux, prefix + length, predicted=length)
        if config.head == "shared":
            total += 3 * 2 * length * self.model.aux_head.weight.numel()
        if config.trunk_layer is not None:
            total += forward_flops(base, prefix, predicted=0)
            total += 3 * 2 * (prefix + length) * self.model.trunk_projection.weight.numel()
        return total


def copy_layers(base: PreTrainedModel, aux: PreTrainedModel, trunk_layer: int) -> None:
    """The base's layers from `trunk_layer` on into `aux`."""
    for block, original in zip(blocks_of(aux), blocks_of(base)[trunk_layer:], strict=True):
        block.load_state_dict(original.state_dict())


@torch.no_grad()
def zero_gpt2_logits(base: GPT2LMHeadModel, aux: GPT2LMHeadModel) -> None:
    """The base's head into `aux`, whose positions and last norm become zero, and so do its logits."""
    aux.get_output_embeddings().weight.copy_(base.get_output_embeddings().weight)
    for zeroed in (aux.transformer.wpe.weight, aux.transformer.ln_f.weight, aux.transformer.ln_f.bias):
        zeroed.zero_()


def reading_the_trunk_as_it_is(model: AuxiliaryForCausalLM) -> AuxiliaryForCausalLM:
    """The same model; its trunk projection, which must be square, is the identity."""
    torch.nn.init.eye_(model.trunk_projection.weight)
    torch.nn.init.zeros_(model.trunk_projection.bias)
    return model


def _sample(model, inputs: Tensor, length: int, **kwargs) -> Tensor:
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": length}
    options |= {"pad_token_id": END_OF_TEXT_ID, "eos_token_id": END_OF_TEXT_ID}
    return model.generate(inputs, attention_mask=torch.ones_like(inputs), **options, **kwargs)
