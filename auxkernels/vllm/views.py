"""One of the two models as vLLM makes it: its configuration, taken from that of the whole."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PretrainedConfig
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.utils import WeightsMapper


def view_of(
    vllm_config: VllmConfig, hf_config: PretrainedConfig, prefix: str, top_names: Iterable[str] = ()
) -> VllmConfig:
    """vllm_config for the model of `hf_config` whose layers' names begin with a prefix.

    `with_hf_config` alone would leave it the base's text config (and with it sizes of heads and of caches), window and
    quantisation.
    top_names   of the model's modules in transformers, in whose terms a quantisation lists layers
    """
    view = vllm_config.with_hf_config(hf_config)
    inner = view.model_config  # a deep copy
    text = inner.hf_text_config = inner.hf_config.get_text_config()
    inner.model_arch_config = inner.get_model_arch_config()
    inner.attention_chunk_size = getattr(text, "attention_chunk_size", None)
    # a window without layer_types reaches attention layers by cache_config: the base's would be the auxiliary's too
    view.cache_config = copy.copy(view.cache_config)
    kinds = set(getattr(text, "layer_types", None) or ["sliding_attention"])
    view.cache_config.sliding_window = inner.get_sliding_window() if kinds == {"sliding_attention"} else None
    inner.quantization = view.quant_config = None
    inner._verify_quantization()
    if inner.quantization is not None:
        view.quant_config = VllmConfig.get_quantization_config(inner, view.load_config)
        names = {name: f"{prefix}.{name}" for name in top_names}
        view.quant_config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix=names))
    return view


def make_model(vllm_config: VllmConfig, hf_config: PretrainedConfig, prefix: str, top_names: Iterable[str]) -> Any:
    """vLLM's model of a configuration, without weights. Raises ValueError for a family that vLLM does not have."""
    view = view_of(vllm_config, hf_config, prefix, top_names)
    with set_model_tag(f"auxiliary_{prefix}"):  # apart in the cache of torch.compile
        model = initialize_model(vllm_config=view, prefix=prefix)
    if type(model).__name__.startswith("Transformers"):
        raise ValueError(
            f"the {prefix} must be of a family that vLLM has a model of its own for, got {hf_config.model_type}: it "
            "would be run by transformers, which was not tried"
        )
    return model


def drop(model: nn.Module, kind: type[nn.Module], but: tuple[type[nn.Module], ...], instead: nn.Module) -> None:
    """Replaces a model's modules of a kind, those of further kinds excepted."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, kind) and not isinstance(module, but):
                setattr(parent, name, instead)
