"""Configuration of a planner-conditioned language model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig

from .. import checks
from .cache_argument import CACHE_NAMES
from .config_fields import describe_as
from .places import check_place

MODES = ("soft", "straight_through", "gumbel", "hard", "fixed")
INITS = ("zero_projection", "zero_gate", "xavier")


class PlannerConfig(PretrainedConfig):
    """Configuration of `PlannerForCausalLM`.

    text_config         configuration of the language model: a config, or its dict with a `model_type`.
    num_labels          K, the number of labels. Their names, if any, are `id2label`.
    label_dim           E, width of a label's embedding.
    layers              indices of the conditioned decoder layers, ascending.
    place               what a layer's label embeddings are added to:
                        "layer_input": its hidden states, residual stream included, in every family;
                        "attention_output": the input of its attention's output projection, that is all heads' outputs,
                        as the paper's code does in GPT-2;
                        "feed_forward_input": what its feed-forward part reads, as the paper's code does in OLMo.
                        The last two are refused in layers without such a module, as those of state-space models.
    mode                how a segment's label conditions its tokens, unless a call says otherwise:
                        "soft": embeddings averaged with softmax(scores / label_temperature);
                        "straight_through": the likeliest label forward, the gradient of "soft" backward;
                        "gumbel": "soft" with Gumbel noise on the scores, in training mode only;
                        "hard": a given label, or the likeliest of given scores, which get no gradient;
                        "fixed": the label `fixed_label` for every segment, whatever the planner says (a control).
    label_temperature   positive number. (Not `temperature`: transformers would read that as a sampling temperature.)
    gumbel_scale        factor of the noise of mode "gumbel".
    gumbel_hard         mode "gumbel" takes the likeliest label of the noisy scores forward (straight-through).
    gumbel_clean_gradient   with gumbel_hard: the gradient is that of "soft", without the noise that chose the label.
    fixed_label         the label of mode "fixed".
    conditioning_init   "zero_projection": projections start at zero, so that step 0 equals the language model;
                        "zero_gate": Xavier projections behind a trainable gate per channel that starts at zero;
                        "xavier": as the paper, where step 0 already differs from the language model.
    freeze_lm           the language model gets no gradient and stays in eval mode.
    skip_logits_in_evaluation   where there are labels no [batch, seq, vocabulary] logits are made in evaluation either:
                      for a Trainer without compute_metrics, which drops them
    lm_name_or_path, lm_revision, lm_fingerprint   the pointer to a frozen language model that is not saved with it
    lm_options          what else from_pretrained needs to load its weights
    lm_is_saved         the saved weights include the language model's
    hidden_size, ...    the language model's, for trainers and servers that read them of any model.
    has_planner         whether saved weights include a planner module, which must then be given to load them.
    """

    model_type = "planner"
    auto_map: ClassVar[dict[str, Any]] = {}  # of remote code; TRL reads it where transformers has no such class
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        *CACHE_NAMES,
        "hidden_states",
        "attentions",
        "label_entropy",
        "label_usage",
        "segment_labels",
        "router_loss",
    ]

    def __init__(
        self,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        num_labels: int = 2,
        label_dim: int = 1,
        layers: Iterable[int] = (),
        place: str = "layer_input",
        mode: str = "soft",
        label_temperature: float = 1.0,
        gumbel_scale: float = 1.0,
        gumbel_hard: bool = False,
        gumbel_clean_gradient: bool = False,
        fixed_label: int = 0,
        conditioning_init: str = "zero_projection",
        freeze_lm: bool = True,
        skip_logits_in_evaluation: bool = False,
        has_planner: bool = False,
        lm_name_or_path: str | None = None,
        lm_revision: str | None = None,
        lm_fingerprint: dict[str, Any] | None = None,
        lm_options: dict[str, Any] | None = None,
        lm_is_saved: bool = True,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        # as Python's own numbers: JSON holds no others
        num_labels, fixed_label = checks.integer("num_labels", num_labels), checks.integer("fixed_label", fixed_label)
        if "id2label" in kwargs:
            num_labels = len(kwargs["id2label"])
        else:
            kwargs["num_labels"] = num_labels
        check_place(place)
        check_mode(mode)
        if conditioning_init not in INITS:
            raise ValueError(f"conditioning_init must be one of {', '.join(INITS)}, got {conditioning_init!r}")
        label_temperature = checks.number("label_temperature", label_temperature)
        if not label_temperature > 0:
            raise ValueError(f"label_temperature must be positive, got {label_temperature}")
        gumbel_clean_gradient = checks.boolean("gumbel_clean_gradient", gumbel_clean_gradient)
        if gumbel_clean_gradient and not gumbel_hard:
            raise ValueError("gumbel_clean_gradient needs gumbel_hard=True")
        if not 0 <= fixed_label < num_labels:
            raise ValueError(f"fixed_label must be in [0, {num_labels}), got {fixed_label}")
        self.text_config: PretrainedConfig | None = text_config
        self.label_dim = checks.integer("label_dim", label_dim)
        self.layers = [checks.integer("layers", layer) for layer in layers]
        self.place = place
        self.mode = mode
        self.label_temperature = label_temperature
        self.gumbel_scale = checks.number("gumbel_scale", gumbel_scale)
        self.gumbel_hard = checks.boolean("gumbel_hard", gumbel_hard)
        self.gumbel_clean_gradient = gumbel_clean_gradient
        self.fixed_label = fixed_label
        self.conditioning_init = conditioning_init
        self.freeze_lm = freeze_lm
        self.skip_logits_in_evaluation = checks.boolean("skip_logits_in_evaluation", skip_logits_in_evaluation)
        self.has_planner = has_planner
        self.lm_name_or_path = lm_name_or_path
        self.lm_revision = lm_revision
        self.lm_fingerprint = lm_fingerprint
        self.lm_options = lm_options
        self.lm_is_saved = lm_is_saved
        super().__init__(**kwargs)
        if text_config is not None:
            describe_as(self, text_config)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PretrainedConfig:
        """As transformers', which goes one level down; a language model with images has its text's another below."""
        found = super().get_text_config(decoder=decoder, encoder=encoder)
        return found if found is self else found.get_text_config(decoder=decoder, encoder=encoder)


def check_mode(mode: str) -> str:
    """The mode; ValueError if there is none of that name."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    return mode
