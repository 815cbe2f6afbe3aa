"""Chart of the newest result of every case: share of the floor, and time relative to auxkernels."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import torch

from benchmarks.cross_entropy import cases as cross_entropy
from benchmarks.files import write_atomically
from benchmarks.heads import cases as cross_entropy_heads
from benchmarks.soft_embedding import cases as soft_embedding
from benchmarks.timing.harness import shape_text
from benchmarks.timing.report import case_key, floor_text

# colours of Okabe and Ito, told apart by colour-blind readers too; a marker of its own where a colour comes twice
STYLES = {
    "auxkernels": ("#009E73", "o"),
    "auxkernels (triton)": ("#0072B2", "o"),
    "auxkernels (cuda)": ("#CC79A7", "D"),
    "auxkernels kernel alone": ("#56B4E9", "D"),
    "auxkernels, stored logits": ("#56B4E9", "d"),
    "auxkernels logit_stats": ("#0072B2", "P"),
    "auxkernels return_stats": ("#CC79A7", "X"),
    "auxkernels reference": ("#999999", "v"),
    "eager": ("#D55E00", "s"),
    "eager upcast": ("#E69F00", "^"),
    "compile upcast": ("#000000", "x"),
    "compile": ("#000000", "x"),
    "F.gumbel_softmax": ("#D55E00", "p"),
    "F.one_hot": ("#D55E00", "<"),
    "eager, each token": ("#D55E00", ">"),
    "eager, each segment": ("#E69F00", "s"),
    "F.linear_cross_entropy": ("#0072B2", "1"),
    "F.linear_cross_entropy chunked": ("#999999", "2"),
    "Liger": ("#D55E00", "*"),
    "Cut Cross Entropy": ("#F0E442", "h"),
    "QuACK": ("#000000", "+"),
    "QuACK, gradient in forward": ("#0072B2", "3"),
}
MAX_CASES = 80
# drawn as rings around the one that "auxkernels" has chosen
OPEN = ("auxkernels (triton)", "auxkernels (cuda)")
PASS_LABELS = {
    "forward": "forward",
    "training": "training",
    "both": "both",
    "half_ignored": "half ignored",
    "lora": "LoRA",
    "stats": "stats",
    "stats_training": "stats + training",
    "autocast": "autocast",
    "gumbel": "Gumbel",
    "gumbel_training": "Gumbel + training",
    "straight_through": "straight-through",
    "planner": "planner",
    "planner_training": "planner + training",
    "decode": "decode",
    "decode_top_k": "decode, top-k",
}


def newest_cases(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Rows of the last run of each case, which were timed together; the calls bound by overhead have no floor."""
    cases: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["pass"] in PASS_LABELS:
            known = cases.get(case_key(row), [])
            is_same_run = bool(known) and known[0]["date"] == row["date"]
            cases[case_key(row)] = [*known, row] if is_same_run else [row]
    passes = list(PASS_LABELS)
    order = sorted(cases, key=lambda key: (key[0], passes.index(key[1]), key[3:], key[2]))
    return {key: cases[key] for key in order}


def shown_cases(rows: list[dict]) -> dict[tuple, list[dict]]:
    """The timed ones of `newest_cases`; of hundreds, as a GPU's full grid has, those of the quick grid."""
    cases = {key: group for key, group in newest_cases(rows).items() if any(row["time_us"] for row in group)}
    if len(cases) <= MAX_CASES or "capability" not in rows[-1]:
        return cases
    device = torch.device("cuda")
    ops = (cross_entropy, cross_entropy_heads, soft_embedding)
    quick = {(op.OP, *spec[:4]) for op in ops for spec in op.quick_specs(device)}  # in the order of a case's key
    return {key: group for key, group in cases.items() if key in quick}


def draw(rows: list[dict], path: Path) -> bool:
    """Writes the chart, a row of panels for each operator; False where no case has a time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = shown_cases(rows)
    if not cases:
        return False
    by_op = {op: [cases[key] for key in keys] for op, keys in groupby(cases, key=lambda key: key[0])}
    counts = [len(groups) for groups in by_op.values()]
    size = (13, 1.4 + 0.9 * len(by_op) + 0.36 * sum(counts))
    layout = {"height_ratios": [count + 1 for count in counts], "layout": "constrained", "squeeze": False}
    figure, panels = pyplot.subplots(len(by_op), 2, figsize=size, sharey="row", **layout)
    shown = {}
    for groups, (left, right) in zip(by_op.values(), panels, strict=True):
        for position, group in enumerate(groups):
            shown |= _draw_case(left, right, position, group)
        _finish_axes(left, right, groups)
    commits = sorted({f"{row['commit']}{' (changed)' if row['is_dirty'] else ''}" for g in cases.values() for row in g})
    device, is_cpu = rows[-1]["device"], "capability" not in rows[-1]
    threads = f", {rows[-1]['threads']} threads" if is_cpu else ""
    figure.suptitle(f"auxkernels on {device}{threads}; commit {', '.join(commits)}", fontsize=11)
    names = [name for name in STYLES if name in shown]
    handles = [shown[name] for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130))
    pyplot.close(figure)
    return True


def _label(row: dict) -> str:
    return f"{PASS_LABELS[row['pass']]}  {shape_text(row['shape'])}  {row['dtype']} {row['inputs']}"


def _draw_case(left, right, position: int, group: list[dict]) -> dict:
    shown = {}
    own_us = next((row["time_us"] for row in group if row["implementation"] == "auxkernels"), None)
    for row in group:
        if not row["time_us"] or row["implementation"] not in STYLES:
            continue
        colour, marker = STYLES[row["implementation"]]
        style = {"color": colour, "marker": marker, "markersize": 7, "linestyle": "none", "clip_on": False}
        if row["implementation"] in OPEN:
            style |= {"markersize": 11, "fillstyle": "none"}
        if row["share_of_floor"]:
            (shown[row["implementation"]],) = left.plot(100 * row["share_of_floor"], position, **style)
        if own_us:
            right.plot(row["time_us"] / own_us, position, **style)
    return shown


def _finish_axes(left, right, groups: list[list[dict]]) -> None:
    row, labels = groups[0][0], [_label(group[0]) for group in groups]
    left.set_title(row["op"], loc="left", fontsize=10, fontweight="bold")
    left.set_yticks(range(len(labels)), labels, fontsize=9)
    left.set_ylim(len(labels) - 0.5, -0.5)
    left.set_xlim(left=0)
    left.axvline(100, color="#888888", linewidth=1)
    left.set_xlabel(f"share of the floor, % (100 = {floor_text(row)})")
    right.set_xscale("log")
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if _is_inside(tick, right.get_xlim())]
    right.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    right.minorticks_off()
    right.axvline(1, color="#888888", linewidth=1)
    right.set_xlabel("time relative to auxkernels (right of 1x: slower)")
    for axis in (left, right):
        axis.grid(True, color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)


def _is_inside(tick: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= tick <= limits[1]
