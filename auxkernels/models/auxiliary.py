"""A frozen causal language model and a trainable auxiliary one whose logits are added: auxiliary tuning."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.utils import can_return_tuple

from . import adapters, base_pointer, saving
from . import auxiliary_inputs as reading
from .auxiliary_generation import GenerationWithPairs
from .base_states import Layers, given_states
from .cache_argument import takes_cache
from .causal_lm import check_frozen, check_trunk, has_cache, is_dead, is_stateful, keeps_state, trunk_index
from .composite_generation import inherited
from .config_fields import describe_as
from .configuration import AuxiliaryConfig
from .frozen_base import Call, Given, OnFrozenBase
from .gathering import written_by_one
from .heads import OutputHead, check_output_head, output_head, probe, zero_output_head
from .loading_options import pop_place, with_call_options
from .modules import device_of, head_width, run
from .paired_cache import PairedCache
from .small import check_zero_init, drop_unread_weights, hidden_width, is_frozen_at_zero, new_head, small_model
from .sums import AuxiliaryCausalLMOutput
from .trunkless import check_has_trunk, point_to_whole
from .vocabulary import check_tokenizers, shared_width

if TYPE_CHECKING:
    from transformers.utils import ModelOutput


class AuxiliaryForCausalLM(GenerationWithPairs, OnFrozenBase, PreTrainedModel, GenerationMixin):
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
            assert width is not None, "`_join` has said it"
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
        self._unread_keys = {f"aux.{name}" for name, weight in aux.named_parameters() if not weight.numel()}
        self._keys_to_ignore_on_save = {f"base.{key}" for key in base.state_dict()}
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
        dtype: torch.dtype | str | None = None,
        device_map: str | int | dict[str, Any] | torch.device | None = None,
        base_kwargs: dict[str, Any] | None = None,
        aux_kwargs: dict[str, Any] | None = None,
    ) -> AuxiliaryForCausalLM:
        """Joins a base and an auxiliary model. Both are taken, not copied; a base may be shared by several.

        The base is frozen for good. Training or eval mode is the auxiliary's (training for a new one).

        base, aux      a causal LM, also with adapters of PEFT (not prompts), or the name or path of one; base also
                       `BaseCache.base_head()`, without its trunk in memory; aux also a configuration: a new, random
                       one; or "small": a new one of the base's family, with a quarter of its heads, width and layers,
                       in float32
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
        dtype, device_map         as of from_pretrained, for both: which must be given by name, aux or by configuration
        base_kwargs, aux_kwargs   for from_pretrained (from_config) of what is given by name, over those for both
        Raises         TypeError, ValueError: no causal LM with a linear head, vocabularies, trunk layer
        """
        base, aux = adapters.language_model("base", base), adapters.language_model("aux", aux)
        base_kwargs = with_call_options("base", base, base_kwargs, dtype=dtype, device_map=device_map)
        aux_kwargs = with_call_options("aux", aux, aux_kwargs, dtype=dtype, device_map=device_map)
        base, aux = (os.fspath(given) if isinstance(given, os.PathLike) else given for given in (base, aux))
        if base_revision is not None and isinstance(base, str):
            base_kwargs["revision"] = base_revision
        is_small = isinstance(aux, str) and aux == "small"
        if isinstance(base, str) and isinstance(aux, str) and not is_small:
            check_tokenizers(base, aux, saving.hub_options(base_kwargs), saving.hub_options(aux_kwargs))
        is_new = is_small or isinstance(aux, PretrainedConfig)
        base_model = saving.causal_lm("base", base, base_kwargs)
        place = pop_place(aux_kwargs, base_model) if is_new else None
        aux_model = small_model(base_model, aux_kwargs) if is_small else saving.causal_lm("aux", aux, aux_kwargs)
        aux_model = aux_model if place is None else aux_model.to(place)
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
        point_to_whole(config, base_model)
        check_zero_init(head, zero_init)
        return cls._join(config, base_model, aux_model, zero_init)

    @classmethod
    def _join(
        cls, config: AuxiliaryConfig, base: PreTrainedModel, aux: PreTrainedModel, zero_init: bool
    ) -> AuxiliaryForCausalLM:
        if aux is base or aux.get_output_embeddings() is base.get_output_embeddings():
            raise ValueError("aux must be another model than base, with a head of its own: the base is frozen")
        widths = [head_width(model) for model in (base, aux)]
        if config.trunk_layer is not None:
            config.trunk_layer = trunk_index(config.trunk_layer, base.config.get_text_config().num_hidden_layers)
            check_trunk(base, config.trunk_layer, probe(base))
            if config.head != "own":
                widths[1] = widths[0]  # the auxiliary has no vocabulary
        config.vocab_size, config.num_valid_tokens = widths[0], shared_width(widths[0], widths[1], config.vocab_policy)
        for model in (base, aux) if config.head == "own" else (base,):
            check_output_head(model)
        if zero_init and config.head == "own":
            zero_output_head(aux)
        return cls(config, base, aux)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        base: PreTrainedModel | str | None = None,
        base_kwargs: dict[str, Any] | None = None,
        check_base: bool = True,
        config: AuxiliaryConfig | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
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

    @written_by_one(saving.not_saved)
    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        save_base: bool = False,
        state_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Saves the auxiliary, with a pointer to the base (name, revision, fingerprint of its weights).

        save_base   also saves the base, in the folder's "base/"
        The configuration is written last, so that an interrupted save leaves no folder that loads. Where weights are
        sharded (`apply_fully_shard`), all processes call and the first one writes.
        Raises ValueError for a base without a name, unless save_base; where the folder holds the base that is pointed
        to, or another kind of model; for adapters of PEFT, unless they are the auxiliary's own, which are saved.
        """
        saving.save(self, super().save_pretrained, save_directory, save_base, state_dict, kwargs)

    def merge_adapters(self) -> None:
        """Adds the adapters that are in use on the auxiliary to its weights, and removes all of them."""
        adapters.merge(self.aux)

    @property
    def _auxiliaries(self) -> list[AuxiliaryForCausalLM]:
        return [self]

    # -- training ------------------------------------------------------------------------------------------------------

    def _check_trainable(self) -> None:
        """ValueError for adapters in the base; warns once where the auxiliary's weights get no gradient."""
        own = self._keys_to_ignore_on_save  # unfrozen by hand they get no gradient all the same
        check_frozen(self.base, "base", " ('aux.lm_head', not 'lm_head')", own)
        if self._has_known_head:
            return
        if self.config.head == "own":
            head, name = output_head(self.aux), "aux.lm_head"
            if not isinstance(head, OutputHead) or head.weight.requires_grad:
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

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        self.aux._set_gradient_checkpointing(*args, **kwargs)  # the base keeps no activations

    def get_input_embeddings(self) -> nn.Module:
        return self.aux.get_input_embeddings()

    # -- forward -------------------------------------------------------------------------------------------------------

    @can_return_tuple
    @takes_cache
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
        base_hidden_states: Tensor | None = None,
        base_trunk_states: Tensor | None = None,
        **kwargs: Any,
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
        base_hidden_states  [batch, new, D] floating point, what enters the base's head (behind its final norm) for
                            these tokens, as a `BaseCache` holds it: the base's trunk is not run. Without a cache of
                            keys and values, images, output_hidden_states
        base_trunk_states   [batch, new, D'], with base_hidden_states and a trunk layer: the base's hidden states there
        Raises              TypeError, ValueError: arguments; in training adapters in the base, where PEFT puts
                            them if a short name matches
        Warns               in training, once, where the auxiliary's head is zero and frozen: nothing learns behind it
        """
        refused = {
            "past_key_values": past_key_values is not None,
            "use_cache": bool(use_cache),
            "output_hidden_states": bool(output_hidden_states),
        }
        states = given_states(
            self.base, self._trunk_layers, input_ids, base_hidden_states, base_trunk_states, refused, kwargs
        )
        call = Call(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            labels,
            use_cache if states is None else False,
            logits_to_keep,
            skip_logits,
            num_items_in_batch,
            output_hidden_states,
            states,
        )
        scale = self.config.aux_scale if aux_scale is None else aux_scale
        return self._called(call, [Given(scale, aux_input_ids, aux_attention_mask)], kwargs)

    def _run_aux(
        self,
        text: reading.Text,
        behind: reading.AuxText,
        use_cache: bool,
        states: Layers | None,
        kwargs: dict[str, Any],
    ) -> ModelOutput:
        """What the auxiliary returns (`run`) for prefix and text, in the order in which they are read."""
        prefix = behind.prefix
        if self.config.trunk_layer is None:
            tokens = text.input_ids if prefix is None else torch.cat([prefix, text.input_ids], dim=1)
            inputs = {"input_ids": behind.arranged(tokens)}
        else:
            assert states is not None, "the base gives them where there is a trunk layer"
            features = states[self.config.trunk_layer]
            if prefix is not None and behind.prefix_mask is not None:
                features = torch.cat([self._trunk_of_prefix(prefix, behind.prefix_mask, kwargs), features], dim=1)
            features = behind.arranged(features).to(self.trunk_projection.weight.dtype)
            inputs = {"inputs_embeds": self.trunk_projection(features)}
        return run(
            self.aux,
            **inputs,
            attention_mask=behind.attention_mask,
            position_ids=behind.position_ids,
            cache=None if text.cache is None else text.cache.aux,
            use_cache=bool(use_cache),
            **kwargs,
        )

    @torch.no_grad()
    def _trunk_of_prefix(self, prefix: Tensor, mask: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The base's hidden states of a prefix [batch, prefix, D], which it reads apart from the text."""
        check_has_trunk(self.base, "aux_input_ids with a trunk layer")
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
