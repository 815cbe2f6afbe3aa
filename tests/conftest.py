"""Fixtures: the implementations of this machine, and a seed for every test."""

import os
import zlib

# several test processes share the cores: threads that spin while they wait take the others' time (four times slower)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import emulated_cuda
import implementations
import pytest
import torch
from implementations import implementation_fixture

from auxkernels import dispatch

impl = implementation_fixture(implementations.ALL, "Every implementation: what the contract promises of all of them.")
fused = implementation_fixture(
    implementations.FUSED,
    "The fused ones: promises about bits, memory, single use of a gradient, and confident rows.",
)
on_cpu = implementation_fixture(implementations.ON_CPU, "Those that raise IndexError for a target out of range.")
on_gpu = implementation_fixture(implementations.ON_CUDA, "Those that poison the row of such a target.")
doubles = implementation_fixture(implementations.IN_FLOAT64, "Those that know float64.")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Where there is no CUDA device, what needs one is left out, and counted once."""
    if torch.cuda.is_available():
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    if left_out:
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=left_out)


def pytest_report_header():
    return None if torch.cuda.is_available() else "no CUDA device: tests that need one are left out"


@pytest.fixture
def machine(monkeypatch) -> emulated_cuda.Machine:
    """The emulated CUDA machine with one seed, its module in place of the compiled CPU module."""
    reason = emulated_cuda.missing()
    if reason:
        pytest.skip(reason)
    emulated_cuda.install(monkeypatch)
    found = emulated_cuda.Machine()
    found.seed(1)
    yield found
    found.use(emulated_cuda.Device())
    found.may_touch_all()


@pytest.fixture
def native():
    """The compiled CPU module."""
    reason = dispatch.native_missing()
    if reason:
        pytest.skip(f"native on cpu: {reason}")
    from auxkernels.native import cpu

    return cpu()


@pytest.fixture
def compiled(monkeypatch):
    """A function of (target name, call): the Triton kernels that the call would launch there, in their order."""
    from triton_compile import compiler  # here, since it needs Triton

    with compiler(monkeypatch) as kernels_of:
        yield kernels_of


@pytest.fixture(autouse=True)
def _seed(request):
    """The same numbers for a test whatever ran before it, in whatever process; the emulation's are the CPU's.

    AUXKERNELS_TEST_SEED, an integer, draws other ones: no test may pass by its numbers alone.
    """
    name = request.node.nodeid.replace("native-emulated", "native-cpu")
    torch.manual_seed(zlib.crc32((name + os.environ.get("AUXKERNELS_TEST_SEED", "")).encode()))
