"""`python -m auxkernels.models.base_cache`, and the rows that it makes of texts."""

import pytest
import torch

pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

import transformers  # noqa: E402
from tiny import tiny_model  # noqa: E402

from auxkernels.models import BaseCache  # noqa: E402
from auxkernels.models.base_cache import rows_of_texts, tokenizer_fingerprint  # noqa: E402
from auxkernels.models.base_cache.command import main  # noqa: E402

WORDS = ["<pad>", "<end>", *"abcdefghij"]
TEXTS = ["a b c d e f g", "h", "i j a b\nc d", ""]


def word_tokenizer():
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<end>")


def words_of(rows):
    return [" ".join(WORDS[i] for i in row["input_ids"]) for row in rows]


# -- rows --------------------------------------------------------------------------------------------------------------


def test_texts_are_cut_into_rows_of_their_own():
    rows = rows_of_texts(TEXTS, word_tokenizer(), 4)
    assert words_of(rows) == ["a b c d", "e f g <end>", "h <end>", "i j a b", "c d <end>"]
    assert all(row.keys() == {"input_ids"} for row in rows)


def test_a_row_of_a_single_token_is_dropped():
    assert words_of(rows_of_texts(["a b c d", "h"], word_tokenizer(), 4)) == ["a b c d", "h <end>"]


def test_packed_texts_fill_their_rows_and_count_anew():
    rows = rows_of_texts(TEXTS, word_tokenizer(), 5, is_packed=True)
    assert words_of(rows) == ["a b c d e", "f g <end> h <end>", "i j a b c", "d <end>"]
    assert [row["position_ids"].tolist() for row in rows] == [
        [0, 1, 2, 3, 4],
        [0, 1, 2, 0, 1],
        [0, 1, 2, 3, 4],
        [0, 1],
    ]


def test_an_end_that_the_tokenizer_has_put_is_not_put_twice():
    tokenizer = word_tokenizer()
    single = "$A <end>"
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=[("<end>", 1)]
    )
    assert words_of(rows_of_texts(["a b"], tokenizer, 8)) == ["a b <end>"]


def test_what_no_rows_can_be_made_of_is_refused():
    with pytest.raises(ValueError, match="max_length must be at least 2, got 1"):
        rows_of_texts(TEXTS, word_tokenizer(), 1)
    for is_packed in (False, True):
        with pytest.raises(ValueError, match="texts must have at least two tokens"):
            rows_of_texts(["", ""], word_tokenizer(), 4, is_packed=is_packed)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    tiny_model("llama", seed=1, width=24, vocab_size=len(WORDS)).to(torch.bfloat16).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{k}.txt" for k in range(len(TEXTS))]
    for path, text in zip(paths, TEXTS, strict=True):
        path.write_text(text, encoding="utf-8")
    return list(map(str, paths))


def test_text_files_are_written(base, files, tmp_path, capsys):
    folder = str(tmp_path / "cache")
    assert main([folder, "--base", base, "--texts", *files, "--max-length", "4", "--trunk-layers", "0", "-1"]) == 0
    assert f"{folder}: 5 examples, 17 tokens of" in capsys.readouterr().out
    cache = BaseCache.open(folder, tokenizer=word_tokenizer(), dtype="bfloat16", verify=True)
    assert words_of(cache) == words_of(rows_of_texts(TEXTS, word_tokenizer(), 4))
    assert cache.trunk_layers == [0, 2] and cache.manifest.base["name_or_path"] == base
    assert cache.manifest.tokenizer == tokenizer_fingerprint(transformers.AutoTokenizer.from_pretrained(base))
    assert main([folder, "--base", base, "--texts", *files, "--max-length", "4", "--trunk-layers", "0", "-1"]) == 0
    with pytest.raises(ValueError, match="holds a cache with another data"):
        main([folder, "--base", base, "--texts", files[0], "--max-length", "4", "--trunk-layers", "0", "-1"])


def test_lines_can_be_texts_and_rows_packed(base, files, tmp_path):
    options = [
        "--lines",
        "--packed",
        "--max-length",
        "6",
        "--no-lse",
        "--dtype",
        "float32",
        "--batch-size",
        "2",
        "--autocast",
        "bfloat16",
    ]
    main([str(tmp_path / "cache"), "--base", base, "--tokenizer", base, "--texts", *files, *options])
    cache = BaseCache.open(tmp_path / "cache", is_packed=True, dtype="float32")
    assert words_of(cache) == ["a b c d e f", "g <end> h <end> i j", "a b <end> c d <end>"]
    assert "base_lse" not in cache[0] and cache.manifest.batch_size == 2 and cache.manifest.autocast == "bfloat16"


def test_a_dry_run_says_the_size_and_writes_nothing(base, files, tmp_path, capsys):
    main([str(tmp_path / "cache"), "--base", base, "--texts", *files, "--dry-run"])
    assert "MB in 1 shards" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("column", ["text", "input_ids"])
def test_a_data_set_is_written(base, column, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = rows_of_texts(TEXTS, word_tokenizer(), 64)
    columns = {"text": [*TEXTS[:3]]} if column == "text" else {"input_ids": [row["input_ids"].tolist() for row in rows]}
    data = datasets.Dataset.from_dict(columns)
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "data")
    main([str(tmp_path / "cache"), "--base", base, "--dataset", str(tmp_path / "data"), "--column", column])
    cache = BaseCache.open(tmp_path / "cache", data=rows)
    assert words_of(cache) == words_of(rows)


def test_texts_or_a_data_set_must_be_given(base, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "cache"), "--base", base])
    assert "one of the arguments --texts --dataset is required" in capsys.readouterr().err
