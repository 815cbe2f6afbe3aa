"""Which models `AuxiliaryForCausalLM` joins, what it leaves of them as it was, and which inputs it refuses."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from network import assert_same_network  # noqa: E402
from tiny import VOCAB_SIZE, tiny_config, tiny_model, tiny_pair  # noqa: E402

from auxkernels.models import AuxiliaryForCausalLM  # noqa: E402

PREFIX = torch.tensor([[7, 9, 11, 13]]).expand(3, 4)


# -- heads and joining -------------------------------------------------------------------------------------------------


class OtherHead(transformers.LlamaForCausalLM):
    """Logits that no linear head with scale and softcap makes."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.sin()
        return output


def test_a_head_that_computes_something_else_is_refused_on_both_sides():
    other = OtherHead(tiny_config("llama"))
    assert not other.get_input_embeddings().weight[0].any()  # the padding token would show logits 0
    head = other.lm_head.weight
    for models in ((other, tiny_config("gpt2")), (tiny_model("gpt2"), other)):
        with pytest.raises(ValueError, match="the logits of OtherHead are not those of a linear head"):
            AuxiliaryForCausalLM.from_base_and_aux(*models)
    assert other.lm_head.weight is head and head.any()


def test_a_head_is_checked_also_where_all_hidden_states_are_zero():
    model, other = tiny_model("llama"), OtherHead(tiny_config("llama"))
    for silenced in (model, other):
        with torch.no_grad():
            silenced.model.norm.weight.zero_()
    with pytest.raises(ValueError, match="the logits of OtherHead are not those of a linear head"):
        AuxiliaryForCausalLM.from_base_and_aux(tiny_model("gpt2"), other, zero_init=False)
    AuxiliaryForCausalLM.from_base_and_aux(tiny_model("gpt2"), model, zero_init=False)


@pytest.mark.parametrize("name", ["HyperCLOVAX", "Granite"])
def test_scaled_heads_are_scaled_the_way_of_their_model(name, tokens):
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"this transformers has no {name}")
    options = tiny_config("llama").to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = getattr(transformers, f"{name}Config")(
        **{n: options[n] for n in names}, num_key_value_heads=1, logits_scaling=4.0, pad_token_id=0
    )
    base = transformers.AutoModelForCausalLM.from_config(config).eval()
    model = AuxiliaryForCausalLM.from_base_and_aux(base, tiny_config("gpt2")).eval()
    assert_same_network(model(tokens).logits, base(tokens).logits)


def test_head_multiplier_of_falcon_h1_multiplies():
    from auxkernels.models.heads import output_head

    model = tiny_model("llama")
    model.config.lm_head_multiplier = 0.25
    assert output_head(model).scale == 0.25


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_joining_changes_no_configuration_of_the_users(architecture):
    config = tiny_config(architecture, tie_word_embeddings=True)
    before = config.to_dict()
    AuxiliaryForCausalLM.from_base_and_aux(tiny_model("llama"), config)
    assert config.to_dict() == before
    aux = transformers.AutoModelForCausalLM.from_config(config)
    shared = aux.config
    model = AuxiliaryForCausalLM.from_base_and_aux(tiny_model("llama"), aux)
    assert shared.tie_word_embeddings and not aux.config.tie_word_embeddings
    assert model.config.aux_config is aux.config is aux.base_model.config
    assert not any(getattr(module, "config", None) is shared for module in model.modules())


def test_models_that_share_a_head_are_refused_before_it_is_zeroed():
    base, aux = tiny_model("llama"), tiny_model("llama", seed=1)
    aux.lm_head = base.lm_head
    for other in (aux, base):
        with pytest.raises(ValueError, match="aux must be another model than base, with a head of its own"):
            AuxiliaryForCausalLM.from_base_and_aux(base, other)
    assert base.lm_head.weight.any()


def test_trunk_projection_has_the_width_of_the_auxiliarys_embeddings(tokens):
    options = {"hidden_size": 16, "word_embed_proj_dim": 8, "ffn_dim": 16, "num_hidden_layers": 1}
    config = transformers.OPTConfig(
        vocab_size=VOCAB_SIZE, num_attention_heads=2, max_position_embeddings=32, pad_token_id=0, **options
    )
    model = AuxiliaryForCausalLM.from_base_and_aux(tiny_model("llama"), config, trunk_layer=1)
    assert model.trunk_projection.weight.shape == (8, 16)
    assert model(tokens).logits.shape == (3, 9, VOCAB_SIZE)


def test_base_that_was_put_in_training_mode_runs_in_eval_mode(tokens):
    model = tiny_pair("gpt2", "llama")
    want = model(tokens).logits
    model.base.train()
    assert torch.equal(model(tokens).logits, want)


# -- inputs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"trunk_layer": 1}], ids=["tokens", "trunk"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_an_empty_prefix_is_none(options, use_cache, tokens):
    model, empty = tiny_pair(**options), PREFIX[:, :0]
    for kwargs in ({}, {"aux_attention_mask": empty}):
        got = model(tokens, aux_input_ids=empty, use_cache=use_cache, **kwargs)
        assert torch.equal(got.logits, model(tokens).logits)


def test_unknown_arguments_for_the_auxiliary_are_errors(tokens):
    with pytest.raises(TypeError, match="aux_input_ids, aux_attention_mask and aux_scale, got aux_ids, aux_labels"):
        tiny_pair()(tokens, aux_ids=PREFIX, aux_labels=PREFIX)


def test_packed_positions_behind_a_prefix_are_errors_with_a_cache_too(tokens):
    for cache in ({"use_cache": True}, {"past_key_values": tiny_pair().new_cache()}, {}):
        with pytest.raises(ValueError, match="packed texts"):
            tiny_pair()(tokens, aux_input_ids=PREFIX, position_ids=torch.arange(9)[None] % 5, **cache)


def test_labels_are_needed_for_a_count_of_items_in_evaluation_too(tokens):
    for model in (tiny_pair().eval(), tiny_pair().train()):
        with pytest.raises(ValueError, match="labels must be given where num_items_in_batch is"):
            model(tokens, num_items_in_batch=4)
