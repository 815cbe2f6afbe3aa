"""What the two models of `AuxiliaryForCausalLM` read: the text, and the auxiliary's prefix in front of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from . import modalities
from .causal_lm import are_packed, position_offset
from .modules import backbone
from .paired_cache import PairedCache

IGNORE_INDEX = -100


@dataclass
class Text:
    """What both models read."""

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    cache: PairedCache | None
    past: int  # tokens in the cache before these
    offset: int = 0  # the reader's first position

    def behind(self, prefix_mask: Tensor | None, prefix: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Mask and positions of the auxiliary's tokens, which stand behind a prefix and hold it if `prefix` is new."""
        if prefix_mask is None:
            return self.attention_mask, self.position_ids
        (batch, new), device = self.input_ids.shape, self.input_ids.device
        mask = _text_mask(self.attention_mask, batch, self.past + new, device)
        positions = self.position_ids
        if positions is not None and positions.dim() == 3 and len(positions) == 4:
            positions = positions[0]  # of the text; the others are of images, of which there are none behind a prefix
        if positions is None:
            positions = positions_of(mask)[:, self.past :] + self.offset
        elif positions.dim() != 2:
            raise ValueError(f"position_ids must be [batch, new] behind a prefix, got {list(positions.shape)}")
        elif self.past == 0 and are_packed(self.attention_mask, positions):
            raise ValueError("position_ids of packed texts cannot stand behind a prefix: give each text its own row")
        positions = positions + (prefix_mask != 0).sum(dim=-1, keepdim=True)
        if prefix is not None:
            positions = torch.cat([positions_of(prefix_mask) + self.offset, positions], dim=1)
        return torch.cat([prefix_mask.to(mask.dtype), mask], dim=1), positions


@dataclass
class AuxText:
    """What the auxiliary reads: a new prefix (None: no prefix, or it is in the cache) and the text behind it."""

    prefix: Tensor | None
    prefix_mask: Tensor | None  # of the prefix in force, new or not
    attention_mask: Tensor | None
    position_ids: Tensor | None
    order: Tensor | None = None  # [batch, prefix + new]: the token that is read at each place; None: as they stand
    arranged_mask: Tensor | None = None  # of the first tokens in the order in which they were read; None: as they stand

    def arranged(self, tokens: Tensor) -> Tensor:
        """Prefix and text [batch, prefix + new, *] in the order in which they are read."""
        return tokens if self.order is None else _gathered(tokens, self.order)

    def with_token_types(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Further inputs of the auxiliary; the types of the text's tokens get those of the prefix in front, zeros."""
        if self.prefix is None:
            return inputs
        given = {name: inputs[name] for name in modalities.TOKEN_TYPES if inputs.get(name) is not None}
        length = self.prefix.shape[1]
        return inputs | {name: self.arranged(nn.functional.pad(one, (length, 0))) for name, one in given.items()}

    def of_text(self, hidden: Tensor) -> Tensor:
        """What was read, [batch, prefix + new, D], to what stands for the text's tokens, [batch, new, D]."""
        start = 0 if self.prefix is None else self.prefix.shape[1]
        return hidden[:, start:] if self.order is None else _gathered(hidden, self.order.argsort(dim=1)[:, start:])


@dataclass(frozen=True)
class Readers:
    """What each of the two models can read beside the tokens.

    base, aux        the arguments that it names
    is_multimodal    whether the base, and whether the auxiliary, reads images, video or sound itself; behind a trunk
                     layer the auxiliary does not, whose inputs have come by them already
    has_own_positions   whether the auxiliary counts positions of images in three dimensions
    problem          why the one that reads text alone cannot read the text around images
    offsets          first positions (`position_offset`) of base and auxiliary
    """

    base: frozenset[str]
    aux: frozenset[str]
    is_multimodal: tuple[bool, bool]
    has_own_positions: bool
    problem: str | None
    has_trunk: bool
    offsets: tuple[int, int]

    @classmethod
    def of_models(cls, base: nn.Module, aux: nn.Module, has_trunk: bool) -> Readers:
        is_multimodal = tuple(map(modalities.reads_more_than_text, (base, aux)))
        problem = None
        if not has_trunk and is_multimodal[0] != is_multimodal[1]:
            leader, other = (base, aux) if is_multimodal[0] else (aux, base)
            problem = modalities.placeholder_problem(leader.config, other)
        return cls(
            modalities.input_names(base),
            modalities.input_names(aux),
            (is_multimodal[0], is_multimodal[1] and not has_trunk),
            hasattr(backbone(aux), "get_rope_index"),
            problem,
            has_trunk,
            (position_offset(base), position_offset(aux)),
        )

    def leaders(self) -> tuple[str | None, int, bool]:
        """What `GenerationOfComposites` asks: who leads, how many could, and whether positions differ."""
        names = [name for name, leads in zip(("base", "aux"), self.is_multimodal, strict=True) if leads]
        return next(iter(names), None), len(names), len(names) == 1 or any(self.offsets)

    def split(
        self, text: Text, inputs: dict[str, Any], has_prefix: bool
    ) -> tuple[Text, dict[str, Any], Text, dict[str, Any]]:
        """(text, further inputs) of the base and of the auxiliary. inputs lose what neither of them gets.

        One that reads text alone gets no images, and positions of its own where those are of images too.
        """
        text_positions, positions = inputs.pop("text_position_ids", None), text.position_ids
        of_base, of_aux = (
            modalities.shared(inputs, *names) for names in ((self.base, self.aux), (self.aux, self.base))
        )
        if self.has_trunk:
            of_aux = modalities.only_text(of_aux)
        if modalities.has_more_than_text(inputs):
            if self.problem is not None:
                raise ValueError(self.problem)
            if has_prefix and self.is_multimodal[1] and self.has_own_positions:
                raise ValueError(
                    "aux_input_ids must be None with images whose positions the auxiliary counts in three dimensions: "
                    "put the prefix into the text"
                )
        plain = positions
        if text_positions is not None:
            plain = text_positions
        elif positions is not None and positions.dim() == 3:
            plain = None if text.attention_mask is None else positions_of(text.attention_mask)[:, text.past :]
        are_shared, texts = not (any(self.is_multimodal) or any(self.offsets)), []
        for is_leader, offset in zip(self.is_multimodal, self.offsets, strict=True):
            given = positions if is_leader or are_shared else plain
            if text_positions is not None and given is not None and not is_leader:
                given = given + offset
            texts.append(replace(text, position_ids=given, offset=offset))
        return texts[0], of_base, texts[1], of_aux


def aux_text(
    text: Text,
    input_ids: Tensor | None,
    mask: Tensor | None,
    pad_token_id: int | None,
    prefix_keeps_state: bool = False,
    aux_keeps_state: bool = False,
) -> AuxText:
    """Checks everything and changes nothing, so that what raises here leaves the cache as it was.

    prefix_keeps_state, aux_keeps_state   whether a model that reads the prefix, and whether the auxiliary, carries a
                                          state along the tokens, which padding behind the first of them would change
    """
    if text.cache is not None:
        text.cache.check_in_step()
    prefix, mask = prefix_to_read(text, input_ids, mask, pad_token_id)
    if text.cache is not None:
        text.cache.check_room(text.input_ids.shape[1], 0 if mask is None else mask.shape[1])
    if prefix is not None and mask is not None and prefix_keeps_state:
        order = _padding_first(mask)
        prefix, mask = prefix.gather(1, order), mask.gather(1, order)
    behind = AuxText(prefix, mask, *text.behind(mask, prefix))
    return behind if mask is None or not aux_keeps_state else _without_gaps(text, behind)


def _without_gaps(text: Text, behind: AuxText) -> AuxText:
    """The text's left padding is read before the prefix; ValueError for padding that can no longer be moved there."""
    attention_mask, positions = behind.attention_mask, behind.position_ids
    assert behind.prefix_mask is not None and attention_mask is not None and positions is not None, "see Text.behind"
    length = behind.prefix_mask.shape[1]
    if behind.prefix is not None:
        if text.attention_mask is None:
            return behind
        is_text = _text_mask(text.attention_mask, len(behind.prefix), text.past + text.input_ids.shape[1], None) != 0
        order = _padding_first(torch.cat([behind.prefix_mask != 0, is_text.cumsum(dim=1) > 0], dim=1))
        mask = attention_mask.gather(1, order)
        positions = positions.expand(len(order), -1).gather(1, order)
        return replace(behind, attention_mask=mask, position_ids=positions, order=order, arranged_mask=mask)
    assert text.cache is not None, "that is where the prefix is"
    arranged = text.cache.arranged_mask
    first = (attention_mask if arranged is None else arranged)[:, : length + text.past]
    later = attention_mask[:, first.shape[1] :]
    if not torch.compiler.is_compiling() and (later[:, 1:] > later[:, :-1]).any():
        raise ValueError(
            "attention_mask must have its left padding in the call that reads the prefix, where the auxiliary keeps a "
            "recurrent or convolutional state: give the whole prompt at once"
        )
    return replace(behind, attention_mask=torch.cat([first, later], dim=1), arranged_mask=arranged)


def _padding_first(is_token: Tensor) -> Tensor:
    """The order [batch, n] in which padding stands first, and what counts as it stood."""
    return (is_token != 0).long().argsort(dim=1, stable=True)


def _gathered(rows: Tensor, order: Tensor) -> Tensor:
    """[batch, n, *] to [batch, m, *] by indices [batch, m]."""
    return rows.gather(1, order.view(*order.shape, *[1] * (rows.dim() - 2)).expand(-1, -1, *rows.shape[2:]))


def positions_of(mask: Tensor) -> Tensor:
    """Positions of the tokens that count, [batch, n]: 0, 1, ... without gaps."""
    return ((mask != 0).cumsum(dim=-1) - 1).clamp(min=0)


def prefix_to_read(
    text: Text, input_ids: Tensor | None, mask: Tensor | None, pad_token_id: int | None
) -> tuple[Tensor | None, Tensor | None]:
    """The prefix to be read now (None: it is in the cache, or there is none) and the mask of the one in force."""
    if input_ids is None and mask is not None:
        raise ValueError("aux_attention_mask must come with aux_input_ids, got it alone")
    if input_ids is not None:
        if input_ids.dim() != 2 or input_ids.shape[0] != text.input_ids.shape[0]:
            raise ValueError(f"aux_input_ids must be [{text.input_ids.shape[0]}, prefix], got {list(input_ids.shape)}")
        if mask is None:
            _check_no_padding(input_ids, pad_token_id)
            mask = torch.ones_like(input_ids)
        elif mask.shape != input_ids.shape:
            raise ValueError(f"aux_attention_mask must be {list(input_ids.shape)}, got {list(mask.shape)}")
        if input_ids.shape[1] == 0:
            input_ids = mask = None
    cache = text.cache
    if cache is None:
        return input_ids, mask
    if input_ids is not None and cache.aux.get_seq_length() == 0:
        return input_ids, mask
    if input_ids is not None and cache.prefix_length != input_ids.shape[1]:
        raise ValueError(
            f"aux_input_ids must be the prefix that the cache was begun with, of {cache.prefix_length} tokens, got "
            f"{input_ids.shape[1]}"
        )
    return None, cache.prefix_mask


def shifted(labels: Tensor | None) -> Tensor | None:
    """[batch, new], the next token's label at each position; the last has none."""
    return None if labels is None else nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def row_scale(scale: float | Tensor, shape: torch.Size, name: str = "aux_scale") -> float | Tensor:
    """A number or 0-d tensor as it is; one for each text, [batch], as one for each position, [batch, new]."""
    if not isinstance(scale, Tensor):
        if isinstance(scale, bool) or not isinstance(scale, (Real, torch.SymFloat, torch.SymInt)):
            raise TypeError(f"{name} must be a number or a tensor, got {type(scale).__name__}")
        return scale
    if scale.dim() == 0:
        return scale
    if scale.shape != shape[:1]:
        raise ValueError(f"{name} must be a number or a tensor of shape [] or [{shape[0]}], got {list(scale.shape)}")
    if not (scale.is_floating_point() or scale.dtype == torch.bool):
        scale = scale.float()
    return scale[:, None].expand(shape)


def _check_no_padding(input_ids: Tensor, pad_token_id: int | None) -> None:
    if pad_token_id is None or torch.compiler.is_compiling() or not input_ids.shape[1]:
        return
    if (input_ids[:, [0, -1]] == pad_token_id).any():
        raise ValueError(f"aux_input_ids begin or end with the padding token {pad_token_id}: pass aux_attention_mask")


def check_cache(cache: object) -> None:
    if not isinstance(cache, PairedCache):
        raise TypeError(f"past_key_values must be a PairedCache (model.new_cache()), got {type(cache).__name__}")


def check_inputs(
    input_ids: Tensor | None, target: Tensor | None, num_items_in_batch: int | Tensor | None, kwargs: dict[str, Any]
) -> None:
    unknown = sorted(name for name in kwargs if name.startswith("aux_"))
    if unknown:
        raise TypeError(
            f"aux_* arguments are aux_input_ids, aux_attention_mask and aux_scale, got {', '.join(unknown)}"
        )
    if kwargs.pop("inputs_embeds", None) is not None or input_ids is None:
        raise ValueError("input_ids must be given: two models share tokens, not inputs_embeds")
    if kwargs.pop("output_attentions", None):
        raise ValueError("output_attentions must be False: call model.base or model.aux for their attentions")
    if target is None and num_items_in_batch is not None:
        raise ValueError(
            "labels must be given where num_items_in_batch is: with label_smoothing_factor or compute_loss_func, "
            "Trainer takes them away and computes a loss of its own; set model.config.label_smoothing instead"
        )
    check_labels(target, input_ids.shape)


def check_labels(target: Tensor | None, shape: torch.Size) -> None:
    if target is not None and target.shape != shape:
        raise ValueError(f"labels must be {list(shape)}, as the tokens, got {list(target.shape)}")


def _text_mask(attention_mask: Tensor | None, batch: int, length: int, device: torch.device | None) -> Tensor:
    """The mask of `length` text tokens, [batch, length]: as given, or ones."""
    if attention_mask is None:
        return torch.ones((batch, length), dtype=torch.long, device=device)
    if attention_mask.shape != (batch, length):
        raise ValueError(
            f"attention_mask must be [batch, past and new tokens] = {[batch, length]} where the auxiliary has a "
            f"prefix, got {list(attention_mask.shape)}"
        )
    return attention_mask
