"""A frozen causal language model and a trainable auxiliary one whose logits are added: auxiliary tuning."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from ..cross_entropy import aux_cross_entropy
from ..sources import Logits, Source, row_scale
from . import adapters, base_pointer, saving
from . import auxiliary_inputs as reading
from .causal_lm import (
    are_packed,
    check_frozen,
    check_trunk,
    has_cache,
    is_dead,
    is_stateful,
    keeps_state,
    router_loss,
    trunk_index,
    wants_router_logits,
)
from .composite_generation import GenerationOfComposites, inherited
from .config_fields import describe_as
from .configuration import AuxiliaryConfig
from .heads import (
    CalledHead,
    OutputHead,
    check_output_head,
    detached,
    kept_positions,
    output_head,
    probe,
    zero_output_head,
)
from .modules import device_of, features, head_width, run
from .paired_cache import PairedCache
from .small import (
    added,
    check_hidden_states,
    check_zero_init,
    drop_unread_weights,
    hidden_width,
    is_frozen_at_zero,
    low_rank_head,
    new_head,
    small_model,
)
from .token_statistics import OwnTokenStatistics, check_no_further_loss
from .vocabulary import check_tokenizers, shared_width

_GROWING = (None, "dynamic", "dynamic_full")


@dataclass
class AuxiliaryCausalLMOutput(ModelOutput):
    """What `AuxiliaryForCausalLM` returns. With labels, all numbers are 0-d tensors over the counted tokens.

    loss            cross-entropy of the summed logits, nats; has a gradient
    logits          [batch, kept, V], V the base's width; None where they were skipped
    past_key_values `PairedCache`, with use_cache
    hidden_states   the base's, with output_hidden_states
    base_loss       cross-entropy of the base alone, with the loss's divisor: base_loss - loss is what was gained, but
                    not in training with config.label_smoothing, which smooths the loss alone, nor with router_loss.
                    None in training with a shared head, where it would cost a product of its own
    router_loss     a mixture of experts' weighted balancing loss, which the loss includes: the auxiliary's alone, where
                    its configuration or the call says output_router_logits; else None
    token_accuracy, entropy           means over the counted tokens; entropy of the summed softmax, nats
    num_valid_tokens, num_correct_tokens, entropy_sum   what those are means of
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    base_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    entropy: Tensor | None = None
    num_valid_tokens: Tensor | None = None
    num_correct_tokens: Tensor | None = None
    entropy_sum: Tensor | None = None
    router_loss: Tensor | None = None


class AuxiliaryForCausalLM(
    adapters.PartsWithAdapters, OwnTokenStatistics, GenerationOfComposites, PreTrainedModel, GenerationMixin
):
    """softmax(base logits + aux_scale * aux logits), the base frozen: `from_base_and_aux` or `from_pretrained`.

    base              the frozen model: in eval mode, without gradients and run under no_grad, whatever is called
    aux               the trained model; reads the same tokens, a prefix of its own in front of them (`aux_input_ids`)
                      and, with a trunk layer, the base's hidden states instead of token embeddings
    trunk_projection  Linear from the base's width to the auxiliary's, with a trunk layer
    aux_head          in place of the auxiliary's output head: with head="shared" from its last hidden states to the
                      base's, to which they are added in front of the base's own head; with head="low_rank" to logits
    A model or a head that does more than one layer's weights say (hooks, offloaded, FSDP, quantised, BERT's head) is
    called: its logits [batch, new, V] are then stored, and those of the auxiliary have a gradient as large.
    Source            Zeldes et al. 2020, https://arxiv.org/abs/2006.16823
    """

    config_class = AuxiliaryConfig
    main_input_name = "input_ids"
    _own_arguments = ("aux_input_ids", "aux_attention_mask", "aux_scale")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self, config: AuxiliaryConfig, base: PreTrainedModel | None = None, aux: PreTrainedModel | None = None
    ):
        if base is None or aux is None:
            raise ValueError(
                "AuxiliaryForCausalLM needs its two models, got a configuration alone: use from_base_and_aux or "
                "from_pretrained, which never make a base of random weights"
            )
        super().__init__(config)
        self.base = base
        self.aux = aux
        config.base_config, config.aux_config = base.config, aux.config
        config.base_fingerprint = saving.fingerprint(base)  # now, when all ranks are here and weights rarely sharded
        describe_as(config, base.config, aux.config)
        if config.trunk_layer is not None:
            weight, width = aux.get_input_embeddings().weight, base.config.get_text_config().hidden_size
            self.trunk_projection = nn.Linear(width, weight.shape[1], device=device_of(aux), dtype=weight.dtype)
        if config.head != "own":
            dtype, inputs = aux.get_output_embeddings().weight.dtype, hidden_width(aux)
            width = hidden_width(base) if config.head == "shared" else config.num_valid_tokens
            self.aux_head = new_head(inputs, width, config.head_rank, device=device_of(aux), dtype=dtype)
        drop_unread_weights(aux, config.head, config.trunk_layer)
        self.post_init()
        self.generation_config = inherited(base.generation_config)
        self._is_stateful = is_stateful(base, aux)  # generation asks before it drafts tokens that may be taken back
        self._has_cache = has_cache(base) and has_cache(aux)
        is_trunk_kept = config.trunk_layer is not None and keeps_state(base)
        self._keep_states = is_trunk_kept or keeps_state(aux), keeps_state(aux)  # of a prefix's readers, of the text's
        self._readers = reading.Readers.of_models(base, aux, config.trunk_layer is not None)
        self._leader_name, self._num_leaders, self._has_text_positions = self._readers.leaders()
        self._has_known_head = False  # a frozen one that passes gradients, or of which the user was warned
        unread = {f"aux.{name}" for name, weight in aux.named_parameters() if not weight.numel()}
        self._keys_to_ignore_on_save = {f"base.{key}" for key in base.state_dict()} | unread
        self._is_pointer_checked = False
        self._freeze_base()
        self.train(aux.training)

    @classmethod
    def from_base_and_aux(
        cls,
        base: PreTrainedModel | str,
        aux: PreTrainedModel | PretrainedConfig | str,
        *,
        base_revision: str | None = None,
        trunk_layer: int | None = None,
        head: str = "own",
        head_rank: int | None = None,
        zero_init: bool = True,
        vocab_policy: str = "strict",
        aux_scale: float = 1.0,
        base_kwargs: dict | None = None,
        aux_kwargs: dict | None = None,
    ) -> AuxiliaryForCausalLM:
        """Joins a base and an auxiliary model. Both are taken, not copied; a base may be shared by several.

        The base is frozen for good. Training or eval mode is the auxiliary's (training for a new one).

        base, aux      a causal LM, also with adapters of PEFT (not prompts), or the name or path of one; aux also a
                       configuration: a new, random one; or "small": a new one of the base's family, with a quarter of
                       its heads, width and layers, in float32
        base_revision  of the base's name; saved in the pointer to it
        trunk_layer    which of the base's hidden states (0: the embeddings) the auxiliary reads through a new Linear
                       instead of its token embeddings, -1: the last; a prefix then runs through the base on its own
        head           "own": the auxiliary's output head. "shared": a new map of zeros from its last hidden states to
                       the base's, so that the model is base_head(h_base + aux_scale * map(h_aux)), one product with the
                       frozen head of a sum that is rounded once, to that head's dtype. A softcap (Gemma) bends the sum;
                       otherwise it is that of the logits. Without a trunk layer, a new auxiliary then reads the base's
                       embeddings (trunk_layer=0) and has no vocabulary matrix at all. "low_rank": logits of two narrow
                       matrices, the second of zeros
        head_rank      rank of the shared head's map (None: full) or of the low-rank head
        zero_init      the auxiliary's output head is replaced by zeros, and untied from its input embeddings if it
                       was tied: the untrained model is the base. False: the head stays as it is (head="own" alone)
        vocab_policy   "strict": equally wide heads; "pad": the narrower one's width counts, the rest gets -inf. With
                       two names, tokenizers that give one id two tokens are an error under both
        aux_scale      what the auxiliary's logits are multiplied by, where a call does not say
        base_kwargs, aux_kwargs   for from_pretrained (from_config) of what is given by name
        Raises         TypeError, ValueError: no causal LM with a linear head, vocabularies, trunk layer
        """
        base_kwargs, aux_kwargs = dict(base_kwargs or {}), dict(aux_kwargs or {})
        base, aux = adapters.language_model("base", base), adapters.language_model("aux", aux)
        base, aux = (os.fspath(given) if isinstance(given, os.PathLike) else given for given in (base, aux))
        if base_revision is not None and isinstance(base, str):
            base_kwargs["revision"] = base_revision
        is_small = isinstance(aux, str) and aux == "small"
        if isinstance(base, str) and isinstance(aux, str) and not is_small:
            check_tokenizers(base, aux, saving.hub_options(base_kwargs), saving.hub_options(aux_kwargs))
        base_model = saving.causal_lm("base", base, base_kwargs)
        aux_model = small_model(base_model, aux_kwargs) if is_small else saving.causal_lm("aux", aux, aux_kwargs)
        is_new = is_small or isinstance(aux, PretrainedConfig)
        config = AuxiliaryConfig(
            base_config=base_model.config,
            aux_config=aux_model.config,
            trunk_layer=0 if head == "shared" and trunk_layer is None and is_new else trunk_layer,
            head=head,
            head_rank=head_rank,
            vocab_policy=vocab_policy,
            aux_scale=aux_scale,
            base_name_or_path=saving.pointer(base if isinstance(base, str) else base_model.config.name_or_path),
            base_revision=base_kwargs.get("revision", base_revision),
            base_options=base_pointer.weight_options(base_model, base_kwargs),
        )
        check_zero_init(head, zero_init)
        return cls._join(config, base_model, aux_model, zero_init)

    @classmethod
    def _join(cls, config: AuxiliaryConfig, base, aux, zero_init: bool) -> AuxiliaryForCausalLM:
        if aux is base or aux.get_output_embeddings() is base.get_output_embeddings():
            raise ValueError("aux must be another model than base, with a head of its own: the base is frozen")
        widths = [head_width(model) for model in (base, aux)]
        if config.trunk_layer is not None:
            config.trunk_layer = trunk_index(config.trunk_layer, base.config.get_text_config().num_hidden_layers)
            check_trunk(base, config.trunk_layer, probe(base))
            if config.head != "own":
                widths[1] = widths[0]  # the auxiliary has no vocabulary
        config.vocab_size, config.num_valid_tokens = widths[0], shared_width(*widths, config.vocab_policy)
        for model in (base, aux) if config.head == "own" else (base,):
            check_output_head(model)
        if zero_init and config.head == "own":
            zero_output_head(aux)
        return cls(config, base, aux)

    @classmethod
    def from_pretrained(
        cls, folder, *, base=None, base_kwargs=None, check_base=True, config=None, output_loading_info=False, **kwargs
    ):
        """Loads what `save_pretrained` wrote, in eval mode.

        folder       path, or name on the hub. A pointer says also which of from_pretrained's options the base's weights
                     need (subfolder, gguf_file, quantization_config, ...); these are passed again. A base with code of
                     its own is loaded only with trust_remote_code=True, here or in base_kwargs
        base         the base, where it is at hand (shared) or has moved: a model, name or path; a name is saved on
        base_kwargs  for the base alone, over **kwargs
        check_base   whether the base must be the one that the auxiliary was saved with, by its fingerprint
        **kwargs     for from_pretrained of both models (dtype, device_map, attn_implementation, ...); revision and
                     subfolder are of the folder alone. Without dtype, both are as they were saved
        output_loading_info   returns (model, what was not loaded: nothing, because that is an error)
        Raises       OSError: no such folder or base; ValueError: another base, missing or unexpected weights, code
        """
        config, base_model, aux_model, rest = saving.load(
            folder, config, base=base, base_kwargs=base_kwargs, check_base=check_base, **kwargs
        )
        model = cls._join(config, base_model, aux_model, zero_init=False).eval()
        saving.load_rest(model, rest, kwargs)
        saving.load_generation_config(model, folder, kwargs)
        model.config.name_or_path = os.fspath(folder)
        return (model, {problem: set() for problem in saving.PROBLEMS}) if output_loading_info else model

    def save_pretrained(self, save_directory, *, save_base: bool = False, state_dict: dict | None = None, **kwargs):
        """Saves the auxiliary, with a pointer to the base (name, revision, fingerprint of its weights).

        save_base   also saves the base, in the folder's "base/"
        The configuration is written last, so that an interrupted save leaves no folder that loads.
        Raises ValueError for a base without a name, unless save_base; where the folder holds the base that is pointed
        to, or another kind of model; for adapters of PEFT, unless they are the auxiliary's own, which are saved.
        """
        saving.save(self, super().save_pretrained, save_directory, save_base, state_dict, kwargs)

    def merge_adapters(self) -> None:
        """Adds the adapters that are in use on the auxiliary to its weights, and removes all of them."""
        adapters.merge(self.aux)

    def _check_pointer(self) -> None:
        """Says at the first step what would otherwise be found at the first checkpoint, or after it."""
        if not self._is_pointer_checked and not torch.compiler.is_compiling():
            self._is_pointer_checked = True
            base_pointer.warn_of_pointer(self)

    # -- the base stays frozen -----------------------------------------------------------------------------------------

    def init_weights(self):
        """Nothing: both models come with their weights."""

    def _freeze_base(self) -> None:
        self.base.requires_grad_(False)
        self.base.eval()

    def train(self, mode: bool = True):
        super().train(mode)
        self.base.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True):
        super().requires_grad_(requires_grad)
        self.base.requires_grad_(False)
        return self

    def _check_trainable(self) -> None:
        """ValueError for adapters in the base; warns once where the auxiliary's weights get no gradient."""
        own = self._keys_to_ignore_on_save  # unfrozen by hand they get no gradient all the same
        check_frozen(self.base, "base", " ('aux.lm_head', not 'lm_head')", own)
        if self._has_known_head:
            return
        if self.config.head == "own":
            head, name = output_head(self.aux), "aux.lm_head"
            if isinstance(head, CalledHead) or head.weight.requires_grad:
                return
            is_blocked = is_dead(head)
        else:
            is_blocked, name = is_frozen_at_zero(self.aux_head), "aux_head"
        if is_blocked and any(weight.requires_grad for weight in self.aux.base_model.parameters()):
            warnings.warn(
                "the auxiliary's output head is zero and frozen, so that nothing behind it is ever trained: train the "
                f"head too (with PEFT modules_to_save=[{name!r}], or LoRA on it), or join with zero_init=False",
                stacklevel=3,
            )
            self._has_known_head = True
        elif not is_blocked:
            self._has_known_head = True

    def _set_gradient_checkpointing(self, *args, **kwargs):
        self.aux._set_gradient_checkpointing(*args, **kwargs)  # the base keeps no activations

    def get_input_embeddings(self):
        return self.aux.get_input_embeddings()

    def get_output_embeddings(self):
        return None  # no single layer makes the sum

    def resize_token_embeddings(self, *args, **kwargs):
        raise ValueError("resize_token_embeddings must be called on base and aux before they are joined")

    # -- generation ----------------------------------------------------------------------------------------------------

    def generate(self, *args, aux_scale: float | Tensor | None = None, **kwargs):
        """As of transformers, with the arguments of `forward` for the auxiliary.

        They hold in every branch: under guidance_scale also for the unconditional text, and an assistant_model gets
        them if it is one of this class. Raises ValueError for ways of generating that would leave them out: guidance
        with beams or drafts, token healing, early exit, continuous batching, methods that transformers has moved out.
        """
        if isinstance(aux_scale, Tensor) and aux_scale.dim() == 0:
            aux_scale = aux_scale.item()  # beams repeat the rows of every tensor
        return super().generate(*args, aux_scale=aux_scale, **kwargs)

    def new_cache(self) -> PairedCache:
        """An empty cache for both models. ValueError where one of them has none that can be paired (`has_cache`)."""
        if not self._has_cache:
            names = [type(model).__name__ for model in (self.base, self.aux) if not has_cache(model)]
            raise ValueError(f"use_cache must be False: {' and '.join(names)} has no cache that can be paired")
        return PairedCache.of_configs(self.base.config, self.aux.config)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        if model_kwargs.get("past_key_values") is not None:
            reading.check_cache(model_kwargs["past_key_values"])
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if generation_config.cache_implementation not in _GROWING:
            raise ValueError(
                f"cache_implementation must be 'dynamic' for two models, got {generation_config.cache_implementation!r}"
            )
        if not self._has_cache:
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.new_cache()
            if generation_config.is_assistant:
                model_kwargs["past_key_values"].activate_past_recording()
        return None

    # -- forward -------------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PairedCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        aux_input_ids: Tensor | None = None,
        aux_attention_mask: Tensor | None = None,
        aux_scale: float | Tensor | None = None,
        skip_logits: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> AuxiliaryCausalLMOutput:
        """Summed logits, or with labels their loss, for which no [N, V] tensor is made.

        input_ids           [batch, new] int64, read by both models
        attention_mask      [batch, past + new], 0: padding, on either side
        position_ids        [batch, new]; of the auxiliary's text, behind a prefix, they count on from it, and where
                            none are given they count what attention_mask lets through
        use_cache           None: where a cache is given; in evaluation without labels as the configuration says, unless
                            positions begin anew within a row (packed texts, which a cache would not keep apart).
                            Without effect where a model has no cache that can be paired
        labels              [batch, new], shifted inside; keyword shift_labels: already shifted. -100: not counted
        logits_to_keep      how many of the last positions, or which, get logits; 0: all. The loss is over all
        aux_input_ids       [batch, prefix] int64, read by the auxiliary alone in front of the text, never predicted;
                            with a cache it is read into it once. aux_attention_mask: 0: padding, anywhere. An
                            auxiliary with a recurrent or convolutional state reads padding in front of all tokens that
                            count, for which the first call with a cache must hold all of the text's left padding
        aux_scale           number, 0-d or [batch] tensor; None: config.aux_scale
        skip_logits         None: with labels in training mode, or as config.skip_logits_in_evaluation says
        num_items_in_batch  what the sum of the loss is divided by; None: the counted tokens
        Raises              TypeError, ValueError: arguments; in training adapters in the base, where PEFT puts
                            them if a short name matches
        Warns               in training, once, where the auxiliary's head is zero and frozen: nothing learns behind it
        """
        # not in the signature, where Trainer would take it for a second label that every batch must have
        shift_labels, token_statistics = kwargs.pop("shift_labels", None), kwargs.pop("token_statistics", None)
        target = reading.shifted(labels) if shift_labels is None else shift_labels
        reading.check_inputs(input_ids, target, num_items_in_batch, kwargs)
        if self.training and target is not None:
            self._check_pointer()
        if past_key_values is not None:
            reading.check_cache(past_key_values)
        if self.training and target is not None and torch.is_grad_enabled():
            self._check_trainable()
        if use_cache is None:
            is_new = target is None and not self.training and not are_packed(attention_mask, position_ids)
            use_cache = past_key_values is not None or (self.config.use_cache and is_new)
        if use_cache and past_key_values is None and self._has_cache:
            past_key_values = self.new_cache()
        use_cache = use_cache and past_key_values is not None

        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        is_balanced = target is not None and wants_router_logits(self.aux, kwargs.pop("output_router_logits", None))
        text = reading.Text(input_ids, attention_mask, position_ids, past_key_values, past)
        base_text, base_kwargs, text, aux_kwargs = self._readers.split(text, kwargs, aux_input_ids is not None)
        scale = reading.row_scale(self.config.aux_scale if aux_scale is None else aux_scale, input_ids.shape)
        reader = self.aux if self.config.trunk_layer is None else self.base
        pad_token_id = getattr(reader.config.get_text_config(), "pad_token_id", None)
        behind = reading.aux_text(text, aux_input_ids, aux_attention_mask, pad_token_id, *self._keep_states)
        if past_key_values is not None:
            past_key_values.is_complete = False
        h_base, states = self._run_base(base_text, use_cache, output_hidden_states, base_kwargs)
        aux_kwargs |= {"output_router_logits": True} if is_balanced else {}
        aux_output = self._run_aux(text, behind, use_cache, states, behind.with_token_types(aux_kwargs))
        h_aux = behind.of_text(features(aux_output))
        if past_key_values is not None:
            past_key_values.prefix_mask, past_key_values.arranged_mask = behind.prefix_mask, behind.arranged_mask
            past_key_values.is_complete = True

        if self.config.head != "own":
            check_hidden_states(self.base if self.config.head == "shared" else None, self.aux)
        if token_statistics is not None:
            check_no_further_loss(self, is_balanced)
            base, aux = self._sources(h_base, h_aux, scale)
            is_shifted, width = shift_labels is not None, self.config.num_valid_tokens
            return token_statistics(base, aux or [], target, is_shifted, width, num_items_in_batch)
        numbers = {} if target is None else self._loss(h_base, h_aux, target, scale, num_items_in_batch)
        router = router_loss(self.aux, aux_output, behind.attention_mask) if is_balanced else None
        if router is not None:
            numbers |= {"loss": numbers["loss"] + router.to(numbers["loss"].device), "router_loss": router}
        if skip_logits is None:
            skip_logits = target is not None and (self.training or self.config.skip_logits_in_evaluation)
        return AuxiliaryCausalLMOutput(
            logits=None if skip_logits else self._logits(h_base, h_aux, scale, logits_to_keep),
            past_key_values=past_key_values if use_cache else None,
            hidden_states=states if output_hidden_states else None,
            **numbers,
        )

    def _run_base(self, text: reading.Text, use_cache: bool, output_hidden_states: bool | None, kwargs: dict):
        """`features` [batch, new, D] and, where they are wanted, all of them."""
        wants_states = bool(output_hidden_states) or self.config.trunk_layer is not None
        if self.base.training:  # it may be shared
            self.base.eval()
        with torch.no_grad():
            output = run(
                self.base,
                input_ids=text.input_ids,
                attention_mask=text.attention_mask,
                position_ids=text.position_ids,
                past_key_values=None if text.cache is None else text.cache.base,
                use_cache=bool(use_cache),
                output_hidden_states=wants_states,
                **kwargs,
            )
        return features(output), output.hidden_states if wants_states else None

    def _run_aux(self, text: reading.Text, behind: reading.AuxText, use_cache: bool, states, kwargs: dict):
        """What the auxiliary returns (`run`) for prefix and text, in the order in which they are read."""
        prefix = behind.prefix
        if self.config.trunk_layer is None:
            tokens = text.input_ids if prefix is None else torch.cat([prefix, text.input_ids], dim=1)
            inputs = {"input_ids": behind.arranged(tokens)}
        else:
            features = states[self.config.trunk_layer]
            if prefix is not None:
                features = torch.cat([self._trunk_of_prefix(prefix, behind.prefix_mask, kwargs), features], dim=1)
            features = behind.arranged(features).to(self.trunk_projection.weight.dtype)
            inputs = {"inputs_embeds": self.trunk_projection(features)}
        return run(
            self.aux,
            **inputs,
            attention_mask=behind.attention_mask,
            position_ids=behind.position_ids,
            past_key_values=None if text.cache is None else text.cache.aux,
            use_cache=bool(use_cache),
            **kwargs,
        )

    @torch.no_grad()
    def _trunk_of_prefix(self, prefix: Tensor, mask: Tensor, kwargs: dict) -> Tensor:
        """The base's hidden states of a prefix [batch, prefix, D], which it reads apart from the text."""
        output = run(
            self.base,
            input_ids=prefix,
            attention_mask=mask,
            position_ids=reading.positions_of(mask),
            use_cache=False,
            output_hidden_states=True,
            **kwargs,
        )
        return output.hidden_states[self.config.trunk_layer]

    def _frozen_sources(self, h_base: Tensor) -> list[Source]:
        """Of the base's head, which gets no gradient; hidden states that need one do."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and h_base.requires_grad):
            sources = output_head(self.base).sources(h_base)
        return [one if isinstance(one, Logits) and h_base.requires_grad else detached(one) for one in sources]

    def _summed(self, h_base: Tensor, h_aux: Tensor, scale: float | Tensor) -> Tensor:
        """What the base's head makes the sum of, with a shared head."""
        dtype = getattr(output_head(self.base), "weight", h_base).dtype
        return added(h_base, self.aux_head(h_aux.to(h_base.device)), scale, dtype)

    def _own_head(self, h_aux: Tensor) -> tuple[Tensor, OutputHead | CalledHead]:
        """The auxiliary's head and what enters it."""
        if self.config.head == "own":
            return h_aux, output_head(self.aux)
        down, head = low_rank_head(self.aux_head)
        return down(h_aux), head

    def _sources(
        self, h_base: Tensor, h_aux: Tensor, scale: float | Tensor
    ) -> tuple[list[Source], list[Source] | None]:
        """Base and auxiliary as `aux_cross_entropy` takes them; a shared head makes one of them."""
        if self.config.head == "shared":
            return self._frozen_sources(self._summed(h_base, h_aux, scale)), None
        hidden, head = self._own_head(h_aux)
        aux = [
            replace(source, scale=scale if source.scale == 1.0 else source.scale * scale)
            for source in head.sources(hidden)
        ]
        return self._frozen_sources(h_base), aux

    def _loss(self, h_base, h_aux, target, scale, num_items_in_batch) -> dict[str, Tensor]:
        options = {"ignore_index": reading.IGNORE_INDEX, "vocab_size": self.config.num_valid_tokens}
        loss, stats = aux_cross_entropy(
            *self._sources(h_base, h_aux, scale),
            target,
            label_smoothing=self.config.label_smoothing if self.training else 0.0,
            normalizer=num_items_in_batch,
            return_stats=True,
            **options,
        )
        num_valid = (target != reading.IGNORE_INDEX).sum()
        num_correct, entropy_sum = (stats.argmax == target).sum(), stats.entropy.sum()
        base_loss = None
        if self.config.head != "shared":
            base_loss = -stats.base_log_prob.sum() / (num_valid if num_items_in_batch is None else num_items_in_batch)
        elif not self.training:
            base = self._frozen_sources(h_base.detach())
            base_loss = aux_cross_entropy(base, None, target, normalizer=num_items_in_batch, **options)
        return {
            "loss": loss,
            "base_loss": base_loss,
            "token_accuracy": num_correct / num_valid,
            "entropy": entropy_sum / num_valid,
            "num_valid_tokens": num_valid,
            "num_correct_tokens": num_correct,
            "entropy_sum": entropy_sum,
        }

    def _logits(self, h_base: Tensor, h_aux: Tensor, scale: float | Tensor, logits_to_keep: int | Tensor) -> Tensor:
        """[batch, kept, V] in float32 at least: a sum rounded to 16 bits would lose the auxiliary's part."""
        kept = kept_positions(logits_to_keep)
        if isinstance(scale, Tensor) and scale.dim() == 2:
            scale = scale[:, kept]
        h_base, h_aux, num_valid = h_base[:, kept], h_aux[:, kept], self.config.num_valid_tokens
        if self.config.head == "shared":
            base = output_head(self.base).logits(self._summed(h_base, h_aux, scale))
            total = base[..., :num_valid].to(torch.promote_types(base.dtype, torch.float32))
        else:
            with torch.no_grad():
                base = output_head(self.base).logits(h_base)
            hidden, head = self._own_head(h_aux)
            aux = head.logits(hidden)
            dtype = torch.promote_types(torch.promote_types(base.dtype, aux.dtype), torch.float32)
            total = base[..., :num_valid].to(dtype) + row_scale(scale, dtype) * aux[..., :num_valid].to(dtype)
        return nn.functional.pad(total, (0, self.config.vocab_size - num_valid), value=-torch.inf)
