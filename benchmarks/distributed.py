"""``python -m benchmarks.distributed``: a loss step over a vocabulary that processes share, and what it sends.

A step is forward and backward of a frozen base's head and an auxiliary's, of which each process holds its columns:
gradients of the auxiliary's hidden states and head. Beside it the matrix products that it cannot do without, on the
same columns, and PyTorch's `loss_parallel` on the added logits of the same heads. A step's time is that of the slowest
process, from a barrier on; what is told is the median of rounds in which the methods take turns, and the memory that a
process holds in a step beyond what was there before, of the process that takes most.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel
from torch.utils._python_dispatch import TorchDispatchMode

from auxkernels import Head, VocabShard, aux_cross_entropy
from benchmarks.heads.inputs import Heads, make_heads
from benchmarks.timing import report
from benchmarks.timing.harness import peak_bytes
from benchmarks.timing.implementations import DTYPES

CPU = torch.device("cpu")
OURS, PRODUCTS, PARALLEL = "auxkernels", "bare products", "loss_parallel on added logits"
Step = Callable[[], object]


class Sent(TorchDispatchMode):
    """Collectives that are called, and the bytes that a process gives to them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if name.startswith(("c10d.", "_c10d_functional.")) and "wait" not in name and "barrier" not in name:
            given = args[1] if "allgather" in name and name.startswith("c10d.") else args[0]
            self.count += 1
            self.num_bytes += sum(t.numel() * t.element_size() for t in _tensors(given))
        return function(*args, **(kwargs or {}))


def _tensors(given: object) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    return [t for one in given for t in _tensors(one)] if isinstance(given, (list, tuple)) else []


def own_columns(heads: Heads, shard: VocabShard) -> Heads:
    columns = slice(shard.start, shard.stop)
    return heads._replace(w_base=heads.w_base[columns].clone(), w_aux=heads.w_aux[columns].clone())


def steps_of(heads: Heads, shard: VocabShard, mesh: DeviceMesh) -> dict[str, Step]:
    """Of each method, on the own columns of the heads."""
    own = own_columns(heads, shard)
    hidden, weight = own.h_aux.detach().requires_grad_(), own.w_aux.detach().requires_grad_()

    def gradients_of(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (hidden, weight))

    def ours() -> object:
        return gradients_of(
            aux_cross_entropy(Head(own.h_base, own.w_base), Head(hidden, weight), own.target, shard=shard)
        )

    logit_gradient = torch.randn(len(own.target), shard.width).to(weight.dtype)

    def products() -> object:
        with torch.no_grad():
            return [
                own.h_base @ own.w_base.T,
                hidden @ weight.T,
                logit_gradient @ weight,
                logit_gradient.T @ hidden,
            ]

    def parallel() -> object:
        logits = own.h_base @ own.w_base.T + hidden @ weight.T
        shape = (len(own.target), shard.size)
        values = DTensor.from_local(logits, mesh, [Shard(1)], run_check=False, shape=shape, stride=(shape[1], 1))
        with loss_parallel():
            d_hidden, d_weight = gradients_of(F.cross_entropy(values, own.target))
        dist.all_reduce(d_hidden)
        return d_hidden, d_weight

    return {OURS: ours, PRODUCTS: products, PARALLEL: parallel}


def _same_results(steps: dict[str, Step], dtype: torch.dtype) -> None:
    """RuntimeError where the two losses have other gradients than within a few roundings of 16-bit sums."""
    for one, other in zip(steps[OURS](), steps[PARALLEL](), strict=True):
        error = (one.double() - other.double()).norm() / one.double().norm()
        if error > 8 * torch.finfo(dtype).eps:
            raise RuntimeError(f"the gradients differ by {error:.1e}")


def compare(rank: int, world: int, store: str, shape: tuple[int, ...], dtype: str, rounds: int, answers) -> None:
    """On one of the processes; the first one puts what was found to `answers`."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    num_columns = shape[1]
    step = -(-num_columns // world)
    shard = VocabShard(min(rank * step, num_columns), min((rank + 1) * step, num_columns), num_columns)
    heads = make_heads(shape, DTYPES[dtype], "flat", False, CPU, seed=0)
    steps = steps_of(heads, shard, DeviceMesh("cpu", list(range(world))))
    _same_results(steps, DTYPES[dtype])
    with Sent() as sent:
        steps[OURS]()
    names, seconds = list(steps), {name: [] for name in steps}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            steps[name]()  # not timed: what runs after another method pays for that one's memory
            dist.barrier()
            begun = time.perf_counter()
            steps[name]()
            took = torch.tensor(time.perf_counter() - begun)
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            seconds[name].append(took.item())
    found = {}
    for name in names:
        dist.barrier()
        peak = torch.tensor(float(peak_bytes(steps[name], CPU) or 0))
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        found[name] = {"step_seconds": statistics.median(seconds[name]), "peak_bytes": peak.item()}
    found[OURS] |= {"collectives": sent.count, "sent_bytes": sent.num_bytes}
    if rank == 0:
        answers.put({"shape": shape, "dtype": dtype, "processes": world, "rounds": rounds, "methods": found})
    dist.destroy_process_group()
    # a mesh keeps gloo's threads alive, and one that lets go of a tensor while Python ends aborts the process
    os._exit(0)


def measured(world: int, shape: tuple[int, ...], dtype: str, rounds: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        answers = mp.get_context("spawn").SimpleQueue()
        arguments = (world, f"{folder}/store", shape, dtype, rounds, answers)
        mp.start_processes(compare, args=arguments, nprocs=world, start_method="spawn")
        return answers.get()


def table(row: dict) -> Table:
    n, v, *widths = row["shape"]
    of = f"{n} x {v} ({' + '.join(map(str, widths))}) {row['dtype']}, {row['processes']} processes"
    made = Table(title=f"loss step over a vocabulary in shards, {of}")
    for name in ("method", "step, s", "of products", "memory, MB", "collectives", "sent, kB"):
        made.add_column(name, justify="left" if name == "method" else "right")
    products = row["methods"][PRODUCTS]["step_seconds"]
    for name, found in row["methods"].items():
        sent = [str(found["collectives"]), f"{found['sent_bytes'] / 1e3:.0f}"] if "sent_bytes" in found else ["", ""]
        times = [f"{found['step_seconds']:.2f}", f"{found['step_seconds'] / products:.2f}"]
        made.add_row(name, *times, f"{found['peak_bytes'] / 1e6:.0f}", *sent)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__)
    parser.add_argument("--processes", type=int, default=2, help="with the cores shared among them")
    parser.add_argument("--dtype", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    parser.add_argument("--shape", type=_shape, default=(2048, 50257, 768, 256), help="rows x columns x widths")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="a file of JSON lines that the results are added to")
    arguments = parser.parse_args()
    rows = [measured(arguments.processes, arguments.shape, dtype, arguments.rounds) for dtype in arguments.dtype]
    for row in rows:
        Console().print(table(row))
    report.append_described(arguments.output, rows, CPU)


def _shape(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x")))


if __name__ == "__main__":
    main()
