"""Caches that generation is asked for by name: what they compute is what a growing one does, or they are refused."""

import copy
from unittest.mock import MagicMock

import pytest
import torch

transformers = pytest.importorskip("transformers")

import planner_models  # noqa: E402
from network import assert_same_network  # noqa: E402
from recurrent_models import CONFIGS, recurrent_model  # noqa: E402
from segment_ends import end_by_sum, scores_of  # noqa: E402
from tiny import VOCAB_SIZE, tiny_model, tiny_pair  # noqa: E402
from transformers import DynamicCache, QuantizedCache, StaticCache, cache_utils  # noqa: E402

from auxkernels.models import AuxiliaryForCausalLM, PairedCache, PlannerForCausalLM, caches  # noqa: E402

NEW = 6
PREFIX = torch.tensor([[7, 9, 11, 13], [0, 0, 21, 23], [0, 31, 33, 35]])
BEHIND_PREFIX = {"aux_input_ids": PREFIX, "aux_attention_mask": (PREFIX != 0).long()}
KINDS = ("static", "offloaded", "offloaded_static", "sliding_window")
STATIC = {"cache_implementation": "static", "max_cache_len": 20}


def padded(tokens):
    """The tokens with the first row's first four made padding, and the mask."""
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    return tokens * mask, mask


def generate(model, tokens, **options):
    tokens, mask = padded(tokens)
    options = {"max_new_tokens": NEW, "eos_token_id": None, "do_sample": False, **options}
    return model.generate(tokens, attention_mask=mask, pad_token_id=0, **options)


def filled(model, tokens, cache):
    model(tokens, past_key_values=cache, **BEHIND_PREFIX)
    return cache


# -- a pair ------------------------------------------------------------------------------------------------------------


WAYS = ({"num_beams": 3}, {"guidance_scale": 2.0}, {"prefill_chunk_size": 4})


@pytest.mark.parametrize(
    "kind, options", [*((kind, {}) for kind in KINDS), *(("static", way) for way in WAYS)], ids=str
)
def test_generation_with_any_cache_is_that_with_a_growing_one(kind, options, tokens):
    model = tiny_pair("llama", "gpt2", trunk_layer=1 if options else None)
    want = generate(model, tokens, **options, **BEHIND_PREFIX)
    assert generate(model, tokens, cache_implementation=kind, **options, **BEHIND_PREFIX).equal(want)
    model.generation_config.cache_implementation = kind
    assert generate(model, tokens, **options, **BEHIND_PREFIX).equal(want)


def test_static_caches_have_room_for_text_and_prefix_and_are_filled(tokens):
    model = tiny_pair()
    made = []
    new_cache = model.new_cache
    model.new_cache = lambda *args, **kwargs: made.append(new_cache(*args, **kwargs)) or made[-1]
    generate(model, tokens, cache_implementation="static", **BEHIND_PREFIX)
    generate(model, tokens, cache_implementation="static", generation_config=None, max_cache_len=30)
    sizes = [[cache.layers[0].keys.shape[-2] for cache in (pair.base, pair.aux)] for pair in made]
    assert sizes == [[9 + NEW - 1, 9 + NEW - 1 + 4], [30, 30]]
    assert [type(cache) for cache in (made[0].base, made[0].aux)] == [StaticCache, StaticCache]


def test_a_cache_that_is_made_beforehand_is_generated_with(tokens):
    model = tiny_pair()
    want = generate(model, tokens, **BEHIND_PREFIX)
    cache = model.new_cache(**STATIC, prefix_length=4)
    assert generate(model, tokens, past_key_values=cache, **BEHIND_PREFIX).equal(want)
    assert (cache.get_seq_length(), cache.prefix_length) == (9 + NEW - 1, 4)
    length = cache.get_seq_length()  # of a static layer it would be the tensor that goes on counting
    cache.reset()
    assert length == 9 + NEW - 1
    assert cache.get_seq_length() == cache.prefix_length == 0
    assert generate(model, tokens, past_key_values=cache).equal(generate(model, tokens))


def test_text_is_read_into_static_caches_in_parts(pair, tokens):
    want = pair(tokens, **BEHIND_PREFIX).logits
    cache = filled(pair, tokens[:, :4], pair.new_cache(**STATIC, prefix_length=4))
    rows = torch.tensor([2, 0, 1])
    cache.reorder_cache(rows)
    got = [pair(tokens[rows, n:m], past_key_values=cache).logits for n, m in ((4, 5), (5, 9))]
    assert_same_network(torch.cat(got, dim=1), want[rows, 4:])


@pytest.mark.parametrize("max_cache_len, prefix_length, part, room", [(8, 4, "base", 9), (9, 3, "aux", 13)])
def test_what_does_not_fit_is_refused_and_leaves_the_cache_as_it_was(max_cache_len, prefix_length, part, room, tokens):
    model = tiny_pair()
    cache = model.new_cache("static", max_cache_len=max_cache_len, prefix_length=prefix_length)
    with pytest.raises(ValueError, match=rf"room for {room} tokens of {part}, got {room - 1}.*max_cache_len=9 or more"):
        filled(model, tokens, cache)
    assert_same_network(model(tokens[:, :8], past_key_values=cache).logits, model(tokens[:, :8]).logits)


def test_windows_that_are_longer_than_the_cache_are_not_cut_in_silence(tokens):
    config = transformers.MistralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=5,
    )
    model = AuxiliaryForCausalLM.from_base_and_aux(tiny_model("llama"), config, zero_init=False).eval()
    for options in ({}, {"num_beams": 2}):
        want = generate(model, tokens, **options)
        assert generate(model, tokens, cache_implementation="static", **options).equal(want)
    parts = [transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval() for _ in range(2)]
    for part in parts:
        part.config.sliding_window = 50
    model = AuxiliaryForCausalLM.from_base_and_aux(*parts, zero_init=False)
    with pytest.raises(ValueError, match="room for 9 tokens of base, got 8"):
        model(tokens, past_key_values=model.new_cache("static", max_cache_len=8))


@pytest.mark.parametrize("family", CONFIGS)
def test_recurrent_states_go_with_static_caches(family, tokens):
    model = AuxiliaryForCausalLM.from_base_and_aux(recurrent_model(family), recurrent_model(family, 1), zero_init=False)
    want = generate(model.eval(), tokens, **BEHIND_PREFIX)
    assert generate(model, tokens, cache_implementation="static", **BEHIND_PREFIX).equal(want)


# -- on the CPU but for the layer in use -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_both_caches_are_offloaded_where_there_is_an_accelerator(kind, tokens, monkeypatch):
    model = tiny_pair()
    want, plain = generate(model, tokens, **BEHIND_PREFIX), model.new_cache("offloaded")
    assert not plain.base.offloading and not plain.aux.offloading  # on a CPU all of it is there anyway
    monkeypatch.setattr(caches, "device_of", lambda model: torch.device("cuda"))
    monkeypatch.setattr(torch, "Stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "default_stream", MagicMock())
    moved, made = [], []
    monkeypatch.setattr(cache_utils.Cache, "offload", lambda self, *args: moved.append(self))
    new_cache = model.new_cache
    model.new_cache = lambda *args, **kwargs: made.append(new_cache(*args, **kwargs)) or made[-1]
    assert generate(model, tokens, cache_implementation=kind, **BEHIND_PREFIX).equal(want)
    assert {id(cache) for cache in moved} == {id(made[0].base), id(made[0].aux)}


# -- what gives tokens back --------------------------------------------------------------------------------------------


def test_drafts_go_with_offloaded_caches_and_are_refused_with_others(tokens):
    model, drafts = tiny_pair(), {"prompt_lookup_num_tokens": 2}
    want = generate(model, tokens[1:2])
    assistants = [{"assistant_model": tiny_pair("gpt2", "llama")}, {"assistant_model": model}]
    for options in (drafts, *assistants):
        assert generate(model, tokens[1:2], cache_implementation="offloaded", **options).equal(want)
        for kind in ("static", "offloaded_static"):
            with pytest.raises(ValueError, match=r"must be dynamic for crop \(drafts need it\): StaticLayer cannot"):
                generate(model, tokens[1:2], cache_implementation=kind, **options)
    with pytest.raises(ValueError, match="must be dynamic for crop"):
        generate(model, tokens[1:2], past_key_values=model.new_cache(**STATIC), **drafts)


def test_an_assistant_with_a_static_cache_is_refused(tokens):
    model, assistant = tiny_pair(), tiny_pair("gpt2", "llama")
    assistant.generation_config.cache_implementation = "static"
    with pytest.raises(ValueError, match="must be dynamic for crop"):
        generate(model, tokens[1:2], assistant_model=assistant)


@pytest.mark.parametrize(
    "method, argument",
    [("crop", -2), ("batch_select_indices", torch.tensor([1, 2])), ("batch_repeat_interleave", 2)],
)
def test_changes_that_a_layer_does_not_know_are_refused_before_any_is_made(method, argument, tokens):
    model = tiny_pair()
    cache = filled(model, tokens[:, :5], model.new_cache(**STATIC, prefix_length=4))
    with pytest.raises(ValueError, match=f"must be dynamic for {method} .*StaticLayer cannot"):
        getattr(cache, method)(argument)
    assert_same_network(
        model(tokens[:, 5:], past_key_values=cache).logits, model(tokens, **BEHIND_PREFIX).logits[:, 5:]
    )


def test_states_beside_keys_are_not_left_behind_when_rows_are_chosen(tokens):
    model = AuxiliaryForCausalLM.from_base_and_aux(
        tiny_model("llama").double(), recurrent_model("falcon_h1"), zero_init=False
    ).eval()
    cache, other = (filled(model, tokens[:, :5], model.new_cache()) for _ in range(2))
    with pytest.raises(ValueError, match="LinearAttentionAndFullAttentionLayer cannot"):
        cache.batch_select_indices(torch.tensor([1, 2]))
    got, want = (model(tokens[:, 5:], past_key_values=one).logits for one in (cache, other))
    assert torch.equal(got, want)


# -- quantised ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fp8():
    try:
        QuantizedCache(backend="fp8", config=tiny_model("llama").config)
    except ValueError:
        pytest.skip("this transformers has no fp8 cache")
    return {"backend": "fp8"}


def test_both_caches_are_quantised(fp8, tokens):
    model = tiny_pair()
    cache = model.new_cache("quantized", cache_config=fp8)
    alone = [QuantizedCache(config=part.config, **fp8) for part in (model.base, model.aux)]
    exact = model(tokens).logits
    for n, m in ((0, 5), (5, 7), (7, 9)):
        parts = zip((model.base, model.aux), alone, strict=True)
        want = sum(part(tokens[:, n:m], past_key_values=one).logits for part, one in parts)
        got = model(tokens[:, n:m], past_key_values=cache).logits
        assert_same_network(got, want)
    assert not torch.allclose(got, exact[:, 7:], rtol=1e-3)
    cache.reset()
    assert_same_network(model(tokens[:, :5], past_key_values=cache).logits, exact[:, :5])


def test_generation_with_quantised_caches_is_that_with_a_given_one(fp8, tokens):
    model = tiny_pair()
    cache = model.new_cache("quantized", cache_config=fp8)
    for options in ({}, {"num_beams": 2}):
        want = generate(model, tokens, past_key_values=cache, **options)
        got = generate(model, tokens, cache_implementation="quantized", cache_config=fp8, **options)
        assert got.equal(want)
        cache.reset()
    with pytest.raises(ValueError, match=r"must be dynamic for crop .*QuantizedCache"):
        generate(model, tokens[1:2], prompt_lookup_num_tokens=2, cache_implementation="quantized", cache_config=fp8)


def test_layers_that_cannot_be_quantised_are_named(fp8):
    model = AuxiliaryForCausalLM.from_base_and_aux(tiny_model("llama").double(), recurrent_model("bamba"))
    with pytest.raises(ValueError, match=r"must not be 'quantized' for BambaForCausalLM: .*layer types"):
        model.new_cache("quantized", cache_config=fp8)


# -- refused by name ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("paged", {}, "must be one of dynamic, offloaded, static, offloaded_static, quantized, got 'paged'"),
        ("static", {}, "max_cache_len must be a positive number of tokens for cache_implementation='static', got None"),
        ("static", {"max_cache_len": 0}, "max_cache_len must be a positive number of tokens, got 0"),
        ("offloaded", {"max_cache_len": 9}, "max_cache_len must be None for cache_implementation='offloaded', got 9"),
        ("static", {"max_cache_len": 9, "cache_config": {}}, "cache_config must be None"),
    ],
)
def test_options_of_another_kind_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_pair().new_cache(kind, **options)


def bloom():
    return transformers.AutoModelForCausalLM.from_config(
        transformers.BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=2, pad_token_id=0)
    )


def openai_gpt():
    return transformers.AutoModelForCausalLM.from_config(
        transformers.OpenAIGPTConfig(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=3, n_head=2, pad_token_id=0)
    )


@pytest.mark.parametrize("make, name", [(bloom, "BloomForCausalLM"), (openai_gpt, "OpenAIGPTLMHeadModel")])
def test_models_without_a_static_cache_are_named(make, name, tokens):
    pair = AuxiliaryForCausalLM.from_base_and_aux(tiny_model("llama"), make(), zero_init=False).eval()
    planner = PlannerForCausalLM.from_lm(make(), num_labels=4, label_dim=4, mode="fixed", layers=[1]).eval()
    for model in (pair, planner):
        want = generate(model, tokens, use_cache=False)
        assert generate(model, tokens).equal(want)
        with pytest.raises(ValueError, match=name):
            generate(model, tokens, cache_implementation="static")
        assert generate(model, tokens, cache_implementation="static", use_cache=False).equal(want)


def test_layers_of_a_type_without_a_static_cache_are_named(monkeypatch):
    monkeypatch.delitem(cache_utils.STATIC_LAYER_TYPE_MAPPING, "full_attention")
    with pytest.raises(ValueError, match="'dynamic' for LlamaForCausalLM: layers of type 'full_attention' have no"):
        tiny_pair().new_cache(**STATIC)
    assert isinstance(tiny_pair().new_cache(), PairedCache)


# -- a planner's language model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture, kind", [*(("gpt2", kind) for kind in KINDS), ("gpt2", "static cache"), ("llama", "static")]
)
def test_plans_go_with_any_cache(architecture, kind):
    model, tokens = planner_models.tiny_model(architecture), planner_models.tokens(3, 7)
    plans = {"planner_fn": scores_of, "is_segment_end": end_by_sum}
    options = {"cache_implementation": kind}
    if kind == "static cache":
        options = {"past_key_values": StaticCache(config=model.lm.config, max_cache_len=20)}
    for own in (plans, {"mode": "fixed"}):
        want = generate(model, tokens, **own)
        assert generate(model, tokens, **own, **options).equal(want)
        if "past_key_values" in options:
            options["past_key_values"].reset()
    if kind in KINDS:
        beams = {"mode": "fixed", "num_beams": 2}
        assert generate(model, tokens, **beams, **options).equal(generate(model, tokens, **beams))


@pytest.mark.slow
def test_a_planner_is_compiled_with_a_static_cache_as_any_model_is():
    options = {"num_labels": planner_models.NUM_LABELS, "label_dim": 4, "layers": [1]}
    model, tokens = PlannerForCausalLM.from_lm(tiny_model("llama"), **options), planner_models.tokens(2, 7)
    torch.nn.init.normal_(model.conditioning.bias)
    plans = {"planner_fn": scores_of, "is_segment_end": end_by_sum}
    compiled = transformers.CompileConfig(backend="eager", mode=None)
    compiled._compile_all_devices = True
    want, calls = generate(model, tokens, **plans), []
    compiled_call = model.get_compiled_call
    model.get_compiled_call = lambda config: calls.append(config) or compiled_call(config)
    got = generate(model, tokens, cache_implementation="static", compile_config=compiled, **plans)
    assert got.equal(want) and calls


def test_drafts_of_a_planner_need_a_cache_that_gives_them_back():
    model, tokens = planner_models.tiny_model(mode="fixed"), planner_models.tokens(1, 7)
    drafts = {"prompt_lookup_num_tokens": 2}
    want = model.generate(tokens, max_new_tokens=NEW)
    assert model.generate(tokens, max_new_tokens=NEW, cache_implementation="offloaded", **drafts).equal(want)
    assert model.generate(tokens, max_new_tokens=NEW, past_key_values=DynamicCache(), **drafts).equal(want)
    for options in (
        {"cache_implementation": "offloaded_static"},
        {"past_key_values": StaticCache(config=model.lm.config, max_cache_len=20)},
    ):
        with pytest.raises(ValueError, match="must be dynamic for crop"):
            model.generate(tokens, max_new_tokens=NEW, **options, **drafts)
