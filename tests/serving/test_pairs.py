"""Greedy tokens and log-probabilities of every kind of pair are those of plain sums of transformers' logits."""

import pytest
from engines import PROMPTS, check, generate
from pairs import PAIRS, Sums


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_gives_the_plain_sums_tokens_and_log_probabilities(engines, folder, name):
    outputs = generate(engines(folder(name)), PROMPTS, logprobs=5, prompt_logprobs=2)
    check(outputs, Sums(folder(name)))
