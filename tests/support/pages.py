"""Python of a documentation page."""

import re
import textwrap
from pathlib import Path

BLOCKS = re.compile(r"^( *)```python\n(.*?)^\1```", flags=re.MULTILINE | re.DOTALL)


def blocks_of(page: Path) -> list[str]:
    return [textwrap.dedent(block) for _, block in BLOCKS.findall(page.read_text())]


def run(place, page: str) -> None:
    """From its first block to its last, in one session; place: of a process among others."""
    names: dict = {"__name__": Path(page).stem}
    for block in blocks_of(Path(page)):
        exec(compile(block, page, "exec"), names)
