"""A sharded vocabulary with one process on each of several CUDA devices."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from auxkernels import Head, Logits, VocabShard, aux_cross_entropy

ROWS, COLUMNS, OPTIONS = 33, 50257, {"label_smoothing": 0.1, "z_loss": 1e-3}


def sources(kind: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Leaves of base and auxiliary, the base's without gradients, and targets with one row that is ignored."""
    drawn = torch.Generator().manual_seed(0)
    target = torch.randint(COLUMNS, (ROWS,), generator=drawn)
    target[3] = -100
    shapes = [(ROWS, COLUMNS)] * 2 if kind == "logits" else [(ROWS, 64), (COLUMNS, 64), (ROWS, 32), (COLUMNS, 32)]
    return [torch.randn(shape, generator=drawn).to(dtype) for shape in shapes], target


def results(leaves: list[Tensor], target: Tensor, shard: VocabShard | None = None) -> list[Tensor]:
    """The loss, and the gradients of the auxiliary's leaves."""
    frozen, trained = leaves[: len(leaves) // 2], [t.requires_grad_() for t in leaves[len(leaves) // 2 :]]
    of = Logits if len(frozen) == 1 else Head
    loss = aux_cross_entropy(of(*frozen), of(*trained), target, shard=shard, **OPTIONS)
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


def compare(rank: int, world: int, store: str, kind: str, dtype: torch.dtype, answers) -> None:
    """Puts the largest difference from one process, relative to the largest value of each result, and the loss."""
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", store=dist.FileStore(store, world), rank=rank, world_size=world)
    step = -(-COLUMNS // world)
    shard = VocabShard(rank * step, min((rank + 1) * step, COLUMNS), COLUMNS)
    leaves, target = sources(kind, dtype)
    leaves, target = [t.cuda() for t in leaves], target.cuda()
    want = results(leaves, target)
    own = [t.detach()[:, shard.start : shard.stop] if t.shape[1] == COLUMNS else t.detach() for t in leaves]
    own = [t[shard.start : shard.stop] if len(t) == COLUMNS else t for t in own]
    found = results([t.clone() for t in own], target, shard)
    errors = []
    for got, expected in zip(found, want, strict=True):
        if expected.dim() == 2 and expected.shape[1] == COLUMNS:
            expected = expected[:, shard.start : shard.stop]
        elif expected.dim() == 2 and len(expected) == COLUMNS:
            expected = expected[shard.start : shard.stop]
        errors.append(((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item())
    answers.put((rank, errors, found[0].item()))
    dist.barrier()
    dist.destroy_process_group()
