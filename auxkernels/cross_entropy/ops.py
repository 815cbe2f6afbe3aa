"""The operators as PyTorch sees them: schemas, fakes, dispatch to an implementation. Torch alone is imported here.

Row fields. A forward scan of row n, with s the sum of the sources, p = softmax(s), z_b the base's part,
q = softmax(z_b), m and m_b the maxima of s and z_b, y the target, w the class weights (1 without), gives the numbers of
`FIELDS`. Which of them a call wants is a bit mask; they come back in this order, stacked: one float tensor [F, *], one
int64 tensor [A, *]. Ignored rows hold +0.0 (argmax -1).

Coefficients. With one number per row for each name of `COEFFICIENTS`, every gradient has the form

    ds_v   = p_v (A + C (s_v - m) + D (z_b,v - m_b)) + Q q_v + G (p_v - [v = y]) + S w_v
    dz_i,v = ds_v + [i is base] (D p_v + Q_b q_v + B_b [v = y])
    dvalues_i,v = scale_i softcap_i'(values_i,v) dz_i,v        dscale_i = sum_v dz_i,v softcap_i(values_i,v)

where 0 * (-inf) = 0, at v = y the G term is -G (1 - p_y) formed from nll without cancellation, and ignored rows get
+0.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks, dispatch

FIELDS = (
    "max",  # m
    "log_denom",  # log d, d = sum_v exp(s_v - m)
    "nll",  # log d - (s_y - m), accurate for confident rows
    "mean_sum",  # E_p[s - m]
    "mean_base",  # E_p[z_b - m_b]
    "base_max",  # m_b
    "base_log_denom",  # log d_b, d_b = sum_v exp(z_b,v - m_b)
    "base_nll",  # log d_b - (z_b,y - m_b)
    "weighted_sum",  # sum_v w_v (s_v - m)
    "lse",  # the rest of LogitStats, for those who need no gradient of them: m + log d
    "entropy",  # log d - E_p[s - m]
    "kl_to_base",  # (E_p[s - m] - E_p[z_b - m_b]) + (log d_b - log d)
    "log_prob",  # -nll
    "base_log_prob",  # -base_nll
    "argmax",  # int64: of s, lowest index on a tie, the first NaN wins
    "base_argmax",  # int64: of z_b
)
FIELD_BIT = {name: 1 << i for i, name in enumerate(FIELDS)}
NUM_FLOAT_FIELDS = FIELDS.index("argmax")
DERIVED = {
    "lse": ("max", "log_denom"),
    "entropy": ("log_denom", "mean_sum"),
    "kl_to_base": ("log_denom", "mean_sum", "mean_base", "base_log_denom"),
    "log_prob": ("nll",),
    "base_log_prob": ("base_nll",),
}
COEFFICIENTS = ("A", "C", "D", "Q", "G", "S", "Q_b", "B_b")
# bits of `needs`: which gradients a call computes; they come back in this order
NEEDS_BASE, NEEDS_AUX, NEEDS_BASE_SCALE, NEEDS_AUX_SCALE = 1, 2, 4, 8

_SOURCES = (
    "Tensor base, Tensor? aux, Tensor? target, Tensor? weight, Tensor? base_scale, Tensor? aux_scale, "
    "float? base_softcap, float? aux_softcap, int ignore_index, SymInt vocab_size"
)
_library = torch.library.Library("auxkernels", "DEF")
_library.define(f"cross_entropy_scan({_SOURCES}, int wanted, str backend) -> Tensor[]")
_library.define(
    f"cross_entropy_loss({_SOURCES}, Tensor? normalizer, float label_smoothing, float z_loss, bool mean, "
    "int wanted, int needs, str backend) -> Tensor[]"
)
_library.define(
    f"cross_entropy_backward({_SOURCES}, Tensor max, Tensor log_denom, Tensor? nll, Tensor? base_max, "
    "Tensor? base_log_denom, Tensor?[] coefficients, int needs, str backend) -> Tensor[]"
)
_library.define(
    "cross_entropy_rescale_(Tensor(a!) grad, Tensor factor, Tensor? target, int ignore_index, str backend) -> ()"
)
_library.define("check_target(Tensor target, SymInt vocab_size, int ignore_index) -> Tensor")

cross_entropy_backward = torch.ops.auxkernels.cross_entropy_backward.default
cross_entropy_rescale_ = torch.ops.auxkernels.cross_entropy_rescale_.default
check_target = torch.ops.auxkernels.check_target.default


def fields_in(wanted: int) -> list[str]:
    """The names of the fields in a mask, in the order in which they come back."""
    return [name for i, name in enumerate(FIELDS) if wanted >> i & 1]


def mask_of(*names: str) -> int:
    return sum(FIELD_BIT[name] for name in names)


OF_TARGET = mask_of("nll", "base_nll", "log_prob", "base_log_prob")
OF_BASE = mask_of("mean_base", "base_max", "base_log_denom", "base_nll", "kl_to_base", "base_log_prob", "base_argmax")


def is_ignored(target: Tensor, ignore_index: int) -> Tensor:
    """Which rows are ignored, compared in 64 bits: an int32 target has no 2**32 + 5 to be equal to."""
    return target.long() == ignore_index


def with_sources_of_derived(wanted: int) -> int:
    """The mask with the fields that the wanted derived ones are made of."""
    for name, sources in DERIVED.items():
        if wanted & FIELD_BIT[name]:
            wanted |= mask_of(*sources)
    return wanted


def compute_dtype(base: Tensor, aux: Tensor | None) -> torch.dtype:
    """Arithmetic, loss and statistics are float32, or float64 if a source is."""
    wide = base.dtype == torch.float64 or (aux is not None and aux.dtype == torch.float64)
    return torch.float64 if wide else torch.float32


# -- outputs, shared by the fakes and the implementations, so that metadata cannot differ ------------------------------

_FLOAT_FIELDS = (1 << NUM_FLOAT_FIELDS) - 1


def empty_rows(like: Tensor, shape: torch.Size, compute: torch.dtype, wanted: int) -> list[Tensor]:
    """Room for the wanted fields: [F, *] of the compute dtype, then [A, *] of int64; each only if it is not empty."""
    num_floats = (wanted & _FLOAT_FIELDS).bit_count()
    num_ints = wanted.bit_count() - num_floats
    fields = []
    if num_floats:
        fields.append(like.new_empty((num_floats, *shape), dtype=compute))
    if num_ints:
        fields.append(like.new_empty((num_ints, *shape), dtype=torch.int64))
    return fields


def empty_fields(base: Tensor, aux: Tensor | None, wanted: int) -> list[Tensor]:
    return empty_rows(base, base.shape[:-1], compute_dtype(base, aux), wanted)


def named_fields(wanted: int, outputs: list[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """An op's outputs as the wanted fields by name, and what follows them."""
    rows: list[Tensor] = []
    num_tensors = bool(wanted & _FLOAT_FIELDS) + bool(wanted & ~_FLOAT_FIELDS)
    for stacked in outputs[:num_tensors]:
        rows += stacked.unbind()
    return dict(zip(fields_in(wanted), rows, strict=True)), outputs[num_tensors:]


def empty_grads(base: Tensor, aux: Tensor | None, needs: int) -> list[Tensor]:
    """Room for the requested gradients: dvalues in a source's dtype and width, dscale per row in the compute dtype."""
    grads = []
    if needs & NEEDS_BASE:
        grads.append(base.new_empty(base.shape))
    if needs & NEEDS_AUX:
        grads.append(aux.new_empty(aux.shape))
    for bit in (NEEDS_BASE_SCALE, NEEDS_AUX_SCALE):
        if needs & bit:
            grads.append(base.new_empty(base.shape[:-1], dtype=compute_dtype(base, aux)))
    return grads


# -- dispatch ----------------------------------------------------------------------------------------------------------


def _with_tensors(args: tuple, positions: tuple[int, ...]) -> list:
    """The arguments with the numbers at these positions (scales, normalizer) as the tensors of the schema."""
    args = list(args)
    dtype = compute_dtype(args[0], args[1])
    for i in positions:
        args[i] = dispatch.number_tensor(args[i], dtype, args[0].device)
    return args


def cross_entropy_scan(*args) -> list[Tensor]:
    """The op of that name on checked arguments; scales may be numbers."""
    if dispatch.is_direct(args[:6], args[-1]):
        return dispatch.implementation("cross_entropy", "native", is_cuda=args[0].is_cuda).scan(*args[:-1])
    return torch.ops.auxkernels.cross_entropy_scan.default(*_with_tensors(args, (4, 5)))


def cross_entropy_loss(*args) -> list[Tensor]:
    """The op of that name on checked arguments; scales and normalizer may be numbers."""
    if dispatch.is_direct(args[:6], args[-1]):
        return dispatch.implementation("cross_entropy", "native", is_cuda=args[0].is_cuda).loss(*args[:-1])
    return torch.ops.auxkernels.cross_entropy_loss.default(*_with_tensors(args, (4, 5, 10)))


def check_wanted(wanted: int, target: Tensor | None) -> None:
    if wanted < 0 or wanted >> len(FIELDS):
        raise ValueError(f"wanted must be a mask of ops.FIELDS, got {wanted}")
    if wanted & OF_TARGET and target is None:
        raise ValueError("target must be given for the fields of a target, got None")


def check_coefficients(coefficients, nll, base_max, base_log_denom, target: Tensor | None) -> None:
    """As many as there are, with the row state that they need."""
    if len(coefficients) != len(COEFFICIENTS):
        raise ValueError(f"coefficients must be the {len(COEFFICIENTS)} of ops.COEFFICIENTS, got {len(coefficients)}")
    for names, state, name in (
        (("G",), nll, "nll"),
        (("D", "Q", "Q_b"), base_max, "base_max"),
        (("Q", "Q_b"), base_log_denom, "base_log_denom"),
        (("G", "B_b"), target, "target"),
    ):
        if state is None and any(coefficients[COEFFICIENTS.index(c)] is not None for c in names):
            raise ValueError(f"{name} must be given for the coefficients {', '.join(names)}, got None")


def _checked(args: tuple):
    """The implementation that the last argument names, after the checks that all ops share: anyone may call an op."""
    kernels = dispatch.implementation("cross_entropy", args[-1], is_cuda=args[0].is_cuda)
    checks.op_arguments(*args[:10])
    if args[-1] == "native" and args[0].device.type not in ("cpu", "cuda"):
        raise RuntimeError(f"base must be a CPU or CUDA tensor for backend='native', got {args[0].device}")
    return kernels


def _scan(*args):
    kernels = _checked(args)
    check_wanted(args[-2], args[2])
    return kernels.scan(*args[:-1])


def _loss(*args):
    kernels = _checked(args)
    _, aux, target, _, base_scale, aux_scale, *_, wanted, needs, _ = args
    check_wanted(wanted | OF_TARGET, target)
    checks.op_gradients(aux, base_scale, aux_scale, needs)
    return kernels.loss(*args[:-1])


def _backward(*args):
    kernels = _checked(args)
    _, aux, target, _, base_scale, aux_scale, *_, coefficients, needs, _ = args
    check_coefficients(coefficients, *args[12:15], target)
    checks.op_gradients(aux, base_scale, aux_scale, needs)
    return kernels.backward(*args[:-1])


def _rescale_(grad, factor, target, ignore_index, backend):
    checks.rescaled(grad, factor, target)
    dispatch.implementation("cross_entropy", backend, is_cuda=grad.is_cuda).rescale_(grad, factor, target, ignore_index)


def _scan_fake(*args):
    checks.op_arguments(*args[:10])
    return empty_fields(*args[:2], wanted=args[-2])


def _loss_fake(*args):
    checks.op_arguments(*args[:10])
    base, aux = args[:2]
    wanted, needs = args[-3:-1]
    loss = base.new_empty((), dtype=compute_dtype(base, aux))
    return [loss, *empty_fields(base, aux, wanted), *empty_grads(base, aux, needs)]


def _backward_fake(*args):
    checks.op_arguments(*args[:10])
    return empty_grads(*args[:2], needs=args[-2])


def raise_out_of_range(target: Tensor, vocab_size: int, ignore_index: int) -> None:
    """IndexError for a CPU target that names no class; a GPU's cannot be looked at without waiting for it."""
    if target.device.type != "cpu":
        return
    bad = ((target < 0) | (target >= vocab_size)) & ~is_ignored(target, ignore_index)
    if bool(bad.any()):
        row = int(bad.flatten().nonzero()[0])
        value = int(target.flatten()[row])
        raise IndexError(checks.in_range_message(target.shape, row, value, vocab_size, ignore_index))


def _check_target(target, vocab_size, ignore_index):
    raise_out_of_range(target, vocab_size, ignore_index)
    return target.clone()


for _name, _kernel, _fake in (
    ("cross_entropy_scan", _scan, _scan_fake),
    ("cross_entropy_loss", _loss, _loss_fake),
    ("cross_entropy_backward", _backward, _backward_fake),
    ("cross_entropy_rescale_", _rescale_, lambda *args: None),
    ("check_target", _check_target, lambda target, vocab_size, ignore_index: torch.empty_like(target)),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"auxkernels::{_name}", _fake, lib=_library)
