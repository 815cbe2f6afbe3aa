"""Native's lookup of plain calls (native_plain.py): on every side of its thresholds, and that others do not take it."""

import pytest
import torch
from inputs import logits
from soft_oracle import Case, check_results
from torch.autograd import grad
from torch.fx.experimental.proxy_tensor import make_fx

from auxkernels import soft_embedding
from auxkernels.native import cpu
from auxkernels.soft_embedding import autograd, native, native_plain

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# one compiled call, or by a library's products in one chunk; several chunks forward, backward
SHAPES = [(1, 1, 1), (5, 3, 17), (64, 32, 16), (67, 1025, 40), (130, 257, 513), (1030, 2100, 33), (2100, 1500, 9)]

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture
def taken(monkeypatch):
    """The calls that go this way."""
    taken, lookup = [], autograd.plain_lookup

    def counted(*args):
        taken.append(args)
        return lookup(*args)

    monkeypatch.setattr(autograd, "plain_lookup", counted)
    return taken


NAMES = ("out", "grad values 0", "grad table")


def check_lookup(got, scores, table, temperature, upstream, products=None):
    """The mixture and the gradients of scores and table, or the first few of these, as float64 has them."""
    leaves = (t.detach().requires_grad_() for t in (scores, table))
    case = Case(*leaves, {"temperature": temperature})
    check_results(case, dict(zip(NAMES, got, strict=False)), {"out": upstream}, products=products)


@pytest.mark.slow
@pytest.mark.parametrize("small", [native_plain.SMALL, 1 << 21])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1e-3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mixture_and_gradients_match_float64(taken, monkeypatch, shape, temperature, small):
    monkeypatch.setattr(native_plain, "SMALL", small)
    num_rows, num_labels, width = shape
    scores = logits(num_rows, num_labels, scale=0.01 if temperature < 0.1 else 3.0, requires_grad=True)
    table = logits(num_labels, width, requires_grad=True)
    upstream = logits(num_rows, width)
    mixture = soft_embedding(scores, table, temperature=temperature)
    got = (mixture, *grad(mixture, (scores, table), upstream))
    assert len(taken) == 1
    check_lookup(got, scores, table, temperature, upstream)
    assert torch.equal(soft_embedding(scores.detach(), table.detach(), temperature=temperature), mixture)


@pytest.mark.parametrize("table_dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("scores_dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(64, 32, 16), (67, 1025, 40), (1300, 600, 3)], ids=str)
def test_dtypes_mix(taken, monkeypatch, shape, scores_dtype, table_dtype):
    num_rows, num_labels, width = shape
    for name in ("FORWARD_BYTES", "BACKWARD_BYTES"):
        monkeypatch.setattr(native_plain, name, 1 << 20)  # several chunks of the last shape
    scores = logits(num_rows, num_labels, dtype=scores_dtype, requires_grad=True)
    table = logits(num_labels, width, dtype=table_dtype, requires_grad=True)
    upstream = logits(num_rows, width, dtype=table_dtype)
    mixture = soft_embedding(scores, table, temperature=0.7)
    assert len(taken) == 1 and mixture.dtype == table_dtype
    got = (mixture, *grad(mixture, (scores, table), upstream))
    assert [t.dtype for t in got] == [table_dtype, scores_dtype, table_dtype]
    check_lookup(got, scores, table, 0.7, upstream)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(2, 35, 96, 40), (3, 100, 1024, 24)], ids=str)
def test_one_chunk_by_a_librarys_products(taken, monkeypatch, shape, dtype):
    """Whatever this processor multiplies; and each gradient alone has the same bits."""
    monkeypatch.setattr(native_plain, "has_bfloat16", lambda: True)
    for name in ("SMALL", "SMALL_FORWARD", "SMALL_BFLOAT16"):
        monkeypatch.setattr(native_plain, name, 0)
    *leading, num_labels, width = shape
    scores = logits(*leading, num_labels, dtype=dtype, requires_grad=True)
    table = logits(num_labels, width, dtype=dtype, requires_grad=True)
    upstream = logits(*leading, width, dtype=dtype)
    assert native_plain._is_whole(scores, table, 2 * scores.nbytes, native_plain.FORWARD_BYTES)
    mixture = soft_embedding(scores, table, temperature=0.7)
    got = (mixture, *grad(mixture, (scores, table), upstream))
    check_lookup(got, scores, table, 0.7, upstream)
    for i, leaf in enumerate((scores, table)):
        alone = [t.detach() for t in (scores, table)]
        alone[i] = leaf
        (of_leaf,) = grad(soft_embedding(*alone, temperature=0.7), leaf, upstream)
        assert torch.equal(of_leaf, got[1 + i])
    assert len(taken) == 3


@pytest.mark.parametrize("shape", [(6, 5, 4), (70, 1025, 40), (300, 8192, 9)], ids=str)
def test_rows_without_a_finite_score(taken, shape):
    """All -inf: zeros and no gradient. A NaN or +inf makes its own row NaN and no other."""
    num_rows, num_labels, width = shape
    scores, table = logits(num_rows, num_labels), logits(num_labels, width)
    scores[1] = -torch.inf
    scores[2, 1:] = -torch.inf
    scores[3, num_labels // 2] = torch.nan
    scores[4, num_labels - 1] = torch.inf
    scores[5] = torch.nan
    scores.requires_grad_()
    mixture = soft_embedding(scores, table, temperature=0.5)
    (dscores,) = grad(mixture.sum(), scores)
    assert len(taken) == 1
    for t in (mixture, dscores):
        assert t[3:6].isnan().all() and t[:3].isfinite().all() and t[6:].isfinite().all()
        assert not t[1].any()
    assert torch.equal(mixture[2], table[0])
    good = [0, 1, 2, *range(6, num_rows)]
    check_lookup([mixture[good]], scores[good], table, 0.5, torch.ones(len(good), width))


@pytest.mark.parametrize("shape", [(6, 5, 4), (70, 1025, 40), (1030, 2100, 8)], ids=str)
def test_each_gradient_alone_has_the_same_bits(shape):
    num_rows, num_labels, width = shape
    scores, table = logits(num_rows, num_labels, requires_grad=True), logits(num_labels, width, requires_grad=True)
    upstream = logits(num_rows, width)
    both = grad(soft_embedding(scores, table), (scores, table), upstream)
    of_scores = grad(soft_embedding(scores, table.detach()), scores, upstream)
    of_table = grad(soft_embedding(scores.detach(), table), table, upstream)
    assert torch.equal(both[0], of_scores[0]) and torch.equal(both[1], of_table[0])


@pytest.mark.parametrize("shape", [(64, 32, 16), (67, 1025, 40), (1030, 2100, 33), (40, 256, 300)], ids=str)
def test_bits_do_not_depend_on_our_threads(shape):
    """Small problems, whose products are ours too; a library's may depend on how it shares its work."""
    num_rows, num_labels, width = shape
    scores, table = logits(num_rows, num_labels), logits(num_labels, width)
    want, threads = None, torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            state, probabilities = torch.empty(2, num_rows), torch.empty(num_rows, num_labels)
            native.plain_softmax(scores, 0, 0.7, state, probabilities)
            got = [state, probabilities, torch.empty_like(scores), torch.empty_like(table)]
            mixture = table.new_empty((num_rows, width))
            native.small_lookup(scores, table, 0.7, None, mixture)
            native.small_lookup_backward(scores, table, 0.7, mixture, got[2], got[3])
            got.append(mixture)
            want = got if want is None else want
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def instruction_set(request):
    """One instruction set, and the best one again afterwards."""
    module = cpu()
    if request.param not in module.instruction_sets():
        pytest.skip(f"this processor has no {request.param}")
    module.set_instruction_set(request.param)
    yield request.param
    module.set_instruction_set(module.instruction_sets()[0])


# rows, columns and sums around a tile's; panels of labels, with the table transposed and, where that has more numbers,
# the mixture's gradient; buffers whose rows are apart; the probabilities of one chunk and of several
PRODUCTS = [
    *((num_rows, 40, 70) for num_rows in (1, 2, 3, 5, 6, 7, 8, 11, 13, 15)),
    *((7, 12, width) for width in (1, 4, 5, 8, 15, 16, 17, 31, 33, 47, 129)),
    *((5, num_labels, 260) for num_labels in (31, 32, 33, 63, 95)),
    *((20, 128, 20), (3, 256, 40), (300, 257, 9), (513, 33, 130), (130, 1100, 300), (2200, 70, 5)),
]


@pytest.mark.parametrize("threads", [1, 3])
def test_products_of_every_size(instruction_set, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for num_rows, num_labels, width in PRODUCTS:
            scores, table = logits(num_rows, num_labels), logits(num_labels, width)
            scores[0], scores[-1, 1:] = 0.0, -torch.inf
            upstream = logits(num_rows, width)
            got = torch.empty_like(upstream), torch.empty_like(scores), torch.empty_like(table)
            for t in got:
                t.fill_(torch.nan)
            native.small_lookup(scores, table, 0.7, None, got[0])
            native.small_lookup_backward(scores, table, 0.7, upstream, *got[1:])
            check_lookup(got, scores, table, 0.7, upstream)
    finally:
        torch.set_num_threads(before)


DTYPES = [(F32, F32), (BF16, BF16), (F16, BF16), (F32, BF16), (BF16, F32), (F16, F16)]


@pytest.mark.parametrize(("scores_dtype", "table_dtype"), DTYPES, ids=str)
def test_every_instruction_set(instruction_set, scores_dtype, table_dtype):
    around_vectors = [(9, num_labels, 3) for num_labels in (1, 15, 16, 17, 31, 32, 33, 48, 49, 63, 64, 65)]
    for num_rows, num_labels, width in [*around_vectors, (64, 47, 50), (67, 1025, 40)]:
        scores = logits(num_rows, num_labels, dtype=scores_dtype, requires_grad=True)
        table = logits(num_labels, width, dtype=table_dtype, requires_grad=True)
        upstream = logits(num_rows, width, dtype=table_dtype)
        state, mixture = torch.empty(2, num_rows), torch.empty(num_rows, width, dtype=table_dtype)
        grads = torch.empty_like(scores), torch.empty_like(table)
        native.small_lookup(scores, table, 0.7, state, mixture)
        native.small_lookup_backward(scores, table, 0.7, upstream, *grads)
        check_lookup((mixture, *grads), scores, table, 0.7, upstream)


@pytest.mark.parametrize(("scores_dtype", "table_dtype"), [(F32, F32), (BF16, BF16), (BF16, F32)], ids=str)
@pytest.mark.parametrize("num_labels", [5, 16, 33, 64])
def test_short_rows_of_large_calls(taken, instruction_set, monkeypatch, num_labels, scores_dtype, table_dtype):
    """With row state, a library's products, and the gradient of the probabilities where that of the scores goes."""
    for name in ("SMALL", "SMALL_BFLOAT16"):
        monkeypatch.setattr(native_plain, name, 1 << 20)
    width = native_plain.SMALL // (9000 * num_labels) + 1
    scores = logits(9000, num_labels, dtype=scores_dtype, requires_grad=True)
    with torch.no_grad():
        scores[7], scores[9, 1:] = -torch.inf, -torch.inf
    table = logits(num_labels, width, dtype=table_dtype, requires_grad=True)
    assert not native_plain.is_small(scores, table)
    upstream = logits(9000, width, dtype=table_dtype)
    mixture = soft_embedding(scores, table, temperature=0.7)
    got = (mixture, *grad(mixture, (scores, table), upstream))
    assert len(taken) == 1 and not got[1][7].any()
    check_lookup(got, scores, table, 0.7, upstream)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_small_16_bit_results_are_those_of_float32_rounded_once(instruction_set, dtype):
    """Within half a unit in the last place, and what float32's own roundings are worth. A NaN stays one."""
    for num_rows, num_labels, width in ((9, 5, 3), (64, 47, 50), (300, 33, 7)):
        scores, table = logits(num_rows, num_labels, dtype=dtype), logits(num_labels, width, dtype=dtype)
        scores[3], scores[5, 1] = -torch.inf, torch.nan
        upstream = logits(num_rows, width, dtype=dtype)
        results = []
        for t in (dtype, F32):
            given = [x.to(t) for x in (scores, table, upstream)]
            state, mixture = torch.empty(2, num_rows), torch.empty_like(given[2])
            grads = torch.empty_like(given[0]), torch.empty_like(given[1])
            native.small_lookup(*given[:2], 0.7, state, mixture)
            native.small_lookup_backward(*given[:2], 0.7, given[2], *grads)
            results.append((mixture, *grads))
        for got, want in zip(*results, strict=True):
            assert torch.equal(got.isnan(), want.isnan()) and got.dtype == dtype
            got, want, info = got.float().nan_to_num(), want.nan_to_num(), torch.finfo(dtype)
            in_float32 = 16 * torch.finfo(F32).eps * want.abs().max()
            assert ((got - want).abs() <= info.eps / 2 * want.abs() + info.tiny * info.eps + in_float32).all()


def test_autocast_casts_the_table_alone(taken):
    scores, table = logits(300, 40, dtype=BF16, requires_grad=True), logits(40, 24, requires_grad=True)
    upstream = logits(300, 24, dtype=BF16)
    with torch.autocast("cpu", torch.bfloat16):
        mixture = soft_embedding(scores, table, temperature=0.7)
    got = (mixture, *grad(mixture, (scores, table), upstream))
    assert len(taken) == 1 and [t.dtype for t in got] == [BF16, BF16, F32]
    check_lookup(got, scores, table, 0.7, upstream, products=BF16)
    with torch.autocast("cpu", torch.float16):
        assert soft_embedding(scores, table).dtype == F16
    assert len(taken) == 1


def test_upstream_of_any_strides(taken):
    scores, table = logits(2, 40, 9, requires_grad=True), logits(9, 6, requires_grad=True)
    mixture = soft_embedding(scores, table)
    assert len(taken) == 1 and mixture.shape == (2, 40, 6)
    for upstream in (torch.ones(()).expand(2, 40, 6), logits(6, 40, 2).transpose(0, 2), logits(2, 40, 12)[..., ::2]):
        grads = grad(mixture, (scores, table), upstream, retain_graph=True)
        check_lookup((mixture, *grads), scores, table, 1.0, upstream)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_result_may_be_changed_in_place(shape):
    num_rows, num_labels, width = shape
    scores, table = logits(num_rows, num_labels, requires_grad=True), logits(num_labels, width)
    want = grad(soft_embedding(scores, table).mul(2.0).sum(), scores)[0]
    mixture = soft_embedding(scores, table)
    assert mixture._base is None
    assert torch.equal(grad(mixture.mul_(2.0).sum(), scores)[0], want)
    with torch.no_grad():
        inferred = soft_embedding(scores, table)
    bias = torch.zeros(width, requires_grad=True)
    assert inferred.add_(bias).requires_grad


@pytest.mark.parametrize("dtype", [BF16, F16, F64], ids=str)
def test_the_default_dtype_and_device_do_not_matter(dtype):
    scores, table = logits(64, 32, requires_grad=True), logits(32, 16)
    want = grad(soft_embedding(scores, table).sum(), scores)[0]
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(grad(soft_embedding(scores, table).sum(), scores)[0], want)
        with torch.device("meta"):
            mixture = soft_embedding(scores, table)
        assert torch.equal(grad(mixture.sum(), scores)[0], want)
    finally:
        torch.set_default_dtype(F32)


@pytest.mark.parametrize("options", [{}, {"hard": True}, {"top_k": 3}, {"gumbel": 1.0, "seed": 1}], ids=str)
@pytest.mark.parametrize("shape", [(6, 5, 4), (130, 257, 513)], ids=str)
def test_lazily_negated_upstream_gradients(shape, options):
    num_rows, num_labels, width = shape
    scores, table = logits(num_rows, num_labels, requires_grad=True), logits(num_labels, width, requires_grad=True)
    upstream = logits(num_rows, width)
    mixture = soft_embedding(scores, table, **options)
    want = grad(mixture, (scores, table), -upstream, retain_graph=True)
    got = grad(mixture, (scores, table), torch._neg_view(upstream))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"gumbel": 1.0, "seed": 1}], ids=str)
@pytest.mark.parametrize("shape", [(6, 5, 4), (130, 257, 513)], ids=str)
def test_saved_tensors_may_come_back_with_other_strides(shape, options):
    num_rows, num_labels, width = shape
    scores, table = logits(num_rows, num_labels, requires_grad=True), logits(num_labels, width, requires_grad=True)
    upstream = logits(num_rows, width)

    def transposed(t):
        return t.detach().t().contiguous() if t.dim() == 2 else t.detach()

    with torch.autograd.graph.saved_tensors_hooks(transposed, lambda t: t.t() if t.dim() == 2 else t):
        mixture = soft_embedding(scores, table, **options)
    got = dict(zip(NAMES, (mixture, *grad(mixture, (scores, table), upstream)), strict=True))
    check_results(Case(scores, table, options), got, {"out": upstream})


def test_backward_alone_may_be_traced():
    """make_fx over a gradient whose forward was eager records the operator, not the making of empty tensors."""
    scores, table = logits(6, 5, requires_grad=True), logits(5, 4, requires_grad=True)
    mixture, upstream = soft_embedding(scores, table, temperature=0.7), logits(6, 4)
    traced = make_fx(lambda g: grad(mixture, (scores, table), g, retain_graph=True))(upstream)
    assert any("soft_embedding_backward" in str(node.target) for node in traced.graph.nodes)
    check_lookup((mixture, *traced(upstream)), scores, table, 0.7, upstream)


def test_the_compiled_functions_refuse_sizes_of_nothing():
    for N, K, D in ((1, 0, 1), (1, 1, 0), (-1, 1, 1)):
        with pytest.raises(ValueError, match="label"):
            cpu().small_lookup(0, 0, 0, 0, N, K, D, 1.0, 1, 0, 0)


def test_the_compiled_functions_have_no_float64():
    with pytest.raises(ValueError, match="float64"):
        cpu().small_lookup(0, 0, 3, 0, 1, 1, 1, 1.0, 1, 0, 0)
    with pytest.raises(ValueError, match="float64"):
        cpu().plain_softmax(0, 3, 1, 1, 0, 1.0, 1, 0, 0, 0, 0, 1)


def test_backward_under_autocast_and_create_graph():
    scores, table = logits(600, 300, requires_grad=True), logits(300, 200, requires_grad=True)
    upstream = logits(600, 200)
    mixture = soft_embedding(scores, table)
    want = grad(mixture, (scores, table), upstream, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = grad(mixture, (scores, table), upstream, retain_graph=True)
    assert all(torch.equal(a, b) and a.dtype == F32 for a, b in zip(got, want, strict=True))
    recorded = grad(mixture, (scores, table), upstream, create_graph=True)
    assert all(torch.equal(a.detach(), b) for a, b in zip(recorded, want, strict=True))
    with pytest.raises(RuntimeError, match="twice"):
        grad(recorded[0].sum(), table)


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": torch.tensor(1.0)},
        {"hard": True},
        {"gumbel": 1.0, "seed": 3},
        {"mask": torch.zeros(9, dtype=torch.bool)},
        {"top_k": 2},
        {"return_stats": True},
        {"backend": "reference"},
        {"temperature": 1e35},
        {"table": torch.randn(2, 9, 6)},
        {"table": torch.randn(9, 6, dtype=F64)},
        {"table": torch.randn(9, 6, dtype=F16)},
        {"table": torch.randn(6, 9).T},
        {"logits": torch.randn(0, 9)},
        {"logits": torch.randn(4, 18)[:, :9]},
        {"logits": [torch.randn(4, 9)]},
    ],
    ids=lambda change: "-".join(change),
)
def test_anything_else_goes_the_general_path(taken, change):
    soft_embedding(**{"logits": torch.randn(4, 9), "table": torch.randn(9, 6), **change})
    assert not taken


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"temperature": 0.0}, ValueError),
        ({"temperature": float("nan")}, ValueError),
        ({"temperature": "1"}, TypeError),
        ({"seed": 1.5}, TypeError),
        ({"seed": 2**63}, ValueError),
        ({"hard": 0}, TypeError),
        ({"table": torch.randn(8, 6)}, ValueError),
        ({"logits": torch.zeros(4, 9, dtype=torch.int64)}, TypeError),
        ({"backend": "fast"}, ValueError),
        ({"logits": torch.randn(4, 9).to_sparse_csr()}, TypeError),
        ({"table": torch.randn(9, 6).to_mkldnn()}, TypeError),
    ],
)
def test_wrong_arguments_are_refused_as_ever(taken, change, error):
    with pytest.raises(error):
        soft_embedding(**{"logits": torch.randn(4, 9), "table": torch.randn(9, 6), **change})
    assert not taken


def test_transforms_and_tracing_do_not_come_here(taken):
    scores, table = torch.randn(3, 4, 9), torch.randn(9, 6)
    for transform in (torch.func.vmap, lambda f: torch.func.grad(lambda z: f(z).sum())):
        with pytest.raises(RuntimeError):  # what the operator says, which has no rule for either
            transform(lambda z: soft_embedding(z, table))(scores)
    assert not taken
