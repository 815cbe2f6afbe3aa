"""The weights that vLLM reads of a folder and a base: that all are there, none is left over, and the base is the one.

vLLM itself takes a checkpoint that lacks some: it counts modules, not what is in them. All of this happens to the
stream of names and tensors, because behind it queries, keys and values are one tensor, and cut over processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..models import saving
from ..models.small import unread_weights
from .checks import override
from .config import AuxiliaryConfig

_SHOWN = 3


@dataclass
class Names:
    """The tensors in a checkpoint of a model of transformers.

    shapes    of each that must be there
    aliases   other names of the same tensor (tied), to the name in `shapes`
    ignored   what may be there and is not read: buffers, and an auxiliary's matrices that nothing reads
    prefix    that of the names' common module, which some checkpoints leave out
    """

    shapes: dict[str, list[int]]
    aliases: dict[str, str] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)
    prefix: str = ""

    @classmethod
    def of_model(cls, model: PreTrainedModel, unread: Iterable[str] = ()) -> Names:
        """Of a model, whose tensors may have no values."""
        first: dict[int, str] = {}
        aliases: dict[str, str] = {}
        ignored = set(unread)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name not in ignored and first.setdefault(id(parameter), name) != name:
                aliases[name] = first[id(parameter)]
        state = model.state_dict()
        ignored |= state.keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
        shapes = {
            name: list(tensor.shape) for name, tensor in state.items() if name not in ignored and name not in aliases
        }
        return cls(shapes, aliases, ignored, model.base_model_prefix + ".")

    def known(self, name: str) -> str | None:
        """The name in `shapes` of a name in a checkpoint, or that of what is ignored; None: unknown."""
        for one in (name, self.prefix + name):
            one = self.aliases.get(one, one)
            if one in self.shapes or one in self.ignored:
                return one
        return None

    def missing(self, seen: Iterable[str]) -> list[str]:
        return sorted(self.shapes.keys() - set(seen))


def names_of_aux(config: AuxiliaryConfig, aux: PreTrainedModel) -> Names:
    return Names.of_model(aux, unread_weights(aux, config.head, config.trunk_layer))


def is_quantised(config: PretrainedConfig) -> bool:
    return getattr(config, "quantization_config", None) is not None


class CheckedWeights:
    """A stream of "base.", "aux." and other weights, to be read once; `finish` says what was wrong with it.

    base, aux   what is expected of the two
    others      shapes of the weights that are neither's
    """

    def __init__(self, config: AuxiliaryConfig, base: Names, aux: Names, others: dict[str, list[int]]) -> None:
        self.config, self.base = config, base
        self._own = {"aux.": aux, "": Names(others)}
        self._seen: dict[str, set[str]] = {"base.": set(), "aux.": set(), "": set()}
        self._is_quantised = is_quantised(config.base_config)
        expected = config.base_fingerprint if config.check_base else None
        self._print = None if expected is None else saving.FingerprintOfFiles(expected)

    def stream(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The weights under the names by which vLLM knows them, each once."""
        for name, tensor in weights:
            if name.startswith("base."):
                prefix, key = "base.", self._of_base(name.removeprefix("base."), tensor)
            else:
                prefix = "aux." if name.startswith("aux.") else ""
                key = self._of_own(prefix, name.removeprefix(prefix), tensor)
            if key is not None and key not in self._seen[prefix]:
                self._seen[prefix].add(key)
                yield prefix + key, tensor

    def _of_base(self, name: str, tensor: Tensor) -> str | None:
        """None: not read, as transformers leaves out what it does not know."""
        key = self.base.known(name)
        if key in self.base.ignored or (key is None and not self._is_quantised):
            return None
        if key is None:
            key = name
        elif not self._is_quantised:
            _check_shape("base." + key, self.base.shapes[key], tensor)
        if self._print is not None and key not in self._seen["base."]:
            self._print.add(key, tensor)
        return key

    def _of_own(self, prefix: str, name: str, tensor: Tensor) -> str | None:
        names = self._own[prefix]
        key = names.known(name)
        if key is None:
            raise ValueError(
                f"the folder must hold the auxiliary's weights and no others, got {prefix}{name}: was it saved by "
                "another model, or are files of an older one left in it?"
            )
        if key in names.ignored:
            return None
        _check_shape(prefix + key, names.shapes[key], tensor)
        return key

    def finish(self) -> None:
        """ValueError for what has not come, and for another base."""
        for prefix, names in self._own.items():
            missing = names.missing(self._seen[prefix])
            if missing:
                raise ValueError(
                    f"the folder must hold all of the auxiliary's weights, it lacks {_some(prefix, missing)}: save it "
                    "anew"
                )
        self._finish_base()

    def _finish_base(self) -> None:
        seen = self._seen["base."]
        missing = self.base.missing(seen)
        if self._is_quantised:  # a quantised weight is others under its module's name
            modules = {name.rpartition(".")[0] for name in seen}
            missing = [name for name in missing if name.rpartition(".")[0] not in modules]
        where = "base/ of the folder" if self.config.base_is_saved else repr(self.config.base_name_or_path)
        if missing:
            raise ValueError(f"the base must have all its weights, {where} lacks {_some('', missing)}: save it anew")
        if self._print is not None and not self._print.is_expected():
            raise ValueError(
                f"the base must be the model that the auxiliary was saved with, and {where} has other weights or "
                "shapes: give that model's folder as base_name_or_path in --hf-overrides, or save the joined model "
                "with save_base=True; " + override("check_base", False, "another base that is meant")
            )


def _check_shape(name: str, shape: list[int], tensor: Tensor) -> None:
    if list(tensor.shape) != shape:
        raise ValueError(f"{name} must be {shape}, as the folder's configuration says, got {list(tensor.shape)}")


def _some(prefix: str, names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(prefix + name for name in names[:_SHOWN]) + more
