"""The compiled CPU module by itself: on lesser processors than this one, and beside torch's OpenMP runtime."""

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from auxkernels import native

if reason := native.missing():
    pytest.skip(reason, allow_module_level=True)

MODULE = Path(native.cpu().__file__)
HERE = Path(__file__).parent


def run(*command):
    return subprocess.run(command, capture_output=True, text=True)


def test_the_module_works_with_one_openmp_runtime():
    assert MODULE.stat().st_size < 3e6 or "sanitized" in str(MODULE)
    done = run(sys.executable, HERE / "wheel_works.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sys.platform != "linux" or "libgomp" in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_module_that_is_loaded_before_torch_shares_its_openmp_runtime():
    code = """
import sys
from module_works import load
load(sys.argv[1])
from wheel_works import openmp_runtimes
print(len(openmp_runtimes()))
"""
    done = subprocess.run([sys.executable, "-c", code, MODULE], cwd=HERE, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


def test_the_module_works_without_torch_in_every_instruction_set():
    done = run(sys.executable, HERE / "module_works.py", MODULE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"works with {' '.join(native.cpu().instruction_sets())}"


# an emulator that knows nothing of AVX-512; in Debian's package qemu-user
EMULATOR = shutil.which(os.environ.get("AUXKERNELS_TEST_EMULATOR", "qemu-x86_64"))


@pytest.mark.slow
@pytest.mark.skipif(EMULATOR is None, reason="qemu-x86_64 is not installed")
@pytest.mark.skipif("sanitized" in str(MODULE), reason="the sanitizers' runtime is preloaded")
@pytest.mark.parametrize(
    "processor, names", [("Nehalem", "baseline"), ("IvyBridge", "baseline"), ("Haswell", "avx2 baseline")]
)
def test_the_module_works_on_a_lesser_processor(processor, names):
    done = run(EMULATOR, "-cpu", processor, sys.executable, HERE / "module_works.py", MODULE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"works with {names}"


# what a function's code needs, least first
LEVELS = ["baseline", "avx2", "avx512", "avx512bf16"]
FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
OF_AVX512 = re.compile(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])")


def level_of(instruction):
    """The instruction set of a line that objdump prints, as far as its operation and registers tell."""
    name = instruction.split()[0]
    if name.endswith("bf16"):
        return "avx512bf16"
    if OF_AVX512.search(instruction):
        return "avx512"
    return "avx2" if name.startswith("v") and name not in ("verr", "verw") else "baseline"


def levels_of(module):
    """By function, as the linker knows it, the levels of its instructions."""
    found, function = defaultdict(set), ""
    for line in run("objdump", "-d", "--no-show-raw-insn", module).stdout.splitlines():
        if start := FUNCTION.match(line):
            function = start[1]
        elif "\t" in line and (instruction := line.partition("\t")[2].strip()):
            found[function].add(level_of(instruction))
    return found


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="one instruction set")
def test_no_function_has_instructions_beyond_those_of_its_namespace():
    """A function that several namespaces share, as std::max, must not be the widest one's copy of it."""
    names_at = {name: set() for name in LEVELS}
    for function, levels in levels_of(MODULE).items():
        namespace = next((name for name in LEVELS if f"4auxk{len(name)}{name}" in function), "baseline")
        allowed = LEVELS[: LEVELS.index(namespace) + 1]
        assert levels <= set(allowed), f"{function} has instructions of {max(levels, key=LEVELS.index)}"
        for level in levels:
            names_at[level].add(function)
    # and the comparison has seen something: in a build for one instruction set alone there would be nothing to find
    assert names_at["avx512bf16"]
    assert len(names_at["avx512"]) > 50 and len(names_at["avx2"]) > 100 and len(names_at["baseline"]) > 500
