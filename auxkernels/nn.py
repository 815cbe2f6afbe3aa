"""Thin modules over the functions; tensors that they own are buffers or parameters."""

from __future__ import annotations

from torch import Tensor, nn

from .cross_entropy import aux_cross_entropy
from .sources import SourceLike


class AuxCrossEntropyLoss(nn.Module):
    """`aux_cross_entropy` as a module. `weight` is a buffer: it moves with .to() and is part of the state dict.

    Arguments are those of `aux_cross_entropy`, which is called with them in forward(base, aux, target).
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        reduction: str = "mean",
        vocab_size: int | None = None,
        return_stats: bool = False,
        recompute: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        self.register_buffer("weight", weight)
        self.options = {
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "reduction": reduction,
            "vocab_size": vocab_size,
            "return_stats": return_stats,
            "recompute": recompute,
            "backend": backend,
        }

    def forward(
        self, base: SourceLike, aux: SourceLike | None, target: Tensor, normalizer: float | Tensor | None = None
    ):
        """The loss of base and aux [*, V] against target [*]; `normalizer` replaces the divisor of "mean"."""
        return aux_cross_entropy(base, aux, target, weight=self.weight, normalizer=normalizer, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
