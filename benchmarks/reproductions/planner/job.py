"""The reproduction's job: base and labels, for each seed a planner and every way to condition on it, the report."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.reproductions.gpt2 import build_gpt2, gpt2_config
from benchmarks.reproductions.job import ReproductionJob, check_unchanged, run_job
from benchmarks.reproductions.language_models import lm_loss
from benchmarks.reproductions.planner.methods import (
    ARMS,
    Planner,
    conditioned_inputs,
    conditioned_lm,
    planner_inputs,
    window_losses,
)
from benchmarks.reproductions.planner.report import make_report, plot_results, results_table
from benchmarks.reproductions.planner.task import Labels, Task, load_labels, load_task
from benchmarks.training.terminal import Terminal
from benchmarks.training.text import IGNORE_INDEX

EVALUATION_BATCH = 64
SECOND_STAGE = 1000  # added to the seed of the order of the windows, so that it is not the first stage's again


@dataclass(frozen=True)
class Scale:
    """Sizes of a reproduction. `length` is the tokens of a window, `context` the verses that the planner reads.

    Batches are windows for the language model, verses for the planner; learning rates are of AdamW. Conditioning is
    trained in two stages, alone (`start_steps`) and, at a lower rate, with the planner where a way trains it
    (`joint_steps`): from an untrained conditioning the planner would first get noise for a gradient, and forget.
    """

    vocab_size: int
    length: int
    max_chapters: int | None
    width: int
    layers: int
    dropout: float
    num_labels: int
    label_dim: int
    context: int
    dtype: str
    batch: int
    base_steps: int
    base_rate: float
    planner_batch: int
    planner_steps: int
    planner_rate: float
    start_steps: int
    start_rate: float
    joint_steps: int
    joint_rate: float
    conditioning_init: str


SMALL = Scale(
    vocab_size=4096,
    length=64,
    max_chapters=None,
    width=128,
    layers=4,
    dropout=0.0,
    num_labels=128,
    label_dim=64,
    context=8,
    dtype="float32",
    batch=16,
    base_steps=1000,
    base_rate=3e-3,
    planner_batch=128,
    planner_steps=1000,
    planner_rate=3e-3,
    start_steps=200,
    start_rate=1e-2,
    joint_steps=200,
    joint_rate=1e-3,
    conditioning_init="zero_projection",
)
SCALES = {
    "tiny": dataclasses.replace(
        SMALL,
        vocab_size=1024,
        length=32,
        max_chapters=60,
        width=32,
        layers=3,
        num_labels=16,
        label_dim=16,
        context=4,
        batch=8,
        base_steps=60,
        planner_batch=32,
        planner_steps=40,
        planner_rate=1e-3,
        start_steps=20,
        joint_steps=10,
    ),
    "small": SMALL,
    "gpu": dataclasses.replace(
        SMALL,
        vocab_size=8192,
        length=128,
        width=512,
        layers=8,
        dropout=0.2,
        num_labels=256,
        label_dim=128,
        dtype="bfloat16",
        batch=64,
        base_steps=1200,
        base_rate=1e-3,
        planner_steps=600,
        planner_rate=1e-3,
        start_steps=400,
        start_rate=3e-3,
        joint_steps=400,
        joint_rate=3e-4,
    ),
}


class Job(ReproductionJob):
    """One reproduction: its text, labels and base, and the folder that its checkpoints and measurements are kept in."""

    def __init__(self, scale: Scale, device: torch.device, checkpoints, terminal: Terminal, resume: bool = True):
        super().__init__(scale, {}, device, checkpoints, terminal, resume)
        with terminal.stage("reading the text"):
            task = load_task(scale.vocab_size, scale.length, scale.context, scale.max_chapters, checkpoints)
        with terminal.stage("labels of the verses"):
            labels = load_labels(task, scale.num_labels, scale.label_dim, self.folder / "labels.safetensors")
        windows = {split: value.to(device) for split, value in task.windows.items()}
        self.task: Task = dataclasses.replace(task, windows=windows, contexts=task.contexts.to(device))
        self.labels = Labels(*(value.to(device) for value in vars(labels).values()))
        config = gpt2_config(scale.vocab_size, scale.length, scale.width, scale.layers, scale.dropout)
        self.base = build_gpt2(config, seed=0).to(device)

    # -- training ------------------------------------------------------------------------------------------------------

    def fit_base(self) -> dict:
        """Trains the language model that all seeds share, and freezes it."""
        scale, windows = self.scale, self.task.windows["train"]
        cost = self.train(
            "base",
            self.base,
            lambda rows: lm_loss(self.base, windows.tokens[rows], windows.targets[rows]),
            len(windows),
            scale.base_steps,
            scale.batch,
            scale.base_rate,
            seed=0,
        )
        self.base.requires_grad_(False)
        return {**cost, "epochs": scale.base_steps * scale.batch / len(windows)}

    def new_planner(self, seed: int) -> Planner:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Planner(self.labels.centroids.cpu(), self.scale.context).to(self.device)

    def fit_planner(self, planner: Planner, seed: int) -> dict:
        """Pretrains a planner with cross-entropy to the training verses' oracle labels."""
        scale, train_verses = self.scale, self.task.verses_of["train"]

        def loss_of(rows):
            verses = rows + train_verses.start
            scores = planner(**planner_inputs(verses, self.task, self.labels))
            return torch.nn.functional.cross_entropy(scores, self.labels.oracle[verses])

        count = train_verses.stop - train_verses.start
        name = f"planner, seed {seed}"
        return self.train(
            name, planner, loss_of, count, scale.planner_steps, scale.planner_batch, scale.planner_rate, seed
        )

    def fit_arm(self, name: str, planner: Planner, seed: int, split: str = "test") -> dict:
        """Trains one way of conditioning, from the pretrained planner, which is not changed, and measures it.

        `seconds` and `train_loss` are those of the second stage; the first one may be shared with another way.
        """
        scale, codebook = self.scale, self.labels.centroids
        start = ARMS[name].start or name
        model = conditioned_lm(self.base, copy.deepcopy(planner), ARMS[name], codebook, seed, scale.conditioning_init)
        try:
            self.fit_conditioning(
                f"{start}, start, seed {seed}", model, start, scale.start_steps, scale.start_rate, seed
            )
            if start != name:
                model.freeze_planner(False)
            order = seed + SECOND_STAGE
            cost = self.fit_conditioning(
                f"{name}, seed {seed}", model, name, scale.joint_steps, scale.joint_rate, order
            )
            result = self.measured(f"{name}, seed {seed}", lambda: self.measure_arm(model, name, split))
        finally:
            model.remove_hooks()
        steps = scale.start_steps + scale.joint_steps
        return {"arm": name, "seed": seed, **cost, "steps": steps, "examples": steps * scale.batch, **result}

    def fit_conditioning(self, run_name: str, model, arm: str, steps: int, rate: float, seed: int) -> dict:
        windows = self.task.windows["train"]

        def loss_of(rows):
            batch = windows[rows]
            inputs = conditioned_inputs(ARMS[arm], batch, self.task, self.labels)
            return model(**inputs, shift_labels=batch.targets).loss

        return self.train(run_name, model, loss_of, len(windows), steps, self.scale.batch, rate, seed)

    # -- measuring -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure_lm(self, model, inputs_of, split: str = "test") -> dict:
        """Held-out nats per token, and the sum of each chapter."""
        windows = self.task.windows[split]
        sums = torch.zeros(int(windows.chapters.max()) + 1, dtype=torch.float64)
        tokens = torch.zeros_like(sums)
        for start in range(0, len(windows), EVALUATION_BATCH):
            batch = windows[start : start + EVALUATION_BATCH]
            with self.autocast():
                losses = window_losses(model, inputs_of(batch), batch.targets)
            chapters = batch.chapters.cpu()
            sums.index_add_(0, chapters, losses.double().cpu())
            tokens.index_add_(0, chapters, (batch.targets != IGNORE_INDEX).sum(1).double().cpu())
        return {"loss": (sums.sum() / tokens.sum()).item(), "chapter_nats": sums.tolist()}

    def measure_arm(self, model, name: str, split: str) -> dict:
        arm = ARMS[name]
        model.eval()
        result = self.measure_lm(model, lambda batch: conditioned_inputs(arm, batch, self.task, self.labels), split)
        return result | (self.measure_planner(model.planner, split) if arm.labels == "planner" else {})

    @torch.no_grad()
    def measure_planner(self, planner: Planner, split: str = "test") -> dict:
        """How well the planner predicts the oracle labels of held-out verses, and which labels it uses."""
        planner.eval()
        part = self.task.verses_of[split]
        verses = torch.arange(part.start, part.stop, device=self.device)
        log_probs = torch.cat(
            [planner(**planner_inputs(chunk, self.task, self.labels)).log_softmax(-1) for chunk in verses.split(1024)]
        )
        oracle, chosen = self.labels.oracle[part], log_probs.argmax(-1)
        return {
            "accuracy": (chosen == oracle).double().mean().item(),
            "label_loss": -log_probs.gather(1, oracle.unsqueeze(1)).double().mean().item(),
            "entropy": -(log_probs.exp() * log_probs).sum(-1).double().mean().item(),
            "used_labels": effective_labels(chosen.bincount(minlength=log_probs.shape[1])),
        }

    def describe_text(self) -> dict:
        """Sizes of the splits, and what a planner that knows nothing could do about the held-out labels."""
        task, num_labels = self.task, self.scale.num_labels
        train, test = (self.labels.oracle[task.verses_of[split]] for split in ("train", "test"))
        counts = train.bincount(minlength=num_labels).double()
        log_shares = ((counts + 1) / (counts + 1).sum()).log()
        splits = {
            split: {
                "verses": task.verses_of[split].stop - task.verses_of[split].start,
                "windows": len(windows),
                "tokens": int((windows.targets != IGNORE_INDEX).sum()),
                "chapters": int(windows.chapters.max()) + 1,
            }
            for split, windows in task.windows.items()
        }
        chapter_tokens = torch.zeros(splits["test"]["chapters"], dtype=torch.int64)
        windows = task.windows["test"]
        chapter_tokens.index_add_(0, windows.chapters.cpu(), (windows.targets != IGNORE_INDEX).sum(1).cpu())
        return {
            "splits": splits,
            "test_chapter_tokens": chapter_tokens.tolist(),
            "used_labels": effective_labels(test.bincount(minlength=num_labels)),
            "commonest_label_accuracy": (test == counts.argmax()).double().mean().item(),
            "label_loss_of_shares": -log_shares[test].mean().item(),
        }


def effective_labels(counts: Tensor) -> float:
    """The exponential of the entropy of a histogram: how many labels, used equally, it amounts to."""
    shares = counts.double() / counts.sum()
    return math.exp(torch.special.entr(shares).sum().item())


def train_and_measure(job: Job, num_seeds: int) -> dict:
    """The whole job; every number of it as JSON-compatible values."""
    start = time.perf_counter()
    cost = job.fit_base()
    original = copy.deepcopy(job.base.state_dict())
    use_tokens = lambda batch: {"input_ids": batch.tokens, "use_cache": False}  # noqa: E731
    base = {**cost, **job.measured("base", lambda: job.measure_lm(job.base, use_tokens))}
    planners, runs = [], []
    for seed in range(num_seeds):
        planner = job.new_planner(seed)
        cost = job.fit_planner(planner, seed)
        measured = job.measured(f"planner, seed {seed}", lambda planner=planner: job.measure_planner(planner))
        planners.append({"seed": seed, **cost, **measured})
        for name in ARMS:
            runs.append(job.fit_arm(name, planner, seed))
            job.terminal.say(f"  perplexity {math.exp(runs[-1]['loss']):.3f}")
    check_unchanged(job.base, original)
    return {
        **job.describe(),
        "text": job.describe_text(),
        "base": base,
        "planners": planners,
        "runs": runs,
        "wall_seconds": time.perf_counter() - start,
    }


def run(arguments) -> int:
    """Run the reproduction and write its results; returns the exit status."""

    def new_job(device, terminal):
        return Job(SCALES[arguments.scale], device, arguments.checkpoints, terminal, arguments.resume)

    def files(results):
        return {"perplexity.png": plot_results(results), "report.md": make_report(results)}

    return run_job(arguments, new_job, lambda job: train_and_measure(job, arguments.seeds), results_table, files)
