"""Tolerances for what goes through products of the library, whose order of summation is the processor's to choose.

A rounding to a dtype multiplies by 1 + u x with |x| <= 1 and u its unit roundoff. A product of K terms, summed in
float32 (float64) in an order that nobody promises, errs by K u |a| @ |b| at worst; roundings being independent, by
about sqrt(K) u |a| @ |b|. `product_error` is the first, a bound for every element.

`Drawn` is a whole call in float64 with every rounding of its plan drawn at random: products of operands and results in
the heads' dtype, the sum of the sources and the row kernels in float32. The norm of the error that it shows over a few
draws, and how much that varies, tell what an implementation may show on any machine, for any numbers: of tensors with
many elements hardly more than the mean, of single numbers several times as much.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from oracle import F64, Case, Plain, sources_of, tensors_of
from torch import Tensor

from auxkernels import Head, LogitStats

NUM_DRAWS = 16
DEVIATIONS = 6  # above the mean: one in 10^7 of a normal number, and the deviation is known to a fifth only
SLACK = 1.5  # of float32 and 16-bit roundings that the plan does not name: what the contract grants beyond eager torch


def unit(dtype: torch.dtype) -> float:
    """Unit roundoff: half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def summed_in(*dtypes: torch.dtype) -> torch.dtype:
    return F64 if F64 in dtypes else torch.float32


def product_error(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """How far any library's a @ b may be from float64's, element by element; dtype: that of the result, a's if None.

    Any order of summation, and a factor of two for operands that are split or products that are rounded on their own.
    """
    size = a.detach().to(F64).abs() @ b.detach().to(F64).abs()
    exact = a.detach().to(F64) @ b.detach().to(F64)
    dtype = dtype or a.dtype
    return 2 * a.shape[-1] * unit(summed_in(a.dtype, dtype)) * size + unit(dtype) * exact.abs() + tiny(dtype)


# roundings of a row: the 8 (1 + |z| + log d) of oracle.py, logits up to 20 below the largest and thousands of classes
OF_A_ROW = 8 * 32


def assert_alike(got, want, roundings: float = OF_A_ROW) -> None:
    """Two roads to the same numbers, of which neither need be exact: tensors, or sequences or dicts of them.

    Each may be off by `roundings` of the largest number, since sums of as large ones may come out small, and by one of
    the less precise dtype; sums are made in float32 at least. Integers, infinities and NaN are the same.
    """
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        got, want = got.values(), want.values()
    if not isinstance(want, Tensor):
        for one, two in zip(got, want, strict=True):
            assert_alike(one, two, roundings)
        return
    if not want.is_floating_point():
        assert torch.equal(got, want)
        return
    own = max(unit(got.dtype), unit(want.dtype))
    finite = want.detach()[want.isfinite()].double()
    size = finite.abs().max().item() if finite.numel() else 0.0
    atol = 2 * roundings * min(own, unit(torch.float32)) * size + max(tiny(got.dtype), tiny(want.dtype))
    torch.testing.assert_close(got.double(), want.double(), rtol=2 * own, atol=atol, equal_nan=True)


def tiny(dtype: torch.dtype) -> float:
    """The smallest number that a result may be flushed below: fp16 gradients are subnormal, others are not."""
    return 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny


def tensors_in(case: Case) -> list[Tensor]:
    """All tensors of a case's sources."""
    sources = [source for given in (case.base, case.aux) for source in sources_of(given)]
    return [tensor for source in sources for tensor in tensors_of(source, "").values()]


class Draw:
    """Of a seed: numbers between -1 and 1, as many as a tensor has."""

    def __init__(self, seed: int):
        self.seed, self.generators = seed, {}

    def __call__(self, like: Tensor) -> Tensor:
        if like.device not in self.generators:
            self.generators[like.device] = torch.Generator(like.device).manual_seed(self.seed)
        uniform = torch.rand(like.shape, dtype=F64, device=like.device, generator=self.generators[like.device])
        return uniform.mul_(2).sub_(1).to(like.dtype)


class Rounded(torch.autograd.Function):
    """x with an error of its own, its gradient with a relative one; a size that is no tensor is 0."""

    @staticmethod
    def forward(ctx, x, size, relative, draw):
        ctx.relative, ctx.draw = relative, draw
        return x + size * draw(x) if isinstance(size, Tensor) else x.clone()

    @staticmethod
    def backward(ctx, grad):
        is_exact = not isinstance(ctx.relative, Tensor) and ctx.relative == 0
        return grad if is_exact else grad + ctx.relative * grad * ctx.draw(grad), None, None, None


class Product(torch.autograd.Function):
    """hidden [*, D] @ weight [V, D].T + bias; operands and results rounded to `dtype`, sums in float32 (float64)."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, dtype, draw):
        ctx.save_for_backward(hidden, weight)
        ctx.dtype, ctx.draw, ctx.has_bias = dtype, draw, bias is not None
        u, stored = unit(summed_in(dtype)), unit(dtype)
        z = hidden @ weight.T
        size = u * hidden.shape[-1] ** 0.5 * (hidden.abs() @ weight.abs().T) + stored * z.abs()
        if bias is not None:  # on the rounded product, unless the library adds it to the sum
            z = z + bias
            size = size + stored * z.abs()
        return z + size * draw(z)

    @staticmethod
    def backward(ctx, grad):
        (hidden, weight), draw = ctx.saved_tensors, ctx.draw
        u, stored = unit(summed_in(ctx.dtype)), unit(ctx.dtype)
        grad = grad + stored * grad * draw(grad)
        of_hidden = grad @ weight
        size = u * weight.shape[0] ** 0.5 * (grad.abs() @ weight.abs()) + stored * of_hidden.abs()
        of_hidden = of_hidden + size * draw(of_hidden)
        g, h = grad.reshape(-1, grad.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
        of_weight = g.T @ h
        # the products of the chunks are rounded one by one; of rows in no order, each is of the size of the root sum
        chunks = (g.square().T @ h.square()).sqrt() + of_weight.abs()
        size = u * len(h) ** 0.5 * (g.abs().T @ h.abs()) + stored * chunks
        of_weight = of_weight + size * draw(of_weight)
        of_bias = None
        if ctx.has_bias:
            of_bias = g.sum(0)
            of_bias = of_bias + u * len(g) ** 0.5 * g.abs().sum(0) * draw(of_bias)
        return of_hidden, of_weight, of_bias, None, None


def as_read(s: Tensor, u: float, draw: Draw, stored: float = 0.0) -> Tensor:
    """A sum of sources [*, V] as row kernels err: by oracle.py in log p 4 u (1 + |s - max| + log d), in p 8 u of these.

    Their sums over the row may have any order. stored: unit roundoff of the dtype that gradients are stored in.
    """
    z = s.detach() - s.detach().amax(-1, keepdim=True)
    condition = u * (1 + z.abs() + z.exp().sum(-1, keepdim=True).log())
    return Rounded.apply(s, 4 * condition, 8 * condition + u * s.shape[-1] ** 0.5 + stored, draw)


class Drawn(Plain):
    """The call in float64 with the roundings of an implementation, drawn anew for each instance.

    products   dtype of the heads' products and of what enters them; None: what the heads' dtype means on the device
    """

    def __init__(self, case: Case, seed: int, products: torch.dtype | None = None):
        self.products, self.draw = products, Draw(seed)
        compute = summed_in(*(tensor.dtype for tensor in tensors_in(case)))
        # float64 is compared with float64, which makes the same errors itself
        self.unit = unit(compute) * (2 if compute == F64 else 1)
        super().__init__(case)
        self.z_b, self.s = (as_read(s, self.unit, self.draw) for s in (self.z_b, self.s))

    def _stored(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        if self.products is not None and dtype != F64:
            return self.products
        # products of float16 are made in float32 on CPU
        return torch.float32 if dtype == torch.float16 and device.type == "cpu" else dtype

    def product(self, source: Head, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = self._stored(source.hidden.dtype, source.hidden.device)
        return Product.apply(hidden, weight, bias, dtype, self.draw)

    def logits(self, source) -> Tensor:
        """Rounded by the addition, by a scale and its product, by a softcap's division, tanh and product."""
        z = super().logits(source)
        roundings = 1 + 4 * (source.softcap is not None) + 2 * (isinstance(source.scale, Tensor) or source.scale != 1.0)
        return Rounded.apply(z, roundings * self.unit * z.detach().abs(), 2 * roundings * self.unit, self.draw)

    def loss(self) -> Tensor:
        loss = super().loss()
        size = self.unit * (2 + self.s[..., 0].numel() ** 0.5) * loss.detach().abs()
        return Rounded.apply(loss, size, 0.0, self.draw)

    def statistics(self) -> LogitStats:
        """Each is a difference of a few numbers of the row's state."""
        found, p = super().statistics(), self.s.detach().softmax(-1)
        size = 1.0
        for z in (self.s.detach(), self.z_b.detach()):
            relative = z - z.amax(-1, keepdim=True)
            size = size + (p * relative.abs()).sum(-1) + relative.exp().sum(-1).log()
        offset = {"lse": self.s.detach().amax(-1).abs()}
        drawn = {}
        for name, value in vars(found).items():
            if value is not None and value.is_floating_point():
                error = self.kept(4 * self.unit * (size + offset.get(name, 0.0)))
                drawn[name] = Rounded.apply(value, error, 0.0, self.draw)
        return replace(found, **drawn)

    def gradients(self, result: Tensor, upstream: Tensor | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """With the sum over the rows of a 0-d scale, and the rounding of each to its own dtype."""
        found, leaves = super().gradients(result, upstream), self.case.leaves()
        for name, (grad, size) in found.items():
            own = unit(leaves[name].dtype) * grad.abs()
            if leaves[name].dim() == 0:
                own = own + self.unit * self.s[..., 0].numel() ** 0.5 * size
            found[name] = (grad + own * self.draw(grad), size)
        return found


def check_values(values_of, got: dict[str, Tensor], case: Case, products: torch.dtype | None = None) -> None:
    """What an implementation gave for each of values_of(call), by name, within what its roundings may make of it.

    values_of is a function of a `Plain`, or of one that is `Drawn`.
    """
    exact, errors = values_of(Plain(case)), {name: [] for name in got}
    for seed in range(NUM_DRAWS):
        drawn = values_of(Drawn(case, seed, products))
        for name in got:
            errors[name].append(float((drawn[name].detach() - exact[name].detach()).norm()))
    for name, value in got.items():
        assert_within(name, value, exact[name].detach(), limit_of(errors[name]))


def limit_of(errors: list[float]) -> float:
    """What the errors of some draws allow another one."""
    of_draws = torch.tensor(errors, dtype=F64)
    return SLACK * float(of_draws.mean() + DEVIATIONS * of_draws.std())


def assert_within(name: str, got: Tensor, want: Tensor, limit: float) -> None:
    """The norm of the error within the limit and what the dtype flushes."""
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, expected {list(want.shape)}"
    error = float((got.detach().to(F64) - want).norm())
    limit = limit + tiny(got.dtype) * want.numel() ** 0.5
    assert error <= limit, f"{name}: {error:.3e} off, allowed {limit:.3e}, of a norm of {float(want.norm()):.3e}"


def gradients_of(value: Tensor, call: Plain, upstream: Tensor | None = None, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: grad for name, (grad, _) in call.gradients(value, upstream).items()}


def check_results(
    case: Case, results: dict[str, Tensor], upstream: Tensor | None = None, *, products: torch.dtype | None = None
) -> None:
    """Loss and gradients (or some of them) as `Case.run` names them."""

    def values_of(call: Plain) -> dict[str, Tensor]:
        loss = call.loss()
        return {"loss": loss, **(gradients_of(loss, call, upstream) if case.leaves() else {})}

    check_values(values_of, results, case, products)


def check_plain(case: Case, impl, upstream: Tensor | None = None) -> dict[str, Tensor]:
    """Run a case with heads and hold loss and gradients against float64; returns what the implementation gave."""
    got, leaves = case.run(impl.backend, upstream), case.leaves()
    assert got["loss"].dtype == summed_in(*(tensor.dtype for tensor in tensors_in(case)))
    for name, leaf in leaves.items():
        assert got[name].dtype == leaf.dtype, f"{name}: gradient {got[name].dtype} for {leaf.dtype}"
    check_results(case, got, upstream)
    return got


def check_statistics(stats: LogitStats, case: Case) -> None:
    """The numbers against float64; a likeliest class may be any whose logit is the largest but for rounding, and a rank
    is that of a target whose logit is rounded."""
    exact = Plain(case).statistics()
    got = {name: value for name, value in vars(stats).items() if value is not None}
    assert got.keys() == {name for name, value in vars(exact).items() if value is not None}
    floats = {name: value for name, value in got.items() if value.is_floating_point()}
    check_values(lambda call: vars(call.statistics()), floats, case)
    for name, sum_of in (
        ("argmax", lambda call: call.s),
        ("base_argmax", lambda call: call.z_b),
        ("target_rank", lambda call: call.s),
    ):
        if name not in got:
            continue
        call, classes = Plain(case), got[name]
        s = sum_of(call).detach()
        assert torch.equal(classes == -1, call.ignored), name
        errors = [(sum_of(Drawn(case, seed)).detach() - s).abs().amax(-1) for seed in range(NUM_DRAWS)]
        limit = 2 * SLACK * torch.stack(errors).amax(0)
        if name == "target_rank":
            target = case.target.long().masked_fill(call.ignored, 0).unsqueeze(-1)
            ahead = s - s.gather(-1, target)
            fewest = (ahead > limit.unsqueeze(-1)).sum(-1)
            most = (ahead >= -limit.unsqueeze(-1)).sum(-1) - 1  # but for itself
            assert (call.ignored | ((classes >= fewest) & (classes <= most))).all(), name
            continue
        gap = s.amax(-1) - s.gather(-1, classes.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        assert (call.kept(gap) <= limit).all(), name


# -- training ----------------------------------------------------------------------------------------------------------

NUM_COURSES = 6


def assert_same_course(course_of, eager, ours, stored: float = 0.0) -> list[Tensor]:
    """Training multiplies roundings, AdamW those of small gradients most: by how much, a few eager courses show whose
    row kernels err at random. Returns the tensors of the eager course.

    course_of   a function of a loss to tensors (losses, parameters)
    eager       loss of the arguments that `ours` has, and what is to be done to the sum of the sources
    """

    def drawn(seed: int):
        draw = Draw(seed)
        return lambda *args: eager(*args, lambda s: as_read(s, unit(torch.float32), draw, stored))

    want = course_of(lambda *args: eager(*args, lambda s: s))
    others, got = [course_of(drawn(seed)) for seed in range(NUM_COURSES)], course_of(ours)
    for i, (course, one) in enumerate(zip(want, got, strict=True)):
        off = float((one - course).detach().abs().max())
        limit = limit_of([float((other[i] - course).detach().abs().max()) for other in others])
        assert off <= limit, f"{off:.3e} off the eager course, allowed {limit:.3e}"
    return want
