"""A causal language model whose decoder layers are conditioned on labels of segments, which a planner predicts."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..cross_entropy import aux_cross_entropy
from ..sources import Logits
from . import adapters, saving
from . import planner_loading as loading
from .auxiliary_inputs import check_labels, shifted
from .cache_argument import CACHE, takes_cache
from .caches import new_cache
from .causal_lm import (
    are_packed,
    check_frozen,
    check_layers,
    has_cache,
    is_stateful,
    position_offset,
    router_loss,
    wants_router_logits,
)
from .composite_generation import GenerationOfComposites, inherited
from .conditioning import (
    ActiveRows,
    Conditioning,
    LayerHooks,
    checked_segments,
    chosen_layers,
    conditioning_segments,
    decoder_layers,
    token_mask,
)
from .gathering import written_by_one
from .heads import check_output_head, kept_positions, output_head, probe
from .loading_options import with_call_options
from .modalities import auto_class, reads_more_than_text
from .modules import device_of, features, run
from .places import modules_at, width_at
from .planner_checkpointing import CheckpointingThroughHooks
from .planner_config import PlannerConfig, check_mode
from .planner_generation import GenerationWithPlans, SegmentPlans
from .planner_loading import MARK, kept_buffers, marked_as_initialized
from .planner_training import Freezing
from .token_statistics import OwnTokenStatistics

if TYPE_CHECKING:
    from transformers.utils import ModelOutput
    from typing_extensions import Self


@dataclass
class PlannerCausalLMOutput(CausalLMOutputWithPast):
    """The output of a causal LM, and statistics of the S segments' labels.

    label_entropy    0-d, mean entropy of the segments' label probabilities, nats; 0 where labels are given
    label_usage      [K], mean probability of each label over the segments
    segment_labels   int64 [S], the likeliest label of each segment, or the given one
    router_loss      0-d, the weighted balancing loss of a mixture of experts, which the loss includes: of a language
                     model that is not frozen, where its configuration or the call says output_router_logits; else None
    next_tokens      int64 [batch], in generation that needs no logits: what follows the last position
    The first two are differentiable in modes "soft", "straight_through" and "gumbel". Other than the last, all are None
    in generation.
    """

    label_entropy: Tensor | None = None
    label_usage: Tensor | None = None
    segment_labels: Tensor | None = None
    router_loss: Tensor | None = None
    next_tokens: Tensor | None = None


class PlannerForCausalLM(
    adapters.PartsWithAdapters,
    OwnTokenStatistics,
    Freezing,
    CheckpointingThroughHooks,
    GenerationWithPlans,
    GenerationOfComposites,
    PreTrainedModel,
    GenerationMixin,
):
    """A causal LM conditioned on segment labels, with the planner that scores them. See `from_lm`.

    Submodules: `lm`, the language model; `conditioning`, a `Conditioning`; `planner`, the user's module or None.
    A language model may be shared by several of these, and used on its own, also in other threads: the hooks add
    nothing outside `forward` and its thread. They are removed with `remove_hooks`, or when the model is deleted.
    A language model or a head with hooks, or weights elsewhere (offloaded, sharded), is called: its logits are stored.
    Not for `torch.nn.DataParallel` (RuntimeError): segments are numbered over the whole batch.
    """

    config_class = PlannerConfig
    _own_arguments = ("mode",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # trained, where a language model is often bfloat16; a planner then gets back the dtypes that it came with
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["conditioning", "planner"]

    def __init__(self, config: PlannerConfig, lm: PreTrainedModel | None = None, planner: nn.Module | None = None):
        super().__init__(config)
        self.lm = auto_class(config.text_config).from_config(config.text_config) if lm is None else lm
        self.config.text_config = self.lm.config
        self._is_stateful = is_stateful(self.lm)  # generation asks before it drafts tokens that may be taken back
        self._has_cache = has_cache(self.lm)
        self._position_offset = position_offset(self.lm)
        self._leader_name = "lm" if reads_more_than_text(self.lm) else None
        self.planner = planner
        config.has_planner = planner is not None
        modules = modules_at(config.place, self.lm, self._decoder_layers(), config.layers)
        self.conditioning = Conditioning(
            len(config.layers),
            config.num_labels,
            config.label_dim,
            width_at(config.place, self.lm, modules, config.layers),
            init=config.conditioning_init,
            dtype=torch.float64 if self.lm.dtype == torch.float64 else torch.float32,
            device=device_of(self.lm),
        )
        self._frozen: dict[str, list[str]] = {}  # names of the weights that freezing changed
        self._active = ActiveRows()
        self._hooks = LayerHooks(modules, self._active)
        self._is_hooked = True
        with marked_as_initialized(lm, planner):  # or post_init would draw weights anew that are not its own
            self.post_init()
        if config.freeze_lm:
            self.freeze_lm()

    @classmethod
    def from_lm(
        cls,
        lm: PreTrainedModel | str,
        planner: nn.Module | None = None,
        *,
        lm_kwargs: dict[str, Any] | None = None,
        codebook: Tensor | None = None,
        num_labels: int | None = None,
        label_dim: int | None = None,
        layers: Iterable[int] | None = None,
        place: str = "layer_input",
        mode: str = "soft",
        temperature: float = 1.0,
        freeze_lm: bool = True,
        gumbel_scale: float = 1.0,
        gumbel_hard: bool = False,
        gumbel_clean_gradient: bool = False,
        fixed_label: int = 0,
        conditioning_init: str = "zero_projection",
        dtype: torch.dtype | str | None = None,
        device_map: str | int | dict[str, Any] | torch.device | None = None,
    ) -> PlannerForCausalLM:
        """Condition the decoder layers of a language model on labels.

        lm                      a causal LM of transformers, decoder only. It is not copied, and may be shared. It gets
                                hooks, which go with this model or by `remove_hooks`. Or the name or path of one.
        dtype, device_map       as of from_pretrained, of an lm given by name. lm_kwargs: what else it takes, over them.
        planner                 called as planner(**planner_inputs), returns scores [S, K]; None: scores or labels are
                                given to each call.
        codebook                [K, E], the first value of every layer's codebook, such as the centroids of
                                `fit_codebook`; None: standard normal, of num_labels and label_dim.
        layers                  indices of the layers to condition; None: all but the first two.
        place, mode, temperature, freeze_lm, gumbel_scale, gumbel_hard, gumbel_clean_gradient, fixed_label,
        conditioning_init       as in `PlannerConfig`, where temperature is `label_temperature`.
        Raises                  TypeError, ValueError: a model or an option that cannot be served.
        """
        if codebook is not None:
            num_labels, label_dim = _codebook_sizes(codebook, num_labels, label_dim)
        if num_labels is None or label_dim is None:
            raise ValueError("num_labels and label_dim must be given where there is no codebook")
        given, lm = lm, adapters.language_model("lm", lm)
        lm_kwargs = with_call_options("lm", lm, lm_kwargs, dtype=dtype, device_map=device_map)
        lm = loading.language_model(lm, lm_kwargs)
        check_output_head(lm)
        width = lm.config.get_text_config().hidden_size if place == "layer_input" else None
        check_layers(lm, list(decoder_layers(lm)), probe(lm), width)
        config = PlannerConfig(
            text_config=copy.deepcopy(lm.config),  # what the constructor sets in it must not reach the model
            attn_implementation=lm.config._attn_implementation,
            num_labels=num_labels,
            label_dim=label_dim,
            layers=chosen_layers(layers, len(decoder_layers(lm))),
            place=place,
            mode=mode,
            label_temperature=temperature,
            gumbel_scale=gumbel_scale,
            gumbel_hard=gumbel_hard,
            gumbel_clean_gradient=gumbel_clean_gradient,
            fixed_label=fixed_label,
            conditioning_init=conditioning_init,
            freeze_lm=freeze_lm,
        )
        loading.point_to(config, lm, given, lm_kwargs)
        model = cls(config, lm=lm, planner=planner)
        model.generation_config = inherited(lm.generation_config)
        if codebook is not None:
            model.conditioning.set_codebook(codebook)
        return model.train(lm.training)

    # -- forward -------------------------------------------------------------------------------------------------------

    @takes_cache
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        segment_ids: Tensor | None = None,
        segments_are_aligned: bool = False,
        planner_inputs: Mapping[str, Any] | None = None,
        mode: str | None = None,
        skip_logits: bool | None = None,
        plans: SegmentPlans | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> PlannerCausalLMOutput | tuple[Any, ...]:
        """Logits or loss of the conditioned language model. Arguments not described here are those of any causal LM.

        attention_mask        [batch, seq] says also after which tokens padding comes (`predicted_segments`), with a
                              cache its last seq columns; masks of other forms do not, so there ids must be aligned.
        use_cache             None: unless past_key_values are given, none is made in training, where there are labels,
                              or where positions begin anew within a row (packed texts, which it would not keep apart).
        segment_ids           int64 [batch, seq], the segment of each token, numbered from 0 over the whole batch;
                              negative: a token of no segment. Mode "fixed" does without: all tokens. Ids that begin
                              anew in each row, as collators leave them that know nothing of segments, are an error
                              where labels of further segments are given.
        segments_are_aligned  they already say of which segment the *predicted* token is (`predicted_segments`).
        label_scores [S, K], label_ids int64 [S], planner_inputs: keyword arguments of the planner
                              where the S segments' labels come from. Exactly one: scores or planner_inputs, in mode
                              "hard" also ids; "fixed" reads none.
        mode                  instead of the configuration's.
        num_items_in_batch    divisor of the summed loss; None: the counted labels of this call.
        skip_logits           return no logits; None: where there is a loss, in training mode or if the configuration
                              says skip_logits_in_evaluation.
        plans                 what generate() passes instead.
        label_scores, label_ids and shift_labels (shifted already) are among the kwargs: a Trainer evaluates no loss
        without every argument that has "label" in its name. It also drops these columns and those of planner_inputs
        from the data, unless `TrainingArguments(remove_unused_columns=False)`.
        Returns               `PlannerCausalLMOutput`. In training no [batch, seq, vocabulary] tensor is made.
        Raises                TypeError, ValueError: arguments; in training trainable weights, such as PEFT's, in a
                              language model that is frozen. On CPU IndexError, on GPU NaN: unknown segments, labels.
        """
        given = {name: kwargs.pop(name, None) for name in ("label_scores", "label_ids", "shift_labels")}
        shift_labels, token_statistics = given.pop("shift_labels"), kwargs.pop("token_statistics", None)
        token_choice = kwargs.pop("token_choice", None)
        tokens = inputs_embeds if input_ids is None else input_ids
        if tokens is None:
            raise ValueError("input_ids or inputs_embeds must be given")
        shape = tokens.shape[:2]
        target = shifted(labels) if shift_labels is None else shift_labels
        check_labels(target, shape)
        statistics: dict[str, Tensor | None] = {}
        if plans is not None:
            planned, token_segments = plans.rows, plans.segments_of_last(shape[1])
            assert planned is not None, "`advance` comes first"
            rows = planned
        else:
            mode = check_mode(mode or self.config.mode)
            mask = None if segments_are_aligned else token_mask(attention_mask, shape)
            segment_ids = checked_segments(segment_ids, mode, shape, tokens.device)
            rows, of_labels = self._rows(mode, given | {"planner_inputs": planner_inputs})
            statistics.update(of_labels)
            num_segments = None if mode == "fixed" else rows.shape[1]
            token_segments = conditioning_segments(segment_ids, segments_are_aligned, mask, num_segments)
        if self.training and "lm" in self._frozen and torch.is_grad_enabled():
            check_frozen(self.lm, "lm", "; to train adapters in it, use freeze_lm=False")
        if not self._has_cache:
            use_cache = False
        elif use_cache is None and past_key_values is None and plans is None:
            # a frozen model in eval mode would make one, which checkpointed layers fill twice
            is_asked = not self.training and target is None
            use_cache = None if is_asked and not are_packed(attention_mask, position_ids) else False
        kwargs |= {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        kwargs |= {"cache": past_key_values, "inputs_embeds": inputs_embeds, "use_cache": use_cache}
        kwargs["output_router_logits"] = self._is_balanced(target is not None, kwargs.pop("output_router_logits", None))
        outputs = self._lm_outputs(rows, token_segments, kwargs)
        hidden = features(outputs)
        if token_statistics is not None:
            base, is_shifted = output_head(self.lm).sources(hidden), shift_labels is not None
            assert target is not None, "statistics are asked for with labels"
            output = token_statistics(base, [], target.to(hidden.device), is_shifted, None, num_items_in_batch)
            is_balanced = bool(kwargs["output_router_logits"])
            output.aux_loss = self._unweighted_router_loss(outputs, attention_mask, is_balanced)
            return output
        loss = self._loss(hidden, target, num_items_in_batch)
        if kwargs["output_router_logits"]:
            statistics["router_loss"] = balance = router_loss(self.lm, outputs, attention_mask)
            loss = loss if balance is None or loss is None else loss + balance.to(loss.device)
        if skip_logits is None:
            skip_logits = loss is not None and (self.training or self.config.skip_logits_in_evaluation)
        if token_choice is not None:
            skip_logits = True
            last = Logits(self._logits(hidden, 1))
            statistics["next_tokens"] = token_choice([last], None, last.values.shape[-1], None)
        output = PlannerCausalLMOutput(
            loss=loss,
            logits=None if skip_logits else self._logits(hidden, logits_to_keep),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            **{CACHE: outputs.get(CACHE)},
            **statistics,
        )
        return output.to_tuple() if return_dict is False else output

    def _loss(self, hidden: Tensor, target: Tensor | None, num_items_in_batch: int | Tensor | None) -> Tensor | None:
        if target is None:
            if num_items_in_batch is not None:
                raise ValueError(
                    "num_items_in_batch needs labels (a Trainer with label_smoothing_factor takes them away)"
                )
            return None
        head, target = output_head(self.lm), target.to(hidden.device)
        loss = aux_cross_entropy(head.source(hidden), None, target, normalizer=num_items_in_batch)
        assert isinstance(loss, Tensor), "statistics are not asked for"
        return loss

    def _unweighted_router_loss(self, outputs: ModelOutput, attention_mask: Tensor | None, is_balanced: bool) -> Tensor:
        """What a trainer that weights it itself adds to its loss; 0 of a frozen language model."""
        weighted = router_loss(self.lm, outputs, attention_mask) if is_balanced else None
        if weighted is None:
            return features(outputs).new_zeros(())
        return weighted / self.lm.config.get_text_config().router_aux_loss_coef

    def _is_balanced(self, has_loss: bool, given: bool | None) -> bool | None:
        """Whether the routers of the language model are to be balanced; None: it is not told, as it may not know."""
        return (has_loss and "lm" not in self._frozen and wants_router_logits(self.lm, given)) or None

    def _logits(self, hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
        return output_head(self.lm).logits(hidden[:, kept_positions(logits_to_keep)])

    def _lm_outputs(self, rows: Tensor, token_segments: Tensor, lm_inputs: dict[str, Any]) -> ModelOutput:
        """The language model without its head, its layers conditioned on rows [L, S, H] of its tokens' segments."""
        if not self._is_hooked:
            raise RuntimeError("this model's hooks were removed from its language model")
        if getattr(self, "_is_replica", False):
            raise RuntimeError("PlannerForCausalLM does not run under DataParallel: use DistributedDataParallel")
        self._check_checkpointing()
        lm_inputs = {name: value for name, value in lm_inputs.items() if value is not None}
        self._active.set(rows.unbind(0), token_segments)
        try:
            outputs = run(self.lm, **lm_inputs, return_dict=True)
        finally:
            self._active.set(None, None)
        self._check_all_were_added()
        if torch.is_grad_enabled() and rows.requires_grad and not features(outputs).requires_grad:
            raise RuntimeError(
                f"{type(self.lm).__name__} passes no gradient on to what is added in its layers (it computes them anew "
                "in the backward pass): it can be conditioned under torch.no_grad(), not trained"
            )
        return outputs

    def _check_all_were_added(self) -> None:
        """RuntimeError where layers read a module's weight and never call it: nothing would be added there."""
        if torch.compiler.is_compiling() or getattr(self.lm.config.get_text_config(), "layerdrop", False):
            return
        missed = [self.config.layers[n] for n in self._hooks.passed_by()]
        if missed:
            raise RuntimeError(
                f"{type(self.lm).__name__} as it is configured does not call the modules that place="
                f"{self.config.place!r} is in front of, in layers {missed}: use place='layer_input'"
            )

    def _rows(self, mode: str, sources: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The conditioning rows [L, S, H] of the segments, and the label statistics."""
        if mode == "fixed":
            label_ids = torch.full((1,), self.config.fixed_label, device=self.conditioning.codebooks.device)
            return self._rows_of_labels(label_ids)
        given = [name for name, value in sources.items() if value is not None]
        allowed = ["label_scores", "planner_inputs"] + (["label_ids"] if mode == "hard" else [])
        if len(given) != 1 or given[0] not in allowed:
            got = " and ".join(given) or "none"
            hint = "" if given else " (a Trainer removes such columns unless remove_unused_columns=False)"
            raise ValueError(f"mode {mode!r} needs exactly one of {', '.join(allowed)}, got {got}{hint}")
        if given == ["label_ids"]:
            return self._rows_of_labels(sources["label_ids"])
        scores = self._scores(sources.get("label_scores"), sources.get("planner_inputs"))
        if mode == "hard":
            return self._rows_of_labels(scores.detach().argmax(-1))
        return self._rows_of_scores(mode, scores)

    def _rows_of_scores(self, mode: str, scores: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        is_noisy = mode == "gumbel" and self.training
        rows, stats = self.conditioning(
            scores,
            temperature=config.label_temperature,
            hard=mode == "straight_through" or (mode == "gumbel" and config.gumbel_hard),
            gumbel=float(config.gumbel_scale) if is_noisy else 0.0,
            clean_gradient=mode == "gumbel" and config.gumbel_clean_gradient,
        )
        entropy = stats.entropy.sum() / max(len(scores), 1)
        return rows, {"label_entropy": entropy, "label_usage": stats.usage, "segment_labels": stats.argmax}

    def _rows_of_labels(self, label_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        rows = self.conditioning(label_ids, are_labels=True)
        num_labels = self.config.num_labels
        is_label = ((label_ids >= 0) & (label_ids < num_labels)).float()
        usage = torch.zeros(num_labels, dtype=torch.float32, device=label_ids.device)
        usage = usage.index_add(0, label_ids.clamp(0, num_labels - 1), is_label) / max(len(label_ids), 1)
        return rows, {"label_entropy": usage.new_zeros(()), "label_usage": usage, "segment_labels": label_ids}

    # -- planner -------------------------------------------------------------------------------------------------------

    def _scores(self, label_scores: Tensor | None, planner_inputs: Mapping[str, Any] | None) -> Tensor:
        if label_scores is None:
            if self.planner is None:
                raise ValueError("planner_inputs need a planner, and this model has none: pass label_scores")
            assert planner_inputs is not None, "one of the two is given"
            label_scores = self.planner(**planner_inputs)
        if not isinstance(label_scores, Tensor) or not label_scores.is_floating_point():
            raise TypeError(f"scores of labels must be a floating point tensor, got {_describe(label_scores)}")
        if label_scores.dim() != 2 or label_scores.shape[1] != self.config.num_labels:
            raise ValueError(
                f"scores of labels must be [segments, {self.config.num_labels}], got {list(label_scores.shape)}"
            )
        return label_scores

    def planner_loss(
        self,
        label_ids: Tensor,
        *,
        planner_inputs: Mapping[str, Any] | None = None,
        label_scores: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy of the planner's scores against oracle labels [S], in nats: the loss of its pretraining.

        label_ids             int64 [S], -100: a segment that does not count
        num_items_in_batch    divisor of the sum; None: the counted segments of this call
        Returns               0-d. The language model is not run.
        """
        if (planner_inputs is None) == (label_scores is None):
            raise ValueError("planner_loss needs exactly one of planner_inputs and label_scores")
        scores = self._scores(label_scores, planner_inputs)
        loss = aux_cross_entropy(scores, None, label_ids, normalizer=num_items_in_batch)
        assert isinstance(loss, Tensor), "statistics are not asked for"
        return loss

    def _cache_of_kind(self, kind: str | None, model_kwargs: dict[str, Any], **options: Any) -> Cache:
        return new_cache(self.lm, kind, **options)

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def _decoder_layers(self) -> nn.ModuleList:
        return decoder_layers(self.lm)

    def remove_hooks(self) -> None:
        """Take this model's hooks off its language model, which others may go on using. Ends the use of this model."""
        self._hooks.remove()
        self._is_hooked = False

    # -- transformers --------------------------------------------------------------------------------------------------

    @written_by_one(loading.not_saved)
    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        save_lm: bool | None = None,
        state_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """As any model's, with a pointer (name, revision, fingerprint) instead of a frozen language model's weights.

        Where weights are sharded (`apply_fully_shard`), all processes call and the first one writes.
        save_lm   True: also the language model's weights. None: where it is not frozen, has no name or path, or has
                  changed since it was given. One that was changed between its own loading and `from_lm` needs True.
        Raises    ValueError: save_lm=False in such a case; the folder that the language model was loaded from
        """
        self.config.lm_is_saved = loading.is_lm_saved(self, save_lm, save_directory)
        self.lm.config.dtype = self.lm.dtype
        of_lm = self.lm._keys_to_ignore_on_save if self.config.lm_is_saved else self.lm.state_dict()
        self._keys_to_ignore_on_save = {f"lm.{key}" for key in of_lm or ()}  # Trainer misses no others when it resumes
        super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *args: Any,
        planner: nn.Module | None = None,
        lm: PreTrainedModel | str | None = None,
        lm_kwargs: dict[str, Any] | None = None,
        check_lm: bool = True,
        config: PlannerConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """As any model's, from safetensors. `planner` is the module whose weights were saved: they are loaded into it.

        Its buffers that are not saved keep their values.

        planner    needed where a planner was saved; where none was, it is taken as it is.
        lm         for a folder with a pointer: the language model, where it is at hand (shared) or has moved; a model,
                   name or path. lm_kwargs: for it alone, over **kwargs
        check_lm   whether it must be the one that the planner was saved with, by its fingerprint
        Raises     ValueError: no planner for saved weights; weights that are missing or belong to nothing; another
                   language model. OSError: none where the pointer says.
        """
        if config is None:
            config = PlannerConfig.from_pretrained(name_or_path, **saving.hub_options(kwargs))
        had_planner = config.has_planner
        if had_planner and planner is None:
            raise ValueError(f"{name_or_path} holds the weights of a planner: pass planner=, the module they belong to")
        if config.lm_is_saved and (lm is not None or lm_kwargs):
            raise ValueError(f"{name_or_path} holds the weights of its language model: lm and lm_kwargs must be None")
        wants_info, loaded = kwargs.pop("output_loading_info", False), planner if had_planner else None
        if config.lm_is_saved:
            model, info = cls._loaded_whole(name_or_path, *args, planner=loaded, config=config, **kwargs)
        else:
            lm = loading.pointed_lm(name_or_path, config, lm, lm_kwargs, check_lm, kwargs)
            model, info = cls(config, lm=lm, planner=loaded).eval(), {problem: set() for problem in saving.PROBLEMS}
            loading.load_own_weights(model, name_or_path, kwargs)
        if planner is not None and not had_planner:
            model.planner, model.config.has_planner = planner, True
        return (model, info) if wants_info else model

    @classmethod
    def _loaded_whole(
        cls, name_or_path: str | os.PathLike[str], *args: Any, planner: nn.Module | None, **kwargs: Any
    ) -> tuple[Self, dict[str, Any]]:
        """A model whose language model is saved with it, and what transformers says of loading it."""
        kwargs = {"use_safetensors": True, **kwargs, "output_loading_info": True}
        dtypes = {} if planner is None else {name: value.dtype for name, value in planner.state_dict().items()}
        with marked_as_initialized(planner), kept_buffers(planner):
            model, info = super().from_pretrained(name_or_path, *args, planner=planner, **kwargs)
        loading.refuse_keys(name_or_path, {*info["missing_keys"], *info["unexpected_keys"]})
        if planner is not None:
            for name, value in (*planner.named_parameters(), *planner.named_buffers()):
                value.data = value.data.to(dtypes.get(name, value.dtype))
        if model.config.freeze_lm:  # loading makes new parameters, which require gradients
            model.freeze_lm()
        return model, info

    def initialize_weights(self) -> None:
        """As the language model's own class does, also where one of its modules fills the buffers of others.

        In code that is not its own transformers passes over modules without weights, and would leave such buffers as
        uninitialized memory.
        """
        self.is_custom_code = self.lm.is_custom_code
        try:
            super().initialize_weights()
        finally:
            del self.is_custom_code

    def _init_weights(self, module: nn.Module) -> None:
        is_new = not all(getattr(weight, MARK, False) for weight in module.parameters(recurse=False))
        if isinstance(module, Conditioning) and is_new:
            module.reset_parameters()

    def get_input_embeddings(self) -> nn.Module:
        return self.lm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.lm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm.set_output_embeddings(value)


def _codebook_sizes(codebook: Tensor, num_labels: int | None, label_dim: int | None) -> tuple[int, int]:
    if not isinstance(codebook, Tensor) or codebook.dim() != 2 or not codebook.is_floating_point():
        raise TypeError(f"codebook must be a floating point tensor [num_labels, label_dim], got {_describe(codebook)}")
    for name, given, size in zip(("num_labels", "label_dim"), (num_labels, label_dim), codebook.shape, strict=True):
        if given not in (None, size):
            raise ValueError(f"{name} must be {size}, as the codebook's, got {given}")
    labels, width = codebook.shape
    return labels, width


def _describe(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
