"""Forks, threads and what importing does: most of these run in a process of their own, which must end in time."""

import json
import subprocess
import sys
import textwrap

import interpreter
import pytest
import torch

from auxkernels import dispatch

COMMON = """
import multiprocessing, os, sys, threading, time, zlib
import torch
from auxkernels import aux_cross_entropy, logit_stats
BACKEND = {backend!r}

def problem(seed=0, rows=24, vocab_size=8192):  # more elements than one thread takes alone
    torch.manual_seed(seed)
    base = torch.randn(rows, vocab_size)
    aux = torch.randn(rows, vocab_size, requires_grad=True)
    return base, aux, torch.randint(vocab_size, (rows,))

def result(given):
    base, aux, target = given
    loss = aux_cross_entropy(base, aux, target, backend=BACKEND)
    (grad,) = torch.autograd.grad(loss, aux)
    lse = logit_stats(base, aux, target, backend=BACKEND).lse
    # numpy, because torch's own operators enter OpenMP, which is what a forked child must not do
    return loss.item(), zlib.crc32(grad.numpy()), zlib.crc32(lse.detach().numpy())
"""


def run(code: str, backend: str = "reference", first: str = "") -> str:
    return interpreter.run(code, first + COMMON.format(backend=backend))


# -- fork --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_forked_child_can_call_after_its_parent_has(on_cpu):
    """The OpenMP runtime's threads do not survive a fork: entering it in the child hangs."""
    out = run(
        """
        torch.set_num_threads(2)
        given = problem()
        want = result(given)
        queue = multiprocessing.get_context("fork").SimpleQueue()
        def child():
            if BACKEND == "reference":
                torch.set_num_threads(1)  # torch's own promise
            queue.put(result(given))
        children = [multiprocessing.get_context("fork").Process(target=child) for _ in range(4)]
        for process in children:
            process.start()
        for process in children:
            process.join(600)
            assert process.exitcode == 0, process.exitcode
        got = [queue.get() for _ in children]
        assert result(given) == want, "the parent still works"
        print(all(one == want for one in got) if BACKEND == "native" else "close")
        """,
        on_cpu.backend,
    )
    assert out.strip() == ("True" if on_cpu.backend == "native" else "close")


@pytest.mark.slow
def test_a_child_of_a_child_can_call_too(native):
    out = run(
        """
        torch.set_num_threads(2)
        given = problem()
        want = result(given)
        for generation in range(2):
            pid = os.fork()
            if pid:
                _, status = os.waitpid(pid, 0)
                if generation == 0:
                    print("children ended with", status)
                os._exit(0 if status == 0 else 1) if generation else sys.stdout.flush()
                break
            assert result(given) == want
            if generation == 1:
                os._exit(0)
        """,
        "native",
    )
    assert out.strip() == "children ended with 0"


@pytest.mark.slow
def test_data_loader_workers_can_call(on_cpu):
    out = run(
        """
        from torch.utils.data import DataLoader, Dataset

        class Losses(Dataset):
            def __len__(self):
                return 4
            def __getitem__(self, i):
                return result(problem(i))[0]

        torch.set_num_threads(2)
        want = [result(problem(i))[0] for i in range(4)]
        loader = DataLoader(Losses(), batch_size=1, num_workers=2, multiprocessing_context="fork")
        got = [batch.item() for batch in loader]
        assert max(abs(a - b) for a, b in zip(got, want)) < 1e-5
        print(len(got))
        """,
        on_cpu.backend,
    )
    assert out.strip() == "4"


@pytest.mark.slow
def test_a_spawned_child_can_call(on_cpu, tmp_path):
    script = tmp_path / "spawned.py"
    script.write_text(
        COMMON.format(backend=on_cpu.backend)
        + textwrap.dedent(
            """
            def child(queue):
                queue.put(result(problem()))

            if __name__ == "__main__":
                context = multiprocessing.get_context("spawn")
                queue = context.SimpleQueue()
                process = context.Process(target=child, args=(queue,))
                process.start()
                got = queue.get()
                process.join()
                assert abs(got[0] - result(problem())[0]) < 1e-6
                print("same")
            """
        )
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=1200)
    assert done.stdout.strip() == "same", done.stderr[-2000:]


# -- threads -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_eight_threads_may_make_the_first_call_together_and_many_after_it(on_cpu):
    out = run(
        """
        torch.set_num_threads(2)
        given = problem(rows=4, vocab_size=3000)
        results, barrier = [], threading.Barrier(8)

        def work():
            barrier.wait()
            results.extend(result(given) for _ in range(40))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(600)
            assert not thread.is_alive()
        print(len(results), len(set(results)))
        """,
        on_cpu.backend,
    )
    count, distinct = map(int, out.split())
    assert count == 8 * 40
    if on_cpu.backend == "native":
        assert distinct == 1


def test_another_python_thread_runs_while_a_call_works(native):
    """The lock is released: a spinning thread keeps running during one long call."""
    out = run(
        """
        torch.set_num_threads(1)
        base, aux, target = problem(rows=600, vocab_size=20000)
        result((base[:8], aux[:8], target[:8]))
        ticks, stop, inside = [], threading.Event(), 0

        def spin():
            while not stop.is_set():
                ticks.append(time.perf_counter())
                time.sleep(0.001)

        thread = threading.Thread(target=spin)
        thread.start()
        for _ in range(100):  # on a busy machine the other thread may have to wait for a turn
            start = time.perf_counter()
            with torch.no_grad():
                aux_cross_entropy(base, aux, target, backend=BACKEND)
            end = time.perf_counter()
            # all the time goes to one C++ function: with the lock held there would be at most a tick at each end
            inside += sum(start + 0.1 * (end - start) < tick < end - 0.1 * (end - start) for tick in ticks)
            ticks.clear()
            if inside >= 3:
                break
        stop.set()
        thread.join()
        print(inside)
        """,
        "native",
    )
    assert int(out) >= 3


def test_more_threads_than_rows_or_cores_change_nothing(native):
    from auxkernels import aux_cross_entropy

    before = torch.get_num_threads()
    base, aux = torch.randn(3, 20000), torch.randn(3, 20000, requires_grad=True)
    target = torch.tensor([1, 19999, -100])
    results = []
    try:
        for threads in (1, 2, 3, 17):
            torch.set_num_threads(threads)
            for reduction in ("sum", "none"):
                loss = aux_cross_entropy(base, aux, target, reduction=reduction, backend="native")
                results.append((loss.detach(), torch.autograd.grad(loss, aux, torch.ones_like(loss))[0]))
    finally:
        torch.set_num_threads(before)
    for i, (loss, grad) in enumerate(results):
        assert torch.equal(loss, results[i % 2][0]) and torch.equal(grad, results[i % 2][1])


# -- import hygiene ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imported() -> dict:
    """What the process looks like before and after importing the package, and after the first call."""
    code = """
import json, os, sys, warnings
warnings.simplefilter("error")
import torch

def state():
    return {
        "threads": torch.get_num_threads(),
        "interop": torch.get_num_interop_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "default": str(torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "subnormal": sys.float_info.min / 2 > 0 and bool(torch.tensor(1e-40) / 2 > 0),
        "environment": dict(os.environ),
        "filters": len(warnings.filters),
        "random": torch.random.get_rng_state().sum().item(),
        "cuda": torch.cuda.is_initialized(),
        "os_threads": len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0,
    }

before, torch_modules = state(), sorted(sys.modules)
import auxkernels
after, modules = state(), sorted(sys.modules)
loss = auxkernels.aux_cross_entropy(torch.zeros(2, 3), None, torch.tensor([0, 1]))
found = {"before": before, "after": after, "called": state(), "loss": loss.item()}
print(json.dumps(found | {"torch_modules": torch_modules, "modules": modules, "called_modules": sorted(sys.modules)}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"stderr": done.stderr}


def test_importing_changes_nothing_about_the_process(imported):
    assert imported["before"] == imported["after"]


def test_subnormal_numbers_survive_import_and_call(imported):
    """-ffast-math in any loaded library would flush them to zero for the whole process."""
    assert imported["before"]["subnormal"] and imported["after"]["subnormal"] and imported["called"]["subnormal"]


def test_the_first_call_changes_no_setting(imported):
    assert imported["called"] | {"os_threads": 0} == imported["before"] | {"os_threads": 0}
    assert abs(imported["loss"] - 1.0986123) < 1e-6


def test_importing_loads_the_package_and_the_standard_library_alone(imported):
    new = {name.split(".")[0] for name in set(imported["modules"]) - set(imported["torch_modules"])}
    assert new - set(sys.stdlib_module_names) == {"auxkernels"}


def test_a_cpu_call_does_not_load_triton(imported):
    assert not any(name == "triton" or "tritonlib" in name for name in imported["called_modules"])


def test_importing_creates_no_cuda_context(imported):
    assert not imported["after"]["cuda"] and not imported["called"]["cuda"]


def test_importing_prints_nothing(imported):
    assert imported["stderr"] == ""


def test_importing_is_cheap():
    """Counted, because a busy machine makes any time long: calls of functions, modules from outside, processes."""
    out = interpreter.run(
        """
        import sys
        import torch
        calls, started, before = 0, [], set(sys.modules)

        def count(frame, event, argument):
            global calls
            calls += event in ("call", "c_call")

        def watch(event, arguments):
            if event in ("subprocess.Popen", "os.posix_spawn", "os.fork", "os.exec", "os.system"):
                started.append(event)

        sys.addaudithook(watch)
        sys.setprofile(count)
        import auxkernels
        sys.setprofile(None)
        others = [name for name in set(sys.modules) - before if name.split(".")[0] != "auxkernels"]
        print(calls, len(others), len(started))
        """
    )
    calls, modules, processes = map(int, out.split())
    assert calls < 200_000 and modules <= 10 and processes == 0


WITHOUT = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name == "auxkernels.native._cpu" or name.split(".")[0] == "triton":
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


def test_the_package_works_without_its_compiled_module_and_without_triton():
    code = """
    given = problem(rows=2, vocab_size=5)
    BACKEND = "auto"
    automatic = result(given)
    BACKEND = "reference"
    assert automatic == result(given)
    BACKEND = "native"
    try:
        result(given)
    except RuntimeError as error:
        print(error)
    """
    assert "backend='native' cannot be used:" in run(code, first=WITHOUT)


def test_show_config_touches_no_cuda_context():
    assert "False" in run("from auxkernels import show_config; show_config(); print(torch.cuda.is_initialized())")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_importing_opens_no_file_for_good():
    out = run(
        """
        import auxkernels
        open_files = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        print(sum("auxkernels" in os.readlink(path) for path in open_files if os.path.exists(path)))
        """
    )
    assert out.strip() == "0"


def test_backends_are_looked_for_once():
    assert dispatch.native_missing() is dispatch.native_missing()
