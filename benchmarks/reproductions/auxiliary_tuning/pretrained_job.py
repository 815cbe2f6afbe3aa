"""The reproduction on a pretrained base, which has never been trained here: `--scale pretrained`.

The base is SmolLM2-135M from an installed package, its 4-bit weights brought to float32. A keyword is read after an
END_OF_TEXT: as a text's first token it would say nothing to the upper layers, see `keyword_similarity`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from auxkernels.models import AuxiliaryForCausalLM, AuxiliaryGroupForCausalLM, BaseCache, DataCollatorForBaseCache
from benchmarks import pretrained
from benchmarks.reproductions.auxiliary_tuning.job import Job, Run, train_and_measure
from benchmarks.reproductions.auxiliary_tuning.methods import (
    AuxiliaryTuning,
    PlainLM,
    copy_layers,
    reading_the_trunk_as_it_is,
)
from benchmarks.reproductions.auxiliary_tuning.pretrained_report import make_report, plot_results, results_table
from benchmarks.reproductions.auxiliary_tuning.task import Task, load_task
from benchmarks.reproductions.gpt2 import END_OF_TEXT_ID
from benchmarks.reproductions.job import run_job
from benchmarks.reproductions.language_models import forward_flops
from benchmarks.training.standard_library import load_corpus
from benchmarks.training.text import Windows, make_windows

CACHED = "cached"
OTHERS_DISTANCE = 7  # passages to the one whose keyword is given for the own: of another part of the chapter


@dataclass(frozen=True)
class PretrainedScale:
    """Sizes of a reproduction on a pretrained base.

    `base_flops` is the unit of the budgets, `length` the tokens of a window, the band of the keywords is in training
    verses, learning rates are of AdamW. At the largest budget the methods of `repeated` are run `num_seeds` times.
    `initial_share`: of the base's logits, what the auxiliary beside the trunk begins with. `cached_passages`: of how
    many training passages the base's hidden states are kept. Measured on `max_examples` held-out passages with
    a keyword, `max_plain` without, and `other_windows` windows of `other_length` tokens of other text, of
    the held-out ones among `other_files` files.
    """

    length: int = 32
    max_chapters: int | None = None
    min_verses: int = 400
    max_verses: int = 2000
    trunk_layer: int = 15
    initial_share: float = 0.3
    lora_rank: int = 16
    batch: int = 8
    dtype: str = "float32"
    base_flops: float = 24e12
    # beside the trunk, keywords were worth more with 1e-3 than with 5e-4 after 50 steps; the others were not searched
    rates: tuple[tuple[str, float], ...] = (
        ("auxiliary", 1e-3),
        ("independent", 1e-3),
        (CACHED, 1e-3),
        ("fine-tuning", 2e-4),
        ("lora", 2e-3),
        ("scratch", 1e-3),
    )
    budgets: tuple[float, ...] = (1 / 4, 1 / 2, 1.0)
    num_seeds: int = 3
    repeated: tuple[str, ...] = ("auxiliary", CACHED, "fine-tuning")
    cached_passages: int = 2048
    max_examples: int = 160
    max_plain: int = 96
    other_files: int = 400
    other_windows: int = 32
    other_length: int = 128


SCALE = PretrainedScale()


class PretrainedJob(Job):
    """One reproduction. A training's checkpoint is removed once its measurement exists: full ones take 1.6 GB."""

    checkpoint_steps = 1000  # at the end alone: writing 1.6 GB takes as long as a few steps
    evaluation_batch = 256
    prefix_length = 2  # END_OF_TEXT and the keyword

    def load_task(self, checkpoints) -> Task:
        base, tokenizer = pretrained.load_language_model()
        self.base = base.requires_grad_(False).to(self.device, getattr(torch, self.scale.dtype))
        backend = tokenizer.backend_tokenizer
        corpus = load_corpus(self.scale.other_files)
        windows = make_windows(backend, corpus.held_out_docstrings, self.scale.other_length)
        windows = windows.spread(self.scale.other_windows)
        self.other = Windows(windows.tokens.to(self.device), windows.targets.to(self.device))
        task = load_task(self.scale, checkpoints, backend)
        after_start = {split: F.pad(ids, (1, 0), value=END_OF_TEXT_ID) for split, ids in task.keyword_ids.items()}
        return dataclasses.replace(task, keyword_ids=after_start)

    def planned(self) -> list[Run]:
        """All runs, by rising budget; auxiliaries from the cached base at the largest alone."""
        methods, scale = dict(self.scale.rates), self.scale
        largest = max(self.scale.budgets)
        smaller = [Run(m, b) for b in sorted(self.scale.budgets) if b < largest for m in methods if m != CACHED]
        repeats = [Run(m, largest, seed) for m in methods if m in scale.repeated for seed in range(1, scale.num_seeds)]
        return [*smaller, *(Run(method, largest) for method in methods), *repeats]

    def base_and_result(self):
        plain = PlainLM(self.base, is_conditional=False)
        with self.terminal.stage("base, measuring"):
            self.base_result = self.measured("base", lambda: self.measure(plain, self.base, self.seed))
        return self.base, self.base_result

    # -- methods -------------------------------------------------------------------------------------------------------

    def new_method(self, name: str, base: PreTrainedModel, seed: int = 0):
        rate = dict(self.scale.rates)[name]
        with torch.random.fork_rng():
            torch.manual_seed(self.seed + 1 + seed)
            if name == "scratch":
                model = AutoModelForCausalLM.from_config(base.config, dtype=torch.float32).to(self.device)
                return PlainLM(model, is_conditional=True), rate
            if name == "fine-tuning":
                return PlainLM(copy.deepcopy(base).float().requires_grad_(True), is_conditional=True), rate
            if name == "lora":
                return PlainLM(with_lora(base, self.scale.lora_rank), is_conditional=True), rate
            if name == "auxiliary":
                scale = self.scale
                return AuxiliaryTuning(upper_layers_beside(base, scale.trunk_layer, scale.initial_share)), rate
            return AuxiliaryTuning(AuxiliaryForCausalLM.from_base_and_aux(base, "small", head="shared")), rate

    def result_of(self, run: Run, base) -> dict:
        is_done = (self.folder / f"{run.name}.json").exists()
        if not is_done:
            method, cost = self.trained(run, base)

            def measure() -> dict:
                with self.terminal.stage(f"{run.name}, measuring"):
                    return {**cost, **self.measure(method, base, self.seed + run.seed)}

        result = self.measured(run.name, measure if not is_done else dict)
        self.seconds[f"training {run.name}"] = result["seconds"]
        if run.method != CACHED or run.seed == self.scale.num_seeds - 1:
            (self.folder / f"{self.checkpoint_of(run)}.safetensors").unlink(missing_ok=True)
        rate = dict(self.scale.rates)[run.method]
        return {"method": run.method, "budget": run.budget, "seed": run.seed, "learning_rate": rate, **result}

    def checkpoint_of(self, run: Run) -> str:
        return f"{CACHED} {run.budget:g}" if run.method == CACHED else run.name

    def trained(self, run: Run, base):
        """A method after its training, and what that cost."""
        if run.method == CACHED:
            return self.trained_from_cache(run, base)
        method, rate = self.new_method(run.method, base, run.seed)
        flops, windows, keyword_ids = (
            run.budget * self.scale.base_flops,
            self.tuning["train"],
            self.keyword_ids["train"],
        )
        cost = self.fit(method, run.name, flops, rate, windows, keyword_ids, self.seed + run.seed)
        if isinstance(method, PlainLM):  # measured in the dtype that autocast computes in: nothing is cast at each step
            method.model.to(getattr(torch, self.scale.dtype))
        return method, cost

    # -- from a cached base --------------------------------------------------------------------------------------------

    def trained_from_cache(self, run: Run, base):
        """Auxiliaries of all seeds, trained together by one pass over the cache; the one of the run, and what it cost.

        All read the same batches; what one costs is a share of what all cost.
        """
        scale, count = self.scale, self.scale.num_seeds
        methods = [self.new_method(CACHED, base, seed)[0] for seed in range(count)]
        rows = self.cached_rows()
        windows, keyword_ids = self.tuning["train"][rows], self.keyword_ids["train"][rows]
        group = AuxiliaryGroupForCausalLM.from_members({f"seed_{i}": m.model for i, m in enumerate(methods)})
        data, collator = self.cache.dataset(group), DataCollatorForBaseCache()

        def loss_of(batch):
            items = collator([data[i] for i in batch.tolist()])
            states = {name: value for name, value in items.items() if name.startswith("base_")}
            return group(
                input_ids=windows.tokens[batch],
                aux_input_ids=keyword_ids[batch],
                shift_labels=windows.targets[batch],
                **{name: value.to(self.device) for name, value in states.items() if name != "base_lse"},
            ).loss

        step_flops = scale.batch * methods[0].training_flops(scale.length, self.prefix_length, is_base_cached=True)
        steps = max(1, round(run.budget * scale.base_flops / step_flops))
        members = [method.model for method in methods]
        cost = self.train(
            self.checkpoint_of(run),
            group,
            loss_of,
            len(windows),
            steps,
            scale.batch,
            dict(scale.rates)[CACHED],
            self.seed,
            clipped_apart=members,
        )
        for name in ("seconds", "trained_parameters", "train_loss"):
            cost[name] /= count
        return methods[run.seed], {
            **cost,
            "flops": steps * step_flops,
            "flops_per_passage": step_flops / scale.batch,
            "epochs": cost["examples"] / len(windows),
        }

    def cached_rows(self) -> torch.Tensor:
        """Training passages at equal distances, of which the base's hidden states are kept."""
        count = min(self.scale.cached_passages, len(self.tuning["train"]))
        return torch.linspace(0, len(self.tuning["train"]) - 1, count).long().to(self.device)

    @functools.cached_property
    def cache(self) -> BaseCache:
        """The base's hidden states of the cached passages: written once, an interrupted writing goes on."""
        tokens = self.tuning["train"].tokens[self.cached_rows()]
        with self.terminal.stage("base cache"), torch.no_grad():
            return BaseCache.create(
                self.folder / "base_cache",
                self.base,
                [{"input_ids": row.tolist()} for row in tokens],
                dtype=getattr(torch, self.scale.dtype),
                trunk_layers=[0],
                lse=False,
                batch_size=32,
            )

    def cache_result(self) -> dict:
        """What the cache cost, and its size. It was written when an auxiliary was first trained on it."""
        cache = self.cache
        flops = len(cache) * forward_flops(self.base, self.scale.length, predicted=0)
        return {"passages": len(cache), "tokens": cache.num_tokens, "bytes": cache.num_bytes, "flops": flops}

    # -- measuring -----------------------------------------------------------------------------------------------------

    def measure(self, method, base, seed: int) -> dict:
        """Also the held-out loss given another passage's keyword: what it is above the loss, the keyword is worth."""
        held_out, ids = (x["test"][: self.scale.max_examples] for x in (self.tuning, self.keyword_ids))
        others = {"loss_given_another": self.mean_loss(method, held_out, ids.roll(OTHERS_DISTANCE, 0))}
        return {**super().measure(method, base, seed), **others}

    def losses_without_keyword(self, method) -> dict:
        if isinstance(method, AuxiliaryTuning):  # without keyword it is the base, whose weights are the same bits
            return {name: self.base_result[name] for name in ("loss_without_keyword", "loss_other_text")}
        plain = self.passages["test"].spread(self.scale.max_plain)
        return {
            "loss_without_keyword": self.mean_loss(method, plain),
            "loss_other_text": self.mean_loss(method, self.other),
        }

    @torch.no_grad()
    def keyword_similarity(self) -> dict[str, float]:
        """Mean cosine of two keywords' states at the trunk's end: as a text's first token, and after END_OF_TEXT."""
        keywords = self.keyword_ids["train"][:, -1:].unique().view(-1, 1)
        found = {}
        for place, tokens in (("first", keywords), ("after_start", F.pad(keywords, (1, 0), value=END_OF_TEXT_ID))):
            states = self.base.base_model(tokens, output_hidden_states=True, use_cache=False).hidden_states
            unit = F.normalize(states[self.scale.trunk_layer][:, -1].double(), dim=-1)
            pairs = len(unit) * (len(unit) - 1)
            found[place] = ((unit.sum(0).square().sum() - len(unit)) / pairs).item()
        return found

    def setting(self) -> dict:
        sizes = {
            "parameters": sum(p.numel() for p in self.base.parameters()),
            "layers": self.base.config.num_hidden_layers,
            "width": self.base.config.hidden_size,
            "vocab_size": self.base.config.vocab_size,
        }
        num_samples = min(self.scale.max_examples, len(self.tuning["test"]))
        return {
            **super().setting(),
            "num_samples": num_samples,
            "model": sizes,
            "cache": self.cache_result(),
            "keyword_similarity": self.keyword_similarity(),
        }


def with_lora(base: PreTrainedModel, rank: int) -> PreTrainedModel:
    """A copy of the base with trainable float32 adapters on all linear layers but the head."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = inject_adapter_in_model(config, copy.deepcopy(base))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def upper_layers_beside(base: PreTrainedModel, trunk_layer: int, initial_share: float) -> AuxiliaryForCausalLM:
    """An auxiliary that begins as a copy of the base's layers above `trunk_layer`, and reads the states below them.

    Its head is a map into what enters the base's head, at first `initial_share` of the identity: its logits are that
    share of the base's. Through a map of zeros, with which the untrained model is the base, no gradient reaches its
    layers at first, and for long after one that says little.
    """
    config = copy.deepcopy(base.config)
    config.num_hidden_layers -= trunk_layer
    aux = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(base.device)
    copy_layers(base, aux, trunk_layer)
    aux.base_model.norm.load_state_dict(base.base_model.norm.state_dict())
    model = AuxiliaryForCausalLM.from_base_and_aux(base, aux, trunk_layer=trunk_layer, head="shared")
    with torch.no_grad():
        torch.nn.init.eye_(model.aux_head.weight).mul_(initial_share)
    return reading_the_trunk_as_it_is(model)


def run(arguments) -> int:
    """Run the reproduction and write its results; returns the exit status."""

    def new_job(device, terminal):
        return PretrainedJob(SCALE, arguments.seed, device, arguments.checkpoints, terminal, arguments.resume)

    def files(results):
        return {"curves.png": plot_results(results), "report.md": make_report(results)}

    return run_job(arguments, new_job, train_and_measure, results_table, files)
