"""The pages about several processes run on several processes; that they run on one, the other pages' test shows."""

from pathlib import Path

import pages
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distributed", "parallel_training"])
def test_page_runs_on_four_processes(running, name):
    """On all of them, as the default group has them."""
    page = Path(__file__).parents[2] / "docs" / f"{name}.md"
    running.run(4, pages.run, str(page), limit=900.0)  # transformers is imported by all of them at once
