"""Time, peak memory and error of one loss step (loss and gradient of the auxiliary's logits) for each loss function."""

import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.demo_data import IGNORE_INDEX
from benchmarks.demo_train import LOSSES
from benchmarks.harness import peak_bytes

ORACLE_ROWS = 64


@dataclass(frozen=True)
class LossStep:
    """One implementation's loss step.

    time_ms         median over the repeats
    peak_mib        most memory held at once beyond the inputs, so the gradient counts; None where it cannot be read
    loss_error      |loss - float64 loss|, in nats
    gradient_error  ||gradient - float64 gradient|| / ||float64 gradient||
    """

    time_ms: float
    peak_mib: float | None
    loss_error: float
    gradient_error: float


def loss_and_gradient(loss_function, base_logits, aux_logits, target):
    aux_logits = aux_logits.detach().requires_grad_()
    loss = loss_function(base_logits, aux_logits, target)
    loss.backward()
    return loss.detach(), aux_logits.grad


def errors_against_float64(loss, gradient, base_logits, aux_logits, target):
    """(loss error, gradient error) as in LossStep, in blocks of rows: the float64 sum is not stored whole."""
    kept = (target != IGNORE_INDEX).sum()
    rows = (tensor.flatten(0, -2).split(ORACLE_ROWS) for tensor in (gradient, base_logits, aux_logits))
    exact_loss, error_square, exact_square = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    for gradient_rows, base_rows, aux_rows, target_rows in zip(*rows, target.flatten().split(ORACLE_ROWS), strict=True):
        logits = (base_rows.double() + aux_rows.double()).requires_grad_()
        row_loss = F.cross_entropy(logits, target_rows, ignore_index=IGNORE_INDEX, reduction="sum") / kept
        row_loss.backward()
        exact_loss += row_loss.detach()
        exact_square += logits.grad.square().sum()
        error_square += (gradient_rows.double() - logits.grad).square().sum()
    return (loss.double() - exact_loss).abs().item(), (error_square / exact_square).sqrt().item()


def measure_loss_step(base_logits, aux_logits, target, repeats, on_step):
    """LossStep of each entry of LOSSES on the same logits, in alternating order.

    An untimed call of the same implementation precedes each timed one: what follows another implementation pays for
    the pages that the other gave back.
    """

    def call(name):
        return loss_and_gradient(LOSSES[name], base_logits, aux_logits, target)

    times_ms = {name: [] for name in LOSSES}
    for repeat in range(repeats):
        for name in list(LOSSES) if repeat % 2 == 0 else list(LOSSES)[::-1]:
            call(name)
            start = time.perf_counter()
            call(name)
            times_ms[name].append((time.perf_counter() - start) * 1e3)
        on_step("")
    measured = {}
    for name in LOSSES:
        peak = peak_bytes(lambda name=name: call(name), torch.device("cpu"))
        errors = errors_against_float64(*call(name), base_logits, aux_logits, target)
        measured[name] = LossStep(statistics.median(times_ms[name]), None if peak is None else peak / 2**20, *errors)
    return measured
