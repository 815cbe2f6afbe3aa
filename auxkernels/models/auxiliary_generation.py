"""Generation with a base and an auxiliary: the auxiliary's arguments in every branch, and a cache for each."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .caches import paired_cache
from .mixins import Model
from .paired_cache import PairedCache
from .trunkless import check_has_trunk


class GenerationWithPairs(Model):
    """Mixed in before `OnFrozenBase`, for a model with `base`, `aux` and a `forward` that takes aux_*."""

    def generate(self, *args: Any, aux_scale: float | Tensor | None = None, **kwargs: Any) -> Any:
        """As of transformers, with the arguments of `forward` for the auxiliary.

        They hold in every branch: under guidance_scale also for the unconditional text, and an assistant_model gets
        them if it is one of this class. cache_implementation is one of `new_cache`.
        Raises ValueError for ways of generating that would leave them out: guidance with beams or drafts, token
        healing, early exit, continuous batching, methods that transformers has moved out; and for drafts with a cache
        that cannot give them back.
        """
        check_has_trunk(self.base, "generate")
        if isinstance(aux_scale, Tensor) and aux_scale.dim() == 0:
            aux_scale = aux_scale.item()  # beams repeat the rows of every tensor
        return super().generate(*args, aux_scale=aux_scale, **kwargs)

    def new_cache(
        self,
        cache_implementation: str | None = None,
        *,
        max_cache_len: int | None = None,
        prefix_length: int = 0,
        cache_config: dict[str, Any] | None = None,
    ) -> PairedCache:
        """An empty cache for both models, of a kind that `generate` knows.

        cache_implementation   None or "dynamic": grows. "static": of a fixed size. "offloaded", "offloaded_static": on
                               the CPU but for the layer in use. "quantized"
        max_cache_len          of a static one: how many tokens of text it holds
        prefix_length          of a static one: the auxiliary's has room for so many tokens of a prefix beside them
        cache_config           of a quantised one: arguments of transformers' `QuantizedCache`, with its backend
        Raises                 ValueError where a model has none of that kind, or none that can be paired (`has_cache`)
        """
        return paired_cache(self.base, self.aux, cache_implementation, max_cache_len, prefix_length, cache_config)

    def _cache_of_kind(self, kind: str | None, model_kwargs: dict[str, Any], **options: Any) -> PairedCache:
        prefix = model_kwargs.get("aux_input_ids")
        return self.new_cache(kind, prefix_length=0 if prefix is None else prefix.shape[1], **options)
