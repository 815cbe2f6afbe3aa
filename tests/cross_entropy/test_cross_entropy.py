"""Losses and gradients against the float64 oracle: dtypes, sizes, options, shapes and views."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from inputs import LAYOUTS, WIDTHS_LARGE, WIDTHS_SMALL, covering_pairs, label, logits, strided, targets
from oracle import Case, Rows, assert_close, check, expected

from auxkernels import Logits, aux_cross_entropy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
short = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}.get


# -- sizes and dtypes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("vocab_size", WIDTHS_SMALL)
def test_loss_and_gradients_at_every_width(impl, vocab_size, dtype):
    base, aux = (logits(4, vocab_size, dtype=dtype, device=impl.device, requires_grad=True) for _ in range(2))
    target = targets(4, vocab_size=vocab_size, device=impl.device, ignored=0.25)
    check(Case(base, aux, target), impl)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("vocab_size", WIDTHS_LARGE)
def test_loss_and_gradients_of_real_vocabularies(impl, vocab_size, reduction):
    base = logits(2, vocab_size, dtype=torch.bfloat16, device=impl.device)
    aux = logits(2, vocab_size, dtype=torch.bfloat16, device=impl.device, requires_grad=True)
    target = torch.tensor([vocab_size - 1, vocab_size // 3], device=impl.device)
    upstream = torch.tensor([1.0, -0.3], device=impl.device) if reduction == "none" else None
    check(Case(base, aux, target, {"reduction": reduction}), impl, upstream)


@pytest.mark.parametrize(
    "num_rows", [1, 2, 3, 17, 128, 289]
)  # fewer, as many, more rows than threads or blocks of rows
def test_loss_and_gradients_at_every_number_of_rows(impl, num_rows):
    aux = logits(num_rows, 65, device=impl.device, requires_grad=True)
    target = targets(num_rows, vocab_size=65, device=impl.device)
    check(Case(logits(num_rows, 65, device=impl.device), aux, target), impl)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("pair", list(itertools.product(DTYPES, DTYPES)), ids=lambda pair: "-".join(map(short, pair)))
def test_mixed_dtypes_are_summed_in_float32(impl, pair, reduction):
    base, aux = (logits(3, 1025, dtype=dtype, device=impl.device, requires_grad=True) for dtype in pair)
    target = targets(3, vocab_size=1025, device=impl.device)
    upstream = torch.tensor([1.0, 0.0, -2.5], device=impl.device) if reduction == "none" else None
    check(Case(base, aux, target, {"reduction": reduction}), impl, upstream)


@pytest.mark.parametrize("other", [torch.float64, *DTYPES], ids=short)
@pytest.mark.parametrize("side", ["base", "aux"])
def test_a_float64_source_makes_everything_float64(doubles, side, other):
    sources = [logits(3, 129, dtype=torch.float64, device=doubles.device, requires_grad=True)]
    sources.append(logits(3, 129, dtype=other, device=doubles.device, requires_grad=True))
    base, aux = sources if side == "base" else sources[::-1]
    check(Case(base, aux, targets(3, vocab_size=129, device=doubles.device)), doubles)


@pytest.mark.parametrize("scale", [0.1, 10.0, 30.0])  # flat, peaked, and one class that takes almost all
@pytest.mark.parametrize("offset", [0.0, 100.0, -1e4])  # one logsumexp in float32 would lose 5e-4 at 1e4
def test_offsets_and_peaks_cost_no_accuracy(impl, scale, offset):
    base = logits(4, 515, device=impl.device, scale=scale) + offset
    aux = logits(4, 515, device=impl.device, scale=scale, requires_grad=True)
    case = Case(base.round(), aux, targets(4, vocab_size=515, device=impl.device), {"reduction": "sum"})
    check(case, impl)


# -- options, by pairs -------------------------------------------------------------------------------------------------

AXES = {
    "vocab_size": [40, 7, 129, 1030],
    "lead": ["rows", "batch", "deep", "single"],
    "aux": ["pair", "none", "three", "nested"],
    "base_dtype": [torch.bfloat16, torch.float32, torch.float16],
    "aux_dtype": [torch.bfloat16, torch.float32, torch.float16],
    "target_dtype": [torch.int64, torch.int32],
    "ignored": [0.0, 0.3, 1.0],
    "reduction": ["mean", "sum", "none", "mean by number", "mean by tensor"],
    "weight": [None, torch.float32, torch.bfloat16],
    "label_smoothing": [0.0, 0.1, 1.0],
    "z_loss": [0.0, 0.01],
    "base_scale": [1.0, -0.7, "tensor", "per row"],
    "aux_scale": [1.0, 1.5, "tensor", "per row"],
    "base_softcap": [None, 5.0],
    "aux_softcap": [None, 5.0],
    "tail": [0, 3],
    "grads": ["aux", "both", "base", "none"],
    "recompute": [False, True],
}
LEADS = {"rows": (6,), "batch": (2, 3), "deep": (2, 1, 3), "single": ()}


def one_source(row, side, lead, device, softcap=None, scale=1.0):
    needs = row["grads"] in (side, "both")
    width = row["vocab_size"] + (row["tail"] if side == "aux" else 0)
    values = logits(*lead, width, dtype=row[f"{side}_dtype"], device=device, requires_grad=needs)
    if scale == "tensor":
        scale = torch.tensor(0.8, device=device, requires_grad=needs)
    elif scale == "per row":
        scale = torch.rand(lead, device=device).add(0.25).requires_grad_(needs)
    return Logits(values, scale=scale, softcap=softcap)


def sources_of_row(row, lead, device):
    base, aux = (
        one_source(row, side, lead, device, row[f"{side}_softcap"], row[f"{side}_scale"]) for side in ("base", "aux")
    )
    if row["aux"] == "none":
        return base, None
    if row["aux"] == "three":
        return base, [aux, one_source(row, "aux", lead, device, scale=-0.4), one_source(row, "aux", lead, device)]
    if row["aux"] == "nested":
        return [[base], (one_source(row, "base", lead, device, softcap=3.0),)], [aux]
    return base, aux


def case_of(row, device):
    lead, vocab_size = LEADS[row["lead"]], row["vocab_size"]
    base, aux = sources_of_row(row, lead, device)
    target = targets(*lead, vocab_size=vocab_size, dtype=row["target_dtype"], device=device, ignored=row["ignored"])
    options = {name: row[name] for name in ("label_smoothing", "z_loss", "recompute")}
    options["reduction"] = row["reduction"].split()[0]
    if "by" in row["reduction"]:
        options["normalizer"] = 11 if "number" in row["reduction"] else torch.tensor(7.5, dtype=torch.bfloat16)
    if row["weight"]:
        options["weight"] = torch.rand(vocab_size, device=device).add(0.1).to(row["weight"])
        options["weight"][0] = 0
    if row["tail"]:
        options["vocab_size"] = vocab_size
    return Case(base, aux, target, options)


@pytest.mark.parametrize("row", covering_pairs(AXES), ids=label)
def test_options_together_match_the_oracle(impl, row):
    case = case_of(row, impl.device)
    lead = LEADS[row["lead"]]
    upstream = torch.randn(lead, device=impl.device) if case.options["reduction"] == "none" else None
    check(case, impl, upstream)


@pytest.mark.parametrize("row", covering_pairs(AXES, seed=1)[:24], ids=label)
def test_options_together_match_the_oracle_in_float64(doubles, row):
    row = row | {"base_dtype": torch.float64, "weight": torch.float64 if row["weight"] else None}
    case = case_of(row, doubles.device)
    upstream = torch.randn(LEADS[row["lead"]], device=doubles.device, dtype=torch.float64)
    check(case, doubles, upstream if case.options["reduction"] == "none" else None)


# -- shapes and views --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 1, 3), (2, 3, 2, 2)], ids=str)
def test_leading_dimensions_are_rows(impl, lead):
    base = logits(*lead, 37, device=impl.device, requires_grad=True)
    aux = logits(*lead, 37, device=impl.device, requires_grad=True)
    target = targets(*lead, vocab_size=37, device=impl.device)
    upstream = torch.randn(lead, device=impl.device)
    check(Case(base, aux, target, {"reduction": "none"}), impl, upstream)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_view_gives_the_bits_of_its_copy(fused, layout, reduction):
    base, aux = (logits(3, 4, 70, dtype=torch.bfloat16, device=fused.device) for _ in range(2))
    target = targets(3, 4, vocab_size=70, device=fused.device)
    options = {"reduction": reduction}
    plain = Case(base, aux.clone().requires_grad_(), target, options)
    upstream = torch.rand(3, 4, device=fused.device) if reduction == "none" else None
    views = [strided(tensor, layout).requires_grad_() for tensor in (base, aux)]
    case = Case(*views, target.t().contiguous().t(), options)
    got = check(case, fused, upstream)
    want = plain.run(fused.backend, upstream)
    assert torch.equal(got["loss"], want["loss"])
    assert torch.equal(got["aux[0]"], want["aux[0]"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_view_is_read_where_it_lies(impl, layout):
    base, aux = (strided(logits(3, 4, 70, device=impl.device), layout).requires_grad_() for _ in range(2))
    check(Case(base, aux, targets(3, 4, vocab_size=70, device=impl.device)), impl)


def test_the_slice_of_shifted_labels_is_not_copied(fused):
    """logits[:, :-1] of two leading dimensions: the gradient still reaches the whole tensor."""
    whole = logits(2, 5, 33, device=fused.device, requires_grad=True)
    target = targets(2, 5, vocab_size=33, device=fused.device)[:, 1:]
    base = logits(2, 5, 33, device=fused.device)[:, :-1]
    loss = aux_cross_entropy(base, whole[:, :-1], target, backend=fused.backend)
    loss.backward()
    wanted = expected(Case(base, whole[:, :-1], target), confident=True)["aux[0]"]
    assert_close("aux", whole.grad[:, :-1], *wanted)
    assert not whole.grad[:, -1].any()


@pytest.mark.parametrize("side", ["base", "aux"])
def test_an_expanded_source_is_read_with_stride_zero(impl, side):
    one = logits(1, 50, device=impl.device, requires_grad=True)
    full = logits(6, 50, device=impl.device, requires_grad=True)
    sources = (one.expand(6, 50), full) if side == "base" else (full, one.expand(6, 50))
    check(Case(*sources, targets(6, vocab_size=50, device=impl.device)), impl)


def test_an_expanded_source_gets_the_sum_of_its_rows(impl):
    one = logits(1, 50, device=impl.device, requires_grad=True)
    base, target = logits(6, 50, device=impl.device), targets(6, vocab_size=50, device=impl.device)
    aux_cross_entropy(base, one.expand(6, 50), target, backend=impl.backend).backward()
    want, error = expected(Case(base, one.expand(6, 50), target), confident=False)["aux[0]"]
    order = (8 + 6**0.5) * torch.finfo(torch.float32).eps * want.abs().sum(0, keepdim=True)
    assert_close("aux", one.grad, want.sum(0, keepdim=True), error.sum(0, keepdim=True) + order)


def test_base_and_aux_may_be_the_same_tensor(impl):
    both = logits(5, 40, device=impl.device, requires_grad=True)
    target = targets(5, vocab_size=40, device=impl.device)
    loss = aux_cross_entropy(both, both, target, backend=impl.backend)
    loss.backward()
    wanted = expected(Case(both, both, target), confident=False)
    assert_close("loss", loss, *wanted["loss"])
    want, error = (one + two for one, two in zip(wanted["base[0]"], wanted["aux[0]"], strict=True))
    assert_close("both", both.grad, want, error)


def test_overlapping_sources_are_read_like_separate_ones(fused):
    room = logits(6 * 40 + 11, device=fused.device)
    base, aux = room[: 6 * 40].view(6, 40), room[11:].view(6, 40)
    target = targets(6, vocab_size=40, device=fused.device)
    got = Case(base, aux.detach().requires_grad_(), target).run(fused.backend)
    want = Case(base.clone(), aux.clone().requires_grad_(), target).run(fused.backend)
    assert torch.equal(got["loss"], want["loss"]) and torch.equal(got["aux[0]"], want["aux[0]"])


def test_a_noncontiguous_target_and_scale_are_read_where_they_lie(impl):
    base, aux = (logits(4, 3, 20, device=impl.device, requires_grad=True) for _ in range(2))
    target = targets(3, 4, vocab_size=20, device=impl.device, ignored=0.2).t()
    scale = torch.rand(4, 6, device=impl.device)[:, ::2].requires_grad_()
    assert not target.is_contiguous() and not scale.is_contiguous()
    check(Case(base, Logits(aux, scale=scale), target), impl)


def test_one_per_row_scale_expanded_over_a_batch(impl):
    aux = logits(4, 3, 20, device=impl.device, requires_grad=True)
    scale = torch.rand(4, 1, device=impl.device, requires_grad=True)
    target = targets(4, 3, vocab_size=20, device=impl.device)
    check(Case(logits(4, 3, 20, device=impl.device), Logits(aux, scale=scale.expand(4, 3)), target), impl)


# -- widths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_columns_past_vocab_size_are_never_read_and_get_zero_gradient(impl, reduction):
    base = torch.full((4, 60), torch.nan, device=impl.device)
    base[:, :50] = logits(4, 50, device=impl.device)
    aux = torch.full((4, 53), torch.inf, device=impl.device)
    aux[:, :50] = logits(4, 50, device=impl.device)
    target = targets(4, vocab_size=50, device=impl.device)
    case = Case(base.requires_grad_(), aux.requires_grad_(), target, {"vocab_size": 50, "reduction": reduction})
    got = check(case, impl, torch.rand(4, device=impl.device) if reduction == "none" else None)
    for tail in (got["base[0]"][:, 50:], got["aux[0]"][:, 50:]):
        assert tail.numel() and not tail.any() and not torch.signbit(tail).any()


# -- against torch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_never_worse_than_eager_torch_in_the_same_dtype(impl, dtype):
    """By the worst of many draws: in one, either may be lucky. Where both round alike, who has the worst is chance."""
    worst = {"loss": [0.0, 0.0], "aux[0]": [0.0, 0.0]}
    for _ in range(16):
        base, aux = (logits(8, 1025, dtype=dtype, device=impl.device) for _ in range(2))
        aux.requires_grad_()
        case = Case(base, aux, targets(8, vocab_size=1025, device=impl.device), {"reduction": "sum"})
        want, got = expected(case, confident=True), case.run(impl.backend)
        eager = F.cross_entropy(base + aux, case.target, reduction="sum")
        (eager_grad,) = torch.autograd.grad(eager, aux)
        for name, theirs in (("loss", eager.detach()), ("aux[0]", eager_grad)):
            exact = want[name][0]
            for i, value in enumerate((got[name], theirs)):
                error = float((value.double() - exact).abs().max() / exact.abs().max())
                worst[name][i] = max(worst[name][i], error)
    for name, (ours, theirs) in worst.items():
        assert ours <= theirs * (2 if dtype == torch.float32 else 1) + torch.finfo(got[name].dtype).eps, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_rounded_gradients_are_not_biased(fused, dtype):
    """Truncation instead of rounding would leave every element on one side of the oracle, within any tolerance."""
    aux = logits(16, 4097, dtype=dtype, device=fused.device, scale=1.0, requires_grad=True)
    base = logits(16, 4097, dtype=dtype, device=fused.device, scale=1.0)
    case = Case(base, aux, targets(16, vocab_size=4097, device=fused.device), {"reduction": "sum"})
    got, want = case.run(fused.backend)["aux[0]"].double(), expected(case, confident=True)["aux[0]"][0]
    below = ((got < want).double() + (got == want).double() / 2).mean()
    assert abs(below - 0.5) < 10 / got.numel() ** 0.5


# -- upstream gradients ------------------------------------------------------------------------------------------------

UPSTREAM = {
    "ones expanded": lambda n: torch.ones(()).expand(n),
    "one number expanded": lambda n: torch.tensor(-0.3).expand(n),
    "random": lambda n: torch.randn(n),
    "zeros among them": lambda n: torch.randn(n) * (torch.arange(n) % 2),
    "strided": lambda n: torch.randn(n, 3)[:, 1],
    "tiny and huge": lambda n: 10.0 ** torch.linspace(-20, 20, n),
}


@pytest.mark.parametrize("kind", UPSTREAM)
def test_every_row_is_scaled_by_its_own_upstream(impl, kind):
    base, aux = (logits(7, 65, device=impl.device, requires_grad=True) for _ in range(2))
    target = targets(7, vocab_size=65, device=impl.device, ignored=0.2)
    check(Case(base, aux, target, {"reduction": "none"}), impl, UPSTREAM[kind](7).to(impl.device))


@pytest.mark.parametrize("value", [1.0, 0.0, -2.5, 1e-6])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_scalar_upstream_scales_everything(impl, reduction, value):
    base, aux = (logits(7, 65, dtype=torch.bfloat16, device=impl.device, requires_grad=True) for _ in range(2))
    target = targets(7, vocab_size=65, device=impl.device, ignored=0.2)
    check(Case(base, aux, target, {"reduction": reduction}), impl, torch.tensor(value, device=impl.device))


@pytest.mark.parametrize("value", [-1.0, torch.inf, torch.nan])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_stay_plus_zero_under_any_upstream(impl, reduction, value):
    base, aux = (logits(6, 33, device=impl.device, requires_grad=True) for _ in range(2))
    scale = torch.rand(6, device=impl.device, requires_grad=True)
    target = targets(6, vocab_size=33, device=impl.device, ignored=0.5)
    case = Case(base, Logits(aux, scale=scale), target, {"reduction": reduction})
    upstream = torch.full((6,) if reduction == "none" else (), value, device=impl.device)
    got = case.run(impl.backend, upstream)
    for name in case.leaves():
        rows = got[name][target == -100]
        assert not rows.any() and not torch.signbit(rows).any(), name
        kept = got[name][target != -100]
        assert kept.isfinite().all() if value == -1.0 else not kept.isfinite().any(), name


# -- gradient accumulation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_micro_batches_with_the_whole_batch_as_normalizer_are_one_batch(impl, parts):
    base, aux = (logits(257, 17, device=impl.device) for _ in range(2))
    target = targets(257, vocab_size=17, device=impl.device, ignored=0.3)
    kept = (target != -100).sum()
    collected, total = [], 0.0
    cuts = torch.linspace(0, 257**0.5, parts + 1).square().round().int().tolist()  # unequal parts
    for start, end in itertools.pairwise(cuts):
        leaf = aux[start:end].clone().requires_grad_()
        loss = aux_cross_entropy(base[start:end], leaf, target[start:end], normalizer=kept, backend=impl.backend)
        loss.backward()
        total += loss.item()
        collected.append(leaf.grad)
    whole = Case(base, aux.clone().requires_grad_(), target)
    wanted = expected(whole, confident=impl.backend != "reference")
    assert_close("aux", torch.cat(collected), *wanted["aux[0]"])
    assert_close("loss", torch.tensor(total), *wanted["loss"])


@pytest.mark.parametrize("count", [257, 4095, 2**24 + 1])  # bf16 rounds the first two, float32 the third
@pytest.mark.parametrize("kind", [int, torch.int64, torch.int32])
def test_the_normalizer_is_not_rounded(doubles, count, kind):
    base = logits(1, 4, dtype=torch.float64, device=doubles.device)
    target = torch.tensor([1], device=doubles.device)
    normalizer = count if kind is int else torch.tensor(count, dtype=kind)
    case = Case(base, None, target, {"normalizer": normalizer})
    total = aux_cross_entropy(base, None, target, reduction="sum", backend=doubles.backend)
    assert aux_cross_entropy(base, None, target, normalizer=normalizer, backend=doubles.backend) == total / count
    check(case, doubles)


def test_the_divisor_counts_more_rows_than_a_half_can(impl):
    """257 kept rows: a bf16 counter would say 256."""
    base = logits(257, 3, dtype=torch.bfloat16, device=impl.device)
    target = targets(257, vocab_size=3, device=impl.device)
    case = Case(base, base.clone().requires_grad_(), target)
    assert Rows(case).ignored.logical_not().sum() == 257
    check(case, impl)
