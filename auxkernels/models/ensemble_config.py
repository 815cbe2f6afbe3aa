"""Configuration of `AuxiliaryEnsembleForCausalLM`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import nn
from transformers import AutoConfig, PretrainedConfig

from .. import checks
from .config_fields import describe_as
from .configuration import AuxiliaryConfig, as_config

_NAME = re.compile(r"[A-Za-z0-9_-]+")


def check_names(names: Iterable[str]) -> list[str]:
    """The names of members, which are those of modules and folders too. Raises ValueError."""
    names = list(names)
    if not names:
        raise ValueError("members must hold at least one auxiliary, got none")
    taken = nn.ModuleDict()
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"members must have names of letters, digits, '_' and '-', got {name!r}")
        if hasattr(taken, name):
            raise ValueError(f"members must not have the name {name!r}, which torch.nn.ModuleDict uses itself")
    if len({name.lower() for name in names}) < len(names):
        raise ValueError(f"members must have names that differ beyond upper and lower case, got {', '.join(names)}")
    return names


def check_known(argument: str, given: Iterable[str], names: list[str]) -> None:
    """ValueError where a name is none of the members'."""
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ValueError(f"{argument} must name members ({', '.join(names)}), got {unknown[0]!r}")


def check_floor(floor: float | None) -> float | None:
    """A number in (0, 1], or None, which 0 is too. Raises TypeError, ValueError."""
    return None if floor is None else checks.real_number("base_floor", floor, minimum=0.0, maximum=1.0) or None


class AuxiliaryEnsembleConfig(PretrainedConfig):
    """Configuration of `AuxiliaryEnsembleForCausalLM`. Those of the members are in their own folders.

    base_config       PretrainedConfig of the base, or its dict with model_type
    member_names      in their order, which is that of scales in a tensor
    aux_scales        of each member, by name: what its logits are multiplied by
    frozen_members    names of those that are not trained
    base_scale        what the base's logits are multiplied by
    base_floor        alpha in [0, 1]; 0 or None: no floor. Tokens less likely than alpha times the likeliest, under the
                      base alone and unscaled, get logits of -inf; losses have no floor
    vocab_size, num_valid_tokens, label_smoothing, skip_logits_in_evaluation, base_name_or_path, base_revision,
    base_fingerprint, base_options, base_is_saved, hidden_size, ...   as in `AuxiliaryConfig`; a member's own
                      label_smoothing and skip_logits_in_evaluation count only where it is called alone
    """

    model_type = "auxiliary_ensemble"
    auto_map: ClassVar[dict[str, Any]] = {}
    sub_configs: ClassVar[dict[str, Any]] = {"base_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = AuxiliaryConfig.keys_to_ignore_at_inference

    def __init__(
        self,
        base_config: PretrainedConfig | dict[str, Any] | None = None,
        *,
        member_names: Iterable[str] = (),
        aux_scales: Mapping[str, float] | None = None,
        frozen_members: Iterable[str] = (),
        base_scale: float = 1.0,
        base_floor: float | None = None,
        vocab_size: int | None = None,
        num_valid_tokens: int | None = None,
        label_smoothing: float = 0.0,
        skip_logits_in_evaluation: bool = False,
        base_name_or_path: str | None = None,
        base_revision: str | None = None,
        base_fingerprint: dict[str, Any] | None = None,
        base_options: dict[str, Any] | None = None,
        base_is_saved: bool = False,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        member_names, frozen_members = list(member_names), list(frozen_members)
        if member_names:
            check_names(member_names)
        aux_scales = dict(aux_scales or {})
        check_known("aux_scales", aux_scales, member_names)
        check_known("frozen_members", frozen_members, member_names)
        # as Python's own numbers: JSON holds no others
        scales = {name: checks.real_number(f"aux_scales[{name!r}]", scale) for name, scale in aux_scales.items()}
        base_scale = checks.real_number("base_scale", base_scale)
        base_floor = check_floor(base_floor)
        label_smoothing = checks.real_number("label_smoothing", label_smoothing, minimum=0.0, maximum=1.0)
        super().__init__(**kwargs)
        self.base_config = as_config("base_config", base_config)
        self.member_names = member_names
        self.aux_scales = {name: scales.get(name, 1.0) for name in member_names}
        self.frozen_members = [name for name in member_names if name in frozen_members]
        self.base_scale = base_scale
        self.base_floor = base_floor
        self.vocab_size = None if vocab_size is None else checks.integer("vocab_size", vocab_size)
        self.num_valid_tokens = (
            None if num_valid_tokens is None else checks.integer("num_valid_tokens", num_valid_tokens)
        )
        self.label_smoothing = label_smoothing
        self.skip_logits_in_evaluation = checks.boolean("skip_logits_in_evaluation", skip_logits_in_evaluation)
        self.base_name_or_path = base_name_or_path
        self.base_revision = base_revision
        self.base_fingerprint = base_fingerprint
        self.base_options = base_options
        self.base_is_saved = base_is_saved
        self.use_cache = use_cache
        if self.base_config is not None:
            describe_as(self, self.base_config)
