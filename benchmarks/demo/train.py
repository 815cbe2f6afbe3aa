"""The demo's training: fit the base on code, then train one auxiliary per loss function, step by step together."""

import copy
import math
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from auxkernels import Head, aux_cross_entropy, logit_stats
from benchmarks.demo.model import Auxiliary, BaseModel
from benchmarks.training.schedule import batch_order, warm_up_and_decay
from benchmarks.training.text import IGNORE_INDEX

LEARNING_RATE = 3e-3
WARMUP_STEPS = 10
EVALUATIONS = 6


@dataclass
class Run:
    """One training of the auxiliary: mean loss in nats of each step's batch, held-out losses, duration of each step."""

    auxiliary: Auxiliary
    optimizer: torch.optim.Optimizer
    train_loss: list[float] = field(default_factory=list)
    held_out_loss: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)


def head_of(model, hidden, dtype):
    """The source of a model's logits: its hidden states and head weight, no logits."""
    return Head(hidden.to(dtype), model.head.to(dtype))


def stored_logits(head):
    return F.linear(head.hidden, head.weight)


def fused_loss(base, aux, target, reduction="mean"):
    return aux_cross_entropy(base, aux, target, ignore_index=IGNORE_INDEX, reduction=reduction)


def eager_loss(base, aux, target, reduction="mean"):
    """What training code writes without this package, with the float32 upcast of Hugging Face's loss."""
    logits = (stored_logits(base) + stored_logits(aux)).float()
    return F.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=IGNORE_INDEX, reduction=reduction)


# each is loss(base Head, aux Head, target, reduction)
LOSSES = {"auxkernels": fused_loss, "eager": eager_loss}


def make_optimizer(model, steps):
    """AdamW with a linear warm-up and a cosine decay to a tenth; returns (optimizer, scheduler)."""

    def factor(step):
        return warm_up_and_decay(step, steps, WARMUP_STEPS)

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def fit_base(scale, windows, seed, on_step):
    """Fit the base on windows of code and freeze it."""
    torch.manual_seed(seed)
    base = BaseModel(scale.vocab_size, scale.window, scale.base_width, scale.base_layers)
    optimizer, scheduler = make_optimizer(base, scale.base_steps)
    for index in batch_order(len(windows), scale.batch, scale.base_steps, seed):
        batch = windows[index]
        loss = fused_loss(head_of(base, base.hidden(batch.tokens), torch.float32), None, batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        on_step(f"loss {loss.item():.3f}")
    return base.requires_grad_(False).eval()


@torch.no_grad()
def base_outputs(base, tokens, dtype):
    """The frozen base's hidden states, and the source of its logits."""
    hidden = base.hidden(tokens)
    return hidden, head_of(base, hidden, dtype)


@torch.no_grad()
def held_out_statistics(base, auxiliary, windows, scale, dtype):
    """Means over the held-out tokens: losses of base alone and of base + auxiliary, their top-1 accuracies, the KL."""
    kept = (windows.targets != IGNORE_INDEX).sum().item()
    totals = dict.fromkeys(("base_loss", "loss", "base_accuracy", "accuracy", "kl_to_base"), 0.0)
    for start in range(0, len(windows), scale.batch):
        batch = windows[start : start + scale.batch]
        hidden, base_head = base_outputs(base, batch.tokens, dtype)
        aux_head = head_of(auxiliary, auxiliary(hidden), dtype)
        stats = logit_stats(base_head, aux_head, batch.targets, ignore_index=IGNORE_INDEX)
        totals["base_loss"] -= stats.base_log_prob.double().sum().item()
        totals["loss"] -= stats.log_prob.double().sum().item()
        totals["base_accuracy"] += (stats.base_argmax == batch.targets).sum().item()
        totals["accuracy"] += (stats.argmax == batch.targets).sum().item()
        totals["kl_to_base"] += stats.kl_to_base.double().sum().item()
    return {name: total / kept for name, total in totals.items()}


@torch.no_grad()
def held_out_losses(base, runs, windows, scale, dtype):
    """Held-out loss of base + auxiliary for each run, computed with the run's own loss function."""
    kept = (windows.targets != IGNORE_INDEX).sum().item()
    totals = dict.fromkeys(runs, 0.0)
    for start in range(0, len(windows), scale.batch):
        batch = windows[start : start + scale.batch]
        hidden, base_head = base_outputs(base, batch.tokens, dtype)
        for name, run in runs.items():
            aux_head = head_of(run.auxiliary, run.auxiliary(hidden), dtype)
            totals[name] += LOSSES[name](base_head, aux_head, batch.targets, reduction="sum").item()
    return {name: total / kept for name, total in totals.items()}


def train_step(run, loss_function, hidden, base_head, targets, dtype):
    """One step of one run: forward of the auxiliary, loss, backward, update."""
    start = time.perf_counter()
    loss = loss_function(base_head, head_of(run.auxiliary, run.auxiliary(hidden), dtype), targets)
    run.optimizer.zero_grad()
    loss.backward()
    run.optimizer.step()
    run.train_loss.append(loss.item())
    run.step_ms.append((time.perf_counter() - start) * 1e3)


def train_auxiliaries(base, scale, steps, windows, held_out, seed, dtype, on_step):
    """Train one auxiliary per entry of LOSSES from the same start on the same batches; returns (runs, evaluated steps).

    The runs advance together, in alternating order, so that both meet the same load of the machine, and so that the
    frozen base's hidden states, which are the same for both, are computed once for each batch.
    """
    torch.manual_seed(seed + 1)
    initial = Auxiliary(scale.vocab_size, scale.base_width, scale.aux_width, scale.aux_layers)
    runs, schedulers = {}, []
    for name in LOSSES:
        auxiliary = copy.deepcopy(initial)
        optimizer, scheduler = make_optimizer(auxiliary, steps)
        runs[name] = Run(auxiliary, optimizer)
        schedulers.append(scheduler)
    every = max(1, steps // EVALUATIONS)
    evaluated = sorted({*range(0, steps, every), steps})
    order = batch_order(len(windows), scale.batch, steps, seed + 1)
    for step in range(steps + 1):
        if step in evaluated:
            for name, loss in held_out_losses(base, runs, held_out, scale, dtype).items():
                runs[name].held_out_loss.append(loss)
        if step == steps:
            break
        batch = windows[order[step]]
        hidden, base_head = base_outputs(base, batch.tokens, dtype)
        names = list(runs) if step % 2 == 0 else list(runs)[::-1]
        for name in names:
            train_step(runs[name], LOSSES[name], hidden, base_head, batch.targets, dtype)
        for scheduler in schedulers:
            scheduler.step()
        first, second = (run.train_loss[-1] for run in runs.values())
        on_step(f"loss {first:.3f}, eager {second:.3f}")
    return runs, evaluated


def largest_difference(runs, evaluated_steps, compared_steps):
    """Largest distance in nats of the two runs' curves, step losses and held-out losses, in the first `compared_steps`.

    Infinite where either curve is not finite, since NaN compares as no difference at all.
    """
    evaluations = sum(step <= compared_steps for step in evaluated_steps)
    curves = (run.train_loss[:compared_steps] + run.held_out_loss[:evaluations] for run in runs.values())
    first, second = (torch.tensor(curve, dtype=torch.float64) for curve in curves)
    difference = (first - second).abs().max().item()
    return difference if math.isfinite(difference) else math.inf
