"""aux_scale of each request: how a number gets from a request's parameters to its tokens' logits.

vLLM's V1 runner tells logits processors which request is in which slot of the batch. One keeps a number for each slot;
`forward` finds the slot of each token and appends the number to the token's hidden state. So `compute_logits` has it
whichever rows it is asked for: the last ones, or those of prompt log-probabilities.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

ARGUMENT = "aux_scale"
# whose metadata say where each request's tokens start
BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN", "FLEX_ATTENTION", "ROCM_ATTN", "ROCM_AITER_FA")

_processor: AuxScale | None = None  # this process's: vLLM makes it apart from the model


class AuxScale(LogitsProcessor):
    """Takes a request's extra argument `aux_scale` (a finite number); changes no logits itself.

    slots   [max_num_seqs] float32, NaN: the configuration's
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        global _processor
        _processor = self
        self.slots = torch.full((vllm_config.scheduler_config.max_num_seqs,), torch.nan, device=device)

    @classmethod
    def validate_params(cls, params: Any) -> None:
        """ValueError, HTTP 400, for aux_* that are none, and for a prefix of the auxiliary's own."""
        given = params.extra_args or {}
        for name in given:
            if name in ("aux_input_ids", "aux_attention_mask"):
                raise ValueError(
                    f"{name} must not be given: under vLLM the auxiliary has no prefix of its own, because one cache "
                    "and its positions are shared by all layers; generate() of transformers has it"
                )
            if name.startswith("aux_") and name != ARGUMENT:
                raise ValueError(f"of aux_* arguments a request can have {ARGUMENT} alone, got {name}")
        scale = given.get(ARGUMENT)
        if scale is None:
            return
        is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
        if not is_number or (isinstance(scale, float) and not math.isfinite(scale)):  # an int may be none that fits
            raise ValueError(f"{ARGUMENT} must be a finite number, got {scale!r}")
        if abs(scale) > torch.finfo(torch.float32).max:
            raise ValueError(f"{ARGUMENT} must be in the range of float32, got {scale!r}")

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: Tensor) -> Tensor:
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        slots = self.slots
        for slot in batch_update.removed:
            slots[slot] = torch.nan
        for slot, params, _, _ in batch_update.added:
            scale = (params.extra_args or {}).get(ARGUMENT)
            slots[slot] = torch.nan if scale is None else scale
        for one, other, direction in batch_update.moved:
            taken = slots[[one, other]]
            slots[other] = taken[0]
            slots[one] = taken[1] if direction == MoveDirectionality.SWAP else torch.nan


class ScaleColumns:
    """Each token's scale as columns of its hidden states.

    default   the scale of requests that have none
    width     how many columns of `dtype` hold the bits of a float32
    """

    def __init__(self, default: float, dtype: torch.dtype) -> None:
        self.default, self.dtype = default, dtype
        self.width = torch.float32.itemsize // dtype.itemsize

    def of_tokens(self, num_tokens: int, device: torch.device) -> Tensor:
        """[num_tokens, width] for the tokens of the step that runs."""
        metadata = get_forward_context().attn_metadata
        if metadata is None or _processor is None:  # a step that only measures memory
            scales = torch.full((num_tokens,), self.default, dtype=torch.float32, device=device)
        else:
            starts = _starts(metadata)
            tokens = torch.arange(num_tokens, device=device, dtype=starts.dtype)
            slot = torch.searchsorted(starts[1:], tokens, right=True)
            scales = _processor.slots[slot.clamp(max=len(_processor.slots) - 1)]  # padding is behind all requests
            scales = torch.where(scales.isnan(), self.default, scales)
        return scales.unsqueeze(-1).view(self.dtype)

    @staticmethod
    def read(columns: Tensor) -> Tensor:
        """[rows, 1] float32 of [rows, width]."""
        return columns.contiguous().view(torch.float32)


def _starts(metadata: Any) -> Tensor:
    """[requests + 1], at which token of the step each request starts, of the metadata of attention layers."""
    layers = metadata.values() if isinstance(metadata, dict) else ()
    starts = next((one.query_start_loc for one in layers if hasattr(one, "query_start_loc")), None)
    if starts is None:
        raise RuntimeError("no attention layer says where each request starts, so that its aux_scale is not known")
    return starts
