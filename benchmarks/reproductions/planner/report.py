"""The reproduction's report from its results: a table, two panels, and sentences that follow from the numbers."""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

from matplotlib.figure import Figure

from benchmarks.training.results import figure_png, machine_text, markdown_table

LABELS = {
    "fixed": "fixed label",
    "hard": "predicted hard label",
    "straight_through": "straight-through, end to end",
    "soft_frozen": "soft label, planner frozen",
    "soft": "soft label, end to end",
    "soft_attention_frozen": "in the attention: planner frozen",
    "soft_attention": "in the attention: end to end",
    "oracle": "oracle label (sees the verse)",
}
COLOURS = {  # of Okabe and Ito, and a brown
    "fixed": "#555555",
    "hard": "#0072B2",
    "straight_through": "#D55E00",
    "soft_frozen": "#56B4E9",
    "soft": "#009E73",
    "soft_attention_frozen": "#E69F00",
    "soft_attention": "#A6761D",
    "oracle": "#CC79A7",
}
REFERENCE = "hard"


class Estimate(NamedTuple):
    mean: float
    error: float


class Difference(NamedTuple):
    """Nats per token of one way minus those of another, negative where the first is better.

    seeds      mean of the seeds' differences, and its standard error over seeds (same seed: same planner to start
               from, same batches)
    chapters   the same mean, and its standard error over held-out chapters, each averaged over seeds
    """

    seeds: Estimate
    chapters: Estimate
    by_seed: list[float]

    def is_clear(self) -> bool:
        """The same sign for every seed, and beyond two standard errors both over seeds and over chapters."""
        has_one_sign = all(value < 0 for value in self.by_seed) or all(value > 0 for value in self.by_seed)
        return has_one_sign and all(abs(e.mean) > 2 * e.error for e in (self.seeds, self.chapters))


def estimate(values: list[float]) -> Estimate:
    """Mean and standard error; no error can be told from one value (nan)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(statistics.fmean(values), error)


def runs_of(results: dict, arm: str) -> list[dict]:
    """An arm's runs by seed."""
    return sorted((run for run in results["runs"] if run["arm"] == arm), key=lambda run: run["seed"])


def arms_of(results: dict) -> list[str]:
    """The ways that were run, in the order of `LABELS`."""
    run = {each["arm"] for each in results["runs"]}
    return [arm for arm in LABELS if arm in run]


def perplexity(results: dict, arm: str) -> Estimate:
    return estimate([math.exp(run["loss"]) for run in runs_of(results, arm)])


def difference(results: dict, arm: str, reference: str = REFERENCE) -> Difference:
    pairs = list(zip(runs_of(results, arm), runs_of(results, reference), strict=True))
    by_seed = [ours["loss"] - other["loss"] for ours, other in pairs]
    nats = [  # of each chapter, averaged over seeds
        statistics.fmean(ours["chapter_nats"][i] - other["chapter_nats"][i] for ours, other in pairs)
        for i in range(len(pairs[0][0]["chapter_nats"]))
    ]
    return Difference(estimate(by_seed), ratio_estimate(nats, results["text"]["test_chapter_tokens"]), by_seed)


def ratio_estimate(sums: list[float], counts: list[int]) -> Estimate:
    """sum(sums) / sum(counts), and its standard error where the pairs are independent (Cochran 1977, 6.4)."""
    ratio = sum(sums) / sum(counts)
    squares = sum((s - ratio * n) ** 2 for s, n in zip(sums, counts, strict=True))
    num = len(sums)
    return Estimate(ratio, math.sqrt(num / (num - 1) * squares) / sum(counts))


# -- table -------------------------------------------------------------------------------------------------------------


def results_table(results: dict) -> str:
    """Markdown: the base, then a row for each way to condition it."""
    against = f"millinats per token against {LABELS[REFERENCE]}"
    header = ["", "perplexity", f"{against}, ± over seeds", "± over chapters", "planner's accuracy"]
    rows = [["no plan", f"{math.exp(results['base']['loss']):.3f}", "", "", ""]]
    for arm in arms_of(results):
        cells = ["", ""]
        if arm != REFERENCE:
            found = difference(results, arm)
            cells = [_with_error(found.seeds, 1000, "+.1f"), f"{1000 * found.chapters.error:.1f}"]
        accuracies = [run["accuracy"] for run in runs_of(results, arm) if "accuracy" in run]
        accuracy = f"{100 * statistics.fmean(accuracies):.1f} %" if accuracies else ""
        rows.append([LABELS[arm], _with_error(perplexity(results, arm), 1, ".3f"), *cells, accuracy])
    return markdown_table(header, rows)


def _with_error(value: Estimate, factor: float, form: str) -> str:
    mean = format(factor * value.mean, form)
    return mean if math.isnan(value.error) else f"{mean} ± {format(factor * value.error, form.lstrip('+'))}"


# -- plot --------------------------------------------------------------------------------------------------------------


def plot_results(results: dict) -> bytes:
    """PNG: perplexity of every way, and each one's difference to the predicted hard label."""
    figure = Figure(figsize=(11, 4.2), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    _plot_perplexity(left, results)
    _plot_differences(right, results)
    for axes in (left, right):
        axes.grid(True, axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure_png(figure)


def _plot_perplexity(axes, results: dict) -> None:
    none = math.exp(results["base"]["loss"])
    axes.axvline(none, color="#555555", linestyle=":")
    axes.annotate("no plan", (none, 1), (-4, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
                  rotation=90, ha="right", va="top", color="#555555", fontsize=9)  # fmt: skip
    arms = arms_of(results)
    for place, arm in enumerate(arms):
        values = [math.exp(run["loss"]) for run in runs_of(results, arm)]
        found = estimate(values)
        error = None if math.isnan(found.error) else found.error
        axes.errorbar(found.mean, place, xerr=error, fmt="o", capsize=4, color=COLOURS[arm])
        axes.plot(values, [place + 0.22] * len(values), "|", color=COLOURS[arm])
    axes.set_yticks(range(len(arms)), [LABELS[arm] for arm in arms])
    axes.invert_yaxis()
    axes.set(xlabel="perplexity of held-out chapters", title="mean ± standard error; strokes: seeds")


def _plot_differences(axes, results: dict) -> None:
    arms = [arm for arm in arms_of(results) if arm not in (REFERENCE, "oracle")]
    axes.axvline(0, color=COLOURS[REFERENCE])
    for place, arm in enumerate(arms):
        found = difference(results, arm)
        for offset, part, marker in ((-0.1, found.seeds, "o"), (0.1, found.chapters, "s")):
            error = None if math.isnan(part.error) else 1000 * part.error
            style = {"capsize": 4, "color": COLOURS[arm], "markersize": 5}
            axes.errorbar(1000 * part.mean, place + offset, xerr=error, fmt=marker, **style)
    axes.set_yticks(range(len(arms)), [LABELS[arm] for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set(xlabel="millinats per token (left is better)", title=f"against {LABELS[REFERENCE]}")
    axes.plot([], [], "o", color="#555555", markersize=5, label="± over seeds")
    axes.plot([], [], "s", color="#555555", markersize=5, label="± over chapters")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.15), ncols=2, frameon=False)


# -- report ------------------------------------------------------------------------------------------------------------


def make_report(results: dict) -> str:
    """Markdown: what was run, the table, and what its numbers say."""
    return "\n".join(
        [
            f"# Planner with soft labels, `--scale {results['scale_name']}`\n",
            _setting(results),
            results_table(results),
            "![perplexity of each way, and differences to the predicted hard label](perplexity.png)\n",
            "\n".join(f"* {sentence}" for sentence in findings(results)) + "\n",
            _measured_on(results),
        ]
    )


def _setting(results: dict) -> str:
    scale, text, runs = results["scale"], results["text"], results["runs"]
    is_pretrained, test = "language_model" in scale, text["splits"]["test"]
    first, count = (scale["first_layer"], results["base"]["layers"]) if is_pretrained else (2, scale["layers"])
    place = f"the input of layers {first + 1} to {count}"
    shared = ", beside an entry that all labels share," if is_pretrained else ""
    if "soft_attention" in arms_of(results):
        place += ' ("in the attention": to the outputs of its heads)'
    num_seeds = len(runs_of(results, REFERENCE))
    embedded = f"{scale['sentence_encoder']}, pretrained too," if is_pretrained else "TF-IDF"
    chapters = f"{test['chapters']} held-out chapters"
    if is_pretrained and scale["held_out_one_in"] > 1:
        chapters += f", one in {scale['held_out_one_in']} of all those held out"
    return (
        f"{_pretrained_base(results) if is_pretrained else _trained_base(results)} Segments are verses, "
        f"embedded by {embedded} and {scale['label_dim']} singular vectors; labels are {scale['num_labels']} k-means "
        f"centroids. The planner reads the {scale['context']} verses before, also those outside the language model's "
        f"window, and is pretrained for {scale['planner_steps']} steps to predict the nearest centroid. Each way adds "
        f"label embeddings{shared} to {place} and is trained with the language model's loss "
        f"on the same {runs[0]['examples']:,} windows: {scale['start_steps']} steps of the conditioning alone, then "
        f'{scale["joint_steps"]} at a lower rate, where "end to end" trains the planner too. The {num_seeds} seeds '
        f"share text, base, embeddings and codebook; planner, its pretraining and the windows' order are each "
        f"seed's own and the same for all ways. Measured on {test['verses']:,} verses of {chapters} "
        f"({test['tokens']:,} tokens). ± is one standard error, over seeds unless said otherwise; a "
        f"difference is called clear if it has the same sign for every seed and exceeds two standard errors over seeds "
        f"and over chapters.\n"
    )


def _trained_base(results: dict) -> str:
    scale, base, train = results["scale"], results["base"], results["text"]["splits"]["train"]
    return (
        f"A GPT-2 of {scale['layers']} layers and width {scale['width']} ({base['trained_parameters'] / 1e6:.2f} M "
        f"parameters, windows of {scale['length']} tokens) was trained for {base['epochs']:.1f} epochs on the American "
        f"Standard Version ({train['verses']:,} verses, {train['tokens']:,} tokens) and frozen."
    )


def _pretrained_base(results: dict) -> str:
    scale, base, train = results["scale"], results["base"], results["text"]["splits"]["train"]
    return (
        f"{base['name']} ({base['layers']} layers, width {base['width']}, {base['parameters'] / 1e6:.1f} M parameters, "
        f"its own vocabulary of {base['vocab_size']:,}), frozen as it came pretrained, reads windows of "
        f"{scale['length']} tokens of the American Standard Version (training chapters: {train['verses']:,} verses, "
        f"{train['tokens']:,} tokens). What it was pretrained on may hold this text."
    )


def findings(results: dict) -> list[str]:
    """Sentences that follow from the numbers alone, whichever way they go."""
    return [
        _claim(results, "soft", "soft labels end to end beat predicted hard labels", expects_gain=True),
        _claim(results, "straight_through", "straight-through does not help", expects_gain=False),
        _what_helps(results),
        *_place(results),
        _against_no_plan(results),
        _planner(results),
        _drift(results),
    ]


def _claim(results: dict, arm: str, claim: str, expects_gain: bool) -> str:
    found = difference(results, arm)
    is_gain = found.is_clear() and found.seeds.mean < 0
    verdict = "no clear difference" if not found.is_clear() else "a clear gain" if is_gain else "a clear loss"
    name, was_seen = LABELS[arm].capitalize(), "seen" if is_gain == expects_gain else "not seen"
    return (
        f'The paper\'s "{claim}": **{was_seen} here.** {name} against {LABELS[REFERENCE]}: {_with_errors(found)}, '
        f"{verdict}."
    )


def _with_errors(found: Difference) -> str:
    seeds = "" if math.isnan(found.seeds.error) else f"± {1000 * found.seeds.error:.1f} over seeds, "
    chapters = f"± {1000 * found.chapters.error:.1f} over chapters"
    return f"{1000 * found.seeds.mean:+.1f} millinats per token ({seeds}{chapters})"


def _what_helps(results: dict) -> str:
    mixing, training = difference(results, "soft_frozen"), difference(results, "soft", "soft_frozen")
    parts = [
        f"{name} {_with_errors(part)}, {'clear' if part.is_clear() else 'not clear'}"
        for name, part in (
            ("mixing labels while the planner is frozen", mixing),
            ("training the planner too", training),
        )
    ]
    return f"Of soft labels' difference to predicted hard labels: {'; '.join(parts)}."


def _place(results: dict) -> list[str]:
    if "soft_attention" not in arms_of(results):
        return []
    found = difference(results, "soft_attention", "soft")
    return [
        f"Soft labels end to end before the attention's output projection, where the paper's code adds them, against "
        f"those at the layer's input: {_with_errors(found)}, {'clear' if found.is_clear() else 'not clear'}."
    ]


def _against_no_plan(results: dict) -> str:
    none = math.exp(results["base"]["loss"])
    parts = "; ".join(f"{LABELS[arm]} {perplexity(results, arm).mean - none:+.2f}" for arm in arms_of(results))
    return (
        f"Against no plan (perplexity {none:.2f}): {parts}. The fixed label says what training the conditioning's "
        f"parameters gives without any plan."
    )


def _planner(results: dict) -> str:
    text = results["text"]
    accuracy, loss, used = (
        statistics.fmean(planner[key] for planner in results["planners"])
        for key in ("accuracy", "label_loss", "used_labels")
    )
    return (
        f"The pretrained planner predicts {100 * accuracy:.1f} % of the held-out labels (always the commonest: "
        f"{100 * text['commonest_label_accuracy']:.1f} %), with {loss:.2f} nats per label (the labels' shares: "
        f"{text['label_loss_of_shares']:.2f}). Its likeliest labels amount to {used:.0f} labels used equally, the "
        f"oracle's to {text['used_labels']:.0f}."
    )


def _drift(results: dict) -> str:
    parts = []
    for arm in ("soft", "straight_through"):
        runs = runs_of(results, arm)
        accuracy, entropy, used = (
            statistics.fmean(run[key] for run in runs) for key in ("accuracy", "entropy", "used_labels")
        )
        parts.append(
            f"{LABELS[arm]}: accuracy {100 * accuracy:.1f} %, entropy {entropy:.2f} nats, {used:.0f} labels used"
        )
    before = statistics.fmean(planner["entropy"] for planner in results["planners"])
    return (
        f"What the language model's loss makes of the planner (entropy before: {before:.2f} nats): {'; '.join(parts)}."
    )


def _measured_on(results: dict) -> str:
    return (
        f"{machine_text(results['machine'])}. The times of training and measuring add up to "
        f"{results['seconds'] / 60:.1f} minutes.\n"
    )
