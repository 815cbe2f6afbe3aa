"""Families whose caches, heads, bodies or layers differ from most: as parts, and what is refused and why."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from family_configs import tiny_config  # noqa: E402
from family_configs import tiny_model as tiny_family  # noqa: E402
from tiny import tiny_model  # noqa: E402

from auxkernels.models import AuxiliaryForCausalLM, PlannerForCausalLM  # noqa: E402

COMMON = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, **COMMON}
OLD_SIZES = {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64, **COMMON}


def _configs():
    for name in ("Mamba", "FalconMamba"):
        yield name, lambda kind: kind(hidden_size=32, num_hidden_layers=3, state_size=8, **COMMON)
    heads = {"num_heads": 4, "head_dim": 16, "n_groups": 1, "expand": 2, "chunk_size": 8, "state_size": 8}
    yield "Mamba2", lambda kind: kind(hidden_size=32, num_hidden_layers=3, **heads, **COMMON)
    yield "MiniMax", lambda kind: kind(head_dim=8, num_local_experts=2, block_size=4, intermediate_size=48, **SIZES)
    yield "Rwkv", lambda kind: kind(hidden_size=32, num_hidden_layers=3, context_length=64, **COMMON)
    yield "OpenAIGPT", lambda kind: kind(**OLD_SIZES)
    yield "XLM", lambda kind: kind(emb_dim=32, n_layers=3, n_heads=2, pad_index=0, causal=True, vocab_size=61)
    experts = {"intermediate_size": 48, "intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 8}
    yield "Llama4Text", lambda kind: kind(**experts, **SIZES)
    recurrent = {"intermediate_size": 48, "lru_width": 32, "attention_window_size": 16}
    yield "RecurrentGemma", lambda kind: kind(**recurrent, **SIZES)


FAMILIES = dict(_configs())


def model_of(family, seed=0):
    """In eval mode; weights large enough that no token is chosen by rounding."""
    kind = getattr(transformers, f"{family}Config", None)
    if kind is None:
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](kind))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "A_log" not in name:
                parameter.normal_(0, 0.2)
    return model.eval()


def continued(logits_of, tokens, count=4):
    for _ in range(count):
        tokens = torch.cat([tokens, logits_of(tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return tokens


def generated(model, tokens, **options):
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "eos_token_id": None, **options}
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["base", "aux"])
def test_sums_and_generated_tokens_are_those_of_the_plain_models(family, side, tokens):
    model, other = model_of(family), tiny_model("llama", seed=3)
    parts = (model, other) if side == "base" else (other, model)

    def sums(ids):
        return model(input_ids=ids, use_cache=False).logits + other(ids).logits

    want, continuation = sums(tokens), continued(sums, tokens)
    joined = AuxiliaryForCausalLM.from_base_and_aux(*parts, zero_init=False).eval()
    torch.testing.assert_close(joined(tokens).logits, want, rtol=1e-4, atol=1e-4)
    for use_cache in (True, False, None):
        options = {} if use_cache is None else {"use_cache": use_cache}
        assert torch.equal(generated(joined, tokens, **options), continuation)
    joined.train()(tokens, labels=tokens).loss.backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_planner_conditions_and_generates_the_same_with_and_without_cache(family, tokens):
    model = model_of(family)
    want = model(input_ids=tokens, use_cache=False).logits
    planner = PlannerForCausalLM.from_lm(model, num_labels=4, label_dim=4, mode="fixed", layers=[1]).eval()
    torch.testing.assert_close(planner(tokens).logits, want)
    with torch.no_grad():
        planner.conditioning.bias.normal_()
    assert not torch.allclose(planner(tokens).logits, want, atol=0.01)
    continuation = continued(lambda ids: planner(ids).logits, tokens)
    for use_cache in (True, False):
        assert torch.equal(generated(planner, tokens, use_cache=use_cache), continuation)


def test_a_cache_where_none_can_be_paired_is_refused_by_name(tokens):
    model = AuxiliaryForCausalLM.from_base_and_aux(tiny_model("llama"), model_of("OpenAIGPT"), zero_init=False)
    with pytest.raises(ValueError, match="use_cache must be False: OpenAIGPTLMHeadModel has no cache"):
        model.new_cache()


def test_prefix_of_a_model_without_cache_is_read_at_each_step(tokens):
    prefix = torch.tensor([[7, 9, 11, 13]]).expand(3, 4)
    base, aux = tiny_model("llama"), model_of("OpenAIGPT")
    model = AuxiliaryForCausalLM.from_base_and_aux(base, aux, zero_init=False).eval()
    want = continued(lambda ids: base(ids).logits + aux(torch.cat([prefix, ids], dim=1)).logits[:, 4:], tokens)
    assert torch.equal(generated(model, tokens, aux_input_ids=prefix), want)


@pytest.mark.parametrize("side", ["base", "aux"])
def test_configurations_without_a_padding_token_are_read(side, tokens):
    config = transformers.CpmAntConfig(
        hidden_size=32,
        num_attention_heads=2,
        dim_head=16,
        dim_ff=48,
        num_hidden_layers=3,
        vocab_size=61,
        prompt_types=4,
        prompt_length=4,
        segment_types=34,
    )
    torch.manual_seed(0)
    model, other = transformers.AutoModelForCausalLM.from_config(config).eval(), tiny_model("llama", seed=3)
    want = model(input_ids=tokens).logits + other(tokens).logits
    parts = (model, other) if side == "base" else (other, model)
    joined = AuxiliaryForCausalLM.from_base_and_aux(*parts, zero_init=False).eval()
    torch.testing.assert_close(joined(tokens).logits, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(generated(joined, tokens), generated(joined, tokens, use_cache=False))


@pytest.mark.parametrize("side", ["base", "aux"])
def test_rows_that_only_pad_a_head_give_no_logits(side, tokens):
    if not hasattr(transformers, "InklingTextConfig"):
        pytest.skip("this transformers has no Inkling")
    config = tiny_config("inkling_text")
    config.unpadded_vocab_size = 50
    torch.manual_seed(0)
    model, other = transformers.AutoModelForCausalLM.from_config(config).eval(), tiny_model("llama", seed=3)
    tokens = tokens.clamp(max=49)
    want = model(input_ids=tokens).logits + other(tokens).logits[..., :50]
    parts = (model, other) if side == "base" else (other, model)
    joined = AuxiliaryForCausalLM.from_base_and_aux(*parts, zero_init=False, vocab_policy="pad").eval()
    torch.testing.assert_close(joined(tokens).logits[..., :50], want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="50"):
        AuxiliaryForCausalLM.from_base_and_aux(*parts, zero_init=False)
    joined.train()(tokens, labels=tokens).loss.backward()
    trained = joined.aux.get_output_embeddings().weight.grad
    assert trained[:50].any(dim=1).all() and not trained[50:].any()


def test_a_prefix_in_front_of_roberta_is_at_the_positions_that_it_was_trained_with(tokens):
    base, aux = tiny_model("llama"), tiny_family("roberta")
    prefix = torch.tensor([[7, 9, 11, 13]]).expand(3, 4)
    joined = AuxiliaryForCausalLM.from_base_and_aux(base, aux, zero_init=False).eval()

    def sums(ids):
        return base(ids).logits + aux(torch.cat([prefix, ids], dim=1)).logits[:, 4:]

    torch.testing.assert_close(joined(tokens, aux_input_ids=prefix).logits, sums(tokens), rtol=1e-4, atol=1e-4)
    assert torch.equal(generated(joined, tokens, aux_input_ids=prefix), continued(sums, tokens))


# -- refused for the right reason --------------------------------------------------------------------------------------


def test_hidden_states_of_four_dimensions_are_refused_as_trunk_when_joining():
    options = {"vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "head_dim": 8}
    config = transformers.Gemma3nTextConfig(
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0] * 4,
        intermediate_size=48,
        **options,
        **{**SIZES, "num_hidden_layers": 4},
    )
    base = transformers.AutoModelForCausalLM.from_config(config)
    message = r"trunk_layer 2 of Gemma3nForCausalLM must be \[batch, n, width\] = \[1, 7, 32\], got \[4, 1, 7, 32\]"
    with pytest.raises(ValueError, match=message):
        AuxiliaryForCausalLM.from_base_and_aux(base, tiny_model("llama"), trunk_layer=2)


def test_a_language_model_that_passes_no_gradient_to_labels_is_refused_in_training(tokens):
    lm, tokens = tiny_family("reformer"), tokens[:, :8]  # a multiple of its chunks
    model = PlannerForCausalLM.from_lm(lm, num_labels=4, label_dim=4, mode="fixed", layers=[1]).train()
    with pytest.raises(RuntimeError, match="ReformerModelWithLMHead passes no gradient on"):
        model(tokens, labels=tokens)


def test_layers_of_another_width_than_the_hidden_states_are_refused_when_joining():
    message = r"layers of Qwen4ExpForCausalLM must take hidden states .* = \[1, 7, 32\] .* got \[1, 7, 128\]"
    if not hasattr(transformers, "Qwen4ExpConfig"):
        pytest.skip("this transformers has no Qwen4Exp")
    with pytest.raises(ValueError, match=message):
        PlannerForCausalLM.from_lm(tiny_family("qwen4_exp_text"), num_labels=4, label_dim=4, layers=[1])


def test_layers_whose_states_are_not_one_for_each_token_are_refused_when_joining():
    config = transformers.XLNetConfig(d_model=32, n_layer=3, n_head=2, d_inner=48, **COMMON)
    lm = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"layers of XLNetLMHeadModel must take hidden states .* got \[7, 1, 32\]"):
        PlannerForCausalLM.from_lm(lm, num_labels=4, label_dim=4, layers=[1])


# -- vision-language wrappers ------------------------------------------------------------------------------------------


def test_planner_conditions_the_text_layers_of_a_wrapper_with_as_many_vision_layers(tokens):
    text = transformers.LlamaConfig(intermediate_size=48, **SIZES)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    torch.manual_seed(0)
    lm = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=60)
    ).eval()
    tokens = tokens.clamp(max=59)
    want = lm(input_ids=tokens).logits
    model = PlannerForCausalLM.from_lm(lm, num_labels=4, label_dim=4, mode="fixed", layers=[1]).eval()
    torch.testing.assert_close(model(tokens).logits, want)
    with torch.no_grad():
        model.conditioning.bias.normal_()
    assert not torch.allclose(model(tokens).logits, want, atol=1e-3)
    assert model.conditioning.weight.shape[1] == 32 and model.config.hidden_size == 32
    assert torch.equal(generated(model, tokens), generated(model, tokens, use_cache=False))
