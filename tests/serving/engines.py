"""One engine at a time, in this process, and what it gave compared with plain sums."""

import gc
import random

import pytest
import torch
from pairs import SCALE, Sums

vllm = pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 16,
    "num_gpu_blocks_override": 256,  # else a whole GiB is filled with zeros
    "skip_tokenizer_init": True,
    "seed": 0,
}
_numbers = random.Random(0)
# of one token to several blocks, and beyond the windows
LENGTHS = (1, 3, 20, 71)
PROMPTS = [[1, *(_numbers.randrange(3, 480) for _ in range(n - 1))] for n in LENGTHS]
MANY = [
    [1, *(_numbers.randrange(3, 480) for _ in range(n))]
    for n in (2, 5, 9, 30, 33, 64, 65, 100, 127, 128, 129, 150, 17, 1, 40, 90)
]


class Engines:
    """The engine last asked for: the one before it must be gone, or its end takes the next one's groups along."""

    def __init__(self) -> None:
        self._asked, self._engine = None, None

    def __call__(self, folder, **options) -> vllm.LLM:
        asked = (str(folder), repr(sorted(options.items())))
        if asked != self._asked:
            self.close()
            self._engine = vllm.LLM(model=str(folder), **{**ENGINE, **options})
            self._asked = asked
        return self._engine

    def close(self) -> None:
        self._asked = self._engine = None
        gc.collect()
        gc.freeze()  # vLLM collects often, and what is imported is most of what there is to look at


def generate(engine: vllm.LLM, prompts, params=None, **common):
    """params: of each prompt, over those that all have."""
    common = {"temperature": 0, "max_tokens": 24, "ignore_eos": True, "detokenize": False, **common}
    made = [vllm.SamplingParams(**{**common, **one}) for one in (params or [{}] * len(prompts))]
    return engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], made, use_tqdm=False)


def tokens(outputs) -> list[list[int]]:
    return [list(one.outputs[0].token_ids) for one in outputs]


def check(outputs, sums: Sums, scales=None) -> None:
    """Greedy outputs with log-probabilities are those of plain sums; scales: of each output.

    The error may be four times that of transformers in the same dtype, and a token another one where that decides.
    """
    for i, output in enumerate(outputs):
        prompt, answer = list(output.prompt_token_ids), output.outputs[0]
        text, scale = prompt + list(answer.token_ids), SCALE if scales is None else scales[i]
        exact, error = sums.log_probs(text, scale)
        bound = 4 * error + 8 * torch.finfo(torch.float32).eps
        if i == 0:  # where another scale gave the same, nothing would be shown
            assert (exact - sums.log_probs(text, scale + 1)[0]).abs().max() > 100 * bound
        rows = [(n - 1, row) for n, row in enumerate(output.prompt_logprobs or []) if row]
        rows += [(len(prompt) + n - 1, row) for n, row in enumerate(answer.logprobs)]
        for n, row in rows:
            for token, found in row.items():
                assert abs(found.logprob - exact[n, token].item()) <= bound, (i, n, token, bound)
        for n, token in enumerate(answer.token_ids):
            row = exact[len(prompt) + n - 1]
            assert row.max() - row[token] <= 2 * bound, (i, n)
