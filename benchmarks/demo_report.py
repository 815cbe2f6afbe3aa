"""The demo's terminal output and results: progress bars, one table, one PNG of the curves, one JSON with every number."""

import contextlib
import io
import json
import math
import time

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.demo_data import write_atomically

COLORS = {"auxkernels": "#1f77b4", "eager": "#ff7f0e", "base": "#555555", "difference": "#9467bd"}


class Terminal:
    """Lines that stay, and one progress bar at a time; no bar where the output is not a terminal."""

    def __init__(self):
        self.console = Console(highlight=False)

    def say(self, text):
        self.console.print(text)

    @contextlib.contextmanager
    def stage(self, name, total=None):
        """Bar of a stage; yields advance(text). The stage's line with its duration is printed when it ends."""
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
        columns += [TimeRemainingColumn(), TextColumn("{task.fields[text]}")]
        start = time.perf_counter()
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(name, total=total, text="")
            yield lambda text: progress.update(task, advance=1, text=text)
        self.say(f"{name}: {time.perf_counter() - start:.1f} s")


def loss_and_perplexity(loss):
    return f"{loss:.4f} (ppl {math.exp(loss):,.0f})"


def add_loss_step_rows(table, dtype, steps):
    ours, eager = steps["auxkernels"], steps["eager"]
    rows = (("time, median (ms)", "time_ms", ".1f"), ("peak memory beyond the inputs (MiB)", "peak_mib", ".0f"))
    table.add_section()
    for label, key, form in rows:
        ratio = f"{eager[key] / ours[key]:.1f}x" if ours[key] else ""
        table.add_row(f"{dtype}: {label}", format(ours[key], form), format(eager[key], form), ratio)
    for label, key in (("loss error (nats)", "loss_error"), ("gradient error (relative)", "gradient_error")):
        table.add_row(f"{dtype}: {label}", f"{ours[key]:.1e}", f"{eager[key]:.1e}", "")


def make_table(results):
    """The summary: held-out losses, agreement of the curves, cost and error of the loss step, for both trainings."""
    held_out, curves, shape = results["held_out"]["docstrings"], results["curves"], results["loss_step_shape"]
    table = Table(title=f"Auxiliary tuning, {results['dtype']} logits", title_justify="left")
    table.add_column("held-out docstrings, nats per token")
    for name in ("auxkernels", "eager PyTorch"):
        table.add_column(name, justify="right")
    table.add_column("", justify="right")
    table.add_row("base alone", loss_and_perplexity(held_out["base_loss"]), "", "")
    ours, eager = (run["held_out_loss"] for run in curves["runs"].values())
    gain = f"-{held_out['base_loss'] - ours[-1]:.2f}"
    table.add_row("base + auxiliary, step 0", f"{ours[0]:.4f}", f"{eager[0]:.4f}", "")
    table.add_row(
        f"base + auxiliary, step {curves['steps']}", loss_and_perplexity(ours[-1]), loss_and_perplexity(eager[-1]), gain
    )
    difference = f"{curves['largest_difference']:.1e}"
    table.add_row("largest distance of the curves", difference, "", f"< {curves['bound']:.0e}")
    table.add_row(
        "training step, median (ms)", *(f"{run['median_step_ms']:.0f}" for run in curves["runs"].values()), ""
    )
    table.add_section()
    table.add_row(f"[bold]one loss step, {shape[0]} x {shape[1]}: loss + gradient", "", "", "")
    for dtype, steps in results["loss_step"].items():
        add_loss_step_rows(table, dtype, steps)
    return table


def plot_curves(results):
    """PNG bytes: losses of both runs over the base's held-out loss, and below them their distance on a log scale."""
    curves = results["curves"]
    figure = Figure(figsize=(8, 6), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.axhline(
        results["held_out"]["docstrings"]["base_loss"],
        color=COLORS["base"],
        linestyle=":",
        label="base alone, held-out",
    )
    styles = {"auxkernels": {"linewidth": 3, "alpha": 0.6}, "eager": {"linewidth": 1, "linestyle": "--"}}
    trained = range(1, curves["steps"] + 1)
    for name, run in curves["runs"].items():
        upper.plot(trained, run["train_loss"], color=COLORS[name], linewidth=styles[name]["linewidth"] / 3, alpha=0.35)
        marker = "o" if name == "auxkernels" else "x"
        label = f"base + auxiliary, held-out, {name}"
        upper.plot(
            curves["evaluated_steps"],
            run["held_out_loss"],
            color=COLORS[name],
            marker=marker,
            label=label,
            **styles[name],
        )
    upper.set(ylabel="loss (nats per token)", title="Auxiliary tuning: base fitted on code, auxiliary on docstrings")
    upper.plot([], [], color="gray", alpha=0.6, linewidth=1, label="training batches, faint")
    upper.legend(frameon=False)
    first, second = (run["train_loss"] for run in curves["runs"].values())
    distance = [max(abs(a - b), 1e-9) for a, b in zip(first, second, strict=True)]
    lower.semilogy(trained, distance, color=COLORS["difference"], linewidth=1)
    lower.axhline(curves["bound"], color=COLORS["base"], linestyle=":", label="bound")
    lower.set(xlabel="step", ylabel="|auxkernels - eager|")
    lower.legend(frameon=False)
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def write_results(results, folder):
    """Write demo.png and demo.json under `folder`, each whole or not at all; returns their paths."""
    contents = {"demo.png": plot_curves(results), "demo.json": (json.dumps(results, indent=2) + "\n").encode()}
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return [folder / name for name in contents]
