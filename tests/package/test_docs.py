"""The pages: every block of Python runs, section by section; every link and path leads somewhere.

That every public name has its place on a page, tests/package/test_site.py shows.
"""

import importlib.util
import re
from pathlib import Path

import pages
import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
SESSIONS = [(page, section) for page in PAGES for section in pages.sessions_of(page)]
TEXTS = [*sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("*.md"))]


def test_every_block_of_python_is_in_a_session():
    """And what else is Python is one session with an engine that has an environment of its own."""
    of_operators = {"decoding", "heads", "losses", "soft_labels"}
    assert {page.stem for page, _ in SESSIONS} == of_operators | {"models", "performance"}
    for page in PAGES:
        ran = {block for one, section in SESSIONS if one == page for block in pages.session_of(page, section)}
        assert len(ran) == len(re.findall(r"^ *```python$", page.read_text(), flags=re.MULTILINE))
    fences = [(page.stem, *fence[2:]) for page in PAGES for fence in pages.FENCES.findall(page.read_text())]
    assert {language for _, language, _ in fences} == {"console", "python"}
    typed = [(page, text.splitlines()[0]) for page, _, text in fences if re.search("^ *>>>", text, flags=re.MULTILINE)]
    assert typed == [("decoding", ">>> from vllm import LLM, SamplingParams")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page, section", SESSIONS, ids=[f"{page.stem}: {section or 'whole page'}" for page, section in SESSIONS]
)
def test_a_sections_examples_run_in_their_order(page, section):
    code = "\n".join(pages.session_of(page, section))
    for package in re.findall(r"^(?:import|from) (\w+)", code, flags=re.MULTILINE):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    pages.run(None, str(page), section)


def test_the_start_page_lists_every_page():
    listed = re.findall(r"\]\(([\w/]+\.md)\)", (DOCS / "README.md").read_text())
    assert len(listed) == len(set(listed))
    assert set(listed) == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} - {"README.md"}


def _anchors(page: Path) -> list[str]:
    """Of the headings, as GitHub and the site make them."""
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in pages.headings_of(page)]


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: str(page.relative_to(DOCS)))
def test_an_anchor_is_one_headings(page):
    """GitHub and the site number those of equal headings in different ways."""
    anchors = _anchors(page)
    assert len(anchors) == len(set(anchors))


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_what_there_is(page):
    links = re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]*))?\)", page.read_text())
    missing = {path for path, _ in links if not (page.parent / path).exists()}
    assert not missing
    for path, anchor in links:
        assert not anchor or anchor in _anchors(page.parent / path if path else page), anchor


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_of_the_code_are_those_of_the_checkout(page):
    paths = re.findall(r"`((?:auxkernels|csrc|tests|benchmarks|docs)/[\w./*]*)`", page.read_text())
    assert not [path for path in paths if not list(ROOT.glob(path.rstrip("/")))]


def _files_with(pattern: str) -> set[str]:
    """Of the package, its models aside, and of csrc."""
    sources = [
        path
        for folder, kinds in (("auxkernels", "*.py"), ("csrc", "*.[chi]*"))
        for path in (ROOT / folder).rglob(kinds)
        if "models" not in path.parts
    ]
    assert len(sources) > 50
    return {str(path.relative_to(ROOT)) for path in sources if re.search(pattern, path.read_text())}


@pytest.mark.parametrize(
    "heading, pattern",
    [
        ("To add a scanned statistic", r"\b(mean_base|kMeanBase)\b"),
        ("as `target_rank`", r"\b(target_rank|kTargetRank|TARGET_RANK|num_above|count_above)\b"),
        ("as `z_loss`", r"\bz_loss\b"),
    ],
)
def test_recipes_name_the_files_that_the_last_one_of_its_kind_is_in(heading, pattern):
    """The tables of CONTRIBUTING, where the option or statistic that each gives as its example is spelled out."""
    _, _, text = (ROOT / "CONTRIBUTING.md").read_text().partition(heading)
    table = re.search(r"^\| files.*?\n\n", text, flags=re.MULTILINE | re.DOTALL)[0]
    assert set(re.findall(r"`((?:auxkernels|csrc)/[\w/]+\.\w+)`", table)) == _files_with(pattern)
