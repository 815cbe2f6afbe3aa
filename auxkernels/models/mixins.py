"""What the mixins in front of a model are checked against."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Model
else:
    Model = object  # nothing at runtime: the model itself comes behind its mixins

__all__ = ["Model"]
