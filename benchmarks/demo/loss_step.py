"""Time, peak memory and error of one loss step (loss and gradients of the auxiliary's head) for each way to do it."""

import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from auxkernels import Head
from benchmarks.demo.train import LOSSES, fused_loss, stored_logits
from benchmarks.timing.harness import peak_bytes
from benchmarks.training.text import IGNORE_INDEX

ORACLE_ROWS = 64
STORED = "auxkernels, stored logits"


def loss_of_stored_logits(base, aux, target):
    return fused_loss(stored_logits(base), stored_logits(aux), target)


STEPS = {"auxkernels": LOSSES["auxkernels"], STORED: loss_of_stored_logits, "eager": LOSSES["eager"]}


@dataclass(frozen=True)
class LossStep:
    """One implementation's loss step, from hidden states and head weights on.

    time_ms         median over the repeats
    peak_mib        most memory held at once beyond the inputs, so gradients count; None where it cannot be read
    saved_mib       peak_mib of this less that of auxkernels on heads
    loss_error      |loss - float64 loss|, in nats
    gradient_error  ||gradient - float64 gradient|| / ||float64 gradient||, the larger of hidden states' and weight's
    """

    time_ms: float
    peak_mib: float | None
    saved_mib: float | None
    loss_error: float
    gradient_error: float


def loss_and_gradients(loss_function, base, aux, target):
    """(loss, (d hidden, d weight)) of the auxiliary; the base is frozen."""
    leaves = tuple(tensor.detach().requires_grad_() for tensor in (aux.hidden, aux.weight))
    loss = loss_function(base, Head(*leaves), target)
    return loss.detach(), torch.autograd.grad(loss, leaves)


def float64_loss_and_gradients(base, aux, target):
    """What loss_and_gradients should return, in blocks of rows: no float64 logits are stored whole."""
    kept = (target != IGNORE_INDEX).sum()
    weights = base.weight.double(), aux.weight.double().requires_grad_()
    exact_loss, exact_weight = torch.zeros((), dtype=torch.float64), torch.zeros_like(weights[1])
    exact_hidden = []
    rows = (tensor.flatten(0, -2).split(ORACLE_ROWS) for tensor in (base.hidden, aux.hidden))
    for base_rows, aux_rows, target_rows in zip(*rows, target.flatten().split(ORACLE_ROWS), strict=True):
        hidden = aux_rows.double().requires_grad_()
        logits = base_rows.double() @ weights[0].T + hidden @ weights[1].T
        row_loss = F.cross_entropy(logits, target_rows, ignore_index=IGNORE_INDEX, reduction="sum") / kept
        d_hidden, d_weight = torch.autograd.grad(row_loss, (hidden, weights[1]))
        exact_loss += row_loss.detach()
        exact_weight += d_weight
        exact_hidden.append(d_hidden)
    return exact_loss, (torch.cat(exact_hidden).view(aux.hidden.shape), exact_weight)


def errors_against(exact_loss, exact_gradients, loss, gradients):
    """(loss error, gradient error) as in LossStep."""
    pairs = zip(gradients, exact_gradients, strict=True)
    errors = [((gradient.double() - exact).norm() / exact.norm()).item() for gradient, exact in pairs]
    return (loss.double() - exact_loss).abs().item(), max(errors, key=lambda error: (error != error, error))


def measure_loss_step(base, aux, target, repeats, on_step):
    """LossStep of each entry of STEPS on the same heads, in alternating order.

    An untimed call of the same implementation precedes each timed one: what follows another implementation pays for
    the pages that the other gave back.
    """

    def call(name):
        return loss_and_gradients(STEPS[name], base, aux, target)

    times_ms = {name: [] for name in STEPS}
    for repeat in range(repeats):
        for name in list(STEPS) if repeat % 2 == 0 else list(STEPS)[::-1]:
            call(name)
            start = time.perf_counter()
            call(name)
            times_ms[name].append((time.perf_counter() - start) * 1e3)
        on_step("")
    peaks = {name: peak_bytes(lambda name=name: call(name), torch.device("cpu")) for name in STEPS}
    peaks_mib = {name: None if peak is None else peak / 2**20 for name, peak in peaks.items()}
    exact, measured = float64_loss_and_gradients(base, aux, target), {}
    for name, peak_mib in peaks_mib.items():
        saved_mib = None if peak_mib is None else peak_mib - peaks_mib["auxkernels"]
        errors = errors_against(*exact, *call(name))
        measured[name] = LossStep(statistics.median(times_ms[name]), peak_mib, saved_mib, *errors)
    return measured
