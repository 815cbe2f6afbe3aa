"""The CUDA module compiled for the CPU: the same kernels, thread by thread, on the machine of kernels/cuda/on_cpu."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import ninja
import pybind11
import torch

from auxkernels import dispatch
from auxkernels.cross_entropy import cuda as cuda_cross_entropy

ROOT = Path(__file__).parents[2]
MACHINE = ROOT / "tests/kernels/cuda/on_cpu"
COMPILER = "g++"
FLAGS = "-std=c++17 -O2 -g1 -fPIC -fvisibility=hidden -ffp-contract=off -fno-strict-aliasing -Wno-unknown-pragmas"


def missing() -> str | None:
    """Why there is no emulated module here; None if there is one."""
    return None if shutil.which(COMPILER) else f"{COMPILER} is not installed"


def install(monkeypatch) -> None:
    """Puts it in the place of the compiled CPU module: backend="native" with CPU tensors then runs the CUDA kernels."""
    emulated = module(os.environ.get("AUXKERNELS_CUDA_SANITIZERS", ""))
    real = dispatch.implementation

    def implementation(operator: str, backend: str, is_cuda: bool = False):
        if backend == "native" and operator == "cross_entropy":
            return cuda_cross_entropy
        return real(operator, backend, is_cuda)

    monkeypatch.setattr(cuda_cross_entropy, "cuda", lambda: emulated)
    monkeypatch.setattr(cuda_cross_entropy, "_place_of", lambda tensor: (0, Machine.number))
    monkeypatch.setattr(dispatch, "implementation", implementation)
    monkeypatch.setattr(dispatch, "_NATIVE_MISSING", None)


class Device(NamedTuple):
    """A device, as the kernels' caller sees it."""

    multiprocessors: int = 32
    shared_bytes: int = 227 * 1024
    has_clusters: bool = True


class Launched(NamedTuple):
    num_blocks: int
    cluster: int
    threads: int
    shared_bytes: int


_numbers = {Device(): 0}  # what is known of a device is kept under its number


class Machine:
    """What a test may ask of the emulation beside the calls themselves."""

    number = 0  # of the device in use

    def __init__(self):
        self.module = module(os.environ.get("AUXKERNELS_CUDA_SANITIZERS", ""))
        self.library = ctypes.CDLL(self.module.__file__)

    def use(self, device: Device) -> None:
        Machine.number = _numbers.setdefault(device, len(_numbers))
        self.library.auxk_use_device(
            Machine.number, device.multiprocessors, ctypes.c_int64(device.shared_bytes), device.has_clusters
        )

    @contextlib.contextmanager
    def capture(self):
        """Kernels run as ever, but none may be the first use of its code by a launch."""
        self.library.auxk_capture(True)
        try:
            yield
        finally:
            self.library.auxk_capture(False)

    def seed(self, value: int) -> None:
        self.library.auxk_seed(ctypes.c_uint64(value))

    def may_touch(self, *tensors: torch.Tensor) -> None:
        """From here on kernels' wide accesses stay in these tensors' elements, each one stretch of memory."""
        for tensor in tensors:
            assert tensor.is_contiguous()
            self.library.auxk_register_memory(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_uint64(tensor.nbytes))

    def may_touch_all(self) -> None:
        self.library.auxk_forget_memory()

    def last(self) -> Launched:
        found = (ctypes.c_int64 * 4)()
        self.library.auxk_last_launch(found)
        return Launched(*found)


@functools.cache
def module(sanitizers: str = "") -> ModuleType:
    """The emulated module, compiled if its sources have changed."""
    path = built(sanitizers)
    spec = importlib.util.spec_from_file_location("_cuda", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def built(sanitizers: str = "") -> Path:
    """Its file; one with sanitizers loads only into a process that was started with their runtime."""
    folder = ROOT / "build" / f"cuda_on_cpu{sanitizers and '_sanitized'}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes would build it at once
        _build(folder, path, sanitizers)
    return path


def _build(folder: Path, path: Path, sanitizers: str) -> None:
    includes = [ROOT / "csrc", ROOT / "csrc/cuda", MACHINE]
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
        others = [ROOT / "csrc/cuda/bindings.cpp", MACHINE / "controls.cpp"]
        sources = sorted((ROOT / "csrc/cuda").glob("*.cu")) + others
        objects = [rules.build(str(folder / f"{source.name}.o"), "compile", str(source))[0] for source in sources]
        rules.build(str(path), "link", objects)
    command = [f"{ninja.BIN_DIR}/ninja", "-f", str(folder / "build.ninja"), "-j", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the CUDA module does not compile for the CPU:\n{done.stdout[-4000:]}")
