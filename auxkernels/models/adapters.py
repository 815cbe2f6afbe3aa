"""PEFT's models as parts of a composite, and adapters on an auxiliary. PEFT puts its layers into the model itself.

So the language model inside a `PeftModel` computes what that does, and its methods (merge_and_unload, set_adapter, ...)
go on to work on it, unless it adds tokens of its own (prompt learning).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

PARTS = ("base", "aux", "lm")


def language_model(name: str, given: Any) -> Any:
    """The model that a `PeftModel` has put its layers into; anything else as it is. TypeError for prompt learning."""
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(given, peft.PeftModel):
        return given
    if any(config.is_prompt_learning for config in given.peft_config.values()):
        raise TypeError(
            f"{name} must have adapters in its layers (LoRA, ...), got {given.active_peft_config.peft_type.value}, "
            "which adds tokens outside of them"
        )
    return given.get_base_model()


class PartsWithAdapters:
    """Lets a composite's parts be assigned as `PeftModel`s: `model.aux = get_peft_model(model.aux, config)`."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, language_model(name, value) if name in PARTS else value)


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether PEFT's layers are in a model, put there by PEFT or by transformers."""
    return next(_layers(model), None) is not None


def check_saveable(model: PreTrainedModel) -> None:
    """ValueError where a composite has adapters that a folder cannot say: in all of it, or merged and still there."""
    if getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config"):
        raise ValueError("the model must have no adapters: save the PeftModel, or merge_and_unload first")
    if any(getattr(layer, "merged", False) for _, layer in _layers(model.aux)):
        raise ValueError(
            "the auxiliary's adapters must not be merged and kept: unmerge_adapter or merge_adapters first"
        )


def described(aux: PreTrainedModel) -> dict[str, Any] | None:
    """What a configuration says of an auxiliary's adapters; None where it has none.

    configs   of each by its name, as PEFT's; active: names of those in use
    trained   the weights beside those of adapters that require gradients, such as the head
    """
    if not has_adapters(aux):
        return None
    layers = list(_layers(aux))
    names = [name for name, weight in aux.named_parameters() if weight.requires_grad]
    return {
        "configs": {name: _plain(config.to_dict()) for name, config in aux.peft_config.items()},
        "active": list(layers[0][1].active_adapters),
        "trained": [name for name in names if _without_adapters(name, layers) is not None],
    }


def plain_weights(weights: dict[str, Tensor], aux_adapters: dict[str, Any] | None) -> dict[str, Tensor]:
    """The weights of the model without adapters, by its own names, from those of one with adapters."""
    if not aux_adapters:
        return weights
    marks = (".base_layer.", ".original_module.")
    wrapped = {key.partition(mark)[0] for key in weights for mark in marks if mark in key}
    plain = {}
    for key, value in weights.items():
        name = key
        for mark in marks:
            name = name.replace(mark, ".")
        if name != key or not any(key.startswith(prefix + ".") for prefix in wrapped):
            plain[name] = value
    return plain


def put_in(aux: PreTrainedModel, weights: dict[str, Tensor], aux_adapters: dict[str, Any]) -> None:
    """Puts adapters that were `described` into an auxiliary, with their weights."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("the auxiliary has adapters, which need PEFT: pip install peft") from error
    configs = {name: peft.PeftConfig.from_peft_type(**config) for name, config in aux_adapters["configs"].items()}
    (first, config), *others = configs.items()
    wrapped = peft.get_peft_model(aux, config, adapter_name=first)
    for name, config in others:
        wrapped.add_adapter(name, config)
    wrapped.base_model.set_adapter(aux_adapters["active"])
    expected = aux.state_dict(keep_vars=True)
    given = {id(expected[key]) for key in weights if key in expected}
    wrong = {key for key in expected if id(expected[key]) not in given} | (weights.keys() - expected.keys())
    if wrong:  # tied weights are saved under one of their names
        raise ValueError(f"the auxiliary's weights must be those of its adapters' configurations, got {min(wrong)}")
    aux.load_state_dict(weights, strict=False)
    aux._hf_peft_config_loaded = True  # transformers' methods for adapters (disable_adapters, ...) ask for it
    for name in aux_adapters["trained"]:
        aux.get_parameter(name).requires_grad_(True)


def merge(model: PreTrainedModel) -> None:
    """Adds the adapters in use to a model's weights, and takes all of PEFT's layers out."""
    for name, layer in list(_layers(model)):
        if hasattr(layer, "unload_and_optionally_merge_module"):
            merged = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        else:
            layer.merge()
            merged = layer.get_base_layer()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, merged)
    for mark in ("peft_config", "_hf_peft_config_loaded"):
        vars(model).pop(mark, None)


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers that are in no other, by name."""
    if "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inside = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside = name + "."
            yield name, module


def _without_adapters(name: str, layers: list[tuple[str, nn.Module]]) -> str | None:
    """A parameter's name where it is one of the model's own; None for an adapter's."""
    prefix = next((prefix for prefix, _ in layers if name.startswith(prefix + ".")), None)
    if prefix is None:
        return name
    rest = name[len(prefix) + 1 :]
    return name if rest.startswith(("base_layer.", "original_module.")) else None


def _plain(value: Any) -> Any:
    """A configuration of PEFT as JSON holds it."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return getattr(value, "value", value)
