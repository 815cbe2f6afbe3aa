"""What pages say of several processes runs on several; that it runs on one, the other pages' test shows."""

from pathlib import Path

import pages
import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, section",
    [("heads", "A vocabulary over several processes"), ("models", "Training on several processes")],
)
def test_section_runs_on_four_processes(running, name, section):
    """On all of them, as the default group has them."""
    page = Path(__file__).parents[2] / "docs" / f"{name}.md"
    running.run(4, pages.run, str(page), section, limit=900.0)  # transformers is imported by all of them at once
