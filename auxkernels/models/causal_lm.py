"""What a composite must know of the causal language models in it, and of a call of one."""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin
from transformers.modeling_outputs import MoeModelOutputWithPast

from .cache_argument import CACHE
from .heads import OutputHead
from .modalities import input_names
from .modules import backbone, features, run
from .trunkless import check_holds_trunk_layer, has_trunk

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

# -- recurrent and convolutional states --------------------------------------------------------------------------------


def is_stateful(*models: nn.Module) -> bool:
    """Whether transformers says of any of these, or of a model inside, that it cannot take back what it has read."""
    return any(getattr(module, "_is_stateful", False) for model in models for module in model.modules())


def keeps_state(model: PreTrainedModel) -> bool:
    """Whether a model carries a recurrent or convolutional state along the tokens, padding between them included."""
    if is_stateful(model):
        return True
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=model.config).layers)


# -- caches ------------------------------------------------------------------------------------------------------------

# an argument of that name, which is not what `DynamicCache` is: with a prompt in it, or one that is not returned
_OTHER_CACHES = ("cpmant", "flaubert", "xlm")


def has_cache(model: PreTrainedModel) -> bool:
    """Whether a model reads on from a `DynamicCache` that tells how many tokens it holds.

    Some have none (OpenAI-GPT, XLM), some one of their own (RWKV, XLNet, Reformer), and one that holds recurrent states
    alone (Mamba) does not tell; CPM-Ant's holds a prompt of its own too. Composites of such models read all tokens
    again at each step.
    """
    if model.config.model_type in _OTHER_CACHES or CACHE not in input_names(model):
        return False
    layers = DynamicCache(config=model.config).layers
    tells = not layers or any(isinstance(layer, CacheLayerMixin) for layer in layers)
    return tells and type(model)._supports_default_dynamic_cache()


# -- positions ---------------------------------------------------------------------------------------------------------


def position_offset(model: PreTrainedModel) -> int:
    """The position of a text's first token where a model is given none.

    RoBERTa and its like count from behind the padding token's id. transformers' generation passes positions from 0 on,
    others than those that such a model was trained with.
    """
    counting = (module for module in model.modules() if hasattr(module, "create_position_ids_from_input_ids"))
    return next((module.padding_idx + 1 for module in counting), 0)


# -- layers -----------------------------------------------------------------------------------------------------------


def trunk_index(given: int, num_layers: int) -> int:
    """Which of a model's num_layers + 1 hidden states is meant; negative: counted from the last."""
    given = operator.index(given)
    if not -num_layers - 1 <= given <= num_layers:
        raise ValueError(f"trunk_layer must be in [{-num_layers - 1}, {num_layers}], the base's layers, got {given}")
    return given if given >= 0 else given + num_layers + 1


def check_trunk(base: PreTrainedModel, index: int, tokens: Tensor) -> None:
    """ValueError where a base has no hidden states [batch, n, width] at that index, which an auxiliary could read."""
    if not has_trunk(base):
        return check_holds_trunk_layer(base, index)
    states = _tried(base, tokens, output_hidden_states=True).get("hidden_states")
    want = [*tokens.shape, base.config.get_text_config().hidden_size]
    got = None if not states or len(states) <= index else list(states[index].shape)
    if got != want:
        raise ValueError(f"trunk_layer {index} of {type(base).__name__} must be [batch, n, width] = {want}, got {got}")


def check_layers(lm: PreTrainedModel, layers: list[nn.Module], tokens: Tensor, width: int | None = None) -> None:
    """ValueError where layers do not take hidden states [..., batch, n, width], one for each token.

    width   None: of any width
    """
    shapes = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shapes.append(list((args[0] if args else kwargs["hidden_states"]).shape))

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        _tried(lm, tokens)
    finally:
        for hook in hooks:
            hook.remove()
    is_wrong = (shape[-3:-1] != list(tokens.shape) or shape[-1] != (width or shape[-1]) for shape in shapes)
    wrong = [shape for shape, one in zip(shapes, is_wrong, strict=True) if one]
    if wrong:
        want = f"[batch, n, width] = [{tokens.shape[0]}, {tokens.shape[1]}, {width or '...'}]"
        raise ValueError(
            f"layers of {type(lm).__name__} must take hidden states {want} to be conditioned, got {wrong[0]}"
        )


@torch.no_grad()
def _tried(model: PreTrainedModel, tokens: Tensor, **options: Any) -> ModelOutput:
    was_training = model.training
    model.eval()
    try:
        return run(model, input_ids=tokens, use_cache=False, **options)
    finally:
        model.train(was_training)


# -- packed texts ------------------------------------------------------------------------------------------------------


def are_packed(attention_mask: Tensor | None, position_ids: Tensor | None) -> bool:
    """Whether rows hold several texts, which positions that begin anew keep apart: where there is no mask or cache."""
    if attention_mask is not None or position_ids is None or position_ids.dim() != 2 or torch.compiler.is_compiling():
        return False
    return bool((position_ids.diff(dim=-1) != 1).any())


# -- mixtures of experts -----------------------------------------------------------------------------------------------


class _Given(nn.Module):
    """Stands for a module that has been run, and returns what it returned."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.outputs


def wants_router_logits(model: PreTrainedModel, given: bool | None) -> bool:
    """Whether a model's routers are balanced: as the call says, else as its configuration does; if it has routers."""
    configured = getattr(model.config.get_text_config(), "output_router_logits", None)
    return configured is not None and bool(configured if given is None else given)


def router_loss(model: PreTrainedModel, outputs: ModelOutput, attention_mask: Tensor | None) -> Tensor | None:
    """The weighted balancing loss that a mixture of experts adds to its own loss: 0-d, with a gradient.

    outputs   what `run` returned of it, with router logits; None is returned where there are none
    The model's own `forward` computes it, since families differ: behind a base model that has been run, with the last
    token's logits and a cross-entropy of zero.
    """
    router_logits = outputs.get("router_logits")
    if router_logits is None or len(router_logits) == 0:
        return None
    hidden, calls = features(outputs), []
    model = next(module for module in model.modules() if isinstance(module, PreTrainedModel))  # out of a wrapper
    body = backbone(model)
    stand_ins = {
        next(name for name, module in model._modules.items() if module is body): _Given(
            MoeModelOutputWithPast(hidden[:, -1:], router_logits=outputs.router_logits)
        )
    }
    if "last_hidden_state" not in outputs:  # it was called with its head, whose weights may be gone again
        head = model.get_output_embeddings()
        stand_ins |= {name: nn.Identity() for name, module in model._modules.items() if module is head}

    def no_loss(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return hidden.new_zeros((), dtype=torch.float32)

    shell = copy.copy(model)  # shares the weights; its base model and its loss are replaced, the model's are not
    shell._modules = {**model._modules, **stand_ins}
    shell.loss_function = no_loss
    no_ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    loss = (
        type(model)
        .forward(
            shell,
            input_ids=no_ids,
            attention_mask=attention_mask,
            labels=no_ids,
            output_router_logits=True,
            return_dict=True,
        )
        .loss
    )
    if len(calls) != 1:
        raise ValueError(
            f"output_router_logits must be False for {type(model).__name__}, whose balancing loss cannot be told from "
            "its cross-entropy"
        )
    return loss


# -- what is frozen ----------------------------------------------------------------------------------------------------


def check_frozen(model: nn.Module, name: str, hint: str, own: Collection[str] = ()) -> None:
    """Raises ValueError where a model that is frozen has weights that require gradients, such as adapters.

    own   names, behind that of the model, of weights of which this does not matter
    """
    if torch.compiler.is_compiling() or not any(weight.requires_grad for weight in model.parameters()):
        return
    for key, weight in model.named_parameters(prefix=name):
        if weight.requires_grad and key not in own:
            raise ValueError(
                f"the frozen {name} must have no trainable weights, got {key}: PEFT keeps out of it with "
                rf"exclude_modules=r'{name}\..*', and with whole names in modules_to_save{hint}"
            )


def is_dead(head: OutputHead) -> bool:
    """Whether nothing can pass a gradient through an output head: zeros that are not trained, without adapters."""
    if torch.compiler.is_compiling() or head.weight.requires_grad or head.weight.is_meta or head.low_rank:
        return False
    return not head.weight.detach().any()
