"""Configurations of the composite models."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from .. import checks
from .cache_argument import CACHE_NAMES
from .config_fields import describe_as

VOCAB_POLICIES = ("strict", "pad")
HEADS = ("own", "shared", "low_rank")


def as_config(name: str, given: PretrainedConfig | dict[str, Any] | None) -> PretrainedConfig | None:
    """A configuration, also of a dict with model_type. Raises TypeError."""
    if given is None or isinstance(given, PretrainedConfig):
        return given
    if not isinstance(given, dict) or "model_type" not in given:
        raise TypeError(f"{name} must be a PretrainedConfig or a dict with model_type, got {type(given).__name__}")
    given = dict(given)
    model_type = given.pop("model_type")
    if model_type in CONFIG_MAPPING:
        return AutoConfig.for_model(model_type, **given)
    config = PretrainedConfig(**given)  # of a model with code of its own, until that is loaded
    config.model_type = model_type
    return config


def check_head(head: str, rank: int | None) -> int | None:
    """The rank of a head's map as an int, None: full. Raises ValueError, TypeError."""
    if head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
    if rank is None:
        if head == "low_rank":
            raise ValueError("head_rank must be given for head='low_rank'")
        return None
    rank = checks.integer("head_rank", rank)
    if head == "own" or rank < 1:
        raise ValueError(f"head_rank must be positive, and None for head='own', got {rank} for head={head!r}")
    return rank


class AuxiliaryConfig(PretrainedConfig):
    """Configuration of `AuxiliaryForCausalLM`: the two models' configurations and how they are joined.

    base_config, aux_config   PretrainedConfig, or its dict with model_type
    trunk_layer       index into the base's hidden states (0: the embeddings) that the auxiliary reads instead of token
                      embeddings; None: it reads tokens
    head              what makes the auxiliary's part: "own", its output head; "shared", the base's frozen head behind a
                      trained map of hidden states; "low_rank", two narrow matrices
    head_rank         rank of that map (None: full) or of the two
    vocab_policy      "strict": equally wide heads; "pad": the narrower one's width counts, the rest is -inf
    vocab_size        width of the emitted logits: the base's
    num_valid_tokens  how many leading columns count
    aux_scale         the auxiliary's logits are multiplied by it
    label_smoothing   of the training loss, in [0, 1]; evaluation has none
    skip_logits_in_evaluation   where there are labels no [batch, seq, vocabulary] logits are made in evaluation either:
                      for a Trainer without compute_metrics, which drops them
    base_name_or_path, base_revision, base_fingerprint   the pointer to a base that is not saved with the model
    aux_adapters      the auxiliary's adapters of PEFT, as they were saved; None: it has none
    base_options      what else from_pretrained needs to load the base's weights
    base_is_saved     the folder holds the base too, in "base/"
    hidden_size, num_hidden_layers, bos_token_id, ...   the base's, for trainers and servers that read them of any model
    max_position_embeddings   the smaller of the two; a prefix takes its length of the auxiliary's
    """

    model_type = "auxiliary"
    auto_map: ClassVar[dict[str, Any]] = {}  # of remote code; TRL reads it where transformers has no such class
    sub_configs: ClassVar[dict[str, Any]] = {"base_config": AutoConfig, "aux_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        *CACHE_NAMES,
        "hidden_states",
        "token_accuracy",
        "entropy",
        "base_loss",
        "num_valid_tokens",
        "num_correct_tokens",
        "entropy_sum",
        "router_loss",
    ]

    def __init__(
        self,
        base_config: PretrainedConfig | dict[str, Any] | None = None,
        aux_config: PretrainedConfig | dict[str, Any] | None = None,
        *,
        trunk_layer: int | None = None,
        head: str = "own",
        head_rank: int | None = None,
        vocab_policy: str = "strict",
        vocab_size: int | None = None,
        num_valid_tokens: int | None = None,
        aux_scale: float = 1.0,
        label_smoothing: float = 0.0,
        skip_logits_in_evaluation: bool = False,
        base_name_or_path: str | None = None,
        base_revision: str | None = None,
        base_fingerprint: dict[str, Any] | None = None,
        base_options: dict[str, Any] | None = None,
        base_is_saved: bool = False,
        aux_adapters: dict[str, Any] | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        if vocab_policy not in VOCAB_POLICIES:
            raise ValueError(f"vocab_policy must be one of {', '.join(VOCAB_POLICIES)}, got {vocab_policy!r}")
        head_rank = check_head(head, head_rank)
        # as Python's own numbers: JSON holds no others
        label_smoothing = checks.real_number("label_smoothing", label_smoothing, minimum=0.0, maximum=1.0)
        aux_scale = checks.real_number("aux_scale", aux_scale)
        sizes = {"trunk_layer": trunk_layer, "vocab_size": vocab_size, "num_valid_tokens": num_valid_tokens}
        trunk_layer, vocab_size, num_valid_tokens = (
            None if size is None else checks.integer(name, size) for name, size in sizes.items()
        )
        super().__init__(**kwargs)
        self.base_config = as_config("base_config", base_config)
        self.aux_config = as_config("aux_config", aux_config)
        self.trunk_layer = trunk_layer
        self.head, self.head_rank = head, head_rank
        self.vocab_policy = vocab_policy
        self.vocab_size = vocab_size
        self.num_valid_tokens = num_valid_tokens
        self.aux_scale = aux_scale
        self.label_smoothing = label_smoothing
        self.skip_logits_in_evaluation = checks.boolean("skip_logits_in_evaluation", skip_logits_in_evaluation)
        self.base_name_or_path = base_name_or_path
        self.base_revision = base_revision
        self.base_fingerprint = base_fingerprint
        self.base_options = base_options
        self.base_is_saved = base_is_saved
        self.aux_adapters = aux_adapters
        self.use_cache = use_cache
        if self.base_config is not None and self.aux_config is not None:
            describe_as(self, self.base_config, self.aux_config)
