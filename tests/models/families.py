"""Writes docs/models.md: what works with each family of transformers, as `family_trials` finds it.

python tests/models/families.py --write [family ...]
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

import transformers

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from family_configs import families  # noqa: E402
from family_trials import COLUMNS, WORKS, results_of  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
Results = dict[str, "dict[str, str] | str"]
BEGIN, END = "<!-- written by `python tests/models/families.py --write` -->", "<!-- end of families -->"
_LISTS = {"kept": "Everything works", "none": "Everything works, without a cache"}
_LIMITED, _NOT_BUILT = "With limits", "Not built"


# -- to text -----------------------------------------------------------------------------------------------------------


def _all_work(result) -> bool:
    return isinstance(result, dict) and all(result[name] == WORKS for name in COLUMNS if name != "cache")


def written(results: Results, version: str) -> str:
    """What stands between the markers."""
    lines = [f"Found with transformers {version}, {len(results)} families."]
    for cache, title in _LISTS.items():
        names = [f"`{name}`" for name, one in results.items() if _all_work(one) and one["cache"] == cache]
        lines += ["", f"### {title}", "", f"{len(names)} families:", *_wrapped(names)]
    limited = {name: one for name, one in results.items() if isinstance(one, dict) and not _all_work(one)}
    reasons = sorted({one[name] for one in limited.values() for name in COLUMNS if name != "cache"} - {WORKS})
    lines += ["", f"### {_LIMITED}", "", f"| family | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for family, one in limited.items():
        cells = (f"({reasons.index(one[name]) + 1})" if one[name] in reasons else one[name] for name in COLUMNS)
        lines.append(f"| `{family}` | {' | '.join(cells)} |")
    lines += ["", *(f"{n}. {reason}" for n, reason in enumerate(reasons, 1))]
    lines += ["", f"### {_NOT_BUILT}", ""]
    lines += [f"* `{name}`: {one}" for name, one in results.items() if isinstance(one, str)]
    return "\n".join(lines)


def _wrapped(names: list[str]) -> list[str]:
    lines = [""]
    for name in names:
        if len(lines[-1]) + len(name) > 116:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + name + ("," if name is not names[-1] else ".")
    return lines


# -- from text ---------------------------------------------------------------------------------------------------------


def between_markers(page: str) -> str:
    return page.partition(BEGIN)[2].partition(END)[0].strip()


def version_of(page: str) -> str:
    return re.search(r"Found with transformers (\S+),", page)[1]


def read(page: str) -> Results:
    """The results that a page states."""
    sections = dict(re.findall(r"^### ([^\n]+)\n(.*?)(?=^### |\Z)", between_markers(page), re.MULTILINE | re.DOTALL))
    results: Results = {}
    for cache, title in _LISTS.items():
        for name in re.findall(r"`([^`]+)`", sections[title]):
            results[name] = dict.fromkeys(COLUMNS, WORKS) | {"cache": cache}
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", sections[_LIMITED], re.MULTILINE))
    for family, cells in re.findall(r"^\| `([^`]+)` \| (.*) \|$", sections[_LIMITED], re.MULTILINE):
        found = (reasons[cell[1:-1]] if cell.startswith("(") else cell for cell in cells.split(" | "))
        results[family] = dict(zip(COLUMNS, found, strict=True))
    results |= dict(re.findall(r"^\* `([^`]+)`: (.*)$", sections[_NOT_BUILT], re.MULTILINE))
    return dict(sorted(results.items()))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--write", action="store_true", help="write the page's part; otherwise print what does not work"
    )
    parser.add_argument("families", nargs="*", help="these alone (the page keeps the others); none: all")
    options = parser.parse_args(arguments)
    results = read(PAGE.read_text()) if options.families and options.write else {}
    for family in options.families or sorted(families()):
        start = time.perf_counter()
        results[family] = results_of(family)
        if not options.write:
            found = WORKS if _all_work(results[family]) else results[family]
            print(f"{family} ({time.perf_counter() - start:.1f} s): {found}", flush=True)
    if options.write:
        page = PAGE.read_text()
        head, tail = page.partition(BEGIN)[0], page.partition(END)[2]
        text = written(dict(sorted(results.items())), transformers.__version__)
        PAGE.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
