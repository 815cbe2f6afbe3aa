"""`torch.distributed.fsdp.fully_shard` in the units that the package's models are best sharded in."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from .modules import backbone


def apply_fully_shard(
    model: PreTrainedModel, mesh: DeviceMesh | None = None, *, shard_frozen: bool = False, **options: Any
) -> PreTrainedModel:
    """Shards a model of this package over the processes of a mesh (FSDP2), in place, and returns it.

    Units are the layers of each language model, its last norm with its output head (and with the input embeddings,
    where they are one matrix), and the rest. A head in such a unit is read by the fused loss without being called, so
    that no [N, V] logits are stored: torch 2.13; before, it is called, and its logits are stored.

    model         AuxiliaryForCausalLM, AuxiliaryEnsembleForCausalLM or PlannerForCausalLM, the same on all processes
    mesh          1-d, or 2-d to shard over the second dimension and replicate over the first; None: all processes
    shard_frozen  False: language models without a trained weight stay whole on each process, and nothing of them is
                  ever sent. True: they are sharded too, and gathered for each forward pass
    options       for each call of fully_shard: mp_policy, offload_policy, ...
    Raises        ValueError: a model without a language model in it, or in which FSDP has units already
    """
    parts = _language_models(model)
    if not parts:
        raise ValueError(f"model must hold language models of transformers, got {type(model).__name__}")
    if any(hasattr(module, "_get_fsdp_state") for module in model.modules()):
        raise ValueError("model must have no units of FSDP yet: apply_fully_shard makes them all")
    frozen = [part for part in parts if not any(weight.requires_grad for weight in part.parameters())]
    whole = [] if shard_frozen else frozen
    ignored = {weight for part in whole for weight in part.parameters()}
    ignored |= {weight for weight in model.parameters() if not weight.numel()}  # of matrices that nothing reads
    options = {"mesh": mesh, "ignored_params": ignored | set(options.pop("ignored_params", None) or ()), **options}
    for part in parts:
        if part not in whole:
            _shard_layers(part, options)
    fully_shard(model, **options)
    return model


def _language_models(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The causal LMs in a composite, each once; none within another."""
    found: list[PreTrainedModel] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        is_model = isinstance(module, PreTrainedModel) and module is not model and module not in inside
        if is_model and module.get_output_embeddings() is not None:
            found.append(module)
            inside.update(module.modules())
    return found


def _shard_layers(model: PreTrainedModel, options: dict[str, Any]) -> None:
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    for layer in layers:
        fully_shard(layer, **options)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tail = [*_behind(backbone(model), layers), head]
    if getattr(head, "weight", None) is getattr(embeddings, "weight", head):
        tail = [embeddings, *tail]
    if len(tail) > 1:  # a head alone would have to be called
        fully_shard(tail, **{**options, "reshard_after_forward": False})


def _behind(body: nn.Module, layers: list[nn.Module]) -> list[nn.Module]:
    """The modules with weights that follow a model's layers: its last norm."""
    for module in body.modules():
        children = list(module.children())
        last = max(
            (i for i, child in enumerate(children) if any(one in layers for one in child.children())), default=-1
        )
        if last >= 0:
            return [child for child in children[last + 1 :] if any(p.numel() for p in child.parameters())]
    return []
