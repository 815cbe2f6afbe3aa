"""The configuration of `AuxiliaryForCausalLM` as vLLM reads it."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PretrainedConfig

from ..models import AuxiliaryConfig as _AuxiliaryConfig


class AuxiliaryConfig(_AuxiliaryConfig):
    """That of a folder; vLLM takes sizes of attention, dtype and token ids of its text config, which is the base's.

    check_base   whether the base's weights must be those of the folder's fingerprint. An engine's hf_overrides can
                 set this, `aux_scale`, `base_name_or_path` and `base_revision`
    """

    def __init__(self, *args: Any, check_base: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.check_base = check_base

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PretrainedConfig:
        """A copy of the base's, with the shorter of both models' texts and the vocabulary that both have.

        So vLLM refuses longer texts and, where it has a tokenizer, other tokens.
        """
        base, aux = getattr(self, "base_config", None), getattr(self, "aux_config", None)
        if base is None or aux is None:  # `PretrainedConfig.__init__` asks before they are set
            return self
        text = copy.deepcopy(base.get_text_config())
        if isinstance(getattr(self, "max_position_embeddings", None), int):
            text.max_position_embeddings = self.max_position_embeddings
        if getattr(self, "num_valid_tokens", None) is not None:
            text.vocab_size = self.num_valid_tokens
        return text
