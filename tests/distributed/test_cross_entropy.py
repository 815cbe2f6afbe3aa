"""Losses and gradients over a sharded vocabulary against float64 on one process, and against one process's bits."""

import pytest
import sharded
import torch
from inputs import confident_row, logits, split_in_two, targets
from oracle import Case
from tolerance import assert_alike, check_results

from auxkernels import Head, Logits, VocabShard

pytestmark = pytest.mark.timeout(120, func_only=True)  # not of the processes' start
short = {torch.float32: "f32", torch.bfloat16: "bf16"}.get
BF16 = torch.bfloat16


def edges(vocab_size: int, world: int, num_rows: int) -> torch.Tensor:
    """Targets at the first and last column of every shard, then any; two rows are ignored."""
    found = [t for start, stop in sharded.even(vocab_size, world) if stop > start for t in (start, stop - 1)]
    found = torch.tensor(found + torch.randint(vocab_size, (num_rows,)).tolist())[:num_rows]
    found[[num_rows // 2, -1]] = -100
    return found


def cases_of_logits(vocab_size: int, world: int, dtype: torch.dtype) -> list[tuple[Case, tuple[str, ...]]]:
    """(case, sources that all processes hold whole)."""
    N = 10

    def pair(grad_base=True):
        return [logits(N, vocab_size, dtype=dtype, requires_grad=grad) for grad in (grad_base, True)]

    y = edges(vocab_size, world, N)
    per_row, one = (torch.rand(N) + 0.5).requires_grad_(), torch.tensor(0.7, requires_grad=True)
    (b, a), weight = pair(), torch.rand(vocab_size) + 0.1
    capped = Logits(b, softcap=5.0, scale=one), Logits(a, scale=per_row)
    return [
        (Case(*pair(grad_base=False), y), ()),
        (Case(*capped, y, {"label_smoothing": 0.1, "weight": weight, "z_loss": 1e-3}), ()),
        (Case(*pair(), y, {"reduction": "sum", "label_smoothing": 0.1}), ("base[0]",)),
        (Case(*pair(), y.clamp(min=0), {"normalizer": 7.0, "recompute": True, "ignore_index": int(y[1])}), ("aux[0]",)),
        (Case([Logits(b.detach(), scale=-0.5), *pair()], a, y.int()), ()),
    ]


def cases_of_heads(vocab_size: int, world: int, dtype: torch.dtype) -> list[tuple[Case, tuple[str, ...]]]:
    N = 10

    def head(width, **options):
        return sharded.head((N,), vocab_size, width, dtype, **options)

    def frozen(source):
        return Head(source.hidden.detach(), source.weight.detach())

    y, bias = edges(vocab_size, world, N), torch.randn(vocab_size).to(dtype).requires_grad_()
    per_row, weight = (torch.rand(N) + 0.5).requires_grad_(), torch.rand(vocab_size) + 0.1
    options = {"label_smoothing": 0.1, "weight": weight, "z_loss": 1e-3}
    return [
        (Case(frozen(head(16)), head(8), y), ()),
        (Case(head(16, softcap=4.0), head(8, bias=bias, scale=per_row), y, options), ()),
        (Case(frozen(head(16)), head(8), y, {"reduction": "sum"}), ("aux[0]",)),
        (Case(head(16), [head(8), logits(N, vocab_size, dtype=dtype, requires_grad=True)], y, {"recompute": True}), ()),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=short)
@pytest.mark.parametrize("vocab_size", [50257, 5, 4])
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("cases_of", [cases_of_logits, cases_of_heads], ids=["logits", "heads"])
def test_loss_and_gradients(running, cases_of, world, vocab_size, dtype):
    layouts = [make(vocab_size, world) for make in sharded.LAYOUTS.values()]
    cases = cases_of(vocab_size, world, dtype)
    if vocab_size > 1000 and cases_of is cases_of_heads:  # float64 with drawn errors takes its time
        layouts, cases = [layouts[(world + (dtype == BF16)) % 2]], cases[world % 2 :: 2]
    given = [(case, bounds, whole) for bounds in layouts for case, whole in cases]
    shares = running.run(world, sharded.run_shares, given)
    for i, (case, bounds, whole) in enumerate(given):
        sharded.check_case(case, sharded.joined(case, [of_rank[i] for of_rank in shares], bounds, whole))


def test_one_process_has_the_bits_of_no_shard():
    for dtype in (torch.float32, BF16):
        for cases_of in (cases_of_logits, cases_of_heads):
            for case, _ in cases_of(50, 2, dtype):
                want = case.run("auto")
                case.options["shard"] = VocabShard(0, 50, 50)
                got = case.run("auto")
                for name, value in want.items():
                    assert torch.equal(got[name], value), name


def test_upstream_gradients_of_rows(running):
    base, aux = (logits(6, 50, requires_grad=True) for _ in range(2))
    case = Case(base, aux, targets(6, vocab_size=50, ignored=0.2), {"reduction": "none", "z_loss": 1e-3})
    upstream, bounds = torch.randn(6), sharded.even(50, 3)
    shares = running.run(3, sharded.run_share, case, bounds, (), upstream)
    sharded.check_case(case, sharded.joined(case, shares, bounds), upstream)


# -- rows that are no plain ones ---------------------------------------------------------------------------------------


def test_confident_rows_keep_their_loss_and_gradient(running):
    """To 1e-4 of itself, down to 1 - p = 1e-12, wherever the others and the target are."""
    rows, y, rests = [], [], (1e-3, 1e-6, 1e-9, 1e-12)
    for rest in rests:
        for target in (0, 49, 99):
            rows.append(confident_row(100, target, rest, offset=50.0))
            y.append(target)
    base, aux = split_in_two(torch.stack(rows))
    case = Case(base, aux.requires_grad_(), torch.tensor(y), {"reduction": "none"})
    upstream = torch.rand(len(y)) + 0.5
    for world in (2, 4):
        bounds = sharded.even(100, world)
        got = sharded.joined(case, running.run(world, sharded.run_share, case, bounds, (), upstream), bounds)
        sharded.check_case(case, got, upstream)
        exact = torch.nn.functional.cross_entropy(base.double() + aux.detach().double(), case.target, reduction="none")
        assert ((got["loss"] - exact).abs() <= 1e-4 * exact + 1e-15).all()


def test_columns_of_minus_infinity(running):
    """Of a whole process, of all in one row, and at the target."""
    base, aux = logits(6, 40), logits(6, 40, requires_grad=True)
    base[:, 10:20] = -torch.inf
    base[1, 20:] = -torch.inf
    base[2] = -torch.inf
    base[3, 3] = -torch.inf
    y = torch.tensor([0, 9, 4, 3, 39, -100])
    bounds = [(0, 10), (10, 20), (20, 40)]
    for options in ({"reduction": "none"}, {"reduction": "none", "label_smoothing": 0.1}):
        case = Case(base, aux, y, options)
        got = sharded.joined(case, running.run(3, sharded.run_share, case, bounds, (), torch.ones(6)), bounds)
        want = case.run("native", torch.ones(6))
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_head_of_masked_columns_alone(running):
    """A bias of -inf, as in padded vocabularies."""
    bias = torch.zeros(40)
    bias[20:] = -torch.inf
    head = sharded.head((6,), 40, 16, torch.float32)
    case = Case(Head(head.hidden, head.weight, bias=bias), None, torch.arange(6))
    bounds = sharded.even(40, 2)
    assert_alike(sharded.joined(case, running.run(2, sharded.run_share, case, bounds), bounds), case.run("native"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_number_that_is_none_spoils_its_row_alone(running, value):
    for column in (0, 25, 39):
        base, aux = logits(4, 40), logits(4, 40, requires_grad=True)
        base[1, column] = value
        base[2] = value if value != value else base[2]
        case = Case(base, aux, torch.tensor([0, 5, 39, 20]), {"reduction": "none"})
        bounds = sharded.even(40, 2)
        got = sharded.joined(case, running.run(2, sharded.run_share, case, bounds, (), torch.ones(4)), bounds)
        spoiled = torch.tensor([False, True, value != value, False])
        assert torch.equal(got["loss"].isnan(), spoiled)
        assert torch.equal(got["aux[0]"].isnan().all(-1), spoiled) and not got["aux[0]"][~spoiled].isnan().any()


@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_everything_ignored(running, kind):
    cases = {"logits": cases_of_logits, "heads": cases_of_heads}[kind](40, 2, torch.float32)
    bounds = sharded.even(40, 2)
    for case, whole in cases[:2]:
        case.target.fill_(-100)
        got = sharded.joined(case, running.run(2, sharded.run_share, case, bounds, whole), bounds, whole)
        assert got.pop("loss").isnan()
        assert all((grad == 0).all() and not grad.signbit().any() for grad in got.values())


def test_no_rows(running):
    case = Case(logits(0, 40), logits(0, 40, requires_grad=True), torch.zeros(0, dtype=torch.int64))
    bounds = sharded.even(40, 2)
    got = sharded.joined(case, running.run(2, sharded.run_share, case, bounds), bounds)
    assert got["loss"].isnan() and got["aux[0]"].shape == (0, 40)


@pytest.mark.parametrize("vocab_size", [37, 21, 3])
def test_columns_beyond_vocab_size_belong_to_nobody(running, vocab_size):
    for make in (logits(5, 40, requires_grad=True), sharded.head((5,), 40, 8, torch.float32)):
        source = make if isinstance(make, Head) else Logits(make)
        case = Case(source, None, torch.randint(vocab_size, (5,)), {"vocab_size": vocab_size})
        bounds = sharded.even(40, 2)
        sharded.check_case(case, sharded.joined(case, running.run(2, sharded.run_share, case, bounds), bounds))


def test_half_precision_and_float64(running):
    for dtype in (torch.float16, torch.float64):
        base, aux = logits(6, 50, dtype=dtype), logits(6, 50, dtype=dtype, requires_grad=True)
        case, bounds = Case(base, aux, targets(6, vocab_size=50)), sharded.even(50, 3)
        sharded.check_case(case, sharded.joined(case, running.run(3, sharded.run_share, case, bounds), bounds))
        heads = [sharded.head((6,), 50, width, dtype) for width in (16, 8)]
        case = Case(*heads, targets(6, vocab_size=50))
        check_results(case, sharded.joined(case, running.run(3, sharded.run_share, case, bounds), bounds))


def test_several_chunks(running):
    """Of heads: one exchange each."""
    heads = [sharded.head((2500,), 64, width, torch.float32) for width in (16, 8)]
    case, bounds = Case(*heads, targets(2500, vocab_size=64, ignored=0.3)), sharded.uneven(64, 3)
    shares = running.run(3, sharded.run_in_chunks, case, bounds)
    check_results(case, sharded.joined(case, shares, bounds))


def test_a_second_backward_needs_recompute(running):
    heads = [sharded.head((6,), 50, width, torch.float32) for width in (16, 8)]
    for options, is_error in (({}, True), ({"recompute": True}, False)):
        case = Case(*heads, targets(6, vocab_size=50), options)
        found = running.tried(2, sharded.run_backward_twice, case, sharded.even(50, 2))
        for result, error in found:
            if is_error:
                assert error[0] is RuntimeError and "recompute=True" in error[1]
            else:
                assert error is None and result
