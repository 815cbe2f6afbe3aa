"""All runs of the GPU check from end to end on a fake device: real commands, real processes, real files.

What is smaller than on a device: sizes, numbers of cases and rounds, and of the suite one file.
"""

import os
import re
from pathlib import Path

import pytest

from benchmarks.gpu import cases as gpu_cases
from benchmarks.gpu import check as gpu_check
from benchmarks.gpu import processes, results_page
from benchmarks.gpu import steps as gpu_steps
from benchmarks.timing import report

HERE = Path(__file__).parent
TOOLS = HERE / "fake_cuda_tools"
SLUG = "fake-gpu"
# limits are for a machine that is not shared with other tests
PATIENCE = 6


def play(patch: pytest.MonkeyPatch, **variables: str) -> None:
    """Every process from here on has the fake device and its tools, and less to do."""
    patch.setenv("PATH", f"{TOOLS}{os.pathsep}{os.environ['PATH']}")
    patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (TOOLS, HERE, processes.ROOT))))
    patch.setenv("OMP_NUM_THREADS", "1")
    for name, value in variables.items():
        patch.setenv(name, value)
    patch.setattr(gpu_steps, "SHARDS", {"native": 2, "triton": 1})
    patch.setattr(gpu_steps, "MAX_WORKERS", 1)
    patch.setattr(gpu_steps, "ROUNDS", 2)
    patch.setattr(gpu_steps, "FILES", dict.fromkeys(gpu_steps.FILES, ("cross_entropy/test_confident_rows.py",)))
    selected = {name: f"{expression} and softcap" for name, expression in gpu_steps.SELECTED.items()}
    patch.setattr(gpu_steps, "SELECTED", selected)
    test = "test_smoothing_and_weights_do_not_spoil_the_loss_of_a_confident_row"
    patch.setattr(gpu_steps, "REST", (f"tests/cross_entropy/test_confident_rows.py::{test}",))
    patch.setattr(gpu_cases, "NUM_REPEATS", 3)
    runs = {
        number: tuple(step._replace(limit=PATIENCE * step.limit) for step in steps)
        for number, steps in gpu_check.RUNS.items()
    }
    patch.setattr(gpu_check, "RUNS", runs)


def check(output: Path, *options: str) -> tuple[int, list[dict]]:
    """Exit status and the rows that the command has added."""
    path = output / f"{SLUG}-check.jsonl"
    before = len(report.read_rows(path))
    seconds = str(PATIENCE * gpu_check.RUN_SECONDS)
    commit = "0123456789abcdef-dirty"
    code = gpu_check.main(["--output", str(output), "--commit", commit, "--seconds", seconds, *options])
    return code, report.read_rows(path)[before:]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the runs leave, each in a folder of its own: {run: (exit status, rows, folder)}."""
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUXKERNELS_COMMIT", "")  # to be as it was afterwards
        play(patch)
        for number in gpu_check.RUNS:
            folder = tmp_path_factory.mktemp(f"run{number}")
            results[number] = (*check(folder, "--run", str(number)), folder)
    return results


def kept(found, tmp_path: Path) -> Path:
    """The files of all runs together, as they are kept."""
    for _, _, folder in found.values():
        for path in folder.glob("*.jsonl"):
            report.append_rows(tmp_path / path.name, report.read_rows(path))
    return tmp_path


CALLS = {name: [f"{check}-{name}" for check in ("values", "repeats", "graphs")] for name in ("native", "triton")}
PARTS = {
    1: ["machine", "module", *CALLS["native"], "quick", "tests-native", *CALLS["triton"], "peers"],
    2: ["machine", "module", "tests-triton", "lattice", "memcheck-native", "synccheck-native", "racecheck-native"],
    3: ["machine", "module", "operators", "tests-rest"],
}


@pytest.mark.slow
@pytest.mark.parametrize("number", PARTS)
def test_every_part_of_a_run_passes_and_is_written(found, number):
    code, rows, folder = found[number]
    assert {row["part"]: (row["status"], row["detail"]) for row in rows if row["status"] != "passed"} == {}
    assert [row["part"] for row in rows] == PARTS[number] and code == 0
    assert {(row["device"], row["commit"], row["is_dirty"], row["run"]) for row in rows} == {
        ("Fake GPU", "0123456789ab", True, number)
    }
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [f"check-{number}.log", f"{SLUG}-check.jsonl", f"{SLUG}.jsonl"]
    )


@pytest.mark.slow
def test_the_log_has_every_command_and_what_it_said_line_by_line(found):
    first, second = ((found[n][2] / f"check-{n}.log").read_text() for n in (1, 2))
    for name in ("machine", "calls-native/0", "calls-native/1", "quick", "tests-native", "calls-triton/0", "peers"):
        assert f"[{name}] $ " in first
    assert re.search(r"\[calls-native/1\] ok   graphs: .* \(native\)$", first, flags=re.MULTILINE)
    assert "(cuda) bf16 training 8192 x 128256, share of floor" in first and "not set" in first
    assert "--target-processes application-only" in second and "RACECHECK SUMMARY: 0 hazards" in second
    assert "[tests-triton] [gw0]" in second


@pytest.mark.slow
def test_readme_can_be_made_of_what_is_found(found, tmp_path):
    results = kept(found, tmp_path)
    (parts,) = results_page.read_checks(results)
    assert results_page.is_verified(parts, "native") and results_page.is_verified(parts, "triton")
    verified, speed, *_ = results_page.sections(results, tmp_path / "results.md").values()
    lines = [line for line in verified.splitlines() if "Fake GPU (sm_90), driver 580.0 (fake)" in line]
    assert len(lines) == 2 and all("verified by its part of `pytest -m gpu` (1 passed" in line for line in lines)
    assert "memcheck, synccheck, racecheck |" in lines[1] and "**not: " not in verified
    assert "training 8192 x 128256 bf16 flat" in speed and "Tests have not passed" not in speed


@pytest.mark.slow
def test_what_goes_wrong_with_one_implementation_is_found_and_leaves_the_other_verified(found, tmp_path, monkeypatch):
    results = kept(found, tmp_path)
    monkeypatch.setenv("AUXKERNELS_COMMIT", "")
    play(monkeypatch, FAKE_CUDA_DEFECT="native:illegal", FAKE_CUDA_SANITIZER="3")
    code, rows = check(results, "--steps", "calls-native", "tests-native", "memcheck-native")
    status = {row["part"]: row["status"] for row in rows}
    assert code == 1 and status.pop("machine") == status.pop("module") == "passed"
    assert status.pop("repeats-native") == status.pop("graphs-native") == "stopped"  # the device was lost
    assert set(status.values()) == {"failed"} and set(status) == {"values-native", "tests-native", "memcheck-native"}
    details = {row["part"]: row["detail"] for row in rows}
    assert "2 not: fp32" in details["values-native"] and "illegal memory access" in details["values-native"]
    assert details["tests-native"].startswith("1 failed") and "ERROR SUMMARY: 3 errors" in details["memcheck-native"]
    (parts,) = results_page.read_checks(results)
    assert results_page.is_verified(parts, "triton") and not results_page.is_verified(parts, "native")


@pytest.mark.slow
@pytest.mark.parametrize("defect, status", [("native:abort", "failed"), ("native:hang", "stopped")])
def test_a_process_that_ends_or_hangs_is_told_from_one_that_is_done(tmp_path, monkeypatch, defect, status):
    monkeypatch.setenv("AUXKERNELS_COMMIT", "")
    play(monkeypatch, FAKE_CUDA_DEFECT=defect)
    monkeypatch.setattr(gpu_steps, "SHARDS", {"native": 1})
    place = gpu_steps.Place({"unusable": {"native": None}}, gpu_steps.Log(tmp_path / "log"), tmp_path)
    found = gpu_steps.calls("native")(place, 120.0 if status == "failed" else 12.0)
    assert found["values-native"].status == status
    assert {outcome.status for outcome in found.values()} <= {"failed", "stopped"}
