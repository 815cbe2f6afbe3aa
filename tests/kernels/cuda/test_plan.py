"""How the CUDA module shares rows out: host arithmetic, from the module compiled for the CPU."""

import emulated_cuda
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auxkernels import aux_cross_entropy, logit_stats
from auxkernels.native import DTYPE_CODES

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
H100 = {"multiprocessors": 132, "shared_bytes": 232448, "has_clusters": True}
A100 = {"multiprocessors": 108, "shared_bytes": 166912, "has_clusters": False}
SM_120 = {"multiprocessors": 170, "shared_bytes": 101376, "has_clusters": True}
DEVICES = [H100, A100, SM_120]
# of a tile: up to 15 bytes before it and after it are copied with it
PADDING = 32


@pytest.fixture(scope="module")
def plan():
    if reason := emulated_cuda.missing():
        pytest.skip(reason)
    module = emulated_cuda.module()

    def call(num_rows, V, base=BF16, aux=BF16, has_gradient=True, has_statistics=False, device=H100):
        codes = DTYPE_CODES[base], -1 if aux is None else DTYPE_CODES[aux]
        return module.plan(num_rows, V, *codes, has_gradient, has_statistics, **device)

    return call


widths = st.one_of(st.integers(1, 300_000), st.sampled_from([32000, 50257, 65536, 128256, 151936, 256000, 262144]))
calls = st.fixed_dictionaries(
    {
        "num_rows": st.sampled_from([0, 1, 2, 8, 64, 1000, 8192, 2**31, 2**40]),
        "V": widths,
        "base": st.sampled_from([F32, BF16, F16]),
        "aux": st.sampled_from([None, F32, BF16, F16]),
        "has_gradient": st.booleans(),
        "has_statistics": st.booleans(),
        "device": st.sampled_from(DEVICES),
    }
)


@settings(max_examples=2000, deadline=None)
@given(calls)
def test_every_plan_fits_and_covers_the_row(plan, call):
    p = plan(**call)
    assert p["num_segments"] * p["segment"] >= call["V"] and p["num_tiles"] * p["tile"] >= p["segment"]
    assert p["threads"] % 32 == 0 and p["lanes"] <= p["threads"] and 8 * p["lanes"] == p["tile"]
    assert p["segment"] % 64 == 0 and p["tile"] % 64 == 0  # tiles are aligned as their row is
    assert p["num_segments"] in (1, 2, 4, 8, 16) and p["num_segments"] % p["cluster"] == 0
    assert p["shared_bytes"] <= call["device"]["shared_bytes"]
    assert p["is_ragged"] or call["V"] % p["piece"] == 0
    assert p["threads"] // 32 <= 16  # lanes that merge the states of a segment's warps
    if p["is_resident"]:
        num_bytes = sum(dtype.itemsize for dtype in (call["base"], call["aux"]) if dtype is not None)
        num_sources = 2 if call["aux"] is not None else 1
        assert p["slot_bytes"] >= p["tile"] * num_bytes + num_sources * PADDING
        assert 2 <= p["num_slots"] <= 32
        if call["has_gradient"]:  # or the producer would wait for a slot that is released after the wait
            assert p["num_slots"] >= p["num_segments"] // p["cluster"] * p["num_tiles"]
    else:
        assert p["cluster"] == 1


@settings(max_examples=500, deadline=None)
@given(calls)
def test_the_tiles_of_a_segment_are_equal_but_for_rounding(plan, call):
    """A slot holds a whole tile: what the last one lacks is lost in each."""
    p = plan(**call)
    unit = 256 if p["is_ragged"] else 64
    assert 0 <= p["num_tiles"] * p["tile"] - p["segment"] < p["num_tiles"] * unit
    assert p["num_tiles"] == -(-p["segment"] // (8 * p["threads"]))


@settings(max_examples=300, deadline=None)
@given(calls)
def test_the_cut_of_a_row_follows_from_its_width_and_dtypes_alone(plan, call):
    """The bits of a result depend on it."""
    names = ("threads", "piece", "is_ragged", "num_segments", "segment", "num_tiles", "tile", "lanes")
    first = plan(**call)
    for change in ({"num_rows": 3}, {"has_gradient": not call["has_gradient"]}, {"device": A100}, {"device": SM_120}):
        again = plan(**{**call, **change})
        assert [again[name] for name in names] == [first[name] for name in names]


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("V", [1, 4096, 32000, 50257, 65536, 128256, 151936, 256000, 262144])
def test_on_an_h100_a_row_of_any_common_vocabulary_stays_in_shared_memory(plan, V, dtype):
    p = plan(8192, V, dtype, dtype)
    assert p["is_resident"]
    assert p["num_slots"] * p["slot_bytes"] >= (40 << 10) or V < 4096  # on their way while nothing else is done


@pytest.mark.parametrize(
    "V, dtype, cluster",
    [(32000, BF16, 1), (50257, BF16, 2), (128256, BF16, 4), (151936, BF16, 4), (151936, F32, 8), (262144, F32, 16)],
)
def test_clusters_are_as_small_as_the_row_allows(plan, V, dtype, cluster):
    assert plan(8192, V, dtype, dtype)["cluster"] == cluster


@pytest.mark.parametrize("num_rows, cluster", [(1, 16), (8, 16), (9, 8), (16, 8), (17, 4), (8192, 4)])
def test_few_rows_are_shared_by_more_blocks(plan, num_rows, cluster):
    assert plan(num_rows, 128256)["cluster"] == cluster


def test_without_a_gradient_a_row_needs_no_place_to_wait(plan):
    assert plan(8192, 262144, F32, F32, has_gradient=False)["cluster"] == 1


def test_devices_without_clusters_read_a_row_twice(plan):
    assert not plan(8192, 128256, device=A100)["is_resident"]


@pytest.mark.parametrize("V, is_ragged", [(50257, True), (50260, True), (50264, False)])
def test_16_bit_columns_are_read_in_pieces_however_rows_are_aligned(plan, V, is_ragged):
    p = plan(8192, V)
    assert p["piece"] == 8 and p["is_ragged"] == is_ragged


def test_wider_columns_of_misaligned_rows_are_read_one_by_one(plan):
    assert plan(8192, 50257, F32, F32)["piece"] == 1 and plan(8192, 50260, F32, F32)["piece"] == 4


def test_more_columns_than_32_bits_count_are_refused(machine):
    """Of addresses that nothing touches."""
    base = torch.empty(1, 2**30 + 1, dtype=BF16)
    with pytest.raises(ValueError, match="vocab_size must be at most 1073741824, got 1073741825"):
        logit_stats(base, None, backend="native")


def test_rows_more_than_32_bits_of_elements_apart_are_found(machine):
    """Of 16 GiB of addresses three rows are ever touched."""
    V, apart = 1000, 2**32 // 2 + 24
    try:
        buffer = torch.empty(2 * apart + V, dtype=F32)
    except RuntimeError:
        pytest.skip("the system gives no 16 GiB of addresses")
    base = buffer.as_strided((3, V), (apart, 1))
    near = torch.randn(3, V)
    base.copy_(near)
    aux, target = torch.randn(3, V), torch.tensor([5, 999, 0])
    got, want = (aux_cross_entropy(b, aux, target, reduction="none", backend="native") for b in (base, near))
    assert torch.equal(got, want)
