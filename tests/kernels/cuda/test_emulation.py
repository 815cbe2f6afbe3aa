"""The emulation of the CUDA machine itself: its own test, and sanitizers around the kernels that it runs."""

import os
import subprocess
import sys

import emulated_cuda
import pytest

pytestmark = pytest.mark.skipif(emulated_cuda.missing() is not None, reason=f"{emulated_cuda.missing()}")


@pytest.mark.slow
@pytest.mark.parametrize("option", ["-DNDEBUG", "-DAUXK_UCONTEXT", "-fsanitize=address,undefined"])
def test_the_emulations_own_test_passes(tmp_path, option):
    folders = [f"-I{emulated_cuda.ROOT / folder}" for folder in ("csrc", "csrc/cuda", emulated_cuda.MACHINE)]
    source = emulated_cuda.MACHINE / "selftest.cpp"
    flags = [*emulated_cuda.FLAGS.split(), "-Wall", "-Werror", option]
    command = [emulated_cuda.COMPILER, *flags, *folders, str(source), "-o", str(tmp_path / "selftest")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    done = subprocess.run([tmp_path / "selftest"], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0 and "FAILED" not in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    assert "all as it should be" in done.stdout


OVERRUN = """
import sys
sys.path.insert(0, "tests/support")
import ctypes
import emulated_cuda, pytest, torch
from auxkernels.cross_entropy import cuda as cuda_cross_entropy
emulated_cuda.install(pytest.MonkeyPatch())
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
memory = (ctypes.c_char * (12 * {width})).from_address(libc.malloc(ctypes.c_size_t(12 * 33)))
grad = torch.frombuffer(memory, dtype=torch.float32).view(3, {width})
print("loaded")
cuda_cross_entropy.rescale_(grad, torch.tensor(2.0), None, -100)
print("survived")
"""
SANITIZERS = "address,undefined"
SANITIZED = [
    "kernels/cuda/test_emulated.py::test_nothing_is_touched_outside_of_the_rows",
    "kernels/cuda/test_emulated.py::test_columns_past_vocab_size_are_outside_and_their_gradient_is_zero",
    "kernels/cuda/test_emulated.py::test_rescaling_stays_inside",
    "kernels/cuda/test_emulated.py::test_hostile_targets_among_many_rows_poison_only_their_own",
    "kernels/cuda/test_emulated.py::test_the_counter_is_zero_after_every_call",
    "cross_entropy/test_nonfinite.py::test_a_row_has_the_pattern_of_float64_torch_and_its_neighbours_are_untouched",
]
CHOSEN = "emulated and not reference and not native-cpu and (4099 or 12001 or 2047 or 33 or counter or nonfinite)"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_sanitizers_find_nothing_in_the_kernels_and_do_find_an_overrun(preload):
    """In processes of their own, since the sanitizers' runtime must be loaded before Python is."""
    emulated_cuda.built(SANITIZERS)
    environment = os.environ | {
        "AUXKERNELS_CUDA_SANITIZERS": SANITIZERS,
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONPATH": str(emulated_cuda.ROOT),
    }
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_ADDOPTS"):
        environment.pop(name, None)

    def run(*arguments):
        command = [sys.executable, *arguments]
        options = {"cwd": emulated_cuda.ROOT, "env": environment, "capture_output": True, "text": True}
        return subprocess.run(command, timeout=1200, **options)

    assert "survived" in run("-c", OVERRUN.format(width=33)).stdout
    control = run("-c", OVERRUN.format(width=34))
    assert "loaded" in control.stdout and "survived" not in control.stdout
    assert "AddressSanitizer: heap-buffer-overflow" in control.stderr, control.stderr[-2000:]
    chosen = [f"tests/{test}" for test in SANITIZED]
    done = run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", CHOSEN, *chosen)
    report = done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == 0 and " passed" in done.stdout, report
    assert "AddressSanitizer" not in report and "runtime error" not in report, report
