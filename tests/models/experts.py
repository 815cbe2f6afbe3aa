"""Small mixtures of experts."""

import pytest
import torch
import transformers

COMMON = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}


MASK = torch.tensor([[1] * 9, [1] * 9, [1] * 5 + [0] * 4])


def experts(family="mixtral", coefficient=10.0, balanced=True, seed=1):
    common = {**SIZES, **COMMON, "output_router_logits": balanced}
    sizes = {"intermediate_size": 24, **common}
    if family == "mixtral":
        config = transformers.MixtralConfig(num_local_experts=4, router_aux_loss_coef=coefficient, **sizes)
    elif family == "qwen3_moe":
        options = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
        config = transformers.Qwen3MoeConfig(router_aux_loss_coef=coefficient, **options, **sizes)
    elif family == "jetmoe":  # names of its own
        options = {"num_local_experts": 4, "aux_loss_coef": coefficient, "kv_channels": 8}
        options["num_key_value_heads"] = 1
        config = transformers.JetMoeConfig(**{**sizes, **options})
    else:
        options = {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 24, "moe_loss_weight": coefficient}
        heads = {
            "d_model": 16,
            "n_heads": 2,
            "n_layers": 2,
            "max_seq_len": 32,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        }
        config = transformers.DbrxConfig(ffn_config=options, output_router_logits=balanced, **heads, **COMMON)
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def skip_unless_balanced(family):
    """Some versions of transformers lose the balancing loss of some families, alone too."""
    tokens = torch.randint(2, 61, (2, 9))
    try:
        loss = experts(family)(input_ids=tokens, labels=tokens).aux_loss
    except AttributeError as error:
        pytest.skip(f"{family} alone fails in this transformers: {error}")
    if loss is None:
        pytest.skip(f"{family} alone has no balancing loss in this transformers")
