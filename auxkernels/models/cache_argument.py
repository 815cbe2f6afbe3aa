"""What transformers calls a model's cache of keys and values: `past_key_values`, and since its release 5.24 `cache`.

Composites take both as arguments, with any release. What they pass on, and what they return, has the release's name,
because transformers' generation looks for that one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
CACHE_NAMES = ("past_key_values", "cache")

Forward = TypeVar("Forward", bound=Callable[..., Any])


def renamed_cache(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    """Arguments of a call, with the cache under one name. TypeError where two are given."""
    caches = [arguments[one] for one in CACHE_NAMES if arguments.get(one) is not None]
    if len(caches) > 1:
        raise TypeError("cache and past_key_values are one argument: one of them must be given, got both")
    others = {one: value for one, value in arguments.items() if one not in CACHE_NAMES}
    return {**others, name: caches[0]} if caches else others


def takes_cache(forward: Forward) -> Forward:
    """A `forward` with an argument `past_key_values` that is taken as `cache` too."""

    @functools.wraps(forward)
    def with_one_name(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **(renamed_cache(kwargs, "past_key_values") if "cache" in kwargs else kwargs))

    return with_one_name  # type: ignore[return-value]
