"""Python of a documentation page.

A section, which a heading of the second level begins, is a session of its own: what stands before the page's first one
runs ahead of it.
"""

import re
import textwrap
from pathlib import Path

BLOCKS = re.compile(r"^( *)```python\n(.*?)^\1```", flags=re.MULTILINE | re.DOTALL)
FENCES = re.compile(r"^( *)(```+)([^\n]*)\n(.*?)^\1\2$", flags=re.MULTILINE | re.DOTALL)
FIRST = ""  # what precedes the first heading of the second level


def headings_of(page: Path) -> list[str]:
    """Its headings of all levels, and none of a comment in code."""
    return re.findall(r"^#+ (.*)", FENCES.sub("", page.read_text()), flags=re.MULTILINE)


def sections_of(page: Path) -> dict[str, str]:
    """The text of each section."""
    sections, heading, in_code = {FIRST: ""}, FIRST, False
    for line in page.read_text().splitlines(keepends=True):
        in_code ^= line.lstrip().startswith("```")
        if not in_code and line.startswith("## "):
            heading = line[3:].strip()
            sections[heading] = ""
        sections[heading] += line
    return sections


def blocks_in(text: str) -> list[str]:
    return [textwrap.dedent(block) for _, block in BLOCKS.findall(text)]


def session_of(page: Path, section: str) -> list[str]:
    """The blocks that run one after the other."""
    sections = sections_of(page)
    return blocks_in(sections[FIRST]) + (blocks_in(sections[section]) if section != FIRST else [])


def sessions_of(page: Path) -> list[str]:
    """The sections that have Python; that in front of all others where none has."""
    sections = sections_of(page)
    with_code = [heading for heading, text in sections.items() if heading != FIRST and blocks_in(text)]
    return with_code or ([FIRST] if blocks_in(sections[FIRST]) else [])


def names_after(page: Path, section: str) -> dict:
    """A section's names when its session has run, in one module."""
    names: dict = {"__name__": page.stem}
    for block in session_of(page, section):
        exec(compile(block, str(page), "exec"), names)
    return names


def run(place, page: str, section: str) -> None:
    """The same on a process among others."""
    names_after(Path(page), section)
