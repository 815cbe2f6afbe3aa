"""``python -m benchmarks.versions``: which releases the tests ran with, as docs/performance.md has it.

``--run PATHS`` has pytest run those tests, in the environment whose Python runs this, and appends what was found to the
rows in benchmarks/results/versions; what stands after ``--`` is pytest's. ``--write`` writes the table: of each
environment and kind of package the newest run of the same tests.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.files import RESULTS, ROOT, with_section, write_atomically

ROWS = RESULTS / "versions/tests.jsonl"
PAGE = ROOT / "docs/performance.md"
COMMAND = "python -m benchmarks.versions --write"
RELEASES = ("torch", "triton", "transformers")
INTRODUCTION = f"""What the tests ran with, a row for each run, written by `{COMMAND}` from the rows that
`python -m benchmarks.versions --run tests/...` adds. "wheel" is the repaired wheel, installed; "source" the checkout
with its module compiled in place. Skipped are tests of what the environment lacks; tests that need a GPU are left out
where there is none, and counted nowhere. What has no row was not run: pyproject.toml allows ranges, of which these are
some releases."""


def release(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def processor() -> str:
    """The processor's name, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{platform.machine()}, {names[0]}" if names else platform.machine()


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def environment() -> dict[str, str | bool]:
    import auxkernels

    place = Path(auxkernels.__file__).parents[1]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": git("rev-parse", "--short=12", "HEAD"),
        # of what the tests read; the rows themselves and other pages are none of it
        "is_dirty": bool(git("status", "--porcelain", "auxkernels", "csrc", "tests", "setup.py", "pyproject.toml")),
        "python": platform.python_version(),
        **{name: release(name) for name in RELEASES},
        "processor": processor(),
        "package": "source" if place == ROOT else "wheel",
    }


def counts_of(report: Path) -> dict[str, int]:
    """What pytest's report in JUnit's XML says; an error while a test is set up is a failure."""
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    total = dict.fromkeys(("tests", "skipped", "failures", "errors"), 0)
    for suite in suites:
        for name in total:
            total[name] += int(suite.get(name, "0"))
    failed = total["failures"] + total["errors"]
    return {"passed": total["tests"] - failed - total["skipped"], "skipped": total["skipped"], "failed": failed}


def run(paths: list[str], options: list[str], rows: Path) -> int:
    """pytest's exit status; a run that found no tests, or was broken off, adds no row."""
    row = environment()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), f"--junitxml={report}"]
        status = subprocess.run([*command, *options, *(str(ROOT / path) for path in paths)]).returncode
        if status not in (0, 1):
            return status
        chosen = [f'{flag} "{words}"' for flag, words in pairwise(options) if flag in ("-m", "-k")]
        row |= {"tests": " ".join([*paths, *chosen]), **counts_of(report)}
    # not by benchmarks.timing.report: it imports more than the tests need
    old = rows.read_text() if rows.exists() else ""
    write_atomically(rows, lambda path: path.write_text(f"{old}{json.dumps(row)}\n"))
    return status


def newest(rows: list[dict]) -> list[dict]:
    """Of each environment and package the newest run of the same tests; newest Python first."""
    of_environment = {}
    for row in rows:
        of_environment[tuple(row[name] for name in ("python", *RELEASES, "processor", "package", "tests"))] = row
    return sorted(of_environment.values(), key=lambda row: [int(n) for n in row["python"].split(".")], reverse=True)


def section(rows: list[dict]) -> str:
    header = ["Python", *RELEASES, "package", "tests", "passed", "skipped", "failed", "processor", "commit", "date"]
    lines = [
        [
            *(row[name] for name in ("python", *RELEASES, "package")),
            " ".join(f"`{word}`" if "/" in word else word for word in row["tests"].split()),
            *(str(row[name]) for name in ("passed", "skipped", "failed")),
            row["processor"],
            row["commit"] + (" (changed)" if row["is_dirty"] else ""),
            row["date"],
        ]
        for row in newest(rows)
    ]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *lines])
    return f"{INTRODUCTION}\n\n{table}"


def page() -> str:
    """docs/performance.md, with what it says of versions written anew."""
    return with_section(PAGE.read_text(), "versions", COMMAND, section(read_rows(ROWS)))


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.versions", description=__doc__)
    parser.add_argument("--run", nargs="+", metavar="PATH", help="run these tests, and append a row")
    parser.add_argument("--write", action="store_true", help="write it into docs/performance.md")
    parser.add_argument("options", nargs="*", help="after --: options of pytest")
    arguments = parser.parse_args(argv)
    status = run(arguments.run, arguments.options, ROWS) if arguments.run else 0
    if arguments.write:
        text = page()
        write_atomically(PAGE, lambda path: path.write_text(text))
    if not arguments.run and not arguments.write:
        print(section(read_rows(ROWS)))
    return status


if __name__ == "__main__":
    sys.exit(main())
