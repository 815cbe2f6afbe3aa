"""What requests can ask for, and how the engine batches, caches and cuts them, changes no result."""

import random

import pytest
import torch
from engines import MANY, PROMPTS, check, generate, tokens
from pairs import SCALE, Sums
from vllm.exceptions import VLLMValidationError

NAME = "other-head-size"
SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 0.9}


@pytest.fixture(scope="module")
def sums(folder):
    return Sums(folder(NAME))


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 4},
        {"max_num_batched_tokens": 32, "enable_chunked_prefill": True},
        {"max_num_batched_tokens": 4096, "enable_chunked_prefill": False},
    ],
    ids=["more requests than slots", "prompts in chunks", "whole prompts"],
)
def test_batches_give_what_each_request_alone_gives(engines, folder, sums, options):
    check(generate(engines(folder(NAME), **options), MANY, logprobs=1), sums)


@pytest.mark.parametrize("is_on", [True, False])
@pytest.mark.parametrize("name", [NAME, "window-of-base"])
def test_prefix_caching_changes_nothing(engines, folder, is_on, name):
    shared = [1, *range(20, 116)]
    prompts = [[*shared, *tail] for tail in ([7], [9, 9], [11, 12, 13], [7, 8])]
    engine = engines(folder(name), enable_prefix_caching=is_on, block_size=32)
    generate(engine, prompts[:1], logprobs=1)
    outputs = generate(engine, prompts, [{"extra_args": {"aux_scale": s}} for s in (0.7, 2.0, 0.0, -1.0)], logprobs=1)
    assert all((one.num_cached_tokens > 0) == is_on for one in outputs)
    check(outputs, Sums(folder(name)), [0.7, 2.0, 0.0, -1.0])


def test_seeds_repeat_whatever_else_is_in_the_batch(engines, folder):
    engine = engines(folder(NAME))
    one, again, other = (tokens(generate(engine, PROMPTS, seed=seed, **SAMPLING)) for seed in (7, 7, 8))
    alone = tokens(generate(engine, PROMPTS[1:2], seed=7, **SAMPLING))
    assert one == again and one[1] == alone[0] and one != other


def test_each_request_has_its_own_scale(engines, folder, sums):
    numbers = random.Random(1)
    scales = [numbers.choice([0.0, 0.3, SCALE, 1.5, -2]) for _ in MANY]
    asked = [
        {"max_tokens": numbers.randrange(4, 24), "extra_args": None if scale == SCALE else {"aux_scale": scale}}
        for scale in scales
    ]
    assert len(set(scales)) == 5
    outputs = generate(engines(folder(NAME), max_num_seqs=4), MANY, asked, logprobs=2, prompt_logprobs=1)
    check(outputs, sums, scales)


@pytest.mark.parametrize("name", ["shared-head-behind-trunk", "low-rank-head"])
def test_other_heads_have_scales_too(engines, folder, name):
    scales = [0.0, 1.5, -1.0, SCALE]
    asked = [{"extra_args": {"aux_scale": scale}} for scale in scales]
    check(generate(engines(folder(name)), PROMPTS, asked, logprobs=2), Sums(folder(name)), scales)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"aux_scale": "big"}, "aux_scale must be a finite number, got 'big'"),
        ({"aux_scale": True}, "aux_scale must be a finite number, got True"),
        ({"aux_scale": float("nan")}, "aux_scale must be a finite number, got nan"),
        ({"aux_scale": float("inf")}, "aux_scale must be a finite number, got inf"),
        ({"aux_scale": 1e39}, "aux_scale must be in the range of float32"),
        ({"aux_input_ids": [5, 6]}, "the auxiliary has no prefix of its own"),
        ({"aux_scales": 1.0}, "a request can have aux_scale alone, got aux_scales"),
    ],
)
def test_a_wrong_argument_is_refused_and_the_engine_goes_on(engines, folder, sums, given, message):
    engine = engines(folder(NAME))
    with pytest.raises(VLLMValidationError, match=message):
        generate(engine, PROMPTS[:1], extra_args=given)
    check(generate(engine, PROMPTS[1:2], logprobs=1, max_tokens=2), sums)


def test_in_bfloat16_errors_are_those_of_transformers_in_bfloat16(engines, folder):
    """In the same dtype, rounded at other places: the mean error may be a quarter larger."""
    scale = 2.1
    engine = engines(folder(NAME), dtype="bfloat16")
    outputs = generate(engine, MANY, max_tokens=1, prompt_logprobs=1, extra_args={"aux_scale": scale})
    half, found, expected = Sums(folder(NAME), dtype=torch.bfloat16), [], []
    exact_sums = Sums(folder(NAME))
    for one in outputs:
        text = list(one.prompt_token_ids)
        exact, _ = exact_sums.log_probs(text, scale)
        rounded = half._of(half.own, text, scale)
        for n, row in enumerate(one.prompt_logprobs):
            for token, got in (row or {}).items():
                found.append(abs(got.logprob - exact[n - 1, token].item()))
                expected.append(abs(rounded[n - 1, token] - exact[n - 1, token]).item())
    assert len(found) > 1000
    assert sum(found) <= 1.25 * sum(expected)


def test_compiled_models_give_the_same(engines, folder):
    name, scales = "trunk-2", [SCALE, 0.0, 2.0, -1.0]
    engine = engines(folder(name), enforce_eager=False)
    asked = [{"extra_args": {"aux_scale": scale}} for scale in scales]
    check(generate(engine, PROMPTS, asked, logprobs=2, prompt_logprobs=1), Sums(folder(name)), scales)
