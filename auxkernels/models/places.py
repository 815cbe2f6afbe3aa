"""Where in a decoder layer label embeddings are added: the modules whose input that is, in any family."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLACES = ("layer_input", "attention_output", "feed_forward_input")

_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "Wo", "wo", "attention_out", "output")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_OTHER_ATTENTION = re.compile(r"cross|encoder", re.IGNORECASE)  # of another text or of images
_FEED_FORWARDS = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "mlp_block", "intermediate", "fc1")
_FEED_FORWARD_CLASS = re.compile(r"(mlp|moe)$", re.IGNORECASE)  # of a layer that is nothing else, as Nemotron-H's
_BESIDE = ("shared_mlp",)  # read the same input as the feed-forward part, and are added to its output


def check_place(place: str) -> str:
    """The place; ValueError if there is none of that name."""
    if place not in PLACES:
        raise ValueError(f"place must be one of {', '.join(PLACES)}, got {place!r}")
    return place


def modules_at(
    place: str, lm: PreTrainedModel, layers: nn.ModuleList | Sequence[nn.Module], indices: Sequence[int]
) -> list[list[nn.Module]]:
    """For each of the chosen layers, the modules to whose input is added.

    Raises   ValueError naming the family and the layers that have no such place.
    """
    if place == "layer_input":
        return [[layers[i]] for i in indices]
    find, what = {
        "attention_output": (_output_projection, "output projection of an attention"),
        "feed_forward_input": (_feed_forward, "feed-forward part"),
    }[place]
    everywhere = [find(layer) for layer in layers]
    owners = Counter(id(module) for modules in everywhere for module in modules)
    found = [everywhere[i] for i in indices]
    missing = [
        i
        for i, modules in zip(indices, found, strict=True)
        if not modules or any(owners[id(module)] > 1 for module in modules)  # hooks would run in other layers too
    ]
    if missing:
        kinds = ", ".join(sorted({type(layers[i]).__name__ for i in missing}))
        raise ValueError(
            f"place={place!r} needs each conditioned layer to have one {what} of its own, which layers {missing} "
            f"({kinds}) of {type(lm).__name__} have not: choose other layers, or place='layer_input'"
        )
    return found


def width_at(place: str, lm: PreTrainedModel, found: list[list[nn.Module]], indices: Sequence[int]) -> int:
    """The width of what is added to, one for all layers. ValueError where they differ."""
    if place != "attention_output":
        return lm.config.get_text_config().hidden_size
    widths = {_in_features(modules[0]) for modules in found}  # of all heads, which may be more or less than the layer's
    if len(widths) > 1:
        got = {i: _in_features(modules[0]) for i, modules in zip(indices, found, strict=True)}
        raise ValueError(
            f"place={place!r} needs conditioned layers of one attention width, {type(lm).__name__} has {got}: choose "
            "among them, or place='layer_input'"
        )
    width = widths.pop()
    assert width is not None, "these modules are projections"
    return width


def _in_features(module: nn.Module) -> int | None:
    """The input width of a projection, also a quantised or an adapted one; None: not a projection."""
    for name in ("in_features", "nx"):  # the second is that of transformers' Conv1D
        if isinstance(getattr(module, name, None), int):
            return getattr(module, name)
    inner = getattr(module, "linear", None)
    return None if inner is None else _in_features(inner)


def _output_projection(layer: nn.Module) -> list[nn.Module]:
    """The projection that ends a layer's self-attention; [] where there is none or several."""
    found = []
    for name, module in layer.named_modules():
        *parents, last = name.split(".")
        if last not in _PROJECTIONS or not parents or _in_features(module) is None:
            continue
        names = parents + [type(layer.get_submodule(".".join(parents[: i + 1]))).__name__ for i in range(len(parents))]
        if any(_ATTENTION.search(one) for one in names) and not any(_OTHER_ATTENTION.search(one) for one in parents):
            found.append(module)
    return found if len(found) == 1 else []


def _feed_forward(layer: nn.Module) -> list[nn.Module]:
    """A layer's feed-forward part, and what reads the same input; [] where there is none or several."""
    children = dict(layer.named_children())
    named = [name for name in _FEED_FORWARDS if name in children]
    named = named or [name for name, child in children.items() if _FEED_FORWARD_CLASS.search(type(child).__name__)]
    if len(named) != 1 or "experts" in children:  # experts beside it read something else
        return []
    part = children[named[0]]
    while named[0] in dict(part.named_children()):  # a block with the norm and the residual sum around the part itself
        part = part.get_submodule(named[0])
    return [part, *(children[name] for name in _BESIDE if name in children)]
