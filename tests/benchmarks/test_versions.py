"""What docs/performance.md says of versions is what the command writes, from rows that a run of the tests adds."""

import pytest

from benchmarks import versions

TESTS = """
import pytest
def test_passes(): pass
def test_fails(): assert {}
def test_of_something_else(): pytest.skip("not here")
"""


def test_the_page_is_what_the_command_writes():
    assert versions.PAGE.read_text() == versions.page()


@pytest.mark.parametrize("is_broken", [False, True])
def test_a_run_adds_a_row_with_what_passed(tmp_path, is_broken):
    (tmp_path / "test_some.py").write_text(TESTS.format(not is_broken))
    rows = tmp_path / "rows.jsonl"
    options = ["-q", "-p", "no:cacheprovider", f"--confcutdir={tmp_path}", "-k", "not nothing"]
    assert versions.run([str(tmp_path)], options, rows) == int(is_broken)
    (row,) = versions.read_rows(rows)
    assert row["tests"] == f'{tmp_path} -k "not nothing"'
    assert row["package"] in ("source", "wheel") and row["torch"] == versions.release("torch")
    assert (row["passed"], row["skipped"], row["failed"]) == ((1, 1, 1) if is_broken else (2, 1, 0))
    assert versions.run([str(tmp_path / "nothing")], options, rows) not in (0, 1)
    assert len(versions.read_rows(rows)) == 1


def test_the_newest_run_of_the_same_tests_counts():
    row = versions.environment() | {"tests": "tests/sampling", "skipped": 0, "failed": 0}
    older, newer, other = row | {"passed": 1}, row | {"passed": 2}, row | {"passed": 3, "python": "3.99.0"}
    assert versions.newest([older, other, newer]) == [other, newer]
