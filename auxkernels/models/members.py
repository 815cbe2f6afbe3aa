"""Several auxiliaries on one frozen base, by name: what an ensemble and a group of them have in common."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import auxiliary_inputs as reading
from . import members_saving
from .auxiliary import AuxiliaryForCausalLM
from .base_states import Layers
from .config_fields import describe_as
from .ensemble_config import check_known
from .frozen_base import Given, OnFrozenBase
from .members_saving import MEMBERS, ConfigOfMembers, is_trained

if TYPE_CHECKING:
    from transformers.utils import ModelOutput
    from typing_extensions import Self


class MembersOnFrozenBase(OnFrozenBase):
    """Mixed in before `PreTrainedModel`.

    base      the frozen model, which runs once for all
    members   `AuxiliaryForCausalLM`s of that base by their names, each trained or frozen: a frozen one is in eval mode
              and run under no_grad
    """

    config: ConfigOfMembers
    members: Mapping[str, AuxiliaryForCausalLM]

    def _take_members(self, base: PreTrainedModel, members: Mapping[str, AuxiliaryForCausalLM]) -> None:
        """Makes the models this one's, and describes them in its configuration. ValueError where they do not fit."""
        check_members(base, members)
        config = self.config
        self.base = base
        self.members = nn.ModuleDict(members)  # type: ignore[assignment]
        auxiliaries = self._auxiliaries
        config.base_config, config.base_fingerprint = base.config, auxiliaries[0].config.base_fingerprint
        config.vocab_size = auxiliaries[0].config.vocab_size
        describe_as(config, base.config, *(one.aux.config for one in auxiliaries))
        self.post_init()
        for name, one in members.items():  # transformers looks for tied weights in direct children alone
            tied = {key: to for key, to in one.all_tied_weights_keys.items() if key.startswith("aux.")}
            prefix = f"{MEMBERS}.{name}."
            self.all_tied_weights_keys.update({prefix + key: prefix + to for key, to in tied.items()})
        self._is_pointer_checked = False
        for name in config.frozen_members:
            self.members[name].requires_grad_(False)
        self._freeze_base()
        self.train(any(one.training for one in auxiliaries))

    @property
    def _auxiliaries(self) -> list[AuxiliaryForCausalLM]:
        return list(self.members.values())

    # -- saving --------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        save_base: bool = False,
        state_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Saves the configuration, and each member in "members/<name>/" as by its own `save_pretrained`.

        save_base   also saves the base, in the folder's "base/"; members by themselves are then loaded with base=
        Members that are trained are in the folder's model.safetensors once more, from which a Trainer resumes. The
        configuration is written last, so that an interrupted save leaves no folder that loads.
        Raises ValueError as `AuxiliaryForCausalLM.save_pretrained`.
        """
        members_saving.save(self, super().save_pretrained, save_directory, save_base, state_dict, kwargs)

    @property
    def _keys_to_ignore_on_save(self) -> set[str]:
        """Of the folder's own weights, which are those of trained members."""
        return members_saving.keys_kept_elsewhere(self)

    @_keys_to_ignore_on_save.setter
    def _keys_to_ignore_on_save(self, keys: set[str]) -> None:
        """Nothing: transformers sets what it has found in direct children."""

    # -- training ------------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for one in self._auxiliaries:
            if not is_trained(one):
                one.eval()
        return self

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        for one in self._auxiliaries:  # the base keeps no activations, nor do members that are frozen
            if is_trained(one):
                one._set_gradient_checkpointing(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """Of the first member that is trained, or of the first."""
        trained = [one for one in self._auxiliaries if is_trained(one)]
        return (trained or self._auxiliaries)[0].get_input_embeddings()

    # -- forward -------------------------------------------------------------------------------------------------------

    def _of_members(self, argument: str, given: Mapping[str, Tensor] | None) -> list[Tensor | None]:
        if given is None:
            return [None] * len(self.members)
        if not isinstance(given, Mapping):
            raise TypeError(f"{argument} must be a dict of tensors by members' names, got {type(given).__name__}")
        check_known(argument, given, list(self.members))
        return [given.get(name) for name in self.members]

    def _aux_text(self, index: int, text: reading.Text, given: Given) -> reading.AuxText:
        try:
            return super()._aux_text(index, text, given)
        except ValueError as error:
            raise ValueError(f"of the member {list(self.members)[index]!r}: {error}") from error

    def _run_one(
        self,
        one: AuxiliaryForCausalLM,
        text: reading.Text,
        own: reading.AuxText,
        use_cache: bool,
        states: Layers | None,
        kwargs: dict[str, Any],
    ) -> ModelOutput:
        needs_grad = torch.is_grad_enabled() and is_trained(one)
        if one.aux.training and not is_trained(one):  # it was frozen after `train()`
            one.eval()
        with torch.set_grad_enabled(needs_grad):
            return super()._run_one(one, text, own, use_cache, states, kwargs)


def check_members(base: PreTrainedModel, members: Mapping[str, AuxiliaryForCausalLM]) -> None:
    """ValueError for members of another base object, and for one model under two names."""
    seen: dict[int, str] = {}
    for name, one in members.items():
        if one.base is not base:
            raise ValueError(
                f"members must share the base as one object, members[{name!r}] has another: join or load it with "
                "base=base, or give the folder that it was saved to"
            )
        if id(one.aux) in seen:
            raise ValueError(
                f"members must be different models, {seen[id(one.aux)]!r} and {name!r} are one: give it once, with the "
                "sum of their scales where they are added"
            )
        seen[id(one.aux)] = name
