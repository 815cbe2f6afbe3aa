"""Configuration of `AuxiliaryGroupForCausalLM`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig

from .. import checks
from .config_fields import describe_as
from .configuration import as_config
from .ensemble_config import check_known, check_names


class AuxiliaryGroupConfig(PretrainedConfig):
    """Configuration of `AuxiliaryGroupForCausalLM`. What the losses need is in those of the members.

    base_config       PretrainedConfig of the base, or its dict with model_type
    member_names      in their order
    frozen_members    names of those that are not trained
    vocab_size, base_name_or_path, base_revision, base_fingerprint, base_options, base_is_saved, hidden_size, ...
                      as in `AuxiliaryConfig`
    """

    model_type = "auxiliary_group"
    auto_map: ClassVar[dict[str, Any]] = {}
    sub_configs: ClassVar[dict[str, Any]] = {"base_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["losses", "outputs"]

    def __init__(
        self,
        base_config: PretrainedConfig | dict[str, Any] | None = None,
        *,
        member_names: Iterable[str] = (),
        frozen_members: Iterable[str] = (),
        vocab_size: int | None = None,
        base_name_or_path: str | None = None,
        base_revision: str | None = None,
        base_fingerprint: dict[str, Any] | None = None,
        base_options: dict[str, Any] | None = None,
        base_is_saved: bool = False,
        **kwargs: Any,
    ) -> None:
        member_names, frozen_members = list(member_names), list(frozen_members)
        if member_names:
            check_names(member_names)
        check_known("frozen_members", frozen_members, member_names)
        super().__init__(**kwargs)
        self.base_config = as_config("base_config", base_config)
        self.member_names = member_names
        self.frozen_members = [name for name in member_names if name in frozen_members]
        self.vocab_size = None if vocab_size is None else checks.integer("vocab_size", vocab_size)
        self.base_name_or_path = base_name_or_path
        self.base_revision = base_revision
        self.base_fingerprint = base_fingerprint
        self.base_options = base_options
        self.base_is_saved = base_is_saved
        if self.base_config is not None:
            describe_as(self, self.base_config)
