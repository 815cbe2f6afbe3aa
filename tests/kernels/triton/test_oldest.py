"""The Triton kernels compile ahead of time with the oldest release that pyproject.toml allows: torch 2.11 brings it.

Two releases exclude each other in a process, so the tests that compile for sm_90 run once more in one that finds the
other first; `make oldest-triton` puts it there. Interpreted kernels are left out: that release needs numpy before 2.4.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TESTS = Path(__file__).parent
ROOT = Path(__file__).parents[3]
OLDEST = re.search(r'^triton = \["triton>=([\d.]+)', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
FOLDER = ROOT / "build" / f"triton-{OLDEST}"
ELSEWHERE = ("sm_80", "sm_100", "sm_120", "gfx942", "interpreted")


def run(*arguments: str) -> str:
    path = os.pathsep.join(filter(None, (str(FOLDER), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    return done.stdout


@pytest.fixture(autouse=True)
def _oldest():
    if (FOLDER / "triton").is_dir():
        return
    missing = f"no Triton {OLDEST} in {FOLDER.parent.name}/{FOLDER.name}: `make oldest-triton` fetches it"
    if os.environ.get("AUXKERNELS_TEST_OLDEST_TRITON") == "1":
        pytest.fail(missing)
    pytest.skip(missing)


def test_another_process_finds_the_oldest_release():
    found, where = run("-c", "import triton; print(triton.__version__, triton.__file__)").split()
    assert f"{found}.".startswith(f"{OLDEST}.") and Path(where).is_relative_to(FOLDER)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compile", "heads", "soft_embedding"])
def test_kernels_compile_with_the_oldest_release(name):
    chosen = " and ".join(f"not {word}" for word in ELSEWHERE)
    said = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, str(TESTS / f"test_{name}.py"))
    assert re.search(r"\b[1-9]\d* passed", said), said
