"""Whether two models' vocabularies can be added: widths of their heads, and the maps of their tokenizers."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer
from transformers.utils import cached_file


def shared_width(base_width: int, aux_width: int, policy: str) -> int:
    """How many leading columns count: all ("strict"), or the narrower head's ("pad").

    Raises ValueError for unequal widths under "strict".
    """
    if policy == "strict" and base_width != aux_width:
        raise ValueError(
            f"base and aux must have equally wide heads under vocab_policy='strict', got {base_width} and {aux_width}: "
            "where the wider one's tail is padding, pass vocab_policy='pad'"
        )
    return min(base_width, aux_width)


def _vocabulary(name: str, kwargs: dict[str, Any]) -> dict[str, int] | None:
    """Token -> id of the tokenizer saved under a name; None where there is none."""
    try:
        cached_file(name, "tokenizer_config.json", **kwargs)  # without files, some architectures make an empty one
        return AutoTokenizer.from_pretrained(name, **kwargs).get_vocab()
    except (OSError, ValueError, KeyError, ImportError):
        return None


def check_tokenizers(base: str, aux: str, base_kwargs: dict[str, Any], aux_kwargs: dict[str, Any]) -> None:
    """Raises ValueError where both names have a tokenizer and an id below both lengths means different tokens.

    base_kwargs, aux_kwargs   for `AutoTokenizer.from_pretrained`
    """
    base_ids, aux_ids = _vocabulary(base, base_kwargs), _vocabulary(aux, aux_kwargs)
    if base_ids is None or aux_ids is None:
        return
    of_base, of_aux = ({i: token for token, i in vocabulary.items()} for vocabulary in (base_ids, aux_ids))
    for i in sorted(of_base.keys() & of_aux.keys()):
        if of_base[i] != of_aux[i]:
            raise ValueError(
                f"base and aux must share their tokens, got {of_base[i]!r} in {base} and {of_aux[i]!r} in {aux} for "
                f"token {i}: logits of different tokens cannot be added"
            )
