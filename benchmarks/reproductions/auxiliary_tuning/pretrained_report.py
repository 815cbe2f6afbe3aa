"""The report at the pretrained scale: a table with errors over seeds, panels over training compute, and sentences."""

from __future__ import annotations

import math
import statistics

from benchmarks.reproductions.auxiliary_tuning.report import (
    PANELS,
    budget_for_control,
    fraction,
    measured_on,
    plot_curves,
)
from benchmarks.training.results import markdown_table, share_error

LABELS = {
    "auxiliary": "auxiliary, shared trunk",
    "independent": "auxiliary, own small model",
    "cached": "auxiliary, own small model, base cached",
    "fine-tuning": "fine-tuning all weights",
    "lora": "fine-tuning by LoRA",
    "scratch": "from scratch",
}
STYLES = {  # colours of Okabe and Ito
    "auxiliary": ("#009E73", "o"),
    "independent": ("#56B4E9", "D"),
    "cached": ("#CC79A7", "*"),
    "fine-tuning": ("#D55E00", "s"),
    "lora": ("#E69F00", "v"),
    "scratch": ("#0072B2", "^"),
}
AUXILIARIES = ("auxiliary", "independent", "cached")
LOSSES = {**PANELS, "loss_other_text": "perplexity of other text (docstrings)"}


def worth(run: dict) -> float:
    """Millinats per token by which a passage is more likely given its keyword than given another passage's."""
    return 1e3 * (run["loss_given_another"] - run["loss"])


def averaged(results: dict) -> dict[str, list[dict]]:
    """By method: a point for each budget by rising budget, of what was measured the means over seeds.

    worth            of the keyword
    deviations       by measure: standard deviation over seeds; None where there is one
    sampling_error   of one run's control share
    control_error    of the mean control share: over seeds (in which that of sampling is), or of sampling with one seed
    """
    groups: dict[tuple[str, float], list[dict]] = {}
    for run in results["runs"]:
        groups.setdefault((run["method"], run["budget"]), []).append(run)
    points: dict[str, list[dict]] = {method: [] for method in LABELS}
    for (method, budget), runs in sorted(groups.items(), key=lambda group: group[0][1]):
        point: dict = {"budget": budget, "num_seeds": len(runs), "deviations": None}
        for key in ("control", "steps", "epochs", "flops", "seconds", *LOSSES):
            point[key] = statistics.fmean(run[key] for run in runs)
        point["worth"] = statistics.fmean(worth(run) for run in runs)
        point["sampling_error"] = share_error(point["control"], results["num_samples"])
        point["control_error"] = point["sampling_error"]
        if len(runs) > 1:
            point["deviations"] = {key: statistics.stdev(run[key] for run in runs) for key in ("control", *LOSSES)}
            point["deviations"]["worth"] = statistics.stdev(map(worth, runs))
            point["control_error"] = max(point["deviations"]["control"], point["sampling_error"]) / math.sqrt(len(runs))
        points[method].append(point)
    return points


def results_table(results: dict) -> str:
    """Markdown: a row for the base, then one for each method and budget."""
    header = [
        "",
        "compute",
        "seeds",
        "steps",
        "contains the keyword",
        "sampling error",
        "keyword's worth",
        "perplexity given the keyword",
        "under the base",
        "without keyword",
        "of other text",
    ]
    base = results["base"]
    chance = [f"{100 * base['control']:.1f} %", f"{100 * base['control_error']:.1f}"]
    rows = [["base alone", "0", "", "", *chance, "", *(f"{math.exp(base[key]):.1f}" for key in LOSSES)]]
    entries = [(point["budget"], method, point) for method, points in averaged(results).items() for point in points]
    for budget, method, point in sorted(entries, key=lambda entry: (entry[0], list(LABELS).index(entry[1]))):
        control = f"{100 * point['control']:.1f}"
        if point["deviations"] is not None:
            control += f" ± {100 * point['deviations']['control']:.1f}"
        worth_of_it = f"{round(point['worth'])}"
        if point["deviations"] is not None:
            worth_of_it += f" ± {point['deviations']['worth']:.0f}"
        cells = [control + " %", f"{100 * point['sampling_error']:.1f}", worth_of_it]
        cells += [_perplexity(point, key) for key in LOSSES]
        rows.append([LABELS[method], fraction(budget), f"{point['num_seeds']}", f"{point['steps']:.0f}", *cells])
    return markdown_table(header, rows)


def _perplexity(point: dict, key: str) -> str:
    """exp of the mean loss; its deviation is the loss's times itself, to first order."""
    value = math.exp(point[key])
    deviation = 0.0 if point["deviations"] is None else value * point["deviations"][key]
    return f"{value:.1f}" + (f" ± {deviation:.1f}" if deviation > 0 else "")


def plot_results(results: dict) -> bytes:
    """PNG: control and four perplexities over the training compute, means over seeds."""
    curves = {LABELS[method]: (points, *STYLES[method]) for method, points in averaged(results).items() if points}
    unit = results["scale"]["base_flops"] / 1e12
    return plot_curves(curves, results["base"], LOSSES, f"training compute ({unit:g} TFLOP = 1)", True)


def make_report(results: dict) -> str:
    """Markdown: what was run, the table, and what its numbers say."""
    return "\n".join(
        [
            "# Auxiliary tuning of a pretrained model with keywords, `--scale pretrained`\n",
            _setting(results),
            results_table(results),
            "![control and perplexities over training compute](curves.png)\n",
            "\n".join(f"* {sentence}" for sentence in findings(results)) + "\n",
            "## Beside the paper\n",
            "\n".join(f"* {sentence}" for sentence in beside_the_paper(results)) + "\n",
            measured_on(results),
        ]
    )


def _setting(results: dict) -> str:
    scale, text, model = results["scale"], results["text"], results["model"]
    similarity = results["keyword_similarity"]
    test, rates = text["splits"]["test"], dict(scale["rates"])
    told = ", ".join(f"{LABELS[method]} {rate:g}" for method, rate in rates.items())
    return (
        f"The base is SmolLM2-135M-Instruct ({model['parameters'] / 1e6:.0f} M weights in {model['layers']} layers, "
        f"its 4-bit weights brought to {scale['dtype']}), as it comes, frozen. The task: passages of the American "
        f"Standard Version of up to {scale['length'] - 1} tokens that contain one of {text['keyword_candidates']} "
        f"keywords, {text['splits']['train']['with_keyword']:,} of them to train on. Compute is counted in FLOPs of "
        f"matrix products: once the forward pass of what is frozen and passes no gradient, twice of what is frozen and "
        f"passes one, three times of what is trained; 1 is {scale['base_flops'] / 1e12:g} TFLOP. The shared trunk is "
        f"the base's first {scale['trunk_layer']} layers, of the others the auxiliary begins as a copy, whose logits "
        f'are {scale["initial_share"]:g} of the base\'s; the own small model is `aux="small"`; all auxiliaries share '
        f"the base's head. LoRA has rank {scale['lora_rank']} on all linear layers but the head. A keyword is read "
        f"after an end of text: two keywords' states at the trunk's end have a mean cosine of "
        f"{similarity['first']:.5f} as a text's first token, and of {similarity['after_start']:.2f} after an end of "
        f"text. Learning rates, of AdamW: {told}; the shared trunk's is the better one of two after 50 "
        f"steps, the others are usual ones and not searched. Measured on {results['num_samples']} passages of held-out "
        f"chapters and as many written to their keywords by sampling at temperature 1, on "
        f"{min(scale['max_plain'], test['passages'])} held-out passages without keyword, and on "
        f"{scale['other_windows']} windows of {scale['other_length']} tokens of the Python library's docstrings. ± is "
        f"one standard deviation over seeds (weights, order of the data and samples); the sampling error is one "
        f"standard error of one run's share. The keyword's worth is by how many millinats a token a held-out passage "
        f"is more likely given its keyword than given another passage's.\n"
    )


def _named(results: dict) -> tuple[dict[str, list[dict]], dict[str, dict], float]:
    """Points by method, those at the largest budget that all but the cached auxiliaries have, and that budget."""
    points = averaged(results)
    budget = max(point["budget"] for point in points["scratch"])
    return points, {m: p for m, ps in points.items() for p in ps if p["budget"] == budget}, budget


def _share(point: dict) -> str:
    return f"{100 * point['control']:.1f} ± {100 * point['control_error']:.1f} %"


def differ(one: dict, other: dict) -> int:
    """1 or -1 where the first control share is higher or lower by more than two standard errors, else 0."""
    difference = one["control"] - other["control"]
    if abs(difference) <= 2 * math.hypot(one["control_error"], other["control_error"]):
        return 0
    return 1 if difference > 0 else -1


def _base(results: dict) -> dict:
    """What the base gave; its control share's error is at least that of one sample, so that none is no certainty."""
    base = results["base"]
    return {**base, "control_error": max(base["control_error"], 1 / results["num_samples"])}


def findings(results: dict) -> list[str]:
    """Sentences that follow from the numbers alone, whichever way they go."""
    return [
        _control(results),
        *(_compute_of_scratch(results, name) for name in ("auxiliary", "independent")),
        _against(results, "fine-tuning"),
        _against(results, "lora"),
        _forgetting(results),
        _fluency(results),
        _cached(results),
    ]


def _control(results: dict) -> str:
    _, largest, budget = _named(results)
    ranked = sorted(largest, key=lambda method: -largest[method]["control"])
    parts = "; ".join(f"{LABELS[method]} {_share(largest[method])}" for method in ranked)
    worths = ", ".join(f"{round(largest[method]['worth'])}" for method in ranked)
    return (
        f"Control at compute {fraction(budget)} each, mean and its standard error: {parts}; the base, which sees no "
        f"keyword, {100 * results['base']['control']:.1f} %. In the same order a keyword is worth "
        f"{worths} millinats a token."
    )


def _compute_of_scratch(results: dict, name: str) -> str:
    points, largest, budget = _named(results)
    goal, scratch = largest[name], points["scratch"]
    subject = f"The control of {LABELS[name]} at compute {fraction(budget)}, {100 * goal['control']:.1f} %,"
    if differ(goal, _base(results)) <= 0:
        return f"{subject} is not above the base's, within two standard errors: there is nothing to compare."
    needed = budget_for_control(scratch, goal["control"])
    if needed is None:
        return (
            f"{subject} is not reached by training from scratch with up to {fraction(budget)}, which gives "
            f"{100 * scratch[-1]['control']:.1f} %: it would need more than this, how much was not measured."
        )
    bound = "or less " if needed == scratch[0]["budget"] else ""
    return f"{subject} is reached by training from scratch at {needed:.3g} {bound}of that unit of compute."


def _against(results: dict, other: str) -> str:
    _, largest, budget = _named(results)
    words = {1: "more control than", -1: "less control than", 0: "the same control, within two standard errors, as"}
    parts = [
        f"{LABELS[name]} has {words[differ(largest[name], largest[other])]} {LABELS[other]}"
        for name in ("auxiliary", "independent")
    ]
    losses = ", ".join(f"{LABELS[m]} {math.exp(largest[m]['loss']):.1f}" for m in ("auxiliary", "independent", other))
    return f"At compute {fraction(budget)} {', and '.join(parts)}. Perplexity given the keyword: {losses}."


def _forgetting(results: dict) -> str:
    points, base = averaged(results), results["base"]
    parts = []
    for method in ("fine-tuning", "lora", "scratch"):
        told = ", ".join(
            f"{math.exp(p['loss_without_keyword']):.1f} and {math.exp(p['loss_other_text']):.1f} at "
            f"{fraction(p['budget'])}"
            for p in points[method]
        )
        parts.append(f"{LABELS[method]} {told}")
    return (
        f"Without a keyword the base has perplexity {math.exp(base['loss_without_keyword']):.1f} on held-out passages "
        f"and {math.exp(base['loss_other_text']):.1f} on docstrings. With the auxiliary's scale at zero it is the "
        f"base, whose weights are the same bits after all trainings (the run checks it). Afterwards: "
        f"{'; '.join(parts)}."
    )


def _fluency(results: dict) -> str:
    _, largest, budget = _named(results)
    told = ", ".join(f"{LABELS[m]} {math.exp(point['loss_under_base']):.1f}" for m, point in largest.items())
    return (
        f"Perplexity under the untouched base of what was written, at compute {fraction(budget)}: {told}; the base's "
        f"own {math.exp(results['base']['loss_under_base']):.1f}."
    )


def _cached(results: dict) -> str:
    _, largest, budget = _named(results)
    cached, online, cache = largest["cached"], largest["independent"], results["cache"]
    word = {1: "more than", -1: "less than", 0: "within two standard errors of"}[differ(cached, online)]
    unit = results["scale"]["base_flops"]
    whole = cache["flops"] / unit / cached["num_seeds"]
    return (
        f"From cached hidden states compute {fraction(budget)} is {cached['steps']:.0f} steps "
        f"({cached['epochs']:.1f} epochs of {cache['passages']:,} passages) instead of {online['steps']:.0f}: control "
        f"{_share(cached)}, {word} that of {LABELS['independent']} with the base run, {_share(online)}. Not counted in "
        f"it is the cache itself, {cache['flops'] / unit:.2f} of that unit and {cache['bytes'] / 1e6:.0f} MB, which "
        f"{cached['num_seeds']} trainings shared: {whole:.2f} for each."
    )


def beside_the_paper(results: dict) -> list[str]:
    """What Zeldes et al. 2020 report, and what these numbers say of it."""
    points, largest, budget = _named(results)
    base, sentences = _base(results), []
    best = max(("auxiliary", "independent"), key=lambda name: largest[name]["control"])
    goal, scratch = largest[best], largest["scratch"]
    claim = "The paper: results similar to training from scratch, for much less compute."
    if differ(goal, base) <= 0:
        sentences.append(f"{claim} Not seen here: no auxiliary has control above chance at these budgets.")
    elif differ(scratch, base) <= 0:
        sentences.append(
            f"{claim} It agrees as far as it goes: {LABELS[best]} has {_share(goal)} where training from scratch at "
            f"the same compute is not above chance. That they end up similar was not tried, scratch is far from "
            f"its end."
        )
    else:
        needed = budget_for_control(points[best], scratch["control"])
        told = "does not agree: it is not reached" if needed is None else f"is reached at {needed:.3g}"
        verdict = "" if needed is None else ", which agrees" if needed < budget / 2 else ", which is not much less"
        sentences.append(
            f"{claim} The {100 * scratch['control']:.1f} % that training from scratch has here at {fraction(budget)} "
            f"{told} by {LABELS[best]}{verdict}."
        )
    written, own = math.exp(goal["loss_under_base"]), math.exp(base["loss_under_base"])
    from_scratch = math.exp(scratch["loss_under_base"])
    word = "agrees" if written < from_scratch else "does not agree"
    sentences.append(
        f"The paper: the pretrained model keeps what is written fluent. That {word}: perplexity under the base "
        f"{written:.1f} ({LABELS[best]}), {from_scratch:.1f} from scratch, {own:.1f} the base's own."
    )
    forgotten = [
        LABELS[m] for m in ("fine-tuning", "lora") if largest[m]["loss_other_text"] > base["loss_other_text"] + 0.01
    ]
    told = f"{' and '.join(forgotten)} made it worse by more than 1 %" if forgotten else "neither way made it worse"
    sentences.append(
        f"The paper: weights that stay as they are forget nothing, which fine-tuning may. Of docstrings, which no "
        f"training showed: {told} at {fraction(budget)}; the auxiliaries' base cannot."
    )
    sentences.append(
        "Other than in the paper: the base (135 M weights that have seen the web, and follow instructions), one "
        "keyword of one token, passages of a few clauses, and budgets of minutes."
    )
    return sentences
