"""What docs/performance.md says of devices, of invented rows: nothing is verified untested, newest rows count."""

import re

import invented_rows as invented
import pytest
from invented_rows import case_rows, check_row, rows_of_tests

from benchmarks.chart import draw, newest_cases, shown_cases
from benchmarks.cross_entropy import cases as cross_entropy
from benchmarks.cross_entropy.cases import Spec
from benchmarks.gpu import results_page
from benchmarks.timing import report

TEXT = """# title

<!-- verified on GPUs: written by `python -m benchmarks.gpu.results_page` -->
<!-- end of verified on GPUs -->

by hand

<!-- speed on GPUs: written by `python -m benchmarks.gpu.results_page` -->
old
<!-- end of speed on GPUs -->
<!-- speed on CPUs: written by `python -m benchmarks.gpu.results_page` -->
<!-- end of speed on CPUs -->
<!-- scaling: written by `python -m benchmarks.gpu.results_page` -->
<!-- end of scaling -->
the end
"""
TRAINING = Spec("training", (8192, 128256), "bf16", "flat")


def texts(tmp_path, checks=(), rows=()):
    """What the page would say of these rows: "verified on GPUs" and "speed on GPUs"."""
    for row in checks:
        report.append_rows(tmp_path / f"{row['device_slug']}-check.jsonl", [row])
    for row in rows:
        report.append_rows(tmp_path / f"{row['device_slug']}.jsonl", [row])
    sections = results_page.sections(tmp_path, tmp_path / "results.md")
    return sections["verified on GPUs"], sections["speed on GPUs"]


def lines_with(text, *words):
    return [line for line in text.splitlines() if all(word in line for word in words)]


def says_of_cuda(verified: str, architectures: str, verdict: str) -> bool:
    start, end = f"| native (CUDA C++) | {architectures} | compiles ", f"; **{verdict}** |"
    return re.search(f"^{re.escape(start)}.*{re.escape(end)}$", verified, re.MULTILINE) is not None


def test_without_rows_nothing_is_claimed(tmp_path):
    verified, speed = texts(tmp_path)
    assert speed == "No GPU has been measured."
    assert verified.count("**has not run on a GPU: unverified**") == len(results_page.IMPLEMENTATIONS) == 2
    assert "verified by" not in verified and verified.endswith("It has not been run yet.")
    assert "| native (CUDA C++) | sm_80, sm_90a, sm_100 | compiles without spills" in verified


@pytest.mark.parametrize(
    ("half", "memory", "says_half", "says_memory"),
    [
        ("AMX", "as it comes", "AMX", "Memory as it comes from the operating system."),
        (None, "kept", "without instructions for bfloat16", "**The C library keeps all memory**, for all."),
    ],
)
def test_rows_of_a_cpu_say_nothing_of_gpus(tmp_path, half, memory, says_half, says_memory):
    (row,) = case_rows("cross_entropy", TRAINING, {"auxkernels": 1.0}, 1.0)
    del row["capability"]
    row |= {"bfloat16": half, "memory": memory}
    row |= {"threads": 2, "native_isa": "avx512", "gemm_gflops": {"float32": 300.0, "bfloat16": 1900.0}}
    row |= {"commit": "fedcba987654", "date": "2026-12-04T00:00:00+00:00"}
    assert texts(tmp_path, rows=[row])[1] == "No GPU has been measured."
    said = results_page.sections(tmp_path, tmp_path / "results.md")["speed on CPUs"]
    machine = f"{row['device']}, 2 threads, avx512, {says_half}, torch {row['torch']}"
    assert f"{machine}; commit fedcba987654, 2026-12-04; copy" in said and says_memory in said
    assert "products of float32 300 and of bfloat16 1900 GFLOP/s." in said
    assert "| training 8192 x 128256 bf16 flat | 100 % |" in said


def test_passed_tests_verify_the_device_they_ran_on(tmp_path):
    memcheck = check_row("memcheck-native", detail="36 calls; ERROR SUMMARY: 0 errors")
    graphs = check_row("graphs-native", commit="fedcba987654")
    verified, _ = texts(tmp_path, [*rows_of_tests(), memcheck, check_row("repeats-native"), graphs])
    (line,) = lines_with(verified, "| native (CUDA C++) |", "Imaginary H100")
    assert "(sm_90), driver 570.1, CUDA 12.8, torch 2.13.0 | verified by its part of `pytest -m gpu` (3000 pas" in line
    assert "commit 0123456789ab, 2026-12-01); also 250 runs alike, " in line
    assert line.endswith("alike, CUDA graphs and streams (commit fedcba987654), memcheck |")
    (line,) = lines_with(verified, "| triton |", "Imaginary H100")
    assert "verified by its part" in line and "; also" not in line  # what CUDA C++ has shown is not Triton's
    assert says_of_cuda(verified, "sm_80, sm_100", "unverified there")
    assert lines_with(verified, "| triton | sm_80, sm_100, sm_120, gfx942 |", "**unverified there**")
    assert "It has not been run yet" not in verified


@pytest.mark.parametrize("status", ["failed", "stopped", "skipped"])
def test_without_passed_tests_no_row_is_called_verified(tmp_path, status):
    failed = rows_of_tests(status, detail="1 failed, 9 passed | odd")
    verified, _ = texts(tmp_path, [*failed, check_row("memcheck-native")])
    for line in lines_with(verified, "Imaginary H100"):
        assert "**its tests did not pass there (1 failed, 9 passed \\| odd; commit 0123456789ab, 2026-12-01)" in line
        assert "verified by" not in line
    assert "sm_80, sm_90a, sm_100" in verified


@pytest.mark.parametrize("status", ["failed", "stopped", None])
@pytest.mark.parametrize("other, name", [("triton", "native"), ("native", "triton")])
def test_each_implementation_is_verified_by_its_own_part_alone(tmp_path, name, other, status):
    rows = [check_row(f"tests-{name}")]
    rows += [check_row(f"{part}-{other}", status) for part in ("tests", "values", "repeats")] if status else []
    verified, speed = texts(tmp_path, rows, invented.quick_grid())
    (good, bad) = (results_page.IMPLEMENTATIONS[n].title for n in (name, other))
    assert lines_with(verified, f"| {good} | Imaginary H100", "verified by its part")
    assert not lines_with(verified, f"| {bad} | Imaginary H100", "verified by")
    assert f"**Tests have not passed there: {bad}.**" in speed


def test_wrong_values_of_small_calls_outweigh_passed_tests(tmp_path):
    verified, _ = texts(tmp_path, [*rows_of_tests(), check_row("values-triton", "failed", detail="1 not: bf16 loss")])
    (line,) = lines_with(verified, "| triton | Imaginary H100")
    assert "and small calls did not: unverified**; **not: values failed (1 not: bf16 loss)**" in line
    assert lines_with(verified, "| native (CUDA C++) | Imaginary H100", "verified by its part")


def test_a_check_without_its_tests_verifies_nothing(tmp_path):
    verified, _ = texts(tmp_path, [check_row("memcheck-native")])
    assert len(lines_with(verified, "Imaginary H100", "**its tests have not been run there: unverified**")) == 2
    assert lines_with(verified, "| native (CUDA C++) |", "unverified**; also memcheck (commit 0123456789ab) |")


def test_an_implementation_that_cannot_be_used_is_unverified(tmp_path):
    missing = {"triton": None, "native": "the CUDA module was not built: no nvcc"}
    rows = [check_row("tests-triton", unusable=missing), check_row("tests-native", "skipped", unusable=missing)]
    verified, _ = texts(tmp_path, rows)
    assert lines_with(verified, "| triton | Imaginary H100", "verified by its part")
    (line,) = lines_with(verified, "| native (CUDA C++) | Imaginary H100")
    assert "**it could not be used there (the CUDA module was not built: no nvcc): unverified**" in line
    assert says_of_cuda(verified, "sm_80, sm_90a, sm_100", "has not run on a GPU: unverified")
    assert lines_with(verified, "| triton | sm_80, sm_100, sm_120, gfx942 |", "**unverified there**")


def test_a_part_that_failed_is_named_beside_passed_tests(tmp_path):
    rows = [*rows_of_tests(), check_row("racecheck-native", "failed", detail="1 hazard")]
    verified, _ = texts(tmp_path, rows)
    (line,) = lines_with(verified, "| native (CUDA C++) | Imaginary H100")
    assert line.endswith("2026-12-01); **not: racecheck failed (1 hazard)** |")


def test_of_each_part_the_newest_row_counts(tmp_path):
    old = rows_of_tests(date="2026-12-02")
    new = rows_of_tests("failed", date="2026-12-03", detail="1 failed")
    verified, _ = texts(tmp_path, [*new, *old])
    assert "verified by" not in verified and "1 failed" in verified
    verified, _ = texts(tmp_path, rows_of_tests(date="2026-12-04", commit="fedcba987654", is_dirty=True))
    assert "verified by" in verified and "commit fedcba987654 with changes, 2026-12-04" in verified


def test_devices_are_told_apart(tmp_path):
    other = {"device": "Imaginary A100", "capability": "8.0"}
    checks = [*rows_of_tests(), *rows_of_tests("failed", detail="1 failed", **other)]
    rows = [*invented.quick_grid(), *invented.quick_grid(**other)]
    verified, speed = texts(tmp_path, checks, rows)
    assert len(lines_with(verified, "Imaginary H100", "verified by")) == 2
    assert len(lines_with(verified, "Imaginary A100 (sm_80)", "its tests did not pass there")) == 2
    a100, h100 = (speed.index(f"Imaginary {name}, driver") for name in ("A100", "H100"))
    assert a100 < h100 and speed.count("**Tests have not passed there: triton, native (CUDA C++).**") == 1
    assert "**Tests have not passed" in speed[a100:h100]


def test_speed_is_share_of_the_floor_and_ratios(tmp_path):
    times_us = {"copy (floor)": 100.0, "eager": 500.0, "Liger": 220.0, "auxkernels (triton)": 125.0}
    times_us |= {"auxkernels (cuda)": 110.0, "auxkernels": 110.0}
    old = case_rows("cross_entropy", TRAINING, dict.fromkeys(times_us, 100.0), 100.0, date="2026-11-01")
    _, speed = texts(tmp_path, rows=[*old, *case_rows("cross_entropy", TRAINING, times_us, 100.0)])
    assert "| share | triton | cuda | than eager | than Liger |" in speed
    assert "| training 8192 x 128256 bf16 flat | 91 % | 80 % | 91 % | 4.55x | 2.00x |" in speed
    assert "copy 3000 GB/s, bfloat16 products 700 TFLOP/s" in speed and "Not there to compare with: QuACK." in speed
    assert "2026-12-01" in speed and "2026-11-01" not in speed


def test_statistics_are_compared_with_statistics(tmp_path):
    times_us = {"eager": 600.0, "auxkernels": 100.0, "auxkernels logit_stats": 120.0, "auxkernels (cuda)": 105.0}
    _, speed = texts(tmp_path, rows=case_rows("cross_entropy", TRAINING._replace(pass_name="stats"), times_us, 90.0))
    assert "| stats 8192 x 128256 bf16 flat | 75 % | 86 % | 5.00x |" in speed


def test_what_was_not_timed_leaves_its_cell_empty(tmp_path):
    rows = case_rows("cross_entropy", TRAINING, {"eager": 500.0, "auxkernels": 100.0, "Liger": 1.0}, 90.0)
    rows[-1] |= {"time_us": None, "share_of_floor": None, "status": "unavailable: no module"}
    other = case_rows("cross_entropy", TRAINING._replace(dtype="fp32"), {"Liger": 200.0, "auxkernels": 100.0}, 90.0)
    _, speed = texts(tmp_path, rows=[*rows, *other])
    assert "| training 8192 x 128256 bf16 flat | 90 % | 5.00x |  |" in speed
    assert "| training 8192 x 128256 fp32 flat | 90 % |  | 2.00x |" in speed


def test_the_chart_of_a_device_is_shown_where_it_exists(tmp_path):
    pytest.importorskip("matplotlib")
    rows = invented.quick_grid()
    assert ".png" not in texts(tmp_path, rows=rows)[1]
    assert draw(rows, tmp_path / "imaginary-h100.png")
    assert "](imaginary-h100.png)" in texts(tmp_path)[1]
    assert (
        "](../imaginary-h100.png)" in results_page.sections(tmp_path, tmp_path / "docs/performance.md")["speed on GPUs"]
    )


def test_of_hundreds_of_cases_those_of_the_quick_grid_are_shown(tmp_path):
    quick = invented.quick_grid()
    specs = cross_entropy.full_specs(invented.CUDA)
    full = [row for spec in specs for row in case_rows("cross_entropy", spec, {"auxkernels": 2.0}, 1.0)]
    shown = shown_cases([*full, *quick])
    timed = {report.case_key(row) for row in quick if row["pass"] != "overhead"}
    assert set(shown) == timed and len(newest_cases([*full, *quick])) > 500
    few = [row for row in full if row["shape"] == [1024, 4096]]
    assert set(shown_cases(few)) == {report.case_key(row) for row in few}


def test_only_what_is_between_the_markers_changes(tmp_path, capsys):
    path = tmp_path / "results.md"
    path.write_text(TEXT)
    options = ["--page", str(path), "--results", str(tmp_path)]
    assert results_page.main([*options, "--check"]) == 1 and path.read_text() == TEXT
    assert results_page.main(options) == 0
    text = path.read_text()
    assert results_page.main([*options, "--check"]) == 0
    assert results_page.main(options) == 0 and path.read_text() == text
    assert "No CPU has been measured." in text
    assert "by hand" in text and text.endswith("-->\nthe end\n") and "old" not in text
    report.append_rows(tmp_path / "d-check.jsonl", rows_of_tests())
    assert results_page.main([*options, "--check"]) == 1
    assert "out of date" in capsys.readouterr().out


def test_markers_that_are_missing_are_an_error():
    with pytest.raises(ValueError, match="must have <!-- verified on GPUs"):
        results_page.rewritten("# title", {"verified on GPUs": "x"})
