"""``make links``: asks every address that the pages and docstrings lead to, and lists those that do not answer.

Not part of the checks of a change: what it finds lies with others. Its exit status is 1 where it finds something.
"""

from __future__ import annotations

import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[2]
ADDRESS = re.compile(r"https://[^\s)>`\"'\]]+")
NOT_PAGES = ("https://download.pytorch.org/whl/cpu",)  # an index for pip


def addresses() -> dict[str, Path]:
    """Each, and a file that has it."""
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "auxkernels").rglob("*.py")]
    found = {one.rstrip(".,;:"): path for path in files for one in ADDRESS.findall(path.read_text())}
    return {one: path for one, path in sorted(found.items()) if one not in NOT_PAGES and "{" not in one}


def fault_of(address: str) -> str | None:
    request = urllib.request.Request(address, headers={"User-Agent": "auxkernels documentation"})
    try:
        with urllib.request.urlopen(request, timeout=30):
            return None
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        return str(error)


def main() -> int:
    faults = {one: fault for one in addresses() if (fault := fault_of(one))}
    for address, fault in faults.items():
        print(f"{addresses()[address].relative_to(ROOT)}: {address}: {fault}")
    print(f"{len(addresses())} addresses, {len(faults)} of which do not answer")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
