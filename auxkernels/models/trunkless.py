"""A base of which the output head alone is in memory: its hidden states come from a `BaseCache`."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .modalities import auto_class
from .modules import backbone

_WHOLE = "_whole"  # the attribute
_ADVICE = (
    "pass base_hidden_states (a BaseCache's data set and DataCollatorForBaseCache give them), or load the model with "
    "its whole base (from_pretrained(folder))"
)


@dataclass(frozen=True)
class Whole:
    """What is known of the base that a head was taken from; the first four as in `AuxiliaryConfig`.

    trunk_layers   the hidden states that the cache holds beside the last ones
    """

    name_or_path: str | None
    revision: str | None
    options: dict[str, Any]
    fingerprint: dict[str, Any]
    trunk_layers: tuple[int, ...]


def whole_of(model: nn.Module) -> Whole | None:
    """What is known of a model whose trunk is not in memory; None: the model is whole."""
    return vars(model).get(_WHOLE)


def has_trunk(model: nn.Module) -> bool:
    return whole_of(model) is None


def check_has_trunk(base: nn.Module, what: str) -> None:
    """ValueError where a base would be run that has no trunk in memory. what: needs it."""
    if not has_trunk(base):
        raise ValueError(f"{what} needs the base's trunk, which is not in memory: {_ADVICE}")


def check_holds_trunk_layer(base: nn.Module, index: int) -> None:
    """ValueError where the cache that a base's head comes from does not hold a trunk layer."""
    whole = whole_of(base)
    if whole is not None and index not in whole.trunk_layers:
        raise ValueError(
            f"trunk_layer must be one that the base's cache holds, {list(whole.trunk_layers)}, got {index}: write the "
            "cache with trunk_layers"
        )


def point_to_whole(config: Any, base: nn.Module) -> None:
    """Makes the pointer in an `AuxiliaryConfig` that of the whole base."""
    whole = whole_of(base)
    if whole is not None:
        config.base_name_or_path, config.base_options = whole.name_or_path, copy.deepcopy(whole.options)
        config.base_revision = whole.revision


def on_meta(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model of a configuration without values."""
    options = {} if dtype is None else {"dtype": dtype}
    kind: Any = auto_class(config)
    with torch.device("meta"):
        return kind.from_config(copy.deepcopy(config), **options)


def _no_trunk(*args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(f"the base's trunk is not in memory: {_ADVICE}")


def headed(config: PretrainedConfig, weight: Tensor, bias: Tensor | None, whole: Whole) -> PreTrainedModel:
    """A model in eval mode that has an output head [V, D] with a bias [V], and no trunk: weights of no elements."""
    model = on_meta(config, weight.dtype)
    layer, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = layer.weight is embeddings.weight
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    if is_tied:
        embeddings.weight = layer.weight
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(_nothing(parameter, weight), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                module._buffers[name] = _nothing(buffer, weight)
    backbone(model).forward = _no_trunk
    # they would make or save weights of no elements
    for name in ("resize_token_embeddings", "save_pretrained"):
        setattr(model, name, _no_trunk)
    vars(model)[_WHOLE] = whole
    return model.requires_grad_(False).eval()


def _nothing(like: Tensor, beside: Tensor) -> Tensor:
    return torch.empty(0, dtype=like.dtype, device=beside.device)
