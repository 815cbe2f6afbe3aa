"""README's Python runs, from the first block to the last, in one session."""

import re
import textwrap
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_the_examples_run_in_their_order():
    blocks = re.findall(r"^( *)```python\n(.*?)^\1```", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    names: dict = {}
    for _, block in blocks:
        exec(compile(textwrap.dedent(block), README.name, "exec"), names)
    assert len(blocks) >= 4
    assert names["loss"].isfinite() and names["per_layer"].shape == (10, 2048, 256)
    assert names["W_aux"].grad.isfinite().all() and names["aux"].grad.isfinite().all()


def test_what_is_said_of_gpus_is_what_the_rows_say():
    """Not where the package is tested as installed: the benchmarks are not part of it."""
    pytest.importorskip("rich")
    readme_sections = pytest.importorskip("benchmarks.gpu.readme_sections")
    assert readme_sections.main(["--check"]) == 0, "python -m benchmarks.gpu.readme_sections"
