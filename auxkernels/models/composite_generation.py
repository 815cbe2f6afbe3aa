"""Where `generate` calls a composite or another model on its own account: with the call's arguments, or an error."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from .cache_argument import CACHE, renamed_cache
from .caches import is_dynamic, is_static
from .modalities import has_more_than_text, input_names
from .paired_cache import check_takes
from .token_choice import GenerationBySampling

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

# of one model's generation config: asked for by nobody who calls the composite, which some of them would refuse
_OF_ONE_MODEL = (
    "cache_implementation",
    "cache_config",
    "max_cache_len",
    "prompt_lookup_num_tokens",
    "prefill_chunk_size",
)
_OTHER_DRAFTS = ("assistant_early_exit", "use_mtp", "speculation_type")


def inherited(generation_config: GenerationConfig) -> GenerationConfig:
    """A copy of one model's generation config, without what chooses its cache and its drafts."""
    copied = copy.deepcopy(generation_config)
    for name in (*_OF_ONE_MODEL, *_OTHER_DRAFTS, "token_healing"):
        if getattr(copied, name, None):
            setattr(copied, name, None)
    return copied


class GenerationOfComposites(GenerationBySampling):
    """Mixed in before transformers' generation.

    _has_cache       whether the models inside have caches; if not, all tokens are read again at each step
    _own_arguments   those of `forward` that generate() passes on and that other models do not know
    _unconditional_arguments   those in place of the call's, for the unconditional text under guidance
    _leader_name     the attribute of the model that reads images, video or sound and knows how they enter generation
                     (positions, once behind a cache, once for each beam); None: all read text alone
    _num_leaders     how many models read more than text
    _has_text_positions   whether a model gets positions of text that are not the leader's: `text_position_ids`
    _position_offset   the position of a text's first token (`position_offset`), where all models have the same
    """

    _has_cache = True
    _leader_name: str | None = None
    _num_leaders = 1
    _has_text_positions = False
    _position_offset = 0
    _own_arguments: ClassVar[tuple[str, ...]] = ()
    _unconditional_arguments: ClassVar[dict[str, Any]] = {}
    # the others are code from elsewhere, which reads one model's head, states and cache
    _supported_generation_modes: ClassVar[list[GenerationMode]] = [
        GenerationMode.GREEDY_SEARCH,
        GenerationMode.SAMPLE,
        GenerationMode.BEAM_SEARCH,
        GenerationMode.BEAM_SAMPLE,
        GenerationMode.ASSISTED_GENERATION,
    ]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return super().generate(*args, **renamed_cache(kwargs, CACHE))

    def _validate_generation_mode(
        self,
        generation_mode: GenerationMode,
        generation_config: GenerationConfig,
        generation_mode_kwargs: dict[str, Any],
    ) -> None:
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)
        is_simple = generation_mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        if has_guidance(generation_config) and not is_simple:
            # transformers keeps one cache for the unconditional branch, which follows neither beams nor rejected tokens
            raise ValueError(f"guidance_scale needs greedy search or sampling, got {generation_mode.value}")
        if generation_config.token_healing:
            raise ValueError("token_healing must be off: it generates without the arguments of this call")
        for name in _OTHER_DRAFTS:
            if getattr(generation_config, name, None):
                raise ValueError(f"{name} must not be set: its drafts come from a part of one model")

    def _get_logits_processor(
        self, generation_config: GenerationConfig, *args: Any, model_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> LogitsProcessorList:
        processors = super()._get_logits_processor(generation_config, *args, model_kwargs=model_kwargs, **kwargs)
        given = model_kwargs or {}
        own = {name: given[name] for name in self._own_arguments if given.get(name) is not None}
        own |= self._unconditional_arguments
        for i, processor in enumerate(processors):
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) and processor.model is self:
                processor.model = partial(self, **own)
                processors[i] = _GuidanceOfTheRest(processor)
        return processors

    def _get_candidate_generator(
        self,
        generation_config: GenerationConfig,
        *args: Any,
        model_kwargs: dict[str, Any],
        assistant_model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> Any:
        if assistant_model is not None and generation_config.cache_implementation is not None:
            generation_config = copy.copy(generation_config)
            generation_config.cache_implementation = None  # an assistant is handed its own cache from draft to draft
        if not self._shares_arguments(assistant_model):
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in self._own_arguments}
        return super()._get_candidate_generator(
            generation_config, *args, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )

    def _shares_arguments(self, assistant: object) -> bool:
        """Whether an assistant takes `_own_arguments` for what this model takes them for."""
        return isinstance(assistant, type(self))

    def _cache_of_kind(self, kind: str | None, model_kwargs: dict[str, Any], **options: Any) -> Cache:
        """An empty cache for a call of `generate`; options as of `caches.new_cache`."""
        raise NotImplementedError

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """The cache that a call asks for; ValueError where a model has none of that kind, or drafts need another."""
        cache, kind = model_kwargs.get(CACHE), generation_config.cache_implementation
        if not self._has_cache and is_dynamic(kind):
            generation_config.use_cache = model_kwargs["use_cache"] = False  # or one token alone would be read
            return None
        if cache is None and generation_config.use_cache is not False:
            options = {}
            if is_static(kind):
                options["max_cache_len"] = max(max_cache_length, generation_config.max_cache_len or 0)
            elif kind == "quantized":
                options["cache_config"] = generation_config.cache_config
            cache = model_kwargs[CACHE] = self._cache_of_kind(kind, model_kwargs, **options)
        else:
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        is_assistant = bool(generation_config.is_assistant)
        if isinstance(cache, Cache) and (is_assistant or generation_mode == GenerationMode.ASSISTED_GENERATION):
            check_takes("crop", cache)
            if is_assistant:
                cache.activate_past_recording()
        return None

    # -- images, video and sound ---------------------------------------------------------------------------------------

    @property
    def _leader(self) -> PreTrainedModel | None:
        return None if self._leader_name is None else getattr(self, self._leader_name)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        known = {CACHE} if self._leader is None else {CACHE, *input_names(self._leader)}
        super()._validate_model_kwargs({name: value for name, value in model_kwargs.items() if name not in known})

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        if self._leader is None:
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs) + self._position_offset
        return self._leader._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        if self._leader is None or self._num_leaders > 1:
            return super()._maybe_prepare_encoder_kwargs_for_generation(inputs_tensor, model_kwargs, *args, **kwargs)
        return self._leader._maybe_prepare_encoder_kwargs_for_generation(inputs_tensor, model_kwargs, *args, **kwargs)

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
        if self._leader is None or expand_size == 1:
            return super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)
        if self._num_leaders > 1 and has_more_than_text(kwargs):
            raise ValueError(
                "num_beams and num_return_sequences must be 1 where two models read images, which only a single one "
                "can encode before they are repeated"
            )
        return self._leader._expand_inputs_for_generation(expand_size=expand_size, **kwargs)

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        updated: Any = super() if self._leader is None else self._leader
        return updated._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """transformers' own; what enters beside the tokens, and their positions, as the model has it that reads it.

        `text_position_ids` are the positions for a model that reads text alone, where they are known.
        """
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if CACHE in inputs:  # by the name that `forward` has for it, also a subclass's
            inputs["past_key_values"] = inputs.pop(CACHE)
        positions = inputs.get("position_ids")
        if self._has_text_positions and positions is not None and positions.dim() == 2:
            inputs["text_position_ids"] = positions
        if self._leader is None or self._leader_name is None:
            return inputs
        known = {name: value for name, value in kwargs.items() if name not in self._own_arguments}
        known[CACHE] = getattr(known.get(CACHE), self._leader_name, known.get(CACHE))  # of a pair
        of_leader = self._leader.prepare_inputs_for_generation(input_ids, *args, **known)
        own = ("past_key_values", "text_position_ids", "token_choice", *self._own_arguments)
        of_leader.pop(CACHE, None)
        return of_leader | {name: inputs[name] for name in own if name in inputs}

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises ValueError: continuous batching has one cache, and no place for the arguments of each text."""
        raise ValueError(
            f"{type(self).__name__} cannot batch continuously (generate_batch), with one cache for several models: use "
            "generate, or serve a saved AuxiliaryForCausalLM by vLLM"
        )


class _GuidanceOfTheRest(LogitsProcessor):
    """Classifier-free guidance for what has a probability: differences of infinities are NaN, which argmax takes."""

    def __init__(self, guidance: LogitsProcessor):
        self.guidance = guidance

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.guidance(input_ids, scores).masked_fill(scores == -torch.inf, -torch.inf)


def has_guidance(generation_config: GenerationConfig) -> bool:
    """Whether a configuration asks for classifier-free guidance."""
    return getattr(generation_config, "guidance_scale", None) not in (None, 1)
