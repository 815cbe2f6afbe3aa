"""`AuxiliaryForCausalLM.generate` against loops that use no cache, and the paired cache itself."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from generation import NEW, Draws, generate, greedy, loop, next_logits, padded  # noqa: E402
from network import assert_same_network  # noqa: E402
from tiny import PAIRS, VOCAB_SIZE, tiny_pair  # noqa: E402
from transformers.cache_utils import CacheLayerMixin, DynamicLayer  # noqa: E402

from auxkernels.models import PairedCache  # noqa: E402

PREFIX = torch.tensor([[7, 9, 11, 13], [0, 0, 21, 23], [0, 31, 33, 35]])
PREFIX_MASK = (PREFIX != 0).long()
VARIANTS = {
    "plain": ({}, {}),
    "prefix": ({}, {"aux_input_ids": PREFIX, "aux_attention_mask": PREFIX_MASK}),
    "trunk": ({"trunk_layer": 1}, {}),
    "trunk and prefix": ({"trunk_layer": 2}, {"aux_input_ids": PREFIX, "aux_attention_mask": PREFIX_MASK}),
    "scale": ({}, {"aux_scale": torch.tensor([0.0, 0.5, 2.0])}),
}


@pytest.fixture(params=VARIANTS)
def variant(request):
    return VARIANTS[request.param]


@pytest.mark.parametrize("base, aux", PAIRS)
@pytest.mark.parametrize("lengths", [(9, 9, 9), (9, 5, 1)], ids=["full", "left-padded"])
def test_greedy_equals_a_loop_without_cache(base, aux, lengths, variant, tokens):
    options, kwargs = variant
    model = tiny_pair(base, aux, **options)
    text, mask = padded(tokens, lengths)
    want, steps = loop(model, text, mask, greedy, **kwargs)
    got = generate(model, text, mask, output_logits=True, **kwargs)
    assert torch.equal(got.sequences, want)
    assert_same_network(torch.stack(got.logits, dim=1), steps)
    assert got.past_key_values.get_seq_length() == 9 + NEW - 1


def test_every_input_of_the_auxiliary_changes_what_is_generated(tokens):
    text, mask = padded(tokens, (9, 9, 9))
    results = set()
    for options, kwargs in VARIANTS.values():
        results.add(generate(tiny_pair(**options), text, mask, **kwargs).sequences.numpy().tobytes())
    assert len(results) == len(VARIANTS)


def test_sampling_with_a_seed_equals_a_loop(variant, tokens):
    options, kwargs = variant
    model = tiny_pair(**options)
    text, mask = padded(tokens, (9, 5, 2))
    torch.manual_seed(7)
    want, _ = loop(model, text, mask, Draws(3, 9, temperature=0.7), **kwargs)
    torch.manual_seed(7)
    got = generate(model, text, mask, do_sample=True, temperature=0.7, top_k=0, **kwargs)
    assert torch.equal(got.sequences, want)


def beam_loop(model, tokens, mask, num_beams, **kwargs):
    """Beam search of one row without end of text: at every step the best `num_beams` continuations of all."""
    scores = torch.zeros(1)
    beams = tokens
    for _ in range(NEW):
        n = len(beams)
        expanded = {name: value.expand(n, *value.shape[1:]) for name, value in kwargs.items()}
        full = torch.cat([mask.expand(n, -1), torch.ones(n, beams.shape[1] - mask.shape[1], dtype=torch.long)], dim=1)
        total = scores[:, None] + next_logits(model, beams, full, **expanded).log_softmax(-1)
        scores, flat = total.flatten().topk(num_beams)
        beams = torch.cat([beams[flat // VOCAB_SIZE], (flat % VOCAB_SIZE)[:, None]], dim=1)
    return beams[:1]


def test_beams_equal_a_search_without_cache(variant, tokens):
    options, kwargs = variant
    model = tiny_pair(**options)
    text, mask = padded(tokens, (9, 5, 2))
    got = generate(model, text, mask, num_beams=3, **kwargs).sequences
    for row in range(3):
        own = {name: value[row : row + 1] for name, value in kwargs.items()}
        assert torch.equal(got[row : row + 1], beam_loop(model, text[row : row + 1], mask[row : row + 1], 3, **own))


@pytest.mark.parametrize("num_beams", [1, 4])
def test_several_returned_sequences(num_beams, tokens):
    model = tiny_pair()
    torch.manual_seed(3)
    got = model.generate(
        tokens,
        do_sample=num_beams == 1,
        num_beams=num_beams,
        num_return_sequences=2,
        max_new_tokens=3,
        aux_scale=torch.tensor([1.0, 0.0, 2.0]),
        aux_input_ids=PREFIX,
        aux_attention_mask=PREFIX_MASK,
    )
    assert got.shape[0] == 6


@pytest.mark.slow
@pytest.mark.parametrize("base, aux", PAIRS)
def test_prompt_lookup_equals_greedy(base, aux, variant):
    options, kwargs = variant
    kwargs = {name: value[:1] for name, value in kwargs.items()}
    model = tiny_pair(base, aux, **options)
    text = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    mask = torch.ones_like(text)
    for prompt in (text, loop(model, text, mask, greedy, new=20, **kwargs)[0]):  # the second repeats itself sooner
        mask = torch.ones_like(prompt)
        want, _ = loop(model, prompt, mask, greedy, new=12, **kwargs)
        got = model.generate(
            prompt, attention_mask=mask, prompt_lookup_num_tokens=3, max_new_tokens=12, do_sample=False,
            eos_token_id=VOCAB_SIZE + 1, **kwargs,
        )  # fmt: skip
        assert torch.equal(got, want)


@pytest.mark.parametrize("prefill_chunk_size", [None, 3])
def test_continuation_from_a_cache(variant, prefill_chunk_size, tokens):
    options, kwargs = variant
    model = tiny_pair(**options)
    text, mask = padded(tokens, (9, 5, 2))
    want, _ = loop(model, text, mask, greedy, new=2 * NEW, **kwargs)
    first = generate(model, text, mask, prefill_chunk_size=prefill_chunk_size, **kwargs)
    mask = torch.cat([mask, torch.ones(3, NEW, dtype=torch.long)], dim=1)
    scale = {name: value for name, value in kwargs.items() if name == "aux_scale"}  # the prefix is in the cache
    second = generate(model, first.sequences, mask, past_key_values=first.past_key_values, **scale)
    assert torch.equal(second.sequences, want)


def test_generation_without_a_cache(variant, tokens):
    options, kwargs = variant
    model = tiny_pair(**options)
    text, mask = padded(tokens, (9, 5, 2))
    with_cache, without = (generate(model, text, mask, use_cache=use, **kwargs).sequences for use in (True, False))
    assert torch.equal(with_cache, without)


def test_end_of_text_and_padding_are_the_bases(tokens):
    model = tiny_pair()
    model.generation_config.eos_token_id = int(next_logits(model, tokens, torch.ones_like(tokens))[0].argmax())
    got = model.generate(tokens, max_new_tokens=4, do_sample=False)
    assert got[0, 10:].eq(0).all() and model.generation_config.pad_token_id == 0


def test_foreign_caches_are_refused(tokens):
    with pytest.raises(TypeError, match="past_key_values must be a PairedCache"):
        tiny_pair().generate(tokens, max_new_tokens=2, past_key_values=transformers.DynamicCache())


# -- the cache ---------------------------------------------------------------------------------------------------------


def filled(model, tokens):
    return model(tokens, aux_input_ids=PREFIX, aux_attention_mask=PREFIX_MASK, use_cache=True).past_key_values


def test_crop_removes_text_and_keeps_the_prefix(pair, tokens):
    cache = filled(pair, tokens)
    cache.crop(-4)
    assert (cache.get_seq_length(), cache.aux.get_seq_length(), cache.prefix_length) == (5, 9, 4)
    want = pair(tokens, aux_input_ids=PREFIX, aux_attention_mask=PREFIX_MASK).logits[:, 5:]
    assert_same_network(pair(tokens[:, 5:], past_key_values=cache).logits, want)
    cache.crop(-9)
    assert (cache.get_seq_length(), cache.aux.get_seq_length()) == (0, 4)
    again = pair(tokens, past_key_values=cache, aux_input_ids=PREFIX, aux_attention_mask=PREFIX_MASK).logits
    assert_same_network(again[:, 5:], want)


@pytest.mark.parametrize("change", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
def test_changes_of_the_batch_reach_both_caches_and_the_prefix(pair, change, tokens):
    rows = [0, 0, 1, 1, 2, 2] if change == "batch_repeat_interleave" else [2, 2, 0]
    want = pair(tokens, aux_input_ids=PREFIX, aux_attention_mask=PREFIX_MASK).logits[rows, 5:]
    cache = filled(pair, tokens[:, :5])
    getattr(cache, change)(2 if change == "batch_repeat_interleave" else torch.tensor(rows))
    assert_same_network(pair(tokens[rows, 5:], past_key_values=cache).logits, want)


def test_reset_empties_both_caches(tokens):
    model = tiny_pair()
    cache = filled(model, tokens)
    cache.reset()
    assert (cache.get_seq_length(), cache.aux.get_seq_length(), cache.prefix_length) == (0, 0, 0)
    assert_same_network(model(tokens, past_key_values=cache).logits, model(tokens).logits)


def test_reset_empties_layers_that_transformers_only_zeroes(monkeypatch, tokens):
    monkeypatch.setattr(DynamicLayer, "reset", CacheLayerMixin.reset)  # as in transformers 5.17
    model = tiny_pair()
    cache = filled(model, tokens)
    cache.reset()
    assert (cache.get_seq_length(), cache.aux.get_seq_length()) == (0, 0)
    torch.testing.assert_close(model(tokens, past_key_values=cache).logits, model(tokens).logits)


def test_cache_speaks_of_the_base():
    model = tiny_pair(aux_options={"layers": 3})
    cache = model.new_cache()
    assert isinstance(cache, PairedCache) and not cache.is_compileable
    assert len(cache) == 2 and len(cache.layers) == 5 and len(cache.is_sliding) == 2
    assert cache.get_mask_sizes(3, 0) == (3, 0)
    with pytest.raises(TypeError, match=r"update \.base or \.aux"):
        cache.update(None, None, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"aux_scale": torch.ones(2)},
        {"aux_input_ids": PREFIX[:2]},
        {"aux_input_ids": PREFIX, "aux_attention_mask": PREFIX_MASK, "attention_mask": torch.ones(3, 2)},
        {"aux_input_ids": PREFIX, "aux_attention_mask": PREFIX_MASK[:, 1:]},
    ],
    ids=["scale", "prefix", "attention mask", "prefix mask"],
)
@pytest.mark.parametrize("past", [0, 5])
def test_refused_arguments_leave_the_cache_as_it_was(wrong, past, tokens):
    model = tiny_pair()
    prefix = {"aux_input_ids": PREFIX, "aux_attention_mask": PREFIX_MASK}
    cache = filled(model, tokens[:, :past]) if past else model.new_cache()
    with pytest.raises(ValueError, match="must be"):
        model(tokens[:, past:], past_key_values=cache, **wrong)
    want = model(tokens, **prefix).logits[:, past:]
    assert_same_network(model(tokens[:, past:], past_key_values=cache, **prefix).logits, want)


@pytest.mark.parametrize(
    "part", ["base.model.layers.0", "base.model.layers.1", "aux.transformer.h.0", "aux.transformer.h.1"]
)
@pytest.mark.parametrize("past", [0, 5])
def test_a_cache_that_a_failed_call_left_half_filled_is_refused_until_it_is_reset(part, past, tokens):
    model = tiny_pair("llama", "gpt2")
    cache = filled(model, tokens[:, :past]) if past else model.new_cache()

    def fail(*args):
        raise MemoryError

    prefix = {} if past else {"aux_input_ids": PREFIX, "aux_attention_mask": PREFIX_MASK}
    hook = model.get_submodule(part).register_forward_hook(fail)
    with pytest.raises(MemoryError):
        model(tokens[:, past:], past_key_values=cache, **prefix)
    hook.remove()
    with pytest.raises(ValueError, match="a call with this cache failed, begin again"):
        model(tokens[:, past:], past_key_values=cache, **prefix)
    cache.reset()
    assert_same_network(model(tokens, past_key_values=cache).logits, model(tokens).logits)


def test_a_cache_that_one_model_alone_read_into_is_refused(tokens):
    model = tiny_pair()
    cache = filled(model, tokens)
    model.base(tokens, past_key_values=cache.base)
    with pytest.raises(ValueError, match="got 18 tokens for base and 13 for aux behind a prefix of 4"):
        model(tokens, past_key_values=cache)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_scale_without_dimensions_is_a_number_in_generation(num_beams, tokens):
    model = tiny_pair()
    text, mask = padded(tokens, (9, 5, 2))
    got, want = (
        generate(model, text, mask, num_beams=num_beams, aux_scale=scale).sequences
        for scale in (torch.tensor(0.5), 0.5)
    )
    assert torch.equal(got, want)
