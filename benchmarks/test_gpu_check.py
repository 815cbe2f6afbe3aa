"""The GPU check without a GPU: its cases, its bookkeeping, and that a defect is seen."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import cross_entropy, cross_entropy_heads, gpu_cases, gpu_check, machine, peers, soft_embedding

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
        if backend != "reference":
            found["grad aux"] = found["grad aux"] * 1.001
        return found

    monkeypatch.setattr(gpu_cases.Case, "run", wrong)
    assert "grad aux is off by 1.0e-03" in case.check(CPU)
    assert "grad aux is off by 1.0e-03" in case.check(CPU, "native")


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
    status, output = gpu_check._run(
        [sys.executable, "-c", "print('begun'); import time; time.sleep(60)"], tmp_path / "log", 3.0
    )
    assert status is None and output == "begun\n"


def calls_that_say(monkeypatch, said: str, status: int) -> gpu_check.Outcome:
    monkeypatch.setattr(gpu_check, "_run", lambda command, log, seconds: (status, said))
    return gpu_check._calls("repeats")(Path("log"), 30.0)


def test_a_case_that_fails_is_named(monkeypatch):
    outcome = calls_that_say(monkeypatch, "ok   bf16 one\nFAIL fp32 loss, mean, V 33: differs\n", 1)
    assert outcome.status == "failed" and outcome.detail == "1 of 2 calls: FAIL fp32 loss, mean, V 33: differs"


@pytest.mark.parametrize(
    "said, status, outcome",
    [
        ("ok   bf16 one\nok   bf16 two\n", 0, ("passed", "2 calls")),
        ("ok   bf16 one\ntime is over: 1 of 20 calls\n", 0, ("stopped", "time is over: 1 of 20 calls")),
        ("Traceback\nImportError: no torch\n", 1, ("failed", "ImportError: no torch")),
        ("ok   bf16 one\n", -11, ("failed", "ok   bf16 one")),
    ],
)
def test_calls_pass_only_where_their_process_does(monkeypatch, said, status, outcome):
    assert calls_that_say(monkeypatch, said, status)[:2] == outcome


def test_calls_run_in_a_process_of_their_own(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_cases", "--device", "cpu", "--check", "repeats", "--every", "30"]
    status, output = gpu_check._run(command, tmp_path / "log", 100.0)
    assert status == 0 and [line[:2] for line in output.splitlines()] == ["ok", "ok"]


def test_equal_bits_count_nan_as_equal():
    a = {"x": torch.tensor([1.0, torch.nan])}
    assert gpu_cases._same_bits(a, {"x": torch.tensor([1.0, torch.nan])})
    assert not gpu_cases._same_bits(a, {"x": torch.tensor([1.0, 2.0])})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_nothing_is_claimed(capsys):
    assert gpu_check.main([]) == 2 and "nothing was checked" in capsys.readouterr().out


def test_repeats_of_a_call_are_compared(monkeypatch):
    case = gpu_cases.all_cases()[0]
    assert gpu_cases._repeats_alike(case, "auto", CPU, num_repeats=3) is None
    run, calls = gpu_cases.Case.run, []

    def drifting(self, inputs, backend="auto"):
        calls.append(backend)
        return {name: t + (len(calls) == 3) for name, t in run(self, inputs, backend).items()}

    monkeypatch.setattr(gpu_cases.Case, "run", drifting)
    assert gpu_cases._repeats_alike(case, "reference", CPU, num_repeats=3) == "1 of 3 runs differ"
    assert set(calls) == {"reference"}


CUDA = torch.device("cuda")


def named_usable(monkeypatch, **reasons):
    monkeypatch.setattr(gpu_cases, "unusable", lambda device: {"triton": None, "native": None} | reasons)


def test_on_a_gpu_both_implementations_of_logits_are_checked_by_name(monkeypatch):
    named_usable(monkeypatch)
    cases = gpu_cases.all_cases()
    both = [case for case in cases if case.usable(CUDA) == ("triton", "native")]
    assert len(both) == 36 and {case.usable(CUDA) for case in cases if case not in both} == {("auto",)}
    assert {case.usable(CPU) for case in cases} == {("auto",)}
    named_usable(monkeypatch, native="was not built")
    assert both[0].usable(CUDA) == ("triton",)
    named_usable(monkeypatch, native="was not built", triton="is not installed")
    assert both[0].usable(CUDA) == ("auto",)


def test_an_option_that_an_implementation_lacks_is_no_finding_and_a_failed_launch_is(monkeypatch):
    named_usable(monkeypatch)

    def check(case, backend):
        if backend == "native":
            raise RuntimeError("backend='native' cannot be used: no softcap")
        raise RuntimeError("CUDA error: an illegal memory access")

    (finding,) = gpu_cases.each(gpu_cases.all_cases()[:1], CUDA, check)
    assert finding[0].startswith("FAIL fp32 loss, mean, V 33 (triton): RuntimeError: CUDA error")
    lines = [line for line, _ in gpu_cases.each(gpu_cases.all_cases()[:1], CUDA, lambda case, backend: None)]
    assert lines == [f"ok   fp32 loss, mean, V 33 ({name})" for name in ("native", "triton")]


def test_calls_end_with_their_time_and_say_so():
    lines = []
    some = gpu_cases.all_cases()[::3]
    done = list(gpu_cases.each(some, CPU, lambda case, backend: time.sleep(0.05), 0.2, lines.append))
    assert 1 <= len(done) < 20 and lines[-1] == f"time is over: {len(done)} of 20 calls"
    assert len(list(gpu_cases.each(some, CPU, lambda case, backend: None, 60.0))) == 20


@pytest.mark.parametrize("said, status", [("", "passed"), ("time is over: 2 of 60 calls\n", "stopped")])
def test_a_sanitizer_that_saw_some_calls_only_has_not_passed(monkeypatch, tmp_path, said, status):
    commands = []

    def run(command, log, seconds, **variables):
        commands.append(command)
        return 0, f"ok   a\nok   b\n{said}========= ERROR SUMMARY: 0 errors\n"

    monkeypatch.setattr(gpu_check, "_run", run)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: name)
    outcome = gpu_check.PARTS["memcheck"](tmp_path / "log", 80.0)
    assert (outcome.status, outcome.detail) == (status, "2 calls; ERROR SUMMARY: 0 errors")
    assert commands[0][-4:] == ["--every", "1", "--seconds", "55"]


def outcome_of_suite(monkeypatch, tmp_path, status, output, usable='{"triton": null, "native": "was not built"}'):
    """The part `tests`, where the suite ends with `status` and `output`."""

    def run(command, log, seconds, **variables):
        return (0, usable) if "benchmarks.gpu_cases" in command else (status, output)

    monkeypatch.setattr(gpu_check, "_run", run)
    return gpu_check.tests(tmp_path / "log", 60.0)


def test_the_suite_says_what_passed_and_which_implementations_it_could_see(monkeypatch, tmp_path):
    outcome = outcome_of_suite(monkeypatch, tmp_path, 0, "......\n3000 passed, 12 skipped in 99.1s (0:01:39)\n")
    assert outcome.status == "passed" and outcome.detail.startswith("3000 passed, 12 skipped")
    assert outcome.found == {"unusable": {"triton": None, "native": "was not built"}}
    assert outcome_of_suite(monkeypatch, tmp_path, 1, "1 failed, 9 passed in 3s").status == "failed"
    assert outcome_of_suite(monkeypatch, tmp_path, None, "....").status == "stopped"


def test_a_suite_of_skipped_tests_has_not_passed(monkeypatch, tmp_path):
    assert outcome_of_suite(monkeypatch, tmp_path, 0, "5896 skipped in 9.9s").status == "skipped"
    broken = outcome_of_suite(monkeypatch, tmp_path, 0, "1 passed in 1s", usable="Traceback\nImportError: no torch")
    assert broken.found["unusable"]["triton"] == "not known: ImportError: no torch"


@pytest.mark.parametrize("printed, status", [("2/2 a\n", "passed"), ("1/2 a\ntime is over: 1 of 2", "stopped")])
def test_a_benchmark_that_ran_out_of_time_says_so(monkeypatch, tmp_path, printed, status):
    commands = []

    def run(command, log, seconds, **variables):
        commands.append(command)
        return 0, f"{printed}\nrows: benchmarks/results/d.jsonl\n"

    monkeypatch.setattr(gpu_check, "_run", run)
    outcome = gpu_check.benchmark(tmp_path / "log", 130.0)
    assert (outcome.status, outcome.detail.split(";")[0]) == (status, f"{printed[0]} of 2 cases")
    assert commands[0][-2:] == ["--time-limit", "90"]


# seconds of a case on a GPU, guessed: inputs, float64 check and rounds; torch.compile; what other packages compile
SETUP_SECONDS = {cross_entropy.OP: 2.0, cross_entropy_heads.OP: 2.5, soft_embedding.OP: 1.0}
COMPILE_SECONDS, PEER_SECONDS = 6.0, {cross_entropy.OP: 6.0, cross_entropy_heads.OP: 20.0}


def test_the_quick_grid_fits_its_part_with_every_baseline_installed():
    seconds = 10.0  # until the first case
    for op in (cross_entropy, cross_entropy_heads, soft_embedding):
        for spec in op.quick_specs(CUDA):
            is_small = op is cross_entropy and spec.shape[0] <= 64  # its rounds are over at once
            seconds += 1.2 if is_small else 0.5 + SETUP_SECONDS[op.OP]
            seconds += COMPILE_SECONDS * (spec.baselines not in ("eager", "none"))
            seconds += PEER_SECONDS.get(op.OP, 0.0) * (spec.baselines in ("all", "slow"))
    assert seconds <= gpu_check.LIMITS["benchmark"]


def test_rows_name_every_baseline_with_its_version_or_why_it_is_missing():
    found = machine.describe(CPU)["peers"]
    assert list(found) == ["eager", "compile", "F.linear_cross_entropy", "Liger", "Cut Cross Entropy", "QuACK"]
    assert found["eager"] == torch.__version__
    for name, distribution in peers.DISTRIBUTIONS.items():
        assert found[name] == f"unavailable: {distribution} is not installed" or found[name][0].isdigit()
