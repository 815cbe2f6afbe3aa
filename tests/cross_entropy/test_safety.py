"""No tensor content reaches memory that is not its own, and every output element is written.

Hostile targets, buffers that end or begin at a protected page (one element too far kills the process), outputs that
start as NaN, canaries around gradients.
"""

import itertools
import mmap
import subprocess
import sys
from pathlib import Path

import guarded as guarded_pages
import pytest
import torch
from guarded import guarded
from inputs import HOSTILE_IGNORE_INDICES, HOSTILE_TARGETS, integer, logits, targets

from auxkernels import Logits, aux_cross_entropy, logit_stats

HOSTILE = list(itertools.product(HOSTILE_TARGETS, HOSTILE_IGNORE_INDICES))
DTYPES = [torch.int64, torch.int32]


def fits(value: int, dtype: torch.dtype) -> bool:
    return dtype == torch.int64 or -(2**31) <= value < 2**31


def hostile(bad, ignore_index, dtype, device, vocab_size=97):
    value, ignored = integer(bad, vocab_size), integer(ignore_index, vocab_size)
    if not fits(value, dtype):
        return None
    target = targets(5, vocab_size=vocab_size, dtype=dtype)
    target[target == ignored] = 1
    target[3] = value
    base = logits(5, vocab_size, device=device)
    aux = logits(5, vocab_size, device=device, requires_grad=True)
    return base, aux, target.to(device), {"ignore_index": ignored}


def calls(base, aux, target, options, backend):
    """Every path to a read at the target."""
    weight = torch.rand(base.shape[-1], device=base.device)
    for changes in (
        {"reduction": "mean"},
        {"reduction": "none"},
        {"reduction": "sum", "recompute": True, "weight": weight, "label_smoothing": 0.1},
        {"reduction": "mean", "weight": weight, "return_stats": True},
    ):
        yield lambda changes=changes: aux_cross_entropy(base, aux, target, backend=backend, **options, **changes)
    yield lambda: logit_stats(base, aux, target, backend=backend, **options)
    yield lambda: aux_cross_entropy([base, base], aux, target, backend=backend, **options)
    with torch.no_grad():
        yield lambda: aux_cross_entropy(base, aux, target, backend=backend, **options)


# -- hostile targets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad, ignore_index", HOSTILE)
def test_a_hostile_target_is_an_index_error_with_row_and_value(on_cpu, bad, ignore_index):
    for dtype in DTYPES:
        problem = hostile(bad, ignore_index, dtype, "cpu")
        if problem is None:
            continue
        value, ignored = integer(bad, 97), integer(ignore_index, 97)
        for call in calls(*problem, on_cpu.backend):
            if value == ignored:
                call()
                continue
            with pytest.raises(IndexError) as caught:
                call()
            assert f"got target[3] = {value} (row 3)" in str(caught.value)
            assert f"ignore_index={ignored}" in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("bad, ignore_index", HOSTILE)
def test_a_hostile_target_poisons_its_row_on_gpu_and_the_context_survives(on_gpu, bad, ignore_index):
    problem = hostile(bad, ignore_index, torch.int64, "cuda")
    base, aux, target, options = problem
    loss = aux_cross_entropy(base, aux, target, reduction="none", backend=on_gpu.backend, **options)
    (grad,) = torch.autograd.grad(loss.sum(), aux)
    poisoned = integer(bad, 97) != options["ignore_index"]
    assert loss.isnan().tolist() == [False, False, False, poisoned, False]
    assert grad.isnan().all(-1).tolist() == loss.isnan().tolist()
    for call in calls(*problem, on_gpu.backend):
        call()
    torch.cuda.synchronize()


def test_nothing_is_written_before_the_index_error(native, monkeypatch):
    """Outputs are handed to the module before targets are checked: they must still hold what they held."""
    made = []
    plain = torch.Tensor.new_empty

    def canary(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        out.fill_(-77)
        made.append(out)
        return out

    monkeypatch.setattr(torch.Tensor, "new_empty", canary)
    problem = hostile("V", "-100", torch.int64, "cpu", vocab_size=97)
    for call in calls(*problem, "native"):
        with pytest.raises(IndexError):
            call()
    assert all((out == -77).all() for out in made)


# -- outputs that start as NaN -----------------------------------------------------------------------------------------


@pytest.fixture
def poisoned_memory():
    """torch fills what it allocates with NaN, or the largest integer."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("vocab_size", [1, 33, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_output_element_is_written(impl, poisoned_memory, dtype, vocab_size, reduction):
    base = logits(2, 3, vocab_size + 5, dtype=dtype, device=impl.device, requires_grad=True)
    aux = logits(2, 3, vocab_size, dtype=dtype, device=impl.device, requires_grad=True)
    scales = [torch.rand(2, 3, device=impl.device).requires_grad_() for _ in range(2)]
    target = targets(2, 3, vocab_size=vocab_size, device=impl.device, ignored=0.4)
    sources = (Logits(base, scale=scales[0]), Logits(aux, scale=scales[1]))
    options = {"vocab_size": vocab_size, "backend": impl.backend}
    loss, stats = aux_cross_entropy(*sources, target, reduction=reduction, return_stats=True, **options)
    assert loss.isfinite().all()
    for name, value in vars(stats).items():
        assert value.isfinite().all() and (value < 10**6).all(), name
    for grad in torch.autograd.grad(loss, (base, aux, *scales), torch.ones_like(loss)):
        assert grad.isfinite().all()
    stats = logit_stats(*sources, target, **options)
    total = stats.entropy + stats.kl_to_base + stats.log_prob + stats.base_log_prob + stats.lse
    for grad in torch.autograd.grad(total.sum(), (base, aux, *scales)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5)], ids=str)
def test_no_rows_leave_nothing_unwritten(impl, poisoned_memory, shape):
    aux = torch.empty(shape, device=impl.device, requires_grad=True)
    scale = torch.ones((), device=impl.device, requires_grad=True)
    target = torch.empty(shape[:-1], dtype=torch.int64, device=impl.device)
    base = torch.empty(shape, device=impl.device)
    loss = aux_cross_entropy(base, Logits(aux, scale=scale), target, reduction="sum", backend=impl.backend)
    grads = torch.autograd.grad(loss, (aux, scale))
    assert loss == 0 and grads[0].shape == shape and grads[1] == 0
    assert logit_stats(base, None, backend=impl.backend).lse.shape == shape[:-1]


@pytest.mark.parametrize("offset", [0, 1, 3, 7])
def test_gradients_stay_inside_their_buffers(native, monkeypatch, offset):
    """Outputs in the middle of larger buffers, at every alignment: nothing around them changes."""
    rooms = []
    plain = torch.Tensor.new_empty

    def fenced(self, shape, dtype=None, **kwargs):
        size, dtype = torch.Size(shape), dtype or self.dtype
        room = plain(self, (size.numel() + 128 + offset,), dtype=dtype).fill_(-77)
        out = room[64 + offset : 64 + offset + size.numel()].view(size)
        rooms.append((room, 64 + offset, size.numel()))
        return out

    monkeypatch.setattr(torch.Tensor, "new_empty", fenced)
    for dtype, vocab_size in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16, torch.float64), (1, 31, 4099)
    ):
        base, aux = (logits(3, vocab_size, dtype=dtype, requires_grad=True) for _ in range(2))
        target = targets(3, vocab_size=vocab_size, ignored=0.3)
        for reduction in ("mean", "none"):
            loss, _ = aux_cross_entropy(base, aux, target, reduction=reduction, return_stats=True, backend="native")
            torch.autograd.grad(loss, (base, aux), torch.full_like(loss, 0.5))
    assert len(rooms) > 20
    for room, start, count in rooms:
        assert (room[:start] == -77).all() and (room[start + count :] == -77).all()


# -- protected pages ---------------------------------------------------------------------------------------------------


TOO_FAR = """
import sys
sys.path.insert(0, {folder!r})
import ctypes, torch
from guarded import guarded
tensor = guarded(torch.zeros(8), at_end=True)
print(tensor.sum().item())
ctypes.cast(tensor.data_ptr() + {offset}, ctypes.POINTER(ctypes.c_char))[0]
print("survived")
"""


@pytest.mark.slow
@pytest.mark.parametrize("offset, survives", [(31, True), (32, False)])
def test_the_guard_page_kills_a_process_that_reads_one_byte_too_far(offset, survives):
    """The negative control of the tests below."""
    code = TOO_FAR.format(folder=str(Path(guarded_pages.__file__).parent), offset=offset)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1200)
    assert done.stdout.split() == (["0.0", "survived"] if survives else ["0.0"])
    assert (done.returncode == 0) == survives


MAP_NORESERVE = 0x4000  # of Linux; Python does not always name it


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs memory that is not there until it is touched")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_further_apart_than_32_bits_can_say_are_found(native, reduction):
    """Row strides past 2**31 elements, in memory of which only the rows themselves are ever touched."""
    rows, vocab_size, stride = 3, 1000, 2**31 + 5
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    try:
        room = mmap.mmap(-1, 2 * (stride * rows + vocab_size), flags=flags)
    except (OSError, OverflowError):
        pytest.skip("no address space of 13 GB")
    base = torch.frombuffer(room, dtype=torch.bfloat16).as_strided((rows, vocab_size), (stride, 1))
    plain = logits(rows, vocab_size, dtype=torch.bfloat16)
    base.copy_(plain)
    aux, target = logits(rows, vocab_size, requires_grad=True), targets(rows, vocab_size=vocab_size)
    results = []
    for source in (base, plain):
        loss = aux_cross_entropy(source, aux, target, reduction=reduction, backend="native")
        stats = logit_stats(source, aux, target, backend="native")
        results.append([loss.detach(), stats.lse.detach(), *torch.autograd.grad(loss.sum(), aux)])
    assert all(map(torch.equal, *results))


GUARDED_WIDTHS = [1, 15, 16, 17, 33, 1023, 4095, 4096, 4097]


@pytest.mark.parametrize("at_end", [True, False], ids=["ends at the page", "begins after the page"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("vocab_size", GUARDED_WIDTHS)
def test_nothing_is_read_or_written_past_a_protected_page(native, monkeypatch, vocab_size, dtype, at_end):
    plain, made = torch.Tensor.new_empty, []

    def on_guarded_pages(self, shape, dtype=None, **kwargs):
        made.append(guarded(plain(self, shape, dtype=dtype or self.dtype, **kwargs), at_end))
        return made[-1]

    compute = torch.float64 if dtype == torch.float64 else torch.float32
    rows = 3
    base, aux = (guarded(logits(rows, vocab_size, dtype=dtype), at_end) for _ in range(2))
    weight = guarded(torch.rand(vocab_size, dtype=compute), at_end)
    scale = guarded(torch.rand(rows, dtype=compute), at_end).requires_grad_()
    monkeypatch.setattr(torch.Tensor, "new_empty", on_guarded_pages)
    base.requires_grad_()
    aux.requires_grad_()
    for target_dtype, options in itertools.product(
        DTYPES,
        ({}, {"reduction": "none"}, {"reduction": "sum", "weight": weight, "label_smoothing": 0.1, "z_loss": 0.1}),
    ):
        target = guarded(targets(rows, vocab_size=vocab_size, dtype=target_dtype, ignored=0.2), at_end)
        for source in (aux, Logits(aux, scale=scale, softcap=5.0)):
            loss, stats = aux_cross_entropy(base, source, target, return_stats=True, backend="native", **options)
            torch.autograd.grad(loss, (base, aux), torch.full_like(loss, 0.5))
            assert loss.isfinite().all() and stats.entropy.isfinite().all()
    stats = logit_stats(base, aux, target, backend="native")
    torch.autograd.grad(stats.entropy.sum() + stats.kl_to_base.sum(), (base, aux))
    assert len(made) > 12 * 3  # the outputs were on guarded pages too
