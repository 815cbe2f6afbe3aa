"""The site: every public name has its place on an API page, every page its place in the navigation.

Read without the site's tools. That it builds, and that all links of the result lead somewhere, `make docs` shows.
"""

import ast
import importlib.util
import re
import sys
import types
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
DIRECTIVES = [
    path
    for page in sorted((DOCS / "api").glob("*.md"))
    for path in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.MULTILINE)
]
TARGETS = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
# of the rest of the package: under another name in `auxkernels`, and for annotations alone
ELSEWHERE = {"settings": "chunk_settings", "Model": None}


@pytest.fixture(scope="module")
def docstrings():
    """The site's extension of griffe, without griffe."""
    name, path = "site_docstrings", DOCS / "site" / "docstrings.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "griffe", types.SimpleNamespace(Extension=object, Object=object))
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def _file_of(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    return next((one for one in (path / "__init__.py", path.with_suffix(".py")) if one.exists()), None)


def _names_in(path: Path) -> set[str]:
    """What a module defines or imports at its top."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {ast.unparse(target) for target in node.targets}
    return names


def test_every_public_name_is_on_one_api_page(docstrings):
    wanted = set(docstrings.links().values())
    assert len(wanted) > 40
    counts = Counter(DIRECTIVES)
    assert not wanted - set(counts)
    assert set(counts.values()) == {1}


def test_what_other_folders_export_is_on_an_api_page():
    documented = {path.rpartition(".")[2] for path in DIRECTIVES}
    exported = set()
    for path in (ROOT / "auxkernels").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                exported |= set(ast.literal_eval(node.value))
    assert {ELSEWHERE.get(name, name) for name in exported} - {None} <= documented


@pytest.mark.parametrize("path", DIRECTIVES)
def test_an_api_page_names_what_there_is(path):
    module, _, name = path.rpartition(".")
    assert _file_of(path) is not None or name in _names_in(_file_of(module))


def test_the_navigation_has_every_page_once_and_ten_beside_the_api():
    assert sorted(TARGETS) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
    assert len([target for target in TARGETS if not target.startswith("api/")]) <= 10


def test_included_files_are_there():
    included = {
        page.name: re.findall(r"<!-- site: (\S+) -->\n.*?<!-- end of site -->", page.read_text(), flags=re.DOTALL)
        for page in DOCS.glob("*.md")
    }
    assert {name: paths for name, paths in included.items() if paths} == {
        "README.md": ["../README.md"],
        "changelog.md": ["../CHANGELOG.md"],
    }


def test_entries_of_a_docstring_become_definitions(docstrings):
    given = """The sum.

base, aux    [*, V] floating point, `Logits`, 2**n or a < b; see
             docs/heads.md.
len(cache)   how many
    inner    of it
Returns      float32, and more.
Raises TypeError: never.
"""
    assert (
        docstrings.markdown_of(given)
        == r"""The sum.

`base`, `aux`

:   `[*, V]` floating point, [`Logits`][auxkernels.Logits], 2\*\*n or a &lt; b; see
    <a href="../heads.html">heads</a>.

**len(cache)**

:   how many

    `inner`

    :   of it

**Returns**

:   float32, and more.

**Raises** TypeError: never.
"""
    )
