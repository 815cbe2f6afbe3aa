"""A frozen causal language model and several auxiliaries, whose logits are added with signed scales."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor
from transformers import AutoConfig, GenerationMixin, PreTrainedModel
from transformers.utils import can_return_tuple

from . import adapters, members_saving, saving
from .auxiliary import AuxiliaryForCausalLM
from .cache_argument import takes_cache
from .caches import is_dynamic
from .causal_lm import has_cache
from .composite_generation import GenerationOfComposites, inherited
from .ensemble_cache import EnsembleCache
from .ensemble_config import AuxiliaryEnsembleConfig, check_floor, check_known, check_names
from .frozen_base import Call, Given
from .members import MembersOnFrozenBase
from .members_saving import MEMBERS
from .modalities import has_more_than_text
from .sums import AuxiliaryCausalLMOutput, Scale
from .vocabulary import check_tokenizers

if TYPE_CHECKING:
    from .paired_cache import PairedCache

_Scale = TypeVar("_Scale", bound="Scale | None")


class AuxiliaryEnsembleForCausalLM(MembersOnFrozenBase, PreTrainedModel, GenerationMixin):
    """softmax(base_scale * base logits + the sum of aux_scale * aux logits): `from_members` or `from_pretrained`.

    base      the frozen model, which runs once for all
    members   `AuxiliaryForCausalLM`s of that base by their names, each with its own head, trunk layer and prefix, and
              each trained or frozen (`requires_grad_(False)`): a frozen one is in eval mode and run under no_grad. They
              can be called and saved by themselves; a call of the ensemble does not call their `forward`
    Scales may be negative: with members tuned (1) and untuned (-1) this is proxy tuning, with an expert (a) and an
    antiexpert (-a) DExperts, with a base_scale of 1 + b, an amateur (-b) and base_floor contrastive decoding.
    Source    Liu et al. 2024, https://arxiv.org/abs/2401.08565; Liu et al. 2021, https://arxiv.org/abs/2105.03023;
              Li et al. 2022, https://arxiv.org/abs/2210.15097; O'Brien & Lewis 2023, https://arxiv.org/abs/2309.09117
    """

    config_class = AuxiliaryEnsembleConfig
    main_input_name = "input_ids"
    _own_arguments = ("aux_input_ids", "aux_attention_mask", "aux_scale", "base_scale", "base_floor")
    _unconditional_arguments: ClassVar[dict[str, Any]] = {"base_floor": 0.0}  # a difference of two floors would be NaN
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: AuxiliaryEnsembleConfig,
        base: PreTrainedModel | None = None,
        members: Mapping[str, AuxiliaryForCausalLM] | None = None,
    ):
        if base is None or not members:
            raise ValueError(
                "AuxiliaryEnsembleForCausalLM needs its base and members, got a configuration alone: use from_members "
                "or from_pretrained, which never make a base of random weights"
            )
        super().__init__(config)
        self._take_members(base, members)
        auxiliaries = self._auxiliaries
        config.num_valid_tokens = min(one.config.num_valid_tokens for one in auxiliaries)
        self.generation_config = inherited(base.generation_config)
        self._is_stateful = any(one._is_stateful for one in auxiliaries)
        self._has_cache = all(one._has_cache for one in auxiliaries)
        readers = [one._readers for one in auxiliaries]
        reads_images = [readers[0].is_multimodal[0], *(reader.is_multimodal[1] for reader in readers)]
        self._leader_name, self._num_leaders = "base" if reads_images[0] else None, sum(reads_images)
        self._has_text_positions = any(reader.leaders()[2] for reader in readers)

    @classmethod
    def from_members(
        cls,
        base: PreTrainedModel | str,
        members: Mapping[str, AuxiliaryForCausalLM | PreTrainedModel | str],
        *,
        aux_scales: Mapping[str, float] | None = None,
        base_scale: float = 1.0,
        base_floor: float | None = None,
        frozen: Iterable[str] = (),
        vocab_policy: str = "strict",
        base_kwargs: dict[str, Any] | None = None,
    ) -> AuxiliaryEnsembleForCausalLM:
        """Joins a base and members. All are taken, not copied; the base is frozen for good.

        base          a causal LM, or the name or path of one. Members that are joined already share it as an object
        members       by name (letters, digits, "_", "-"): an `AuxiliaryForCausalLM` on this base, or the folder of one;
                      or any causal LM, or its name, whose own logits are added (`from_base_and_aux(zero_init=False)`)
        aux_scales    of members by name, may be negative; without: the member's own config.aux_scale
        base_scale    what the base's logits are multiplied by
        base_floor    alpha in [0, 1], 0 or None: no floor. In logits, and so in `generate`, tokens that the base alone
                      gives less than alpha times the probability of its likeliest are -inf. Losses and their statistics
                      have no floor
        frozen        names of members that are not trained; a member whose weights need no gradients is one anyway
        vocab_policy  of members that are joined here, as in `AuxiliaryForCausalLM.from_base_and_aux`
        base_kwargs   for from_pretrained of a base given by name
        Raises        TypeError, ValueError: names, scales, another base, one model twice
        """
        if not isinstance(members, Mapping):
            raise TypeError(f"members must be a dict of models by name, got {type(members).__name__}")
        names, frozen = check_names(members), list(frozen)
        check_known("aux_scales", aux_scales or {}, names)
        check_known("frozen", frozen, names)
        base, base_kwargs = adapters.language_model("base", base), dict(base_kwargs or {})
        base_name = os.fspath(base) if isinstance(base, (str, os.PathLike)) else None
        base_model = saving.causal_lm("base", base, base_kwargs)
        joined = {
            name: _member(name, given, base_model, base_name, base_kwargs, vocab_policy)
            for name, given in members.items()
        }
        scales = {name: (aux_scales or {}).get(name, one.config.aux_scale) for name, one in joined.items()}
        config = AuxiliaryEnsembleConfig(
            base_model.config,
            member_names=names,
            aux_scales=scales,
            frozen_members=frozen,
            base_scale=base_scale,
            base_floor=base_floor,
        )
        members_saving.take_pointer(config, list(joined.values()))
        return cls(config, base_model, joined)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        base: PreTrainedModel | str | None = None,
        base_kwargs: dict[str, Any] | None = None,
        check_base: bool = True,
        config: AuxiliaryEnsembleConfig | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Loads what `save_pretrained` wrote, in eval mode: the base once, and the members on it.

        Arguments and errors as in `AuxiliaryForCausalLM.from_pretrained`; **kwargs are those of all models.
        """
        config, base_model, members = members_saving.load(
            folder, config, cls, base=base, base_kwargs=base_kwargs, check_base=check_base, **kwargs
        )
        model = cls(config, base_model, members).eval()
        saving.load_generation_config(model, folder, kwargs)
        model.config.name_or_path = os.fspath(folder)
        return (model, {problem: set() for problem in saving.PROBLEMS}) if output_loading_info else model

    # -- generation ----------------------------------------------------------------------------------------------------

    def generate(
        self,
        *args: Any,
        aux_scale: Mapping[str, Scale] | Tensor | None = None,
        base_scale: Scale | None = None,
        **kwargs: Any,
    ) -> Any:
        """As of transformers, with the arguments of `forward` for the members.

        They hold in every branch: under guidance_scale also for the unconditional text, but for the floor, and an
        assistant_model gets them if it is an ensemble of members with the same names. Raises ValueError as
        `AuxiliaryForCausalLM.generate`, and for images that the base does not read.
        """
        if self._leader_name is None and self._num_leaders and has_more_than_text(kwargs):
            raise ValueError("images in generation must be read by the base, got them for members alone")
        if isinstance(aux_scale, Tensor) and aux_scale.dim() == 1:  # beams repeat the rows of every tensor
            aux_scale = dict(zip(self.members, self._scales(aux_scale, None), strict=True))
        if isinstance(aux_scale, Mapping):
            aux_scale = {name: _as_number(scale) for name, scale in aux_scale.items()}
        return super().generate(*args, aux_scale=aux_scale, base_scale=_as_number(base_scale), **kwargs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        input_ids, model_kwargs = super()._expand_inputs_for_generation(expand_size, *args, **kwargs)
        if expand_size > 1:
            for argument in self._own_arguments:
                given = model_kwargs.get(argument)
                if isinstance(given, Mapping):
                    model_kwargs[argument] = {name: _repeated(one, expand_size) for name, one in given.items()}
        return input_ids, model_kwargs

    def _maybe_initialize_input_ids_for_generation(
        self,
        inputs: Tensor | None,
        bos_token_id: Tensor | None,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, str, dict[str, Any]]:
        if inputs is None:  # the batch is looked for in tensors alone
            given = [model_kwargs.get(argument) for argument in self._own_arguments]
            tensors = {name: one for each in given if isinstance(each, Mapping) for name, one in each.items()}
            model_kwargs = {**tensors, **model_kwargs}
        return super()._maybe_initialize_input_ids_for_generation(inputs, bos_token_id, model_kwargs, *args, **kwargs)

    def _shares_arguments(self, assistant: Any) -> bool:
        return super()._shares_arguments(assistant) and list(assistant.members) == list(self.members)

    def new_cache(self) -> EnsembleCache:
        """An empty cache for all models. ValueError where one of them has none that can be paired (`has_cache`)."""
        if not self._has_cache:
            models = [self.base, *(one.aux for one in self._auxiliaries)]
            names = sorted({type(model).__name__ for model in models if not has_cache(model)})
            raise ValueError(f"use_cache must be False: {' and '.join(names)} has no cache that can be paired")
        configs = {name: one.aux.config for name, one in self.members.items()}
        return EnsembleCache.of_configs(self.base.config, configs)

    def _cache_of_kind(self, kind: str | None, model_kwargs: dict[str, Any], **options: Any) -> EnsembleCache:
        if not is_dynamic(kind):
            raise ValueError(f"cache_implementation must be 'dynamic' for several auxiliaries, got {kind!r}")
        return self.new_cache()

    def _check_cache(self, cache: object) -> None:
        if not isinstance(cache, EnsembleCache):
            raise TypeError(f"past_key_values must be an EnsembleCache (model.new_cache()), got {type(cache).__name__}")
        if list(cache.pairs) != list(self.members):
            raise ValueError(
                f"past_key_values must be of the members {', '.join(self.members)}, got {', '.join(cache.pairs)}"
            )

    def _pairs(self, cache: EnsembleCache) -> list[PairedCache]:
        return list(cache.pairs.values())

    # -- forward -------------------------------------------------------------------------------------------------------

    @can_return_tuple
    @takes_cache
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: EnsembleCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        aux_input_ids: Mapping[str, Tensor] | None = None,
        aux_attention_mask: Mapping[str, Tensor] | None = None,
        aux_scale: Mapping[str, Scale] | Tensor | None = None,
        base_scale: Scale | None = None,
        base_floor: float | None = None,
        skip_logits: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> AuxiliaryCausalLMOutput:
        """Summed logits, or with labels their loss, for which no [N, V] tensor is made.

        As `AuxiliaryForCausalLM.forward`, but for:
        aux_input_ids       dict of prefixes [batch, prefix] int64 by the names of those members that read one;
                            aux_attention_mask: dict of their masks
        aux_scale           dict of numbers, 0-d or [batch] tensors by name, where members that are left out have
                            config.aux_scales; or a tensor [K] or [batch, K] in the members' order; None: config
        base_scale          number, 0-d or [batch] tensor; None: config.base_scale
        base_floor          number in [0, 1], which is in logits and in nothing else; None: config.base_floor
        Returns             base_loss is that of the base alone and unscaled: None in training with a member whose head
                            is shared or with a base_scale, where it would cost a product of its own. router_loss is
                            the sum of the members'
        A member with a shared head adds base_head(h_base + aux_scale * map(h_aux)) - base_head(h_base), whatever
        base_scale is: all of these and the base are one product, and two where base_scale is not 1 and the base's head
        has a bias or a softcap.
        """
        for name in ("base_hidden_states", "base_trunk_states"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"{name} must not be given to an ensemble, which runs its base: train one auxiliary")
        call = Call(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            labels,
            use_cache,
            logits_to_keep,
            skip_logits,
            num_items_in_batch,
            output_hidden_states,
        )
        scales = self._scales(aux_scale, None if input_ids is None else input_ids.shape[0])
        prefixes = self._of_members("aux_input_ids", aux_input_ids)
        masks = self._of_members("aux_attention_mask", aux_attention_mask)
        given = [Given(*each) for each in zip(scales, prefixes, masks, strict=True)]
        base_scale = self.config.base_scale if base_scale is None else base_scale
        base_floor = check_floor(self.config.base_floor if base_floor is None else base_floor)
        return self._called(call, given, kwargs, base_scale, base_floor)

    def _scales(self, given: Mapping[str, Scale] | Tensor | None, batch: int | None) -> list[Scale]:
        """Of each member: a number, 0-d or [batch]. batch: None where it is not known."""
        names, defaults = list(self.members), self.config.aux_scales
        if given is None:
            return [defaults[name] for name in names]
        if isinstance(given, Tensor):
            rows = [] if given.dim() < 2 else [given.shape[0] if batch is None else batch]
            if list(given.shape) != [*rows, len(names)]:
                want = f"[{len(names)}] or [{'batch' if batch is None else batch}, {len(names)}]"
                raise ValueError(
                    f"aux_scale must be {want}, one for each member ({', '.join(names)}), got {list(given.shape)}"
                )
            return list(given.unbind(-1))
        if not isinstance(given, Mapping):
            raise TypeError(
                f"aux_scale must be a dict of scales by members' names ({', '.join(names)}), or a tensor with one for "
                f"each, got {type(given).__name__}"
            )
        check_known("aux_scale", given, names)
        for name, scale in given.items():
            if isinstance(scale, bool) or not isinstance(scale, (Real, Tensor)):
                raise TypeError(f"aux_scale[{name!r}] must be a number or a tensor, got {type(scale).__name__}")
        return [given.get(name, defaults[name]) for name in names]


def _member(
    name: str, given: Any, base: PreTrainedModel, base_name: str | None, base_kwargs: dict[str, Any], vocab_policy: str
) -> AuxiliaryForCausalLM:
    """A member that is given in any of the ways that `from_members` knows."""
    given = adapters.language_model(f"members[{name!r}]", given)
    if isinstance(given, AuxiliaryForCausalLM):
        return given
    if isinstance(given, GenerationOfComposites):
        raise TypeError(
            f"members[{name!r}] must be an AuxiliaryForCausalLM or a causal LM of one piece, got {type(given).__name__}"
        )
    if isinstance(given, (str, os.PathLike)):
        given = os.fspath(given)
        kind = AutoConfig.from_pretrained(given).model_type
        if kind == AuxiliaryForCausalLM.config_class.model_type:
            return AuxiliaryForCausalLM.from_pretrained(given, base=base)
        if kind == AuxiliaryEnsembleConfig.model_type:
            raise TypeError(f"members[{name!r}] must not be an ensemble: take a member's folder in {given}/{MEMBERS}/")
        if base_name is not None:
            check_tokenizers(base_name, given, saving.hub_options(base_kwargs), {})
    elif not isinstance(given, PreTrainedModel):
        raise TypeError(
            f"members[{name!r}] must be an AuxiliaryForCausalLM, a causal LM, or the name of one, got "
            f"{type(given).__name__}"
        )
    return AuxiliaryForCausalLM.from_base_and_aux(base, given, zero_init=False, vocab_policy=vocab_policy)


def _as_number(scale: _Scale) -> _Scale | float:
    """A 0-d tensor as a number; anything else as it is."""
    return scale.item() if isinstance(scale, Tensor) and scale.dim() == 0 else scale


def _repeated(value: Any, times: int) -> Any:
    return value.repeat_interleave(times, dim=0) if isinstance(value, Tensor) else value
