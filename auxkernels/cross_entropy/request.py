"""What is asked of the row kernels of cross-entropy and what they answer: by name, and the mathematics.

Row fields. A forward scan of row n, with s the sum of the sources, p = softmax(s), z_b the base's part,
q = softmax(z_b), m and m_b the maxima of s and z_b, y the target, w the class weights (1 without), gives the numbers of
`FIELDS`. Which of them a call wants is a bit mask; they come back in this order, stacked: one float tensor [F, *], one
int64 tensor [A, *]. Ignored rows hold +0.0 (-1 in those of int64).

Coefficients. With one number per row for each name of `Coefficients`, every gradient has the form

    ds_v   = p_v (A + C (s_v - m) + D (z_b,v - m_b)) + Q q_v + G (p_v - [v = y]) + S w_v
    dz_i,v = ds_v + [i is base] (D p_v + Q_b q_v + B_b [v = y])
    dvalues_i,v = scale_i softcap_i'(values_i,v) dz_i,v        dscale_i = sum_v dz_i,v softcap_i(values_i,v)

where 0 * (-inf) = 0, at v = y the G term is -G (1 - p_y) formed from nll without cancellation, and ignored rows get
+0.0.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .. import checks, memory
from ..sources import Leaves, Matrix, Source, SourceTensors

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
    "target_rank",  # int64: how many s_v > s_y; -1 where p is none, or y no class
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


def fields_in(wanted: int) -> list[str]:
    """The names of the fields in a mask, in the order in which they come back."""
    return [name for i, name in enumerate(FIELDS) if wanted >> i & 1]


def mask_of(*names: str) -> int:
    return sum(FIELD_BIT[name] for name in names)


OF_TARGET = mask_of("nll", "base_nll", "log_prob", "base_log_prob", "target_rank")
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


class BadTarget(IndexError):
    """The IndexError of one of several requests. number: which."""

    def __init__(self, number: int, message: object):
        super().__init__(message)
        self.number = number


# -- requests ----------------------------------------------------------------------------------------------------------


class Arguments(NamedTuple):
    """What a public function was given, checked."""

    base: list[Source]
    aux: list[Source]
    target: Tensor | None
    ignore_index: int
    vocab_size: int
    compute: torch.dtype
    autocast: torch.dtype | None  # dtype of the heads' products, where autocast is on
    backend: str


class Request(NamedTuple):
    """What the operators are asked about: sources, the first `num_base` of which are the base, and classes."""

    sources: list[SourceTensors]
    num_base: int
    autocast: torch.dtype | None
    target: Tensor | None
    weight: Tensor | None
    ignore_index: int
    vocab_size: int

    def first(self) -> Tensor:
        return self.sources[0].values

    def shape(self) -> torch.Size:
        return self.first().shape[:-1]

    def compute(self) -> torch.dtype:
        return compute_dtype(*(source.values for source in self.sources))

    def ignored(self) -> Tensor | None:
        return None if self.target is None else is_ignored(self.target, self.ignore_index)

    def is_of_matrices(self) -> bool:
        """Whether base and auxiliary are one matrix of logits each, so that the row kernels take them as they are."""
        num_aux = len(self.sources) - self.num_base
        return self.num_base == 1 and num_aux < 2 and all(source.weight is None for source in self.sources)

    def problem(self) -> Problem:
        """As the row kernels take a request `is_of_matrices`."""
        base, *aux = (Matrix(source.values, source.scale, source.softcap) for source in self.sources)
        return Problem(base, aux[0] if aux else None, self.target, self.weight, self.ignore_index, self.vocab_size)


class Problem(NamedTuple):
    """What the row kernels are asked about: one matrix of logits each for base and auxiliary."""

    base: Matrix
    aux: Matrix | None
    target: Tensor | None  # [*] int32 or int64
    weight: Tensor | None  # [V]
    ignore_index: int
    vocab_size: int
    # [*], compute dtype: the sum at the target, where it is known more exactly than the matrices have it; for CPU alone
    target_logits: Tensor | None = None

    def shape(self) -> torch.Size:
        return self.base.values.shape[:-1]

    def compute(self) -> torch.dtype:
        if self.aux is None:
            return compute_dtype(self.base.values)
        return compute_dtype(self.base.values, self.aux.values)


class LossTerms(NamedTuple):
    """What a reduced loss is made of, beside its normalizer, which may be a tensor. mean: it is divided at all."""

    label_smoothing: float
    z_loss: float
    mean: bool


class RowState(NamedTuple):
    """The fields of a scan that gradients are made of, [*] each; None: not needed by the coefficients given."""

    max: Tensor
    log_denom: Tensor
    nll: Tensor | None = None
    base_max: Tensor | None = None
    base_log_denom: Tensor | None = None


class Coefficients(NamedTuple):
    """One number for each row, [*]; None: 0."""

    A: Tensor | None = None
    C: Tensor | None = None
    D: Tensor | None = None
    Q: Tensor | None = None
    G: Tensor | None = None
    S: Tensor | None = None
    Q_b: Tensor | None = None
    B_b: Tensor | None = None

    def are_of_base(self) -> bool:
        """Whether the base counts by itself in the gradients."""
        return any(c is not None for c in (self.D, self.Q, self.Q_b, self.B_b))


COEFFICIENTS = Coefficients._fields


class Gradients(NamedTuple):
    """Where the gradients go: [*, width] of a matrix, one number for each row of a scale; None: not wanted."""

    base: Tensor | None = None
    aux: Tensor | None = None
    base_scale: Tensor | None = None
    aux_scale: Tensor | None = None


class Kernels(Protocol):
    """An implementation: native.py, cuda.py, triton/launch.py. Arguments have been checked.

    native.py has `losses` too, of several problems with one base.
    """

    def scan(self, problem: Problem, wanted: int) -> list[Tensor]:
        """The wanted fields of every row, stacked as `empty_rows` makes them."""

    def loss(
        self, problem: Problem, normalizer: float | Tensor | None, terms: LossTerms, wanted: int, grads: Gradients
    ) -> tuple[Tensor, list[Tensor]]:
        """(0-d loss, the wanted fields) and the gradients, divided too: contiguous and as wide as the matrices."""

    def backward(self, problem: Problem, state: RowState, coefficients: Coefficients, grads: Gradients) -> None:
        """The gradients that the coefficients make."""

    def rescale_(self, grad: Tensor, factor: Tensor, target: Tensor | None, ignore_index: int) -> None:
        """grad [*, V] *= factor (0-d) in place, but for ignored rows, which stay +0.0."""


# -- outputs -----------------------------------------------------------------------------------------------------------

_FLOAT_FIELDS = (1 << NUM_FLOAT_FIELDS) - 1


def compute_dtype(*values: Tensor) -> torch.dtype:
    """Arithmetic, loss and statistics are float32, or float64 if a source is."""
    for tensor in values:
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


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


def named_fields(wanted: int, outputs: list[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """An op's outputs as the wanted fields by name, and what follows them."""
    rows: list[Tensor] = []
    num_tensors = bool(wanted & _FLOAT_FIELDS) + bool(wanted & ~_FLOAT_FIELDS)
    for stacked in outputs[:num_tensors]:
        rows += stacked.unbind()
    return dict(zip(fields_in(wanted), rows, strict=True)), outputs[num_tensors:]


def empty_fields(problem: Problem, wanted: int) -> list[Tensor]:
    return empty_rows(problem.base.values, problem.shape(), problem.compute(), wanted)


def empty_gradients(problem: Problem, needs: list[Leaves]) -> Gradients:
    """Room for the gradients that are wanted of base and auxiliary: in the values' dtype, in the compute dtype."""
    base, aux, like = problem.base.values, problem.aux, problem.base.values
    of_base, of_aux = needs[0], needs[1] if aux is not None else Leaves(False, scale=False)
    rows = problem.shape() if of_base.scale or of_aux.scale else ()
    return Gradients(
        memory.empty(base, base.shape) if of_base.values else None,
        memory.empty(aux.values, aux.values.shape) if aux is not None and of_aux.values else None,
        like.new_empty(rows, dtype=problem.compute()) if of_base.scale else None,
        like.new_empty(rows, dtype=problem.compute()) if of_aux.scale else None,
    )


# -- checks ------------------------------------------------------------------------------------------------------------


def check_wanted(wanted: int, target: Tensor | None) -> None:
    if wanted < 0 or wanted >> len(FIELDS):
        raise ValueError(f"wanted must be a mask of request.FIELDS, got {wanted}")
    if wanted & OF_TARGET and target is None:
        raise ValueError("target must be given for the fields of a target, got None")


def check_coefficients(given: list[Tensor | None], state: RowState, request: Request) -> Coefficients:
    """By name: as many as there are, with the row state that they need, one number for each row."""
    if len(given) != len(COEFFICIENTS):
        raise ValueError(f"coefficients must be the {len(COEFFICIENTS)} of request.COEFFICIENTS, got {len(given)}")
    coefficients = Coefficients(*given)
    for names, needed, name in (
        (("G",), state.nll, "nll"),
        (("D", "Q", "Q_b"), state.base_max, "base_max"),
        (("Q", "Q_b"), state.base_log_denom, "base_log_denom"),
        (("G", "B_b"), request.target, "target"),
    ):
        if needed is None and any(getattr(coefficients, c) is not None for c in names):
            raise ValueError(f"{name} must be given for the coefficients {', '.join(names)}, got None")
    shape = request.shape()
    for name, values in (*state._asdict().items(), *coefficients._asdict().items()):
        if values is not None and values.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(values.shape)}")
        if values is not None and values.device != request.first().device:
            raise ValueError(f"{name} must be on {request.first().device}, got {values.device}")
    return coefficients


def raise_out_of_range(target: Tensor, vocab_size: int, ignore_index: int) -> None:
    """IndexError for a CPU target that names no class; a GPU's cannot be looked at without waiting for it."""
    if target.device.type != "cpu":
        return
    bad = ((target < 0) | (target >= vocab_size)) & ~is_ignored(target, ignore_index)
    if bool(bad.any()):
        row = int(bad.flatten().nonzero()[0])
        value = int(target.flatten()[row])
        raise IndexError(checks.in_range_message(target.shape, row, value, vocab_size, ignore_index))
