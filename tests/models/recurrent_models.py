"""Tiny models with recurrent or convolutional states, beside attention or alone."""

import torch
import transformers

COMMON = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
MAMBA = {"mamba_d_head": 16, "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_n_groups": 1}


def _configs():
    hybrid = {**SIZES, "intermediate_size": 48, **COMMON}
    yield "bamba", transformers.BambaConfig(attn_layer_indices=[1], mamba_expand=2, **MAMBA, **hybrid)
    yield (
        "falcon_h1",
        transformers.FalconH1Config(mamba_d_ssm=64, mamba_chunk_size=8, **MAMBA, **hybrid),
    )
    yield "lfm2", transformers.Lfm2Config(layer_types=["conv", "full_attention"], **hybrid)
    linear = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "mlp_only_layers": [0, 1]}
    types = ["linear_attention", "full_attention"]
    yield (
        "qwen3_next",
        transformers.Qwen3NextConfig(
            linear_value_head_dim=8, head_dim=8, layer_types=types, **linear, **experts, **hybrid
        ),
    )


CONFIGS = dict(_configs())
STATEFUL = sorted(CONFIGS.keys() - {"lfm2"})  # whose states cannot be taken back


def recurrent_model(family: str, seed: int = 0):
    """In eval mode and float64: no ties by rounding."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "A_log" not in name:
                parameter.normal_(0, 0.2)
    return model.eval().double()
