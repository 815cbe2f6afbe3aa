"""The key-value cache of several auxiliaries beside one base, all of which read one text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from .paired_cache import PairedCache


class EnsembleCache(Cache):
    """A base model's cache and those of auxiliaries, kept at the same text.

    base      its cache, which all pairs hold
    pairs     a `PairedCache` for each auxiliary by its name, with its own prefix
    is_complete   False from the start of a call to its end: a call that failed leaves some layers behind others
    Lengths and masks are the base's. What changes the batch or the length is done once to the base and once to each
    auxiliary, and the prefixes stay.
    """

    def __init__(self, base: Cache, pairs: Mapping[str, PairedCache]):
        self.base = base
        self.pairs = dict(pairs)
        if any(pair.base is not base for pair in self.pairs.values()):
            raise ValueError("pairs must hold the base's cache, got another one")
        self.layer_class_to_replicate = None
        self.offloading = False

    @classmethod
    def of_configs(cls, base_config: PretrainedConfig, aux_configs: Mapping[str, PretrainedConfig]) -> EnsembleCache:
        """Empty and growing."""
        base = DynamicCache(config=base_config)
        return cls(base, {n: PairedCache(base, DynamicCache(config=one)) for n, one in aux_configs.items()})

    @property
    def layers(self) -> list[Any]:
        """Of all: what `Cache` does to its layers is done once to each of them."""
        return [*self.base.layers, *(layer for pair in self.pairs.values() for layer in pair.aux.layers)]

    @property
    def is_complete(self) -> bool:
        return all(pair.is_complete for pair in self.pairs.values())

    @is_complete.setter
    def is_complete(self, is_complete: bool) -> None:
        for pair in self.pairs.values():
            pair.is_complete = is_complete

    @property
    def is_compileable(self) -> bool:
        return False  # generation would make one four-dimensional mask for several models

    @property
    def is_sliding(self) -> list[bool]:
        return self.base.is_sliding

    def __len__(self) -> int:
        return len(self.base)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(base={self.base}, pairs={list(self.pairs)})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.base.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.base.get_mask_sizes(query_length, layer_idx)

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("EnsembleCache holds several models' caches: update .base or .pairs[name].aux")

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the text's last tokens from all, given what `Cache.crop` of this transformers takes.

        Raises   ValueError where a layer holds a recurrent state, in which the removed tokens would stay.
        """
        if any(isinstance(layer, LinearAttentionCacheLayerMixin) and not layer.is_croppable for layer in self.layers):
            raise ValueError("past_key_values hold a recurrent state, which cannot take back the tokens it has read")
        before = self.base.get_seq_length()
        self.base.crop(tokens_to_remove)
        for pair in self.pairs.values():
            pair.aux.crop(self.base.get_seq_length() - before)

    def reset(self) -> None:
        """Empties all."""
        for pair in self.pairs.values():  # the base's again each time, which changes nothing
            pair.reset()

    def check_in_step(self) -> None:
        """Raises ValueError unless all caches hold the same text, and the auxiliaries' their prefixes."""
        for pair in self.pairs.values():
            pair.check_in_step()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        for pair in self.pairs.values():
            pair._change_masks(lambda mask: mask.index_select(0, beam_idx.to(mask.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        for pair in self.pairs.values():
            pair._change_masks(lambda mask: mask.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        for pair in self.pairs.values():
            pair._change_masks(lambda mask: mask[indices])
