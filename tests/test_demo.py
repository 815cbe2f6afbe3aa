import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.append(str(REPOSITORY))  # plain `pytest` puts only this folder there
demo, demo_data, demo_job, demo_report, demo_train = (
    pytest.importorskip(f"benchmarks.{name}") for name in ("demo", "demo_data", "demo_job", "demo_report", "demo_train")
)
TIMEOUT_S = 240


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
    for name in ("benchmarks.demo_job", "benchmarks.demo_data"):
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
    windows = demo_data.Windows(tokens, tokens.roll(-1, dims=-1))
    base = demo_train.fit_base(scale, windows, 0, lambda text: None)
    runs, evaluated_steps = demo_train.train_auxiliaries(
        base, scale, 20, windows, windows[:8], 0, dtype, lambda text: None
    )
    return demo_train.largest_difference(runs, evaluated_steps, 20)


def loss_of_rounded_sum(base_logits, aux_logits, target, reduction="mean"):
    return demo_train.eager_loss(base_logits.bfloat16(), aux_logits.bfloat16(), target, reduction)


def loss_without_one_row(base_logits, aux_logits, target, reduction="mean"):
    target = target.clone()
    target[0, 0] = demo_data.IGNORE_INDEX
    return demo_train.eager_loss(base_logits, aux_logits, target, reduction)


def loss_of_nan(base_logits, aux_logits, target, reduction="mean"):
    return demo_train.eager_loss(base_logits, aux_logits, target, reduction) * math.nan


@pytest.mark.parametrize("loss_function", [loss_of_rounded_sum, loss_without_one_row, loss_of_nan])
def test_a_slightly_wrong_loss_parts_the_curves(monkeypatch, loss_function):
    assert train_on_random_tokens(monkeypatch, loss_function) > demo_job.CURVE_BOUND_NATS["float32"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_fused_loss_keeps_the_curves_together(monkeypatch, dtype):
    distance = train_on_random_tokens(monkeypatch, demo_train.fused_loss, getattr(torch, dtype))
    assert distance <= demo_job.CURVE_BOUND_NATS[dtype]


def test_a_wrong_gradient_is_a_failure_and_so_is_nan():
    step = {"gradient_error": 1e-7}
    curves = {"largest_difference_nats": 1e-6, "bound_nats": 1e-4}
    good = {"curves": curves, "loss_step": {"float32": {"auxkernels": step}}}
    assert demo_job.failures(good) == []
    assert len(demo_job.failures({**good, "curves": {**curves, "largest_difference_nats": math.inf}})) == 1
    assert len(demo_job.failures({**good, "loss_step": {"float32": {"auxkernels": {"gradient_error": math.nan}}}})) == 1


def test_source_splits_into_code_and_docstrings():
    source = '"""Modul-\nüberschrift."""\nx = "no docstring"\ndef f():\n    """Zählt."""\n    return 1\n'
    code, docstrings = demo_data.split_source(source)
    assert docstrings == ["Modul-\nüberschrift.", "Zählt."]
    assert code == '\nx = "no docstring"\ndef f():\n\n    return 1\n'


def test_a_file_is_either_held_out_or_trained_on():
    corpus = demo_data.load_corpus(max_files=60)
    assert corpus.held_out_docstrings and corpus.train_docstrings
    assert not set(corpus.held_out_code) & {text for text in corpus.train_code if len(text) > 1000}


def test_targets_are_the_next_tokens_and_window_ends_have_none():
    tokenizer = demo_data.Tokenizer(demo_data.BPE({"a": 0, "b": 1, demo_data.END_OF_TEXT: 2}, []))
    windows = demo_data.make_windows(tokenizer, ["ab", "ba", "b"], 5)
    assert windows.tokens.tolist() == [[0, 1, 2, 1, 0], [2, 1, 2, 2, 2]]
    assert windows.targets.tolist() == [[1, 2, 1, 0, -100], [1, 2, -100, -100, -100]]


def test_every_window_comes_once_before_any_comes_again():
    order = demo_data.batch_order(window_count=7, batch_size=2, steps=7, seed=3).flatten()
    assert sorted(order[:7].tolist()) == list(range(7)) == sorted(order[7:].tolist())
