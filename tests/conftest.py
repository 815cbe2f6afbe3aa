"""Fixtures: the implementations of this machine, and a seed for every test."""

import os
import zlib

# several test processes share the cores: threads that spin while they wait take the others' time (four times slower)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import emulated_cuda
import pytest
import torch
from implementations import Implementation

from auxkernels import dispatch
from auxkernels.soft_embedding import plain_lookup


def _param(backend: str, device: str):
    marks = [pytest.mark.gpu] if device == "cuda" else []
    return pytest.param(Implementation(backend, device), id=f"{backend}-{device}", marks=marks)


REFERENCE = [_param("reference", "cpu"), _param("reference", "cuda")]
EMULATED = pytest.param(Implementation("native", "cpu", is_emulated=True), id="native-emulated")
CUDA = _param("native", "cuda")
FUSED = [_param("native", "cpu"), EMULATED, _param("triton", "cuda"), CUDA]
IMPLEMENTATIONS = {
    "impl": REFERENCE + FUSED,
    "fused": FUSED,
    "on_cpu": [_param("reference", "cpu"), _param("native", "cpu")],
    "on_gpu": [_param("reference", "cuda"), _param("triton", "cuda"), CUDA],
    "doubles": [*REFERENCE, _param("native", "cpu"), EMULATED, CUDA],
}


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    """Implementations by fixture; the CUDA module has no lookups of label embeddings, its emulation no process."""
    module = metafunc.module.__name__.rpartition(".")[2]
    left_out = []
    if module.startswith(("test_soft", "test_segments", "test_nn")):
        left_out = [EMULATED, CUDA]
    elif module in ("test_memory", "test_process", "test_heads_process"):
        left_out = [EMULATED]
    for name in IMPLEMENTATIONS.keys() & set(metafunc.fixturenames):
        kept = [param for param in IMPLEMENTATIONS[name] if param not in left_out]
        metafunc.parametrize(name, kept, indirect=True)


def _available(request) -> Implementation:
    reason = request.param.unavailable()
    if reason:
        pytest.skip(f"{request.param.backend} on {request.param.device}: {reason}")
    if request.param.is_emulated:
        emulated_cuda.install(request.getfixturevalue("monkeypatch"))
    return request.param


@pytest.fixture
def impl(request) -> Implementation:
    """Every implementation: what the contract promises of all of them."""
    return _available(request)


@pytest.fixture
def fused(request) -> Implementation:
    """The fused ones: promises about bits, memory, single use of a gradient, and confident rows."""
    return _available(request)


@pytest.fixture
def on_cpu(request) -> Implementation:
    """Those that raise IndexError for a target out of range."""
    return _available(request)


@pytest.fixture
def on_gpu(request) -> Implementation:
    """Those that poison the row of such a target."""
    return _available(request)


@pytest.fixture
def doubles(request) -> Implementation:
    """Those that know float64."""
    return _available(request)


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
    found.use(emulated_cuda.Room())
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


@pytest.fixture
def general_road(monkeypatch):
    """soft_embedding without its short road, whose bits are its own: equal bits are a promise of each road alone."""
    monkeypatch.setattr(plain_lookup, "serves", lambda *_: False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """One line of the summary for each implementation that is not here, rather than one for each test."""
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple) and report.longrepr[2].endswith(": no CUDA device"):
        report.longrepr = (__file__, _available.__code__.co_firstlineno, report.longrepr[2])
    return report


@pytest.fixture(autouse=True)
def _seed(request):
    """The same numbers for a test whatever ran before it, in whatever process; the emulation's are the CPU's.

    AUXKERNELS_TEST_SEED, an integer, draws other ones: no test may pass by its numbers alone.
    """
    name = request.node.nodeid.replace("native-emulated", "native-cpu")
    torch.manual_seed(zlib.crc32((name + os.environ.get("AUXKERNELS_TEST_SEED", "")).encode()))
