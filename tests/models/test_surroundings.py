"""Composites among others: configurations that trainers and servers read, defaults of torch, inherited settings."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

import planner_models  # noqa: E402
from tiny import tiny_config, tiny_model, tiny_pair  # noqa: E402

from auxkernels.models import AuxiliaryForCausalLM, PlannerForCausalLM  # noqa: E402

PREFIX = torch.tensor([[7, 9, 11, 13]]).expand(3, 4)
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


# -- configurations ----------------------------------------------------------------------------------------------------


def composite(kind):
    return tiny_pair() if kind == "auxiliary" else planner_models.tiny_model()


@pytest.mark.parametrize("kind", ["auxiliary", "planner"])
@pytest.mark.parametrize("name", [*SIZES, *TOKENS])
def test_configuration_says_what_any_language_models_does(kind, name):
    model = composite(kind)
    want = getattr((model.base if kind == "auxiliary" else model.lm).config, name)
    assert getattr(model.config, name) == want and getattr(model.config.get_text_config(), name) == want


def test_positions_are_as_many_as_both_models_have(tokens):
    base, aux = tiny_model("llama"), tiny_config("gpt2")
    aux.n_positions = 48
    assert AuxiliaryForCausalLM.from_base_and_aux(base, aux).config.max_position_embeddings == 48
    mamba = transformers.MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, state_size=4)
    assert AuxiliaryForCausalLM.from_base_and_aux(base, mamba).config.max_position_embeddings == 128


@pytest.mark.parametrize("kind", ["auxiliary", "planner"])
def test_token_ids_that_a_trainer_sets_are_kept(kind, tmp_path):
    model = composite(kind)
    model.config.pad_token_id = 7
    model.save_pretrained(tmp_path, **({"save_base": True} if kind == "auxiliary" else {}))
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    assert again.pad_token_id == 7 and again.eos_token_id == model.config.eos_token_id
    own = {} if kind == "auxiliary" else {"planner": planner_models.TinyPlanner()}
    assert type(model).from_pretrained(tmp_path, **own).config.pad_token_id == 7


# -- settings that are another model's ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value",
    [
        ("cache_implementation", "static"),
        ("cache_implementation", "offloaded"),
        ("token_healing", True),
        ("assistant_early_exit", 1),
        ("prefill_chunk_size", 2),
        ("prompt_lookup_num_tokens", 2),
    ],
)
@pytest.mark.parametrize("kind", ["auxiliary", "planner"])
def test_a_parts_own_way_of_generating_is_not_the_composites(kind, name, value, tokens):
    lm = tiny_model("llama", seed=1, layers=3)
    setattr(lm.generation_config, name, value)
    if kind == "auxiliary":
        model = AuxiliaryForCausalLM.from_base_and_aux(lm, tiny_model("gpt2", seed=2), zero_init=False).eval()
        options = {}
    else:
        model = PlannerForCausalLM.from_lm(lm, num_labels=4, label_dim=4, mode="hard").eval()
        options = {"planner_fn": lambda tokens, mask: torch.zeros(len(tokens), dtype=torch.int64)}
        options["is_segment_end"] = [5]
    got = model.generate(tokens, max_new_tokens=4, do_sample=False, **options)
    setattr(model.generation_config, name, None)
    assert torch.equal(got, model.generate(tokens, max_new_tokens=4, do_sample=False, **options))
    assert getattr(lm.generation_config, name) == value


# -- defaults of torch -------------------------------------------------------------------------------------------------


def everything(tokens, models):
    """Joins, trains and generates with three pairs of models; returns what came out."""
    results, models = [], iter(models)
    for trunk_layer in (None, 1):
        model = AuxiliaryForCausalLM.from_base_and_aux(*next(models), zero_init=False, trunk_layer=trunk_layer)
        if trunk_layer is not None:
            with torch.no_grad():
                model.trunk_projection.weight.fill_(0.1), model.trunk_projection.bias.fill_(0.1)
        loss = model.train()(tokens, labels=tokens, aux_input_ids=PREFIX).loss
        loss.backward()
        options = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
        results += [loss.detach(), model.eval()(tokens).logits, model.generate(tokens, **options)]
    lm = next(models)[0]
    planner = PlannerForCausalLM.from_lm(lm, num_labels=4, label_dim=4, layers=[1])
    scores, segments = torch.ones_like(tokens[:, :4]).float(), torch.zeros_like(tokens)
    segments += torch.arange(len(tokens), device=tokens.device).unsqueeze(1)  # numbered on from row to row
    for mode, given in (
        ("soft", {"label_scores": scores}),
        ("hard", {"label_ids": scores[:, 0].long()}),
        ("fixed", {}),
    ):
        output = planner.train()(tokens, labels=tokens, mode=mode, segment_ids=segments, **given)
        results += [output.loss.detach(), output.label_usage.detach()]
    plan = lambda tokens, mask: torch.zeros_like(tokens[:, 0])  # noqa: E731
    options |= {"planner_fn": plan, "is_segment_end": [5], "mode": "hard"}
    return [*results, planner.eval().generate(tokens, **options)]


def pairs():
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return [(tiny_model("llama", seed=1, width=24), tiny_model("gpt2", seed=2, **no_dropout)) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_default_dtype_of_torch_changes_nothing(dtype, tokens):
    want, made = everything(tokens, pairs()), pairs()
    torch.set_default_dtype(dtype)
    try:
        got = everything(tokens, made)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_default_device_of_torch_changes_nothing(tokens):
    want, made = everything(tokens, pairs()), pairs()
    with torch.device("meta"):
        got = everything(tokens, made)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


# -- by name, and from the end -----------------------------------------------------------------------------------------


def test_planners_language_model_may_be_a_name(tmp_path):
    planner_models.tiny_lm("llama").save_pretrained(tmp_path)
    tokens = planner_models.tokens()
    for name in (tmp_path, str(tmp_path)):
        model = PlannerForCausalLM.from_lm(
            name, num_labels=4, label_dim=4, mode="fixed", lm_kwargs={"dtype": "float64"}
        )
        assert model.lm.dtype == torch.float64 and not model.training
        torch.testing.assert_close(model(tokens).logits, model.lm(tokens).logits)
    with pytest.raises(ValueError, match="lm_kwargs must be empty where lm is a model, got dtype"):
        PlannerForCausalLM.from_lm(model.lm, num_labels=4, label_dim=4, lm_kwargs={"dtype": "float64"})


@pytest.mark.parametrize("given, meant", [(-1, 2), (-3, 0)])
def test_negative_trunk_layers_count_from_the_last(given, meant, tmp_path, tokens):
    model = tiny_pair(trunk_layer=given)
    assert model.config.trunk_layer == meant
    states = model.base(tokens, output_hidden_states=True).hidden_states
    want = model.base(tokens).logits + model.aux(inputs_embeds=model.trunk_projection(states[given])).logits
    torch.testing.assert_close(model(tokens).logits, want)
