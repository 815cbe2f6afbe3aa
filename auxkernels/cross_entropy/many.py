"""Cross-entropy of several auxiliaries beside one base, which is read once, or its products made once, for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..sources import Source, SourceLike, as_sources
from . import autograd, ops, rows
from .api import OF_STATS, aux_cross_entropy, call_of, checked_loss
from .request import BadTarget
from .rows import LogitStats


def aux_cross_entropies(
    base: SourceLike,
    auxes: Sequence[SourceLike | None],
    target: Tensor | Sequence[Tensor],
    *,
    ignore_index: int | Sequence[int] = -100,
    weight: Tensor | Sequence[Tensor | None] | None = None,
    label_smoothing: float | Sequence[float] = 0.0,
    z_loss: float | Sequence[float] = 0.0,
    reduction: str | Sequence[str] = "mean",
    normalizer: float | Tensor | Sequence[float | Tensor | None] | None = None,
    vocab_size: int | Sequence[int | None] | None = None,
    return_stats: bool = False,
    recompute: bool = False,
    backend: str = "auto",
) -> list[Tensor] | list[tuple[Tensor, LogitStats]]:
    """`aux_cross_entropy(base, aux, target, ...)` for each of K auxiliaries, a frozen base being worked on once.

    base         as in `aux_cross_entropy`.
    auxes        list or tuple of K >= 1 auxiliaries, each as in `aux_cross_entropy`: a list in it is one auxiliary, the
                 sum of what it holds, and None is the base alone.
    target, ignore_index, weight, label_smoothing, z_loss, reduction, normalizer, vocab_size
                 as in `aux_cross_entropy`, one for all auxiliaries or a list or tuple of K, one for each.
    Returns      list of K losses, or with return_stats of K pairs (loss, `LogitStats`): each with a graph of its own,
                 which goes backward by itself. All gradients are made before any loss is returned.
    Raises       as `aux_cross_entropy`, the message preceded by the auxiliary that it is about, "auxes[2]: ...".
                 ValueError: a list of other than K entries.

    Each result is bit for bit that of its single call. What is shared: on CPU, one pass over the rows of the base's
    logits serves all auxiliaries that are logits; a base that is a head, or a sum, is computed once per chunk of rows
    for all auxiliaries that take the same rows (of one vocab_size, with the same rows ignored), in one [rows, V] buffer
    more than a single call has. The rest are single calls, one after the other: where the base gets a gradient;
    reduction="none", recompute=True or float16 logits that get a gradient; base logits beside heads; logits on GPU; the
    reference; under torch.compile and torch.func's transforms.
    """
    if not isinstance(auxes, (list, tuple)):
        raise TypeError(f"auxes must be a list or tuple with an entry for each auxiliary, got {type(auxes).__name__}")
    if not auxes:
        raise ValueError(f"auxes must hold at least one auxiliary, got an empty {type(auxes).__name__}")
    of_each: dict[str, Any] = {
        "target": target,
        "ignore_index": ignore_index,
        "weight": weight,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "reduction": reduction,
        "normalizer": normalizer,
        "vocab_size": vocab_size,
    }
    spread = {name: _spread(name, value, len(auxes)) for name, value in of_each.items()}
    options = [{name: values[k] for name, values in spread.items()} for k in range(len(auxes))]
    shared: dict[str, Any] = {"return_stats": return_stats, "recompute": recompute, "backend": backend}
    if torch.compiler.is_compiling():
        traced: list[Any] = [
            aux_cross_entropy(base, aux, **own, **shared) for aux, own in zip(auxes, options, strict=True)
        ]
        return traced
    of_base = as_sources("base", base)
    jointly: dict[int, ops.LossOf] = {}
    for k, (aux, own) in enumerate(zip(auxes, options, strict=True)):
        try:
            found = _joint(of_base, aux, **own, recompute=recompute, backend=backend)
        except (TypeError, ValueError) as error:
            raise _of(k, error) from None
        if found is not None:
            jointly[k] = found
    results: dict[int, Any] = {}
    try:
        if len(jointly) > 1:
            losses = _losses(list(jointly.values()), return_stats)
            results.update(zip(jointly, losses, strict=True))
    except BadTarget as error:
        raise _of(list(jointly)[error.number], IndexError(error)) from None
    for k, (aux, own) in enumerate(zip(auxes, options, strict=True)):
        if k in results:
            continue
        try:
            results[k] = aux_cross_entropy(of_base, aux, **own, **shared)
        except (TypeError, ValueError, IndexError) as error:
            raise _of(k, error) from None
    return [results[k] for k in range(len(auxes))]


def _spread(name: str, value: Any, num_auxes: int) -> Sequence[Any]:
    """One value for each auxiliary."""
    if not isinstance(value, (list, tuple)):
        return [value] * num_auxes
    if len(value) != num_auxes:
        raise ValueError(f"{name} must have an entry for each of the {num_auxes} auxiliaries, got {len(value)}")
    return value


def _of(k: int, error: Exception) -> Exception:
    return type(error)(f"auxes[{k}]: {error}")


def _joint(
    base: list[Source],
    aux: SourceLike | None,
    target: Tensor,
    ignore_index: int,
    weight: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    normalizer: float | Tensor | None,
    vocab_size: int | None,
    recompute: bool,
    backend: str,
) -> ops.LossOf | None:
    """What may be made beside others of its base; None: a single call. Raises what that would of its arguments."""
    options = weight, label_smoothing, z_loss, reduction, normalizer
    given, terms, normalizer = checked_loss(base, aux, target, ignore_index, vocab_size, backend, *options)
    if given.backend == "reference" or reduction == "none" or forward_ad._current_level >= 0:
        return None
    call = call_of(given, weight, target.device)
    has_gradient = autograd.requires_grad(call)
    if autograd.is_better_from_rows(call, has_gradient, recompute) or not call.is_plain():
        return None
    if has_gradient and any(autograd.needs_of(call)[: 4 * len(base)]):
        return None
    return ops.LossOf(call, normalizer, terms, autograd.needs_of(call) if has_gradient else ())


def _losses(given: list[ops.LossOf], return_stats: bool) -> list[Any]:
    wanted = OF_STATS if return_stats else 0
    results: list[Any] = []
    for (call, normalizer, terms, needs), made in zip(given, ops.losses(given, wanted), strict=True):
        loss, fields = autograd.loss_in_one_pass(call, bool(needs), normalizer, terms, wanted, made)
        results.append((loss, rows.finished_stats(fields)) if return_stats else loss)
    return results
