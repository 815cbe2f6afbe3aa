"""``python -m benchmarks.training_steps [MODEL]``: whole training steps, the base run or read from a cache.

The auxiliary is `aux="small"` of the pretrained base, or several of them are trained by one pass. A step is forward,
backward and AdamW (fused, as Trainer's) on one batch of docstrings, whose tokens count once for each auxiliary; the
order of the methods turns by one each step, and a method's time is the median over all steps but the first. Memory is
the most that a step holds beyond what was there before it. Beside a bfloat16 base, the auxiliaries' float32 weights are
trained under autocast, as by Trainer's `bf16`. MODEL: a name or a folder; without: the one that `make pretrained`
fetches.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from auxkernels.models import (
    AuxiliaryForCausalLM,
    AuxiliaryGroupForCausalLM,
    BaseCache,
    DataCollatorForBaseCache,
)
from benchmarks import pretrained
from benchmarks.small_auxiliaries import windows
from benchmarks.timing import report
from benchmarks.timing.harness import peak_bytes
from benchmarks.training import standard_library

EAGER, ONLINE, CACHED, SHARED = "eager sum and loss", "base run", "base cached", "base cached, shared head"
GROUP_ONLINE, GROUP_CACHED = "base run, group", "base cached, group"
Model = AuxiliaryForCausalLM | AuxiliaryGroupForCausalLM


class Method(NamedTuple):
    """One step, and how many auxiliaries it trains."""

    step: Callable[[], None]
    num_auxiliaries: int = 1


def _summed_in_eager(base: PreTrainedModel, aux: PreTrainedModel, batch: Tensor) -> Tensor:
    """The loss by plain PyTorch, in the sum's float32."""
    with torch.no_grad():
        logits = base(batch, use_cache=False).logits.float()
    logits = logits + aux(batch, use_cache=False).logits.float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def _method(model: Model, loss_of: Callable[[Model], Tensor], autocast: bool) -> Method:
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(trained[0].device.type, torch.bfloat16, enabled=autocast):
            loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if trained[0].is_cuda:
            torch.cuda.synchronize()

    return Method(step, len(model._auxiliaries))


def methods_of(
    base: PreTrainedModel, tokens: Tensor, folder: str, num_auxiliaries: int, autocast: bool = False
) -> dict[str, Method]:
    """All methods, on the same tokens [rows, length]. num_auxiliaries: of a group; autocast: to bfloat16."""
    device, examples = tokens.device, [{"input_ids": row.tolist()} for row in tokens]
    dtype = str(base.dtype).removeprefix("torch.")
    options = {"batch_size": len(examples), "dtype": dtype, "autocast": "bfloat16" if autocast else None}
    options["trunk_layers"] = [0]  # a shared head's auxiliary reads it
    cache = BaseCache.create(folder, base, examples, lse=False, **options)
    head = cache.base_head().to(device)

    def small(of: PreTrainedModel, head: str = "own", seed: int = 0) -> AuxiliaryForCausalLM:
        torch.manual_seed(seed)
        return AuxiliaryForCausalLM.from_base_and_aux(of, "small", head=head)

    def group(of: PreTrainedModel) -> AuxiliaryGroupForCausalLM:
        return AuxiliaryGroupForCausalLM.from_members({str(i): small(of, seed=i) for i in range(num_auxiliaries)})

    def batch_of(model: Model) -> dict[str, Tensor]:
        """Read and put together in each step, as in training."""
        items = cache.dataset(model)
        batch = DataCollatorForBaseCache()([items[i] for i in range(len(items))])
        return {name: values.to(device) for name, values in batch.items()}

    made: dict[str, tuple[Model, Callable[[Model], Tensor]]] = {
        EAGER: (small(base), lambda model: _summed_in_eager(base, model.aux, tokens)),
        ONLINE: (small(base), lambda model: model(tokens, labels=tokens).loss),
        CACHED: (small(head), lambda model: model(**batch_of(model)).loss),
        SHARED: (small(head, "shared"), lambda model: model(**batch_of(model)).loss),
        GROUP_ONLINE: (group(base), lambda model: model(tokens, labels=tokens).loss),
        GROUP_CACHED: (group(head), lambda model: model(**batch_of(model)).loss),
    }
    return {name: _method(model, loss_of, autocast) for name, (model, loss_of) in made.items()}


def autocasts(arguments: argparse.Namespace) -> bool:
    return arguments.dtype == "bfloat16" if arguments.autocast is None else arguments.autocast


def compare(arguments: argparse.Namespace) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base, tokenizer = pretrained.load(arguments.model, arguments.gguf_file, getattr(torch, arguments.dtype))
    corpus = standard_library.load_corpus()
    tokens = windows(tokenizer, corpus.train_docstrings, arguments.length, arguments.rows, 0).to(device)
    with tempfile.TemporaryDirectory() as folder:
        options = arguments.auxiliaries, autocasts(arguments)
        methods = methods_of(base.to(device), tokens, f"{folder}/cache", *options)
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        names = list(methods)
        for i in range(arguments.steps):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                begun = time.perf_counter()
                methods[name].step()
                seconds[name].append(time.perf_counter() - begun)
        memory = {name: peak_bytes(method.step, device) for name, method in methods.items()}
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    found = {"base_parameters": base.num_parameters(), "dtype": arguments.dtype, "autocast": autocasts(arguments)}
    found["tokens_per_step"] = tokens.numel()
    found["methods"] = {
        name: {
            "auxiliaries": methods[name].num_auxiliaries,
            "step_seconds": median,
            "tokens_per_second": methods[name].num_auxiliaries * tokens.numel() / median,
            "peak_bytes": memory[name],
        }
        for name, median in medians.items()
    }
    return found


def table(found: dict) -> Table:
    under = ", autocast" if found["autocast"] else ""
    made = Table(title=f"steps of {found['tokens_per_step']} tokens, base in {found['dtype']}{under}")
    for name in ("step", "auxiliaries", "tokens a second", "times eager", "memory, MB"):
        made.add_column(name, justify="left" if name == "step" else "right")
    eager = found["methods"][EAGER]
    for name, row in found["methods"].items():
        memory = "unknown" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
        ratio = row["tokens_per_second"] / eager["tokens_per_second"]
        made.add_row(name, f"{row['auxiliaries']}", f"{row['tokens_per_second']:.0f}", f"{ratio:.2f}", memory)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_steps", description=__doc__)
    parser.add_argument("model", nargs="?", help="a pretrained causal LM with a tokenizer; none: SmolLM2-135M")
    parser.add_argument("--gguf-file", help="in that folder")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="of base and cache")
    autocast = {"action": argparse.BooleanOptionalAction, "help": "to bfloat16 (default: with a bfloat16 base)"}
    parser.add_argument("--autocast", **autocast)
    parser.add_argument("--steps", type=int, default=11, help="of each method; the first is not counted")
    parser.add_argument("--rows", type=int, default=4, help="texts in a batch")
    parser.add_argument("--length", type=int, default=256, help="tokens in a text")
    parser.add_argument("--auxiliaries", type=int, default=4, help="in a group")
    parser.add_argument("--output", type=Path, help="a file of JSON lines that the result is added to")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error(f"--steps must be at least 2, got {arguments.steps}")
    if arguments.auxiliaries < 1:
        parser.error(f"--auxiliaries must be at least 1, got {arguments.auxiliaries}")
    found = compare(arguments)
    Console().print(table(found))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report.append_described(arguments.output, [found], device)


if __name__ == "__main__":
    main()
