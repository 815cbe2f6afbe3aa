"""Every Triton kernel compiles ahead of time for each architecture: no spills, 128-bit loads, one program for any N."""

import os
import re
from dataclasses import dataclass, field

import pytest
import row_kernels
import torch
from row_kernels import NEEDS_AUX, NEEDS_BASE, problem_of

from auxkernels.cross_entropy import request

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiled kernels and interpreted ones exclude each other", allow_module_level=True)

from triton_compile import (  # noqa: E402
    MULTIPROCESSORS,
    SHARED_LIMIT,
    TARGETS,
    amd_spills,
    nvidia_spills,
    wide_loads,
)

from auxkernels.cross_entropy.triton import launch as cross_entropy  # noqa: E402
from auxkernels.tritonlib import launch  # noqa: E402

LLAMA, GPT2, QWEN, SMALL = 128256, 50257, 151936, 32000


# -- calls -------------------------------------------------------------------------------------------------------------


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass
class Call:
    """One call of an operator, on tensors without memory."""

    op: str
    dtypes: tuple = (torch.bfloat16, torch.bfloat16)
    vocab_size: int = LLAMA
    rows: int = 8192
    needs: int = NEEDS_AUX
    wanted: tuple = ()
    coefficients: str = "G"
    options: dict = field(default_factory=dict)
    bent: bool = False
    weighted: bool = False
    alone: bool = False

    def problem(self):
        base, aux = (empty(self.rows, self.vocab_size, dtype=dtype) for dtype in self.dtypes)
        aux = None if self.alone else aux
        target = None if self.op == "scan" else empty(self.rows, dtype=torch.int64)
        scales = (empty(), empty(self.rows)) if self.bent else (None, None)
        weight = empty(self.vocab_size) if self.weighted else None
        softcaps = (30.0, 5.0) if self.bent else (None, None)
        names = ("base_scale", "aux_scale", "base_softcap", "aux_softcap")
        return problem_of(base, aux, target, weight=weight, **dict(zip(names, (*scales, *softcaps), strict=True)))

    def __call__(self):
        mask, row = request.mask_of(*self.wanted), empty(self.rows)
        if self.op == "scan":
            cross_entropy.scan(self.problem(), mask)
        elif self.op == "loss":
            row_kernels.loss(cross_entropy, self.problem(), mean=True, wanted=mask, needs=self.needs, **self.options)
        elif self.op == "backward":
            k = [row if name in self.coefficients.split() else None for name in request.COEFFICIENTS]
            row_kernels.backward(cross_entropy, self.problem(), [row] * 5, k, needs=self.needs)
        else:
            grad, target = empty(self.rows, self.vocab_size, dtype=self.dtypes[0]), empty(self.rows, dtype=torch.int64)
            cross_entropy.rescale_(grad, empty(), target, -100)


STATISTICS = ("lse", "entropy", "kl_to_base", "log_prob", "base_log_prob", "argmax", "base_argmax", "target_rank")
EVERYTHING = {"normalizer": empty(dtype=torch.float64), "label_smoothing": 0.1, "z_loss": 1e-4}
BOTH, ALL = NEEDS_BASE | NEEDS_AUX, 15
HALF, FULL = (torch.float16, torch.float16), (torch.float32, torch.float32)
CALLS = {
    "plain": Call("loss"),
    "plain-float32-odd": Call("loss", FULL, GPT2, 100, BOTH),
    "plain-odd": Call("loss", HALF, GPT2, 100),
    "forward": Call("loss", vocab_size=SMALL, needs=0),
    "statistics": Call("loss", vocab_size=SMALL, wanted=STATISTICS),
    "statistics-without-target": Call("scan", FULL, QWEN, wanted=("lse", "entropy", "kl_to_base", "argmax")),
    "one-source": Call("loss", FULL, SMALL, needs=NEEDS_BASE, alone=True),
    "smoothing-odd": Call("loss", HALF, GPT2, needs=BOTH, options={"label_smoothing": 0.1}, weighted=True),
    "everything": Call(
        "loss", (torch.bfloat16, torch.float32), QWEN, 8192, ALL, request.FIELDS, "", EVERYTHING, True, True
    ),
    "split": Call("loss", rows=4, needs=BOTH, wanted=STATISTICS),
    "tiny": Call("loss", FULL, 1000, 64),
    "backward": Call("backward"),
    "backward-everything": Call(
        "backward", HALF, GPT2, needs=ALL, coefficients=" ".join(request.COEFFICIENTS), bent=True, weighted=True
    ),
    "backward-statistics": Call("backward", FULL, SMALL, needs=BOTH, coefficients="A C D G Q_b B_b"),
    "rescale": Call("rescale"),
}
# rows that begin at a multiple of 16 bytes, and those that do not, where a wide load would be an error
ALIGNED = {"plain", "forward", "statistics", "statistics-without-target", "split", "backward", "rescale"}
ODD = {"plain-float32-odd", "plain-odd"}
# every call for Hopper; elsewhere those that have spilled there, or whose instructions are others
ELSEWHERE = ("plain", "plain-odd", "statistics", "everything", "split", "backward-everything", "rescale")


def launches(monkeypatch, call):
    """(name, number of programs, arguments) of the kernels that a call launches on sm_90."""
    made = []
    monkeypatch.setattr(launch, "device_of", lambda _: launch.Device("cuda", MULTIPROCESSORS, 32))
    monkeypatch.setattr(launch, "check_device", lambda _: None)
    monkeypatch.setattr(launch, "run", lambda kernel, count, *args, **_: made.append((kernel.__name__, count, args)))
    call()
    return made


def covering():
    return [(target, call) for target in TARGETS for call in CALLS if target == "sm_90" or call in ELSEWHERE]


@pytest.mark.slow
@pytest.mark.parametrize("target, name", covering())
def test_kernels_compile_without_spills(compiled, tmp_path, target, name):
    kernels = compiled(target, CALLS[name])
    assert kernels
    for kernel in kernels:
        spills = nvidia_spills(kernel, tmp_path) if "cubin" in kernel.asm else amd_spills(kernel)
        assert not any(spills.values()), f"{kernel.metadata.name} spills {spills}"
        assert kernel.metadata.shared <= SHARED_LIMIT
        assert not kernel.metadata.enable_fp_fusion


@pytest.mark.parametrize("name", sorted(ALIGNED | ODD))
def test_aligned_rows_are_read_128_bits_at_a_time_and_others_element_by_element(compiled, name):
    kernels = compiled("sm_90", CALLS[name])
    over_rows = [k for k in kernels if re.search("fwd|bwd|segment|rescale", k.metadata.name)]
    for kernel in over_rows:
        # the programs of a split row read states, not columns, before they write gradients
        wide = {load.split(".")[-2] for load in wide_loads(kernel)}
        assert wide == ({"v4"} if name in ALIGNED else set()), kernel.metadata.name


@pytest.mark.parametrize("target", TARGETS)
def test_no_float_is_added_atomically(compiled, target):
    for kernel in compiled(target, CALLS["split"]):
        text = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
        assert not re.search(r"\batom|\bred\.|_atomic_", text), kernel.metadata.name


@pytest.mark.parametrize("rows", [4096, 65536, 2**20])
@pytest.mark.parametrize("needs", [0, NEEDS_AUX])
@pytest.mark.parametrize("reduction", ["mean", "normalizer"])
def test_no_program_works_alone_on_many_rows(monkeypatch, rows, needs, reduction):
    """It would read them block after block, while the rest of the device waits."""
    options = {"normalizer": empty(dtype=torch.float64)} if reduction == "normalizer" else {}
    made = launches(monkeypatch, Call("loss", FULL, SMALL, rows, needs, options=options))
    assert [kernel for kernel, _, _ in made if "fwd" in kernel]
    for kernel, num_programs, args in made:
        sizes = [arg.numel() for arg in args if isinstance(arg, torch.Tensor) and arg.dim() == 1]
        assert num_programs > 1 or max(sizes) <= 2048, kernel


@pytest.mark.parametrize("has_target", [True, False])
def test_a_rescale_starts_no_more_programs_than_a_device_holds(monkeypatch, has_target):
    """Backward always calls it, and where the factor is 1 nothing but the starts of programs takes time."""
    target = empty(8192, dtype=torch.int64) if has_target else None
    grad = empty(8192, LLAMA, dtype=torch.bfloat16)
    for rows, most in ((8192, 8 * MULTIPROCESSORS), (1, 63)):
        given = (grad[:rows], empty(), None if target is None else target[:rows], -100)
        ((_, num_programs, _),) = launches(monkeypatch, lambda: cross_entropy.rescale_(*given))  # noqa: B023
        assert num_programs == most


def test_rows_ignore_index_and_numbers_start_no_compilation(compiled):
    """A kernel for each would stop a training loop for seconds whenever a batch has another size."""
    first = compiled("sm_90", Call("loss", vocab_size=SMALL, wanted=STATISTICS, options={"z_loss": 1e-4}))
    for rows in (4097, 8191, 100_000):
        call = Call("loss", vocab_size=SMALL, rows=rows, wanted=STATISTICS, options={"z_loss": 0.5})
        again = compiled("sm_90", call)
        assert [id(kernel) for kernel in again] == [id(kernel) for kernel in first], rows


@pytest.mark.parametrize("ignore_index", [0, 1, 16, -100, 2**40])
def test_ignore_index_starts_no_compilation(compiled, ignore_index):
    class Other(Call):
        def problem(self):
            return super().problem()._replace(ignore_index=ignore_index)

    first = compiled("sm_90", Call("loss", vocab_size=SMALL))
    again = compiled("sm_90", Other("loss", vocab_size=SMALL))
    assert [id(kernel) for kernel in again] == [id(kernel) for kernel in first]


def test_a_wide_row_leaves_registers_for_a_whole_multiprocessor(compiled):
    """512 threads of at most 128 registers: one row in flight on each, whose second read is to come from L2."""
    (kernel,) = (k for k in compiled("sm_90", CALLS["plain"]) if "fwd" in k.metadata.name)
    assert kernel.metadata.num_warps == 16
    assert kernel.metadata.maxnreg == 128
