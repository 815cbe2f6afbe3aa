"""What is refused before anything is loaded, in the process that is asked to serve a folder.

Private functions and attributes of vLLM and transformers that this package uses, beside what they document. A release
may change them, so the releases that were tried are pinned (`VERSIONS`, and the extra `vllm` in pyproject.toml):

vllm.model_executor.models.config.MODELS_CONFIG_MAP   these checks
vllm.config.VllmConfig.with_hf_config, .get_quantization_config, .use_v2_model_runner
vllm.config.ModelConfig._verify_quantization, .get_model_arch_config, .model_arch_config, .hf_text_config,
    .attention_chunk_size, .get_sliding_window, .get_and_verify_max_len, .quantization
vllm.compilation.backends.set_model_tag
vllm.config.CompilationConfig.static_forward_context   which attention layers there are
vllm.forward_context.get_forward_context().attn_metadata.query_start_loc   where each request starts
vllm.model_executor.model_loader.utils.initialize_model
vllm.model_executor.model_loader.default_loader.DefaultModelLoader.Source, and `secondary_weights` of a model
vllm.model_executor.models.utils.AutoWeightsLoader, .WeightsMapper, .PPMissingLayer
vllm.model_executor.models.interfaces.supports_eagle3, .is_hybrid, .is_attention_free, .has_inner_state
vllm.tokenizers.cached_tokenizer_from_config
vllm.v1.sample.logits_processor   deprecated: of the V1 runner alone
transformers.conversion_mapping.get_checkpoint_conversion_mapping   whether files hold other tensors than models
"""

from __future__ import annotations

import json
import os
from typing import Any

from transformers import PretrainedConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from .. import checks
from .config import AuxiliaryConfig

VERSIONS = (0, 32)
PROCESSOR = "auxkernels.vllm.scales:AuxScale"
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
# options of the base's that say which weights it has, and that are nothing to vLLM or can be told to it
_KNOWN_OPTIONS = ("subfolder", "use_safetensors", "config")


class Checks(VerifyAndUpdateConfig):
    """Called by vLLM while it makes its configuration. ValueErrors name what is wrong and a way out."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        check_version()
        config = model_config.hf_config
        if not isinstance(config, AuxiliaryConfig):
            raise ValueError(
                f"vLLM serves AuxiliaryForCausalLM alone, got {model_config.architecture}: of an ensemble or a group "
                "save one member (model.members[name].save_pretrained(folder)), or use generate() of transformers"
            )
        check_folder(config)
        check_engine(model_config, config)

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        model_config, config = vllm_config.model_config, vllm_config.model_config.hf_config
        check_parallel(vllm_config, config)
        check_runner(vllm_config)
        check_length(vllm_config, config)
        check_tokenizer(model_config, config)
        # the scale of each request; a way of its own into vLLM would reach the models of others too
        given = list(model_config.logits_processors or ())
        if PROCESSOR not in given:
            model_config.logits_processors = [*given, PROCESSOR]


def check_version() -> None:
    import vllm

    if vllm.__version_tuple__[:2] != VERSIONS:
        wanted = ".".join(map(str, VERSIONS))
        raise ValueError(
            f"vllm must be {wanted}, got {vllm.__version__}: AuxiliaryForCausalLM is served by functions that change "
            "from release to release; pip install 'auxkernels[vllm]'"
        )


# -- the folder --------------------------------------------------------------------------------------------------------


def check_folder(config: AuxiliaryConfig) -> None:
    """Of what the folder holds and points to."""
    if config.base_config is None or config.aux_config is None or config.num_valid_tokens is None:
        raise ValueError(
            "the folder must be one that AuxiliaryForCausalLM.save_pretrained wrote: its config.json has no "
            "base_config, aux_config or num_valid_tokens"
        )
    checks.real_number("aux_scale", config.aux_scale)
    if not isinstance(config.check_base, bool):
        raise TypeError(f"check_base must be a bool, got {config.check_base!r}")
    if config.aux_adapters:
        raise ValueError(
            "the auxiliary must have no adapters of PEFT: load the model with transformers, call "
            "model.merge_adapters(), and save it to another folder"
        )
    for name, one in (("base", config.base_config), ("aux", config.aux_config)):
        _check_part(name, one)
    if config.check_base and config.base_fingerprint is None:
        raise ValueError("the folder must say which base it was saved with: " + override("check_base", False, "any"))
    if not config.base_is_saved:
        _check_pointer(config)


def override(name: str, value: object, what: str) -> str:
    """How an engine is told a value of the folder's configuration."""
    return f"for {what} pass --hf-overrides '{json.dumps({name: value})}' (hf_overrides of LLM)"


def converts(config: PretrainedConfig) -> bool:
    """Whether transformers makes a family's parameters of other tensors in its files, as those of experts."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    return bool(get_checkpoint_conversion_mapping(config.model_type))


def _check_part(name: str, config: PretrainedConfig) -> None:
    if type(config) is PretrainedConfig:
        raise ValueError(
            f"{name} must be of a family of transformers' own, got {config.model_type}, which has code of its own: use "
            "generate() of transformers"
        )
    if config.get_text_config() is not config:
        raise ValueError(
            f"{name} must be a model of text alone, got {config.model_type}, which reads images, video or sound too: "
            "use generate() of transformers"
        )
    if converts(config) or any((getattr(config, count, None) or 0) > 1 for count in _EXPERTS):
        raise ValueError(
            f"{name} must be a model without experts, whose files hold the weights that transformers has, got "
            f"{config.model_type}: use generate() of transformers"
        )


def _check_pointer(config: AuxiliaryConfig) -> None:
    base, options = config.base_name_or_path, dict(config.base_options or {})
    moved = "of a base that has moved: " + override("base_name_or_path", "FOLDER", "its new place")
    if not base:
        raise ValueError("base_name_or_path must be the name or path " + moved)
    if os.path.isabs(base):
        if not os.path.isdir(base):
            raise ValueError(f"base {base!r}, which the folder points to, must exist; {moved}")
        if os.path.exists(os.path.join(base, options.get("subfolder") or "", "adapter_config.json")):
            raise ValueError(
                f"the base must have no adapters of PEFT, {base!r} holds some: merge_and_unload them, save the base, "
                "and join and train the auxiliary with that"
            )
    for option in options:
        if option not in _KNOWN_OPTIONS and not hasattr(config.base_config, option):
            raise ValueError(
                f"the base must be loaded by its name alone, the folder also says {option}, which vLLM does not do: "
                "save the base as it is in transformers to a folder of its own, and join the auxiliary with that"
            )


# -- the engine --------------------------------------------------------------------------------------------------------


def check_engine(model_config: Any, config: AuxiliaryConfig) -> None:
    """Of the model's options."""
    if model_config.enable_prompt_embeds:
        raise ValueError("enable_prompt_embeds must be False: two models read the tokens, each by its own embeddings")
    if model_config.runner_type != "generate":
        raise ValueError(
            f"runner must be 'generate': there are logits and no embeddings, got {model_config.runner_type!r}"
        )
    if model_config.disable_sliding_window:
        raise ValueError(
            "disable_sliding_window must be False: the windows of two models differ; pass --max-model-len of the "
            "shorter window instead"
        )
    if model_config.quantization and getattr(config.base_config, "quantization_config", None) is None:
        raise ValueError(
            f"quantization must not be given, got {model_config.quantization!r}: join the auxiliary with a base whose "
            "checkpoint is quantised, which vLLM then runs as such"
        )


def check_parallel(vllm_config: Any, config: AuxiliaryConfig) -> None:
    """Of processes: heads and widths that do not divide, pipelines."""
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise ValueError(
            f"pipeline_parallel_size must be 1, got {parallel.pipeline_parallel_size}: stages would each have "
            "parts of one model alone; use tensor_parallel_size"
        )
    contexts = [getattr(parallel, f"{phase}_context_parallel_size", 1) for phase in ("decode", "prefill")]
    if max(contexts) > 1 or getattr(parallel, "use_ubatching", False):
        raise ValueError(
            "context parallelism and micro-batches must be off, under which it is not known where a request's tokens "
            "are: use tensor_parallel_size"
        )
    size = parallel.tensor_parallel_size
    for name, one in (("base", config.base_config), ("aux", config.aux_config)):
        assert one is not None, "the folder has been checked"
        heads = getattr(one, "num_attention_heads", size)  # recurrent ones are refused for what they are
        key_heads = getattr(one, "num_key_value_heads", None) or heads
        inner = getattr(one, "intermediate_size", None)
        wrong = None
        if heads % size:
            wrong = f"{heads} attention heads"
        elif key_heads % size and size % key_heads:
            wrong = f"{key_heads} key-value heads"
        elif isinstance(inner, int) and inner % size:
            wrong = f"an intermediate_size of {inner}"
        if wrong:
            raise ValueError(
                f"tensor_parallel_size must divide the sizes of both models, got {size}, and the {name} has {wrong}: "
                "pass one that does, or train an auxiliary whose heads and widths it divides"
            )


def check_runner(vllm_config: Any) -> None:
    """Of what runs the model."""
    from vllm.config import CUDAGraphMode

    if vllm_config.speculative_config is not None:
        raise ValueError(
            "speculative_config must be None: vLLM then tells no logits processor which request is where, and a "
            "request's aux_scale would be left out in silence"
        )
    if vllm_config.use_v2_model_runner:
        raise ValueError(
            "the V1 model runner must be used, whose logits processors tell which request is where: set "
            "VLLM_USE_V2_MODEL_RUNNER=0 in the environment"
        )
    compilation = vllm_config.compilation_config
    if compilation.cudagraph_mode is None:
        if not vllm_config.model_config.enforce_eager:
            # around the two models, not of the whole: the whole looks up which request is where
            compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
    elif compilation.cudagraph_mode.has_full_cudagraphs():
        raise ValueError(
            f"cudagraph_mode must be PIECEWISE or NONE, got {compilation.cudagraph_mode.name}: the look-up of each "
            "request's aux_scale is not for a captured graph"
        )


def check_length(vllm_config: Any, config: AuxiliaryConfig) -> None:
    """Of texts: vLLM asks the base alone."""
    from .views import view_of

    assert config.aux_config is not None, "the folder has been checked"
    wanted = vllm_config.model_config.max_model_len
    aux = view_of(vllm_config, config.aux_config, "aux").model_config
    aux.spec_target_max_model_len = None
    try:
        aux.get_and_verify_max_len(wanted)
    except ValueError as error:
        positions = getattr(config.aux_config, "max_position_embeddings", None)
        raise ValueError(
            f"max_model_len must be within both models' texts, got {wanted}, and the auxiliary's "
            f"max_position_embeddings is {positions}: pass --max-model-len {positions}, or train a longer auxiliary"
        ) from error


def check_tokenizer(model_config: Any, config: AuxiliaryConfig) -> None:
    """Of a tokenizer with tokens for which the auxiliary has no embedding: one request's would end the engine."""
    if config.trunk_layer is not None or model_config.skip_tokenizer_init:
        return
    from vllm.tokenizers import cached_tokenizer_from_config

    assert config.aux_config is not None, "the folder has been checked"
    known, last = config.aux_config.vocab_size, cached_tokenizer_from_config(model_config).max_token_id
    if last >= known:
        raise ValueError(
            f"the tokenizer's tokens must be ones that the auxiliary reads, which has {known}, got token {last}: save "
            "the tokenizer that both models were trained with to the folder, or pass it as --tokenizer"
        )
