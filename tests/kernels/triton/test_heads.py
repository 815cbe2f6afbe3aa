"""The Triton kernel that scans heads without logits: interpreted against float64, and compiled ahead of time.

As in test_cross_entropy.py, an ordinary run starts this file once more with TRITON_INTERPRET=1 for the first
kind; fp16 only, the interpreter's bf16 is not to be trusted. No GPU is needed, and nothing here shows what one does.
"""

import re
import subprocess

import pytest
import torch
from interpreted import INTERPRETED, check_interpreted, compiles, interpreted
from row_kernels import problem_of
from tolerance import assert_alike

import auxkernels
from auxkernels.cross_entropy import request

triton = pytest.importorskip("triton")

from triton_compile import nvidia_spills  # noqa: E402

from auxkernels.cross_entropy.triton import head_launch as heads  # noqa: E402
from auxkernels.cross_entropy.triton import launch as cross_entropy  # noqa: E402
from auxkernels.cross_entropy.triton.head_launch import Head, Schedule, Tile, fits, scan, schedule_of  # noqa: E402
from auxkernels.tritonlib import launch  # noqa: E402

ALL_FIELDS = (1 << len(request.FIELDS)) - 1
PLAIN = request.mask_of("max", "log_denom", "nll", "lse", "log_prob", "argmax", "target_rank")
RANK = request.mask_of("target_rank")
WITHOUT_TARGET = ALL_FIELDS & ~request.OF_TARGET
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.slow
@compiles
def test_the_interpreted_kernels_pass():
    check_interpreted(__file__)


# -- interpreted: 3 blocks of rows, splits of 3 tiles and of a part of one, 3 steps of the base's product --------------

N, V, D_BASE, D_AUX = 10, 61, 48, 16


@pytest.fixture(autouse=True)
def _many_tiles(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(heads, "tile_of", lambda *_: Tile(4, 16, 16, 2, 2, 4, 1, 1))
        monkeypatch.setattr(heads, "schedule_of", lambda rows, *_: Schedule(-(-rows // 4), 2, 48, 2))
        monkeypatch.setattr(heads, "FINISH_LANES", 2)


def head(rows=N, classes=V, depth=D_BASE, **options) -> Head:
    """Logits of a size of about 3."""
    hidden, weight = (torch.randn(n, depth, dtype=F64) * 3**0.5 * depth**-0.25 for n in (rows, classes))
    return Head(hidden.to(F16), weight.to(F16), *(options.get(name) for name in ("bias", "scale", "softcap")))


def logits_of(given: Head, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 logits of the exact values, and the error of float32 products and sums in them."""
    hidden, weight = given.hidden.to(F64), given.weight[:vocab_size].to(F64)
    z, size = hidden @ weight.T, hidden.abs() @ weight.abs().T
    if given.bias is not None:
        z = z + given.bias[:vocab_size].to(F64)
        size = size + z.abs()
    if given.softcap is not None:
        z = given.softcap * torch.tanh(z / given.softcap)
    if given.scale is not None:
        scale = given.scale.to(F64)
        scale = scale[:, None] if scale.dim() else scale
        z, size = z * scale, size * scale.abs()
    return z, torch.where(size.isfinite(), size, 0.0) * given.hidden.shape[-1] ** 0.5 * 2.0**-23


def expected(base, aux, target, weight, ignore_index, vocab_size) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Every field from its definition in ops.py, and an error for each row."""
    z_b, error = logits_of(base, vocab_size)
    s = z_b
    if aux is not None:
        z_a, more = logits_of(aux, vocab_size)
        s, error = z_b + z_a, error + more
    m, m_b = s.amax(-1), z_b.amax(-1)
    p, q = (s - m[:, None]).exp(), (z_b - m_b[:, None]).exp()
    log_d, log_d_b = p.sum(-1).log(), q.sum(-1).log()
    p = p / p.sum(-1, keepdim=True)
    w = torch.ones(vocab_size, dtype=F64) if weight is None else weight.to(F64)

    def mean(z):
        return torch.where(p == 0, 0.0, p * z).sum(-1)

    want = {
        "max": m,
        "log_denom": log_d,
        "mean_sum": mean(s - m[:, None]),
        "mean_base": mean(z_b - m_b[:, None]),
        "base_max": m_b,
        "base_log_denom": log_d_b,
        "weighted_sum": (w * (s - m[:, None])).sum(-1),
        "argmax": s.argmax(-1),
        "base_argmax": z_b.argmax(-1),
    }
    want["lse"], want["entropy"] = m + log_d, log_d - want["mean_sum"]
    want["kl_to_base"] = (want["mean_sum"] - want["mean_base"]) + (log_d_b - log_d)
    ignored = torch.zeros(len(s), dtype=torch.bool)
    if target is not None:
        ignored = target.long() == ignore_index
        poisoned = ~ignored & ((target < 0) | (target >= vocab_size))
        y = target.long().masked_fill(ignored | poisoned, 0)[:, None]
        want["nll"], want["base_nll"] = m + log_d - s.gather(1, y)[:, 0], m_b + log_d_b - z_b.gather(1, y)[:, 0]
        want["log_prob"], want["base_log_prob"] = -want["nll"], -want["base_nll"]
        want["target_rank"] = (s > s.gather(1, y)).sum(-1).masked_fill(poisoned | log_d.isnan(), -1)
        want = {k: t.masked_fill(poisoned, torch.nan) if t.is_floating_point() else t for k, t in want.items()}
    want = {k: t.masked_fill(ignored, 0.0 if t.is_floating_point() else -1) for k, t in want.items()}
    size = 1 + m.abs() + m_b.abs() + log_d + log_d_b + (w.sum() if weight is not None else vocab_size) * 0.1
    return want, 4 * error.amax(-1) + 16 * 2.0**-24 * torch.where(size.isfinite(), size, 1.0)


def check(base, aux, target=None, weight=None, ignore_index=-100, vocab_size=V, wanted=None) -> dict[str, torch.Tensor]:
    """Scans, compares every wanted field, and returns them by name."""
    if wanted is None:
        wanted = WITHOUT_TARGET if target is None else ALL_FIELDS
    assert fits(base, aux, wanted) is None
    if wanted & RANK:  # without ranks it is the scan that finds the targets' logits
        check(base, aux, target, weight, ignore_index, vocab_size, wanted & ~RANK)
    got, _ = request.named_fields(wanted, scan(base, aux, target, weight, ignore_index, vocab_size, wanted))
    want, error = expected(base, aux, target, weight, ignore_index, vocab_size)
    for name, value in got.items():
        if not value.is_floating_point():
            assert torch.equal(value, want[name]), name
            continue
        assert value.dtype == F32
        # a weighted sum has V terms of that error
        allowed = error * (vocab_size if name == "weighted_sum" else 1)
        off = (value.to(F64) - want[name]).abs()
        fine = (off <= allowed) | (value == want[name]) | (value.isnan() & want[name].isnan())
        assert fine.all(), f"{name}: {value[~fine]} should be {want[name][~fine]} within {allowed[~fine]}"
    return got


def some_targets(vocab_size=V) -> torch.Tensor:
    """The first and last class, ignored rows among others, and a block of ignored rows alone."""
    target = torch.randint(vocab_size, (N,))
    target[0], target[1], target[2], target[9] = 0, vocab_size - 1, -100, vocab_size - 1
    target[4:8] = -100
    return target


@interpreted
def test_all_fields_of_two_plain_heads():
    got = check(head(), head(depth=D_AUX), some_targets())
    assert not any(value[2] for name, value in got.items() if value.is_floating_point())
    assert got["argmax"][2] == got["argmax"][5] == got["target_rank"][2] == got["target_rank"][5] == -1


@interpreted
def test_one_accumulator_where_nothing_is_asked_of_the_base():
    aux = head(depth=D_AUX, bias=torch.randn(V).to(F16))
    check(head(bias=torch.randn(V).to(F16)), aux, some_targets(), wanted=PLAIN)
    check(head(bias=torch.randn(V).to(F16), scale=torch.tensor(0.7), softcap=4.0), aux, some_targets(), wanted=PLAIN)


@interpreted
def test_bias_scale_softcap_and_class_weights_of_both_heads():
    base = head(bias=torch.randn(V).to(F16), scale=torch.rand(N) + 0.5, softcap=5.0)
    aux = head(depth=D_AUX, bias=torch.randn(V).to(F16), scale=torch.tensor(-0.7), softcap=3.0)
    check(base, aux, some_targets(), torch.rand(V))


@interpreted
@pytest.mark.parametrize("has_target", [True, False])
def test_one_head(monkeypatch, has_target):
    monkeypatch.setattr(heads, "FINISH_LANES", 8)  # more than a row has states
    check(head(bias=torch.randn(V).to(F16)), None, some_targets() if has_target else None)


@interpreted
def test_two_heads_without_target():
    got = check(head(), head(depth=D_AUX))
    assert set(got) == set(request.fields_in(WITHOUT_TARGET))


@interpreted
def test_classes_beyond_vocab_size_are_not_read():
    base, aux = head(), head(depth=D_AUX, classes=V + 3, bias=torch.randn(V + 3).to(F16))
    base.weight[50:], aux.weight[50:], aux.bias[50:] = torch.nan, torch.nan, torch.inf
    check(base, aux, some_targets(50), torch.rand(50), vocab_size=50)


@interpreted
def test_a_depth_that_is_no_multiple_of_the_step(monkeypatch):
    monkeypatch.setattr(heads, "tile_of", lambda *_: Tile(4, 16, 32, 2, 2, 4, 1, 1))
    storage = torch.full((N, 64), torch.nan, dtype=F16)  # what lies beyond a row's end
    base = head()
    storage[:, :48] = base.hidden
    check(base._replace(hidden=storage[:, :48]), head(depth=D_AUX), some_targets(), wanted=PLAIN)


@interpreted
def test_nan_stays_in_its_row_and_an_ignored_row_hides_it():
    base, aux, target = head(), head(depth=D_AUX), some_targets()
    base.hidden[2], base.hidden[3] = torch.nan, torch.nan  # row 2 is ignored
    got, _ = request.named_fields(ALL_FIELDS, scan(base, aux, target, None, -100, V, ALL_FIELDS))
    for name, value in got.items():
        if value.is_floating_point() and name not in ("max", "base_max"):
            assert value.isnan().nonzero().tolist() == [[3]] and value[2] == 0, name
    kept = [i for i in range(N) if i not in (2, 3)]
    clean = base.hidden.clone()
    clean[[2, 3]] = 0
    again, _ = request.named_fields(
        ALL_FIELDS, scan(base._replace(hidden=clean), aux, target, None, -100, V, ALL_FIELDS)
    )
    assert all(torch.equal(got[name][kept], again[name][kept]) for name in got)


@interpreted
@pytest.mark.parametrize("bad", [-1, V, 2**32 + 5])
def test_a_target_out_of_range_poisons_its_row_alone(bad):
    target = some_targets()
    target[3] = bad
    got = check(head(), head(depth=D_AUX), target, wanted=PLAIN)
    assert got["nll"].isnan().nonzero().tolist() == [[3]] and got["argmax"][3] >= 0
    assert got["target_rank"][3] == -1 and (got["target_rank"][[0, 1, 8, 9]] >= 0).all()


@interpreted
def test_any_int64_is_an_ignore_index():
    target = some_targets()
    check(head(), None, target.masked_fill(target == -100, 2**40), ignore_index=2**40, wanted=PLAIN)
    check(head(), None, target.masked_fill(target == -100, 5).to(torch.int32), ignore_index=5, wanted=PLAIN)


@interpreted
def test_masked_classes_also_whole_tiles_of_them():
    bias = torch.zeros(V)
    bias[3], bias[16:32], bias[48:] = -torch.inf, -torch.inf, -torch.inf  # the last tile too
    base, aux, target = head(bias=bias.to(F16)), head(depth=D_AUX), some_targets()
    target[[0, 1, 3, 8, 9]] = torch.tensor([0, 47, 20, 3, 7])  # two of them masked
    wanted = ALL_FIELDS & ~request.mask_of("weighted_sum")
    got = check(base, aux, target, wanted=wanted)
    assert got["nll"][3] == got["nll"][8] == torch.inf and got["kl_to_base"].isfinite().all()
    check(head(), aux._replace(bias=bias.to(F16)), target, wanted=PLAIN)


@interpreted
def test_rows_without_a_distribution_are_what_the_kernel_for_logits_makes_of_them():
    base, aux, target = head(rows=4), head(rows=4, depth=D_AUX), torch.tensor([3, 4, 5, 6])
    base.hidden[1], aux.hidden[2] = torch.nan, torch.nan
    base.hidden[3] = 0
    base.hidden[3, 7] = torch.inf  # logits of +inf and -inf
    logits = [logits_of(given, V)[0].float() for given in (base, aux)]
    got = scan(base, aux, target, None, -100, V, ALL_FIELDS)
    want = cross_entropy.scan(problem_of(*logits, target, vocab_size=V), ALL_FIELDS)
    assert torch.equal(got[0].isnan(), want[0].isnan()) and torch.equal(got[1], want[1])
    infinite = want[0].isinf()
    assert infinite.any() and torch.equal(got[0].isinf(), infinite) and torch.equal(got[0][infinite], want[0][infinite])


@interpreted
def test_argmax_takes_the_lowest_class_of_a_tie_and_the_first_nan():
    base = head()
    base.weight[[11, 12, 40, 60]] = base.weight[30] * 4
    got = check(base, None, wanted=request.mask_of("argmax", "base_argmax"))
    assert (got["argmax"] == 11).any()
    base.weight[[50, 51, 33]] = torch.nan
    got, _ = request.named_fields(
        ALL_FIELDS & ~request.OF_TARGET, scan(base, None, None, None, -100, V, WITHOUT_TARGET)
    )
    assert (got["argmax"] == 33).all() and got["lse"].isnan().all()


@interpreted
@pytest.mark.parametrize("form", ["one", "one accumulator", "capped first", "two"])
def test_ranks_count_what_is_greater_and_no_tie(form):
    """Products of small integers are exact, and many are equal; beyond them all classes have the same weights."""
    torch.manual_seed(1)
    base, aux = head(bias=torch.randn(V).round().to(F16)), head(depth=D_AUX)
    for given in (base, aux):
        given.hidden.round_(), given.weight.round_()
    base = base._replace(scale=torch.tensor(0.5) if form == "capped first" else None)
    aux = None if form == "one" else aux._replace(scale=torch.rand(N).round() + 1 if form == "two" else None)
    target = some_targets()
    got = check(base, aux, target, wanted=PLAIN)["target_rank"]
    kept = target != -100
    assert got[kept].max() > V // 2
    base.weight[:], base.bias[:] = base.weight[7].clone(), base.bias[7].clone()
    if aux is not None:
        aux.weight[:] = aux.weight[7].clone()
    ties = request.named_fields(PLAIN, scan(base, aux, target, None, -100, V, PLAIN))[0]["target_rank"]
    assert not ties[kept].any() and (ties[~kept] == -1).all()


@interpreted
def test_strided_rows_are_read_in_place_and_results_repeat():
    base, aux, target = head(), head(depth=D_AUX), some_targets()
    room = torch.full((2 * N, 64), torch.nan, dtype=F16)
    room[::2, 16:] = base.hidden
    strided = base._replace(hidden=room[::2, 16:])
    assert fits(strided, aux, ALL_FIELDS) is None
    plain, again = (scan(b, aux, target, None, -100, V, ALL_FIELDS) for b in (base, strided))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@interpreted
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_evaluation_and_row_losses_of_heads_store_no_logits(monkeypatch, reduction):
    scans = []
    monkeypatch.setattr(heads, "scan", lambda *args: scans.append(args) or scan(*args))
    base, aux, target = head(), head(depth=D_AUX), some_targets().view(1, N)
    hidden = aux.hidden.view(1, N, -1).requires_grad_(reduction == "none")
    sources = (auxkernels.Head(base.hidden.view(1, N, -1), base.weight), auxkernels.Head(hidden, aux.weight))
    loss = auxkernels.aux_cross_entropy(*sources, target, reduction=reduction, backend="triton")
    want = auxkernels.aux_cross_entropy(*sources, target, reduction=reduction, backend="reference")
    assert_alike(loss, want)
    assert len(scans) == 1 and loss.shape == target.shape[: loss.dim()]


@interpreted
def test_no_rows_and_nothing_wanted():
    assert scan(head(), None, None, None, -100, V, 0) == []
    floats, ints = scan(head(rows=0), head(rows=0, depth=D_AUX), None, None, -100, V, WITHOUT_TARGET)
    assert floats.shape == (WITHOUT_TARGET.bit_count() - 2, 0) and ints.shape == (2, 0)


# -- policy ------------------------------------------------------------------------------------------------------------


def on_meta(rows=256, classes=1024, depth=64, dtype=BF16, device="meta") -> Head:
    hidden, weight = (torch.empty(n, depth, dtype=dtype, device=device) for n in (rows, classes))
    return Head(hidden, weight, None, None, None)


@compiles
@pytest.mark.parametrize("rows", [1, 8, 100, 1024, 8192, 65536])
@pytest.mark.parametrize("vocab_size", [1, 300, 32000, 151936])
@pytest.mark.parametrize("multiprocessors", [1, 108, 132])
def test_splits_cover_the_vocabulary_and_fill_the_device(rows, vocab_size, multiprocessors):
    tile = Tile(128, 256, 64, 4, 2, 8, 8, 4)
    made = schedule_of(rows, vocab_size, 8192, tile, multiprocessors)
    assert made.num_blocks == -(-rows // 128) and 1 <= made.blocks_together <= made.num_blocks
    assert made.split_size % tile.cols == 0
    assert (made.num_splits - 1) * made.split_size < vocab_size <= made.num_splits * made.split_size
    assert made.num_splits * tile.parts <= heads.MAX_STATES_PER_ROW
    tiles, programs = -(-vocab_size // 256), made.num_blocks * made.num_splits
    spent = -(-programs // multiprocessors) * (made.split_size // 256) * multiprocessors
    if tiles * made.num_blocks > 20 * multiprocessors:
        assert made.num_blocks * tiles > 0.85 * spent
    elif programs < multiprocessors:
        assert made.split_size <= 2 * 256 or programs > 0.75 * multiprocessors or made.num_splits == tiles


@compiles
@pytest.mark.parametrize(
    "head, reason",
    [
        (on_meta(dtype=F32), "bfloat16 or float16"),
        (on_meta()._replace(weight=torch.empty(1024, 64, dtype=F16, device="meta")), "weight must be torch.bfloat16"),
        (on_meta(depth=72), "multiple of 16, got 72"),
        (on_meta()._replace(hidden=torch.empty(64, 256, dtype=BF16, device="meta").T), "rows of hidden"),
        (on_meta()._replace(weight=torch.empty(1024, 72, dtype=BF16, device="meta")[:, :64]), "rows of weight"),
        (on_meta()._replace(hidden=torch.empty_strided((256, 64), (2**23, 1), dtype=BF16, device="meta")), "apart"),
        (on_meta()._replace(hidden=torch.empty(256, 80, dtype=BF16, device="meta")[:, 8:72]), "rows of hidden"),
    ],
)
def test_what_does_not_fit_is_said(monkeypatch, head, reason):
    monkeypatch.setattr(launch, "device_of", lambda _: launch.Device("cuda", 132, 32))
    monkeypatch.setattr(heads, "architecture_of", lambda _: 90)
    assert fits(on_meta(), on_meta(dtype=F16, depth=16), ALL_FIELDS) is None
    assert reason in fits(on_meta(), head, ALL_FIELDS) and fits(head, None, ALL_FIELDS).startswith("base: ")
    monkeypatch.setattr(heads, "architecture_of", lambda _: 75)
    assert "compute capability" in fits(on_meta(), None, 0)


@compiles
def test_a_cpu_does_not_fit():
    assert "CUDA" in fits(on_meta(device="cpu"), None, 0)


# -- compiled ----------------------------------------------------------------------------------------------------------

INSTRUCTION = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "sm_120": "mma.sync"}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "sm_120": 99 * 1024}
FEW_BYTES = 64  # of a thread's stack: numbers that wait there while the products of a tile are formed


CLASSES = 128256
STATISTICS = request.mask_of(
    *("lse", "entropy", "kl_to_base", "log_prob", "base_log_prob", "argmax", "base_argmax", "target_rank")
)


def call(rows, wanted, base=None, aux=None, aux_dtype=BF16, aux_depth=256, weight=None):
    def number(*shape, dtype=F32):
        return torch.empty(shape, dtype=dtype, device="meta")

    def bent(given, dtype):
        given = given or {}
        scale = {"row": number(rows), "number": number(), None: None}[given.get("scale")]
        return number(CLASSES, dtype=dtype) if given.get("bias") else None, scale, given.get("softcap")

    wide, narrow = on_meta(rows, CLASSES, 4096), on_meta(rows, CLASSES, aux_depth, aux_dtype)
    first, second = Head(*wide[:2], *bent(base, BF16)), Head(*narrow[:2], *bent(aux, aux_dtype))
    target = number(rows, dtype=torch.int64)
    return first, second, target, number(CLASSES) if weight else None, -100, CLASSES, wanted


BENT = {"bias": True, "scale": "row", "softcap": 30.0}
VARIANTS = {
    "plain": lambda rows: call(rows, request.mask_of("max", "log_denom", "nll")),
    "statistics": lambda rows: call(rows, STATISTICS),
    "bent": lambda rows: call(rows, PLAIN, BENT, {"bias": True}, F16),
    "uneven": lambda rows: call(rows, request.mask_of("max", "log_denom", "nll"), aux_depth=48),
    "everything": lambda rows: call(rows, ALL_FIELDS, BENT, {"bias": True, "scale": "number"}, F16, weight=True),
}
COMPILED = [
    *((target, variant) for target in INSTRUCTION for variant in ("plain", "statistics")),
    *(("sm_90", variant) for variant in ("bent", "uneven")),
    ("sm_80", "everything"),  # the longest to compile
]


def the_scan(variant, rows=8192):
    args = VARIANTS[variant](rows)

    def run():
        assert fits(*args[:2], args[-1]) is None
        scan(*args)

    return run


def loops_of_products(kernel, tmp_path) -> list[str]:
    """The machine code of the innermost loops with a matrix instruction."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-sass", str(cubin)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = {int(at, 16): line for at, line in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S[^;]*);", said)}
    ends = {at: re.search(r"\bBRA(?:\.\S+)?\s.*?0x([0-9a-f]+)", line) for at, line in code.items()}
    ranges = [(int(end[1], 16), at) for at, end in ends.items() if end and int(end[1], 16) < at]
    loops = {r: "\n".join(line for at, line in code.items() if r[0] <= at <= r[1]) for r in ranges}
    loops = {r: text for r, text in loops.items() if re.search(r"GMMA|HMMA|UTC\w*MMA", text)}
    return [text for r, text in loops.items() if not any(r[0] <= o[0] and o[1] <= r[1] and o != r for o in loops)]


@pytest.mark.slow
@compiles
@pytest.mark.parametrize("target, variant", COMPILED)
def test_the_scan_compiles_to_matrix_instructions_and_keeps_its_registers(compiled, tmp_path, target, variant):
    *of_targets, over_tiles, finish = compiled(target, the_scan(variant))
    assert len(of_targets) == bool(VARIANTS[variant](1)[-1] & request.mask_of("target_rank"))
    for kernel in (*of_targets, over_tiles):
        assert INSTRUCTION[target] in kernel.asm["ptx"]
        assert kernel.metadata.shared <= SHARED_LIMIT[target]
    for kernel in of_targets:
        assert not any(nvidia_spills(kernel, tmp_path).values())
    assert nvidia_spills(over_tiles, tmp_path)["LOCAL"] == 0
    assert nvidia_spills(over_tiles, tmp_path)["STACK"] <= FEW_BYTES
    loops = loops_of_products(over_tiles, tmp_path)
    assert len(loops) >= 2 and not any(re.search(r"\b(LDL|STL)\b", text) for text in loops)
    assert not any(nvidia_spills(finish, tmp_path).values())
    for kernel in (*of_targets, over_tiles, finish):
        assert not kernel.metadata.enable_fp_fusion
        assert not re.search(r"\batom|\bred\.", kernel.asm["ptx"])


@compiles
def test_the_number_of_rows_starts_no_compilation(compiled):
    first = compiled("sm_90", the_scan("plain"))
    for rows in (1, 100, 4097, 65536):
        again = compiled("sm_90", the_scan("plain", rows))
        assert [id(kernel) for kernel in again] == [id(kernel) for kernel in first]
