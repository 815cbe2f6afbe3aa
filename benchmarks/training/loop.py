"""The reproductions' training loop: AdamW on the trainable parameters, with checkpoints that a later call goes on from.

A checkpoint is one safetensors file, written whole or not at all, with parameters, optimizer state, step and losses.
The order of the batches, the learning rate and the random state of a step depend on recipe and step alone, so that a
run that was interrupted and went on ends with the same bits as one that was not (same machine and threads).
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.files import write_atomically
from benchmarks.training.schedule import batch_order, warm_up_and_decay


@dataclass(frozen=True)
class Recipe:
    """How one model is trained: linear warm-up over `warmup_steps`, then cosine to a tenth of `learning_rate`."""

    steps: int
    batch: int
    learning_rate: float
    warmup_steps: int
    seed: int
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    checkpoint_steps: int = 100

    def rate_at(self, step: int) -> float:
        return self.learning_rate * warm_up_and_decay(step, self.steps, self.warmup_steps)


@dataclass
class Progress:
    """Steps done, the loss in nats of each, and the seconds they took together (over all interrupted parts)."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


def settings_key(settings: dict) -> str:
    """Twelve hexadecimal digits that name JSON-compatible settings: the folder that their checkpoints belong to."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def train(
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    num_examples: int,
    recipe: Recipe,
    path: Path,
    on_step: Callable[[str], None] = lambda text: None,
    clipped_apart: Sequence[nn.Module] = (),
) -> Progress:
    """Trains the parameters of `model` that require a gradient; goes on from the checkpoint at `path` if there is one.

    loss_of   int64 [recipe.batch] indices of examples -> mean loss, a 0-d tensor.
    path      safetensors file of the checkpoint; after the last step it is the trained model, and a later call only
              loads it. Whoever gives a path answers for its settings being those of the call (`settings_key`).
    on_step   called once for each step, also for those that a checkpoint has done already.
    clipped_apart   parts of the model that hold all its trained parameters, each once: gradients are clipped by the
              norm of each part's, as if it were trained alone. None: by that of all.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [  # no decay of biases and norms
        {"params": [p for p in parameters.values() if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)
    progress = load_checkpoint(path, parameters, optimizer)
    for loss in progress.losses:
        on_step(f"loss {loss:.3f}")
    clipped = [[p for p in part.parameters() if p.requires_grad] for part in clipped_apart or (model,)]
    order = batch_order(num_examples, recipe.batch, recipe.steps, recipe.seed)
    model.train()
    start = time.perf_counter() - progress.seconds
    while progress.step < recipe.steps:
        torch.manual_seed(recipe.seed * 1_000_003 + progress.step)  # dropout: the same in a run that was interrupted
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate_at(progress.step)
        loss = loss_of(order[progress.step])
        loss.backward()
        for part in clipped:
            torch.nn.utils.clip_grad_norm_(part, recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        progress.step += 1
        progress.losses.append(loss.item())
        progress.seconds = time.perf_counter() - start
        if not math.isfinite(progress.losses[-1]):
            raise RuntimeError(f"the loss must be finite, got {progress.losses[-1]} in step {progress.step}")
        if progress.step % recipe.checkpoint_steps == 0 or progress.step == recipe.steps:
            save_checkpoint(path, parameters, optimizer, progress)
        on_step(f"loss {progress.losses[-1]:.3f}")
    model.eval()
    return progress


def save_checkpoint(path: Path, parameters: dict[str, Tensor], optimizer, progress: Progress) -> None:
    tensors = {f"parameter.{name}": p.detach() for name, p in parameters.items()}
    for name, p in parameters.items():
        tensors |= {f"optimizer.{key}.{name}": value for key, value in optimizer.state[p].items()}
    metadata = {"progress": json.dumps(vars(progress))}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_checkpoint(path: Path, parameters: dict[str, Tensor], optimizer=None) -> Progress:
    """Fills parameters and optimizer from `path`; a fresh Progress, and nothing changed, where there is no such file.

    Raises ValueError where the file's parameters are not those given.
    """
    if not path.exists():
        return Progress()
    with safe_open(path, framework="pt") as file, torch.no_grad():
        saved = {name.partition(".")[2] for name in file.keys() if name.startswith("parameter.")}  # noqa: SIM118
        if saved != set(parameters):
            raise ValueError(
                f"{path.name} must hold the model's trainable parameters, but differs in "
                f"{sorted(saved ^ set(parameters))[:3]}"
            )
        for name, p in parameters.items():
            p.copy_(file.get_tensor(f"parameter.{name}"))
        if optimizer is not None:
            for name, p in parameters.items():
                state = {key: file.get_tensor(f"optimizer.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {key: value.to(p.device) for key, value in state.items()}
        return Progress(**json.loads(file.metadata()["progress"]))
