"""Tiny random language models of two architectures, and pairs of them."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

VOCAB_SIZE = 61
ARCHITECTURES = ("gpt2", "llama")
PAIRS = [(base, aux) for base in ARCHITECTURES for aux in ARCHITECTURES]


def tiny_config(architecture: str, *, width: int = 16, layers: int = 2, vocab_size: int = VOCAB_SIZE, **options):
    """Configuration of a model of some thousand parameters; token 1 ends a text, token 0 pads."""
    common = {"vocab_size": vocab_size, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, **options}
    key_heads = common.pop("num_key_value_heads", 1)
    if architecture == "gpt2":
        return transformers.GPT2Config(n_embd=width, n_layer=layers, n_head=2, n_positions=128, **common)
    return transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=key_heads,
        max_position_embeddings=128,
        **common,
    )


def tiny_model(architecture: str, *, seed: int = 0, sharpness: float = 20.0, **options):
    """A random model in eval mode whose logits differ clearly, so that no test depends on near ties."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(architecture, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(sharpness)
    return model.eval()


def tiny_pair(base: str = "llama", aux: str = "gpt2", *, zero_init: bool = False, aux_options=None, **options):
    """An `AuxiliaryForCausalLM` in eval mode; the auxiliary is narrower than the base and, by default, not zero."""
    from auxkernels.models import AuxiliaryForCausalLM

    return AuxiliaryForCausalLM.from_base_and_aux(
        tiny_model(base, seed=1, width=24),
        tiny_model(aux, seed=2, width=16, **(aux_options or {})),
        zero_init=zero_init,
        **options,
    )
