"""`AuxiliaryEnsembleForCausalLM.generate` against loops that use no cache, and its cache."""

import math

import pytest
import torch

transformers = pytest.importorskip("transformers")

from ensembles import PREFIX, PREFIX_MASK, eager_sum, tiny_ensemble  # noqa: E402
from family_configs import tiny_model as family_model  # noqa: E402
from generation import NEW, Draws, generate, greedy, loop, next_logits, padded  # noqa: E402
from network import assert_same_network  # noqa: E402
from tiny import VOCAB_SIZE, tiny_model, tiny_pair  # noqa: E402
from transformers.cache_utils import CacheLayerMixin, DynamicLayer  # noqa: E402

from auxkernels.models import AuxiliaryEnsembleForCausalLM, AuxiliaryForCausalLM, EnsembleCache  # noqa: E402

OTHER = torch.tensor([[3, 5], [6, 8], [12, 10]])
ROWS = torch.tensor([[0.0, 1.0, -1.0], [0.5, -0.5, 2.0], [2.0, 0.0, 0.7]])
VARIANTS = {
    "plain": {},
    "prefixes": {"aux_input_ids": {"a": PREFIX, "b": OTHER}, "aux_attention_mask": {"a": PREFIX_MASK}},
    "rows": {"aux_scale": ROWS, "base_scale": torch.tensor([1.0, 0.5, 2.0])},
    "dials": {"aux_scale": {"b": torch.tensor([0.0, -1.0, 2.0]), "c": 0.2}, "base_scale": 1.5},
    "members": {"aux_scale": torch.tensor([0.3, -0.4, 1.7])},
    "floor": {},
    "floor of the call": {"base_floor": 0.3},
}


@pytest.fixture(params=VARIANTS)
def variant(request):
    """An ensemble of three kinds, and arguments of a call."""
    model = tiny_ensemble(("own", "trunk", "shared"))
    model.config.base_floor = 0.2 if request.param == "floor" else None
    return model, VARIANTS[request.param]


def one_row(kwargs, row):
    """The arguments for one text."""

    def of(value):
        if isinstance(value, dict):
            return {name: of(one) for name, one in value.items()}
        per_text = isinstance(value, torch.Tensor) and value is not VARIANTS["members"]["aux_scale"]
        return value[row : row + 1] if per_text else value

    return {name: of(value) for name, value in kwargs.items()}


def assert_same_scores(got, want):
    assert torch.equal(got.isfinite(), want.isfinite())
    assert_same_network(got[got.isfinite()], want[want.isfinite()])


# -- generate ----------------------------------------------------------------------------------------------------------


def test_greedy_equals_a_loop_without_cache(variant, tokens):
    model, kwargs = variant
    text, mask = padded(tokens, (9, 5, 2))
    want, steps = loop(model, text, mask, greedy, **kwargs)
    got = generate(model, text, mask, output_logits=True, **kwargs)
    assert torch.equal(got.sequences, want)
    assert_same_scores(torch.stack(got.logits, dim=1), steps)
    assert got.past_key_values.get_seq_length() == 9 + NEW - 1
    assert torch.equal(generate(model, text, mask, use_cache=False, **kwargs).sequences, want)


def test_greedy_equals_a_loop_of_plain_models(tokens):
    model, text = tiny_ensemble(("own", "trunk")), tokens
    with torch.no_grad():
        for _ in range(NEW):
            logits = eager_sum(model, text, (0.8, -1.5), base_scale=1.2)[:, -1]
            text = torch.cat([text, greedy(logits)], dim=1)
    got = generate(model, tokens, torch.ones_like(tokens), aux_scale={"a": 0.8, "b": -1.5}, base_scale=1.2)
    assert torch.equal(got.sequences, text)


def test_every_argument_changes_what_is_generated(tokens):
    model, (text, mask) = tiny_ensemble(("own", "trunk", "shared")), padded(tokens, (9, 9, 9))
    results = set()
    for name, kwargs in VARIANTS.items():
        model.config.base_floor = 0.9 if name == "floor" else None  # of the call: less
        results.add(generate(model, text, mask, **kwargs).sequences.numpy().tobytes())
    assert len(results) == len(VARIANTS)


def test_sampling_with_a_seed_equals_a_loop(variant, tokens):
    model, kwargs = variant
    text, mask = padded(tokens, (9, 5, 2))
    torch.manual_seed(7)
    want, _ = loop(model, text, mask, Draws(3, 9, temperature=0.7), **kwargs)
    torch.manual_seed(7)
    got = generate(model, text, mask, do_sample=True, temperature=0.7, top_k=0, **kwargs)
    assert torch.equal(got.sequences, want)


def beam_loop(model, tokens, mask, num_beams, **kwargs):
    """Beam search of one row without end of text, each beam by itself."""
    beams = [(0.0, tokens)]
    for _ in range(NEW):
        found = []
        for score, text in beams:
            full = torch.cat([mask, torch.ones(1, text.shape[1] - mask.shape[1], dtype=torch.long)], dim=1)
            best, ids = next_logits(model, text, full, **kwargs)[0].log_softmax(-1).topk(num_beams)
            found += [
                (score + float(one), torch.cat([text, i.view(1, 1)], dim=1)) for one, i in zip(best, ids, strict=True)
            ]
        beams = sorted(found, key=lambda each: -each[0])[:num_beams]
    return beams[0][1]


@pytest.mark.slow
def test_beams_equal_a_search_without_cache(variant, tokens):
    model, kwargs = variant
    text, mask = padded(tokens, (9, 5, 2))
    got = generate(model, text, mask, num_beams=3, **kwargs).sequences
    for row in range(3):
        want = beam_loop(model, text[row : row + 1], mask[row : row + 1], 3, **one_row(kwargs, row))
        assert torch.equal(got[row : row + 1], want)


@pytest.mark.parametrize("num_beams", [1, 4])
def test_several_returned_sequences_have_their_texts_arguments(num_beams, variant, tokens):
    model, kwargs = variant
    text, mask = padded(tokens, (9, 5, 2))
    options = {"num_beams": num_beams, "num_return_sequences": 2, "do_sample": num_beams == 1, "top_k": 1}
    options = options if num_beams == 1 else {**options, "top_k": None}
    got = generate(model, text, mask, **options, **kwargs).sequences
    assert got.shape[0] == 6
    if num_beams == 1:  # the likeliest token alone
        assert torch.equal(got, generate(model, text, mask, **kwargs).sequences.repeat_interleave(2, dim=0))


@pytest.mark.slow
def test_prompt_lookup_equals_greedy(variant):
    model, kwargs = variant
    kwargs = one_row(kwargs, 1)
    text = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    prompt, _ = loop(model, text, torch.ones_like(text), greedy, new=12, **kwargs)
    mask = torch.ones_like(prompt)
    want, _ = loop(model, prompt, mask, greedy, **kwargs)
    got = generate(model, prompt, mask, prompt_lookup_num_tokens=3, eos_token_id=VOCAB_SIZE + 1, **kwargs)
    assert torch.equal(got.sequences, want)


@pytest.mark.slow
@pytest.mark.parametrize("assistant", ["lm", "pair", "ensemble", "itself"])
def test_assistants_draft_and_the_ensemble_decides(assistant, variant, tokens):
    model, kwargs = variant
    kwargs, text = one_row(kwargs, 1), tokens[:1]
    drafts = {
        "lm": lambda: tiny_model("gpt2", seed=5),
        "pair": tiny_pair,
        "ensemble": lambda: tiny_ensemble(("own", "own"), names="xy"),
        "itself": lambda: model,
    }[assistant]()
    options = {"eos_token_id": VOCAB_SIZE + 1, **kwargs}
    want = generate(model, text, torch.ones_like(text), **options).sequences
    got = generate(model, text, torch.ones_like(text), assistant_model=drafts, **options).sequences
    assert torch.equal(got, want)


@pytest.mark.slow
@torch.no_grad()
def test_the_unconditional_branch_has_the_arguments_of_the_call(variant, tokens):
    model, kwargs = variant
    text, negative = tokens, tokens[:, -1:]
    for _ in range(NEW):
        scores, unconditional = (
            model(ids, use_cache=False, **given).logits[:, -1].log_softmax(-1)
            for ids, given in (
                (text, kwargs),
                (negative, {**kwargs, "base_floor": 0}),
            )  # differences of infinities: NaN
        )
        best = greedy(unconditional + 2.5 * (scores - unconditional))  # no floor twice: a difference of infinities
        text, negative = torch.cat([text, best], dim=1), torch.cat([negative, best], dim=1)
    got = generate(model, tokens, torch.ones_like(tokens), guidance_scale=2.5, **kwargs).sequences
    assert torch.equal(got, text)


def test_continuation_from_a_cache(variant, tokens):
    model, kwargs = variant
    text, mask = padded(tokens, (9, 5, 2))
    want, _ = loop(model, text, mask, greedy, new=2 * NEW, **kwargs)
    first = generate(model, text, mask, **kwargs)
    mask = torch.cat([mask, torch.ones(3, NEW, dtype=torch.long)], dim=1)
    dials = {name: value for name, value in kwargs.items() if name.endswith(("scale", "floor"))}
    second = generate(model, first.sequences, mask, past_key_values=first.past_key_values, **dials)  # holds prefixes
    assert torch.equal(second.sequences, want)


def test_batches_of_prefixes_begin_without_a_text():
    model = tiny_ensemble(("own", "trunk"))
    got = model.generate(aux_input_ids={"b": OTHER}, max_new_tokens=3, do_sample=False)
    want = model.generate(
        torch.ones(3, 1, dtype=torch.long), aux_input_ids={"b": OTHER}, max_new_tokens=3, do_sample=False
    )
    assert torch.equal(got, want) and got.shape[0] == 3


def test_floored_tokens_are_never_sampled(tokens):
    model = tiny_ensemble(("own", "trunk"), base_floor=0.5, aux_scales={"a": 5.0})
    got = model.generate(tokens, do_sample=True, top_k=0, max_new_tokens=NEW, eos_token_id=VOCAB_SIZE + 1)
    log_p = model.base(got).logits.log_softmax(-1)[:, 8:-1]
    chosen = log_p.gather(-1, got[:, 9:, None])[..., 0]
    assert (chosen >= math.log(0.5) + log_p.amax(-1) - 1e-4).all()


def test_ways_that_leave_the_arguments_out_are_refused(tokens):
    model = tiny_ensemble()
    for options, message in (
        ({"guidance_scale": 1.5, "num_beams": 2}, "guidance_scale needs greedy search or sampling"),
        ({"token_healing": True}, "token_healing must be off"),
        ({"cache_implementation": "quantized"}, "cache_implementation must be"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(tokens[:1], max_new_tokens=2, **options)
    with pytest.raises(ValueError, match="cannot batch continuously"):
        model.generate_batch(tokens.tolist(), max_new_tokens=2)


# -- the cache ---------------------------------------------------------------------------------------------------------

PREFIXES = VARIANTS["prefixes"]


def filled(model, tokens):
    return model(tokens, use_cache=True, **PREFIXES).past_key_values


def lengths(cache):
    return cache.get_seq_length(), *(pair.aux.get_seq_length() for pair in cache.pairs.values())


@pytest.fixture
def model():
    return tiny_ensemble(("own", "trunk", "shared"))


def test_crop_removes_text_once_and_keeps_the_prefixes(model, tokens):
    cache = filled(model, tokens)
    assert lengths(cache) == (9, 13, 11, 9)
    cache.crop(-4)
    assert lengths(cache) == (5, 9, 7, 5)
    want = model(tokens, **PREFIXES).logits[:, 5:]
    assert_same_network(model(tokens[:, 5:], past_key_values=cache).logits, want)
    cache.crop(-9)
    assert lengths(cache) == (0, 4, 2, 0)
    assert_same_network(model(tokens, past_key_values=cache, **PREFIXES).logits[:, 5:], want)


@pytest.mark.parametrize("change", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
def test_changes_of_the_batch_reach_each_cache_once_and_the_prefixes(model, change, tokens):
    rows = [0, 0, 1, 1, 2, 2] if change == "batch_repeat_interleave" else [2, 2, 0]
    want = model(tokens, **PREFIXES).logits[rows, 5:]
    cache = filled(model, tokens[:, :5])
    getattr(cache, change)(2 if change == "batch_repeat_interleave" else torch.tensor(rows))
    assert_same_network(model(tokens[rows, 5:], past_key_values=cache).logits, want)


@pytest.mark.parametrize("zeroes", [False, True])
def test_reset_empties_all(model, zeroes, tokens, monkeypatch):
    if zeroes:
        monkeypatch.setattr(DynamicLayer, "reset", CacheLayerMixin.reset)  # as in transformers 5.17
    cache = filled(model, tokens)
    cache.reset()
    assert lengths(cache) == (0, 0, 0, 0)
    assert_same_network(model(tokens, past_key_values=cache).logits, model(tokens).logits)


def test_the_cache_speaks_of_the_base(model):
    cache = model.new_cache()
    assert isinstance(cache, EnsembleCache) and not cache.is_compileable
    assert len(cache) == 2 and len(cache.layers) == 8 and len(cache.is_sliding) == 2
    assert cache.get_mask_sizes(3, 0) == (3, 0)
    assert all(pair.base is cache.base for pair in cache.pairs.values())
    with pytest.raises(TypeError, match=r"update \.base or"):
        cache.update(None, None, 0)
    with pytest.raises(ValueError, match="pairs must hold the base's cache"):
        EnsembleCache(cache.base, tiny_ensemble().new_cache().pairs)


@pytest.mark.parametrize(
    "wrong",
    [{"aux_scale": {"a": torch.ones(2)}}, {"aux_input_ids": {"b": OTHER[:2]}}, {"base_scale": torch.ones(2)}],
    ids=["scale", "prefix", "base scale"],
)
@pytest.mark.parametrize("past", [0, 5])
def test_refused_arguments_leave_the_cache_as_it_was(model, wrong, past, tokens):
    cache = filled(model, tokens[:, :past]) if past else model.new_cache()
    with pytest.raises(ValueError, match="must be"):
        model(tokens[:, past:], past_key_values=cache, **wrong)
    want = model(tokens, **PREFIXES).logits[:, past:]
    assert_same_network(model(tokens[:, past:], past_key_values=cache, **PREFIXES).logits, want)


@pytest.mark.parametrize(
    "part", ["base.model.layers.1", "members.a.aux.transformer.h.0", "members.c.aux.model.layers.1"]
)
def test_a_cache_that_a_failed_call_left_half_filled_is_refused_until_it_is_reset(model, part, tokens):
    cache = filled(model, tokens[:, :5])

    def fail(*args):
        raise MemoryError

    hook = model.get_submodule(part).register_forward_hook(fail)
    with pytest.raises(MemoryError):
        model(tokens[:, 5:], past_key_values=cache)
    hook.remove()
    with pytest.raises(ValueError, match="a call with this cache failed, begin again"):
        model(tokens[:, 5:], past_key_values=cache)
    cache.reset()
    assert_same_network(model(tokens, past_key_values=cache).logits, model(tokens).logits)


def test_caches_of_others_are_refused(model, tokens):
    with pytest.raises(TypeError, match="past_key_values must be an EnsembleCache"):
        model(tokens, past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match="past_key_values must be of the members a, b, c, got x, y"):
        model(tokens, past_key_values=tiny_ensemble(("own", "own"), names="xy").new_cache())


def test_models_without_a_cache_read_all_tokens_again(tokens):
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": VOCAB_SIZE}
    other = transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**sizes)).eval()
    members = {"a": tiny_model("gpt2", seed=3), "b": other}
    model = AuxiliaryEnsembleForCausalLM.from_members(tiny_model("llama"), members)
    want, _ = loop(model, tokens, torch.ones_like(tokens), greedy)
    assert torch.equal(generate(model, tokens, torch.ones_like(tokens)).sequences, want)
    with pytest.raises(ValueError, match="use_cache must be False: OpenAIGPTLMHeadModel has no cache"):
        model.new_cache()


@pytest.mark.parametrize("families", [("roberta", "llama"), ("llama", "roberta")], ids="-".join)
def test_positions_that_begin_behind_the_padding_token_are_those_of_training(families):
    base, aux = (family_model(family) for family in families)
    one = AuxiliaryForCausalLM.from_base_and_aux(base, aux, zero_init=False).eval()
    model = AuxiliaryEnsembleForCausalLM.from_members(base, {"a": one}).eval()
    tokens = torch.randint(3, 50, (2, 7))
    made = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, **GREEDY)
    for n in range(tokens.shape[1], made.shape[1]):
        assert torch.equal(one(made[:, :n], use_cache=False).logits[:, -1].argmax(-1), made[:, n])


GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
