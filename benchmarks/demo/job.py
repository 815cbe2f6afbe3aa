"""The demo's job: text, base, two trainings of the auxiliary, measurements; and what of it counts as a failure."""

import dataclasses
import statistics
import sys
from dataclasses import dataclass

import torch

from benchmarks.demo import train as demo_train
from benchmarks.demo.loss_step import measure_loss_step
from benchmarks.demo.model import parameter_count
from benchmarks.demo.report import make_table, write_results
from benchmarks.timing import machine_info
from benchmarks.training.standard_library import load_corpus
from benchmarks.training.terminal import Terminal
from benchmarks.training.text import load_tokenizer, make_windows

# Two equal trainings part by rounding alone: 160 steps at the default sizes against the same steps with the loss in
# float64 by 1.4e-6 nats in float32, and by 3.5e-3 in bfloat16, because eager rounds the sum of the logits to 8 bits.
# Training amplifies what rounding began (tiny, float32: 1e-6 nats after 300 steps, 4e-4 after 900), so that only the
# first steps can tell a wrong loss from a rounded one.
COMPARED_STEPS = 200
CURVE_BOUND_NATS = {"float32": 1e-4, "bfloat16": 2e-2}
# float32: rounding of the sum and of exp. bfloat16: both products are rounded to 8 significant bits, which moves logits
# of about ten, and so every probability, by 2**-6; whoever starts from the same products is a yardstick for the rest.
GRADIENT_ERROR_BOUND = {"float32": 1e-5, "bfloat16": 2**-6}
# float32: equal errors but for the order of the products' sums, which the library chooses by their shape
GRADIENT_ERROR_OVER_EAGER = {"float32": 2.0, "bfloat16": 1.5}


@dataclass(frozen=True)
class Scale:
    """Sizes of one run: tokens per window, windows per batch, models, steps, held-out windows, timed repeats."""

    max_files: int | None
    vocab_size: int
    window: int
    batch: int
    base_width: int
    base_layers: int
    base_steps: int
    aux_width: int
    aux_layers: int
    aux_steps: int
    held_out_windows: int
    repeats: int


SMALL = Scale(
    max_files=None,
    vocab_size=16384,
    window=128,
    batch=8,
    base_width=192,
    base_layers=3,
    base_steps=80,
    aux_width=128,
    aux_layers=1,
    aux_steps=60,
    held_out_windows=16,
    repeats=3,
)
SCALES = {
    "tiny": dataclasses.replace(
        SMALL,
        max_files=60,
        vocab_size=1024,
        window=64,
        base_width=64,
        base_layers=1,
        base_steps=30,
        aux_width=32,
        aux_steps=30,
    ),
    "small": SMALL,
}


def prepare_text(scale, cache_folder, terminal):
    """Windows of the corpus by part ("train_code", "held_out_docstrings", ...)."""
    with terminal.stage("reading the standard library"):
        corpus = dataclasses.asdict(load_corpus(scale.max_files))
    with terminal.stage(f"vocabulary of {scale.vocab_size} tokens"):
        texts = corpus["train_code"] + corpus["train_docstrings"]
        tokenizer = load_tokenizer(texts, scale.vocab_size, cache_folder)
    with terminal.stage("tokenizing"):
        windows = {part: make_windows(tokenizer, texts, scale.window) for part, texts in corpus.items()}
    for part, texts in corpus.items():
        size_mb, tokens = sum(map(len, texts)) / 1e6, windows[part].tokens.numel()
        terminal.say(f"  {part.replace('_', ' '):19} {len(texts):5} texts {size_mb:5.2f} MB {tokens:8} tokens")
    return windows


def measure_loss_steps(base, auxiliary, windows, repeats, terminal):
    """LossStep of every implementation in both dtypes on the trained models' hidden states of held-out windows."""
    measured = {}
    with terminal.stage("measuring the loss step", total=repeats * len(CURVE_BOUND_NATS)) as advance:
        for name in CURVE_BOUND_NATS:
            dtype = getattr(torch, name)
            with torch.no_grad():
                hidden, base_head = demo_train.base_outputs(base, windows.tokens, dtype)
                aux_head = demo_train.head_of(auxiliary, auxiliary(hidden), dtype)
            steps = measure_loss_step(base_head, aux_head, windows.targets, repeats, advance)
            measured[name] = {loss: dataclasses.asdict(step) for loss, step in steps.items()}
    return measured


def describe_curves(runs, evaluated_steps, bound):
    described = {
        name: {
            "train_loss": run.train_loss,
            "held_out_loss": run.held_out_loss,
            "median_step_ms": statistics.median(run.step_ms),
        }
        for name, run in runs.items()
    }
    steps = evaluated_steps[-1]
    compared_steps = min(steps, COMPARED_STEPS)
    return {
        "steps": steps,
        "compared_steps": compared_steps,
        "evaluated_steps": evaluated_steps,
        "runs": described,
        "largest_difference_nats": demo_train.largest_difference(runs, evaluated_steps, compared_steps),
        "bound_nats": bound,
    }


def train_and_measure(arguments, scale, terminal):
    """The whole job; returns every number of it as JSON-compatible values."""
    dtype, steps = getattr(torch, arguments.dtype), arguments.steps or scale.aux_steps
    windows = prepare_text(scale, arguments.cache, terminal)
    held_out = windows["held_out_docstrings"].spread(scale.held_out_windows)
    held_out_code = windows["held_out_code"].spread(scale.held_out_windows)
    with terminal.stage("fitting the base on code", total=scale.base_steps) as advance:
        base = demo_train.fit_base(scale, windows["train_code"], arguments.seed, advance)
    with terminal.stage("training the auxiliary on docstrings, twice", total=steps) as advance:
        runs, evaluated_steps = demo_train.train_auxiliaries(
            base, scale, steps, windows["train_docstrings"], held_out, arguments.seed, dtype, advance
        )
    auxiliary = runs["auxkernels"].auxiliary
    with terminal.stage("evaluating on held-out text"):
        held_out_statistics = {
            domain: demo_train.held_out_statistics(base, auxiliary, part, scale, dtype)
            for domain, part in (("docstrings", held_out), ("code", held_out_code))
        }
    loss_steps = measure_loss_steps(base, auxiliary, held_out, scale.repeats, terminal)
    with terminal.stage("measuring the machine"):
        described_machine = machine_info.describe(torch.device("cpu"))
    return {
        "machine": described_machine,
        "dtype": arguments.dtype,
        "seed": arguments.seed,
        "scale": dataclasses.asdict(scale),
        "parameters": {"base": parameter_count(base), "auxiliary": parameter_count(auxiliary)},
        "held_out": held_out_statistics,
        "curves": describe_curves(runs, evaluated_steps, CURVE_BOUND_NATS[arguments.dtype]),
        "loss_step_shape": [held_out.tokens.numel(), scale.vocab_size, scale.base_width, scale.aux_width],
        "loss_step": loss_steps,
    }


def failures(results):
    """What makes the run a failure, as sentences; empty if the two trainings agree and the gradient is right."""
    found = []
    curves = results["curves"]
    # written so that NaN fails
    if not curves["largest_difference_nats"] <= curves["bound_nats"]:
        found.append(
            f"the curves part by {curves['largest_difference_nats']:.1e} nats, more than {curves['bound_nats']:.0e}"
        )
    for dtype, steps in results["loss_step"].items():
        error, eager_error = (steps[name]["gradient_error"] for name in ("auxkernels", "eager"))
        bound = min(GRADIENT_ERROR_BOUND[dtype], GRADIENT_ERROR_OVER_EAGER[dtype] * eager_error)
        if not error <= bound:
            found.append(f"the {dtype} gradient is off by {error:.1e}, more than {bound:.1e}")
    return found


def run(arguments):
    """Run the job and report it; returns the exit status."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    terminal = Terminal()
    results = train_and_measure(arguments, SCALES[arguments.scale], terminal)
    terminal.console.print(make_table(results))
    for path in write_results(results, arguments.output):
        terminal.say(f"wrote {path}")
    found = failures(results)
    for failure in found:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if found else 0
