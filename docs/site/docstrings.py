"""The package's docstrings as Markdown, for the site's API pages: an extension of griffe.

A docstring consists of paragraphs and of entries, which are names, two spaces or more, and text that goes on in the
same column:

    target        [*] int32 or int64, each in [0, V) or equal to ignore_index.
    normalizer    number or 0-d tensor: the divisor of "mean" instead (the whole batch's count makes gradient
                  accumulation exact).

An entry becomes an item of a definition list. Names of public functions and classes in backticks become links.
"""

from __future__ import annotations

import ast
import html
import re
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).parents[2]
# of which the API pages have every public name
MODULES = ("auxkernels", "auxkernels.models", "auxkernels.models.base_cache")
ENTRY = re.compile(r"(?P<names>\S+(?: \S+)*?) {2,}(?P<text>\S.*)")
NAMES = re.compile(r"\*{0,2}[A-Za-z_][\w.]*(?:, \*{0,2}[A-Za-z_][\w.]*)*")
SHAPE = re.compile(r"\[(?:[\w*.'+/ -]+, )*[\w*.'+/ -]*\*[^\[\]]*\]")  # [*, V]: not the beginning of emphasis
PAGE = re.compile(r"docs/(\w+)\.md")


def public_names(module: str) -> list[str]:
    """What `__all__` of a module lists, read and not imported."""
    path = ROOT.joinpath(*module.split("."), "__init__.py")
    (value,) = (
        node.value
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return ast.literal_eval(value)


def place_of(module: str, name: str) -> str:
    """By which path an API page names it: a function that has its folder's name is found in the folder."""
    is_folder = ROOT.joinpath(*module.split("."), name, "__init__.py").exists()
    return f"{module}.{name}.{name}" if is_folder else f"{module}.{name}"


def links() -> dict[str, str]:
    """Of each public name, where it is documented."""
    found: dict[str, str] = {}
    for module in MODULES:
        for name in public_names(module):
            found.setdefault(name, place_of(module, name))
    return found


LINKS = links()


def markdown_of(docstring: str) -> str:
    lines = docstring.splitlines()
    out: list[str] = []
    while lines:
        line = lines.pop(0)
        if line.startswith("    "):  # code, or a formula
            out += ["", line]
            while lines and (lines[0].startswith("    ") or not lines[0].strip()):
                out.append(lines.pop(0))
            out.append("")
            continue
        entry = ENTRY.fullmatch(line)
        if entry is None and not (NAMES.fullmatch(line) and lines and lines[0].startswith("  " * 4)):
            out.append(text_of(line))
            continue
        below = []
        while lines and (lines[0].startswith(" ") or (not lines[0].strip() and _goes_on(lines))):
            below.append(lines.pop(0))
        names, text = (entry["names"], entry["text"]) if entry else (line, "")
        column = entry.start("text") if entry else len(below[0]) - len(below[0].lstrip())
        out += ["", term_of(names), "", *_definition(text, below, column), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip() + "\n"


def _goes_on(lines: list[str]) -> bool:
    return len(lines) > 1 and lines[1].startswith(" " * 8)


def _definition(text: str, below: list[str], column: int) -> list[str]:
    """Lines in the entry's column are its text; others, further to the left, are entries of its own."""
    texts, inner = [text] if text else [], []
    for line in below:
        is_text = not inner and len(line) - len(line.lstrip()) >= column
        (texts if is_text else inner).append(line.strip() if is_text else line)
    found = [text_of(line) for line in texts]
    if inner:
        indent = min(len(line) - len(line.lstrip()) for line in inner if line.strip())
        found += ["", *markdown_of("\n".join(line[indent:] for line in inner)).splitlines()]
    return [(":   " if i == 0 else "    ") + line if line else "" for i, line in enumerate(found)]


def term_of(names: str) -> str:
    if names in ("Raises", "Returns", "Source") or not NAMES.fullmatch(names):
        return f"**{text_of(names)}**"
    return ", ".join(f"`{name}`" for name in names.split(", "))


def text_of(line: str) -> str:
    """A line with links, and without anything that only Markdown would take for a mark."""
    pieces = re.split(r"(`[^`]*`)", line)
    for i, piece in enumerate(pieces):
        if i % 2:
            name = piece.strip("`")
            pieces[i] = f"[{piece}][{LINKS[name]}]" if name in LINKS else piece
            continue
        shapes = re.split(f"({SHAPE.pattern})", piece)
        pieces[i] = "".join(f"`{part}`" if j % 2 else _escaped(part) for j, part in enumerate(shapes))
    return re.sub(r"^(Raises|Returns|Source)(?= )", r"**\1**", "".join(pieces))


def _escaped(text: str) -> str:
    marked = re.sub(r"([*_\[\]])", r"\\\1", html.escape(text, quote=False)).replace("$", "&#36;")
    parts = PAGE.split(marked)
    return "".join(f'<a href="../{part}.html">{part}</a>' if i % 2 else part for i, part in enumerate(parts))


class Layout(griffe.Extension):
    """Docstrings of this package, before they are rendered."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown_of(obj.docstring.value)
