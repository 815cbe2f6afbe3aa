"""What the demo shows and keeps: one table, a PNG of the curves, a JSON file with every number."""

import json
import math

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks import files
from benchmarks.demo.loss_step import STORED
from benchmarks.timing.harness import shape_text
from benchmarks.training.results import figure_png

COLORS = {"auxkernels": "#1f77b4", "eager": "#ff7f0e", "base": "#555555", "distance": "#9467bd"}


def with_perplexity(loss):
    return f"{loss:.4f}, ppl {math.exp(loss):,.0f}"


def add_loss_step_rows(table, dtype, steps):
    """Time, memory and error of the loss step on heads and of eager; below each cost, that on stored logits."""
    ours, stored, eager = steps["auxkernels"], steps[STORED], steps["eager"]
    table.add_section()
    table.add_row(f"[bold]loss step, {dtype}")
    for label, key, form in (("time, median (ms)", "time_ms", ".1f"), ("peak memory (MiB)", "peak_mib", ".0f")):
        if ours[key] is not None:
            costs = (format(step[key], form) for step in (ours, eager))
            table.add_row(f"  {label}", *costs, _ratio(eager[key], ours[key]))
            table.add_row("    with stored logits", format(stored[key], form), "", _ratio(eager[key], stored[key]))
    if ours["saved_mib"] is not None:
        table.add_row("  memory heads save (MiB)", f"{stored['saved_mib']:.0f}", f"{eager['saved_mib']:.0f}")
    for label, key in (("error of the loss (nats)", "loss_error"), ("error of the gradients", "gradient_error")):
        table.add_row(f"  {label}", f"{ours[key]:.1e}", f"{eager[key]:.1e}")


def _ratio(eager, ours):
    return f"{eager / ours:.1f}x" if ours else ""


def make_table(results):
    """The summary: held-out losses, agreement of the curves, cost and error of the loss step, for both trainings."""
    base_loss, curves = results["held_out"]["docstrings"]["base_loss"], results["curves"]
    code_loss = results["held_out"]["code"]["base_loss"]
    ours, eager = (run["held_out_loss"] for run in curves["runs"].values())
    shape = shape_text(results["loss_step_shape"])
    device, threads = results["machine"]["device"], results["machine"]["threads"]
    caption = (
        f"{device}, {threads} threads. The base alone on held-out code: {code_loss:.2f} nats. A loss step goes from "
        "hidden states to the loss and the gradients of the auxiliary's hidden states and head, here "
        f"{shape}. Its peak memory is counted beyond these inputs and includes the gradients; what heads save is told "
        "against stored logits and against eager. Errors are against float64, the gradients' relative to their norm."
    )
    if curves["compared_steps"] < curves["steps"]:
        caption += f" The curves are compared over the first {curves['compared_steps']} steps."
    table = Table(title=f"Auxiliary tuning with {results['dtype']} heads", caption=caption, caption_justify="left")
    table.add_column()
    for name in ("auxkernels", "eager PyTorch", ""):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("[bold]held-out docstrings, nats")
    table.add_row("  base alone", with_perplexity(base_loss))
    table.add_row("  base + auxiliary, step 0", with_perplexity(ours[0]), with_perplexity(eager[0]))
    last = [with_perplexity(losses[-1]) for losses in (ours, eager)]
    table.add_row(f"  base + auxiliary, step {curves['steps']}", *last, f"{ours[-1] - base_loss:+.2f}")
    bound = f"bound {curves['bound_nats']:.0e}"
    table.add_row("  largest distance of curves", f"{curves['largest_difference_nats']:.1e}", bound)
    step_times_ms = [run["median_step_ms"] for run in curves["runs"].values()]
    ratio = f"{step_times_ms[1] / step_times_ms[0]:.1f}x"
    table.add_row("  training step, median (ms)", *(f"{time_ms:.0f}" for time_ms in step_times_ms), ratio)
    for dtype, steps in results["loss_step"].items():
        add_loss_step_rows(table, dtype, steps)
    return table


def plot_runs(axes, curves):
    """Held-out losses as marked lines over the faint losses of the training batches; eager dashed above ours."""
    styles = {"auxkernels": ("-", 3.5, "o"), "eager": ("--", 1.2, "x")}
    steps = range(1, curves["steps"] + 1)
    for name, run in curves["runs"].items():
        dashes, width, marker = styles[name]
        axes.plot(steps, run["train_loss"], dashes, color=COLORS[name], linewidth=width / 2, alpha=0.25)
    for name, run in curves["runs"].items():
        dashes, width, marker = styles[name]
        label = f"base + auxiliary, held-out: {name}"
        style = {"color": COLORS[name], "linewidth": width, "marker": marker, "markersize": 7, "label": label}
        axes.plot(curves["evaluated_steps"], run["held_out_loss"], dashes, **style)
    axes.plot([], [], color=COLORS["auxkernels"], alpha=0.25, label="base + auxiliary, training batches (both)")


def plot_curves(results):
    """PNG bytes: losses of both runs below the base's held-out loss, and their distance on a log scale."""
    curves = results["curves"]
    figure = Figure(figsize=(8, 6), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    base_loss = results["held_out"]["docstrings"]["base_loss"]
    upper.axhline(base_loss, color=COLORS["base"], linestyle=":", label="base alone, held-out")
    plot_runs(upper, curves)
    upper.set(ylabel="loss (nats per token)")
    figure.suptitle("Auxiliary tuning: base fitted on code and frozen, auxiliary trained on docstrings")
    upper.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    first, second = (run["train_loss"] for run in curves["runs"].values())
    # equal losses have no logarithm and no dot
    distance = [abs(a - b) or math.nan for a, b in zip(first, second, strict=True)]
    lower.semilogy(range(1, curves["steps"] + 1), distance, ".", color=COLORS["distance"], markersize=4)
    lower.plot([0, curves["compared_steps"]], [curves["bound_nats"]] * 2, "--", color=COLORS["base"])
    lower.annotate("bound", (0, curves["bound_nats"]), (0, -3), textcoords="offset points", va="top")
    lower.set(xlabel="step", ylabel="distance (nats)")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    return figure_png(figure)


def write_results(results, folder):
    """Write demo.png and demo.json under `folder`, each whole or not at all; returns their paths."""
    contents = {"demo.png": plot_curves(results), "demo.json": json.dumps(results, indent=1) + "\n"}
    return files.write_results(folder, contents)
