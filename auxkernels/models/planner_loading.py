"""Loading and saving of `PlannerForCausalLM`: the pointer to a frozen language model, and modules that a user gives.

transformers must not draw the weights of given modules anew, nor lose their buffers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import base_pointer, saving
from .planner_config import PlannerConfig

if TYPE_CHECKING:
    from .planner import PlannerForCausalLM

MARK = "_is_hf_initialized"


@contextmanager
def marked_as_initialized(*given: nn.Module | None) -> Iterator[None]:
    """While it lasts, transformers initializes no submodule of those given; then each gets back the mark it had."""
    before = [(module, vars(module).get(MARK)) for root in given if root is not None for module in root.modules()]
    for module, _ in before:
        setattr(module, MARK, True)
    try:
        yield
    finally:
        for module, mark in before:
            vars(module).pop(MARK, None) if mark is None else setattr(module, MARK, mark)


@contextmanager
def kept_buffers(root: nn.Module | None) -> Iterator[None]:
    """Gives the buffers that are not saved their values back afterwards, in their dtypes, where they were moved to.

    from_pretrained() replaces them by uninitialized memory, which only a model's own initialization would fill.
    """
    clones: dict[int, Tensor] = {}
    places: list[tuple[nn.Module, str, Tensor]] = []
    for module in () if root is None else root.modules():
        for name in module._non_persistent_buffers_set:
            value = module._buffers.get(name)
            if value is not None:
                clones.setdefault(id(value), value.detach().clone())  # a shared buffer stays shared
                places.append((module, name, value))
    yield
    moved: dict[tuple[int, torch.device], Tensor] = {}
    for module, name, value in places:
        buffer = module._buffers[name]
        assert buffer is not None, "it is replaced, not taken away"
        key = id(value), buffer.device
        if key not in moved:
            moved[key] = clones[id(value)].to(key[1])
        module._buffers[name] = moved[key]


# -- the pointer to a frozen language model ----------------------------------------------------------------------------


def language_model(given: PreTrainedModel | str, lm_kwargs: dict[str, Any] | None) -> PreTrainedModel:
    """A model as it is, or loaded by name or path."""
    if lm_kwargs or isinstance(given, (str, os.PathLike)):
        return saving.causal_lm("lm", given, dict(lm_kwargs or {}))
    return given


def point_to(
    config: PlannerConfig, lm: PreTrainedModel, given: PreTrainedModel | str, lm_kwargs: dict[str, Any] | None
) -> None:
    """Writes down where a language model comes from, and what it is now."""
    name = os.fspath(given) if isinstance(given, (str, os.PathLike)) else lm.config.name_or_path
    config.lm_name_or_path, config.lm_revision = saving.pointer(name), (lm_kwargs or {}).get("revision")
    config.lm_options = base_pointer.weight_options(lm, lm_kwargs or {})
    config.lm_fingerprint = saving.fingerprint(lm) if config.lm_name_or_path else None


def is_lm_saved(model: PlannerForCausalLM, save_lm: bool | None, folder: str | os.PathLike[str]) -> bool:
    """Whether the language model's weights are written too; None: where a pointer would not bring them back.

    Raises   ValueError where they are not wanted but needed, or where the folder is the language model's own.
    """
    name = model.config.lm_name_or_path
    if name and os.path.isdir(name) and os.path.realpath(name) == os.path.realpath(folder):
        raise ValueError(f"save_directory must be apart from the language model's own folder {name}")
    if save_lm:
        return True
    problem = _pointers_problem(model)
    if problem and save_lm is not None:
        raise ValueError(f"save_lm must be True for a language model that {problem}")
    return problem is not None


def not_saved(model: PlannerForCausalLM, folder: str | os.PathLike[str], options: dict[str, Any]) -> tuple[str, ...]:
    """Prefixes of the keys that save_pretrained does not write."""
    return () if is_lm_saved(model, options.get("save_lm"), folder) else ("lm.",)


def _pointers_problem(model: PlannerForCausalLM) -> str | None:
    config = model.config
    if not config.freeze_lm:
        return "is not frozen"
    if not config.lm_name_or_path or config.lm_fingerprint is None:
        return "has no name or path to be found by"
    if saving.is_sharded(model.lm):  # a rank that saves alone cannot look at it; it was frozen all along
        return None
    is_same = saving.is_same_base(config.lm_fingerprint, saving.fingerprint(model.lm))
    return None if is_same else "has changed since it was given to the planner"


def pointed_lm(
    folder: str | os.PathLike[str],
    config: PlannerConfig,
    lm: PreTrainedModel | str | None,
    lm_kwargs: dict[str, Any] | None,
    check_lm: bool,
    kwargs: dict[str, Any],
) -> PreTrainedModel:
    """The language model that a folder points to, or one that is given instead; kwargs: of from_pretrained."""
    if isinstance(lm, PreTrainedModel):
        model = language_model(lm, lm_kwargs)
    else:
        model = _loaded(folder, config, lm, lm_kwargs or {}, kwargs)
    expected = config.lm_fingerprint
    if check_lm and expected is None:
        raise ValueError(f"{folder} must say which language model it was saved with: pass check_lm=False for any")
    if expected is not None and check_lm and not saving.is_same_base(expected, saving.fingerprint(model)):
        advice = base_pointer.advice_on(config.text_config, model, "lm")
        raise ValueError(f"lm must be the language model that the planner was saved with, {advice}")
    if isinstance(lm, PreTrainedModel) and not check_lm:  # it may be another one
        point_to(config, model, lm, None)
    elif lm is not None and not isinstance(lm, PreTrainedModel):
        point_to(config, model, lm, _loading_options(config, "moved", lm_kwargs or {}))
    return model


def _loaded(
    folder: str | os.PathLike[str],
    config: PlannerConfig,
    lm: str | None,
    lm_kwargs: dict[str, Any],
    kwargs: dict[str, Any],
) -> PreTrainedModel:
    """The language model from where the folder points to, or from the name that is given instead."""
    options = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
    if lm is None and config.lm_revision is not None:
        options["revision"] = config.lm_revision
    if config.text_config is None:
        raise OSError(f"{folder} must hold the configuration of a PlannerForCausalLM, found none")
    if config.text_config.dtype is not None and not saving.says_dtype(kwargs):
        options["dtype"] = config.text_config.dtype
    options = _loading_options(config, "pointer" if lm is None else "moved", options | lm_kwargs)
    name = config.lm_name_or_path if lm is None else lm
    try:
        return language_model(name, options)
    except OSError as error:
        raise OSError(f"lm {name!r}, which {folder} points to, could not be loaded: pass lm=") from error


def _loading_options(config: PlannerConfig, kind: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    lm: dict[str, Any] = {"name": config.lm_name_or_path, "config": config.text_config}
    return base_pointer.loading_options(config.lm_options, kind, kwargs, argument="lm", **lm)


def load_own_weights(model: PlannerForCausalLM, folder: str | os.PathLike[str], kwargs: dict[str, Any]) -> None:
    """Everything but the language model's weights, into a model that has one. ValueError for missing and other keys."""
    weights = saving.weights_of(folder, saving.hub_options(kwargs))
    expected = {key for key in model.state_dict() if not key.startswith("lm.")}
    refuse_keys(folder, expected ^ weights.keys())
    model.load_state_dict(weights, strict=False)
    saving.load_generation_config(model, folder, kwargs)


def refuse_keys(folder: str | os.PathLike[str], wrong: Iterable[object]) -> None:
    if wrong:
        names = ", ".join(sorted(map(str, wrong)))
        raise ValueError(f"{folder}: weights that are missing or belong to nothing: {names}")
