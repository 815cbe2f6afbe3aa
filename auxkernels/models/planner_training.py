"""What of a planner-conditioned language model is trained, and when."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback

from .mixins import Model
from .planner_checkpointing import check_own_dropout

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments
    from typing_extensions import Self


class Freezing(Model):
    """Freezes the `lm` and the `planner` of a model: no gradients, and eval mode whatever train() says."""

    def freeze_lm(self, frozen: bool = True) -> None:
        """Whether the language model gets gradients. What was frozen before stays so.

        Raises   ValueError: it is checkpointed, and its layers apply dropout themselves (`check_own_dropout`).
        """
        layers = self._decoder_layers()
        if frozen and any(getattr(layer, "gradient_checkpointing", False) for layer in layers):
            check_own_dropout(self.lm, layers)
        self.config.freeze_lm = frozen
        self._freeze("lm", self.lm, frozen)

    def freeze_planner(self, frozen: bool = True) -> None:
        """Whether the planner gets gradients. What was frozen before stays so. ValueError without a planner."""
        if self.planner is None:
            raise ValueError("there is no planner to freeze")
        self._freeze("planner", self.planner, frozen)

    def _freeze(self, name: str, module: nn.Module, frozen: bool) -> None:
        if frozen:
            names = [key for key, weight in module.named_parameters() if weight.requires_grad]
            self._frozen[name] = self._frozen.get(name, []) + names
            module.requires_grad_(False)
        else:
            for key in self._frozen.pop(name, []):
                module.get_parameter(key).requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As any module's, but what is frozen stays in eval mode."""
        super().train(mode)
        if "lm" in self._frozen:
            self.lm.eval()
            for layer in self._decoder_layers():  # a layer that checkpoints does so in training mode only
                layer.training = mode and getattr(layer, "gradient_checkpointing", False)
        if "planner" in self._frozen:
            self.planner.eval()
        return self


class UnfreezePlanner(TrainerCallback):
    """Keeps the planner of a `PlannerForCausalLM` frozen until a point of training, then trains it with the rest.

    at_step       the first optimizer step that trains it, counted from 0
    at_fraction   the same as a share of all steps, in [0, 1]; exactly one of the two
    The planner must not be frozen when the Trainer makes its optimizer (ValueError): its weights would never be in it.
    DistributedDataParallel needs find_unused_parameters=True, since the planner has no gradient at first.
    """

    def __init__(self, at_step: int | None = None, at_fraction: float | None = None):
        if (at_step is None) == (at_fraction is None):
            raise ValueError("exactly one of at_step and at_fraction must be given")
        if at_step is not None and at_step < 0:
            raise ValueError(f"at_step must not be negative, got {at_step}")
        if at_fraction is not None and not 0 <= at_fraction <= 1:
            raise ValueError(f"at_fraction must be in [0, 1], got {at_fraction}")
        self.at_step, self.at_fraction = at_step, at_fraction

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        model = _freezing(model)
        weights = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        if not any(id(weight) in weights for weight in model.planner.parameters()):
            raise ValueError("the optimizer does not hold the planner's weights: the planner was frozen before")
        if not self._is_reached(state):
            model.freeze_planner()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        model = _freezing(model)
        if "planner" in model._frozen and self._is_reached(state):
            model.freeze_planner(False)

    def _is_reached(self, state: TrainerState) -> bool:
        start = self.at_fraction * state.max_steps if self.at_step is None else self.at_step
        return state.global_step >= start


def _freezing(model: nn.Module) -> Freezing:
    """The model with a planner that a Trainer's model is or wraps."""
    found = next((module for module in model.modules() if isinstance(module, Freezing)), None)
    if found is None or found.planner is None:
        raise TypeError(f"UnfreezePlanner needs a PlannerForCausalLM with a planner, got {type(model).__name__}")
    return found
