"""A base's hidden states that a call is given, in place of those that its trunk would make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from .heads import OutputHead, output_head
from .modalities import has_more_than_text
from .modules import is_called_whole
from .small import hidden_width

# by layer: all that the base gave, or those that are read
Layers = tuple[Tensor, ...] | Mapping[int, Tensor]


@dataclass
class BaseStates:
    """hidden: [batch, seq, D], what enters the base's head. trunks: [batch, seq, D'] by trunk layer, what it gave."""

    hidden: Tensor
    trunks: dict[int, Tensor] = field(default_factory=dict)


def given_states(
    base: PreTrainedModel,
    trunk_layers: set[int],
    input_ids: Tensor | None,
    hidden: Tensor | None,
    trunk: Tensor | Mapping[int, Tensor] | None,
    refused: dict[str, bool],
    kwargs: dict[str, Any],
) -> BaseStates | None:
    """The states of a call in the base's dtype, None where it is given none.

    trunk_layers   those that are read; trunk: the states of the one, or by layer
    refused        arguments beside which there can be none, and whether the call has them
    Raises    TypeError, ValueError: shapes, dtypes, a trunk layer's states that lack or are not read, other arguments
    """
    if hidden is None:
        if trunk is not None:
            raise ValueError("base_trunk_states must come with base_hidden_states, got them alone")
        return None
    for name, is_given in {**refused, "images, video or sound": has_more_than_text(kwargs)}.items():
        if is_given:
            raise ValueError(f"{name} must not be given with base_hidden_states: the base is not run")
    if is_called_whole(base):
        raise ValueError(
            "base_hidden_states must be for a transformers model without hooks whose head is one layer, got "
            f"{type(base).__name__}: only its logits are known"
        )
    trunks = _by_layer(trunk, trunk_layers)
    _check("base_hidden_states", hidden, input_ids, hidden_width(base))
    head = output_head(base)
    dtype = head.weight.dtype if isinstance(head, OutputHead) else base.dtype
    for layer, states in trunks.items():
        name = f"base_trunk_states[{layer}]" if isinstance(trunk, Mapping) else "base_trunk_states"
        _check(name, states, input_ids, base.config.get_text_config().hidden_size)
    return BaseStates(hidden.to(dtype), {layer: states.to(dtype) for layer, states in trunks.items()})


def _by_layer(given: Tensor | Mapping[int, Tensor] | None, layers: set[int]) -> dict[int, Tensor]:
    """The states of each layer that is read. Raises ValueError."""
    if isinstance(given, Mapping):
        if set(given) != layers:
            raise ValueError(f"base_trunk_states must have those of the layers {sorted(layers)}, got {sorted(given)}")
        return dict(given)
    if len(layers) > 1:
        got = "none" if given is None else "a tensor"
        raise ValueError(f"base_trunk_states must be a dict of those of the layers {sorted(layers)}, got {got}")
    if (given is None) != (not layers):
        raise ValueError(
            f"base_trunk_states must be given with base_hidden_states where there is a trunk layer, and only there, "
            f"got {'none' if given is None else 'some'} for trunk_layer={next(iter(layers), None)}"
        )
    return {} if given is None else dict.fromkeys(layers, given)


def _check(name: str, states: Tensor, input_ids: Tensor | None, width: int) -> None:
    if not states.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {states.dtype}")
    if input_ids is not None and states.shape != (*input_ids.shape, width):
        raise ValueError(f"{name} must be {[*input_ids.shape, width]}, got {list(states.shape)}")
