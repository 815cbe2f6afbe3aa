"""``python -m benchmarks.cross_entropy.many``: aux_cross_entropies against as many calls of aux_cross_entropy.

Losses and gradients of K auxiliaries beside a frozen base, of logits or of heads. The two take turns in one run, first
the one and then the other; results are compared bit for bit first. Times are the best of all rounds: of the clock, and
of the processor, which other processes on the machine disturb less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from auxkernels import Head, aux_cross_entropies, aux_cross_entropy
from benchmarks.timing import report
from benchmarks.timing.implementations import DTYPES

LOGITS, HEADS = (1024, 50257), (2048, 49152, 576, 192)  # rows, classes, and widths of base and auxiliary
CPU = torch.device("cpu")


class Inputs(NamedTuple):
    base: Tensor | Head
    auxes: list
    target: Tensor

    def leaves(self) -> list[Tensor]:
        return [leaf for aux in self.auxes for leaf in ((aux.hidden, aux.weight) if isinstance(aux, Head) else (aux,))]


def inputs_of(kind: str, shape: tuple[int, ...], dtype: torch.dtype, num_auxes: int, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    rows, classes = shape[:2]

    def made(*size: int, scale: float = 1.0, grad: bool = True) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(dtype).requires_grad_(grad)

    def source(width: int, grad: bool) -> Tensor | Head:
        if kind == "logits":
            return made(rows, classes, grad=grad)
        return Head(made(rows, width, grad=grad), made(classes, width, scale=width**-0.5, grad=grad))

    base_width, width = shape[2:] or (0, 0)
    auxes = [source(width, True) for _ in range(num_auxes)]
    return Inputs(source(base_width, False), auxes, torch.randint(0, classes, (rows,), generator=generator))


def joint(inputs: Inputs) -> list[Tensor]:
    return aux_cross_entropies(*inputs)


def single(inputs: Inputs) -> list[Tensor]:
    return [aux_cross_entropy(inputs.base, aux, inputs.target) for aux in inputs.auxes]


def raise_unless_equal(inputs: Inputs) -> None:
    found, expected = joint(inputs), single(inputs)
    grads = [torch.autograd.grad(sum(losses), inputs.leaves()) for losses in (found, expected)]
    if not all(map(torch.equal, [*found, *grads[0]], [*expected, *grads[1]])):
        raise SystemExit("the two give different results")


def timed(call: Callable[[Inputs], list[Tensor]], inputs: Inputs) -> tuple[float, float]:
    begun, of_processor = time.perf_counter(), time.process_time()
    losses = call(inputs)
    took = time.perf_counter() - begun, time.process_time() - of_processor
    del losses
    return took


def compare(kind: str, shape: tuple[int, ...], dtype: str, num_auxes: int, rounds: int, seed: int) -> dict:
    inputs = inputs_of(kind, shape, DTYPES[dtype], num_auxes, seed)
    raise_unless_equal(inputs)
    times: dict[str, list[tuple[float, float]]] = {"joint": [], "single": []}
    calls = [("joint", joint), ("single", single)]
    for i in range(rounds):
        for name, call in calls if i % 2 else calls[::-1]:
            times[name].append(timed(call, inputs))
    row: dict = {"kind": kind, "shape": shape, "dtype": dtype, "num_auxes": num_auxes, "rounds": rounds}
    for name, found in times.items():
        row[f"{name}_seconds"], row[f"{name}_processor_seconds"] = map(min, zip(*found, strict=True))
    return row


def table(rows: list[dict]) -> Table:
    made = Table(title="seconds of the clock (of the processor)")
    for name in ("sources", "shape", "dtype", "K", "K calls", "one call", "ratio"):
        made.add_column(name, justify="left" if name == "sources" else "right")
    for row in rows:
        times = [(row[f"{name}_seconds"], row[f"{name}_processor_seconds"]) for name in ("single", "joint")]
        ratios = tuple(one / other for one, other in zip(*times, strict=True))
        shape = "x".join(map(str, row["shape"]))
        cells = [f"{one:.2f} ({other:.2f})" for one, other in (*times, ratios)]
        made.add_row(row["kind"], shape, row["dtype"], str(row["num_auxes"]), *cells)
    return made


def _shape(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x")))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cross_entropy.many", description=__doc__)
    parser.add_argument("--kind", nargs="+", choices=("logits", "heads"), default=["logits", "heads"])
    parser.add_argument("--dtype", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    parser.add_argument("--num-auxes", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--logits", type=_shape, default=LOGITS, metavar="NxV", help="1024x50257")
    parser.add_argument("--heads", type=_shape, default=HEADS, metavar="NxVxDxE", help="2048x49152x576x192")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, help="torch's threads (torch's own choice)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a file of JSON lines that the results are added to")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    rows = []
    for kind in arguments.kind:
        for dtype in arguments.dtype:
            for num_auxes in arguments.num_auxes:
                shape = arguments.logits if kind == "logits" else arguments.heads
                rows.append(compare(kind, shape, dtype, num_auxes, arguments.rounds, arguments.seed))
    Console().print(table(rows))
    report.append_described(arguments.output, rows, CPU)


if __name__ == "__main__":
    main()
