"""Chunks of rows: how a batch is cut, and that neither loss nor gradients show it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import cut_rows, head, logits, targets
from oracle import Case
from tolerance import check_plain

import auxkernels
from auxkernels import Logits, aux_cross_entropy, chunk_settings, logit_stats
from auxkernels.cross_entropy import chunked
from auxkernels.heads.rows import Rows, chunks_of, fewest_rows

# -- cutting -----------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    num_rows=st.one_of(st.integers(0, 5000), st.integers(0, 10**7)),
    bytes_per_row=st.integers(1, 2**22),
    budget=st.one_of(st.integers(1, 2**20), st.integers(1, 2**34)),
    fewest=st.sampled_from([256, 1024]),
)
def test_chunks_cover_all_rows_once_in_order_and_are_as_large_as_the_budget_allows(
    num_rows, bytes_per_row, budget, fewest
):
    chunks = chunks_of(num_rows, bytes_per_row, budget, fewest)
    assert [start for start, _ in chunks] == [0, *(stop for _, stop in chunks)][: len(chunks)]
    assert (chunks[-1][1] if chunks else 0) == num_rows
    sizes = [stop - start for start, stop in chunks]
    assert all(size > 0 for size in sizes)
    if not sizes:
        return
    assert max(sizes) - min(sizes) <= 1  # balanced
    assert min(sizes) >= min(fewest, num_rows)
    affordable = budget // bytes_per_row
    assert max(sizes) <= affordable or len(sizes) == max(1, num_rows // fewest)
    if len(sizes) > 1:  # and no more chunks than that takes
        assert -(-num_rows // (len(sizes) - 1)) > affordable


@pytest.mark.parametrize("device, fewest", [("cpu", 256), ("cuda", 1024)])
def test_no_chunk_is_below_1024_rows_or_on_cpu_256_where_there_are_as_many(device, fewest):
    assert fewest_rows(torch.device(device)) == fewest
    for num_rows in (1024, 1500, 2047, 2048, 5000):
        chunks = chunks_of(num_rows, 2**20, 1, fewest)
        assert len(chunks) == num_rows // fewest and all(stop - start >= fewest for start, stop in chunks)
    assert chunks_of(fewest - 1, 2**20, 1, fewest) == [(0, fewest - 1)] and chunks_of(0, 1, 1, fewest) == []


def test_the_buffers_of_a_chunk_are_within_the_budget(fused, monkeypatch):
    """Of a call, not of the formula: what is asked for as [rows, V], all together."""
    cut_rows(monkeypatch, 1)
    budget = 64 * 1024
    monkeypatch.setattr(chunk_settings, "num_bytes", budget)
    base, aux = (head(64, vocab_size=500, dtype=torch.bfloat16, device=fused.device) for _ in range(2))
    values, target = logits(64, 500, device=fused.device), targets(64, vocab_size=500, device=fused.device)
    plain, made = torch.Tensor.new_empty, []

    def counted(self, *args, **kwargs):
        tensor = plain(self, *args, **kwargs)
        if tensor.dim() == 2 and tensor.shape[1] >= 500:
            made.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", counted)
    for sources in ((base, aux), (values, aux), ([values, base], aux), ([base, aux], [aux, values])):
        made.clear()
        aux_cross_entropy(*sources, target, backend=fused.backend).backward()
        assert budget / 4 < sum(made) <= budget


# -- settings ----------------------------------------------------------------------------------------------------------


def spy_chunks(monkeypatch) -> list:
    seen = []

    def seeing(*args):
        seen.append(chunks_of(*args))
        return seen[-1]

    monkeypatch.setattr(chunked, "chunks_of", seeing)
    return seen


@pytest.mark.slow
def test_the_settings_are_read_by_every_call(fused, monkeypatch):
    base, aux = (head(5000, vocab_size=40, device=fused.device) for _ in range(2))
    target = targets(5000, vocab_size=40, device=fused.device)
    seen = spy_chunks(monkeypatch)
    for num_bytes, count in ((None, 1), (1, 5000 // fewest_rows(torch.device(fused.device))), (None, 1)):
        monkeypatch.setattr(chunk_settings, "num_bytes", num_bytes)
        aux_cross_entropy(base, aux, target, backend=fused.backend)
        assert len(seen[-1]) == count


def test_the_default_budget_is_256_mib_on_cpu_and_1_gib_on_gpu():
    assert chunk_settings.num_bytes is None and chunk_settings.drops_ignored_on_gpu is False
    assert chunk_settings.budget(torch.device("cpu")) == 256 * 2**20
    assert chunk_settings.budget(torch.device("cuda")) == 2**30
    assert auxkernels.chunk_settings is chunk_settings and "chunk_settings" in auxkernels.__all__


@pytest.mark.parametrize(
    "value, error", [(0, ValueError), (-1, ValueError), (1e6, TypeError), ("1", TypeError), (True, TypeError)]
)
def test_a_wrong_budget_is_an_error_that_names_it(fused, monkeypatch, value, error):
    monkeypatch.setattr(chunk_settings, "num_bytes", value)
    base, target = head(4, vocab_size=40, device=fused.device), targets(4, vocab_size=40, device=fused.device)
    with pytest.raises(error, match=r"chunk_settings\.num_bytes must be"):
        aux_cross_entropy(base, None, target, backend=fused.backend)
    with pytest.raises(error, match=r"chunk_settings\.num_bytes must be"):
        logit_stats(base, None, target, backend=fused.backend)


def test_materialised_logits_are_not_cut(fused, monkeypatch):
    """One matrix or two take the path without chunks, whatever the settings hold."""
    cut_rows(monkeypatch, 2)
    seen = spy_chunks(monkeypatch)
    base, aux = (logits(9, 40, device=fused.device, requires_grad=True) for _ in range(2))
    aux_cross_entropy(base, Logits(aux, softcap=3.0), targets(9, vocab_size=40, device=fused.device)).backward()
    assert not seen


# -- results -----------------------------------------------------------------------------------------------------------


def upstream_of(case):
    target = case.target
    return torch.linspace(-1, 2, target.numel(), device=target.device) if case.options.get("reduction") else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"recompute": True, "z_loss": 0.1}], ids=str)
def test_results_are_those_of_float64_whatever_the_budget(fused, monkeypatch, options, dtype):
    scale = torch.rand(50, device=fused.device, requires_grad=True)
    base = head(50, vocab_size=60, dtype=dtype, device=fused.device, bias=True)
    aux = head(50, vocab_size=60, dtype=dtype, device=fused.device, bias=True, scale=scale)
    target = targets(50, vocab_size=60, device=fused.device, ignored=0.2)
    case = Case(base, aux, target, options)
    check_plain(case, fused, upstream_of(case))
    seen = spy_chunks(monkeypatch)
    for rows in (1, 7, 20):
        cut_rows(monkeypatch, rows)
        check_plain(case, fused, upstream_of(case))
        assert len(seen[-1]) == (target != -100).sum() // rows if fused.backend == "native" else len(seen[-1]) > 1


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"recompute": True}], ids=str)
def test_bits_repeat_for_the_same_budget(fused, monkeypatch, options):
    cut_rows(monkeypatch, 7)
    base, aux = (head(50, vocab_size=60, dtype=torch.bfloat16, device=fused.device, bias=True) for _ in range(2))
    target = targets(50, vocab_size=60, device=fused.device, ignored=0.2)
    case = Case(base, aux, target, options)
    first, second = (case.run(fused.backend, upstream_of(case)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("rows", [4, 1])
def test_weight_gradients_are_summed_over_the_chunks_in_float32(fused, monkeypatch, rows):
    """A bfloat16 sum of n equal terms errs by about sqrt(n) / 3 of its roundings: with 1024 chunks, by ten."""
    num_rows = 1024 * rows
    base = head(num_rows, vocab_size=6, width=3, dtype=torch.bfloat16, device=fused.device, bias=True)
    # a target that the head does not predict: every row pulls in the same direction
    target = torch.zeros(num_rows, dtype=torch.int64, device=fused.device)
    with torch.no_grad():
        base.hidden.add_(2)
        base.weight[0] -= 1
    case = Case(base, None, target, {"reduction": "sum"})
    cut_rows(monkeypatch, rows)
    check_plain(case, fused)


def test_chunks_of_rows_with_unrelated_strides_are_the_rows(impl, monkeypatch):
    cut_rows(monkeypatch, 4)
    states = logits(2, 5, 3, 16, scale=1.0, device=impl.device)
    weight = head(1, vocab_size=40, device=impl.device).weight
    target = targets(3, 2, 5, vocab_size=40, device=impl.device, ignored=0.2)
    hidden = states.permute(2, 0, 1, 3)
    for ignored in (0.0, 0.3):
        target = targets(3, 2, 5, vocab_size=40, device=impl.device, ignored=ignored)
        check_plain(Case(auxkernels.Head(hidden.detach().requires_grad_(), weight), None, target), impl)


@pytest.mark.parametrize("kept", [None, [0, 2, 3, 7, 11]])
def test_rows_are_taken_and_put_back(kept):
    kept = None if kept is None else torch.tensor(kept)
    rows = Rows(torch.Size((3, 4)), kept)
    flat = torch.arange(12) if kept is None else kept
    tensor = torch.randn(12, 5)
    for view in (tensor.view(3, 4, 5), tensor.view(3, 4, 5).transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(rows.take(view, 1, 4), tensor[flat[1:4]])
    assert torch.equal(rows.take(tensor[:, 0].view(3, 4), 1, 4), tensor[flat[1:4], 0])
    out = rows.new_output(tensor, (5,), torch.float32)
    for start, stop in ((0, 2), (2, rows.num_rows)):
        rows.put(out, start, stop, tensor[flat[start:stop]])
    want = torch.zeros_like(tensor)
    want[flat] = tensor[flat]
    assert torch.equal(out, want)
