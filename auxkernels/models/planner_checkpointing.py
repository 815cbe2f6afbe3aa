"""Gradient checkpointing of layers whose hooks read a model's state."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .conditioning import ActiveRows
from .mixins import Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# some versions checkpoint a layer's __call__, so that its hooks run again in the backward pass; others its forward,
# which gets the hidden states as the layer's own hooks left them, and runs those of modules inside again.
HOOKS_RUN_AGAIN = "__call__" in vars(GradientCheckpointingLayer)


class CheckpointingThroughHooks(Model):
    """Makes what the hooks add in the recomputation what they added at first, whatever ran in between."""

    _checkpoints_through_hooks = False

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """As any model's.

        Raises   ValueError: use_reentrant=True where the hooks run again in the backward pass; a frozen language model
                 whose layers apply dropout themselves (`check_own_dropout`).
        """
        if "lm" in self._frozen:
            check_own_dropout(self.lm, self._decoder_layers())
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if self._hooks_run_again():
            if options["use_reentrant"]:
                raise ValueError("gradient checkpointing of a planner's language model needs use_reentrant=False")
            options["context_fn"] = partial(_checkpoint_contexts, self._active)
            self._checkpoints_through_hooks = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the name changes in transformers 6
            super().gradient_checkpointing_enable(options, **kwargs)
        self.train(self.training)  # a frozen layer is in training mode only to be checkpointed

    def gradient_checkpointing_disable(self) -> None:
        """As any model's."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            super().gradient_checkpointing_disable()
        self.train(self.training)

    def _hooks_run_again(self) -> bool:
        return HOOKS_RUN_AGAIN or self.config.place != "layer_input"

    def _check_checkpointing(self) -> None:
        """RuntimeError where the recomputation would lack what the hooks add."""
        if not self._hooks_run_again() or self._checkpoints_through_hooks:
            return
        if any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in self._decoder_layers()):
            raise RuntimeError("enable gradient checkpointing on the PlannerForCausalLM, not on its language model")


def _checkpoint_contexts(active: ActiveRows) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a checkpointed layer's first run and of its recomputation. They keep no model alive."""
    return nullcontext(), _again(active, active.rows, active.segment_ids)


@contextmanager
def _again(active: ActiveRows, rows: tuple[Tensor, ...] | None, segment_ids: Tensor | None) -> Iterator[None]:
    before = active.rows, active.segment_ids  # of this thread: the backward pass may have its own
    active.set(rows, segment_ids)
    try:
        yield
    finally:
        active.set(*before)


def check_own_dropout(lm: PreTrainedModel, layers: Iterable[nn.Module]) -> None:
    """ValueError for layers that would drop out in a frozen model, as they are in training mode to be checkpointed.

    Those are layers whose own `forward` reads `training`, as OPT's and Falcon's, in a model with dropout. Dropout in
    their submodules stays off, since these are in eval mode. Only the code of `forward` is looked at.
    """
    config = lm.config.get_text_config().to_dict()
    rates = {name: value for name, value in config.items() if "drop" in name and isinstance(value, float) and value > 0}
    is_own = any("training" in inspect.unwrap(type(layer).forward).__code__.co_names for layer in layers)
    if rates and is_own:
        raise ValueError(
            f"a frozen {type(lm).__name__} cannot be checkpointed with dropout, which its layers apply in training "
            f"mode: load it with {', '.join(f'{name}=0.0' for name in rates)}, or use freeze_lm=False"
        )
