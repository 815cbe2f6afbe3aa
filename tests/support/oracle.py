"""Float64 oracle of losses, row statistics and gradients, and the error that an implementation may make in each.

Everything is computed on the exact input values, so a bf16 input is what bf16 holds. Tolerances are the error model of
the package: with z the relative logit s - max(s), log d the log of the exp-sum and eps that of the compute dtype
(float32, or float64 if a source is),

    loss       4 eps (1 + |z_y| + log d)
    gradient   8 eps (1 + |z_v| + log d) times the size of each of its terms, then one ulp of the tensor's dtype
    the sum    half an eps of |base| + |aux| for each rounding on the way into s: one for the addition, two for a
               scale (its own rounding and the product), four for a softcap (a division, tanh and a product)

and the smallest normal number, below which exp may flush. The true class's -G (1 - p_y) is the sum of the other
classes' terms and may be wrong by the sum of their errors; plain torch, which forms p_y - 1, may add the error of p_y.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from auxkernels import Head, Logits, LogitStats, aux_cross_entropy

F64 = torch.float64
GRADIENT_FLOOR = {torch.float16: 2.0**-24}  # the smallest fp16 number; elsewhere the smallest normal one


@dataclass
class Case:
    """One call of `aux_cross_entropy`."""

    base: Any
    aux: Any
    target: Tensor | None
    options: dict = field(default_factory=dict)

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that require a gradient, by where they are."""
        found = {}
        for side, given in (("base", self.base), ("aux", self.aux)):
            for i, source in enumerate(sources_of(given)):
                found |= tensors_of(source, f"{side}[{i}]")
        return {name: tensor for name, tensor in found.items() if tensor.requires_grad}

    def run(self, backend: str, upstream: Tensor | None = None) -> dict[str, Tensor]:
        """The loss and the gradients of the leaves, by name."""
        loss = aux_cross_entropy(self.base, self.aux, self.target, backend=backend, **self.options)
        leaves = self.leaves()
        if not leaves:
            return {"loss": loss}
        grads = torch.autograd.grad(loss, list(leaves.values()), upstream)
        return {"loss": loss.detach(), **dict(zip(leaves, grads, strict=True))}


def sources_of(given) -> list[Logits | Head]:
    if given is None:
        return []
    if isinstance(given, (list, tuple)):
        return [source for item in given for source in sources_of(item)]
    return [Logits(given) if isinstance(given, Tensor) else given]


def tensors_of(source: Logits | Head, place: str) -> dict[str, Tensor]:
    """What of a source may get a gradient, by name."""
    if isinstance(source, Logits):
        found = {place: source.values}
    else:
        found = {f"{name} of {place}": getattr(source, name) for name in ("hidden", "weight", "bias")}
    found[f"scale of {place}"] = source.scale
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


# -- facts of every row ------------------------------------------------------------------------------------------------


@dataclass
class Term:
    """One source in float64: scale * bent, with bent = softcap(values)."""

    values: Tensor
    scale: Tensor | float
    bent: Tensor
    slope: Tensor | float
    roundings: int

    def logits(self) -> Tensor:
        return self.scale * self.bent


def term_of(source: Logits, vocab_size: int) -> Term:
    z = source.values.detach()[..., :vocab_size].to(F64)
    scale, bent, slope, roundings = source.scale, z, 1.0, 1
    if source.softcap is not None:
        bent, slope = source.softcap * torch.tanh(z / source.softcap), torch.cosh(z / source.softcap) ** -2
        roundings += 4
    if isinstance(scale, Tensor):
        scale = scale.detach().to(F64)
        scale = scale.unsqueeze(-1) if scale.dim() else scale
        roundings += 2
    elif scale != 1.0:
        roundings += 2
    return Term(z, scale, bent, slope, roundings)


def zero_where_p_is(p: Tensor, z: Tensor) -> Tensor:
    return torch.where(p == 0, 0.0, z)


class Softmax:
    """Softmax of one sum of terms: z relative to the maximum, p, log d, and the relative error of each p."""

    def __init__(self, terms: list[Term], eps: float):
        self.s = sum(term.logits() for term in terms)
        size = sum(term.logits().abs() * term.roundings for term in terms)
        size = torch.where(size.isfinite(), size, 0.0)
        self.max = self.s.amax(-1, keepdim=True)
        self.z = self.s - self.max
        self.e = self.z.exp()
        self.d = self.e.sum(-1, keepdim=True)
        # d - 1 without the 1 of a largest: beside it float64 would lose what a confident row's entropy is made of
        largest = self.s.argmax(-1, keepdim=True)
        self.log_d = torch.where(self.max.isfinite(), self.e.scatter(-1, largest, 0.0).sum(-1, keepdim=True), torch.nan)
        self.log_d = self.log_d.log1p()
        self.p = self.e / self.d
        condition = 1 + torch.where(self.z.isfinite(), self.z.abs(), 0.0) + self.log_d
        self.sum_error = eps / 2 * (size + (self.p * size).sum(-1, keepdim=True))
        self.loss_error = 4 * eps * condition + self.sum_error  # absolute, of log p
        self.p_error = 8 * eps * condition + self.sum_error  # relative, of p
        self.mean = (self.p * zero_where_p_is(self.p, self.z)).sum(-1, keepdim=True)
        spread = zero_where_p_is(self.p, self.z).abs() + self.mean.abs() + 1
        self.mean_error = (self.p * spread * self.p_error).sum(-1, keepdim=True)

    def nll(self, onehot: Tensor) -> Tensor:
        """[*, 1]; log1p where the target is the likeliest class, so that 1e-12 is 1e-12 and not a rounding error."""
        z_y = torch.where(onehot, self.z, 0.0).sum(-1, keepdim=True)
        rest = torch.where(onehot, 0.0, self.e).sum(-1, keepdim=True)
        return torch.where(z_y == 0, torch.log1p(rest), self.log_d - z_y)

    def residual(self, onehot: Tensor) -> Tensor:
        """p - onehot, with the true class as minus the sum of the others."""
        rest = torch.where(onehot, 0.0, self.p).sum(-1, keepdim=True)
        return torch.where(onehot, -rest, self.p)


class Rows:
    """Everything about the rows of a case that a loss, a statistic or a gradient is made of. Row numbers are [*, 1]."""

    def __init__(self, case: Case):
        base, aux = sources_of(case.base), sources_of(case.aux)
        widths = [source.values.shape[-1] for source in base + aux]
        self.vocab_size = case.options.get("vocab_size") or widths[0]
        is_double = any(source.values.dtype == F64 for source in base + aux)
        self.compute = F64 if is_double else torch.float32
        # float64 results are compared with an oracle that makes the same errors itself
        self.eps = torch.finfo(self.compute).eps * (2 if is_double else 1)
        self.base_terms = [term_of(source, self.vocab_size) for source in base]
        self.aux_terms = [term_of(source, self.vocab_size) for source in aux]
        self.sum = Softmax(self.base_terms + self.aux_terms, self.eps)
        self.base = Softmax(self.base_terms, self.eps)
        shape, device = self.sum.s.shape, self.sum.s.device
        if case.target is None:
            self.ignored = torch.zeros(*shape[:-1], 1, dtype=torch.bool, device=device)
            self.onehot = torch.zeros(shape, dtype=torch.bool, device=device)
        else:
            y = case.target.long().unsqueeze(-1)
            self.ignored = y == case.options.get("ignore_index", -100)
            self.onehot = (torch.arange(self.vocab_size, device=device) == y) & ~self.ignored
        weight = case.options.get("weight")
        self.weight = torch.ones(self.vocab_size, dtype=F64, device=device) if weight is None else weight.to(F64)
        self.weight_y = (self.onehot * self.weight).sum(-1, keepdim=True)

    def at_target(self, z: Tensor) -> Tensor:
        return torch.where(self.onehot, z, 0.0).sum(-1, keepdim=True)

    def rank_bounds(self) -> tuple[Tensor, Tensor]:
        """Fewest and most classes that may have a greater sum than the target's, [*]; -1 where there is no rank.

        The sums of two classes may both be wrong, so that what is less than that apart counts or does not.
        """
        s, error = self.sum.s, torch.where(self.sum.s.isfinite(), self.sum.sum_error, 0.0)
        ahead = s - torch.where(self.onehot, s, -torch.inf).amax(-1, keepdim=True)
        ahead = torch.where(ahead.isnan(), 0.0, ahead)  # -inf beside a target of -inf
        unsure = torch.where(s.isfinite(), error + self.at_target(error), 0.0)
        is_ranked = self.onehot.any(-1) & self.sum.log_d.squeeze(-1).isfinite()
        counts = (ahead > unsure).sum(-1), ((ahead > 0) | ((ahead > -unsure) & ~self.onehot)).sum(-1)
        return tuple(torch.where(is_ranked, count, -1) for count in counts)


# -- loss --------------------------------------------------------------------------------------------------------------


def divisor(case: Case, rows: Rows) -> Tensor | float:
    if case.options.get("reduction", "mean") != "mean":
        return 1.0
    given = case.options.get("normalizer")
    if given is not None:
        return given.detach().to(F64).to(rows.ignored.device) if isinstance(given, Tensor) else float(given)
    return (~rows.ignored).sum().to(F64) if case.options.get("weight") is None else rows.weight_y.sum()


def row_loss(case: Case, rows: Rows) -> tuple[Tensor, Tensor]:
    """Loss of each row and its tolerance, [*]."""
    eps_smooth, z_loss = case.options.get("label_smoothing", 0.0), case.options.get("z_loss", 0.0)
    s = rows.sum
    loss = (1 - eps_smooth) * rows.weight_y * s.nll(rows.onehot)
    error = (1 - eps_smooth) * rows.weight_y * rows.at_target(s.loss_error)
    if eps_smooth:
        share = eps_smooth / rows.vocab_size * rows.weight
        loss = loss + (share * (s.log_d - s.z)).sum(-1, keepdim=True)
        error = error + (share * s.loss_error).sum(-1, keepdim=True)
    if z_loss:
        lse, size = s.max + s.log_d, s.max.abs() + s.log_d
        lse_error = 4 * rows.eps * (1 + size) + (s.p * s.sum_error).sum(-1, keepdim=True)
        loss = loss + z_loss * lse.square()
        error = error + 2 * z_loss * size * lse_error
    return (torch.where(rows.ignored, 0.0, t).squeeze(-1) for t in (loss, error))


def expected_loss(case: Case, rows: Rows) -> tuple[Tensor, Tensor]:
    loss, error = row_loss(case, rows)
    if case.options.get("reduction", "mean") == "none":
        return loss, error
    by = divisor(case, rows)
    order = (2 + loss.numel() ** 0.5) * rows.eps  # of a float32 sum over the rows, and of the division
    return loss.sum() / by, (error.sum() + order * loss.abs().sum()) / abs(by)


# -- gradients: every one has the form of auxkernels/cross_entropy/ops.py ----------------------------------------------


@dataclass
class Coefficients:
    """One number per row, [*, 1], for each term of the gradient; `A_error` is how wrong A may be, absolutely."""

    A: Tensor | float = 0.0
    C: Tensor | float = 0.0
    D: Tensor | float = 0.0
    Q: Tensor | float = 0.0
    G: Tensor | float = 0.0
    S: Tensor | float = 0.0
    Q_b: Tensor | float = 0.0
    B_b: Tensor | float = 0.0
    A_size: Tensor | float | None = None
    A_error: Tensor | float = 0.0

    def size(self) -> Tensor | float:
        return sum(abs(getattr(self, name)) for name in ("A", "C", "D", "Q", "G", "S", "Q_b", "B_b"))


def loss_coefficients(case: Case, rows: Rows, upstream: Tensor | None) -> Coefficients:
    eps_smooth, z_loss = case.options.get("label_smoothing", 0.0), case.options.get("z_loss", 0.0)
    c = torch.ones((), dtype=F64, device=rows.ignored.device) if upstream is None else upstream.to(F64)
    c = (c / divisor(case, rows)).expand(rows.ignored.shape[:-1]).unsqueeze(-1)
    smooth = c * eps_smooth / rows.vocab_size
    lse, size = rows.sum.max + rows.sum.log_d, rows.sum.max.abs() + rows.sum.log_d
    return Coefficients(
        G=c * (1 - eps_smooth) * rows.weight_y,
        A=smooth * rows.weight.sum() + 2 * c * z_loss * lse,
        A_size=abs(smooth) * rows.weight.sum() + abs(2 * c * z_loss) * (1 + size),
        S=-smooth,
    )


def source_gradients(rows: Rows, k: Coefficients, confident: bool) -> tuple:
    """(ds, error) and (what the base's sources get on top, error)."""
    s, b, eps = rows.sum, rows.base, rows.eps
    z, z_b = zero_where_p_is(s.p, s.z), zero_where_p_is(s.p, b.z)
    others = torch.where(rows.onehot, 0.0, s.p * s.p_error)
    residual_error = torch.where(rows.onehot, others.sum(-1, keepdim=True), others)
    if not confident:
        residual_error = residual_error + torch.where(rows.onehot, s.p * s.p_error, 0.0)
    a_size = abs(k.A) if k.A_size is None else k.A_size
    ds = s.p * (k.A + k.C * z + k.D * z_b) + k.Q * b.p + k.G * s.residual(rows.onehot) + k.S * rows.weight
    error = (
        s.p * s.p_error * (a_size + abs(k.C * z) + abs(k.D * z_b))
        + s.p * (k.A_error + abs(k.C) * s.p_error + abs(k.D) * b.p_error)
        + abs(k.Q) * b.p * b.p_error
        + abs(k.G) * residual_error
        + abs(k.S) * rows.weight * 4 * eps
    )
    extra = k.D * s.p + k.Q_b * b.p + k.B_b * rows.onehot
    extra_error = abs(k.D) * s.p * s.p_error + abs(k.Q_b) * b.p * b.p_error + 4 * eps * abs(k.B_b) * rows.onehot
    return tuple(torch.where(rows.ignored, 0.0, t) for t in (ds, error, extra, extra_error))


def expected_gradients(case: Case, rows: Rows, k: Coefficients, *, confident: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Gradient and tolerance of every leaf of the case."""
    ds, error, extra, extra_error = source_gradients(rows, k, confident)
    found = {}
    sides = (("base", case.base, rows.base_terms), ("aux", case.aux, rows.aux_terms))
    for side, given, terms in sides:
        dz, dz_error = (ds + extra, error + extra_error) if side == "base" else (ds, error)
        for i, (source, term) in enumerate(zip(sources_of(given), terms, strict=True)):
            values = _value_gradient(source, term, dz, dz_error, rows, k)
            found[f"{side}[{i}]"] = values
            if isinstance(source.scale, Tensor):
                found[f"scale of {side}[{i}]"] = _scale_gradient(source, term, dz, dz_error, rows, k)
    return {name: found[name] for name in case.leaves()}


def _value_gradient(source, term: Term, dz, dz_error, rows: Rows, k: Coefficients):
    finfo = torch.finfo(source.values.dtype)
    scale = torch.as_tensor(term.scale, dtype=F64, device=dz.device)
    scale = torch.where(rows.ignored, 0.0, scale)  # an ignored row's scale may be NaN
    want = scale * term.slope * dz if source.softcap is not None else scale * dz
    want = torch.where(dz == 0, 0.0, want)
    bend_error = 8 * rows.eps * abs(dz) if source.softcap is not None else 0.0
    error = abs(scale) * (term.slope * dz_error + bend_error) + abs(want) * (finfo.eps + 2 * rows.eps)
    flushed = torch.finfo(rows.compute).tiny * abs(scale) * (1 + k.size())
    error = torch.where(rows.ignored, 0.0, error + flushed + GRADIENT_FLOOR.get(source.values.dtype, finfo.tiny))
    tail = source.values.shape[-1] - rows.vocab_size
    return tuple(torch.nn.functional.pad(t, (0, tail)) for t in (want, error))


def _scale_gradient(source, term: Term, dz, dz_error, rows: Rows, k: Coefficients):
    bent = torch.where(dz == 0, 0.0, term.bent)
    products = dz * bent
    want = products.sum(-1)
    error = (dz_error * abs(bent)).sum(-1) + (8 + 2 * term.roundings) * rows.eps * abs(products).sum(-1)
    if source.scale.dim() == 0:
        error = error.sum() + (2 + want.numel() ** 0.5) * rows.eps * abs(want).sum()
        want = want.sum()
    finfo = torch.finfo(source.scale.dtype)
    error = error + abs(want) * finfo.eps + finfo.tiny
    if source.scale.dim():
        error = torch.where(rows.ignored.squeeze(-1), 0.0, error)
    return want, error


def expected(case: Case, upstream: Tensor | None = None, *, confident: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """What `case.run` should return: value and tolerance by name. `confident`: with the fused kernels' promise."""
    rows = Rows(case)
    k = loss_coefficients(case, rows, upstream)
    return {"loss": expected_loss(case, rows), **expected_gradients(case, rows, k, confident=confident)}


# -- comparison --------------------------------------------------------------------------------------------------------


def assert_close(name: str, got: Tensor, want: Tensor, error: Tensor) -> None:
    """Every element within its own tolerance; NaN where NaN is wanted, infinities equal."""
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, expected {list(want.shape)}"
    got = got.detach().to(F64)
    off = torch.where(want.isfinite(), (got - want).abs(), torch.where(got == want, 0.0, torch.inf))
    off = torch.where(want.isnan(), torch.where(got.isnan(), 0.0, torch.inf), off)
    bad = ~(off <= torch.where(want.isfinite(), error, 0.0))
    if bad.any():
        worst = int(torch.where(bad, (off / error).nan_to_num(torch.inf), -1.0).flatten().argmax())
        index = [int(i) for i in torch.unravel_index(torch.tensor(worst), bad.shape)]
        numbers = [float(t.flatten()[worst]) for t in (got, want, off, error.expand(off.shape))]
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} elements out of tolerance, worst at {index}: "
            "got {!r}, expected {!r}, off by {:.3e}, allowed {:.3e}".format(*numbers)
        )


def check(case: Case, impl, upstream: Tensor | None = None) -> dict[str, Tensor]:
    """Run a case and hold loss and gradients against the oracle; returns what the implementation gave."""
    got = case.run(impl.backend, upstream)
    wanted = expected(case, upstream, confident=impl.backend != "reference")
    leaves = case.leaves()
    assert got["loss"].dtype == Rows(case).compute
    for name, (want, error) in wanted.items():
        assert_close(name, got[name], want, error)
        if name in leaves:
            assert got[name].dtype == leaves[name].dtype, f"{name}: gradient {got[name].dtype} for {leaves[name].dtype}"
    return got


# -- heads: the same call in plain torch, whole logits and autograd ----------------------------------------------------


class Plain:
    """A call with any sources as anyone would write it without the package.

    dtype   of all arithmetic; None: each tensor keeps its own, which is what eager torch does
    """

    def __init__(self, case: Case, dtype: torch.dtype | None = F64):
        self.case, self.dtype, self.copies = case, dtype, {}
        base, aux = sources_of(case.base), sources_of(case.aux)
        first = base[0].hidden if isinstance(base[0], Head) else base[0].values
        self.shape, options = first.shape[:-1], case.options
        widths = [source.weight.shape[0] if isinstance(source, Head) else source.values.shape[-1] for source in base]
        self.vocab_size = options.get("vocab_size") or widths[0]
        self.ignored = torch.zeros(self.shape, dtype=torch.bool, device=first.device)
        if case.target is not None:
            self.ignored = case.target.long() == options.get("ignore_index", -100)
        self.z_b = sum(map(self.logits, base))
        self.s = sum(map(self.logits, aux), self.z_b)

    def of(self, tensor: Tensor) -> Tensor:
        """The leaf that stands for a tensor, also where that is used twice; a scale is one number per row."""
        if id(tensor) not in self.copies:
            copy = tensor.detach() if self.dtype is None else tensor.detach().to(self.dtype)
            if not copy.dim():
                copy = copy.expand(self.shape)
            self.copies[id(tensor)] = copy.clone().requires_grad_()
        return self.copies[id(tensor)]

    def kept(self, rows: Tensor) -> Tensor:
        return rows.masked_fill(self.ignored.view([*self.shape, *[1] * (rows.dim() - len(self.shape))]), 0.0)

    def logits(self, source: Logits | Head) -> Tensor:
        if isinstance(source, Head):
            weight, bias = (None if t is None else self.of(t)[: self.vocab_size] for t in (source.weight, source.bias))
            z = self.product(source, self.kept(self.of(source.hidden)), weight, bias)
        else:
            z = self.kept(self.of(source.values)[..., : self.vocab_size])
        if source.softcap is not None:
            z = source.softcap * torch.tanh(z / source.softcap)
        if isinstance(source.scale, Tensor):
            return z * self.kept(self.of(source.scale)).unsqueeze(-1)
        return z * source.scale

    def product(self, source: Head, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = hidden @ weight.T
        return z if bias is None else z + bias

    def loss(self) -> Tensor:
        options, s = self.case.options, self.s.reshape(-1, self.vocab_size)
        y, kept = self.case.target.long().flatten(), ~self.ignored.flatten()
        weight, ignore_index = options.get("weight"), options.get("ignore_index", -100)
        weight = None if weight is None else weight.to(s.dtype)
        smoothing = options.get("label_smoothing", 0.0)
        rows = F.cross_entropy(s, y, weight, ignore_index=ignore_index, reduction="none", label_smoothing=smoothing)
        if options.get("z_loss"):
            rows = rows + options["z_loss"] * s.logsumexp(-1).square() * kept
        reduction, normalizer = options.get("reduction", "mean"), options.get("normalizer")
        if reduction == "none":
            return rows.view(self.shape)
        if reduction == "mean" and normalizer is None:
            normalizer = kept.sum() if weight is None else weight[y.masked_fill(~kept, 0)][kept].sum()
        return rows.sum() if reduction == "sum" else rows.sum() / normalizer

    def statistics(self) -> LogitStats:
        log_p, log_q = self.s.log_softmax(-1), self.z_b.log_softmax(-1)
        p, at_target, rank = log_p.exp(), (None, None), None
        if self.case.target is not None:
            y = self.case.target.long().masked_fill(self.ignored, 0).unsqueeze(-1)
            at_target = [self.kept(log.gather(-1, y).squeeze(-1)) for log in (log_p, log_q)]
            rank = (self.s > self.s.gather(-1, y)).sum(-1).masked_fill(self.ignored, -1)
        return LogitStats(
            *at_target,
            lse=self.kept(self.s.logsumexp(-1)),
            entropy=self.kept(-(p * log_p).sum(-1)),
            kl_to_base=self.kept((p * (log_p - log_q)).sum(-1)),
            argmax=self.s.argmax(-1).masked_fill(self.ignored, -1),
            base_argmax=self.z_b.argmax(-1).masked_fill(self.ignored, -1),
            target_rank=rank,
        )

    def gradients(self, result: Tensor, upstream: Tensor | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """Of the case's leaves, each with its size: its norm, or that of the numbers which a 0-d scale's sums up."""
        leaves, found = self.case.leaves(), {}
        copies = [self.of(tensor) for tensor in leaves.values()]
        upstream = None if upstream is None else upstream.to(result.dtype)
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        grads = torch.autograd.grad(result, copies, upstream, **options)
        for (name, tensor), grad in zip(leaves.items(), grads, strict=True):
            is_sum = grad.dim() > tensor.dim()
            found[name] = (grad.sum(), grad.double().abs().sum()) if is_sum else (grad, grad.double().norm())
        return found


def relative_error(got: Tensor, want: Tensor, size: Tensor | None = None) -> float:
    """Norm of the difference over the norm of what is wanted (or another size); 0 / 0 is 0."""
    assert got.shape == want.shape, f"shape {list(got.shape)}, expected {list(want.shape)}"
    off = float((got.detach().to(F64) - want.detach().to(F64)).norm())
    return off / max(float(want.detach().to(F64).norm() if size is None else size), 1e-300) if off else 0.0


HALVES = (torch.float16, torch.bfloat16)
