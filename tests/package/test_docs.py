"""Every page's Python runs, from its first block to its last, in one session; every link and path leads somewhere."""

import importlib.util
import re
from pathlib import Path

import pages
import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [page for page in sorted(DOCS.glob("*.md")) if pages.blocks_of(page)]
TEXTS = [*sorted(DOCS.glob("*.md")), *sorted(ROOT.glob("*.md"))]


def test_there_are_pages():
    of_operators = {"distributed", "operators", "recipes"}
    of_models = {
        "base_cache",
        "caches",
        "memory",
        "models",
        "parallel_training",
        "peft",
        "saving",
        "serving",
        "several_auxiliaries",
        "tokenizers",
        "trainer",
        "trl",
    }
    assert of_operators | of_models <= {page.stem for page in PAGES}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_pages_examples_run_in_their_order(page):
    for package in re.findall(r"^(?:import|from) (\w+)", "\n".join(pages.blocks_of(page)), flags=re.MULTILINE):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    pages.run(None, str(page))


def test_the_index_lists_every_page():
    listed = re.findall(r"\]\((\w+\.md)\)", (DOCS / "README.md").read_text())
    assert len(listed) == len(set(listed))
    assert set(listed) >= {page.name for page in DOCS.glob("*.md")} - {"README.md"}


def _anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


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
