"""Key-value caches of the kinds that `generate` knows by name (cache_implementation), for one model and for a pair."""

from __future__ import annotations

from typing import Any

from transformers import Cache, DynamicCache, PreTrainedModel, QuantizedCache, StaticCache
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS

from .causal_lm import has_cache
from .modules import device_of
from .paired_cache import PairedCache

_DYNAMIC = (None, "dynamic", "dynamic_full")
_KINDS = ("dynamic", "offloaded", "static", "offloaded_static", "quantized")
_GROWING_MASKS = ("bloom",)


def is_dynamic(kind: str | None) -> bool:
    """Whether a cache of that kind is the one that is made where none is asked for."""
    return kind in _DYNAMIC


def is_static(kind: str | None) -> bool:
    """Whether a cache of that kind is made for a number of tokens."""
    return kind in ALL_STATIC_CACHE_IMPLEMENTATIONS


def new_cache(
    model: PreTrainedModel,
    kind: str | None = None,
    *,
    max_cache_len: int | None = None,
    cache_config: dict[str, Any] | None = None,
) -> Cache:
    """An empty cache of one model.

    kind            a cache_implementation; None: "dynamic". "offloaded" and "offloaded_static" keep all layers but the
                    one in use on the CPU, where those of a model on the CPU are anyway
    max_cache_len   of a static one: how many tokens it holds
    cache_config    of a quantised one: arguments of `QuantizedCache` but its config; without a backend: "quanto"
    Raises          ValueError: an unknown kind, options of another kind, a model without such a cache
    """
    if not (is_dynamic(kind) or is_static(kind) or kind in _KINDS):
        raise ValueError(f"cache_implementation must be one of {', '.join(_KINDS)}, got {kind!r}")
    if is_static(kind) != (max_cache_len is not None):
        what = "a positive number of tokens" if is_static(kind) else "None"
        raise ValueError(f"max_cache_len must be {what} for cache_implementation={kind!r}, got {max_cache_len}")
    if cache_config is not None and kind != "quantized":
        raise ValueError(f"cache_config must be None for cache_implementation={kind!r}, got {cache_config}")
    if not has_cache(model):
        raise ValueError(f"use_cache must be False: {type(model).__name__} has no cache that can be paired")
    offloading = str(kind).startswith("offloaded") and device_of(model).type != "cpu"
    if max_cache_len is not None:
        return _static_cache(model, max_cache_len, offloading)
    if kind == "quantized":
        return _quantized_cache(model, **(cache_config or {}))
    return DynamicCache(config=model.config, offloading=offloading)


def _static_cache(model: PreTrainedModel, max_cache_len: int, offloading: bool) -> StaticCache:
    if max_cache_len < 1:
        raise ValueError(f"max_cache_len must be a positive number of tokens, got {max_cache_len}")
    refusal = f"cache_implementation must be 'dynamic' for {type(model).__name__}"
    if model.config.model_type in _GROWING_MASKS:
        raise ValueError(f"{refusal}: it reads masks as long as the cache, which a static one's are not")
    try:
        return StaticCache(config=model.config, max_cache_len=max_cache_len, offloading=offloading)
    except KeyError as error:
        raise ValueError(f"{refusal}: layers of type {error} have no static cache") from error


def _quantized_cache(model: PreTrainedModel, backend: str = "quanto", **options: Any) -> QuantizedCache:
    try:
        return QuantizedCache(backend=backend, config=model.config, **options)
    except ValueError as error:
        raise ValueError(f"cache_implementation must not be 'quantized' for {type(model).__name__}: {error}") from error


def paired_cache(
    base: PreTrainedModel,
    aux: PreTrainedModel,
    kind: str | None,
    max_cache_len: int | None,
    prefix_length: int,
    cache_config: dict[str, Any] | None,
) -> PairedCache:
    """Two empty caches of one kind; arguments as of `AuxiliaryForCausalLM.new_cache`."""
    lengths = max_cache_len, None if max_cache_len is None else max_cache_len + prefix_length
    caches = (
        new_cache(model, kind, max_cache_len=length, cache_config=cache_config)
        for model, length in zip((base, aux), lengths, strict=True)
    )
    return PairedCache(*caches, max_lengths=lengths)
