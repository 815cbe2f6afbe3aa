"""A tiny random model of every family that transformers maps to a causal LM, or to one that reads images too.

A family's default configuration is shrunk by the names that most families share; `EXCEPTIONS` has what that leaves.
"""

from __future__ import annotations

import warnings

import torch
import transformers
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto as auto

VOCAB, IMAGE_TOKEN = 61, 60
WIDTH, HEADS, LAYERS = 32, 4, 2
_WIDTHS = ("hidden_size", "n_embd", "d_model", "emb_dim", "embed_dim", "embedding_size", "word_embed_proj_dim", "dim")
_LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "decoder_layers", "encoder_layers",
    "num_decoder_layers", "num_encoder_layers",
)  # fmt: skip
_HEADS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads",
    "num_decoder_attention_heads", "num_encoder_attention_heads", "attention_heads", "swa_num_attention_heads",
)  # fmt: skip
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_global_key_value_heads")
_INNER = (
    "intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "ffn_hidden_size", "d_inner",
    "dim_feedforward", "d_ff", "intermediate_size_mlp", "dense_intermediate_size", "ffn_embed_dim",
    "shared_intermediate_size", "shared_expert_intermediate_size", "block_ff_dim", "dim_ff", "feed_forward_hidden_size",
    "expert_ffn_hidden_size", "prefix_dense_intermediate_size",
)  # fmt: skip
_OF_ATTENTION = (
    "head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "global_head_dim", "swa_head_dim",
    "swa_v_head_dim", "qk_head_dim", "attention_head_size", "kv_channels", "index_head_dim", "dim_head", "d_kv",
)  # fmt: skip
SIZES = (
    dict.fromkeys(_WIDTHS, WIDTH)
    | dict.fromkeys(_LAYERS, LAYERS)
    | dict.fromkeys(_HEADS, HEADS)
    | dict.fromkeys(_KEY_HEADS, 2)
    | dict.fromkeys(_INNER, 48)
    | dict.fromkeys(_OF_ATTENTION, 8)
    | {
        "vocab_size": VOCAB, "entity_vocab_size": VOCAB, "max_position_embeddings": 64, "n_positions": 64,
        "n_ctx": 64, "context_length": 64, "max_seq_len": 64, "sliding_window": 16, "attention_window_size": 16,
        "sliding_window_size": 16, "window_size": 16, "attention_chunk_size": 16, "local_attention": 16,
        "kv_lora_rank": 16, "q_lora_rank": 16, "index_n_heads": 2, "index_topk": 16, "o_lora_rank": 8, "o_groups": 2,
        "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
        "moe_topk": 2, "moe_k": 2, "num_experts_per_token": 2, "top_k_experts": 2, "moe_intermediate_size": 16,
        "expert_intermediate_size": 16, "n_shared_experts": 1, "moe_num_shared_experts": 1, "n_group": 1,
        "topk_group": 1, "num_expert_group": 1, "first_k_dense_replace": 1, "moe_layer_start_index": 1,
        "lru_width": WIDTH, "state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16,
        "mamba_d_ssm": 64, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_chunk_size": 8, "chunk_size": 8,
        "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "mamba_dt_rank": 2,
        "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_head_dim": 8, "linear_num_heads": 2,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "laurel_rank": 4,
        "image_size": 8, "patch_size": 4, "projection_dim": 16, "out_hidden_size": WIDTH, "num_channels": 3,
        "in_channels": 3, "num_image_tokens": 4, "image_seq_length": 4, "mm_tokens_per_image": 4, "num_mel_bins": 16,
        "block_size": 4, "num_mtp_layers": 0, "num_nextn_predict_layers": 0, "vision_output_dim": WIDTH,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "image_token_id": IMAGE_TOKEN,
        "image_token_index": IMAGE_TOKEN, "video_token_id": 59, "video_token_index": 59, "audio_token_id": 58,
        "audio_token_index": 58, "vision_start_token_id": 57, "vision_end_token_id": 56, "boi_token_id": 55,
        "eoi_token_id": 54, "boa_token_id": 53, "eoa_token_id": 52, "image_start_token_id": 57,
        "image_end_token_id": 56, "decoder_start_token_id": 1, "pad_index": 0, "embedding_dim": WIDTH,
    }
)  # fmt: skip

# what beside these sizes a family's configuration needs, by model type; a dict is of the configuration in that field
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_PER_TYPE = {name: {"rope_type": "default", "rope_theta": 10000.0} for name in ("full_attention", "sliding_attention")}
_HALF_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_HYBRIDS = (
    *("bailing_hybrid", "granitemoehybrid", "kimi_linear", "minimax", "qwen3_next"),
    *("qwen3_5_text", "qwen3_5_moe_text"),
)
EXCEPTIONS: dict[str, dict] = {
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": _PER_TYPE},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "hidden_size": WIDTH, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "qwen2_vl_text": {"rope_parameters": _MROPE},
    "qwen2_5_vl_text": {"rope_parameters": _MROPE},
    "glm4v_text": {"rope_parameters": _MROPE},
    "glm4v_moe_text": {"rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0}},
    "glm_ocr_text": {"rope_parameters": _MROPE},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": 2, "num_experts": 4},
    "hunyuan_vl_text": {"head_dim": 8, "rope_parameters": {**_MROPE, "mrope_section": [1, 1, 1, 1]}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"qk_head_dim": 16, "head_dim": 8},
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 8,
    },
    "xmod": {"languages": ("en_XX",), "default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 2},
    "zamba2": {"layer_types": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1},
    **dict.fromkeys(_HYBRIDS, _HALF_LINEAR),
    "qwen4_exp_text": {
        **_HALF_LINEAR,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 57},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 57},
    "paddleocr_vl_text": {"rope_parameters": _MROPE},
    "qwen2_5_omni_text": {"rope_parameters": _MROPE},
    "chameleon": {"vocabulary_map": {"<image>": IMAGE_TOKEN}},
    "cosmos3_edge_text": {"rope_parameters": _MROPE},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2, "n_routed_experts": 4},
    "ernie4_5_vl_moe_text": {"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2]}},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "granite4_vision": {"deepstack_layer_map": []},
    "mistral4": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        },
        "head_dim": 8,
    },
    "inkling2": {"vision_config": {"text_hidden_size": WIDTH}},
}
# families of which no model is built, and why
NOT_BUILT: dict[str, str] = {
    **dict.fromkeys(
        ("blip", "blip-2", "idefics", "instructblip", "instructblipvideo", "kosmos-2", "pix2struct"),
        "reads no text without an image",
    ),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "reads several codebooks of sound, not text"),
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"), "drafts from another model's hidden states and cache"
    ),
    **dict.fromkeys(("fast_vlm", "gemma3n", "perception_lm"), "its vision tower needs timm"),
    **dict.fromkeys(
        ("pp_formulanet", "t5gemma2", "udop", "vision-encoder-decoder"), "an encoder and a decoder, of images or text"
    ),
    "diffusion_gemma": "generates by diffusion",
    "pi0": "reads the state of a robot",
}


def shrunk(default: PretrainedConfig, **further) -> PretrainedConfig:
    """A configuration of the same class with small sizes; what it derives from them is derived anew."""
    parts = {name: part for name, part in vars(default).items() if isinstance(part, PretrainedConfig)}
    of_class = {default.attribute_map.get(name, name): size for name, size in SIZES.items()}
    known = vars(default).keys() - parts.keys()
    given: dict = {name: size for name, size in of_class.items() if name in known and _is_of_size(default, name)}
    for name in given.keys() & set(_KEY_HEADS):
        heads = next((vars(default)[one] for one in _HEADS if one in known), None)
        given[name] = HEADS if vars(default)[name] == heads else 2
    exceptions = {**EXCEPTIONS.get(default.model_type, {}), **further}
    for name, part in parts.items():
        own = exceptions.pop(name, {})
        given[name] = shrunk(part, **own) if isinstance(own, dict) else own
    return type(default)(**{**given, **exceptions})


def _is_of_size(default: PretrainedConfig, name: str) -> bool:
    value = vars(default)[name]
    if value is None:
        return name.endswith("token_id")
    return isinstance(value, int) and not isinstance(value, bool)


def families() -> dict[str, type]:
    """Model type to the class that is built of it: of causal LMs, and of those that read images too."""
    names = {**auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    # one model type may have a class in both: the first reads images, the second is its text part alone
    both = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    found = {}
    for kind, name in sorted(names.items()):
        found[kind] = name
        if kind in both and both[kind] != name:
            found[f"{kind} (images)"] = both[kind]
    return found


def tiny_config(family: str) -> PretrainedConfig:
    kind = family.partition(" ")[0]
    return shrunk(transformers.CONFIG_MAPPING[kind](), **({"is_decoder": True} if _is_encoder(kind) else {}))


def _is_encoder(kind: str) -> bool:
    """Of the families that are causal only as decoders."""
    return hasattr(transformers.CONFIG_MAPPING[kind](), "is_decoder")


def tiny_model(family: str, seed: int = 0) -> torch.nn.Module:
    """In eval mode; weights large enough that no token is chosen by rounding."""
    kind = getattr(transformers, families()[family])
    config = tiny_config(family)
    if kind.config_class is not type(config):
        parts = [part for part in vars(config).values() if isinstance(part, kind.config_class)]
        config = parts[0] if parts else config
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind._from_config(config)
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "A_log" not in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=drawn))
    if hasattr(model, "generation_config"):  # some force a last token, or suppress others
        model.generation_config = transformers.GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return model.eval()
