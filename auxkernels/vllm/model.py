"""softmax(base logits + aux_scale * aux logits) as one model of vLLM, with two decoders and both their caches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.interfaces import has_inner_state, is_attention_free, is_hybrid, supports_eagle3
from vllm.model_executor.models.utils import AutoWeightsLoader, PPMissingLayer

from ..models.small import hidden_width, new_head
from ..models.trunkless import on_meta
from . import views
from .config import AuxiliaryConfig
from .scales import BACKENDS, ScaleColumns
from .weights import CheckedWeights, Names, names_of_aux


class AuxiliaryForCausalLM(nn.Module):
    """What `auxkernels.models.AuxiliaryForCausalLM` computes, of vLLM's own models of both families.

    Hidden states are those of both models side by side, and each token's scale as the last columns. Logits are float32
    of the vocabulary that both models have. Errors are ValueErrors while the engine starts.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.model_config
        dtype = model_config.dtype
        self.config: AuxiliaryConfig = model_config.hf_config
        config = self.config
        assert config.base_config is not None and config.aux_config is not None, "the checks have said it"
        whole = {"base": on_meta(config.base_config), "aux": on_meta(config.aux_config)}
        self._names = Names.of_model(whole["base"]), names_of_aux(config, whole["aux"])
        made = {
            name: views.make_model(vllm_config, model.config, f"{prefix}.{name}" if prefix else name, _parts(model))
            for name, model in whole.items()
        }
        for name, model in made.items():
            if is_hybrid(model) or is_attention_free(model) or has_inner_state(model):
                raise ValueError(
                    f"{name} must have attention in all its layers, got {type(model).__name__}, which keeps a "
                    "recurrent state: use generate() of transformers"
                )
        self.base, self.aux = made["base"], made["aux"]
        base_width, aux_width = (hidden_width(model) for model in whole.values())

        self.aux_head: nn.Module | None = None
        if config.head != "own":
            width = base_width if config.head == "shared" else config.num_valid_tokens
            assert width is not None, "the checks have said it"
            self.aux_head = new_head(aux_width, width, config.head_rank, dtype=dtype)
            views.drop(self.aux, ParallelLMHead, (), PPMissingLayer())
        if config.trunk_layer is not None:
            embeddings = whole["aux"].get_input_embeddings().weight
            states_width = config.base_config.hidden_size
            self.trunk_projection = nn.Linear(states_width, embeddings.shape[1], dtype=dtype)
            if not (config.head == "own" and embeddings is whole["aux"].get_output_embeddings().weight):
                views.drop(self.aux, VocabParallelEmbedding, (ParallelLMHead,), PPMissingLayer())
            self._read_states()
        self.secondary_weights = [self._source_of_base(model_config)]
        self._scales = ScaleColumns(config.aux_scale, dtype)
        self._widths = [base_width, aux_width, self._scales.width]
        _check_backends(vllm_config)

    def _read_states(self) -> None:
        """Makes the base return the states that the auxiliary reads: after its last layer they are what it returns."""
        assert self.config.base_config is not None
        layer, last = self.config.trunk_layer, self.config.base_config.num_hidden_layers
        self._reads_last = layer == last
        if self._reads_last:
            return
        if not supports_eagle3(self.base):
            raise ValueError(
                f"trunk_layer must be None or {last}, the last, for a base of {type(self.base).__name__}, got {layer}: "
                "vLLM gives the states of earlier layers for families with SupportsEagle3 alone"
            )
        self.base.set_aux_hidden_state_layers((layer,))

    def _source_of_base(self, model_config: Any) -> Any:
        source, config = DefaultModelLoader.Source, self.config
        if config.base_is_saved:
            return source(model_config.model, model_config.revision, subfolder="base", prefix="base.")
        subfolder = (config.base_options or {}).get("subfolder")
        return source(config.base_name_or_path, config.base_revision, subfolder=subfolder, prefix="base.")

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        raise ValueError("there are no prompt embeddings: two models read the tokens, each by its own embeddings")

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """[tokens, both widths and that of the scales] of token ids and positions, [tokens]."""
        if inputs_embeds is not None or intermediate_tensors is not None:
            raise ValueError("input_ids must be given: neither prompt embeddings nor pipeline stages are served")
        h_base = self.base(input_ids, positions)
        if self.config.trunk_layer is None:
            h_aux = self.aux(input_ids, positions)
        else:
            states = h_base
            if not self._reads_last:
                h_base, (states,) = h_base
            h_aux = self.aux(None, positions, inputs_embeds=self.trunk_projection(states))
        return torch.cat([h_base, h_aux, self._scales.of_tokens(h_base.shape[0], h_base.device)], dim=-1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """[rows, num_valid_tokens] float32 of rows of `forward`; None on a process that does not sample."""
        h_base, h_aux, columns = (one.contiguous() for one in hidden_states.split(self._widths, dim=-1))
        scale, num_valid = self._scales.read(columns), self.config.num_valid_tokens
        if self.config.head == "shared":
            assert self.aux_head is not None
            h_base = (h_base.float() + scale * self.aux_head(h_aux).float()).to(h_base.dtype)
        total = self.base.compute_logits(h_base)
        if self.config.head == "shared":
            return None if total is None else total[..., :num_valid].float()
        aux = self.aux.compute_logits(h_aux) if self.aux_head is None else self.aux_head(h_aux)
        if total is None:
            return None
        return total[..., :num_valid].float() + scale * aux[..., :num_valid].float()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Names of what was loaded. ValueError for missing, unexpected and misshapen weights, and another base."""
        others = {
            name: list(parameter.shape)
            for name, parameter in self.named_parameters()
            if not name.startswith(("base.", "aux."))
        }
        checked = CheckedWeights(self.config, *self._names, others)
        loaded = AutoWeightsLoader(self).load_weights(checked.stream(weights))
        checked.finish()
        return loaded


def _parts(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_children()]


def _check_backends(vllm_config: VllmConfig) -> None:
    """ValueError where no attention layer would say where each request's tokens start."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    names = {layer.get_attn_backend().get_name() for layer in layers if hasattr(layer, "get_attn_backend")}
    if not names & set(BACKENDS):
        raise ValueError(
            f"the attention backend must be one of {', '.join(BACKENDS)}, which say where each request starts, got "
            f"{', '.join(sorted(names)) or 'none'}: pass --attention-backend"
        )
