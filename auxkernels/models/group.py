"""Several auxiliaries that are trained beside each other on one frozen base, each for a loss of its own."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from . import auxiliary_inputs as reading
from . import members_saving, saving, sums
from .auxiliary import AuxiliaryForCausalLM
from .base_states import given_states
from .cache_argument import CACHE_NAMES
from .ensemble_config import check_known, check_names
from .frozen_base import Call, Given
from .group_config import AuxiliaryGroupConfig
from .members import MembersOnFrozenBase
from .sums import AuxiliaryCausalLMOutput, Sum, with_router_loss

_INSTEAD = "a group has losses alone: call a member, or join them as an AuxiliaryEnsembleForCausalLM"
# arguments of a single auxiliary that ask for what a group does not have, and values that do not ask for it
_OF_LOGITS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(CACHE_NAMES, (None,)),
    "use_cache": (None, False),
    "logits_to_keep": (None, 0),
    "skip_logits": (None, True),
    "output_hidden_states": (None, False),
    "token_statistics": (None,),
}


@dataclass
class AuxiliaryGroupOutput(ModelOutput):
    """What `AuxiliaryGroupForCausalLM` returns.

    loss      0-d, the sum of all losses: each member gets from it the gradient of its own
    losses    of each member by name, 0-d
    outputs   `AuxiliaryCausalLMOutput` of each member by name, without logits, caches and hidden states
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    outputs: dict[str, AuxiliaryCausalLMOutput] | None = None


class AuxiliaryGroupForCausalLM(MembersOnFrozenBase, PreTrainedModel):
    """K auxiliaries on one frozen base, trained by one pass, each for its own loss: `from_members`, `from_pretrained`.

    base      the frozen model: its trunk runs once (or not at all, with base_hidden_states), and its head's product of
              a chunk of rows is made once for all members with logits of their own and the same ignored positions
    members   `AuxiliaryForCausalLM`s of that base by their names, with heads, trunk layers, prefixes, scales, dtypes
              and label smoothing of their own; frozen ones (`requires_grad_(False)`) have a loss and no gradient
    Members know nothing of each other: the loss of each and its gradients are those of its own `forward`, to the bit,
    on the same machine and without dropout. They are saved, loaded and called by themselves, or their logits are added
    with a scale for each member and text: `AuxiliaryEnsembleForCausalLM.from_members(group.base, dict(group.members))`.
    """

    config_class = AuxiliaryGroupConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: AuxiliaryGroupConfig,
        base: PreTrainedModel | None = None,
        members: Mapping[str, AuxiliaryForCausalLM] | None = None,
    ):
        if base is None or not members:
            raise ValueError(
                "AuxiliaryGroupForCausalLM needs its base and members, got a configuration alone: use from_members or "
                "from_pretrained, which never make a base of random weights"
            )
        super().__init__(config)
        self._take_members(base, members)

    @classmethod
    def from_members(
        cls, members: Mapping[str, AuxiliaryForCausalLM], *, frozen: Iterable[str] = ()
    ) -> AuxiliaryGroupForCausalLM:
        """Joins members, which are taken, not copied. They share their base as one object.

        members   by name (letters, digits, "_", "-")
        frozen    names of members that are not trained; a member whose weights need no gradients is one anyway
        Raises    TypeError, ValueError: names, no members, other models, bases that differ, one model twice
        """
        if not isinstance(members, Mapping):
            raise TypeError(f"members must be a dict of models by name, got {type(members).__name__}")
        names, frozen = check_names(members), list(frozen)
        check_known("frozen", frozen, names)
        for name, one in members.items():
            if not isinstance(one, AuxiliaryForCausalLM):
                raise TypeError(f"members[{name!r}] must be an AuxiliaryForCausalLM, got {type(one).__name__}")
        base = members[names[0]].base
        config = AuxiliaryGroupConfig(base.config, member_names=names, frozen_members=frozen)
        members_saving.take_pointer(config, list(members.values()))
        return cls(config, base, members)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        base: PreTrainedModel | str | None = None,
        base_kwargs: dict[str, Any] | None = None,
        check_base: bool = True,
        config: AuxiliaryGroupConfig | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Loads what `save_pretrained` wrote, in eval mode: the base once, and the members on it.

        Arguments and errors as in `AuxiliaryForCausalLM.from_pretrained`; **kwargs are those of all models.
        """
        config, base_model, members = members_saving.load(
            folder, config, cls, base=base, base_kwargs=base_kwargs, check_base=check_base, **kwargs
        )
        model = cls(config, base_model, members).eval()
        model.config.name_or_path = os.fspath(folder)
        return (model, {problem: set() for problem in saving.PROBLEMS}) if output_loading_info else model

    @classmethod
    def can_generate(cls) -> bool:
        return False

    def generate(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises ValueError: members have no common logits."""
        raise ValueError(f"generate must not be called on {type(self).__name__}: {_INSTEAD}")

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | Mapping[str, Tensor] | None = None,
        aux_input_ids: Tensor | Mapping[str, Tensor] | None = None,
        aux_attention_mask: Tensor | Mapping[str, Tensor] | None = None,
        num_items_in_batch: int | Tensor | Mapping[str, int | Tensor] | None = None,
        base_hidden_states: Tensor | None = None,
        base_trunk_states: Tensor | Mapping[int, Tensor] | None = None,
        **kwargs: Any,
    ) -> AuxiliaryGroupOutput:
        """The losses of labels, which must be given. No [N, V] tensor is made.

        As `AuxiliaryForCausalLM.forward`, but for:
        labels              one for all members, or a dict of those of each by name; keyword shift_labels likewise
        aux_input_ids       one for all members, or a dict for those that have a prefix; aux_attention_mask likewise
        num_items_in_batch  one for all members, or a dict for each by name
        base_trunk_states   of the layer that members read; a dict by layer where they read several
        """
        for name, harmless in _OF_LOGITS.items():
            given = kwargs.pop(name, None)
            if isinstance(given, Tensor) or given not in harmless:
                raise ValueError(f"{name} must not be given: {_INSTEAD}")
        states = given_states(
            self.base, self._trunk_layers, input_ids, base_hidden_states, base_trunk_states, {}, kwargs
        )
        shift_labels = kwargs.pop("shift_labels", None)
        if labels is None and shift_labels is None:
            raise ValueError(f"labels must be given: {_INSTEAD}")
        targets: list[Any]
        if shift_labels is None:
            targets = [reading.shifted(one) for one in self._of_each("labels", labels)]
        else:
            targets = self._of_each("shift_labels", shift_labels)
        num_items = self._of_each("num_items_in_batch", num_items_in_batch)
        reading.check_inputs(input_ids, targets[0], num_items[0], kwargs)
        for target in targets[1:]:
            reading.check_labels(target, targets[0].shape)
        prefixes, masks = (
            self._of_members(name, one if isinstance(one, Mapping) or one is None else dict.fromkeys(self.members, one))
            for name, one in (("aux_input_ids", aux_input_ids), ("aux_attention_mask", aux_attention_mask))
        )
        self._check_trained()
        wants_balance = self._wants_balance(kwargs)
        call = Call(input_ids, attention_mask, position_ids, None, None, False, 0, True, None, None, base_states=states)
        scales = [one.config.aux_scale for one in self._auxiliaries]
        ran = self._run(
            call,
            [Given(*each) for each in zip(scales, prefixes, masks, strict=True)],
            None,
            False,
            wants_balance,
            kwargs,
        )
        found = sums.losses(
            [Sum(self.base, ran.h_base, [term], term.model.config.num_valid_tokens) for term in ran.terms],
            targets,
            [one.config.label_smoothing if one.training else 0.0 for one in self._auxiliaries],
            num_items,
            self.training,
        )
        outputs = {
            name: AuxiliaryCausalLMOutput(**with_router_loss(numbers, router))
            for name, numbers, router in zip(self.members, found, ran.router_losses, strict=True)
        }
        losses: dict[str, Any] = {name: one.loss for name, one in outputs.items()}
        first, *others = losses.values()
        total = sum((one.to(first.device) for one in others), first)
        return AuxiliaryGroupOutput(loss=total, losses=losses, outputs=outputs)

    def _of_each(self, argument: str, given: Any) -> list[Any]:
        """What each member is given: the same, or by name."""
        if not isinstance(given, Mapping):
            return [given] * len(self.members)
        check_known(argument, given, list(self.members))
        missing = [name for name in self.members if name not in given]
        if missing:
            raise ValueError(f"{argument} must be given for each member, got none for {missing[0]!r}")
        return [given[name] for name in self.members]
