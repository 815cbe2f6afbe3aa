"""The reproduction's report from its results: a table, four panels over training compute, and sentences."""

from __future__ import annotations

import math

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.training.results import figure_png, machine_text, markdown_table

LABELS = {
    "auxiliary": "auxiliary tuning, shared trunk",
    "independent": "auxiliary tuning, own embeddings",
    "fine-tuning": "fine-tuning the base",
    "scratch": "from scratch",
}
PANELS = {
    "loss": "perplexity of held-out text, given its keyword",
    "loss_under_base": "perplexity of what was written, under the base",
    "loss_without_keyword": "perplexity of held-out text, no keyword given",
}
STYLES = {  # colours of Okabe and Ito
    "auxiliary": ("#009E73", "o"),
    "independent": ("#56B4E9", "D"),
    "fine-tuning": ("#D55E00", "s"),
    "scratch": ("#0072B2", "^"),
}
BASE_STYLE = {"color": "#555555", "linestyle": ":", "label": "base alone"}


def runs_of(results: dict, method: str) -> list[dict]:
    """A method's runs by rising budget."""
    return sorted((run for run in results["runs"] if run["method"] == method), key=lambda run: run["budget"])


def results_table(results: dict) -> str:
    """Markdown: a row for the base, then one for each run by budget."""
    base = results["base"]
    header = [
        "",
        "compute (base = 1)",
        "steps",
        "perplexity given the keyword",
        "contains the keyword",
        "perplexity under the base",
        "perplexity without keyword",
    ]
    rows = [["base alone", "1", f"{base['steps']}", *_measures(base)]]
    for run in sorted(results["runs"], key=lambda run: (run["budget"], list(LABELS).index(run["method"]))):
        rows.append([LABELS[run["method"]], f"{run['budget']:g}", f"{run['steps']}", *_measures(run)])
    return markdown_table(header, rows)


def _measures(run: dict) -> list[str]:
    control = f"{100 * run['control']:.1f} ± {100 * run['control_error']:.1f} %"
    losses = (run["loss"], run["loss_under_base"], run["loss_without_keyword"])
    loss, under_base, without = (f"{math.exp(value):.1f}" for value in losses)
    return [loss, control, under_base, without]


def budget_for_control(runs: list[dict], control: float) -> float | None:
    """The budget at which runs of one method reach a control share, between two runs by the budget's logarithm.

    None where the largest run stays below it. A share that the smallest run has already gives that run's budget.
    """
    previous = None
    for run in runs:
        if run["control"] >= control:
            if previous is None:
                return run["budget"]
            part = (control - previous["control"]) / (run["control"] - previous["control"])
            return previous["budget"] * (run["budget"] / previous["budget"]) ** part
        previous = run
    return None


def plot_results(results: dict) -> bytes:
    """PNG: control, perplexity given the keyword, fluency and forgetting over the training compute."""
    points = {LABELS[method]: (runs_of(results, method), *STYLES[method]) for method in STYLES}
    return plot_curves(points, results["base"], PANELS, "training compute after the base (base's training = 1)")


def plot_curves(
    curves: dict[str, tuple[list[dict], str, str]],
    base: dict,
    panels: dict[str, str],
    x_label: str,
    is_log: bool = False,
) -> bytes:
    """PNG: control, then for each loss of `panels` (key: title) a panel of perplexities, over budgets, two in a row.

    curves   by label: runs by rising budget, colour, marker
    is_log   whether perplexities are on a logarithmic axis
    """
    count = 1 + len(panels)
    figure = Figure(figsize=(10, 4 * math.ceil(count / 2)), dpi=130, layout="constrained")
    control, *others = list(figure.subplots(math.ceil(count / 2), 2, sharex=True).flat)
    budgets = sorted({run["budget"] for runs, _, _ in curves.values() for run in runs})
    for label, (runs, colour, marker) in curves.items():
        style = {"color": colour, "marker": marker, "markersize": 6, "label": label}
        x = [run["budget"] for run in runs]
        error = [100 * run["control_error"] for run in runs]
        control.errorbar(x, [100 * run["control"] for run in runs], yerr=error, capsize=3, **style)
        for axes, key in zip(others, panels, strict=False):
            axes.plot(x, [math.exp(run[key]) for run in runs], **style)
    control.axhline(100 * base["control"], **BASE_STYLE)
    control.set(title="written passages with the requested keyword, %", ylim=(0, None))
    for axes, (key, title) in zip(others, panels.items(), strict=False):
        axes.axhline(math.exp(base[key]), **BASE_STYLE)
        axes.set(title=title, yscale="log" if is_log else "linear")
    shown = [control, *others][:count]
    for axes in others[len(panels) :]:
        axes.set_visible(False)
    for axes in shown:
        axes.set_xscale("log", base=2)
        axes.set_xticks(budgets, [fraction(budget) for budget in budgets])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in shown[-2:]:
        axes.set_xlabel(x_label)
        axes.tick_params(labelbottom=True)
    handles, labels = control.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure_png(figure)


def fraction(budget: float) -> str:
    return f"1/{round(1 / budget)}" if budget < 1 else f"{budget:g}"


def make_report(results: dict) -> str:
    """Markdown: what was run, the table, and what its numbers say."""
    return "\n".join(
        [
            f"# Auxiliary tuning with keywords, `--scale {results['scale_name']}`\n",
            _setting(results),
            results_table(results),
            "![control and perplexities over training compute](curves.png)\n",
            "\n".join(f"* {sentence}" for sentence in findings(results)) + "\n",
            measured_on(results),
        ]
    )


def _setting(results: dict) -> str:
    scale, base, text = results["scale"], results["base"], results["text"]
    train, test = (text["splits"][split] for split in ("train", "test"))
    return (
        f"A GPT-2 of {scale['layers']} layers and width {scale['width']} ({base['trained_parameters'] / 1e6:.2f} M "
        f"parameters) was trained on {train['passages']:,} passages of the American Standard Version for "
        f"{base['epochs']:.1f} epochs ({base['flops'] / 1e12:.3g} TFLOP), without keywords, and frozen. Each passage "
        f"is clauses of up to {scale['length'] - 1} tokens together, longer clauses are left out; "
        f"{train['with_keyword']:,} contain one of {text['keyword_candidates']} keywords. Compute is counted in FLOPs: "
        f"three times the forward pass of what is trained, once that of what is frozen. Measured on "
        f"{min(scale['max_examples'], test['with_keyword'])} passages of held-out chapters with their keywords, and as "
        f"many passages written to these keywords by sampling at temperature 1; perplexity without keyword on all "
        f"{test['passages']:,} held-out passages. ± is one standard error of the samples; the scatter between "
        f"trainings is not in it, each was run once.\n"
    )


def findings(results: dict) -> list[str]:
    """Sentences that follow from the numbers alone, whichever way they go."""
    sentences = [_equal_compute(results), _fraction_of_scratch(results), _forgetting(results), _fluency(results)]
    return [sentence for sentence in sentences if sentence]


def _largest_shared_budget(results: dict) -> float | None:
    sets = [{run["budget"] for run in runs_of(results, name)} for name in ("auxiliary", "fine-tuning", "scratch")]
    return max(set.intersection(*sets), default=None)


def _equal_compute(results: dict) -> str | None:
    budget = _largest_shared_budget(results)
    if budget is None:
        return None
    parts = []
    for method in ("auxiliary", "fine-tuning", "scratch"):
        run = next(run for run in runs_of(results, method) if run["budget"] == budget)
        parts.append(f"{LABELS[method]} {100 * run['control']:.1f} % and perplexity {math.exp(run['loss']):.1f}")
    chance = f"the base, which sees no keyword, {100 * results['base']['control']:.1f} %"
    return f"At {fraction(budget)} of the base's compute each: {'; '.join(parts)}; {chance}."


def _fraction_of_scratch(results: dict) -> str:
    auxiliary, scratch = runs_of(results, "auxiliary"), runs_of(results, "scratch")
    goal = scratch[-1]
    if not is_above_chance(goal, results["base"]):
        return "Training from scratch has no control at any of these budgets: its share is the base's, within errors."
    needed = budget_for_control(auxiliary, goal["control"])
    share = f"{100 * goal['control']:.1f} %"
    control = (
        f"The control that training from scratch has at {fraction(goal['budget'])} of the base's compute, {share},"
    )
    if needed is None:
        best = auxiliary[-1]
        return (
            f"{control} is not reached by auxiliary tuning with up to {fraction(best['budget'])}, which gives "
            f"{100 * best['control']:.1f} %."
        )
    bound = "or less " if needed == auxiliary[0]["budget"] else ""
    return f"{control} is reached by auxiliary tuning at {needed:.3g} {bound}of the base's compute."


def is_above_chance(run: dict, base: dict) -> bool:
    """Whether a run's control share exceeds the base's by more than two standard errors of their difference."""
    return run["control"] - base["control"] > 2 * math.hypot(run["control_error"], base["control_error"])


def _forgetting(results: dict) -> str:
    base = math.exp(results["base"]["loss_without_keyword"])
    tuned = ", ".join(
        f"{math.exp(run['loss_without_keyword']):.1f} at {fraction(run['budget'])}"
        for run in runs_of(results, "fine-tuning")
    )
    return (
        f"On text without a keyword the base has perplexity {base:.1f}. Auxiliary tuning leaves it as it is (its "
        f"weights are the same bits, which the run checks); after fine-tuning it is {tuned}."
    )


def _fluency(results: dict) -> str:
    written = ", ".join(
        f"{LABELS[method]} {math.exp(runs_of(results, method)[-1]['loss_under_base']):.1f}" for method in LABELS
    )
    own = math.exp(results["base"]["loss_under_base"])
    subject = "Perplexity under the base of what was written, at each one's largest budget"
    return f"{subject}: {written}; the base's own {own:.1f}."


def measured_on(results: dict) -> str:
    return (
        f"{machine_text(results['machine'])}, seed {results['seed']}. Training and measuring took "
        f"{results['seconds'] / 60:.1f} minutes in sum.\n"
    )
