"""The CPU module built with address and undefined-behaviour sanitizers, under the part of the tests that reaches furthest.

Python itself is not instrumented, so the sanitizers' runtime is preloaded and its leak check is off.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
CHECKOUT = Path(__file__).parents[1]
SANITIZERS = "address,undefined"
# hostile targets and canaries; every width and layout; backward with every coefficient; non-finite rows
CHOSEN = {
    "test_safety.py": "hostile or buffers or every_output",
    "test_cross_entropy.py": "every_width or layout or view or columns_past or number_of_rows",
    "test_backward_form.py": "f32 or f64 or needed",
    "test_nonfinite.py": "dtype0 or dtype3",
    "test_statistics.py": "argmax or ignored",
    "test_instruction_sets.py": "losses or halves",
}


@pytest.fixture(scope="module")
def preload() -> str:
    """The runtimes that must be loaded before Python's own libraries."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    if not sys.platform.startswith("linux") or shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} on Linux to build with")
    if not (CHECKOUT / "csrc").is_dir():
        pytest.skip("an installed package has no sources to build")
    found = []
    for library in ("libasan.so", "libstdc++.so"):
        command = [compiler, f"-print-file-name={library}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not os.path.isabs(path):
            pytest.skip(f"{compiler} comes without {library}")
        found.append(path)
    return " ".join(found)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory, preload) -> Path:
    """A copy of the package with a CPU module built with sanitizers."""
    root = tmp_path_factory.mktemp("sanitized")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, root)
    for name in ("csrc", "auxkernels", "tests"):
        shutil.copytree(CHECKOUT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "_build.json"))
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    environment = os.environ | {"AUXKERNELS_BUILD": "cpu", "AUXKERNELS_SANITIZE": SANITIZERS}
    built = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=250)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    return root


def run(root: Path, preload: str, arguments: list[str], timeout: float = 280):
    environment = os.environ | {
        "LD_PRELOAD": preload,
        "PYTHONPATH": str(root),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "OMP_NUM_THREADS": "2",
    }
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=timeout)


OVERRUN = """
import ctypes, torch
from auxkernels import native
base = torch.zeros(3, 4, dtype=torch.float64)
room = (ctypes.c_double * 2)()  # of the module's allocator, two numbers where twelve are read
module = native.cpu()
print(module.__file__)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
pointer = libc.malloc(ctypes.c_size_t(16))
target = torch.zeros(3, dtype=torch.int64)
out = torch.zeros(11, 3, dtype=torch.float64)
problem = (3, 4, target.data_ptr(), 0, -100, 0, 1, 1)
fields = [row.data_ptr() for row in out]
module.scan(problem, (pointer, 3, 4, 3, 0, 4, 0, 0), 0.0, (0, 0, 0, 1, 0, 0, 0, 0), 0.0, [*fields, 0, 0, 0, 0])
print("survived")
"""


def test_the_sanitized_module_notices_a_read_past_the_end(sanitized, preload):
    """The negative control: the module is told of four classes where two were allocated."""
    done = run(sanitized, preload, ["-c", OVERRUN])
    assert str(sanitized) in done.stdout, done.stderr[-2000:]
    assert "survived" not in done.stdout
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr


@pytest.mark.parametrize("file", CHOSEN)
def test_the_sanitizers_find_nothing(sanitized, preload, file):
    chosen = f"native and not reference and ({CHOSEN[file]})"
    if file == "test_instruction_sets.py":
        chosen = CHOSEN[file]
    done = run(sanitized, preload, ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{file}", "-k", chosen])
    report = done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == 0, report
    assert "AddressSanitizer" not in report and "runtime error" not in report, report
    assert " passed" in done.stdout, report
