"""Gradient checkpointing of layers whose hooks read a model's state."""

from __future__ import annotations

import warnings
from contextlib import contextmanager, nullcontext

from transformers.modeling_layers import GradientCheckpointingLayer

# some versions checkpoint a layer's __call__, so that its hooks run again in the backward pass; others its forward,
# which gets the hidden states as the hooks left them.
HOOKS_RUN_AGAIN = "__call__" in vars(GradientCheckpointingLayer)


class CheckpointingThroughHooks:
    """Makes what the hooks add in the recomputation what they added at first, whatever ran in between."""

    _checkpoints_through_hooks = False

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        """As any model's. ValueError for use_reentrant=True where the hooks run again in the backward pass."""
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if HOOKS_RUN_AGAIN:
            if options["use_reentrant"]:
                raise ValueError("gradient checkpointing of a planner's language model needs use_reentrant=False")
            options["context_fn"] = self._checkpoint_contexts
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

    def _check_checkpointing(self) -> None:
        """RuntimeError where the recomputation would lack what the hooks add."""
        if not HOOKS_RUN_AGAIN or self._checkpoints_through_hooks:
            return
        if any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in self._decoder_layers()):
            raise RuntimeError("enable gradient checkpointing on the PlannerForCausalLM, not on its language model")

    def _checkpoint_contexts(self):
        """Contexts of a checkpointed layer's first run and of its recomputation."""
        return nullcontext(), self._again(self._active.rows, self._active.segment_ids)

    @contextmanager
    def _again(self, rows, segment_ids):
        before = self._active.rows, self._active.segment_ids
        self._active.set(rows, segment_ids)
        try:
            yield
        finally:
            self._active.set(*before)
