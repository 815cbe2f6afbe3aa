"""What a saved model says of a frozen one beside the name: which weights they are, and how they come to be loaded.

An auxiliary's folder points to its base, a planner's to its language model.
"""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, find_adapter_config_file

from .adapters import has_adapters

if TYPE_CHECKING:
    from .frozen_base import OnFrozenBase

# from_pretrained's options that say where files come from, where weights are put and how they are computed with. The
# others say which weights a base has: subfolder, gguf_file, variant, quantization_config, values of its configuration.
_NOT_OF_THE_WEIGHTS = {
    *("cache_dir", "force_download", "local_files_only", "proxies", "token", "revision", "state_dict", "disable_mmap"),
    *("output_loading_info", "weights_only", "low_cpu_mem_usage", "tqdm_class", "device_map", "max_memory", "dtype"),
    *("torch_dtype", "offload_folder", "offload_buffers", "offload_state_dict", "attn_implementation", "tp_plan"),
    *("experts_implementation", "tp_size", "device_mesh", "distributed_config", "fusion_config", "use_kernels"),
    *("kernel_config", "allow_all_kernels", "generation_config", "trust_remote_code", "config", "quantization_config"),
}
_OF_THE_PLACE = ("subfolder", "gguf_file", "variant", "use_safetensors")  # they go with the name


def weight_options(base: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What from_pretrained must be told again to load the weights that `base` has, as JSON has it.

    kwargs   with which the base was loaded; of a model that the user loaded only its quantisation is known
    """
    options = {name: value for name, value in kwargs.items() if name not in _NOT_OF_THE_WEIGHTS}
    given = kwargs.get("config")
    if given is not None:  # True: the one that is saved as base_config
        options["config"] = True if isinstance(given, PretrainedConfig) else str(given)
    quantizer = getattr(base, "hf_quantizer", None)
    quantization = kwargs.get("quantization_config")
    if quantization is None and quantizer is not None and not quantizer.pre_quantized:
        quantization = quantizer.quantization_config
    if quantization is not None:
        options["quantization_config"] = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if has_own_code(base):
        options["trust_remote_code"] = True
    return options


def has_own_code(model: PreTrainedModel) -> bool:
    """Whether a model's class came with its weights."""
    return type(model).__module__.startswith("transformers_modules.")


def loading_options(
    saved: dict[str, Any] | None,
    kind: str,
    kwargs: dict[str, Any],
    *,
    argument: str,
    name: str | None,
    config: PretrainedConfig,
) -> dict[str, Any]:
    """Those of the saved options under the call's own kwargs.

    kind       where the model is loaded from: "pointer", its name; "folder", which holds it as it was; "moved", a new
               name
    argument   what the model is called in errors, and where it can be given
    name, config   the model's, as they were saved
    Raises     ValueError where the model's code would be run and the call does not say that it is trusted.
    """
    options = dict(saved or {})
    if options.pop("trust_remote_code", False) and kind != "moved" and not kwargs.get("trust_remote_code"):
        raise ValueError(
            f"{argument} {name!r} runs code that comes with its weights: pass trust_remote_code=True if you have read "
            f"and trust it, or {argument}= the model"
        )
    if kind == "folder":
        return dict(kwargs)
    if kind == "moved":
        options = {name: value for name, value in options.items() if name not in _OF_THE_PLACE}
    quantization = options.pop("quantization_config", None)
    if quantization is not None:
        options["quantization_config"] = AutoQuantizationConfig.from_dict(dict(quantization))
    if options.get("config") is True:
        options["config"] = copy.deepcopy(config)
        if quantization is not None:  # or it would say that the weights are quantised already
            options["config"].__dict__.pop("quantization_config", None)
    return {**options, **kwargs}


# -- pointers that will not do -----------------------------------------------------------------------------------------


def way_to_save(model: OnFrozenBase) -> str:
    """How a base without a name, or with that of other weights, is saved so that it loads again."""
    if has_adapters(model.base):
        return "join it by the name of the folder that holds its adapters, or merge_and_unload, save and load it"
    if getattr(model.base, "hf_quantizer", None) is not None:
        return (
            "a quantised base is joined by the name of the checkpoint that it is quantised from, with "
            "base_kwargs={'quantization_config': ...}"
        )
    return "save the base to a folder, load it from there, and join it with the auxiliary anew"


def warn_of_pointer(model: OnFrozenBase) -> None:
    """UserWarning where what is trained now could not be saved with a pointer to its base, or not be loaded."""
    name = model.config.base_name_or_path
    if not name:
        warnings.warn(
            "base has no name to be found by, so that save_pretrained, and with it Trainer's first checkpoint, will "
            f"fail unless save_base=True: {way_to_save(model)}",
            stacklevel=3,
        )
        return
    found = _other_than_named(model.base, name, model.config)
    if found is not None:
        whole = "" if has_adapters(model.base) else ", or save with save_base=True"
        warnings.warn(
            f"base has {found} than {name}, to which save_pretrained points, so that what is saved will not load with "
            f"it: {way_to_save(model)}{whole}",
            stacklevel=3,
        )


def _other_than_named(base: PreTrainedModel, name: str, config: PretrainedConfig) -> str | None:
    """What a base has other than the files on this machine under its name (resized, merged); None: nothing, or unknown.

    The first row of each weight is looked at, and only where the files call them as the model does.
    """
    options = config.base_options or {}
    if options.keys() - {"subfolder", "trust_remote_code"}:
        return None
    where = {"subfolder": options.get("subfolder", ""), "local_files_only": True}
    if config.base_revision is not None:
        where["revision"] = config.base_revision
    if has_adapters(base) and find_adapter_config_file(name, **where) is None:
        return "other adapters"
    with contextlib.suppress(Exception):  # other kinds of files, names that are not here: nothing is known
        width = base.config.get_text_config().vocab_size
        if not has_own_code(base) and AutoConfig.from_pretrained(name, **where).get_text_config().vocab_size != width:
            return f"another number of tokens ({width})"
        weights = dict(base.named_parameters())
        for path in _files(name, where):
            with safe_open(path, framework="pt") as file:
                if any(_differs(weights[key], file.get_slice(key)) for key in file.keys() & weights.keys()):
                    return "other weights"
    return None


def _files(name: str, where: dict[str, Any]) -> list[str]:
    try:
        with open(cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **where), encoding="utf-8") as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
    except OSError:
        names = [SAFE_WEIGHTS_NAME]
    return [cached_file(name, one, **where) for one in names]


def _differs(weight: Tensor, saved: Any) -> bool:
    """Whether the first row of a weight is another one than was saved, beyond the coarser dtype's rounding."""
    if type(weight) is not nn.Parameter or weight.is_meta or list(weight.shape) != saved.get_shape():
        return False
    row, got = saved[:1], weight.detach()[:1].cpu()
    if not (row.is_floating_point() and got.is_floating_point()):
        return False
    limits = max(torch.finfo(row.dtype), torch.finfo(got.dtype), key=lambda limit: limit.eps)
    return not torch.allclose(got.double(), row.double(), rtol=limits.eps, atol=limits.smallest_normal)


def advice_on(saved: PretrainedConfig, found: PreTrainedModel, argument: str) -> str:
    """What to say of a model that is not the one, of the saved configuration, that a folder points to."""
    sizes = [one.get_text_config().vocab_size for one in (saved, found.config)]
    got = "other weights or shapes" if sizes[0] == sizes[1] else f"{sizes[1]} tokens where it had {sizes[0]}"
    quantised = [getattr(one, "quantization_config", None) is not None for one in (saved, found.config)]
    if quantised[0] != quantised[1]:
        got += ", quantised" if quantised[1] else ", not quantised as it was"
    return (
        f"got {got}: pass {argument}= that model; one that was merged, resized or trained on after loading must be "
        f"saved to a folder of its own, and a quantised one loaded with the same quantization_config. check_{argument}"
        f"=False computes with what was found, and is for another {argument} that is meant"
    )
