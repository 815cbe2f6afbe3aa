"""``python -m benchmarks.generation [MODEL]``: what a token costs beyond the two models that it is the sum of.

An auxiliary `aux="small"` beside a pretrained base continues docstrings, by greedy search, sampling and sampling with
top-k and top-p. "models" runs both models and their heads on the same tokens with caches of their own, and does nothing
else; "transformers" is its own loop with the sum's logits; "fused" chooses from the sources. The methods take turns,
and a time is the median over the rounds. With --assisted the base alone drafts for base + auxiliary, which is the
demo's (`make demo-pretrained`, trained here if it has not been). MODEL: a name or a folder; without: the one that
`make pretrained` fetches.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.utils import logging

from auxkernels.models import AuxiliaryForCausalLM
from benchmarks import pretrained
from benchmarks.demo.pretrained import SETTINGS, tune, windows_of
from benchmarks.small_auxiliaries import windows
from benchmarks.timing import report
from benchmarks.training import standard_library
from benchmarks.training.terminal import Terminal

CALLS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "temperature": {"do_sample": True, "temperature": 0.8, "top_k": 0},
    "top-k, top-p": {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.9},
}
MODELS, TRANSFORMERS, FUSED = "models", "transformers", "fused"


class _Nothing(LogitsProcessor):
    """Changes no score, and is none of those that are known to: `generate` then goes through the logits."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores


@torch.no_grad()
def run_models(base: PreTrainedModel, aux: PreTrainedModel, prompt: Tensor, tokens: Tensor) -> None:
    """Both models over the prompt, then over `tokens` [rows, new] one by one, with the last position's logits."""
    caches: list[Any] = [None, None]
    for read in (prompt, *tokens[:, :-1].split(1, dim=1)):
        for i, model in enumerate((base, aux)):
            output = model(read, past_key_values=caches[i], use_cache=True, logits_to_keep=1)
            caches[i] = output.past_key_values


def compare(arguments: argparse.Namespace, terminal: Terminal) -> list[dict]:
    """Seconds of each call, number of rows and method, and of the prompt alone."""
    base, tokenizer = pretrained.load(arguments.model, arguments.gguf_file, getattr(torch, arguments.dtype))
    corpus, found = standard_library.load_corpus(), []
    torch.manual_seed(0)
    through_logits = LogitsProcessorList([_Nothing()])
    model = AuxiliaryForCausalLM.from_base_and_aux(base, "small", aux_kwargs={"dtype": base.dtype}).eval()
    for rows in arguments.rows:
        prompt = windows(tokenizer, corpus.held_out_docstrings, arguments.length, rows, 0)
        for name, call in CALLS.items():
            options = {"max_new_tokens": arguments.new, "eos_token_id": None, **call}
            options["attention_mask"] = torch.ones_like(prompt)
            methods: dict[str, Callable[[], Any]] = {
                FUSED: lambda prompt=prompt, options=options: model.generate(prompt, **options),
                TRANSFORMERS: lambda prompt=prompt, options=options: model.generate(
                    prompt, logits_processor=through_logits, **options
                ),
            }
            tokens = methods[FUSED]()[:, prompt.shape[1] :]
            methods[MODELS] = lambda prompt=prompt, tokens=tokens: run_models(base, model.aux, prompt, tokens)
            with terminal.stage(f"{rows} rows, {name}", total=arguments.rounds * len(methods)) as advance:
                seconds = _medians(methods, arguments.rounds, advance)
            found.append({"rows": rows, "call": name, "new": arguments.new, "seconds": seconds})
    return found


def _medians(methods: dict[str, Callable[[], Any]], rounds: int, advance: Callable[[str], None]) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, run in methods.items():
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
            advance("")
    return {name: statistics.median(times) for name, times in seconds.items()}


def assisted(arguments: argparse.Namespace, terminal: Terminal) -> list[dict]:
    """The base alone as the draft of base + auxiliary: greedy tokens that were accepted, and what it gains."""
    base, tokenizer = pretrained.load_language_model(getattr(torch, arguments.dtype))
    settings = argparse.Namespace(cache=arguments.cache, seed=0)
    model, _, _ = tune(base, windows_of(tokenizer, SETTINGS), SETTINGS, settings, terminal)
    model.eval()
    corpus, found = standard_library.load_corpus(), []
    prompts = windows(tokenizer, corpus.held_out_docstrings, arguments.length, 4, 0).split(1)
    for dial in (0.0, 0.5, 1.0):
        options = {"max_new_tokens": arguments.new, "eos_token_id": None, "do_sample": False, "aux_scale": dial}
        options["attention_mask"] = torch.ones_like(prompts[0])
        calls = _Calls(model)
        with terminal.stage(f"dial {dial:g}", total=arguments.rounds * 2) as advance:
            methods = {
                "alone": lambda options=options: [model.generate(one, **options) for one in prompts],
                "assisted": lambda options=options: [
                    model.generate(one, assistant_model=base, **options) for one in prompts
                ],
            }
            want, got = methods["alone"](), calls.counted(methods["assisted"])
            same = statistics.fmean(float((a == b).float().mean()) for a, b in zip(want, got, strict=True))
            seconds = _medians(methods, arguments.rounds, advance)
        tokens = arguments.new * len(prompts)
        found.append({"dial": dial, "tokens_per_pass": tokens / calls.count, "same_tokens": same, "seconds": seconds})
    return found


class _Calls:
    """Counts how often a model is called."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.count = model, 0

    def counted(self, run: Callable[[], Any]) -> Any:
        def count(*_: Any) -> None:
            self.count += 1

        handle = self.model.register_forward_pre_hook(count)
        try:
            return run()
        finally:
            handle.remove()


def table(found: list[dict]) -> Table:
    made = Table(title="tokens a second, and the rest: a token's time that is not the two models'")
    for name in ("rows", "call", MODELS, TRANSFORMERS, FUSED, "rest, transformers", "rest, fused"):
        made.add_column(name, justify="left" if name == "call" else "right")
    for row in found:
        seconds, tokens = row["seconds"], row["rows"] * row["new"]
        rates = (f"{tokens / seconds[name]:.1f}" for name in (MODELS, TRANSFORMERS, FUSED))
        shares = (f"{100 * (1 - seconds[MODELS] / seconds[name]):.1f} %" for name in (TRANSFORMERS, FUSED))
        made.add_row(str(row["rows"]), row["call"], *rates, *shares)
    return made


def assisted_table(found: list[dict]) -> Table:
    made = Table(title="greedy, the base alone as the draft")
    for name in ("dial", "tokens of a pass", "same tokens", "time of that without draft"):
        made.add_column(name, justify="right")
    for row in found:
        ratio = row["seconds"]["assisted"] / row["seconds"]["alone"]
        made.add_row(
            f"{row['dial']:g}", f"{row['tokens_per_pass']:.2f}", f"{100 * row['same_tokens']:.0f} %", f"{ratio:.2f}"
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description=__doc__)
    parser.add_argument("model", nargs="?", help="a pretrained causal LM with a tokenizer: a name or a folder")
    parser.add_argument("--gguf-file", help="in that folder")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of both models")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="texts in a batch")
    parser.add_argument("--length", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--assisted", action="store_true", help="measure drafts by the base instead")
    parser.add_argument("--cache", type=Path, default=Path("build/demo"), help="folder of the demo's auxiliary")
    parser.add_argument("--output", type=Path, help="a file of JSON lines that the result is added to")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    terminal = Terminal()
    found = (assisted if arguments.assisted else compare)(arguments, terminal)
    terminal.console.print((assisted_table if arguments.assisted else table)(found))
    row = {"dtype": arguments.dtype, "generation": found}
    report.append_described(arguments.output, [row], torch.device("cpu"))


if __name__ == "__main__":
    main()
