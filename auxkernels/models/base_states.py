"""A base's hidden states that a call is given, in place of those that its trunk would make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
    """hidden: [batch, seq, D], what enters the base's head. trunk: [batch, seq, D'], what a trunk layer gave."""

    hidden: Tensor
    trunk: Tensor | None = None

    def of_layers(self, trunk_layer: int | None) -> dict[int, Tensor]:
        """In place of all the base's hidden states: the one that is read."""
        return {} if trunk_layer is None or self.trunk is None else {trunk_layer: self.trunk}


def given_states(
    base: PreTrainedModel,
    trunk_layer: int | None,
    input_ids: Tensor | None,
    hidden: Tensor | None,
    trunk: Tensor | None,
    refused: dict[str, bool],
    kwargs: dict[str, Any],
) -> BaseStates | None:
    """The states of a call in the base's dtype, None where it is given none.

    refused   arguments beside which there can be none, and whether the call has them
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
    if (trunk is None) != (trunk_layer is None):
        raise ValueError(
            f"base_trunk_states must be given with base_hidden_states where there is a trunk layer, and only there, "
            f"got {'none' if trunk is None else 'some'} for trunk_layer={trunk_layer}"
        )
    _check("base_hidden_states", hidden, input_ids, hidden_width(base))
    head = output_head(base)
    dtype = head.weight.dtype if isinstance(head, OutputHead) else base.dtype
    if trunk is None:
        return BaseStates(hidden.to(dtype))
    _check("base_trunk_states", trunk, input_ids, base.config.get_text_config().hidden_size)
    return BaseStates(hidden.to(dtype), trunk.to(dtype))


def _check(name: str, states: Tensor, input_ids: Tensor | None, width: int) -> None:
    if not states.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {states.dtype}")
    if input_ids is not None and states.shape != (*input_ids.shape, width):
        raise ValueError(f"{name} must be {[*input_ids.shape, width]}, got {list(states.shape)}")
