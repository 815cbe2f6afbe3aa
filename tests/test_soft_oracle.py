"""Float64 oracle of soft_embedding: the plain formula and its autograd, written apart from auxkernels/reference.py.

Everything is computed on the exact input values. A result may be wrong by `TOLERANCE` of its norm, for the coarsest
dtype that its arithmetic passes through. Gradients of temperatures and scales are sums that cancel: there the norm is
that of the terms.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inputs import logits
from torch import Tensor

from auxkernels import Head, Logits, chunk_settings, noise, soft_embedding
from auxkernels.chunked import rows as row_module
from auxkernels.chunked import soft_embedding as chunked

F32, F64 = torch.float32, torch.float64
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 2e-3, F32: 3e-6, F64: 1e-12}
FLOATS = ("entropy", "max_prob", "sum_squares", "usage")
STATS = ("entropy", "max_prob", "argmax", "sum_squares", "usage")


def coarsest(*dtypes: torch.dtype) -> float:
    return max(TOLERANCE[dtype] for dtype in dtypes)


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


def gradients(results: dict, leaves: dict, upstream: dict) -> dict[str, Tensor]:
    if not leaves:
        return {}
    used = [name for name in upstream if results[name].requires_grad]
    grads = torch.autograd.grad(
        [results[name] for name in used],
        list(leaves.values()),
        [upstream[name].to(results[name].dtype) for name in used],
        allow_unused=True,
    )
    return {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}


# -- the formula -------------------------------------------------------------------------------------------------------


def kept_by(v: Tensor, top_k: int) -> Tensor:
    """Which of v are its k largest, the lowest label first among equals."""
    order = torch.sort(v, dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(v, dtype=torch.bool).scatter(-1, order[..., :top_k], True)


def log_softmax(u: Tensor, best: Tensor) -> Tensor:
    """Relative to the largest, at `best`: where the other exponentials add up to less than 1, a log1p of their sum."""
    x = (u - u.gather(-1, best)).scatter(-1, best, 0.0)
    rest = x.exp().scatter(-1, best, 0.0).sum(-1, keepdim=True)
    return torch.where(rest < 1, x - rest.log1p(), torch.log_softmax(u, -1))


def formula(
    v: Tensor,
    table: Tensor,
    T: Tensor | float,
    hard=False,
    mask=None,
    top_k=None,
    probe: Tensor | float = 0.0,
    choice_noise: Tensor | float | None = None,
) -> dict[str, Tensor]:
    """v [*, K] with the noise in it, table [K, D] or [L, K, D]; the gradient of `probe` is the probabilities'.

    choice_noise   what is added to v for a hard choice that the probabilities have no noise of
    """
    T = T.unsqueeze(-1) if isinstance(T, Tensor) and T.dim() else T
    allowed = torch.ones_like(v, dtype=torch.bool) if mask is None else ~mask.expand_as(v)
    allowed = allowed & (v.detach() != -torch.inf)
    among = allowed
    if top_k is not None:
        allowed = allowed & kept_by(v.detach().masked_fill(~allowed, -torch.inf), top_k)
    empty = ~allowed.any(-1, keepdim=True)
    largest = v.detach().masked_fill(~allowed, -torch.inf).amax(-1, keepdim=True).masked_fill(empty, 0.0)
    u = torch.where(allowed, v - largest, 0.0) / T  # relative, or the gradient of T would cancel even in float64
    u = u.masked_fill(~allowed, -torch.inf)
    best = v.detach().masked_fill(~allowed, -torch.inf).argmax(-1)  # not p's: two likely labels may have one p
    log_p = log_softmax(u.masked_fill(empty, 0.0), best.unsqueeze(-1)).masked_fill(~allowed, 0.0)
    p = torch.where(allowed, log_p.exp() + probe, 0.0)
    choice = best
    if choice_noise is not None:
        choice = (v.detach() + choice_noise).masked_fill(~among, -torch.inf).argmax(-1)
    chosen = F.one_hot(choice, v.shape[-1]).to(p.dtype).masked_fill(empty, 0.0)
    mix = "...k,kd->...d" if table.dim() == 2 else "...k,lkd->l...d"
    if hard:
        out = torch.einsum(mix, chosen, table) + torch.einsum(mix, p - p.detach(), table.detach())
    else:
        out = torch.einsum(mix, p, table)
    rows = p.reshape(-1, p.shape[-1])
    return {
        "out": out,
        "entropy": -(p * log_p).sum(-1),
        "max_prob": (p * F.one_hot(best, v.shape[-1])).sum(-1),
        "argmax": choice.masked_fill(empty.squeeze(-1), -1),
        "sum_squares": p.square().sum(-1),
        "usage": rows.sum(0) / max(len(rows), 1),
        "log_p": log_p,
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


def expected(case: Case, upstream: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor | float]]:
    """Results and gradients in float64, and the norms that errors are measured against where that is not theirs."""
    copies: dict[int, Tensor] = {}

    def wide(tensor):
        if not isinstance(tensor, Tensor):
            return tensor
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().to(F64).requires_grad_(tensor.requires_grad)
        return copies[id(tensor)]

    scaled, terms = [], []
    for source in sources_of(case.logits):
        if isinstance(source, Head):
            z = F.linear(wide(source.hidden), wide(source.weight), wide(source.bias))
        else:
            z = wide(source.values)
        if source.softcap is not None:
            z = source.softcap * torch.tanh(z / source.softcap)
        scale = wide(source.scale)
        scaled.append(z)
        terms.append((scale.unsqueeze(-1) if isinstance(scale, Tensor) and scale.dim() else scale) * z)
    is_clean = case.options.get("clean_gradient", False)
    v = sum(terms) if is_clean else sum(terms) + noise_of(case)
    probes = {name: torch.zeros_like(v).requires_grad_() for name in ("v", "p")}
    T = wide(case.options.get("temperature", 1.0))
    choice = {name: case.options.get(name) for name in ("mask", "top_k")}
    choice["choice_noise"] = noise_of(case) if is_clean else None
    table, hard = wide(case.table), case.options.get("hard", False)
    results = formula(v + probes["v"], table, T, hard, **choice, probe=probes["p"])
    log_p = results["log_p"].detach()
    leaves = {name: wide(tensor) for name, tensor in case.leaves().items()}
    grads = gradients(results, leaves | {f"probe {name}": probe for name, probe in probes.items()}, upstream)
    dv, dp = (grads.pop(f"grad probe {name}") for name in probes)
    results = {name: t.detach() for name, t in results.items()}
    return results | grads, {} if dv is None else sizes_of(leaves, dv, dp, log_p, T, scaled)


def sizes_of(leaves, dv, dp, log_p, T, scaled) -> dict[str, Tensor]:
    """Of the terms whose sums are the gradients of temperature and scales; "terms": of the scores' gradient."""
    T = (T.unsqueeze(-1) if T.dim() else T).detach() if isinstance(T, Tensor) else T
    p = torch.where(log_p == 0, 0.0, log_p.exp()) + (dv != 0) * (log_p == 0)
    mean = (p * dp).sum(-1, keepdim=True)
    terms = p * (dp.abs() + mean.abs()) / T
    of_temperature = (terms * log_p).abs()
    # an exp below float32's normal numbers may be 0: what is lost of a term is no more than this, with log p = -88
    flushed = 88 * torch.finfo(F32).tiny * (dp.abs() + mean.abs()) / T
    sizes = {
        "terms": terms,
        "terms of temperature": of_temperature.sum(-1),
        "log terms": of_temperature,
        "flushed": flushed,
    }
    sizes["grad temperature"] = (dv * log_p).abs().sum(-1)
    for i, z in enumerate(scaled):
        sizes[f"grad scale {i}"] = torch.where(dv == 0, 0.0, dv * z.detach()).abs().sum(-1)
    return {name: t.sum() if name[5:] in leaves and leaves[name[5:]].dim() == 0 else t for name, t in sizes.items()}


# -- comparison --------------------------------------------------------------------------------------------------------


def relative_error(got: Tensor, want: Tensor, size: Tensor | None = None) -> float:
    """Norm of the error over the norm of what is wanted, or of the terms that it is the sum of."""
    got, want = got.detach().to(F64), want.detach()
    norm = (want if size is None else size).norm() + 1e-30  # below that, float32's exp is zero
    return ((got - want).norm() / norm).item()


def tolerances(case: Case) -> dict[str, float]:
    """By result: a coarse table is a coarse gradient of the probabilities, and through it of everything before them."""
    table, compute = case.table.dtype, case.compute()
    rounded = {name: tensor.dtype for name, tensor in case.tensors().items()}
    has_noise = isinstance(case.options.get("gumbel"), Tensor) or case.options.get("gumbel")
    noise_error = 0.0
    if has_noise:  # within 4 ulp of numbers of about 1, in float32 whatever the scores are
        T = torch.as_tensor(case.options.get("temperature", 1.0)).detach().min().item()
        noise_error = 1e-6 / min(T, 1.0)
    products = [source.hidden.dtype for source in sources_of(case.logits) if isinstance(source, Head)]
    # scores that are a 16-bit product are wrong by half an ulp of up to 8: eager has that error too
    coarse = max((3 * TOLERANCE[dtype] for dtype in products if dtype.itemsize == 2), default=0.0)
    found = dict.fromkeys(STATS, max(coarsest(compute, *products), coarse) + noise_error)
    found["out"] = max(coarsest(compute, table, *products), coarse) + noise_error
    for name, dtype in rounded.items():
        found[f"grad {name}"] = max(coarsest(compute, table, dtype, *products), coarse) + noise_error
    return found


def check(
    case: Case, backend: str, upstream: dict[str, Tensor] | None = None, confident: bool = False, slack: float = 1.0
) -> dict[str, Tensor]:
    """The case's results and gradients within the tolerances of float64's; returns them.

    confident   rows may have a probability that rounds to one: gradients are measured against their terms, which cancel
    """
    upstream = case.upstream() if upstream is None else upstream
    got, (want, sizes) = case.run(backend, upstream), expected(case, upstream)
    allowed = tolerances(case)
    # exp(x) is as wrong as x, an eps of |x| = |log p|: that counts where the likeliest label, with x = 0, does not
    log_p = want.pop("log_p").detach().abs()
    entropy_terms = (-log_p).exp() * log_p
    for name, terms in (("entropy", entropy_terms), ("grad temperature", sizes.get("log terms"))):
        if terms is not None and name in allowed and float(terms.sum()) > 1e-30:
            conditions = torch.where(terms == 0, 0.0, terms * log_p)
            allowed[name] *= 1 + 0.1 * (conditions.sum(-1).norm() / terms.sum(-1).norm()).item()
    assert got["out"].dtype == case.table.dtype and tuple(got["out"].shape) == case.out_shape()
    for name, value in got.items():
        if name == "argmax":
            assert_same_argmax(case, value, want[name])
            continue
        if value is None or want[name] is None:
            assert (value is None or not value.any()) and (want[name] is None or not want[name].any()), name
            continue
        assert value.shape == want[name].shape, name
        if name.startswith("grad "):
            assert value.dtype == case.tensors()[name[5:]].dtype, name
        elif name != "out":
            assert value.dtype == case.compute(), name
        size = sizes.get(name)
        if confident and name.startswith("grad ") and name != "grad table":
            size = sizes["terms of temperature" if name == "grad temperature" else "terms"]
        error = relative_error(value, want[name], size)
        if name == "grad temperature":
            flushed = sizes["flushed"].sum(-1)
            allowed[name] += (flushed.norm() / ((want[name] if size is None else size).norm() + 1e-30)).item()
        assert error <= allowed[name] * slack, f"{name}: error {error:.2e}, allowed {allowed[name] * slack:.2e}"
    return got


def assert_same_argmax(case: Case, got: Tensor, want: Tensor) -> None:
    """Noise may differ by 4 ulp and a head's product by more: there another label may be as likely."""
    assert got.dtype == torch.int64 and got.shape == want.shape
    is_exact = "seed" not in case.options and all(isinstance(source, Logits) for source in sources_of(case.logits))
    assert torch.equal(got, want) if is_exact else (got == want).float().mean() > 0.9


def cut_lookup(monkeypatch, num_rows: int) -> None:
    """Work on as many chunks as there are whole `num_rows` in the batch, with a head or without."""
    monkeypatch.setattr(chunked, "CPU_BYTES", 1)
    monkeypatch.setattr(chunked, "CPU_MIN_ROWS", num_rows)
    monkeypatch.setattr(row_module, "MIN_ROWS", num_rows)
    monkeypatch.setattr(row_module, "DEFAULT_BYTES", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(chunk_settings, "num_bytes", None)


# -- the oracle itself -------------------------------------------------------------------------------------------------


def test_the_formula_is_softmax_times_table():
    v, table = logits(4, 6, dtype=F64), logits(2, 6, 3, dtype=F64)
    want = torch.softmax(v / 0.3, -1) @ table
    torch.testing.assert_close(formula(v, table, 0.3)["out"], want)
    torch.testing.assert_close(formula(v, table[0], torch.full((4,), 0.3, dtype=F64))["out"], want[0])


def test_the_formula_masks_as_masked_fill_and_selects_as_topk():
    v, table, mask = logits(5, 9, dtype=F64), logits(9, 3, dtype=F64), torch.rand(5, 9) < 0.3
    kept = torch.topk(v.masked_fill(mask, -torch.inf), 3)
    want = torch.zeros_like(v).scatter(-1, kept.indices, torch.softmax(kept.values / 0.5, -1)) @ table
    torch.testing.assert_close(formula(v, table, 0.5, mask=mask, top_k=3)["out"], want)


def test_the_formula_is_torchs_gumbel_softmax_given_its_noise(monkeypatch):
    """Its noise is -log of an exponential number."""
    drawn = torch.rand(6, 8, dtype=F64)
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: self.copy_(-drawn.log()))
    for hard in (False, True):
        v, table = (logits(*shape, dtype=F64, requires_grad=True) for shape in ((6, 8), (8, 3)))
        want = F.gumbel_softmax(v, tau=0.7, hard=hard) @ table
        got = formula(v - (-drawn.log()).log(), table, 0.7, hard=hard)["out"]
        torch.testing.assert_close(got, want)
        upstream = torch.randn_like(want)
        grads = [torch.autograd.grad(out, (v, table), upstream) for out in (got, want)]
        torch.testing.assert_close(*grads)


def test_statistics_of_the_formula_are_those_of_its_probabilities():
    v = logits(7, 12, dtype=F64)
    p, found = torch.softmax(v, -1), formula(v, torch.eye(12, dtype=F64), 1.0)
    torch.testing.assert_close(found["entropy"], torch.distributions.Categorical(p).entropy())
    torch.testing.assert_close(found["max_prob"], p.amax(-1))
    torch.testing.assert_close(found["sum_squares"], p.square().sum(-1))
    torch.testing.assert_close(found["usage"], p.mean(0))
    assert torch.equal(found["argmax"], v.argmax(-1))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_an_error_of_ten_tolerances_is_seen(dtype):
    case = Case(logits(5, 7, dtype=dtype), logits(7, 3, dtype=dtype))
    want = expected(case, case.upstream())[0]["out"]
    assert relative_error(want * (1 + 10 * TOLERANCE[dtype]), want) > TOLERANCE[dtype]
    assert relative_error(want.to(dtype), want) < TOLERANCE[dtype]
