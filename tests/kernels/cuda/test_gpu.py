"""What only a GPU can get wrong: streams, devices, processes, and more elements than 32 bits can count."""

import fcntl
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from captures import CAPTURED_FIRST
from implementations import Implementation
from inputs import logits, targets
from oracle import Case, assert_close, expected

from auxkernels import aux_cross_entropy, logit_stats, soft_embedding

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def problem(rows=64, vocab_size=4000, dtype=torch.bfloat16, device="cuda"):
    base = logits(rows, vocab_size, dtype=dtype, device=device)
    aux = logits(rows, vocab_size, dtype=dtype, device=device, requires_grad=True)
    return base, aux, targets(rows, vocab_size=vocab_size, device=device, ignored=0.2)


def result(impl, base, aux, target, **options):
    loss = aux_cross_entropy(base, aux, target, backend=impl.backend, **options)
    return [loss.detach(), *torch.autograd.grad(loss, aux, torch.ones_like(loss))]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_kernels_run_on_the_current_stream(on_gpu, reduction):
    """Inputs are written late on a side stream: a kernel on another stream would read them too early."""
    base, aux, target = problem()
    want = result(on_gpu, base, aux, target, reduction=reduction)
    late = torch.zeros_like(base)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        late.copy_(base)
        got = result(on_gpu, late, aux, target, reduction=reduction)
    side.synchronize()
    assert all(map(torch.equal, got, want))


def test_kernels_run_on_the_tensors_device_and_not_on_the_current_one(on_gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    base, aux, target = problem(device="cuda:1")
    with torch.cuda.device(0):
        got = result(on_gpu, base, aux, target)
    with torch.cuda.device(1):
        want = result(on_gpu, base, aux, target)
    assert got[1].device == base.device and all(map(torch.equal, got, want))


def test_tensors_on_two_devices_are_refused(on_gpu):
    base, aux, target = problem()
    with pytest.raises(ValueError, match="base must be on the target's device cuda"):
        aux_cross_entropy(base.cpu(), aux, target, backend=on_gpu.backend)
    with pytest.raises(ValueError, match="must be on the target's device cpu"):
        aux_cross_entropy(base, aux, target.cpu(), backend=on_gpu.backend)


def test_native_says_that_it_has_no_lookups():
    scores, table = torch.zeros(4, 5, device="cuda"), torch.zeros(5, 3, device="cuda")
    with pytest.raises(RuntimeError, match="backend='native' cannot be used: the compiled CUDA module has"):
        soft_embedding(scores, table, backend="native")


def test_auto_on_gpu_is_triton(on_gpu):
    if on_gpu.backend != "triton":
        pytest.skip("about the other one")
    arguments = problem()
    got, want = result(Implementation("auto", "cuda"), *arguments), result(on_gpu, *arguments)
    assert all(map(torch.equal, got, want))


def test_gpu_and_cpu_agree(on_gpu):
    base, aux, target = problem(dtype=torch.float32)
    got = result(on_gpu, base, aux, target)
    case = Case(base.cpu(), aux.detach().cpu().requires_grad_(), target.cpu())
    wanted = expected(case, confident=on_gpu.backend != "reference")
    for name, value in zip(("loss", "aux[0]"), got, strict=True):
        assert_close(name, value.cpu(), *wanted[name])


@pytest.fixture
def most_of_the_memory():
    """One test process at a time: several such tests do not fit on a device together."""
    with open(Path(tempfile.gettempdir()) / "auxkernels-gpu-memory.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


@pytest.mark.slow
@pytest.mark.parametrize("beyond", [2**31, 2**32])
def test_more_elements_than_32_bits_count(on_gpu, most_of_the_memory, beyond):
    """Rows from both ends of a loss over 2**31 or 2**32 elements, and of its gradient, are those of the rows alone."""
    vocab_size = 131072
    rows = beyond // vocab_size + 2
    if on_gpu.backend == "reference":
        pytest.skip("plain torch would need several times the memory")
    if torch.cuda.get_device_properties(0).total_memory < 3.2 * 2 * rows * vocab_size:
        pytest.skip(f"needs {3.2 * 2 * rows * vocab_size / 2**30:.0f} GiB of GPU memory")
    base, aux = (torch.empty(rows, vocab_size, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(2))
    target = torch.randint(vocab_size, (rows,), device="cuda")
    loss, grad = result(on_gpu, base, aux.requires_grad_(), target, reduction="none")
    for n in (0, rows // 2, rows - 2, rows - 1):
        row = slice(n, n + 1)
        alone = result(on_gpu, base[row], aux.detach()[row].requires_grad_(), target[row], reduction="none")
        assert torch.equal(alone[0], loss[row]) and torch.equal(alone[1], grad[row])


@pytest.mark.parametrize("rows", [65535, 65536, 65537])  # the second and third dimension of a grid end at 65535
def test_more_rows_than_a_grid_dimension(on_gpu, rows):
    base, aux, target = problem(rows, 5, torch.float32)
    loss, grad = result(on_gpu, base, aux, target, reduction="none")
    case = Case(base, aux, target, {"reduction": "none"})
    wanted = expected(case, torch.ones_like(loss), confident=on_gpu.backend != "reference")
    assert_close("loss", loss, *wanted["loss"])
    assert_close("aux[0]", grad, *wanted["aux[0]"])


def test_statistics_run_where_their_tensors_are(on_gpu):
    base, aux, target = problem()
    stats = logit_stats(base, aux, target, backend=on_gpu.backend)
    assert all(value.device == base.device for value in vars(stats).values())


SPAWNED = """
import torch
from auxkernels import aux_cross_entropy
torch.manual_seed(0)
base, aux = torch.randn(4, 100, device="cuda"), torch.randn(4, 100, device="cuda", requires_grad=True)
target = torch.tensor([0, 99, -100, 5], device="cuda")
loss = aux_cross_entropy(base, aux, target, backend={backend!r})
loss.backward()
print(bool(loss.isfinite()), bool(aux.grad.isfinite().all()))
"""


def test_a_process_of_its_own_can_begin_on_the_gpu(on_gpu):
    code = SPAWNED.format(backend=on_gpu.backend)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout.split() == ["True", "True"], done.stderr[-2000:]


def test_a_capture_may_be_the_first_call_of_a_process(on_gpu):
    """Whatever the compiled module asks of the driver before its first launch, it may ask in a capture."""
    if on_gpu.backend != "native":
        pytest.skip("Triton compiles at its first call, which a capture forbids")
    done = subprocess.run([sys.executable, "-c", CAPTURED_FIRST], capture_output=True, text=True, timeout=200)
    assert done.stdout.split() == ["True"], done.stderr[-2000:]


REDUCED_OVERHEAD = """
import torch
from auxkernels import aux_cross_entropy
base, aux = torch.randn(4, 5000, device="cuda"), torch.randn(4, 5000, device="cuda", requires_grad=True)
target = torch.tensor([0, 99, -100, 5], device="cuda")
def loss_of(base, aux, target):
    return aux_cross_entropy(base, aux, target, backend={backend!r})
compiled = torch.compile(loss_of, mode="reduce-overhead", fullgraph=True)
want = loss_of(base, aux, target)
same = []
for _ in range(6):
    torch.compiler.cudagraph_mark_step_begin()
    same.append(torch.equal(compiled(base, aux, target).detach(), want))
print(all(same))
"""


def test_compiled_with_graphs_of_its_own_in_a_fresh_process(on_gpu):
    """torch warms such a graph up in the graph's own memory pool: nothing that outlives a call may be made there."""
    code = REDUCED_OVERHEAD.format(backend=on_gpu.backend)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
    if on_gpu.backend == "reference":
        assert done.stdout.split(), done.stderr[-2000:]  # generated code rounds as it likes
    else:
        assert done.stdout.split() == ["True"], done.stderr[-2000:]


def test_streams_that_torch_did_not_make(on_gpu):
    base, aux, target = problem()
    want = result(on_gpu, base, aux, target)
    ours = torch.cuda.Stream()
    external = torch.cuda.ExternalStream(ours.cuda_stream)
    torch.cuda.synchronize()
    with torch.cuda.stream(external):
        got = result(on_gpu, base, aux, target)
    external.synchronize()
    assert all(map(torch.equal, got, want))
