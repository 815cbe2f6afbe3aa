"""Auxiliaries without vocabulary matrices of their own: heads that are shared or of low rank, small configurations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from .causal_lm import is_dead
from .heads import OutputHead, untie_output_head, without_wrappers
from .modules import is_called_whole, is_plain
from .trunkless import has_trunk, on_meta

# -- heads -------------------------------------------------------------------------------------------------------------


class Factored(nn.Module):
    """A linear map of low rank without a bias, [*, in] -> [*, out]: zero at the start, and it learns from there."""

    def __init__(self, num_inputs: int, num_outputs: int, rank: int, **made: Any) -> None:
        super().__init__()
        self.down = nn.Linear(num_inputs, rank, bias=False, **made)
        self.up = nn.Linear(rank, num_outputs, bias=False, **made)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.up(self.down(hidden))


def check_zero_init(head: str, zero_init: bool) -> None:
    if head != "own" and not zero_init:
        raise ValueError(f"zero_init must be True for head={head!r}, which is new")


def new_head(num_inputs: int, num_outputs: int, rank: int | None, **made: Any) -> nn.Module:
    """A linear map of zeros, of low rank or (None) full. made: device and dtype."""
    if rank is not None:
        return Factored(num_inputs, num_outputs, rank, **made)
    linear = nn.Linear(num_inputs, num_outputs, bias=False, **made)
    nn.init.zeros_(linear.weight)
    return linear


def low_rank_head(head: nn.Module) -> tuple[nn.Module, OutputHead]:
    """(what makes the r numbers, the head [V, r] that they enter) of a `Factored`, in PEFT's wrappers or not."""
    factored, _ = without_wrappers(head)
    up, adapters = without_wrappers(factored.up)
    return factored.down, OutputHead(up.weight, None, 1.0, None, adapters)


def is_frozen_at_zero(head: nn.Module) -> bool:
    """Whether nothing can pass a gradient through a new head."""
    layer, _ = without_wrappers(head)
    last, adapters = without_wrappers(getattr(layer, "up", layer))
    return is_dead(OutputHead(last.weight, None, 1.0, None, adapters))


def hidden_width(model: PreTrainedModel) -> int:
    """How wide the hidden states are that enter a model's output head."""
    layer, _ = without_wrappers(model.get_output_embeddings())
    return getattr(layer, "in_features", None) or model.config.get_text_config().hidden_size


def check_hidden_states(base: nn.Module | None, aux: nn.Module) -> None:
    """ValueError where a model that must give hidden states is called with its head (`modules.is_called_whole`)."""
    for name, model in (("base", base), ("aux", aux)):
        if model is not None and is_called_whole(model):
            raise ValueError(
                f"{name} must be a transformers model without hooks whose head is one layer, or with head='own', got "
                f"{type(model).__name__}: only its logits are known"
            )


# -- matrices that nothing reads ---------------------------------------------------------------------------------------


def _as_it_is(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Whatever a checkpoint holds for a matrix without rows (older ones do), or does not."""
    for name, parameter in module.named_parameters(recurse=False):
        state_dict[prefix + name] = parameter


def _without_rows(layer: nn.Module) -> None:
    for name, parameter in list(layer.named_parameters(recurse=False)):
        setattr(layer, name, nn.Parameter(parameter.detach()[:0].clone(), requires_grad=False))
    layer.register_load_state_dict_pre_hook(_as_it_is)


def unread_weights(model: PreTrainedModel, head: str, trunk_layer: int | None) -> set[str]:
    """Names of the vocabulary matrices that nothing reads: of a replaced head, and of embeddings behind a trunk layer.

    A matrix that is both, tied, counts where neither is read.
    """
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    read = [layer for layer, is_read in ((embeddings, trunk_layer is None), (output, head == "own")) if is_read]
    kept = {id(weight) for layer in read for weight in layer.parameters()}
    unread = {id(weight) for layer in (embeddings, output) for weight in layer.parameters()} - kept
    return {name for name, weight in model.named_parameters(remove_duplicate=False) if id(weight) in unread}


def drop_unread_weights(model: PreTrainedModel, head: str, trunk_layer: int | None) -> None:
    """Leaves the matrices that nothing reads no rows. A replaced head is untied from embeddings that are read."""
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    unread = unread_weights(model, head, trunk_layer)
    is_tied = embeddings.weight is output.weight
    if trunk_layer is not None and unread and not (is_tied and head == "own"):
        if is_plain(embeddings):
            _without_rows(embeddings)
            embeddings.num_embeddings, embeddings.padding_idx = 0, None
        embeddings.requires_grad_(False)
    if head != "own":
        if not is_plain(output):
            raise ValueError(
                f"head must be 'own' for {type(model).__name__}, whose output head has hooks or weights that are not "
                "in memory: or load it without, and offload, shard or quantise the joined model"
            )
        untie_output_head(model)
        _without_rows(output)
        output.out_features = 0


# -- configurations ----------------------------------------------------------------------------------------------------

RATIO = 4
_OF_WIDTH = ("word_embed_proj_dim", "attention_hidden_size", "lru_width")
_OF_LAYERS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "moe_intermediate_size")
_OF_THE_BASE_ALONE = (
    "architectures",
    "quantization_config",
    "dtype",
    "torch_dtype",
    "_name_or_path",
    "transformers_version",
)
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads")


def small_config(config: PretrainedConfig) -> PretrainedConfig:
    """A configuration of the same family and vocabulary: a quarter of the heads, the width and the layers.

    Heads are as wide as they were, so that rotary dimensions stay; at least one head and two layers (or all there are).
    ValueError for a family that is not described by hidden_size, num_attention_heads and num_hidden_layers.
    """
    config = config.get_text_config()
    sizes: dict[str, Any] = {}
    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
        sizes[name] = getattr(config, name, None)
        if not isinstance(sizes[name], int) or sizes[name] < 1:
            raise _not_derived(config, f"it has no {name}")
    width, heads, layers = sizes.values()
    if width % heads:
        raise _not_derived(config, f"its {heads} heads do not divide its width of {width}")
    new_heads = max(1, round(heads / RATIO))
    new_width, new_layers = width // heads * new_heads, min(layers, max(2, round(layers / RATIO)))
    changed = {"hidden_size": new_width, "num_attention_heads": new_heads, "num_hidden_layers": new_layers}
    for name in _KEY_HEADS:
        if isinstance(getattr(config, name, None), int):
            fewer = max(1, round(getattr(config, name) / RATIO))
            changed[name] = max(n for n in range(1, fewer + 1) if new_heads % n == 0)
    for name in (*_OF_WIDTH, *_OF_LAYERS):
        size = getattr(config, name, None)
        if isinstance(size, int):
            changed[name] = new_width if size == width else max(8, round(size * new_width / width / 8) * 8)
    return _with(config, changed, layers)


def _with(config: PretrainedConfig, changed: dict[str, Any], num_layers: int) -> PretrainedConfig:
    """A configuration with other sizes; lists of one entry for each layer keep the first ones."""
    given = {name: value for name, value in config.to_dict().items() if name not in _OF_THE_BASE_ALONE}
    for name, value in given.items():
        if isinstance(value, list) and len(value) == num_layers and not name.endswith("token_id"):
            given[name] = value[: changed["num_hidden_layers"]]
    given |= {config.attribute_map.get(name, name): value for name, value in changed.items()}
    given.pop("model_type", None)
    try:
        return type(config)(**given)
    except Exception as error:
        raise _not_derived(config, f"its configuration refuses these sizes ({error})") from error


def small_model(base: PreTrainedModel, kwargs: dict[str, Any]) -> PreTrainedModel:
    """A new auxiliary of `small_config`, in float32 unless kwargs, for from_config, say a dtype."""
    config = small_config(base.config)
    try:
        model = AutoModelForCausalLM.from_config(config, **{"dtype": torch.float32, **kwargs})
        with torch.no_grad():
            tokens = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
            model.base_model(input_ids=tokens, use_cache=False)
    except Exception as error:
        raise _not_derived(config, f"a model of these sizes does not run ({error})") from error
    whole = base if has_trunk(base) else on_meta(base.config)
    if 2 * _size_beside_vocabulary(model) > _size_beside_vocabulary(whole):
        raise _not_derived(config, "more than half of its weights do not follow its width, heads and layers")
    return model


def _size_beside_vocabulary(model: PreTrainedModel) -> int:
    matrices = {
        id(p) for layer in (model.get_input_embeddings(), model.get_output_embeddings()) for p in layer.parameters()
    }
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in matrices)


def _not_derived(config: PretrainedConfig, why: str) -> ValueError:
    return ValueError(f"aux='small' cannot be derived from {config.model_type!r}, {why}: pass a configuration")
