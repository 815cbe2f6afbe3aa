"""Loading and saving of `AuxiliaryForCausalLM`: an auxiliary's own weights and a pointer to its base."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from . import adapters, base_pointer, modalities
from .configuration import AuxiliaryConfig
from .small import unread_weights
from .trunkless import has_trunk, whole_of

if TYPE_CHECKING:
    from .auxiliary import AuxiliaryForCausalLM
    from .members import MembersOnFrozenBase

BASE_FOLDER = "base"
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_OF_THE_FOLDER = ("revision", "subfolder")
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_NUM_SAMPLES = 32
_SUM_LENGTH = 4096
PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of from_pretrained's options that say where files come from."""
    return {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}


# -- parts -------------------------------------------------------------------------------------------------------------


def causal_lm(name: str, given: PreTrainedModel | PretrainedConfig | str, kwargs: dict[str, Any]) -> PreTrainedModel:
    """A decoder-only causal LM with all its weights: as it is, loaded by name or path, or (aux) new from a config.

    Raises TypeError, ValueError naming the argument; OSError where there is no such name or path.
    """
    if isinstance(given, (str, os.PathLike)):
        model = _loaded(name, os.fspath(given), kwargs)
    elif isinstance(given, PretrainedConfig) and name == "aux":
        _check_decoder(name, given)
        model = modalities.auto_class(given).from_config(copy.deepcopy(given), **kwargs)
    elif isinstance(given, PreTrainedModel):
        if kwargs:
            raise ValueError(f"{name}_kwargs must be empty where {name} is a model, got {', '.join(sorted(kwargs))}")
        model = given
    else:
        allowed = "a PreTrainedModel or a name" + (", or a configuration" if name == "aux" else "")
        raise TypeError(f"{name} must be {allowed}, got {type(given).__name__}")
    _check_decoder(name, model.config)
    if not model.can_generate() or model.get_output_embeddings() is None:
        raise TypeError(f"{name} must be a causal LM with an output head, got {type(model).__name__}")
    return model


def pointer(name: str | None) -> str | None:
    """What is saved of a base's name or path: a folder is found from everywhere."""
    return (os.path.abspath(name) if os.path.isdir(name) else name) if name else None


def _check_decoder(name: str, config: PretrainedConfig) -> None:
    if config.is_encoder_decoder:
        raise ValueError(f"{name} must be decoder-only, got the encoder-decoder {config.model_type}")


def _loaded(name: str, path: str, kwargs: dict[str, Any]) -> PreTrainedModel:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
    except ValueError:
        if not _reads_images(path, kwargs):
            raise
        model, info = AutoModelForImageTextToText.from_pretrained(path, output_loading_info=True, **kwargs)
    if info["missing_keys"]:
        raise ValueError(f"{name} must have all its weights, {path} lacks {_some(info['missing_keys'])}")
    return model


def _reads_images(path: str, kwargs: dict[str, Any]) -> bool:
    """Whether a name or path holds a model of a family that only AutoModelForImageTextToText knows."""
    try:
        config = AutoConfig.from_pretrained(path, **hub_options(kwargs))
    except (OSError, ValueError):
        return False
    return modalities.auto_class(config) is AutoModelForImageTextToText


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# -- which base --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """What tells a base from another one: its parameters' names and shapes, 32 elements, and sums of each parameter.

    sums       of at most 4096 elements of each parameter, evenly spaced; magnitudes: of their absolute values
    dtype is kept beside the values, because a base may be loaded in another one than it was saved with. Weights that
    are offloaded have no value and are not compared, nor those that DeepSpeed has partitioned. Quantised weights count
    as what they are stored as. Sharded ones (DTensor) are gathered one at a time: all ranks must call. A base without
    its trunk in memory (`trunkless`) counts as the whole one.
    """
    whole = whole_of(model)
    if whole is not None:
        return copy.deepcopy(whole.fingerprint)
    parameters = sorted(model.named_parameters())
    shapes = [(name, list(getattr(p, "ds_shape", p.shape))) for name, p in parameters]
    values, sums = [], []
    for n, (_, parameter) in enumerate(parameters):
        stored = None if _is_partitioned(parameter) else _stored(parameter.detach())
        values += [_element(stored, i) for i in _samples_of(n, len(parameters))]
        sums.append(_sums(stored))
    return _as_fingerprint(shapes, model.dtype, values, sums)


def _samples_of(n: int, count: int) -> list[int]:
    """Which of the samples are elements of the n-th of so many parameters."""
    return [i for i in range(_NUM_SAMPLES) if i * count // _NUM_SAMPLES == n]


def _as_fingerprint(
    shapes: list[tuple[str, list[int]]], dtype: torch.dtype, values: list[Any], sums: list[Any]
) -> dict[str, Any]:
    return {
        "structure": hashlib.sha256(repr(shapes).encode()).hexdigest()[:32],
        "dtype": str(dtype).removeprefix("torch."),
        "values": values,
        "sums": [one for one, _ in sums],
        "magnitudes": [magnitude for _, magnitude in sums],
    }


class FingerprintOfFiles:
    """The fingerprint of weights that come one at a time, as files hold them, to be compared with an expected one.

    Weights of at least the precision that the expected one's had are rounded to that, as loading does.
    """

    def __init__(self, expected: dict[str, Any]) -> None:
        self._expected = expected
        self._dtype = self._coarsest = getattr(torch, expected["dtype"])
        self._noted: dict[str, tuple[list[int], list[Any], Any]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        if tensor.is_floating_point() and self._dtype.is_floating_point:
            precisions = [torch.finfo(dtype).eps for dtype in (tensor.dtype, self._dtype, self._coarsest)]
            if tensor.element_size() > 1 and precisions[0] <= precisions[1]:
                tensor = tensor.to(self._dtype)
            elif precisions[0] > precisions[2]:
                self._coarsest = tensor.dtype
        stored = [tensor]
        self._noted[name] = (
            list(tensor.shape),
            [_element(stored, i) for i in range(_NUM_SAMPLES)],
            _sums(stored),
        )

    def is_expected(self) -> bool:
        names = sorted(self._noted)
        values = [self._noted[name][1][i] for n, name in enumerate(names) for i in _samples_of(n, len(names))]
        shapes = [(name, self._noted[name][0]) for name in names]
        found = _as_fingerprint(shapes, self._coarsest, values, [self._noted[name][2] for name in names])
        return is_same_base(self._expected, found)


def is_sharded(model: nn.Module) -> bool:
    """Whether a rank holds only its part of some weights, so that it cannot tell alone which model this is."""
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        return True
    return any(_is_sharded(weight) or _is_partitioned(weight) for weight in model.parameters())


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _is_partitioned(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id")  # DeepSpeed's ZeRO-3


def _stored(tensor: Tensor) -> list[Tensor] | None:
    """The ordinary tensors that a weight consists of; None: it is offloaded."""
    if tensor.is_meta:
        return None
    if _is_sharded(tensor):
        return _stored(tensor.full_tensor())  # type: ignore[attr-defined]
    if is_traceable_wrapper_subclass(tensor):
        parts = [_stored(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]]
        return None if None in parts else [part for stored in parts for part in stored]
    with torch._C.DisableTorchFunctionSubclass():
        tensor = tensor.as_subclass(Tensor)
        return [tensor.int_repr() if tensor.is_quantized else tensor]


def _element(stored: list[Tensor] | None, i: int) -> float | int | None:
    """The i-th sample: an element of the first tensor that has any."""
    tensor = next((one for one in stored or () if one.numel()), None)
    if tensor is None:
        return None
    index = (i * 7919 + tensor.numel() // 2) % tensor.numel()
    element = tensor[torch.unravel_index(torch.tensor(index, device="cpu"), tensor.shape)]
    return element.item() if _has_numbers(tensor) else _numbers(element.reshape(1)).item()


def _sums(stored: list[Tensor] | None) -> tuple[float, float] | tuple[None, None]:
    if stored is None:
        return None, None
    total = magnitude = 0.0
    for tensor in stored:
        step = -(-tensor.numel() // _SUM_LENGTH) | 1  # odd, so that it does not stay in one column
        sample = _numbers(tensor.reshape(-1)[::step])
        total, magnitude = total + sample.sum().item(), magnitude + sample.abs().sum().item()
    return total, magnitude


def _has_numbers(tensor: Tensor) -> bool:
    return (tensor.is_floating_point() and tensor.element_size() > 1) or tensor.dtype in _INTEGERS


def _numbers(tensor: Tensor) -> Tensor:
    """[n] in float64 on the CPU: values, or the bytes of types that torch cannot convert (several values in one)."""
    if not _has_numbers(tensor) and not str(tensor.dtype).startswith("torch.float8"):
        tensor = tensor.contiguous().view(torch.uint8)
    return tensor.cpu().double()


def is_same_base(expected: dict[str, Any], found: dict[str, Any]) -> bool:
    """Equal structure, values and sums: exactly in one dtype, else up to the coarser one's rounding."""
    if expected.keys() != found.keys() or expected["structure"] != found["structure"]:
        return False
    tolerance = least = 0.0
    if expected["dtype"] != found["dtype"]:
        dtypes = [getattr(torch, one["dtype"]) for one in (expected, found)]
        limits = [torch.finfo(dtype) for dtype in dtypes if dtype.is_floating_point]
        tolerance = max((one.eps for one in limits), default=0.0)
        least = max((one.smallest_normal for one in limits), default=0.0)
    pairs = zip(expected["values"], found["values"], strict=True)
    known = (pair for pair in pairs if None not in pair)
    if not all(math.isclose(*pair, rel_tol=tolerance, abs_tol=tolerance * 1e-4) for pair in known):
        return False
    order = 1e-12  # of float64 sums that are added up in another order
    sums = zip(expected["sums"], found["sums"], found["magnitudes"], strict=True)
    return all(
        abs(one - other) <= max(tolerance, order) * (magnitude + _SUM_LENGTH * least)
        for one, other, magnitude in sums
        if one is not None and other is not None
    )


# -- save --------------------------------------------------------------------------------------------------------------


def save(
    model: AuxiliaryForCausalLM,
    write: Callable[..., None],
    folder: str | os.PathLike[str],
    save_base: bool,
    state_dict: dict[str, Any] | None,
    kwargs: dict[str, Any],
) -> None:
    """Writes beside the folder's own files and moves them in, the configuration last.

    write   `PreTrainedModel.save_pretrained` of the model
    """
    check_can_save(model, save_base, kwargs)
    own = _own_weights(model, state_dict)
    check_adapters(model, save_base)
    check_target(os.fspath(folder), model.config, save_base)
    _describe(model, save_base)
    if not kwargs.get("is_main_process", True):
        write(folder, state_dict=own, **kwargs)
        return
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as new:
        write(new, state_dict=own, **kwargs)
        if save_base:
            write_base(model.base, os.path.join(new, BASE_FOLDER), state_dict)
        move_in(new, os.fspath(folder))


def not_saved(model: PreTrainedModel, folder: str | os.PathLike[str], options: dict[str, Any]) -> tuple[str, ...]:
    """Prefixes of the keys that save_pretrained of a model on a frozen base does not write."""
    return () if options.get("save_base") else ("base.",)


def write_base(base: PreTrainedModel, folder: str, state_dict: dict[str, Any] | None) -> None:
    """Writes a base to a new folder; state_dict: of the model that has it, with whole weights where it is sharded."""
    weights = None
    if state_dict is not None and is_sharded(base):
        weights = {key.removeprefix("base."): one for key, one in state_dict.items() if key.startswith("base.")}
    base.save_pretrained(folder, state_dict=weights)


def write_folder(model: AuxiliaryForCausalLM, folder: str, state_dict: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Writes an `AuxiliaryForCausalLM` to a new folder, without its base and whether or not that has a name."""
    _describe(model, save_base=False)
    PreTrainedModel.save_pretrained(model, folder, state_dict=_own_weights(model, state_dict), **kwargs)


def check_can_save(model: AuxiliaryForCausalLM | MembersOnFrozenBase, save_base: bool, kwargs: dict[str, Any]) -> None:
    """ValueError for what no folder can be made of."""
    if kwargs.get("push_to_hub"):
        raise ValueError("push_to_hub must be False in save_pretrained: call model.push_to_hub(name)")
    if save_base and not has_trunk(model.base):
        raise ValueError("save_base must be False for a base without its trunk in memory")
    if not save_base and not model.config.base_name_or_path:
        raise ValueError(
            f"save_base must be True for a base that has no name to be found by: or {base_pointer.way_to_save(model)}"
        )


def _own_weights(model: AuxiliaryForCausalLM, state_dict: dict[str, Any] | None) -> dict[str, Tensor]:
    """What is saved of an auxiliary's state dict: neither the base's weights nor matrices that nothing reads."""
    if state_dict is None:
        state_dict = model.state_dict()
    unread = model._unread_keys
    return {key: value for key, value in state_dict.items() if not (key.startswith("base.") or key in unread)}


def _describe(model: AuxiliaryForCausalLM, save_base: bool) -> None:
    """Brings an auxiliary's configuration to what is saved."""
    config = model.config
    config.base_is_saved, config.aux_adapters = save_base, adapters.described(model.aux)
    if not is_sharded(model.base):  # else it is as it was when all ranks joined the models: this one may save alone
        config.base_fingerprint = fingerprint(model.base)
    model.aux.config.dtype, model.base.config.dtype = model.aux.dtype, model.base.dtype


def check_adapters(model: AuxiliaryForCausalLM, save_base: bool) -> None:
    """ValueError for adapters that the folder would not hold; those of a base that is pointed to are its own affair."""
    adapters.check_saveable(model)
    if save_base and adapters.has_adapters(model.base):
        raise ValueError("the base must have no adapters with save_base: merge_and_unload them before it is joined")


def _old_config(folder: str) -> dict[str, Any] | None:
    """The configuration that a folder holds, or None."""
    try:
        with open(os.path.join(folder, CONFIG_NAME), encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def check_target(folder: str, config: PretrainedConfig, save_base: bool, folders: tuple[str, ...] = ()) -> None:
    """Raises ValueError where saving to a folder would destroy what is not an old version of the model.

    folders   names of those that the model has in its folder, beside that of a base
    """
    old = _old_config(folder)
    if old is not None and old.get("model_type") != config.model_type:
        kind = type(config).__name__.replace("Config", "ForCausalLM")
        raise ValueError(
            f"save_directory must be new or hold an {kind}, {folder} holds a model of type {old.get('model_type')!r}"
        )
    base, within = config.base_name_or_path, [BASE_FOLDER, *folders]
    inside = {name: os.path.realpath(os.path.join(folder, name)) for name in within}
    if base and os.path.isdir(base):
        base = os.path.realpath(base)
        if base == os.path.realpath(folder) or any(
            base == one or base.startswith(one + os.sep) for one in inside.values()
        ):
            raise ValueError(f"save_directory must be apart from the base's own folder {base}, got {folder}")
    if save_base and os.path.lexists(inside[BASE_FOLDER]) and not (old or {}).get("base_is_saved"):
        raise ValueError(f"save_directory must have no {BASE_FOLDER}/ of other origin with save_base, got {folder}")
    for name in folders:
        if old is None and os.path.lexists(inside[name]):
            raise ValueError(f"save_directory must have no {name}/ of other origin, got {folder}")


def move_in(new: str, folder: str, folders: tuple[str, ...] = ()) -> None:
    """Replaces a folder's model: while its files are changed it has no configuration, and so does not load.

    folders   as for `check_target`
    """
    if not os.path.exists(os.path.join(new, CONFIG_NAME)):
        raise RuntimeError(f"nothing was saved to {folder}: no {CONFIG_NAME} was written")
    old = _old_config(folder)
    if old is not None:
        os.remove(os.path.join(folder, CONFIG_NAME))
        if old.get("base_is_saved"):
            shutil.rmtree(os.path.join(folder, BASE_FOLDER), ignore_errors=True)
        for name in folders:
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
    for name in os.listdir(folder):
        if name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json")):
            os.remove(os.path.join(folder, name))
    for name in sorted(os.listdir(new), key=lambda name: name == CONFIG_NAME):
        os.replace(os.path.join(new, name), os.path.join(folder, name))


# -- load --------------------------------------------------------------------------------------------------------------


def load(
    folder: str | os.PathLike[str],
    config: PretrainedConfig | None,
    *,
    base: PreTrainedModel | str | None,
    base_kwargs: dict[str, Any] | None,
    check_base: bool,
    **kwargs: Any,
) -> tuple[AuxiliaryConfig, PreTrainedModel, PreTrainedModel, dict[str, Tensor]]:
    """(config, base, aux, other weights) of a saved folder; arguments as for `from_pretrained`."""
    where = hub_options(kwargs)
    if config is None:
        config = AuxiliaryConfig.from_pretrained(folder, **where)
    if not isinstance(config, AuxiliaryConfig):
        raise TypeError(f"config must be an AuxiliaryConfig, got {type(config).__name__}")
    if config.base_config is None or config.aux_config is None:
        raise OSError(f"{folder} must hold the configuration of an AuxiliaryForCausalLM, found none")
    base, base_model = load_base(folder, config, base, base_kwargs, check_base, kwargs)
    model_kwargs = {name: value for name, value in kwargs.items() if name not in _OF_THE_FOLDER}
    weights = weights_of(folder, where)
    own = {key.removeprefix("aux."): weights.pop(key) for key in list(weights) if key.startswith("aux.")}
    kind = modalities.class_of(config.aux_config)
    if kind is None:
        raise ValueError(
            f"aux must be of a class of transformers, or registered there, got {config.aux_config.model_type}"
        )
    options = {name: value for name, value in model_kwargs.items() if name not in _HUB_OPTIONS}
    unread = {} if config.head == "own" and config.trunk_layer is None else _unread_weights(config)
    aux, info = kind.from_pretrained(
        None,
        config=config.aux_config,
        state_dict={**unread, **adapters.plain_weights(own, config.aux_adapters)},
        output_loading_info=True,
        **options,
    )
    for problem in PROBLEMS:
        if info[problem]:
            raise ValueError(f"{folder} must hold the auxiliary's weights, {problem}: {_some(map(str, info[problem]))}")
    if config.aux_adapters:
        adapters.put_in(aux, {**unread, **own}, config.aux_adapters)
    _keep_dtypes(aux, own, kwargs)
    point_to(config, base, base_model, check_base, base_kwargs)
    return config, base_model, aux, weights


def load_base(
    folder: str | os.PathLike[str],
    config: PretrainedConfig,
    base: PreTrainedModel | str | None,
    base_kwargs: dict[str, Any] | None,
    check_base: bool,
    kwargs: dict[str, Any],
) -> tuple[PreTrainedModel | str | None, PreTrainedModel]:
    """(base as it was given, the model): of a folder's pointer, or given. Arguments as for `from_pretrained`.

    config   the folder's; kwargs: those of all models
    """
    where, base = hub_options(kwargs), adapters.language_model("base", base)
    model_kwargs = {name: value for name, value in kwargs.items() if name not in _OF_THE_FOLDER}
    base_model = _base_of(folder, config, base, {**model_kwargs, **(base_kwargs or {})}, where, base_kwargs)
    if check_base and config.base_fingerprint is None:
        raise ValueError(f"{folder} must say which base it was saved with: pass check_base=False for any")
    if check_base and not is_same_base(config.base_fingerprint, fingerprint(base_model)):
        advice = base_pointer.advice_on(config.base_config, base_model, "base")
        raise ValueError(f"base must be the model that the auxiliary was saved with, {advice}")
    return base, base_model


def _unread_weights(config: AuxiliaryConfig) -> dict[str, Tensor]:
    """Zeros without memory for the auxiliary's matrices that nothing reads, which only older folders hold."""
    with torch.device("meta"):
        model = modalities.auto_class(config.aux_config).from_config(copy.deepcopy(config.aux_config))
    shapes = {name: weight.shape for name, weight in model.named_parameters(remove_duplicate=False)}
    return {
        name: torch.zeros(()).expand(shapes[name]) for name in unread_weights(model, config.head, config.trunk_layer)
    }


def says_dtype(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("dtype", kwargs.get("torch_dtype")) is not None


def _keep_dtypes(model: PreTrainedModel, weights: dict[str, Tensor], kwargs: dict[str, Any]) -> None:
    """Weights that were saved in another dtype than the model's, as they were saved, unless a dtype is asked for."""
    if says_dtype(kwargs):
        return
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in weights and parameter.dtype != weights[name].dtype:
            parameter.data = weights[name].to(parameter.device)


def point_to(
    config: PretrainedConfig,
    base: PreTrainedModel | str | None,
    base_model: PreTrainedModel,
    check_base: bool,
    base_kwargs: dict[str, Any] | None,
) -> None:
    """Makes the pointer that of a base given by name, or of an unchecked model, which may be another one."""
    if isinstance(base, PreTrainedModel) and not check_base:
        config.base_name_or_path, config.base_revision = pointer(base.config.name_or_path), None
        config.base_options = base_pointer.weight_options(base, {})
    elif isinstance(base, (str, os.PathLike)):
        config.base_name_or_path = pointer(os.fspath(base))
        config.base_revision = (base_kwargs or {}).get("revision")
        kwargs = _loading_options(config, "moved", base_kwargs or {})
        config.base_options = base_pointer.weight_options(base_model, kwargs)


def _loading_options(config: PretrainedConfig, kind: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    base = {"name": config.base_name_or_path, "config": config.base_config}
    return base_pointer.loading_options(config.base_options, kind, kwargs, argument="base", **base)


def _base_of(
    folder: str | os.PathLike[str],
    config: PretrainedConfig,
    base: PreTrainedModel | str | None,
    kwargs: dict[str, Any],
    where: dict[str, Any],
    base_kwargs: dict[str, Any] | None,
) -> PreTrainedModel:
    if isinstance(base, PreTrainedModel):
        return causal_lm("base", base, base_kwargs or {})
    if config.base_config.dtype is not None and not says_dtype(kwargs):
        kwargs = {**kwargs, "dtype": config.base_config.dtype}
    kind = "moved" if base is not None else "folder" if config.base_is_saved else "pointer"
    kwargs = _loading_options(config, kind, kwargs)
    if base is None and config.base_is_saved:
        subfolder = os.path.join(where.get("subfolder", ""), BASE_FOLDER)
        if "revision" in where:
            kwargs = {**kwargs, "revision": where["revision"]}
        inside = os.path.join(os.fspath(folder), subfolder)
        if os.path.isdir(inside):  # code of its own is not looked for in subfolders
            return causal_lm("base", inside, kwargs)
        return causal_lm("base", os.fspath(folder), {**kwargs, "subfolder": subfolder})
    name = config.base_name_or_path if base is None else base
    if base is None and config.base_revision is not None:
        kwargs = {"revision": config.base_revision, **kwargs}
    try:
        return causal_lm("base", name, kwargs)
    except OSError as error:
        raise OSError(f"base {name!r}, which {folder} points to, could not be loaded: pass base=") from error


def weights_of(folder: str | os.PathLike[str], where: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files; those of a saved base are in its own folder."""
    try:
        with open(cached_file(folder, SAFE_WEIGHTS_INDEX_NAME, **where), encoding="utf-8") as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
    except OSError:
        names = [SAFE_WEIGHTS_NAME]
    weights = {}
    for name in names:
        with safe_open(cached_file(folder, name, **where), framework="pt") as file:
            weights.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    return weights


def load_rest(model: AuxiliaryForCausalLM, weights: dict[str, Tensor], kwargs: dict[str, Any]) -> None:
    """The weights that are neither model's: the trunk projection and a head in place of the auxiliary's."""
    expected = {key for key in model.state_dict() if not key.startswith(("base.", "aux."))}
    if expected != weights.keys():
        raise ValueError(f"weights must be {sorted(expected)} beside the auxiliary's, got {sorted(weights)}")
    _keep_dtypes(model, weights, kwargs)
    model.load_state_dict(weights, strict=False)


def load_generation_config(model: PreTrainedModel, folder: str | os.PathLike[str], kwargs: dict[str, Any]) -> None:
    """The folder's own; where it has none, the model keeps the base's."""
    with contextlib.suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(folder, **hub_options(kwargs))
