"""A cache's examples as a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from .cache import BaseCache
from .fingerprints import row_of

_OF_THE_CACHE = ("position_ids", "attention_mask")


class BaseCacheDataset(Dataset[dict[str, Any]]):
    """Map-style and picklable: each worker maps the files anew. Arguments as for `BaseCache.dataset`.

    Items are those of the cache, with base_trunk_states [n, D'] where a trunk layer is read (a dict by layer where
    several are), and the columns of the example with the same index. `DataCollatorForBaseCache` makes batches of them.
    """

    def __init__(
        self,
        cache: BaseCache,
        model: PreTrainedModel | None = None,
        *,
        examples: Sequence[Mapping[str, Any]] | None = None,
        trunk_layer: int | None = None,
    ) -> None:
        if model is not None:
            if getattr(model.config, "base_fingerprint", None) is None:
                raise TypeError(f"model must be an AuxiliaryForCausalLM, got {type(model).__name__}")
            layers = sorted(model._trunk_layers)
            if trunk_layer is not None and layers != [trunk_layer]:
                own = ", ".join(map(str, layers)) or None
                raise ValueError(f"trunk_layer must be the model's, {own}, got {trunk_layer}")
            cache.check_base(model.config.base_fingerprint)
            cache.check_config(model.base.config)
        else:
            layers = [] if trunk_layer is None else [trunk_layer]
        for layer in layers:
            if layer not in cache.trunk_layers:
                raise ValueError(
                    f"trunk_layer must be one that the cache {cache.path} holds, {cache.trunk_layers}, got {layer}: "
                    "write it with trunk_layers"
                )
        if examples is not None and len(examples) != len(cache):
            raise ValueError(f"examples must be those of the cache, {len(cache)}, got {len(examples)}")
        self.cache, self.examples, self.trunk_layers = cache, examples, layers

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = self.cache[index]
        trunks = {name: item.pop(name) for name in list(item) if name.startswith("base_trunk_states.")}
        states = {layer: trunks[f"base_trunk_states.{layer}"] for layer in self.trunk_layers}
        if states:
            item["base_trunk_states"] = states if len(states) > 1 else states[self.trunk_layers[0]]
        if self.examples is None:
            return item
        example = self.examples[index]
        ids, positions = row_of(example, f"examples[{index}]")
        if not torch.equal(ids, item["input_ids"]):
            raise ValueError(f"examples[{index}] must have the tokens of the cache's example, got others")
        held = item.get("position_ids", torch.arange(len(ids)))
        if positions is not None and not torch.equal(positions, held):
            raise ValueError(f"examples[{index}] must have the position_ids of the cache's example, got others")
        return {**{name: value for name, value in example.items() if name not in _OF_THE_CACHE}, **item}
