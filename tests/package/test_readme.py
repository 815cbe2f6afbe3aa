"""README's Python runs, from the first block to the last, in one session; what it says in brief, the pages say too."""

import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
RESULTS = ROOT / "docs" / "performance.md"


def test_the_examples_run_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a Trainer makes its folder
    blocks = re.findall(r"^( *)```python\n(.*?)^\1```", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    names: dict = {}
    for _, block in blocks:
        exec(compile(textwrap.dedent(block), README.name, "exec"), names)
    assert len(blocks) >= 4
    assert names["loss"].isfinite() and names["stats"].entropy.shape == (512,)
    assert names["W_aux"].grad.isfinite().all() and names["aux"].grad.isfinite().all()
    assert names["mix"].shape == names["choice"].shape == (512, 256)
    assert names["model"].aux.lm_head.weight.any() and names["tokens"].shape == (2, 12)


def test_a_newcomer_reads_it_in_five_minutes():
    text = README.read_text()
    assert len(text.splitlines()) <= 200
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).splitlines()
    assert not [line for line in prose if len(line) > 120 and not line.startswith("|")]


def test_each_speed_is_one_of_the_results():
    table = re.search(r"^## Speed\n(.*?)^## ", README.read_text(), flags=re.MULTILINE | re.DOTALL)[1]
    speeds = re.findall(r"[\d.]+x(?= \|)", table)
    assert len(speeds) > 5
    assert not set(speeds) - set(re.findall(r"[\d.]+x(?= \|)", RESULTS.read_text()))


@pytest.mark.parametrize("implementation", ["triton", "native (CUDA C++)"])
def test_it_calls_unverified_on_gpus_what_the_results_do(implementation):
    def rows_of(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith(f"| {implementation} |")]

    (said,) = rows_of(README.read_text())
    shown = rows_of(RESULTS.read_text().partition("| on GPUs |")[2])
    assert shown
    assert ("unverified" in said) == all("verified by its part of" not in line for line in shown)


def test_what_is_said_of_devices_is_what_the_rows_say():
    """Not where the package is tested as installed: the benchmarks are not part of it."""
    pytest.importorskip("rich")
    results_page = pytest.importorskip("benchmarks.gpu.results_page")
    assert results_page.main(["--check"]) == 0, "python -m benchmarks.gpu.results_page"
