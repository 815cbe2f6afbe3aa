"""Every operator as a function from a tensor to a number, for what transforms and compilers make of it."""

import torch

from auxkernels import Head, Logits, aux_cross_entropy, logit_stats, segments_to_tokens, soft_embedding

ROWS, V, WIDTH = 4, 9, 3


def _with_stats(found):
    mixture, stats = found
    return mixture.square().sum() + stats.entropy.sum() + stats.usage.square().sum()


def _all_stats(stats):
    return (stats.entropy + stats.kl_to_base - stats.lse + stats.log_prob * stats.base_log_prob).sum()


def operator(name: str, backend: str):
    """(a function to a number, its argument)."""
    made = torch.Generator().manual_seed(1)
    base, z = (torch.randn(ROWS, V, generator=made) for _ in range(2))
    hidden, weight, table = (torch.randn(n, WIDTH, generator=made) for n in (ROWS, V, V))
    tables = torch.randn(2, V, WIDTH, generator=made)
    y, ids = torch.tensor([0, 8, -100, 3]), torch.tensor([0, 2, -1, 2])
    mask, weights = torch.arange(V) == 1, torch.rand(V, generator=made)

    def loss(aux, **options):
        return aux_cross_entropy(base, aux, y, backend=backend, **options)

    def mixed(scores, table=table, **options):
        return soft_embedding(scores, table, backend=backend, **options)

    return {
        "mean": (loss, z),
        "sum and options": (
            lambda x: loss(x, reduction="sum", label_smoothing=0.1, z_loss=0.1, weight=weights),
            z,
        ),
        "normalizer": (lambda x: loss(x, normalizer=7), z),
        "none": (lambda x: loss(x, reduction="none").square().sum(), z),
        "recompute": (lambda x: loss(x, recompute=True), z),
        "return_stats": (lambda x: loss(x, return_stats=True)[0], z),
        "scale": (lambda x: loss(Logits(z, scale=x, softcap=5.0)), torch.tensor(1.3)),
        "hidden": (lambda x: loss(Head(x, weight)), hidden),
        "weight of a head": (lambda x: loss([Head(hidden, x), z], reduction="none").sum(), weight),
        "logit_stats": (lambda x: _all_stats(logit_stats(base, x, y, backend=backend)), z),
        "soft": (lambda x: mixed(x).square().sum(), z),
        "table": (lambda x: mixed(z, x, top_k=3).square().sum(), table),
        "temperature": (lambda x: mixed(z, temperature=x, mask=mask).square().sum(), torch.tensor(0.7)),
        "hard": (lambda x: mixed(x, hard=True, gumbel=0.5, seed=3).square().sum(), z),
        "tables and stats": (lambda x: _with_stats(mixed(Head(x, weight), tables, return_stats=True)), hidden),
        "segments": (lambda x: segments_to_tokens(x, ids, backend).square().sum(), hidden),
    }[name]


OPERATORS = (
    *("mean", "sum and options", "normalizer", "none", "recompute", "return_stats", "scale", "hidden"),
    *("weight of a head", "logit_stats", "soft", "table", "temperature", "hard", "tables and stats", "segments"),
)


FEW = ("mean", "none", "logit_stats", "tables and stats", "segments")


def gradient(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]
