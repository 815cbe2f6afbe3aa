"""``python -m benchmarks.training_steps MODEL``: whole training steps, the base run or read from a cache.

The auxiliary is `aux="small"` of the pretrained base. A step is forward, backward and AdamW on one batch of docstrings;
the order of the methods turns by one each step, and a method's time is the median over all steps but the first. Memory
is the most that a step holds beyond what was there before it. MODEL: a name or a folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from auxkernels.models import AuxiliaryForCausalLM, BaseCache, DataCollatorForBaseCache
from benchmarks.small_auxiliaries import windows
from benchmarks.timing import machine_info
from benchmarks.timing.harness import peak_bytes
from benchmarks.training import standard_library

EAGER, ONLINE, CACHED, SHARED = "eager sum and loss", "base run", "base cached", "base cached, shared head"
Step = Callable[[], None]


def _summed_in_eager(base: PreTrainedModel, aux: PreTrainedModel, batch: Tensor) -> Tensor:
    """The loss by plain PyTorch, in the sum's float32."""
    with torch.no_grad():
        logits = base(batch, use_cache=False).logits.float()
    logits = logits + aux(batch, use_cache=False).logits.float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def _step_of(model: AuxiliaryForCausalLM, loss_of: Callable[[AuxiliaryForCausalLM], Tensor]) -> Step:
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        if trained[0].is_cuda:
            torch.cuda.synchronize()

    return step


def steps_of(base: PreTrainedModel, tokens: Tensor, folder: str) -> dict[str, Step]:
    """One step of each method, on the same tokens [rows, length]."""
    device, examples = tokens.device, [{"input_ids": row.tolist()} for row in tokens]
    dtype = str(base.dtype).removeprefix("torch.")
    options = {"batch_size": len(examples), "dtype": dtype, "trunk_layers": [0]}  # a shared head's auxiliary reads it
    cache = BaseCache.create(folder, base, examples, lse=False, **options)
    head = cache.base_head().to(device)

    def small(of: PreTrainedModel, head: str = "own") -> AuxiliaryForCausalLM:
        torch.manual_seed(0)
        return AuxiliaryForCausalLM.from_base_and_aux(of, "small", head=head)

    def batch_of(model: AuxiliaryForCausalLM) -> dict[str, Tensor]:
        """Read and put together in each step, as in training."""
        items = cache.dataset(model)
        batch = DataCollatorForBaseCache()([items[i] for i in range(len(items))])
        return {name: values.to(device) for name, values in batch.items()}

    return {
        EAGER: _step_of(small(base), lambda model: _summed_in_eager(base, model.aux, tokens)),
        ONLINE: _step_of(small(base), lambda model: model(tokens, labels=tokens).loss),
        CACHED: _step_of(small(head), lambda model: model(**batch_of(model)).loss),
        SHARED: _step_of(small(head, "shared"), lambda model: model(**batch_of(model)).loss),
    }


def compare(arguments: argparse.Namespace) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files = {} if arguments.gguf_file is None else {"gguf_file": arguments.gguf_file}
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype), **files)
    tokenizer, corpus = AutoTokenizer.from_pretrained(arguments.model, **files), standard_library.load_corpus()
    tokens = windows(tokenizer, corpus.train_docstrings, arguments.length, arguments.rows, 0).to(device)
    with tempfile.TemporaryDirectory() as folder:
        steps = steps_of(base.to(device), tokens, f"{folder}/cache")
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        names = list(steps)
        for i in range(arguments.steps):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                begun = time.perf_counter()
                steps[name]()
                seconds[name].append(time.perf_counter() - begun)
        memory = {name: peak_bytes(step, device) for name, step in steps.items()}
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    found = {"base_parameters": base.num_parameters(), "dtype": arguments.dtype, "tokens_per_step": tokens.numel()}
    found["methods"] = {
        name: {"step_seconds": median, "tokens_per_second": tokens.numel() / median, "peak_bytes": memory[name]}
        for name, median in medians.items()
    }
    return found


def table(found: dict) -> Table:
    made = Table(title=f"steps of {found['tokens_per_step']} tokens, base in {found['dtype']}")
    for name in ("step", "tokens a second", "times eager", "memory, MB"):
        made.add_column(name, justify="left" if name == "step" else "right")
    eager = found["methods"][EAGER]
    for name, row in found["methods"].items():
        memory = "unknown" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
        ratio = eager["step_seconds"] / row["step_seconds"]
        made.add_row(name, f"{row['tokens_per_second']:.0f}", f"{ratio:.2f}", memory)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_steps", description=__doc__)
    parser.add_argument("model", help="a pretrained causal LM with a tokenizer: a name or a folder")
    parser.add_argument("--gguf-file", help="in that folder")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="of base and cache")
    parser.add_argument("--steps", type=int, default=11, help="of each method; the first is not counted")
    parser.add_argument("--rows", type=int, default=4, help="texts in a batch")
    parser.add_argument("--length", type=int, default=256, help="tokens in a text")
    parser.add_argument("--output", type=Path, help="a file of JSON lines that the result is added to")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error(f"--steps must be at least 2, got {arguments.steps}")
    found = compare(arguments)
    Console().print(table(found))
    if arguments.output is not None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with arguments.output.open("a") as file:
            file.write(json.dumps({**machine_info.describe(device), **found}) + "\n")


if __name__ == "__main__":
    main()
