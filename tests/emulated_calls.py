"""Calls of the CUDA kernels on the emulated machine: the compiled functions as they are, past checks and autograd."""

import torch
from emulated_cuda import Room

from auxkernels.cross_entropy import cuda as cuda_cross_entropy
from auxkernels.cross_entropy import ops

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NO_CLUSTERS = Room(has_clusters=False)
ALL_FIELDS = ops.mask_of(*ops.FIELDS)
NEEDS_BOTH = ops.NEEDS_BASE | ops.NEEDS_AUX


def loss_of(base, aux, target, *, mean=False, wanted=0, needs=NEEDS_BOTH, grads=None, **options) -> list:
    """[loss, fields, gradients] as the kernel leaves them."""
    names = ("weight", "base_scale", "aux_scale", "base_softcap", "aux_softcap")
    given = [options.get(name) for name in names]
    end = (options.get("normalizer"), options.get("label_smoothing", 0.0), options.get("z_loss", 0.0))
    ignore_index, vocab_size = options.get("ignore_index", -100), options.get("vocab_size", base.shape[-1])
    return cuda_cross_entropy.loss(
        base, aux, target, *given, ignore_index, vocab_size, *end, mean, wanted, needs, grads=grads
    )


def scan_of(base, aux, target, wanted=ALL_FIELDS, **options) -> list:
    names = ("weight", "base_scale", "aux_scale", "base_softcap", "aux_softcap")
    given = [options.get(name) for name in names]
    ignore_index, vocab_size = options.get("ignore_index", -100), options.get("vocab_size", base.shape[-1])
    return cuda_cross_entropy.scan(base, aux, target, *given, ignore_index, vocab_size, wanted)


STATE = ("max", "log_denom", "nll", "base_max", "base_log_denom")


def backward_of(base, aux, target, coefficients, *, needs=NEEDS_BOTH, grads=None, **options) -> list:
    fields, _ = ops.named_fields(ALL_FIELDS, scan_of(base, aux, target, **options))
    state = [fields[name].clone() for name in STATE]
    names = ("weight", "base_scale", "aux_scale", "base_softcap", "aux_softcap")
    given = [options.get(name) for name in names]
    ignore_index, vocab_size = options.get("ignore_index", -100), options.get("vocab_size", base.shape[-1])
    listed = [coefficients.get(name) for name in ops.COEFFICIENTS]
    return cuda_cross_entropy.backward(
        base, aux, target, *given, ignore_index, vocab_size, *state, listed, needs, grads=grads
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_equal_bits(got: list, want: list, what="") -> None:
    assert len(got) == len(want)
    for i, (one, other) in enumerate(zip(got, want, strict=True)):
        assert one.dtype == other.dtype and one.shape == other.shape, f"{what} output {i}"
        assert torch.equal(bits(one), bits(other)), f"{what} output {i}: {int((bits(one) != bits(other)).sum())} differ"
