"""The small calls of the GPU check: what is a finding, and every line of theirs on a fake device."""

import json
import time
import types

import fake_cuda
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.cross_entropy import cases as cross_entropy
from benchmarks.gpu import cases as gpu_cases
from benchmarks.timing import harness, machine_info, report

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def fake_cuda_with(monkeypatch):
    """A function that lets the CPU play torch's CUDA in this process, with a defect."""
    modes = []

    def install(defect: str):
        monkeypatch.setenv("FAKE_CUDA_DEFECT", defect)
        modes.append(fake_cuda.install(monkeypatch.setattr))

    yield install
    for mode in modes:
        mode.__exit__(None, None, None)


@pytest.fixture
def on_fake_cuda(fake_cuda_with):
    fake_cuda_with("")


def calls(cases, device=CPU):
    return gpu_cases.calls_of(cases, device)


def lines_of(capsys):
    return capsys.readouterr().out.splitlines()


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


def test_equal_bits_count_nan_as_equal():
    a = {"x": torch.tensor([1.0, torch.nan])}
    assert gpu_cases._same_bits(a, {"x": torch.tensor([1.0, torch.nan])})
    assert not gpu_cases._same_bits(a, {"x": torch.tensor([1.0, 2.0])})


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

    some = gpu_cases.calls_of(gpu_cases.all_cases()[:1], CUDA)
    (finding,) = gpu_cases.each("values", some, CPU, check)
    assert finding[0].startswith("FAIL values: fp32 loss, mean, V 33 (triton): RuntimeError: CUDA error")
    lines = [line for line, _ in gpu_cases.each("values", some, CPU, lambda case, backend: None)]
    assert lines == [f"ok   values: fp32 loss, mean, V 33 ({name})" for name in ("native", "triton")]


def test_what_does_not_compile_is_a_finding_and_the_next_call_is_made():
    def check(case, backend):
        raise NameError("at 3:4:\n cannot convert None")  # Triton's own errors are no RuntimeError

    lines = []
    found = list(gpu_cases.each("values", calls(gpu_cases.all_cases()[:2]), CPU, check, say=lines.append))
    assert [problem for _, problem in found] == ["NameError: at 3:4: cannot convert None"] * 2
    assert len(lines) == 3 and lines[-1] == "done values: 2 of 2 calls"


def test_calls_end_with_their_time_and_say_so():
    lines = []
    some = calls(gpu_cases.all_cases()[::3])
    deadline = time.perf_counter() + 0.2
    done = list(gpu_cases.each("values", some, CPU, lambda case, backend: time.sleep(0.05), deadline, lines.append))
    assert 1 <= len(done) < 20 and lines[-1] == f"time is over values: {len(done)} of 20 calls"
    lines.clear()
    assert len(list(gpu_cases.each("values", some, CPU, lambda case, backend: None, say=lines.append))) == 20
    assert lines[-1] == "done values: 20 of 20 calls"


def test_processes_share_the_cases_between_them():
    def shared(check_thin, every):
        return [gpu_cases.all_cases()[::check_thin][first::every] for first in range(every)]

    for thin, every in ((1, 4), (gpu_cases.THIN, 8)):
        names = [(case.name, case.dtype) for shard in shared(thin, every) for case in shard]
        assert len(names) == len(set(names)) == 60 // thin


# -- on the fake device ------------------------------------------------------------------------------------------------


def test_cuda_kernels_are_found_usable_though_they_serve_one_operator_alone(on_fake_cuda):
    assert gpu_cases.unusable(CUDA) == {"triton": None, "native": None}
    named = [case.usable(CUDA) for case in gpu_cases.all_cases()]
    assert ("triton", "native") in named and ("auto",) in named


def test_a_missing_module_is_unusable_and_says_why(fake_cuda_with):
    fake_cuda_with("native:missing")
    reason = "backend='native' cannot be used: the CUDA module was not built"
    assert gpu_cases.unusable(CUDA) == {"triton": None, "native": reason}


def test_every_check_runs_by_name_on_the_fake_device(on_fake_cuda, capsys):
    options = ["--device", "cuda", "--repeats", "2", "--check", *gpu_cases.CHECKS]
    assert gpu_cases.main([*options, "--only", "native"]) == 0
    assert gpu_cases.main([*options, "--only", "triton", "auto"]) == 0
    lines = lines_of(capsys)
    for check in gpu_cases.CHECKS:
        oks = [line for line in lines if line.startswith(f"ok   {check}: ")]
        assert any("(native)" in line for line in oks) and any("(triton)" in line for line in oks)
        assert any("(" not in line for line in oks)  # by "auto"
        assert len([line for line in lines if line.startswith(f"done {check}: ")]) == 2
    assert not [line for line in lines if not line.startswith(("ok ", "done "))]


def test_the_machine_is_described_on_the_fake_device(on_fake_cuda, capsys):
    assert gpu_cases.main(["--device", "cuda", "--describe"]) == 0
    found = json.loads(lines_of(capsys)[-1])
    assert (found["device"], found["device_slug"], found["capability"]) == (fake_cuda.NAME, "fake-gpu", "9.0")
    assert found["unusable"] == {"triton": None, "native": None} and found["copy_gbps"] > 0
    assert "128256: 132 of 1, 20 slots" in found["plans"]


def test_a_plan_that_cannot_be_told_stops_no_check(on_fake_cuda, monkeypatch):
    monkeypatch.setattr(gpu_cases.cuda_cross_entropy, "plan", lambda *arguments: {})
    assert gpu_cases.describe(torch.device("cuda"))["plans"] == "no plan was told: KeyError: 'clusters_at_once'"


def test_an_illegal_access_is_one_finding_and_ends_its_process(fake_cuda_with, capsys):
    fake_cuda_with("native:illegal")
    assert gpu_cases.main(["--device", "cuda", "--only", "native", "--check", "values", "repeats"]) == 1
    lines = lines_of(capsys)
    *before, failed, lost = lines  # small calls of tensors that lie on the CPU pass the faked kernel by
    assert all(line.startswith("ok ") for line in before)
    assert failed.startswith("FAIL values: fp32 loss, ") and "(native): AcceleratorError" in failed
    assert lost.startswith(f"device lost values: {len(before) + 1} of ")


def replayed_with(call):
    """What a captured call of that kind is found to be."""
    case = gpu_cases.all_cases()[0]._replace(call=call)
    return gpu_cases._works_in_graphs_and_streams(case, "auto", CUDA)


def test_a_graph_that_keeps_its_first_inputs_is_a_finding(on_fake_cuda):
    kept = []

    def right(t, backend):
        return ((t["aux"].float() * t["frozen base"].float()).sum(-1),)

    def stale(t, backend):
        kept.append(t["frozen base"].clone())
        is_captured = len(kept) == 4  # after two runs on the side stream and the one before them
        return ((t["aux"].float() * (kept[2] if is_captured else t["frozen base"]).float()).sum(-1),)

    assert replayed_with(right) is None
    assert replayed_with(stale) == "another result from a replayed graph"


def test_another_result_on_a_side_stream_is_a_finding(on_fake_cuda):
    calls = []

    def drifting(t, backend):
        calls.append(backend)
        return (t["aux"].float().sum(-1) * len(calls),)

    assert replayed_with(drifting) == "another result on a side stream"


def test_a_large_call_is_timed_by_events_and_a_small_one_by_the_host(on_fake_cuda):
    for calls_per_sample, name in ((1, "elapsed_us"), (3, None)):
        case = types.SimpleNamespace(calls_per_sample=calls_per_sample, device=CUDA)
        time_call = harness._cuda_timer(case)
        assert time_call(lambda: time.sleep(0.01)) >= 1e4
        assert (name in time_call.__code__.co_freevars) == (name is not None)


def test_peak_memory_is_the_allocators_own_count(on_fake_cuda):
    begun = []
    assert harness.peak_bytes(lambda: begun.append(1), CUDA) == 2 << 20 and begun == [1]


HEADLINE = [
    "--device",
    "cuda",
    "--op",
    "cross_entropy",
    "--shape",
    "8192x128256",
    "--dtype",
    "bf16",
    "--inputs",
    "flat",
]


def timed(tmp_path, *options):
    """Exit status and rows of the benchmark on the fake device: training and forward at one size."""
    passes = ["--pass", "training", "forward", "--baselines", "eager", "--rounds", "1", "--no-plot"]
    code = command.main([*HEADLINE, *passes, "--output", str(tmp_path), *options])
    return code, [row["pass"] for row in report.read_rows(tmp_path / "fake-gpu.jsonl")]


def test_after_its_time_the_benchmark_begins_no_case_and_says_so(on_fake_cuda, tmp_path, capsys):
    code, passes = timed(tmp_path, "--time-limit", "1e-9")
    assert (code, passes) == (2, []) and "time is over: 0 of 2 cases finished" in capsys.readouterr().out


def test_a_case_that_does_not_fit_the_device_is_left_out_and_the_next_is_timed(
    on_fake_cuda, tmp_path, monkeypatch, capsys
):
    build = cross_entropy.build

    def too_large(spec, *args):
        if spec.pass_name == "training":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build(spec, *args)

    monkeypatch.setattr(cross_entropy, "build", too_large)
    code, passes = timed(tmp_path)
    assert code == 0 and set(passes) == {"forward"}
    assert "1/2 training 8192 x 128256 bf16: does not fit the device" in capsys.readouterr().out


@pytest.mark.parametrize("at, code", [("training", 130), ("forward", 130)])
def test_an_interrupted_benchmark_keeps_the_cases_before(on_fake_cuda, tmp_path, monkeypatch, capsys, at, code):
    build = cross_entropy.build

    def interrupted(spec, *args):
        if spec.pass_name == at:
            raise KeyboardInterrupt
        return build(spec, *args)

    monkeypatch.setattr(cross_entropy, "build", interrupted)
    found, passes = timed(tmp_path)
    assert found == code and set(passes) == ({"training"} if at == "forward" else set())
    assert "interrupted: " in capsys.readouterr().out


def test_a_wrong_index_is_a_finding(monkeypatch):
    case = next(case for case in gpu_cases.all_cases() if case.name.startswith("statistics"))
    run = gpu_cases.Case.run
    wrong = lambda self, inputs, backend="auto": {  # noqa: E731
        name: value + (value.dtype == torch.int64 and backend != "reference")
        for name, value in run(self, inputs, backend).items()
    }
    monkeypatch.setattr(gpu_cases.Case, "run", wrong)
    assert case.check(CPU) == "output 2 differs"


def test_without_a_compiled_module_none_is_named(monkeypatch):
    monkeypatch.setattr(gpu_cases.importlib.util, "find_spec", lambda name: None)
    assert gpu_cases._module_text() is None


def test_a_copy_without_its_history_has_no_commit_of_its_own(monkeypatch, tmp_path):
    monkeypatch.delenv("AUXKERNELS_COMMIT", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine_info.git_commit() == (None, None)


def test_the_driver_is_unknown_where_its_tool_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine_info.driver() is None


def test_a_copy_without_its_history_is_told_its_commit(monkeypatch):
    monkeypatch.setenv("AUXKERNELS_COMMIT", "0123456789abcdef0123")
    assert machine_info.git_commit() == ("0123456789ab", False)
    monkeypatch.setenv("AUXKERNELS_COMMIT", "0123456789ab-dirty")
    assert machine_info.git_commit() == ("0123456789ab", True)
