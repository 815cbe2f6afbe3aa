"""Where CUDA C++ is said to be the faster: only where it was measured so, on a device where its tests have passed."""

import json

import pytest

from . import choices, report
from .choices import CUDA, TRITON, Box
from .cross_entropy import Spec
from .gpu_rows_testing import case_rows, check_row, rows_of_tests


def rows_of(ratios, pass_name="training", dtype="bf16", inputs="flat", **changes):
    """Rows in which Triton took `ratio` times as long as CUDA C++, by (rows, vocabulary)."""
    found = []
    for shape, ratio in ratios.items():
        times_us = {TRITON: 100.0 * ratio, CUDA: 100.0, "auxkernels": 100.0}
        found += case_rows("cross_entropy", Spec(pass_name, shape, dtype, inputs), times_us, 90.0, **changes)
    return found


def chosen(tmp_path, rows, checks=None):
    """What the file would hold."""
    for row in rows:
        report.append_rows(tmp_path / f"{row['device_slug']}.jsonl", [row])
    for row in rows_of_tests() if checks is None else checks:
        report.append_rows(tmp_path / f"{row['device_slug']}-check.jsonl", [row])
    return choices.choices(tmp_path)


def boxes_of(found, capability="9.0"):
    return [tuple(box.values()) for box in found[capability]["faster"]]


GRID = {(rows, vocab): 1.2 for rows in (1024, 8192) for vocab in (32000, 65536, 128256)}


def test_a_box_spans_what_was_won(tmp_path):
    found = chosen(tmp_path, rows_of(GRID))
    assert found == {
        "9.0": {
            "device": "Imaginary H100",
            "commit": "0123456789ab",
            "faster": [
                {"pass": "training", "num_bytes": 2, "min_vocab": 32000, "max_vocab": 128256}
                | {"min_rows": 1024, "max_rows": 8192}
            ],
        }
    }


@pytest.mark.parametrize("ratio", [0.8, 1.0, 1.019])
def test_what_was_not_clearly_won_is_in_no_box(tmp_path, ratio):
    found = chosen(tmp_path, rows_of(GRID | {(1024, 65536): ratio}))
    assert boxes_of(found) == [
        ("training", 2, 32000, 32000, 1024, 8192),
        ("training", 2, 32000, 128256, 8192, 8192),
        ("training", 2, 128256, 128256, 1024, 8192),
    ]
    assert not any(Box(*box[2:]).holds(65536, 1024) for box in boxes_of(found))


def test_a_loss_everywhere_is_an_entry_without_boxes(tmp_path):
    assert chosen(tmp_path, rows_of(dict.fromkeys(GRID, 0.9)))["9.0"]["faster"] == []


def test_every_kind_of_input_and_dtype_of_a_width_must_be_won(tmp_path):
    size = (8192, 128256)
    rows = [*rows_of({size: 1.5}), *rows_of({size: 1.5}, inputs="peaked"), *rows_of({size: 1.5}, dtype="fp32")]
    assert boxes_of(chosen(tmp_path, rows)) == [
        ("training", 2, 128256, 128256, 8192, 8192),
        ("training", 4, 128256, 128256, 8192, 8192),
    ]
    found = chosen(
        tmp_path, [*rows_of({size: 0.9}, dtype="fp16"), *rows_of({size: 0.9}, dtype="fp32", inputs="peaked")]
    )
    assert boxes_of(found) == []


def test_passes_have_boxes_of_their_own(tmp_path):
    rows = [*rows_of(GRID), *rows_of(dict.fromkeys(GRID, 0.5), "forward"), *rows_of(GRID, "stats")]
    assert {box[0] for box in boxes_of(chosen(tmp_path, rows))} == {"training", "stats"}


def test_a_box_has_measured_corners_and_no_long_steps():
    assert choices.boxes({(32000, 1024): True, (128256, 8192): True}) == [
        Box(32000, 32000, 1024, 1024),
        Box(128256, 128256, 8192, 8192),
    ]
    far = {(vocab, rows): True for vocab in (4096, 32000) for rows in (8, 64)}
    assert choices.boxes(far) == [Box(4096, 4096, 8, 64), Box(32000, 32000, 8, 64)]
    assert choices.boxes({(32000, 1): True, (32000, 64): True}) == [Box(32000, 32000, 1, 1), Box(32000, 32000, 64, 64)]
    assert choices.boxes({(32000, rows): True for rows in (1, 8, 64)}) == [Box(32000, 32000, 1, 64)]


def test_no_box_holds_a_size_that_was_lost():
    won = {(vocab, rows): (vocab // 1000 + rows) % 3 > 0 for vocab in range(1000, 9000, 1000) for rows in (1, 2, 4, 8)}
    found = choices.boxes(won)
    assert found and not any(box.holds(*size) for box in found for size, is_won in won.items() if not is_won)
    assert all(any(box.holds(*size) for box in found) for size, is_won in won.items() if is_won)


NATIVE = "tests-native"
DOUBTFUL = {
    "no check": [],
    "tests failed": [check_row(NATIVE, "failed")],
    "tests stopped": [check_row(NATIVE, "stopped")],
    "nothing tested": [check_row(NATIVE, "skipped")],
    "wrong values": [check_row(NATIVE), check_row("values-native", "failed")],
    "Triton's tests": [check_row("tests-triton")],
    "other parts": [check_row("memcheck-native")],
    "another device": [check_row(NATIVE, device="Imaginary A100")],
    "failed since": [check_row(NATIVE), check_row(NATIVE, "failed", date="2027-01-01")],
}


@pytest.mark.parametrize("doubt", DOUBTFUL)
def test_without_passed_tests_on_the_device_nothing_is_chosen(tmp_path, doubt):
    assert chosen(tmp_path, rows_of(GRID), DOUBTFUL[doubt]) == {}


@pytest.mark.parametrize("status", ["failed", "stopped", None])
def test_what_became_of_tritons_tests_does_not_matter_to_a_choice_of_cuda(tmp_path, status):
    checks = [check_row(NATIVE), *([check_row("tests-triton", status)] if status else [])]
    assert len(boxes_of(chosen(tmp_path, rows_of(GRID), checks))) == 1


def test_both_must_have_been_timed_in_the_same_run(tmp_path):
    both = rows_of({(8192, 128256): 1.5})
    apart = [row for row in both if row["implementation"] != TRITON]
    assert chosen(tmp_path, apart) == {}
    later = [row | {"date": "2026-12-02T00:00:00+00:00"} for row in both if row["implementation"] == TRITON]
    assert chosen(tmp_path, later, []) == {}
    refused = [row | {"time_us": None} if row["implementation"] == CUDA else row for row in both]
    assert chosen(tmp_path, refused, []) == {}


def test_the_newest_run_and_commit_count(tmp_path):
    old = rows_of(GRID, commit="aaaaaaaaaaaa", date="2026-11-01")
    new = rows_of({(8192, 128256): 1.5}, commit="bbbbbbbbbbbb")
    again = rows_of({(8192, 32000): 1.5}, commit="bbbbbbbbbbbb", date="2026-12-03")
    found = chosen(tmp_path, [*new, *old, *again])
    assert found["9.0"]["commit"] == "bbbbbbbbbbbb"
    assert boxes_of(found) == [
        ("training", 2, 32000, 32000, 8192, 8192),
        ("training", 2, 128256, 128256, 8192, 8192),
    ]
    lost = rows_of({(8192, 128256): 0.5}, commit="bbbbbbbbbbbb", date="2026-12-04")
    assert boxes_of(chosen(tmp_path, lost)) == [("training", 2, 32000, 32000, 8192, 8192)]


def test_devices_of_one_capability_must_agree_and_others_are_apart(tmp_path):
    other, older = {"device": "Imaginary H200"}, {"device": "Imaginary A100", "capability": "8.0"}
    rows = [*rows_of(GRID), *rows_of(GRID | {(8192, 128256): 0.9}, **other), *rows_of(GRID, **older)]
    found = chosen(tmp_path, rows, [*rows_of_tests(), *rows_of_tests(**other), *rows_of_tests(**older)])
    assert found["9.0"]["device"] == "Imaginary H100, Imaginary H200" and list(found) == ["8.0", "9.0"]
    assert not any(Box(*box[2:]).holds(128256, 8192) for box in boxes_of(found))
    assert len(found["8.0"]["faster"]) == 1


def test_the_file_is_written_only_where_there_is_something_to_say(tmp_path, capsys):
    output = tmp_path / "out" / "cuda_choices.json"
    options = ["--results", str(tmp_path), "--output", str(output)]
    assert choices.main(options) == 0 and not output.exists()
    assert "nothing to choose by" in capsys.readouterr().out
    found = chosen(tmp_path, rows_of(GRID))
    assert choices.main(options) == 0 and json.loads(output.read_text()) == found
    assert "9.0 (Imaginary H100): CUDA C++ is the faster in 1 boxes" in capsys.readouterr().out
