"""The CUDA module compiled for the CPU: the same kernels, thread by thread, on the machine of tests/cuda_on_cpu."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import ninja
import pybind11
import pytest

ROOT = Path(__file__).parent.parent
FLAGS = "-std=c++17 -O2 -g1 -fPIC -fvisibility=hidden -ffp-contract=off -fno-strict-aliasing -Wno-unknown-pragmas"


@functools.cache
def module(sanitizers: str = "") -> ModuleType:
    """The emulated module; skips the test where there is no compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    folder = ROOT / "build" / f"cuda_on_cpu{sanitizers and '_sanitized'}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes would build it at once
        _build(compiler, folder, path, sanitizers)
    spec = importlib.util.spec_from_file_location("_cuda", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _build(compiler: str, folder: Path, path: Path, sanitizers: str) -> None:
    includes = [ROOT / "csrc", ROOT / "csrc/cuda", ROOT / "tests/cuda_on_cpu"]
    systems = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = [FLAGS, *(f"-I{path}" for path in includes), *(f"-isystem {path}" for path in systems)]
    if sanitizers:
        flags.append(f"-fsanitize={sanitizers} -fno-sanitize-recover=all")
    with open(folder / "build.ninja", "w") as file:
        rules = ninja.Writer(file)
        rules.variable("builddir", str(folder))
        rules.variable("cc", f"{compiler} {' '.join(flags)}")
        rules.rule("compile", "$cc -MD -MF $out.d -x c++ -c $in -o $out", depfile="$out.d", deps="gcc")
        rules.rule("link", "$cc -shared $in -o $out")
        sources = sorted((ROOT / "csrc/cuda").glob("*.cu")) + [ROOT / "csrc/cuda/bindings.cpp"]
        objects = [rules.build(str(folder / f"{source.name}.o"), "compile", str(source))[0] for source in sources]
        rules.build(str(path), "link", objects)
    command = [f"{ninja.BIN_DIR}/ninja", "-f", str(folder / "build.ninja"), "-j", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the CUDA module does not compile for the CPU:\n{done.stdout[-4000:]}")
