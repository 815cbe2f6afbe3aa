"""Saving a model whose weights are spread over processes: gathered by all, written by the first."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Save = Callable[..., None]


def written_by_one(unsaved: Callable[[Any, Any, dict[str, Any]], tuple[str, ...]]) -> Callable[[Save], Save]:
    """Makes a `save_pretrained` that all processes call where weights are DTensors, as after `fully_shard`.

    unsaved   (model, folder, keywords) -> prefixes of the state dict's keys that are not written, and not gathered
    With a state dict, or without DTensors, nothing changes: whoever calls writes. Otherwise the first process writes
    whole weights, the others wait until it has, and an error there is a RuntimeError on all others.
    """

    def decorate(save: Save) -> Save:
        @functools.wraps(save)
        def save_pretrained(
            self: PreTrainedModel, save_directory: Any, *, state_dict: dict[str, Any] | None = None, **kwargs: Any
        ) -> None:
            mesh = None if state_dict is not None else mesh_of(self)
            if mesh is None:
                save(self, save_directory, state_dict=state_dict, **kwargs)
                return
            is_first = not any(mesh.get_coordinate() or ())
            whole = gathered(self, unsaved(self, save_directory, kwargs), is_first)
            error: Exception | None = None
            if is_first:
                try:
                    save(self, save_directory, state_dict=whole, **kwargs)
                except Exception as raised:
                    error = raised
            _raise_on_all(error, mesh)

        return save_pretrained

    return decorate


def mesh_of(model: nn.Module) -> DeviceMesh | None:
    """The largest mesh that weights are spread over; None: all are ordinary tensors."""
    meshes = (weight.device_mesh for weight in model.parameters() if isinstance(weight, DTensor))
    return max(meshes, key=lambda mesh: mesh.size(), default=None)


@torch.no_grad()
def gathered(model: nn.Module, unsaved: tuple[str, ...], is_kept: bool) -> dict[str, Tensor]:
    """The state dict with whole tensors, on CPU those that were gathered; empty where it is not to be kept."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    once: dict[nn.Parameter | str, Tensor] = {}  # tied weights stay one tensor, so that they are written once
    whole = {}
    for key, value in model.state_dict().items():
        if key.startswith(unsaved):
            continue
        if isinstance(value, DTensor):
            weight = weights.get(key, key)
            if weight not in once:
                full = _whole(value)
                once[weight] = full.cpu() if is_kept else full[:0]
            value = once[weight]
        if is_kept:
            whole[key] = value
    return whole


def _whole(weight: DTensor) -> Tensor:
    return weight.full_tensor()  # without gradients, as those of the other processes' parts would be lost


def _raise_on_all(error: Exception | None, mesh: DeviceMesh) -> None:
    """Waits for the first process, which alone has an error; the others raise one that tells its text."""
    text = [None if error is None else f"{type(error).__name__}: {error}"]
    for dim in range(mesh.ndim):  # along each dimension from its first process
        dist.broadcast_object_list(text, group=mesh.get_group(dim), group_src=0)
    if error is not None:
        raise error
    if text[0] is not None:
        raise RuntimeError(f"the model was not saved, the first process raised {text[0]}")
