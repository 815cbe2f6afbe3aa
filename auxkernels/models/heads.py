"""The output head of a causal language model as a `Head` source, so that its [N, V] logits are never made."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import checks
from ..sources import Head


class LowRank(NamedTuple):
    """An adapter of a head, which adds scale * (down(hidden) @ weight.T + bias) to its logits; weight is [V, r]."""

    down: Callable[[Tensor], Tensor]
    weight: Tensor
    bias: Tensor | None
    scale: float


class OutputHead(NamedTuple):
    """What turns the last hidden states of a model into its logits: scale * softcap(hidden @ weight.T + bias).

    low_rank   adapters of the layer (LoRA); only without a softcap
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    low_rank: tuple[LowRank, ...] = ()

    def source(self, hidden: Tensor) -> Head:
        """hidden [*, D] -> Head. TypeError for a head with adapters, which is the sum of several: `sources`."""
        if self.low_rank:
            raise TypeError("the output embeddings must have no adapters here, got LoRA on them")
        return Head(hidden, self.weight, bias=self.bias, scale=self.scale, softcap=self.softcap)

    def sources(self, hidden: Tensor) -> list[Head]:
        """hidden [*, D] -> the sources whose sum are the logits."""
        adapters = [Head(a.down(hidden), a.weight, bias=a.bias, scale=self.scale * a.scale) for a in self.low_rank]
        return [self._replace(low_rank=()).source(hidden), *adapters]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [*, D] -> [*, V]: for decoding, where there are few rows."""
        z = nn.functional.linear(hidden, self.weight, self.bias)
        for a in self.low_rank:
            z = z + a.scale * nn.functional.linear(a.down(hidden), a.weight, a.bias).to(z.dtype)
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z if self.scale == 1.0 else self.scale * z


def output_head(model) -> OutputHead:
    """The head of a transformers causal LM, as its configuration says. `check_output_head` compares with the model.

    PEFT's wrappers are looked through: a head trained whole (`modules_to_save`), and LoRA on it.
    """
    layer, low_rank = _without_wrappers(model.get_output_embeddings())
    if not isinstance(layer, nn.Linear):
        kind = f"{type(layer).__module__}.{type(layer).__name__}"
        raise TypeError(f"the output embeddings of {type(model).__name__} must be a Linear, got {kind}")
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)  # FalconH1 multiplies
    scaling = float(getattr(config, "logits_scaling", None) or 1.0)  # Granite divides, HyperCLOVAX multiplies
    scale = scale * scaling if config.model_type == "hyperclovax" else scale / scaling
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    if low_rank and softcap is not None:
        raise TypeError("the output embeddings must have no adapters under a softcap, got LoRA on them")
    return OutputHead(layer.weight, layer.bias, scale, None if softcap is None else float(softcap), low_rank)


def _without_wrappers(layer) -> tuple[nn.Module, tuple[LowRank, ...]]:
    copies = getattr(layer, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        return (layer.original_module if layer.disable_adapters else copies[layer.active_adapters[0]]), ()
    downs = getattr(layer, "lora_A", None)
    if not isinstance(downs, nn.ModuleDict) or layer.lora_variant:  # variants (DoRA, ...) compute something else
        return layer, ()
    names = [] if layer.disable_adapters or layer.merged else [n for n in layer.active_adapters if n in downs]
    return layer.base_layer, tuple(_low_rank(layer, name) for name in names)


def _low_rank(layer, name: str) -> LowRank:
    down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    return LowRank(lambda x: down(dropout(x.to(down.weight.dtype))), up.weight, up.bias, layer.scaling[name])


def kept_positions(logits_to_keep: int | Tensor) -> slice | Tensor:
    """The positions that get logits: so many of the last, 0: all, or those that a tensor names."""
    if isinstance(logits_to_keep, Tensor):
        return logits_to_keep
    return slice(-checks.integer("logits_to_keep", logits_to_keep), None)


def detached(source: Head) -> Head:
    """The same source with a head that gets no gradient."""
    bias = None if source.bias is None else source.bias.detach()
    return replace(source, weight=source.weight.detach(), bias=bias)


def zero_output_head(model) -> None:
    """Replaces the output head's weight and bias by trainable zeros. A head tied to the input embeddings is untied.

    The model gets a configuration of its own to say so: others may share the one it had.
    """
    output_head(model)  # that it is a Linear
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise ValueError("zero_init must be False where adapters are on the head: or put them on after joining")
    tied = {name for name, weight in model.named_parameters(remove_duplicate=False) if weight is layer.weight}
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight))
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.zeros_like(layer.bias))
    _own_config(model)
    model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    keys = model.all_tied_weights_keys
    model.all_tied_weights_keys = {to: source for to, source in keys.items() if not tied & {to, source}}


def _own_config(model) -> None:
    """Gives all the modules that hold the model's configuration, or a part of it, a copy."""
    copies: dict = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        held = module.__dict__.get("config")
        if id(held) in copies:
            module.config = copies[id(held)]


def _probe(model) -> Tensor:
    """Some tokens [1, n] that are not padding, whose embeddings some models hold at zero."""
    embeddings, padding = model.get_input_embeddings().weight, model.config.get_text_config().pad_token_id
    tokens = [i for i in range(min(8, embeddings.shape[0])) if i != padding]
    return torch.tensor([tokens], device=embeddings.device)


@torch.no_grad()
def check_output_head(model) -> None:
    """Raises ValueError where the model's own logits are not what `output_head` makes of its last hidden states.

    The model is shown random hidden states in place of its own, which may all be zero (behind a zero norm); its own
    where it does not call its base model as a module.
    """
    weight, tokens, was_training = output_head(model).weight, _probe(model), model.training
    hidden = torch.randn(*tokens.shape, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    shown = []

    def show(module, args, output):
        shown.append(True)
        if isinstance(output, tuple):
            return hidden, *output[1:]
        output.last_hidden_state = hidden
        return output

    hook = model.base_model.register_forward_hook(show)
    model.eval()
    try:
        want = model(input_ids=tokens, use_cache=False).logits.float()
        hook.remove()
        if not shown:
            hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    finally:
        hook.remove()
        model.train(was_training)
    got = output_head(model).logits(hidden).float()
    tolerance = 64 * torch.finfo(weight.dtype).eps * want.abs().max().item()
    if want.shape != got.shape or not torch.allclose(want, got, rtol=0.0, atol=tolerance):
        raise ValueError(f"the logits of {type(model).__name__} are not those of a linear head with scale and softcap")
