"""The CUDA kernels on the emulated machine, where the contract's small cases do not reach.

Every way to share a row out (clusters of 1 to 16 blocks, rows that stay in shared memory and rows that are read again,
rings of slots that wrap), other devices, other orders of the threads, and memory that ends where the rows do.
"""

import itertools

import pytest
import torch
from confident_rows import confident_problem, true_class_errors
from emulated_calls import (
    ALL_FIELDS,
    BF16,
    F16,
    F32,
    F64,
    NEEDS_BOTH,
    NO_CLUSTERS,
    assert_equal_bits,
    backward_of,
    bits,
    loss_of,
    scan_of,
)
from emulated_cuda import Device
from implementations import Implementation
from inputs import logits, targets
from oracle import Case, check
from row_kernels import NEEDS_AUX, NEEDS_AUX_SCALE, NEEDS_BASE, NEEDS_BASE_SCALE
from row_statistics import check_statistics
from tolerance import assert_alike

from auxkernels import Logits, aux_cross_entropy
from auxkernels.cross_entropy import cuda as cuda_cross_entropy
from auxkernels.cross_entropy import request
from auxkernels.native import DTYPE_CODES

pytestmark = pytest.mark.usefixtures("machine")

IMPL = Implementation("native", "cpu", is_emulated=True)
NEEDS_SCALES = NEEDS_BASE_SCALE | NEEDS_AUX_SCALE


def short(value) -> str:
    return str(value).replace("torch.", "")


# -- every plan against float64 ----------------------------------------------------------------------------------------

WIDTHS = [1, 7, 8, 64, 127, 128, 129, 1023, 1024, 1025, 4095, 4096, 4097, 8191, 8192, 8193]
WIDTHS += [12000, 23999, 24000, 48000, 50257, 96001, 128256, 151936, 262144]
DTYPES = [(BF16, BF16), (F16, F16), (F32, F32), (BF16, F32), (F32, F16), (F32, None)]


def places(rows: int, vocab_size: int) -> torch.Tensor:
    """Targets at the ends of a row and of what its blocks have."""
    last = vocab_size - 1
    return torch.tensor([last, 0, last // 2, min(vocab_size // 16, last), last - last // 16][:rows])


def sources_of(rows, vocab_size, dtypes):
    base = logits(rows, vocab_size, dtype=dtypes[0], requires_grad=vocab_size < 30000 or dtypes[1] is None)
    aux = None if dtypes[1] is None else logits(rows, vocab_size, dtype=dtypes[1], requires_grad=True)
    return base, aux


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", DTYPES, ids=short)
@pytest.mark.parametrize("vocab_size", WIDTHS)
def test_loss_gradients_and_statistics_of_every_plan(vocab_size, dtypes):
    rows = 1 + (vocab_size + len(str(dtypes))) % 3
    base, aux = sources_of(rows, vocab_size, dtypes)
    case = Case(base, aux, places(rows, vocab_size), {"reduction": "sum"})
    got = check(case, IMPL)
    leaf = base if aux is None else aux
    loss, stats = aux_cross_entropy(base, aux, case.target, reduction="sum", return_stats=True, backend="native")
    assert torch.equal(loss.detach(), got["loss"]) and torch.equal(stats.log_prob, stats.log_prob)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(grad, got["aux[0]" if aux is not None else "base[0]"])
    check_statistics(Case(base, aux, case.target), IMPL)


@pytest.mark.parametrize("vocab_size", [1, 7, 64, 1025, 8193, 24000, 50257, 96001])
def test_the_general_kernel_at_every_width(vocab_size):
    """Weights, smoothing, z-loss, scales and softcaps: another kernel, other plans, and a scale's sum over the row."""
    rows = 2
    base, aux = sources_of(rows, vocab_size, (F32, BF16))
    weight = torch.rand(vocab_size).add(0.1)
    target = places(rows, vocab_size)
    plain = {"weight": weight, "label_smoothing": 0.2, "z_loss": 0.01}
    check(Case(base, aux, target, plain), IMPL)
    scale = torch.rand(rows).add(0.5).requires_grad_()
    check(Case(base, Logits(aux, scale=scale, softcap=5.0), target, plain), IMPL)
    check(Case(base, Logits(aux, scale=-0.5, softcap=7.0), target, {"reduction": "sum", "z_loss": 0.1}), IMPL)
    check_statistics(Case(Logits(base, softcap=9.0), Logits(aux, scale=scale), target), IMPL)


@pytest.mark.parametrize("vocab_size", [1, 7, 128, 1025, 12001, 24000])
def test_float64_at_every_width(vocab_size):
    base, aux = sources_of(2, vocab_size, (F64, F32))
    target = places(2, vocab_size)
    check(Case(base, aux, target, {"label_smoothing": 0.1}), IMPL)
    check_statistics(Case(base, aux, target), IMPL)


PLANNED = [  # rows, width, dtype of both sources, device
    *((2, vocab_size, F32, Device()) for vocab_size in WIDTHS),
    (40, 12000, F32, Device()),
    (2, 10**6, F32, Device()),
    (5, 24000, F32, Device(shared_bytes=100 << 10)),
    (3, 96001, F32, Device(multiprocessors=8)),
]


def test_the_widths_above_have_every_plan(machine):
    seen = {"cluster": set(), "tiles": set(), "segments": set(), "resident": set(), "wraps": set()}
    for rows, vocab_size, dtype, device in PLANNED:
        code = DTYPE_CODES[dtype]
        plan = machine.module.plan(rows, vocab_size, code, code, True, False, *device)
        seen["cluster"].add(plan["cluster"])
        seen["tiles"].add(plan["num_tiles"])
        seen["segments"].add(plan["num_segments"])
        seen["resident"].add(plan["is_resident"])
        clusters = min(rows, device.multiprocessors // plan["cluster"])
        num_tiles = plan["num_segments"] // plan["cluster"] * plan["num_tiles"] * -(-rows // clusters)
        seen["wraps"].add(plan["is_resident"] and num_tiles > plan["num_slots"])
    assert seen["cluster"] == seen["segments"] == {1, 2, 4, 8, 16}
    assert {1, 2, 3, 4} <= seen["tiles"]
    assert seen["resident"] == seen["wraps"] == {False, True}


@pytest.mark.parametrize("wanted", [0, request.mask_of("entropy")], ids=["loss", "statistics"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=short)
def test_the_plan_that_is_told_is_the_one_that_is_launched(machine, dtype, wanted):
    for rows, vocab_size, device, needs in [
        *((2, vocab_size, Device(), NEEDS_BOTH) for vocab_size in (1, 1025, 12000, 24000)),
        (2, 24000, Device(), 0),
        (5, 24000, Device(multiprocessors=5, shared_bytes=100 << 10), NEEDS_BOTH),
        (2, 24000, NO_CLUSTERS, NEEDS_BOTH),
    ]:
        machine.use(device)
        base, aux = (logits(rows, vocab_size, dtype=dtype) for _ in range(2))
        loss_of(base, aux, places(rows, vocab_size), needs=needs, wanted=wanted)
        code = DTYPE_CODES[dtype]
        plan = machine.module.plan(rows, vocab_size, code, code, needs != 0, wanted != 0, *device)
        threads = plan["threads"] + (32 if plan["is_resident"] else 0)
        assert machine.last()[1:] == (plan["cluster"], threads, plan["shared_bytes"]), (rows, vocab_size, device)


# -- equal bits on every device ----------------------------------------------------------------------------------------

MULTIPROCESSORS = [1, 3, 6, 12, 24, 132]
SHARED_BYTES = [100 << 10, 163 << 10, 227 << 10]
# how many clusters share a row, which the number of rows and the device decide, is in nobody's bits
FORMS = {
    "plain": {},
    "statistics": {"wanted": ALL_FIELDS & ~request.mask_of("weighted_sum")},
    "loss alone": {"needs": 0},
    "general": {"wanted": ALL_FIELDS, "label_smoothing": 0.1, "z_loss": 0.01, "aux_softcap": 6.0, "base_scale": -0.7},
}
SHARED_OUT = [(1025, BF16), (12000, F32), (12001, BF16), (24000, BF16), (24007, F16), (50257, BF16), (96008, BF16)]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("vocab_size, dtype", SHARED_OUT, ids=short)
def test_a_row_has_the_same_bits_however_it_is_shared_out(machine, vocab_size, dtype, form):
    base, aux = (logits(3, vocab_size, dtype=dtype) for _ in range(2))
    target = places(3, vocab_size)
    machine.use(NO_CLUSTERS)
    want = loss_of(base, aux, target, **FORMS[form])
    seen, num_segments = set(), machine.module.plan(3, vocab_size, 0, 0, False, False, *Device())["num_segments"]
    for device in itertools.starmap(Device, itertools.product(MULTIPROCESSORS, SHARED_BYTES)):
        machine.use(device)
        got = loss_of(base, aux, target, **FORMS[form])
        launch = machine.last()
        if (launch.cluster, launch.shared_bytes) not in seen:
            assert_equal_bits(got, want, f"{device} {launch}")
        seen.add((launch.cluster, launch.shared_bytes))
    clusters = {cluster for cluster, _ in seen}
    # 1: read again, where no cluster fits; which others there are is the plan's affair, but not one alone
    assert max(clusters) == num_segments and (len(clusters - {1}) > 1 or num_segments <= 2), clusters


def test_the_rooms_above_bring_out_every_cluster(machine):
    seen = set()
    for (vocab_size, dtype), device in itertools.product(
        SHARED_OUT, itertools.starmap(Device, itertools.product(MULTIPROCESSORS, SHARED_BYTES))
    ):
        code = DTYPE_CODES[dtype]
        plan = machine.module.plan(3, vocab_size, code, code, True, False, *device)
        if plan["is_resident"] and plan["cluster"] <= device.multiprocessors:
            seen.add(plan["cluster"])
    assert seen == {1, 2, 4, 8, 16}


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["plain", "general"])
@pytest.mark.parametrize("vocab_size, dtype", [(129, BF16), (12001, BF16), (24000, F32), (50257, BF16)], ids=short)
def test_a_row_alone_has_the_bits_it_has_among_others(machine, vocab_size, dtype, options):
    rows = 40 if vocab_size < 40000 else 20
    base, aux = (logits(rows, vocab_size, dtype=dtype) for _ in range(2))
    target = targets(rows, vocab_size=vocab_size)
    wanted = request.mask_of("nll")
    _, fields, *grads = loss_of(base, aux, target, wanted=wanted, **options)
    clusters = {machine.last().cluster}
    for start, end in ((0, 1), (rows - 1, rows), (3, 5), (7, 12)):
        part = slice(start, end)
        _, some, *parts = loss_of(base[part], aux[part], target[part], wanted=wanted, **options)
        clusters.add(machine.last().cluster)
        assert_equal_bits([some, *parts], [fields[:, part], *(grad[part] for grad in grads)], f"rows {start}:{end}")
    # one block has the narrow row, and four are needed for the float32 one, however many rows there are
    assert len(clusters) > 1 or vocab_size == 129 or dtype == F32


def test_where_no_cluster_of_this_size_runs_a_smaller_one_does_or_the_row_is_read_again(machine):
    base, aux = (logits(2, 96001, dtype=BF16) for _ in range(2))
    target = places(2, 96001)
    want = loss_of(base, aux, target)
    assert machine.last().cluster == 16
    machine.use(Device(multiprocessors=12, shared_bytes=48 << 10))
    assert_equal_bits(loss_of(base, aux, target), want)
    assert machine.last().cluster == 1
    machine.use(Device(multiprocessors=12, shared_bytes=64 << 10))  # eight blocks have little shared memory, but run
    assert_equal_bits(loss_of(base, aux, target), want)
    assert machine.last().cluster == 8


# -- any order of the threads ------------------------------------------------------------------------------------------

SEEDED = {
    # rows, width, dtype, device, options
    "cluster 1, odd": (5, 37, BF16, Device(multiprocessors=2), {}),
    "cluster 1, ring wraps": (24, 1030, F32, Device(multiprocessors=2, shared_bytes=48 << 10), {}),
    "cluster 1, no gradient": (48, 1031, BF16, Device(multiprocessors=2, shared_bytes=48 << 10), {"needs": 0}),
    "cluster 2": (3, 12001, BF16, Device(multiprocessors=6), {}),
    "cluster 2, ring wraps": (4, 12004, F32, Device(multiprocessors=2, shared_bytes=100 << 10), {}),
    "cluster 2, statistics": (3, 12008, BF16, Device(multiprocessors=6), {"wanted": ALL_FIELDS}),
    "cluster 4": (5, 24008, BF16, Device(multiprocessors=8, shared_bytes=48 << 10), {}),
    "cluster 4, no gradient": (5, 24008, BF16, Device(multiprocessors=4, shared_bytes=40 << 10), {"needs": 0}),
    "cluster 16": (3, 96001, BF16, Device(multiprocessors=16, shared_bytes=48 << 10), {"needs": NEEDS_AUX}),
    "reread": (3, 12001, BF16, NO_CLUSTERS, {"wanted": ALL_FIELDS}),
    "scales' sums": (2, 1027, F32, Device(), {"needs": NEEDS_BOTH | NEEDS_SCALES, "aux_scale": 0.5}),
    "mean": (9, 65, BF16, Device(multiprocessors=3), {"mean": True, "weight": torch.linspace(0, 1, 65)}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEDED)
def test_any_order_of_the_threads_gives_the_same_bits(machine, name):
    rows, vocab_size, dtype, device, options = SEEDED[name]
    base, aux = (logits(rows, vocab_size, dtype=dtype) for _ in range(2))
    target = places(rows, vocab_size) if rows <= 5 else targets(rows, vocab_size=vocab_size)
    target[1] = -100
    machine.use(device)
    want = None
    for seed in range(50 if vocab_size < 50000 else 20):
        machine.seed(seed)
        got = loss_of(base, aux, target, **options)
        want = got if want is None else want
        assert_equal_bits(got, want, f"seed {seed}")
    if name.startswith("cluster"):
        cluster = int(name.split(",")[0].split()[1])
        assert machine.last().cluster == cluster
    if "wraps" in name:
        code = DTYPE_CODES[dtype]
        plan = machine.module.plan(rows, vocab_size, code, code, True, False, *device)
        num_tiles = rows // (device.multiprocessors // cluster) * plan["num_segments"] // cluster * plan["num_tiles"]
        assert num_tiles >= 2 * plan["num_slots"], plan
    check(Case(base, aux.requires_grad_(), target, {"reduction": "sum"}), IMPL)


# -- nothing outside of the rows ---------------------------------------------------------------------------------------

GUARD = 40  # elements on either side


class Fenced:
    """Rows in the middle of NaN, each at its own stride, and the memory that may be touched: their columns."""

    def __init__(self, plain, offset=0, gap=0, lead=None):
        rows, vocab_size = plain.shape
        self.buffer = plain.new_full((2 * GUARD + offset + rows * (vocab_size + gap),), torch.nan)
        inner = rows if lead is None else lead[1]
        strides = [vocab_size + gap, 1] if lead is None else [inner * (vocab_size + gap), vocab_size + gap, 1]
        shape = [rows, vocab_size] if lead is None else [*lead, vocab_size]
        self.view = self.buffer.as_strided(shape, strides, GUARD + offset)
        self.view.copy_(plain.view(shape))
        self.rows = list(self.view) if lead is None else [row for outer in self.view for row in outer]


class FencedGradient:
    """A contiguous gradient in the middle of a number that must stay."""

    def __init__(self, shape, dtype, offset):
        size = torch.Size(shape).numel()
        self.buffer = torch.full((size + 2 * GUARD + offset,), -77.0, dtype=dtype)
        self.at = slice(GUARD + offset, GUARD + offset + size)
        self.inside = self.buffer[self.at]
        self.inside.fill_(torch.nan)
        self.view = self.inside.view(shape)

    def assert_fence_is_whole(self):
        assert (self.buffer[: self.at.start] == -77).all() and (self.buffer[self.at.stop :] == -77).all()
        assert not self.inside.isnan().any()


PAIRS = [(BF16, BF16), (F32, F32), (BF16, F32), (F16, F16)]
OFFSETS = [(0, 1), (1, 3), (7, 0), (4, 5), (2, 6)]  # in elements, of base and aux
BOUNDS = [
    (vocab_size, PAIRS[i % 4], OFFSETS[i % 5])
    for i, vocab_size in enumerate([5, 8, 24, 127, 128, 1025, 1032, 4099, 8200, 12001, 12008, 24001])
]
BOUNDS += [(1024, PAIRS[0], (0, 4)), (1024, PAIRS[1], (0, 2)), (12000, PAIRS[2], (4, 1)), (48, (F32, BF16), (0, 4))]


BOUNDED = [*itertools.product(("resident", "small", "reread"), ("loss", "general")), ("reread", "scales")]
BOUNDED.append(("resident", "backward"))  # which has one plan everywhere
DEVICES = {"resident": Device(), "small": Device(3, 100 << 10), "reread": NO_CLUSTERS}


@pytest.mark.parametrize("device, form", BOUNDED, ids=short)
@pytest.mark.parametrize("vocab_size, dtypes, offsets", BOUNDS, ids=short)
def test_nothing_is_touched_outside_of_the_rows(machine, vocab_size, dtypes, offsets, device, form):
    machine.use(DEVICES[device])
    plain = [logits(4, vocab_size, dtype=dtype) for dtype in dtypes]
    target = targets(4, vocab_size=vocab_size, ignored=0.25)
    options = {"z_loss": 0.1} if form == "general" else {}
    needs = NEEDS_BOTH
    if form == "scales":
        options, needs = {"aux_scale": torch.rand(4)}, NEEDS_BOTH | NEEDS_SCALES
    if form == "backward":
        k = {"A": torch.randn(4), "G": torch.rand(4)}
    want = backward_of(*plain, target, k) if form == "backward" else loss_of(*plain, target, needs=needs, **options)
    for gap, lead in ((0, None), (3, None), (8, (2, 2)), (1, (2, 2))):
        made = [Fenced(values, offset, gap, lead) for values, offset in zip(plain, offsets, strict=True)]
        fenced = [FencedGradient(made[i].view.shape, dtypes[i], (offsets[1 - i] + gap) % 8) for i in range(len(dtypes))]
        sources, grads = [one.view for one in made], [one.view for one in fenced]
        shaped = target if lead is None else target.view(lead)
        scale = options.get("aux_scale")
        given = options | ({} if scale is None else {"aux_scale": scale.view(shaped.shape)})
        grads += [torch.empty(shaped.shape) for _ in range(2 if form == "scales" else 0)]
        for one in made:
            machine.may_touch(*one.rows)
        machine.may_touch(*(one.inside for one in fenced))
        if form == "backward":
            shaped_k = {name: value.view(shaped.shape) for name, value in k.items()}
            got = backward_of(*sources, shaped, shaped_k, grads=grads)
        else:
            got = loss_of(*sources, shaped, needs=needs, grads=grads, **given)
        machine.may_touch_all()
        assert_equal_bits([one.view(other.shape) for one, other in zip(got, want, strict=True)], want, f"gap {gap}")
        for one in fenced:
            one.assert_fence_is_whole()


@pytest.mark.parametrize("device", [Device(), NO_CLUSTERS], ids=["resident", "reread"])
@pytest.mark.parametrize("vocab_size", [50, 64, 4099, 12000, 12001])
def test_columns_past_vocab_size_are_outside_and_their_gradient_is_zero(machine, vocab_size, device):
    machine.use(device)
    plain = [logits(3, vocab_size, dtype=dtype) for dtype in (BF16, BF16)]
    target = targets(3, vocab_size=vocab_size)
    target[1] = -100
    want = loss_of(*plain, target)
    k = {"A": torch.randn(3), "G": torch.rand(3)}
    want_backward = backward_of(*plain, target, k)
    for tails in ((1, 0), (7, 16), (8, 77)):
        made = [Fenced(values, 3, tail) for values, tail in zip(plain, tails, strict=True)]
        # as wide as the rows are apart: NaN after the columns that count
        shapes = [(3, vocab_size + tail) for tail in tails]
        sources = [
            one.buffer.as_strided(shape, (shape[1], 1), GUARD + 3) for one, shape in zip(made, shapes, strict=True)
        ]
        for result, function in ((want, loss_of), (want_backward, lambda *a, **o: backward_of(*a, k, **o))):
            fenced = [FencedGradient(shape, BF16, 1) for shape in shapes]
            for one in made:
                machine.may_touch(*one.rows)
            machine.may_touch(*(one.inside for one in fenced))
            got = function(*sources, target, vocab_size=vocab_size, grads=[one.view for one in fenced])
            machine.may_touch_all()
            for one, other in zip(got[-2:], result[-2:], strict=True):
                assert torch.equal(one[:, :vocab_size], other)
                assert not one[:, vocab_size:].any() and not torch.signbit(one[:, vocab_size:]).any()
            assert torch.equal(got[0], result[0]) or got[0].dim()
            for one in fenced:
                one.assert_fence_is_whole()


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("vocab_size", [33, 1024, 12001])
def test_an_expanded_row_is_read_as_its_copies(machine, vocab_size, side):
    one, full = logits(1, vocab_size, dtype=BF16), logits(6, vocab_size, dtype=BF16)
    target = targets(6, vocab_size=vocab_size)
    fenced = [Fenced(one, 5), Fenced(full, 2)]
    copies, views = [one.repeat(6, 1), full], [fenced[0].view.expand(6, vocab_size), fenced[1].view]
    want = loss_of(*copies[:: 1 - 2 * side], target)
    for each in fenced:
        machine.may_touch(*each.rows)
    grads = [torch.empty_like(full) for _ in range(2)]
    machine.may_touch(*grads)
    assert_equal_bits(loss_of(*views[:: 1 - 2 * side], target, grads=grads), want)


@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize("vocab_size", [1, 8, 33, 2047, 2052, 4100])
@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64], ids=short)
def test_rescaling_stays_inside(machine, dtype, vocab_size, offset):
    grad = FencedGradient((3, vocab_size), dtype, offset)
    grad.view.copy_(logits(3, vocab_size, dtype=dtype))
    target = torch.tensor([0, -100, 0])
    grad.view[1] = 0
    want = grad.view.clone() * -0.5
    want[1] = 0.0
    machine.may_touch(grad.inside)
    cuda_cross_entropy.rescale_(grad.view, torch.tensor(-0.5, dtype=BF16), target, -100)
    assert_equal_bits([grad.view], [want])
    grad.assert_fence_is_whole()
    cuda_cross_entropy.rescale_(grad.view, torch.tensor(1.0), target, -100)
    assert_equal_bits([grad.view], [want])


# -- gradients in the sources' own memory ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("device", [Device(), Device(4, 100 << 10), NO_CLUSTERS], ids=["resident", "small", "reread"])
@pytest.mark.parametrize("vocab_size", [1, 33, 1025, 8200, 12001, 24000, 96001])
def test_gradients_may_take_the_sources_place(machine, vocab_size, device):
    machine.use(device)
    base, aux = (logits(3, vocab_size, dtype=BF16) for _ in range(2))
    target = places(3, vocab_size)
    target[1] = -100
    k = {"A": torch.randn(3), "G": torch.rand(3)}
    general = {"z_loss": 0.1, "aux_softcap": 5.0}
    for needs, which in ((NEEDS_BOTH, [0, 1]), (NEEDS_BASE, [0]), (NEEDS_AUX, [1])):
        for options in ({}, {"mean": True}, {"wanted": ALL_FIELDS}, general):
            want = loss_of(base, aux, target, needs=needs, **options)
            copies = [base.clone(), aux.clone()]
            got = loss_of(*copies, target, needs=needs, grads=[copies[i] for i in which], **options)
            assert_equal_bits(got, want, f"{needs} {options}")
        for coefficients in (k, k | {"D": torch.randn(3)}):
            want = backward_of(base, aux, target, coefficients, needs=needs)
            copies = [base.clone(), aux.clone()]
            got = backward_of(*copies, target, coefficients, needs=needs, grads=[copies[i] for i in which])
            assert_equal_bits(got, want)


# -- many rows ---------------------------------------------------------------------------------------------------------


def ignored_rows(rows, kind):
    row = torch.arange(rows)
    return {
        "none": row < 0,
        "all": row >= 0,
        "even": row % 2 == 0,
        "odd": row % 2 == 1,
        "but one": row != rows // 2,
        "the last": row > 2,
    }[kind]


@pytest.mark.parametrize("kind", ["none", "all", "even", "odd", "but one", "the last"])
@pytest.mark.parametrize(
    "rows, vocab_size, device", [(40, 33, Device(3)), (23, 1032, Device(4)), (11, 12001, Device(4))]
)
def test_many_rows_of_each_block(rows, vocab_size, device, kind, machine):
    machine.use(device)
    base, aux = (logits(rows, vocab_size, dtype=BF16) for _ in range(2))
    target = targets(rows, vocab_size=vocab_size)
    ignored = ignored_rows(rows, kind)
    target[ignored] = -100
    base[ignored] = torch.nan
    aux.requires_grad_()
    upstream = torch.rand(rows)
    weight = torch.rand(vocab_size)
    given = [{"reduction": "sum"}, {"reduction": "none"}, {"normalizer": 7}, {"normalizer": torch.tensor(3.0)}]
    if kind != "all":
        given += [{}, {"weight": weight}, {"weight": weight, "normalizer": 2.5, "label_smoothing": 0.1}]
    for options in given:
        got = check(Case(base, aux, target, options), IMPL, upstream if "none" in options.values() else None)
        assert not got["aux[0]"][ignored].any() and not torch.signbit(got["aux[0]"][ignored]).any()
    loss, fields, *_ = loss_of(base, aux.detach(), target, wanted=request.mask_of("max", "nll", "entropy"), mean=True)
    assert loss.isnan() == (kind == "all") and not fields[:, ignored].any()


@pytest.mark.parametrize(
    "rows, vocab_size, device", [(29, 33, Device(3)), (7, 12001, Device(4)), (7, 12001, NO_CLUSTERS)]
)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "weight": True}, {"wanted": ALL_FIELDS}], ids=str)
def test_hostile_targets_among_many_rows_poison_only_their_own(machine, rows, vocab_size, device, options):
    machine.use(device)
    if "weight" in options:
        options = options | {"weight": torch.rand(vocab_size)}
    base, aux = (logits(rows, vocab_size, dtype=BF16) for _ in range(2))
    target = targets(rows, vocab_size=vocab_size)
    target[3] = -100
    want = loss_of(base, aux, target, **options)
    bad = torch.zeros(rows, dtype=torch.bool)
    for row, value in zip((0, 4, rows - 1), (vocab_size, -1, 2**40 + 1), strict=True):
        target[row], bad[row] = value, True
    got = loss_of(base, aux, target, **options)
    assert got[0].isnan()
    for one, other in zip(got[-2:], want[-2:], strict=True):
        assert one[bad].isnan().all() and torch.equal(bits(one[~bad]), bits(other[~bad]))
    if "wanted" in options:
        assert got[1][:, bad].isnan().all() and torch.equal(bits(got[1][:, ~bad]), bits(want[1][:, ~bad]))
        ranks, before = got[2][2], want[2][2]
        assert (ranks[bad] == -1).all() and torch.equal(ranks[~bad], before[~bad]) and ranks[1] >= 0
    # the divisor counts a row whose target names no class, which has no weight
    mean = loss_of(base, aux, target, mean=True, **options)
    for one, other in zip(mean[-2:], got[-2:], strict=True):
        assert torch.equal(one.isnan(), other.isnan())


def test_no_rows_at_all(machine):
    base, target = torch.empty(0, 12001, dtype=BF16), torch.empty(0, dtype=torch.int64)
    for device in (Device(), NO_CLUSTERS):
        machine.use(device)
        assert loss_of(base, base.clone(), target)[0] == 0
        assert loss_of(base, None, target, mean=True, needs=NEEDS_BASE)[0].isnan()
        assert scan_of(base, None, target)[0].shape[1:] == (0,)


def test_the_counter_is_zero_after_every_call(machine, monkeypatch):
    counter = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(cuda_cross_entropy, "_counter", lambda like: counter)
    for device in (Device(), Device(3), NO_CLUSTERS, Device(1)):
        machine.use(device)
        for rows, vocab_size in ((0, 5), (1, 5), (2, 12001), (9, 33), (70, 33)):
            base, target = logits(rows, vocab_size), targets(rows, vocab_size=vocab_size)
            for options in ({"mean": True}, {"needs": 0}, {"z_loss": 0.1}):
                first = loss_of(base, base, target, **options)
                assert counter == 0
                assert_equal_bits(loss_of(base, base, target, **options), first)
                assert counter == 0


# -- rows whose blocks have little to say ------------------------------------------------------------------------------

APART = [
    (1025, Device()),
    (12001, Device()),
    (24008, Device()),
    (50257, Device()),
    (96001, Device()),
    (24008, NO_CLUSTERS),
]


@pytest.mark.parametrize("vocab_size, device", APART, ids=short)
def test_whole_blocks_of_masked_classes_count_nothing(machine, vocab_size, device):
    """All but one class in one block, the first half, the last, all but the ends."""
    machine.use(device)
    base, aux = (logits(5, vocab_size, dtype=BF16) for _ in range(2))
    half, last = vocab_size // 2, vocab_size - 1
    keep = torch.zeros(5, vocab_size, dtype=torch.bool)
    keep[0, last], keep[1, half:], keep[2, :half], keep[3, ::last], keep[4, : vocab_size // 16] = [True] * 5
    aux[~keep] = -torch.inf
    target = torch.tensor([last, half, 0, last, 1])
    check(Case(base, aux.requires_grad_(), target, {"reduction": "sum"}), IMPL)
    check(Case(base, aux, target, {"reduction": "none"}), IMPL, torch.rand(5))
    check_statistics(Case(base, aux.detach(), target), IMPL)
    target = torch.tensor([0, 0, half, 5, last])  # a masked class is the true one
    got = Case(base, aux, target, {"reduction": "none"}).run("native", torch.ones(5))
    assert (got["loss"] == torch.inf).all()
    p = (base.double() + aux.detach().double()).softmax(-1)
    assert_alike(got["aux[0]"], p - torch.nn.functional.one_hot(target, vocab_size))


@pytest.mark.parametrize("vocab_size, device", APART, ids=short)
def test_ties_and_nan_far_apart_have_the_lowest_index(machine, vocab_size, device):
    machine.use(device)
    last = vocab_size - 1
    at = [[0, last], [last // 2, last], [last // 3, last // 2, last - 1], [last]]
    for value in (50.0, torch.nan, torch.inf):
        base = logits(4, vocab_size, dtype=BF16)
        for row, columns in enumerate(at):
            base[row, columns] = value
        for target in (torch.tensor([columns[-1] for columns in at]), torch.tensor([columns[0] for columns in at])):
            fields, ints = scan_of(base, None, target, ALL_FIELDS)
            assert ints[:2].tolist() == [[columns[0] for columns in at]] * 2, value
            assert ints[2].tolist() == [0 if value == 50.0 else -1] * 4, value
            assert fields.isnan().any() == (value != 50.0)
    base[3] = -torch.inf
    assert (scan_of(base, None, torch.tensor([0, 1, 2, last]), request.mask_of("argmax"))[0][0, 3]) == 0


@pytest.mark.parametrize("vocab_size, device", APART, ids=short)
def test_confident_rows_of_several_blocks_are_accurate(machine, vocab_size, device):
    machine.use(device)
    for place in (0, vocab_size // 2, vocab_size - 1):
        base, aux, target = confident_problem(vocab_size, 30.0, "cpu", place)
        for options, upstream in (({"reduction": "sum"}, None), ({"reduction": "none"}, torch.rand(len(target)))):
            case = Case(base, aux, target, options)
            assert true_class_errors(case, check(case, IMPL, upstream), upstream).max() < 1e-4
