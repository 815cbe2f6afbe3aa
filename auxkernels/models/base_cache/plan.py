"""What a cache is going to hold, and writing it."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ... import checks
from ...cross_entropy import logit_stats
from .. import adapters, base_pointer, saving
from ..causal_lm import check_trunk, trunk_index
from ..heads import OutputHead, check_output_head, output_head, probe
from ..modules import device_of, features, is_called_whole, run
from ..trunkless import check_has_trunk
from .batches import DataCollatorForBaseCache
from .configurations import config_dict, without_marks
from .files import bytes_of, only_writer, unfinished_name, write_whole
from .fingerprints import digest_of, joined, row_of, tokenizer_fingerprint
from .layout import DTYPES, ordered, shard_fields, trunk_name
from .manifest import AUTOCAST, HEAD, NAME, Manifest, check_same, read_manifest
from .parts import check_part, is_written, write_part


class CachePlan:
    """A cache that is not yet written: arguments as for `BaseCache.create`. Reads all token ids, and runs nothing.

    num_examples, num_tokens, num_bytes   of the whole cache
    manifest                              what the folder will say
    """

    def __init__(
        self,
        base: PreTrainedModel | str,
        examples: Sequence[Mapping[str, Any]],
        *,
        tokenizer: Any = None,
        dtype: str | torch.dtype = "bfloat16",
        trunk_layers: Sequence[int] = (),
        lse: bool = True,
        batch_size: int = 8,
        padding_side: str = "right",
        pad_token_id: int | None = None,
        autocast: str | torch.dtype | None = None,
        shard_bytes: int = 2**29,
        base_revision: str | None = None,
        base_kwargs: dict[str, Any] | None = None,
    ) -> None:
        base = adapters.language_model("base", base)
        base_kwargs = dict(base_kwargs or {})
        if base_revision is not None and isinstance(base, str):
            base_kwargs["revision"] = base_revision
        given = base
        self.base = saving.causal_lm("base", base, base_kwargs)
        self.head = _plain_head(self.base)
        self.dtype = dtype_of(dtype)
        self.examples = examples
        self.batch_size = checks.integer("batch_size", batch_size)
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        num_layers = self.base.config.get_text_config().num_hidden_layers
        layers = sorted({trunk_index(layer, num_layers) for layer in trunk_layers})
        for layer in layers:
            check_trunk(self.base, layer, probe(self.base))
        if pad_token_id is None:
            pad_token_id = getattr(self.base.config.get_text_config(), "pad_token_id", None) or 0
        self.collator = DataCollatorForBaseCache(pad_token_id=pad_token_id, padding_side=padding_side)
        lengths, self._digests, is_packed = _read(examples, self.head.weight.shape[0])
        sizes = {
            "dtype": self.dtype,
            "hidden_size": self.head.weight.shape[1],
            "trunk_layers": layers,
            "trunk_size": self.base.config.get_text_config().hidden_size,
            "has_lse": checks.boolean("lse", lse),
            "is_packed": is_packed,
        }
        shards = _shards(lengths, self.batch_size, checks.integer("shard_bytes", shard_bytes), sizes)
        layer = self.base.get_output_embeddings()
        self.manifest = Manifest(
            **{**sizes, "dtype": _name_of(self.dtype)},
            base=_described(self.base, given, base_revision, base_kwargs),
            tokenizer=tokenizer if tokenizer is None else tokenizer_fingerprint(tokenizer),
            data=joined(self._digests),
            batch_size=self.batch_size,
            padding_side=padding_side,
            pad_token_id=checks.integer("pad_token_id", pad_token_id),
            autocast=_autocast(autocast),
            head_shape=list(layer.weight.shape),
            head_dtype=_name_of(layer.weight.dtype),
            head_has_bias=layer.bias is not None,
            shards=shards,
            software={"torch": torch.__version__, "transformers": transformers.__version__},
        )
        self.num_examples, self.num_tokens = self.manifest.num_examples, self.manifest.num_tokens
        self.num_bytes = self.manifest.num_bytes

    def __str__(self) -> str:
        each = (self.num_bytes - self._bytes_of_head) / self.num_tokens
        return (
            f"{self.num_examples:,} examples, {self.num_tokens:,} tokens of {each:,.0f} bytes and a head of "
            f"{self._bytes_of_head / 1e6:,.1f} MB: {self.num_bytes / 1e6:,.1f} MB in {len(self.manifest.shards)} shards"
        )

    @property
    def _bytes_of_head(self) -> int:
        return sum(field.num_bytes for field in self.manifest.fields(HEAD))

    # -- writing -------------------------------------------------------------------------------------------------------

    def write(self, path: str | os.PathLike[str], *, progress: bool = False) -> None:
        """Writes what the folder lacks: everything, or what a writing that was interrupted has left undone.

        Raises   ValueError: a folder that holds something else, or another cache, or a damaged shard; OSError: a disk
                 with too little space; BlockingIOError: another process writes there
        """
        folder = os.path.abspath(os.fspath(path))
        os.makedirs(folder, exist_ok=True)
        with only_writer(folder):
            self._begin(folder)
            missing = [part for part in self.manifest.parts if not is_written(folder, part)]
            for part in self.manifest.parts:
                if part not in missing:
                    check_part(folder, self.manifest, part)
            self._check_space(folder, missing)
            self._write_parts(folder, set(missing), progress)

    def _begin(self, folder: str) -> None:
        """Writes the manifest, or compares with the one that is there."""
        if os.path.exists(os.path.join(folder, NAME)):
            check_same(self.manifest, read_manifest(folder), folder)
            return
        others = sorted(set(os.listdir(folder)) - {unfinished_name(NAME)})
        if others:
            raise ValueError(f"path must be a new or empty folder, or that of a cache, {folder} holds {others[0]}")
        write_whole(os.path.join(folder, NAME), [self.manifest.to_bytes()])

    def _check_space(self, folder: str, missing: list[str]) -> None:
        fields = (field for part in missing for field in self.manifest.fields(part))
        needed, free = sum(field.num_bytes for field in fields), shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"{needed:,} bytes are needed, {free:,} are free", folder)

    def _write_parts(self, folder: str, missing: set[str], progress: bool) -> None:
        if HEAD in missing:
            layer = self.base.get_output_embeddings()
            tensors = {"weight": layer.weight, "bias": layer.bias}
            self._write(folder, HEAD, {name: one.detach().cpu() for name, one in tensors.items() if one is not None})
        bar = tqdm(total=self.num_tokens, unit="token", unit_scale=True, disable=not progress)
        with bar, _frozen(self.base):
            first = 0
            for part, (count, num_tokens) in zip(self.manifest.parts[1:], self.manifest.shards, strict=True):
                if part in missing:
                    self._write(folder, part, self._computed(part, range(first, first + count), bar))
                else:
                    bar.update(num_tokens)
                first += count

    def _write(self, folder: str, part: str, tensors: dict[str, Tensor]) -> None:
        data: Iterator[memoryview] = (bytes_of(tensors[field.name]) for field in ordered(self.manifest.fields(part)))
        write_part(folder, self.manifest, part, data)

    def _computed(self, part: str, indices: range, bar: Any) -> dict[str, Tensor]:
        """The tensors of a shard."""
        tensors = {field.name: torch.zeros(field.shape, dtype=field.dtype) for field in self.manifest.fields(part)}
        begin = 0
        for start in range(indices.start, indices.stop, self.batch_size):
            chosen = range(start, min(start + self.batch_size, indices.stop))
            rows = [self._row(i) for i in chosen]
            for name, values in self._run(rows).items():
                tensors[name][begin : begin + len(values)] = values
            for i, (ids, _) in zip(chosen, rows, strict=True):
                begin += len(ids)
                tensors["offsets"][i - indices.start + 1] = begin
                bar.update(len(ids))
        return tensors

    def _row(self, i: int) -> tuple[Tensor, Tensor | None]:
        ids, positions = row_of(self.examples[i], f"examples[{i}]")
        if digest_of(ids, positions) != self._digests[i]:
            raise ValueError(f"examples[{i}] must be the same whenever it is read, got other tokens")
        return ids, positions

    @torch.no_grad()
    def _run(self, rows: list[tuple[Tensor, Tensor | None]]) -> dict[str, Tensor]:
        """What a shard holds of a batch's tokens, [tokens, ...]."""
        given = ({"input_ids": ids} | ({} if one is None else {"position_ids": one}) for ids, one in rows)
        batch = self.collator(list(given))
        is_token = batch_mask([len(ids) for ids, _ in rows], self.collator.padding_side)
        device, manifest = device_of(self.base), self.manifest
        inputs = {
            name: batch[name].to(device) if name in batch else None
            for name in ("input_ids", "attention_mask", "position_ids")
        }
        # as `AuxiliaryForCausalLM` calls its base, so that the same kernels run
        wants_states = bool(manifest.trunk_layers)
        with self._autocast(device):
            output = run(self.base, **inputs, cache=None, use_cache=False, output_hidden_states=wants_states)
        shape, got = [*is_token.shape, manifest.hidden_size], list(features(output).shape)
        if got != shape:
            raise ValueError(f"base must give hidden states {shape}, one for each token, got {got}")
        hidden = self._stored(features(output), is_token)
        found = {"input_ids": batch["input_ids"][is_token].int(), "hidden": hidden.cpu()}
        if manifest.is_packed:
            found["position_ids"] = batch["position_ids"][is_token].int()
        if manifest.has_lse:
            with self._autocast(self.head.weight.device):
                stats = logit_stats(self.head.sources(hidden.to(self.head.weight.dtype)), None)
            found["lse"] = stats.lse.float().cpu()
        for layer in manifest.trunk_layers:
            found[trunk_name(layer)] = self._stored(output.hidden_states[layer], is_token).cpu()
        return found

    def _autocast(self, device: torch.device) -> torch.autocast:
        """That of the manifest, whatever the caller's is."""
        name = self.manifest.autocast
        dtype = None if name is None else DTYPES[name]
        return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)

    def _stored(self, states: Tensor, is_token: Tensor) -> Tensor:
        """What a shard holds of hidden states [batch, seq, D]: [tokens, D], where they were made."""
        states = states[is_token.to(states.device)]
        stored = states.to(self.dtype)
        if bool(states.isfinite().all()) and not bool(stored.isfinite().all()):
            raise ValueError(f"dtype must be able to hold the base's hidden states, {self.dtype} overflows")
        return stored


@contextlib.contextmanager
def _frozen(base: PreTrainedModel) -> Iterator[None]:
    """A base as it is in training: weights that require gradients let torch take other roads, with other roundings."""
    was_training = base.training
    trained = [weight for weight in base.parameters() if weight.requires_grad]
    base.eval().requires_grad_(False)
    try:
        yield
    finally:
        base.train(was_training)
        for weight in trained:
            weight.requires_grad_(True)


def batch_mask(lengths: list[int], side: str) -> Tensor:
    """bool [batch, seq]: what is no padding."""
    places = torch.arange(max(lengths))
    if side == "left":
        places = places.flip(0)
    return places < torch.tensor(lengths)[:, None]


# -- what is planned ---------------------------------------------------------------------------------------------------


def dtype_of(given: str | torch.dtype) -> torch.dtype:
    """Raises ValueError for other dtypes than those that a cache can have."""
    name = str(given).removeprefix("torch.")
    if name not in DTYPES:
        hint = ""
        if name.startswith(("float8", "int8", "uint8")):
            hint = ": 8 bits are not offered, because what they do to the base's probabilities has not been measured"
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name}{hint}")
    return DTYPES[name]


def _autocast(given: str | torch.dtype | None) -> str | None:
    name = None if given is None else str(given).removeprefix("torch.")
    if name not in (None, *AUTOCAST):
        raise ValueError(f"autocast must be None or one of {', '.join(AUTOCAST)}, got {name}")
    return name


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain_head(base: PreTrainedModel) -> OutputHead:
    """Raises ValueError for a base of which hidden states and a weight do not say the logits."""
    check_has_trunk(base, "writing a cache")
    if adapters.has_adapters(base):
        raise ValueError("base must have no adapters: merge_and_unload, save and load it")
    head = None if is_called_whole(base) else output_head(base)
    if not isinstance(head, OutputHead):
        raise ValueError(
            "base must be a transformers model without hooks whose head is one linear layer with its weights in "
            f"memory, got {type(base).__name__}: only its logits are known"
        )
    check_output_head(base)
    return head


def _described(
    base: PreTrainedModel, given: PreTrainedModel | str, revision: str | None, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """What the manifest says of the base, as JSON holds it."""
    config = copy.deepcopy(base.config)
    config.dtype = base.dtype
    described = {
        "name_or_path": saving.pointer(given if isinstance(given, str) else base.config.name_or_path),
        "revision": kwargs.get("revision", revision),
        "options": base_pointer.weight_options(base, kwargs),
        "fingerprint": saving.fingerprint(base),
        "config": config_dict(config),
        "generation_config": without_marks(json.loads(base.generation_config.to_json_string(use_diff=False))),
    }
    return json.loads(json.dumps(described))


def _read(examples: Sequence[Mapping[str, Any]], num_rows: int) -> tuple[list[int], list[bytes], bool]:
    """(lengths, digests, whether they are packed) of all examples."""
    if not len(examples):
        raise ValueError("examples must hold at least one, got none")
    lengths, digests, kinds = [], [], set()
    for i in range(len(examples)):
        ids, positions = row_of(examples[i], f"examples[{i}]")
        if int(ids.min()) < 0 or int(ids.max()) >= num_rows:
            raise ValueError(
                f"input_ids of examples[{i}] must be in [0, {num_rows}), the base's tokens, got {int(ids.min())} to "
                f"{int(ids.max())}: were they made by another tokenizer?"
            )
        lengths.append(len(ids))
        digests.append(digest_of(ids, positions))
        kinds.add(positions is not None)
        if len(kinds) > 1:
            raise ValueError(f"position_ids must be given for every example or for none, examples[{i}] differs")
    return lengths, digests, kinds.pop()


def _shards(lengths: list[int], batch_size: int, most_bytes: int, sizes: dict[str, Any]) -> list[list[int]]:
    """[examples, tokens] of each: whole batches, until they have most_bytes."""
    each = sum(field.num_bytes for field in shard_fields(1, 1, **sizes))
    shards, examples, tokens = [], 0, 0
    for start in range(0, len(lengths), batch_size):
        batch = lengths[start : start + batch_size]
        examples, tokens = examples + len(batch), tokens + sum(batch)
        if tokens * each >= most_bytes:
            shards.append([examples, tokens])
            examples = tokens = 0
    return shards + ([[examples, tokens]] if examples else [])
