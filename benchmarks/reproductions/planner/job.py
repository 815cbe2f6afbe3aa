"""The reproduction's job: base and labels, for each seed a planner and every way to condition on it, the report."""

from __future__ import annotations

import copy
import dataclasses
import math
import time

import torch
from torch import Tensor, nn

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
from benchmarks.reproductions.planner.scales import SCALES, PretrainedScale, Scale
from benchmarks.reproductions.planner.task import (
    Labels,
    SegmentedWindows,
    Task,
    load_labels,
    load_task,
    tfidf_embeddings,
)
from benchmarks.training.terminal import Terminal
from benchmarks.training.text import IGNORE_INDEX

SECOND_STAGE = 1000  # added to the seed of the order of the windows, so that it is not the first stage's again


class Job(ReproductionJob):
    """One reproduction: its text, labels and base, and the folder that its checkpoints and measurements are kept in.

    base           the language model, which all seeds share
    conditioned    what of it is conditioned and predicts, of the `layers` given (None: `PlannerForCausalLM`'s default)
    """

    arms = tuple(ARMS)
    evaluation_batch = 64
    layers: list[int] | None = None

    def __init__(self, scale: Scale, device: torch.device, checkpoints, terminal: Terminal, resume: bool = True):
        super().__init__(scale, {}, device, checkpoints, terminal, resume)
        with terminal.stage("reading the text"):
            task = self.load_task(checkpoints)
        with terminal.stage("labels of the verses"):
            path = self.folder / "labels.safetensors"
            labels = load_labels(task, scale.num_labels, scale.label_dim, path, self.embeddings)
        windows = {split: value.to(device) for split, value in task.windows.items()}
        self.task: Task = dataclasses.replace(task, windows=windows, contexts=task.contexts.to(device))
        self.labels = Labels(*(value.to(device) for value in vars(labels).values()))
        self.load_base()

    # -- the text and the language model, of a scale whose language model is trained on the text -----------------------

    def load_task(self, checkpoints) -> Task:
        scale = self.scale
        return load_task(scale.vocab_size, scale.length, scale.context, scale.max_chapters, checkpoints)

    def embeddings(self, texts: list[str], train: slice, dim: int) -> Tensor:
        """Sentence embeddings float32 [texts, dim] of length 1, of which only texts[train] are learnt from."""
        return tfidf_embeddings(texts, train, dim)

    def load_base(self) -> None:
        """Sets `base` and `conditioned`."""
        scale = self.scale
        config = gpt2_config(scale.vocab_size, scale.length, scale.width, scale.layers, scale.dropout)
        self.base: nn.Module = build_gpt2(config, seed=0).to(self.device)
        self.conditioned = self.base

    def reading(self, windows: SegmentedWindows) -> dict[str, Tensor]:
        """Arguments by which `conditioned` reads windows."""
        return {"input_ids": windows.tokens}

    # -- training ------------------------------------------------------------------------------------------------------

    def fit_base(self) -> dict:
        """Trains the language model that all seeds share, and freezes it; what the report says of it."""
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

    def codebook(self) -> Tensor:
        """What the label embeddings start as, [K, label_dim]."""
        return self.labels.centroids

    def fit_arm(self, name: str, planner: Planner, seed: int, split: str = "test") -> dict:
        """Trains one way of conditioning, from the pretrained planner, which is not changed, and measures it.

        `seconds` and `train_loss` are those of the second stage; the first one may be shared with another way.
        """
        scale, codebook = self.scale, self.codebook()
        start = ARMS[name].start or name
        arm, init = ARMS[name], scale.conditioning_init
        model = conditioned_lm(self.conditioned, copy.deepcopy(planner), arm, codebook, seed, init, self.layers)
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
            inputs = self.conditioned_inputs(arm, batch)
            return model(**inputs, shift_labels=batch.targets).loss

        return self.train(run_name, model, loss_of, len(windows), steps, self.scale.batch, rate, seed)

    def conditioned_inputs(self, arm: str, batch: SegmentedWindows) -> dict:
        return conditioned_inputs(ARMS[arm], batch, self.task, self.labels, self.reading(batch))

    # -- measuring -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure_lm(self, model, inputs_of, split: str = "test") -> dict:
        """Held-out nats per token, and the sum of each chapter."""
        windows = self.task.windows[split]
        sums = torch.zeros(int(windows.chapters.max()) + 1, dtype=torch.float64)
        tokens = torch.zeros_like(sums)
        for start in range(0, len(windows), self.evaluation_batch):
            batch = windows[start : start + self.evaluation_batch]
            with self.autocast():
                losses = window_losses(model, inputs_of(batch), batch.targets)
            chapters = batch.chapters.cpu()
            sums.index_add_(0, chapters, losses.double().cpu())
            tokens.index_add_(0, chapters, (batch.targets != IGNORE_INDEX).sum(1).double().cpu())
        return {"loss": (sums.sum() / tokens.sum()).item(), "chapter_nats": sums.tolist()}

    def measure_arm(self, model, name: str, split: str) -> dict:
        model.eval()
        result = self.measure_lm(model, lambda batch: self.conditioned_inputs(name, batch), split)
        return result | (self.measure_planner(model.planner, split) if ARMS[name].labels == "planner" else {})

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
    reading = lambda batch: {**job.reading(batch), "use_cache": False}  # noqa: E731
    base = {**cost, **job.measured("base", lambda: job.measure_lm(job.conditioned, reading))}
    planners, runs = [], []
    for seed in range(num_seeds):
        planner = job.new_planner(seed)
        cost = job.fit_planner(planner, seed)
        measured = job.measured(f"planner, seed {seed}", lambda planner=planner: job.measure_planner(planner))
        planners.append({"seed": seed, **cost, **measured})
        for name in job.arms:
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


def job_class(scale: Scale) -> type[Job]:
    if isinstance(scale, PretrainedScale):
        from benchmarks.reproductions.planner.pretrained import PretrainedJob

        return PretrainedJob
    return Job


def run(arguments) -> int:
    """Run the reproduction and write its results; returns the exit status."""

    def new_job(device, terminal):
        scale = SCALES[arguments.scale]
        return job_class(scale)(scale, device, arguments.checkpoints, terminal, arguments.resume)

    def files(results):
        return {"perplexity.png": plot_results(results), "report.md": make_report(results)}

    return run_job(arguments, new_job, lambda job: train_and_measure(job, arguments.seeds), results_table, files)
