"""The GPU check without a GPU: its cases, its bookkeeping, and that a defect is seen."""

import json

import pytest
import torch
from rich.console import Console

from benchmarks import gpu_cases, gpu_check

CPU = torch.device("cpu")
ENVIRONMENT = {"device": "d", "device_slug": "d", "driver": "1", "torch": "2", "triton": "3", "commit": "c"}


def test_there_are_sixty_cases_of_distinct_names():
    names = [(case.name, case.dtype) for case in gpu_cases.all_cases()]
    assert len(names) == len(set(names)) == 60


def test_every_case_agrees_with_the_reference_on_cpu():
    assert [case.check(CPU) for case in gpu_cases.all_cases()] == [None] * 60


def test_a_wrong_gradient_is_a_finding(monkeypatch):
    case = gpu_cases.all_cases()[0]
    run = gpu_cases.Case.run

    def wrong(self, inputs, backend="auto"):
        found = run(self, inputs, backend)
        if backend == "auto":
            found["grad aux"] = found["grad aux"] * 1.001
        return found

    monkeypatch.setattr(gpu_cases.Case, "run", wrong)
    assert "grad aux is off by 1.0e-03" in case.check(CPU)


def test_equal_seeds_give_equal_inputs_and_others_do_not():
    case = gpu_cases.all_cases()[0]
    a, b, c = (case.inputs(CPU, seed)["aux"] for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_the_parts_fit_nine_minutes():
    assert list(gpu_check.LIMITS) == list(gpu_check.PARTS)
    assert sum(gpu_check.LIMITS.values()) <= gpu_check.WHOLE == 9 * 60


def test_rows_are_written_as_parts_end_and_unused_time_goes_on(monkeypatch, tmp_path):
    given = []

    def part(log, seconds):
        given.append(seconds)
        log.write_text("said")
        return gpu_check.Outcome("passed", "detail")

    monkeypatch.setattr(gpu_check, "PARTS", {"build": part, "tests": part})
    rows = gpu_check.run_parts(["build", "tests"], tmp_path, ENVIRONMENT, Console(quiet=True))
    assert given[0] == pytest.approx(40, abs=1) and given[1] == pytest.approx(230, abs=2)
    lines = (tmp_path / "d-check.jsonl").read_text().splitlines()
    assert [json.loads(line)["part"] for line in lines] == ["build", "tests"] == [row["part"] for row in rows]
    assert (tmp_path / "d-check-tests.log").read_text() == "said"


def test_a_process_that_outlives_its_time_is_stopped(tmp_path):
    import sys

    status, output = gpu_check._run(
        [sys.executable, "-c", "print('begun'); import time; time.sleep(60)"], tmp_path / "log", 3.0
    )
    assert status is None and output == "begun\n"


def test_a_case_that_fails_is_named(monkeypatch, tmp_path):
    outcome = gpu_check._each_case(lambda case: "differs" if "V 33" in case.name else None, tmp_path / "log", 60.0)
    assert outcome.status == "failed" and "V 33" in outcome.detail
    assert "FAIL fp32 loss, mean, V 33 differs" in (tmp_path / "log").read_text()


def test_equal_bits_count_nan_as_equal():
    a = {"x": torch.tensor([1.0, torch.nan])}
    assert gpu_check._same_bits(a, {"x": torch.tensor([1.0, torch.nan])})
    assert not gpu_check._same_bits(a, {"x": torch.tensor([1.0, 2.0])})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_nothing_is_claimed(capsys):
    assert gpu_check.main([]) == 2 and "nothing was checked" in capsys.readouterr().out


def test_repeats_of_a_call_are_compared(monkeypatch):
    case = gpu_cases.all_cases()[0]
    inputs = case.inputs
    monkeypatch.setattr(gpu_cases.Case, "inputs", lambda self, device, seed=0: inputs(CPU, seed))
    assert gpu_check._repeats_alike(case, num_repeats=3) is None
