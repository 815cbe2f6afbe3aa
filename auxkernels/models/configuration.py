"""Configurations of the composite models."""

from __future__ import annotations

from typing import ClassVar

from transformers import AutoConfig, PretrainedConfig

from .. import checks

VOCAB_POLICIES = ("strict", "pad")


def _as_config(name: str, given: PretrainedConfig | dict | None) -> PretrainedConfig | None:
    if given is None or isinstance(given, PretrainedConfig):
        return given
    if not isinstance(given, dict) or "model_type" not in given:
        raise TypeError(f"{name} must be a PretrainedConfig or a dict with model_type, got {type(given).__name__}")
    given = dict(given)
    return AutoConfig.for_model(given.pop("model_type"), **given)


class AuxiliaryConfig(PretrainedConfig):
    """Configuration of `AuxiliaryForCausalLM`: the two models' configurations and how they are joined.

    base_config, aux_config   PretrainedConfig, or its dict with model_type
    trunk_layer       index into the base's hidden states (0: the embeddings) that the auxiliary reads instead of token
                      embeddings; None: it reads tokens
    vocab_policy      "strict": equally wide heads; "pad": the narrower one's width counts, the rest is -inf
    vocab_size        width of the emitted logits: the base's
    num_valid_tokens  how many leading columns count
    aux_scale         the auxiliary's logits are multiplied by it
    label_smoothing   of the training loss, in [0, 1]; evaluation has none
    base_name_or_path, base_revision, base_fingerprint   the pointer to a base that is not saved with the model
    aux_adapters      the auxiliary's adapters of PEFT, as they were saved; None: it has none
    base_is_saved     the folder holds the base too, in "base/"
    """

    model_type = "auxiliary"
    auto_map: ClassVar[dict] = {}  # of remote code; TRL reads it where transformers has no such class
    sub_configs: ClassVar[dict] = {"base_config": AutoConfig, "aux_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
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
        base_config: PretrainedConfig | dict | None = None,
        aux_config: PretrainedConfig | dict | None = None,
        *,
        trunk_layer: int | None = None,
        vocab_policy: str = "strict",
        vocab_size: int | None = None,
        num_valid_tokens: int | None = None,
        aux_scale: float = 1.0,
        label_smoothing: float = 0.0,
        base_name_or_path: str | None = None,
        base_revision: str | None = None,
        base_fingerprint: dict | None = None,
        base_is_saved: bool = False,
        aux_adapters: dict | None = None,
        use_cache: bool = True,
        **kwargs,
    ):
        if vocab_policy not in VOCAB_POLICIES:
            raise ValueError(f"vocab_policy must be one of {', '.join(VOCAB_POLICIES)}, got {vocab_policy!r}")
        # as Python's own numbers: JSON holds no others
        label_smoothing = checks.real_number("label_smoothing", label_smoothing, minimum=0.0, maximum=1.0)
        aux_scale = checks.real_number("aux_scale", aux_scale)
        sizes = {"trunk_layer": trunk_layer, "vocab_size": vocab_size, "num_valid_tokens": num_valid_tokens}
        trunk_layer, vocab_size, num_valid_tokens = (
            None if size is None else checks.integer(name, size) for name, size in sizes.items()
        )
        super().__init__(**kwargs)
        self.base_config = _as_config("base_config", base_config)
        self.aux_config = _as_config("aux_config", aux_config)
        self.trunk_layer = trunk_layer
        self.vocab_policy = vocab_policy
        self.vocab_size = vocab_size
        self.num_valid_tokens = num_valid_tokens
        self.aux_scale = aux_scale
        self.label_smoothing = label_smoothing
        self.base_name_or_path = base_name_or_path
        self.base_revision = base_revision
        self.base_fingerprint = base_fingerprint
        self.base_is_saved = base_is_saved
        self.aux_adapters = aux_adapters
        self.use_cache = use_cache
