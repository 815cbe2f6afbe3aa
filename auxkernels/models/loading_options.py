"""dtype and device_map of a composite's parts, where one call says them for all of its parts."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from . import saving
from .modules import device_of

_OVER_ALL_DEVICES = ("auto", "balanced", "balanced_low_0", "sequential")


def with_call_options(
    name: str,
    given: PreTrainedModel | PretrainedConfig | str,
    kwargs: dict[str, Any] | None,
    *,
    dtype: torch.dtype | str | None,
    device_map: Any,
) -> dict[str, Any]:
    """A part's own options of from_pretrained (from_config), and under them those that the call gives for all parts.

    Raises   ValueError where the part is a model, which nothing would load; or for the places of modules by their names
    """
    kwargs, common = dict(kwargs or {}), {"dtype": dtype, "device_map": device_map}
    common = {option: value for option, value in common.items() if value is not None}
    if common and not isinstance(given, (str, os.PathLike, PretrainedConfig)):
        raise ValueError(
            f"{' and '.join(common)} must be None where {name} is a model, which is not loaded here: convert or move "
            f"it before ({name}.to(...)), or give its name; options of one part alone go into its *_kwargs"
        )
    if saving.says_dtype(kwargs):
        common.pop("dtype", None)
    return {**common, **kwargs}


def pop_place(kwargs: dict[str, Any], base: PreTrainedModel) -> torch.device | None:
    """Where a new model is put, of its options for from_config, which are left with what from_config takes.

    A map over all devices puts it, which is small, where its base begins.
    """
    if kwargs.get("dtype") == "auto":  # of the weights, of which there are none
        del kwargs["dtype"]
    device_map = kwargs.pop("device_map", None)
    if device_map is None:
        return None
    if isinstance(device_map, dict):
        if device_map.keys() != {""}:
            raise ValueError(f"device_map of a new aux must be one device, got {device_map}: pass aux_kwargs")
        device_map = device_map[""]
    if device_map in _OVER_ALL_DEVICES:
        return device_of(base)
    return torch.device(device_map)
