"""The CUDA kernels on the emulated machine: single elements outside of the tensors, and sums over a thousand rows."""

import ctypes
import functools
import mmap

import pytest
import torch
from emulated_calls import (
    ALL_FIELDS,
    BF16,
    F16,
    F32,
    NO_CLUSTERS,
    STATE,
    assert_equal_bits,
    backward_of,
    loss_of,
    scan_of,
)
from emulated_cuda import Device
from inputs import logits, targets
from tolerance import OF_A_ROW, assert_alike

from auxkernels.cross_entropy import cuda as cuda_cross_entropy
from auxkernels.cross_entropy import request

pytestmark = pytest.mark.usefixtures("machine")


@functools.cache
def _libc():
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def alone(plain: torch.Tensor, at_end: bool) -> torch.Tensor:
    """A copy between pages of which no byte can be read, right beside one of them: what touches it ends the process."""
    size = plain.numel() * plain.element_size()
    inside = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, inside + 2 * mmap.PAGESIZE)
    all_bytes = torch.frombuffer(pages, dtype=torch.uint8)
    for offset in (0, mmap.PAGESIZE + inside):
        assert _libc().mprotect(all_bytes.data_ptr() + offset, mmap.PAGESIZE, 0) == 0  # PROT_NONE
    start = mmap.PAGESIZE + (inside - size if at_end else 0)
    copy = torch.frombuffer(pages, dtype=plain.dtype, count=plain.numel(), offset=start).view(plain.shape)
    return copy.copy_(plain)


@pytest.mark.parametrize("at_end", [False, True], ids=["after a hole", "before a hole"])
@pytest.mark.parametrize("device", [Device(), Device(2), NO_CLUSTERS], ids=["resident", "two blocks", "reread"])
@pytest.mark.parametrize("vocab_size, dtype", [(1, BF16), (37, BF16), (37, F32), (1027, F16), (12001, BF16)], ids=str)
def test_no_element_outside_of_the_tensors_is_touched(machine, vocab_size, dtype, device, at_end):
    """Single elements as well, which the emulation does not look at."""
    machine.use(device)
    rows = 3
    target = targets(rows, vocab_size=vocab_size)
    target[-1] = -1  # names no class, and has no weight: the last of the targets, and one before the weights
    plain = [logits(rows, vocab_size, dtype=dtype) for _ in range(2)]
    weight = torch.rand(vocab_size)
    k = {"A": torch.randn(rows), "G": torch.rand(rows)}
    away = functools.partial(alone, at_end=at_end)
    sources, grads = [away(one) for one in plain], [away(one) for one in plain]
    given = [{}, {"mean": True, "weight": weight, "label_smoothing": 0.1}, {"mean": True}]
    for options in given:
        fenced = {name: away(value) if name == "weight" else value for name, value in options.items()}
        got = loss_of(*sources, away(target), grads=grads, **fenced)
        assert_equal_bits(got, loss_of(*plain, target, **options))
    got = backward_of(*sources, away(target), {name: away(one) for name, one in k.items()}, grads=grads)
    assert_equal_bits(got, backward_of(*plain, target, k))
    factor = torch.tensor(0.5)
    cuda_cross_entropy.rescale_(grads[0], away(factor.view(1)).view(()), away(target), -100)


@pytest.mark.parametrize("rows", [897, 1025, 1153])
@pytest.mark.parametrize("is_weighted", [False, True], ids=["counted", "weighted"])
def test_every_row_is_in_the_sums_once(rows, is_weighted):
    """A thread has eight rows at a time of the losses and of the targets: of rows as narrow as these 1024 in all."""
    base = logits(rows, 3)
    target = targets(rows, vocab_size=3)
    target[:: rows // 5] = 1  # ignored, although it is a class and has a weight
    weight = torch.tensor([0.5, 2.0, 1.25])
    options = {"weight": weight} if is_weighted else {}
    loss = loss_of(base, None, target, mean=True, needs=0, ignore_index=1, **options)[0]
    exact = {name: value.double() for name, value in options.items()}
    want = torch.nn.functional.cross_entropy(base.double(), target, ignore_index=1, **exact)
    # a row's error is that of its log-softmax; float32 partial sums in any order err by sqrt(rows) at random
    assert_alike(loss, want, OF_A_ROW + rows**0.5)


def test_a_target_that_names_no_class_counts_in_the_mean_but_has_no_weight():
    base, target = logits(40, 33), targets(40, vocab_size=33)
    target[7], target[21], target[30] = -1, 33, -100
    kept = torch.ones(40, dtype=torch.bool)
    kept[[7, 21, 30]] = False
    weight = torch.rand(33) + 0.1
    grad = loss_of(base, None, target, needs=1)[-1]
    mean = loss_of(base, None, target, mean=True, needs=1)[-1]
    assert_alike(mean[kept] * 39, grad[kept])
    grad = loss_of(base, None, target, needs=1, weight=weight)[-1]
    mean = loss_of(base, None, target, mean=True, needs=1, weight=weight)[-1]
    assert_alike(mean[kept] * weight[target[kept]].sum(), grad[kept])


@pytest.mark.parametrize("vocab_size", [5, 4097, 4100])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_few_blocks_rescale_many_rows(machine, dtype, vocab_size):
    """Eight blocks, each with whole parts of rows, a row's short last part and parts of ignored rows in turn."""
    machine.use(Device(1))
    grad, target = logits(23, vocab_size, dtype=dtype), targets(23, vocab_size=vocab_size, ignored=0.3)
    target[0], target[-1] = -100, 1
    want = torch.where(target[:, None] == -100, grad, grad * -0.5)
    cuda_cross_entropy.rescale_(grad, torch.tensor(-0.5), target, -100)
    assert machine.last().num_blocks == 8
    assert_equal_bits([grad], [want])


@pytest.mark.parametrize("vocab_size, dtype", [(33, BF16), (33, F32), (12001, BF16)], ids=str)
@pytest.mark.parametrize("more", [(), ("D",)], ids=["plain", "general"])
def test_a_hostile_target_poisons_its_gradient_whatever_the_saved_state(vocab_size, dtype, more):
    """The state is of a row with another target, or of none: it is finite."""
    base, aux = (logits(4, vocab_size, dtype=dtype) for _ in range(2))
    target = torch.tensor([1, 2, 3, 4])
    fields, _ = request.named_fields(ALL_FIELDS, scan_of(base, aux, target))
    state = [fields[name].clone() for name in STATE]
    listed = [torch.ones(4) if name in ("A", "G", *more) else None for name in request.COEFFICIENTS]

    def gradients(target):
        return backward_of(base, aux, target, listed, state=state)

    want = gradients(target)
    got = gradients(torch.tensor([1, vocab_size, 3, -1]))
    for one, other in zip(got, want, strict=True):
        assert one[1::2].isnan().all() and torch.equal(one[::2], other[::2])
