"""Where a composite calls a model past its head, and where it must call the model, or the head, as a module.

The loss over hidden states and heads reads the head's weight and never calls the head. What only a call would bring in
is then lost: hooks, weights that lie elsewhere until the call (offloaded, sharded), weights of other types (quantised),
layers in front of the head's (BERT's transform).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from .cache_argument import CACHE
from .token_statistics import is_fused, original_of

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_FSDP, _TENSOR_PARALLEL = "torch.distributed.fsdp", "torch.distributed.tensor"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def does_more(module: nn.Module) -> bool:
    """Whether a call of a module does more than its class says: hooks, parametrizations, a replaced `forward`.

    FSDP2 and tensor parallelism are hooks, offloading of accelerate replaces `forward`. Hooks of accelerate that only
    bring inputs to a device do not count.
    """
    if any(getattr(module, name, None) for name in _HOOKS) or hasattr(module, "parametrizations"):
        return True
    if "forward" not in module.__dict__:
        return False
    if is_fused(module.forward):  # a base as TRL's reference: without the keyword it is what it was
        return getattr(original_of(module.forward), "__func__", None) is not type(module).forward
    hook, forward = getattr(module, "_hf_hook", None), getattr(module, "_old_forward", None)
    return (
        hook is None or not _only_moves_inputs(hook) or getattr(forward, "__func__", None) is not type(module).forward
    )


def _only_moves_inputs(hook: object) -> bool:
    hooks = getattr(hook, "hooks", [hook])  # several, one after the other
    return all(type(one).__name__ == "AlignDevicesHook" and not one.offload for one in hooks)


def is_called_whole(model: nn.Module) -> bool:
    """Whether a model is called with its head: it does more, is a wrapper, or its head is more than one layer."""
    return not isinstance(model, PreTrainedModel) or does_more(model) or _is_more_than_body_and_layer(model)


def _is_more_than_body_and_layer(model: PreTrainedModel) -> bool:
    """Whether a causal LM has weights between last hidden states and output layer (BERT), or no module for the former.

    Llama 4 with images has parts for images and for text, which only its own forward joins.
    """
    body, head = backbone(model), model.get_output_embeddings()
    if head is None:
        return False
    if body is model:
        return True
    known = set(head.modules())
    return any(
        module not in known and any(True for _ in module.parameters(recurse=False))
        for child in model.children()
        if child is not body
        for module in child.modules()
    )


def run(model: nn.Module, **inputs: Any) -> ModelOutput:
    """The outputs of a model without its head or, where that would pass something by, of the whole model.

    inputs   of its forward; a cache is passed on by transformers' name for it
    """
    if "cache" in inputs:
        inputs[CACHE] = inputs.pop("cache")
    return model(**inputs) if is_called_whole(model) else backbone(model)(**inputs)


def features(outputs: ModelOutput) -> Tensor:
    """What `output_head` turns into logits, of what `run` returned: last hidden states, or the logits themselves."""
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


def backbone(model: PreTrainedModel) -> nn.Module:
    """A causal LM without its head; the model itself where it has none."""
    if model.base_model is not model:
        return model.base_model
    # some classes, as Llama 4's, are parts of larger models, whose names for their parts they inherit
    parts = [part for part in model.children() if isinstance(part, PreTrainedModel)]
    return parts[0] if len(parts) == 1 else model


# -- heads -------------------------------------------------------------------------------------------------------------


def is_plain(layer: nn.Module) -> bool:
    """Whether a head is nothing but its weights: linear layers whose call does no more, dense weights in memory."""
    return all(_is_plain(module) for module in layer.modules())


def _is_plain(module: nn.Module) -> bool:
    if (does_more(module) and not _is_gathered(module)) or (
        isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    ):
        return False
    return all(_is_dense(weight) for weight in module.parameters(recurse=False))


def _is_gathered(module: nn.Module) -> bool:
    """Whether all that a call does more is to gather the weights of a unit of FSDP2, which is done at this point."""
    return _is_in_gathered_unit(module) and _calls_no_more_than(module, _FSDP)


def _is_in_gathered_unit(module: nn.Module) -> bool:
    """Whether a module is in a unit of FSDP2 that another one's call has gathered.

    So it is in `fully_shard([norm, head])` once the norm has been called and the head has not: weights then are plain
    tensors until the backward pass, and FSDP takes their gradients whether the head is called or not. The outermost
    module with fully_shard ends the unit's forward pass in the head's place (since torch 2.13).
    """
    if not isinstance(module, FSDPModule):
        return False
    state = module._get_fsdp_state()
    has_begun = module in getattr(state, "_modules_to_run_forward", ())
    return has_begun and hasattr(state, "_force_complete_incomplete_states")


def _calls_no_more_than(module: nn.Module, *origins: str) -> bool:
    """Whether what a call does beside the class's forward are hooks of some parts of torch."""
    if hasattr(module, "parametrizations") or "forward" in module.__dict__:
        return False
    return all(hook.startswith(origins) for hook in _hooks_of(module))


def _hooks_of(module: nn.Module) -> list[str]:
    """The modules that the hooks come from."""
    return [getattr(hook, "__module__", "") for name in _HOOKS for hook in getattr(module, name, {}).values()]


def is_vocabulary_parallel(layer: nn.Module) -> bool:
    """Whether a head is a linear layer of which each process holds some rows, by tensor parallelism.

    A weight alone does not say so: one that FSDP has sharded over the same processes, which then read other data, looks
    the same. What does are the hooks of `parallelize_module`, and a mesh of one dimension once FSDP has gathered.
    """
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        return False
    weight, hooks = layer.weight, _hooks_of(layer)
    if not isinstance(weight, DTensor) or tuple(weight.placements) != (Shard(0),):
        return False
    if not any(hook.startswith(_TENSOR_PARALLEL) for hook in hooks):
        return False
    return _calls_no_more_than(layer, _TENSOR_PARALLEL, *((_FSDP,) if _is_in_gathered_unit(layer) else ()))


def _is_dense(weight: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return not isinstance(weight, DTensor)  # tracing shows tensors of its own types
    is_known = type(weight) in (Tensor, nn.Parameter) and weight.layout == torch.strided
    return is_known and weight.dtype in _DTYPES and not weight.is_meta


def check_weights_come(model: nn.Module, layer: nn.Module, hidden: Tensor) -> None:
    """ValueError where a head's weights are elsewhere, and nothing brings them when it is called."""
    for name, weight in layer.named_parameters():
        is_sharded, is_elsewhere = isinstance(weight, DTensor), weight.is_meta and not hidden.is_meta
        if (is_sharded or is_elsewhere) and not any(does_more(module) for module in layer.modules()):
            kind = "a DTensor that nothing gathers" if is_sharded else "on meta, from where nothing loads it"
            way = "apply fully_shard to the whole model and call that" if is_sharded else "load the model's weights"
            raise ValueError(f"{name} of the output head of {type(model).__name__} is {kind} when it is called: {way}")


def call_of(model: nn.Module, layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """What calls a head as a module."""

    def call(hidden: Tensor) -> Tensor:
        check_weights_come(model, layer, hidden)
        logits = layer(hidden)
        return logits.full_tensor() if isinstance(logits, DTensor) else logits

    return call


def head_width(model: PreTrainedModel) -> int:
    """How many logits a model's head gives; rows that only pad the head give none (Inkling)."""
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    layer = getattr(layer, "base_layer", layer)  # of PEFT's wrapper
    if isinstance(layer, nn.Linear) and _is_plain(layer):
        width = layer.weight.shape[0]
    else:
        width = getattr(layer, "out_features", None) or config.vocab_size
    return min(width, getattr(config, "unpadded_vocab_size", None) or width)


# -- places ------------------------------------------------------------------------------------------------------------


def device_of(module: nn.Module) -> torch.device:
    """Where a module's inputs belong, also where its weights are offloaded and lie on meta between calls."""
    first = next(module.parameters()).device
    if first.type != "meta":
        return first
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            place = getattr(one, "execution_device", None)
            if place is not None and torch.device(place).type != "meta":
                return torch.device(place)
    return first
