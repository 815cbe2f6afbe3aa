"""What is known of the CUDA kernels without a device: they compile, and to what machine code."""

import os
import re
import subprocess
import sys

import cuda_compile
import pytest
import torch

RESIDENT = "cross_entropy_resident_kernel"
WITH_CLUSTERS = ("90a", "100")


def _compiled(request) -> str:
    if reason := cuda_compile.missing():
        pytest.skip(reason)
    return request.param


@pytest.fixture(params=cuda_compile.ARCHITECTURES)
def architecture(request) -> str:
    return _compiled(request)


@pytest.fixture(params=WITH_CLUSTERS)
def with_clusters(request) -> str:
    return _compiled(request)


@pytest.fixture(params=["80"])
def without_clusters(request) -> str:
    return _compiled(request)


def named(architecture: str, pattern: str) -> list[cuda_compile.Kernel]:
    found = [kernel for kernel in cuda_compile.kernels(architecture) if re.search(pattern, kernel.name)]
    assert found, pattern
    return found


@pytest.mark.slow
def test_no_kernel_spills_registers_or_uses_local_memory(architecture):
    for kernel in named(architecture, "_kernel<float"):
        assert (kernel.stack_bytes, kernel.spilled_bytes) == (0, 0), kernel.name
        assert not kernel.has("LDL") and not kernel.has("STL"), kernel.name


def test_kernels_of_float64_spill_a_few_registers_at_most(architecture):
    for kernel in named(architecture, "_kernel<double"):
        assert kernel.spilled_bytes <= 128, kernel.name


def test_the_registers_suffice_for_all_threads(architecture):
    """A multiprocessor has 65536, given to warps in units of 256, to its four schedulers a quarter each."""
    for kernel in named(architecture, "resident|reread"):
        is_general = re.search(r"<\w+, 2,", kernel.name) is not None
        num_warps = (224 if is_general else 384) // 32 + kernel.name.startswith(RESIDENT)
        of_warp = -(-32 * kernel.registers // 256) * 256
        assert -(-num_warps // 4) * of_warp <= 65536 // 4, kernel.name


def test_rows_are_brought_to_shared_memory_by_bulk_copies(with_clusters):
    for kernel in named(with_clusters, RESIDENT):
        assert kernel.has("UBLKCP"), kernel.name  # cp.async.bulk
        assert kernel.has("SYNCS.PHASECHK.TRANS64.TRYWAIT"), kernel.name  # mbarrier.try_wait
        assert kernel.has("UCGABAR_ARV") and kernel.has("UCGABAR_WAIT"), kernel.name  # barrier.cluster


def test_the_producer_reads_nothing_between_a_tiles_copies_and_its_arrival(with_clusters):
    """Or it would wait for memory before it can start the next copies."""
    for kernel in named(with_clusters, RESIDENT):
        start = next(i for i, name in enumerate(kernel.listing) if name.startswith("UBLKCP"))
        stop = next(i for i, name in enumerate(kernel.listing) if i > start and name.startswith("SYNCS.ARRIVE"))
        between = kernel.listing[start:stop]
        assert not [name for name in between if name.startswith(("LDG", "LD."))], kernel.name


def test_devices_without_clusters_are_asked_for_nothing_of_the_kind(without_clusters):
    for kernel in cuda_compile.kernels(without_clusters):
        for mnemonic in ("UBLKCP", "SYNCS", "UCGABAR"):
            assert not kernel.has(mnemonic), kernel.name


def has_wide(kernel: cuda_compile.Kernel, start: str) -> bool:
    return any(mnemonic.startswith(start) and ".128" in mnemonic for mnemonic in kernel.instructions)


@pytest.mark.parametrize("types", ["Kind<0, 0, 4, ", "Kind<1, 1, 8, ", "Kind<2, 2, 8, "])
def test_aligned_rows_are_read_and_written_16_bytes_at_a_time(architecture, types):
    for kernel in named(architecture, rf"(reread|backward)_kernel<float, \d, {types}"):
        assert has_wide(kernel, "LDG") and has_wide(kernel, "STG"), kernel.name
    if architecture in WITH_CLUSTERS:
        for kernel in named(architecture, rf"{RESIDENT}<float, \d, {types}"):
            assert has_wide(kernel, "LDS"), kernel.name
            assert kernel.has("STG.E.EF.128"), kernel.name  # past what waits in L2


def test_exponentials_are_one_instruction(architecture):
    for kernel in named(architecture, "backward_kernel<float, 0"):
        assert kernel.has("MUFU.EX2"), kernel.name


def test_no_float_is_added_atomically(architecture):
    """What counts blocks is an integer that no result depends on; sums of floats would depend on who comes first."""
    for kernel in cuda_compile.kernels(architecture):
        for mnemonic in kernel.instructions:
            assert not mnemonic.startswith("RED."), (kernel.name, mnemonic)
            assert not mnemonic.startswith("ATOM") or ".INC" in mnemonic, (kernel.name, mnemonic)


def test_the_flags_are_those_of_the_build():
    setup = (cuda_compile.ROOT / "setup.py").read_text()
    for flag in (*cuda_compile.FLAGS, *cuda_compile.ARCHITECTURES):
        assert f'"{flag}"' in setup, flag


LOADED = """
import sys
sys.path.insert(0, sys.argv[1])
import _cuda
print(sorted(_cuda.plan(8192, 50257, 1, 1, True, False, 132, 232448, True).items()))
print(_cuda.driver_problem())
try:
    _cuda.rescale(16, 0, 1, 1, 0, False, 0, 16, 0, 0, 0)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a device")
def test_the_module_is_built_and_loaded_where_there_is_no_device():
    """It must not cost the import of the package, and says of a call what is missing."""
    if reason := cuda_compile.missing():
        pytest.skip(reason)
    folder = cuda_compile.ROOT / "build" / "cuda_module"
    variables = {"AUXKERNELS_BUILD": "cuda", "AUXKERNELS_CUDA_ARCHS": "90a", "AUXKERNELS_WERROR": "1"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder / "scratch"]
    options = {"cwd": cuda_compile.ROOT, "capture_output": True, "text": True}
    built = subprocess.run(command, env=os.environ | variables, **options)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    done = subprocess.run([sys.executable, "-c", LOADED, folder / "auxkernels/native"], **options)
    assert done.returncode == 0, done.stderr[-2000:]
    plan, problem, error = done.stdout.splitlines()
    assert "('cluster', 2)" in plan and "('is_resident', True)" in plan
    assert problem in ("there is no CUDA driver", "the driver's version cannot be read")
    assert error.startswith("CUDA error, here or of earlier work: ")
