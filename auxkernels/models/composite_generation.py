"""Where `generate` calls a composite or another model on its own account: with the call's arguments, or an error."""

from __future__ import annotations

import copy
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessor
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from .caches import is_dynamic, is_static
from .paired_cache import check_takes

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


class GenerationOfComposites:
    """Mixed in before transformers' generation.

    _has_cache       whether the models inside have caches; if not, all tokens are read again at each step
    _own_arguments   those of `forward` that generate() passes on and that other models do not know
    _unconditional_arguments   those in place of the call's, for the unconditional text under guidance
    """

    _has_cache = True
    _own_arguments: ClassVar[tuple[str, ...]] = ()
    _unconditional_arguments: ClassVar[dict] = {}
    # the others are code from elsewhere, which reads one model's head, states and cache
    _supported_generation_modes: ClassVar[list[GenerationMode]] = [
        GenerationMode.GREEDY_SEARCH,
        GenerationMode.SAMPLE,
        GenerationMode.BEAM_SEARCH,
        GenerationMode.BEAM_SAMPLE,
        GenerationMode.ASSISTED_GENERATION,
    ]

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
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

    def _get_logits_processor(self, generation_config, *args, model_kwargs: dict | None = None, **kwargs):
        processors = super()._get_logits_processor(generation_config, *args, model_kwargs=model_kwargs, **kwargs)
        own = {name: model_kwargs[name] for name in self._own_arguments if (model_kwargs or {}).get(name) is not None}
        own |= self._unconditional_arguments
        for i, processor in enumerate(processors):
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) and processor.model is self:
                processor.model = partial(self, **own)
                processors[i] = _GuidanceOfTheRest(processor)
        return processors

    def _get_candidate_generator(self, generation_config, *args, model_kwargs: dict, assistant_model=None, **kwargs):
        if assistant_model is not None and generation_config.cache_implementation is not None:
            generation_config = copy.copy(generation_config)
            generation_config.cache_implementation = None  # an assistant is handed its own cache from draft to draft
        if not self._shares_arguments(assistant_model):
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in self._own_arguments}
        return super()._get_candidate_generator(
            generation_config, *args, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )

    def _shares_arguments(self, assistant) -> bool:
        """Whether an assistant takes `_own_arguments` for what this model takes them for."""
        return isinstance(assistant, type(self))

    def _cache_of_kind(self, kind: str | None, model_kwargs: dict, **options) -> Cache:
        """An empty cache for a call of `generate`; options as of `caches.new_cache`."""
        raise NotImplementedError

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """The cache that a call asks for; ValueError where a model has none of that kind, or drafts need another."""
        cache, kind = model_kwargs.get("past_key_values"), generation_config.cache_implementation
        if not self._has_cache and is_dynamic(kind):
            generation_config.use_cache = model_kwargs["use_cache"] = False  # or one token alone would be read
            return None
        if cache is None and generation_config.use_cache is not False:
            options = {}
            if is_static(kind):
                options["max_cache_len"] = max(max_cache_length, generation_config.max_cache_len or 0)
            elif kind == "quantized":
                options["cache_config"] = generation_config.cache_config
            cache = model_kwargs["past_key_values"] = self._cache_of_kind(kind, model_kwargs, **options)
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

    def init_continuous_batching(self, *args, **kwargs):
        """Raises ValueError: continuous batching has one cache, and no place for the arguments of each text."""
        raise ValueError(f"{type(self).__name__} cannot batch continuously (generate_batch): use generate")


class _GuidanceOfTheRest(LogitsProcessor):
    """Classifier-free guidance for what has a probability: differences of infinities are NaN, which argmax takes."""

    def __init__(self, guidance: LogitsProcessor):
        self.guidance = guidance

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.guidance(input_ids, scores).masked_fill(scores == -torch.inf, -torch.inf)


def has_guidance(generation_config) -> bool:
    """Whether a configuration asks for classifier-free guidance."""
    return getattr(generation_config, "guidance_scale", None) not in (None, 1)
