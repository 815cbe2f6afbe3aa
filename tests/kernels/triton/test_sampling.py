"""The Triton kernel of sample_logits: interpreted against the reference, and compiled ahead of time.

As in test_soft_embedding.py, an ordinary run starts this file once more with TRITON_INTERPRET=1 for the first kind. No
GPU is needed; nothing here shows what one does.
"""

import re

import pytest
import torch
from interpreted import INTERPRETED, check_interpreted, compiles, interpreted

from auxkernels import Head, Logits, sample_logits
from auxkernels.sampling import arithmetic
from auxkernels.sampling.request import FIELDS, Parameters, SampleRows
from auxkernels.sources import Matrix

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton_compile import SHARED_LIMIT, TARGETS, amd_spills, nvidia_spills  # noqa: E402

from auxkernels.sampling.triton import exact  # noqa: E402
from auxkernels.sampling.triton import launch as on_triton  # noqa: E402

F32, F64 = torch.float32, torch.float64


@pytest.mark.slow
@compiles
def test_the_interpreted_kernels_pass():
    check_interpreted(__file__)


# -- interpreted -------------------------------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "greedy": {"temperature": 0},
    "cold": {"temperature": 1e-300},
    "hot": {"temperature": 1e30, "top_p": 0.5},
    "top-k": {"top_k": 7},
    "top-p": {"top_p": 0.8, "temperature": 1.3},
    "min-p": {"min_p": 0.1},
    "plausibility": {"plausibility": 0.05},
    "all": {"temperature": 0.8, "top_k": 60, "top_p": 0.95, "min_p": 0.01, "plausibility": 1e-4},
    "vllm": {"temperature": 1.5, "top_k": 60, "top_p": 0.7, "min_p": 0.05, "order": "vllm"},
}


@pytest.fixture(autouse=True)
def short_tiles(monkeypatch):
    """A row of several tiles, the last of them partly beyond its end."""
    if INTERPRETED:
        monkeypatch.setattr(on_triton, "lanes_of", lambda _: 32)


def both(base, aux=None, **options):
    results = []
    for backend in ("reference", "triton"):
        token, stats = sample_logits(base, aux, return_stats=True, backend=backend, **options)
        results.append((token, stats.num_kept, stats.base_rank, stats.log_prob, stats.kept_log_prob))
    return results


def assert_same(one, other):
    assert all(map(torch.equal, one[:3], other[:3]))
    for ours, theirs in zip(one[3:], other[3:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=4e-6, atol=4e-6, equal_nan=True)


CASES = [("plain", name) for name in OPTIONS]
CASES += [(kind, name) for kind in ("ties", "masked", "scaled") for name in ("plain", "greedy", "all", "vllm")]


@interpreted
@pytest.mark.parametrize("kind, name", CASES)
def test_tokens_are_those_of_the_reference(kind, name):
    base, aux = torch.randn(2, 150) * 3, torch.randn(2, 150).half()
    if kind == "ties":
        base, aux = base.mul(2).round().div(2), None
    if kind == "masked":
        base = base.masked_fill(torch.rand(2, 150) < 0.9, -torch.inf)
        base[:, 0] = 0.0
    if kind == "scaled":
        base, aux = Logits(base, scale=0.7), Logits(aux, scale=torch.rand(2))
    assert_same(*both(base, aux, seed=5, **OPTIONS[name]))


@interpreted
def test_rows_have_their_own_parameters_and_rows_without_a_distribution_none():
    base, aux = torch.randn(8, 100), torch.randn(8, 100)
    base[3], base[4, 7], aux[5, 99] = -torch.inf, torch.nan, torch.inf
    options = {
        "temperature": torch.tensor([0.0, 0.5, 1.0, 1.0, 0.0, 1.0, 2.0, 0.1]),
        "top_k": torch.tensor([0, 3, 1, 5, 5, 5, 0, 1000]),
        "top_p": torch.tensor([1.0, 0.9, 0.5, 0.5, 0.5, 0.5, 0.0, 1.0]),
        "min_p": torch.rand(8) / 10,
        "plausibility": torch.rand(8) / 10,
        "seed": torch.arange(8) * 2**40 - 3,
        "position": torch.arange(8) + 2**33,
    }
    one, other = both(base, aux, **options)
    assert_same(one, other)
    assert (one[0] == -1).tolist() == [False, False, False, True, True, True, False, False]


@interpreted
@pytest.mark.parametrize("name, value", [("temperature", -1.0), ("top_p", 1.5), ("top_k", -1), ("min_p", torch.nan)])
def test_a_parameter_out_of_range_gives_no_token(name, value):
    """As on a GPU, where the host does not look."""
    dtype = torch.int64 if name == "top_k" else F64
    defaults = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None, "plausibility": None}
    given = defaults | {"seed": 1, "position": None, name: torch.tensor([value, defaults[name] or 0], dtype=dtype)}
    rows = SampleRows([Matrix(torch.randn(2, 40))], [], 2, 0, 40, F32, "transformers", Parameters(**given))
    fields = [torch.full((2,), -7, dtype=torch.int64 if i in (0, 3, 4) else F32) for i in range(len(FIELDS))]
    on_triton.sample(rows, fields)
    assert fields[0][0] == -1 and fields[0][1] >= 0
    assert fields[1].isnan().tolist() == [True, False]


@interpreted
def test_heads_and_sums_of_sources():
    hidden, weight = torch.randn(5, 8), torch.randn(60, 8)
    more = [torch.randn(5, 64), Logits(torch.randn(5, 61), scale=-0.5)]
    assert_same(*both(more, [Head(hidden, weight), torch.randn(5, 60)], vocab_size=60, top_k=9, seed=1))


@interpreted
def test_the_fixed_functions_have_the_references_bits():
    @triton.jit
    def kernel(bits, noise, x, e, N: tl.constexpr):
        at = tl.arange(0, N)
        tl.store(noise + at, exact.gumbel64(tl.load(bits + at).to(tl.uint32)))
        tl.store(e + at, exact.exp32(tl.load(x + at)))

    bits = torch.randint(2**32, (4096,))
    bits[:4] = torch.tensor([0, 1, 2**32 - 1, 2**31])
    x = -90 * torch.rand(4096)
    noise, e = torch.empty(4096, dtype=F64), torch.empty(4096)
    kernel[(1,)](bits, noise, x, e, 4096)
    assert torch.equal(noise, arithmetic.gumbel(bits))
    assert torch.equal(e, arithmetic.exp(x))


# -- compiled ----------------------------------------------------------------------------------------------------------


def empty(*shape, dtype=F32):
    return torch.empty(shape, dtype=dtype, device="meta")


def call(num_rows=64, vocab_size=151936, dtype=torch.bfloat16, aux=True, wants_stats=False, order="vllm", filters=()):
    """A call on tensors without memory."""

    def run():
        scale = empty(num_rows) if aux == "scaled" else None
        base = [Matrix(empty(num_rows, vocab_size, dtype=dtype), None, 30.0 if aux == "scaled" else None)]
        of_aux = [Matrix(empty(num_rows, vocab_size, dtype=dtype), scale)] if aux else []
        names = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None, "plausibility": None}
        numbers = {name: empty(num_rows, dtype=F64) for name in filters if name != "top_k"}
        if "top_k" in filters:
            numbers["top_k"] = empty(num_rows, dtype=torch.int64)
        seed, position = (empty(num_rows, dtype=torch.int64) for _ in range(2))
        parameters = Parameters(**(names | numbers), seed=seed, position=position)
        rows = SampleRows(base, of_aux, num_rows, 0, vocab_size, F32, order, parameters)
        dtypes = (torch.int64, F32, F32, torch.int64, torch.int64)
        on_triton.sample(rows, [empty(num_rows, dtype=d) for d in dtypes[: None if wants_stats else 1]])

    return run


FILTERS = ("temperature", "top_k", "top_p", "min_p", "plausibility")
CALLS = {
    "plain": call(),
    "one source": call(aux=False, dtype=F32, vocab_size=50257),
    "top-k and top-p": call(filters=("temperature", "top_k", "top_p")),
    "everything": call(aux="scaled", wants_stats=True, filters=FILTERS, dtype=torch.float16),
    "tiny": call(num_rows=2, vocab_size=7, filters=("top_p",), wants_stats=True),
}


@pytest.mark.slow
@compiles
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("target", TARGETS)
def test_it_compiles_for_every_architecture(compiled, tmp_path, target, name):
    if target not in ("sm_90", "gfx942") and name != "everything":
        pytest.skip("every call for Hopper and CDNA 3, elsewhere the longest")
    (kernel,) = compiled(target, CALLS[name])
    spills = nvidia_spills(kernel, tmp_path) if "cubin" in kernel.asm else amd_spills(kernel)
    spills.pop("sgpr_spill_count", None)  # masks of a row's many loops, into lanes of vector registers: no memory
    assert not any(spills.values()), f"{kernel.metadata.name} spills {spills}"
    assert kernel.metadata.shared <= SHARED_LIMIT
    assert not kernel.metadata.enable_fp_fusion


@compiles
def test_constants_of_float64_are_not_rounded_to_float32(compiled):
    (kernel,) = compiled("sm_90", CALLS["plain"])
    found = re.findall(r"(?:dense<([^>x]*)> : tensor<[^>]*f64|arith.constant ([^ x]*) : f64)", kernel.asm["ttir"])
    constants = {float(one or other) for one, other in found}
    assert {1 / (2 * i + 1) for i in range(1, 11)} <= constants
    assert {arithmetic.LN_2_HIGH, arithmetic._LN_2_LOW} <= constants
    assert "fma.rn.f64" not in kernel.asm["ptx"] and "fma.rn.f32" not in kernel.asm["ptx"]
