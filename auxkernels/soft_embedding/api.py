"""Softmax-weighted lookup of label embeddings: the public function, its checks and its autograd."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import checks, dispatch
from ..autograd import apply, distinct, is_traced_in_transform, once, saveable
from ..sources import Head, SourceLike, as_sources
from . import chunked, plain_lookup, reference


@dataclass(frozen=True, eq=False)
class LookupStats:
    """Statistics of each row's label probabilities p, of the scores' leading shape, float32 (float64 if an input is).

    entropy      of p, nats
    max_prob     the largest p
    argmax       int64, its label: lowest on a tie, the first NaN wins; -1 for a row without an allowed label
    sum_squares  sum_k p_k**2, the inverse of the effective number of labels
    usage        [K], mean of p over all rows; 0 for no rows
    row_entropy  of the softmax over all allowed labels, nats: with top_k p is over the kept ones alone, and its entropy
                 says nothing of the rest. Costs a pass over the scores there; without top_k it is `entropy`.
    With clean_gradient p is without noise, but argmax is the chosen label.
    """

    entropy: Tensor
    max_prob: Tensor
    argmax: Tensor
    sum_squares: Tensor
    usage: Tensor
    row_entropy: Tensor


def soft_embedding(
    logits: SourceLike,
    table: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    hard: bool = False,
    gumbel: float | Tensor = 0.0,
    clean_gradient: bool = False,
    seed: int | Tensor | None = None,
    mask: Tensor | None = None,
    top_k: int | None = None,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LookupStats]:
    """softmax(logits / temperature) @ table: label embeddings mixed by predicted probabilities, which are never saved.

    logits        scores [*, K] floating point, `Logits`, `Head` or a sequence of these (their sum).
    table         [K, D], or tables [L, K, D] that share one softmax, floating point.
    temperature   positive number, or tensor of shape () or [*]; gets a gradient if it requires one. Divides scores
                  relative to their maximum, so that a small one costs no digits, as a scale of the scores would.
    hard          straight-through: the row of the likeliest label forward, the gradient of the soft mixture backward;
                  the table's gradient goes to the chosen rows only.
    gumbel        scale of the Gumbel noise that is added to the scores before the temperature; gets no gradient.
    clean_gradient  needs hard: the noise decides which label is chosen, and nothing else. The gradient of scores and
                  temperature is that of softmax(logits / temperature) @ table, as in vector quantisation. With
                  gumbel=temperature the choice is a sample from that softmax. The choice is among all allowed labels,
                  top_k cuts the gradient alone.
    seed          of the noise: int, 0-d int64 tensor, or None: drawn with torch's generator. The noise of a row and
                  label follows from it alone, on every device.
    mask          bool, [*, K] or [K], True: forbidden. A row without an allowed label gives zeros.
    top_k         mix the likeliest labels only, renormalised; the others get no gradient. Ties: lowest label.
    return_stats  also return `LookupStats` of the probabilities, differentiable but for the argmax.
    backend       "auto", or "reference", "native", "triton": that one or an error.
    Returns       [*, D] or [L, *, D] in the table's dtype (under autocast in autocast's).
    Raises        TypeError, ValueError: dtype, shape, device, option. RuntimeError: an unavailable backend; double
                  differentiation.
    Source        Cornille et al. 2024 (planner with soft labels); Jang et al. 2017 (Gumbel-softmax, straight-through);
                  Bengio et al. 2013 (straight-through).
    """
    has_option = hard is not False or mask is not None or top_k is not None or return_stats is not False
    has_option = has_option or clean_gradient is not False
    is_plain = not has_option and type(gumbel) in (float, int) and gumbel == 0
    if is_plain and plain_lookup.serves(logits, table, temperature, seed, backend):
        return plain_lookup.lookup(logits, table, temperature)
    problem = _problem(logits, table, temperature, hard, gumbel, clean_gradient, seed, mask, top_k, backend)
    if problem.backend == "reference":
        mixture, stats = reference.soft_embedding(
            problem.sources,
            table,
            temperature=problem.options.temperature,
            hard=problem.hard,
            gumbel=problem.options.gumbel,
            clean_gradient=problem.clean_gradient,
            seed=problem.seed,
            mask=mask,
            top_k=problem.top_k or None,
            autocast=problem.autocast,
        )
        return (mixture, LookupStats(**stats)) if return_stats else mixture
    mixture, fields = _run(problem, _STATS if return_stats else 0)
    if not return_stats:
        return mixture
    return mixture, LookupStats(**fields, row_entropy=_row_entropy(problem) if problem.top_k else fields["entropy"])


# -- arguments ---------------------------------------------------------------------------------------------------------


class _Problem(NamedTuple):
    """Checked arguments, numbers as the op takes them."""

    sources: list
    options: checks.LookupOptions
    parts: tuple
    softcaps: tuple[float, ...]
    table: Tensor
    temperature: Tensor | None
    gumbel: Tensor | None
    seed: Tensor | None
    mask: Tensor | None
    top_k: int
    hard: bool
    clean_gradient: bool  # and there is noise
    autocast: torch.dtype | None
    backend: str

    def constants(self) -> tuple:
        return self.softcaps, self.autocast, self.top_k, self.hard, self.backend

    def requires_grad(self) -> bool:
        if forward_ad._current_level >= 0:  # a dual number: autograd says that it has no forward mode here
            return True
        tensors = (*self.parts, self.temperature, self.table)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            return True
        return is_traced_in_transform()


def _problem(logits, table, temperature, hard, gumbel, clean_gradient, seed, mask, top_k, backend) -> _Problem:
    sources = as_sources("logits", logits)
    checks.tables(table)
    shape, device = checks.leading("logits", sources[0])
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    widths, compute = [], torch.float64 if table.dtype == torch.float64 else torch.float32
    for i, source in enumerate(sources):
        name = "logits" if len(sources) == 1 else f"logits[{i}]"
        width, dtype = checks.source(name, source, shape, device, autocast)
        widths.append((name, width))
        if dtype == torch.float64:
            compute = dtype
    num_labels = checks.common_width(widths, None)
    checks.table_of(table, num_labels, device)
    options = checks.lookup_options(temperature, hard, gumbel, seed, mask, top_k, shape, num_labels, device)
    temperature, hard, gumbel, seed, top_k = options
    if type(temperature) is float:
        temperature = _in_range(temperature, compute)
    clean_gradient = checks.gradient_option(clean_gradient, hard)
    backend = dispatch.resolve(backend, device, compute)
    has_noise = isinstance(gumbel, Tensor) or gumbel != 0
    parts: list[Tensor | None] = []
    for source in sources:
        is_head = isinstance(source, Head)
        parts += (source.hidden, source.weight, source.bias) if is_head else (source.values, None, None)
        scale = source.scale if isinstance(source.scale, Tensor) or source.scale != 1.0 else None
        parts.append(_number(scale, compute, device))
    is_plain = not isinstance(temperature, Tensor) and temperature == 1.0
    return _Problem(
        sources,
        options,
        tuple(parts),
        tuple(float(source.softcap or 0.0) for source in sources),
        table,
        None if is_plain else _number(temperature, compute, device),
        _number(gumbel, compute, device) if has_noise else None,
        _seed(seed, device) if has_noise else None,
        mask,
        top_k,
        hard,
        clean_gradient and has_noise,
        autocast,
        backend,
    )


def _in_range(temperature: float, compute: torch.dtype) -> float:
    """A temperature that the compute dtype has: neither rounded to 0 nor, if it is not infinite, beyond the largest."""
    finfo = torch.finfo(compute)
    return max(temperature, finfo.smallest_normal) if temperature <= finfo.max else math.inf


def _number(value: float | Tensor | None, compute: torch.dtype, device: torch.device) -> Tensor | None:
    if isinstance(value, Tensor):
        return value if value.dtype == compute else value.to(compute)
    return dispatch.number_tensor(value, compute, device)


def _seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if seed is None:  # drawn here, so that checkpointing and graph replay draw it again
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed.to(device=device, dtype=torch.int64)
    return torch.full((), seed, dtype=torch.int64, device=device)


# -- autograd ----------------------------------------------------------------------------------------------------------

_STATS = chunked.mask_of("entropy", "max_prob", "sum_squares", "usage", "argmax")
_STATE = chunked.mask_of("max", "log_denom", "argmax")
_DIFFERENTIABLE = ("entropy", "max_prob", "sum_squares", "usage")


def _names(wanted: int) -> list[str]:
    return [name for i, name in enumerate(chunked.OUTPUTS) if wanted >> i & 1]


def _arguments(constants: tuple, parts, table, temperature, gumbel, seed, mask) -> tuple:
    """The leading arguments of the ops."""
    softcaps, autocast, top_k, hard, _ = constants
    return list(parts), list(softcaps), autocast, table, temperature, gumbel, seed, mask, top_k, hard


def _run(problem: _Problem, wanted: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The mixture and the wanted fields by name."""
    tensors = (*problem.parts, problem.temperature, problem.table)
    constants = problem.constants()
    numbers = (problem.gumbel, problem.seed, problem.mask)
    if problem.requires_grad():
        numbers = tuple(saveable(None if t is None else t.detach()) for t in numbers)
        function = _CleanStraightThrough if problem.clean_gradient else _SoftEmbedding
        mixture, *fields = apply(function, "soft_embedding", constants, wanted, *numbers, *distinct(tensors))
    elif problem.clean_gradient:
        mixture, chosen = _chosen_rows(constants, tensors, *numbers)
        given = _clean_fields(constants, tensors, problem.mask, wanted) if wanted else {}
        fields = [chosen if name == "argmax" else value for name, value in given.items()]
    else:
        arguments = _arguments(constants, problem.parts, problem.table, problem.temperature, *numbers)
        mixture, *fields = chunked.forward(*arguments, wanted, problem.backend)
    return mixture, dict(zip(_names(wanted), fields, strict=True))


def _first_column(table: Tensor) -> Tensor:
    """A table for calls whose mixture nobody reads."""
    return table.detach().narrow(-1, 0, min(1, table.shape[-1]))


def _row_entropy(problem: _Problem) -> Tensor:
    """The entropy of the softmax that the gradient is of, without top_k."""
    table = _first_column(problem.table)
    whole = problem._replace(table=table, top_k=0, hard=True, clean_gradient=False)  # hard: no product with the table
    if problem.clean_gradient:
        whole = whole._replace(gumbel=None, seed=None)
    return _run(whole, chunked.mask_of("entropy"))[1]["entropy"]


class _SoftEmbedding(torch.autograd.Function):
    """Row state is saved, probabilities are made again: any upstream gradients, as often as wanted."""

    @staticmethod
    def forward(ctx, constants, wanted, gumbel, seed, mask, *tensors):
        *parts, temperature, table = tensors
        saved = wanted | _STATE | (chunked.mask_of("labels") if constants[2] else 0)
        arguments = _arguments(constants, parts, table, temperature, gumbel, seed, mask)
        mixture, *outputs = chunked.forward(*arguments, saved, constants[-1])
        fields = dict(zip(_names(saved), outputs, strict=True))
        state = [fields.get(name) for name in ("max", "log_denom", "argmax", "labels")]
        ctx.save_for_backward(gumbel, seed, mask, *state, *tensors)
        ctx.constants, ctx.wanted = constants, wanted
        ctx.set_materialize_grads(False)
        # a copy: what is saved must not be what its user may write
        given = {name: fields[name].clone() if name == "argmax" else fields[name] for name in _names(wanted)}
        ctx.mark_non_differentiable(*(t for name, t in given.items() if name not in _DIFFERENTIABLE))
        return (mixture, *given.values())

    @staticmethod
    def backward(ctx, grad, *of_fields):
        gumbel, seed, mask, *state_and_tensors = ctx.saved_tensors
        state, tensors = state_and_tensors[:4], state_and_tensors[4:]
        *parts, temperature, table = tensors
        given = dict(zip(_names(ctx.wanted), of_fields, strict=True))
        upstream = [given.get(name) for name in _DIFFERENTIABLE]
        needs = list(ctx.needs_input_grad[5:])
        grads: list = [None] * len(needs)
        if grad is not None or any(t is not None for t in upstream):
            arguments = _arguments(ctx.constants, parts, table, temperature, gumbel, seed, mask)
            made = iter(chunked.backward(*arguments, *state, grad, upstream, needs, ctx.constants[-1]))
            grads = [next(made) if need else None for need in needs]
            for i in (*range(3, len(parts), 4), len(parts)):  # scales and the temperature
                if grads[i] is not None and tensors[i].dim() == 0:
                    grads[i] = grads[i].sum()
        return (*[None] * 5, *once("soft_embedding", grads, (*tensors, grad, *of_fields)))


# -- a noisy choice with the gradient of the softmax without noise -----------------------------------------------------


def _choice(constants: tuple, tensors, gumbel, seed, mask) -> tuple:
    """The leading arguments of the ops for the noisy choice, which is among all labels."""
    softcaps, autocast, _, hard, backend = constants
    *parts, temperature, table = tensors
    return _arguments((softcaps, autocast, 0, hard, backend), parts, table, temperature, gumbel, seed, mask)


def _chosen_rows(constants: tuple, tensors, gumbel, seed, mask) -> list[Tensor]:
    """The chosen labels' rows of the table, and these labels."""
    choice = _choice(constants, tensors, gumbel, seed, mask)
    return chunked.forward(*choice, chunked.mask_of("argmax"), constants[-1])


def _clean_fields(constants: tuple, tensors, mask, wanted: int) -> dict[str, Tensor]:
    """The wanted fields of the softmax without noise."""
    *parts, temperature, table = tensors
    arguments = _arguments(constants, parts, _first_column(table), temperature, None, None, mask)
    _, *fields = chunked.forward(*arguments, wanted, constants[-1])
    return dict(zip(_names(wanted), fields, strict=True))


class _CleanStraightThrough(torch.autograd.Function):
    """Two lookups in one: the noisy one's rows and gradient of the table, the other one's gradient of the rest."""

    @staticmethod
    def forward(ctx, constants, wanted, gumbel, seed, mask, *tensors):
        mixture, chosen = _chosen_rows(constants, tensors, gumbel, seed, mask)
        saved = wanted | _STATE | (chunked.mask_of("labels") if constants[2] else 0)
        fields = _clean_fields(constants, tensors, mask, saved)
        state = [fields.get(name) for name in ("max", "log_denom", "argmax", "labels")]
        ctx.save_for_backward(gumbel, seed, mask, chosen, *state, *tensors)
        ctx.constants, ctx.wanted = constants, wanted
        ctx.set_materialize_grads(False)
        # a copy: what is saved must not be what its user may write
        given = {name: chosen.clone() if name == "argmax" else fields[name] for name in _names(wanted)}
        ctx.mark_non_differentiable(*(t for name, t in given.items() if name not in _DIFFERENTIABLE))
        return (mixture, *given.values())

    @staticmethod
    def backward(ctx, grad, *of_fields):
        gumbel, seed, mask, chosen, *state_and_tensors = ctx.saved_tensors
        state, tensors = state_and_tensors[:4], state_and_tensors[4:]
        *parts, temperature, table = tensors
        given = dict(zip(_names(ctx.wanted), of_fields, strict=True))
        upstream = [given.get(name) for name in _DIFFERENTIABLE]
        needs = list(ctx.needs_input_grad[5:])
        *needs_rest, needs_table = needs
        grads: list = [None] * len(needs)
        backend = ctx.constants[-1]
        if any(needs_rest) and (grad is not None or any(t is not None for t in upstream)):
            arguments = _arguments(ctx.constants, parts, table, temperature, None, None, mask)
            made = iter(chunked.backward(*arguments, *state, grad, upstream, [*needs_rest, False], backend))
            grads = [*(next(made) if need else None for need in needs_rest), None]
            for i in (*range(3, len(parts), 4), len(parts)):  # scales and the temperature
                if grads[i] is not None and tensors[i].dim() == 0:
                    grads[i] = grads[i].sum()
        if needs_table and grad is not None:
            arguments = _choice(ctx.constants, tensors, gumbel, seed, mask)
            # of the state it reads the label, and whether the row is a distribution, which noise does not change
            noisy = (*state[:2], chosen, None)
            of_table = [*(False for _ in needs_rest), True]
            (grads[-1],) = chunked.backward(*arguments, *noisy, grad, [None] * 4, of_table, backend)
        return (*[None] * 5, *once("soft_embedding", grads, (*tensors, grad, *of_fields)))
