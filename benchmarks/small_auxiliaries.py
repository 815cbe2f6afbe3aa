"""``python -m benchmarks.small_auxiliaries [MODEL]``: an auxiliary's own head beside a shared and a low-rank one.

All auxiliaries are `aux="small"` of one pretrained base, trained side by side on the same batches of docstrings, with
every rate of `--rates`; the rate of each is that of the lowest loss on half of the held-out windows, and the loss that
is told is that of the other half. A step is forward, backward and AdamW; the order of the methods turns by one each
step, and its time is the median over all steps but the first. MODEL: a name or a folder; without it the language model
that `make pretrained` installs.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn

from auxkernels.models import AuxiliaryForCausalLM
from benchmarks import pretrained
from benchmarks.timing import report
from benchmarks.training import standard_library
from benchmarks.training.terminal import Terminal

METHODS = {
    "own head": {"head": "own"},
    "own head, trunk 0": {"head": "own", "trunk_layer": 0},
    "low rank 64, trunk 0": {"head": "low_rank", "head_rank": 64, "trunk_layer": 0},
    "shared": {"head": "shared"},
    "shared, rank 64": {"head": "shared", "head_rank": 64},
}


class Run:
    """One auxiliary and its optimiser."""

    def __init__(self, base: nn.Module, method: str, rate: float, seed: int):
        torch.manual_seed(seed)
        self.model = AuxiliaryForCausalLM.from_base_and_aux(base, "small", **METHODS[method]).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=rate)
        self.seconds: list[float] = []

    def step(self, batch: Tensor) -> None:
        begun = time.perf_counter()
        self.model(batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if batch.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - begun)

    @torch.no_grad()
    def losses(self, batches) -> tuple[float, float]:
        """Of the sum and of the base alone, nats per token."""
        self.model.eval()
        outputs = [self.model(batch, labels=batch, skip_logits=True, use_cache=False) for batch in batches]
        self.model.train()
        return tuple(statistics.fmean(float(getattr(o, name)) for o in outputs) for name in ("loss", "base_loss"))


def windows(tokenizer, texts: list[str], length: int, count: int, seed: int) -> Tensor:
    """[count, length] of a stream of texts in random order."""
    texts = random.Random(seed).sample(texts, len(texts))
    tokens: list[int] = []
    for text in texts:
        tokens += [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        if len(tokens) >= count * length:
            return torch.tensor(tokens[: count * length]).view(count, length)
    raise ValueError(f"the texts have {len(tokens) // length} windows of {length} tokens, asked for {count}")


def compare(arguments: argparse.Namespace, terminal: Terminal) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base, tokenizer = pretrained.load(arguments.model, arguments.gguf_file, getattr(torch, arguments.dtype))
    base, corpus = base.to(device), standard_library.load_corpus()
    steps, rows, length = arguments.steps, arguments.rows, arguments.length
    train = windows(tokenizer, corpus.train_docstrings, length, steps * rows, arguments.seed).to(device)
    held_out = windows(tokenizer, corpus.held_out_docstrings, length, 2 * arguments.held_out * rows, arguments.seed)
    to_choose, to_tell = held_out.to(device).split(rows)[::2], held_out.to(device).split(rows)[1::2]
    keys = list(itertools.product(METHODS, arguments.rates))
    runs = {key: Run(base, *key, arguments.seed) for key in keys}
    with terminal.stage(f"{len(runs)} auxiliaries, {steps} steps each", total=steps * len(runs)) as advance:
        for i, batch in enumerate(train.split(rows)):
            for key in keys[i % len(keys) :] + keys[: i % len(keys)]:
                runs[key].step(batch)
                advance("")
    found = {"base_parameters": base.num_parameters(), "steps": steps, "tokens_per_step": rows * length}
    found["methods"] = {}
    with terminal.stage("measuring", total=len(METHODS)) as advance:
        for method in METHODS:
            found["methods"][method] = measured(method, runs, arguments.rates, to_choose, to_tell)
            advance("")
    return found


def measured(method: str, runs: dict[tuple[str, float], Run], rates: list[float], to_choose, to_tell) -> dict:
    """A method at the rate of the lowest loss on `to_choose`; its losses are those on `to_tell`."""
    rate = min(rates, key=lambda rate: runs[method, rate].losses(to_choose)[0]) if len(rates) > 1 else rates[0]
    run = runs[method, rate]
    loss, base_loss = run.losses(to_tell)
    return {
        "parameters": sum(p.numel() for p in run.trained),
        "step_seconds": statistics.median(one for r in rates for one in runs[method, r].seconds[1:]),
        "rate": rate,
        "loss": loss,
        "base_loss": base_loss,
    }


def table(found: dict) -> Table:
    first = next(iter(found["methods"].values()))
    made = Table(
        title=f"after {found['steps']} steps of {found['tokens_per_step']} tokens; base {first['base_loss']:.3f}"
    )
    for name in ("auxiliary", "trained", "step, s", "of own head", "rate", "held-out loss"):
        made.add_column(name, justify="left" if name == "auxiliary" else "right")
    for method, row in found["methods"].items():
        ratio = row["step_seconds"] / first["step_seconds"]
        size = f"{row['parameters'] / 1e6:.2f} M"
        made.add_row(
            method, size, f"{row['step_seconds']:.2f}", f"{ratio:.2f}", f"{row['rate']:g}", f"{row['loss']:.3f}"
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small_auxiliaries", description=__doc__)
    parser.add_argument("model", nargs="?", help="a pretrained causal LM with a tokenizer: a name or a folder")
    parser.add_argument("--gguf-file", help="in that folder")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the base")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=8, help="texts in a batch")
    parser.add_argument("--length", type=int, default=256, help="tokens in a text")
    parser.add_argument("--held-out", type=int, default=16, help="batches to choose the rate, and as many for the loss")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a file of JSON lines that the result is added to")
    arguments = parser.parse_args()
    terminal = Terminal()
    found = compare(arguments, terminal)
    terminal.console.print(table(found))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report.append_described(arguments.output, [found], device)


if __name__ == "__main__":
    main()
