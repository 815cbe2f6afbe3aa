"""Loading and saving of several auxiliaries on one base: members in their own folders, and one pointer to the base."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig, PreTrainedModel

from . import saving
from .auxiliary import AuxiliaryForCausalLM
from .ensemble_config import AuxiliaryEnsembleConfig
from .group_config import AuxiliaryGroupConfig

if TYPE_CHECKING:
    from .members import MembersOnFrozenBase

MEMBERS = "members"
ConfigOfMembers = AuxiliaryEnsembleConfig | AuxiliaryGroupConfig
_POINTER = ("base_name_or_path", "base_revision", "base_options")


def is_trained(member: AuxiliaryForCausalLM) -> bool:
    """Whether a weight of a member, beside the base's, requires a gradient."""
    own = (part for name, part in member.named_children() if name != "base")
    return any(weight.requires_grad for part in own for weight in part.parameters())


def keys_kept_elsewhere(model: MembersOnFrozenBase) -> set[str]:
    """Of a state dict, what loads from other files than its folder's own: all but the trained members'."""
    prefixes = {f"{MEMBERS}.{name}.": one for name, one in model.members.items()}
    base = model.base.state_dict().keys()
    keys = {f"{prefix}base.{key}" for prefix in ("", *prefixes) for key in base}
    for prefix, one in prefixes.items():
        if not is_trained(one):
            keys |= {prefix + key for key in one.state_dict() if key not in one._unread_keys}
    return keys


def _unread_keys(model: MembersOnFrozenBase) -> set[str]:
    return {f"{MEMBERS}.{name}.{key}" for name, one in model.members.items() for key in one._unread_keys}


# -- the pointer -------------------------------------------------------------------------------------------------------


def take_pointer(config: ConfigOfMembers, members: list[AuxiliaryForCausalLM]) -> None:
    """Makes the pointer that of the first member that has one; all of them have the same base."""
    known = next((one.config for one in members if one.config.base_name_or_path), members[0].config)
    for name in _POINTER:
        setattr(config, name, getattr(known, name))


def _give_pointer(config: ConfigOfMembers, members: list[AuxiliaryForCausalLM], replaces: bool) -> None:
    """Makes the pointers of members that have none (or of all) this one."""
    for one in members:
        if replaces or not one.config.base_name_or_path:
            for name in _POINTER:
                setattr(one.config, name, getattr(config, name))


# -- save --------------------------------------------------------------------------------------------------------------


def save(
    model: MembersOnFrozenBase,
    write: Callable[..., None],
    folder: str | os.PathLike[str],
    save_base: bool,
    state_dict: dict[str, Any] | None,
    kwargs: dict[str, Any],
) -> None:
    """Writes beside the folder's own files and moves them in, the configuration last.

    write   `PreTrainedModel.save_pretrained` of the model
    """
    config, members = model.config, dict(model.members.items())
    saving.check_can_save(model, save_base, kwargs)
    for one in members.values():
        saving.check_adapters(one, save_base)
    saving.check_target(os.fspath(folder), config, save_base, (MEMBERS,))
    if state_dict is None:
        state_dict = model.state_dict()
    config.base_is_saved = save_base
    config.frozen_members = [name for name, one in members.items() if not is_trained(one)]
    if not saving.is_sharded(model.base):  # else it is as it was when all ranks joined the models
        config.base_fingerprint = saving.fingerprint(model.base)
    model.base.config.dtype = model.base.dtype
    _give_pointer(config, list(members.values()), replaces=False)
    elsewhere = keys_kept_elsewhere(model) | _unread_keys(model)
    own = {key: value for key, value in state_dict.items() if key not in elsewhere}
    # a Trainer loads these by their names in the model, not by those that a family's files have
    own_kwargs = {**kwargs, "save_original_format": False}

    def write_all(new: str | os.PathLike[str]) -> None:
        write(new, state_dict=own, **own_kwargs)
        for name, one in members.items():
            prefix = f"{MEMBERS}.{name}."
            weights = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
            saving.write_folder(one, os.path.join(new, MEMBERS, name), weights, kwargs)

    if not kwargs.get("is_main_process", True):
        write_all(os.fspath(folder))
        return
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as new:
        write_all(new)
        if save_base:
            model.base.save_pretrained(os.path.join(new, saving.BASE_FOLDER))
        saving.move_in(new, os.fspath(folder), (MEMBERS,))


# -- load --------------------------------------------------------------------------------------------------------------


def load(
    folder: str | os.PathLike[str],
    config: PretrainedConfig | None,
    kind: type[MembersOnFrozenBase],
    *,
    base: PreTrainedModel | str | None,
    base_kwargs: dict[str, Any] | None,
    check_base: bool,
    **kwargs: Any,
) -> tuple[Any, PreTrainedModel, dict[str, AuxiliaryForCausalLM]]:
    """(config, base, members) of a saved folder of a kind; arguments as for `from_pretrained`."""
    where = saving.hub_options(kwargs)
    if config is None:
        config = kind.config_class.from_pretrained(folder, **where)
    if not isinstance(config, kind.config_class):
        raise TypeError(f"config must be an {kind.config_class.__name__}, got {type(config).__name__}")
    if config.base_config is None or not config.member_names:
        raise OSError(f"{folder} must hold the configuration of an {kind.__name__}, found none")
    given, base_model = saving.load_base(folder, config, base, base_kwargs, check_base, kwargs)
    saving.point_to(config, given, base_model, check_base, base_kwargs)
    members = {}
    for name in config.member_names:
        inside = os.path.join(where.get("subfolder", ""), MEMBERS, name)
        options = {**kwargs, "subfolder": inside}
        members[name] = AuxiliaryForCausalLM.from_pretrained(folder, base=base_model, check_base=check_base, **options)
    _give_pointer(config, list(members.values()), replaces=True)
    return config, base_model, members
