"""Rows with infinities and NaN, and what float64 torch makes of them."""

import torch
import torch.nn.functional as F

from auxkernels import aux_cross_entropy

V, TARGET = 8300, 1700  # three blocks of 4096, the last one partial; the target in the first


INF = torch.inf


def put(where, value, side="aux"):
    def change(base, aux):
        (aux if side == "aux" else base)[where] = value

    return change


def everywhere_but(kept, value):
    def change(base, aux):
        keep = aux[kept].clone()
        aux[:] = value
        aux[kept] = keep

    return change


def both(base_value, aux_value, where):
    def change(base, aux):
        base[where], aux[where] = base_value, aux_value

    return change


def extremes(base, aux):
    aux[:] = 0
    base[:] = torch.linspace(-1, 1, V).to(base) * torch.finfo(base.dtype).max


def subnormals(base, aux):
    base[:] = torch.finfo(base.dtype).smallest_normal / 2
    aux[:] = 0


PATTERNS = {
    "one masked class": put(40, -INF),
    "the front of the first block masked": put(slice(0, 1200), -INF),
    "a whole block masked that holds no target": put(slice(4096, 8192), -INF),
    "all blocks masked but the target's": put(slice(4096, V), -INF),
    "last block masked": put(slice(8192, V), -INF),
    "base masks what aux does not": put(slice(0, 1200), -INF, "base"),
    "all masked but the target": everywhere_but(TARGET, -INF),
    "all masked but one other": everywhere_but(V - 1, -INF),
    "all masked but two others": everywhere_but([3, 4097], -INF),
    "target masked": put(TARGET, -INF),
    "target and the last block masked": put([TARGET, *range(8192, V)], -INF),
    "whole row masked": put(slice(None), -INF),
    "+inf at another class": put(60, INF),
    "+inf at the target": put(TARGET, INF),
    "+inf twice": put([0, V - 1], INF),
    "NaN at the first class": put(0, torch.nan),
    "NaN at the last class": put(V - 1, torch.nan),
    "NaN at the target": put(TARGET, torch.nan, "base"),
    "NaN at another class": put(2500, torch.nan),
    "NaN in a masked row": lambda base, aux: (put(slice(None), -INF)(base, aux), put(7, torch.nan)(base, aux)),
    "-inf in base and +inf in aux": both(-INF, INF, 10),
    "-inf in both": both(-INF, -INF, slice(0, 4100)),
    "largest and smallest finite numbers": extremes,
    "subnormal numbers": subnormals,
}


OPTIONS = {
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "mean with everything": {"reduction": "mean", "label_smoothing": 0.1, "z_loss": 1e-3},
}


def torch_result(base, aux, target, options):
    """Float64 torch on the sum as float32 forms it; loss of each row, gradient of the reduced loss."""
    s = (base.float() + aux.float()).double().requires_grad_()
    given = {k: v for k, v in options.items() if k == "label_smoothing"}
    rows = F.cross_entropy(s, target, reduction="none", **given)
    if "z_loss" in options:
        rows = rows + options["z_loss"] * s.logsumexp(-1).square()
    total = rows.sum() / (target.numel() if options["reduction"] == "mean" else 1)
    return rows.detach(), torch.autograd.grad(total, s)[0]


def run(base, aux, target, options, impl):
    base, aux = (t.clone().requires_grad_() for t in (base, aux))
    loss = aux_cross_entropy(base, aux, target, backend=impl.backend, **options)
    upstream = torch.ones_like(loss)
    return loss.detach(), *torch.autograd.grad(loss, (base, aux), upstream)


def pattern(t):
    """0 finite, 1 NaN, 2 +inf, 3 -inf."""
    return t.isnan().int() + 2 * (t == INF).int() + 3 * (t == -INF).int()
