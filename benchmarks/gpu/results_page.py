"""``python -m benchmarks.gpu.results_page``: parts of docs/performance.md, written from rows of benchmarks/results.

"Verified on" follows from <device>-check.jsonl, of each part the newest row, and for each implementation from its own
parts ("tests-native"), whatever became of the others'; "Speed" from the rows of <device>.jsonl, of each case the newest
run, apart for GPUs and CPUs; "Scaling" from scaling/rows.jsonl. They lie between markers there; all else is written by
hand.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from benchmarks.chart import shown_cases
from benchmarks.files import RESULTS, ROOT, with_section, write_atomically
from benchmarks.scaling import slopes
from benchmarks.timing.harness import shape_text
from benchmarks.timing.implementations import OWN_BACKENDS
from benchmarks.timing.report import floor_text, read_rows

COMMAND = "python -m benchmarks.gpu.results_page"
# what is compared in a case: its statistics where it is about these
OWN = {"stats": "auxkernels logit_stats", "stats_training": "auxkernels return_stats"}


class Implementation(NamedTuple):
    """One of ours on GPUs: its name on the page, and what the tests show of it where there is no GPU."""

    title: str
    compiles_for: tuple[str, ...]
    compiles: str


IMPLEMENTATIONS = {
    "triton": Implementation(
        "triton",
        ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942"),
        "compiles ahead of time without spills in the loops (`make test-all`; for sm_90 with Triton 3.6 too; heads "
        "without logits: NVIDIA only)",
    ),
    "native": Implementation(
        "native (CUDA C++)",
        ("sm_80", "sm_90a", "sm_100"),
        "compiles without spills (float64: a few registers), with the copies and wide accesses expected "
        "(`make test-all`, where there is an nvcc)",
    ),
}
# what each part of the check beside the tests shows where it has passed: "repeats-native" and so on
SHOWN = {
    "values": "small calls of every kind",
    "repeats": "250 runs alike",
    "graphs": "CUDA graphs and streams",
    "memcheck": "memcheck",
    "synccheck": "synccheck",
    "racecheck": "racecheck",
}


# -- verified on -------------------------------------------------------------------------------------------------------


def newest_parts(rows: list[dict]) -> dict[str, dict]:
    """The newest row of each part of a check."""
    return {row["part"]: row for row in sorted(rows, key=lambda row: row["date"])}


def is_verified(parts: dict[str, dict], name: str) -> bool:
    """Whether the suite's tests of the implementation have passed, and none of its small calls gave wrong values."""
    tests, values = parts.get(f"tests-{name}"), parts.get(f"values-{name}")
    has_wrong_values = values is not None and values["status"] == "failed"
    return tests is not None and tests["status"] == "passed" and not has_wrong_values


def _reason_against(parts: dict[str, dict], name: str) -> str | None:
    """Why it could not be used there; None if it could, or if nobody has asked."""
    newest = max(parts.values(), key=lambda row: row["date"])
    return newest.get("unusable", {}).get(name)


def verified_text(checks: list[dict[str, dict]]) -> str:
    lines = ["| on GPUs | device | status |", "|---|---|---|"]
    for name, implementation in IMPLEMENTATIONS.items():
        on_devices = [_device_line(name, parts) for parts in checks]
        lines += on_devices
        compiled_for = ", ".join(_not_verified(implementation, name, checks))
        if compiled_for:
            has_run = any(_may_have_run(parts, name) for parts in checks)
            verdict = "unverified there" if has_run else "has not run on a GPU: unverified"
            lines.append(f"| {implementation.title} | {compiled_for} | {implementation.compiles}; **{verdict}** |")
    return "\n".join([*lines, "", _command_text(checks)])


def _may_have_run(parts: dict[str, dict], name: str) -> bool:
    return _reason_against(parts, name) is None


def _not_verified(implementation: Implementation, name: str, checks: list[dict[str, dict]]) -> list[str]:
    """The architectures that it compiles for, less those of devices that it is verified on."""
    verified = {f"sm_{_capability(parts).replace('.', '')}" for parts in checks if is_verified(parts, name)}
    return [target for target in implementation.compiles_for if target.removesuffix("a") not in verified]


def _capability(parts: dict[str, dict]) -> str:
    return next(iter(parts.values())).get("capability") or "?"


def _device_line(name: str, parts: dict[str, dict]) -> str:
    row = parts.get(f"tests-{name}") or next(iter(parts.values()))
    versions = f"driver {row.get('driver')}, CUDA {row.get('cuda')}, torch {row['torch']}"
    versions += f", triton {row['triton']}" if name == "triton" else ""
    device = f"{row['device']} (sm_{_capability(parts).replace('.', '')}), {versions}"
    return f"| {IMPLEMENTATIONS[name].title} | {device} | {_status(name, parts)} |"


def _status(name: str, parts: dict[str, dict]) -> str:
    shown = _shown_text(name, parts)
    if (reason := _reason_against(parts, name)) is not None:
        return f"**it could not be used there ({_escaped(reason)}): unverified**"
    tests = parts.get(f"tests-{name}")
    if tests is None:
        return f"**its tests have not been run there: unverified**{shown}"
    source = f"{_escaped(tests['detail'])}; commit {commit_text(tests)}, {tests['date'][:10]}"
    if tests["status"] != "passed":
        return f"**its tests did not pass there ({source}): unverified**{shown}"
    if not is_verified(parts, name):
        return f"**its tests passed ({source}) and small calls did not: unverified**{shown}"
    return f"verified by its part of `pytest -m gpu` ({source}){shown}"


def _shown_text(name: str, parts: dict[str, dict]) -> str:
    """What the implementation's other parts have shown, and which of them have not."""
    commits = {row["commit"] for part, row in parts.items() if part == f"tests-{name}"}
    passed, others = [], []
    for check, shown in SHOWN.items():
        row = parts.get(f"{check}-{name}")
        if row is None:
            continue
        if row["status"] == "passed":
            passed.append(shown if row["commit"] in commits else f"{shown} (commit {commit_text(row)})")
        else:
            others.append(f"{check} {row['status']} ({_escaped(row['detail'])})")
    text = f"; also {', '.join(passed)}" if passed else ""
    return text + (f"; **not: {', '.join(others)}**" if others else "")


def commit_text(row: dict) -> str:
    return f"{row['commit']}{' with changes' if row.get('is_dirty') else ''}"


def _escaped(text: str) -> str:
    """In one cell of a table."""
    return re.sub(r"\s+", " ", text.replace("|", "\\|")).strip()


def _command_text(checks: list[dict[str, dict]]) -> str:
    text = """\
What only a GPU can show, `python -m benchmarks.gpu.check` finds out in two runs of at most 330 s and keeps in
`benchmarks/results/`; see [GPU check](#gpu-check)."""
    return text + ("" if checks else " It has not been run yet.")


# -- speed -------------------------------------------------------------------------------------------------------------


def speed_text(devices: list[list[dict]], checks: list[dict[str, dict]], results: Path, page: Path) -> str:
    if not devices:
        return "No GPU has been measured."
    by_slug = {next(iter(parts.values()))["device_slug"]: parts for parts in checks}
    return "\n\n".join(_speed_of(rows, by_slug.get(rows[0]["device_slug"], {}), results, page) for rows in devices)


def cpu_speed_text(devices: list[list[dict]], results: Path, page: Path) -> str:
    return "\n\n".join(_cpu_speed_of(rows, results, page) for rows in devices) or "No CPU has been measured."


def _cpu_speed_of(rows: list[dict], results: Path, page: Path) -> str:
    cases = shown_cases(rows)
    newest = _newest_of(cases)
    half = newest.get("bfloat16") or "without instructions for bfloat16"
    said = f"{newest['device']}, {newest['threads']} threads, {newest['native_isa']}, {half}, torch {newest['torch']}; "
    said += f"{_commits_of(cases)}; copy {newest['copy_gbps']:.0f} GB/s, products of float32 "
    said += f"{newest['gemm_gflops']['float32']:.0f} and of bfloat16 {newest['gemm_gflops']['bfloat16']:.0f} GFLOP/s. "
    said += "Medians of calls with a cold cache. "
    kept = newest.get("memory") == "kept"
    said += "**The C library keeps all memory**, for all." if kept else "Memory as it comes from the operating system."
    return "\n\n".join([said, *_tables(cases, newest, results, page)])


def _newest_of(cases: dict[tuple, list[dict]]) -> dict:
    return max((row for group in cases.values() for row in group), key=lambda row: row["date"])


def _commits_of(cases: dict[tuple, list[dict]]) -> str:
    commits = sorted({commit_text(row) for group in cases.values() for row in group})
    return f"commit {', '.join(commits)}, {_newest_of(cases)['date'][:10]}"


def _tables(cases: dict[tuple, list[dict]], newest: dict, results: Path, page: Path) -> list[str]:
    """One for each operator, and the device's chart."""
    blocks = [_speed_table([cases[key] for key in keys]) for _, keys in groupby(cases, key=lambda key: key[0])]
    chart = results / f"{newest['device_slug']}.png"
    if chart.exists():
        blocks.append(f"![share of the floor and time relative to auxkernels]({os.path.relpath(chart, page.parent)})")
    return blocks


def _speed_of(rows: list[dict], parts: dict[str, dict], results: Path, page: Path) -> str:
    cases = shown_cases(rows)
    newest = _newest_of(cases)
    said = f"{newest['device']}, driver {newest.get('driver')}, torch {newest['torch']}, triton {newest['triton']}; "
    said += f"{_commits_of(cases)}; copy {newest['copy_gbps']:.0f} GB/s, bfloat16 "
    said += f"products {newest['gemm_gflops']['bfloat16'] / 1000:.0f} TFLOP/s. Medians of calls with a cold cache."
    absent = [name for name, version in newest.get("peers", {}).items() if version.startswith("unavailable")]
    if any(pass_name in OWN for _, pass_name, *_ in cases):
        said += " Statistics (`stats`) are compared with eager's, with a gradient (`stats_training`) with a plain loss."
    said += f" Not there to compare with: {', '.join(absent)}." if absent else ""
    unverified = [own.title for name, own in IMPLEMENTATIONS.items() if not is_verified(parts, name)]
    said += f" **Tests have not passed there: {', '.join(unverified)}.**" if unverified else ""
    return "\n\n".join([said, *_tables(cases, newest, results, page)])


def _speed_table(cases: list[list[dict]]) -> str:
    """Share of the floor of ours, as chosen and by name, and how many times faster than each baseline the former is."""
    row = cases[0][0]
    timed = [{row["implementation"]: row for row in case if row["time_us"]} for case in cases]
    for case, rows in zip(cases, timed, strict=True):
        rows["auxkernels"] = rows.get(OWN.get(case[0]["pass"], "auxkernels"))
    own = ["auxkernels", *(name for name in OWN_BACKENDS if any(name in rows for rows in timed))]
    compared = ("yardstick", "baseline")
    others = {name: None for t in timed for name, row in t.items() if row and row["role"] in compared}
    titles = [_own_title(name) for name in own] + [f"than {name}" for name in others]
    lines = [
        f"| {row['op']}: share of the floor ({floor_text(row)}); times faster | {' | '.join(titles)} |",
        f"|---|{'---|' * len(titles)}",
    ]
    for case, rows in zip(cases, timed, strict=True):
        if rows["auxkernels"] is None:
            continue
        shares = [_share(rows.get(name)) for name in own]
        ratios = [_ratio(rows.get(name), rows["auxkernels"]) for name in others]
        lines.append(f"| {_case_text(case[0])} | {' | '.join(shares + ratios)} |")
    return "\n".join(lines)


def _own_title(name: str) -> str:
    return "share" if name == "auxkernels" else name.removeprefix("auxkernels ").strip("()")


def _case_text(row: dict) -> str:
    return f"{row['pass']} {shape_text(row['shape'])} {row['dtype']} {row['inputs']}"


def _share(row: dict | None) -> str:
    return f"{100 * row['share_of_floor']:.0f} %" if row and row["share_of_floor"] else ""


def _ratio(row: dict | None, own: dict) -> str:
    return f"{row['time_us'] / own['time_us']:.2f}x" if row else ""


# -- scaling -----------------------------------------------------------------------------------------------------------

SCALING = f"""\
How the time of a call grows with each of its sizes, all others fixed (`python -m benchmarks.scaling`): slopes in
logarithms, 1 where time is proportional to the size, with standard errors. Beside them those of eager PyTorch, of the
floor (a copy of the same bytes, or the bare matrix products), and of the bytes and multiplications that no kernel can
do without. Where time grows faster than both by more than its spread explains, the line says by how much; by chance
alone one set of tables in {1 / slopes.FALSE_ALARMS:.0f} has such a line. "Fixed" is a call too small for its work to
matter, and its share of the ladder's smallest; "threads" how many times faster more threads are. Cells have a value for
each number of threads."""


def scaling_text(rows: list[dict]) -> str:
    """A table for each device and operator."""
    slugs = sorted({row["device_slug"] for row in rows})
    blocks = [block for slug in slugs for block in _scaling_of([row for row in rows if row["device_slug"] == slug])]
    return "\n\n".join([SCALING, *(blocks or ["No device has been measured."])])


def _scaling_of(rows: list[dict]) -> list[str]:
    found = slopes.ladders(rows)
    shown = [row for ladder in found for row in ladder.rows]
    newest = max(shown, key=lambda row: row["date"])
    threads = " and ".join(map(str, sorted({ladder.threads for ladder in found})))
    said = f"{newest['device']}, {threads} threads, {newest['native_isa']}, torch {newest['torch']}; commit "
    said += f"{', '.join(sorted({commit_text(row) for row in shown}))}, {newest['date'][:10]}."
    blocks = [said]
    for op in dict.fromkeys(ladder.op for ladder in found):
        cells = [(f"{op}: slopes over", *slopes.HEADER[1:]), ("---",) * len(slopes.HEADER), *slopes.lines(found, op)]
        blocks.append("\n".join(f"| {' | '.join(line)} |" for line in cells))
    return blocks


# -- the file ----------------------------------------------------------------------------------------------------------


def read_checks(results: Path) -> list[dict[str, dict]]:
    """Newest parts of each device's check."""
    found = (newest_parts(read_rows(path)) for path in sorted(results.glob("*-check.jsonl")))
    return [parts for parts in found if parts]


def read_devices(results: Path, *, of_gpus: bool) -> list[list[dict]]:
    """The benchmark's rows of each device; those of CUDA have a compute capability; those timed at least once."""
    files = (path for path in sorted(results.glob("*.jsonl")) if not path.stem.endswith("-check"))
    found = ([row for row in read_rows(path) if bool(row.get("capability")) == of_gpus] for path in files)
    return [rows for rows in found if any(row["time_us"] for row in rows)]


def sections(results: Path, page: Path) -> dict[str, str]:
    checks = read_checks(results)
    return {
        "verified on GPUs": verified_text(checks),
        "speed on GPUs": speed_text(read_devices(results, of_gpus=True), checks, results, page),
        "speed on CPUs": cpu_speed_text(read_devices(results, of_gpus=False), results, page),
        "scaling": scaling_text(read_rows(results / "scaling" / "rows.jsonl")),
    }


def rewritten(text: str, texts: dict[str, str]) -> str:
    """A page with new text between its markers. Raises ValueError where a pair of markers is missing."""
    for name, new in texts.items():
        text = with_section(text, name, COMMAND, new)
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.partition(": ")[2])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the page is out of date")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="benchmarks/results")
    options = parser.parse_args(arguments)
    old = options.page.read_text()
    new = rewritten(old, sections(options.results.resolve(), options.page.resolve()))
    if options.check:
        name = options.page.name
        print(
            f"{name} is up to date" if old == new else f"{name} is out of date: python -m benchmarks.gpu.results_page"
        )
        return int(old != new)
    if old != new:
        write_atomically(options.page, lambda temporary: temporary.write_text(new))
    return 0


if __name__ == "__main__":
    sys.exit(main())
