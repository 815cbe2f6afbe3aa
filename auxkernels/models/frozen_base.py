"""A frozen base and what is added to its logits: what one auxiliary and an ensemble of them have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig

from . import adapters, base_pointer
from . import auxiliary_inputs as reading
from .base_states import BaseStates, Layers
from .cache_argument import CACHE
from .causal_lm import are_packed, router_loss, wants_router_logits
from .composite_generation import GenerationOfComposites
from .heads import kept_positions
from .modules import features, run
from .sums import AuxiliaryCausalLMOutput, Scale, Sum, Term, with_router_loss
from .token_statistics import OwnTokenStatistics, check_no_further_loss
from .trunkless import check_has_trunk

if TYPE_CHECKING:
    from transformers.utils import ModelOutput
    from typing_extensions import Self

    from .auxiliary import AuxiliaryForCausalLM
    from .paired_cache import PairedCache
    from .token_statistics import TokenStatisticsOutput


@dataclass
class Call:
    """What `forward` is given of the text and of what is asked for, as documented there."""

    input_ids: Tensor | None
    attention_mask: Tensor | None
    position_ids: Tensor | None
    past_key_values: Cache | None
    labels: Tensor | None
    use_cache: bool | None
    logits_to_keep: int | Tensor
    skip_logits: bool | None
    num_items_in_batch: int | Tensor | None
    output_hidden_states: bool | None
    base_states: BaseStates | None = None


@dataclass
class Ran:
    """What the models of a call gave.

    h_base   [batch, new, D], what enters the base's head; states: its hidden states, where they are wanted
    terms, router_losses   of each auxiliary; a balancing loss, 0-d, where it is wanted and its experts have one
    """

    h_base: Tensor
    states: Layers | None
    terms: list[Term]
    router_losses: list[Tensor | None]


@dataclass
class Given:
    """What a call gives one auxiliary: its scale, a number, 0-d or [batch], and its prefix with a mask."""

    scale: Scale
    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None


class OnFrozenBase(adapters.PartsWithAdapters, OwnTokenStatistics, GenerationOfComposites):
    """Mixed in before `PreTrainedModel` and transformers' generation.

    base           the frozen model
    _auxiliaries   the `AuxiliaryForCausalLM`s whose auxiliaries are added: a composite of one is that itself
    """

    _is_pointer_checked: bool

    @property
    def _auxiliaries(self) -> list[AuxiliaryForCausalLM]:
        raise NotImplementedError

    @property
    def _trunk_layers(self) -> set[int]:
        """Which of the base's hidden states are read beside the last ones."""
        return {one.config.trunk_layer for one in self._auxiliaries if one.config.trunk_layer is not None}

    # -- the base stays frozen -----------------------------------------------------------------------------------------

    def init_weights(self) -> None:
        """Nothing: all models come with their weights."""

    def _freeze_base(self) -> None:
        self.base.requires_grad_(False)
        self.base.eval()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.base.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        super().requires_grad_(requires_grad)
        self.base.requires_grad_(False)
        return self

    def get_output_embeddings(self) -> None:
        return None  # no single layer makes the sum

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError("resize_token_embeddings must be called on base and aux before they are joined")

    def _check_pointer(self) -> None:
        """Says at the first step what would otherwise be found at the first checkpoint, or after it."""
        if not self._is_pointer_checked and not torch.compiler.is_compiling():
            self._is_pointer_checked = True
            base_pointer.warn_of_pointer(self)

    # -- caches --------------------------------------------------------------------------------------------------------

    def new_cache(self) -> Cache:
        raise NotImplementedError

    def _check_cache(self, cache: Cache) -> None:
        reading.check_cache(cache)

    def _pairs(self, cache: Any) -> list[PairedCache]:
        """The `PairedCache` of each auxiliary."""
        return [cache]

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if model_kwargs.get(CACHE) is not None:
            self._check_cache(model_kwargs[CACHE])
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _cache_of(self, call: Call, has_target: bool) -> tuple[Cache | None, bool]:
        """The cache of a call, which may be new, and whether it is returned."""
        cache, use_cache = call.past_key_values, call.use_cache
        if use_cache is None:
            is_new = not has_target and not self.training and not are_packed(call.attention_mask, call.position_ids)
            use_cache = cache is not None or (self.config.use_cache and is_new)
        if use_cache and cache is None and self._has_cache:
            cache = self.new_cache()
        return cache, bool(use_cache) and cache is not None

    # -- forward -------------------------------------------------------------------------------------------------------

    def _called(
        self,
        call: Call,
        given: list[Given],
        kwargs: dict[str, Any],
        base_scale: Scale = 1.0,
        base_floor: float | None = None,
    ) -> AuxiliaryCausalLMOutput | TokenStatisticsOutput:
        """What `forward` returns. given: of each auxiliary; base_floor: of the logits, as for `Sum.logits`."""
        # not in the signature, where Trainer would take it for a second label that every batch must have
        shift_labels, token_statistics = kwargs.pop("shift_labels", None), kwargs.pop("token_statistics", None)
        token_choice = kwargs.pop("token_choice", None)
        target = reading.shifted(call.labels) if shift_labels is None else shift_labels
        reading.check_inputs(call.input_ids, target, call.num_items_in_batch, kwargs)
        if call.past_key_values is not None:
            self._check_cache(call.past_key_values)
        assert call.input_ids is not None, "they have been checked"
        wants_balance = [False] * len(given)
        if target is not None:
            self._check_trained()
            wants_balance = self._wants_balance(kwargs)
        cache, use_cache = self._cache_of(call, target is not None)
        base_scale = reading.row_scale(base_scale, call.input_ids.shape, "base_scale")
        ran = self._run(call, given, cache, use_cache, wants_balance, kwargs)
        total = Sum(self.base, ran.h_base, ran.terms, self.config.num_valid_tokens, base_scale)

        if token_statistics is not None:
            check_no_further_loss(self, any(wants_balance))
            base, aux = total.sources()
            is_shifted, width = shift_labels is not None, self.config.num_valid_tokens
            return token_statistics(base, aux or [], target, is_shifted, width, call.num_items_in_batch)
        numbers: dict[str, Any] = {}
        if target is not None:
            label_smoothing = self.config.label_smoothing if self.training else 0.0
            numbers = total.loss(target, label_smoothing, call.num_items_in_batch, self.training)
        balances = [one for one in ran.router_losses if one is not None]
        if balances:
            router = sum((one.to(balances[0].device) for one in balances[1:]), balances[0])
            numbers = with_router_loss(numbers, router)
        skip_logits = call.skip_logits
        if skip_logits is None:
            skip_logits = target is not None and (self.training or self.config.skip_logits_in_evaluation)
        logits = None
        if token_choice is not None:
            numbers["next_tokens"] = total.at(kept_positions(1)).next_tokens(token_choice, base_floor)
        elif not skip_logits:
            logits = total.at(kept_positions(call.logits_to_keep)).logits(self.config.vocab_size, base_floor)
        return AuxiliaryCausalLMOutput(
            logits=logits,
            hidden_states=ran.states if call.output_hidden_states and isinstance(ran.states, tuple) else None,
            **{CACHE: cache if use_cache else None},
            **numbers,
        )

    def _check_trained(self) -> None:
        """In training, of a call with labels: what will not save, adapters in the base, dead heads."""
        if self.training:
            self._check_pointer()
            if torch.is_grad_enabled():
                for one in self._auxiliaries:
                    one._check_trainable()

    def _wants_balance(self, kwargs: dict[str, Any]) -> list[bool]:
        """Of each auxiliary, in a call with labels: whether its loss has a balancing loss. kwargs lose what says so."""
        balanced = kwargs.pop("output_router_logits", None)
        return [wants_router_logits(one.aux, balanced) for one in self._auxiliaries]

    def _run(
        self,
        call: Call,
        given: list[Given],
        cache: Cache | None,
        use_cache: bool,
        wants_balance: list[bool],
        kwargs: dict[str, Any],
    ) -> Ran:
        """Runs the base, unless its states are given, and each auxiliary once."""
        input_ids = call.input_ids
        assert input_ids is not None, "they have been checked"
        past = 0 if cache is None else cache.get_seq_length()
        pairs = [None] * len(given) if cache is None else self._pairs(cache)
        texts = [reading.Text(input_ids, call.attention_mask, call.position_ids, pair, past) for pair in pairs]
        base_text, base_kwargs, split = self._split(texts, given, kwargs)
        scales = [reading.row_scale(one.scale, input_ids.shape) for one in given]
        behind = [self._aux_text(i, text, one) for i, ((text, _), one) in enumerate(zip(split, given, strict=True))]
        if cache is not None:
            cache.is_complete = False
        if call.base_states is None:
            h_base, states = self._run_base(base_text, use_cache, call.output_hidden_states, base_kwargs)
        else:
            h_base, states = call.base_states.hidden, call.base_states.trunks
        ran = Ran(h_base, states, [], [])
        for one, (text, inputs), own, scale, is_balanced in zip(
            self._auxiliaries, split, behind, scales, wants_balance, strict=True
        ):
            aux_kwargs = own.with_token_types(inputs | ({"output_router_logits": True} if is_balanced else {}))
            output = self._run_one(one, text, own, use_cache, states, aux_kwargs)
            ran.terms.append(Term(one, own.of_text(features(output)), scale))
            ran.router_losses.append(router_loss(one.aux, output, own.attention_mask) if is_balanced else None)
            if text.cache is not None:
                text.cache.prefix_mask, text.cache.arranged_mask = own.prefix_mask, own.arranged_mask
        if cache is not None:
            cache.is_complete = True
        return ran

    def _split(
        self, texts: list[reading.Text], given: list[Given], kwargs: dict[str, Any]
    ) -> tuple[reading.Text, dict[str, Any], list[tuple[reading.Text, dict[str, Any]]]]:
        """(text, further inputs) of the base, and of each auxiliary: none gets what another one alone reads."""
        readers = [one._readers for one in self._auxiliaries]
        found = [
            reader.split(text, dict(kwargs), own.input_ids is not None)
            for reader, text, own in zip(readers, texts, given, strict=True)
        ]
        base_text, of_base = found[0][:2]
        of_base = {name: value for name, value in of_base.items() if all(name in one[1] for one in found)}
        named = frozenset().union(*(reader.aux for reader in readers))
        of_auxiliaries = [
            (text, {name: value for name, value in inputs.items() if name in reader.aux or name not in named})
            for reader, (_, _, text, inputs) in zip(readers, found, strict=True)
        ]
        return base_text, of_base, of_auxiliaries

    def _aux_text(self, index: int, text: reading.Text, given: Given) -> reading.AuxText:
        """What the auxiliary of an index reads; raises before anything has run."""
        one = self._auxiliaries[index]
        reader = one.aux if one.config.trunk_layer is None else self.base
        pad_token_id = getattr(reader.config.get_text_config(), "pad_token_id", None)
        return reading.aux_text(text, given.input_ids, given.attention_mask, pad_token_id, *one._keep_states)

    def _run_base(
        self, text: reading.Text, use_cache: bool, output_hidden_states: bool | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Layers | None]:
        """`features` [batch, new, D] and, where they are wanted, all of them."""
        check_has_trunk(self.base, "a call without base_hidden_states")
        wants_states = bool(output_hidden_states) or bool(self._trunk_layers)
        if self.base.training:  # it may be shared
            self.base.eval()
        with torch.no_grad():
            output = run(
                self.base,
                input_ids=text.input_ids,
                attention_mask=text.attention_mask,
                position_ids=text.position_ids,
                cache=None if text.cache is None else text.cache.base,
                use_cache=use_cache,
                output_hidden_states=wants_states,
                **kwargs,
            )
        return features(output), output.hidden_states if wants_states else None

    def _run_one(
        self,
        one: AuxiliaryForCausalLM,
        text: reading.Text,
        own: reading.AuxText,
        use_cache: bool,
        states: Layers | None,
        kwargs: dict[str, Any],
    ) -> ModelOutput:
        return one._run_aux(text, own, use_cache, states, kwargs)
