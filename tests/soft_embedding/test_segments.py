"""segments_to_tokens: one row for each segment, broadcast to tokens; its gradient is a sum in fixed order."""

import pytest
import torch
from inputs import logits
from oracle import assert_close
from soft_oracle import F32, F64
from tolerance import assert_alike, summed_in, tiny, unit
from torch.library import opcheck

from auxkernels.soft_embedding.segments import segments_to_tokens

BF16, F16 = torch.bfloat16, torch.float16
to_tokens_op = torch.ops.auxkernels.segments_to_tokens.default
sum_op = torch.ops.auxkernels.sum_of_segments.default


def by_hand(rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    flat = [rows[..., i, :] if i >= 0 else torch.zeros_like(rows[..., 0, :]) for i in ids.flatten().tolist()]
    return torch.stack(flat, -2).view(*rows.shape[:-2], *ids.shape, rows.shape[-1]) + 0 * rows.nan_to_num().sum()


def sum_error(want: torch.Tensor, size: torch.Tensor, num_terms: int, dtype: torch.dtype) -> torch.Tensor:
    """Of sums in float32 (float64), in any order, rounded to dtype; size: the sums of the terms' sizes."""
    return num_terms * unit(summed_in(dtype)) * size + unit(dtype) * want.abs() + tiny(dtype)


@pytest.fixture(params=[(), (2,), (1,)], ids=["one table", "two tables", "a stack of one"])
def tables(request):
    return request.param


IDS = {
    "in order": lambda S: torch.arange(S).repeat_interleave(7),
    "shuffled": lambda S: torch.randperm(5 * S) % S,
    "with negative": lambda S: torch.randint(-3, S, (40,)),
    "two dimensions": lambda S: torch.randint(-1, S, (3, 11)),
    "three dimensions": lambda S: torch.randint(-1, S, (2, 3, 4)),
    "one token": lambda S: torch.tensor(S - 1),
    "all negative": lambda S: torch.full((9,), -100),
    "strided": lambda S: torch.randint(-1, S, (40,))[::2],
    "transposed": lambda S: torch.randint(-1, S, (3, 11)).T,
    "expanded": lambda S: torch.randint(-1, S, (3, 1)).expand(3, 5),
}


@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("kind", IDS)
def test_every_token_gets_its_segments_row_and_every_row_the_sum_of_its_tokens(impl, tables, kind, id_dtype):
    for dtype in (F32, BF16, F16, F64):
        if impl.backend != "triton" or dtype != F64:
            check_broadcast(impl, tables, dtype, IDS[kind](6).to(impl.device))
            check_broadcast(impl, tables, dtype, IDS[kind](6).to(impl.device, id_dtype))


def check_broadcast(impl, tables, dtype, ids):
    rows = logits(*tables, 6, 67, dtype=dtype, device=impl.device, requires_grad=True)
    out = segments_to_tokens(rows, ids, impl.backend)
    assert out.dtype == dtype and torch.equal(out, by_hand(rows.detach(), ids))
    upstream = torch.randn(out.shape, dtype=F64).to(out)
    (grad,) = torch.autograd.grad(out, rows, upstream)
    wide = rows.detach().double().requires_grad_()
    want, size = (
        torch.autograd.grad(by_hand(wide, ids), wide, g)[0] for g in (upstream.double(), upstream.double().abs())
    )
    assert grad.dtype == dtype and grad.shape == rows.shape and grad.is_contiguous()
    assert_close("gradient", grad, want, sum_error(want, size, ids.numel(), dtype))


def test_segments_without_tokens_get_a_gradient_of_zero(impl, tables):
    rows = logits(*tables, 6, 5, device=impl.device, requires_grad=True)
    out = segments_to_tokens(rows, torch.tensor([4, 1, 4, -1], device=impl.device), impl.backend)
    (grad,) = torch.autograd.grad(out, rows, torch.ones_like(out))
    assert torch.equal(grad[..., 0].reshape(-1, 6)[0].cpu(), torch.tensor([0.0, 1, 0, 0, 2, 0]))


@pytest.mark.parametrize("layout", ["expanded scalar", "transposed", "expanded rows", "every second column"])
def test_upstream_gradients_of_any_strides(impl, tables, layout):
    """out.sum().backward() is one: its gradient has no stride at all."""
    rows, ids = (
        logits(*tables, 6, 5, device=impl.device, requires_grad=True),
        torch.randint(-1, 6, (12,)).to(impl.device),
    )
    out = segments_to_tokens(rows, ids, impl.backend)
    shape, device = out.shape, impl.device
    upstream = {
        "expanded scalar": lambda: torch.randn((), device=device).expand(shape),
        "transposed": lambda: torch.randn(shape[::-1], device=device).permute(*range(len(shape))[::-1]),
        "expanded rows": lambda: torch.randn(shape[-1], device=device).expand(shape),
        "every second column": lambda: torch.randn(*shape[:-1], 10, device=device)[..., ::2],
    }[layout]()
    got = torch.autograd.grad(out, rows, upstream, retain_graph=True)
    assert_alike(got, torch.autograd.grad(out, rows, upstream.contiguous()))


@pytest.mark.parametrize("layout", ["transposed", "every second row", "columns of a wider one", "expanded"])
def test_rows_of_any_strides(impl, layout):
    plain = logits(6, 5, device=impl.device)
    rows = {
        "transposed": plain.T.contiguous().T,
        "every second row": plain.repeat_interleave(2, 0)[::2],
        "columns of a wider one": torch.cat([plain, plain], 1)[:, 5:],
        "expanded": plain[:, :1].expand(6, 5),
    }[layout]
    ids = torch.randint(-1, 6, (12,)).to(impl.device)
    assert torch.equal(segments_to_tokens(rows, ids, impl.backend), by_hand(rows, ids))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_the_gradient_repeats_bit_for_bit_and_is_summed_in_float32(fused, dtype):
    rows = logits(3, 130, dtype=dtype, device=fused.device, requires_grad=True)
    ids = torch.randint(3, (5000,)).to(fused.device)
    out = segments_to_tokens(rows, ids, fused.backend)
    upstream = torch.randn_like(out)
    first = torch.autograd.grad(out, rows, upstream, retain_graph=True)[0]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(torch.autograd.grad(out, rows, upstream, retain_graph=True)[0], first)
    finally:
        torch.set_num_threads(before)
    none = torch.zeros(3, 130, dtype=F64, device=fused.device)
    want, size = (none.index_add(0, ids, g) for g in (upstream.double(), upstream.double().abs()))
    assert_close("gradient", first, want, sum_error(want, size, int(ids.bincount().max()), dtype))


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)], ids=str)
def test_no_tokens_give_none_and_a_gradient_of_zero(impl, tables, shape):
    rows = logits(*tables, 6, 5, device=impl.device, requires_grad=True)
    ids = torch.zeros(shape, dtype=torch.int64, device=impl.device)
    out = segments_to_tokens(rows, ids, impl.backend)
    assert out.shape == (*tables, *shape, 5)
    (grad,) = torch.autograd.grad(out.sum(), rows)
    assert grad.shape == rows.shape and not grad.any()


def test_no_segments_leave_only_tokens_of_none(impl, tables):
    rows = torch.zeros(*tables, 0, 5, device=impl.device, requires_grad=True)
    out = segments_to_tokens(rows, torch.full((3,), -1, device=impl.device), impl.backend)
    assert torch.equal(out, torch.zeros(*tables, 3, 5, device=impl.device))
    assert torch.autograd.grad(out.sum(), rows)[0].shape == rows.shape


def test_nan_stays_in_its_segments_tokens(impl):
    rows = logits(4, 5, device=impl.device)
    rows[2, 3] = torch.nan
    out = segments_to_tokens(rows, torch.tensor([0, 2, -1, 1], device=impl.device), impl.backend)
    assert torch.equal(out.isnan().nonzero().cpu(), torch.tensor([[1, 3]]))


def test_tokens_of_no_segment_hide_nan_in_upstream_gradients(impl):
    rows = logits(4, 5, device=impl.device, requires_grad=True)
    out = segments_to_tokens(rows, torch.tensor([0, -1, 1], device=impl.device), impl.backend)
    upstream = torch.ones_like(out)
    upstream[1] = torch.nan
    assert torch.autograd.grad(out, rows, upstream)[0].isfinite().all()


# -- contract ----------------------------------------------------------------------------------------------------------


def test_a_second_backward_gives_the_same_bits_and_a_third_derivative_an_error(fused):
    rows = logits(4, 5, device=fused.device, requires_grad=True)
    ids = torch.tensor([0, 2, -1, 1, 2], device=fused.device)
    out = segments_to_tokens(rows, ids, fused.backend)
    one, two = (torch.autograd.grad(out, rows, torch.ones_like(out), retain_graph=True)[0] for _ in range(2))
    assert torch.equal(one, two)
    upstream = torch.ones_like(out).requires_grad_()
    (grad,) = torch.autograd.grad(out, rows, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(grad.sum(), upstream)


def test_a_gradient_that_is_not_needed_is_not_made(impl):
    rows = logits(4, 5, device=impl.device)
    assert not segments_to_tokens(rows, torch.tensor([0], device=impl.device), impl.backend).requires_grad
    with torch.no_grad():
        rows.requires_grad_()
        assert not segments_to_tokens(rows, torch.tensor([0], device=impl.device), impl.backend).requires_grad


def test_gradcheck(doubles, tables):
    rows = logits(*tables, 4, 3, dtype=F64, device=doubles.device, requires_grad=True)
    ids = torch.tensor([[0, 2, -1], [1, 2, 2]], device=doubles.device)
    assert torch.autograd.gradcheck(lambda r: segments_to_tokens(r, ids, doubles.backend), rows)


SAMPLES = {
    "one": lambda d: (logits(4, 5, device=d), torch.tensor([0, 3, -1, 2, 2], device=d)),
    "tables": lambda d: (logits(2, 4, 5, device=d), torch.tensor([[0, 3], [-1, 2]], device=d)),
    "int32 and halves": lambda d: (
        logits(4, 5, dtype=BF16, device=d),
        torch.tensor([0, 3, -1], dtype=torch.int32, device=d),
    ),
    "no tokens": lambda d: (logits(4, 5, device=d), torch.zeros(0, dtype=torch.int64, device=d)),
    "views": lambda d: (logits(8, 9, device=d)[::2, 2:7], torch.tensor([0, 3, -1, 2, 2], device=d)[::2]),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_the_operators_pass_opcheck(impl, name):
    rows, ids = SAMPLES[name](impl.device)
    opcheck(to_tokens_op, (rows, ids, impl.backend))
    tokens = torch.randn(*rows.shape[:-2], *ids.shape, rows.shape[-1]).to(rows)
    opcheck(sum_op, (tokens, ids, 4, impl.backend))


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [4, 5, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**63 - 1])
def test_an_id_of_no_segment_is_an_index_error_on_cpu(on_cpu, value):
    with pytest.raises(IndexError, match=f"segment_ids must be below 4, got {value}"):
        segments_to_tokens(torch.randn(4, 5), torch.tensor([0, value, -1]), on_cpu.backend)
    with pytest.raises(IndexError, match="segment_ids"):
        segments_to_tokens(torch.randn(0, 5), torch.tensor([0]), on_cpu.backend)


@pytest.mark.parametrize("value", [-1, -2, -(2**31), -(2**32) + 1, -(2**63)])
def test_every_negative_id_is_a_token_of_no_segment(impl, value):
    out = segments_to_tokens(logits(4, 5, device=impl.device), torch.tensor([value, 1]).to(impl.device), impl.backend)
    assert not out[0].any() and out[1].all()


@pytest.mark.parametrize("value", [4, 2**32 + 1, 2**63 - 1])
def test_an_id_of_no_segment_poisons_its_token_on_gpu(on_gpu, value):
    rows, ids = logits(4, 5, device="cuda", requires_grad=True), torch.tensor([0, value, 2], device="cuda")
    out = segments_to_tokens(rows, ids, on_gpu.backend)
    assert out[1].isnan().all() and torch.equal(out[[0, 2]], rows[[0, 2]])
    (grad,) = torch.autograd.grad(out[[0, 2]].sum(), rows)
    assert torch.equal(grad.sum(-1).cpu(), torch.tensor([5.0, 0, 5, 0]))


BAD = {
    "rows of one dimension": (ValueError, "rows", lambda r, i: (r[0], i)),
    "rows of four dimensions": (ValueError, "rows", lambda r, i: (r[None, None], i)),
    "integer rows": (TypeError, "rows", lambda r, i: (r.long(), i)),
    "rows that are no tensor": (TypeError, "rows", lambda r, i: (r.tolist(), i)),
    "sparse rows": (TypeError, "rows", lambda r, i: (r.to_sparse(), i)),
    "float ids": (TypeError, "segment_ids", lambda r, i: (r, i.float())),
    "bool ids": (TypeError, "segment_ids", lambda r, i: (r, i > 0)),
    "int16 ids": (TypeError, "segment_ids", lambda r, i: (r, i.short())),
    "ids that are no tensor": (TypeError, "segment_ids", lambda r, i: (r, i.tolist())),
    "ids on another device": (ValueError, "segment_ids", lambda r, i: (r, i.to("meta"))),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_meant_is_refused_by_name(on_cpu, what):
    error, name, change = BAD[what]
    given = change(torch.randn(4, 5), torch.tensor([0, 1]))
    with pytest.raises(error, match=name):
        segments_to_tokens(*given, on_cpu.backend)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend"):
        segments_to_tokens(torch.randn(4, 5), torch.tensor([0]), "cuda")


RAW = {
    "fewer tokens than ids": (torch.ones(2, 5), torch.tensor([0, 1, 2]), 4),
    "more tokens than ids": (torch.ones(4, 5), torch.tensor([0, 1, 2]), 4),
    "no width": (torch.ones(3), torch.tensor([0, 1, 2]), 4),
    "four dimensions": (torch.ones(2, 2, 3, 5), torch.tensor([0, 1, 2]), 4),
    "integer tokens": (torch.ones(3, 5, dtype=torch.int64), torch.tensor([0, 1, 2]), 4),
    "float ids": (torch.ones(3, 5), torch.tensor([0.0, 1.0, 2.0]), 4),
    "too few segments": (torch.ones(3, 5), torch.tensor([0, 1, 2]), 2),
    "negative segments": (torch.ones(3, 5), torch.tensor([0, 1, 2]), -1),
    "ids elsewhere": (torch.ones(3, 5), torch.tensor([0, 1, 2], device="meta"), 4),
}


@pytest.mark.parametrize("what", RAW)
def test_a_raw_sum_refuses_nonsense_with_an_exception_that_names_it(on_cpu, what):
    with pytest.raises((TypeError, ValueError, IndexError), match=r"tokens|segment"):
        sum_op(*RAW[what], on_cpu.backend)
