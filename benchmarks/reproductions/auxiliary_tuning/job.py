"""The reproduction's job: train the base, tune it in every way at every budget, measure, report."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import torch

from benchmarks.reproductions.auxiliary_tuning.methods import AuxiliaryTuning, PlainLM
from benchmarks.reproductions.auxiliary_tuning.report import make_report, plot_results, results_table
from benchmarks.reproductions.auxiliary_tuning.task import Task, contains, generated_text, load_task
from benchmarks.reproductions.gpt2 import END_OF_TEXT_ID, build_gpt2, gpt2_config
from benchmarks.reproductions.job import ReproductionJob, check_unchanged, run_job
from benchmarks.training.results import share_error
from benchmarks.training.terminal import Terminal
from benchmarks.training.text import IGNORE_INDEX, Windows


@dataclass(frozen=True)
class Scale:
    """Sizes of a reproduction. Budgets are fractions of `base_flops`, the base's own training compute.

    `length` is the tokens of a window, the band of the keywords is in training verses, learning rates are of AdamW
    (`plain_rate`: base and from scratch). `max_examples`: how many held-out passages are measured and written.
    """

    vocab_size: int
    length: int
    max_chapters: int | None
    min_verses: int
    max_verses: int
    width: int
    layers: int
    dropout: float
    trunk_layer: int
    own_layers: int
    batch: int
    dtype: str
    base_flops: float
    plain_rate: float
    tuning_rate: float
    aux_rate: float
    budgets: dict[str, tuple[float, ...]]
    max_examples: int


SMALL = Scale(
    vocab_size=2048,
    length=32,
    max_chapters=None,
    min_verses=300,
    max_verses=2000,
    width=128,
    layers=4,
    dropout=0.0,
    trunk_layer=2,
    own_layers=2,
    batch=16,
    dtype="float32",
    base_flops=6e12,
    plain_rate=3e-3,
    tuning_rate=3e-3,
    aux_rate=3e-3,
    budgets={
        "auxiliary": (1 / 4, 1 / 2, 1.0),
        "independent": (1 / 2,),
        "fine-tuning": (1 / 4, 1 / 2, 1.0),
        "scratch": (1 / 4, 1 / 2, 1.0),
    },
    max_examples=512,
)
SCALES = {
    "tiny": dataclasses.replace(
        SMALL,
        vocab_size=1024,
        length=48,
        max_chapters=60,
        min_verses=5,
        max_verses=200,
        width=32,
        layers=2,
        trunk_layer=1,
        own_layers=1,
        batch=8,
        base_flops=6e9,
        tuning_rate=2e-3,
        budgets={"auxiliary": (0.25, 0.5), "independent": (0.5,), "fine-tuning": (0.5,), "scratch": (0.5, 1.0)},
        max_examples=16,
    ),
    "small": SMALL,
    "gpu": dataclasses.replace(
        SMALL,
        vocab_size=8192,
        length=64,
        min_verses=20,
        max_verses=500,
        width=512,
        layers=8,
        dropout=0.1,
        trunk_layer=4,
        own_layers=3,
        batch=64,
        dtype="bfloat16",
        base_flops=4e15,
        plain_rate=1e-3,
        tuning_rate=3e-4,
        aux_rate=1e-3,
        budgets={
            "auxiliary": (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2),
            "independent": (1 / 16, 1 / 4),
            "fine-tuning": (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2),
            "scratch": (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0),
        },
        max_examples=2008,
    ),
}


@dataclass(frozen=True)
class Run:
    """One training: a method, a budget in units of `Scale.base_flops`, and which of the repetitions it is."""

    method: str
    budget: float
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.method} {self.budget:g}" + (f" seed {self.seed}" if self.seed else "")


class Job(ReproductionJob):
    """One reproduction: its text, its base, and the folder that its checkpoints and measurements are kept in."""

    checkpoint_steps = 200
    evaluation_batch = 128
    prefix_length = 1  # a keyword is one token

    def __init__(
        self, scale: Scale, seed: int, device: torch.device, checkpoints, terminal: Terminal, resume: bool = True
    ):
        super().__init__(scale, {"seed": seed}, device, checkpoints, terminal, resume)
        self.seed = seed
        with terminal.stage("reading the text"):
            self.task: Task = self.load_task(checkpoints)
        self.passages, self.tuning = (
            {split: Windows(w.tokens.to(device), w.targets.to(device)) for split, w in windows.items()}
            for windows in (self.task.passages, self.task.tuning)
        )
        self.keyword_ids = {split: ids.to(device) for split, ids in self.task.keyword_ids.items()}

    def load_task(self, checkpoints) -> Task:
        return load_task(self.scale, checkpoints)

    def new_lm(self, seed: int):
        scale, num_positions = self.scale, self.scale.length + self.prefix_length
        config = gpt2_config(scale.vocab_size, num_positions, scale.width, scale.layers, scale.dropout)
        return build_gpt2(config, seed).to(self.device)

    def planned(self) -> list[Run]:
        """All runs, by rising budget."""
        runs = (Run(name, budget) for name, budgets in self.scale.budgets.items() for budget in budgets)
        return sorted(runs, key=lambda run: run.budget)

    def base_and_result(self):
        """The base, trained and frozen, and what its training cost and gave."""
        scale, base = self.scale, self.new_lm(self.seed)
        plain = PlainLM(base, is_conditional=False)
        cost = self.fit(plain, "base", scale.base_flops, scale.plain_rate, self.passages["train"], None, self.seed)
        base.requires_grad_(False)
        return base, {**cost, **self.measured("base", lambda: self.measure(plain, base, self.seed))}

    def result_of(self, run: Run, base) -> dict:
        """What a run's training cost and gave."""
        method, rate = self.new_method(run.method, base)
        flops, windows, keyword_ids = (
            run.budget * self.scale.base_flops,
            self.tuning["train"],
            self.keyword_ids["train"],
        )
        cost = self.fit(method, run.name, flops, rate, windows, keyword_ids, self.seed)
        with self.terminal.stage(f"{run.name}, measuring"):
            result = self.measured(run.name, lambda: self.measure(method, base, self.seed))
        return {"method": run.method, "budget": run.budget, "learning_rate": rate, **cost, **result}

    def new_method(self, name: str, base):
        """A method before its training, and its learning rate; `base` is not changed."""
        scale, seed = self.scale, self.seed + 1
        if name == "scratch":
            return PlainLM(self.new_lm(seed), is_conditional=True), scale.plain_rate
        if name == "fine-tuning":
            return PlainLM(copy.deepcopy(base).requires_grad_(True), is_conditional=True), scale.tuning_rate
        trunk_layer = {"auxiliary": scale.trunk_layer, "independent": None}[name]
        return AuxiliaryTuning.beside_gpt2(base, trunk_layer, scale.own_layers, scale.dropout, seed), scale.aux_rate

    def fit(self, method, name: str, flops: float, rate: float, windows: Windows, keyword_ids, seed: int) -> dict:
        """Trains a method for as many steps as `flops` allow; what it cost."""
        step_flops = self.scale.batch * method.training_flops(self.scale.length, self.prefix_length)
        steps = max(1, round(flops / step_flops))

        def loss_of(rows):
            return method.loss(windows[rows], None if keyword_ids is None else keyword_ids[rows])

        cost = self.train(name, method.model, loss_of, len(windows), steps, self.scale.batch, rate, seed)
        return {
            **cost,
            "flops": steps * step_flops,
            "flops_per_passage": step_flops / self.scale.batch,
            "epochs": cost["examples"] / len(windows),
        }

    @torch.no_grad()
    def mean_loss(self, method, windows: Windows, keyword_ids=None) -> float:
        """Nats per token; without `keyword_ids` the method reads none."""
        total = 0.0
        for start in range(0, len(windows), self.evaluation_batch):
            rows = slice(start, start + self.evaluation_batch)
            with self.autocast():
                ids = None if keyword_ids is None else keyword_ids[rows]
                total += method.loss(windows[rows], ids, reduction="sum").item()
        return total / (windows.targets != IGNORE_INDEX).sum().item()

    @torch.no_grad()
    def written(self, method, keyword_ids, seed: int) -> list[torch.Tensor]:
        """One sample for each keyword, int64 [<= length]."""
        torch.manual_seed(seed + 2)
        samples = []
        for ids in keyword_ids.split(self.evaluation_batch):
            start = torch.full_like(ids[:, :1], END_OF_TEXT_ID)
            with self.autocast():
                samples += method.generate(start, ids, self.scale.length)
        return samples

    def measure(self, method, base, seed: int) -> dict:
        """Held-out losses with and without keywords, and control and fluency of what the method writes."""
        count = self.scale.max_examples
        held_out, keyword_ids = self.tuning["test"][slice(count)], self.keyword_ids["test"][:count]
        keywords = self.task.keywords["test"][:count]
        samples = self.written(method, keyword_ids, seed)
        texts = [generated_text(self.task.tokenizer, sample) for sample in samples]
        hits = [contains(text, keyword) for text, keyword in zip(texts, keywords, strict=True)]
        control = sum(hits) / len(hits)
        windows = windows_of_samples(samples, self.scale.length)
        return {
            "loss": self.mean_loss(method, held_out, keyword_ids),
            **self.losses_without_keyword(method),
            "control": control,
            "control_error": share_error(control, len(hits)),
            "loss_under_base": self.mean_loss(PlainLM(base, is_conditional=False), windows),
            "tokens_per_sample": (windows.targets != IGNORE_INDEX).sum().item() / len(samples),
            "samples": [{"keyword": k, "text": t} for k, t in zip(keywords[:3], texts[:3], strict=True)],
        }

    def losses_without_keyword(self, method) -> dict:
        return {"loss_without_keyword": self.mean_loss(method, self.passages["test"])}

    def setting(self) -> dict:
        """What the results say of the job beside its runs."""
        splits = self.passages.items()
        windows = {split: {"passages": len(w), "with_keyword": len(self.tuning[split])} for split, w in splits}
        return {"seed": self.seed, "text": {"splits": windows, "keyword_candidates": self.task.num_candidates}}


def windows_of_samples(samples: list[torch.Tensor], length: int) -> Windows:
    """Samples as windows for the base, up to and including their END_OF_TEXT."""
    tokens = torch.full((len(samples), length), END_OF_TEXT_ID, device=samples[0].device)
    targets = torch.full_like(tokens, IGNORE_INDEX)
    for row, sample in enumerate(samples):
        ends = (sample == END_OF_TEXT_ID).nonzero()
        count = int(ends[0]) + 1 if len(ends) else len(sample)
        targets[row, :count] = sample[:count]
        tokens[row, 1:count] = sample[: count - 1]
    return Windows(tokens, targets)


def train_and_measure(job: Job) -> dict:
    """The whole job; every number of it as JSON-compatible values."""
    base, base_result = job.base_and_result()
    original = copy.deepcopy(base.state_dict())
    runs = []
    for run in job.planned():
        result = job.result_of(run, base)
        runs.append(result)
        job.terminal.say(f"  control {result['control']:.2f}, {result['loss']:.3f} nats")
    check_unchanged(base, original)
    return {**job.describe(), **job.setting(), "base": base_result, "runs": runs}


def run(arguments) -> int:
    """Run the reproduction and write its results; returns the exit status."""

    def new_job(device, terminal):
        scale = SCALES[arguments.scale]
        return Job(scale, arguments.seed, device, arguments.checkpoints, terminal, arguments.resume)

    def files(results):
        return {"curves.png": plot_results(results), "report.md": make_report(results)}

    return run_job(arguments, new_job, train_and_measure, results_table, files)
