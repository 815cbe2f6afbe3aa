"""The key-value cache of two models that read one text, one of them behind a prefix of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig, QuantizedCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, LinearAttentionCacheLayerMixin, StaticLayer


class PairedCache(Cache):
    """A base model's cache and an auxiliary model's, kept at the same text.

    base, aux     their caches; the auxiliary's holds `prefix_length` more tokens: the prefix that only it reads.
    prefix_mask   [batch, prefix_length], non-zero where the prefix counts; None: no prefix.
    arranged_mask [batch, n], of the first n tokens in the auxiliary's cache where they were read in another order than
                  they stand (padding first); None: as they stand.
    is_complete   False from the start of a call to its end: a call that failed leaves some layers behind others.
    max_lengths   how many tokens base and aux hold, where they are of a fixed size; None: as many as their layers say.
    Lengths and masks are the base's, because generation asks for the text's. What changes the batch or the length
    (reorder, repeat, select, crop, reset) is done to both, and the prefix stays. Static and quantised caches can be
    reordered and reset alone, and offloaded ones offload on their own.
    """

    def __init__(self, base: Cache, aux: Cache, *, max_lengths: tuple[int | None, int | None] = (None, None)):
        self.base = base
        self.aux = aux
        self.max_lengths = max_lengths
        self.prefix_mask: Tensor | None = None
        self.arranged_mask: Tensor | None = None
        self.is_complete = True
        self.layer_class_to_replicate = None
        self.offloading = False

    @classmethod
    def of_configs(cls, base_config: PretrainedConfig, aux_config: PretrainedConfig) -> PairedCache:
        """Empty and growing."""
        return cls(DynamicCache(config=base_config), DynamicCache(config=aux_config))

    @property
    def layers(self) -> list[Any]:
        """Of both: what `Cache` does to its layers is done to all of them."""
        return [*self.base.layers, *self.aux.layers]

    @property
    def prefix_length(self) -> int:
        return 0 if self.prefix_mask is None else self.prefix_mask.shape[1]

    @property
    def is_compileable(self) -> bool:
        return False  # generation would make one four-dimensional mask for two models

    @property
    def is_sliding(self) -> list[bool]:
        return self.base.is_sliding

    def __len__(self) -> int:
        return len(self.base)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(base={self.base}, aux={self.aux}, prefix_length={self.prefix_length})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return _number(self.base.get_seq_length(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.base.get_mask_sizes(query_length, layer_idx)

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("PairedCache holds two models' caches: update .base or .aux")

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the text's last tokens from both, given what `Cache.crop` of this transformers takes.

        Raises   ValueError where a layer holds a recurrent state, in which the removed tokens would stay, or is static.
        """
        if any(isinstance(layer, LinearAttentionCacheLayerMixin) and not layer.is_croppable for layer in self.layers):
            raise ValueError("past_key_values hold a recurrent state, which cannot take back the tokens it has read")
        check_takes("crop", self)
        before = self.base.get_seq_length()
        self.base.crop(tokens_to_remove)
        self.aux.crop(self.base.get_seq_length() - before)

    def reset(self) -> None:
        """Empties both."""
        super().reset()
        for layer in self.layers:
            _drop_states(layer)
        self.prefix_mask = self.arranged_mask = None
        self.is_complete = True

    def check_in_step(self) -> None:
        """Raises ValueError unless both caches hold the same text, and the auxiliary's its prefix."""
        text, aux = self.get_seq_length(), _number(self.aux.get_seq_length())
        if not self.is_complete or (aux != text + self.prefix_length and (text or aux)):
            raise ValueError(
                f"past_key_values must hold one text, got {text} tokens for base and {aux} for aux behind a prefix of "
                f"{self.prefix_length}: a call with this cache failed, begin again with model.new_cache()"
            )

    def check_room(self, num_new: int, prefix_length: int) -> None:
        """Raises ValueError where caches of a fixed size are too short for so much more text behind such a prefix."""
        needed = self.get_seq_length() + num_new
        caches = (("base", self.base, 0), ("aux", self.aux, prefix_length))
        for (name, cache, before), given in zip(caches, self.max_lengths, strict=True):
            sizes = [one.max_cache_len for one in cache.layers if isinstance(one, StaticLayer) and not one.is_sliding]
            limit = min([*sizes, *([] if given is None else [given])], default=None)
            if limit is not None and before + needed > limit:
                raise ValueError(
                    f"past_key_values must have room for {before + needed} tokens of {name}, got {limit}: make them "
                    f"with new_cache(..., max_cache_len={needed} or more, prefix_length={prefix_length})"
                )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._change_masks(lambda mask: mask.index_select(0, beam_idx.to(mask.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        check_takes("batch_repeat_interleave", self)
        super().batch_repeat_interleave(repeats)
        self._change_masks(lambda mask: mask.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        check_takes("batch_select_indices", self)
        super().batch_select_indices(indices)
        self._change_masks(lambda mask: mask[indices])

    def _change_masks(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.prefix_mask is not None:
            self.prefix_mask = change(self.prefix_mask)
        if self.arranged_mask is not None:
            self.arranged_mask = change(self.arranged_mask)


def check_takes(method: str, cache: Cache) -> None:
    """ValueError where a cache cannot be changed by a method of that name (crop: to take drafts back), before it is."""
    parts = (cache.base, cache.aux) if isinstance(cache, PairedCache) else (cache,)
    kinds = {type(part).__name__ for part in parts if isinstance(part, QuantizedCache)}  # would leave what is quantised
    kinds |= {type(layer).__name__ for part in parts for layer in part.layers if not _takes(layer, method)}
    if kinds:
        raise ValueError(
            f"past_key_values must be dynamic for {method} (drafts need it): {', '.join(sorted(kinds))} cannot"
        )


def _takes(layer: object, method: str) -> bool:
    if isinstance(layer, StaticLayer):
        return False
    is_of_states = isinstance(layer, LinearAttentionCacheLayerMixin)  # beside them it may have keys, which do
    return hasattr(LinearAttentionCacheLayerMixin if is_of_states else layer, method)


def _number(length: int | Tensor) -> int:
    """A length that is the caller's own: static layers give the tensor that they count on in."""
    return int(length) if isinstance(length, Tensor) else length


def _drop_states(layer: CacheLayerMixin) -> None:
    """Empties a layer that grows by concatenation, which `reset` zeroes and leaves as long as it was.

    transformers 5.17 does; what is read later would follow zeroed tokens, and no error would say so.
    """
    if not isinstance(layer, DynamicLayer):
        return
    layer.keys = layer.values = None
    layer.is_initialized = False
    if hasattr(layer, "indexer_keys"):  # of sparse attention
        layer.indexer_keys, layer.is_indexer_initialized = None, False
