"""Images, video and sound beside the tokens: which of a composite's models reads them, and what the others read."""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from .modules import backbone

_OTHER_THAN_TEXT = re.compile(r"pixel|image|video|audio|vision|input_features|input_values|^mm_|^moe_mm_")
_PLACEHOLDER = re.compile(r"^(image|video|audio)_token_(id|index)$")
# [batch, seq], of a model's own tokens
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


def auto_class(config: PretrainedConfig) -> Any:
    """What makes a model of a configuration: AutoModelForCausalLM, or where that knows no such family the other."""
    is_known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForCausalLM if is_known else AutoModelForImageTextToText


def class_of(config: PretrainedConfig) -> Any:
    """The class of transformers, or registered there, of which `auto_class` makes a model."""
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    return next((mapping[type(config)] for mapping in mappings if type(config) in mapping), None)


def input_names(model: nn.Module) -> frozenset[str]:
    """The arguments that the forward of a model, and of the model without its head, name; looks through wrappers."""
    model = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)
    kinds = {type(model), type(backbone(model))}
    return frozenset().union(*(inspect.signature(kind.forward).parameters for kind in kinds))


def reads_more_than_text(model: nn.Module) -> bool:
    """Whether a model reads images, video or sound, through arguments of their own."""
    names = input_names(model)
    return any(_OTHER_THAN_TEXT.search(name) and name not in TOKEN_TYPES for name in names)


def only_text(inputs: dict[str, Any]) -> dict[str, Any]:
    """Without images, video and sound, and what says where in the text they are."""
    return {name: value for name, value in inputs.items() if not _OTHER_THAN_TEXT.search(name)}


def shared(inputs: dict[str, Any], own: frozenset[str], others: frozenset[str]) -> dict[str, Any]:
    """The further inputs of one model: those that it names, and those that neither it nor another one does."""
    return {name: value for name, value in inputs.items() if name in own or name not in others}


def has_more_than_text(inputs: dict[str, Any]) -> bool:
    """Whether images, video or sound are given."""
    return any(
        value is not None and _OTHER_THAN_TEXT.search(name) and name not in TOKEN_TYPES
        for name, value in inputs.items()
        if isinstance(value, (Tensor, dict, list, tuple))
    )


def placeholder_problem(config: PretrainedConfig, reader: PreTrainedModel) -> str | None:
    """Why a model that reads text alone cannot read the tokens that stand for images or sound; None: it can.

    config   of the model that reads images
    """
    count = reader.get_input_embeddings().num_embeddings
    for name, token in config.to_dict().items():
        if _PLACEHOLDER.match(name) and isinstance(token, int) and token >= count:
            return (
                f"{type(reader).__name__} reads text alone, and the tokens that stand for images as any others, but "
                f"{name} {token} is not among its {count} tokens: resize its token embeddings before the models are "
                "joined, or give an auxiliary a trunk_layer, with which it reads the base's hidden states"
            )
    return None
