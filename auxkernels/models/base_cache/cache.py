"""A cache that has been written: its examples, and its base's output head."""

from __future__ import annotations

import copy
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from .. import adapters, saving
from ..configuration import as_config
from ..modalities import class_of
from ..trunkless import Whole, headed
from .configurations import comparable, config_dict, without_code
from .fingerprints import data_fingerprint, tokenizer_fingerprint
from .layout import trunk_name
from .manifest import HEAD, Manifest, read_manifest
from .parts import Part, Shard, check_part, verify_part
from .plan import CachePlan, dtype_of

if TYPE_CHECKING:
    from .dataset import BaseCacheDataset

_MOST_OPEN = 256  # shards at a time in one process


class BaseCache:
    """A frozen base's last hidden states on a set of tokens, memory-mapped: `BaseCache.create`, `BaseCache.open`.

    len(cache)   how many examples; cache[i] is a dict of copies
        input_ids             [n] int64
        position_ids          [n] int64, where the example holds several texts
        base_hidden_states    [n, D] of the cache's dtype: what enters the base's head, behind its final norm
        base_lse              [n] float32, nats: log-sum-exp of the base's logits of those, over the head's whole width
        base_trunk_states.k   [n, D'], the base's hidden states k, for each of trunk_layers
    manifest     what the cache holds and of what: `manifest.Manifest`
    An object can be pickled, and reopens its files in the process that it comes to.
    """

    def __init__(self, path: str, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._ends = list(accumulate(examples for examples, _ in manifest.shards))
        self._opened: OrderedDict[int, Shard] = OrderedDict()
        self._process = os.getpid()

    # -- making ones ---------------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
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
        progress: bool = False,
    ) -> BaseCache:
        """Writes a cache, or the rest of one whose writing was interrupted, and opens it.

        path          a new or empty folder, or that of the interrupted one, which must have been begun with the same
                      arguments
        base          a causal LM without adapters whose head is one linear layer in memory, or its name or path
        examples      map-style; each has `input_ids` [n] without padding and, where it holds several texts,
                      `position_ids` [n] that begin anew in each. Other columns are not held: give them to `dataset`
        tokenizer     that made the ids; its fingerprint is held
        dtype         of the hidden states: bfloat16, float16, float32 or float64. With the dtype in which the base
                      computes they are the very ones
        trunk_layers  which of the base's hidden states (0: the embeddings; negative: from the last) are held too, for
                      auxiliaries with such a trunk_layer
        lse           whether the log-sum-exp of the base's logits is held
        batch_size, padding_side, pad_token_id   of the batches, of successive examples, in which the base runs
        autocast      bfloat16 or float16, for training under it (Trainer's bf16, fp16): the base computes in it here as
                      it would there
        shard_bytes   at which a shard ends, 512 MiB; one at a time is in memory
        base_revision, base_kwargs   for from_pretrained of a base given by name
        progress      whether a bar is shown
        Raises        TypeError, ValueError: arguments; a folder with something else, or with a cache that differs in a
                      field, which is named; OSError: too little space
        """
        plan = CachePlan(
            base,
            examples,
            tokenizer=tokenizer,
            dtype=dtype,
            trunk_layers=trunk_layers,
            lse=lse,
            batch_size=batch_size,
            padding_side=padding_side,
            pad_token_id=pad_token_id,
            autocast=autocast,
            shard_bytes=shard_bytes,
            base_revision=base_revision,
            base_kwargs=base_kwargs,
        )
        plan.write(path, progress=progress)
        return cls.open(path)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        base: PreTrainedModel | dict[str, Any] | None = None,
        tokenizer: Any = None,
        data: Sequence[Mapping[str, Any]] | str | None = None,
        dtype: str | torch.dtype | None = None,
        trunk_layers: Sequence[int] | None = None,
        is_packed: bool | None = None,
        verify: bool = False,
    ) -> BaseCache:
        """Opens a whole cache, after the sizes and headers of all its files have been found right.

        What is given is expected of it:
        base          a model, or the fingerprint of one (`AuxiliaryConfig.base_fingerprint`)
        tokenizer     one of transformers', or its `tokenizer_fingerprint`
        data          the examples, or their `data_fingerprint`
        dtype, is_packed   as in the manifest; trunk_layers: those that it must hold at least
        verify        whether all files are read and compared with their checksums
        Raises        FileNotFoundError: no cache, or a shard that is missing; ValueError: a field that is another one
                      than is expected, which is named; a file that is truncated, exchanged or edited
        """
        folder = os.path.abspath(os.fspath(path))
        cache = cls(folder, read_manifest(folder))
        cache._check_expected(base, tokenizer, data, dtype, trunk_layers, is_packed)
        for part in cache.manifest.parts:
            check_part(folder, cache.manifest, part)
        if verify:
            cache.verify()
        return cache

    def _check_expected(
        self,
        base: PreTrainedModel | dict[str, Any] | None,
        tokenizer: Any,
        data: Sequence[Mapping[str, Any]] | str | None,
        dtype: str | torch.dtype | None,
        trunk_layers: Sequence[int] | None,
        is_packed: bool | None,
    ) -> None:
        manifest = self.manifest
        if base is not None:
            self.check_base(base)
        if tokenizer is not None:
            want = tokenizer if isinstance(tokenizer, str) else tokenizer_fingerprint(tokenizer)
            self._check_field("tokenizer", want, manifest.tokenizer)
        if data is not None:
            self._check_field("data", data if isinstance(data, str) else data_fingerprint(data), manifest.data)
        if dtype is not None:
            self._check_field("dtype", str(dtype_of(dtype)).removeprefix("torch."), manifest.dtype)
        if is_packed is not None:
            self._check_field("is_packed", is_packed, manifest.is_packed)
        if trunk_layers is not None and not set(trunk_layers) <= set(manifest.trunk_layers):
            self._check_field("trunk_layers", sorted(trunk_layers), manifest.trunk_layers)

    def _check_field(self, name: str, wanted: object, got: object) -> None:
        if wanted != got:
            raise ValueError(f"{name} of the cache {self.path} must be {wanted!r}, got {got!r}")

    def check_base(self, base: PreTrainedModel | dict[str, Any]) -> None:
        """ValueError where the cache is of another base than a model, or than that of a fingerprint."""
        model = None if isinstance(base, dict) else adapters.language_model("base", base)
        found = base if model is None else saving.fingerprint(model)
        if not saving.is_same_base(self.manifest.base["fingerprint"], found):
            raise ValueError(
                f"base of the cache {self.path} must be the model that is meant, got another one, of "
                f"{self.manifest.base['name_or_path']!r}: their weights' fingerprints differ"
            )
        if model is not None:
            self.check_config(model.config)

    def check_config(self, config: PretrainedConfig) -> None:
        """ValueError where the cache is of a base with another configuration: the same weights give other states."""
        held, found = comparable(self.manifest.base["config"]), comparable(config_dict(config))
        names = sorted(name for name in held.keys() | found.keys() if held.get(name) != found.get(name))
        if names:
            raise ValueError(
                f"base of the cache {self.path} must have the configuration of the model that is meant, they differ in "
                f"{', '.join(names)}"
            )

    def verify(self, *, progress: bool = False) -> None:
        """Reads all files and compares them with the checksums that they were written with.

        Raises   ValueError naming the file
        """
        for part in tqdm(self.manifest.parts, unit="file", disable=not progress):
            verify_part(self.path, self.manifest, part)

    # -- examples ------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def num_tokens(self) -> int:
        return self.manifest.num_tokens

    @property
    def num_bytes(self) -> int:
        """Of all files but the manifest and the checksums."""
        return self.manifest.num_bytes

    @property
    def trunk_layers(self) -> list[int]:
        return list(self.manifest.trunk_layers)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        shard, begin, end = self._place(index)
        item = {"input_ids": shard.rows("input_ids", begin, end).long()}
        if self.manifest.is_packed:
            item["position_ids"] = shard.rows("position_ids", begin, end).long()
        item["base_hidden_states"] = shard.rows("hidden", begin, end)
        if self.manifest.has_lse:
            item["base_lse"] = shard.rows("lse", begin, end)
        for layer in self.manifest.trunk_layers:
            item[f"base_trunk_states.{layer}"] = shard.rows(trunk_name(layer), begin, end)
        return item

    def input_ids(self, index: int) -> Tensor:
        """[n] int64 of an example, without its hidden states."""
        shard, begin, end = self._place(index)
        return shard.rows("input_ids", begin, end).long()

    def _place(self, index: int) -> tuple[Shard, int, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be in [{-len(self)}, {len(self)}), got {index}")
        index %= len(self)
        number = bisect_right(self._ends, index)
        shard = self._shard(number)
        first = self._ends[number] - self.manifest.shards[number][0]
        return shard, *shard.offsets[index - first : index - first + 2]

    def _shard(self, number: int) -> Shard:
        if self._process != os.getpid():  # a worker that was forked
            self._opened, self._process = OrderedDict(), os.getpid()
        if number not in self._opened:
            self._opened[number] = Shard(self.path, self.manifest, self.manifest.parts[number + 1])
            if len(self._opened) > _MOST_OPEN:
                self._opened.popitem(last=False)
        self._opened.move_to_end(number)
        return self._opened[number]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        BaseCache.__init__(self, state["path"], state["manifest"])

    def dataset(
        self,
        model: PreTrainedModel | None = None,
        *,
        examples: Sequence[Mapping[str, Any]] | None = None,
        trunk_layer: int | None = None,
    ) -> BaseCacheDataset:
        """The examples as a data set for `DataLoader` and `Trainer`.

        model        the `AuxiliaryForCausalLM`, or group of them, that is trained: its base must be the cache's, and
                     the trunk layers that it reads are those that are given
        examples     of the same tokens, one for one, whose further columns (labels, aux_input_ids, ...) are added
        trunk_layer  where there is no model: which of the trunk layers is given, None: none
        Raises       ValueError: another base, a trunk layer that the cache does not hold, another number of examples
        """
        from .dataset import BaseCacheDataset

        return BaseCacheDataset(self, model, examples=examples, trunk_layer=trunk_layer)

    # -- the base ------------------------------------------------------------------------------------------------------

    def base_head(
        self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        """The base with its output head alone in memory, as the base of `from_base_and_aux` or `from_pretrained`.

        It comes from the cache, so that the base itself need not be at hand. What is saved points to the whole base.
        device, dtype   of the head; None: the CPU, and that of the base when the cache was written
        Raises          ValueError: a class that is not of transformers nor registered there; a head that was changed
        """
        described = self.manifest.base
        verify_part(self.path, self.manifest, HEAD)
        part = Part(self.path, self.manifest, HEAD)
        weight = part.whole("weight").clone().to(device=device, dtype=dtype)
        bias = part.whole("bias").clone().to(device=device, dtype=dtype) if self.manifest.head_has_bias else None
        whole = Whole(
            described["name_or_path"],
            described["revision"],
            copy.deepcopy(described["options"]),
            copy.deepcopy(described["fingerprint"]),
            tuple(self.manifest.trunk_layers),
        )
        model = headed(self._config(), weight, bias, whole)
        model.generation_config = GenerationConfig.from_dict(copy.deepcopy(described["generation_config"]))
        return model

    def _config(self) -> PretrainedConfig:
        config = as_config("base", without_code(self.manifest.base["config"]))
        if config is None or class_of(config) is None:
            raise ValueError(
                f"base of the cache {self.path} must be of a class of transformers, or registered there, to be built "
                "without its trunk: give the whole base"
            )
        config.name_or_path = self.manifest.base["name_or_path"] or ""
        return config
