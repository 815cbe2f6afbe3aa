"""What MkDocs does beside what it is configured to, for pages that are read on the forge as they are, too.

* Between `<!-- site: PATH -->` and `<!-- end of site -->` a page has what another file says.
* Links to figures outside of docs/ lead to copies; links to other files there are their paths.
* Formulas become MathML, which browsers show by themselves: no script, and nothing from elsewhere.
* Every link and anchor of the finished site leads somewhere, and no page fetches anything from elsewhere.
"""

from __future__ import annotations

import html
import os
import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
IN_SITE = {"README.md": "README.md", "CHANGELOG.md": "changelog.md"}  # files of the root that pages include
INCLUDED = re.compile(r"<!-- site: (\S+) -->.*?<!-- end of site -->", flags=re.DOTALL)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?://)([^()\s#]*)(#[^()\s]*)?\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)


# -- pages -------------------------------------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """With the figures that pages show."""
    for file in list(files.documentation_pages()):
        folder = Path(file.abs_src_path).parent
        for mark, _, path, _ in LINK.findall(Path(file.abs_src_path).read_text()):
            figure = (folder / path).resolve()
            if mark and DOCS not in figure.parents and files.get_file_from_path(_copy_of(figure)) is None:
                files.append(File.generated(config, _copy_of(figure), abs_src_path=str(figure)))
    return files


def _copy_of(figure: Path) -> str:
    return f"figures/{figure.relative_to(ROOT).as_posix()}"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    folder = Path(page.file.abs_src_path).parent
    at = page.file.src_uri
    included = INCLUDED.search(markdown)
    if included is None:
        return _with_links(markdown, folder, at)
    path = (folder / included[1]).resolve()
    text = _with_links(path.read_text(), path.parent, at)
    rest = _with_links(markdown[included.end() :], folder, at)
    return text + rest  # whose title is the page's


def _with_links(markdown: str, folder: Path, at: str) -> str:
    """Links of a file in `folder`, for the page `at`."""

    def of_page(link: re.Match[str]) -> str:
        mark, text, path, anchor = link.groups(default="")
        if not path:
            return link[0]
        target = (folder / path).resolve()
        if DOCS in target.parents:
            found = target.relative_to(DOCS).as_posix()
        elif target.relative_to(ROOT).as_posix() in IN_SITE:
            found = IN_SITE[target.relative_to(ROOT).as_posix()]
        elif mark:
            found = _copy_of(target)
        else:
            name = target.relative_to(ROOT).as_posix()
            return f"{text}" if text == name.removesuffix(".md") else f"{text} (`{name}`)"
        return f"{mark}[{text}]({posixpath.relpath(found, posixpath.dirname(at) or '.')}{anchor})"

    parts = re.split(r"(^ *```.*?^ *```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if i % 2 else LINK.sub(of_page, part) for i, part in enumerate(parts))


def on_page_content(text: str, page: Any, config: Any, files: Any) -> str:
    def mathml(formula: re.Match[str]) -> str:
        is_block = formula[1] == "div"
        found = convert(html.unescape(formula[2]).strip(), display="block" if is_block else "inline")
        found = re.sub(r"(?<!<msup>)<mi>(log|tanh)</mi>", r'\g<0><mspace width="0.17em"/>', found)
        found = re.sub(r"<mo>(KL|max|softmax)</mo>", r'<mi>\1</mi><mspace width="0.1em"/>', found)
        return f'<div class="formula">{found}</div>' if is_block else found

    return FORMULA.sub(mathml, text)


# -- the finished site -------------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """Its anchors, where it leads, and what it fetches."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.fetched: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if value and (name == "id" or (tag == "a" and name == "name")):
                self.anchors.add(value)
            if value and name in ("href", "src"):
                self.links.add(value)
                if tag != "a":
                    self.fetched.add(value)


def on_post_build(config: Any) -> None:
    """Raises PluginError where a link of a page leads nowhere, or a page needs more than the site."""
    site = Path(config.site_dir)
    pages = {path: _Page(path.read_text()) for path in site.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links are from the site's root
            continue
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.fetched:
                    broken.append(f"{path.relative_to(site)}: fetches {link}")
                continue
            target = Path(os.path.normpath(path.parent / unquote(parts.path))) if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                broken.append(f"{path.relative_to(site)}: {link}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                broken.append(f"{path.relative_to(site)}: {link}: no such anchor")
    if broken:
        raise PluginError("what leads nowhere, or is fetched from elsewhere:\n" + "\n".join(broken))
