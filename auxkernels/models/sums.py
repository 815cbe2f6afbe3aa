"""The sum of a frozen base's logits and those of auxiliaries: as sources of a loss, and as logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput

from ..cross_entropy import LogitStats, aux_cross_entropies, aux_cross_entropy
from ..sources import Logits, Source, row_scale
from .auxiliary_inputs import IGNORE_INDEX
from .cache_argument import CACHE
from .heads import CalledHead, OutputHead, ParallelHead, detached, output_head
from .small import check_hidden_states, low_rank_head

if TYPE_CHECKING:
    from .auxiliary import AuxiliaryForCausalLM
    from .token_choice import TokenChoice

Scale = float | Tensor


@dataclass
class AuxiliaryCausalLMOutput(ModelOutput):
    """What `AuxiliaryForCausalLM` returns. With labels, all numbers are 0-d tensors over the counted tokens.

    loss            cross-entropy of the summed logits, nats; has a gradient
    logits          [batch, kept, V], V the base's width; None where they were skipped
    past_key_values `PairedCache`, with use_cache; the field is called `cache` where transformers calls it so
    hidden_states   the base's, with output_hidden_states
    base_loss       cross-entropy of the base alone, with the loss's divisor: base_loss - loss is what was gained, but
                    not in training with config.label_smoothing, which smooths the loss alone, nor with router_loss.
                    None in training with a shared head, where it would cost a product of its own
    next_tokens     int64 [batch], in generation that needs no logits: what follows the last position
    router_loss     a mixture of experts' weighted balancing loss, which the loss includes: the auxiliary's alone, where
                    its configuration or the call says output_router_logits; else None
    token_accuracy, entropy           means over the counted tokens; entropy of the summed softmax, nats
    num_valid_tokens, num_correct_tokens, entropy_sum   what those are means of
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    if CACHE == "cache":
        cache: Cache | None = None
    else:
        past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    base_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    entropy: Tensor | None = None
    num_valid_tokens: Tensor | None = None
    num_correct_tokens: Tensor | None = None
    entropy_sum: Tensor | None = None
    router_loss: Tensor | None = None
    next_tokens: Tensor | None = None


@dataclass
class Term:
    """An auxiliary's part of the sum.

    model    whose auxiliary it is
    hidden   [batch, new, D], what enters its head
    scale    number, 0-d or [batch, new]
    """

    model: AuxiliaryForCausalLM
    hidden: Tensor
    scale: Scale

    @property
    def is_shared(self) -> bool:
        return self.model.config.head == "shared"

    def of_base_head(self, h_base: Tensor) -> Tensor:
        """With a shared head: what is added to the base's hidden states, before it is scaled."""
        return self.model.aux_head(self.hidden.to(h_base.device))

    def head(self) -> tuple[Tensor, OutputHead | CalledHead | ParallelHead]:
        """Without a shared head: the auxiliary's head and what enters it."""
        if self.model.config.head == "own":
            return self.hidden, output_head(self.model.aux)
        down, head = low_rank_head(self.model.aux_head)
        return down(self.hidden), head


@dataclass
class Sum:
    """base_scale * base + the terms, each times its scale.

    Terms with a shared head are added to h_base [batch, new, D] before the base's head, whose product then is one; what
    they add is head(h_base + terms) - head(h_base), whatever base_scale is.
    num_valid   how many leading columns count
    """

    base: PreTrainedModel
    h_base: Tensor
    terms: list[Term]
    num_valid: int
    base_scale: Scale = 1.0

    def __post_init__(self) -> None:
        for term in self.terms:
            if term.model.config.head != "own":
                check_hidden_states(self.base if term.is_shared else None, term.model.aux)

    @property
    def _has_plain_base(self) -> bool:
        """Whether the base's part is its logits as they are."""
        return _is_one(self.base_scale) and not any(term.is_shared for term in self.terms)

    # -- of the base's head --------------------------------------------------------------------------------------------

    def _parts_of_base(self) -> list[tuple[Tensor, Scale]]:
        """What enters the base's head, and the scale of its logits: one product where the head is linear, else two."""
        shared = [term for term in self.terms if term.is_shared]
        if not shared:
            return [(self.h_base, self.base_scale)]
        head = output_head(self.base)
        dtype = getattr(head, "weight", self.h_base).dtype
        projected = [(term.of_base_head(self.h_base), term.scale) for term in shared]
        if _is_one(self.base_scale) or _is_homogeneous(head):
            return [(added(self.h_base, projected, dtype, self.base_scale), 1.0)]
        return [(self.h_base, self.base_scale - 1.0), (added(self.h_base, projected, dtype), 1.0)]

    def _frozen_sources(self, hidden: Tensor, scale: Scale = 1.0) -> list[Source]:
        """Of the base's head, which gets no gradient; hidden states that need one do."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and hidden.requires_grad):
            sources = output_head(self.base).sources(hidden)
        frozen = [one if isinstance(one, Logits) and hidden.requires_grad else detached(one) for one in sources]
        return [scaled(source, scale) for source in frozen]

    def _base_logits(self, hidden: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and hidden.requires_grad):
            return output_head(self.base).logits(hidden)

    # -- the loss ------------------------------------------------------------------------------------------------------

    def sources(self) -> tuple[list[Source], list[Source] | None]:
        """Base and auxiliaries as `aux_cross_entropy` takes them."""
        aux = self._aux_sources()
        return [source for part in self._parts_of_base() for source in self._frozen_sources(*part)], aux

    def _aux_sources(self) -> list[Source] | None:
        aux: list[Source] = []
        for term in self.terms:
            if not term.is_shared:
                hidden, head = term.head()
                aux += [scaled(source, term.scale) for source in head.sources(hidden)]
        return aux or None

    def loss(
        self, target: Tensor, label_smoothing: float, num_items_in_batch: int | Tensor | None, is_training: bool
    ) -> dict[str, Any]:
        """The numbers of `AuxiliaryCausalLMOutput`."""
        options: dict[str, Any] = {"ignore_index": IGNORE_INDEX, "vocab_size": self.num_valid}
        loss, stats = aux_cross_entropy(
            *self.sources(),
            target,
            label_smoothing=label_smoothing,
            normalizer=num_items_in_batch,
            return_stats=True,
            **options,
        )
        return self._numbers(loss, stats, target, num_items_in_batch, is_training)

    def _numbers(
        self,
        loss: Tensor,
        stats: LogitStats,
        target: Tensor,
        num_items_in_batch: int | Tensor | None,
        is_training: bool,
    ) -> dict[str, Any]:
        num_valid = (target != IGNORE_INDEX).sum()
        num_correct, entropy_sum = (stats.argmax == target).sum(), stats.entropy.sum()
        base_loss: Any = None
        if self._has_plain_base:
            assert stats.base_log_prob is not None, "there is a target"
            base_loss = -stats.base_log_prob.sum() / (num_valid if num_items_in_batch is None else num_items_in_batch)
        elif not is_training:
            base_loss = aux_cross_entropy(
                self._frozen_sources(self.h_base.detach()),
                None,
                target,
                ignore_index=IGNORE_INDEX,
                normalizer=num_items_in_batch,
                vocab_size=self.num_valid,
            )
        return {
            "loss": loss,
            "base_loss": base_loss,
            "token_accuracy": num_correct / num_valid,
            "entropy": entropy_sum / num_valid,
            "num_valid_tokens": num_valid,
            "num_correct_tokens": num_correct,
            "entropy_sum": entropy_sum,
        }

    # -- logits --------------------------------------------------------------------------------------------------------

    def _parts(self) -> list[tuple[Tensor, Scale]]:
        """Logits [batch, new, >= num_valid] of each head, and what they are multiplied by; the base's come first."""
        parts = [(self._base_logits(hidden), scale) for hidden, scale in self._parts_of_base()]
        for term in self.terms:
            if not term.is_shared:
                hidden, head = term.head()
                parts.append((head.logits(hidden), term.scale))
        return parts

    def at(self, kept: slice | Tensor) -> Sum:
        """The sum at some positions."""
        terms = [replace(one, hidden=one.hidden[:, kept], scale=_at(one.scale, kept)) for one in self.terms]
        return replace(self, h_base=self.h_base[:, kept], terms=terms, base_scale=_at(self.base_scale, kept))

    def logits(self, width: int, floor: float | None = None) -> Tensor:
        """[batch, new, width] in float32 at least: a sum rounded to 16 bits would lose the auxiliaries' part.

        floor   -inf for tokens whose probability under the base alone is below `floor` times that of its likeliest
        """
        parts = self._parts()
        dtype = torch.float32
        for logits, _ in parts:
            dtype = torch.promote_types(dtype, logits.dtype)
        total: Tensor | None = None
        for logits, scale in parts:
            part = logits[..., : self.num_valid].to(dtype)
            part = part if _is_one(scale) else row_scale(scale, dtype) * part
            total = part if total is None else total + part
        assert total is not None, "there is a base"
        if floor is not None:
            base = self._base_logits(self.h_base) if any(term.is_shared for term in self.terms) else parts[0][0]
            base = base[..., : self.num_valid].to(dtype)
            total = total.masked_fill(base < base.amax(dim=-1, keepdim=True) + math.log(floor), -torch.inf)
        return nn.functional.pad(total, (0, width - self.num_valid), value=-torch.inf)

    def next_tokens(self, choice: TokenChoice, floor: float | None = None) -> Tensor:
        """int64 [batch] for one position, without the sum being stored; -1 where a row is no distribution.

        floor   as of `logits`. It is on the base as it is, of which the sum may have something else: then it is stored.
        """
        if floor is not None and not self._has_plain_base:
            return choice([Logits(self.logits(self.num_valid, floor))], None, self.num_valid, None)
        base, *aux = [Logits(logits, scale=scale) for logits, scale in self._parts()]
        return choice([base], list(aux) or None, self.num_valid, floor)


def losses(
    sums: list[Sum],
    targets: list[Tensor],
    label_smoothing: list[float],
    num_items_in_batch: list[int | Tensor | None],
    is_training: bool,
) -> list[dict[str, Any]]:
    """`Sum.loss` of each of several sums of one base and one h_base, with the same bits.

    The base's logits of a chunk of rows are made once for all whose auxiliaries have logits of their own. A shared head
    multiplies a sum of hidden states, which no other has.
    """
    beside = [i for i, one in enumerate(sums) if one._has_plain_base]
    made: dict[int, tuple[Tensor, LogitStats]] = {}
    if beside:
        first = sums[beside[0]]
        found: list[Any] = aux_cross_entropies(
            first._frozen_sources(first.h_base),
            [sums[i]._aux_sources() for i in beside],
            [targets[i] for i in beside],
            ignore_index=IGNORE_INDEX,
            label_smoothing=[label_smoothing[i] for i in beside],
            normalizer=[num_items_in_batch[i] for i in beside],
            vocab_size=[sums[i].num_valid for i in beside],
            return_stats=True,
        )
        made.update(zip(beside, found, strict=True))
    return [
        one._numbers(*made[i], targets[i], num_items_in_batch[i], is_training)
        if i in made
        else one.loss(targets[i], label_smoothing[i], num_items_in_batch[i], is_training)
        for i, one in enumerate(sums)
    ]


def with_router_loss(numbers: dict[str, Any], router: Tensor | None) -> dict[str, Any]:
    """The numbers of `AuxiliaryCausalLMOutput` with a balancing loss in the loss."""
    if router is None:
        return numbers
    return numbers | {"loss": numbers["loss"] + router.to(numbers["loss"].device), "router_loss": router}


def added(h_base: Tensor, projected: list[tuple[Tensor, Scale]], dtype: torch.dtype, base_scale: Scale = 1.0) -> Tensor:
    """base_scale * h_base + the sum of scale * projected, [*, D]: in float32 at least and rounded once, to `dtype`.

    Scales are numbers, 0-d, or one for each row.
    """
    wide = torch.promote_types(h_base.dtype, torch.float32)
    for one, _ in projected:
        wide = torch.promote_types(wide, one.dtype)
    total = h_base.to(wide)
    if not _is_one(base_scale):
        total = row_scale(base_scale, wide) * total
    for one, scale in projected:
        total = total + row_scale(scale, wide) * one.to(wide)
    return total.to(dtype)


def scaled(source: Source, scale: Scale) -> Source:
    """A source whose logits are multiplied by a scale."""
    return replace(source, scale=scale if source.scale == 1.0 else source.scale * scale)


def _is_one(scale: Scale) -> bool:
    return not isinstance(scale, Tensor) and scale == 1.0


def _is_homogeneous(head: OutputHead | CalledHead | ParallelHead) -> bool:
    """Whether a head of scaled hidden states gives scaled logits."""
    if not isinstance(head, OutputHead) or head.softcap is not None:
        return False
    return head.bias is None and all(adapter.bias is None for adapter in head.low_rank)


def _at(scale: Scale, kept: slice | Tensor) -> Scale:
    return scale[:, kept] if isinstance(scale, Tensor) and scale.dim() == 2 else scale
