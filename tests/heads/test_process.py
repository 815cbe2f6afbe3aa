"""Heads: how much memory a step takes, in forked children, and from many threads; each in a process of its own."""

import gc
import json
import os
import subprocess
import sys

import interpreter
import pytest
import torch
from inputs import cut_rows, head, logits, targets
from interpreter import huge_page, resident

from auxkernels import aux_cross_entropy, logit_stats

MIB = 2**20

# -- memory ------------------------------------------------------------------------------------------------------------

N, V, D, THREADS = 4096, 8192, 32, 2
# name: (dtype, rows of a chunk, what requires a gradient, options)
EVERYTHING = ("base.hidden", "base.weight", "aux.hidden", "aux.weight")
STEPS = {
    "everything": ("float32", 1024, EVERYTHING, {}),
    "everything, two chunks": ("float32", 2048, EVERYTHING, {}),
    "recomputed": ("float32", 1024, EVERYTHING, {"recompute": True}),
    "frozen base": ("bfloat16", 1024, EVERYTHING[2:], {}),
    "loss alone": ("bfloat16", 1024, (), {}),
    "half precision": ("float16", 1024, EVERYTHING, {}),
}
MEASURE = (
    interpreter.RESIDENT_SIZE
    + """
import gc, json, sys, torch
from auxkernels import Head, aux_cross_entropy, cache_settings, chunk_settings
from auxkernels.heads import rows as row_module

N, V, D, steps = json.loads(sys.argv[1])
torch.set_num_threads({threads})
chunk_settings.num_bytes = 1
cache_settings.num_bytes = 0  # one step does not use the last one's blocks
peaks = {{}}

# what the library packs the operands of a chunk's products into, which it may keep or not
def of_products(rows, dtype):
    shapes = ((rows, D, V), (rows, V, D), (V, rows, D))
    given = [(torch.ones(n, k, dtype=dtype), torch.ones(m, k, dtype=dtype).T) for n, k, m in shapes]
    results = [torch.ones(n, m, dtype=dtype) for n, k, m in shapes]
    before = status("VmRSS")
    reset_peak()
    for (a, b), out in zip(given, results):
        torch.mm(a, b, out=out)
    return status("VmHWM") - before

for name, (dtype, rows, needs, options) in steps.items():
    made = {{}}
    for side in ("base", "aux"):
        for part, shape in (("hidden", (N, D)), ("weight", (V, D))):
            place = f"{{side}}.{{part}}"
            made[place] = torch.randn(shape).to(getattr(torch, dtype)).requires_grad_(place in needs)
    target = torch.randint(V, (N,))

    def step(n):
        heads = [Head(made[f"{{side}}.hidden"][:n], made[f"{{side}}.weight"]) for side in ("base", "aux")]
        loss = aux_cross_entropy(*heads, target[:n], backend="native", **options).sum()
        return torch.autograd.grad(loss, [made[place] for place in needs]) if needs else loss

    row_module.MIN_ROWS = rows
    step(64)
    scratch = of_products(rows, torch.float32 if dtype == "float16" else getattr(torch, dtype))
    gc.collect()
    before = status("VmRSS")
    reset_peak()
    kept = step(N)
    peaks[name] = status("VmHWM") - before, scratch
    del kept, made
print(json.dumps(peaks))
"""
)


@pytest.fixture(scope="module")
def peaks() -> dict[str, list[int]]:
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    # large blocks are handed back when they are freed, so that one step does not use those of the last
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_=str(MIB), MALLOC_TRIM_THRESHOLD_=str(MIB))
    command = [sys.executable, "-c", MEASURE.format(threads=THREADS), json.dumps([N, V, D, STEPS])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_takes_a_chunk_its_gradients_and_little_else(native, peaks, name):
    dtype, rows, needs, _ = STEPS[name]
    itemsize = getattr(torch, dtype).itemsize
    compute = 4 if dtype == "float16" else itemsize  # float16 is computed in float32 on CPU
    chunk = 2 * rows * V * compute  # the logits of two heads, over which their gradients are written
    gradients = sum((N if place.endswith("hidden") else V) * D * itemsize for place in needs)
    # 16 bits: sums of weight gradients in float32, and the product on its way into the sum; float16 weights in float32
    sums = 0 if dtype == "float32" else sum(V * D * (4 + compute) for place in needs if place.endswith("weight"))
    sums += 2 * (N + V) * D * 4 if dtype == "float16" else 0
    allowed = chunk + gradients + sums + 32 * N + THREADS * (4 * V + 256 * 1024)
    # a huge page more for each buffer of the chunk, and what the GEMM library packs its operands into
    peak, scratch = peaks[name]
    assert peak <= allowed + scratch + 3 * huge_page()
    if rows == 1024:
        # no gradient, 16 bits of them or float32: below a single tensor of all logits
        assert peak < N * V * compute + scratch


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["losses", "statistics", "errors"])
def test_three_hundred_calls_leave_nothing_behind(native, monkeypatch, kind):
    cut_rows(monkeypatch, 4)
    base, aux = head(8, vocab_size=700, grad=False), head(8, vocab_size=700, bias=True)
    values, target = logits(8, 700), targets(8, vocab_size=700, ignored=0.2)
    wrong = target.clone()
    wrong[5] = 700

    def once():
        if kind == "losses":
            for options in ({}, {"reduction": "none"}):
                loss = aux_cross_entropy([base, values], aux, target, backend="native", **options)
                torch.autograd.grad(loss.sum(), (aux.hidden, aux.weight, aux.bias))
        elif kind == "statistics":
            torch.autograd.grad(logit_stats(base, aux, target, backend="native").entropy.sum(), aux.weight)
        else:
            with pytest.raises(IndexError):
                aux_cross_entropy(base, aux, wrong, backend="native")

    once()  # what is made once, at the first call, is no leak
    growth = []
    while len(growth) < 4 and (not growth or min(growth) >= MIB):
        gc.collect()
        before, alive = resident(), len(gc.get_objects())
        for _ in range(300):
            once()
        gc.collect()
        growth.append(resident() - before)
    # a leak of one weight's gradient would be 13 MB, and of one for each row of 700 floats 6.7
    assert min(growth) < MIB
    assert len(gc.get_objects()) - alive < 100


@pytest.mark.gpu
def test_peak_memory_on_gpu_is_a_chunk_and_gradients(on_gpu, monkeypatch):
    if on_gpu.backend == "reference":
        pytest.skip("plain torch stores the logits")
    cut_rows(monkeypatch, 1024)
    rows, vocab_size, width = 8192, 32000, 256
    made = {"vocab_size": vocab_size, "width": width, "dtype": torch.bfloat16, "device": "cuda"}
    base, aux = head(rows, grad=False, **made), head(rows, **made)
    target = targets(rows, vocab_size=vocab_size, device="cuda")

    def step():
        loss = aux_cross_entropy(base, aux, target, backend=on_gpu.backend)
        return torch.autograd.grad(loss, (aux.hidden, aux.weight))

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    chunk = 1024 * vocab_size * (4 + 4 + 2)  # two products in float32, one gradient
    sums = vocab_size * width * 4 + aux.weight.nbytes + aux.hidden.nbytes
    assert peak <= chunk + sums + 128 * rows + 40 * MIB < rows * vocab_size * 2


# -- processes and threads ---------------------------------------------------------------------------------------------

COMMON = """
import multiprocessing, threading, zlib
import torch
from auxkernels import Head, aux_cross_entropy, chunk_settings, logit_stats
from auxkernels.heads import rows as row_module
BACKEND = {backend!r}
row_module.MIN_ROWS, chunk_settings.num_bytes = 16, 1

def problem(rows=48, vocab_size=8192):  # more elements than one thread takes alone
    torch.manual_seed(0)
    base, aux = (Head(torch.randn(rows, 8), torch.randn(vocab_size, 8)) for _ in range(2))
    target = torch.randint(vocab_size, (rows,))
    target[::5] = -100
    return base, aux, target

def result(given):
    base, aux, target = given
    leaves = [t.clone().requires_grad_() for t in (aux.hidden, aux.weight)]
    loss = aux_cross_entropy(base, Head(*leaves), target, backend=BACKEND)
    grads = torch.autograd.grad(loss, leaves)
    lse = logit_stats(base, aux, target, backend=BACKEND).lse
    return loss.item(), *(zlib.crc32(t.detach().numpy()) for t in (*grads, lse))
"""


def run(code: str, backend: str) -> str:
    return interpreter.run(code, COMMON.format(backend=backend))


def test_a_forked_child_can_call_after_its_parent_has(native):
    """With torch on one thread in the child, which is torch's own condition for its products. These may then be summed
    in another order, and losses be off by the roundings of a row (tolerance.py)."""
    out = run(
        """
        torch.set_num_threads(2)
        given = problem()
        want = result(given)
        queue = multiprocessing.get_context("fork").SimpleQueue()
        def child():
            torch.set_num_threads(1)
            queue.put(result(given))
        children = [multiprocessing.get_context("fork").Process(target=child) for _ in range(3)]
        for process in children:
            process.start()
        for process in children:
            process.join(600)
            assert process.exitcode == 0, process.exitcode
        got = [queue.get() for _ in children]
        assert result(given) == want, "the parent still works"
        room = 2 * 256 * 2**-24 * want[0]
        print(len(set(got)), max(abs(one[0] - want[0]) for one in got) <= room)
        """,
        "native",
    )
    assert out.split() == ["1", "True"]


def test_many_threads_may_call_at_once(native):
    out = run(
        """
        torch.set_num_threads(2)
        given = problem()
        results, barrier = [], threading.Barrier(6)

        def work():
            torch.set_num_threads(2)
            barrier.wait()
            results.extend(result(given) for _ in range(8))

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(600)
            assert not thread.is_alive()
        print(len(results), len(set(results)))
        """,
        "native",
    )
    assert out.split() == ["48", "1"]
