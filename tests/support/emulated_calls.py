"""Calls of the CUDA kernels on the emulated machine: the compiled functions as they are, past checks and autograd."""

import row_kernels
import torch
from emulated_cuda import Device
from row_kernels import NEEDS_BOTH, bits, problem_of

from auxkernels.cross_entropy import cuda as cuda_cross_entropy
from auxkernels.cross_entropy.request import FIELDS, RowState, mask_of, named_fields

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NO_CLUSTERS = Device(has_clusters=False)
ALL_FIELDS = mask_of(*FIELDS)
STATE = RowState._fields
_TERMS = ("normalizer", "label_smoothing", "z_loss")


def loss_of(base, aux, target, *, mean=False, wanted=0, needs=NEEDS_BOTH, grads=None, **options) -> list:
    """[loss, fields, gradients] as the kernel leaves them."""
    terms = {name: options.pop(name) for name in _TERMS if name in options}
    problem = problem_of(base, aux, target, **options)
    return row_kernels.loss(cuda_cross_entropy, problem, mean=mean, wanted=wanted, needs=needs, grads=grads, **terms)


def scan_of(base, aux, target, wanted=ALL_FIELDS, **options) -> list:
    return cuda_cross_entropy.scan(problem_of(base, aux, target, **options), wanted)


def backward_of(base, aux, target, coefficients, *, needs=NEEDS_BOTH, grads=None, state=None, **options) -> list:
    """`state`: of a scan of the same, if none is given."""
    if state is None:
        fields, _ = named_fields(ALL_FIELDS, scan_of(base, aux, target, **options))
        state = [fields[name].clone() for name in STATE]
    problem = problem_of(base, aux, target, **options)
    return row_kernels.backward(cuda_cross_entropy, problem, state, coefficients, needs=needs, grads=grads)


def assert_equal_bits(got: list, want: list, what="") -> None:
    assert len(got) == len(want)
    for i, (one, other) in enumerate(zip(got, want, strict=True)):
        assert one.dtype == other.dtype and one.shape == other.shape, f"{what} output {i}"
        assert torch.equal(bits(one), bits(other)), f"{what} output {i}: {int((bits(one) != bits(other)).sum())} differ"
