"""The output head of a causal language model as a `Head` source, so that its [N, V] logits are never made."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from .. import checks
from ..sources import Head, Logits, Source
from .modules import (
    backbone,
    call_of,
    device_of,
    features,
    head_width,
    is_called_whole,
    is_plain,
    is_vocabulary_parallel,
    run,
)
from .trunkless import has_trunk

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        return Head(hidden.to(self.weight.device), self.weight, bias=self.bias, scale=self.scale, softcap=self.softcap)

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


class CalledHead(NamedTuple):
    """A head that must be called, because a product with its weight would pass something by: see `modules`.

    The logits [*, V] are stored, and their gradient where one is required; scale and softcap are as in `OutputHead`.
    """

    call: Callable[[Tensor], Tensor]
    scale: float = 1.0
    softcap: float | None = None

    def source(self, hidden: Tensor) -> Logits:
        return Logits(self.call(hidden), scale=self.scale, softcap=self.softcap)

    def sources(self, hidden: Tensor) -> list[Logits]:
        return [self.source(hidden)]

    def logits(self, hidden: Tensor) -> Tensor:
        z = self.call(hidden)
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z if self.scale == 1.0 else self.scale * z


class ParallelHead(NamedTuple):
    """A head of which each process holds some columns (tensor parallelism); hidden states are the same on all of them.

    A loss exchanges a few numbers a row; for logits the head is called and all columns are gathered.
    """

    weight: DTensor
    bias: Tensor | None
    call: Callable[[Tensor], Tensor]
    scale: float
    softcap: float | None

    def source(self, hidden: Tensor) -> Head:
        if not isinstance(hidden, DTensor):
            hidden = DTensor.from_local(hidden, self.weight.device_mesh, [Replicate()], run_check=False)
        return Head(hidden, self.weight, bias=self.bias, scale=self.scale, softcap=self.softcap)

    def sources(self, hidden: Tensor) -> list[Head]:
        return [self.source(hidden)]

    def logits(self, hidden: Tensor) -> Tensor:
        return CalledHead(self.call, self.scale, self.softcap).logits(hidden)


_WITHOUT_SCALE = ("aya_vision", "cohere2_vision")  # whose text models alone apply their configuration's scale
_OF_THE_MODEL = CalledHead(lambda logits: logits)  # behind a model that is called whole


def output_head(model: PreTrainedModel) -> OutputHead | CalledHead | ParallelHead:
    """What turns `features` of a transformers causal LM into logits. `check_output_head` compares with the model.

    PEFT's wrappers are looked through: a head trained whole (`modules_to_save`), and LoRA on it. A head, or a model,
    with hooks or with weights of other kinds is called, but for heads that tensor parallelism cuts by their columns.
    """
    if is_called_whole(model):
        return _OF_THE_MODEL
    embeddings = model.get_output_embeddings()
    if embeddings is None:
        raise TypeError(f"{type(model).__name__} must have output embeddings, got None")
    layer, low_rank = without_wrappers(embeddings)
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)  # FalconH1 multiplies
    scaling = float(getattr(config, "logits_scaling", None) or 1.0)  # Granite divides, HyperCLOVAX multiplies
    scale = scale * scaling if config.model_type == "hyperclovax" else scale / scaling
    scale /= float(getattr(config, "logits_mup_width_multiplier", None) or 1.0)  # Inkling divides
    if model.config.model_type in _WITHOUT_SCALE:
        scale = 1.0
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
    softcap = next((cap for cap in (getattr(config, name, None) for name in caps) if cap is not None), None)
    multiplier = float(getattr(config, "output_multiplier", None) or 1.0)  # Muse multiplies in front of the softcap
    scale, softcap = scale * multiplier, None if softcap is None else float(softcap) / multiplier
    width = head_width(model)
    if is_vocabulary_parallel(embeddings) and width == embeddings.out_features:
        return ParallelHead(embeddings.weight, embeddings.bias, call_of(model, embeddings), scale, softcap)
    if not isinstance(layer, nn.Linear) or not is_plain(embeddings):
        called = call_of(model, embeddings)
        return CalledHead(lambda h: called(h)[..., :width], scale, softcap)
    if low_rank and softcap is not None:
        raise TypeError("the output embeddings must have no adapters under a softcap, got LoRA on them")
    weight: Tensor = layer.weight
    bias: Tensor | None = layer.bias
    if width < len(weight):  # the rest pads
        weight, bias = weight[:width], None if bias is None else bias[:width]
        low_rank = tuple(
            a._replace(weight=a.weight[:width], bias=None if a.bias is None else a.bias[:width]) for a in low_rank
        )
    return OutputHead(weight, bias, scale, softcap, low_rank)


def without_wrappers(layer: Any) -> tuple[Any, tuple[LowRank, ...]]:
    """(the layer in PEFT's wrappers, the adapters that they add)."""
    copies = getattr(layer, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        return (layer.original_module if layer.disable_adapters else copies[layer.active_adapters[0]]), ()
    downs = getattr(layer, "lora_A", None)
    if not isinstance(downs, nn.ModuleDict) or layer.lora_variant:  # variants (DoRA, ...) compute something else
        return layer, ()
    names = [] if layer.disable_adapters or layer.merged else [n for n in layer.active_adapters if n in downs]
    return layer.base_layer, tuple(_low_rank(layer, name) for name in names)


def _low_rank(layer: Any, name: str) -> LowRank:
    down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    return LowRank(lambda x: down(dropout(x.to(down.weight.dtype))), up.weight, up.bias, layer.scaling[name])


def kept_positions(logits_to_keep: int | Tensor) -> slice | Tensor:
    """The positions that get logits: so many of the last, 0: all, or those that a tensor names."""
    if isinstance(logits_to_keep, Tensor):
        return logits_to_keep
    return slice(-checks.integer("logits_to_keep", logits_to_keep), None)


def detached(source: Source) -> Source:
    """The same source without a gradient of its own: of its head, or of logits."""
    if isinstance(source, Logits):
        return replace(source, values=source.values.detach())
    bias = None if source.bias is None else source.bias.detach()
    return replace(source, weight=source.weight.detach(), bias=bias)


def zero_output_head(model: PreTrainedModel) -> None:
    """Replaces the output head's weight and bias by trainable zeros. A head tied to the input embeddings is untied."""
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear) or not is_plain(layer):
        raise ValueError(
            f"zero_init must be False for {type(model).__name__}, whose output head is not a Linear layer with weights "
            "in memory and without hooks: or load it so, and offload, shard or quantise the joined model"
        )
    untie_output_head(model)
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight))
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.zeros_like(layer.bias))


def untie_output_head(model: PreTrainedModel) -> nn.Module:
    """The output head's layer, whose weight is no longer said to be that of the input embeddings.

    The model gets a configuration of its own to say so: others may share the one it had.
    """
    layer = model.get_output_embeddings()
    tied = {name for name, weight in model.named_parameters(remove_duplicate=False) if weight is layer.weight}
    _own_config(model)
    model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    keys = model.all_tied_weights_keys
    model.all_tied_weights_keys = {to: source for to, source in keys.items() if not tied & {to, source}}
    return layer


def _own_config(model: PreTrainedModel) -> None:
    """Gives all the modules that hold the model's configuration, or a part of it, a copy."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        held = module.__dict__.get("config")
        if id(held) in copies:
            module.config = copies[id(held)]


def probe(model: PreTrainedModel) -> Tensor:
    """Some tokens [1, n] that are not padding, whose embeddings some models hold at zero."""
    embeddings, padding = (
        model.get_input_embeddings().weight,
        getattr(model.config.get_text_config(), "pad_token_id", None),
    )
    tokens = [i for i in range(min(8, embeddings.shape[0])) if i != padding]
    return torch.tensor([tokens], device=device_of(model))


@torch.no_grad()
def check_output_head(model: PreTrainedModel) -> None:
    """Raises ValueError where the model's own logits are not what `output_head` makes of its last hidden states.

    The model is shown random hidden states in place of its own, which may all be zero (behind a zero norm); its own
    where it does not call its base model as a module. Without a trunk in memory nothing is left to compare with: it was
    compared when the cache was written.
    """
    if is_called_whole(model) or not has_trunk(model):
        return
    tokens, was_training, shown = probe(model), model.training, []

    def show(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        own = output[0] if isinstance(output, tuple) else output.last_hidden_state
        drawn = torch.Generator("cpu").manual_seed(0)
        shown.append(torch.randn(own.shape, generator=drawn, dtype=torch.float32, device="cpu").to(own))
        if isinstance(output, tuple):
            return shown[0], *output[1:]
        output.last_hidden_state = shown[0]
        return output

    hook = backbone(model).register_forward_hook(show)
    model.eval()
    try:
        want = model(input_ids=tokens, use_cache=False).logits.float()
        hook.remove()
        hidden = shown[0] if shown else features(run(model, input_ids=tokens, use_cache=False))
        got = output_head(model).logits(hidden).float()
    finally:
        hook.remove()
        model.train(was_training)
    tolerance = 64 * torch.finfo(hidden.dtype).eps * want.abs().max().item()
    if want.shape != got.shape or not torch.allclose(want, got.to(want.device), rtol=0.0, atol=tolerance):
        raise ValueError(f"the logits of {type(model).__name__} are not those of a linear head with scale and softcap")
    if want.shape[-1] != head_width(model):
        raise ValueError(
            f"the head of {type(model).__name__} must give {head_width(model)} logits, got {want.shape[-1]}"
        )
