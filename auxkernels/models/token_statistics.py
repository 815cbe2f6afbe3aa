"""Numbers of each token from a composite's own head, which TRL's trainers would compute from a single head's weight.

They replace `forward` by one with a keyword fused_lm_head, which multiplies the last hidden states of `base_model` by
the weight of the output embeddings. Two summed models have no such weight, and a conditioned one no such base model.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from ..cross_entropy import logit_stats
from ..sources import Logits, Source
from .mixins import Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORE_INDEX = -100
_CHUNK = 8192
_KEYWORD = "fused_lm_head"
_CHOICES = ("temperature", "outputs")


@dataclass
class TokenStatisticsOutput(ModelOutput):
    """Of each predicted token [batch, new - 1], or [batch, new] with shift_labels; zero where a label is not counted.

    loss              0-d, the mean of -log_probs over the counted tokens, or their sum over num_items_in_batch
    log_probs         of the next token's label, with the logits divided by the temperature, as in all that follows
    entropy           nats. These three have gradients
    log_sum_sq_probs  log of the sum of squared probabilities, where it is asked for
    mean_logits       mean over the vocabulary, where it is asked for
    is_top1           whether the label is the likeliest token
    label_mask        which tokens are counted
    aux_loss          0-d, a mixture of experts' balancing loss without its weight, where it is asked for
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


class TokenStatistics(NamedTuple):
    """What is asked for of each token: the temperature of the logits, and which of the optional numbers."""

    temperature: float
    outputs: tuple[str, ...]

    def __call__(
        self,
        base: list[Source],
        aux: list[Source],
        target: Tensor,
        is_shifted: bool,
        vocab_size: int | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> TokenStatisticsOutput:
        """base, aux: sources of [batch, new] positions; target [batch, new], whose last counts if `is_shifted`."""
        base, aux = ([_scaled(source, 1 / self.temperature) for source in side] for side in (base, aux))
        stats = logit_stats(base, aux or None, target, ignore_index=IGNORE_INDEX, vocab_size=vocab_size)
        assert stats.log_prob is not None, "there is a target"
        mask = target != IGNORE_INDEX
        fields = {"log_probs": stats.log_prob, "entropy": stats.entropy, "is_top1": mask & (stats.argmax == target)}
        with torch.no_grad():
            if "log_sum_sq_probs" in self.outputs:
                of_base, of_aux = ([_scaled(source, 2.0) for source in side] for side in (base, aux))
                twice = logit_stats(of_base, of_aux or None, target, ignore_index=IGNORE_INDEX, vocab_size=vocab_size)
                fields["log_sum_sq_probs"] = twice.lse - 2 * stats.lse
            if "mean_logits" in self.outputs:
                means = [_mean_logits(source, vocab_size) for source in [*base, *aux]]
                fields["mean_logits"] = sum(means[1:], means[0]).masked_fill(~mask, 0.0)
        loss = -stats.log_prob.sum() / (mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        fields["label_mask"] = mask
        if not is_shifted:
            fields = {name: value[:, :-1] for name, value in fields.items()}
        return TokenStatisticsOutput(loss=loss, **fields)


def _scaled(source: Source, factor: float) -> Source:
    return source if factor == 1.0 else replace(source, scale=source.scale * factor)


def _mean_logits(source: Source, vocab_size: int | None) -> Tensor:
    """Mean over the vocabulary, [batch, new] in float32."""
    if isinstance(source, Logits):
        values = source.values[..., :vocab_size].float()
        return source.scale * _softcapped(values, source.softcap).mean(dim=-1)
    hidden, weight = source.hidden.float(), source.weight[:vocab_size]
    bias = None if source.bias is None else source.bias[:vocab_size]
    if source.softcap is None:
        mean = hidden @ weight.mean(dim=0, dtype=torch.float32)
        return source.scale * (mean if bias is None else mean + bias.float().mean())
    total = hidden.new_zeros(hidden.shape[:-1])
    for start in range(0, len(weight), _CHUNK):
        part = None if bias is None else bias[start : start + _CHUNK].float()
        z = torch.nn.functional.linear(hidden, weight[start : start + _CHUNK].float(), part)
        total = total + _softcapped(z, source.softcap).sum(dim=-1)
    return source.scale * total / len(weight)


def _softcapped(values: Tensor, softcap: float | None) -> Tensor:
    return values if softcap is None else softcap * torch.tanh(values / softcap)


def check_no_further_loss(model: PreTrainedModel, is_balanced: bool) -> None:
    """ValueError where a loss that a trainer makes of log-probabilities would lack what the model's own has."""
    if not (model.training and torch.is_grad_enabled()):
        return
    if is_balanced:
        raise ValueError(
            "aux.config.output_router_logits must be False here: the trainer makes its loss of log-probabilities, "
            "without the balancing loss of the auxiliary's experts"
        )
    if model.config.label_smoothing:
        raise ValueError(
            "config.label_smoothing must be 0 here: the trainer makes its loss of log-probabilities (SFTTrainer "
            "smooths labels by its own label_smoothing_factor)"
        )


# -- TRL's replacement of forward ----------------------------------------------------------------------------------


class OwnTokenStatistics(Model):
    """Keeps a composite's own head where TRL replaces `forward`: the same keyword, answered by `TokenStatistics`.

    The composite's `forward` takes a keyword token_statistics for it.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward" and is_fused(value):
            value = types.MethodType(_with_own_head(value.__func__, type(self).forward), self)
        super().__setattr__(name, value)


def is_fused(forward: object) -> bool:
    """Whether this is TRL's replacement."""
    code = getattr(getattr(forward, "__func__", None), "__code__", None)
    return code is not None and _KEYWORD in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def original_of(fused: Any) -> Callable[..., Any] | None:
    """What TRL's replacement passes calls on to."""
    return inspect.getclosurevars(fused.__func__).nonlocals.get("original_forward")


def _with_own_head(given: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    """`given`, which passes everything on to the composite's own forward where its head is not asked for."""
    choices = inspect.getclosurevars(given).nonlocals
    missing = [name for name in _CHOICES if name not in choices]
    if missing:
        raise RuntimeError(
            f"TRL's fused head must hold {' and '.join(_CHOICES)}, {missing[0]} was not found: use trl==1.16.0"
        )
    statistics = TokenStatistics(float(choices["temperature"]), tuple(choices["outputs"]))

    @functools.wraps(own)  # generate and Trainer read the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.pop(_KEYWORD, False):
            kwargs |= {"use_cache": False, "token_statistics": statistics}
        return given(self, *args, **kwargs)

    return forward
