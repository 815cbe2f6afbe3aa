"""Thin modules over the functions; tensors that they own are buffers or parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .cross_entropy.api import aux_cross_entropy
from .cross_entropy.rows import LogitStats
from .soft_embedding.api import LookupStats, soft_embedding
from .soft_embedding.segments import segments_to_tokens
from .sources import SourceLike


class AuxCrossEntropyLoss(nn.Module):
    """`aux_cross_entropy` as a module. `weight` is a buffer: it moves with .to() and is part of the state dict.

    Arguments are those of `aux_cross_entropy`, which is called with them in forward(base, aux, target).
    """

    weight: Tensor | None

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
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.options: dict[str, Any] = {
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
    ) -> Tensor | tuple[Tensor, LogitStats]:
        """The loss of base and aux [*, V] against target [*]; `normalizer` replaces the divisor of "mean"."""
        return aux_cross_entropy(base, aux, target, weight=self.weight, normalizer=normalizer, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class SoftEmbedding(nn.Module):
    """Label embeddings mixed by predicted probabilities: `soft_embedding` with tables that are parameters.

    num_labels, embedding_dim   K and D
    num_tables                  L tables that share one softmax; 1: a single table, and results without that dimension
    temperature, hard, gumbel, clean_gradient, top_k, backend
                                as for `soft_embedding`; Gumbel noise is added in training mode only
    """

    temperature: float | Tensor

    def __init__(
        self,
        num_labels: int,
        embedding_dim: int,
        num_tables: int = 1,
        *,
        temperature: float | Tensor = 1.0,
        hard: bool = False,
        gumbel: float = 0.0,
        clean_gradient: bool = False,
        top_k: int | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        shape = (num_labels, embedding_dim) if num_tables == 1 else (num_tables, num_labels, embedding_dim)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if isinstance(temperature, nn.Parameter):
            self.temperature = temperature
        elif isinstance(temperature, Tensor):
            self.register_buffer("temperature", temperature)
        else:
            self.temperature = temperature
        self.hard, self.gumbel, self.top_k, self.backend = hard, gumbel, top_k, backend
        self.clean_gradient = clean_gradient
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Standard normal, as torch.nn.Embedding."""
        nn.init.normal_(self.weight)

    @classmethod
    def from_codebook(cls, codebook: Tensor, freeze: bool = False, **options: Any) -> SoftEmbedding:
        """A module whose tables start as `codebook` [K, D] or [L, K, D]; freeze: they get no gradient."""
        if codebook.dim() not in (2, 3):
            raise ValueError(f"codebook must be [K, D] or [L, K, D], got {list(codebook.shape)}")
        *num_tables, num_labels, embedding_dim = codebook.shape
        given: dict[str, Any] = {"device": codebook.device, "dtype": codebook.dtype} | options
        module = cls(num_labels, embedding_dim, *num_tables, **given)
        with torch.no_grad():
            module.weight = nn.Parameter(codebook.detach().to(module.weight).clone(), requires_grad=not freeze)
        return module

    def forward(
        self,
        logits: SourceLike,
        *,
        mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        seed: int | Tensor | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, LookupStats]:
        """The mixture for scores [*, K]: [*, D] or [L, *, D].

        segment_ids   int [*tokens]: the rows of the scores, numbered through, are segments, and every token gets its
                      segment's mixture, zeros where the id is negative: [*tokens, D] or [L, *tokens, D].
        """
        result = soft_embedding(
            logits,
            self.weight,
            temperature=self.temperature,
            hard=self.hard,
            gumbel=self.gumbel if self.training else 0.0,
            clean_gradient=self.clean_gradient,
            seed=seed,
            mask=mask,
            top_k=self.top_k,
            return_stats=return_stats,
            backend=self.backend,
        )
        mixture, stats = result if isinstance(result, tuple) else (result, None)
        if segment_ids is not None:
            rows = mixture.flatten(self.weight.dim() - 2, -2)
            mixture = segments_to_tokens(rows, segment_ids, self.backend)
        return mixture if stats is None else (mixture, stats)

    def extra_repr(self) -> str:
        options = {name: getattr(self, name) for name in ("hard", "gumbel", "clean_gradient", "top_k", "backend")}
        sizes = ", ".join(map(str, self.weight.shape))
        return f"{sizes}, " + ", ".join(f"{name}={value!r}" for name, value in options.items())
