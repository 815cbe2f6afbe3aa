"""Which vocabularies may be added."""

import pathlib

import pytest

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from tiny import tiny_model  # noqa: E402

from auxkernels.models import AuxiliaryForCausalLM  # noqa: E402
from auxkernels.models.vocabulary import shared_width  # noqa: E402


def folder_of(path, architecture, words, vocab_size):
    tiny_model(architecture, vocab_size=vocab_size).save_pretrained(path)
    if words is not None:
        model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model))
        tokenizer.save_pretrained(path)
    return str(path)


WORDS = ["?", "a", "b", "c", "d"]


@pytest.mark.parametrize("policy", ["strict", "pad"])
@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_tokenizers_with_other_tokens_are_an_error(tmp_path, policy, kind):
    base = folder_of(tmp_path / "base", "llama", WORDS, 8)
    aux = folder_of(tmp_path / "aux", "gpt2", ["?", "a", "c", "b", "d"], 8)
    with pytest.raises(ValueError, match=r"got 'b' in .*base and 'c' in .*aux for token 2"):
        AuxiliaryForCausalLM.from_base_and_aux(kind(base), kind(aux), vocab_policy=policy)


@pytest.mark.parametrize("words", [WORDS, [*WORDS, "extra"], None], ids=["equal", "longer", "no tokenizer"])
def test_tokenizers_that_agree_or_are_not_there_pass(tmp_path, words):
    base = folder_of(tmp_path / "base", "llama", WORDS, 8)
    aux = folder_of(tmp_path / "aux", "gpt2", words, 8)
    model = AuxiliaryForCausalLM.from_base_and_aux(base, aux)
    assert model.config.base_name_or_path == base


def test_shared_width():
    assert shared_width(8, 8, "strict") == shared_width(8, 9, "pad") == shared_width(9, 8, "pad") == 8
    with pytest.raises(ValueError, match="got 8 and 9: where the wider one's tail is padding, pass vocab_policy='pad'"):
        shared_width(8, 9, "strict")
