"""soft_embedding in a process: forks, threads, memory, and every instruction set."""

import gc
import subprocess
import sys
import threading
import time

import interpreter
import pytest
import torch
from inputs import logits
from soft_oracle import F32, F64, FLOATS, Case, check
from tolerance import assert_alike

from auxkernels import soft_embedding
from auxkernels.soft_embedding import native as kernels
from auxkernels.soft_embedding.segments import segments_to_tokens

COMMON = """
import os, time, zlib
import torch
from auxkernels import soft_embedding
from auxkernels.soft_embedding import native as kernels
from auxkernels.soft_embedding.segments import segments_to_tokens
BACKEND = {backend!r}
NOISY = dict(gumbel=1.0, seed=3, hard=True)
MODES = [dict(hard=True), dict(top_k=4), NOISY, dict(), dict(gumbel=1.0, seed=3), dict(clean_gradient=True, **NOISY)]

def problem(seed=0, rows=64, K=3000, D=40):  # more than one thread takes alone
    torch.manual_seed(seed)
    return torch.randn(rows, K, requires_grad=True), torch.randn(K, D, requires_grad=True)

def result(given, modes=MODES):
    scores, table = given
    ids = torch.arange(500) % len(scores)
    found = []
    for mode in modes:
        out, stats = soft_embedding(scores, table, temperature=0.7, **mode, return_stats=True, backend=BACKEND)
        out = segments_to_tokens(out, ids, BACKEND)
        upstream = out.detach().clone()
        grads = torch.autograd.grad([out, stats.entropy], (scores, table), [upstream, torch.ones_like(stats.entropy)])
        found += [zlib.crc32(t.detach().numpy()) for t in (out, stats.entropy, *grads)]
    return tuple(found)
"""


def run(code: str, backend: str) -> str:
    return interpreter.run(code, COMMON.format(backend=backend))


# -- forks and threads -------------------------------------------------------------------------------------------------


def test_a_forked_child_can_call_after_its_parent_has(native):
    """One thread where torch's own products run, which enter OpenMP, whose threads do not survive a fork. What gathers
    and scatters is the package's own code, which knows that it was forked."""
    out = run(
        """
        torch.set_num_threads(2)
        given = problem()
        want = result(given)

        def gathered():
            with torch.no_grad():
                return [soft_embedding(*given, **mode, backend=BACKEND).numpy().tobytes() for mode in MODES[:3]]

        def in_a_child(work):
            pid = os.fork()
            if pid == 0:
                try:
                    os._exit(0 if work() else 1)
                finally:
                    os._exit(2)
            deadline = time.monotonic() + 600
            while True:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    return status
                assert time.monotonic() < deadline or os.kill(pid, 9), "the child hangs"
                time.sleep(0.02)

        def everything():
            torch.set_num_threads(1)
            return result(given)[0::4] == want[0::4] or result(given)[:2] == want[:2]

        rows = gathered()
        print(in_a_child(lambda: gathered() == rows), in_a_child(everything), result(given) == want)
        """,
        "native",
    )
    assert out.split() == ["0", "0", "True"]


def test_many_threads_may_call_at_once(on_cpu):
    scores, table = logits(8, 300, requires_grad=True), logits(300, 9, requires_grad=True)
    results, barrier = [], threading.Barrier(6)

    def work():
        barrier.wait()
        for _ in range(10):
            for options in ({"hard": True}, {"top_k": 4}, {"hard": True, "gumbel": 1.0, "seed": 3}):
                out = soft_embedding(scores, table, **options, backend=on_cpu.backend)
                grads = torch.autograd.grad(out, table, torch.ones(8, 9))
                results.append((str(options), [t.detach() for t in (out, *grads)]))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
        assert not thread.is_alive()
    first = dict(reversed(results))
    assert len(results) == 180 and len(first) == 3
    for options, found in results:
        for got, want in zip(found, first[options], strict=True):
            if on_cpu.backend == "native":
                assert torch.equal(got, want)
            else:
                assert_alike(got, want)


def test_another_python_thread_runs_while_a_call_works(native):
    """The lock is released: a spinning thread keeps running during one long call."""
    before = torch.get_num_threads()
    scores, table = torch.randn(400, 20000), torch.randn(20000, 4)
    ticks, stop, inside = [], threading.Event(), 0

    def spin():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=spin)
    try:
        torch.set_num_threads(1)
        thread.start()
        for _ in range(100):  # on a busy machine the other thread may have to wait for a turn
            start = time.perf_counter()
            soft_embedding(scores, table, hard=True, gumbel=1.0, backend="native")
            end = time.perf_counter()
            inside += sum(start + 0.1 * (end - start) < tick < end - 0.1 * (end - start) for tick in ticks)
            ticks.clear()
            if inside >= 3:
                break
    finally:
        stop.set()
        thread.join()
        torch.set_num_threads(before)
    assert inside >= 3


@pytest.mark.parametrize("options", [{}, {"hard": True}, {"top_k": 5}, {"gumbel": 1.0, "seed": 1}], ids=str)
def test_threads_change_no_bit_of_the_kernels_results(native, options):
    before, results = torch.get_num_threads(), []
    scores, table = logits(33, 3000, requires_grad=True), torch.eye(3000, 9)
    try:
        for threads in (1, 2, 3, 17):
            torch.set_num_threads(threads)
            found = Case(scores, table, options).call("native")
            names = ("argmax", "entropy", "max_prob", "sum_squares") + (
                ("out",) if options.keys() & {"hard", "top_k"} else ()
            )
            results.append([found[name].detach() for name in names])
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert all(map(torch.equal, found, results[0]))


# -- sizes of zero -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(7, 0), (2, 7, 0), (0, 7, 3)], ids=["no columns", "none twice", "no tables"])
def test_a_table_of_no_columns_or_no_tables_gives_as_much_or_is_refused(on_cpu, shape):
    """In a process of its own: a division by its width once ended it."""
    out = run(
        f"""
        shape = {shape}
        for mode in MODES:
            scores, table = torch.randn(4, 7, requires_grad=True), torch.zeros(shape, requires_grad=True)
            try:
                out = soft_embedding(scores, table, **mode, backend=BACKEND)
            except ValueError as error:
                assert "table" in str(error)
                continue
            assert out.shape == (*shape[:-2], 4, shape[-1])
            for grad, tensor in zip(torch.autograd.grad(out.sum(), (scores, table)), (scores, table)):
                assert grad.shape == tensor.shape and not grad.any()
        print("done")
        """,
        on_cpu.backend,
    )
    assert out.strip() == "done"


# -- memory ------------------------------------------------------------------------------------------------------------

MEASURE = """
import gc, torch
from auxkernels import soft_embedding

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

torch.set_num_threads(2)
N, K, D = {sizes}
scores = torch.randn(N, K).to(torch.{dtype}).requires_grad_()
table = torch.randn(K, D).to(torch.{dtype}).requires_grad_()
def call(scores):
    return soft_embedding(scores, table, backend="native", {options})

warm = call(scores[: 2048])
del warm
gc.collect()
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
kept = call(scores)
peak = status("VmHWM") - before
gc.collect()
print(peak, status("VmRSS") - before)
"""
MIB = 2**20
MODES = {
    "soft": "",
    "noisy": "gumbel=1.0, seed=1, temperature=0.7",
    "statistics": "return_stats=True",
}


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("mode, dtype", [("soft", "float32"), ("noisy", "bfloat16"), ("statistics", "float32")])
def test_forward_takes_its_output_a_few_bytes_a_row_and_a_chunks_buffer(native, mode, dtype):
    """With gradients recorded: an [N, K] tensor would be 128 (64) MiB."""
    N, K, D = 32768, 1024, 16
    code = MEASURE.format(sizes=(N, K, D), dtype=dtype, options=MODES[mode])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    peak, kept = map(int, done.stdout.split())
    # max and log_denom are 8 bytes a row, the argmax that backward and the user get another 8 each, three statistics 12
    rows = N * D * (4 if dtype == "float32" else 2) + N * (8 + 8 + (8 + 12 if mode == "statistics" else 0))
    chunk = 16 * MIB * (3 if mode == "statistics" else 1)  # exact probabilities and their rounded copy
    assert peak <= rows + chunk + 6 * MIB
    assert kept <= rows + chunk + 6 * MIB and peak < N * K * 2


def resident() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_hundreds_of_calls_leave_nothing_behind(native):
    scores, table = (logits(*s, requires_grad=True) for s in ((16, 700), (700, 5)))
    T, ids = torch.full((16,), 0.5, requires_grad=True), torch.arange(40) % 16
    modes = [{}, {"hard": True}, {"top_k": 5}, {"gumbel": 1.0}, {"hard": True, "top_k": 5, "gumbel": 1.0}]

    def once():
        for mode in modes:
            out, stats = soft_embedding(scores, table, temperature=T, **mode, return_stats=True, backend="native")
            out = segments_to_tokens(out, ids, "native")
            torch.autograd.grad(out.square().sum() + stats.usage.sum(), (scores, table, T))
        with pytest.raises(IndexError):
            segments_to_tokens(table.detach(), ids + 700, "native")

    once()  # what is made once, at the first call, is no leak
    growth: list[int] = []
    while len(growth) < 4 and (not growth or min(growth) >= MIB):
        gc.collect()
        before, alive = resident(), len(gc.get_objects())
        for _ in range(150):
            once()
        gc.collect()
        growth.append(resident() - before)
    assert min(growth) < MIB  # one [16, 700] gradient a call would be 33 MB
    assert len(gc.get_objects()) - alive < 100


# -- instruction sets --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512bf16"])
def instruction_set(request, native):
    """One instruction set, and the best one again afterwards."""
    if request.param not in native.instruction_sets():
        pytest.skip(f"this processor has no {request.param}")
    native.set_instruction_set(request.param)
    yield request.param
    native.set_instruction_set(native.instruction_sets()[0])


@pytest.mark.slow
@pytest.mark.parametrize("K", [1, 2, 3, 15, 16, 17, 31, 33, 255, 257, 1023, 1025, 4095, 4097, 8200])
def test_every_instruction_set_matches_float64(instruction_set, K):
    dtypes = (F32, torch.bfloat16, torch.float16, F64)
    for dtype in dtypes:
        scores, table = (logits(*s, dtype=dtype, requires_grad=True) for s in ((5, K), (K, 19)))
        T = torch.rand(5, dtype=F64 if dtype == F64 else F32).add(0.5).requires_grad_()
        mask = torch.rand(K) < 0.2
        for options in ({}, {"hard": True}, {"top_k": 6}, {"gumbel": 1.0, "seed": 2, "mask": mask}):
            case = Case(scores, table, {"temperature": T, **options})
            check(case, "native", case.upstream("out", *FLOATS))


def test_every_instruction_set_finds_ties_nan_and_rows_without_a_label(instruction_set):
    for K in (5, 33, 1030, 5000):
        scores = torch.randint(3, (8, K)).float()
        scores[1, K // 2] = torch.nan
        scores[2] = -torch.inf
        scores[3, K - 1] = torch.inf
        scores[4, :] = -torch.inf
        scores[4, K - 1] = -3e38
        want = scores.argmax(-1).tolist()
        want[2] = -1
        eye = torch.eye(K)
        for options in ({}, {"hard": True}, {"top_k": 4}):
            found = Case(scores, eye, options).call("native")
            assert found["argmax"].tolist() == want
            assert found["out"][[1, 3]].isnan().all() and not found["out"][2].any() and found["out"][4, K - 1] == 1
            assert not found["out"][[0, 2, 4, 5, 6, 7]].isnan().any()
        order = torch.sort(scores[5:], dim=-1, descending=True, stable=True).indices[:, :4]
        kept = torch.zeros(3, K, dtype=torch.bool).scatter_(1, order, True)
        assert torch.equal(found["out"][5:] > 0, kept)


@pytest.mark.parametrize("num_rows", [4, 1100])  # of which many go past the caches
def test_gathered_rows_keep_the_sign_of_zero_and_a_nan_of_any_bits(instruction_set, num_rows):
    table = torch.full((1, 3, 1001), -0.0)
    table[0, 1] = torch.tensor(-1, dtype=torch.int32).view(F32)  # what a rounding to bfloat16 would carry over
    labels = torch.arange(num_rows).remainder(2).view(-1, 1)
    for dtype in (F32, torch.bfloat16, torch.float16):
        out = torch.empty(1, num_rows, 1001, dtype=dtype)
        kernels.gather(table, labels, None, out, False)
        assert (out[0, 0::2] == 0).all() and out[0, 0::2].signbit().all() and out[0, 1::2].isnan().all()


# -- few long rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("K", [16385, 50257])
def test_threads_that_share_a_long_row_change_no_bit(native, num_rows, K):
    """Parts of a row are merged in their order, whoever worked on them; the product is left out: it is a library's."""
    scores, table = logits(num_rows, K), torch.eye(3)[torch.arange(K) % 3]
    scores[0, [7, 20000 % K, K - 1]] = 50.0  # ties across parts: the lowest label
    mask = torch.rand(K) < 0.3
    runs, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            run = []
            for options in ({}, {"gumbel": 1.0, "seed": 2}, {"mask": mask}, {"top_k": 5}, {"hard": True}):
                _, stats = soft_embedding(scores, table, **options, return_stats=True)
                run += [stats.entropy, stats.max_prob, stats.argmax, stats.sum_squares]
            run.append(soft_embedding(scores, table, top_k=20))
            runs.append(run)
    finally:
        torch.set_num_threads(before)
    assert runs[0][2][0] == 7
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_a_nan_in_any_part_of_a_long_row_is_found(native):
    scores, table = logits(4, 50257), logits(50257, 4)
    for row, label in enumerate((0, 20000, 50256)):
        scores[row, label] = torch.nan
    for options in ({}, {"top_k": 3}, {"hard": True}):
        mixture, stats = soft_embedding(scores, table, **options, return_stats=True)
        assert stats.argmax[:3].tolist() == [0, 20000, 50256]
        assert mixture[:3].isnan().all() and mixture[3].isfinite().all()
