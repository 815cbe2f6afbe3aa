"""Float64 oracle of soft_embedding: the plain formula and its autograd, written apart from the reference.

Everything is computed on the exact input values. How far a result may be from that, by the norm of the error, the same
formula tells with the roundings of an implementation drawn at random (`Drawn`, after tolerance.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tolerance import NUM_DRAWS, SLACK, Draw, Product, Rounded, assert_within, limit_of, summed_in, tiny, unit
from torch import Tensor

from auxkernels import Head, Logits, chunk_settings, soft_embedding
from auxkernels.heads import rows as row_module
from auxkernels.soft_embedding import chunked, noise

F32, F64 = torch.float32, torch.float64
FLOATS = ("entropy", "max_prob", "sum_squares", "usage", "row_entropy")
STATS = (*FLOATS, "argmax")


def sources_of(given) -> list[Logits | Head]:
    if isinstance(given, (list, tuple)):
        return [source for item in given for source in sources_of(item)]
    return [Logits(given) if isinstance(given, Tensor) else given]


def first_of(given) -> Tensor:
    source = sources_of(given)[0]
    return source.hidden if isinstance(source, Head) else source.values


@dataclass
class Case:
    """One call of `soft_embedding`."""

    logits: Any
    table: Tensor
    options: dict = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """What may get a gradient, by name."""
        found = {}
        for i, source in enumerate(sources_of(self.logits)):
            names = ("hidden", "weight", "bias") if isinstance(source, Head) else ("values",)
            found |= {f"{name} {i}": getattr(source, name) for name in (*names, "scale")}
        found |= {"temperature": self.options.get("temperature"), "table": self.table}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def leaves(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.tensors().items() if tensor.requires_grad}

    def shape(self) -> torch.Size:
        return first_of(self.logits).shape[:-1]

    def compute(self) -> torch.dtype:
        values = [source.hidden if isinstance(source, Head) else source.values for source in sources_of(self.logits)]
        return F64 if any(t.dtype == F64 for t in (*values, self.table)) else F32

    def out_shape(self) -> tuple[int, ...]:
        return (*self.table.shape[:-2], *self.shape(), self.table.shape[-1])

    def call(self, backend: str) -> dict[str, Tensor]:
        """The mixture as "out", and the statistics."""
        out, stats = soft_embedding(self.logits, self.table, **self.options, return_stats=True, backend=backend)
        return {"out": out, **{name: getattr(stats, name) for name in STATS}}

    def run(self, backend: str, upstream: dict[str, Tensor]) -> dict[str, Tensor]:
        """Results of the call, and the gradients of the leaves as "grad <name>"."""
        if set(upstream) == {"out"}:  # the usual call, which makes no statistics
            results = {"out": soft_embedding(self.logits, self.table, **self.options, backend=backend)}
        else:
            results = self.call(backend)
        return {name: t.detach() for name, t in results.items()} | gradients(results, self.leaves(), upstream)

    def upstream(self, *names: str) -> dict[str, Tensor]:
        """Random upstream gradients, of "out" if no name is given."""
        device, K = first_of(self.logits).device, self.table.shape[-2]
        made = {}
        for name in names or ("out",):
            shape = {"out": self.out_shape(), "usage": (K,)}.get(name, self.shape())
            dtype = self.table.dtype if name == "out" else self.compute()
            size = max(self.shape().numel(), 1) if name == "usage" else 1
            made[name] = torch.randn(shape, dtype=F64).mul(size).to(device, dtype)
        return made


def gradients(results: dict, leaves: dict, upstream: dict, retain_graph=None) -> dict[str, Tensor]:
    used = [name for name in upstream if results[name].requires_grad]
    if not leaves or not used:
        return {f"grad {name}": None for name in leaves}
    grads = torch.autograd.grad(
        [results[name] for name in used],
        list(leaves.values()),
        [upstream[name].to(results[name].dtype) for name in used],
        allow_unused=True,
        retain_graph=retain_graph,
    )
    return {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}


# -- the formula -------------------------------------------------------------------------------------------------------


def kept_by(v: Tensor, top_k: int) -> Tensor:
    """Which of v are its k largest, the lowest label first among equals."""
    order = torch.sort(v, dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(v, dtype=torch.bool).scatter(-1, order[..., :top_k], True)


def allowed_by(v: Tensor, mask=None) -> Tensor:
    allowed = torch.ones_like(v, dtype=torch.bool) if mask is None else ~mask.expand_as(v)
    return allowed & (v.detach() != -torch.inf)


def choices_of(v: Tensor, mask=None, top_k=None) -> tuple[Tensor, Tensor]:
    """Which labels are allowed and kept, and the likeliest of each row."""
    allowed = allowed_by(v, mask)
    if top_k is not None:
        allowed = allowed & kept_by(v.detach().masked_fill(~allowed, -torch.inf), top_k)
    return allowed, v.detach().masked_fill(~allowed, -torch.inf).argmax(-1)  # not p's: two labels may have one p


def log_softmax(u: Tensor, best: Tensor) -> Tensor:
    """Relative to the largest, at `best`: where the other exponentials add up to less than 1, a log1p of their sum."""
    x = (u - u.gather(-1, best)).scatter(-1, best, 0.0)
    rest = x.exp().scatter(-1, best, 0.0).sum(-1, keepdim=True)
    return torch.where(rest < 1, x - rest.log1p(), torch.log_softmax(u, -1))


class Exact:
    """The arithmetic of the formula; `Drawn` errs in each of these as an implementation may."""

    def product(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(hidden, weight, bias)

    def scale(self, scale: Tensor | float, num_labels: int) -> Tensor | float:
        return scale.unsqueeze(-1) if isinstance(scale, Tensor) and scale.dim() else scale

    def rounded(self, z: Tensor, roundings: int) -> Tensor:
        return z

    def noise(self, noise: Tensor) -> Tensor:
        return noise

    def softmax(self, z: Tensor, T: Tensor | float, allowed: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
        """log p and p of scores relative to the largest, zeros where no label is allowed."""
        empty = ~allowed.any(-1, keepdim=True)
        u = (z / T).masked_fill(~allowed, -torch.inf).masked_fill(empty, 0.0)
        log_p = log_softmax(u, best.unsqueeze(-1)).masked_fill(~allowed, 0.0)
        return log_p, torch.where(allowed, log_p.exp(), 0.0)

    def mix(self, p: Tensor, table: Tensor, num_terms: int) -> Tensor:
        """[*, K] with [K, D]."""
        return p @ table

    def pick(self, chosen: Tensor, table: Tensor) -> Tensor:
        return chosen @ table

    def statistic(self, name: str, value: Tensor, num_terms: int) -> Tensor:
        return value

    def gradient(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        return grad

    def stored(self, out: Tensor) -> Tensor:
        return out


def formula(
    v: Tensor, table: Tensor, T: Tensor | float, hard=False, mask=None, top_k=None, arithmetic=None, chosen_by=None
) -> dict[str, Tensor]:
    """v [*, K] with the noise in it, table [K, D] or [L, K, D].

    chosen_by   scores of which top_k keeps the largest, and those that a hard choice is made by: both are v if None
    """
    by = arithmetic or Exact()
    T = T.unsqueeze(-1) if isinstance(T, Tensor) and T.dim() else T
    kept_of, chosen_of = chosen_by or (v, v)
    allowed, best = choices_of(kept_of, mask, top_k)
    whole, choice = allowed_by(kept_of, mask), choices_of(chosen_of, mask)[1]  # no top_k: noise may choose what it cuts
    empty = ~allowed.any(-1, keepdim=True)
    largest = v.detach().gather(-1, best.unsqueeze(-1)).masked_fill(empty, 0.0)
    # relative, or the gradient of T would cancel even in float64
    log_p, p = by.softmax(torch.where(allowed, v - largest, 0.0), T, allowed, best)
    of_whole = (log_p, p) if top_k is None else by.softmax(torch.where(whole, v - largest, 0.0), T, whole, best)
    K, D = table.shape[-2:]
    chosen = F.one_hot(choice, K).to(p.dtype).masked_fill(empty, 0.0)
    joined = table if table.dim() == 2 else table.transpose(0, 1).reshape(K, -1)
    num_terms = min(top_k or K, K)
    if hard:
        soft = by.mix(p, joined.detach(), num_terms)
        out = by.pick(chosen, joined) + (soft - soft.detach())
    else:
        out = by.mix(p, joined, num_terms)
    if table.dim() == 3:
        out = out.view(*out.shape[:-1], -1, D).movedim(-2, 0)
    rows = p.reshape(-1, K)
    return {
        "out": out,
        "entropy": by.statistic("entropy", -(p * log_p).sum(-1), 1),
        "row_entropy": by.statistic("row_entropy", -(of_whole[0] * of_whole[1]).sum(-1), 1),
        "max_prob": by.statistic("max_prob", (p * F.one_hot(best, K)).sum(-1), 1),
        "argmax": choice.masked_fill(empty.squeeze(-1), -1),
        "sum_squares": by.statistic("sum_squares", p.square().sum(-1), K),
        "usage": by.statistic("usage", rows.sum(0) / max(len(rows), 1), len(rows)),
    }


def noise_of(case: Case, dtype=F64) -> Tensor | float:
    """gumbel * noise of the case's rows, 0 without noise."""
    gumbel, seed = case.options.get("gumbel", 0.0), case.options.get("seed")
    if not isinstance(gumbel, Tensor) and gumbel == 0.0:
        return 0.0
    seed = torch.as_tensor(seed, dtype=torch.int64).to(first_of(case.logits).device)
    scale = gumbel.to(dtype) if isinstance(gumbel, Tensor) else gumbel
    K = case.table.shape[-2]
    return scale * noise.gumbel(case.shape().numel(), K, seed, dtype).view(*case.shape(), K)


class Called(NamedTuple):
    """A call of the formula: the scores of the probabilities and those of the choice, which may have noise of its own;
    results and gradients, by name."""

    scores: tuple[Tensor, Tensor]
    found: dict[str, Tensor | None]


def called(case: Case, upstream: dict[str, Tensor], arithmetic=None, chosen_by: tuple | None = None) -> Called:
    """In float64."""
    by, copies = arithmetic or Exact(), {}

    def wide(tensor):
        if not isinstance(tensor, Tensor):
            return tensor
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().to(F64).requires_grad_(tensor.requires_grad)
        return copies[id(tensor)]

    sources, terms = sources_of(case.logits), []
    for source in sources:
        roundings = 0
        if isinstance(source, Head):
            z = by.product(wide(source.hidden), wide(source.weight), wide(source.bias))
        else:
            z = wide(source.values)
        if source.softcap is not None:
            z, roundings = source.softcap * torch.tanh(z / source.softcap), 4
        scale = wide(source.scale)
        if isinstance(scale, Tensor) or scale != 1.0:
            z, roundings = by.scale(scale, z.shape[-1]) * z, roundings + 2
        terms.append(by.rounded(z, roundings))
    v = choice = by.rounded(sum(terms), len(sources) - 1)
    drawn = noise_of(case)
    if isinstance(drawn, Tensor):
        choice = by.rounded(v + by.noise(drawn), 1)
        v = v if case.options.get("clean_gradient") else choice
    scores = (v.detach(), choice.detach())
    options = {name: case.options.get(name) for name in ("mask", "top_k")} | {"hard": case.options.get("hard", False)}
    T = wide(case.options.get("temperature", 1.0))
    results = formula(v, wide(case.table), T, **options, arithmetic=by, chosen_by=chosen_by or scores)
    grads = summed_gradients(case, results, {name: wide(leaf) for name, leaf in case.leaves().items()}, upstream, by)
    results["out"] = by.stored(results["out"])
    return Called(scores, {name: t.detach() for name, t in results.items()} | grads)


def summed_gradients(case: Case, results: dict, copies: dict, upstream: dict, by: Exact) -> dict[str, Tensor | None]:
    """Each rounded to the leaf's dtype. With top_k the entropy of whole rows is another call: autograd adds up two."""
    is_apart = case.options.get("top_k") is not None
    paths = [{name: t for name, t in upstream.items() if (is_apart and name == "row_entropy") == own} for own in (0, 1)]
    found, summed = [gradients(results, copies, path, retain_graph=True) for path in paths], {}
    for name, leaf in case.leaves().items():
        parts = [grads[f"grad {name}"] for grads in found]
        parts = [by.gradient(part, leaf.dtype) for part in parts if part is not None]
        total = parts[0] if parts else None
        for part in parts[1:]:
            total = by.gradient(total + part, leaf.dtype)
        summed[f"grad {name}"] = total
    return summed


def expected(case: Case, upstream: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Results and gradients in float64."""
    return called(case, upstream).found


# -- what an implementation may make of it -----------------------------------------------------------------------------


class _Softmax(torch.autograd.Function):
    """log p and p as row kernels err, u the unit roundoff: log p by 4 u of itself, since it is a sum of two negative
    numbers; p by that and 4 u, and what exp flushes. Backward makes them anew, and each sum over the row is rounded."""

    @staticmethod
    def forward(ctx, z, T, allowed, best, u, draw):
        log_p, p = Exact().softmax(z, T, allowed, best)
        ctx.save_for_backward(log_p, p, T)
        ctx.u, ctx.draw = u, draw
        index = best.unsqueeze(-1)
        others = (p * (1 + log_p.abs())).scatter(-1, index, 0.0).sum(-1, keepdim=True)  # makes the largest's log p
        size = 4 * u * log_p.abs()
        size = size.scatter_add(-1, index, 8 * u * others)
        log_p = log_p + size * draw(p)
        return log_p, _Softmax.of_log(p, 4 * u + size, draw)

    @staticmethod
    def of_log(p, relative, draw):
        return p + (p * relative + (p != 0) * torch.finfo(F32).tiny) * draw(p)

    @staticmethod
    def backward(ctx, grad_log_p, grad_p):
        (log_p, p, T), u, draw = ctx.saved_tensors, ctx.u, ctx.draw
        p, log_p = _Softmax.of_log(p, 8 * u * (1 + log_p.abs()), draw), log_p + 4 * u * log_p.abs() * draw(p)
        terms = p * grad_p
        mean = terms.sum(-1, keepdim=True)
        size = u * p.shape[-1] ** 0.5 * terms.abs().sum(-1, keepdim=True) + u * mean.abs()
        mean = mean + size * draw(size)
        grad = p * (grad_p - mean) + 4 * u * p * (grad_p.abs() + mean.abs()) * draw(p)
        grad = grad + grad_log_p - p * grad_log_p.sum(-1, keepdim=True)
        terms = grad * log_p
        of_T = -terms.sum(-1, keepdim=True) / T
        of_T = of_T + u * p.shape[-1] ** 0.5 * (terms.abs().sum(-1, keepdim=True) / T) * draw(of_T)
        return grad / T * (1 + 2 * u * draw(p)), of_T, None, None, None, None


class Drawn(Exact):
    """With the roundings of an implementation drawn at random: see tolerance.py.

    products   dtype of products and of what enters them; None: what that of their operands means on the device
    """

    def __init__(self, case: Case, seed: int, products: torch.dtype | None = None):
        # float64 is compared with float64, which makes the same errors itself
        self.u = unit(case.compute()) * (2 if case.compute() == F64 else 1)
        self.case, self.draw, self.num_rows, self.products = case, Draw(seed), case.shape().numel(), products
        heads = [source.hidden for source in sources_of(case.logits) if isinstance(source, Head)]
        self.of_head = self._stored(heads[0]) if heads else None
        self.of_table = self._stored(case.table)

    def _stored(self, tensor: Tensor) -> torch.dtype:
        dtype = tensor.dtype if self.products is None or tensor.dtype == F64 else self.products
        # products of float16 are made in float32 on CPU
        return F32 if dtype == torch.float16 and tensor.device.type == "cpu" else dtype

    def product(self, hidden, weight, bias):
        hidden, weight = self._cast(hidden, self.of_head), self._cast(weight, self.of_head)
        bias = None if bias is None else self._cast(bias, self.of_head)
        return Product.apply(hidden, weight, bias, self.of_head, self.draw)

    def _cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if self.products is None:
            return tensor
        u = unit(F64 if dtype == F64 else self.products)
        return Rounded.apply(tensor, u * tensor.detach().abs(), u, self.draw)

    def scale(self, scale, num_labels):
        """Its gradient is a sum over the labels and, of a 0-d one, over the rows."""
        if not isinstance(scale, Tensor):
            return scale
        rows = self._of_rows(scale).unsqueeze(-1).expand(*self.case.shape(), num_labels)
        return Rounded.apply(rows, 0.0, self.u * num_labels**0.5, self.draw)

    def _of_rows(self, number: Tensor) -> Tensor:
        if number.dim():
            return number
        return Rounded.apply(number.expand(self.case.shape()), 0.0, self.u * self.num_rows**0.5, self.draw)

    def rounded(self, z, roundings):
        if not roundings:
            return z
        return Rounded.apply(z, roundings * self.u * z.detach().abs(), 2 * roundings * self.u, self.draw)

    def noise(self, noise):
        """Within 4 ulp, in float32 whatever the scores are."""
        gumbel = self.case.options["gumbel"]
        size = torch.as_tensor(gumbel, device=noise.device).abs().clamp(min=1e-30)
        return noise + 8 * unit(F32) * (noise.abs() + size) * self.draw(noise)

    def softmax(self, z, T, allowed, best):
        if isinstance(T, Tensor):
            T = self._of_rows(T).unsqueeze(-1) if not T.dim() else T
        else:
            T = torch.tensor(T, dtype=F64, device=z.device)
        return _Softmax.apply(z, T.expand(*z.shape[:-1], 1), allowed, best, self.u, self.draw)

    def mix(self, p, table, num_terms):
        """A library's product of probabilities in its dtype, or float32 sums over the labels that are kept."""
        dtype = self.of_table if num_terms == p.shape[-1] else summed_in(self.of_table)
        p = Rounded.apply(p, unit(dtype) * p.detach() + tiny(dtype), 0.0, self.draw)
        return Product.apply(p, self._cast(table, self.of_table).T, None, dtype, self.draw)

    def pick(self, chosen, table):
        """Values are copies, gradients sums over the rows that chose a label."""
        table = self._cast(table, self.of_table)
        out = chosen @ table.detach()
        summed = Product.apply(chosen, table.T, None, summed_in(self.of_table), self.draw)
        return out + (summed - summed.detach())

    def statistic(self, name, value, num_terms):
        size = self.u * (4 + num_terms**0.5) * value.detach().abs()
        return Rounded.apply(value, size, 4 * self.u, self.draw)

    def gradient(self, grad, dtype):
        return grad + unit(dtype) * grad.abs() * self.draw(grad)

    def stored(self, out):
        return self.gradient(out, self.products or self.case.table.dtype)


# -- comparison --------------------------------------------------------------------------------------------------------


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the error over the norm of what is wanted."""
    got, want = got.detach().to(F64), want.detach()
    return ((got - want).norm() / (want.norm() + 1e-30)).item()


def is_sure(case: Case) -> bool:
    """Whether every implementation chooses by the same scores, since they are one tensor that is read as it is."""
    sources = sources_of(case.logits)
    is_read = isinstance(sources[0], Logits) and sources[0].softcap is None and not isinstance(sources[0].scale, Tensor)
    return len(sources) == 1 and is_read and sources[0].scale == 1.0 and not isinstance(noise_of(case), Tensor)


def unsure_rows(case: Case, exact: Called, products: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Rows [*] in which scores that are rounded otherwise may keep or choose other labels, and by how much less a
    label's score may be than another's where it is chosen, [*]."""
    unsure = torch.zeros(exact.scores[0].shape[:-1], dtype=torch.bool, device=exact.scores[0].device)
    margin = torch.zeros_like(unsure, dtype=F64)
    if is_sure(case):
        return unsure, margin
    drawn = [called(case, {}, Drawn(case, seed, products)).scores for seed in draws_of(case)]
    for i, (v, counts) in enumerate(zip(exact.scores, ({1, case.options.get("top_k") or 1}, {1}), strict=True)):
        errors = [torch.where(v.isfinite(), other[i] - v, 0.0).abs().amax(-1) for other in drawn]
        margin = 2 * SLACK * torch.stack(errors).amax(0)
        ranked = v.masked_fill(~allowed_by(v, case.options.get("mask")), -torch.inf).sort(-1, descending=True).values
        for k in counts:
            if k < v.shape[-1]:
                unsure |= ranked[..., k - 1] - ranked[..., k] <= margin  # NaN of two -inf is not
    return unsure, margin


def blind_to(unsure: Tensor, upstream: dict[str, Tensor]) -> dict[str, Tensor]:
    """Upstream gradients that say nothing of the rows."""
    if not unsure.any():
        return upstream
    rows = {name: unsure.unsqueeze(-1) if name == "out" else unsure for name in upstream}
    return {name: t * 0 if name == "usage" else t.masked_fill(rows[name], 0.0) for name, t in upstream.items()}


def draws_of(case: Case) -> range:
    """Seeds: of large problems a few, whose norms of errors are all alike."""
    return range(NUM_DRAWS if case.shape().numel() * case.table.shape[-2] <= 1 << 17 else 4)


class Allowed(NamedTuple):
    """Float64's results of a case for an upstream, and those of drawn roundings."""

    exact: Called
    draws: list[dict[str, Tensor | None]]


def allowed_of(case: Case, upstream: dict[str, Tensor], products: torch.dtype | None = None) -> Allowed:
    exact = called(case, upstream)
    drawn = [called(case, upstream, Drawn(case, seed, products), exact.scores).found for seed in draws_of(case)]
    return Allowed(exact, drawn)


def check_results(
    case: Case,
    got: dict[str, Tensor],
    upstream: dict[str, Tensor],
    *,
    products: torch.dtype | None = None,
    unsure: Tensor | None = None,
    more: dict[str, float] | None = None,
    allowed: Allowed | None = None,
) -> None:
    """What an implementation gave, by name, within what roundings make of float64's, but for unsure rows' choices.

    more      norms of errors that are allowed beside those of the plan
    allowed   of the case and the upstream, where several results are compared with it
    """
    exact, draws = allowed or allowed_of(case, upstream, products)
    is_unsure = unsure is not None and bool(unsure.any())
    for name, value in got.items():
        if name == "argmax" or (name == "usage" and is_unsure and case.options.get("top_k")):
            continue
        want, others = exact.found[name], [found[name] for found in draws]
        if value is None or want is None:
            assert (value is None or not value.any()) and (want is None or not want.any()), name
            continue
        if name == "out" and is_unsure:
            value, want, *others = (t.masked_fill(unsure.unsqueeze(-1), 0.0) for t in (value, want, *others))
        limit = limit_of([float((other - want).norm()) for other in others])
        assert_within(name, value, want, limit + (more or {}).get(name, 0.0))


def check(case: Case, backend: str, upstream: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The case's results and gradients within what roundings may make of float64's; returns them."""
    upstream = case.upstream() if upstream is None else upstream
    exact, unsure, margin = called(case, {}), None, None
    if case.options.get("hard") or case.options.get("top_k") or set(upstream) != {"out"}:
        unsure, margin = unsure_rows(case, exact)
        upstream = blind_to(unsure, upstream)
    got = case.run(backend, upstream)
    assert got["out"].dtype == case.table.dtype and tuple(got["out"].shape) == case.out_shape()
    for name, value in got.items():
        if name.startswith("grad "):
            assert value is None or value.dtype == case.tensors()[name[5:]].dtype, name
        elif name not in ("out", "argmax"):
            assert value.dtype == case.compute(), name
    if "argmax" in got:
        assert_argmax(got["argmax"], exact, unsure, margin)
    check_results(case, got, upstream, unsure=unsure)
    return got


def assert_argmax(got: Tensor, exact: Called, unsure: Tensor, margin: Tensor) -> None:
    """Where rounding may choose another label, the score is the largest but for it."""
    want = exact.found["argmax"]
    assert got.dtype == torch.int64 and got.shape == want.shape and torch.equal(got[~unsure], want[~unsure])
    scores = exact.scores[1][unsure]
    gap = scores.gather(-1, want[unsure].unsqueeze(-1)) - scores.gather(-1, got[unsure].unsqueeze(-1))
    assert (gap.squeeze(-1) <= margin[unsure]).all()


def cut_lookup(monkeypatch, num_rows: int) -> None:
    """Work on as many chunks as there are whole `num_rows` in the batch, with a head or without."""
    monkeypatch.setattr(chunked, "CPU_BYTES", 1)
    monkeypatch.setattr(chunked, "CPU_MIN_ROWS", num_rows)
    monkeypatch.setattr(row_module, "MIN_ROWS", num_rows)
    monkeypatch.setattr(row_module, "DEFAULT_BYTES", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(chunk_settings, "num_bytes", None)
