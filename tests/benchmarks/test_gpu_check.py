"""The GPU check's plan, what its steps read off their processes, and that little time or a defect loses no evidence."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.cross_entropy import cases as cross_entropy
from benchmarks.gpu import check as gpu_check
from benchmarks.gpu import processes
from benchmarks.gpu import steps as gpu_steps
from benchmarks.gpu.processes import Ended, Log
from benchmarks.gpu.steps import Outcome
from benchmarks.timing import baselines, machine_info, report

CPU = torch.device("cpu")
ENVIRONMENT = {"device": "d", "device_slug": "d", "driver": "1", "torch": "2", "triton": "3", "commit": "c"}
ENVIRONMENT |= {"peers": {"eager": "2"}, "unusable": {"triton": None, "native": None}, "module": "_cuda.so, built"}
USABLE, NOT_BUILT = {"triton": None, "native": None}, {"triton": None, "native": "was not built"}


# -- the plan ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", gpu_check.RUNS)
def test_each_run_is_expected_to_end_before_its_deadline(number):
    steps = gpu_check.RUNS[number]
    expected = gpu_check.MACHINE_EXPECTED + sum(step.expected for step in steps)
    assert expected <= gpu_check.RUN_SECONDS - gpu_check.MARGIN_SECONDS <= 330
    for step in steps:
        assert step.expected < step.limit and step.limit >= gpu_check.LEAST_SECONDS


def test_the_commands_text_has_every_step_with_its_expected_seconds():
    told = dict(re.findall(r"^([a-z-]+) +(\d+)   ", gpu_check.__doc__, flags=re.MULTILINE))
    wanted = {step.name: f"{step.expected}" for steps in gpu_check.RUNS.values() for step in steps}
    assert told == wanted | {"machine": f"{gpu_check.MACHINE_EXPECTED:.0f}"}
    assert "ESTIMATES" in gpu_check.__doc__


def test_all_that_is_shown_in_readme_has_a_step():
    from benchmarks.gpu import results_page

    checks = {*gpu_steps.CHECKS, "memcheck", "synccheck", "racecheck"}
    assert set(results_page.SHOWN) == checks and set(results_page.IMPLEMENTATIONS) == set(gpu_steps.CALLED)


def test_the_lattice_has_every_width_at_several_numbers_of_rows_beside_eager_alone():
    """What tells for which sizes an implementation is the faster."""
    specs = (*cross_entropy.lattice_specs(), *cross_entropy.quick_specs(torch.device("cuda")))
    known = {spec[:4] for spec in specs}
    for dtype, pass_name in itertools.product(("bf16", "fp32"), ("forward", "training")):
        rows = {}
        for name, (num_rows, vocab), kind, inputs in known:
            if (name, kind, inputs) == (pass_name, dtype, "flat"):
                rows.setdefault(vocab, set()).add(num_rows)
        widths = {spec[1][1] for spec in cross_entropy.lattice_specs()}
        assert {32000, 128256} <= widths and all(len(rows[width]) > 1 for width in widths)
    assert {spec.baselines for spec in cross_entropy.lattice_specs()} == {"eager"}


@pytest.mark.slow
def test_the_suites_parts_together_are_all_of_it_and_each_test_is_in_one():
    """By collecting some of the files on a fake device: of both parts, of one, of none, and two of one name."""
    files = [
        f"tests/{name}"
        for name in (
            *("kernels/cuda/test_gpu.py", "cross_entropy/test_tensors.py", "heads/test_compile.py"),
            *("cross_entropy/test_contract.py", "heads/test_contract.py"),
        )
    ]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]

    tools = Path(__file__).parent / "fake_cuda_tools"
    path = os.pathsep.join(map(str, (tools, tools.parent, processes.ROOT)))

    def collected(*options):
        given = {"cwd": processes.ROOT, "env": os.environ | {"PYTHONPATH": path}}
        done = subprocess.run([*command, *options], capture_output=True, text=True, **given)
        return {line for line in done.stdout.splitlines() if "::" in line}

    whole, parts = collected(), {}
    for name, selected in gpu_steps.SELECTED.items():
        its_files = {f"tests/{file}" for file in gpu_steps.FILES[name]}
        parts[name] = {test for test in whole if selected in test and test.partition("::")[0] in its_files}
        assert len(parts[name]) >= 16
    rest = collected("-k", gpu_steps.rest_expression())
    assert rest == whole - parts["native"] - parts["triton"] and len(rest) > 50


def test_every_file_of_the_suites_parts_exists_and_none_imports_transformers():
    for name in {*gpu_steps.NATIVE_FILES, *gpu_steps.TRITON_FILES}:
        text = (processes.ROOT / "tests" / name).read_text()
        assert not re.search(r"^\s*(import|from) transformers", text, flags=re.MULTILINE)


# -- processes ---------------------------------------------------------------------------------------------------------


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_what_a_stopped_process_had_said_remains_and_its_children_end_too(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.5)
    child = tmp_path / "child"
    text = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, lambda *_: print('interrupted', flush=True))
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
open({str(child)!r}, 'w').write(str(child.pid))
print('begun', flush=True)
while True: time.sleep(0.05)
"""
    start = time.perf_counter()
    ended = processes.run({"a": python(text), "b": python("print('done')")}, Log(tmp_path / "log"), 5.0)
    assert time.perf_counter() - start < 30
    assert ended["a"] == Ended(None, "begun\ninterrupted\n") and ended["b"] == Ended(0, "done\n")
    assert "[a] begun" in (tmp_path / "log").read_text() and "[b] $ " in (tmp_path / "log").read_text()
    state = Path(f"/proc/{child.read_text()}/stat")
    for _ in range(100):  # until the system has ended it
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child is still there")


def test_an_interrupted_check_leaves_no_process_behind(tmp_path, monkeypatch):
    def interrupt(self, deadline):
        raise KeyboardInterrupt

    started = []
    monkeypatch.setattr(processes._Process, "wait", interrupt)
    kill = processes._Process.kill
    monkeypatch.setattr(processes._Process, "kill", lambda self: (started.append(self), kill(self)))
    with pytest.raises(KeyboardInterrupt):
        processes.run({"a": python("import time; time.sleep(60)")}, Log(tmp_path / "log"), 60.0)
    assert started[0].process.returncode == -signal.SIGKILL


# -- what is read off an output ----------------------------------------------------------------------------------------


def ended(*lines: str, status: int | None = 0) -> Ended:
    return Ended(status, "".join(f"{line}\n" for line in lines))


OK, BAD = "ok   values: bf16 one", "FAIL values: fp32 loss, mean, V 33 (native): differs"
DONE, OVER, LOST = (f"{text} values: 1 of 1 calls" for text in ("done", "time is over", "device lost"))


@pytest.mark.parametrize(
    "shards, status, detail",
    [
        ([ended(OK, DONE), ended(OK, DONE)], "passed", "2 calls"),
        ([ended(OK, DONE), ended(OK, BAD, DONE, status=1)], "failed", "2 calls alike or right, 1 not: fp32 loss, mean"),
        ([ended(OK, DONE), ended(OK, OVER)], "stopped", "in 1 of 2 processes: time is over values"),
        ([ended(OK, DONE), ended(OK, status=None)], "stopped", "in 1 of 2 processes: it was stopped"),
        ([ended(OK, DONE), ended(BAD, LOST, status=1)], "failed", "1 not: fp32 loss"),
        ([ended(OK, DONE), ended(OK, status=-11)], "failed", "1 not: ended by itself, status -11, after: ok   values"),
        ([ended("ImportError: no torch", status=1)], "stopped", "it did not come to that"),
        ([ended("done values: 0 of 0 calls")], "skipped", "0 calls"),
    ],
)
def test_calls_have_passed_only_where_every_process_has_done_all_of_them(shards, status, detail):
    outcome = gpu_steps._calls_outcome("values", shards)
    assert outcome.status == status and detail in outcome.detail


def test_a_check_that_failed_does_not_fail_another():
    shard = ended(OK, DONE, "FAIL repeats: bf16 one: 1 of 9 runs differ", "done repeats: 1 of 1 calls", status=1)
    found = [gpu_steps._calls_outcome(check, [shard]).status for check in gpu_steps.CHECKS]
    assert found == ["passed", "failed", "stopped"]


GREEN, RED = "[gw0] [ 10%] PASSED tests/a.py::b[native-cuda] ", "[gw1] [ 20%] FAILED tests/a.py::c[native-cuda] "
TAIL = "=========== 2 passed, 1 skipped in 9.5s ==========="


@pytest.mark.parametrize(
    "output, status, detail",
    [
        (ended(GREEN, GREEN, TAIL), "passed", "2 passed, 1 skipped in 9.5s"),
        (ended(GREEN, RED, "=== 1 failed, 1 passed in 3.0s ===", status=1), "failed", "1 failed, 1 passed in 3.0s"),
        (ended(GREEN, GREEN, status=None), "stopped", "2 passed, 0 failed, then the time was over"),
        (ended(GREEN, RED, status=None), "failed", "1 passed, 1 failed, then the time was over"),
        (
            ended(
                "=== 9 skipped in 3.0s ===",
            ),
            "skipped",
            "9 skipped in 3.0s",
        ),
        (ended("=== 9 deselected in 3.0s ===", status=5), "skipped", "9 deselected in 3.0s"),
        (ended("ERROR: unrecognized arguments: -n", status=4), "failed", "0 passed, 0 failed, status 4 after: ERROR"),
        (ended("===== 2 errors in 0.5s =====", status=2), "failed", "2 errors in 0.5s"),
    ],
)
def test_a_suite_has_passed_only_where_some_test_has_and_none_failed(output, status, detail):
    outcome = gpu_steps.suite_outcome(output)
    assert outcome.status == status and outcome.detail.startswith(detail)


CLEAN, DIRTY = "========= ERROR SUMMARY: 0 errors", "========= ERROR SUMMARY: 10 errors"


@pytest.mark.parametrize(
    "output, status",
    [
        (ended(OK, DONE, CLEAN), "passed"),
        (ended(OK, DONE, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"), "passed"),
        (ended(OK, DONE, DIRTY, status=9), "failed"),
        (ended(OK, BAD, DONE, CLEAN, status=1), "failed"),
        (ended(OK, OVER, CLEAN), "stopped"),
        (ended(OK, DONE, status=None), "stopped"),
        (ended(OK, "========= Invalid __global__ read of size 16 bytes", status=None), "failed"),
        (ended("Error: Device not supported", status=1), "stopped"),
        (ended(CLEAN), "stopped"),
    ],
)
def test_a_sanitizer_that_saw_some_calls_only_has_not_passed(output, status):
    assert gpu_steps.sanitizer_outcome(output).status == status


@pytest.mark.parametrize(
    "output, status, detail",
    [
        (ended("1/2 a", "2/2 b", "rows: d.jsonl"), "passed", "2 of 2 cases"),
        (ended("1/2 a", "time is over: 1 of 2 cases finished"), "stopped", "1 of 2 cases"),
        (ended("1/2 a", status=None), "stopped", "1 of 2 cases"),
        (ended("Traceback", "ImportError: rich", status=1), "failed", "0 of ? cases, status 1 after: ImportError"),
        (ended("1/1 a", "training 8 x 9 bf16 flat, auxkernels (cuda): wrong: loss"), "failed", "1 of 1 cases; 1 not"),
        (ended("1/1 a", "training 8 x 9 bf16 flat, Liger: unavailable: none"), "passed", "1 of 1 cases"),
    ],
)
def test_a_benchmark_says_how_far_it_came_and_whether_ours_were_right(output, status, detail):
    outcome = gpu_steps.benchmark_outcome(output)
    assert outcome.status == status and outcome.detail.startswith(detail)


def test_an_implementation_that_cannot_be_used_is_skipped_with_its_reason(tmp_path):
    place = gpu_steps.Place(ENVIRONMENT | {"unusable": NOT_BUILT}, Log(tmp_path / "log"), tmp_path)
    steps = (gpu_steps.calls("native"), gpu_steps.suite("native"), gpu_steps.sanitizer("memcheck", 1))
    found = {part: outcome for step in steps for part, outcome in step(place, 9.0).items()}
    parts = ["values-native", "repeats-native", "graphs-native", "tests-native", "memcheck-native"]
    assert list(found) == parts and set(found.values()) == {Outcome("skipped", "was not built")}


SANITIZERS = [step for step in gpu_check.RUNS[2] if "check-native" in step.name]


@pytest.mark.parametrize("step", SANITIZERS, ids=lambda step: step.name)
def test_the_calls_of_a_sanitizer_end_before_it_is_stopped(tmp_path, monkeypatch, step):
    monkeypatch.setattr(gpu_steps.shutil, "which", lambda name: name)
    commands = []
    monkeypatch.setattr(gpu_steps, "alone", lambda name, command, *_, **__: commands.append(command) or ended(OK, DONE))
    step.run(gpu_steps.Place(ENVIRONMENT, Log(tmp_path / "log"), tmp_path), step.limit)
    (command,) = commands
    # counted from when the program has begun, which under the tool takes a while
    last_call = float(command[command.index("--seconds") + 1])
    assert gpu_steps.SANITIZED_START_SECONDS + last_call + gpu_steps.SUMMARY_SECONDS <= step.limit
    assert last_call > step.expected - gpu_steps.SANITIZED_START_SECONDS


def test_without_the_tool_nothing_is_said_of_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    place = gpu_steps.Place(ENVIRONMENT, Log(tmp_path / "log"), tmp_path)
    outcome = gpu_steps.sanitizer("racecheck", 4)(place, 9.0)["racecheck-native"]
    assert outcome == Outcome("skipped", "compute-sanitizer is not installed")


# -- a run, its steps played -------------------------------------------------------------------------------------------


@pytest.fixture
def described(monkeypatch):
    """What the machine says it is, time after time; the last remains."""

    def say(*environments):
        left = list(environments)
        monkeypatch.setattr(gpu_steps, "describe", lambda log, seconds: left.pop(0) if len(left) > 1 else left[0])

    say(ENVIRONMENT)
    return say


@pytest.fixture
def steps(monkeypatch):
    """Lets run 1 be these steps, each a function of (place, seconds)."""

    def use(**functions):
        made = tuple(gpu_check.Step(name, 50, 20, function) for name, function in functions.items())
        monkeypatch.setattr(gpu_check, "RUNS", {1: made})

    return use


def run(tmp_path, *options: str) -> tuple[int, list[dict]]:
    code = gpu_check.main(["--run", "1", "--commit", "0123456789ab", "--output", str(tmp_path), *options])
    return code, report.read_rows(tmp_path / "d-check.jsonl")


@pytest.fixture(autouse=True)
def no_commit_is_left_behind(monkeypatch):
    monkeypatch.delenv("AUXKERNELS_COMMIT", raising=False)
    yield
    os.environ.pop("AUXKERNELS_COMMIT", None)


def passed(place, seconds):
    return {"one": Outcome("passed", "1 calls")}


def test_rows_are_there_as_steps_end_and_a_faulty_step_stops_no_other(tmp_path, described, steps):
    seen = []

    def look(place, seconds):
        seen.extend(row["part"] for row in report.read_rows(tmp_path / "d-check.jsonl"))
        return {"two": Outcome("passed", ""), "three": Outcome("passed", "")}

    def faulty(place, seconds):
        raise ValueError("of this program")

    steps(one=passed, faulty=faulty, two=look)
    code, rows = run(tmp_path)
    assert seen == ["machine", "module", "one", "faulty"]
    assert [row["part"] for row in rows] == [*seen, "two", "three"] and code == 1
    assert rows[3]["detail"] == "ValueError: of this program" and rows[1]["detail"].startswith("brought along: _cuda")
    assert {row["run"] for row in rows} == {1} and len(list(tmp_path.iterdir())) == 2


def test_no_step_gets_more_than_what_is_left_and_the_last_ones_say_so(tmp_path, described, steps):
    given = []

    def slow(place, seconds):
        given.append(seconds)
        time.sleep(0.3)
        return passed(place, seconds)

    steps(one=slow, two=slow, three=slow)
    seconds = gpu_check.MARGIN_SECONDS + gpu_check.LEAST_SECONDS + 0.2
    code, rows = run(tmp_path, "--seconds", str(seconds))
    assert len(given) == 1 and given[0] <= gpu_check.LEAST_SECONDS + 0.2
    assert [row["detail"] for row in rows[3:]] == ["no time was left"] * 2 and code == 0


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT"])
def test_an_interrupted_run_keeps_its_rows_and_says_so(tmp_path, described, steps, how):
    def interrupted(place, seconds):
        os.kill(os.getpid(), getattr(signal, how))
        time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    steps(one=passed, two=interrupted, three=passed)
    code, rows = run(tmp_path)
    assert code == 1 and [row["part"] for row in rows] == ["machine", "module", "one", "two"]
    assert rows[-1]["detail"] == "the check was interrupted" and signal.getsignal(signal.SIGTERM) is before


def test_a_module_that_is_missing_is_built_and_one_that_was_brought_is_not(tmp_path, described, steps, monkeypatch):
    built = []

    def build(log, seconds):
        built.append(seconds)
        return Outcome("passed", "built here")

    monkeypatch.setattr(gpu_steps, "build", build)
    steps(one=passed)
    run(tmp_path)
    assert not built
    described(ENVIRONMENT | {"unusable": NOT_BUILT, "module": None}, ENVIRONMENT)
    rows = run(tmp_path)[1][-3:]
    assert [row["detail"] for row in rows[1:2]] == ["built here: _cuda.so, built"] and rows[2]["unusable"] == USABLE
    described(ENVIRONMENT | {"unusable": NOT_BUILT, "module": None})
    rows = run(tmp_path)[1][-3:]
    assert rows[1]["status"] == "failed" and rows[1]["detail"] == "built here: None; was not built"
    monkeypatch.setattr(gpu_steps, "build", lambda log, seconds: Outcome("skipped", "there is no nvcc"))
    assert run(tmp_path)[1][-2]["detail"] == "there is no nvcc"
    described(ENVIRONMENT | {"plans": "132 clusters at once"})
    assert run(tmp_path)[1][-2]["detail"].endswith("; 132 clusters at once")


def test_the_build_is_of_both_modules(tmp_path, monkeypatch):
    asked = []

    def alone(name, command, log, seconds, **variables):
        asked.append((command[1:], variables["AUXKERNELS_BUILD"]))
        return Ended(statuses.pop(0), "said\n")

    statuses = [0, 1, None]
    monkeypatch.setattr(gpu_steps, "alone", alone)
    monkeypatch.setenv("CUDACXX", f"{sys.executable} --flag")
    found = [gpu_steps.build(Log(tmp_path / "log"), 9.0) for _ in range(3)]
    assert found == [Outcome("passed", "built here"), Outcome("failed", "said"), Outcome("stopped", "said")]
    assert asked[0] == (["setup.py", "--quiet", "build_ext", "--inplace"], "all")
    monkeypatch.setenv("CUDACXX", "no-such-compiler")
    assert gpu_steps.build(Log(tmp_path / "log"), 9.0) == Outcome("skipped", "there is no nvcc")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_nothing_is_claimed(tmp_path, capsys):
    code, rows = run(tmp_path)
    assert (code, rows) == (2, []) and "nothing was checked: " in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["check-1.log"]


def test_a_machine_that_does_not_answer_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_steps, "alone", lambda *_, **__: Ended(None, "begun\n"))
    assert gpu_steps.describe(Log(tmp_path / "log"), 1.0) == "it took too long"


def test_an_interruption_before_anything_is_known_leaves_nothing_claimed(tmp_path, monkeypatch):
    def describe(log, seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_steps, "describe", describe)
    assert run(tmp_path) == (2, [])


def test_without_a_commit_nothing_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine_info, "git_commit", lambda: (None, None))
    assert gpu_check.main(["--output", str(tmp_path / "out")]) == 2
    assert "AUXKERNELS_COMMIT" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_steps_can_be_named_instead_of_a_run(tmp_path, described, steps):
    steps(one=passed, two=passed)
    assert [row["part"] for row in run(tmp_path, "--steps", "two")[1]] == ["machine", "module", "one"]


def test_the_table_has_a_line_for_each_row(described, tmp_path, steps, capsys):
    steps(one=passed)
    run(tmp_path)
    console = Console(width=120)
    console.print(gpu_check.table_of(report.read_rows(tmp_path / "d-check.jsonl")))
    out = capsys.readouterr().out
    assert "baselines: eager 2" in out and len(re.findall("│ one .*1 calls", out)) == 2


def test_rows_name_every_baseline_with_its_version_or_why_it_is_missing():
    found = machine_info.describe(CPU)["peers"]
    assert list(found) == ["eager", "compile", "F.linear_cross_entropy", "Liger", "Cut Cross Entropy", "QuACK"]
    assert found["eager"] == torch.__version__
    for name, distribution in baselines.DISTRIBUTIONS.items():
        assert found[name] == f"unavailable: {distribution} is not installed" or found[name][0].isdigit()
