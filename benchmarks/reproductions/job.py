"""What the reproductions' jobs share: a folder for their settings, trainings and measurements that are done once."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from torch import nn

from benchmarks.files import write_results
from benchmarks.timing import machine_info
from benchmarks.training.loop import Recipe, settings_key, train
from benchmarks.training.terminal import Terminal


class ReproductionJob:
    """A scale on a device, and the folder of its checkpoints and measurements; `resume=False` empties that folder."""

    checkpoint_steps = 100

    def __init__(
        self, scale, settings: dict, device: torch.device, checkpoints: Path, terminal: Terminal, resume: bool
    ):
        self.scale, self.device, self.terminal = scale, device, terminal
        settings = {"scale": dataclasses.asdict(scale), "device": device.type, "torch": torch.__version__, **settings}
        self.folder = checkpoints / settings_key(settings)
        self.seconds: dict[str, float] = {}  # of every training and measurement, each once
        if not resume:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(self.folder)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.scale.dtype == "bfloat16")

    def train(
        self,
        name: str,
        model: nn.Module,
        loss_of,
        num_examples: int,
        steps: int,
        batch: int,
        rate: float,
        seed: int,
        clipped_apart: Sequence[nn.Module] = (),
    ) -> dict:
        """Trains what of `model` requires a gradient by loss_of(rows [batch]) -> 0-d; what it cost.

        clipped_apart   parts whose gradients are clipped by their own norms, as if each were trained alone
        """
        warmup = min(100, max(1, steps // 10))
        recipe = Recipe(steps, batch, rate, warmup, seed, checkpoint_steps=self.checkpoint_steps)

        def loss_in_dtype(rows):
            with self.autocast():
                return loss_of(rows.to(self.device))

        with self.terminal.stage(f"{name}, {steps} steps", total=steps) as advance:
            path = self.folder / f"{name}.safetensors"
            progress = train(model, loss_in_dtype, num_examples, recipe, path, advance, clipped_apart)
        self.seconds[f"training {name}"] = progress.seconds
        return {
            "steps": steps,
            "examples": steps * batch,
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "train_loss": sum(progress.losses[-50:]) / len(progress.losses[-50:]),
            "seconds": progress.seconds,
        }

    def measured(self, name: str, measure: Callable[[], dict]) -> dict:
        """What `measure()` returns, or what it returned when it was called under this name before."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            start = time.perf_counter()
            result = {**measure(), "measuring_seconds": time.perf_counter() - start}
            write_results(self.folder, {path.name: json.dumps(result)})
        result = json.loads(path.read_text())
        self.seconds[f"measuring {name}"] = result["measuring_seconds"]
        return result

    def describe(self) -> dict:
        """What every result says of where it comes from."""
        return {
            "machine": {**machine_info.describe(self.device), "transformers": transformers.__version__},
            "scale": dataclasses.asdict(self.scale),
            "seconds": sum(self.seconds.values()),
        }


def check_unchanged(base: nn.Module, original: dict[str, torch.Tensor]) -> None:
    """RuntimeError where a frozen base's weights are not the same bits as before."""
    if not all(torch.equal(value, original[name]) for name, value in base.state_dict().items()):
        raise RuntimeError("the base's weights must be the same after training beside it, but they changed")


def run_job(arguments, new_job: Callable, train_and_measure: Callable, results_table: Callable, files: Callable) -> int:
    """Runs a reproduction and writes its results; returns the exit status.

    new_job(device, terminal) -> job, train_and_measure(job) -> results, results_table(results) for the terminal,
    files(results) -> name and content of what is written beside results.json
    """
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    terminal = Terminal()
    results = {"scale_name": arguments.scale, **train_and_measure(new_job(device, terminal))}
    terminal.say(results_table(results))
    contents = {"results.json": json.dumps(results, indent=1) + "\n", **files(results)}
    for path in write_results(arguments.output / arguments.scale, contents):
        terminal.say(f"wrote {path}")
    return 0
