"""The Triton kernels of soft_embedding: interpreted against the CPU module and float64, and compiled ahead of time.

As in test_cross_entropy.py, an ordinary run starts this file once more with TRITON_INTERPRET=1 for the first
kind; fp32 and fp16 only, the interpreter's bf16 is not to be trusted. No GPU is needed; nothing here shows what one
does.
"""

import re

import pytest
import torch
from interpreted import INTERPRETED, check_interpreted, compiles, interpreted
from oracle import assert_close
from tolerance import OF_A_ROW, assert_alike, unit

from auxkernels import Head, dispatch, soft_embedding
from auxkernels.soft_embedding import native as on_cpu
from auxkernels.soft_embedding import noise
from auxkernels.soft_embedding.request import ROW_FIELDS, SoftRows, Upstream

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton_compile import SHARED_LIMIT, amd_spills, nvidia_spills, wide_loads  # noqa: E402

from auxkernels.soft_embedding.triton import kernels as soft_kernels  # noqa: E402
from auxkernels.soft_embedding.triton import launch as on_triton  # noqa: E402
from auxkernels.soft_embedding.triton import row_state as soft_state  # noqa: E402
from auxkernels.tritonlib import launch  # noqa: E402

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.slow
@compiles
def test_the_interpreted_kernels_pass():
    check_interpreted(__file__)


# -- interpreted: a row in registers, a longer one in two segments of up to two loads, that of two programs ------------

K = 75
NEVER, ALWAYS = (lambda *_: False), (lambda *_: True)
PATHS = {"resident": None, "segments": NEVER, "split": ALWAYS}


@pytest.fixture
def path(request, monkeypatch):
    if INTERPRETED:
        small = on_triton.Cut(4, 2, 64, False) if request.param == "split" else on_triton.Cut(8, 1, 64, False)
        if PATHS[request.param] is None:
            small = on_triton.Cut(8, 3, 96, True)
        else:
            monkeypatch.setattr(launch, "is_split", PATHS[request.param])
        monkeypatch.setattr(on_triton, "cut_of", lambda *_: small)
    return request.param


over_paths = pytest.mark.parametrize("path", PATHS, indirect=True)


def rows_of(num_rows=4, num_labels=K, dtype=F32, **options) -> SoftRows:
    scores = (torch.randn(num_rows, num_labels) * 3).to(dtype)
    given = {"first_row": 0, "temperature": 1.0, "gumbel": None, "seed": None, "mask": None}
    return SoftRows(scores, F32, **(given | options))


@interpreted
@over_paths
@pytest.mark.parametrize("top_k", [None, 4])
def test_a_noisy_choice_with_a_clean_gradient_is_the_cpus(path, top_k, monkeypatch):
    scores, table = torch.randn(6, K), torch.randn(K, 5)
    options = {"temperature": 0.7, "hard": True, "gumbel": 1.5, "clean_gradient": True, "seed": 3, "top_k": top_k}
    results = []
    for kernels in (on_cpu, on_triton):
        monkeypatch.setattr(dispatch, "implementation", lambda *_, kernels=kernels: kernels)
        leaves = scores.clone().requires_grad_(), table.clone().requires_grad_()
        out, stats = soft_embedding(*leaves, **options, return_stats=True, backend="native")
        total = out.square().sum() + (stats.row_entropy + stats.max_prob).sum()
        results.append((out, stats.argmax, stats.row_entropy, *torch.autograd.grad(total, leaves)))
    torch.testing.assert_close(*results)
    assert not torch.equal(results[0][1], scores.argmax(-1))


def with_everything(num_rows=4, dtype=F32) -> SoftRows:
    """Noise of rows beyond 32 bits, a temperature for each row, a mask; row 2 without a label, NaN in row 3."""
    mask = torch.rand(num_rows, K) < 0.3
    mask[2] = True
    mask[3, 60] = False
    temperature, seed = torch.rand(num_rows) + 0.5, torch.tensor(-1234567890123)
    options = {"temperature": temperature, "gumbel": torch.tensor(0.7), "seed": seed, "mask": mask}
    rows = rows_of(num_rows, dtype=dtype, first_row=2**33 - 2, **options)
    rows.scores[3, 60:] = torch.nan
    return rows


def empty_fields(num_rows: int) -> dict:
    return {n: torch.full((num_rows,), -7, dtype=torch.int64 if n == "argmax" else F32) for n in ROW_FIELDS}


def poisoned(*shape, dtype=F32) -> torch.Tensor:
    return torch.full(shape, 7e4 if dtype != F16 else 6e4, dtype=dtype)


def softmax_by(kernels, rows, dtype=F32) -> dict:
    num_rows, num_labels = rows.scores.shape
    fields, room = empty_fields(num_rows), poisoned(num_rows, num_labels + 5, dtype=dtype)
    kernels.softmax(rows, fields, room[:, :num_labels])
    assert torch.equal(room[:, num_labels:], poisoned(num_rows, 5, dtype=dtype))
    return {**fields, "probabilities": room[:, :num_labels]}


def backward_by(kernels, rows, fields, of_probabilities, upstream, wants=(True, True, True), dtype=F32) -> dict:
    shape, names = rows.scores.shape, ("grad_scores", "grad_temperature", "probabilities")
    outputs = [poisoned(*shape, dtype=dtype), poisoned(shape[0]), poisoned(*shape, dtype=dtype)]
    outputs = [room if want else None for room, want in zip(outputs, wants, strict=True)]
    kernels.softmax_backward(rows, fields, of_probabilities, upstream, *outputs)
    return {name: room for name, room in zip(names, outputs, strict=True) if room is not None}


def upstreams(num_rows: int, num_labels: int = K) -> Upstream:
    return Upstream(
        torch.randn(num_rows), torch.randn(1).expand(num_rows), torch.randn(num_rows), torch.randn(num_labels)
    )


@interpreted
@over_paths
def test_softmax_and_its_gradient_with_everything(path):
    dtype = F16 if path == "split" else F32
    rows = with_everything(dtype=dtype)
    want = softmax_by(on_cpu, rows)
    assert want["argmax"][2] == -1 and want["argmax"][3] == 60 and want["entropy"].isnan().tolist() == [0, 0, 0, 1]
    assert_alike(softmax_by(on_triton, rows), want)
    of_probabilities = torch.randn(4, K + 3).to(dtype)[:, :K]
    args = (rows, want, of_probabilities, upstreams(4))
    assert_alike(backward_by(on_triton, *args), backward_by(on_cpu, *args))


@interpreted
@pytest.mark.parametrize("path", ["resident", "segments"], indirect=True)
def test_gradients_are_those_of_autograd_in_float64(path):
    rows = rows_of(2, temperature=torch.tensor(0.7))
    scores, temperature = rows.scores.double().requires_grad_(), torch.full((2, 1), 0.7, dtype=F64, requires_grad=True)
    p = torch.softmax(scores / temperature, -1)
    of_probabilities, up = torch.randn(2, K), upstreams(2)
    stats = (-(p * p.log()).sum(-1), p.amax(-1), p.square().sum(-1))
    total = sum((g * s).sum() for g, s in zip(up, stats, strict=False)) + (p * (of_probabilities + up.usage)).sum()
    want = torch.autograd.grad(total, (scores, temperature))
    fields = softmax_by(on_triton, rows)
    got = backward_by(on_triton, rows, fields, of_probabilities, up)
    assert_alike((got["grad_scores"], got["grad_temperature"]), (want[0], want[1][:, 0]))
    assert_alike(fields["entropy"], stats[0].detach())
    assert_alike(got["probabilities"], fields["probabilities"])
    alone = backward_by(on_triton, rows, fields, None, None, (True, False, False))
    assert not alone["grad_scores"].any()


@interpreted
def test_a_row_has_the_same_bits_split_or_not(monkeypatch):
    monkeypatch.setattr(on_triton, "cut_of", lambda *_: on_triton.Cut(4, 1, 32, False))
    rows, of_probabilities, up, made = rows_of(2), torch.randn(2, K), upstreams(2), []
    for is_split in (ALWAYS, NEVER):
        monkeypatch.setattr(launch, "is_split", is_split)
        fields = softmax_by(on_triton, rows)
        made.append({**fields, **backward_by(on_triton, rows, fields, of_probabilities, up, (True, False, True))})
    assert all(torch.equal(made[0][name], value) for name, value in made[1].items())


@interpreted
@over_paths
def test_infinite_scores(path):
    rows = rows_of()
    rows.scores[0, 10], rows.scores[1] = torch.inf, -torch.inf
    rows.scores[2, :40], rows.scores[3, 9] = -torch.inf, torch.nan
    want = softmax_by(on_cpu, rows)
    assert want["max"][0] == torch.inf and want["argmax"].tolist()[:2] == [10, -1]
    assert_alike(softmax_by(on_triton, rows), want)
    args = (rows, want, torch.randn(4, K), upstreams(4))
    assert_alike(backward_by(on_triton, *args), backward_by(on_cpu, *args))


@interpreted
@pytest.mark.parametrize("num_labels", [1, 2, 33])
def test_few_labels_strided_rows_and_a_mask_for_all_rows(num_labels):
    room = torch.randn(6, num_labels + 7)
    rows = rows_of(3, num_labels, mask=torch.arange(num_labels) == 1)
    rows = rows._replace(scores=room[::2, 3 : 3 + num_labels])
    want = softmax_by(on_cpu, rows)
    assert_alike(softmax_by(on_triton, rows), want)
    fields = {"argmax": torch.full((3,), -7)}
    on_triton.softmax(rows, fields, None)
    assert torch.equal(fields["argmax"], want["argmax"])


# -- noise -------------------------------------------------------------------------------------------------------------


@triton.jit
def noise_kernel(scores, out, grouped, any_columns, LANES: tl.constexpr):
    """Random bits of the first tile of row 0."""
    number = tl.program_id(0).to(tl.int64)
    row = soft_state.Row(scores, *soft_state.at_row(scores, number, number))
    cols = soft_state.columns_at(0, LANES, True)
    bits = soft_state.random_bits(row, 0, LANES)
    tl.store(grouped + cols, bits.to(tl.int64))
    tl.store(any_columns + cols, soft_state.random_bits_of(row, cols).to(tl.int64))
    tl.store(out + cols, soft_state.gumbel_of(bits))


@interpreted
@pytest.mark.parametrize("seed", [0, 2**63 - 1, -5])
def test_random_bits_are_those_of_noise_py(seed):
    bits, again, gumbel = torch.empty(32, dtype=torch.int64), torch.empty(32, dtype=torch.int64), torch.empty(32)
    seed = torch.tensor(seed)
    scores = soft_state.Scores(torch.zeros(32), 32, None, 0, torch.ones(()), seed, None, 0)
    noise_kernel[(1,)](scores, gumbel, bits, again, LANES=8)
    assert torch.equal(bits, again)
    zero = torch.zeros(8, dtype=torch.int64)
    want = torch.stack(noise.philox((torch.arange(8), zero, zero, zero), seed), -1).flatten()
    assert torch.equal(bits, want)
    if seed == 0:
        assert [f"{word:08x}" for word in bits[:4].tolist()] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    want = noise.gumbel(1, 32, seed, F64)[0]  # within 4 ulp, near 0 of one
    assert_close("gumbel", gumbel, want, 4 * 2.0**-23 * want.abs().clamp(min=1.0))


@interpreted
@pytest.mark.parametrize("path", ["resident", "segments"], indirect=True)
@pytest.mark.parametrize("num_labels", [64, K])
def test_noise_is_that_of_its_row_and_label_on_every_path(path, num_labels):
    seed = torch.tensor(99)
    rows = rows_of(2, num_labels, first_row=4, gumbel=torch.tensor(1.0), seed=seed)
    v = rows.scores + noise.gumbel(6, num_labels, seed, F32)[4:]
    fields = softmax_by(on_triton, rows)
    assert torch.equal(fields["argmax"], v.argmax(-1))
    assert_alike((fields["max"], fields["probabilities"]), (v.amax(-1), v.softmax(-1)))


# -- selection ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["whole", "segments", "sorted"])
def selection(request, monkeypatch):
    """A row in one segment; in several, whose candidates are merged; every column a candidate."""
    lanes, tiles = (8, 3) if request.param == "whole" else (4, 2)
    monkeypatch.setattr(on_triton, "select_cut_of", lambda *_: on_triton.Cut(lanes, tiles, lanes * 4 * tiles, True))
    if request.param == "sorted":
        monkeypatch.setattr(on_triton, "MOST_PASSES", 0)
        monkeypatch.setattr(on_triton, "SELECTED_BLOCK", 4)
    return request.param


def select_by(kernels, rows, k) -> dict:
    num_rows = len(rows.scores)
    fields, labels, weights = empty_fields(num_rows), torch.full((num_rows, k), -7), poisoned(num_rows, k)
    kernels.select(rows, fields, labels, weights)
    return {**fields, "labels": labels, "weights": weights}


@interpreted
@pytest.mark.parametrize("is_many", [False, True])
def test_selection_and_its_gradient(selection, is_many):
    k = (K if selection == "sorted" else 7) if is_many else 1
    rows = with_everything()
    rows.mask[1, 3:] = True  # fewer labels than k
    want = select_by(on_cpu, rows, k)
    assert_alike(select_by(on_triton, rows, k), want)
    grad_weights, up, made = torch.randn(4, k), upstreams(4), []
    for kernels in (on_triton, on_cpu):
        outputs = poisoned(4, k), poisoned(4, K), poisoned(4)
        kernels.select_backward(rows, want, want["labels"], outputs[0], grad_weights, up, *outputs[1:])
        made.append(outputs)
    # what one label gets is the difference of two numbers, and zero: as wrong as these
    largest = grad_weights.abs().amax() + sum(t.abs().amax() for t in up)
    for got, exact in zip(*made, strict=True):
        room = 2 * OF_A_ROW * unit(F32) * (largest + exact.nan_to_num().abs().amax())
        torch.testing.assert_close(got, exact, rtol=0, atol=float(room), equal_nan=True)


@interpreted
def test_ties_take_the_lowest_labels_and_a_nan_or_infinity_its_row(selection):
    rows = rows_of(6)
    rows.scores[0], rows.scores[1, 20:] = 1.0, 50.0
    rows.scores[2], rows.scores[3, 40] = -torch.inf, torch.inf
    rows.scores[4, 70] = torch.nan
    rows.scores[5, :] = torch.where(torch.arange(K) % 2 == 0, 0.0, -0.0)
    got, want = (select_by(kernels, rows, 4) for kernels in (on_triton, on_cpu))
    assert_alike(got, want)
    assert got["labels"].tolist()[:3] == [[0, 1, 2, 3], [20, 21, 22, 23], [-1] * 4]
    assert got["labels"][5].tolist() == [0, 1, 2, 3] and got["argmax"][4] == 70


# -- rows of tables ----------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("dtype, has_weights, width", [(F32, True, 20), (F16, False, 20), (F32, True, 1)])
def test_rows_of_tables_are_gathered_multiplied_and_summed_up(monkeypatch, dtype, has_weights, width):
    monkeypatch.setattr(on_triton, "_tile", lambda *_: (4, 16))
    L, C, k = 2, 11, 2
    tables = torch.randn(K, L, width).to(dtype).transpose(0, 1)
    labels, weights = torch.randint(-1, K, (C, k)), torch.rand(C, k) if has_weights else None
    made = [torch.full((L, 2 * C, width), 7.0, dtype=dtype) for _ in "ab"]
    for kernels, out in zip((on_triton, on_cpu), made, strict=True):
        kernels.gather(tables, labels, weights, out[:, ::2] if width > 1 else out[:, :C], False)
    assert_alike(*made)
    rows = torch.randn(L, C, width).to(dtype)
    made = [poisoned(C, k) for _ in "ab"]
    for kernels, out in zip((on_triton, on_cpu), made, strict=True):
        kernels.products(tables, labels, rows, out, False)
    assert_alike(*made)
    labels = torch.where(torch.rand(C, k) < 0.5, labels, 5)  # one label with many terms
    made = [torch.randn(L, K, width, generator=torch.Generator().manual_seed(1)) for _ in "ab"]
    for kernels, out in zip((on_triton, on_cpu), made, strict=True):
        kernels.scatter(out, labels, weights, rows, False)
    assert_alike(*made)
    # a single upstream number for all of them
    made = [torch.zeros(L, K, width) for _ in "ab"]
    on_triton.scatter(made[0], labels, weights, torch.tensor(0.5, dtype=dtype).expand(L, C, width), False)
    on_cpu.scatter(made[1], labels, weights, torch.full((L, C, width), 0.5, dtype=dtype), False)
    assert_alike(*made)


@interpreted
def test_a_label_beyond_the_table_makes_its_row_nan_and_is_added_nowhere():
    table, labels, out = torch.randn(1, 6, 8), torch.tensor([[2], [6], [-1], [2**40]]), torch.empty(1, 4, 8)
    on_triton.gather(table, labels, None, out, False)
    assert torch.equal(out[0, 0], table[0, 2]) and out[0, [1, 3]].isnan().all() and not out[0, 2].any()
    total = torch.zeros(1, 6, 8)
    on_triton.scatter(total, labels, None, torch.ones(1, 4, 8), False)
    assert total.sum() == 8 and total[0, 2].sum() == 8


@interpreted
def test_nothing_to_do():
    none = torch.empty(0, 4, dtype=torch.int64)
    on_triton.gather(torch.randn(1, 6, 8), none, None, torch.empty(1, 0, 8), False)
    on_triton.scatter(torch.randn(1, 6, 8), none, None, torch.empty(1, 0, 8), False)
    on_triton.products(torch.randn(1, 6, 8), none, torch.empty(1, 0, 8), torch.empty(0, 4), False)
    rows = rows_of(0)
    fields = softmax_by(on_triton, rows)
    backward_by(on_triton, rows, fields, None, None)
    select_by(on_triton, rows, 2)


# -- end to end --------------------------------------------------------------------------------------------------------

LOOKUPS = {
    "soft": {},
    "hard": {"hard": True},
    "gumbel": {"gumbel": 0.8, "seed": 7, "temperature": 0.6},
    "gumbel-hard": {"gumbel": 0.8, "seed": 7, "hard": True},
    "top_k": {"top_k": 3, "temperature": 1.7},
    "top_k-hard": {"top_k": 3, "hard": True},
    "mask": {"mask": True, "top_k": 4, "gumbel": 0.5, "seed": 1},
}


@interpreted
@pytest.mark.parametrize(
    "name, form",
    [
        *((name, "scores") for name in LOOKUPS),
        *((name, "head") for name in ("soft", "mask")),
        *((name, "expanded") for name in ("soft", "hard", "top_k")),
    ],
)
def test_soft_embedding_and_its_gradients_match_the_reference(name, form):
    options, num_labels = dict(LOOKUPS[name]), 21
    if options.get("mask"):
        options["mask"] = torch.rand(1, 3, num_labels) < 0.4
        options["mask"][0, 1] = True
    scores = torch.randn(1, 3, 8 if form == "head" else num_labels)
    tensors = [scores, torch.randn(2, num_labels, 5), torch.rand(1, 3) + 0.5, torch.randn(num_labels, 8)]
    upstream, made = torch.randn(2, 1, 3, 5), []
    for backend in ("triton", "reference"):
        scores, tables, temperature, weight = leaves = [t.clone().requires_grad_() for t in tensors]
        given = Head(scores, weight) if form == "head" else scores
        options["temperature"] = temperature
        mixture, stats = soft_embedding(given, tables, return_stats=True, backend=backend, **options)
        if form == "expanded":
            total = mixture.sum()
        else:
            total = (mixture * upstream).sum() + stats.entropy.sum() + 2 * stats.max_prob[0].sum()
            total = total + stats.sum_squares.square().sum() + (stats.usage * torch.arange(num_labels)).sum()
        grads = torch.autograd.grad(total, leaves if form == "head" else leaves[:3])
        made.append({"mixture": mixture, **vars(stats), **{f"grad {i}": g for i, g in enumerate(grads)}})
    assert_alike(*made)


# -- compiled ----------------------------------------------------------------------------------------------------------

NVIDIA = ("sm_80", "sm_90", "sm_100", "sm_120")


def empty(*shape, dtype=F32):
    return torch.empty(shape, dtype=dtype, device="meta")


def on_meta(function, num_labels, dtype, has_options, num_rows=8192, k=8, first_row=0):
    """A call on tensors without memory. has_options: noise, mask, temperatures, all statistics."""
    options = (empty(num_rows), empty(), empty(dtype=torch.int64), empty(num_rows, num_labels, dtype=torch.bool))
    scores = empty(num_rows, num_labels, dtype=dtype)
    rows = SoftRows(scores, F32, first_row, *(options if has_options else (1.0, None, None, None)))
    names = ROW_FIELDS if has_options else ("max", "log_denom", "argmax")
    fields = {n: empty(num_rows, dtype=torch.int64 if n == "argmax" else F32) for n in names}
    up = Upstream(empty(num_rows), empty(num_rows), empty(num_rows), empty(num_labels)) if has_options else None
    of_temperature = empty(num_rows) if has_options else None
    labels, weights = empty(num_rows, k, dtype=torch.int64), empty(num_rows, k)
    tables, mixed = empty(4, num_labels, 256, dtype=dtype), empty(4, num_rows, 256, dtype=dtype)
    return {
        "softmax": lambda: on_triton.softmax(rows, fields, scores),
        "softmax_backward": lambda: on_triton.softmax_backward(
            rows, fields, scores, up, scores, of_temperature, scores
        ),
        "select": lambda: on_triton.select(rows, fields, labels, weights),
        "select_backward": lambda: on_triton.select_backward(
            rows, fields, labels, weights, weights, up, scores, of_temperature
        ),
        "gather": lambda: on_triton.gather(tables, labels, weights, mixed, False),
        "products": lambda: on_triton.products(tables, labels, mixed, weights, False),
        "scatter": lambda: on_triton.scatter(tables.float(), labels, weights, mixed, False),
    }[function]


FUNCTIONS = ("softmax", "softmax_backward", "select", "select_backward", "gather", "products", "scatter")
OVER_ROWS = FUNCTIONS[:3]
CALLS = [
    *(("sm_90", f, 1024, BF16, False) for f in FUNCTIONS),
    *((target, f, 1024, BF16, False) for target in ("sm_80", "sm_100", "sm_120") for f in OVER_ROWS),
    *((target, f, 151936, BF16, False) for target in NVIDIA for f in OVER_ROWS[:2]),
    *(("sm_90", f, num_labels, F32, False) for num_labels in (1024, 151936) for f in OVER_ROWS[:2]),
    # noise, mask, temperatures and all statistics: seconds each. sm_80 has spilled first elsewhere
    ("sm_80", "softmax", 151936, BF16, True),
    ("sm_90", "softmax_backward", 151936, BF16, True),
    ("sm_100", "select", 1024, F32, True),
    ("sm_90", "select_backward", 151936, BF16, True),
    ("sm_90", "softmax", 50257, BF16, False),
    ("sm_90", "softmax", 1, F32, False),
    *(("gfx942", f, 1024, BF16, False) for f in ("softmax", "softmax_backward", "scatter")),
]


@pytest.mark.slow
@compiles
@pytest.mark.parametrize("target, function, num_labels, dtype, has_options", CALLS)
def test_kernels_compile_without_spills_or_atomics(
    compiled, tmp_path, target, function, num_labels, dtype, has_options
):
    kernels = compiled(target, on_meta(function, num_labels, dtype, has_options))
    assert kernels
    for kernel in kernels:
        spills = nvidia_spills(kernel, tmp_path) if "cubin" in kernel.asm else amd_spills(kernel)
        assert not any(spills.values()), f"{kernel.metadata.name} spills {spills}"
        assert kernel.metadata.shared <= SHARED_LIMIT and not kernel.metadata.enable_fp_fusion
        text = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
        assert not re.search(r"\batom|\bred\.|_atomic_", text), kernel.metadata.name
        assert "lg2.approx" not in text  # its absolute error is as large as the noise of u near 1
        if (
            function in OVER_ROWS
            and num_labels % 16 == 0
            and "ptx" in kernel.asm
            and "selected" not in kernel.metadata.name
        ):
            assert wide_loads(kernel), kernel.metadata.name


@compiles
@pytest.mark.parametrize("function", OVER_ROWS)
def test_few_long_rows_are_split(compiled, function):
    names = [kernel.metadata.name for kernel in compiled("sm_90", on_meta(function, 151936, BF16, False, num_rows=4))]
    assert len(names) == 2


@compiles
@pytest.mark.parametrize("function", FUNCTIONS)
def test_rows_and_their_numbers_start_no_compilation(compiled, function):
    first = compiled("sm_90", on_meta(function, 1024, BF16, False))
    for num_rows, first_row in ((100, 1), (4097, 16), (65536, 2**33)):
        call = on_meta(function, 1024, BF16, False, num_rows=num_rows, first_row=first_row)
        assert [id(k) for k in compiled("sm_90", call)] == [id(k) for k in first], num_rows


@compiles
def test_noise_of_aligned_rows_stays_in_its_thread(compiled):
    (kernel,) = compiled("sm_90", on_meta("softmax", 256, F32, True))
    assert kernel.metadata.num_warps == 1 and kernel.metadata.shared == 0


@compiles
@pytest.mark.parametrize("num_labels", [1, 31, 1024, 1025, 4096, 16384, 16385, 151936, 262144])
@pytest.mark.parametrize("warp_size", [32, 64])
def test_cuts_cover_the_row(num_labels, warp_size):
    device = launch.Device("cuda", 132, warp_size)
    cut = on_triton.cut_of(num_labels, 4, device)
    assert cut.is_resident == (num_labels <= 16384) and cut.segment % (cut.tiles * cut.lanes * 4) == 0
    assert not cut.is_resident or cut.segment >= num_labels
    cut = on_triton.select_cut_of(num_labels, device)
    assert cut.segment == cut.tiles * cut.lanes * 4 and cut.segment < num_labels + cut.lanes * 4
    assert soft_kernels.WIDTH.value == 4
