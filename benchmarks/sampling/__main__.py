"""``python -m benchmarks.sampling``: sample_logits against the chain that transformers' `generate` runs for a token.

The chain is sum, float32, warpers, softmax and multinomial. The two take turns in one run, in random order; before that
tokens of sample_logits are checked to be classes that the warpers keep. Times are the best of all rounds: of the clock,
and of the processor, which other processes on the machine disturb less.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from auxkernels import sample_logits
from benchmarks.timing import report
from benchmarks.timing.implementations import DTYPES

CPU = torch.device("cpu")
TEMPERATURE, TOP_K, TOP_P = 0.8, 50, 0.9
OPTIONS = {
    "temperature": {},
    "top-k, top-p": {"top_k": TOP_K, "top_p": TOP_P},
    "top-p": {"top_p": TOP_P},
}


def warped(base: Tensor, aux: Tensor, options: dict) -> Tensor:
    scores = (base + aux).float()
    warpers = [TemperatureLogitsWarper(TEMPERATURE)]
    warpers += [TopKLogitsWarper(options["top_k"])] if "top_k" in options else []
    warpers += [TopPLogitsWarper(options["top_p"])] if "top_p" in options else []
    for warper in warpers:
        scores = warper(None, scores)
    return scores


def chain(base: Tensor, aux: Tensor, options: dict) -> Tensor:
    return torch.multinomial(torch.softmax(warped(base, aux, options), dim=-1), num_samples=1).squeeze(1)


def fused(base: Tensor, aux: Tensor, options: dict) -> Tensor:
    return sample_logits(base, aux, temperature=TEMPERATURE, **options)


def raise_unless_kept(base: Tensor, aux: Tensor, options: dict) -> None:
    """Of float32 sums: those of two bfloat16 tensors are rounded by the chain, and not by sample_logits. Where classes
    tie at a threshold, the warpers keep some of them, and sample_logits all."""
    base, aux = base.float(), aux.float()
    is_kept, s = warped(base, aux, options) > -torch.inf, base + aux
    smallest = s.masked_fill(~is_kept, torch.inf).amin(-1)
    for _ in range(3):
        token = fused(base, aux, options)
        if (s.gather(-1, token.unsqueeze(-1)).squeeze(-1) < smallest).any():
            raise SystemExit(f"a token that the warpers do not keep: {options}")


def timed(call: Callable[[Tensor, Tensor, dict], Tensor], *arguments) -> tuple[float, float]:
    begun, of_processor = time.perf_counter(), time.process_time()
    call(*arguments)
    return time.perf_counter() - begun, time.process_time() - of_processor


def compare(num_rows: int, vocab_size: int, dtype: str, name: str, rounds: int, limit: float, seed: int) -> dict:
    generator, order = torch.Generator().manual_seed(seed), random.Random(seed)
    base, aux = (torch.randn(num_rows, vocab_size, generator=generator) * scale for scale in (3, 1))
    given = base.to(DTYPES[dtype]), aux.to(DTYPES[dtype]), OPTIONS[name]
    raise_unless_kept(*given)
    times: dict[str, list[tuple[float, float]]] = {"chain": [], "fused": []}
    begun = time.perf_counter()
    while len(times["chain"]) < rounds and (time.perf_counter() < begun + limit or len(times["chain"]) < 3):
        calls = [("chain", chain), *[("fused", fused)] * 3]
        order.shuffle(calls)
        for which, call in calls:
            times[which].append(timed(call, *given))
    shape = {"rows": num_rows, "vocab_size": vocab_size, "dtype": dtype, "options": name}
    row: dict = {**shape, "rounds": len(times["chain"])}
    for which, found in times.items():
        row[f"{which}_seconds"], row[f"{which}_processor_seconds"] = map(min, zip(*found, strict=True))
    return row


def table(rows: list[dict]) -> Table:
    made = Table(title="milliseconds of the clock (of the processor)")
    for name in ("options", "N x V", "dtype", "transformers", "sample_logits", "ratio"):
        made.add_column(name, justify="left" if name == "options" else "right")
    for row in rows:
        times = [(row[f"{which}_seconds"], row[f"{which}_processor_seconds"]) for which in ("chain", "fused")]
        cells = [f"{1e3 * one:.3g} ({1e3 * other:.3g})" for one, other in times]
        ratios = "{:.3g}x ({:.3g}x)".format(*(one / other for one, other in zip(*times, strict=True)))
        made.add_row(row["options"], f"{row['rows']} x {row['vocab_size']}", row["dtype"], *cells, ratios)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[49152, 151936])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--rounds", type=int, default=15, help="of the chain, each with three of sample_logits (15)")
    parser.add_argument("--seconds", type=float, default=6.0, help="a case's rounds stop early after this long (6)")
    parser.add_argument("--threads", type=int, help="torch's threads (torch's own choice)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a file of JSON lines that the results are added to")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    rows = [
        compare(num_rows, vocab_size, dtype, name, arguments.rounds, arguments.seconds, arguments.seed)
        for name in arguments.options
        for dtype in arguments.dtype
        for vocab_size in arguments.vocab_size
        for num_rows in arguments.rows
    ]
    Console(width=120).print(table(rows))
    report.append_described(arguments.output, rows, CPU)


if __name__ == "__main__":
    main()
