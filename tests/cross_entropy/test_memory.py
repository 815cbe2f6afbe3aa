"""How much memory a call takes: the inputs, the requested gradients, 32 bytes a row and a little for each thread."""

import gc
import subprocess
import sys

import interpreter
import pytest
import torch
from inputs import logits, targets
from interpreter import resident

from auxkernels import Logits, aux_cross_entropy, logit_stats

MIB = 2**20
# measured in the resident size of a process of its own: the kernel hands out pages, and huge ones for large outputs, so
# what is measured may be larger than what was asked for by one huge page for each output and one for the rest
HUGE_PAGE = interpreter.huge_page()

MEASURE = (
    interpreter.RESIDENT_SIZE
    + """
import gc, sys, torch
from auxkernels import Logits, aux_cross_entropy, logit_stats

torch.set_num_threads({threads})
rows, vocab_size, dtype = {rows}, {vocab_size}, torch.{dtype}
base = torch.randn(rows, vocab_size).to(dtype)
aux = torch.randn(rows, vocab_size).to(dtype).requires_grad_()
scale = torch.ones(rows, requires_grad=True)
target = torch.randint(vocab_size, (rows,))

def call(base, aux, scale, target):
    {call}

few = slice(0, {threads} * 4)
call(base[few], aux.detach()[few].requires_grad_(), scale.detach()[few].requires_grad_(), target[few])
gc.collect()
before = status("VmRSS")
reset_peak()
kept = call(base, aux, scale, target)
print(status("VmHWM") - before)
"""
)


def gradient(loss: str, leaves: str) -> str:
    return f"return torch.autograd.grad({loss}, {leaves})"


def without(call: str) -> str:
    return f"with torch.no_grad(): return {call}"


LOSS = "aux_cross_entropy(base, aux, target, backend='native'{})"
SCALED = "aux_cross_entropy(base, Logits(aux, scale=scale), target, backend='native')"
CALLS = {
    # the call, how many [N, V] gradients it returns, and how many bytes of other results for each row
    "loss": (without(LOSS.format("")), 0, 0),
    "loss of each row": (without(LOSS.format(", reduction='none'")), 0, 4),
    "loss and gradient": (gradient(LOSS.format(""), "aux"), 1, 0),
    "loss and gradient of a scaled sum": (gradient(SCALED, "(aux, scale)"), 1, 4),
    "loss and gradient, recomputed": (gradient(LOSS.format(", recompute=True"), "aux"), 1, 0),
    "loss and gradient, upstream 2": (gradient("2 * " + LOSS.format(""), "aux"), 1, 0),
    "statistics": (without("logit_stats(base, aux, target, backend='native')"), 0, 5 * 4 + 2 * 8),
}
SHAPES = {
    "long rows": (512, 50257, "bfloat16"),  # here a temporary of [N, V] shows
    "many rows": (200_000, 64, "float32"),  # here a few bytes a row show
}


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CALLS)
def test_a_call_takes_its_results_and_little_else(native, name, shape):
    (rows, vocab_size, dtype), (call, num_grads, row_bytes), threads = SHAPES[shape], CALLS[name], 2
    code = MEASURE.format(threads=threads, rows=rows, vocab_size=vocab_size, dtype=dtype, call=call)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    results = num_grads * rows * vocab_size * getattr(torch, dtype).itemsize + row_bytes * rows
    allowed = results + 32 * rows + threads * (4 * vocab_size + 256 * 1024)
    assert int(done.stdout) <= allowed + (num_grads + 1) * HUGE_PAGE


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["losses", "statistics", "errors", "sums"])
def test_a_thousand_calls_leave_nothing_behind(on_cpu, kind):
    base, aux = logits(8, 700), logits(8, 700, requires_grad=True)
    scale = torch.rand(8, requires_grad=True)
    target = targets(8, vocab_size=700, ignored=0.2)
    wrong = target.clone()
    wrong[5] = 700

    def once():
        if kind == "losses":
            for reduction in ("mean", "none"):
                source = Logits(aux, scale=scale, softcap=5.0)
                loss = aux_cross_entropy(base, source, target, reduction=reduction, backend=on_cpu.backend)
                torch.autograd.grad(loss.sum(), (aux, scale))
        elif kind == "statistics":
            torch.autograd.grad(logit_stats(base, aux, target, backend=on_cpu.backend).entropy.sum(), aux)
        elif kind == "sums":
            loss = aux_cross_entropy([base, base], [aux, base], target, backend=on_cpu.backend)
            torch.autograd.grad(loss, aux)
        else:
            with pytest.raises(IndexError):
                aux_cross_entropy(base, aux, wrong, backend=on_cpu.backend)

    once()  # what is made once, at the first call, is no leak
    growth = []
    while len(growth) < 4 and (
        not growth or min(growth) >= MIB
    ):  # a leak grows every time, the allocator's rest does not
        gc.collect()
        before, alive = resident(), len(gc.get_objects())
        for _ in range(1000):
            once()
        gc.collect()
        growth.append(resident() - before)
    # a leak of one row of 700 floats, or of one gradient, would be 2.8 or 22 MB
    assert min(growth) < MIB
    assert len(gc.get_objects()) - alive < 100


def test_an_unrequested_gradient_is_not_allocated(fused, monkeypatch):
    made = []
    plain = torch.Tensor.new_empty

    def counted(self, *args, **kwargs):
        made.append(plain(self, *args, **kwargs))
        return made[-1]

    monkeypatch.setattr(torch.Tensor, "new_empty", counted)
    base, aux = logits(4, 5000, device=fused.device), logits(4, 5000, device=fused.device)
    target = targets(4, vocab_size=5000, device=fused.device)
    sizes = {}
    for needs in ((), (aux,), (base, aux)):
        for tensor in (base, aux):
            tensor.requires_grad_(any(tensor is wanted for wanted in needs))
        for options in ({}, {"reduction": "none"}, {"recompute": True}):
            made.clear()
            loss = aux_cross_entropy(base, aux, target, backend=fused.backend, **options)
            if needs:
                torch.autograd.grad(loss.sum(), needs)
            sizes[len(needs)] = max(sizes.get(len(needs), 0), sum(t.numel() >= 5000 for t in made))
    assert sizes == {0: 0, 1: 1, 2: 2}


@pytest.mark.gpu
def test_peak_memory_on_gpu_is_gradients_and_rows(on_gpu):
    if on_gpu.backend == "reference":
        pytest.skip("plain torch stores the sum")
    rows, vocab_size = 2048, 32000
    base = logits(rows, vocab_size, dtype=torch.bfloat16, device="cuda")
    aux = logits(rows, vocab_size, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    target = targets(rows, vocab_size=vocab_size, device="cuda")
    for options, num_grads in (({}, 1), ({"recompute": True}, 1), (None, 0)):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if options is None:
            with torch.no_grad():
                aux_cross_entropy(base, aux, target, backend=on_gpu.backend)
        else:
            torch.autograd.grad(aux_cross_entropy(base, aux, target, backend=on_gpu.backend, **options), aux)
        peak = torch.cuda.max_memory_allocated() - before
        assert peak <= num_grads * aux.nbytes + 128 * rows + MIB


@pytest.mark.gpu
def test_a_thousand_calls_leave_nothing_allocated_on_gpu(on_gpu):
    base, aux = logits(8, 700, device="cuda"), logits(8, 700, device="cuda", requires_grad=True)
    target = targets(8, vocab_size=700, device="cuda")

    def once():
        torch.autograd.grad(aux_cross_entropy(base, aux, target, backend=on_gpu.backend), aux)

    for _ in range(50):
        once()
    before = torch.cuda.memory_allocated()
    for _ in range(1000):
        once()
    assert torch.cuda.memory_allocated() == before
