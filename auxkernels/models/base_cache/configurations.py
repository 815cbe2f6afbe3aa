"""A base's configuration as a manifest holds it, and what of it decides hidden states."""

from __future__ import annotations

import json
from typing import Any

from transformers import PretrainedConfig

# what does not change hidden states by more than roundings: names, versions, tokens, what a call returns
_OF_NO_ACCOUNT = (
    *("transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "return_dict", "auto_map"),
    *("output_hidden_states", "output_attentions", "output_router_logits", "id2label", "label2id", "problem_type"),
)
# what would make transformers look for code outside of itself
_OF_CODE = ("auto_map", "attn_implementation", "experts_implementation")


def config_dict(config: PretrainedConfig) -> dict[str, Any]:
    """All of a configuration as JSON has it, infinities as Python's JSON has them."""
    found: dict[str, Any] = without_marks(json.loads(config.to_json_string(use_diff=False)))
    return found


def without_marks(value: Any) -> Any:
    """JSON without transformers' marks of infinities."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {name: without_marks(one) for name, one in value.items()}
    return [without_marks(one) for one in value] if isinstance(value, list) else value


def comparable(config: dict[str, Any]) -> dict[str, Any]:
    """What two bases of the same weights must have in common, to have the same hidden states."""
    return _without(
        config,
        lambda name: name in _OF_NO_ACCOUNT or name.startswith("_") or name.endswith(("token_id", "token_ids")),
    )


def without_code(config: dict[str, Any]) -> dict[str, Any]:
    """For a model to be made of: nothing in it names code."""
    return _without(config, lambda name: name.strip("_").removesuffix("_internal") in _OF_CODE)


def _without(value: Any, is_left_out: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without(one, is_left_out) for name, one in value.items() if not is_left_out(str(name))}
    return [_without(one, is_left_out) for one in value] if isinstance(value, list) else value
