"""How the CUDA module starts its kernels, on the emulated machine: in captures, as planned, and of sizes of zero."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from captures import CAPTURED_FIRST
from emulated_calls import (
    BF16,
    F32,
    F64,
    NEEDS_BOTH,
    NO_CLUSTERS,
    assert_equal_bits,
    backward_of,
    loss_of,
    scan_of,
)
from emulated_cuda import Device, Machine
from inputs import logits, targets
from row_kernels import NEEDS_BASE

from auxkernels.cross_entropy import cuda as cuda_cross_entropy
from auxkernels.cross_entropy import request

pytestmark = pytest.mark.usefixtures("machine")

# -- captures: rooms that no other test has, of which the module knows nothing yet -------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_a_capture_may_hold_the_first_launch_of_every_kernel(machine, dtype):
    base, aux = (logits(3, 1030, dtype=dtype) for _ in range(2))
    target = targets(3, vocab_size=1030)
    calls = [
        lambda: loss_of(base, aux, target),
        lambda: loss_of(base, aux, target, z_loss=0.1),
        lambda: backward_of(base, aux, target, {"A": torch.ones(3, dtype=request.compute_dtype(base, aux))}),
        lambda: [grad := base.clone(), cuda_cross_entropy.rescale_(grad, torch.tensor(0.5), target, -100)][:1],
    ]
    for has_clusters in (True, False):
        machine.use(Device(multiprocessors=10 + dtype.itemsize, has_clusters=has_clusters))
        with machine.capture():
            got = [call() for call in calls]
        for one, call in zip(got, calls, strict=True):
            assert_equal_bits(one, call())


def test_the_script_that_captures_first_on_a_gpu_is_right(machine, monkeypatch, capsys):
    """Word for word, but on the emulated machine, whose captures run at once and need no replay."""
    machine.use(Device(multiprocessors=21))
    graph = SimpleNamespace(num_replays=0)

    @contextlib.contextmanager
    def captured(given):
        assert given is graph
        with machine.capture():
            yield

    def replay():
        graph.num_replays += 1

    graph.replay = replay
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", captured)
    exec(CAPTURED_FIRST.replace('"cuda"', '"cpu"'), {})
    assert capsys.readouterr().out.split() == ["True"] and graph.num_replays == 1


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [Device(), Device(multiprocessors=5, shared_bytes=100 << 10), NO_CLUSTERS], ids=str)
@pytest.mark.parametrize("vocab_size", [33, 12001, 24000])
def test_a_device_tells_the_launch_of_a_call(machine, vocab_size, device):
    machine.use(device)
    base, aux = (logits(2, vocab_size, dtype=BF16) for _ in range(2))
    for has_gradient, wanted in ((True, 0), (False, 0), (True, request.mask_of("entropy"))):
        options = {"has_gradient": has_gradient, "has_statistics": wanted != 0}
        plan = cuda_cross_entropy.plan(2, vocab_size, BF16, BF16, **options, device=Machine.number)
        loss_of(base, aux, targets(2, vocab_size=vocab_size), needs=NEEDS_BOTH if has_gradient else 0, wanted=wanted)
        num_blocks, cluster, threads, shared_bytes = machine.last()
        assert (plan["cluster"], plan["shared_bytes"]) == (cluster, shared_bytes)
        assert plan["threads"] + 32 * plan["is_resident"] == threads
        assert num_blocks == min(2, plan["clusters_at_once"]) * cluster
        assert plan["clusters_at_once"] == device.multiprocessors // cluster


def test_the_plan_told_is_of_clusters_that_run(machine):
    """Sixteen blocks would share the row, but twelve run at once."""
    device = Device(multiprocessors=12, shared_bytes=64 << 10)
    machine.use(device)
    plan = cuda_cross_entropy.plan(2, 96001, BF16, BF16, device=Machine.number)
    assert (plan["cluster"], plan["clusters_at_once"]) == (8, 1)
    assert machine.module.plan(2, 96001, 1, 1, True, False, *device)["cluster"] == 16


# -- sizes of zero -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5), (0, 0), (2, 0, 5), (0, 2, 5), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F64], ids=str)
def test_nothing_is_rescaled_where_there_is_nothing(shape, dtype):
    grad = torch.empty(shape, dtype=dtype)
    target = torch.zeros(shape[:-1], dtype=torch.int64)
    for given in (target, None):
        cuda_cross_entropy.rescale_(grad, torch.tensor(-0.5), given, -100)


@pytest.mark.parametrize("device", [Device(), NO_CLUSTERS], ids=["resident", "reread"])
@pytest.mark.parametrize("shape", [(0, 5), (0, 12001), (2, 0, 33), (0, 2, 33)], ids=str)
def test_no_rows_have_a_loss_and_empty_outputs(machine, shape, device):
    machine.use(device)
    base, target = torch.empty(shape, dtype=BF16), torch.zeros(shape[:-1], dtype=torch.int64)
    loss, *grads = loss_of(base, base.clone(), target)
    assert loss == 0 and [grad.shape for grad in grads] == [base.shape] * 2
    assert loss_of(base, None, target, mean=True, needs=NEEDS_BASE)[0].isnan()
    assert scan_of(base, None, target)[0].shape[1:] == base.shape[:-1]
    assert backward_of(base, base, target, {"A": torch.empty(shape[:-1])})[0].shape == base.shape


@pytest.mark.parametrize("rows", [0, 3])
def test_rows_without_columns_are_refused(rows):
    base, target = torch.empty(rows, 0), torch.zeros(rows, dtype=torch.int64)
    state = [torch.zeros(rows) for _ in range(5)]
    coefficients = [torch.zeros(rows) for _ in request.COEFFICIENTS]
    for call in (
        lambda: loss_of(base, None, target, needs=NEEDS_BASE),
        lambda: loss_of(base, None, target, needs=NEEDS_BASE, label_smoothing=0.1),
        lambda: scan_of(base, None, target),
        lambda: backward_of(base, base.clone(), target, coefficients, state=state),
        lambda: cuda_cross_entropy.plan(rows, 0, F32, device=Machine.number),
    ):
        with pytest.raises(ValueError, match=r"V must be in \[1, width of each source\], got V=0"):
            call()


@pytest.mark.parametrize("num_rows, vocab_size", [(1, 0), (0, 0), (1, -1), (-1, 1), (1, 2**30 + 1)])
def test_no_plan_is_told_of_an_impossible_size(machine, num_rows, vocab_size):
    with pytest.raises(ValueError, match=r"V must be in|vocab_size must be at most 1073741824"):
        machine.module.plan(num_rows, vocab_size, 1, 1, True, False, *Device())
