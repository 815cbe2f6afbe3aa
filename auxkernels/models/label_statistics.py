"""Statistics of a planner's labels over the segments of all processes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_reduce

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .planner import PlannerCausalLMOutput


def label_statistics_of_all(output: PlannerCausalLMOutput, group: ProcessGroup | None = None) -> PlannerCausalLMOutput:
    """The output with `label_entropy` and `label_usage` over the segments of all processes, each weighted by its own.

    Both have gradients, as a loss that balances the labels needs: a term that every process adds to its loss counts
    once, where gradients are averaged over the processes (DistributedDataParallel, FSDP). One collective of K + 2
    numbers, of all processes of `group` (None: the default group); without torch.distributed nothing changes.
    Raises ValueError: no labels in the output.
    """
    if output.label_usage is None or output.label_entropy is None or output.segment_labels is None:
        raise ValueError("output must have the statistics of a planner's labels, got none: call with segments")
    if not dist.is_available() or not dist.is_initialized():
        return output
    usage, count = output.label_usage, len(output.segment_labels)
    own = torch.cat([usage, output.label_entropy.reshape(1).to(usage), usage.new_ones(1)])
    total = all_reduce(count * own, group=dist.group.WORLD if group is None else group)
    mean = total[:-1] / total[-1].detach().clamp(min=1)
    return replace(output, label_usage=mean[:-1], label_entropy=mean[-1].to(output.label_entropy.dtype))
