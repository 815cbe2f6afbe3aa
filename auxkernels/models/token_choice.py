"""The next token of each text from sources of its logits, in place of transformers' warpers and multinomial."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation import LogitNormalization, MinPLogitsWarper, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..sampling import sample_logits
from ..sources import Logits
from .cache_argument import CACHE
from .mixins import Model

if TYPE_CHECKING:
    from transformers import GenerationConfig
    from transformers.generation.streamers import BaseStreamer

    from ..sources import Source

# in the order in which transformers applies them, which is "transformers" of `sample_logits`: the attribute and option
_WARPERS = {
    TemperatureLogitsWarper: ("temperature", "temperature"),
    TopKLogitsWarper: ("top_k", "top_k"),
    TopPLogitsWarper: ("top_p", "top_p"),
    MinPLogitsWarper: ("min_p", "min_p"),
}
_STORED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


@dataclass
class TokenChoice:
    """How the next token of each row is chosen from sources of its logits.

    options   of `sample_logits`
    seeds     int64 [batch], of the noise; None: greedy
    position  the number of the token to come
    """

    options: dict[str, Any]
    seeds: Tensor | None
    position: int = 0

    def __call__(self, base: list[Source], aux: list[Source] | None, vocab_size: int, floor: float | None) -> Tensor:
        """int64 [batch] of sources of [batch, 1] rows; -1 where a row is no distribution. floor: of `plausibility`."""
        options = {**self.options, "vocab_size": vocab_size, "plausibility": floor}
        if self.seeds is not None:
            first = base[0]
            device = (first.values if isinstance(first, Logits) else first.hidden).device  # of a model on several
            options |= {"seed": self.seeds.unsqueeze(1).to(device), "position": self.position}
        tokens = sample_logits(base, aux, **options)
        assert isinstance(tokens, Tensor), "statistics are not asked for"
        return tokens.squeeze(1)


def sampling_options(processors: LogitsProcessorList, do_sample: bool) -> dict[str, Any] | None:
    """Options of `sample_logits` that do what the processors do, or None where something else is asked for."""
    if not do_sample:
        is_plain = all(type(processor) is LogitNormalization for processor in processors)
        return {"temperature": 0.0} if is_plain else None
    options: dict[str, Any] = {}
    kinds = list(_WARPERS)
    for processor in processors:
        kind = type(processor)
        if kind is LogitNormalization:  # which moves all logits of a row alike
            continue
        if kind not in kinds:
            return None
        del kinds[: kinds.index(kind) + 1]  # what comes before it must not come after it
        if getattr(processor, "filter_value", -torch.inf) != -torch.inf:
            return None
        if getattr(processor, "min_tokens_to_keep", 1) != 1:
            return None
        attribute, option = _WARPERS[kind]
        options[option] = getattr(processor, attribute)
    return options


class GenerationBySampling(Model):
    """Mixed in before transformers' generation, for a model whose `forward` takes `token_choice`.

    Then `forward` returns `next_tokens` instead of logits, those of each text's last position.
    """

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """transformers' own where something is asked for that needs the logits; else the same loop without them."""
        options = sampling_options(logits_processor, bool(generation_config.do_sample))
        needs_logits = (
            synced_gpus  # other processes may be in their loop's last steps, which this one does not know
            or generation_config.is_assistant
            or self._forward_hooks  # of the user's, which may look for logits, as an own `forward` may
            or str(type(self).forward.__module__).partition(".")[0] != __name__.partition(".")[0]
            or generation_config.prefill_chunk_size is not None
            or any(getattr(generation_config, name, None) for name in _STORED)
            or self._valid_auto_compile_criteria(model_kwargs, generation_config)
        )
        if options is None or needs_logits:
            return super()._sample(
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
            )
        choice = TokenChoice(options, _seeds(input_ids) if generation_config.do_sample else None)
        return self._chosen(input_ids, choice, stopping_criteria, generation_config, streamer, model_kwargs)

    def _chosen(
        self,
        input_ids: Tensor,
        choice: TokenChoice,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None,
        model_kwargs: dict[str, Any],
    ) -> Any:
        padding = generation_config._pad_token_tensor
        ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        choice.position = input_ids.shape[1]
        outputs = self._prefill(input_ids, generation_config, {**model_kwargs, "token_choice": choice})
        with self._optimize_model_for_decode():
            while True:
                model_kwargs = self._update_model_kwargs_for_generation(
                    outputs, model_kwargs, is_encoder_decoder=self.config.is_encoder_decoder
                )
                tokens = outputs.next_tokens.to(input_ids.device)
                _check_chosen(tokens, unfinished if ends else None, choice.position)
                if ends:
                    tokens = torch.where(unfinished, tokens, padding.to(tokens.device))
                input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
                unfinished = unfinished & ~stopping_criteria(input_ids, None)
                if streamer is not None:
                    streamer.put(tokens.cpu())
                if not bool(unfinished.any()):
                    break
                choice.position = input_ids.shape[1]
                length = 1 if model_kwargs["use_cache"] else None
                inputs = self.prepare_inputs_for_generation(
                    input_ids, next_sequence_length=length, **model_kwargs, token_choice=choice
                )
                outputs = self(**inputs, return_dict=True)
        if streamer is not None:
            streamer.end()
        if not generation_config.return_dict_in_generate:
            return input_ids
        return GenerateDecoderOnlyOutput(sequences=input_ids, **{CACHE: model_kwargs.get(CACHE)})


def _check_chosen(tokens: Tensor, unfinished: Tensor | None, position: int) -> None:
    """ValueError for a text without a token. unfinished: the texts that count, where others are padded; None: all."""
    is_none = tokens < 0 if unfinished is None else (tokens < 0) & unfinished
    if bool(is_none.any()):
        rows = ", ".join(map(str, is_none.nonzero().flatten().tolist()))
        raise ValueError(
            f"logits must have a largest finite one to choose from, got none at token {position} of text {rows}: NaN "
            "or +inf, or no token that base_floor allows"
        )


def _seeds(input_ids: Tensor) -> Tensor:
    """One for each text, drawn with torch's generator: texts differ where their tokens do not."""
    return torch.randint(2**63 - 1, (len(input_ids),), dtype=torch.int64, device=input_ids.device)
