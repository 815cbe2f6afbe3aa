"""The logits of single classes, without those of the others."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sources import SourceTensors
from .products import plan_of


def sums_at(
    sources: list[SourceTensors],
    classes: Tensor,
    compute: torch.dtype,
    autocast: torch.dtype | None,
    is_exact: bool = False,
) -> Tensor:
    """The sum of the sources at one class of each row, [*] in the compute dtype.

    Rounded as where the logits of all classes are stored, or, with `is_exact`, as in a float32 product.
    """
    total: Tensor | None = None
    for source in sources:
        if source.weight is None:
            z = source.values.gather(-1, classes.unsqueeze(-1)).squeeze(-1).to(compute)
        else:
            plan = plan_of(source.values.dtype, autocast, source.values.device)
            wide = torch.promote_types(plan.operands, torch.float32)
            columns = plan.operand(source.weight[classes]).to(wide)
            z = (plan.operand(source.values).to(wide) * columns).sum(-1)
            if source.bias is not None:
                z = z + plan.operand(source.bias[classes]).to(wide)
            z = z.to(compute) if is_exact else z.to(plan.logits).to(compute)
        if source.softcap is not None:
            z = source.softcap * torch.tanh(z / source.softcap)
        if source.scale is not None:
            z = z * source.scale.to(compute)
        total = z if total is None else total + z
    assert total is not None, "there is at least one source"
    return total
