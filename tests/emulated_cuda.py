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

from auxkernels import ops
from auxkernels.native import cuda_cross_entropy

ROOT = Path(__file__).parent.parent
COMPILER = "g++"
FLAGS = "-std=c++17 -O2 -g1 -fPIC -fvisibility=hidden -ffp-contract=off -fno-strict-aliasing -Wno-unknown-pragmas"


def missing() -> str | None:
    """Why there is no emulated module here; None if there is one."""
    return None if shutil.which(COMPILER) else f"{COMPILER} is not installed"


def install(monkeypatch) -> None:
    """Puts it in the place of the compiled CPU module: backend="native" with CPU tensors then runs the CUDA kernels."""
    emulated = module()
    real = ops.implementation

    def implementation(backend: str, stem: str = "cross_entropy", is_cuda: bool = False):
        if backend == "native" and stem == "cross_entropy":
            return cuda_cross_entropy
        return real(backend, stem, is_cuda)

    monkeypatch.setattr(cuda_cross_entropy, "cuda", lambda: emulated)
    monkeypatch.setattr(ops, "implementation", implementation)


@functools.cache
def module(sanitizers: str = "") -> ModuleType:
    """The emulated module, compiled if its sources have changed."""
    folder = ROOT / "build" / f"cuda_on_cpu{sanitizers and '_sanitized'}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes would build it at once
        _build(folder, path, sanitizers)
    spec = importlib.util.spec_from_file_location("_cuda", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _build(folder: Path, path: Path, sanitizers: str) -> None:
    includes = [ROOT / "csrc", ROOT / "csrc/cuda", ROOT / "tests/cuda_on_cpu"]
    systems = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = [FLAGS, *(f"-I{path}" for path in includes), *(f"-isystem {path}" for path in systems)]
    if sanitizers:
        flags.append(f"-fsanitize={sanitizers} -fno-sanitize-recover=all")
    with open(folder / "build.ninja", "w") as file:
        rules = ninja.Writer(file)
        rules.variable("builddir", str(folder))
        rules.variable("cc", f"{COMPILER} {' '.join(flags)}")
        rules.rule("compile", "$cc -MD -MF $out.d -x c++ -c $in -o $out", depfile="$out.d", deps="gcc")
        rules.rule("link", "$cc -shared $in -o $out")
        sources = sorted((ROOT / "csrc/cuda").glob("*.cu")) + [ROOT / "csrc/cuda/bindings.cpp"]
        objects = [rules.build(str(folder / f"{source.name}.o"), "compile", str(source))[0] for source in sources]
        rules.build(str(path), "link", objects)
    command = [f"{ninja.BIN_DIR}/ninja", "-f", str(folder / "build.ninja"), "-j", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the CUDA module does not compile for the CPU:\n{done.stdout[-4000:]}")
