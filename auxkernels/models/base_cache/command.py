"""The command that writes a cache of any model and text files, or a data set."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoTokenizer

from .layout import DTYPES
from .manifest import AUTOCAST
from .plan import CachePlan
from .texts import rows_of_texts


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m auxkernels.models.base_cache",
        description="Writes what a frozen base gives on a set of texts, for training auxiliaries without running it. "
        "An interrupted run is resumed by the same command.",
    )
    made.add_argument("path", help="folder to write to: new, empty, or of an interrupted run")
    made.add_argument("--base", required=True, help="name or path of a causal language model")
    made.add_argument("--revision", help="of the base")
    made.add_argument("--tokenizer", help="name or path; the base's, where it is not given")
    source = made.add_mutually_exclusive_group(required=True)
    source.add_argument("--texts", nargs="+", metavar="FILE", help="UTF-8 files, each of them one text")
    source.add_argument("--dataset", help="folder of datasets' save_to_disk, or a name for load_dataset")
    made.add_argument("--lines", action="store_true", help="every line of the files that is not empty is one text")
    made.add_argument("--config", help="of the data set")
    made.add_argument("--split", default="train", help="of the data set (train)")
    made.add_argument("--column", default="text", help="with its texts (text); input_ids: its tokens, as they are")
    made.add_argument("--max-length", type=int, default=1024, help="of a row, tokens (1024)")
    made.add_argument("--packed", action="store_true", help="texts one after the other in full rows")
    made.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="in which hidden states are held (bfloat16)")
    made.add_argument("--base-dtype", default="auto", help="in which the base computes (as it was saved)")
    made.add_argument("--autocast", choices=AUTOCAST, help="for training under it (Trainer's bf16, fp16)")
    made.add_argument("--device", help="where the base runs, as device_map of from_pretrained")
    made.add_argument("--trunk-layers", type=int, nargs="*", default=(), metavar="K", help="hidden states held too")
    made.add_argument("--no-lse", action="store_true", help="without the log-sum-exp of the base's logits")
    made.add_argument("--batch-size", type=int, default=8, help="in which the base runs (8)")
    made.add_argument("--padding-side", default="right", choices=("right", "left"), help="of those batches (right)")
    made.add_argument("--shard-mib", type=int, default=512, help="size of a shard, MiB (512)")
    made.add_argument("--dry-run", action="store_true", help="says the size and writes nothing")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    where = {} if given.revision is None or given.tokenizer is not None else {"revision": given.revision}
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer or given.base, **where)
    base_kwargs = {"dtype": given.base_dtype} | ({} if given.device is None else {"device_map": given.device})
    plan = CachePlan(
        given.base,
        _examples(given, tokenizer),
        tokenizer=tokenizer,
        dtype=given.dtype,
        trunk_layers=given.trunk_layers,
        lse=not given.no_lse,
        batch_size=given.batch_size,
        padding_side=given.padding_side,
        autocast=given.autocast,
        shard_bytes=given.shard_mib * 2**20,
        base_revision=given.revision,
        base_kwargs=base_kwargs,
    )
    print(f"{os.path.abspath(given.path)}: {plan}", flush=True)
    if not given.dry_run:
        plan.write(given.path, progress=True)
    return 0


def _examples(given: argparse.Namespace, tokenizer: Any) -> Sequence[Mapping[str, Any]]:
    if given.texts is not None:
        texts = []
        for path in given.texts:
            with open(path, encoding="utf-8") as file:
                text = file.read()
            texts += [line for line in text.splitlines() if line.strip()] if given.lines else [text]
        return rows_of_texts(texts, tokenizer, given.max_length, is_packed=given.packed)
    data = _loaded(given)
    if given.column == "input_ids":
        return data
    return rows_of_texts((row[given.column] for row in data), tokenizer, given.max_length, is_packed=given.packed)


def _loaded(given: argparse.Namespace) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("--dataset needs datasets: pip install datasets") from error
    if not os.path.isdir(given.dataset):
        return datasets.load_dataset(given.dataset, given.config, split=given.split)
    found = datasets.load_from_disk(given.dataset)
    return found[given.split] if isinstance(found, datasets.DatasetDict) else found
