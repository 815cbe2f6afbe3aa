import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

MODULES = ("demo.__main__", "demo.job", "demo.loss_step", "demo.report", "demo.train")
MODULES += ("training.schedule", "training.standard_library", "training.text")
demo, demo_job, demo_loss_step, demo_report, demo_train, schedule, standard_library, text = (
    pytest.importorskip(f"benchmarks.{name}") for name in MODULES
)
from rich.table import Table  # noqa: E402

from auxkernels import Head  # noqa: E402

TIMEOUT_S = 1200  # only against hanging


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small lose more to threads that wait for each other than they gain, with pytest-xdist above all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start_demo(folder, *options):
    """The tiny demo as a process that imports what this one imports: the checkout or an installed wheel."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    command = [sys.executable, "-m", "benchmarks.demo", "--scale", "tiny", "--threads", "1", *options]
    command += ["--output", "results", "--cache", "cache"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


@pytest.mark.slow
def test_tiny_run_lowers_the_held_out_loss_and_its_curves_coincide_with_eager(tmp_path):
    process = start_demo(tmp_path)
    output, error = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, error
    assert "base + auxiliary" in output
    assert "\r" not in output and "\x1b" not in output, "a progress bar where the output is not a terminal"

    results = json.loads((tmp_path / "results" / "demo.json").read_text())
    held_out, curves = results["held_out"]["docstrings"], results["curves"]
    ours, eager = (curves["runs"][name] for name in ("auxkernels", "eager"))
    assert ours["held_out_loss"][0] == pytest.approx(held_out["base_loss"], abs=1e-5), "step 0 is not the base"
    assert ours["held_out_loss"][-1] == pytest.approx(held_out["loss"], abs=1e-5), "logit_stats is not the loss"
    assert held_out["loss"] < held_out["base_loss"] - 0.2
    assert ours["train_loss"] == pytest.approx(eager["train_loss"], rel=0, abs=curves["bound_nats"])
    assert ours["held_out_loss"] == pytest.approx(eager["held_out_loss"], rel=0, abs=curves["bound_nats"])
    assert len(ours["train_loss"]) == curves["steps"]
    for steps in results["loss_step"].values():
        assert list(steps) == ["auxkernels", "auxkernels, stored logits", "eager"]
        assert all(step["time_ms"] > 0 for step in steps.values())

    from matplotlib.image import imread

    image = imread(tmp_path / "results" / "demo.png")
    assert image.shape[0] > 500 and image.std() > 0.05
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["demo.json", "demo.png"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent to one process on Windows")
def test_interrupt_in_mid_training_exits_130_and_leaves_no_file(tmp_path):
    # a handled signal is reset to its default in the child, an ignored one (as under nohup) would stay ignored
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start_demo(tmp_path, "--steps", "1000000")
    signal.signal(signal.SIGINT, previous)
    try:
        assert any(line.startswith("fitting the base") for line in process.stdout), process.stderr.read()
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted" in error and "Traceback" not in error
    assert list((tmp_path / "results").iterdir()) == []
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".json"]


def test_interrupted_write_keeps_the_old_results_and_leaves_no_other_file(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_report, "plot_curves", lambda results: b"image")
    demo_report.write_results({"run": "old"}, tmp_path)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo_report.write_results({"run": "new"}, tmp_path)
    assert json.loads((tmp_path / "demo.json").read_text()) == {"run": "old"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.json", "demo.png"]


def test_missing_optional_dependency_is_named(monkeypatch, capsys):
    for name in ("benchmarks.demo.job", "benchmarks.training.text"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert demo.main([]) == 1
    assert capsys.readouterr().err == "the demo needs tokenizers: pip install '.[bench]'\n"


def test_unwritable_output_is_reported_before_the_work(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert demo.main(["--output", str(tmp_path / "file" / "results")]) == 1
    assert "the demo cannot go on" in capsys.readouterr().err


def train_on_random_tokens(monkeypatch, loss_function, dtype=torch.float32):
    """Largest distance between a training with `loss_function` and the eager one, on random tokens."""
    monkeypatch.setitem(demo_train.LOSSES, "auxkernels", loss_function)
    scale = dataclasses.replace(demo_job.SCALES["tiny"], vocab_size=211, base_steps=5)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 20, (32, scale.window), generator=generator)
    windows = text.Windows(tokens, tokens.roll(-1, dims=-1))
    base = demo_train.fit_base(scale, windows, 0, lambda text: None)
    runs, evaluated_steps = demo_train.train_auxiliaries(
        base, scale, 20, windows, windows[:8], 0, dtype, lambda text: None
    )
    return demo_train.largest_difference(runs, evaluated_steps, 20)


def loss_of_rounded_sum(base, aux, target, reduction="mean"):
    rounded = (Head(head.hidden.bfloat16(), head.weight.bfloat16()) for head in (base, aux))
    return demo_train.eager_loss(*rounded, target, reduction)


def loss_without_one_row(base, aux, target, reduction="mean"):
    target = target.clone()
    target[0, 0] = text.IGNORE_INDEX
    return demo_train.eager_loss(base, aux, target, reduction)


def loss_without_the_gradient_of_one_window(base, aux, target, reduction="mean"):
    hidden = torch.cat((aux.hidden[:1].detach(), aux.hidden[1:]))
    return demo_train.eager_loss(base, Head(hidden, aux.weight), target, reduction)


def loss_of_nan(base, aux, target, reduction="mean"):
    return demo_train.eager_loss(base, aux, target, reduction) * math.nan


WRONG_LOSSES = [loss_of_rounded_sum, loss_without_one_row, loss_without_the_gradient_of_one_window, loss_of_nan]


@pytest.mark.slow
@pytest.mark.parametrize("loss_function", WRONG_LOSSES)
def test_a_slightly_wrong_loss_parts_the_curves(monkeypatch, loss_function):
    assert train_on_random_tokens(monkeypatch, loss_function) > demo_job.CURVE_BOUND_NATS["float32"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_fused_loss_keeps_the_curves_together(monkeypatch, dtype):
    distance = train_on_random_tokens(monkeypatch, demo_train.fused_loss, getattr(torch, dtype))
    assert distance <= demo_job.CURVE_BOUND_NATS[dtype]


def random_heads(num_windows, length, vocab_size, base_width, aux_width, dtype):
    """(base, aux, target) with logits of standard deviation 1 and some ignored targets."""
    generator = torch.Generator().manual_seed(0)

    def head(width):
        hidden = torch.randn(num_windows, length, width, generator=generator)
        weight = torch.randn(vocab_size, width, generator=generator) / math.sqrt(width)
        return Head(hidden.to(dtype), weight.to(dtype))

    target = torch.randint(vocab_size, (num_windows, length), generator=generator)
    target[:, -1] = text.IGNORE_INDEX
    return head(base_width), head(aux_width), target


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_errors_of_the_loss_step_are_within_their_bounds_and_a_wrong_gradient_is_not(dtype):
    base, aux, target = random_heads(2, 70, 300, 24, 16, getattr(torch, dtype))
    exact = demo_loss_step.float64_loss_and_gradients(base, aux, target)
    for name, loss_function in demo_loss_step.STEPS.items():
        loss, gradients = demo_loss_step.loss_and_gradients(loss_function, base, aux, target)
        loss_error, error = demo_loss_step.errors_against(*exact, loss, gradients)
        assert loss_error < {"float32": 1e-5, "bfloat16": 2e-3}[dtype], name
        assert error <= demo_job.GRADIENT_ERROR_BOUND[dtype] or name == "eager", (name, error)
    for i in range(2):
        wrong = [gradient.clone() for gradient in gradients]
        wrong[i][0] = 0
        _, error = demo_loss_step.errors_against(*exact, loss, wrong)
        assert error > demo_job.GRADIENT_ERROR_BOUND[dtype]
        wrong[i][0] = math.nan
        _, error = demo_loss_step.errors_against(*exact, loss, wrong)
        assert math.isnan(error)


@pytest.mark.slow
def test_heads_save_the_memory_of_stored_logits():
    rows, vocab_size = 8192, 2048
    base, aux, target = random_heads(8, rows // 8, vocab_size, 24, 16, torch.float32)
    steps = demo_loss_step.measure_loss_step(base, aux, target, 1, lambda text: None)
    if steps["eager"].peak_mib is None:
        pytest.skip("this system keeps no resettable high-water mark")
    logits_mib = rows * vocab_size * 4 / 2**20
    stored = steps[demo_loss_step.STORED]
    assert steps["auxkernels"].saved_mib == 0
    assert stored.saved_mib == stored.peak_mib - steps["auxkernels"].peak_mib > 0.75 * logits_mib
    assert steps["eager"].saved_mib > 0.75 * logits_mib


def test_the_table_tells_what_heads_save():
    steps = {"auxkernels": 10.0, demo_loss_step.STORED: 30.0, "eager": 80.0}
    step = {"time_ms": 2.0, "loss_error": 0.0, "gradient_error": 0.0}
    steps = {name: {**step, "peak_mib": mib, "saved_mib": mib - 10} for name, mib in steps.items()}
    table = Table("", "", "", "")
    demo_report.add_loss_step_rows(table, "float32", steps)
    cells = [list(column.cells) for column in table.columns]
    row = cells[0].index("  memory heads save (MiB)")
    assert [column[row] for column in cells[1:]] == ["20", "70", ""]
    row = cells[0].index("  peak memory (MiB)")
    assert [column[row] for column in cells[1:]] == ["10", "80", "8.0x"]
    assert [column[row + 1] for column in cells[1:]] == ["30", "", "2.7x"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_gradient_is_a_failure_and_so_is_nan(dtype):
    curves = {"largest_difference_nats": 1e-6, "bound_nats": 1e-4}

    def failures(error, eager_error=2e-7, **changed_curves):
        steps = {"auxkernels": {"gradient_error": error}, "eager": {"gradient_error": eager_error}}
        return demo_job.failures({"curves": {**curves, **changed_curves}, "loss_step": {dtype: steps}})

    assert failures(1e-7) == []
    assert len(failures(1e-7, largest_difference_nats=math.inf)) == 1
    assert len(failures(math.nan)) == len(failures(1e-7, eager_error=math.nan)) + 1 == 1
    assert len(failures(5e-7)) == 1, "more than twice eager's error"
    assert len(failures(0.1, eager_error=0.1)) == 1


def test_source_splits_into_code_and_docstrings():
    source = '"""Modul-\nüberschrift."""\nx = "no docstring"\ndef f():\n    """Zählt."""\n    return 1\n'
    code, docstrings = standard_library.split_source(source)
    assert docstrings == ["Modul-\nüberschrift.", "Zählt."]
    assert code == '\nx = "no docstring"\ndef f():\n\n    return 1\n'


@pytest.mark.slow
def test_a_file_is_either_held_out_or_trained_on():
    corpus = standard_library.load_corpus(max_files=60)
    assert corpus.held_out_docstrings and corpus.train_docstrings
    assert not set(corpus.held_out_code) & {text for text in corpus.train_code if len(text) > 1000}


def test_targets_are_the_next_tokens_and_window_ends_have_none():
    tokenizer = text.Tokenizer(text.BPE({"a": 0, "b": 1, text.END_OF_TEXT: 2}, []))
    windows = text.make_windows(tokenizer, ["ab", "ba", "b"], 5)
    assert windows.tokens.tolist() == [[0, 1, 2, 1, 0], [2, 1, 2, 2, 2]]
    assert windows.targets.tolist() == [[1, 2, 1, 0, -100], [1, 2, -100, -100, -100]]


def test_every_window_comes_once_before_any_comes_again():
    order = schedule.batch_order(window_count=7, batch_size=2, steps=7, seed=3).flatten()
    assert sorted(order[:7].tolist()) == list(range(7)) == sorted(order[7:].tolist())
