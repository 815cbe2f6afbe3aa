"""Plans made during generation: one for each segment that is begun, from the tokens before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .mixins import Model
from .planner_config import check_mode

if TYPE_CHECKING:
    from transformers import GenerationConfig


class SegmentPlans:
    """The conditioning rows of every plan made so far, and the plan that each token carries.

    A token carries a new plan if it is the first of its row that is not padding, or if it ends a segment; otherwise it
    carries its predecessor's. Padding carries none. A plan depends on the tokens so far alone.

    rows_of          planner_fn's result for some rows of the batch, [R, K] or [R], to conditioning rows [L, R, H]
    planner_fn, is_segment_end
                     as for `PlannerForCausalLM.generate`
    """

    def __init__(
        self,
        rows_of: Callable[[Tensor], Tensor],
        planner_fn: Callable[[Tensor, Tensor], Tensor],
        is_segment_end: Callable[[Tensor], Tensor] | Iterable[int],
    ):
        self.rows_of, self.planner_fn = rows_of, planner_fn
        self.is_segment_end = is_segment_end if callable(is_segment_end) else None
        ends = None if callable(is_segment_end) else sorted(is_segment_end)
        self.end_tokens = None if ends is None else torch.tensor(ends, dtype=torch.int64, device="cpu")
        self.rows: Tensor | None = None  # [L, plans, H]
        self.tokens: Tensor | None = None  # [batch, n], those planned so far
        self.plan_of_token: Tensor | None = None  # [batch, n], -1: none

    def segments_of_last(self, count: int) -> Tensor:
        """The plans that the last `count` tokens carry, [batch, count]."""
        assert self.plan_of_token is not None, "`advance` comes first"
        return self.plan_of_token[:, -count:]

    @torch.no_grad()
    def advance(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """Plan up to the last of all tokens so far, [batch, n], with their mask [batch, n]; None: no padding.

        Raises   ValueError where earlier tokens are not those of the last call, or missing.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                "planning needs all tokens so far and a mask of their shape: "
                f"got tokens {list(input_ids.shape)}, attention_mask {list(attention_mask.shape)}"
            )
        batch = len(input_ids)
        if self.tokens is None:
            self.tokens = self.plan_of_token = input_ids.new_empty((batch, 0))
        plan_of_token = self.plan_of_token
        assert plan_of_token is not None, "it is made with the tokens"
        start = self.tokens.shape[1]
        if not torch.equal(input_ids[:, :start], self.tokens):
            raise ValueError("planning needs generation that only appends tokens: greedy search or sampling")
        begins = self._begins(input_ids, attention_mask.bool(), start)
        plan = plan_of_token[:, -1] if start else input_ids.new_full((batch,), -1)
        plans = []
        changes = begins.any(0).tolist()
        for position, changed in enumerate(changes, start):
            if changed:
                now = begins[:, position - start]
                plan = self._planned(input_ids[:, : position + 1], attention_mask[:, : position + 1], now, plan)
            plans.append(plan)
        self.tokens = input_ids.clone()
        self.plan_of_token = torch.cat((plan_of_token, *(p.unsqueeze(1) for p in plans)), dim=1)

    def _begins(self, input_ids: Tensor, is_token: Tensor, start: int) -> Tensor:
        """Which tokens from `start` on carry a new plan, [batch, n - start]."""
        is_first = is_token & (is_token.cumsum(1) == 1)
        if self.end_tokens is not None:
            ends = torch.isin(input_ids[:, start:], self.end_tokens.to(input_ids.device))
        else:
            ends = torch.stack([self._ends(input_ids[:, :n]) for n in range(start + 1, input_ids.shape[1] + 1)], dim=1)
        return is_first[:, start:] | (ends & is_token[:, start:])

    def _ends(self, tokens: Tensor) -> Tensor:
        assert self.is_segment_end is not None, "token ids say it otherwise"
        ends = self.is_segment_end(tokens)
        if not isinstance(ends, Tensor) or ends.dtype != torch.bool or ends.shape != tokens.shape[:1]:
            raise TypeError(f"is_segment_end must return a bool tensor [{len(tokens)}], got {ends!r}")
        return ends.to(tokens.device)

    def _planned(self, tokens: Tensor, attention_mask: Tensor, begins: Tensor, plan: Tensor) -> Tensor:
        """The plan of each row after those rows where a segment begins got new ones, [batch]."""
        planned = self.planner_fn(tokens, attention_mask)
        if not isinstance(planned, Tensor) or len(planned) != len(tokens):
            raise TypeError(f"planner_fn must return a tensor with {len(tokens)} rows, got {planned!r}")
        chosen = begins.nonzero().squeeze(1)
        rows = self.rows_of(planned[chosen.to(planned.device)])
        count = 0 if self.rows is None else self.rows.shape[1]
        self.rows = rows if self.rows is None else torch.cat((self.rows, rows), dim=1)
        return plan.index_copy(0, chosen, torch.arange(count, count + len(chosen), device=plan.device))


class GenerationWithPlans(Model):
    """What `GenerationMixin` lacks for a model with `_rows`, which turns labels into conditioning rows."""

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        planner_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        is_segment_end: Callable[[Tensor], Tensor] | Iterable[int] | None = None,
        mode: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' generate(), greedy or sampling, with a new plan wherever a segment ends.

        planner_fn       called with the tokens so far [batch, n] and their attention mask [batch, n]; returns scores
                         [batch, K], or label ids int64 [batch] in mode "hard". The result is used for the rows whose
                         token n - 1 is the first of the row or the last of a segment: that token already carries the
                         new plan, as in training. The prompt is planned in the same way.
        is_segment_end   called with the tokens so far [batch, n]; returns bool [batch]: whether token n - 1 ends a
                         segment. Or the token ids that do.
        mode             instead of the configuration's. Mode "fixed" needs neither planner_fn nor is_segment_end.
        Raises           ValueError: beam search, assisted decoding, chunked prefill and guidance_scale together with a
                         planner_fn; in every mode what `GenerationOfComposites` refuses.
        """
        mode = check_mode(mode or self.config.mode)
        if mode == "fixed":
            if planner_fn is not None:
                raise ValueError("mode 'fixed' uses no planner_fn")
            return super().generate(inputs, *args, mode=mode, **kwargs)
        if planner_fn is None or is_segment_end is None:
            raise ValueError(f"generate() in mode {mode!r} needs planner_fn and is_segment_end")
        _check_appends_only(self.generation_config, args, kwargs)
        plans = SegmentPlans(lambda scores: self._planned_rows(mode, scores), planner_fn, is_segment_end)
        return super().generate(inputs, *args, plans=plans, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, plans: SegmentPlans | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """transformers' own, and the plans brought up to the last token."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if plans is not None:
            plans.advance(input_ids, kwargs.get("attention_mask"))
            inputs["plans"] = plans
        return inputs

    def _planned_rows(self, mode: str, planned: Tensor) -> Tensor:
        """Rows [L, R, H] of what a planner_fn returned for R rows."""
        return self._rows(mode, {"label_scores" if planned.is_floating_point() else "label_ids": planned})[0]


def _check_appends_only(own_config: GenerationConfig, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """ValueError for a way of generating that does not only append tokens to all that came before."""
    config = kwargs.get("generation_config") or next(iter(args), None) or own_config

    def chosen(name: str) -> Any:
        given = kwargs.get(name)
        return getattr(config, name, None) if given is None else given

    if (chosen("num_beams") or 1) > 1:
        raise ValueError(f"num_beams must be 1 with a planner_fn, got {chosen('num_beams')}")
    for name in ("prompt_lookup_num_tokens", "assistant_model", "prefill_chunk_size", "assistant_early_exit"):
        if chosen(name) is not None:
            raise ValueError(f"{name} cannot be used with a planner_fn")
    if chosen("guidance_scale") not in (None, 1):
        raise ValueError("guidance_scale cannot be used with a planner_fn: the unconditional text would have no plans")
