"""Triton kernels compiled ahead of time: the fixture `compiled` of conftest.py, and what the compilers say of kernels.

No GPU is needed: a driver that only names a target lets the launchers run as far as the compiler, on tensors without
memory, so what is compiled here is what a launch on that device would compile. For tests that have found Triton.
"""

import re
import subprocess
from contextlib import contextmanager

import triton
from triton.backends.compiler import GPUTarget

from auxkernels.cross_entropy.triton import head_launch as heads
from auxkernels.tritonlib import launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MULTIPROCESSORS = 132
SHARED_LIMIT = 48 * 1024  # bytes that every one of them gives a block without being asked


class NamesATarget:
    """As much of a driver as compiling takes."""

    def __init__(self, target):
        self.target = target

    def get_current_device(self):
        return f"no device, {self.target.arch}"

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target


@contextmanager
def compiler(monkeypatch):
    """A function of (target name, call): the kernels that the call would launch there, in their order."""
    made = []

    def warm_up(kernel, num_programs, *args, **options):
        if num_programs:
            made.append(kernel.warmup(*args, grid=(num_programs,), **options, enable_fp_fusion=False))

    def kernels_of(name, call):
        target = TARGETS[name]
        triton.runtime.driver.set_active(NamesATarget(target))
        device = launch.Device(target.backend, MULTIPROCESSORS, target.warp_size)
        monkeypatch.setattr(launch, "device_of", lambda _: device)
        monkeypatch.setattr(heads, "architecture_of", lambda _: target.arch)
        made.clear()
        call()
        return list(made)

    monkeypatch.setattr(launch, "run", warm_up)
    monkeypatch.setattr(launch, "check_device", lambda _: None)
    before = dict(vars(triton.runtime.driver))  # its own reset looks for a GPU
    try:
        yield kernels_of
    finally:
        vars(triton.runtime.driver).update(before)


# -- what the compilers say --------------------------------------------------------------------------------------------


def nvidia_spills(kernel, tmp_path):
    """Bytes of stack and local memory: what a cubin keeps of registers that were spilled."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(re.search(rf"\b{name}:(\d+)", said)[1]) for name in ("STACK", "LOCAL")}


def amd_spills(kernel):
    said = kernel.asm["amdgcn"]
    names = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    return {name: int(re.search(rf"\.{name}:\s+(\d+)", said)[1]) for name in names}


def wide_loads(kernel):
    """Loads of more than one element from global memory."""
    if "ptx" in kernel.asm:
        return re.findall(r"ld\.global[\w.:]*\.v[248]\.\w+", kernel.asm["ptx"])
    return re.findall(r"(?:global|buffer|flat)_load_dwordx?[248]?\b", kernel.asm["amdgcn"])
