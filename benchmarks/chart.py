"""Chart of the newest result of every case: share of the floor, and time relative to auxkernels."""

from __future__ import annotations

from pathlib import Path

from .report import case_key, write_atomically

# colours of Okabe and Ito, told apart by colour-blind readers too
STYLES = {
    "auxkernels": ("#009E73", "o"),
    "auxkernels kernel alone": ("#56B4E9", "D"),
    "auxkernels logit_stats": ("#0072B2", "P"),
    "auxkernels return_stats": ("#CC79A7", "X"),
    "auxkernels reference": ("#999999", "v"),
    "eager": ("#D55E00", "s"),
    "eager upcast": ("#E69F00", "^"),
    "compile upcast": ("#000000", "x"),
}
PASS_ORDER = ("forward", "training", "both", "stats", "stats_training")


def newest_cases(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Rows of the last run of each case, which were timed together; the calls bound by overhead have no floor."""
    cases: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["pass"] in PASS_ORDER:
            known = cases.get(case_key(row), [])
            is_same_run = bool(known) and known[0]["date"] == row["date"]
            cases[case_key(row)] = [*known, row] if is_same_run else [row]
    return {key: cases[key] for key in sorted(cases, key=lambda key: (PASS_ORDER.index(key[0]), key[3:], key[1:3]))}


def draw(rows: list[dict], path: Path) -> bool:
    """Writes the chart; False where no case has a time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = {key: group for key, group in newest_cases(rows).items() if any(row["time_us"] for row in group)}
    if not cases:
        return False
    size = (13, 2.2 + 0.36 * len(cases))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    labels, shown = [], {}
    for position, (key, group) in enumerate(cases.items()):
        name, num_rows, num_columns, dtype, inputs = key
        labels.append(f"{name.replace('_', ' + ')}  {num_rows} x {num_columns}  {dtype} {inputs}")
        shown |= _draw_case(left, right, position, group)
    _finish_axes(left, right, labels)
    commits = sorted({f"{row['commit']}{' (changed)' if row['is_dirty'] else ''}" for g in cases.values() for row in g})
    device, threads = rows[-1]["device"], rows[-1]["threads"]
    figure.suptitle(f"auxkernels on {device}, {threads} threads; commit {', '.join(commits)}", fontsize=11)
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, frameon=False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130))
    pyplot.close(figure)
    return True


def _draw_case(left, right, position: int, group: list[dict]) -> dict:
    shown = {}
    own_us = next((row["time_us"] for row in group if row["implementation"] == "auxkernels"), None)
    for row in group:
        if not row["time_us"] or row["implementation"] not in STYLES:
            continue
        colour, marker = STYLES[row["implementation"]]
        style = {"color": colour, "marker": marker, "markersize": 7, "linestyle": "none", "clip_on": False}
        if row["share_of_floor"]:
            (shown[row["implementation"]],) = left.plot(100 * row["share_of_floor"], position, **style)
        if own_us:
            right.plot(row["time_us"] / own_us, position, **style)
    return shown


def _finish_axes(left, right, labels: list[str]) -> None:
    left.set_yticks(range(len(labels)), labels, fontsize=9)
    left.set_ylim(len(labels) - 0.5, -0.5)
    left.set_xlim(left=0)
    left.axvline(100, color="#888888", linewidth=1)
    left.set_xlabel("share of the floor, % (100 = a copy of the same bytes)")
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
