"""Every page's Python runs, from its first block to its last, in one session."""

import importlib.util
import re
import textwrap
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
BLOCKS = re.compile(r"^( *)```python\n(.*?)^\1```", flags=re.MULTILINE | re.DOTALL)
PAGES = [page for page in sorted(DOCS.glob("*.md")) if BLOCKS.search(page.read_text())]


def test_there_are_pages():
    pages = {"caches", "memory", "peft", "saving", "several_auxiliaries", "tokenizers", "trainer", "trl"}
    assert pages <= {page.stem for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_pages_examples_run_in_their_order(page):
    blocks = [textwrap.dedent(block) for _, block in BLOCKS.findall(page.read_text())]
    for package in re.findall(r"^(?:import|from) (\w+)", "\n".join(blocks), flags=re.MULTILINE):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    names: dict = {"__name__": page.stem}
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
