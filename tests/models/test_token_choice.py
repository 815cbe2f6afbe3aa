"""`generate` chooses tokens from the sum's sources where a call allows it: by the same rules, from the same sums."""

import itertools

import pytest
import torch

transformers = pytest.importorskip("transformers")

from ensembles import tiny_ensemble  # noqa: E402
from generation import NEW, generate, padded  # noqa: E402
from scipy.stats import chisquare  # noqa: E402
from tiny import VOCAB_SIZE, tiny_pair  # noqa: E402

from auxkernels.models.token_choice import TokenChoice, sampling_options  # noqa: E402

WARPERS = {
    "temperature": {"top_k": 0},
    "top-k": {"top_k": 5},
    "top-p": {"top_k": 0, "top_p": 0.6},
    "min-p": {"top_k": 0, "min_p": 0.2},
    "all": {"top_k": 20, "top_p": 0.8, "min_p": 0.1, "renormalize_logits": True},
}
FALLBACKS = {
    "beams": {"num_beams": 2},
    "penalty": {"repetition_penalty": 1.3},
    "typical": {"do_sample": True, "typical_p": 0.5},
    "a processor": {"logits_processor": [transformers.SuppressTokensLogitsProcessor([3])], "do_sample": True},
    "scores": {"output_scores": True},
    "logits": {"output_logits": True},
    "hidden states": {"output_hidden_states": True},
    "guidance": {"guidance_scale": 1.5},
    "minimum length": {"min_new_tokens": 3, "eos_token_id": 2},
    "filter value": {"do_sample": True, "top_k": 4, "logits_processor": [transformers.TopKLogitsWarper(9, -1e4)]},
}


@pytest.fixture
def chosen(monkeypatch):
    """The positions of which `TokenChoice` was asked."""
    positions, choose = [], TokenChoice.__call__

    def counted(self, *args):
        positions.append(self.position)
        return choose(self, *args)

    monkeypatch.setattr(TokenChoice, "__call__", counted)
    return positions


@pytest.fixture(params=["float32", "bfloat16", "ensemble", "ensemble with a floor"])
def model(request):
    if request.param.startswith("ensemble"):
        made = tiny_ensemble(("own", "trunk", "shared" if request.param == "ensemble" else "own"))
        made.config.base_floor = 1e-6 if request.param == "ensemble with a floor" else None
        return made
    return tiny_pair().to(getattr(torch, request.param))


@pytest.mark.parametrize("name", WARPERS)
def test_draws_have_the_distribution_of_the_warped_scores(name, tokens, model, chosen):
    prompt, draws = tokens[:1], 3000
    options = {"do_sample": True, "temperature": 20.0, **WARPERS[name]}  # which makes several tokens likely
    scores = generate(model, prompt, torch.ones_like(prompt), max_new_tokens=1, output_scores=True, **options).scores
    assert chosen == []
    out = generate(model, prompt, torch.ones_like(prompt), max_new_tokens=1, num_return_sequences=draws, **options)
    assert chosen == [prompt.shape[1]]
    p = scores[0][0].softmax(-1).double()
    assert (draws * p >= 5).sum() > 1
    counts = out.sequences[:, -1].bincount(minlength=VOCAB_SIZE).double()
    assert counts[p == 0].sum() == 0
    rare = draws * p < 5  # too few of them each for the statistic
    observed, expected = counts[~rare], draws * p[~rare]
    if rare.any() and draws * p[rare].sum() >= 5:
        observed, expected = (
            torch.cat([a, b[rare].sum()[None]]) for a, b in ((observed, counts), (expected, draws * p))
        )
    expected *= observed.sum() / expected.sum()
    assert chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-4


def test_greedy_tokens_are_those_of_the_logits(tokens, model, chosen):
    text, mask = padded(tokens, (9, 5, 2))
    want = generate(model, text, mask, output_logits=True, eos_token_id=[3, 5, 7], pad_token_id=0)
    assert chosen == []
    got = generate(model, text, mask, eos_token_id=[3, 5, 7], pad_token_id=0)
    assert torch.equal(got.sequences, want.sequences)
    assert chosen == list(range(9, got.sequences.shape[1]))


@pytest.mark.parametrize("name", FALLBACKS)
def test_a_call_that_needs_logits_is_transformers_own(name, tokens, chosen):
    options = {**FALLBACKS[name]}
    if "logits_processor" in options:
        options["logits_processor"] = transformers.LogitsProcessorList(options["logits_processor"])
    generate(tiny_pair(), tokens, torch.ones_like(tokens), **options)
    assert chosen == []


def test_processors_that_are_not_in_transformers_order_are_not_taken_for_it():
    top_k, top_p = transformers.TopKLogitsWarper(5), transformers.TopPLogitsWarper(0.5)
    assert sampling_options(transformers.LogitsProcessorList([top_k, top_p]), True) == {"top_k": 5, "top_p": 0.5}
    assert sampling_options(transformers.LogitsProcessorList([top_p, top_k]), True) is None
    assert sampling_options(transformers.LogitsProcessorList([top_k, top_k]), True) is None
    kept = transformers.TopPLogitsWarper(0.5, min_tokens_to_keep=2)
    assert sampling_options(transformers.LogitsProcessorList([kept]), True) is None


def test_stops_pads_streams_and_returns_as_before(tokens, chosen):
    model, mask = tiny_pair(), torch.ones_like(tokens)
    free = generate(model, tokens, mask).sequences
    end = int(free[0, -3])  # of the first text the third to last, of the others perhaps none
    first = (free[:, 9:] == end).int().argmax(1) + 10
    got = generate(model, tokens, mask, eos_token_id=end, pad_token_id=0).sequences
    for row in range(3):
        stop = int(first[row]) if (free[row, 9:] == end).any() else free.shape[1]
        assert torch.equal(got[row, :stop], free[row, :stop][: got.shape[1]])
        assert not got[row, stop:].any()

    class Streamer(transformers.generation.streamers.BaseStreamer):
        def __init__(self):
            self.parts, self.is_ended = [], False

        def put(self, value):
            self.parts.append(value.reshape(-1).tolist())

        def end(self):
            self.is_ended = True

    streamer = Streamer()
    one = model.generate(tokens[:1], attention_mask=mask[:1], max_new_tokens=NEW, streamer=streamer, eos_token_id=None)
    assert list(itertools.chain(*streamer.parts)) == one[0].tolist() and streamer.is_ended
    assert isinstance(one, torch.Tensor)

    class AfterTwo(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= tokens.shape[1] + 2)

    criteria = transformers.StoppingCriteriaList([AfterTwo()])
    assert generate(model, tokens, mask, stopping_criteria=criteria).sequences.shape[1] == tokens.shape[1] + 2
    static = generate(model, tokens, mask, cache_implementation="static").sequences
    assert torch.equal(static, free)
    uncached = generate(model, tokens, mask, use_cache=False).sequences
    assert torch.equal(uncached, free)
    assert len(chosen) >= 4 * NEW


def test_sampled_texts_differ_and_follow_from_torchs_generator(tokens):
    model, prompt = tiny_pair(), tokens[:1]
    mask = torch.ones_like(prompt)

    def drawn():
        return generate(model, prompt, mask, do_sample=True, top_k=0, num_return_sequences=4).sequences

    torch.manual_seed(1)
    first = drawn()
    assert len({tuple(row) for row in first.tolist()}) == 4
    assert not torch.equal(drawn(), first)
    torch.manual_seed(1)
    assert torch.equal(drawn(), first)


def test_what_looks_for_logits_gets_them(tokens, chosen):
    model, mask = tiny_pair(), torch.ones_like(tokens)

    def prefer_seven(module, args, output):
        output.logits[..., 7] = 1e6

    handle = model.register_forward_hook(prefer_seven)
    assert (generate(model, tokens, mask).sequences[:, 9:] == 7).all() and chosen == []
    handle.remove()

    class Own(type(model)):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
            output = super().forward(input_ids, attention_mask, position_ids, past_key_values, **kwargs)
            output.logits[..., 5] = 1e6
            return output

    model.__class__ = Own
    assert (generate(model, tokens, mask).sequences[:, 9:] == 5).all() and chosen == []


def test_dials_of_integers_are_those_of_numbers(tokens):
    model, mask = tiny_pair(), torch.ones_like(tokens)
    want = generate(model, tokens, mask, aux_scale=torch.tensor([1.0, 2.0, 0.0])).sequences
    assert torch.equal(generate(model, tokens, mask, aux_scale=torch.tensor([1, 2, 0])).sequences, want)


def test_a_text_that_has_ended_does_not_end_the_others(tokens):
    model, mask = tiny_pair(aux="llama"), torch.ones_like(tokens)
    free = generate(model, tokens, mask).sequences
    padding = next(token for token in range(VOCAB_SIZE) if not (free == token).any())
    options = {"eos_token_id": int(free[0, 9]), "pad_token_id": padding}
    with torch.no_grad():
        model.aux.get_input_embeddings().weight[padding] = torch.nan  # read behind the ends of texts alone
    want = generate(model, tokens, mask, output_logits=True, **options).sequences
    assert want.shape[1] > 10 and (want[0, 10:] == padding).all()
    assert torch.equal(generate(model, tokens, mask, **options).sequences, want)


def test_logits_without_a_largest_one_are_an_error(tokens):
    model = tiny_pair()
    with torch.no_grad():
        model.aux.get_output_embeddings().weight.fill_(torch.nan)
    for do_sample in (False, True):
        with pytest.raises(ValueError, match="text 0, 1, 2: NaN"):
            generate(model, tokens, torch.ones_like(tokens), do_sample=do_sample)
